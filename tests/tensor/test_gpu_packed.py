"""Packed weights in Triton, on a GPU where there is one, else in the interpreter: exact, or within a stated bound."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cpq_hf import CPQConfig, fast_inference, pack_model, prepare_model
from cpq_hf.tensor.kernels import packed
from cpq_hf.tensor.kernels.packed import gpu as packed_gpu
from cpq_hf.tensor.packing import pack
from cpq_hf.tensor.spec import Grid

pytest.importorskip("triton")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BITS = [2, 3, 4, 5, 6, 7, 8]
SHAPES = {  # rows, columns, groups (0: one scale for all)
    "one weight": (1, 1, 1),
    "tensor": (3, 7, 0),
    "odd": (5, 131, 1),
    "groups": (2, 96, 3),
    "wide groups": (2, 2048, 2),
    "rounds": (2, 1100, 1),
}
# of the sum of all |weight * input|; half of a unit of the dtype is what rounding the output costs, and the
# interpreter cuts to bfloat16 where a GPU rounds to nearest
TOLERANCE = {torch.float32: packed.TOLERANCE, torch.float16: 2**-11, torch.bfloat16: 2**-8 if CUDA else 2**-7}
EVERY_BITS = pytest.mark.parametrize("bits", BITS)
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The kernels on the device of these tests; the names of those that were launched."""
    caches = (packed_gpu.kernels, packed._is_right, packed._is_exact)
    monkeypatch.setitem(packed.BACKENDS, DEVICE.type, packed_gpu)
    if not CUDA:  # the interpreter is slow: the kernels are checked on fewer rows and inputs
        example = packed._example
        monkeypatch.setattr(packed, "_example", lambda *arguments: tuple(t[:5] for t in example(*arguments)))
    launches = []

    class Recorded:
        def __getattr__(self, name):
            launches.append(name)
            return getattr(packed_gpu.kernels(), name)

    monkeypatch.setattr(packed_gpu, "_loaded", Recorded)
    for cache in caches:
        cache.cache_clear()
    yield launches
    for cache in caches:
        cache.cache_clear()


def packed_rows(bits, shape):
    rows, columns, groups = SHAPES[shape]
    if groups > 1 and columns // groups % packed_gpu._VALUES[bits]:
        pytest.fail("the kernel does not take such groups")
    lo, hi = Grid(bits, True).bounds
    levels = torch.randint(lo, hi + 1, (rows, columns))
    scale = torch.rand(rows, groups) + 0.1 if groups else torch.rand(1) + 0.1
    return pack(levels, bits).to(DEVICE), scale.to(DEVICE), columns


def offsets(bits):
    return (0.0, 0.5) if bits == 2 else (0.0,)


def assert_right(ours, x, words, scale, bias, bits, offset):
    """Against float64, by the sum of magnitudes that the error is measured by."""
    columns, tolerance = x.shape[-1], TOLERANCE[x.dtype]
    weight = packed._dequantize_eager(words, scale, bits, columns, offset, torch.float32).double()
    bias = torch.zeros(words.shape[0], device=DEVICE) if bias is None else bias
    x, bias = x.double(), bias.double()
    error = (ours.double() - (x @ weight.T + bias)).abs()
    assert (error <= (tolerance + packed.TOLERANCE) * (x.abs() @ weight.T.abs() + bias.abs())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16], ids=str)
@EVERY_BITS
@EVERY_SHAPE
def test_dequantize_equals_torch_operations(shape, bits, dtype, launches):
    words, scale, columns = packed_rows(bits, shape)
    for offset in offsets(bits):
        ours = packed_gpu.dequantize(words, scale, bits, columns, offset, dtype)
        exact = packed._dequantize_eager(words, scale, bits, columns, offset, dtype)
        if dtype == torch.bfloat16 and not CUDA:  # cut as the interpreter does: a GPU rounds to nearest
            exact = packed._dequantize_eager(words, scale, bits, columns, offset, torch.float32)
            exact = (exact.view(torch.int32) >> 16 << 16).view(torch.float32).bfloat16()
        assert ours.dtype == dtype
        assert torch.equal(ours, exact)
    assert launches == ["dequantize"] * len(offsets(bits))


