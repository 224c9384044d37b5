"""Weights that are taken without calling their layer, and subclasses of layers: on the grid wherever they are used."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from cpq_hf import CPQConfig, CPQController, CPQError, calibrate_model, pack_model, prepare_model, summarize
from cpq_hf.model.conversion import dequantize


class Model(nn.Module):
    """Subclasses say how they use `layer`; what they use is 8 inputs and 6 outputs."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.use(x))


class Takes(Model):
    def use(self, x):
        assert self.layer.weight.dtype == x.dtype
        return x @ self.layer.weight.T


class TakesInHelper(Model):
    def helper(self):
        return self.layer.weight.t()

    def use(self, x):
        return x @ self.helper()


class HandsOver(Model):
    def use(self, x):
        return product(x, self.layer)


def product(x, layer):
    return x @ layer.weight.T


class TakesAndCalls(Model):
    def use(self, x):
        return F.linear(self.layer(x), self.layer.weight.new_ones(6, 6)) if self.training else x @ self.layer.weight.T


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def correct(self, x):
        return x @ self.linear.weight.T

    def forward(self, x):
        return self.linear(x)


class TakesInMethodOfChild(Model):
    def __init__(self):
        super().__init__()
        self.layer = Inner()

    def use(self, x):
        return self.layer.correct(x)


class OwnForward(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T * 2


class CallsOurs(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class NoForward(nn.Linear):
    pass


class SeveralOutputs(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, y.softmax(-1)


class Calls(Model):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def use(self, x):
        return self.layer(x)


MODELS = {
    "takes": Takes,
    "takes-in-helper": TakesInHelper,
    "hands-over": HandsOver,
    "takes-or-calls": TakesAndCalls,
    "takes-in-method-of-child": TakesInMethodOfChild,
    "own-forward": lambda: Calls(OwnForward(8, 6)),
    "calls-ours": lambda: Calls(CallsOurs(8, 6)),
    "no-forward": lambda: Calls(NoForward(8, 6)),
}
CALLED = ("own-forward", "calls-ours", "no-forward")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def layer_of(model: nn.Module) -> nn.Linear:
    return model.layer.linear if isinstance(model.layer, Inner) else model.layer


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_on_the_grid_wherever_they_are_used(name):
    model, x = build(name), torch.randn(5, 8)
    prepare_model(model, CPQConfig(weight_bits=3)).eval()
    layer = layer_of(model)
    rounded = build(name).eval()
    with torch.no_grad():
        layer_of(rounded).weight.copy_(layer.quantized_weight())
    assert torch.equal(model(x), rounded(x))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        layer_of(twin).weight.zero_()
    assert not torch.equal(twin(x), model(x))  # a copy takes its own weight
    assert isinstance(layer.weight, nn.Parameter)  # outside of the forward it is what is trained
    expected = model(x)
    assert torch.equal(pack_model(model)(x), expected)


@pytest.mark.parametrize("name", MODELS)
def test_their_step_sizes_train(name, caplog):
    model = prepare_model(build(name), CPQConfig(weight_bits=3, activation_bits=4)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    controller = CPQController(model, optimizer, total_steps=2)
    caplog.set_level(logging.WARNING, logger="cpq_hf")
    model(torch.randn(5, 8)).square().sum().backward()
    optimizer.step()
    controller.detach()
    layer = layer_of(model)
    assert layer.weight_quantizer.log_alpha.grad.abs().sum() > 0
    assert layer.weight.grad.abs().sum() > 0
    assert not caplog.text
    assert (layer.input_quantizer is None) == (name not in (*CALLED, "hands-over", "takes-or-calls"))
    if name in CALLED:
        assert layer.input_quantizer.log_alpha.grad is not None


@pytest.mark.parametrize("name", CALLED)
@pytest.mark.parametrize("by_name", [False, True], ids=["by place", "by name"])
def test_inputs_of_subclasses_are_on_the_grid(name, by_name):
    model, x = build(name), torch.randn(5, 8)
    if by_name and name != "no-forward":
        model.use = lambda x: model.layer(x=x)
    prepare_model(model, CPQConfig(weight_bits=8, activation_bits=2))
    calibrate_model(model, [x])
    model.eval()
    expected = model(x)
    assert torch.equal(model(model.layer.quantized_input(x)), expected)
    assert not torch.allclose(model(x * 1.2), expected * 1.2)
    assert torch.equal(pack_model(model)(x), expected)


def test_a_parameter_is_back_after_an_error():
    model = prepare_model(build("takes"), CPQConfig())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(5, 9))
    assert isinstance(model.layer.weight, nn.Parameter)
    assert "weight" not in vars(model.layer)


@pytest.mark.parametrize("packed", [False, True], ids=["training", "packed"])
def test_subclasses_come_back(packed):
    model = prepare_model(Calls(OwnForward(8, 6)), CPQConfig())
    assert isinstance(model.layer, OwnForward)
    assert type(copy.deepcopy(model).layer) is type(model.layer)
    dequantize(pack_model(model) if packed else model)
    assert type(model.layer) is OwnForward
    assert not model.layer._forward_pre_hooks
    assert not model.layer._forward_hooks


def test_what_is_more_than_a_layer_is_left_alone_and_reported():
    of_torch = torch.ao.nn.qat.Linear(4, 4, qconfig=torch.ao.quantization.get_default_qat_qconfig())
    model = nn.Sequential(nn.Linear(4, 4), SeveralOutputs(4, 4), of_torch, nn.Linear(4, 2))
    report = summarize(prepare_model(model, CPQConfig())).to_dict()
    assert list(report["layers"]) == ["0"]
    assert list(report["not_quantized"]) == ["1", "2", "3"]


def test_a_large_share_that_is_not_covered_is_warned_of(caplog):
    caplog.set_level(logging.WARNING, logger="cpq_hf")
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Bilinear(2, 2, 3), "head": nn.Linear(4, 2)})
    prepare_model(model, CPQConfig())
    assert not caplog.text
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Bilinear(4, 4, 3), "head": nn.Linear(4, 2)})
    prepare_model(model, CPQConfig())
    assert "75% of the weights are in layers of types that are not covered" in caplog.text
    assert "`b` (Bilinear) (1 in all)" in caplog.text


