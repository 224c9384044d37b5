"""Find the step size that training begins with: the one with the least squared rounding error."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.fake_quantize import cpu
from .spec import Grid

ELEMENTS_AT_ONCE = 1 << 20
_COARSE = 24  # step sizes tried, from 2 down to 0.01 times the one that covers the largest value
_RATIO = 200 ** (1 / (_COARSE - 1))
_FINE = 16  # tried between the neighbours of the best of these
_DESCENTS = 4


def least_squares_alpha(x: Tensor, grid: Grid) -> Tensor:
    """Return the step size with the least squared rounding error, for every row of `x`.

    A geometric scan, coarse and then fine, finds the right valley of an error that has many; alternating between
    rounding and the exact minimiser `alpha = <x, n>/<n, n>` for fixed levels descends to its floor.

    Args:
        x (`Tensor` of shape `[..., n]`): Finite values; a row shares one step size.
        grid (`Grid`): The levels.

    Returns:
        `Tensor` of shape `[..., 1]`, positive. A row of zeros gets the mean step size of the others (1
        if all are zero).
    """
    rows = x.detach().reshape(-1, x.shape[-1])
    step = max(1, ELEMENTS_AT_ONCE // max(1, rows.shape[1]))
    alpha = torch.cat([_fit_rows(piece, grid) for piece in rows.split(step)])
    found = alpha > 0
    fallback = torch.where(found, alpha, 0).sum() / found.sum().clamp(min=1)
    alpha = torch.where(found, alpha, torch.where(fallback > 0, fallback, 1))
    return alpha.reshape(*x.shape[:-1], 1)


def _fit_rows(x: Tensor, grid: Grid) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.abs().amax(-1, keepdim=True)
    top = 2 * (largest / max(map(abs, grid.bounds))).clamp(min=torch.finfo(x.dtype).tiny)
    coarse = torch.arange(_COARSE, dtype=x.dtype, device=x.device)
    fine = torch.arange(_FINE, dtype=x.dtype, device=x.device) - (_FINE - 1) / 2
    best = _best_step(x, top * _RATIO**-coarse, grid)
    best = _better(best, _best_step(x, best[0] * _RATIO ** (fine * 2 / _FINE), grid))
    for _ in range(_DESCENTS):
        best = _better(best, _best_step(x, best[2], grid))
    return torch.where(largest > 0, best[0], 0)


def _better(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return, row by row, `other` where its error (second in both) is smaller, else `one`."""
    smaller = other[1] < one[1]
    return tuple(torch.where(smaller, b, a) for a, b in zip(one, other, strict=True))


def _best_step(x: Tensor, tries: Tensor, grid: Grid) -> tuple[Tensor, ...]:
    """Return the best of step sizes `[rows, tries]`, its squared error, and the step size that fits its levels best.

    Each is `[rows, 1]`.
    """
    found = cpu.try_steps(x, tries, grid) or _try_steps(x, tries, grid)
    error, refit = found
    error, index = error.nan_to_num(nan=torch.inf).min(-1, keepdim=True)
    return tries.gather(-1, index), error, refit.gather(-1, index).to(x.dtype)


def _try_steps(x: Tensor, tries: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    errors, refits = [], []
    for alpha in tries.split(1, dim=-1):
        levels = (x / alpha).sub_(grid.offset).round_().clamp_(*grid.bounds).add_(grid.offset)
        refits.append((x * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True).clamp(min=1))
        errors.append((x - levels.mul_(alpha)).square_().sum(-1, keepdim=True))
    return torch.cat(errors, -1), torch.cat(refits, -1)
