"""Recipes as a user runs them: as programs, for a few steps."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PreTrainedTokenizerBase,
)

import cpq_hf
from cpq_hf import CPQConfig, CPQError

RECIPES = Path(__file__).parents[2] / "recipes"
DIRECT: tuple[str, ...] = ()
ACCELERATE = ("-m", "accelerate.commands.launch", "--config_file", str(RECIPES / "accelerate" / "cpu.yaml"))
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
RECIPE_NAMES = ("image_classification", "text_classification", "causal_lm", "distill", "accelerate_loop")


def run(script: str, *arguments: str, cwd: Path, launcher: tuple[str, ...] = DIRECT) -> str:
    done = subprocess.run(
        [sys.executable, *launcher, str(RECIPES / script), *arguments],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def scores(printed: str) -> dict[str, str]:
    """The table at the end: it is there once, and the packed model does as well as the trained one."""
    rows = [line.split() for line in printed.splitlines()]
    table = {row[0]: row[-1] for row in rows if row and row[0] in ("float", "rounded", "trained", "reloaded")}
    assert sum(row[:1] == ["reloaded"] for row in rows) == 1
    assert table["trained"] == table["reloaded"]
    return table


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"'loss': '?([0-9.]+)", printed)]


def same_weights(one: Path, other: Path) -> bool:
    name = "cpq_model.safetensors"
    return (one / name).read_bytes() == (other / name).read_bytes()


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def main(name: str, *arguments: str) -> None:
    """A recipe as a program, but in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Digits in the layout of an image folder of the Hub: a subfolder for each class, only a part to train."""
    images, labels = load_digits(return_X_y=True)
    for number, (image, label) in enumerate(zip(images[:200], labels, strict=False)):
        folder = tmp_path / "pictures" / "train" / f"digit-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image.reshape(8, 8) * 15).astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "pictures"


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """Reviews as a data set of two files of JSON lines."""
    folder = tmp_path / "reviews"
    folder.mkdir()
    for part, count in (("train", 40), ("test", 20)):
        rows = [{"review": f"{'good' if i % 2 else 'bad'} number {i} " * 8, "stars": i % 2} for i in range(count)]
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def metric_folder(tmp_path: Path) -> Path:
    """A metric of one's own in the form of the Hub: a script of the name of its folder. It counts what is wrong."""
    folder = tmp_path / "mistakes"
    folder.mkdir()
    (folder / "mistakes.py").write_text(
        """
import datasets
import evaluate


class Mistakes(evaluate.Metric):
    def _info(self):
        kind = datasets.Value("int64")
        features = datasets.Features({"predictions": kind, "references": kind})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"mistakes": sum(p != r for p, r in zip(predictions, references)), "rows": len(references)}
"""
    )
    return folder


def test_quickstart(tmp_path):
    printed = run("quickstart.py", "--max_steps", "2", cwd=tmp_path)
    table = [line.split() for line in printed.splitlines() if line.startswith(("float ", "w4a4 ", "w2a4 "))]
    assert [row[0] for row in table] == ["float", "w4a4", "w2a4"]
    for _, _, trained, reloaded, bits, *_ in table[1:]:
        assert trained == reloaded
        assert bits in ("4.00", "2.00")
    assert "cpq/cluster_distance" not in printed  # two steps log nothing
    assert (tmp_path / "runs/quickstart/weights.png").stat().st_size > 10_000
    assert "Next: put your own model" in printed


@pytest.mark.slow
def test_step_time_benchmark(tmp_path):
    precision = ("--precisions", "bfloat16 autocast")
    printed = run("benchmarks/step_time.py", "--rounds", "2", "--models", "resnet", *precision, cwd=tmp_path)
    rows = {line.split(" | ")[0]: line.split(" | ") for line in printed.splitlines() if line.startswith("| ")}
    assert {"| float", "| LSQ", "| CPQ", "| CPQ, DropBits 0.1", "| CPQ, oscillating frozen"} <= rows.keys()
    assert float(rows["| float"][2]) == float(rows["| LSQ"][3]) == 1.0
    assert float(rows["| CPQ"][4].strip(" |")) > 10  # MB


