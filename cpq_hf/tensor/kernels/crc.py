"""CRC-32 of a tensor's bytes: `crc.c` where the machine can build it, zlib elsewhere and for what is short."""

from __future__ import annotations

import ctypes
import functools
import zlib
from pathlib import Path

import torch
from torch import Tensor

from .compiler import load_library

SOURCE = Path(__file__).with_name("crc.c")
_LONG = 1 << 16  # bytes below which building or calling a library gains nothing
_EMPTY = 0xFFFFFFFF  # of which zlib makes a register of zeros


def crc32(tensor: Tensor, start: int = 0) -> int:
    """As `zlib.crc32(bytes, start)`, of the bytes of a contiguous tensor on the CPU."""
    if not tensor.numel():
        return start
    data = tensor.flatten().view(torch.uint8)
    taken = 0
    if data.numel() >= _LONG and (library := load()) is not None:
        folded = ctypes.create_string_buffer(16)
        taken = library.cpq_fold(data.data_ptr(), data.numel(), start, folded)
        if taken:
            start = zlib.crc32(folded.raw, _EMPTY)
    return zlib.crc32(data[taken:].numpy().data, start)


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, built if need be; None if it cannot be."""
    library = load_library(SOURCE, ("-O3",))
    if library is not None:
        library.cpq_fold.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_char_p)
        library.cpq_fold.restype = ctypes.c_size_t
    return library
