"""The Triton kernels against the textbook: on a GPU where there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import reference
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpq_hf import CPQConfig, CPQController, prepare_model, summarize
from cpq_hf.tensor import fake_quantize as grid
from cpq_hf.tensor.kernels import fake_quantize as kernels
from cpq_hf.tensor.kernels.fake_quantize import BACKENDS, gpu
from cpq_hf.tensor.kernels.fake_quantize.dropped import Dropped
from cpq_hf.tensor.kernels.layout import Layout
from cpq_hf.tensor.spec import RAREST, Grid

pytest.importorskip("triton")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
NOISE = torch.tensor([0.1], device=DEVICE)  # the window changes D by 2e-8 there
SHAPES = {  # x, alpha
    "rows": ((18, 1, 300), (18, 1, 1)),
    "long rows": ((2, 1, 2500), (2, 1, 1)),
    "groups": ((9, 5, 32), (9, 5, 1)),
    "odd": ((3, 1, 7), (3, 1, 1)),
    "one": ((3, 1, 701), (1, 1, 1)),
    "activation": ((4, 3, 17, 5), (1,)),
    "rows of one": ((300, 1, 1), (300, 1, 1)),
    "single": ((1, 1, 1), (1, 1, 1)),
    "columns": ((70, 1, 40), (70, 1, 1)),
}
# relative: what rounding to the dtype costs; the interpreter cuts to bfloat16 where a GPU rounds to nearest
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8 if CUDA else 2**-7}
SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
LAYOUTS = pytest.mark.parametrize("layout", SHAPES)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The kernels on the device of these tests, several tiles a program; how often they were launched."""
    gpu._kernels.cache_clear()
    monkeypatch.setitem(BACKENDS, DEVICE.type, gpu)
    monkeypatch.setattr(gpu, "_ENOUGH_PROGRAMS", 2)
    launches = []
    monkeypatch.setattr(gpu, "_grid", lambda original=gpu._grid: launches.append(None) or original())
    return launches


def case(layout, dtype, bits, spread=1.2):
    shape, alpha_shape = SHAPES[layout]
    alpha = torch.rand(alpha_shape) + 0.5
    x = (torch.randn(shape) * 2 ** (bits - 1) * spread).to(dtype)
    # float32 and float64 may see a value at a boundary on different sides; those of every grid are multiples of 1/2
    halves = 2 * x.double() / alpha.double()
    x = torch.where((halves - halves.round()).abs() < 1e-3, (0.2 * alpha).to(dtype), x)
    g = torch.randn(shape).to(DEVICE, dtype)
    if layout == "columns":  # as transformers' Conv1D stores a weight: [in, out]
        x = x[:, 0].t().contiguous().t()[:, None]
    return x.to(DEVICE).requires_grad_(), alpha.to(DEVICE).requires_grad_(), g


def with_gradients(function, inputs, g):
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, g)]


def textbook(x, alpha, g, bits, signed, drawn, centered):
    x, alpha = (tensor.detach().double().cpu().requires_grad_() for tensor in (x, alpha))
    drawn = None if drawn is None else drawn.double().cpu()
    return with_gradients(
        lambda x, alpha: reference.fake_quantize(x, alpha, NOISE.double().cpu(), bits, signed, drawn, centered),
        [x, alpha],
        g.double().cpu(),
    )


def assert_close(ours, theirs, dtype, bits, g, alpha):
    x_hat, grad_x, grad_alpha = (tensor.double().cpu() for tensor in ours)
    tolerance = TOLERANCE[dtype]
    assert torch.allclose(x_hat, theirs[0], rtol=tolerance, atol=0)
    # sums and exponentials are float32, and so are positions, which are worth as much as D is steep, 0.1 / s^2
    largest, noise = g.double().abs().max().item(), NOISE.item()
    error = largest * (2e-6 / noise + 2**bits * 6e-8 * 0.1 / noise**2)
    assert torch.allclose(grad_x, theirs[1], rtol=tolerance, atol=error)
    assert torch.allclose(grad_alpha, theirs[2], rtol=1e-5, atol=error * 2**bits * (g.numel() / alpha.numel()) ** 0.5)


