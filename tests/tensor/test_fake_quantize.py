"""The closed forms of `fake_quantize.py` against the textbook form, and the properties in docs/method.md."""

from __future__ import annotations

import pytest
import reference
import torch

from cpq_hf.tensor import fake_quantize as grid
from cpq_hf.tensor import step_size as fitting
from cpq_hf.tensor.kernels.fake_quantize import cpu
from cpq_hf.tensor.spec import Grid

BITS = [2, 3, 4, 5, 6, 7, 8]
SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
EXACT_NOISE = 0.05  # at this scale what lies outside the window is below 1e-13
# noise -> bound on the error of D that the window causes, as stated in fake_quantize.py
WINDOW_BOUNDS = {1 / 3: 0.0083, 0.2: 2.4e-4, 0.1: 2.1e-8}


def positions(bits: int, signed: bool) -> torch.Tensor:
    """Positions everywhere: between levels, on levels, on boundaries, next to them, far outside. `[4, 3, n]`."""
    lo, hi = Grid(bits, signed).bounds
    levels = torch.arange(lo - 2, hi + 3, dtype=torch.float64)
    special = torch.cat([levels, levels + 0.5, levels + 0.499, levels - 0.01, torch.tensor([-1e4, 1e4, 0.0])])
    generator = torch.Generator().manual_seed(bits)
    spread = torch.rand(600, generator=generator, dtype=torch.float64) * (hi - lo + 6) + lo - 3
    v = torch.cat([special, spread])
    v = v[torch.randperm(v.numel(), generator=generator)]
    return v[: v.numel() // 12 * 12].view(4, 3, -1)


ALPHA_SHAPES = {"tensor": (1, 1, 1), "channel": (4, 1, 1), "group": (4, 3, 1)}


def case(bits, signed, granularity, noise):
    alpha = torch.rand(ALPHA_SHAPES[granularity], dtype=torch.float64) + 0.5
    x = (positions(bits, signed) * alpha).requires_grad_()
    return x, alpha.requires_grad_(), torch.tensor([noise], dtype=torch.float64, requires_grad=True)


def gradients(function, x, alpha, noise, *args):
    output = function(x, alpha, noise, *args)
    g = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(7))
    return [output.detach(), *torch.autograd.grad(output, [x, alpha, noise], g)]


@SIGNED
@pytest.mark.parametrize("granularity", ALPHA_SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_forward_and_gradients_equal_the_textbook_form(bits, granularity, signed):
    x, alpha, noise = case(bits, signed, granularity, EXACT_NOISE)
    ours = gradients(grid.fake_quantize, x, alpha, noise, Grid(bits, signed))
    theirs = gradients(reference.fake_quantize, x, alpha, noise, bits, signed)
    for name, got, want in zip(("x_hat", "dx", "dalpha", "dnoise"), ours, theirs, strict=True):
        assert got.shape == want.shape
        # relative to the sums that dalpha and dnoise are, which run over positions up to 1e4
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-9), (name, (got - want).abs().max())


@pytest.mark.parametrize("granularity", ALPHA_SHAPES)
def test_centred_grid_equals_the_textbook_form(granularity):
    x, alpha, noise = case(2, True, granularity, EXACT_NOISE)
    ours = gradients(grid.fake_quantize, x, alpha, noise, Grid(2, True, True))
    theirs = gradients(reference.fake_quantize, x, alpha, noise, 2, True, None, True)
    for name, got, want in zip(("x_hat", "dx", "dalpha", "dnoise"), ours, theirs, strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-9), (name, (got - want).abs().max())
    assert set((ours[0] / alpha.detach()).mul(2).round().unique().tolist()) == {-3, -1, 1, 3}


def test_centring_concerns_two_bits_only_and_fits_weights_better():
    x = torch.randn(1, 1, 50_000)
    noise = torch.tensor([0.2])
    for bits in BITS[1:]:
        alpha = fitting.least_squares_alpha(x, Grid(bits, True))
        plain, centered = (grid.fake_quantize(x, alpha, noise, Grid(bits, True, flag)) for flag in (False, True))
        assert torch.equal(plain, centered)
    errors = []
    for own in (Grid(2, True), Grid(2, True, centered=True)):
        alpha = fitting.least_squares_alpha(x, own)
        errors.append((grid.fake_quantize(x, alpha, noise, own) - x).square().mean().item())
    assert errors[1] < 0.85 * errors[0]
    assert errors[1] == pytest.approx(0.1188, rel=0.03)  # Max 1960: the best uniform quantizer of 4 levels


