"""`from_pretrained` on float, training and packed checkpoints of real architectures."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import NAMES, auto_class, build, inputs, logits
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

from cpq_hf import (
    CPQCallback,
    CPQConfig,
    CPQController,
    CPQError,
    calibrate_model,
    pack_model,
    prepare_model,
    summarize,
    verify_checkpoint,
)
from cpq_hf.model.inspection import training_layers
from cpq_hf.version import how_to_install

# what models of the test set warn of by themselves: GPT-2's config has no loss type, Mamba's kernels are not there
EXPECTED_LOGS = (
    "`loss_type=None` was set",
    *(f"Model config: {name}_token_id must be" for name in ("bos", "eos")),  # of SigLIP's default config, in any load
    *(f"`{name}` is falling back" for name in ("mamba_inner_fn", "causal_conv1d_fn", "selective_scan_fn")),
)


@pytest.fixture
def records(caplog):
    """What transformers logs at warning level, its report of missing and unexpected tensors included."""
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    caplog.set_level(logging.WARNING, logger="transformers")
    yield lambda: [r.getMessage() for r in caplog.records if not r.getMessage().startswith(EXPECTED_LOGS)]
    library.removeHandler(caplog.handler)


DECODERS = ("gpt2", "llama", "llama-tied", "mixtral", "gpt-oss", "qwen3-moe", "t5", "falcon", "gemma3", "mamba")
HEADS = dict.fromkeys(DECODERS, "lm_head")
HEADS |= {
    "resnet": "classifier.1",
    "bert-mlm": "cls.predictions.decoder",
    "clip": "text_projection",
    "siglip": "vision_model.head.mlp.fc2",
    "whisper": "proj_out",
}


def train_two_steps(model: nn.Module, name: str) -> None:
    """Two steps; every trainable parameter has to move. Adam without epsilon moves whatever has a gradient at all."""
    model.train()
    before = {key: value.detach().clone() for key, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-30)
    controller = CPQController(model, optimizer, total_steps=2)
    for step in range(2):
        model(**inputs(name, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    controller.detach()
    still = {key for key, value in model.named_parameters() if key in before and torch.equal(value, before[key])}
    still -= {
        "wav2vec2.masked_spec_embed",
        "wavlm.masked_spec_embed",
    }  # used by SpecAugment alone, which this config has switched off
    assert not still, still


def reload(cls, path: Path, **kwargs):
    return cls.from_pretrained(path, **kwargs)


@pytest.mark.shows(
    "from_pretrained, two steps in which every parameter moves, saved, packed, reloaded: the same bits", "a loop"
)
@pytest.mark.parametrize("name", NAMES)
def test_float_to_training_to_packed(name, tmp_path, records):
    build(name).save_pretrained(tmp_path / "float")
    cls, batch = auto_class(name), inputs(name, seed=9)
    model = reload(cls, tmp_path / "float", quantization_config=CPQConfig(weight_bits=4, activation_bits=8))
    assert not records()
    train_two_steps(model, name)
    trained = logits(model, batch)

    model.save_pretrained(tmp_path / "training")
    again = reload(cls, tmp_path / "training")
    assert torch.equal(logits(again, batch), trained)
    train_two_steps(again, name)

    report = summarize(model).to_dict()
    pack_model(model)
    assert torch.equal(logits(model, batch), trained)
    model.save_pretrained(tmp_path / "packed")
    assert {file.suffix for file in (tmp_path / "packed").iterdir()} == {".safetensors", ".json", ".md", ".png"}
    verified = verify_checkpoint(tmp_path / "packed")
    assert verified["layers"] == len(report["layers"])
    assert torch.equal(logits(reload(cls, tmp_path / "packed"), batch), trained)
    assert not records()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_quantized_by_default(name):
    model = prepare_model(build(name), CPQConfig())
    report = summarize(model).to_dict()
    floats = set(report["not_quantized"])
    head = HEADS.get(name, "classifier")
    assert head in floats
    matrices = {
        n
        for n, m in model.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)) or "Conv1D" in str(type(m))
    }
    experts = {key for key, value in build(name).named_parameters() if value.dim() == 3 and "experts" in key}
    reparametrized = {
        f"{audio}.encoder.pos_conv_embed.conv" for audio in ("wav2vec2", "wavlm")
    } & matrices  # its weight is computed, by weight_norm
    attention = {f"{n}.in_proj_weight" for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    assert len(attention) == (name == "siglip")
    assert (matrices | experts | attention) - set(report["layers"]) == {head} | reparametrized
    assert all(f"{name}.parametrizations.weight" in floats for name in reparametrized)
    assert len(experts) == {"mixtral": 4, "gpt-oss": 4, "qwen3-moe": 4}.get(name, 0)
    assert not {n for n, m in model.named_modules() if isinstance(m, nn.Embedding)} & set(report["layers"])


@pytest.mark.parametrize("name", ["serve.py", "cpq-hf.py", "cpq-hf", "cli.py"])
def test_a_fresh_process_needs_only_the_import(name, tmp_path):
    """Whatever the script is called: `import cpq_hf` never asks."""
    model = build("resnet")
    batch = inputs("resnet")
    prepare_model(model, CPQConfig(weight_bits=3, activation_bits=4))
    calibrate_model(model, [batch])
    expected = logits(model, batch)
    pack_model(model)
    model.save_pretrained(tmp_path / "packed")
    torch.save({"batch": batch, "logits": expected}, tmp_path / "expected.pt")
    script = tmp_path / name
    script.write_text(
        "import sys, torch, cpq_hf; from transformers import AutoModelForImageClassification as Auto\n"
        "torch.set_num_threads(1); folder = sys.argv[1]; expected = torch.load(folder + '/expected.pt')\n"
        "model = Auto.from_pretrained(folder + '/packed')\n"
        "with torch.no_grad(): got = model(pixel_values=expected['batch']['pixel_values']).logits\n"
        "assert torch.equal(got, expected['logits'])\n"
        "assert cpq_hf.CPQConfig().weight_bits == 4\n"
    )
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, timeout=120)


WITHOUT_PLUGIN = """
import sys, transformers
folder = sys.argv[1]
auto = transformers.AutoModelForImageClassification
config = transformers.AutoConfig.from_pretrained(folder + "/single")
config.save_pretrained(folder + "/bare config")  # loses what stands in the place of a file name
attempts = {
    "its class": lambda path: transformers.ResNetForImageClassification.from_pretrained(path),
    "an auto class": lambda path: auto.from_pretrained(path, ignore_mismatched_sizes=True),
    "the base model": lambda path: transformers.AutoModel.from_pretrained(path),
    "a config": lambda path: auto.from_pretrained(path, config=config),
    "a pipeline": lambda path: transformers.pipeline("image-classification", model=path),
}
for path in ("single", "sharded", "bare config"):
    for how, attempt in attempts.items():
        try:
            attempt(f"{folder}/{path}")
        except (OSError, ValueError) as error:
            print(f"{path} by {how}: {error}".replace(chr(10), " "))