def widths_drawn(x, alpha, keep, seed, bits, signed):
    """The bit-width of each element: what becomes of a value far above the grid is the last level of its own."""
    above = torch.full_like(x, torch.inf).detach()
    top = gpu.quantize(above, torch.ones_like(alpha), Grid(bits, signed), Dropped(keep, seed, None), x.dtype)
    ratio = Grid(bits, signed).bounds[1] + 1 - top.double()
    return bits - ratio.log2().round().long()


@pytest.fixture
def fixed_seed(monkeypatch):
    seed = torch.tensor([-1234567890123456789], device=DEVICE)
    monkeypatch.setattr(grid, "draw_seed", lambda device: seed)
    return seed


@SIGNED
@pytest.mark.parametrize("bits", [2, 3, 8])
@DTYPES
@LAYOUTS
def test_equal_to_the_textbook(layout, dtype, bits, signed, launches):
    centered = signed and bits == 2
    x, alpha, g = case(layout, dtype, bits)
    ours = with_gradients(
        lambda x, alpha: grid.fake_quantize(x, alpha, NOISE, Grid(bits, signed, centered)), [x, alpha], g
    )
    assert len(launches) == 2
    assert [tensor.dtype for tensor in ours] == [dtype, dtype, torch.float32]
    assert_close(ours, textbook(x, alpha, g, bits, signed, None, centered), dtype, bits, g, alpha)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@LAYOUTS