def test_subclasses_of_embeddings_look_up_rows():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 3

    model = nn.Sequential(Scaled(20, 8), nn.Linear(8, 2))
    ids = torch.tensor([[3, 4]])
    prepare_model(model, CPQConfig(quantize_embeddings=True)).eval()
    assert torch.equal(model[0](ids), model[0].quantized_weight()[ids] * 3)
    expected = model(ids)
    assert torch.equal(pack_model(model)(ids), expected)
    with pytest.raises(CPQError, match="embedding of 20 rows cannot be resized"):
        model[0].num_embeddings = 30


class TakesUnseen(Model):
    """Through a name that no reader of the source connects with the layer."""

    def use(self, x):
        layer = next(self.children())
        return x @ layer.weight.T


def test_a_weight_that_trains_in_float_is_warned_of(caplog):
    model = prepare_model(TakesUnseen(), CPQConfig())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    CPQController(model, optimizer, total_steps=2)
    caplog.set_level(logging.WARNING, logger="cpq_hf")
    for _ in range(2):
        model(torch.randn(5, 8)).sum().backward()
        optimizer.step()
    assert caplog.text.count("computes with the weight of 1 layers without calling them") == 1
    assert "`layer`" in caplog.text


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.head = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x, other=None):
        y = self.used(x)
        return self.head(y if other is None else y + self.unused(other))


def test_layers_that_were_never_reached_are_packed_as_they_are_evaluated(caplog):
    model, x = prepare_model(Branches(), CPQConfig(activation_bits=4)), torch.randn(5, 8)
    calibrate_model(model, [x])
    model.eval()
    expected = model(x)
    with pytest.warns(UserWarning, match="not calibrated yet"):
        with_other = model(x, x)
    caplog.set_level(logging.WARNING, logger="cpq_hf")
    pack_model(model)
    assert "1 of 2 layers got no input other than zeros in training or calibration" in caplog.text
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x, x), with_other)
    layers = summarize(model).to_dict()["layers"]
    assert layers["used"]["activation_bits"] == 4
    assert layers["unused"]["activation_bits"] is None


def test_zeros_need_no_calibration():
    model = prepare_model(Branches(), CPQConfig(activation_bits=4)).eval()
    calibrate_model(model, [torch.randn(5, 8)])
    model(torch.randn(5, 8), torch.zeros(5, 8))  # a warning would be an error


# torch._dynamo instantiates autograd functions itself while tracing (torch/_dynamo/side_effects.py, torch 2.13)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", ["takes", "own-forward", "calls-ours"])
def test_one_graph_under_compile(name):
    model, x = nn.Sequential(build(name), nn.Linear(2, 2)), torch.randn(5, 8)
    prepare_model(model, CPQConfig()).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    compiled(x).sum().backward()
    assert layer_of(model[0]).weight_quantizer.log_alpha.grad is not None


def test_float_layers_are_not_taken_for_subclasses():
    model = prepare_model(nn.Sequential(Conv1D(8, 4), nn.Linear(8, 2)), CPQConfig())
    assert not model[0]._forward_pre_hooks


def test_a_model_without_any_layer_is_refused():
    with pytest.raises(CPQError, match=r"LSTM has no layer of a type that can be quantized \(Linear, "):
        prepare_model(nn.LSTM(4, 4), CPQConfig())
