"""Validation: specs, plans, configs and their messages."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import HfArgumentParser

from cpq_hf import CPQConfig, CPQError, prepare_model, summarize
from cpq_hf.model.settings import matches
from cpq_hf.tensor.spec import ActivationSpec, LayerSpec, WeightSpec


@pytest.mark.parametrize("value", [1, 9, 0, -4, 3.0, "4", True, None])
def test_bits_outside_the_range_or_not_integers(value):
    with pytest.raises(CPQError, match=r"`weight_bits` must be an integer from 2 to 8, got"):
        CPQConfig(weight_bits=value)
    with pytest.raises(CPQError, match=r"`bits` must be an integer from 2 to 8, got"):
        WeightSpec((4, 4), bits=value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_bits": 16}, "`activation_bits` must be an integer from 2 to 8, got 16"),
        ({"granularity": "row"}, "`granularity` must be one of 'tensor', 'channel', 'group', got 'row'"),
        ({"granularity": "group", "group_size": 0}, "`group_size` must be a positive integer, got 0"),
        ({"min_bits": 5}, r"`min_bits` \(=5\) is above `weight_bits` \(=4\)"),
        ({"dropbits": 1.5}, "`dropbits` must be a number from 0 to 0.9, got 1.5"),
        ({"noise_start": 0}, "`noise_start` must be a number from 0.02 to 0.5, got 0"),
        ({"noise_end": "low"}, "`noise_end` must be a number from 0.02 to 0.5, got 'low'"),
        ({"quantize_embeddings": "yes"}, "`quantize_embeddings` must be true or false"),
        ({"modules_to_not_convert": "lm_head"}, "`modules_to_not_convert` must be a list"),
        ({"overrides": ["a"]}, "`overrides` must map patterns to fields"),
        ({"overrides": "classifier"}, r'as in {"classifier": {"weight_bits": 8}}; got .classifier.$'),
        ({"overrides": {"a": 8}}, r"`overrides\['a'\]` must be a dict of fields, got 8"),
        ({"overrides": {"a": {"bits": 8}}}, r"has the field 'bits'; .* did you mean 'weight_bits', 'activation_bits'"),
        ({"overrides": {"a": {"weight_bits": 12}}}, r"in `overrides\['a'\]`: `weight_bits` must be an integer from 2"),
        ({"overrides": {"a": {"granularity": "x"}}}, r"in `overrides\['a'\]`: `granularity` must be one of"),
    ],
)
def test_config_fields(fields, message):
    with pytest.raises(CPQError, match=message):
        CPQConfig(**fields)


def test_error_is_a_value_error():
    with pytest.raises(ValueError, match="weight_bits"):
        CPQConfig(weight_bits=99)


def test_unknown_field_and_newer_layout_in_a_stored_config():
    stored = CPQConfig().to_dict()
    with pytest.raises(CPQError, match=r"no field 'weight_bit'; did you mean 'weight_bits'"):
        CPQConfig.from_dict(stored | {"weight_bit": 4})
    with pytest.raises(CPQError, match=r"layout version 2, this cpq_hf reads version 1; upgrade cpq_hf"):
        CPQConfig.from_dict(stored | {"format_version": 2})


def test_options_of_a_command_line(monkeypatch):
    """What users set, each with its text in the docstring and its default; not what checkpoints store."""
    monkeypatch.setenv("COLUMNS", "1000")  # argparse breaks lines at hyphens
    parser = HfArgumentParser(CPQConfig)
    text = " ".join(parser.format_help().split())
    entries = {action.dest: action for action in parser._actions if action.dest != "help"}
    assert [*entries] == [*CPQConfig.field_names(), "base_model"]
    for name, action in entries.items():
        default = {"centered": False}.get(name, getattr(CPQConfig(), name))  # the last is `--no_centered`
        assert f"{action.help} (default: {default})" in text, name
    assert entries["group_size"].help == 'Input features per group, with granularity="group". Must divide them.'


def test_a_command_line_makes_a_config():
    overrides = {"classifier": {"weight_bits": 8}}
    words = ["--weight_bits", "3", "--no_centered", "--overrides", json.dumps(overrides), "--base_model", "me/float"]
    words += ["--modules_to_not_convert", "a", "b"]
    (config,) = HfArgumentParser(CPQConfig).parse_args_into_dataclasses(words)
    expected = CPQConfig(
        3, centered=False, overrides=overrides, modules_to_not_convert=["a", "b"], base_model="me/float"
    )
    assert config == expected
    stored = config.resolved({"a.b": LayerSpec(WeightSpec((4, 6), 8))}, packed=True).to_dict()
    del stored["quant_method"]
    assert CPQConfig(**stored).to_dict() == stored | {"quant_method": "cpq"}


def test_config_survives_json():
    config = CPQConfig(weight_bits=3, activation_bits=8, overrides={"a.*": {"weight_bits": 8}})
    config = config.resolved({"a.b": LayerSpec(WeightSpec((4, 6), 8), ActivationSpec(8, True))})
    again = CPQConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.layer_specs() == {"a.b": LayerSpec(WeightSpec((4, 6), 8), ActivationSpec(8, True))}
    assert again.get("weight_bits") == 3
    assert again.get("nothing", 1) == 1


@pytest.mark.parametrize("layers", [None, {}, [], {"a": None}, {"a": {"weight": {"bits": 4}}}, {"a": {"weight": 3}}])
def test_broken_table_of_layers(layers):
    config = CPQConfig()
    config.layers = layers
    with pytest.raises(CPQError, match="table of"):
        config.layer_specs()


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("head", "lm_head", False),
        ("layer.0", "encoder.layer.0.attention.query", True),
        ("layer.0", "encoder.layer.01", False),
        ("*.query", "encoder.layer.0.query", True),
        ("query", "encoder.query_norm", False),
        ("layer.?.mlp", "layer.3.mlp", True),
        ("layer.?", "layer.3.mlp", False),
    ],
)
def test_patterns(pattern, name, expected):
    assert matches(pattern, name) is expected


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(100, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.table = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(self.first(x)))


def bits_of(model: nn.Module) -> dict[str, int]:
    return {
        name: module.weight_quantizer.spec.bits
        for name, module in model.named_modules()
        if hasattr(module, "weight_quantizer")
    }


def test_defaults_leave_head_and_embeddings_in_floating_point():
    assert bits_of(prepare_model(Small(), CPQConfig())) == {"first": 4, "block.0": 4, "block.2": 4}


def test_empty_list_leaves_nothing_out():
    config = CPQConfig(modules_to_not_convert=[], quantize_embeddings=True)
    assert set(bits_of(prepare_model(Small(), config))) == {"first", "block.0", "block.2", "table", "head"}


def test_overrides_name_single_modules_and_later_ones_win():
    config = CPQConfig(
        weight_bits=2,
        overrides={"block": {"weight_bits": 3}, "block.2": {"weight_bits": 5}, "head": {"weight_bits": 8}},
    )
    assert bits_of(prepare_model(Small(), config)) == {"first": 2, "block.0": 3, "block.2": 5, "head": 8}


def test_overrides_can_change_the_granularity():
    config = CPQConfig(granularity="group", group_size=4, overrides={"first": {"granularity": "tensor"}})
    model = prepare_model(Small(), config)
    assert model.first.weight_quantizer.log_alpha.shape == (1,)
    assert model.block[0].weight_quantizer.log_alpha.shape == (8, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"overrides": {"hed": {"weight_bits": 8}}}, r"'hed' in `overrides` matches no module.*did you mean 'head'"),
        ({"overrides": {"*.blck.*": {}}}, r"matches no module"),
        ({"modules_to_not_convert": ["frist"]}, r"'frist' in `modules_to_not_convert` .*did you mean 'first'"),
        ({"modules_to_not_convert": ["first", "block", "head"]}, "nothing would be quantized: of 5 layers"),
        ({"modules_to_not_convert": ["head"], "overrides": {"head": {}}}, "`head` is named by `overrides` and by"),
        (
            {"granularity": "group", "group_size": 64},
            r"`first`: `group_size` \(=64\) does not divide the 100 input .*50",
        ),
    ],
)
def test_config_that_does_not_fit_the_model_changes_nothing(fields, message):
    model = Small()
    with pytest.raises(CPQError, match=message):
        prepare_model(model, CPQConfig(**fields))
    assert not bits_of(model)
    assert type(model.first) is nn.Linear


def test_model_prepared_or_packed_or_compiled_already():
    model = prepare_model(Small(), CPQConfig())
    with pytest.raises(CPQError, match="prepared already"):
        prepare_model(model, CPQConfig())
    with pytest.raises(CPQError, match="compiled already: prepare it first, then call `torch.compile`"):
        prepare_model(torch.compile(Small(), backend="eager"), CPQConfig())
    model = Small()
    model.compile(backend="eager")
    with pytest.raises(CPQError, match="compiled already"):
        prepare_model(model, CPQConfig())
    with pytest.raises(CPQError, match=r"weight of `first` is offloaded or on the meta device"):
        prepare_model(Small().to("meta"), CPQConfig())


def test_config_of_another_type():
    with pytest.raises(CPQError, match="`config` must be a CPQConfig, got dict"):
        prepare_model(Small(), {"weight_bits": 4})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    model = Small()
    with torch.no_grad():
        model.block[2].weight[3, 3] = value
    with pytest.raises(CPQError, match=r"the weight of `block.2` holds NaN or infinite values"):
        prepare_model(model, CPQConfig())
    assert type(model.first) is nn.Linear


def test_layers_that_share_a_weight_share_its_quantizer():
    model = Small()
    model.block[2].weight = model.block[0].weight
    prepare_model(model, CPQConfig())
    layers = summarize(model).to_dict()["layers"]
    assert {name: layer["tied_to"] for name, layer in layers.items()} == {
        "first": None,
        "block.0": None,
        "block.2": "block.0",
    }
    assert model.block[2].weight_quantizer is model.block[0].weight_quantizer


def test_layer_whose_forward_was_replaced():
    model = Small()
    model.first.forward = lambda x: x[:, :8]
    with pytest.raises(CPQError, match="the `forward` of `first` was replaced on the instance"):
        prepare_model(model, CPQConfig())
    prepare_model(model, CPQConfig(modules_to_not_convert=["first"]))


def test_embedding_that_renormalizes():
    model = Small()
    model.table.max_norm = 1.0
    with pytest.raises(CPQError, match="`table` has `max_norm`"):
        prepare_model(model, CPQConfig(quantize_embeddings=True))
