"""The report: numbers, table, picture."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from models import build
from torch import nn

from cpq_hf import CPQConfig, CPQError, pack_model, prepare_model, summarize


def small() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16, bias=False), nn.Linear(16, 4))
    return prepare_model(model, CPQConfig(weight_bits=2, overrides={"2": {"weight_bits": 8}}))


def test_names_of_any_length_fit_the_plot(tmp_path):
    name = "transformer_module_" * 5
    model = nn.ModuleDict({name: nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    summarize(prepare_model(model, CPQConfig())).plot(tmp_path / "bits.png")  # a warning of the layout is an error


def test_numbers():
    model = small()
    report = summarize(model).to_dict()
    quantized, everything = 64 * 32 + 32 * 16, 64 * 32 + 32 + 32 * 16 + 16 * 4 + 4
    assert report["quantized_elements"] == quantized
    assert report["all_elements"] == everything
    assert report["coverage"] == quantized / everything
    bits = 64 * 32 * 2 + 32 * 16 * 8
    assert report["mean_bits"] == bits / quantized
    assert report["mean_bits_all"] == (bits + 32 * (everything - quantized)) / everything
    assert report["float_bytes"] == 4 * everything
    assert report["packed_bytes"] == bits / 8 + 4 * (32 + 16) + 4 * (everything - quantized)
    assert report["layers"]["0"] == {
        "kind": "linear",
        "bits": 2,
        "activation_bits": None,
        "granularity": "channel",
        "group_size": None,
        "shape": [32, 64],
        "cluster_distance": report["layers"]["0"]["cluster_distance"],
        "tied_to": None,
    }
    assert report["not_quantized"] == {"3": "Linear"}


def test_cluster_distance_is_that_of_the_weights():
    model = small()
    layer = model[0]
    v = layer.weight / layer.weight_quantizer.alpha()
    assert layer.weight_quantizer.bits == 2  # its levels are at -1.5, -0.5, 0.5 and 1.5 steps
    inside = v.abs() < 2
    want = (v - 0.5 - (v - 0.5).round()).abs()[inside].mean().item()
    assert summarize(model).to_dict()["layers"]["0"]["cluster_distance"] == pytest.approx(want, rel=1e-5)
    with torch.no_grad():
        layer.weight.copy_(layer.quantized_weight())
    assert summarize(model).to_dict()["layers"]["0"]["cluster_distance"] == pytest.approx(0, abs=1e-5)


def test_packed_and_trained_agree():
    model = small()
    trained = summarize(model).to_dict()
    packed = summarize(pack_model(model)).to_dict()
    assert packed.pop("cluster_distance") is None
    trained.pop("cluster_distance")
    for layer in (*trained["layers"].values(), *packed["layers"].values()):
        layer.pop("cluster_distance")
    assert packed == trained


def test_table():
    printed = str(summarize(small()))
    assert "2      linear  8     -    channel      16x32" in printed
    assert "2,560 of 2,660 weights quantized (96.2%), mean 3.20 bits (4.28 over all)" in printed
    assert "in floating point: 3 (Linear)" in printed
    assert "0 of 6,107 weights quantized (0.0%)" in str(summarize(build("resnet")))


def test_the_distance_is_shown_while_there_is_one():
    model = small()
    header, first, *_ = str(summarize(model)).splitlines()
    assert header.endswith("shape  distance")
    assert first.endswith(f"32x64  {summarize(model).layers[0].cluster_distance:.3f}")
    header, first, *_ = str(summarize(pack_model(model))).splitlines()
    assert header.endswith("shape")
    assert first.endswith("32x64")


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("packed", [False, True])
def test_the_table_fits_a_terminal(width, packed):
    """Whole lines of the same numbers: names lose their beginning, and below 80 columns the distance goes."""
    config = CPQConfig(quantize_embeddings=True, granularity="group", group_size=16)
    name = "a_name_that_is_longer_than_any_terminal." * 3
    model = prepare_model(build("llama-tied"), config)
    layers = summarize(pack_model(model) if packed else model)
    layers = replace(layers, layers=tuple(replace(layer, name=name + layer.name) for layer in layers.layers))
    lines = layers.table(width).splitlines()
    assert max(map(len, lines)) <= width
    assert lines[1 + len(layers.layers)] == ""
    assert all(line.startswith("…") for line in lines[1 : 1 + len(layers.layers)])
    assert lines[-2 if width < 120 else -1].startswith("16,640 of 16,800 weights quantized")
    assert ("distance" in lines[0]) == (width >= 80 and not packed)
    assert any("gate_proj  linear     4     -    group 16     48x32" in line for line in lines)
    assert any(line.split("group 16")[1].strip().startswith("…embed_tokens") for line in lines if "lm_head" in line)
    assert layers.table(10_000) == layers.table() == str(layers)


def test_picture(tmp_path):
    path = summarize(small()).plot(tmp_path / "bits.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CPQError, match="no quantized layers to plot"):
        summarize(nn.Linear(2, 2)).plot(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_picture_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(CPQError, match="plotting needs matplotlib: pip install matplotlib"):
        summarize(small()).plot(tmp_path / "bits.png")
