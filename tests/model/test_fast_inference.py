"""Packed weights in C: written out bit for bit, multiplied straight from the words within a stated tolerance."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import auto_class, build, inputs
from torch import nn
from transformers.pytorch_utils import Conv1D

from cpq_hf import CPQConfig, CPQError, calibrate_model, fast_inference, pack_model, prepare_model
from cpq_hf.tensor.kernels import packed
from cpq_hf.tensor.kernels.packed import cpu as packed_cpu
from cpq_hf.tensor.packing import pack
from cpq_hf.tensor.spec import Grid

BITS = [2, 3, 4, 5, 6, 7, 8]
SHAPES = {  # rows, columns, groups (0: one scale for all)
    "one weight": (1, 1, 1),
    "tensor": (3, 7, 0),
    "row below a window": (40, 5, 1),
    "odd": (33, 131, 1),
    "groups within a chunk": (10, 96, 3),
    "groups of chunks": (6, 1024, 2),
    "groups across chunks": (7, 720, 5),
    "many rows": (130, 400, 1),
    "blocks of columns": (6, 4700, 1),
    "groups cut by blocks of columns": (5, 4608, 4),
}
# of the sum of all |weight * input| in float32; in bfloat16 the output is rounded to 8 bits, the exact weights too
TOLERANCE = {torch.float32: packed.TOLERANCE, torch.bfloat16: 2**-8}


@pytest.fixture(autouse=True)
def _kernels():
    if packed_cpu.load() is None:
        pytest.fail("the C kernels were not built; this machine should have a C compiler")


def packed_rows(bits: int, shape: str):
    rows, columns, groups = SHAPES[shape]
    lo, hi = Grid(bits, True).bounds
    levels = torch.randint(lo, hi + 1, (rows, columns))
    return pack(levels, bits), torch.rand(rows, groups) + 0.1 if groups else torch.rand(1) + 0.1, columns


def float64_product(x, words, scale, bias, bits, columns, offset):
    """Product, and the sum of magnitudes that its error is measured by."""
    weight = packed._dequantize_eager(words, scale, bits, columns, offset, torch.float32).double()
    x, bias = x.double(), bias.double()
    return x @ weight.T + bias, x.abs() @ weight.abs().T + bias.abs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_equals_torch_operations(shape, bits, dtype):
    words, scale, columns = packed_rows(bits, shape)
    for offset in (0.0, 0.5) if bits == 2 else (0.0,):
        ours = packed.dequantize(words, scale, bits, columns, offset, dtype)
        assert ours.dtype == dtype
        assert torch.equal(ours, packed._dequantize_eager(words, scale, bits, columns, offset, dtype))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_product_against_float64(shape, bits, dtype):
    words, scale, columns = packed_rows(bits, shape)
    bias = torch.randn(words.shape[0]).to(dtype)
    for offset in (0.0, 0.5) if bits == 2 else (0.0,):
        for batch in range(1, 18):
            x = torch.randn(batch, columns).to(dtype)
            ours = packed.multiply(x, words, scale, bias, bits, offset)
            want, magnitude = float64_product(x, words, scale, bias, bits, columns, offset)
            assert ours.dtype == dtype
            assert ((ours - want).abs() <= TOLERANCE[dtype] * magnitude).all(), batch


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_depends_neither_on_its_batch_nor_on_threads(shape, bits, monkeypatch):
    words, scale, columns = packed_rows(bits, shape)
    x = torch.randn(39, columns)  # more than a band takes at once
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(packed_cpu, "_threads", lambda _, threads=threads: threads)
        results.append(packed.multiply(x, words, scale, None, bits, 0.0))
        results.append(torch.cat([packed.multiply(row[None], words, scale, None, bits, 0.0) for row in x]))
        results.append(torch.cat([packed.multiply(rows, words, scale, None, bits, 0.0) for rows in x.split(6)]))
    assert all(torch.equal(results[0], other) for other in results[1:])


BEHIND = """
import ctypes, mmap, torch
from test_fast_inference import BITS, SHAPES, packed, packed_rows
libc, page = ctypes.CDLL(None), mmap.PAGESIZE
for bits in BITS:
    for shape in SHAPES:
        words, scale, columns = packed_rows(bits, shape)
        room = -(-words.numel() * 4 // page) * page
        memory = mmap.mmap(-1, room + page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert libc.mprotect(ctypes.c_void_p(address + room), ctypes.c_size_t(page), 0) == 0
        inside = torch.frombuffer(memory, dtype=torch.int32, count=words.numel(), offset=room - words.numel() * 4)
        inside = inside.view_as(words).copy_(words)
        x = torch.randn(3, columns)
        assert torch.equal(packed.multiply(x, inside, scale, None, bits, 0.0),
                           packed.multiply(x, words, scale, None, bits, 0.0))
        packed.dequantize(inside, scale, bits, columns, 0.0, torch.float32)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forbids pages by Linux's mprotect")
def test_reads_nothing_behind_the_words():
    """The words end where memory ends that may be read: a byte more kills the process."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", BEHIND],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_inputs_of_any_layout():
    words, scale, columns = packed_rows(3, "odd")
    for x in (
        torch.randn(columns, 6).T,
        torch.randn(6, 2 * columns)[:, ::2],
        torch.randn(2, 3, columns),
        torch.randn(columns),
        torch.randn(0, columns),
        torch.randn(2, 0, columns),
        torch.randn(columns).expand(4, columns),
    ):
        ours = packed.multiply(x, words, scale, None, 3, 0.0)
        assert ours.shape == (*x.shape[:-1], 33)
        assert torch.equal(ours, packed.multiply(x.contiguous(), words, scale, None, 3, 0.0))


def test_nan_and_infinity_stay_in_their_row():
    words, scale, columns = packed_rows(4, "odd")
    x = torch.randn(3, columns)
    x[1, 5] = torch.nan
    ours = packed.multiply(x, words, scale, None, 4, 0.0)
    assert ours.isnan().any(1).tolist() == [False, True, False]


def packed_model(layer: nn.Module, x=None, **fields) -> nn.Module:
    model = prepare_model(nn.Sequential(layer), CPQConfig(modules_to_not_convert=[], **fields))
    return pack_model(model if x is None else calibrate_model(model, [x]))


def assert_close(fast, exact, tolerance=1e-5):
    assert fast.dtype == exact.dtype
    assert torch.allclose(fast, exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


LAYERS = {"linear": lambda: nn.Linear(96, 40), "no bias": lambda: nn.Linear(96, 40, bias=False)}
LAYERS["conv1d"] = lambda: Conv1D(40, 96)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("activation_bits", [None, 8], ids=["W", "WA8"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layer", LAYERS)
def test_fast_layers_equal_exact_ones_and_go_back(layer, bits, activation_bits, granularity):
    x = torch.randn(2, 3, 96)
    fields = {"weight_bits": bits, "activation_bits": activation_bits, "granularity": granularity, "group_size": 16}
    model = packed_model(LAYERS[layer](), x, **fields)
    with torch.no_grad():
        exact = model(x)
        assert fast_inference(model) is model
        assert model[0].fast
        assert_close(model(x), exact)
        assert torch.equal(fast_inference(model, enabled=False)(x), exact)


def test_packing_stays_exact_unless_asked():
    model = packed_model(nn.Linear(96, 40))
    assert not model[0].fast
    assert fast_inference(copy.deepcopy(model))[0].fast
    assert not model[0].fast


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert", "mixtral", "resnet"])
def test_models(name):
    torch.manual_seed(0)
    model = prepare_model(build(name), CPQConfig(weight_bits=4, quantize_embeddings=True))
    pack_model(model)
    batch = inputs(name)
    with torch.no_grad():
        exact = model(**batch).logits
        assert_close(fast_inference(model)(**batch).logits, exact)


def test_reloaded_model_is_exact_until_asked(tmp_path):
    model = pack_model(prepare_model(build("llama"), CPQConfig(weight_bits=3)))
    batch = inputs("llama")
    with torch.no_grad():
        exact, fast = model(**batch).logits, fast_inference(model)(**batch).logits
        model.save_pretrained(tmp_path)
        again = auto_class("llama").from_pretrained(tmp_path)
        assert torch.equal(again(**batch).logits, exact)
        assert torch.equal(fast_inference(again)(**batch).logits, fast)


def test_dequantized_model_forgets_the_setting():
    model = fast_inference(pack_model(prepare_model(build("llama"), CPQConfig(weight_bits=3))))
    batch = inputs("llama")
    with torch.no_grad():
        fast = model(**batch).logits
        assert_close(model.dequantize()(**batch).logits, fast)
    assert not any("fast" in vars(module) for module in model.modules())


def test_bfloat16_model_and_autocast():
    model, x = packed_model(nn.Linear(96, 40), weight_bits=4), torch.randn(5, 96)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            exact = model(x)
            assert_close(fast_inference(model)(x), exact, 2**-7)
        model.to(torch.bfloat16)
        fast = model(x.bfloat16())
        exact = fast_inference(model, False)(x.bfloat16())
        assert not torch.equal(fast, exact)  # the kernel did run
        assert_close(fast, exact, 2**-7)
        model.half()
        half = fast_inference(model)(x.half())
        assert torch.equal(half, fast_inference(model, False)(x.half()))


def test_gradients_of_inputs_and_biases():
    model = packed_model(nn.Linear(96, 40))
    x = torch.randn(2, 3, 96, requires_grad=True)
    exact = torch.autograd.grad(model(x).square().sum(), [x, model[0].bias])
    fast = torch.autograd.grad(fast_inference(model)(x).square().sum(), [x, model[0].bias])
    for one, other in zip(fast, exact, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("enabled", [True, False], ids=["fast", "exact"])
def test_no_graph_break_under_compile(enabled):
    x = torch.randn(5, 96)
    model = fast_inference(packed_model(nn.Linear(96, 40), x, activation_bits=8), enabled)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        assert torch.equal(compiled(x[:3]), model(x[:3]))


def test_export_contains_only_torch_operators():
    model = fast_inference(packed_model(nn.Linear(96, 40)))
    x = torch.randn(5, 96)
    program = torch.export.export(model, (x,))
    assert not any("cpq_hf" in str(node.target) for node in program.graph.nodes)
    assert_close(program.module()(x), model(x))


def test_what_has_no_kernel_stays_exact_and_is_named(caplog, monkeypatch):
    x = torch.randn(5, 96)
    model = packed_model(nn.Linear(96, 40), weight_bits=2, granularity="group", group_size=12)
    exact = model(x)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(fast_inference(model)(x), exact)
    assert "1 layers stay exact, there is no fast kernel for them here: 0" in caplog.text
    monkeypatch.setattr(packed_cpu, "load", lambda: None)
    caplog.clear()
    model = packed_model(nn.Linear(96, 40))
    exact = model(x)
    assert torch.equal(fast_inference(model)(x), exact)
    assert "there is no fast kernel" in caplog.text


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch):
    packed._is_right.cache_clear()
    right = packed_cpu.multiply
    monkeypatch.setattr(packed_cpu, "multiply", lambda *arguments: right(*arguments) * (1 + 1e-4))
    model = packed_model(nn.Linear(96, 40))
    assert not fast_inference(model)[0].fast
    packed._is_right.cache_clear()


def test_without_the_library_a_fast_layer_still_runs(monkeypatch):
    model, x = packed_model(nn.Linear(96, 40)), torch.randn(5, 96)
    exact = model(x)
    fast_inference(model)
    monkeypatch.setattr(packed_cpu, "load", lambda: None)  # as if copied to a machine without a compiler
    assert torch.equal(model(x), exact)


def test_a_model_without_packed_layers_is_refused():
    with pytest.raises(CPQError, match="no packed layers; pack it first"):
        fast_inference(nn.Linear(2, 2))


def test_memory_stays_packed():
    model = fast_inference(packed_model(nn.Linear(512, 512), weight_bits=3))
    model(torch.randn(4, 512))
    held = sum(t.numel() * t.element_size() for t in (*model.buffers(), *model.parameters()))
    assert held <= 1.05 * (512 * 512 * 3 / 8 + 4 * 512 * 2)
    assert not any(isinstance(value, torch.Tensor) for value in vars(model[0]).values())
