"""What a layer multiplies is made again in backward: it is not kept, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from models import build, inputs
from test_layers import CASES, Wrap
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from cpq_hf import CPQConfig, CPQController, calibrate_model, prepare_model
from cpq_hf.nn import training
from cpq_hf.tensor import recompute

MULTIPLYING = [case for case in CASES if case != "embedding"]
PADDED = ("replicate", "reflect", "circular")  # the input is padded first: what is kept is a tensor of its own
FIELDS = {"modules_to_not_convert": [], "group_size": 4, "activation_bits": 4}


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(recompute, "SMALLEST", 0)


def prepared(case: str, **fields) -> tuple[Wrap, torch.Tensor]:
    torch.manual_seed(0)
    layer, example = CASES[case]
    model, x = prepare_model(Wrap(layer()), CPQConfig(**FIELDS | fields)), example()
    calibrate_model(model, [x])
    return model.train(), x.requires_grad_()


def outcome(model: nn.Module, x: torch.Tensor, autocast: bool = False, run=lambda model, x: model(x)):
    """The output and every gradient."""
    torch.manual_seed(1)
    model.zero_grad()
    x.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = run(model, x)
    output.float().square().sum().backward()
    return [output, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("case", MULTIPLYING)
def test_no_bit_changes(case, granularity, autocast, monkeypatch):
    model, x = prepared(case, granularity=granularity)
    kept = outcome(model, x, autocast)
    monkeypatch.setattr(recompute, "SMALLEST", 0)
    assert_equal(kept, outcome(model, x, autocast))


@pytest.mark.parametrize("case", MULTIPLYING)
def test_casting_within_the_quantizers_changes_no_bit(case, monkeypatch):
    model, x = prepared(case)
    dtypes = []
    model.layer.weight_quantizer.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    at_once = outcome(model, x, autocast=True)
    monkeypatch.setattr(training, "dtype_of_product", lambda x: None)
    cast = outcome(model, x, autocast=True)
    assert dtypes == [torch.bfloat16, torch.float32]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, a, b in zip(["output", "x", *trained], at_once, cast, strict=True):
        if name.endswith("log_alpha"):  # a sum, in another order
            assert (a - b).norm() <= 1e-5 * a.norm(), name
        else:
            assert torch.equal(a, b), name


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("case", ["linear", "conv2d", "conv1d"])
def test_shapes_without_values(case, grad):
    """On the meta device, which has no autocast, as tools use it that count operations."""
    model, x = prepared(case, activation_bits=None)
    with torch.set_grad_enabled(grad):
        assert model.to("meta")(x.to("meta")).shape == CASES[case][0]()(x).shape


@pytest.mark.parametrize("fields", [{"dropbits": 0.3}, {"weight_bits": 5, "learn_bits": True}])
def test_bits_are_dropped_as_in_forward(fields, monkeypatch):
    model, x = prepared("linear", **fields)
    CPQController(model, torch.optim.SGD(model.parameters(), 0.0), 10)
    kept = outcome(model, x)
    monkeypatch.setattr(recompute, "SMALLEST", 0)
    assert_equal(kept, outcome(model, x))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", MULTIPLYING)
def test_forward_keeps_neither_operand(case, autocast):
    model, x = prepared(case)
    seen = []
    for quantizer in (model.layer.input_quantizer, model.layer.weight_quantizer):
        quantizer.register_forward_hook(
            lambda module, args, output: seen.append(StorageWeakRef(output._typed_storage()))
        )
    made = []
    with pytest.MonkeyPatch.context() as patch:
        make = recompute.Recipe.make
        patch.setattr(recompute.Recipe, "make", lambda recipe: made.append(recipe) or make(recipe))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(x)
        assert [reference.expired() for reference in seen] == [True, True]
        output.float().sum().backward()
    assert len(made) == 2 or case.endswith(PADDED)


@pytest.mark.usefixtures("always")
def test_experts_keep_no_weight():
    model = prepare_model(build("mixtral"), CPQConfig()).train()
    experts = next(module for module in model.modules() if hasattr(module, "gate_up_proj_quantizers"))
    seen = []
    for name in ("gate_up_proj_quantizers", "down_proj_quantizers"):
        quantizer = getattr(experts, name).weight_quantizer
        quantizer.register_forward_hook(
            lambda module, args, output: seen.append(StorageWeakRef(output._typed_storage()))
        )
    loss = model(**inputs("mixtral")).logits.sum()
    assert [reference.expired() for reference in seen] == [True, True]
    loss.backward()
    assert all(p.grad is not None for p in experts.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "run",
    [
        lambda model, x: checkpoint(model, x, use_reentrant=False),
        lambda model, x: checkpoint(model, x, use_reentrant=True),
        lambda model, x: _offloaded(model, x),
    ],
    ids=["checkpoint", "reentrant checkpoint", "offloading"],
)
def test_beside_other_ways_to_save_memory(run, monkeypatch):
    model, x = prepared("linear", dropbits=0.3)
    CPQController(model, torch.optim.SGD(model.parameters(), 0.0), 10)
    kept = outcome(model, x)
    monkeypatch.setattr(recompute, "SMALLEST", 0)
    assert_equal(kept, outcome(model, x, run=run))


def _offloaded(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.save_on_cpu():
        return model(x)


@pytest.mark.usefixtures("always")
def test_backward_twice_and_gradients_of_gradients():
    model, x = prepared("linear", activation_bits=None)
    output = model(x)
    once = torch.autograd.grad(output.sum(), x, retain_graph=True)[0]
    assert torch.equal(once, torch.autograd.grad(output.sum(), x, retain_graph=True)[0])
    weight = model.layer.weight
    (grad_x,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    (through,) = torch.autograd.grad(grad_x.sum(), weight)
    assert through.abs().sum() > 0


@pytest.mark.usefixtures("always")
def test_a_weight_changed_before_backward_is_noticed():
    model, x = prepared("linear")
    output = model(x)
    with torch.no_grad():
        model.layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
