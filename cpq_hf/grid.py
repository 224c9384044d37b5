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

DropBits quantizes each element with its own bit-width `k <= bits` (same alpha, the nested grid of `k` bits); with
`c_j = clamp(round(v), lo_j, hi_j)` the gradient of the probability `P_j` that bit `j` is kept is

    dL/dP_j   = sum G * alpha * (c_j - c_{j-1})

**The window.** S' decays exponentially, so only the 4 boundaries nearest to `v` that exist are summed (3 for 2 bits,
which is all of them). At s = 1/3 this changes D by at most 0.0083, at s = 0.2 by 2.4e-4, at s = 0.1 by 2.1e-8. The window
is centred on `m`, the level nearest to `v` that has its whole window inside the grid, hence symmetric about `m`.
With `C = cosh((v - m)/s)`, `c = cosh(o/s)`, `u = c/(C + c)`, the two boundaries at `m - o` and `m + o` together give

    S'((v - m - o)/s) + S'((v - m + o)/s) = (1 + C*c)/(C + c)^2 = u * (1 + u * (1/c^2 - 1))

so that one `cosh` an element serves all boundaries and nothing overflows for s >= 0.02.

**Memory.** O(1) an element whatever the bit-width: backward keeps `x` (the parameter itself) and, under DropBits, one
byte an element; scratch tensors are reused in place. Arithmetic is float32 (float64 for float64 input); the output
has the dtype of the input.

Shapes: `x` is anything, `alpha` broadcasts against it (`[out, groups, 1]` against `[out, groups, group_size]`),
`noise` is `[1]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .spec import MIN_BITS, level_bounds

MIN_NOISE, MAX_NOISE = 0.02, 0.5
WINDOW = 4
_BEYOND = 3.0  # positions are clamped this far outside the grid, where D is zero, so that infinities stay finite


def fake_quantize(x: Tensor, alpha: Tensor, noise: Tensor, bits: int, signed: bool) -> Tensor:
    """Put `x` on the grid, with the gradients of the multi-class straight-through estimator.

    Args:
        x (`Tensor`): Values of any floating dtype and shape.
        alpha (`Tensor`): Step size, positive, float32; broadcasts against `x`.
        noise (`Tensor` of shape `[1]`): Scale `s` of the logistic noise in steps, 0.02 to 0.5.
        bits (`int`): Bit-width.
        signed (`bool`): Whether the grid has negative levels.

    Returns:
        `Tensor`: `alpha * clamp(round(x / alpha), lo, hi)`, shape and dtype of `x`.
    """
    return _Grid.apply(x, alpha, noise, None, None, bits, signed)


def fake_quantize_dropped(
    x: Tensor, alpha: Tensor, noise: Tensor, keep: Tensor, bits: int, signed: bool, min_bits: int
) -> Tensor:
    """As [`fake_quantize`], but every element draws its own bit-width from the global generator (DropBits).

    Args:
        keep (`Tensor` of shape `[bits - min_bits]`): `P_j`, the probability that bit `j = min_bits+1 .. bits` is
            kept; non-increasing, since bits are nested.
        min_bits (`int`): Bits that are never dropped.
    """
    return _Grid.apply(x, alpha, noise, keep, draw_bits(x, keep, min_bits), bits, signed)


def draw_bits(x: Tensor, keep: Tensor, min_bits: int) -> Tensor:
    """Draw a bit-width for every element of `x`: `min_bits + #{j : u < P_j}`, `u` uniform. uint8, shape of `x`."""
    u = torch.rand(x.shape, device=x.device)
    drawn = torch.full_like(u, min_bits, dtype=torch.uint8)
    for probability in keep.detach().unbind():
        drawn += u < probability
    return drawn


def nearest_levels(x: Tensor, alpha: Tensor, bits: int, signed: bool) -> Tensor:
    """Levels `n*` of `x`, as whole numbers in the arithmetic dtype."""
    return _levels(_position(x, alpha), *level_bounds(bits, signed))


