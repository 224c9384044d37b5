"""Run `triton_kernels.py` on CUDA devices: tile shapes, buffers for sums, and operators for `torch.compile`.

Triton compiles a kernel at its first launch; nothing happens at import. Without Triton (or without what it needs, a C
compiler), for other dtypes or layouts, the functions here return None and `fake_quantize.py` does the work. While
`torch.compile` traces a model, the kernels are called through operators that it need not look into.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...spec import MIN_BITS, RAREST, Grid
from ..launch import load_kernels, on
from ..layout import Layout, find_layout, in_memory_order_of
from .dropped import Dropped

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILE = 1024  # elements, by 4 warps: 8 a thread, which are whole 16-byte accesses in 2-byte dtypes
_NARROWEST = 128  # columns of a tile, where the tensor has so many
_MOST_PIECES = 8  # tiles a program: those that one random number serves
_ENOUGH_PROGRAMS = 512  # a tensor too small for that many takes fewer tiles a program


def draws(x: Tensor, alpha: Tensor) -> bool:
    """Return whether the kernels run on `x`, and so draw each element's bit-width from the seed."""
    return find_layout(x, alpha, _DTYPES) is not None and _available()


def quantize(x: Tensor, alpha: Tensor, grid: Grid, dropped: Dropped | None, dtype: torch.dtype) -> Tensor | None:
    """Round `x` to the grid in `dtype`; None if it cannot be done here."""
    if not draws(x, alpha):
        return None
    keep_prob, seed = (None, None) if dropped is None else dropped[:2]
    made = dtype if dtype in _DTYPES else x.dtype
    if torch.compiler.is_compiling():
        quantized: Tensor = torch.ops.cpq_hf.quantize(x, alpha, keep_prob, seed, *grid, made)
    else:
        quantized = _quantize(x, alpha, keep_prob, seed, grid, made)
    return quantized.to(dtype)


