"""Find how the memory of a tensor lies against its step sizes: every kernel asks this first."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class Layout(IntEnum):
    """Layout of `x`, seen as `[rows, columns]`; fake_quantize.c has the same numbers."""

    ROWS = 0  # a step size for each row
    COLUMNS = 1  # a step size for each column (weights stored [in, out])
    ONE = 2  # one step size; one row


def find_layout(x: Tensor, alpha: Tensor, dtypes: tuple[torch.dtype, ...]) -> tuple[int, int, Layout] | None:
    """`(rows, columns, layout)` of the memory of `x`, or None where no kernel can run on it."""
    if (
        x.numel() == 0
        or type(x) not in (Tensor, torch.nn.Parameter)
        or x.dtype not in dtypes
        or alpha.dtype != torch.float32
        or not alpha.is_contiguous()
    ):
        return None
    if alpha.numel() == 1:
        channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        return (1, x.numel(), Layout.ONE) if x.is_contiguous() or channels_last or _is_transposed(x) else None
    if alpha.shape == (*x.shape[:-1], 1) and x.is_contiguous():
        return (alpha.numel(), x.shape[-1], Layout.ROWS)
    if alpha.shape == (x.shape[0], 1, 1) and _is_transposed(x):
        return (x.shape[2], x.shape[0], Layout.COLUMNS)
    return None


def _is_transposed(x: Tensor) -> bool:
    """Return whether `x` is `[rows, 1, k]` over the memory of a contiguous `[k, rows]`."""
    return x.dim() == 3 and x.shape[1] == 1 and x.stride(0) == 1 and x.stride(2) == x.shape[0]


def in_memory_order_of(x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """`g` with the strides of `x`, in `dtype`."""
    return g if g.stride() == x.stride() and g.dtype == dtype else torch.empty_like(x, dtype=dtype).copy_(g)
