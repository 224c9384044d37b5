"""Exports to compressed-tensors, read back by plain transformers: the same model, or an error and no folder."""

from __future__ import annotations

import importlib
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import CONFIGS, auto_class, build, inputs, logits
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, BertConfig, BertForMaskedLM, PreTrainedModel

import cpq_hf
from cpq_hf import CPQConfig, CPQError, calibrate_model, export_compressed_tensors, pack_model, prepare_model
from cpq_hf.export.compressed_tensors import plain, reload, stored
from cpq_hf.export.compressed_tensors import writer as compressed_tensors
from cpq_hf.export.compressed_tensors.containers import Container, choose_containers, contained
from cpq_hf.model.inspection import packed_layers
from cpq_hf.tensor.packing import unpack
from cpq_hf.tensor.spec import WeightSpec

# compressed-tensors calls what it deprecated itself, and shows its progress
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:compressed_tensors")


@pytest.fixture
def in_process(monkeypatch):
    """The check without the process around it, which takes most of the time; some tests leave the process in."""

    def run(command: list[str], **kwargs: Any) -> SimpleNamespace:
        before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "cpq_hf"}
        try:
            plain.main(Path(command[-1]))
            with pytest.raises(ImportError):
                importlib.import_module("cpq_hf")
        except (ImportError, AttributeError, RuntimeError, ValueError) as error:
            return SimpleNamespace(returncode=1, stderr=f"Traceback ...\n{type(error).__name__}: {error}\n")
        finally:
            sys.modules.update(before)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(reload.subprocess, "run", run)


def packed(name: str, model: PreTrainedModel | None = None, dtype=torch.float32, **settings: Any) -> PreTrainedModel:
    if model is None:
        torch.manual_seed(0)
        model = auto_class(name).from_config(CONFIGS[name][1](), dtype=dtype).eval()
    model = prepare_model(model, CPQConfig(**settings))
    if settings.get("activation_bits"):
        calibrate_model(model, [inputs(name)])
    return pack_model(model)


def example(name: str) -> dict[str, Any]:
    return {key: value for key, value in inputs(name, seed=5).items() if key != "labels"}


def export(model: PreTrainedModel, folder: Path, name: str, **options: Any) -> dict[str, Any]:
    """Export, then look at the folder without the help of the package: equal logits of all models here are exact."""
    report = export_compressed_tensors(model, folder, example(name), **options)
    again = auto_class(name).from_pretrained(folder, dtype=model.dtype)
    assert not isinstance(again, cpq_hf.nn.PackedLayer)
    assert not any("cpq_hf" in type(module).__module__ for module in again.modules())
    if report["rounding"] == 0:
        assert torch.equal(logits(again, inputs(name, seed=7)), logits(model, inputs(name, seed=7)))
    return report


def groups(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"].values())


def scheme(folder: Path, layer: str) -> dict[str, Any]:
    found = [
        group for group in groups(folder) if any(re.match(t.removeprefix("re:"), layer) for t in group["targets"])
    ]
    assert len(found) == 1, layer
    return found[0]


MIXED = {
    f"model.layers.{layer}.{part}": {"weight_bits": bits}
    for layer, widths in enumerate([(2, 3, 4, 5, 6, 7, 8), (8, 7, 6, 5, 4, 3, 2)])
    for part, bits in zip(
        [*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))],
        widths,
        strict=True,
    )
}


