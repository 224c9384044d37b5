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

so that one `cosh` an element serves all boundaries and nothing overflows for s >= 0.02.

**Memory.** O(1) an element whatever the bit-width: backward keeps `x` (the parameter itself) and, under DropBits, one
byte an element, or a seed alone where the kernels draw the widths a second time (kernels/gpu.py); scratch tensors are
reused in place. Arithmetic is float32 (float64 for float64 input); the output has the dtype of the input, or that
which it will be multiplied in.

Shapes: `x` is anything, `alpha` broadcasts against it (`[out, groups, 1]` against `[out, groups, group_size]`),
`noise` is `[1]`.
"""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .kernels import BACKENDS, cpu
from .sharding import process_rank
from .spec import CENTERED_BITS, RAREST, level_bounds, level_offset

MIN_NOISE, MAX_NOISE = 0.02, 0.5
WINDOW = 4
_MULTIPLIER = 6364136223846793005  # odd, its powers are far apart (Knuth's of a linear congruential generator)
_BEYOND = 3.0  # positions are clamped this far outside the grid, where D is zero, so that infinities stay finite


def fake_quantize(
    x: Tensor,
    alpha: Tensor,
    noise: Tensor,
    bits: int,
    signed: bool,
    alpha_gradient_scale: float = 1.0,
    centered: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Put `x` on the grid, with the gradients of the multi-class straight-through estimator.

    Args:
        x (`Tensor`): Values of any floating dtype and shape.
        alpha (`Tensor`): Step size, positive, float32; broadcasts against `x`.
        noise (`Tensor` of shape `[1]`): Scale `s` of the logistic noise in steps, 0.02 to 0.5.
        bits (`int`): Bit-width.
        signed (`bool`): Whether the grid has negative levels.
        alpha_gradient_scale (`float`, defaults to 1): Factor on the gradient of `alpha`.
        centered (`bool`): Whether a grid of 2 bits has its levels at -1.5, -0.5, 0.5 and 1.5 steps.
        dtype (`torch.dtype`, *optional*): That of the result, to which it is rounded; by default that of `x`.

    Returns:
        `Tensor`: `alpha * (clamp(round(x / alpha - o), lo, hi) + o)`, shape of `x`; `o` is 1/2 on a centred grid,
        else 0.
    """
    return _Grid.apply(x, alpha, noise, None, None, bits, signed, alpha_gradient_scale, centered, dtype or x.dtype)