def test_rounding_to_another_dtype_at_once(layout, dtype, dropped, launches, fixed_seed):
    """As a product under autocast asks for: what casting the result gives, and casting its gradient back."""
    x, alpha, g = case(layout, torch.float32, 4)
    keep, g = torch.tensor([0.9, 0.5], device=DEVICE, requires_grad=True), g.to(dtype)

    def run(**options):
        if dropped:
            output = grid.fake_quantize(x, alpha, NOISE, Grid(4, True), **options, keep_prob=keep).to(dtype)
        else:
            output = grid.fake_quantize(x, alpha, NOISE, Grid(4, True), **options).to(dtype)
        again = grid.quantize_again(output.grad_fn) if options else output
        return output, again, *torch.autograd.grad(output, [x, alpha, *([keep] if dropped else [])], g)

    cast, at_once = run(), run(dtype=dtype)
    assert [tensor.dtype for tensor in at_once] == [tensor.dtype for tensor in cast]
    for a, b in zip(cast[:2], at_once[:2], strict=True):
        assert torch.allclose(a, b, rtol=TOLERANCE[dtype], atol=0)
    assert torch.equal(cast[2], at_once[2])
    for a, b in zip(cast[3:], at_once[3:], strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()
    assert len(launches) == 5  # three forward, two backward


def test_lopsided_grid_of_two_bits():
    x, alpha, g = case("rows", torch.float32, 2)
    ours = with_gradients(lambda x, alpha: grid.fake_quantize(x, alpha, NOISE, Grid(2, True)), [x, alpha], g)
    assert_close(ours, textbook(x, alpha, g, 2, True, None, False), torch.float32, 2, g, alpha)
    assert set((ours[0] / alpha).round().unique().tolist()) == {-2, -1, 0, 1}


@SIGNED
@pytest.mark.parametrize(("bits", "min_bits"), [(3, 2), (4, 3), (8, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@LAYOUTS
def test_dropbits_equal_to_the_textbook(layout, dtype, bits, min_bits, signed, fixed_seed, launches):
    """Every element is put, and gets its gradient, on its own grid, which backward must draw as forward did."""
    x, alpha, g = case(layout, dtype, bits)
    keep = torch.linspace(0.9, 0.4, bits - min_bits, device=DEVICE).requires_grad_()
    ours = with_gradients(
        lambda x, alpha, keep: grid.fake_quantize(x, alpha, NOISE, Grid(bits, signed, signed), keep_prob=keep),
        [x, alpha, keep],
        g,
    )
    assert len(launches) == 2
    drawn = widths_drawn(x, alpha, keep.detach(), fixed_seed, bits, signed)
    if x.numel() > 1000:
        assert set(drawn.unique().tolist()) == set(range(min_bits, bits + 1))
    assert_close(ours[:3], textbook(x, alpha, g, bits, signed, drawn, signed), dtype, bits, g, alpha)
    inputs = [tensor.detach().double().cpu() for tensor in (x, alpha, keep)]
    theirs = reference.keep_gradient(*inputs, drawn.cpu(), g.double().cpu(), bits, signed, signed)
    terms = 0.5 / 0.4 * 2**bits * (g.double().norm() * alpha.max()).item()
    assert torch.allclose(ours[3].double().cpu(), theirs, rtol=1e-5, atol=1e-6 * terms)


def test_rare_bits_have_a_bounded_weight(fixed_seed):
    x, alpha, g = case("rows", torch.float32, 3)
    keep = torch.tensor([0.001], device=DEVICE, requires_grad=True)
    output = grid.fake_quantize(x, alpha, NOISE, Grid(3, True), keep_prob=keep)
    (ours,) = torch.autograd.grad(output, [keep], g)
    drawn = widths_drawn(x, alpha, keep.detach(), fixed_seed, 3, True).cpu()
    assert drawn.eq(3).any()
    inputs = [tensor.detach().double().cpu() for tensor in (x, alpha)]
    rarest = torch.tensor([RAREST], dtype=torch.float64)
    theirs = reference.keep_gradient(*inputs, rarest, drawn, g.double().cpu(), 3, True)
    assert torch.allclose(ours.double().cpu(), theirs, rtol=1e-4)


def test_widths_are_drawn_as_often_as_asked_for(launches):
    x, alpha = torch.zeros(8, 1, 8192, device=DEVICE), torch.ones(8, 1, 1, device=DEVICE)
    keep = torch.tensor([0.8, 0.5, 0.1], device=DEVICE)
    *_, pieces, _, _ = gpu._plan(x, alpha, keep)
    assert pieces == 8
    drawn = widths_drawn(x, alpha, keep, torch.tensor([5], device=DEVICE), 5, True)
    for j, probability in enumerate(keep.tolist(), start=3):
        deviation = (probability * (1 - probability) / x.numel()) ** 0.5
        assert (drawn >= j).double().mean().item() == pytest.approx(probability, abs=4 * deviation)
    # the pieces of a program share a random number, 16 bits of it each: no two may agree more than by chance
    kept = (drawn >= 4).double().view(-1, 8, 1024).cpu()
    for first in range(8):
        for second in range(first):
            assert (kept[:, first] == kept[:, second]).double().mean().item() == pytest.approx(0.5, abs=0.025)
    rows = (drawn >= 4).double().flatten(1).cpu()
    for one, other in pairwise(rows):
        assert (one == other).double().mean().item() == pytest.approx(0.5, abs=0.025)


def test_certain_bits():
    x, alpha, seed = torch.zeros(4, 1, 1024, device=DEVICE), torch.ones(4, 1, 1, device=DEVICE), torch.tensor([5])
    keep = torch.tensor([1.0, 0.0], device=DEVICE)
    assert widths_drawn(x, alpha, keep, seed.to(DEVICE), 4, True).unique().tolist() == [3]


def test_processes_and_seeds_draw_masks_of_their_own(monkeypatch):
    x, alpha = torch.full((4, 1, 4096), 9.0, device=DEVICE), torch.ones(4, 1, 1, device=DEVICE)

    def draw(seed, rank):
        monkeypatch.setattr(grid, "process_rank", lambda: rank)
        torch.manual_seed(seed)
        keep = torch.tensor([0.5], device=DEVICE)
        return grid.fake_quantize(x, alpha, NOISE, Grid(4, True), keep_prob=keep)

    masks = [draw(0, 0), draw(1, 0), draw(0, 1), draw(0, 2)]
    assert torch.equal(masks[0], draw(0, 0))
    assert torch.equal(masks[2], draw(0, 1))
    for number, mask in enumerate(masks):
        for other in masks[:number]:
            assert (mask == other).double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_nothing_of_the_size_of_the_weight_is_stored():
    x, alpha, _ = case("rows", torch.float32, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grid.fake_quantize(x, alpha, NOISE, Grid(4, True), keep_prob=torch.ones(2, device=DEVICE))
    assert sorted(tensor.numel() for tensor in saved) == [1, 1, 2, 18, x.numel()]
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in saved)


def test_trained_noise_is_left_to_torch(launches):
    x, alpha, g = case("rows", torch.float32, 4)
    noise = NOISE.clone().requires_grad_()
    keep = torch.tensor([0.8, 0.5], device=DEVICE, requires_grad=True)
    output = grid.fake_quantize(x, alpha, noise, Grid(4, True), keep_prob=keep)
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(output, [x, alpha, noise, keep], g))
    assert not launches


@pytest.mark.parametrize("dropped", [False, True], ids=["plain", "dropped"])
@LAYOUTS
def test_repeated_bit_by_bit(layout, dropped, fixed_seed):
    x, alpha, g = case(layout, torch.float32, 4)
    keep = torch.tensor([0.8, 0.5], device=DEVICE, requires_grad=True)

    def run():
        if dropped:
            output = grid.fake_quantize(x, alpha, NOISE, Grid(4, True), keep_prob=keep)
            return torch.autograd.grad(output, [x, alpha, keep], g)
        return torch.autograd.grad(grid.fake_quantize(x, alpha, NOISE, Grid(4, True)), [x, alpha], g)

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def test_gradient_in_another_order_dtype_or_expanded():
    x = torch.randn(2, 6, 5, 7, device=DEVICE).to(memory_format=torch.channels_last).requires_grad_()
    alpha = torch.tensor([0.3], device=DEVICE, requires_grad=True)
    g = torch.randn(2, 6, 5, 7, device=DEVICE)
    ours = with_gradients(lambda x, alpha: grid.fake_quantize(x, alpha, NOISE, Grid(4, True)), [x, alpha], g)
    assert_close(ours, textbook(x, alpha, g, 4, True, None, False), torch.float32, 4, g, alpha)
    grid.fake_quantize(x, alpha, NOISE, Grid(4, True)).sum().backward()
    assert_close(
        [ours[0], x.grad, alpha.grad],
        textbook(x, alpha, torch.ones_like(g), 4, True, None, False),
        torch.float32,
        4,
        g,
        alpha,
    )


def test_the_gradient_of_alpha_is_scaled():
    x, alpha, g = case("long rows", torch.float32, 4)
    plain, scaled = (
        torch.autograd.grad(grid.fake_quantize(x, alpha, NOISE, Grid(4, True), scale), [x, alpha], g)
        for scale in (1.0, 0.25)
    )
    assert torch.equal(plain[0], scaled[0])
    assert torch.allclose(plain[1], 4 * scaled[1], rtol=1e-6)


@pytest.mark.parametrize("noise", [0.02, 0.5])
@pytest.mark.parametrize("bits", [2, 4])
def test_values_far_outside(bits, noise):
    x = torch.tensor([torch.inf, -torch.inf, 3e38, -40.0, 100.0], device=DEVICE).requires_grad_()
    alpha = torch.tensor([1.0], device=DEVICE, requires_grad=True)
    output = grid.fake_quantize(x, alpha, torch.tensor([noise], device=DEVICE), Grid(bits, True))
    lo, hi = Grid(bits, True).bounds
    assert output.tolist() == [hi, lo, hi, lo, hi]
    output.sum().backward()
    assert x.grad.abs().max() < 0.02
    assert alpha.grad.item() == pytest.approx(3 * hi + 2 * lo, abs=0.5)


def test_nan_stays_nan():
    x = torch.tensor([torch.nan, 0.3], device=DEVICE)
    out = grid.fake_quantize(x, torch.tensor([0.1], device=DEVICE), NOISE, Grid(4, True))
    assert out.isnan().tolist() == [True, False]


def test_rounding_is_to_even_and_exact():
    lo, hi = Grid(8, True).bounds
    half = torch.arange(lo - 4, hi + 4, device=DEVICE) + 0.5
    out = grid.fake_quantize(half, torch.tensor([1.0], device=DEVICE), NOISE, Grid(8, True))
    assert torch.equal(out, half.round().clamp(lo, hi))
    x, alpha = torch.randn(10_000, device=DEVICE), torch.tensor([0.0371], device=DEVICE)
    assert torch.equal(grid.fake_quantize(x, alpha, NOISE, Grid(8, True)), (x / alpha).round().clamp(lo, hi) * alpha)


@pytest.mark.parametrize(
    ("x", "alpha"),
    [
        (torch.randn(4, 1, 6, dtype=torch.float64), torch.ones(4, 1, 1)),
        (torch.randn(4, 2, 6)[:, :1], torch.ones(4, 1, 1)),
        (torch.randn(4, 1, 6), torch.ones(1, 1, 6)),
        (torch.randn(0, 1, 6), torch.ones(1, 1, 1)),
    ],
    ids=["float64", "strided", "alpha per column", "empty"],
)
def test_what_the_kernels_leave_to_torch(x, alpha, launches):
    x, alpha = x.to(DEVICE).requires_grad_(), alpha.to(DEVICE).requires_grad_()
    noise, keep = NOISE.to(x.dtype), torch.tensor([0.5], device=DEVICE)
    for output in (
        grid.fake_quantize(x, alpha, noise, Grid(4, True)),
        grid.fake_quantize(x, alpha, noise, Grid(4, True), keep_prob=keep),
    ):
        output.sum().backward()
        assert output.shape == x.grad.shape == x.shape
    assert not launches


def test_tiles_are_whole_and_waste_little():
    for layout in Layout:
        for rows in (1, 2, 3, 70, 4096):
            for columns in (1, 2, 9, 127, 128, 576, 768, 3072, 4097, 11008):
                height, width = gpu._tile(rows, columns, layout)
                assert height * width == gpu._TILE
                assert width & (width - 1) == 0
                if layout == Layout.ROWS and columns >= 128 and rows >= 8:
                    wasted = -(-rows // height) * -(-columns // width) * gpu._TILE / (rows * columns)
                    assert wasted < 1.35


# torch._dynamo instantiates autograd functions itself while tracing (torch/_dynamo/side_effects.py, torch 2.13)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dropped", [False, True], ids=["plain", "dropped"])
def test_compiled_without_a_graph_break(dropped, fixed_seed, launches):
    x, alpha, g = case("rows", torch.float32, 4)
    keep = torch.tensor([0.8, 0.5], device=DEVICE, requires_grad=True)

    def function(x, alpha, keep):
        if dropped:
            return grid.fake_quantize(x, alpha.exp(), NOISE, Grid(4, True), keep_prob=keep * 1).sin()
        return grid.fake_quantize(x, alpha.exp(), NOISE, Grid(4, True)).sin() + keep.sum()

    torch._dynamo.reset()
    plain = with_gradients(function, [x, alpha, keep], g)
    assert len(launches) == 2
    compiled = with_gradients(torch.compile(function, backend="aot_eager", fullgraph=True), [x, alpha, keep], g)
    assert len(launches) == 4
    assert all(torch.equal(one, other) for one, other in zip(plain, compiled, strict=True))


@pytest.mark.parametrize("layout", ["long rows", "columns"])
def test_operators_are_what_they_say_to_the_compiler(layout):
    x, alpha, g = (tensor.detach() for tensor in case(layout, torch.float32, 4))
    keep, seed = torch.tensor([0.8, 0.5], device=DEVICE), torch.tensor([3], device=DEVICE)
    for drop in ((keep, seed), (None, None)):
        torch.library.opcheck(torch.ops.cpq_hf.quantize, (x, alpha, *drop, 4, True, True, torch.bfloat16))
        arguments = (x, alpha, *drop, NOISE, g, 4, True, True, 0.1, drop[0] is not None)
        torch.library.opcheck(torch.ops.cpq_hf.gradients, arguments)


# see above
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("learn_bits", [False, True], ids=["dropbits", "learned"])
def test_models_compile_with_and_without_the_kernels(learn_bits, monkeypatch, launches):
    config = CPQConfig(weight_bits=4, learn_bits=learn_bits, target_bits=3 if learn_bits else None)
    model = prepare_model(torch.nn.Sequential(torch.nn.Linear(40, 24), torch.nn.Linear(24, 2)), config).to(DEVICE)
    quantizer = model[0].weight_quantizer
    quantizer.dropping = True
    quantizer.drop_rate.fill_(0.3)
    x = torch.randn(5, 40, device=DEVICE)
    for expected in (2, 0):
        if not expected:
            monkeypatch.delitem(BACKENDS, DEVICE.type)  # as on devices without kernels: torch operations are traced
        torch._dynamo.reset()
        launches.clear()
        model.zero_grad()
        torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
        assert len(launches) == expected
        assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_mask(reentrant):
    x, alpha, g = case("rows", torch.float32, 4)

    def function(x, alpha):
        keep = torch.tensor([0.8, 0.5], device=DEVICE)
        return grid.fake_quantize(x, alpha, NOISE, Grid(4, True), keep_prob=keep).square()

    def run(checkpointed):
        torch.manual_seed(0)
        if checkpointed:
            output = torch.utils.checkpoint.checkpoint(function, x, alpha, use_reentrant=reentrant)
        else:
            output = function(x, alpha)
        x.grad = alpha.grad = None
        output.backward(g)
        return output, x.grad, alpha.grad

    assert all(torch.equal(one, other) for one, other in zip(run(True), run(False), strict=True))


class Reads(TorchDispatchMode):
    """Notes what would make a CPU wait for its GPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique"):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"weight_bits": 2, "activation_bits": 4},
        {"weight_bits": 4, "dropbits": 0.2, "activation_bits": 8, "granularity": "group", "group_size": 4},
        {"weight_bits": 4, "learn_bits": True, "target_bits": 3.0},
        {"weight_bits": 3, "freeze_oscillating": True},
    ],
    ids=["plain", "dropbits", "learned", "frozen"],
)
def test_a_step_waits_for_nothing(settings):
    """Forward, backward and the controller's hook; the first step, which calibrates, may."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    model = prepare_model(model, CPQConfig(**settings)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    CPQController(model, optimizer, total_steps=100)
    x = torch.randn(4, 8, device=DEVICE)

    def step():
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with Reads() as reads:
        x.sum().item()
    assert reads.seen
    with Reads() as reads:
        for _ in range(5):  # oscillating weights are looked at in every fourth
            step()
    assert not reads.seen


def test_the_summary_names_the_kernel(monkeypatch):
    model = prepare_model(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)), CPQConfig()).to(DEVICE)
    assert summarize(model).to_dict()["kernel"] == "triton"
    monkeypatch.setitem(sys.modules, "triton", None)  # not installed
    gpu._kernels.cache_clear()
    assert summarize(model).to_dict()["kernel"] == "eager"
    x, alpha, _ = case("rows", torch.float32, 4)
    assert gpu.quantize(x, alpha, Grid(4, True), None, x.dtype) is None
    grid.fake_quantize(x, alpha, NOISE, Grid(4, True), keep_prob=torch.tensor([0.5], device=DEVICE)).sum().backward()
    assert kernels.kernel_name("meta") == "eager"


# The interpreter runs what the compiler may refuse, which needs no GPU: launches are turned into compilations.
COMPILE = """
import warnings; warnings.simplefilter("error")
import torch
import triton
from triton.backends.compiler import GPUTarget
from cpq_hf.tensor import fake_quantize as grid
from cpq_hf.tensor.kernels.fake_quantize import BACKENDS, gpu, triton_kernels as grid_triton
from cpq_hf.tensor.spec import Grid

class Hopper:
    get_current_device = get_current_stream = lambda self, *args: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

class Compiling:
    def __getattr__(self, name):
        kernel = getattr(grid_triton, name)
        return {(1,): lambda *args, **meta: compiled.append(kernel.warmup(*args, grid=(1,), **meta))}

def variants(kernel):
    return len(kernel.device_caches[0][0])

triton.runtime.driver.set_active(Hopper())
BACKENDS["cpu"], gpu._ENOUGH_PROGRAMS, gpu._grid = gpu, 1, Compiling
noise = torch.tensor([0.2])
rows, groups, one = ((8, 1, 1024), (8, 1, 1)), ((4, 2, 64), (4, 2, 1)), ((4, 1, 1024), (1, 1, 1))
columns = ((128, 1, 64), (128, 1, 1))
full, half, brain = torch.float32, torch.float16, torch.bfloat16
for dtype, made, (shape, alphas), bits, dropped in (
    (full, full, rows, 4, 0), (full, full, rows, 8, 6), (brain, brain, groups, 2, 0), (brain, brain, groups, 3, 1),
    (half, half, one, 4, 0), (half, half, columns, 2, 0), (full, full, columns, 4, 1),
    (full, brain, rows, 4, 1), (full, half, groups, 3, 0),  # as under autocast
):
    for bits in (bits, bits + 1) if bits in (4, 5) else (bits,):
        x = torch.randn(shape)
        x = x[:, 0].t().contiguous().t()[:, None] if shape == columns[0] else x
        x, alpha, compiled = x.to(dtype).requires_grad_(), torch.ones(alphas, requires_grad=True), []
        before = variants(grid_triton.forward), variants(grid_triton.backward)
        if dropped:
            keep = torch.full((dropped,), 0.5, requires_grad=bits > 3)
            output = grid.fake_quantize(x, alpha, noise, Grid(bits, True), dtype=made, keep_prob=keep)
        else:
            output = grid.fake_quantize(x, alpha, noise, Grid(bits, True), dtype=made)
        output.backward(torch.ones_like(output))
        for kernel in compiled:
            text = kernel.asm["ptx"]
            for access in ("ld.global", "st.global"):
                assert access + ".v4" in text or access + ".v2" in text, (shape, dtype, bits)
        new = 0 if bits == 5 else 1  # 4 and 5 bits share a kernel
        assert (variants(grid_triton.forward), variants(grid_triton.backward)) == (before[0] + new, before[1] + new)
print(variants(grid_triton.backward))
"""


def test_compiles_for_hopper_with_wide_accesses(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "9\n"


@pytest.mark.skipif(not CUDA, reason="compares a GPU with the CPU")
@LAYOUTS
def test_equal_to_the_cpu(layout):
    x, alpha, g = case(layout, torch.float32, 4)
    here = with_gradients(lambda x, alpha: grid.fake_quantize(x, alpha, NOISE, Grid(4, True)), [x, alpha], g)
    inputs = [tensor.detach().cpu().requires_grad_() for tensor in (x, alpha)]
    there = with_gradients(lambda x, alpha: grid.fake_quantize(x, alpha, NOISE.cpu(), Grid(4, True)), inputs, g.cpu())
    assert torch.equal(here[0].cpu(), there[0])
    for one, other in zip(here[1:], there[1:], strict=True):
        assert torch.allclose(one.cpu(), other, rtol=1e-5, atol=1e-4)