@pytest.mark.parametrize("granularity", ["channel", "group", "tensor"])
def test_mixed_widths(granularity, tmp_path, in_process):
    model = packed("llama", granularity=granularity, group_size=16, overrides=MIXED)
    report = export(model, tmp_path / "out", "llama")
    assert report["difference"] == report["rounding"] == 0
    first = [report["containers"][f"model.layers.0.{part}"] for part in ("self_attn.q_proj", "self_attn.o_proj")]
    assert first == [4, 5]  # q, k and v have 2, 3 and 4 bits
    for layer, bits in report["containers"].items():
        found = scheme(tmp_path / "out", layer)
        assert found["format"] == "pack-quantized"
        assert found["weights"]["num_bits"] == bits
        assert found["weights"]["strategy"] == ("group" if granularity == "group" else "channel")
        for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if layer.endswith(fused):
                other = re.sub(r"\w+$", fused[0], layer)
                assert scheme(tmp_path / "out", other) == found
    side = json.loads((tmp_path / "out" / "cpq_config.json").read_text())
    assert side["cpq_hf"] == cpq_hf.__version__
    assert side["mean_bits"] == cpq_hf.summarize(model).mean_bits
    assert {name: values["bits"] for name, values in side["layers"].items()} == {
        name: settings["weight_bits"] for name, settings in MIXED.items()
    }
    assert {name: values["container_bits"] for name, values in side["layers"].items()} == report["containers"]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_containers_hold_the_same_numbers(bits):
    torch.manual_seed(bits)
    layer = pack_model(
        prepare_model(nn.Sequential(nn.Linear(45, 8)), CPQConfig(weight_bits=bits, modules_to_not_convert=[]))
    )[0]
    for container in (Container(8, None), Container(bits + (bits == 2), None), Container(8, 15)):
        words, scale = contained(layer, container)
        levels = unpack(words, container.bits, 45)
        assert scale.shape == (8, 45 // (container.group_size or 45))
        weight = levels.float().view(8, scale.shape[1], -1) * scale[..., None]
        assert torch.equal(weight.view(8, 45), layer.quantized_weight())


def test_the_centred_grid_of_2_bits_takes_3():
    layer = pack_model(
        prepare_model(nn.Sequential(nn.Linear(64, 8)), CPQConfig(weight_bits=2, modules_to_not_convert=[]))
    )[0]
    words, scale = contained(layer, Container(3, None))
    levels = unpack(words, 3, 64)
    assert set(levels.flatten().tolist()) == {-3, -1, 1, 3}
    assert torch.equal(scale, layer.weight_scale / 2)
    plain_grid = pack_model(
        prepare_model(
            nn.Sequential(nn.Linear(64, 8)), CPQConfig(weight_bits=2, centered=False, modules_to_not_convert=[])
        )
    )[0]
    weights = {"centred": layer.spec.weight, "plain": plain_grid.spec.weight}
    assert {name: c.bits for name, c in choose_containers(weights, (), range(2, 9)).items()} == {
        "centred": 3,
        "plain": 2,
    }


def test_fused_layers_share_a_container():
    def weight(bits, group_size=None):
        return WeightSpec((8, 48), bits, "group" if group_size else "channel", group_size)

    weights = {"a.q_proj": weight(3, 16), "a.k_proj": weight(5), "a.v_proj": weight(4, 24), "a.o_proj": weight(3)}
    weights |= {"0.experts.up_proj": weight(4), "1.experts.up_proj": weight(6), "1.experts.down_proj": weight(3)}
    experts = [name for name in weights if "experts" in name]
    found = choose_containers(weights, experts, range(2, 9))
    assert {found[f"a.{part}_proj"] for part in "qkv"} == {Container(5, 8)}
    assert found["a.o_proj"] == Container(3, None)
    assert {found[name] for name in experts} == {Container(6, None)}
    assert {c.bits for c in choose_containers(weights, experts, (4, 8)).values()} == {4, 8}
    with pytest.raises(
        CPQError, match=r"`a.q_proj` needs a container of 5 bits, `container_bits` \(=\[4\]\) has none"
    ):
        choose_containers(weights, experts, [4])


def test_container_bits(tmp_path, in_process):
    report = export(packed("llama", overrides=MIXED), tmp_path / "out", "llama", container_bits=(4, 8))
    assert {group["weights"]["num_bits"] for group in groups(tmp_path / "out")} == {4, 8}
    assert report["difference"] == 0


@pytest.mark.parametrize("name", ["bert", "vit", "clip", "convnext", "mixtral"])
def test_architectures(name, tmp_path, caplog, in_process):
    model = packed(name, weight_bits=3)
    report = export(model, tmp_path / "out", name)
    convolutions = {key for key, layer in packed_layers(model) if isinstance(layer, nn.Conv2d)}
    assert {key for key, bits in report["containers"].items() if bits is None} == convolutions
    assert bool(convolutions) == ("written in floating point" in caplog.text)
    assert all(bits == 3 for key, bits in report["containers"].items() if key not in convolutions)
    stored_names = load_file(tmp_path / "out" / "model.safetensors").keys()
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    matrices = {key.removesuffix(".weight") for key in stored_names if key.endswith(".weight")}
    floats = {key for key, module in build(name).named_modules() if isinstance(module, nn.Linear)} & matrices
    assert floats <= set(ignored)


def test_a_model_whose_layers_initialize_themselves_is_refused(tmp_path, in_process):
    """SigLIP reaches for the weights of all its layers, those without a named parent too."""
    with pytest.raises(CPQError, match="no quantized layer that transformers loads packed"):
        export_compressed_tensors(packed("siglip", weight_bits=3), tmp_path / "out", example("siglip"))
    assert not list(tmp_path.iterdir())


def test_experts_of_a_model_share_a_container(tmp_path, in_process):
    widths = {"model.layers.1.mlp.experts.down_proj": {"weight_bits": 6, "granularity": "group", "group_size": 8}}
    model = packed("qwen3-moe", weight_bits=3, overrides=widths)
    report = export(model, tmp_path / "out", "qwen3-moe")
    assert {bits for name, bits in report["containers"].items() if "experts" in name} == {6}
    weights = {
        group["weights"]["group_size"] for group in groups(tmp_path / "out") if "experts" in group["targets"][0]
    }
    assert weights == {8}
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert "model.layers.1.mlp.experts.3.up_proj.weight_packed" in file.keys()  # noqa: SIM118 - not a dict


def test_mixtral_is_stored_under_the_names_of_the_hub(tmp_path, in_process):
    export(packed("mixtral", weight_bits=2), tmp_path / "out", "mixtral")
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight_packed" in load_file(
        tmp_path / "out/model.safetensors"
    )
    # under vLLM's name for it, and with the word that transformers looks for
    assert scheme(tmp_path / "out", "model.layers.0.block_sparse_moe.experts.0.gate_proj")["weights"]["num_bits"] == 3
    assert "experts" in groups(tmp_path / "out")[0]["targets"][0]