@pytest.mark.slow
def test_kernels_benchmark(tmp_path):
    settings = ("--millions", "0.1", "--bits", "2", "--granularities", "tensor", "channel", "group")
    printed = run("benchmarks/kernel_time.py", *settings, "--rounds", "2", cwd=tmp_path)
    assert printed.count("| CPQ |") == 3
    assert printed.count("| LSQ |") == 3  # of groups, too
    peaks = [float(line.split()[-2]) for line in printed.splitlines() if line.endswith(" MB")]
    assert peaks[1] < peaks[0] < peaks[2]  # CPQ, LSQ, textbook


@pytest.mark.shows("image recipe, stopped and resumed: the same packed file", "the program")
def test_image_classification_stopped_and_resumed(tmp_path):
    steps = ("--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--learn_bits", "--target_bits", "3")
    steps += ("--gradient_accumulation_steps", "2", "--logging_steps", "1")
    printed = run("image_classification.py", *steps, cwd=tmp_path)
    scores(printed)
    assert len(losses(printed)) == 8
    assert max(losses(printed)) < 4  # a mean, not a sum, over what was accumulated: guessing among ten gives 2.3
    output = tmp_path / "runs/image_classification"
    packed = (output / "packed").rename(tmp_path / "uninterrupted")
    run("image_classification.py", *steps, "--resume_from_checkpoint", str(output / "checkpoint-2"), cwd=tmp_path)
    assert same_weights(output / "packed", packed)
    assert cpq_hf.verify_checkpoint(packed)["layers"] == 9
    assert {"config.json", "preprocessor_config.json"} <= {file.name for file in packed.iterdir()}
    assert "mean 2." in printed or "mean 3.00" in printed


def test_image_classification_with_model_and_data_of_folders(tmp_path, image_folder):
    recipe = load("image_classification")
    names = [f"digit-{label}" for label in reversed(range(10))]  # another order than that of the data
    model, processor = recipe.load_float(recipe.Arguments(architecture="vit"), names)
    model.save_pretrained(tmp_path / "vit")
    processor.save_pretrained(tmp_path / "vit")
    arguments = ("--model_name_or_path", "vit", "--dataset_name", str(image_folder), "--max_steps", "2")
    printed = run("image_classification.py", *arguments, cwd=tmp_path, launcher=ACCELERATE)
    scores(printed)
    config = json.loads((tmp_path / "runs/image_classification/packed/config.json").read_text())
    assert config["label2id"]["digit-9"] == 0


@pytest.mark.parametrize(("name", "rows"), [("image_classification", 40), ("text_classification", 20)])
def test_metric_of_a_folder(name, rows, tmp_path, image_folder, text_folder, metric_folder):
    data = {
        "image_classification": ("--dataset_name", str(image_folder)),
        "text_classification": (
            "--dataset_name",
            str(text_folder),
            "--text_column",
            "review",
            "--label_column",
            "stars",
        ),
    }
    printed = run(f"{name}.py", *data[name], "--metric", str(metric_folder), "--max_steps", "2", cwd=tmp_path)
    table = scores(printed)
    assert set(table) == {"float", "rounded", "trained", "reloaded"}
    for score in table.values():
        assert float(score) in range(rows + 1)  # counted in rows, not a share of them
    assert "mistakes" in printed


@pytest.mark.shows("image recipe", "torchrun, two processes")
def test_image_classification_in_two_processes(tmp_path):
    printed = run("image_classification.py", "--max_steps", "2", cwd=tmp_path, launcher=TWO_PROCESSES)
    scores(printed)


@pytest.mark.parametrize("architecture", ["resnet", "vit", "mobilenet_v2", "convnext"])
def test_small_images_models_quantize(architecture):
    recipe = load("image_classification")
    model, processor = recipe.load_float(recipe.Arguments(architecture=architecture), [str(i) for i in range(10)])
    inputs = processor([Image.new("RGB", (8, 8))] * 2, return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)
    cpq_hf.prepare_model(model, CPQConfig(activation_bits=4))
    assert model.train()(**inputs, labels=torch.tensor([0, 1])).loss.isfinite()
    cpq_hf.pack_model(model)


@pytest.mark.shows("text recipe", "the program")
def test_text_classification(tmp_path):
    printed = run("text_classification.py", "--max_steps", "2", "--activation_bits", "8", cwd=tmp_path)
    scores(printed)


