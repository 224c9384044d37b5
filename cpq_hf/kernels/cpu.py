"""`grid.c` on the CPU: built once a machine with its C compiler, loaded once a process, called on tensors' memory.

The first quantizer that runs builds the library (about two seconds, compiler.py); nothing happens at import. Without
a C compiler, on another device, for other dtypes or layouts, and while a model is traced by `torch.compile` (whose
own compiler fuses the plain operations), the functions here return None and `grid.py` does the work.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ..spec import MIN_BITS, RAREST, last_centered_level, level_bounds
from .compiler import load_library
from .layout import Layout, find_layout, in_memory_order_of

SOURCE = Path(__file__).with_name("grid.c")
_FLAGS = ("-O3", "-ffp-contract=off")
_DTYPES = (torch.float32, torch.bfloat16)
_TYPES = {  # of `x`, and of what is made of it and its gradient; grid.c has the same numbers
    (torch.float32, torch.float32): 0,
    (torch.bfloat16, torch.bfloat16): 1,
    (torch.float32, torch.bfloat16): 2,
}
_ELEMENTS_PER_THREAD = 1 << 14  # below that, waking another thread costs more than it saves


def draws(x: Tensor, alpha: Tensor) -> bool:
    """Whether the kernels draw bit-widths themselves: no, they read `last_levels`, a byte an element."""
    return False


def quantize(
    x: Tensor,
    alpha: Tensor,
    bits: int,
    signed: bool,
    centered: bool,
    keep: Tensor | None,
    last_levels: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:
    """`x` on the grid in `dtype`, or None if it cannot be done here. `last_levels` say all that `keep` does."""
    if (layout := _layout(x, alpha, last_levels)) is None or (library := load()) is None:
        return None
    out = torch.empty_like(x, dtype=dtype if (x.dtype, dtype) in _TYPES else x.dtype)
    library.cpq_forward(
        x.data_ptr(), alpha.data_ptr(), _pointer(last_levels), out.data_ptr(),
        *layout, *level_bounds(bits, signed), last_centered_level(signed, centered), _TYPES[x.dtype, out.dtype],
        _threads(x),
    )  # fmt: skip
    return out.to(dtype)


def gradients(
    x: Tensor,
    alpha: Tensor,
    bits: int,
    signed: bool,
    centered: bool,
    keep: Tensor | None,
    last_levels: Tensor | None,
    noise: Tensor,
    g: Tensor,
    alpha_scale: float,
    of_keep: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Gradients of `x`, `alpha` (times `alpha_scale`) and, if asked for, `keep`; None if it cannot be done here."""
    if (layout := _layout(x, alpha, last_levels)) is None or noise.dtype != torch.float32:
        return None
    if (library := load()) is None:
        return None
    grad_keep = None
    if of_keep:
        assert keep is not None
        assert last_levels is not None
        if (grad_keep := keep_gradient(x, alpha, bits, signed, centered, keep, last_levels, g)) is None:
            return None
    narrow = bits - (0 if keep is None else keep.numel()) == MIN_BITS
    g = _like(x, g)
    grad_x, grad_alpha = torch.empty_like(x), torch.empty_like(alpha)
    failed = library.cpq_backward(
        x.data_ptr(), alpha.data_ptr(), _pointer(last_levels), noise.data_ptr(), g.data_ptr(), grad_x.data_ptr(),
        grad_alpha.data_ptr(), *layout, *level_bounds(bits, signed), last_centered_level(signed, centered), narrow,
        _TYPES[x.dtype, g.dtype], _threads(x),
    )  # fmt: skip
    return None if failed else (grad_x, grad_alpha.mul_(alpha_scale), grad_keep)


def is_ready() -> bool:
    """Whether the kernels can be called now."""
    return not torch.compiler.is_compiling() and load() is not None


def draw_last_levels(key: int, keep: Tensor, last_levels: list[int], count: int) -> Tensor:
    """Draw the last levels of `count` elements, uint8: `last_levels[j]` where `j` of the bits that may go are kept.

    `keep` has the probabilities, `key` is 64 random bits; asks for `is_ready()`.
    """
    library = load()
    assert library is not None
    thresholds = (keep.detach() * 2**16).round().to(torch.int32).contiguous()
    drawn = torch.empty(count, dtype=torch.uint8)
    library.cpq_draw(
        key, thresholds.data_ptr(), bytes(last_levels), thresholds.numel(), drawn.data_ptr(), count, _threads(drawn)
    )
    return drawn


def keep_gradient(
    x: Tensor,
    alpha: Tensor,
    bits: int,
    signed: bool,
    centered: bool,
    keep: Tensor,
    last_levels: Tensor,
    g: Tensor,
) -> Tensor | None:
    """Gradient of the probabilities with which bits are kept, or None if it cannot be done here."""
    if (layout := _layout(x, alpha, last_levels)) is None or keep.dtype != torch.float32:
        return None
    if (library := load()) is None:
        return None
    g = _like(x, g)
    gradient, keep = torch.empty(keep.numel()), keep.detach().contiguous()
    failed = library.cpq_keep_gradient(
        x.data_ptr(), alpha.data_ptr(), last_levels.data_ptr(), g.data_ptr(), keep.data_ptr(), gradient.data_ptr(),
        *layout, *level_bounds(bits, signed), last_centered_level(signed, centered), keep.numel(), RAREST,
        _TYPES[x.dtype, g.dtype], _threads(x),
    )  # fmt: skip
    return None if failed else gradient


def try_steps(x: Tensor, alpha: Tensor, bits: int, signed: bool, offset: float) -> tuple[Tensor, Tensor] | None:
    """Squared rounding errors of step sizes `[rows, tries]`, and what fits their levels best; None if not here."""
    if _layout(x, alpha[:, :1].contiguous(), None) is None or x.dtype != torch.float32 or (library := load()) is None:
        return None
    error, refit = torch.empty(alpha.shape, dtype=torch.float64), torch.empty(alpha.shape, dtype=torch.float64)
    alpha = alpha.contiguous()
    library.cpq_try_steps(
        x.data_ptr(), alpha.data_ptr(), error.data_ptr(), refit.data_ptr(), *x.shape, alpha.shape[1],
        *level_bounds(bits, signed), offset, _threads(x),
    )  # fmt: skip
    return error, refit


def name() -> str:
    """`"c"` if quantizers on the CPU run on `grid.c` in this process, else `"eager"`."""
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
    library.cpq_draw.argtypes = [ctypes.c_uint64, pointer, ctypes.c_char_p, number, pointer, size, number]
    library.cpq_try_steps.restype = library.cpq_draw.restype = None
    library.cpq_forward.restype, library.cpq_backward.restype, library.cpq_keep_gradient.restype = None, number, number
    return library


def _layout(x: Tensor, alpha: Tensor, last_levels: Tensor | None) -> tuple[int, int, Layout] | None:
    """`(rows, columns, layout)` of the memory of `x` as grid.c sees it, or None."""
    if (
        torch.compiler.is_compiling()
        or x.device.type != "cpu"
        or (last_levels is not None and last_levels.stride() != x.stride())
    ):
        return None
    return find_layout(x, alpha, _DTYPES)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _like(x: Tensor, g: Tensor) -> Tensor:
    """The gradient in the memory order of `x`, in a dtype that the kernels take beside that of `x`."""
    return in_memory_order_of(x, g, g.dtype if (x.dtype, g.dtype) in _TYPES else x.dtype)


def _threads(x: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), x.numel() // _ELEMENTS_PER_THREAD))