@pytest.mark.parametrize("activation_bits", [2, 4, 8])
def test_quantized_inputs(activation_bits, tmp_path, caplog, in_process):
    settings = CONFIGS["bert"][1]().to_dict() | {"hidden_act": "relu"}
    model = auto_class("bert").from_config(BertConfig(**settings)).eval()
    model = packed("bert", model, activation_bits=activation_bits)
    signs = {layer.spec.activation.signed for _, layer in packed_layers(model)}
    assert signs == {True, False}
    export(model, tmp_path / "out", "bert")
    unsigned = scheme(tmp_path / "out", "bert.encoder.layer.1.output.dense")["input_activations"]
    assert (unsigned["num_bits"], unsigned["symmetric"], unsigned["dynamic"]) == (activation_bits, False, False)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["bert.encoder.layer.1.output.dense.input_zero_point"].tolist() == [-(2 ** (activation_bits - 1))]
    signed = scheme(tmp_path / "out", "bert.encoder.layer.1.intermediate.dense")["input_activations"]
    assert signed["symmetric"]
    assert "bert.encoder.layer.1.intermediate.dense.input_zero_point" not in tensors
    assert "vLLM has no kernel" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_scales_and_says_so(dtype, tmp_path, caplog, in_process):
    model = packed("llama", dtype=dtype, weight_bits=2)
    before = {name: layer.weight_scale for name, layer in packed_layers(model)}
    report = export_compressed_tensors(model, tmp_path / "out", example("llama"))
    assert 0 < report["rounding"] < 0.05
    assert f"scales are stored in {dtype}" in caplog.text
    assert all(layer.weight_scale is before[name] for name, layer in packed_layers(model))
    for _, layer in packed_layers(model):
        layer.weight_scale = layer.weight_scale.to(dtype).float()
    again = auto_class("llama").from_pretrained(tmp_path / "out")
    assert again.dtype == dtype
    assert torch.equal(logits(again, inputs("llama")), logits(model, inputs("llama")))


def test_quantized_embeddings_are_written_in_floating_point(tmp_path, in_process):
    model = packed("llama", weight_bits=2, quantize_embeddings=True, overrides={"lm_head": {"weight_bits": 5}})
    report = export(model, tmp_path / "out", "llama")
    assert report["containers"]["model.embed_tokens"] is None
    assert report["containers"]["lm_head"] == 5
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["model.embed_tokens.weight"], model.model.embed_tokens.quantized_weight())
    assert "lm_head.weight_packed" in tensors