def slope(v: Tensor, noise: Tensor, bits: int, signed: bool, drawn: Tensor | None = None) -> Tensor:
    """`D(v)`: slope of the expected level at position `v`, shape of `v`; `drawn` are the bit-widths under DropBits."""
    return _sum_over_window(_density_sum, v, noise, bits, signed, drawn).div_(noise)


def _position(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.div(x.to(torch.promote_types(x.dtype, torch.float32)), alpha)


def _levels(v: Tensor, lo: Any, hi: Any) -> Tensor:
    return v.round().clamp_(lo, hi)


def _drawn_bounds(drawn: Tensor, signed: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    top = torch.exp2(drawn.to(dtype) - int(signed))
    return (-top if signed else torch.zeros_like(top)), top - 1


class _Grid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, alpha, noise, keep, drawn, bits, signed):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, alpha, noise, keep, drawn)
        ctx.bits, ctx.signed = bits, signed
        v = _position(x, alpha)
        bounds: Any = level_bounds(bits, signed) if drawn is None else _drawn_bounds(drawn, signed, v.dtype)
        return v.round_().clamp_(*bounds).mul_(alpha).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        x, alpha, noise, keep, drawn = ctx.saved_tensors
        bits, signed = ctx.bits, ctx.signed
        lo: Any
        hi: Any
        lo, hi = level_bounds(bits, signed)
        v = _position(x, alpha).clamp_(lo - _BEYOND, hi + _BEYOND)
        g = grad_output.to(v.dtype)
        grad_x = grad_alpha = grad_noise = grad_keep = None
        if keep is not None and ctx.needs_input_grad[3]:
            grad_keep = _keep_gradient(v, g * alpha, keep, bits, signed)
        if ctx.needs_input_grad[2]:
            moment = _sum_over_window(_moment_sum, v, noise, bits, signed, drawn)
            grad_noise = (moment.mul_(g).mul_(alpha).sum() / -noise).sum_to_size(noise.shape)
        density = slope(v, noise, bits, signed, drawn)
        if ctx.needs_input_grad[1]:
            if drawn is not None:
                lo, hi = _drawn_bounds(drawn, signed, v.dtype)
            level_gradient = _levels(v, lo, hi).addcmul_(v, density, value=-1).mul_(g)
            grad_alpha = level_gradient.sum_to_size(alpha.shape)
        if ctx.needs_input_grad[0]:
            grad_x = density.mul_(g).to(x.dtype)
        return grad_x, grad_alpha, grad_noise, grad_keep, None, None, None


def _keep_gradient(v: Tensor, g_alpha: Tensor, keep: Tensor, bits: int, signed: bool) -> Tensor:
    min_bits = bits - keep.numel()
    below = _levels(v, *level_bounds(min_bits, signed))
    gradients = []
    for width in range(min_bits + 1, bits + 1):
        here = _levels(v, *level_bounds(width, signed))
        gradients.append((g_alpha * (here - below)).sum())
        below = here
    return torch.stack(gradients).to(keep.dtype)


def _sum_over_window(term, v, noise, bits, signed, drawn):  # type: ignore[no-untyped-def]
    """Sum `term` over the window of each element. A 2-bit grid has 3 boundaries, any other at least `WINDOW`."""
    if drawn is None:
        return term(*_centred(v, noise, *level_bounds(bits, signed)))
    wide = term(*_centred(v, noise, *_drawn_bounds(drawn, signed, v.dtype)))
    narrow = term(*_centred(v, noise, *level_bounds(MIN_BITS, signed)))
    return torch.where(drawn == MIN_BITS, narrow, wide)


