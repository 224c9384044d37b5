"""`nn.MultiheadAttention` and torch's encoder do on the grid what they did, in training, evaluation and packed."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from cpq_hf import (
    CPQConfig,
    CPQController,
    CPQError,
    calibrate_model,
    fast_inference,
    pack_model,
    prepare_model,
    summarize,
)
from cpq_hf.model.conversion import dequantize
from cpq_hf.nn.attention import Attention
from cpq_hf.nn.parameter_weights import refit

WIDTH, HEADS, ROWS, TARGET, SOURCE = 16, 4, 3, 5, 7
QUANTIZED = ["in_proj_weight", "out_proj"]


def attention(**options):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, **options)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return module


def masks(kind):
    """Masks as `forward` takes them: those of positions are [TARGET, SOURCE], those of padding [ROWS, SOURCE]."""
    torch.manual_seed(1)
    positions = (torch.rand(TARGET, SOURCE) < 0.4) & (torch.arange(SOURCE) > 0)
    padding = (torch.rand(ROWS, SOURCE) < 0.4) & (torch.arange(SOURCE) > 0)
    return {
        "none": {},
        "positions": {"attn_mask": positions},
        "positions-added": {"attn_mask": torch.randn(TARGET, SOURCE)},
        "positions-by-head": {"attn_mask": torch.randn(ROWS * HEADS, TARGET, SOURCE)},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": positions, "key_padding_mask": padding},
        "both-added": {"attn_mask": torch.randn(TARGET, SOURCE), "key_padding_mask": torch.randn(ROWS, SOURCE)},
    }[kind]


def same(module, *inputs, **options):
    """Whether our forward gives the outputs and gradients of torch's, with float weights."""
    ours = copy.deepcopy(module)
    refit(ours, Attention)
    assert type(ours).forward is Attention.forward
    for one in (module, ours):
        one.zero_grad()
    torch.manual_seed(2)
    want, want_weights = module(*inputs, **options)
    torch.manual_seed(2)
    got, weights = ours(*inputs, **options)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want)
    assert (weights is None) == (want_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, want_weights)
    want.square().sum().backward()
    got.square().sum().backward()
    for mine, theirs in zip(ours.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "kind", ["none", "positions", "positions-added", "positions-by-head", "padding", "both", "both-added"]
)
def test_forward_of_torch(kind, batch_first, need_weights):
    query, memory = torch.randn(ROWS, TARGET, WIDTH), torch.randn(ROWS, SOURCE, WIDTH)
    if not batch_first:
        query, memory = query.transpose(0, 1), memory.transpose(0, 1)
    same(attention(batch_first=batch_first), query, memory, memory, need_weights=need_weights, **masks(kind))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6}, {"kdim": 6, "vdim": 10, "bias": False}])
@pytest.mark.parametrize("kind", ["none", "padding"])
def test_forward_of_torch_unbatched_and_of_other_widths(kind, options):
    module = attention(**options)
    query = torch.randn(TARGET, WIDTH)
    key, value = torch.randn(SOURCE, module.kdim), torch.randn(SOURCE, module.vdim)
    mask = {name: value[0] for name, value in masks(kind).items()}
    same(module, query, key, value, average_attn_weights=False, **mask)
    same(module, query, key, value, need_weights=False, **mask)


def test_forward_of_torch_to_itself_and_causal():
    x = torch.randn(ROWS, TARGET, WIDTH)
    causal = nn.Transformer.generate_square_subsequent_mask(TARGET)
    for need_weights in (False, True):
        same(attention(batch_first=True), x, x, x, need_weights=need_weights)
        same(attention(batch_first=True), x, x, x, attn_mask=causal, is_causal=True, need_weights=need_weights)
    module = attention()
    refit(module, Attention)
    with pytest.raises(CPQError, match="attn_mask"):
        module(x, x, x, is_causal=True)


def test_dropout_of_attention():
    """Drawn otherwise with than without `need_weights`, so only with it the numbers of torch."""
    x = torch.randn(ROWS, TARGET, WIDTH)
    same(attention(batch_first=True, dropout=0.5).train(), x, x, x)
    module = attention(batch_first=True, dropout=0.5).train()
    refit(module, Attention)
    outputs = [module(x, x, x, need_weights=False)[0] for _ in range(2)]
    assert not torch.equal(*outputs)
    assert torch.equal(*[module.eval()(x, x, x, need_weights=False)[0] for _ in range(2)])


class Decoder(nn.Module):
    """torch's whole transformer, and a head."""

    def __init__(self, **options):
        super().__init__()
        options = {"batch_first": True, "dropout": 0.0} | options
        self.net = nn.Transformer(WIDTH, HEADS, 2, 2, 24, **options)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, source, target, padding=None):
        padded = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        return self.head(self.net(source, target, **(padded if padding is not None else {})))


def batch():
    torch.manual_seed(3)
    padding = torch.arange(SOURCE) >= torch.tensor([[4], [7], [2]])
    return {"source": torch.randn(ROWS, SOURCE, WIDTH), "target": torch.randn(ROWS, TARGET, WIDTH), "padding": padding}