@pytest.mark.parametrize("quantize_embeddings", [False, True])
@pytest.mark.parametrize("name", ["llama-tied", "bert-mlm"])
def test_tied_embeddings(name, quantize_embeddings, tmp_path, in_process):
    report = export(packed(name, weight_bits=2, quantize_embeddings=quantize_embeddings), tmp_path / "out", name)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    heads = {
        "llama-tied": ("model.embed_tokens", "lm_head"),
        "bert-mlm": ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    }[name]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert f"{heads[0]}.weight" in tensors
    assert not [key for key in tensors if key.startswith(f"{heads[1]}.weight")]
    assert {report["containers"].get(head) for head in heads} == {None}


@pytest.mark.parametrize("name", ["llama-tied", "bert-mlm"])
def test_a_tied_head_with_a_quantized_input_is_untied(name, tmp_path, in_process):
    model = packed(name, weight_bits=2, activation_bits=8, quantize_embeddings=True)
    report = export(model, tmp_path / "out", name)
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    assert model.config.tie_word_embeddings
    assert [bits for key, bits in report["containers"].items() if key in ("lm_head", "cls.predictions.decoder")] == [3]


def test_shards_base_model_and_generation_config(tmp_path, in_process):
    model = packed("llama", weight_bits=4)
    model.generation_config.max_new_tokens = 77
    report = export(model, tmp_path / "out", "llama", max_shard_size="10KB")
    assert len(report["files"]) > 1
    assert report["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {
        *report["files"],
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "cpq_config.json",
    }
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_new_tokens"] == 77
    base = AutoModel.from_pretrained(tmp_path / "out")
    ids = inputs("llama")["input_ids"]
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_fast_inference_does_not_matter(tmp_path, in_process):
    model = packed("llama", weight_bits=3)
    exact = logits(model, inputs("llama"))
    fast = {name: layer.fast for name, layer in packed_layers(cpq_hf.fast_inference(model))}
    report = export_compressed_tensors(model, tmp_path / "out", example("llama"))
    assert report["difference"] == 0
    assert {name: layer.fast for name, layer in packed_layers(model)} == fast
    assert torch.equal(logits(auto_class("llama").from_pretrained(tmp_path / "out"), inputs("llama")), exact)


def test_default_inputs(tmp_path, in_process):
    (tmp_path / "empty").mkdir()
    assert export_compressed_tensors(packed("llama"), tmp_path / "empty")["difference"] == 0
    assert export_compressed_tensors(packed("vit"), tmp_path / "vit")["difference"] == 0
    with pytest.raises(CPQError, match=r"cannot run on `example_inputs` \(input_ids\)"):
        export_compressed_tensors(packed("clip"), tmp_path / "clip")
    with pytest.raises(
        CPQError, match="`example_inputs` is needed for a Wav2Vec2ForSequenceClassification.*`input_values`"
    ):
        export_compressed_tensors(packed("wav2vec2"), tmp_path / "wav")


# --- what is refused -------------------------------------------------------------------------------------------------


def with_float_experts() -> PreTrainedModel:
    return packed("mixtral", modules_to_not_convert=["layers.1.mlp.experts", "lm_head"])


def tiny_scales() -> PreTrainedModel:
    model = packed("llama", dtype=torch.float16)
    model.model.layers[0].mlp.up_proj.weight_scale.fill_(1e-7)
    return model


def not_of_transformers() -> PreTrainedModel:
    class Mine(BertForMaskedLM):
        pass

    return packed("bert-mlm", Mine(CONFIGS["bert-mlm"][1]()))


