"""The paper's experiments as a user runs them: the launcher as a program, two steps, on small folders of images."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

PAPER = Path(__file__).parents[2] / "recipes" / "paper"
CUT_OFF = """
import sys
sys.path.insert(0, {paper!r})
import cpq_hf, run, training

class CPQCallback(cpq_hf.CPQCallback):
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise SystemExit("cut off")

training.CPQCallback = CPQCallback
run.main()
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Forty digits of 28x28, twenty of 32x32 and 224x224, in the "imagefolder" format."""
    root = tmp_path_factory.mktemp("images")
    images, labels = load_digits(return_X_y=True)
    for size, mode, count in ((28, "L", 40), (32, "RGB", 20), (224, "RGB", 20)):
        for number in range(count):
            folder = root / str(size) / ("train" if number < count - 10 else "test") / str(labels[number])
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (images[number].reshape(8, 8) * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).convert(mode).resize((size, size)).save(folder / f"{number}.png")
    return root


def python(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def launch(cwd: Path, *arguments: str) -> str:
    done = python(cwd, str(PAPER / "run.py"), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lines(cwd: Path) -> list[dict]:
    return [json.loads(line) for line in (cwd / "runs/paper/results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_all_variants_cut_off_resumed_and_tabled(folders, tmp_path):
    arguments = ["lenet5-mnist", "--data", str(folders / "28"), "--max_steps", "2", "--bits", "3", "2"]
    done = python(tmp_path, "-c", CUT_OFF.format(paper=str(PAPER)), *arguments)
    assert done.returncode == 1
    assert "cut off" in done.stderr
    assert [line["settings"]["variant"] for line in lines(tmp_path)] == ["float"]

    launch(tmp_path, *arguments)
    found = lines(tmp_path)
    runs = [(line["settings"]["variant"], line["settings"].get("bits")) for line in found]
    assert runs == [("float", None), ("plain", 3), ("dropbits", 3), ("learned", 3), ("learned-fixed", 3), ("plain", 2)]
    assert [line["result"]["resumed"] for line in found] == [False, True, False, False, False, False]
    results = {run: line["result"] for run, line in zip(runs, found, strict=True)}
    assert results["plain", 2]["layer_bits"] == dict.fromkeys(["features.0", "features.3", "head.0", "head.2"], 2)
    assert results["learned", 3]["mean_bits"] <= 3
    assert results["learned-fixed", 3]["layer_bits"] == results["learned", 3]["layer_bits"]
    assert len({results[run]["loss"] for run in runs}) == len(runs)
    for line in found:
        assert line["settings"]["data"] == "28"  # not where it was
        assert line["result"]["steps"] == 2
        assert 0 <= line["result"]["top5_error"] <= line["result"]["top1_error"] <= 100

    assert "error" not in launch(tmp_path, *arguments)
    assert lines(tmp_path) == found  # the second call ran nothing
    assert sorted(path.suffix for path in (tmp_path / "runs/paper").iterdir()) == [".jsonl", ".safetensors"]

    page = tmp_path / "page.md"
    page.write_text((PAPER / "README.md").read_text())
    written = [{**line, "settings": line["settings"] | {"max_steps": -1}} for line in found]
    again = {"settings": written[1]["settings"] | {"seed": 1}, "result": written[1]["result"] | {"top1_error": 20}}
    rows = write_table(tmp_path, [*written, again, found[1]], page)
    assert "7 runs in the table, 1 with --max_steps left out" in rows.stdout
    table = {tuple(row[:3]): row[3:] for row in cells(page)}
    one, two = results["plain", 2], (results["plain", 3]["top1_error"], 20)
    assert table["lenet5-mnist", "2/2", "plain"][1] == f"{one['top1_error']:.2f}"
    assert table["lenet5-mnist", "3/3", "plain"][1] == f"{np.mean(two):.2f} ± {np.std(two, ddof=1):.2f}"
    assert table["lenet5-mnist", "3/3", "plain"][-2:] == ["3.00 ± 0.00", "2"]
    assert table["vgg7-cifar10", "4/4", "learned"][:2] == ["not verified", "open"]

    other = {"settings": written[1]["settings"] | {"data": "other"}, "result": written[1]["result"]}
    assert "differ in data" in write_table(tmp_path, [*written, other], page).stderr
    page.write_text("no marks")
    assert "add them" in write_table(tmp_path, written, page).stderr


def write_table(cwd: Path, results: list[dict], page: Path) -> subprocess.CompletedProcess[str]:
    (cwd / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in results))
    return python(cwd, str(PAPER / "table.py"), "--results", "results.jsonl", "--page", str(page))


def cells(page: Path) -> list[list[str]]:
    rows = [line for line in page.read_text().splitlines() if line.count("|") == 9]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_page_has_the_table_that_is_empty():
    rows = {tuple(row[:3]): row for row in cells(PAPER / "README.md")[2:]}
    assert len(rows) == 4 * (1 + 4 + 4 + 1)
    published = {row[3] for row in rows.values()}
    assert published == {"not verified"}  # numbers enter with their source


def test_vgg7_on_32_pixels(folders, tmp_path):
    launch(
        tmp_path, "vgg7-cifar10", "--data", str(folders / "32"), "--max_steps", "2", "--bits", "4",
        "--variants", "plain",
    )  # fmt: skip
    layers = lines(tmp_path)[-1]["result"]["layer_bits"]
    assert list(layers.values()) == [4] * 8


@pytest.mark.parametrize(
    ("experiment", "model"),
    [
        ("resnet18-imagenet", ResNetForImageClassification(ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=10))),
        ("mobilenetv2-imagenet", MobileNetV2ForImageClassification(MobileNetV2Config(
            depth_multiplier=0.1, num_labels=11))),
    ],
    ids=["resnet", "mobilenet"],
)  # fmt: skip
def test_pretrained_model_on_224_pixels(folders, tmp_path, experiment, model):
    """A small model stands in for that of the Hub; that of MobileNetV2 has a background class."""
    model.save_pretrained(tmp_path / "small")
    launch(
        tmp_path, experiment, "--data", str(folders / "224"), "--max_steps", "2", "--bits", "2",
        "--variants", "plain", "--model", "small",
    )  # fmt: skip
    found = lines(tmp_path)
    assert [line["settings"]["start"] for line in found] == ["small", "small"]
    assert [line["result"]["steps"] for line in found] == [0, 2]
    modules = {name for name, module in model.named_modules() if type(module).__name__ in ("Conv2d", "Linear")}
    assert set(found[1]["result"]["layer_bits"]) == modules  # the first and the last layer, too


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["resnet18-imagenet", "mobilenetv2-imagenet"])
def test_full_model_on_224_pixels(folders, tmp_path, experiment):
    launch(
        tmp_path, experiment, "--data", str(folders / "224"), "--max_steps", "2", "--bits", "3",
        "--variants", "plain", "--random_init",
    )  # fmt: skip
    assert [line["settings"]["start"] for line in lines(tmp_path)] == ["random", "random"]


@pytest.mark.slow
def test_two_processes_write_one_line_a_run(folders, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(PAPER / "run.py"), "lenet5-mnist", "--data", str(folders / "28"),
         "--max_steps", "2", "--bits", "3"],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = lines(tmp_path)
    assert [line["settings"]["variant"] for line in found] == [
        "float",
        "plain",
        "dropbits",
        "learned",
        "learned-fixed",
    ]
    assert {line["result"]["processes"] for line in found} == {2}


BAD = """
import sys
sys.path.insert(0, {paper!r})
import run

for source in sys.argv[1:]:
    sys.argv = ["run.py", "lenet5-mnist", "--data", source]
    try:
        run.main()
    except SystemExit as error:
        print(error)
"""


def test_bad_data_folders(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat/train").mkdir(parents=True)
    shutil.copytree(folders / "28/train", tmp_path / "half/train")
    (tmp_path / "flat/test").mkdir()
    for part in ("train", "test"):
        Image.new("L", (28, 28)).save(tmp_path / f"flat/{part}/0.png")
    done = python(tmp_path, "-c", BAD.format(paper=str(PAPER)), "nowhere", "empty", "half", "flat")
    assert done.returncode == 0, done.stderr
    messages = done.stdout.splitlines()
    assert len(messages) == 4, messages
    for message, reason in zip(
        messages, ("no data set", "no data set", "has the parts", "no image with"), strict=True
    ):
        assert message.startswith("error: ")
        assert reason in message
        assert "a folder needs `train/<class>/*.png`" in message
