"""`cpq-hf`: every verb on folders here and on a Hub; mistakes get one line and a code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from hub_server import Hub
from models import auto_class, build, inputs, logits
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GenerationConfig, PreTrainedTokenizerFast, ViTImageProcessorPil, pipeline

from cpq_hf import CPQConfig, cli, prepare_model, verify_checkpoint
from cpq_hf.export import default_inputs


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """`float`, `training` and `packed` checkpoints of one model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    build("llama-tied").save_pretrained(folder / "float")
    model = prepare_model(build("llama-tied"), CPQConfig(weight_bits=3, quantize_embeddings=True))
    model.save_pretrained(folder / "training")
    assert cli.main(["pack", str(folder / "training"), str(folder / "packed")]) == 0
    return folder


def test_pack(folders, tmp_path, capsys):
    batch, cls = inputs("llama-tied"), auto_class("llama-tied")
    trained, packed = (cls.from_pretrained(folders / name) for name in ("training", "packed"))
    assert torch.equal(logits(packed, batch), logits(trained, batch))
    command = ["pack", str(folders / "training"), str(tmp_path), "--max-shard-size", "4KB", "--json"]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"folder": str(tmp_path), "copied": []} | verify_checkpoint(tmp_path)
    assert len(found["files"]) > 1


def test_a_packed_folder_serves_a_pipeline(tmp_path, capsys):
    training, folder = tmp_path / "training", tmp_path / "packed"
    model = prepare_model(build("llama"), CPQConfig())
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(training)
    words = Tokenizer(WordLevel({str(number): number for number in range(40)}, unk_token="0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", chat_template="{{ messages }}")
    tokenizer.save_pretrained(training)
    (training / "trainer_state.json").write_text("{}")
    expected = pipeline("text-generation", model=str(training), device="cpu")("1 2 3", do_sample=False)
    assert cli.main(["pack", str(training), str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} == set(found["copied"])
    assert pipeline("text-generation", model=str(folder), device="cpu")("1 2 3", do_sample=False) == expected
    assert GenerationConfig.from_pretrained(folder).max_new_tokens == 3
    assert not (folder / "trainer_state.json").exists()
    assert cli.main(["pack", str(training), str(training)]) == 0  # in place
    assert "copied" not in capsys.readouterr().out


def test_a_packed_folder_serves_a_pipeline_of_images(tmp_path, capsys):
    training, folder, picture = tmp_path / "training", tmp_path / "packed", Image.new("RGB", (32, 32), "red")
    prepare_model(build("vit"), CPQConfig()).save_pretrained(training)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(training)
    assert cli.main(["pack", str(training), str(folder)]) == 0
    assert capsys.readouterr().out.endswith("; copied: preprocessor_config.json\n")
    scores = [pipeline("image-classification", model=str(path), device="cpu")(picture) for path in (training, folder)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_inspect_fits_the_terminal(columns, folders, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["inspect", str(folders / "packed"), "--plot", str(tmp_path / "bits.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert sum("linear" in line for line in lines) == 15
    assert "16,640 of 16,800 weights quantized (99.0%)" in " ".join(lines)
    assert (tmp_path / "bits.png").exists()
    if columns == 200:
        assert any(line.startswith("model.layers.0.self_attn.q_proj  linear     3     -    channel") for line in lines)


def test_inspect_as_json(folders, capsys):
    for name, packed in (("training", False), ("packed", True)):
        assert cli.main(["inspect", str(folders / name), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["class"], found["packed"], found["mean_bits"]) == ("LlamaForCausalLM", packed, 3.0)
        assert len(found["layers"]) == 16


def test_verify(folders, capsys):
    assert cli.main(["verify", str(folders / "packed")]) == 0
    assert "packed: whole: 50 tensors of 1 files, 16 packed layers" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["compressed-tensors", "onnx"])
def test_export(to, folders, tmp_path, capsys):
    target = tmp_path / "out"
    assert cli.main(["export", str(folders / "packed"), str(target), "--to", to, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"target": str(target), "format": to}
    if to == "onnx":
        names = [value.name for value in onnxruntime.InferenceSession(target).get_inputs()]
        assert names == ["input_ids", "attention_mask"]
    else:
        assert (target / "cpq_config.json").exists()


@pytest.mark.parametrize("name", ["resnet", "vit", "bert", "gpt2"])
def test_default_examples_fit_the_model(name):
    model = build(name)
    example = default_inputs(model)
    with torch.no_grad():
        assert len(model(**example).logits) == len(example[model.main_input_name])


MISTAKES = {
    "no such folder": (["verify", "/nowhere/at/all"], 1, "cpq-hf verify: /nowhere/at/all: no such folder\n"),
    "a relative folder": (["inspect", "./nowhere"], 1, "cpq-hf inspect: ./nowhere: no such folder\n"),
    "not quantized": (["inspect", "float"], 1, "float: nothing in this LlamaForCausalLM is quantized\n"),
    "not packed": (["verify", "training"], 1, "training was saved during training, it is not packed; call"),
    "not trained": (["pack", "float", "x"], 1, "the model is not prepared for training: load it with"),
    "packed already": (["pack", "packed", "x"], 1, "the model is packed: its weights are integers"),
    "not packed, pushed": (["push", "training", "me/x"], 1, "training was saved during training"),
    "offline": (["push", "packed", "me/x"], 1, "packed. To go on: cpq-hf push "),
    "no such verb": (["pak"], 2, "cpq-hf: argument VERB: invalid choice: 'pak'"),
    "no folder": (["pack", "training"], 2, "the following arguments are required: folder; see cpq-hf pack --help\n"),
    "no format": (["export", "packed", "x"], 2, "cpq-hf export: the following arguments are required: --to; see"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line(mistake, folders, capsys):
    arguments, code, message = MISTAKES[mistake]
    arguments = [str(folders / word) if (folders / word).is_dir() else word for word in arguments]
    try:
        assert cli.main(arguments) == code
    except SystemExit as exit_:
        assert exit_.code == code == 2  # noqa: PT017 - argparse leaves this way
    captured = capsys.readouterr()
    assert message in captured.err
    lines = [line for line in captured.err.splitlines() if "Loading weights" not in line]
    assert len(lines) == 1
    assert not captured.out


def test_weights_of_another_class(folders, tmp_path, capsys):
    config = json.loads((folders / "float" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["AutoConfig"]}))
    assert cli.main(["inspect", str(tmp_path)]) == 1
    assert "its config.json names 'AutoConfig', which is no model class of transformers" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["inspect", "pack", "export", "verify", "push"])
def test_help_shows_an_example(verb, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([verb, "--help"])
    assert f"example: cpq-hf {verb} " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--help"], ["pack", "--help"], ["pak"], ["export", "packed", "x"]], ids=" ".join
)
def test_the_command_line_is_read_before_torch_is_imported(arguments):
    script = f"""
import runpy, sys
main = runpy.run_path({str(Path(cli.__file__).with_name("start.py"))!r})["main"]
sys.argv = ["any-name.py", *{arguments}]
try:
    main()
except SystemExit:
    assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout.startswith("usage: cpq-hf"), done.stderr == "") == (arguments[-1] == "--help",) * 2


def test_the_command_as_a_module():
    command = [sys.executable, "-m", "cpq_hf.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout.startswith("usage: cpq-hf"), done.stderr) == (True, "")


def test_on_the_hub(folders, tmp_path):
    """Pushed, verified and inspected by the id."""
    hub = Hub()
    script = f"""
from cpq_hf.cli import main
from pathlib import Path
folder = {str(folders / "packed")!r}
Path(folder, "vocab.txt").write_text("a")
assert main(["push", folder, "me/model", "--private", "--revision", "v1", "--message", "First"]) == 0
assert main(["verify", "me/model", "--revision", "v1"]) == 0
assert main(["inspect", "me/model", "--revision", "v1", "--json"]) == 0
assert main(["verify", "me/nothing"]) == 1
assert main(["inspect", "me/model", "--revision", "v2"]) == 1
assert main(["push", folder, "me/refused"]) == 1
from cpq_hf.cli.commands import _copy_companions
assert _copy_companions("me/model", "v1", Path(folder).parent) == ["vocab.txt"]
"""
    environment = os.environ | hub.environment(tmp_path)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    hub.close()
    assert done.returncode == 0, done.stderr
    assert hub.created[0] == ("me/model", True)
    assert [(commit["summary"], commit["branch"]) for commit in hub.commits] == [("First", "v1")]
    pushed, verified, *inspected = done.stdout.splitlines()
    assert pushed.startswith(f"pushed: {hub.url}/me/model/commit/")
    assert verified.startswith("me/model: whole: 50 tensors")
    assert json.loads("\n".join(inspected))["model"] == "me/model"
    errors = [line for line in done.stderr.splitlines() if line.startswith("cpq-hf ")]
    assert [line.split(":")[0] for line in errors] == ["cpq-hf verify", "cpq-hf inspect", "cpq-hf push"]
    assert "Traceback" not in done.stderr
    assert "To go on: cpq-hf push " in errors[-1]
    assert (folders / "vocab.txt").read_text() == "a"
