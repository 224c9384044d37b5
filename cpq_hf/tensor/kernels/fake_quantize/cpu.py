"""Run `fake_quantize.c` on the CPU: built once per machine with its C compiler, called on the memory of tensors.

The first quantizer that runs builds the library (about two seconds, compiler.py); nothing happens at import. Without
a C compiler, on another device, for other dtypes or layouts, and while a model is traced by `torch.compile` (whose
own compiler fuses the plain operations), the functions here return None and `fake_quantize.py` does the work.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ...spec import MIN_BITS, RAREST, Grid
from ..compiler import load_library
from ..layout import Layout, find_layout, in_memory_order_of
from .dropped import Dropped

SOURCE = Path(__file__).with_name("fake_quantize.c")
_FLAGS = ("-O3", "-ffp-contract=off")
_DTYPES = (torch.float32, torch.bfloat16)
_TYPES = {  # of `x`, and of what is made of it and its gradient; fake_quantize.c has the same numbers
    (torch.float32, torch.float32): 0,
    (torch.bfloat16, torch.bfloat16): 1,
    (torch.float32, torch.bfloat16): 2,
}
_ELEMENTS_PER_THREAD = 1 << 14  # below that, waking another thread costs more than it saves


def draws(x: Tensor, alpha: Tensor) -> bool:
    """Return whether the kernels draw bit-widths: no, they read `max_level`."""
    return False


def quantize(x: Tensor, alpha: Tensor, grid: Grid, dropped: Dropped | None, dtype: torch.dtype) -> Tensor | None:
    """Round `x` to the grid in `dtype`; None if it cannot be done here."""
    max_level = None if dropped is None else dropped.max_level
    if (layout := _layout(x, alpha, max_level)) is None or (library := load()) is None:
        return None
    out = torch.empty_like(x, dtype=dtype if (x.dtype, dtype) in _TYPES else x.dtype)
    library.cpq_forward(
        x.data_ptr(), alpha.data_ptr(), _pointer(max_level), out.data_ptr(),
        *layout, *grid.bounds, grid.max_centered_level, _TYPES[x.dtype, out.dtype], _threads(x),
    )  # fmt: skip
    return out.to(dtype)


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
    max_level = None if dropped is None else dropped.max_level
    if (layout := _layout(x, alpha, max_level)) is None or (library := load()) is None:
        return None
    g = _like(x, g)
    grad_keep = None
    if dropped is not None and of_keep and (grad_keep := keep_gradient(x, alpha, grid, dropped, g)) is None:
        return None
    narrow = grid.bits - (0 if dropped is None else dropped.keep_prob.numel()) == MIN_BITS
    grad_x, grad_alpha = torch.empty_like(x), torch.empty_like(alpha)
    failed = library.cpq_backward(
        x.data_ptr(), alpha.data_ptr(), _pointer(max_level), noise.data_ptr(), g.data_ptr(), grad_x.data_ptr(),
        grad_alpha.data_ptr(), *layout, *grid.bounds, grid.max_centered_level, narrow, _TYPES[x.dtype, g.dtype],
        _threads(x),
    )  # fmt: skip
    return None if failed else (grad_x, grad_alpha.mul_(alpha_scale), grad_keep)


def is_ready() -> bool:
    """Return whether the kernels can be called now."""
    return not torch.compiler.is_compiling() and load() is not None


def draw_max_level(x: Tensor, keep_prob: Tensor, seed: Tensor, grid: Grid) -> Tensor:
    """Draw the last level of every element: uint8, shape and strides of `x`. Needs [`is_ready`]."""
    library = load()
    assert library is not None
    thresholds = (keep_prob.detach() * 2**16).round().to(torch.int32).contiguous()
    levels = bytes(grid.nested_max_levels(thresholds.numel()))
    drawn = torch.empty(x.numel(), dtype=torch.uint8)
    library.cpq_draw(
        seed.item(), thresholds.data_ptr(), levels, thresholds.numel(), drawn.data_ptr(), drawn.numel(),
        _threads(drawn),
    )  # fmt: skip
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    # in the order of the memory of `x` where that has no holes (a transposed weight), as the kernels need it
    return drawn.as_strided(x.shape, x.stride()) if reach == x.numel() else drawn.view(x.shape)


def keep_gradient(x: Tensor, alpha: Tensor, grid: Grid, dropped: Dropped, g: Tensor) -> Tensor | None:
    """Return the gradient of the probabilities that bits are kept, shape of `keep_prob`; None if it cannot be done."""
    max_level = dropped.max_level
    if max_level is None or (layout := _layout(x, alpha, max_level)) is None or (library := load()) is None:
        return None
    gradient, keep_prob = torch.empty(dropped.keep_prob.numel()), dropped.keep_prob.detach().contiguous()
    failed = library.cpq_keep_gradient(
        x.data_ptr(), alpha.data_ptr(), max_level.data_ptr(), g.data_ptr(), keep_prob.data_ptr(), gradient.data_ptr(),
        *layout, *grid.bounds, grid.max_centered_level, keep_prob.numel(), RAREST, _TYPES[x.dtype, g.dtype],
        _threads(x),
    )  # fmt: skip
    return None if failed else gradient


def try_steps(x: Tensor, alpha: Tensor, grid: Grid) -> tuple[Tensor, Tensor] | None:
    """Return the squared rounding errors of step sizes `[rows, tries]`, and the step sizes that fit their levels best.

    None if it cannot be done here.
    """
    if _layout(x, alpha[:, :1].contiguous(), None) is None or x.dtype != torch.float32 or (library := load()) is None:
        return None
    error, refit = torch.empty(alpha.shape, dtype=torch.float64), torch.empty(alpha.shape, dtype=torch.float64)
    alpha = alpha.contiguous()
    library.cpq_try_steps(
        x.data_ptr(), alpha.data_ptr(), error.data_ptr(), refit.data_ptr(), *x.shape, alpha.shape[1],
        *grid.bounds, grid.offset, _threads(x),
    )  # fmt: skip
    return error, refit


def name() -> str:
    """`"c"` if quantizers on the CPU run on `fake_quantize.c` in this process, else `"eager"`."""
    return "eager" if load() is None else "c"


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, built if need be; None if that fails."""
    if (library := load_library(SOURCE, _FLAGS)) is None:
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.cpq_forward.argtypes = [pointer] * 4 + [size] * 2 + [number] * 6
    library.cpq_backward.argtypes = [pointer] * 7 + [size] * 2 + [number] * 7
    library.cpq_keep_gradient.argtypes = [pointer] * 6 + [size] * 2 + [number] * 5 + [ctypes.c_float] + [number] * 2
    library.cpq_try_steps.argtypes = [pointer] * 4 + [size] * 3 + [number] * 2 + [ctypes.c_float, number]
    library.cpq_draw.argtypes = [ctypes.c_int64, pointer, ctypes.c_char_p, number, pointer, size, number]
    library.cpq_try_steps.restype = library.cpq_draw.restype = None
    library.cpq_forward.restype, library.cpq_backward.restype, library.cpq_keep_gradient.restype = None, number, number
    return library


def _layout(x: Tensor, alpha: Tensor, max_level: Tensor | None) -> tuple[int, int, Layout] | None:
    """Return `(rows, columns, layout)` of the memory of `x` as fake_quantize.c sees it; None where it cannot run."""
    drawn_apart = max_level is not None and max_level.stride() != x.stride()
    if torch.compiler.is_compiling() or x.device.type != "cpu" or drawn_apart:
        return None
    return find_layout(x, alpha, _DTYPES)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _like(x: Tensor, g: Tensor) -> Tensor:
    """The gradient in the memory order of `x`, in a dtype that the kernels take beside that of `x`."""
    return in_memory_order_of(x, g, g.dtype if (x.dtype, g.dtype) in _TYPES else x.dtype)


def _threads(x: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), x.numel() // _ELEMENTS_PER_THREAD))