def test_text_classification_with_model_and_data_of_folders(tmp_path, text_folder):
    texts = [json.loads(line)["review"] for line in (text_folder / "train.jsonl").read_text().splitlines()]
    tokenizer = BertTokenizer().train_new_from_iterator(texts, 200, show_progress=False)
    tokenizer.save_pretrained(tmp_path / "bert")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=5, **shape))
    model.save_pretrained(tmp_path / "bert")
    names = ("--model_name_or_path", "bert", "--dataset_name", str(text_folder))
    columns = ("--text_column", "review", "review", "--label_column", "stars")
    steps = ("--max_steps", "2", "--output_dir", "out")
    batches = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4", "--logging_steps", "1")
    printed = run("text_classification.py", *names, *columns, *steps, *batches, cwd=tmp_path, launcher=ACCELERATE)
    scores(printed)
    assert max(losses(printed)) < 2  # a mean, not a sum, over what was accumulated: guessing among two gives 0.7
    config = json.loads((tmp_path / "out/packed/config.json").read_text())
    assert config["label2id"] == {"0": 0, "1": 1}  # the five classes of the model have given way to those of the data


@pytest.mark.shows("language model recipe", "the program")
def test_causal_lm(tmp_path):
    printed = run("causal_lm.py", "--max_steps", "2", "--block_size", "64", cwd=tmp_path)
    assert float(scores(printed)["float"]) > 1


def test_causal_lm_with_model_and_data_of_folders(tmp_path, text_folder):
    texts = [json.loads(line)["review"] for line in (text_folder / "train.jsonl").read_text().splitlines()]
    tokenizer = GPT2Tokenizer().train_new_from_iterator(texts, 300, show_progress=False)
    tokenizer.save_pretrained(tmp_path / "gpt2")
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32))
    model.save_pretrained(tmp_path / "gpt2")
    names = ("--model_name_or_path", "gpt2", "--dataset_name", str(text_folder), "--text_column", "review")
    steps = ("--max_steps", "2", "--block_size", "32", "--granularity", "tensor")
    printed = run("causal_lm.py", *names, *steps, cwd=tmp_path, launcher=ACCELERATE)
    scores(printed)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_small_language_models_quantize(architecture):
    recipe = load("causal_lm")
    model, tokenizer = recipe.load_float(recipe.Arguments(architecture=architecture), ["import os, sys"] * 20)
    ids = torch.tensor([tokenizer("import os, sys")["input_ids"]])
    cpq_hf.prepare_model(model, CPQConfig())
    assert model.train()(input_ids=ids, labels=ids).loss.isfinite()


@pytest.mark.slow
@pytest.mark.shows("distillation recipe, stopped and resumed: the same packed files", "accelerate launch")
def test_distill_stopped_and_resumed(tmp_path):
    steps = ("--max_steps", "4", "--block_size", "64", "--save_strategy", "steps", "--save_steps", "2")
    printed = run("distill.py", *steps, cwd=tmp_path, launcher=ACCELERATE)
    wanted = {row[0]: row[1:] for row in map(str.split, printed.splitlines()) if row[:1] in (["alone"], ["distilled"])}
    assert wanted["alone"][0] == wanted["distilled"][0]  # one start
    assert wanted["alone"][1] != wanted["distilled"][1]
    assert all(trained == reloaded for _, trained, reloaded in wanted.values())
    output = tmp_path / "runs/distill"
    shutil.copytree(output, tmp_path / "whole")

    def stop(*gone: str) -> None:
        for name in gone:
            shutil.rmtree(output / name)

    def resume(checkpoint: str) -> None:
        printed = run("distill.py", *steps, "--resume_from_checkpoint", checkpoint, cwd=tmp_path)
        got = {
            row[0]: row[1:] for row in map(str.split, printed.splitlines()) if row[:1] in (["alone"], ["distilled"])
        }
        assert got == wanted
        for name in wanted:
            assert same_weights(output / name / "packed", tmp_path / "whole" / name / "packed")

    # in the middle of the second copy: the first is left as it is
    stop("distilled/packed", "distilled/trained", "distilled/checkpoint-4", "alone/checkpoint-2", "alone/checkpoint-4")
    before = (output / "alone/trained/model.safetensors").stat().st_mtime_ns
    resume("True")
    assert (output / "alone/trained/model.safetensors").stat().st_mtime_ns == before
    assert not list((output / "alone").glob("checkpoint-*"))
    # in the middle of the first copy: the second begins at its start
    stop("alone", "distilled")
    shutil.copytree(tmp_path / "whole/alone/checkpoint-2", output / "alone/checkpoint-2")
    resume("runs/distill/alone/checkpoint-2")