@SIGNED
@pytest.mark.parametrize("min_bits", [2, 3])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_dropbits_gradients_equal_the_textbook_form(bits, min_bits, signed):
    x, alpha, noise = case(bits, signed, "channel", EXACT_NOISE)
    keep = torch.linspace(0.9, 0.4, bits - min_bits, dtype=torch.float64)
    if keep.numel() == 0:
        keep = keep.new_zeros(0)
    seed, own = torch.tensor([3]), Grid(bits, signed, signed)
    drawn = (grid.draw_max_level(x, keep, seed, own).double() + 1).log2().long() + signed
    assert set(drawn.unique().tolist()) == set(range(min_bits, bits + 1))

    def ours_function(*args):
        return grid.fake_quantize(*args, own, keep_prob=keep, seed=seed)

    ours = gradients(ours_function, x, alpha, noise)
    theirs = gradients(reference.fake_quantize, x, alpha, noise, bits, signed, drawn, signed)
    for name, got, want in zip(("x_hat", "dx", "dalpha", "dnoise"), ours, theirs, strict=True):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-9), (name, (got - want).abs().max())


@SIGNED
@pytest.mark.parametrize("bits", BITS[1:])
def test_gradient_of_keep_probabilities(bits, signed):
    x, alpha, noise = case(bits, signed, "channel", EXACT_NOISE)
    keep = torch.linspace(0.9, 0.4, bits - 2, dtype=torch.float64, requires_grad=True)
    g, seed, own = torch.randn_like(x), torch.tensor([5]), Grid(bits, signed, signed)
    grid.fake_quantize(x, alpha, noise, own, keep_prob=keep, seed=seed).backward(g)
    drawn = (grid.draw_max_level(x, keep, seed, own).double() + 1).log2().long() + signed
    want = reference.keep_gradient(x.detach(), alpha.detach(), keep.detach(), drawn, g, bits, signed, signed)
    assert torch.allclose(keep.grad, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("probability", [0.9, 0.5, 0.2])
def test_gradient_of_a_keep_probability_is_that_of_the_expected_loss(probability):
    """For a quadratic loss of independent elements it is exact in the mean; a plain sum of G * difference is not."""
    torch.manual_seed(0)
    x = torch.randn(40, dtype=torch.float64)
    curvature, target = torch.rand_like(x) + 0.5, torch.randn_like(x)
    alpha, noise = torch.tensor([0.35], dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)
    keep = torch.tensor([probability], dtype=torch.float64, requires_grad=True)
    coarse, fine = reference.at_widths(x, alpha, 3, 2, True)
    want = (0.5 * curvature * ((fine - target).square() - (coarse - target).square())).sum()
    draws = 40_000
    quantized = grid.fake_quantize(x.expand(draws, 40), alpha, noise, Grid(3, True), keep_prob=keep)
    (0.5 * curvature * (quantized - target).square()).sum().div(draws).backward()
    assert keep.grad.item() == pytest.approx(want.item(), abs=0.1)
    assert abs(want.item()) > 1


@SIGNED
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("noise", WINDOW_BOUNDS, ids=lambda noise: f"noise{noise:.2f}")
def test_window_keeps_the_slope_within_the_stated_bound(noise, bits, signed):
    v = positions(bits, signed)
    got = grid.slope(v.clone(), torch.tensor([noise], dtype=v.dtype), Grid(bits, signed))
    want = reference.expected_level_slope(v, noise, bits, signed)
    assert (got - want).abs().max() <= WINDOW_BOUNDS[noise]
    assert (got >= 0).all()


@pytest.mark.parametrize(("noise", "lowest", "highest"), [(1 / 3, 0.93, 1.04), (0.1, 0.13, 2.501)])
def test_slope_within_one_inner_cell(noise, lowest, highest):
    v = torch.linspace(-0.5, 0.5, 100_001, dtype=torch.float64)
    d = grid.slope(v.clone(), torch.tensor([noise], dtype=v.dtype), Grid(8, True))
    assert torch.trapezoid(d, v).item() == pytest.approx(1, abs=WINDOW_BOUNDS[noise] + 1e-9)  # + the quadrature's
    assert d.min() >= lowest
    assert d.max() <= highest
    assert d[50_000] == d.min()  # on the grid point
    assert d.max() - d[0] <= WINDOW_BOUNDS[noise]  # on a boundary


def test_mean_over_draws_equals_the_formula():
    x = torch.randn(50, dtype=torch.float64) * 4
    alpha, noise = torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64)
    keep = torch.tensor([0.8, 0.5], dtype=torch.float64)
    many = grid.fake_quantize(x.expand(40_000, 50), alpha, noise, Grid(4, True), keep_prob=keep).mean(0)
    want = reference.mean_over_draws(x, alpha, keep, 4, True)
    # standard error: a value spreads over at most 6 steps of 0.7, so 4.2 / 2 / sqrt(40000) = 0.0105
    assert (many - want).abs().max() < 5 * 0.0105
    assert (many - want).abs().mean() < 0.0105