assert "cpq_hf" not in sys.modules
"""


def test_without_the_plugin_nothing_is_loaded(tmp_path):
    """transformers skips a quantization that it does not know, and would leave the layers random."""
    model = pack_model(prepare_model(build("resnet"), CPQConfig()))
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="2KB")
    assert len(verify_checkpoint(tmp_path / "sharded")["files"]) > 1
    model.save_pretrained(tmp_path / "bare config")
    script = [sys.executable, "-c", WITHOUT_PLUGIN, str(tmp_path)]
    done = subprocess.run(script, check=True, timeout=120, capture_output=True, text=True)
    errors = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert len(errors) == 15
    for attempt, error in errors.items():
        bare = attempt.startswith("bare") or attempt.endswith("a config")
        hint = f"index.json, which is read after `import cpq_hf` ({how_to_install()})"
        assert ("no file named model.safetensors" if bare else hint) in error, attempt


@pytest.mark.shows("saved again over another save, whole or in shards: the same bits, nothing left over", "a loop")
def test_saved_again_over_another_save(tmp_path):
    batch, cls = inputs("llama-tied"), auto_class("llama-tied")
    model = prepare_model(build("llama-tied"), CPQConfig(quantize_embeddings=True))
    expected = logits(model, batch)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert list(tmp_path.glob("model-*.safetensors"))
    pack_model(model)
    for size in ("50GB", "10KB", "50GB"):
        model.save_pretrained(tmp_path, max_shard_size=size)
        files = sorted(file.name for file in tmp_path.iterdir() if "model" in file.name)
        assert files == sorted([*verify_checkpoint(tmp_path)["files"], "cpq_model.safetensors.index.json"])
        model = reload(cls, tmp_path)
        assert torch.equal(logits(model, batch), expected)
    again = reload(cls, tmp_path, config=model.config)
    assert torch.equal(logits(again, batch), expected)
    again.dequantize()
    again.save_pretrained(tmp_path / "float")
    assert (tmp_path / "float" / "model.safetensors").is_file()
    assert torch.equal(logits(reload(cls, tmp_path / "float", config=again.config), batch), expected)


def test_a_failed_save_leaves_the_last_one(tmp_path, monkeypatch):
    batch = inputs("resnet")
    model = pack_model(prepare_model(build("resnet"), CPQConfig()))
    model.save_pretrained(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CPQError, match=r"`variant` \(='fp16'\): a packed model is saved under one name"):
        model.save_pretrained(tmp_path, variant="fp16")

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    assert torch.equal(logits(reload(auto_class("resnet"), tmp_path), batch), logits(model, batch))


@pytest.mark.shows("dtype and device_map: loaded, trained a step, packed, reloaded: the same bits", "a loop")
@pytest.mark.parametrize("name", ["bert", "llama", "llama-tied", "resnet"])
@pytest.mark.parametrize("device_map", ["cpu", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_and_device_map(name, dtype, device_map, tmp_path):
    build(name).save_pretrained(tmp_path / "float")
    cls, batch = auto_class(name), inputs(name)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}
    options = {"dtype": dtype, "device_map": device_map}
    model = reload(cls, tmp_path / "float", quantization_config=CPQConfig(activation_bits=8), **options)
    for key, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "quantizer" in key else dtype), key
        assert parameter.device.type == "cpu"
    model.train()
    model(**batch).loss.backward()
    trained = logits(model, batch)
    for folder in ("training", "packed"):
        if folder == "packed":
            pack_model(model)
        model.save_pretrained(tmp_path / folder)
        again = reload(cls, tmp_path / folder, **options)
        assert torch.equal(logits(again, batch), trained)
        assert again.dtype == dtype
    assert all(b.dtype == torch.float32 for key, b in again.named_buffers() if key.endswith("_scale"))


def test_loaded_models_start_where_training_begins(tmp_path):
    build("bert").save_pretrained(tmp_path / "float")
    config = CPQConfig(activation_bits=8, noise_start=0.25)
    junk = torch.full((4096,), 7.0)  # memory that a forgotten buffer would come from
    del junk
    model = reload(auto_class("bert"), tmp_path / "float", quantization_config=config)
    assert model._keys_to_ignore_on_load_missing == build("bert")._keys_to_ignore_on_load_missing
    model.save_pretrained(tmp_path / "training")
    for loaded in (model, reload(auto_class("bert"), tmp_path / "training")):
        trained = {key for key, value in loaded.named_parameters() if value.requires_grad and "quantizer" in key}
        assert {key.rpartition(".")[2] for key in trained} == {"log_alpha"}
        buffers = {key: value for key, value in loaded.named_buffers() if "quantizer" in key}
        assert len([key for key in buffers if key.endswith("noise")]) == 26
        for key, value in buffers.items():
            assert value.tolist() == [0.25 if key.endswith("noise") else 0.0], key


def test_disk_offload_is_refused(tmp_path):
    build("bert").save_pretrained(tmp_path)
    with pytest.raises(CPQError, match="`device_map` offloads modules to disk"):
        reload(auto_class("bert"), tmp_path, quantization_config=CPQConfig(), device_map={"bert": "cpu", "": "disk"})


def test_a_new_head_is_the_only_thing_reported(tmp_path, records):
    build("bert").bert.save_pretrained(tmp_path)
    model = reload(AutoModelForSequenceClassification, tmp_path, quantization_config=CPQConfig(), num_labels=3)
    report = "\n".join(records())
    assert "classifier.weight" in report
    assert "quantizer" not in report
    assert "bert." not in report.replace("BertForSequenceClassification", "")
    assert torch.isfinite(logits(model, inputs("bert"))).all()


def test_head_and_base_model_load_each_other(tmp_path):
    model = prepare_model(build("bert"), CPQConfig())
    for folder in ("training", "packed"):
        if folder == "packed":
            pack_model(model)
        model.save_pretrained(tmp_path / folder)
        base = AutoModel.from_pretrained(tmp_path / folder)
        ids = inputs("bert")["input_ids"]
        with torch.no_grad():
            expected = model.eval().bert(ids).last_hidden_state
            assert torch.equal(base(ids).last_hidden_state, expected)
            base.save_pretrained(tmp_path / f"{folder}-base")
            again = AutoModel.from_pretrained(tmp_path / f"{folder}-base")
            assert torch.equal(again(ids).last_hidden_state, expected)
            headed = auto_class("bert").from_pretrained(tmp_path / f"{folder}-base", num_labels=3)
            assert torch.equal(headed.bert(ids).last_hidden_state, expected)


def test_prepare_model_equals_from_pretrained(tmp_path):
    build("vit").save_pretrained(tmp_path)
    config = CPQConfig(weight_bits=3, granularity="group", group_size=16)
    loaded = reload(auto_class("vit"), tmp_path, quantization_config=config)
    in_hand = prepare_model(build("vit"), config)
    assert loaded.state_dict().keys() == in_hand.state_dict().keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, in_hand.state_dict()[key]), key
    assert loaded.config.quantization_config == in_hand.config.quantization_config
    assert config.layers is None  # the user's object is left as it was


SHARING = {  # how two models come to share a config: the float one, and the one to train
    "from_config": ("bert", lambda cls, config: (cls.from_config(config), cls.from_config(config))),
    "the class": ("bert", lambda cls, config: [type(cls.from_config(config))(config) for _ in range(2)]),
    "parts": ("clip", lambda cls, config: (cls.from_config(config), cls.from_config(config))),
    "experts": ("mixtral", lambda cls, config: (cls.from_config(config), cls.from_config(config))),
    "the config of the other": ("vit", lambda cls, config: [m := cls.from_config(config), type(m)(m.config)]),
}


def prepared_by(how: str, model: nn.Module, folder: Path) -> nn.Module:
    if how == "callback":
        args = TrainingArguments(str(folder), use_cpu=True, report_to="none")
        Trainer(model, args, callbacks=[CPQCallback(CPQConfig(weight_bits=3))])
        return model
    return prepare_model(model, CPQConfig(weight_bits=3))


@pytest.mark.parametrize("how", ["prepare_model", "callback"])
@pytest.mark.parametrize("sharing", SHARING)
def test_a_shared_config_stays_that_of_the_float_model(sharing, how, tmp_path):
    name, make = SHARING[sharing]
    cls, batch = auto_class(name), inputs(name)
    config = build(name).config
    teacher, student = make(cls, config)
    wanted, before = logits(teacher, batch), config.to_dict()  # in this order: a loss notes the kind of problem
    parts = [part.config for part in teacher.modules() if hasattr(part, "config")]
    model = prepared_by(how, student, tmp_path / "trainer")
    for folder in ("training", "packed"):
        trained = logits(model, batch)
        model.save_pretrained(tmp_path / folder)
        teacher.save_pretrained(tmp_path / f"teacher-{folder}")
        assert torch.equal(logits(reload(cls, tmp_path / folder), batch), trained)
        plain = reload(cls, tmp_path / f"teacher-{folder}")
        assert torch.equal(logits(plain, batch), wanted)
        assert not getattr(plain, "is_quantized", False)
        if folder == "training":
            pack_model(model)
            assert torch.equal(logits(model, batch), trained)
    assert config.to_dict() == before | {"architectures": config.architectures, "dtype": config.dtype}
    assert not [part for part in parts if hasattr(part, "_is_quantized") or hasattr(part, "quantization_config")]
    again = reload(cls, tmp_path / "teacher-packed", config=config, quantization_config=CPQConfig())
    assert again.is_quantized
    assert not hasattr(config, "quantization_config")


@pytest.mark.parametrize("name", ["llama", "clip", "mixtral", "t5"])
def test_modules_share_the_copy_of_a_config_as_they_shared_the_config(name):
    def sharing(model: nn.Module) -> list[tuple[str, int]]:
        configs = [(path, m.config) for path, m in model.named_modules() if hasattr(m, "config")]
        parts = [(key, getattr(model.config, key)) for key in type(model.config).sub_configs]
        firsts: dict[int, int] = {}
        return [(path, firsts.setdefault(id(item), len(firsts))) for path, item in (*configs, *parts)]

    model = build(name)
    before = sharing(model)
    prepare_model(model, CPQConfig())
    assert sharing(model) == before
    model.set_attn_implementation("eager")
    others = {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    assert others == {"eager"}
    assert model.generation_config.pad_token_id == 0 if name == "t5" else True


@pytest.mark.parametrize("way", ["from_pretrained", "prepare_model", "a training checkpoint", "a copy"])
def test_the_settings_have_one_owner(way, tmp_path):
    build("vit").save_pretrained(tmp_path / "float")
    given = CPQConfig(noise_end=0.2)
    if way == "prepare_model":
        model = prepare_model(build("vit"), given)
    else:
        model = reload(auto_class("vit"), tmp_path / "float", quantization_config=given)
    if way == "a training checkpoint":
        model.save_pretrained(tmp_path / "training")
        model = reload(auto_class("vit"), tmp_path / "training")
    if way == "a copy":
        original, model = model, copy.deepcopy(model)
        assert original.cpq_settings is not model.cpq_settings
    settings = model.config.quantization_config
    assert model.cpq_settings is settings
    assert model.hf_quantizer.quantization_config is settings
    settings.noise_end = 0.05
    given.noise_end = 0.4
    controller = CPQController(model, torch.optim.SGD(model.parameters(), lr=0.0), total_steps=2)
    controller.step = 2
    assert controller.noise == pytest.approx(0.05)
    controller.detach()
    model.save_pretrained(tmp_path / "saved")
    assert reload(auto_class("vit"), tmp_path / "saved").cpq_settings.noise_end == 0.05
    pack_model(model)
    assert not hasattr(model, "cpq_settings")
    settings = model.config.quantization_config
    assert settings.packed
    assert model.hf_quantizer.quantization_config is settings
    model.save_pretrained(tmp_path / "packed")
    packed = reload(auto_class("vit"), tmp_path / "packed")
    assert packed.hf_quantizer.quantization_config is packed.config.quantization_config
    assert packed.config.quantization_config.noise_end == 0.05


def test_the_settings_of_a_plain_model():
    given = CPQConfig(noise_end=0.2)
    model = prepare_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), given)
    assert (model.cpq_settings.noise_end, model.cpq_settings is given) == (0.2, False)
    assert not hasattr(model, "config")
    pack_model(model)
    assert not hasattr(model, "cpq_settings")


def test_a_model_in_hand_knows_that_it_is_quantized(tmp_path):
    """FalconMamba and Jamba compute otherwise in the last digits where their config says so, as once loaded."""
    in_hand = prepare_model(build("clip"), CPQConfig())
    in_hand.save_pretrained(tmp_path)
    for model in (in_hand, reload(auto_class("clip"), tmp_path)):
        assert model.config._is_quantized
        assert model.vision_model.config._is_quantized


def test_embeddings_when_asked_for(tmp_path):
    build("llama").save_pretrained(tmp_path / "float")
    cls, batch = auto_class("llama"), inputs("llama")
    config = CPQConfig(weight_bits=3, quantize_embeddings=True, overrides={"lm_head": {"weight_bits": 8}})
    model = reload(cls, tmp_path / "float", quantization_config=config)
    assert not summarize(model).to_dict()["not_quantized"]
    trained = logits(model, batch)
    with pytest.raises(CPQError, match="embedding of 40 rows cannot be resized to 60"):
        model.resize_token_embeddings(60, mean_resizing=False)
    model = reload(cls, tmp_path / "float", quantization_config=config)
    pack_model(model)
    model.save_pretrained(tmp_path / "packed")
    again = reload(cls, tmp_path / "packed")
    assert torch.equal(logits(again, batch), trained)
    with pytest.raises(CPQError, match="embedding of 40 rows cannot be resized to 60"):
        again.resize_token_embeddings(60, mean_resizing=False)
    assert torch.equal(logits(again, batch), trained)


@pytest.mark.parametrize("packed", [False, True], ids=["training", "packed"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "resnet", "mixtral", "gpt-oss", "falcon", "mamba"])
def test_dequantized_models_are_plain_ones(name, packed, tmp_path):
    model = prepare_model(build(name), CPQConfig(weight_bits=3))
    batch = inputs(name)
    expected = logits(model, batch)
    model = pack_model(model) if packed else model.train()
    model = model.dequantize()
    assert torch.equal(logits(model, batch), expected)
    assert [type(module) for module in model.modules()] == [type(module) for module in build(name).modules()]
    assert model.state_dict().keys() == build(name).state_dict().keys()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(reload(auto_class(name), tmp_path), batch), expected)


def test_dequantizing_says_that_activations_are_lost(caplog):
    model = prepare_model(build("resnet"), CPQConfig(activation_bits=8))
    caplog.set_level(logging.WARNING, logger="cpq_hf")
    model.dequantize()
    assert "activations of the dequantized model are not quantized any more" in caplog.text


def test_keys_that_a_model_does_not_save(tmp_path):
    model = pack_model(prepare_model(build("bert"), CPQConfig()))
    model._keys_to_ignore_on_save = {"classifier.bias"}
    model.save_pretrained(tmp_path)
    assert verify_checkpoint(tmp_path)["tensors"] == len(model.state_dict()) - 1


@pytest.mark.shows("tied embeddings share one quantizer: trained, saved, packed, reloaded", "a loop")
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert-mlm", "t5", "gemma3"])
def test_tied_embeddings_share_one_quantizer(name, tmp_path, records):
    build(name).save_pretrained(tmp_path / "float")
    cls, batch, head = auto_class(name), inputs(name, seed=9), HEADS[name]
    config = CPQConfig(weight_bits=3, activation_bits=8, quantize_embeddings=True)
    model = reload(cls, tmp_path / "float", quantization_config=config)
    report = summarize(model).to_dict()
    source = report["layers"][head]["tied_to"]
    assert source is not None
    assert report["layers"][source]["tied_to"] is None
    assert not [key for key in model.state_dict() if key.startswith(f"{head}.weight_quantizer")]
    owner, tied = model.get_submodule(source), model.get_submodule(head)
    assert tied.weight_quantizer is owner.weight_quantizer
    assert tied.weight is owner.weight
    parameters = sum(value.numel() for key, value in model.named_parameters() if "quantizer" not in key)
    assert report["all_elements"] == parameters
    train_two_steps(model, name)
    trained = logits(model, batch)
    twin = copy.deepcopy(model)
    assert twin.get_submodule(head).weight_quantizer is twin.get_submodule(source).weight_quantizer
    assert torch.equal(logits(twin, batch), trained)
    model.save_pretrained(tmp_path / "training")
    assert torch.equal(logits(reload(cls, tmp_path / "training"), batch), trained)
    pack_model(model)
    assert torch.equal(logits(model, batch), trained)
    assert summarize(model).to_dict()["packed_bytes"] == report["packed_bytes"]
    model.save_pretrained(tmp_path / "packed")
    verify_checkpoint(tmp_path / "packed")
    with safe_open(tmp_path / "packed" / "cpq_model.safetensors", framework="pt") as file:
        stored = list(file.keys())
    assert f"{source}.weight_packed" in stored
    assert f"{head}.weight_packed" not in stored
    again = reload(cls, tmp_path / "packed")
    assert torch.equal(logits(again, batch), trained)
    assert not records()
    plain = twin.dequantize()
    assert plain.get_submodule(head).weight is plain.get_submodule(source).weight


def test_tied_weights_are_quantized_together_or_not_at_all(tmp_path):
    by_head = prepare_model(build("llama-tied"), CPQConfig(overrides={"lm_head": {"weight_bits": 8}}))
    layers = summarize(by_head).to_dict()["layers"]
    assert layers["model.embed_tokens"]["bits"] == layers["lm_head"]["bits"] == 8
    kept = prepare_model(build("llama-tied"), CPQConfig(quantize_embeddings=True, modules_to_not_convert=["lm_head"]))
    assert not {"model.embed_tokens", "lm_head"} & set(summarize(kept).to_dict()["layers"])
    with pytest.raises(CPQError, match=r"`lm_head` is tied to that of `model.embed_tokens`: set `quantize_embeddings"):
        prepare_model(build("llama-tied"), CPQConfig(modules_to_not_convert=[]))
    base = prepare_model(build("llama-tied").model, CPQConfig(quantize_embeddings=True))
    pack_model(base).save_pretrained(tmp_path)
    headed = reload(auto_class("llama-tied"), tmp_path)
    hidden = base(inputs("llama")["input_ids"]).last_hidden_state
    expected = nn.functional.linear(hidden, base.embed_tokens.quantized_weight())
    assert torch.equal(logits(headed, inputs("llama")), expected)


def test_a_budget_counts_a_tied_weight_once():
    """The head multiplies with the embedding's weight: its products count, its weights do not count again."""
    config = CPQConfig(weight_bits=5, quantize_embeddings=True, learn_bits=True, target_bits=3.0, budget="macs")
    model = prepare_model(build("llama-tied"), config)
    controller = CPQController(model, torch.optim.SGD(model.parameters(), lr=0.0), total_steps=400)
    model.train()(**inputs("llama")).loss.backward()
    learner = controller._learners["weight"]
    assert sum(learner.costs) == sum(
        p.numel() for n, p in model.named_parameters() if n.endswith("weight") and p.dim() > 1
    )
    controller._take_costs()
    names = [name for name, _ in training_layers(model) if name != "lm_head"]
    costs = dict(zip(names, learner.costs, strict=True))
    assert costs["model.embed_tokens"] == 40 * 32 * 4 * 6
    assert costs["model.layers.0.mlp.up_proj"] == 32 * 48 * 4 * 6
    controller.detach()


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts(name):
    model = prepare_model(build(name), CPQConfig(weight_bits=3, activation_bits=8))
    layer = summarize(model).to_dict()["layers"]["model.layers.0.mlp.experts.down_proj"]
    assert layer["kind"] == "experts"
    experts = model.model.layers[0].mlp.experts
    grids = {name: experts.get_submodule(f"{name}_quantizers") for name in ("gate_up_proj", "down_proj")}
    assert grids["down_proj"].weight is experts.down_proj
    assert grids["down_proj"].weight_quantizer.log_alpha.shape == (4 * 32, 1)
    model.train()(**inputs(name)).loss.backward()
    for grid in grids.values():
        assert grid.input_quantizer.calibrated
        assert grid.weight_quantizer.log_alpha.grad.abs().sum() > 0
    weight = experts.down_proj.detach().double()
    by_expert = weight if name == "mixtral" else weight.transpose(1, 2)
    alpha = grids["down_proj"].weight_quantizer.alpha().view(4, 32, 1)
    rounded = (by_expert / alpha).round().clamp(-4, 3) * alpha
    quantized = grids["down_proj"].quantized_weight()
    assert torch.allclose((quantized if name == "mixtral" else quantized.transpose(1, 2)).double(), rounded)
    eager = build(name)
    eager.set_experts_implementation("eager")
    with pytest.raises(CPQError, match=r"experts `model.layers.0.mlp.experts.\w+` are out of reach .*'eager'"):
        prepare_model(eager, CPQConfig(activation_bits=8))


