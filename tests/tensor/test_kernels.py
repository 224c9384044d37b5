"""The C kernels against torch operations, which test_fake_quantize.py compares with the textbook form."""

from __future__ import annotations

import subprocess
import sys
import zlib

import pytest
import torch

from cpq_hf.tensor import fake_quantize as grid
from cpq_hf.tensor import step_size as fitting
from cpq_hf.tensor.kernels import crc
from cpq_hf.tensor.kernels.fake_quantize import cpu
from cpq_hf.tensor.kernels.fake_quantize.dropped import Dropped
from cpq_hf.tensor.kernels.layout import Layout, in_memory_order_of
from cpq_hf.tensor.spec import Grid

NOISE = torch.tensor([0.15])
SHAPES = {  # x, alpha
    "rows": ((70, 1, 300), (70, 1, 1)),
    "groups": ((9, 5, 32), (9, 5, 1)),
    "odd": ((3, 1, 7), (3, 1, 1)),
    "one": ((8, 1, 5000), (1, 1, 1)),
    "activation": ((4, 3, 17, 5), (1,)),
    "column of one": ((300, 1, 1), (300, 1, 1)),
}
# relative; in float32 the exponential differs in the last digits, which in bfloat16 can turn a tie: one unit, 2^-7
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def _kernels():
    if cpu.load() is None:
        pytest.fail("the C kernels were not built; this machine should have a C compiler")


@pytest.fixture
def eager(monkeypatch):
    """Run a function on torch operations only."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "load", lambda: None)
            return function()

    return call


def case(shape, alpha_shape, dtype, bits, spread=1.2):
    alpha = torch.rand(alpha_shape) + 0.5
    x = (torch.randn(shape) * 2 ** (bits - 1) * spread * alpha.mean()).to(dtype)
    return x.requires_grad_(), alpha.requires_grad_(), torch.randn(shape).to(dtype)


def both_ways(function, x, alpha, g, eager):
    def run():
        torch.manual_seed(5)
        output = function()
        return output.detach(), *torch.autograd.grad(output, [x, alpha], g)

    return run(), eager(run)


@pytest.mark.parametrize("dropped", [False, True], ids=["plain", "dropped"])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", SHAPES)
def test_equal_to_torch_operations(layout, dtype, bits, signed, dropped, eager, monkeypatch):
    centered = signed and bits != 3  # 3 bits, dropped, are the case of an element of 2 bits that is not centred
    x, alpha, g = case(*SHAPES[layout], dtype, bits)
    keep = torch.linspace(0.9, 0.5, bits - 2)
    drawn = grid.draw_max_level(x, keep, torch.tensor([5]), Grid(bits, signed))
    monkeypatch.setattr(grid, "draw_max_level", lambda *_: drawn)  # torch operations draw others from the same seed
    calls = []
    monkeypatch.setattr(cpu, "_layout", lambda *a, original=cpu._layout: calls.append(original(*a)) or calls[-1])

    def function():
        if dropped:
            return grid.fake_quantize(x, alpha, NOISE, Grid(bits, signed, centered), 0.1, keep_prob=keep)
        return grid.fake_quantize(x, alpha, NOISE, Grid(bits, signed, centered), 0.1)

    ours, theirs = both_ways(function, x, alpha, g, eager)
    assert None not in calls[:2]
    assert torch.equal(ours[0], theirs[0])
    tolerance = TOLERANCE[dtype]
    assert torch.allclose(ours[1], theirs[1], rtol=tolerance, atol=2e-6 * g.abs().max().item() / NOISE.item())
    scale = 2 ** (bits - 1) * (x.numel() / alpha.numel()) ** 0.5
    assert torch.allclose(ours[2], theirs[2], rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("dropped", [False, True], ids=["plain", "dropped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [*SHAPES, "columns"])
def test_rounding_to_another_dtype_at_once(layout, dtype, dropped, eager):
    """As a product under autocast asks for: the bits of casting the result and its gradient; sums in another order."""
    if layout == "columns":
        x, alpha = torch.randn(96, 130).mul(3).t()[:, None, :].requires_grad_(), torch.rand(130, 1, 1).add(0.2)
        alpha.requires_grad_()
    else:
        x, alpha, _ = case(*SHAPES[layout], torch.float32, 4)
    g, keep = torch.randn(x.shape).to(dtype), torch.tensor([0.9, 0.5], requires_grad=True)

    def run(**options):
        torch.manual_seed(5)
        if dropped:
            output = grid.fake_quantize(x, alpha, NOISE, Grid(4, True), **options, keep_prob=keep).to(dtype)
        else:
            output = grid.fake_quantize(x, alpha, NOISE, Grid(4, True), **options).to(dtype)
        again = grid.quantize_again(output.grad_fn) if options else output
        return output, again, *torch.autograd.grad(output, [x, alpha, *([keep] if dropped else [])], g)

    for cast, at_once in ((run(), run(dtype=dtype)), (eager(run), eager(lambda: run(dtype=dtype)))):
        assert [tensor.dtype for tensor in at_once] == [tensor.dtype for tensor in cast]
        assert all(torch.equal(a, b) for a, b in zip(cast[:3], at_once[:3], strict=True))
        for a, b in zip(cast[3:], at_once[3:], strict=True):
            assert (a - b).norm() <= 1e-5 * a.norm()


def test_bits_are_dropped_by_the_published_generator():
    """Philox4x32-10 of counter 0 and key 0, as in the known answers of its authors' library."""
    numbers = torch.tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
    seed, own = torch.tensor([0]), Grid(3, True)
    for index, number in enumerate(numbers.tolist()):
        for half, u in enumerate((number & 0xFFFF, number >> 16)):
            for keep, last_level in ((u, 1), (u + 1, 3)):  # kept if u is below
                drawn = cpu.draw_max_level(torch.empty(128), torch.tensor([keep / 2**16]), seed, own)
                assert drawn[32 * index + half] == last_level