def _centred(v: Tensor, noise: Tensor, lo: Any, hi: Any) -> tuple[Tensor, Tensor, int]:
    """`((v - m)/s, s, boundaries in the window)`."""
    count = min(WINDOW, hi - lo) if isinstance(lo, int) else WINDOW
    centre = v.round().clamp_(lo + count / 2, hi - count / 2)
    return torch.sub(v, centre, out=centre).div_(noise), noise, count


def _density_sum(a: Tensor, noise: Tensor, count: int) -> Tensor:
    """Sum of S'(a - o/s) over `count` offsets `o` one step apart, symmetric about zero. Overwrites `a`."""
    cosh_a = a.cosh_()
    total = torch.add(cosh_a, 1).mul_(2).reciprocal_() if count % 2 else torch.zeros_like(a)
    for pair in range(count // 2):
        cosh_offset = torch.cosh((pair + (1.0 if count % 2 else 0.5)) / noise)
        u = torch.add(cosh_a, cosh_offset).reciprocal_().mul_(cosh_offset)
        total.addcmul_((u * (1 / cosh_offset / cosh_offset - 1)).add_(1), u)
    return total


def _moment_sum(a: Tensor, noise: Tensor, count: int) -> Tensor:
    """Sum of t * S'(t), `t = a - o/s`, over the same offsets as in `_density_sum`."""
    total = torch.zeros_like(a)
    for index in range(count):
        t = a - (index - (count - 1) / 2) / noise
        p = torch.sigmoid(t)
        total.addcmul_(t, p * (1 - p))
    return total


def least_squares_alpha(x: Tensor, bits: int, signed: bool) -> Tensor:
    """Step size with the least squared rounding error, for every row of `x`.

    A geometric scan, coarse and then fine, finds the right valley of an error that has many; alternating between
    rounding and the exact minimiser `alpha = <x, n>/<n, n>` for fixed levels descends to its floor.

    Args:
        x (`Tensor` of shape `[..., n]`): Finite values; a row shares one step size.
        bits (`int`): Bit-width.
        signed (`bool`): Whether the grid has negative levels.

    Returns:
        `Tensor` of shape `[..., 1]`, positive. A row of zeros gets the mean step size of the others (1
        if all are zero).
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    step = max(1, ELEMENTS_AT_ONCE // max(1, rows.shape[1]))
    alpha = torch.cat([_fit_rows(piece, bits, signed) for piece in rows.split(step)])
    found = alpha > 0
    fallback = torch.where(found, alpha, 0).sum() / found.sum().clamp(min=1)
    alpha = torch.where(found, alpha, torch.where(fallback > 0, fallback, 1))
    return alpha.reshape(*x.shape[:-1], 1)


ELEMENTS_AT_ONCE = 1 << 20
_COARSE = 24  # step sizes tried, from 2 down to 0.01 times the one that covers the largest value
_RATIO = 200 ** (1 / (_COARSE - 1))
_FINE = 16  # tried between the neighbours of the best of these
_DESCENTS = 4


def _fit_rows(x: Tensor, bits: int, signed: bool) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    lo, hi = level_bounds(bits, signed)
    largest = x.abs().amax(-1, keepdim=True)
    best = (largest / max(hi, -lo)).clamp(min=torch.finfo(x.dtype).tiny)
    least = torch.full_like(best, torch.inf)

    def try_step(alpha: Tensor) -> None:
        nonlocal best, least
        error = (x - _levels(x / alpha, lo, hi).mul_(alpha)).square_().sum(-1, keepdim=True)
        best, least = torch.where(error < least, alpha, best), torch.minimum(error, least)

    coarse, fine = best * 2, _RATIO ** (2 / _FINE)
    for index in range(_COARSE):
        try_step(coarse * _RATIO**-index)
    centre = best
    for index in range(_FINE):
        try_step(centre * fine ** (index - _FINE / 2 + 0.5))
    for _ in range(_DESCENTS):
        levels = _levels(x / best, lo, hi)
        try_step((x * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True).clamp(min=1))
    return torch.where(largest > 0, best, 0)
