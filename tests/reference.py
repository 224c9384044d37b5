"""The method as the textbook has it: with a grid dimension and autograd, slow and obvious. Float64 only."""

from __future__ import annotations

import torch
from torch import Tensor

from cpq_hf.tensor.spec import Grid


def fake_quantize(
    x: Tensor,
    alpha: Tensor,
    noise: Tensor,
    bits: int,
    signed: bool,
    drawn: Tensor | None = None,
    centered: bool = False,
) -> Tensor:
    """One-hot of the mode forward, the cell probabilities backward; `drawn` gives each element its own bit-width."""
    lo, hi = Grid(bits, signed).bounds
    levels = torch.arange(lo, hi + 1, dtype=x.dtype)
    width = torch.full_like(x, bits) if drawn is None else drawn
    alpha = alpha * 2.0 ** (bits - width)
    offset = torch.where(width == 2, 0.5, 0.0)[..., None] if centered else torch.zeros((), dtype=x.dtype)
    v = (x / alpha)[..., None] - offset
    if drawn is None:
        first, last = torch.full_like(v, lo), torch.full_like(v, hi)
    else:
        pairs = torch.tensor([Grid(int(k), signed).bounds for k in drawn.flatten()], dtype=x.dtype)
        first, last = pairs.view(*x.shape, 2).split(1, dim=-1)
    inside = (levels >= first) & (levels <= last)
    above = torch.sigmoid((levels + 0.5 - v) / noise)
    below = torch.sigmoid((levels - 0.5 - v) / noise)
    above = torch.where(levels == last, torch.ones_like(above), above)  # the last cells reach to infinity
    below = torch.where(levels == first, torch.zeros_like(below), below)
    probabilities = torch.where(inside, above - below, 0)
    mode = torch.round(v.detach()).clamp(first, last)
    one_hot = (levels == mode).to(x.dtype)
    straight_through = one_hot + probabilities - probabilities.detach()
    return alpha * (straight_through * (levels + offset)).sum(-1)


def at_widths(
    x: Tensor, alpha: Tensor, bits: int, min_bits: int, signed: bool, centered: bool = False
) -> list[Tensor]:
    """`x` quantized with min_bits, ..., bits bits on nested grids: the step doubles with each bit that is dropped."""
    quantized = []
    for width in range(min_bits, bits + 1):
        step, offset = alpha * 2.0 ** (bits - width), 0.5 if centered and width == 2 else 0.0
        quantized.append((torch.round(x / step - offset).clamp(*Grid(width, signed).bounds) + offset) * step)
    return quantized


def mean_over_draws(x: Tensor, alpha: Tensor, keep: Tensor, bits: int, signed: bool) -> Tensor:
    """Mean forward value under DropBits: x_min + sum_j P_j (x_j - x_{j-1})."""
    quantized = at_widths(x, alpha, bits, bits - keep.numel(), signed)
    total = quantized[0]
    for probability, here, below in zip(keep, quantized[1:], quantized[:-1], strict=True):
        total = total + probability * (here - below)
    return total


def keep_gradient(
    x: Tensor, alpha: Tensor, keep: Tensor, drawn: Tensor, g: Tensor, bits: int, signed: bool, centered: bool = False
) -> Tensor:
    """`dL/dP_j` for one draw of bit-widths, element by element."""
    quantized = at_widths(x, alpha, bits, bits - keep.numel(), signed, centered)
    gradients = []
    for j, probability in enumerate(keep, start=1):
        kept = drawn >= bits - keep.numel() + j
        weight = torch.where(kept, 1 / (2 * probability), 1 / (2 * (1 - probability)))
        gradients.append((g * (quantized[j] - quantized[j - 1]) * weight).sum())
    return torch.stack(gradients)


def expected_level_slope(v: Tensor, noise: float, bits: int, signed: bool) -> Tensor:
    """D(v) by the full sum over all boundaries."""
    lo, hi = Grid(bits, signed).bounds
    total = torch.zeros_like(v)
    for j in range(lo, hi):
        p = torch.sigmoid((v - j - 0.5) / noise)
        total = total + p * (1 - p)
    return total / noise