@pytest.mark.parametrize("count", [1, 127, 128, 129, 100_001])
def test_draws_do_not_depend_on_the_number_of_threads(count, monkeypatch):
    draws = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(cpu, "_threads", lambda _, threads=threads: threads)
        keep = torch.tensor([0.8, 0.5, 0.0])
        draws.append(cpu.draw_max_level(torch.empty(count), keep, torch.tensor([-5]), Grid(5, True)))
    assert all(torch.equal(draws[0], other) for other in draws)
    assert draws[0].max() <= 7  # a probability of 0 is one


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", [*SHAPES, "columns"])
def test_gradient_of_keep_probabilities_equals_torch_operations(layout, dtype, signed, eager):
    if layout == "columns":
        x, alpha = torch.randn(96, 130).mul(3).to(dtype).t()[:, None, :], torch.rand(130, 1, 1) + 0.2
    else:
        x, alpha, _ = (tensor.detach() for tensor in case(*SHAPES[layout], dtype, 5))
    g = torch.randn(x.shape).to(dtype)
    keep = torch.tensor([0.999, 0.7, 0.01])
    own = Grid(5, signed, signed)
    max_level = grid.draw_max_level(x, keep, torch.tensor([5]), own)
    ours = cpu.keep_gradient(
        x, alpha, own, Dropped(keep, torch.tensor([5]), max_level), in_memory_order_of(x, g, dtype)
    )
    theirs = eager(lambda: grid._keep_gradient(x, alpha, own, keep, max_level, g))
    terms = 25 * (g.float() * alpha).norm() * 16  # the sums cancel: relative to the size of what they add up
    assert ours is not None
    assert ((ours - theirs).abs() <= 1e-6 * terms).all()


def test_transposed_weights(eager):
    weight = torch.randn(96, 130, requires_grad=True)  # [in, out], as transformers' Conv1D has it
    alpha = (torch.rand(130, 1, 1) + 0.2).requires_grad_()
    g = torch.randn(130, 1, 96)
    assert cpu._layout(weight.t()[:, None, :], alpha, None) == (96, 130, Layout.COLUMNS)

    def function():
        return grid.fake_quantize(weight.t()[:, None, :], alpha, NOISE, Grid(4, True))

    ours, theirs = both_ways(function, weight, alpha, g, eager)
    assert torch.equal(ours[0], theirs[0])
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_channels_last_activations(eager):
    x = torch.randn(2, 6, 5, 7).to(memory_format=torch.channels_last).requires_grad_()
    alpha = torch.tensor([0.3], requires_grad=True)
    g = torch.randn(2, 6, 5, 7)  # not channels_last
    ours, theirs = both_ways(lambda: grid.fake_quantize(x, alpha, NOISE, Grid(4, True)), x, alpha, g, eager)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noise", [0.02, 1 / 3, 0.5])
@pytest.mark.parametrize("bits", [2, 4])
def test_noise_at_its_ends_and_values_far_outside(bits, noise, eager):
    x = torch.tensor([torch.inf, -torch.inf, 1e38, -40.0, 0.0, 0.5, -0.5, 1.5, 2.4999, -2.0, 100.0] * 3)
    x.requires_grad_()
    alpha, g = torch.tensor([1.0], requires_grad=True), torch.randn(33)

    def function():
        return grid.fake_quantize(x, alpha, torch.tensor([noise]), Grid(bits, True))

    ours, theirs = both_ways(function, x, alpha, g, eager)
    assert torch.equal(ours[0], theirs[0])
    # at noise 0.02 a boundary is 25 steep, and float32 positions next to it are worth 25 / 0.02 * 6e-8
    assert torch.allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-4)
    assert torch.allclose(ours[2], theirs[2], rtol=1e-4, atol=1e-3)


def test_bfloat16_is_rounded_to_nearest_even():
    # level * alpha lies exactly between two bfloat16 numbers: above an even one, above an odd one, and just off
    for alpha in (1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 + 3 * 2**-8 - 2**-20):
        x = torch.tensor([1.0, -1.0, 2.0], dtype=torch.bfloat16)
        out = grid.fake_quantize(x, torch.tensor([alpha]), NOISE, Grid(8, True))
        assert torch.equal(out, (torch.tensor([1.0, -1.0, 2.0]) * alpha).to(torch.bfloat16)), alpha