@pytest.mark.shows("loop recipe, stopped and resumed: the same packed file", "accelerate launch")
def test_accelerate_loop_stopped_and_resumed(tmp_path):
    steps = ("--max_steps", "4", "--save_steps", "2", "--activation_bits", "4", "--learn_bits", "--target_bits", "3")
    printed = run("accelerate_loop.py", *steps, cwd=tmp_path)
    scores(printed)
    output = tmp_path / "runs/accelerate_loop"
    packed = (output / "packed").rename(tmp_path / "uninterrupted")
    resume = ("--resume_from_checkpoint", str(output / "checkpoint-2"))
    run("accelerate_loop.py", *steps, *resume, cwd=tmp_path, launcher=ACCELERATE)
    assert same_weights(output / "packed", packed)


def test_accelerate_loop_with_model_and_data_of_folders(tmp_path, image_folder):
    recipe = load("image_classification")
    names = [f"digit-{label}" for label in reversed(range(10))]  # another order than that of the data
    model, processor = recipe.load_float(recipe.Arguments(architecture="vit"), names)
    model.save_pretrained(tmp_path / "vit")
    processor.save_pretrained(tmp_path / "vit")
    arguments = ("--model_name_or_path", "vit", "--dataset_name", str(image_folder), "--max_steps", "2")
    printed = run("accelerate_loop.py", *arguments, cwd=tmp_path, launcher=ACCELERATE)
    scores(printed)
    output = tmp_path / "runs/accelerate_loop"
    config = json.loads((output / "packed/config.json").read_text())
    assert config["label2id"]["digit-9"] == 0
    assert {"config.json", "preprocessor_config.json"} <= {file.name for file in (output / "packed").iterdir()}
    # without float epochs, the model is the one that was given
    assert (output / "float/model.safetensors").read_bytes() == (tmp_path / "vit/model.safetensors").read_bytes()


@pytest.mark.shows("loop recipe", "torchrun, two processes")
def test_accelerate_loop_in_two_processes(tmp_path):
    printed = run("accelerate_loop.py", "--max_steps", "2", cwd=tmp_path, launcher=TWO_PROCESSES)
    scores(printed)