REFUSED = {
    "float": (lambda: build("llama"), "the model is not packed"),
    "training": (lambda: prepare_model(build("llama"), CPQConfig()), "the model is not packed"),
    "Conv1D": (lambda: packed("gpt2"), r"has none that are quantized \(only conv1d\): .*cpq_hf.export_onnx"),
    "Conv2d": (lambda: packed("resnet"), r"has none that are quantized \(only conv2d\): .*cpq_hf.export_onnx"),
    "input of Conv2d": (
        lambda: packed("vit", activation_bits=8),
        r"input of `vit.*patch_embeddings.projection` \(conv2d\) is quantized.*export_onnx.*'activation_bits'",
    ),
    "input of experts": (
        lambda: packed("mixtral", activation_bits=8),
        r"input of `model.layers.0.mlp.experts.\w+` \(experts\) is quantized.*own format.*'activation_bits': None",
    ),
    "GPT-OSS": (lambda: packed("gpt-oss"), r"experts `.*gate_up_proj` of GptOssForCausalLM are not stored one by one"),
    "some experts": (with_float_experts, r"`.*experts.*` is in floating point while other experts are quantized"),
    "bfloat16 inputs": (
        lambda: packed("bert", activation_bits=8).bfloat16(),
        r"input of `bert.*` is quantized and the model is torch.bfloat16.*`model.float\(\)`",
    ),
    "input of a layer that is initialized by name": (
        lambda: packed("wav2vec2", activation_bits=8, modules_to_not_convert=["feature_extractor"]),
        r"input of `wav2vec2.feature_projection.projection` is quantized, but .*in floating point.*'activation_bits'",
    ),
    "float64": (lambda: packed("llama", dtype=torch.float64), r"the model is torch.float64; .*`model.float\(\)`"),
    "tiny scales": (tiny_scales, r"scales of `model.layers.0.mlp.up_proj` \(down to 1.0e-07\) are too small"),
    "own class": (not_of_transformers, "Mine is not a class of transformers"),
    "module": (
        lambda: pack_model(prepare_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), CPQConfig())),
        "Sequential is not a class of transformers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(case, tmp_path, monkeypatch):
    make, message = REFUSED[case]
    monkeypatch.setattr(compressed_tensors, "_folder_in_place", None)
    name = {"GPT-OSS": "gpt-oss", "some experts": "mixtral"}.get(case, "llama")
    with pytest.raises(CPQError, match=message):
        export_compressed_tensors(make(), tmp_path / "out", example(name))
    assert not list(tmp_path.iterdir())