def quiet(build):
    with warnings.catch_warnings():  # torch's encoder says that its fused function does not fit, and how new it is
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(0)
        return build()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("settings", [{"weight_bits": 2}, {"weight_bits": 3, "activation_bits": 4}])
def test_evaluation_is_what_is_packed(settings, norm_first, padded):
    """torch's encoder multiplies in evaluation, without gradients, with what it takes for its layers' weights."""
    model = quiet(lambda: Decoder(norm_first=norm_first))
    inputs = batch()
    if not padded:
        del inputs["padding"]
    before = model.state_dict()
    prepare_model(model, CPQConfig(**settings))
    assert before.keys() <= model.state_dict().keys()
    calibrate_model(model, [inputs])
    with_gradients = model.eval()(**inputs)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs), with_gradients, atol=0, rtol=0)
        plain = dequantize_copy(model)
        if "activation_bits" not in settings:
            torch.testing.assert_close(quiet(lambda: plain(**inputs)), with_gradients, atol=1e-5, rtol=1e-5)
        pack_model(model)
        torch.testing.assert_close(model(**inputs), with_gradients, atol=0, rtol=0)
        fast_inference(model)
        torch.testing.assert_close(model(**inputs), with_gradients, atol=2e-2, rtol=2e-2)
    assert plain.state_dict().keys() == before.keys()
    assert {type(one) for one in plain.modules()} == {type(one) for one in quiet(Decoder).modules()}


def dequantize_copy(model):
    plain = copy.deepcopy(model)
    dequantize(plain)
    return plain


@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 10}])
def test_all_of_it_trains(options):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.head = attention(batch_first=True, **options), nn.Linear(WIDTH, 2)

        def forward(self, query, key, value):
            return self.head(self.attend(query, key, value)[0])

    model = prepare_model(Model(), CPQConfig(weight_bits=4, activation_bits=4, dropbits=0.1))
    report = summarize(model).to_dict()
    names = QUANTIZED if not options else ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"]
    assert report["layers"].keys() == {f"attend.{name}" for name in names}
    assert {layer["kind"] for layer in report["layers"].values()} == {"attention"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    CPQController(model, optimizer, total_steps=30)
    inputs = [torch.randn(ROWS, n, width) for n, width in
              ((TARGET, WIDTH), (SOURCE, model.attend.kdim), (SOURCE, model.attend.vdim))]  # fmt: skip
    want, losses = torch.randn(ROWS, TARGET, 2), []
    for _ in range(30):
        loss = (model.train()(*inputs) - want).square().mean()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad():
        trained = model.eval()(*inputs)
        assert torch.equal(pack_model(model)(*inputs), trained)


def test_one_step_size_for_what_shares_a_weight():
    """Query and memory meet one weight; their common grid is found from both."""
    model = prepare_model(nn.ModuleDict({"attend": attention(), "head": nn.Linear(2, 2)}),
                          CPQConfig(activation_bits=8, modules_to_not_convert=["head"]))  # fmt: skip
    attend = model["attend"].train()
    attend(torch.randn(TARGET, ROWS, WIDTH), memory := 100 * torch.randn(SOURCE, ROWS, WIDTH), memory)
    assert float(attend.in_proj_weight_quantizers.input_quantizer.alpha()) * 127 > 100


@pytest.mark.parametrize("left", QUANTIZED)
def test_a_part_left_in_float(left):
    model = quiet(Decoder)
    prepare_model(model, CPQConfig(weight_bits=2, modules_to_not_convert=[f"*.{left}", "head"]))
    with torch.no_grad():
        want = model.eval()(**batch())
        assert torch.equal(pack_model(model)(**batch()), want)
    other = next(name for name in QUANTIZED if name != left)
    names = summarize(model).to_dict()["layers"]
    assert any(name.endswith(other) for name in names)
    assert not any(name.endswith(left) for name in names)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_forms_that_are_not_covered_stay_float(options):
    model = nn.ModuleDict({"attend": attention(**options), "other": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    prepare_model(model, CPQConfig())
    report = summarize(model).to_dict()
    assert report["layers"].keys() == {"other"}
    assert type(model["attend"]) is nn.MultiheadAttention
    x = torch.randn(TARGET, ROWS, WIDTH)
    assert model["attend"](x, x, x)[0].shape == x.shape


def test_products_are_counted():
    """A budget of multiply-accumulates: each third of the weight meets the tokens of its own input."""
    model = prepare_model(nn.ModuleDict({"attend": attention(), "head": nn.Linear(2, 2)}), CPQConfig())
    layer = model["attend"].in_proj_weight_quantizers
    query, memory = torch.randn(TARGET, ROWS, WIDTH), torch.randn(SOURCE, ROWS, WIDTH)
    positions, elements = layer.count_uses((query, memory, memory), None)
    assert positions == (TARGET + 2 * SOURCE) * ROWS / 3
    assert elements == (TARGET + SOURCE) * ROWS * WIDTH
