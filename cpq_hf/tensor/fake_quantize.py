"""The mathematics of Cluster-Promoting Quantization: one tensor on one uniform grid, forward and backward.

Source: Lee, Yun, Hwang, Yang, "Cluster-Promoting Quantization with Bit-Drop for Minimizing Network Quantization
Loss", ICCV 2021 (arXiv 2109.02100). The closed forms are ours; docs/method.md derives them.

With `v = x / alpha` (position in grid steps), `s` the scale of the logistic noise in steps and `S` the sigmoid, `x`
plus noise falls into the cell of level `n` with probability `S((n + 1/2 - v)/s) - S((n - 1/2 - v)/s)`. The forward
pass takes the mode, so its values lie on the grid:

    n* = clamp(round(v), lo, hi)          x_hat = alpha * n*

The backward pass gives every class the gradient of its level. Over all classes that sum telescopes to the slope of
the expected level, a sum over the boundaries `b = lo + 1/2, ..., hi - 1/2` of the grid:

    D(v)      = (1/s) * sum_b S'((v - b)/s)
    dL/dx     = G * D
    dL/dalpha = sum G * (n* - v * D)
    dL/ds     = sum G * alpha * (-1/s) * sum_b ((v - b)/s) * S'((v - b)/s)

DropBits quantizes each element with its own bit-width `k <= bits`, on the grid of `k` bits that is nested in the full
one: every `r = 2^(bits - k)`-th level, the step `r * alpha`. (The paper drops the other end: it keeps alpha and halves
the range. docs/method.md has the measurement that decided.) Written in steps of the full grid,
`c_j = r_j * clamp(round(v / r_j), lo_j, hi_j)` is what `j` bits make of an element. The loss as a function of the
probability `P_j` that bit `j` is kept has the derivative `L(c_j) - L(c_{j-1})`, to second order the mean gradient at
both ends times the difference; an element is at one end only, so each end is weighted by how rarely it is visited:

    dL/dP_j   = sum G * alpha * (c_j - c_{j-1}) * w_j,   w_j = 1/(2 P_j) where bit j is kept, else 1/(2 (1 - P_j))

**Centred grids.** The signed grid of 2 bits, -2 .. 1, is lopsided; weights are not. Where asked for, its levels lie at
n + 1/2, at -1.5, -0.5, 0.5 and 1.5 steps: read `v - 1/2` for `v` and `n* + 1/2` for `n*` outside of D. They are odd
multiples of half a step, hence nested in the full grid as before.

**The window.** S' decays exponentially, so only the 4 boundaries nearest to `v` that exist are summed (3 for 2 bits,
which is all of them). At s = 1/3 this changes D by at most 0.0083, at s = 0.2 by 2.4e-4, at s = 0.1 by 2.1e-8. The
window is centred on `m`, the level nearest to `v` whose whole window lies inside the grid, hence symmetric about `m`.
With `C = cosh((v - m)/s)`, `c = cosh(o/s)`, `u = c/(C + c)`, the two boundaries at `m - o` and `m + o` together give

    S'((v - m - o)/s) + S'((v - m + o)/s) = (1 + C*c)/(C + c)^2 = u * (1 + u * (1/c^2 - 1))

so that one `cosh` per element serves all boundaries and nothing overflows for s >= 0.02.

**Memory.** O(1) per element whatever the bit-width: backward keeps `x` (the parameter itself) and, under DropBits, one
byte per element, or a seed alone where the kernels draw a second time (kernels/fake_quantize/gpu.py). Scratch tensors
are reused in place. Arithmetic is float32 (float64 for float64 input); the output has the dtype of the input, or the
one it will be multiplied in.

Shapes: `x` is anything, `alpha` broadcasts against it (`[out, groups, 1]` against `[out, groups, group_size]`),
`noise` is `[1]`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..distributed import process_rank
from .kernels.fake_quantize import BACKENDS, cpu
from .kernels.fake_quantize.dropped import Dropped
from .spec import RAREST, Grid

MIN_NOISE, MAX_NOISE = 0.02, 0.5
WINDOW = 4
_MULTIPLIER = 6364136223846793005  # odd, its powers are far apart (Knuth's of a linear congruential generator)
_BEYOND = 3.0  # positions are clamped this far outside the grid, where D is zero, so that infinities stay finite
# Of a 32-bit hash that mixes every bit of its input into every bit of its output, found by the search of
# C. Wellons ("hash-prospector", 2018). Both are below 2^31: products stay inside int64, where overflow has no meaning
# that every compiler shares.
_HASH = (0x21F0AAAD, 0x735A2D97)


def fake_quantize(
    x: Tensor,
    alpha: Tensor,
    noise: Tensor,
    grid: Grid,
    alpha_gradient_scale: float = 1.0,
    dtype: torch.dtype | None = None,
    keep_prob: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """Round `x` to the grid, with the gradients of the multi-class straight-through estimator.

    Args:
        x (`Tensor`): Values of any floating dtype and shape.
        alpha (`Tensor`): Step size, positive, float32; broadcasts against `x`.
        noise (`Tensor` of shape `[1]`): Scale `s` of the logistic noise in steps, 0.02 to 0.5.
        grid (`Grid`): The levels.
        alpha_gradient_scale (`float`, defaults to 1): Factor on the gradient of `alpha`.
        dtype (`torch.dtype`, *optional*): Dtype of the result, which is rounded to it; by default that of `x`.
        keep_prob (`Tensor` of shape `[n]`, *optional*): With DropBits: every element gets a bit-width between
            `grid.bits - n` and `grid.bits`. `P_j` is the probability that bit `j = grid.bits - n + 1 .. grid.bits` is
            kept; non-increasing, because bits are nested.
        seed (`Tensor` of shape `[1]`, int64, *optional*): Decides which element drops which bits. By default, one is
            drawn from the global generator ([`draw_seed`]).

    Returns:
        `Tensor`: `alpha * (clamp(round(x / alpha - o), lo, hi) + o)`, shape of `x`; `o` is 1/2 on a centred grid,
        else 0.
    """
    if keep_prob is not None and seed is None:
        seed = draw_seed(x.device)
    quantized: Tensor = _FakeQuantize.apply(
        x, alpha, noise, keep_prob, seed, grid, alpha_gradient_scale, dtype or x.dtype
    )
    return quantized


@torch.no_grad()
def quantize_again(node: Any) -> Tensor:
    """Return the output of [`fake_quantize`] again, bit for bit.

    Args:
        node (`torch.autograd.graph.Node`): The `grad_fn` of that output, of a graph that backward has not freed.
    """
    x, alpha, _, *drawn = node.saved_tensors
    return _quantize(x, alpha, _dropped(*drawn), node.grid, node.dtype, node.fused)


def nearest_levels(x: Tensor, alpha: Tensor, grid: Grid) -> Tensor:
    """Return the level of each element of `x`, as whole numbers in the arithmetic dtype."""
    return _shift(_position(x, alpha), -grid.offset).round_().clamp_(*grid.bounds)


def slope(v: Tensor, noise: Tensor, grid: Grid) -> Tensor:
    """Return `D(v)`, the slope of the expected level at position `v` (finite), shape of `v`."""
    return _slope(v, v.round(), noise, *grid.bounds)


# --- DropBits: which element drops which bits ------------------------------------------------------------------------


def draw_seed(device: torch.device) -> Tensor:
    """Draw 64 random bits from the global generator of a device: int64 `[1]`.

    Processes that are seeded alike, as Trainer seeds them, still draw different seeds: each multiplies by its own odd
    number, which maps the 64-bit numbers one to one.
    """
    if torch.compiler.is_compiling():  # cannot trace `random_`
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    else:
        seed = torch.empty(1, dtype=torch.int64, device=device).random_(-(2**63), None)
    rank = process_rank()
    return seed.mul_(_signed(_MULTIPLIER**rank)) if rank > 0 else seed


def draw_max_level(x: Tensor, keep_prob: Tensor, seed: Tensor, grid: Grid) -> Tensor:
    """Draw the bit-width `k = min_bits + #{j : u < P_j}` of every element from a seed, and return its last level.

    `u` is uniform with 16 bits. The C kernel and torch operations draw differently from the same seed.

    Returns:
        `Tensor`: uint8, shape of `x`.
    """
    if x.device.type == "cpu" and cpu.is_ready():
        return cpu.draw_max_level(x, keep_prob, seed, grid)
    half = -(-x.numel() // 2)
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    words = _hash(_hash(torch.arange(half, device=x.device) ^ low) ^ high)
    u = torch.cat((words & 0xFFFF, words >> 16))[: x.numel()]  # two elements share the 32 bits of a word
    levels = grid.nested_max_levels(keep_prob.numel())
    max_level = torch.full_like(u, levels[0], dtype=torch.uint8)
    thresholds = (keep_prob.detach() * 2**16).round()
    for threshold, (below, above) in zip(thresholds.unbind(), pairwise(levels), strict=True):
        max_level.add_(u < threshold, alpha=above - below)
    return max_level.view(x.shape)


def _hash(word: Tensor) -> Tensor:
    """Mix 32 bits, held in int64."""
    word = word ^ (word >> 16)
    word = (word * _HASH[0]) & 0xFFFFFFFF
    word = word ^ (word >> 15)
    word = (word * _HASH[1]) & 0xFFFFFFFF
    return word ^ (word >> 15)


def _signed(number: int) -> int:
    """Return the lowest 64 bits of a number as int64 holds them."""
    return (number + 2**63) % 2**64 - 2**63


# --- forward and backward --------------------------------------------------------------------------------------------


class _FakeQuantize(torch.autograd.Function):
    """One kernel launch each way where there is a kernel (kernels/), else torch operations."""

    # `ctx` has no usable type: torch declares `forward` with any arguments, and a typed override does not fit that
    @staticmethod
    def forward(ctx, x, alpha, noise, keep_prob, seed, grid, alpha_gradient_scale, dtype):  # type: ignore[no-untyped-def]
        # Forward and backward must draw alike, so both use the kernels or neither does. Kernels have no gradient of
        # the noise, and read these two as float32.
        fused = not ctx.needs_input_grad[2] and all(
            tensor is None or tensor.dtype == torch.float32 for tensor in (noise, keep_prob)
        )
        drawn_here = keep_prob is not None and not (fused and _backend(x).draws(x, alpha))
        max_level = draw_max_level(x, keep_prob, seed, grid) if drawn_here else None
        ctx.save_for_backward(x, alpha, noise, keep_prob, seed, max_level)
        ctx.grid, ctx.alpha_gradient_scale, ctx.dtype, ctx.fused = grid, alpha_gradient_scale, dtype, fused
        return _quantize(x, alpha, _dropped(keep_prob, seed, max_level), grid, dtype, fused)

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        x, alpha, noise, keep_prob, seed, max_level = ctx.saved_tensors
        dropped = _dropped(keep_prob, seed, max_level)
        grid, alpha_scale = ctx.grid, ctx.alpha_gradient_scale
        needs_x, needs_alpha, needs_noise, needs_keep, *_ = ctx.needs_input_grad
        rest = (None,) * 4  # what follows `keep_prob` has no gradient
        if ctx.fused:
            found = _backend(x).gradients(x, alpha, grid, dropped, noise, grad_output, alpha_scale, needs_keep)
            if found is not None:
                grad_x, grad_alpha, grad_keep = found
                return grad_x, grad_alpha, None, grad_keep, *rest
        grad_x = grad_alpha = grad_noise = grad_keep = None
        lo, hi, ratio, offset = _element_grids(alpha, grid, dropped)
        if needs_keep:
            grad_keep = _keep_gradient(x, alpha, grid, keep_prob, hi, grad_output)
        v = _shift(_position(x, alpha * ratio), -offset).clamp_(lo - _BEYOND, hi + _BEYOND)
        g = grad_output.to(v.dtype)
        nearest = v.round()
        if needs_noise:
            moment = _moment(v, nearest, noise, lo, hi)
            grad_noise = (moment.mul_(g).mul_(alpha * ratio).sum() / -noise).sum_to_size(noise.shape)
        density = _slope(v, nearest, noise, lo, hi)
        if needs_alpha:
            levels = _shift(nearest.clamp_(lo, hi), offset)
            level_gradient = levels.addcmul_(_shift(v, offset), density, value=-1).mul_(g)
            if keep_prob is not None:
                level_gradient.mul_(ratio)
            grad_alpha = level_gradient.sum_to_size(alpha.shape).mul_(alpha_scale)
        if needs_x:
            grad_x = density.mul_(g).to(x.dtype)
        return grad_x, grad_alpha, grad_noise, grad_keep, *rest


def _dropped(keep_prob: Tensor | None, seed: Tensor | None, max_level: Tensor | None) -> Dropped | None:
    return None if keep_prob is None or seed is None else Dropped(keep_prob, seed, max_level)


def _quantize(
    x: Tensor, alpha: Tensor, dropped: Dropped | None, grid: Grid, dtype: torch.dtype, fused: bool
) -> Tensor:
    if fused and (quantized := _backend(x).quantize(x, alpha, grid, dropped, dtype)) is not None:
        return quantized
    lo, hi, ratio, offset = _element_grids(alpha, grid, dropped)
    own_alpha = alpha * ratio
    levels = _shift(_position(x, own_alpha), -offset).round_().clamp_(lo, hi)
    return _shift(levels, offset).mul_(own_alpha).to(dtype)


def _backend(x: Tensor) -> Any:
    return BACKENDS.get(x.device.type, cpu)  # the CPU's kernels decline what is not theirs


def _position(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.div(x.to(torch.promote_types(x.dtype, torch.float32)), alpha)


def _shift(v: Tensor, offset: Any) -> Tensor:
    """Add the offset of a grid in place; grids without one cost no pass over memory."""
    return v.add_(offset) if isinstance(offset, Tensor) or offset else v


def _element_grids(alpha: Tensor, grid: Grid, dropped: Dropped | None) -> tuple[Any, Any, Any, Any]:
    """Return `(lo, hi, steps of alpha in one step, offset)`.

    They are numbers without DropBits, and tensors of the shape of `x` with it, where each element has its own grid.
    """
    if dropped is None:
        return (*grid.bounds, 1.0, grid.offset)
    assert dropped.max_level is not None
    hi = dropped.max_level.to(alpha.dtype)
    lo = -1 - hi if grid.signed else torch.zeros_like(hi)
    offset = (hi <= grid.max_centered_level).to(alpha.dtype).mul_(0.5) if grid.centered else 0.0
    return lo, hi, (grid.bounds[1] + 1) / (hi + 1), offset


def _keep_gradient(x: Tensor, alpha: Tensor, grid: Grid, keep_prob: Tensor, max_level: Tensor, g: Tensor) -> Tensor:
    """Return `dL/dP_j`, how much the loss rises or falls where bit `j` is kept; shape of `keep_prob`."""
    v, g_alpha = _position(x, alpha), g * alpha
    below: Tensor | None = None
    gradients: list[Tensor] = []
    for width in range(grid.bits - keep_prob.numel(), grid.bits + 1):
        narrower, ratio = grid.of_width(width), 2.0 ** (grid.bits - width)
        here = (v / ratio - narrower.offset).round_().clamp_(*narrower.bounds).add_(narrower.offset).mul_(ratio)
        if below is not None:
            p = keep_prob[len(gradients)].clamp(RAREST, 1 - RAREST)
            kept = max_level >= narrower.bounds[1]
            gradients.append((g_alpha * (here - below) * torch.where(kept, 0.5 / p, 0.5 / (1 - p))).sum())
        below = here
    return torch.stack(gradients).to(keep_prob.dtype)


def _window(v: Tensor, nearest: Tensor, noise: Tensor, lo: Any, hi: Any) -> tuple[Tensor, int]:
    """`((v - m)/s, number of boundaries)` of each element's window.

    A 2-bit grid has only 3 boundaries. Where grids are drawn per element, such an element gets a window of 4 whose
    first boundary lies outside its grid, at `lo - 1/2`; see `_outside`.
    """
    count = min(WINDOW, hi - lo) if isinstance(lo, int) else WINDOW
    centre = nearest.clamp(lo + count / 2, hi - count / 2)
    return torch.sub(v, centre, out=centre).div_(noise), count


def _outside(a: Tensor, noise: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """`(t, p)`: position against the boundary outside the window of 2-bit elements and its sigmoid, else `p` is 0."""
    t = a + (WINDOW - 1) / 2 / noise
    return t, torch.sigmoid(t).mul_(hi - lo == WINDOW - 1)


def _slope(v: Tensor, nearest: Tensor, noise: Tensor, lo: Any, hi: Any) -> Tensor:
    a, count = _window(v, nearest, noise, lo, hi)
    outside = None if isinstance(lo, int) else _outside(a, noise, lo, hi)[1]
    cosh_a = a.exp_()
    cosh_a = cosh_a.reciprocal().add_(cosh_a).mul_(0.5)  # compilers make vectors of exp, not of cosh
    total = torch.add(cosh_a, 1).mul_(2).reciprocal_() if count % 2 else torch.zeros_like(a)
    first = 1.0 if count % 2 else 0.5
    offsets = torch.arange(first, count / 2, dtype=noise.dtype, device=noise.device)
    cosh_offsets = torch.cosh(offsets / noise)
    curvatures = cosh_offsets.square().reciprocal_().sub_(1)
    for cosh_offset, curvature in zip(cosh_offsets.unbind(), curvatures.unbind(), strict=True):
        u = torch.div(cosh_offset, cosh_a + cosh_offset)
        total.add_(u).addcmul_(u, u * curvature)
    if outside is not None:
        total.sub_(outside).addcmul_(outside, outside)
    return total.div_(noise)


def _moment(v: Tensor, nearest: Tensor, noise: Tensor, lo: Any, hi: Any) -> Tensor:
    """Sum of t * S'(t), `t = (v - b)/s`, over the boundaries `b` of the window."""
    a, count = _window(v, nearest, noise, lo, hi)
    total = torch.zeros_like(a)
    for index in range(count):
        t = a - (index - (count - 1) / 2) / noise
        p = torch.sigmoid(t)
        total.addcmul_(t, p * (1 - p))
    if not isinstance(lo, int):
        t, p = _outside(a, noise, lo, hi)
        total.sub_(t * p * (1 - p))
    return total