def test_multiply_accumulates_of_experts():
    config = CPQConfig(weight_bits=5, learn_bits=True, target_bits=3.0, budget="macs")
    model = prepare_model(build("mixtral"), config)
    controller = CPQController(model, torch.optim.SGD(model.parameters(), lr=0.0), total_steps=400)
    model.train()(**inputs("mixtral")).loss.backward()
    controller._take_costs()
    costs = dict(zip([name for name, _ in training_layers(model)], controller._learners["weight"].costs, strict=True))
    tokens, chosen = 4 * 6, 2
    assert costs["model.layers.0.mlp.experts.down_proj"] == tokens * chosen * 32 * 48
    assert costs["model.layers.0.mlp.experts.gate_up_proj"] == tokens * chosen * 32 * 96
    assert costs["model.layers.0.self_attn.q_proj"] == tokens * 32 * 32
    controller.detach()


def test_configs_can_be_used_again(tmp_path):
    build("bert").save_pretrained(tmp_path / "float")
    model = reload(auto_class("bert"), tmp_path / "float", quantization_config=CPQConfig())
    model.save_pretrained(tmp_path / "training")
    again = reload(auto_class("bert"), tmp_path / "training", config=model.config)
    assert torch.equal(logits(again, inputs("bert")), logits(model, inputs("bert")))