def test_nan_stays_nan():
    x = torch.tensor([torch.nan, 0.3])
    out = grid.fake_quantize(x, torch.tensor([0.1]), NOISE, Grid(4, True))
    assert out.isnan().tolist() == [True, False]


def test_rounding_is_to_even_and_exact():
    lo, hi = Grid(8, True).bounds
    half = torch.arange(lo - 4, hi + 4) + 0.5
    out = grid.fake_quantize(half, torch.tensor([1.0]), NOISE, Grid(8, True))
    assert torch.equal(out, half.round().clamp(lo, hi))
    alpha = torch.tensor([0.0371])
    x = torch.randn(100_000)
    assert torch.equal(grid.fake_quantize(x, alpha, NOISE, Grid(8, True)), (x / alpha).round().clamp(lo, hi) * alpha)


@pytest.mark.parametrize("layout", SHAPES)
def test_results_do_not_depend_on_the_number_of_threads(layout, monkeypatch):
    monkeypatch.setattr(cpu, "_ELEMENTS_PER_THREAD", 1)
    x, alpha, g = case(*SHAPES[layout], torch.float32, 4)
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(cpu, "_threads", lambda _, threads=threads: threads)
        output = grid.fake_quantize(x, alpha, NOISE, Grid(4, True))
        results.append((output.detach(), *torch.autograd.grad(output, [x, alpha], g)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("x", "alpha"),
    [
        (torch.randn(4, 1, 6, dtype=torch.float64), torch.ones(4, 1, 1)),
        (torch.randn(4, 1, 6).half(), torch.ones(4, 1, 1)),
        (torch.randn(4, 2, 6)[:, :1], torch.ones(4, 1, 1)),
        (torch.randn(4, 1, 6), torch.ones(1, 1, 6)),
        (torch.randn(0, 1, 6), torch.ones(1, 1, 1)),
    ],
    ids=["float64", "float16", "strided", "alpha per column", "empty"],
)
def test_what_the_kernels_leave_to_torch(x, alpha):
    assert cpu.quantize(x, alpha, Grid(4, True), None, x.dtype) is None
    assert grid.fake_quantize(x, alpha, NOISE.to(alpha.dtype), Grid(4, True)).shape == x.shape


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_without_a_compiler_everything_still_runs(tmp_path):
    script = (
        "import torch; from cpq_hf import CPQConfig, prepare_model, summarize\n"
        "model = prepare_model(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), CPQConfig())\n"
        "model(torch.randn(3, 8)).sum().backward()\n"
        "assert summarize(model).to_dict()['kernel'] == 'eager'"
    )
    done = run_python(script, PATH=str(tmp_path), CC="", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    # a compiler that fails, and a cache that cannot be written
    done = run_python(script, CC="false", PATH=str(tmp_path) + ":/bin:/usr/bin", XDG_CACHE_HOME="/dev/null")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_built_once_and_not_at_import(tmp_path):
    done = run_python("import cpq_hf", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0
    assert not list(tmp_path.iterdir())
    script = "from cpq_hf.tensor.kernels.fake_quantize import cpu; assert cpu.name() == 'c'"
    for _ in range(2):
        assert run_python(script, XDG_CACHE_HOME=str(tmp_path)).returncode == 0
        (library,) = (tmp_path / "cpq_hf").iterdir()
    assert library.suffix == ".so"


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_step_sizes_are_tried_as_by_torch(bits):
    """In one call, and rows longer than the block in which a sum stays float32."""
    x, tries = torch.randn(5, 3000), torch.rand(5, 7) + 0.05
    own = Grid(bits, True, centered=True)
    found = cpu.try_steps(x, tries, own)
    assert found is not None
    for got, want in zip(found, fitting._try_steps(x.double(), tries.double(), own), strict=True):
        assert torch.allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("start", [0, 1, 0xFFFFFFFF, 0x12345678], ids=hex)
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 127, 1 << 12, (1 << 16) + 15, 300_007])
def test_crc32_is_that_of_zlib(size, start, monkeypatch):
    monkeypatch.setattr(crc, "_LONG", 0)
    data = torch.randint(256, (size + 3,), dtype=torch.uint8)[3:]  # at an odd address
    assert crc.crc32(data, start) == zlib.crc32(data.numpy().tobytes(), start)


def test_crc32_of_any_tensor_and_without_a_compiler(monkeypatch):
    tensors = [torch.randn(300, 200), torch.randn(70, 500).bfloat16(), torch.zeros(0), torch.tensor(7), torch.ones(1)]
    found = [crc.crc32(tensor, 5) for tensor in tensors]
    assert found == [zlib.crc32(bytes(tensor.flatten().view(torch.uint8).tolist()), 5) for tensor in tensors]
    assert found[2] == 5
    monkeypatch.setattr(crc, "load", lambda: None)
    assert [crc.crc32(tensor, 5) for tensor in tensors] == found