@pytest.mark.parametrize("file", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_the_launch_files(file):
    config = load_config_from_file(str(file))
    assert config.num_processes == (1 if file.stem in ("cpu", "one_gpu") else 2)
    assert config.use_cpu == (file.stem == "cpu")


def test_what_is_pushed_is_the_packed_model(tmp_path, text_folder, monkeypatch):
    pushed = []

    def push_to_hub(part, name, private=None):
        pushed.append((type(part).__name__, name, private, getattr(part, "is_quantized", None)))

    monkeypatch.setattr("cpq_hf.hf.quantizer.push_to_hub", push_to_hub)
    monkeypatch.setattr(PreTrainedTokenizerBase, "push_to_hub", push_to_hub)
    data = ["--dataset_name", str(text_folder), "--text_column", "review", "--block_size", "32", "--max_steps", "1"]
    hub = ["--push_to_hub", "--hub_model_id", "me/tiny", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["causal_lm.py", *data, *hub])
    load("causal_lm").main()
    assert pushed == [("LlamaForCausalLM", "me/tiny", None, True), ("GPT2Tokenizer", "me/tiny", None, None)]


# --- what a user can get wrong ---


@pytest.mark.parametrize("name", ["image_classification", "accelerate_loop"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_column": "digit"}, r"no column 'digit'; set --label_column to one of: image, label$"),
        ({"image_column": "picture"}, r"no column 'picture'; set --image_column to one of: image, label$"),
        ({"image_column": "label"}, r"column 'label' holds no images; set --image_column"),
        ({"label_column": "image"}, r"column 'image' holds no classes; set --label_column"),
    ],
)
def test_columns_of_images(name, options, message):
    recipe = load(name)
    with pytest.raises(SystemExit, match=message):
        recipe.load_data(recipe.Arguments(**options), seed=0)


@pytest.mark.parametrize("name", ["image_classification", "accelerate_loop", "text_classification"])
@pytest.mark.parametrize("label", [None, -1])
def test_rows_without_a_class(name, label, monkeypatch):
    """As the parts to test of many data sets."""
    features = {"image": datasets.Image(), "text": datasets.Value("string")}
    features["label"] = datasets.ClassLabel(names=["no", "yes"]) if label == -1 else datasets.Value("string")
    picture, labels = Image.new("L", (8, 8)), [0, 1, label] if label == -1 else ["no", "yes", label]
    rows = {"image": [picture] * 3, "text": ["words"] * 3, "label": labels}
    part = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(train=part, test=part))
    recipe = load(name)
    with pytest.raises(SystemExit, match="column 'label' has rows without a class; leave them out first"):
        recipe.load_data(recipe.Arguments(dataset_name="any"), seed=0)


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_data_without_a_part_to_train(name, text_folder):
    (text_folder / "train.jsonl").unlink()
    recipe = load(name)
    with pytest.raises(SystemExit, match="no part 'train', only: test$"):
        recipe.load_data(recipe.Arguments(dataset_name=str(text_folder)), seed=0)


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (
            "text_classification",
            {"label_column": "label"},
            r"no column 'label'; set --label_column to one of: review, st",
        ),
        ("text_classification", {"text_column": ["stars"], "label_column": "stars"}, r"column 'stars' holds no text"),
        ("causal_lm", {"text_column": "text"}, r"no column 'text'; set --text_column to: review, stars"),
        ("causal_lm", {"text_column": "stars"}, r"column 'stars' holds no text"),
        ("distill", {"text_column": "text"}, r"no column 'text'; set --text_column to: review, stars"),
    ],
)
def test_columns_of_text(recipe, options, message, text_folder):
    recipe = load(recipe)
    with pytest.raises(SystemExit, match=message):
        recipe.load_data(recipe.Arguments(dataset_name=str(text_folder), **options), seed=0)


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_a_packed_model_is_not_overwritten(name, tmp_path, monkeypatch):
    (tmp_path / ("distilled/packed" if name == "distill" else "packed")).mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds a packed model; choose another --output_dir, or --overwrite"):
        load(name).main()


@pytest.mark.parametrize("name", RECIPE_NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weight_bits", "9"), "`weight_bits`"),
        (("--target_bits", "3"), "`target_bits`"),  # without --learn_bits
        (("--model_name_or_path", "no-such-folder"), "couldn't find them"),  # said by transformers, offline
        (("--dataset_name", "no-such-folder"), "no-such-folder"),
        (("--resume_from_checkpoint", "True"), "new/float"),  # of a run that never began
    ],
)
def test_a_mistake_ends_in_its_message_at_once(name, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as end:
        main(name, "--output_dir", "new", *options)
    assert isinstance(end.value.__cause__, CPQError | OSError)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", RECIPE_NAMES)
@pytest.mark.parametrize(
    "option", ["no_such_option", "packed", "layers", "checksums", "config_checksum", "format_version"]
)
def test_an_unknown_option(name, option, tmp_path, monkeypatch, capsys):
    """What a checkpoint stores is none."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(name, f"--{option}", "1")
    assert f"unrecognized arguments: --{option}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_help_explains_the_options(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit, match="0"):
        main(name, "--help")
    printed = " ".join(capsys.readouterr().out.split())
    default = 2 if name == "distill" else 4  # the recipe sets it
    assert f"Bit-width of weights, 2 to 8. (default: {default})" in printed
    assert "Repository of the float model, for the model card." in printed


def test_distill_resumes_from_its_own_checkpoints_only(tmp_path):
    with pytest.raises(SystemExit, match="elsewhere is no checkpoint in .*alone or .*distilled; give one, or True"):
        main("distill", "--output_dir", str(tmp_path), "--resume_from_checkpoint", str(tmp_path / "elsewhere"))


def test_too_little_text(tmp_path, text_folder, monkeypatch):
    names = ["--dataset_name", str(text_folder), "--text_column", "review", "--block_size", "100000"]
    monkeypatch.setattr(sys, "argv", ["causal_lm.py", "--output_dir", str(tmp_path), *names])
    with pytest.raises(SystemExit, match="too little text for one row of 100000 tokens"):
        load("causal_lm").main()


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_recipes_are_short(name):
    assert len((RECIPES / f"{name}.py").read_text().splitlines()) < 200