def test_refused_folders_and_arguments(tmp_path, monkeypatch):
    model = packed("llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in ("full", "file"):
        with pytest.raises(CPQError, match=rf"{place} exists and is not an empty folder"):
            export_compressed_tensors(model, tmp_path / place)
    with pytest.raises(CPQError, match=r"`container_bits` must hold integers from 2 to 8, got \(4, 16\)"):
        export_compressed_tensors(model, tmp_path / "out", container_bits=(4, 16))
    monkeypatch.setattr(compressed_tensors, "version", lambda name: "0.16.1")
    with pytest.raises(CPQError, match=r"compressed-tensors 0.16.1 .*pip install '.\[export\]' in a clone of cpq-hf"):
        export_compressed_tensors(model, tmp_path / "out")
    monkeypatch.setattr(compressed_tensors, "version", lambda name: importlib.metadata.version("no-such-package"))
    with pytest.raises(CPQError, match=r"needs the package compressed-tensors: pip install '.\[export\]' in a"):
        export_compressed_tensors(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


# --- the check can fail ----------------------------------------------------------------------------------------------


def flipped(contained):
    return lambda *args: (contained(*args)[0].flip(0), contained(*args)[1])


def one_weight_off(tensors):
    def change(*args):
        found, checksums = tensors(*args)
        found["model.norm.weight"] = found["model.norm.weight"] + 1e-6
        return found, checksums

    return change


def one_tensor_less(tensors):
    def change(*args):
        found, checksums = tensors(*args)
        del found["model.norm.weight"]
        return found, checksums

    return change


FAULTS = {
    "rows": (stored, "contained", flipped, r"reads another `model.layers.0.self_attn.q_proj.weight`"),
    "a float weight": (compressed_tensors, "stored_tensors", one_weight_off, r"reads another `model.norm.weight`"),
    "a missing tensor": (compressed_tensors, "stored_tensors", one_tensor_less, r"missing keys.*: model.norm.weight"),
    "outputs": (
        compressed_tensors,
        "run",
        lambda run: lambda model, batch: {key: value * 1.0001 for key, value in run(model, batch).items()},
        r"outputs are off by 1.0e-04 of the largest",
    ),
    "a buffer of a cast model": (
        compressed_tensors,
        "choose_containers",
        lambda choose: choose,
        r"another `model.rotary_emb.inv_freq` .* `from_pretrained\(..., dtype=...\)` instead",
    ),
    "the format of a group": (
        compressed_tensors,
        "quantization_config",
        lambda make: lambda *args: make(*args) | {"config_groups": {}},
        r"(unexpected|missing) keys|cannot load",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_differs_is_not_kept(fault, tmp_path, monkeypatch, in_process):
    module, name, change, message = FAULTS[fault]
    monkeypatch.setattr(module, name, change(getattr(module, name)))
    (tmp_path / "out").mkdir()
    model = packed("llama")
    if "cast" in fault:
        model.bfloat16()
    with pytest.raises(CPQError, match=message):
        export_compressed_tensors(model, tmp_path / "out", example("llama"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").iterdir())


def test_differences():
    a = {"logits": torch.tensor([1.0, -4.0])}
    assert reload.difference(a, a) == 0
    assert reload.difference({"logits": torch.tensor([1.0, -3.0])}, a) == 0.25
    for other in ({}, {"logits": torch.zeros(3)}, {"logits": torch.tensor([1.0, torch.nan])}):
        assert reload.difference(other, a) == torch.inf
    same = {"logits": torch.tensor([1.0, -torch.inf, torch.nan])}
    assert reload.difference(same, same) == 0


def test_in_a_process_of_its_own(tmp_path):
    assert export(packed("llama", weight_bits=3), tmp_path / "out", "llama")["difference"] == 0


def test_layers_that_transformers_cannot_load_packed_are_in_floating_point(tmp_path, caplog, in_process):
    """A parent initializes the weights of children by name, which packed ones do not have."""
    report = export(packed("wav2vec2"), tmp_path / "out", "wav2vec2")
    projection = "wav2vec2.feature_projection.projection"
    assert [name for name, bits in report["containers"].items() if bits is None and "conv" not in name] == [projection]
    assert f"initializes them by name and cannot load them packed: {projection}" in caplog.text


def test_models_that_transformers_cannot_load_packed(tmp_path):
    reason = (
        r"T5For.* has no quantized layer .*`decoder.block.0.*SelfAttention.k` and 31 others.*reaches for .*own format"
    )
    with pytest.raises(CPQError, match=reason):
        export_compressed_tensors(packed("t5"), tmp_path / "out", inputs("t5"))
    assert not list(tmp_path.iterdir())


def test_what_transformers_reaches_for_is_what_the_check_says(monkeypatch, tmp_path, in_process):
    monkeypatch.setattr(compressed_tensors, "initialized_by_name", lambda *_: set())
    with pytest.raises(CPQError, match=r"cannot load a \w+ from .*has no attribute 'weight'.*own format"):
        export_compressed_tensors(packed("wav2vec2"), tmp_path / "out", example("wav2vec2"))
    assert not list(tmp_path.iterdir())


def test_fused_layers_of_which_some_are_in_floating_point(tmp_path, caplog, in_process):
    names = ["layers.0.self_attn.k_proj", "layers.1.mlp.up_proj", "layers.0.mlp.down_proj", "lm_head"]
    export(packed("llama", modules_to_not_convert=names), tmp_path / "out", "llama")
    warned = [record.getMessage() for record in caplog.records if "vLLM fuses" in record.getMessage()]
    assert len(warned) == 2
    q, k, v = (f"model.layers.0.self_attn.{part}_proj" for part in "qkv")
    assert f"fuses {k} (in floating point) with {q}, {v} (packed)" in warned[0]
    assert "model.layers.1.mlp.up_proj (in floating point) with model.layers.1.mlp.gate_proj (packed)" in warned[1]
    assert all("quantize all or none of them, with `modules_to_not_convert`" in message for message in warned)
    caplog.clear()
    export(packed("llama"), tmp_path / "all", "llama")
    assert "vLLM" not in caplog.text


def test_the_check_cannot_reach_this_package(tmp_path):
    text = Path(plain.__file__).read_text().replace("    request = ", "    import cpq_hf\n    request = ")
    (tmp_path / "program.py").write_text(text)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py", tmp_path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode
    assert "import of cpq_hf halted" in done.stderr


def test_logging_is_of_this_package():
    assert compressed_tensors.logger is logging.getLogger("cpq_hf.export.compressed_tensors.writer")
