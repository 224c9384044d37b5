"""Every layer, training and packed: against the float layer with rounded weights, and against each other."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from cpq_hf import CPQConfig, CPQError, calibrate_model, pack_model, prepare_model
from cpq_hf.nn import LAYERS
from cpq_hf.tensor.packing import words_per_row

BITS = [2, 3, 4, 5, 6, 7, 8]
GRANULARITIES = ["tensor", "channel", "group"]


class Wrap(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


CASES = {
    "linear": (lambda: nn.Linear(24, 10), lambda: torch.randn(5, 24)),
    "linear-no-bias-3d": (lambda: nn.Linear(24, 7, bias=False), lambda: torch.randn(2, 3, 24)),
    "conv1d": (lambda: Conv1D(10, 24), lambda: torch.randn(2, 3, 24)),
    "nn.conv1d": (lambda: nn.Conv1d(12, 8, 2, stride=2, groups=2), lambda: torch.randn(2, 12, 9)),
    "nn.conv1d-replicate": (
        lambda: nn.Conv1d(8, 6, 4, padding="same", padding_mode="replicate", dilation=2),
        lambda: torch.randn(2, 8, 15),
    ),
    "conv3d-circular": (
        lambda: nn.Conv3d(4, 6, (2, 3, 3), stride=(2, 1, 1), groups=2, padding_mode="circular"),
        lambda: torch.randn(2, 4, 4, 5, 6),
    ),
    "conv2d": (lambda: nn.Conv2d(6, 8, 2, stride=2), lambda: torch.randn(2, 6, 9, 9)),
    "conv2d-grouped": (lambda: nn.Conv2d(12, 6, 2, groups=3, bias=False), lambda: torch.randn(2, 12, 5, 5)),
    "conv2d-depthwise": (lambda: nn.Conv2d(8, 8, 4, groups=8, padding=1), lambda: torch.randn(2, 8, 6, 6)),
    "conv2d-reflect": (
        lambda: nn.Conv2d(6, 4, 2, padding=1, padding_mode="reflect", dilation=2),
        lambda: torch.randn(2, 6, 7, 7),
    ),
    "conv2d-circular": (
        lambda: nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular"),
        lambda: torch.randn(2, 4, 7, 7),
    ),
    "conv2d-replicate": (
        lambda: nn.Conv2d(8, 4, 1, padding=1, padding_mode="replicate"),
        lambda: torch.randn(2, 8, 5, 5),
    ),
    "out_proj": (lambda: NonDynamicallyQuantizableLinear(24, 8), lambda: torch.randn(5, 24)),  # see test_attention.py
    "embedding": (lambda: nn.Embedding(20, 12, padding_idx=0), lambda: torch.randint(20, (3, 7))),
}


def prepared(case: str, **fields) -> tuple[Wrap, torch.Tensor]:
    layer, example = CASES[case]
    fields = {"modules_to_not_convert": [], "quantize_embeddings": True, "group_size": 4} | fields
    return prepare_model(Wrap(layer()), CPQConfig(**fields)), example()


def test_every_covered_type_has_a_case():
    assert {type(layer()) for layer, _ in CASES.values()} == set(LAYERS)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("case", CASES)
def test_packed_equals_trained_bit_for_bit(case, bits, granularity):
    activation_bits = None if case == "embedding" else bits
    model, x = prepared(case, weight_bits=bits, granularity=granularity, activation_bits=activation_bits)
    calibrate_model(model, [x])
    with torch.no_grad():  # as if trained: weights and steps not as initialized
        model.layer.weight.add_(torch.randn_like(model.layer.weight) * 0.1)
        model.layer.weight_quantizer.log_alpha.add_(0.1)
        trained = model.eval()(x)
        trained_weight = model.layer.quantized_weight()
    spec = model.layer.layer_spec().weight
    pack_model(model)
    with torch.no_grad():
        assert torch.equal(model(x), trained)
    assert torch.equal(model.layer.weight, trained_weight)
    assert model.layer.weight_packed.shape == (spec.rows, words_per_row(spec.columns, bits))
    assert model.layer.weight_shape.tolist() == list(trained_weight.shape)
    assert "weight" not in dict(model.layer.named_parameters())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("case", CASES)
def test_training_layer_is_the_float_layer_with_rounded_weights(case, granularity):
    model, x = prepared(case, weight_bits=3, granularity=granularity)
    layer = model.layer
    output = model(x)
    reference_layer = CASES[case][0]()
    state = {key: value for key, value in layer.state_dict().items() if "quantizer" not in key}
    reference_layer.load_state_dict(state | {"weight": layer.quantized_weight().detach()})
    assert torch.equal(output, reference_layer(x))

    # the weight's rows lie on their own grids: [rows, columns] / alpha is whole and within bounds
    matrix = layer.quantized_weight().detach()
    matrix = matrix.t() if case == "conv1d" else matrix.flatten(1)
    alpha = layer.weight_quantizer.alpha()
    steps = matrix.unflatten(1, (layer.weight_quantizer.spec.groups, -1)) / (
        alpha.view(1, 1, 1) if alpha.dim() == 1 else alpha.unsqueeze(-1)
    )
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert steps.min() >= -4.001
    assert steps.max() <= 3.001


@pytest.mark.parametrize("case", [case for case in CASES if case != "embedding"])
def test_every_parameter_gets_a_gradient(case):
    model, x = prepared(case, weight_bits=3, activation_bits=4)
    model.train()
    model(x.requires_grad_()).square().sum().backward()
    assert x.grad.abs().sum() > 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_gradient_of_the_step_is_scaled():
    model, x = prepared("linear", weight_bits=4)
    layer = model.layer
    layer.weight_quantizer.noise.fill_(0.2)
    g = torch.randn(10, 24)
    layer.quantized_weight().backward(g)
    alpha = layer.weight_quantizer.alpha()
    v = layer.weight.detach() / alpha
    from cpq_hf.tensor.fake_quantize import slope
    from cpq_hf.tensor.spec import Grid

    d = slope(v.clone(), layer.weight_quantizer.noise, Grid(4, True))
    want = (g * (v.round().clamp(-8, 7) - v * d)).sum(1, keepdim=True) * alpha / math.sqrt(24 * 7)
    assert torch.allclose(layer.weight_quantizer.log_alpha.grad, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half()])
def test_quantizer_parameters_stay_float32(convert):
    model, x = prepared("linear", activation_bits=8)
    calibrate_model(model, [x])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "quantizer" in name}
    convert(model)
    after = model.state_dict()
    assert model.layer.weight.dtype != torch.float32
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    output = model(x.to(model.layer.weight.dtype))
    assert output.dtype == model.layer.weight.dtype

    trained = model.eval()(x.to(output.dtype))
    pack_model(model)
    assert model.layer.weight_scale.dtype == torch.float32
    assert torch.equal(model(x.to(output.dtype)), trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_packed_layer_follows_a_cast(dtype):
    model, x = prepared("embedding", weight_bits=3)
    pack_model(model)
    scale = model.layer.weight_scale.clone()
    model.to(dtype)
    assert model(x).dtype == dtype
    assert torch.equal(model.layer.weight_scale, scale)


def test_packed_layer_refuses_training_and_new_weights():
    model, x = prepared("linear")
    pack_model(model)
    model.train()
    with pytest.raises(CPQError, match=r"packed: its weights are integers and cannot be trained"):
        model(x)
    with torch.no_grad():
        model(x)
    for value in (nn.Parameter(torch.zeros(10, 24)), torch.zeros(10, 24)):
        with pytest.raises(CPQError, match="weight of a packed layer cannot be replaced"):
            model.layer.weight = value
    with pytest.raises(CPQError, match="packed already"):
        prepare_model(model, CPQConfig())
    with pytest.raises(CPQError, match="the model is packed"):
        pack_model(model)
    with pytest.raises(CPQError, match="the model is packed"):
        calibrate_model(model, [x])


def test_packing_needs_calibration_and_finite_numbers():
    model, x = prepared("linear", activation_bits=8)
    with pytest.raises(CPQError, match=r"the activations of `layer` were never calibrated"):
        pack_model(model)
    calibrate_model(model, [x])
    with torch.no_grad():
        model.layer.weight[0, 0] = torch.nan
    with pytest.raises(CPQError, match=r"the weight of `layer` holds NaN"):
        pack_model(model)
    assert isinstance(model.layer.weight, nn.Parameter)
    with pytest.raises(CPQError, match="not prepared for training"):
        pack_model(Wrap(nn.Linear(2, 2)))


@pytest.mark.parametrize("fill", [0.0, 0.25])
def test_all_zero_and_constant_weights_work(fill):
    layer = Wrap(nn.Linear(8, 4))
    nn.init.constant_(layer.layer.weight, fill)
    model = prepare_model(layer, CPQConfig(modules_to_not_convert=[]))
    assert torch.allclose(model.layer.quantized_weight(), torch.full((4, 8), fill))
    model(torch.randn(2, 8)).sum().backward()
    assert torch.isfinite(model.layer.weight_quantizer.log_alpha.grad).all()
    pack_model(model)
    assert torch.allclose(model.layer.weight, torch.full((4, 8), fill))


@pytest.mark.parametrize("case", CASES)
def test_empty_batch_works(case):
    model, x = prepared(case, activation_bits=None if case == "embedding" else 4)
    model.train()
    model(x[:0]).sum().backward()  # an empty batch tells nothing, so activations stay uncalibrated
    calibrate_model(model, [x])
    model.train()
    model(x[:0]).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    pack_model(model)
    assert len(model(x[:0])) == 0


def test_hooks_of_accelerate_survive():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Count.calls += 1
            return args, kwargs

    plain, x = prepared("linear", weight_bits=2)
    layer = Wrap(nn.Linear(24, 10))
    layer.load_state_dict({key: value for key, value in plain.state_dict().items() if "quantizer" not in key})
    add_hook_to_module(layer.layer, Count())
    hooked = prepare_model(layer, CPQConfig(weight_bits=2, modules_to_not_convert=[]))
    assert torch.equal(hooked(x), plain(x))
    pack_model(hooked)
    assert torch.equal(hooked(x), plain(x))
    assert Count.calls == 2


def test_deepcopy_is_independent():
    model, x = prepared("linear", activation_bits=8)
    calibrate_model(model, [x])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.layer.weight_quantizer.log_alpha.add_(1)
    assert not torch.equal(model.eval()(x), twin.eval()(x))
    pack_model(twin)
    assert isinstance(model.layer.weight, nn.Parameter)


def test_dropbits_only_in_training_and_only_while_set():
    model, x = prepared("linear", weight_bits=4)
    quantizer = model.layer.weight_quantizer
    quantizer.drop_rate.fill_(0.5)
    plain = model.eval().layer.quantized_weight()
    quantizer.dropping = True
    assert torch.equal(model.layer.quantized_weight(), plain)
    model.train()
    torch.manual_seed(0)
    first = model.layer.quantized_weight()
    assert not torch.equal(first, plain)
    torch.manual_seed(0)
    assert torch.equal(model.layer.quantized_weight(), first)
    alpha = quantizer.alpha()
    assert (first / alpha).round().min() >= -8
    quantizer.dropping = False
    assert torch.equal(model.layer.quantized_weight(), plain)


def test_dropbits_never_goes_below_the_floor():
    model, _ = prepared("linear", weight_bits=2)
    quantizer = model.layer.weight_quantizer
    plain = model.eval().layer.quantized_weight()
    quantizer.drop_rate.fill_(0.9)
    quantizer.dropping = True
    assert torch.equal(model.train().layer.quantized_weight(), plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_masks_repeat_under_gradient_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    def gradients(with_checkpoint: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model, x = prepared("linear", weight_bits=4, activation_bits=8)
        model.train()
        model.layer.weight_quantizer.drop_rate.fill_(0.5)
        model.layer.weight_quantizer.dropping = True
        x.requires_grad_()
        out = checkpoint(model, x, use_reentrant=reentrant) if with_checkpoint else model(x)
        out.square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)


# torch._dynamo instantiates autograd functions itself while tracing (torch/_dynamo/side_effects.py, torch 2.13)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_no_graph_break_under_compile():
    model, x = prepared("linear", weight_bits=4, activation_bits=8)
    calibrate_model(model, [x])
    model.train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))
    model.layer.weight_quantizer.noise.fill_(0.11)  # a schedule that moves does not recompile
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(x).sum().backward()