@EVERY_BITS
@EVERY_SHAPE
def test_product_against_float64(shape, bits, launches):
    words, scale, columns = packed_rows(bits, shape)
    bias = torch.randn(words.shape[0], device=DEVICE)
    for offset in offsets(bits):
        for batch in (1, 3, 16) if shape in ("tensor", "groups") else (1, 2):
            x, added = torch.randn(batch, columns, device=DEVICE), None if batch == 3 else bias
            launches.clear()
            ours = packed.multiply(x, words, scale, added, bits, offset)
            assert launches == ["multiply"]
            assert ours.shape == (batch, words.shape[0])
            assert_right(ours, x, words, scale, added, bits, offset)


@EVERY_DTYPE
@EVERY_BITS
def test_product_in_every_dtype(bits, dtype):
    words, scale, columns = packed_rows(bits, "groups")
    bias = torch.randn(words.shape[0], device=DEVICE).to(dtype)
    x = torch.randn(3, columns, device=DEVICE).to(dtype)
    ours = packed.multiply(x, words, scale, bias, bits, 0.0)
    assert ours.dtype == dtype
    assert_right(ours, x, words, scale, bias, bits, 0.0)


@EVERY_DTYPE
def test_many_inputs_are_multiplied_by_torch(dtype, launches):
    words, scale, columns = packed_rows(3, "groups")
    x, bias = torch.randn(40, columns, device=DEVICE).to(dtype), torch.randn(2, device=DEVICE)
    ours = packed.multiply(x, words, scale, bias, 3, 0.0)
    assert set(launches) == {"dequantize"}
    weight = packed.dequantize(words, scale, 3, columns, 0.0, dtype)
    assert torch.equal(ours, nn.functional.linear(x, weight, bias.to(dtype)))


@EVERY_BITS
def test_repeated_bit_by_bit(bits):
    words, scale, columns = packed_rows(bits, "rounds")
    x = torch.randn(2, columns, device=DEVICE)
    ours = [packed.multiply(x, words, scale, None, bits, 0.0) for _ in range(2)]
    assert torch.equal(*ours)


def test_an_input_depends_on_no_other_input():
    words, scale, columns = packed_rows(4, "odd")
    x = torch.randn(11, columns, device=DEVICE)
    x[1, 5] = torch.nan
    ours = packed.multiply(x, words, scale, None, 4, 0.0)
    assert ours.isnan().all(1).tolist() == [row == 1 for row in range(11)]
    order = torch.arange(10, -1, -1, device=DEVICE)
    again = packed.multiply(x[order], words, scale, None, 4, 0.0)
    assert torch.equal(again[order].nan_to_num(), ours.nan_to_num())


def test_inputs_of_any_layout():
    words, scale, columns = packed_rows(8, "odd")
    for x in (
        torch.randn(columns, 6).T,
        torch.randn(6, 2 * columns)[:, ::2],
        torch.randn(2, 3, columns),
        torch.randn(columns),
        torch.randn(0, columns),
        torch.randn(2, 0, columns),
        torch.randn(columns).expand(4, columns),
    ):
        x = x.to(DEVICE)
        ours = packed.multiply(x, words, scale, None, 8, 0.0)
        assert ours.shape == (*x.shape[:-1], 5)
        assert torch.equal(ours, packed.multiply(x.contiguous(), words, scale, None, 8, 0.0))


BEHIND = """
import ctypes, mmap, torch
from test_gpu_packed import BITS, packed, packed_gpu, packed_rows
libc, page = ctypes.CDLL(None), mmap.PAGESIZE

def at_the_end(tensor):
    room = -(-tensor.numel() * 4 // page) * page
    memory = mmap.mmap(-1, room + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + room), ctypes.c_size_t(page), 0) == 0
    count = tensor.numel()
    inside = torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=room - count * 4)
    return inside.view_as(tensor).copy_(tensor)

for bits, shape in [(bits, "odd") for bits in BITS] + [(8, "groups")]:
    words, scale, columns = packed_rows(bits, shape)
    inside, x, bias = at_the_end(words), torch.randn(3, columns), torch.zeros(words.shape[0])
    ours = packed_gpu.multiply(at_the_end(x), inside, at_the_end(scale), at_the_end(bias), bits, 0.0)
    assert torch.equal(ours, packed_gpu.multiply(x, words, scale, None, bits, 0.0))
    packed_gpu.dequantize(inside, at_the_end(scale), bits, columns, 0.0, torch.float32)
    print(bits)
"""


