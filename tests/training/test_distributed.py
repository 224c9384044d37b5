"""What several processes must agree on, with real processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import auto_class, inputs, logits
from safetensors.torch import load_file

from cpq_hf import pack_model, summarize

HERE = Path(__file__).parent


def run(command: list[str]) -> subprocess.CompletedProcess:
    path = os.pathsep.join(
        [str(HERE.parent), str(HERE.parent / "hf"), os.environ.get("PYTHONPATH", "")]
    )  # files imported
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)


def torchrun(name: str, *arguments: str) -> str:
    """Run a script of this folder in two processes; it says "equal" when all went well."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run([*launch, str(HERE / name), *arguments])
    assert done.returncode == 0, done.stderr
    assert "equal" in done.stdout
    return done.stdout


def train(folder: Path, launcher: str, *arguments: str) -> dict[str, torch.Tensor]:
    """Train by distributed_training.py; parameters, buffers and losses at the end."""
    folder.mkdir()
    if launcher == "one":
        done = run([sys.executable, str(HERE / "distributed_training.py"), str(folder), *arguments])
        assert done.returncode == 0, done.stderr
    else:
        torchrun("distributed_training.py", str(folder), "--launcher", launcher, *arguments)
    return load_file(folder / "outcome.safetensors")


def assert_close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        # processes add up gradients in another order; Adam makes an update of full size of the smallest of them
        assert torch.allclose(got[name], value, rtol=1e-4, atol=2e-4), name


@pytest.mark.shows("every rank has the same activation grid", "torchrun")
def test_every_rank_ends_up_with_the_same_activation_grid():
    torchrun("distributed_calibration.py")


@pytest.mark.shows(
    "two processes train as one, to 2e-4; resumed with learned lengths: the same bits", "torchrun, Trainer"
)
@pytest.mark.parametrize("launcher", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_and_resume_exactly(launcher, tmp_path):
    """The same parameters on the same global batch; with learned lengths, whose masks each process draws for itself,
    a resumed run is the straight one, before the decision and after it."""
    assert_close(train(tmp_path / "both", launcher), train(tmp_path / "alone", "one"))
    options = ("--learn", "--steps", "6")
    together = train(tmp_path / "together", launcher, *options)
    checkpoints = tmp_path / "together" / "checkpoints"
    resumed = train(tmp_path / "resumed", launcher, *options, "--resume", str(checkpoints / "checkpoint-2"))
    for name, value in together.items():
        assert torch.equal(resumed[name], value), name

    # what was saved during training is a whole checkpoint: one process loads it, packs it, and the outputs stay
    model = auto_class("llama").from_pretrained(checkpoints / "checkpoint-6")
    saved = model.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in together.items() if name != "losses")
    batch = inputs("llama", seed=4)
    trained = logits(model, batch)
    assert summarize(model).mean_bits <= 3
    pack_model(model).save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(auto_class("llama").from_pretrained(tmp_path / "packed"), batch), trained)


@pytest.mark.slow
@pytest.mark.shows(
    "saved by two processes, resumed by one, and the other way round: as one process, to 2e-4", "torchrun"
)
def test_the_number_of_processes_may_change_on_resume(tmp_path):
    options = ("--steps", "4")
    straight = train(tmp_path / "one", "one", *options)
    train(tmp_path / "two", "ddp", *options)
    for first, then in (("one", "ddp"), ("two", "one")):
        checkpoint = str(tmp_path / first / "checkpoints" / "checkpoint-2")
        assert_close(train(tmp_path / f"{first}-then-{then}", then, *options, "--resume", checkpoint), straight)


@pytest.mark.shows("FSDP2 trains as one process: tied embeddings, fused experts", "torchrun, Trainer")
@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama-tied", "mixtral"])
def test_fsdp2_with_shared_and_stacked_weights(model, tmp_path):
    alone = train(tmp_path / "alone", "one", "--model", model)
    assert_close(train(tmp_path / "together", "fsdp2", "--model", model), alone)


@pytest.mark.shows("DeepSpeed ZeRO-2 and ZeRO-3 train as one process, to 2e-4, and resume", "torchrun, Trainer")
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed_trains_as_one_process(stage, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    alone, together = train(tmp_path / "alone", "one"), train(tmp_path / "together", stage)
    assert_close(together, alone)
    checkpoint = str(tmp_path / "together" / "checkpoints" / "checkpoint-2")
    assert_close(train(tmp_path / "resumed", stage, "--resume", checkpoint), alone)


@pytest.mark.shows("accumulation in two processes", "torchrun, Trainer")
@pytest.mark.parametrize("launcher", ["ddp", "fsdp2"])
def test_accumulation_in_two_processes(launcher, tmp_path):
    plain = train(tmp_path / "plain", "ddp")
    assert_close(train(tmp_path / "accumulated", launcher, "--accumulation", "2"), plain)


@pytest.mark.shows("an error on one rank ends all", "torchrun, Trainer")
def test_an_error_on_one_rank_ends_all(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run([*launch, str(HERE / "distributed_training.py"), str(tmp_path), "--launcher", "ddp",
                "--fail_on_rank", "1"])  # fmt: skip
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.shows("a sharded model is summarized as a whole, and not packed in place", "torchrun")
def test_a_model_that_is_spread_over_processes_is_not_packed_in_place():
    torchrun("distributed_sharded.py")
