"""Damaged packed checkpoints: each damage is an error that names file and layer, on checking and on loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import auto_class, build, inputs, logits
from safetensors.torch import load_file, save_file

from cpq_hf import CPQConfig, CPQError, calibrate_model, pack_model, prepare_model, verify_checkpoint
from cpq_hf.hf.checkpoint import INDEX, config_checksum

LAYER = "vit.encoder.layer.0.intermediate.dense"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("packed")
    model = prepare_model(build("vit"), CPQConfig(weight_bits=3, activation_bits=8))
    calibrate_model(model, [inputs("vit")])
    pack_model(model).save_pretrained(folder)
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    global LAYER
    LAYER = [name for name in layers if "intermediate" in name or "fc1" in name][0]  # noqa: RUF015
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "cpq_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "cpq_model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, edit, seal: bool = True) -> None:
    """Alter the stored `quantization_config`; with its seal renewed, the checks behind the seal have to find it."""
    stored = json.loads((folder / "config.json").read_text())
    edit(stored["quantization_config"])
    if seal:
        stored["quantization_config"]["config_checksum"] = config_checksum(stored)
    (folder / "config.json").write_text(json.dumps(stored))


def edit_model(folder: Path, **changes) -> None:
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | changes))


def flip_bit(folder: Path) -> None:
    file = folder / "cpq_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)


def truncate(folder: Path, to: float) -> None:
    file = folder / "cpq_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * to)])


DAMAGES = {
    "bit flip": (flip_bit, r"cpq_model.safetensors: `.*` of .*layer `.*` was altered"),
    "truncated": (lambda f: truncate(f, 0.7), r"cpq_model.safetensors: truncated or not a safetensors file"),
    "only a piece of the header": (
        lambda f: truncate(f, 0.01),
        r"cpq_model.safetensors: truncated or not a safetensors",
    ),
    "empty file": (lambda f: truncate(f, 0), r"cpq_model.safetensors: truncated or not a safetensors file"),
    "words missing": (
        lambda f: edit_tensors(f, lambda t: t.pop(f"{LAYER}.weight_packed")),
        r"cpq_model.safetensors: `.*weight_packed` of quantized layer `.*` is missing",
    ),
    "a bias missing": (
        lambda f: edit_tensors(f, lambda t: t.pop(f"{LAYER}.bias")),
        r"cpq_model.safetensors: `.*bias` of quantized layer `.*` is missing",
    ),
    "a norm missing": (
        lambda f: edit_tensors(f, lambda t: t.pop("vit.layernorm.weight")),
        r"cpq_model.safetensors: `vit.layernorm.weight` of layer `vit.layernorm` is missing",
    ),
    "scale altered": (
        lambda f: edit_tensors(f, lambda t: t[f"{LAYER}.weight_scale"].mul_(1.001)),
        r"`.*weight_scale` of .*layer `.*` was altered",
    ),
    "float weight altered": (
        lambda f: edit_tensors(f, lambda t: t["classifier.weight"].add_(1)),
        r"`classifier.weight` of layer `classifier` was altered",
    ),
    "other shape": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(3, 1)})),
        r"`.*weight_scale` of layer `.*` is F32 \[3, 1\], config.json calls for F32 \[48, 1\]",
    ),
    "other dtype": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{LAYER}.weight_packed": t[f"{LAYER}.weight_packed"].float()})),
        r"`.*weight_packed` of layer `.*` is F32 .*, config.json calls for I32",
    ),
    "a tensor too many": (
        lambda f: edit_tensors(f, lambda t: t.update({"stranger.weight": torch.ones(2)})),
        r"`stranger.weight` of layer `stranger` is not listed in config.json",
    ),
    "layers swapped": (
        lambda f: edit_tensors(
            f,
            lambda t: t.update(
                {f"{LAYER}.weight_scale": t[f"{LAYER}.bias"], f"{LAYER}.bias": t[f"{LAYER}.weight_scale"]}
            ),
        ),
        r"of layer `.*` (is F32|was altered)",
    ),
    "other bits in the config": (
        lambda f: edit_config(f, lambda c: c["layers"][LAYER]["weight"].update(bits=4)),
        r"`.*weight_packed` of layer `.*` is I32 \[48, 3\], config.json calls for I32 \[48, 4\]",
    ),
    "layer missing from the config": (
        lambda f: edit_config(f, lambda c: c["layers"].pop(LAYER)),
        r"layer `.*` is packed, but config.json does not list it",
    ),
    "no table of layers": (lambda f: edit_config(f, lambda c: c.update(layers=None)), "no table of `layers`"),
    "no checksums": (lambda f: edit_config(f, lambda c: c.pop("checksums")), "no `checksums`"),
    "an activation of other bits": (
        lambda f: edit_config(f, lambda c: c["layers"][LAYER]["activation"].update(bits=4), seal=False),
        r"config.json: altered since it was saved: it does not fit its `config_checksum`",
    ),
    "another field of the config": (lambda f: edit_model(f, hidden_act="relu"), r"config.json: altered since"),
    "no checksum of the config": (
        lambda f: edit_config(f, lambda c: c.pop("config_checksum"), seal=False),
        r"config.json: `quantization_config` has no `config_checksum`",
    ),
    "a tensor of another type, the same bytes": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{LAYER}.bias": t[f"{LAYER}.bias"].view(torch.int32)})),
        r"cpq_model.safetensors: `.*bias` of quantized layer `.*` was altered",
    ),
    "a tensor of another shape, the same bytes": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{LAYER}.bias": t[f"{LAYER}.bias"].view(2, -1)})),
        r"cpq_model.safetensors: `.*bias` of quantized layer `.*` was altered",
    ),
    "newer layout": (
        lambda f: edit_config(f, lambda c: c.update(format_version=7)),
        "layout version 7, this cpq_hf reads version 1",
    ),
    "unknown field": (lambda f: edit_config(f, lambda c: c.update(surprise=1)), "CPQConfig has no field 'surprise'"),
    "impossible bits": (
        lambda f: edit_config(f, lambda c: c["layers"][LAYER]["weight"].update(bits=77)),
        r"in the table of quantized layers in config.json: `bits` must be an integer from 2 to 8, got 77",
    ),
}


def test_whole_checkpoint(whole):
    found = verify_checkpoint(whole)
    assert found["files"] == ["cpq_model.safetensors"]
    assert found["layers"] == 13
    assert found["bytes"] == (whole / "cpq_model.safetensors").stat().st_size


# what older versions wrote under `transformers_weights`
OLDER_TEXT = "cpq_model.safetensors.index.json, which is read after `import cpq_hf` (pip install cpq-hf)"


def test_the_text_of_an_older_version(copy):
    """A packed checkpoint is known by the file that the text names, not by its wording."""
    stored = json.loads((copy / "config.json").read_text())
    assert stored["transformers_weights"].startswith(INDEX)
    expected = logits(auto_class("vit").from_pretrained(copy), inputs("vit"))
    for text in (OLDER_TEXT, f"{INDEX}: the words of a later version"):
        edit_model(copy, transformers_weights=text)
        verify_checkpoint(copy)
        assert torch.equal(logits(auto_class("vit").from_pretrained(copy), inputs("vit")), expected)
    edit_config(copy, lambda c: c.update(packed=False))  # then only the text tells
    with pytest.raises(CPQError, match="was saved during training, it is not packed"):
        auto_class("vit").from_pretrained(copy)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(damage, copy):
    function, message = DAMAGES[damage]
    function(copy)
    with pytest.raises(CPQError, match=message):
        verify_checkpoint(copy)
    with pytest.raises(CPQError, match=message):
        auto_class("vit").from_pretrained(copy)
    with pytest.raises(CPQError, match=message):
        auto_class("vit").from_pretrained(copy, ignore_mismatched_sizes=True)


def test_missing_files(copy):
    (copy / "cpq_model.safetensors").unlink()
    with pytest.raises(CPQError, match=r"cpq_model.safetensors: no such file"):
        verify_checkpoint(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(CPQError, match=r"config.json: not valid JSON"):
        verify_checkpoint(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CPQError, match=r"config.json: no such file"):
        verify_checkpoint(copy)


def test_checkpoints_of_another_kind(tmp_path):
    model = build("vit")
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(CPQError, match="not a CPQ checkpoint"):
        verify_checkpoint(tmp_path / "float")
    prepare_model(model, CPQConfig()).save_pretrained(tmp_path / "training")
    with pytest.raises(CPQError, match="was saved during training, it is not packed"):
        verify_checkpoint(tmp_path / "training")


@pytest.fixture
def sharded(whole, tmp_path) -> Path:
    model = auto_class("vit").from_pretrained(whole)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    return tmp_path / "sharded"


def test_sharded(sharded, whole):
    assert len(verify_checkpoint(sharded)["files"]) > 1
    cls, batch = auto_class("vit"), inputs("vit")
    assert torch.equal(logits(cls.from_pretrained(sharded), batch), logits(cls.from_pretrained(whole), batch))


def test_missing_and_foreign_shards(sharded):
    shards = sorted(sharded.glob("cpq_model-*.safetensors"))
    content = shards[1].read_bytes()
    shards[1].unlink()
    for check in (verify_checkpoint, auto_class("vit").from_pretrained):
        with pytest.raises(CPQError, match=rf"{shards[1].name}: no such file"):
            check(sharded)
    shards[1].write_bytes(shards[0].read_bytes())
    for check in (verify_checkpoint, auto_class("vit").from_pretrained):
        with pytest.raises(CPQError, match="is stored a second time"):
            check(sharded)
    shards[1].write_bytes(content)
    index = sharded / INDEX
    index.write_text(index.read_text().replace(shards[1].name, "../elsewhere.safetensors"))
    with pytest.raises(CPQError, match="is not a plain file name"):
        verify_checkpoint(sharded)
    index.write_text("[]")
    with pytest.raises(CPQError, match="index.json: not valid JSON of a checkpoint"):
        verify_checkpoint(sharded)
