"""The accuracy benchmark: its runs are repeatable and cached, methods start alike, tables follow from the results."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.fixture
def accuracy(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import accuracy
    import report

    short = {"float_steps": 3, "steps": 10, "batch_size": 8}
    tasks = {name: dataclasses.replace(task, **short) for name, task in accuracy.TASKS.items()}
    for module in (accuracy, report):
        monkeypatch.setattr(module, "TASKS", tasks)
    monkeypatch.setattr(accuracy.torch, "set_num_threads", lambda _: None)
    yield accuracy
    for name in ("accuracy", "report", "methods", "tasks", "lsq"):
        sys.modules.pop(name, None)


def settings(accuracy, results, name, seed=0, bits=(3, 3)):
    lr = None if name == "rtn" else 1e-3
    return accuracy.settings_of(accuracy.TASKS["resnet"], name, bits, lr, seed, results)


def test_a_run_is_repeatable_and_found_again(accuracy, tmp_path):
    results = accuracy.Results(tmp_path / "results.jsonl")
    for name in ("rtn", "lsq", "cpq", "cpq-distilled"):
        chosen = settings(accuracy, results, name)
        line, again = (accuracy.run(chosen, str(tmp_path / "float")) for _ in range(2))
        for result in (line["result"], again["result"]):
            result.pop("seconds", None)
        assert line == again
        results.add(line)
    reread = accuracy.Results(tmp_path / "results.jsonl")
    assert reread.runs == results.runs
    assert reread.get(chosen)["test"] == line["result"]["test"]
    assert reread.get(chosen | {"seed": 1}) is None
    (folder,) = (tmp_path / "float").iterdir()  # trained once
    assert folder.name == "resnet-0-3.safetensors"
    distances = {key: result["cluster_distance"] for key, result in results.runs.items()}
    assert all(0.2 < distance < 0.3 for distance in distances.values())


def test_learned_lengths_are_taken_over(accuracy, tmp_path):
    results = accuracy.Results(tmp_path / "results.jsonl")
    assert settings(accuracy, results, "cpq-learned-fixed") is None
    line = accuracy.run(settings(accuracy, results, "cpq-learned"), str(tmp_path / "float"))
    assert line["result"]["mean_bits"] <= 3
    results.add(line)
    fixed = accuracy.run(settings(accuracy, results, "cpq-learned-fixed"), str(tmp_path / "float"))
    assert fixed["result"]["layer_bits"] == line["result"]["layer_bits"]
    assert fixed["result"]["mean_bits"] == line["result"]["mean_bits"]


def test_all_methods_see_the_same_batches_and_weights(accuracy, tmp_path):
    task = accuracy.TASKS["resnet"]
    part = task.parts(0).train
    seen = []
    for method in ("lsq", "cpq"):
        model = accuracy.float_model(task, 0, tmp_path)
        model = accuracy.PREPARE[method](model, (3, 3), accuracy.take(part, slice(0, 64)))
        images = []
        model.register_forward_pre_hook(
            lambda _, args, kwargs, images=images: images.append(kwargs["pixel_values"]), with_kwargs=True
        )
        start = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("convolution.weight")}
        accuracy.train(model, part, task, 3, 1e-3, 5, method == "cpq")
        seen.append((start, torch.stack(images)))
    assert torch.equal(seen[0][1], seen[1][1])
    assert seen[0][0].keys() == seen[1][0].keys()
    assert all(torch.equal(value, seen[1][0][name]) for name, value in seen[0][0].items())


def test_the_report(accuracy, tmp_path, monkeypatch, capsys):
    import report

    results = accuracy.Results(tmp_path / "accuracy.jsonl")
    monkeypatch.setattr(accuracy, "RATES", dict.fromkeys(accuracy.TASKS, (1e-3,)))
    monkeypatch.setitem(accuracy.TUNING_SEEDS, "resnet", 1)
    task = accuracy.TASKS["resnet"]
    for seed in range(2):
        results.add(accuracy.run(accuracy.float_settings(task, seed), str(tmp_path / "float")))
        for name in ("rtn", "lsq", "cpq", "cpq-learned"):
            results.add(accuracy.run(settings(accuracy, results, name, seed), str(tmp_path / "float")))
    for name in ("lsq", "cpq"):  # the rate is tuned at 2 bits
        results.add(accuracy.run(settings(accuracy, results, name, 0, (2, 2)), str(tmp_path / "float")))
    page = tmp_path / "results.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["", "--results", str(results.path), "--page", str(page), "--seeds", "2"])
    report.main()
    printed = capsys.readouterr().out
    written = page.read_text()
    assert written == f"before\n{report.BEGIN}\n\n{printed}{report.END}\nafter\n"
    assert "**resnet, W3A3** (accuracy; float" in printed
    rows = [line for line in printed.splitlines() if line.startswith("| CPQ, learned")]
    assert len(rows) == 1
    lines = [json.loads(line) for line in results.path.read_text().splitlines()]
    learned = [line["result"]["test"] for line in lines if "target_bits" in line["options"]]
    assert f"| {sum(learned) / len(learned):.2f} ± " in rows[0]
    for picture in ("metric.png", "lengths.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