def fake_quantize_dropped(
    x: Tensor,
    alpha: Tensor,
    noise: Tensor,
    keep: Tensor,
    bits: int,
    signed: bool,
    min_bits: int,
    alpha_gradient_scale: float = 1.0,
    centered: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """As [`fake_quantize`], but every element draws its own bit-width from the global generator (DropBits).

    Args:
        keep (`Tensor` of shape `[bits - min_bits]`): `P_j`, the probability that bit `j = min_bits+1 .. bits` is
            kept; non-increasing, since bits are nested.
        min_bits (`int`): Bits that are never dropped.
    """
    # kernels that draw do not know the gradient of the noise
    seeded = not noise.requires_grad and keep.dtype == torch.float32 and _backend(x).draws(x, alpha)
    drawn = _draw_words(1, x.device) if seeded else draw_last_levels(x, keep, signed, min_bits)
    return _Grid.apply(x, alpha, noise, keep, drawn, bits, signed, alpha_gradient_scale, centered, dtype or x.dtype)


@torch.no_grad()
def quantize_again(node: Any) -> Tensor:
    """The output of [`fake_quantize`] or [`fake_quantize_dropped`] again, to the bit.

    Args:
        node (`torch.autograd.graph.Node`): The `grad_fn` of that output, of a graph that backward has not freed.
    """
    x, alpha, _, keep, drawn = node.saved_tensors
    return _quantize(x, alpha, keep, drawn, node.bits, node.signed, node.centered, node.dtype)


def draw_last_levels(x: Tensor, keep: Tensor, signed: bool, min_bits: int) -> Tensor:
    """Draw a bit-width `k = min_bits + #{j : u < P_j}` for every element, `u` uniform; its last level `hi_k`.

    `u` has 16 bits. The CPU's kernel takes them from a counter-based generator, whose key is one 64-bit draw; torch
    operations take four from each draw, since torch's generator on the CPU works serially.

    Returns:
        `Tensor`: uint8, shape of `x`.
    """
    levels = [level_bounds(width, signed)[1] for width in range(min_bits, min_bits + keep.numel() + 1)]
    if x.device.type == "cpu" and cpu.is_ready():
        drawn = cpu.draw_last_levels(int(_draw_words(1, x.device)), keep, levels, x.numel())
    else:
        drawn = _draw_by_torch(x, keep, levels)
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    # in the order of the memory of `x` where that has no holes (a transposed weight), which the kernels ask for
    return drawn.as_strided(x.shape, x.stride()) if reach == x.numel() else drawn.view(x.shape)


def _draw_by_torch(x: Tensor, keep: Tensor, levels: list[int]) -> Tensor:
    u = _draw_words(-(-x.numel() // 4), x.device).view(torch.int16)[: x.numel()]  # uniform on -2^15 .. 2^15-1
    thresholds = (keep.detach() * 2**16 - 2**15 - 1).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)
    drawn = torch.full_like(u, levels[0], dtype=torch.uint8)
    for threshold, (below, above) in zip(thresholds.unbind(), pairwise(levels), strict=True):
        drawn.add_(u <= threshold, alpha=above - below)
    return drawn


def _draw_words(count: int, device: torch.device) -> Tensor:
    """`count` random int64 of the device's global generator.

    Processes that are seeded alike, as Trainer seeds them, still draw differently: each multiplies by an odd number of
    its own, which maps the 64-bit numbers one to one.
    """
    if torch.compiler.is_compiling():  # which cannot trace `random_`, three times as fast on a CPU
        words = torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device=device)
    else:
        words = torch.empty(count, dtype=torch.int64, device=device).random_(-(2**63), None)
    if (rank := process_rank()) > 0:
        words.mul_(_signed(_MULTIPLIER**rank))
    return words


def _signed(number: int) -> int:
    """The lowest 64 bits, as int64 has them."""
    return (number + 2**63) % 2**64 - 2**63


def nearest_levels(x: Tensor, alpha: Tensor, bits: int, signed: bool, offset: float = 0.0) -> Tensor:
    """Levels `n*` of `x`, as whole numbers in the arithmetic dtype."""
    return _shift(_position(x, alpha), -offset).round_().clamp_(*level_bounds(bits, signed))


def slope(v: Tensor, noise: Tensor, bits: int, signed: bool) -> Tensor:
    """`D(v)`: slope of the expected level at position `v` (finite), shape of `v`."""
    return _slope(v, v.round(), noise, *level_bounds(bits, signed))


def _position(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.div(x.to(torch.promote_types(x.dtype, torch.float32)), alpha)


def _backend(x: Tensor) -> ModuleType:
    return BACKENDS.get(x.device.type, cpu)  # the CPU's kernels decline what is not theirs


_NO_MORE = (None,) * 6  # gradients of the arguments of `_Grid` from `drawn` on


class _Grid(torch.autograd.Function):
    """`drawn`: None without DropBits; a seed, int64 `[1]`, where the kernels draw; else each element's last level."""

    # `ctx` has no usable type: torch declares `forward` with any arguments, and a typed override does not fit that
    @staticmethod
    def forward(ctx, x, alpha, noise, keep, drawn, bits, signed, alpha_gradient_scale, centered, dtype):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, alpha, noise, keep, drawn)
        ctx.bits, ctx.signed, ctx.centered, ctx.alpha_gradient_scale = bits, signed, centered, alpha_gradient_scale
        ctx.dtype = dtype
        return _quantize(x, alpha, keep, drawn, bits, signed, centered, dtype)

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        x, alpha, noise, keep, drawn = ctx.saved_tensors
        bits, signed, centered, alpha_scale = ctx.bits, ctx.signed, ctx.centered, ctx.alpha_gradient_scale
        grad_x = grad_alpha = grad_noise = grad_keep = None
        if not ctx.needs_input_grad[2]:
            of_keep = keep is not None and ctx.needs_input_grad[3]
            grid = x, alpha, bits, signed, centered, keep, drawn
            if (found := _backend(x).gradients(*grid, noise, grad_output, alpha_scale, of_keep)) is not None:
                grad_x, grad_alpha, grad_keep = found
                return grad_x, grad_alpha, None, grad_keep, *_NO_MORE
        if keep is not None and ctx.needs_input_grad[3]:
            grad_keep = _keep_gradient(x, alpha, keep, drawn, grad_output, bits, signed, centered)
        lo, hi, coarser, offset = _own_grid(bits, signed, drawn, alpha.dtype, centered)
        v = _shift(_position(x, alpha * coarser), -offset).clamp_(lo - _BEYOND, hi + _BEYOND)
        g = grad_output.to(v.dtype)
        nearest = v.round()
        if ctx.needs_input_grad[2]:
            moment = _moment(v, nearest, noise, lo, hi)
            grad_noise = (moment.mul_(g).mul_(alpha * coarser).sum() / -noise).sum_to_size(noise.shape)
        density = _slope(v, nearest, noise, lo, hi)
        if ctx.needs_input_grad[1]:
            levels = _shift(nearest.clamp_(lo, hi), offset)
            level_gradient = levels.addcmul_(_shift(v, offset), density, value=-1).mul_(g)
            if drawn is not None:
                level_gradient.mul_(coarser)
            grad_alpha = level_gradient.sum_to_size(alpha.shape).mul_(alpha_scale)
        if ctx.needs_input_grad[0]:
            grad_x = density.mul_(g).to(x.dtype)
        return grad_x, grad_alpha, grad_noise, grad_keep, *_NO_MORE


def _quantize(
    x: Tensor,
    alpha: Tensor,
    keep: Tensor | None,
    drawn: Tensor | None,
    bits: int,
    signed: bool,
    centered: bool,
    dtype: torch.dtype,
) -> Tensor:
    if (quantized := _backend(x).quantize(x, alpha, bits, signed, centered, keep, drawn, dtype)) is not None:
        return quantized
    lo, hi, coarser, offset = _own_grid(bits, signed, drawn, alpha.dtype, centered)
    own_alpha = alpha * coarser
    levels = _shift(_position(x, own_alpha), -offset).round_().clamp_(lo, hi)
    return _shift(levels, offset).mul_(own_alpha).to(dtype)


def _shift(v: Tensor, offset: Any) -> Tensor:
    """Add the offset of a grid in place; grids without one cost no pass over memory."""
    return v.add_(offset) if isinstance(offset, Tensor) or offset else v


def _own_grid(
    bits: int, signed: bool, last_levels: Tensor | None, dtype: torch.dtype, centered: bool
) -> tuple[Any, Any, Any, Any]:
    """`(lo, hi, steps of alpha in one step, offset)`: numbers, or tensors where each element has its own grid."""
    if last_levels is None:
        return (*level_bounds(bits, signed), 1.0, level_offset(bits, centered))
    hi = last_levels.to(dtype)
    lo = -1 - hi if signed else torch.zeros_like(hi)
    widest = level_bounds(CENTERED_BITS, signed)[1]
    offset = (hi <= widest).to(dtype).mul_(0.5) if centered else 0.0
    return lo, hi, (level_bounds(bits, signed)[1] + 1) / (hi + 1), offset


def _keep_gradient(
    x: Tensor,
    alpha: Tensor,
    keep: Tensor,
    last_levels: Tensor,
    g: Tensor,
    bits: int,
    signed: bool,
    centered: bool = False,
) -> Tensor:
    """`dL/dP_j`: how much the loss falls or rises where bit `j` is kept."""
    v, g_alpha = _position(x, alpha), g * alpha
    below: Tensor | None = None
    gradients: list[Tensor] = []
    for width in range(bits - keep.numel(), bits + 1):
        coarser, offset = 2.0 ** (bits - width), level_offset(width, centered)
        here = (v / coarser - offset).round_().clamp_(*level_bounds(width, signed)).add_(offset).mul_(coarser)
        if below is not None:
            p = keep[len(gradients)].clamp(RAREST, 1 - RAREST)
            kept = last_levels >= level_bounds(width, signed)[1]
            gradients.append((g_alpha * (here - below) * torch.where(kept, 0.5 / p, 0.5 / (1 - p))).sum())
        below = here
    return torch.stack(gradients).to(keep.dtype)


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