@pytest.mark.skipif(CUDA or not sys.platform.startswith("linux"), reason="forbids pages by Linux's mprotect")
def test_reads_nothing_behind_the_tensors():
    """They end where memory ends that may be read: a byte more kills the process."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", BEHIND],
        env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(BITS) + 1


def test_rounds_leave_few_threads_idle():
    for words in (1, 2, 3, 5, 7):
        for inputs in (1, 2, 4, 8):
            for blocks in (64, 96, 128, 176, 256, 512, 704, 1792, 4096):
                threads, depth = packed_gpu._tile(blocks, words, inputs)
                assert depth == 1 or words * depth * inputs <= 4
                assert -(-blocks // (threads * depth)) * threads * depth <= 1.15 * blocks or threads == 32
    assert packed_gpu._tile(512, 1, 1) == (128, 4)  # 4096 columns of 4 bits, one input: one round
    assert packed_gpu._tile(704, 1, 1) == (128, 3)  # 5632


def packed_linear(bits=4, columns=96, rows=20, **fields):
    model = prepare_model(
        nn.Sequential(nn.Linear(columns, rows)), CPQConfig(bits, modules_to_not_convert=[], **fields)
    )
    return pack_model(model).to(DEVICE)


def assert_close(fast, exact, tolerance=1e-5):
    assert fast.dtype == exact.dtype
    assert torch.allclose(fast, exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@EVERY_BITS
def test_layers(bits, granularity, launches):
    model = packed_linear(bits, granularity=granularity, group_size=32)
    x = torch.randn(2, 3, 96, device=DEVICE)
    with torch.no_grad():
        exact = model(x)
        assert fast_inference(model)[0].fast
        launches.clear()
        assert_close(model(x), exact)
        assert launches == ["multiply"]
        launches.clear()
        assert torch.equal(fast_inference(model, enabled=False)(x), exact)
        assert launches == ["dequantize"]


def test_half_models_and_autocast(launches):
    for dtype in (torch.float16, torch.bfloat16):
        model, x = packed_linear().to(dtype), torch.randn(5, 96, device=DEVICE, dtype=dtype)
        with torch.no_grad():
            exact = model(x)
            fast_inference(model)
            launches.clear()
            assert_close(model(x), exact, 2 * TOLERANCE[dtype])
            assert launches == ["multiply"]
    model, x = fast_inference(packed_linear()), torch.randn(5, 96, device=DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


def test_gradients_of_inputs_and_biases(launches):
    model = packed_linear()
    x = torch.randn(2, 3, 96, device=DEVICE, requires_grad=True)
    exact = torch.autograd.grad(model(x).square().sum(), [x, model[0].bias])
    fast_inference(model)
    launches.clear()
    fast = torch.autograd.grad(model(x).square().sum(), [x, model[0].bias])
    assert launches == ["multiply", "dequantize"]
    for one, other in zip(fast, exact, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("enabled", [True, False], ids=["fast", "exact"])
def test_no_graph_break_under_compile(enabled, launches):
    model, x = fast_inference(packed_linear(), enabled), torch.randn(5, 96, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        exact = model(x)
        launches.clear()
        assert torch.equal(compiled(x), exact)
        assert launches == ["multiply" if enabled else "dequantize"]
        assert torch.equal(compiled(x[:3]), model(x[:3]))


def test_operators_are_what_they_say_to_the_compiler():
    words, scale, columns = packed_rows(4, "groups")
    x = torch.randn(3, columns, device=DEVICE, requires_grad=True)
    bias = torch.randn(words.shape[0], device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.cpq_hf.multiply, (x, words, scale, bias, 4, 0.0))
    torch.library.opcheck(torch.ops.cpq_hf.dequantize, (words, scale, 4, columns, 0.0, torch.float16))


def test_groups_that_do_not_fit_stay_exact_and_are_named(caplog, launches):
    model, x = packed_linear(3, granularity="group", group_size=16), torch.randn(5, 96, device=DEVICE)
    exact = model(x)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(fast_inference(model)(x), exact)
    assert "1 layers stay exact, there is no fast kernel for them here: 0" in caplog.text
    model[0].fast = True  # as if it was made fast on a CPU, and then moved
    launches.clear()
    with torch.no_grad():
        assert torch.equal(model(x), exact)
    assert launches == ["dequantize"]


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch, launches):
    right = packed_gpu.multiply
    monkeypatch.setattr(packed_gpu, "multiply", lambda *arguments: right(*arguments) * (1 + 1e-5))
    assert not fast_inference(packed_linear())[0].fast
    right_weights = packed_gpu.dequantize
    monkeypatch.setattr(packed_gpu, "dequantize", lambda *arguments: right_weights(*arguments) * (1 + 2**-23))
    packed._is_exact.cache_clear()
    words, scale, columns = packed_rows(4, "groups")
    ours = packed.dequantize(words, scale, 4, columns, 0.0, torch.float32)
    assert torch.equal(ours, packed._dequantize_eager(words, scale, 4, columns, 0.0, torch.float32))


def test_without_triton_torch_does_the_work(monkeypatch, launches):
    model, x = fast_inference(packed_linear()), torch.randn(5, 96, device=DEVICE)
    monkeypatch.setitem(sys.modules, "triton", None)  # not installed
    packed_gpu.kernels.cache_clear()
    launches.clear()
    with torch.no_grad():
        fast = model(x)
        assert torch.equal(fast, fast_inference(model, enabled=False)(x))
    assert not fast_inference(model)[0].fast
    assert not launches


# The interpreter runs what the compiler may refuse, which needs no GPU: launches are turned into compilations.
COMPILE = """
import warnings; warnings.simplefilter("error")
import subprocess, sys
from pathlib import Path
import torch
import triton
from triton.backends.compiler import GPUTarget
from cpq_hf.tensor.kernels.packed import gpu as packed_gpu, triton_kernels as packed_triton