def test_layers_that_were_missing_from_a_training_checkpoint(tmp_path):
    model = prepare_model(build("bert"), CPQConfig())
    model.save_pretrained(tmp_path)
    config_file = tmp_path / "config.json"
    stored = json.loads(config_file.read_text())
    layers = stored["quantization_config"]["layers"]
    layers["bert.encoder.layer.0.elsewhere"] = next(iter(layers.values()))
    config_file.write_text(json.dumps(stored))
    with pytest.raises(CPQError, match="lists the quantized layer `bert.encoder.layer.0.elsewhere`"):
        reload(auto_class("bert"), tmp_path)


def test_quantizer_parameters_that_were_missing_from_a_training_checkpoint(tmp_path):
    from safetensors.torch import load_file, save_file

    model = prepare_model(build("bert"), CPQConfig())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["bert.pooler.dense.weight_quantizer.log_alpha"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CPQError, match=r"lacks `bert.pooler.dense.weight_quantizer.log_alpha` of layer `bert.pooler"):
        reload(auto_class("bert"), tmp_path)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_size_of_the_packed_part(bits, tmp_path):
    model = prepare_model(build("vit"), CPQConfig(weight_bits=bits))
    pack_model(model).save_pretrained(tmp_path)
    with safe_open(tmp_path / "cpq_model.safetensors", framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - not a dict
    words = sum(4 * torch.Size(shape).numel() for key, shape in shapes.items() if key.endswith("weight_packed"))
    scales = sum(4 * torch.Size(shape).numel() for key, shape in shapes.items() if key.endswith("weight_scale"))
    report = summarize(model).to_dict()
    ideal = report["quantized_elements"] * bits / 8
    assert words + scales <= 1.02 * ideal + scales
    floats = 4 * (report["all_elements"] - report["quantized_elements"])
    assert report["packed_bytes"] == words + scales + floats
    header_and_shapes = (tmp_path / "cpq_model.safetensors").stat().st_size - report["packed_bytes"]
    assert header_and_shapes < 200 * len(shapes)