def test_dropping_nothing_changes_nothing():
    x, alpha = torch.randn(64, 1, 32, requires_grad=True), torch.rand(64, 1, 1, requires_grad=True)
    noise = torch.tensor([0.2])
    plain = grid.fake_quantize(x, alpha, noise, Grid(4, True))
    kept = grid.fake_quantize(x, alpha, noise, Grid(4, True), keep_prob=torch.ones(2))
    assert torch.equal(plain, kept)
    g = torch.randn_like(x)
    (x_plain, alpha_plain), (x_kept, alpha_kept) = (torch.autograd.grad(out, [x, alpha], g) for out in (plain, kept))
    assert torch.equal(x_plain, x_kept)
    assert torch.allclose(alpha_plain, alpha_kept, rtol=1e-5, atol=1e-5)  # sums of 32, perhaps in another order


@pytest.fixture(params=["kernel", "torch"])
def generator(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(cpu, "load", lambda: None)


@pytest.mark.usefixtures("generator")
def test_draws_have_the_stated_probabilities():
    x, keep = torch.empty(1_000_003), torch.tensor([1.0, 0.75, 0.3])
    counts = torch.bincount(grid.draw_max_level(x, keep, grid.draw_seed(x.device), Grid(6, True)).long(), minlength=32)
    assert counts[[3, 7, 15, 31]].sum() == x.numel()
    shares = counts[[7, 15, 31]] / x.numel()
    assert counts[3] == 0  # a bit that is kept with probability 1 is never dropped
    assert torch.allclose(shares, torch.tensor([0.25, 0.45, 0.3]), atol=5 * 0.0005)  # five standard errors


@pytest.mark.usefixtures("generator")
def test_dropping_uses_the_global_generator():
    x, keep = torch.randn(1000), torch.tensor([0.7, 0.5])

    def draw() -> torch.Tensor:
        return grid.fake_quantize(x, torch.ones(1), torch.tensor([0.2]), Grid(4, True), keep_prob=keep)

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)


# relative to the step: one rounding of the format, for the output; gradients are sums of such products
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_low_precision_input_is_computed_in_float32(dtype):
    x = (torch.randn(64, 1, 48) * 3).to(dtype).requires_grad_()
    alpha = (torch.rand(64, 1, 1) + 0.5).requires_grad_()
    noise = torch.tensor([0.15])
    g = torch.randn(x.shape).to(dtype)
    output = grid.fake_quantize(x, alpha, noise, Grid(3, True))
    grad_x, grad_alpha = torch.autograd.grad(output, [x, alpha], g)
    assert (output.dtype, grad_x.dtype, grad_alpha.dtype) == (dtype, dtype, torch.float32)

    exact = [tensor.detach().double().requires_grad_() for tensor in (x, alpha)]
    want = grid.fake_quantize(*exact, noise.double(), Grid(3, True))
    want_x, want_alpha = torch.autograd.grad(want, exact, g.double())
    tolerance = TOLERANCE[dtype]
    assert torch.allclose(output.double(), want, rtol=tolerance, atol=0)
    assert torch.allclose(grad_x.double(), want_x, rtol=tolerance, atol=3e-5)
    assert torch.allclose(grad_alpha.double(), want_alpha, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 8])