def gradients(
    x: Tensor,
    alpha: Tensor,
    grid: Grid,
    dropped: Dropped | None,
    noise: Tensor,
    g: Tensor,
    alpha_scale: float,
    of_keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return the gradients of `x`, `alpha` (times `alpha_scale`) and, if asked for, `keep_prob`.

    None if it cannot be done here.
    """
    if not draws(x, alpha):
        return None
    keep_prob, seed = (None, None) if dropped is None else dropped[:2]
    if torch.compiler.is_compiling():
        found = torch.ops.cpq_hf.gradients(x, alpha, keep_prob, seed, noise, g, *grid, alpha_scale, of_keep)
    else:
        found = _gradients(x, alpha, keep_prob, seed, noise, g, grid, alpha_scale, of_keep)
    grad_x, grad_alpha, grad_keep = found
    return grad_x, grad_alpha, grad_keep if of_keep else None


def name() -> str:
    """`"triton"` if quantizers on a GPU run on `triton_kernels.py` in this process, else `"eager"`."""
    return "triton" if _available() else "eager"


@torch.compiler.assume_constant_result
def _available() -> bool:
    return _kernels() is not None


@functools.cache
def _kernels() -> ModuleType | None:
    """The kernels, if they can be launched."""
    return load_kernels(f"{__package__}.triton_kernels")


def _quantize(
    x: Tensor, alpha: Tensor, keep_prob: Tensor | None, seed: Tensor | None, grid: Grid, dtype: torch.dtype
) -> Tensor:
    rows, columns, pieces, programs, meta = _plan(x, alpha, keep_prob)
    out = torch.empty_like(x, dtype=dtype)
    with on(x):
        _grid().forward[(programs,)](
            x, alpha, keep_prob, seed, out, rows, columns, pieces, *grid.bounds, grid.max_centered_level, **meta
        )
    return out


def _gradients(
    x: Tensor,
    alpha: Tensor,
    keep_prob: Tensor | None,
    seed: Tensor | None,
    noise: Tensor,
    g: Tensor,
    grid: Grid,
    alpha_scale: float,
    of_keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns, pieces, programs, meta = _plan(x, alpha, keep_prob)
    tile_rows, tile_columns, count = meta["R"], meta["C"], meta["COUNT"]
    along = -(-rows // tile_rows) if meta["BY_COLUMN"] else -(-columns // tile_columns)
    alpha_sums = torch.empty(along, alpha.numel(), dtype=torch.float32, device=x.device)
    keep_sums = torch.empty(programs * pieces if of_keep else 0, count, dtype=torch.float32, device=x.device)
    grad_x = torch.empty_like(x)
    g = in_memory_order_of(x, g, g.dtype if g.dtype in _DTYPES else x.dtype)
    with on(x):
        _grid().backward[(programs,)](
            x, alpha, keep_prob, seed, noise, g, grad_x, alpha_sums, keep_sums, rows, columns,
            pieces, *grid.bounds, grid.max_centered_level, alpha_scale, RAREST,
            NARROW=grid.bits - count == MIN_BITS, KEEP_GRADIENT=of_keep, **meta,
        )  # fmt: skip
    grad_alpha = alpha_sums if along == 1 else alpha_sums.sum(0)
    return grad_x, grad_alpha.view(alpha.shape), keep_sums.sum(0)


def _plan(x: Tensor, alpha: Tensor, keep_prob: Tensor | None) -> tuple[int, int, int, int, dict[str, Any]]:
    """`(rows, columns, tiles a program, programs)` and what a kernel is compiled for."""
    found = find_layout(x, alpha, _DTYPES)
    assert found is not None
    rows, columns, layout = found
    tile_rows, tile_columns = _tile(rows, columns, layout)
    tiles = -(-rows // tile_rows) * -(-columns // tile_columns)
    pieces = max(1, min(_MOST_PIECES, tiles // _ENOUGH_PROGRAMS))
    count = 0 if keep_prob is None else keep_prob.numel()
    meta = {
        "BY_COLUMN": layout == Layout.COLUMNS,
        "COUNT": count,
        "R": tile_rows,
        "C": tile_columns,
        "num_warps": 8 if count else 4,  # random numbers take registers
        "enable_fp_fusion": True,
    }
    return rows, columns, pieces, -(-tiles // pieces), meta


def _tile(rows: int, columns: int, layout: Layout) -> tuple[int, int]:
    """Rows and columns of a tile, powers of two: those that overlap the ends of the tensor least."""
    if layout == Layout.COLUMNS or columns < _NARROWEST:
        widest = _NARROWEST // 4 if layout == Layout.COLUMNS else _NARROWEST
        width = min(widest, 1 << (columns - 1).bit_length())
        return _TILE // width, width
    shapes = [(_TILE // width, width) for width in (1024, 512, 256, 128)]
    return min(shapes, key=lambda shape: -(-rows // shape[0]) * -(-columns // shape[1]))


def _grid() -> ModuleType:
    kernels = _kernels()
    assert kernels is not None
    return kernels


# What torch.compile calls: operators take tensors and plain numbers, so the grid travels as its three fields.


def _quantize_operator(
    x: Tensor,
    alpha: Tensor,
    keep_prob: Tensor | None,
    seed: Tensor | None,
    bits: int,
    signed: bool,
    centered: bool,
    dtype: torch.dtype,
) -> Tensor:
    return _quantize(x, alpha, keep_prob, seed, Grid(bits, signed, centered), dtype)


def _gradients_operator(
    x: Tensor,
    alpha: Tensor,
    keep_prob: Tensor | None,
    seed: Tensor | None,
    noise: Tensor,
    g: Tensor,
    bits: int,
    signed: bool,
    centered: bool,
    alpha_scale: float,
    of_keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grid = Grid(bits, signed, centered)
    return _gradients(x, alpha, keep_prob, seed, noise, g, grid, alpha_scale, of_keep)


torch.library.custom_op("cpq_hf::quantize", _quantize_operator, mutates_args=()).register_fake(
    lambda x, *rest: torch.empty_like(x, dtype=rest[-1])
)
torch.library.custom_op("cpq_hf::gradients", _gradients_operator, mutates_args=()).register_fake(
    lambda x, alpha, keep_prob, *rest: (
        torch.empty_like(x),
        torch.empty_like(alpha),
        alpha.new_empty(0 if keep_prob is None else keep_prob.numel()),
    )
)