class Hopper:
    get_current_device = get_current_stream = lambda self, *args: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

class Compiling:
    def __getattr__(self, name):
        kernel = getattr(packed_triton, name)
        return {grid: lambda *args, grid=grid, **meta: compiled.append(kernel.warmup(*args, grid=(1,), **meta))
                for grid in ((2, 1), (8,))}

triton.runtime.driver.set_active(Hopper())
packed_gpu._loaded = Compiling
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for dtype, bits, batch, columns, groups in (
    (torch.bfloat16, 4, 1, 4096, 1), (torch.float16, 4, 8, 4096, 32), (torch.float32, 3, 1, 2048, 1),
    (torch.bfloat16, 6, 2, 2048, 16), (torch.float32, 8, 1, 2048, 0),
):
    words = torch.zeros(8, columns * bits // 32, dtype=torch.int32)
    scale, compiled = torch.ones(8, groups) if groups else torch.ones(1), []
    packed_gpu.multiply(torch.zeros(batch, columns, dtype=dtype), words, scale, torch.zeros(8), bits, 0.0)
    packed_gpu.dequantize(words, scale, bits, min(columns, 1024), 0.0, dtype)
    assert len(compiled) == 2
    multiply, dequantize = (kernel.asm["ptx"] for kernel in compiled)
    assert "ld.global.v4" in multiply, (dtype, bits)  # the inputs: 16 bytes a thread
    assert "st.global.v4" in dequantize, (dtype, bits)
    for kernel in compiled:
        Path(sys.argv[1]).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", sys.argv[1]], capture_output=True, text=True).stdout
        assert "STACK:0 " in usage, (dtype, bits, usage)  # nothing is spilled
    print(dtype, bits)
"""


def test_compiles_for_hopper_with_wide_accesses_and_without_spills(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, str(tmp_path / "cubin")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5


@pytest.mark.skipif(not CUDA, reason="a GPU runs a graph; the interpreter has none")
@EVERY_BITS
def test_in_a_cuda_graph(bits):
    model, x = fast_inference(packed_linear(bits)), torch.randn(1, 96, device=DEVICE)
    with torch.no_grad():
        expected = model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(x)
        graph.replay()
    assert torch.equal(captured, expected)