def test_memory_is_constant_per_element(bits):
    x, alpha = torch.randn(128, 1, 256, requires_grad=True), torch.ones(128, 1, 1, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grid.fake_quantize(x, alpha, torch.tensor([0.2]), Grid(bits, True))
    assert sorted(tensor.numel() for tensor in saved) == [1, 128, x.numel()]
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in saved)  # the parameter itself, no copy
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grid.fake_quantize(x, alpha, torch.tensor([0.2]), Grid(bits, True), keep_prob=torch.ones(bits - 2))
    extra = [tensor for tensor in saved if tensor.numel() == x.numel() and tensor.data_ptr() != x.data_ptr()]
    assert [tensor.dtype for tensor in extra] == [torch.uint8]


@pytest.mark.parametrize("noise", [0.02, 0.5])
def test_infinite_and_extreme_values_stay_finite(noise):
    x = torch.tensor([torch.inf, -torch.inf, 3e38, -3e38, 0.0]).requires_grad_()
    alpha = torch.tensor([0.01], requires_grad=True)
    output = grid.fake_quantize(x, alpha, torch.tensor([noise]), Grid(4, True))
    output.sum().backward()
    assert torch.allclose(output, torch.tensor([0.07, -0.08, 0.07, -0.08, 0.0]))
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(alpha.grad).all()


def test_empty_input():
    x = torch.zeros(0, 1, 8, requires_grad=True)
    alpha = torch.ones(1, 1, 1, requires_grad=True)
    grid.fake_quantize(x, alpha, torch.tensor([0.2]), Grid(4, True)).sum().backward()
    assert x.grad.shape == x.shape
    assert alpha.grad.item() == 0


@SIGNED
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", ["normal", "heavy-tailed", "few"])
def test_least_squares_alpha_is_near_the_best(bits, signed, shape):
    x = torch.randn(6, 16 if shape == "few" else 512, dtype=torch.float64)
    x = x**5 if shape == "heavy-tailed" else x
    x = x if signed else x.abs()
    lo, hi = Grid(bits, signed).bounds

    def error(alpha):
        return (x - (x / alpha).round().clamp(lo, hi) * alpha).square().sum(-1, keepdim=True)

    alpha = fitting.least_squares_alpha(x, Grid(bits, signed))
    largest = x.abs().amax(-1, keepdim=True) / max(hi, -lo)
    dense = torch.stack([error(largest * ratio) for ratio in torch.linspace(0.005, 2.2, 4000).tolist()]).amin(0)
    # within a tenth of the best; few values at many bits can be fitted almost exactly by luck, which is not asked for
    negligible = 1e-4 * x.square().sum(-1, keepdim=True)
    assert (error(alpha) <= 1.1 * dense + negligible).all(), (error(alpha) / dense).max()


def test_least_squares_alpha_of_constant_and_zero_rows():
    x = torch.tensor([[0.3, 0.3, 0.3], [0.0, 0.0, 0.0], [-0.6, 0.6, 0.0]])
    alpha = fitting.least_squares_alpha(x, Grid(4, True))
    assert (alpha > 0).all()
    on_grid = grid.nearest_levels(x, alpha, Grid(4, True)) * alpha
    assert torch.allclose(on_grid, x, atol=1e-6)
    assert alpha[1] == (alpha[0] + alpha[2]) / 2
    assert fitting.least_squares_alpha(torch.zeros(2, 5), Grid(4, True)).tolist() == [[1.0], [1.0]]


def test_representable_values_survive_exactly():
    alpha = torch.rand(32, 1, 1) + 0.1
    x = torch.randint(-8, 8, (32, 1, 64)) * alpha
    assert torch.equal(grid.fake_quantize(x, alpha, torch.tensor([0.2]), Grid(4, True)), x)


@pytest.mark.usefixtures("generator")
def test_processes_draw_masks_of_their_own(monkeypatch):
    """Seeded alike, they drop other elements, as independently as chance would have it; repeated, the same ones."""
    x, keep = torch.zeros(200_000), torch.tensor([0.7])

    def draw(rank: int) -> torch.Tensor:
        monkeypatch.setattr(grid, "process_rank", lambda: rank)
        torch.manual_seed(0)
        return (grid.draw_max_level(x, keep, grid.draw_seed(x.device), Grid(3, True)) > 1).double()

    masks = [draw(rank) for rank in range(4)]
    for rank, mask in enumerate(masks):
        assert mask.mean() == pytest.approx(0.7, abs=0.005)
        assert torch.equal(mask, draw(rank))
        for other in masks[:rank]:
            assert (mask * other).mean() == pytest.approx(0.49, abs=0.006)
