"""Run `packed.c` on the CPU: built with the machine's C compiler by the first layer that runs, in a few seconds."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ..compiler import load_library

SOURCE = Path(__file__).with_name("packed.c")
DTYPES = (torch.float32, torch.bfloat16)
_FLAGS = ("-O3", "-ffp-contract=fast")
_WEIGHTS_PER_THREAD = 1 << 15  # below that, waking another thread costs more than it saves


def is_available() -> bool:
    """Return whether the library is there, built if need be."""
    return load() is not None


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the library, built if need be; None if that fails."""
    if (library := load_library(SOURCE, _FLAGS)) is None:
        return None
    pointer, size, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    library.cpq_dequantize.argtypes = (*[pointer] * 3, *[size] * 3, number, real, number, number)
    library.cpq_linear.argtypes = (*[pointer] * 5, *[size] * 4, number, real, number, number)
    return library


def fits(bits: int, group_size: int | None) -> bool:
    """Return whether [`multiply`] takes such groups: they must hold whole windows of 32 bits."""
    return group_size is None or group_size % (16 if bits == 2 else 8 if bits <= 4 else 4) == 0


def dequantize(
    words: Tensor, scale: Tensor, bits: int, columns: int, offset: float, dtype: torch.dtype
) -> Tensor | None:
    """Write weights out as packed.py documents it; None if memory runs out. Needs [`is_available`]."""
    kernel_dtype = dtype if dtype in DTYPES else torch.float32
    words, scale, rows = words.contiguous(), scale.contiguous(), words.shape[0]
    out = torch.empty(rows, columns, dtype=kernel_dtype)
    failed = _loaded().cpq_dequantize(
        words.data_ptr(), scale.data_ptr(), out.data_ptr(), rows, columns, _groups(scale), bits, offset,
        kernel_dtype == torch.bfloat16, _threads(out.numel()),
    )  # fmt: skip
    return None if failed else out.to(dtype)


def multiply(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, bits: int, offset: float) -> Tensor | None:
    """Multiply as packed.py documents it; None if memory runs out. Needs [`is_available`]."""
    rows, columns = words.shape[0], x.shape[-1]
    inputs, words, scale = x.reshape(-1, columns).contiguous(), words.contiguous(), scale.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    out = x.new_empty(*x.shape[:-1], rows)
    failed = _loaded().cpq_linear(
        inputs.data_ptr(), words.data_ptr(), scale.data_ptr(), None if bias is None else bias.data_ptr(),
        out.data_ptr(), inputs.shape[0], rows, columns, _groups(scale), bits, offset, x.dtype == torch.bfloat16,
        _threads(rows * columns),
    )  # fmt: skip
    return None if failed else out


def _loaded() -> ctypes.CDLL:
    library = load()
    assert library is not None
    return library


def _groups(scale: Tensor) -> int:
    """Return the number of scales per row; 0 where all rows share one."""
    return 0 if scale.dim() == 1 else scale.shape[1]


def _threads(weights: int) -> int:
    return max(1, min(torch.get_num_threads(), weights // _WEIGHTS_PER_THREAD))
