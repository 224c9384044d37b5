"""Run `triton_kernels.py` on CUDA devices: which launches serve a product, and which products they serve."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launch import load_kernels, on

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_INPUTS = 16  # that are multiplied straight from the words; with more, arithmetic counts and not reading
_VALUES = {2: 16, 3: 32, 4: 8, 5: 32, 6: 16, 7: 32, 8: 8}  # of a block: they fill whole words
_ROWS = 4  # of a program
_MOST_INPUTS_AT_ONCE = 8  # of a program; more would not fit into its registers
_WORDS_AHEAD = 4  # that a thread asks for in each row before it uses the first
_MOST_THREADS = 128
_MOST_WASTE = 1.15  # work on blocks that do not exist; the price of longer rounds
_MOST_COLUMNS = 1024  # of a program that writes weights out: 8 a thread


@functools.cache
def kernels() -> ModuleType | None:
    """The kernels, if they can be launched."""
    return load_kernels(f"{__package__}.triton_kernels")


def is_available() -> bool:
    """Return whether the kernels can be launched."""
    return kernels() is not None


def fits(bits: int, group_size: int | None) -> bool:
    """Return whether [`multiply`] knows such groups: they must hold whole blocks."""
    return group_size is None or group_size % _VALUES[bits] == 0


def dequantize(words: Tensor, scale: Tensor, bits: int, columns: int, offset: float, dtype: torch.dtype) -> Tensor:
    """As in packed.py. The kernels must be there, and a weight that is not empty."""
    words, scale, rows = words.contiguous(), scale.contiguous(), words.shape[0]
    out = words.new_empty(rows, columns, dtype=dtype if dtype in DTYPES else torch.float32)
    groups = 0 if scale.dim() == 1 else scale.shape[1]
    width = min(_MOST_COLUMNS, max(128, 1 << (columns - 1).bit_length()))
    with on(words):
        _loaded().dequantize[(rows * -(-columns // width),)](
            words, scale, out, columns, words.shape[1], columns // max(1, groups), groups,
            BITS=bits, ZERO=2.0 ** (bits - 1) - offset, GROUPED=groups > 1, C=width, num_warps=max(1, width // 256),
            enable_fp_fusion=False,  # every rounding is torch's
        )  # fmt: skip
    return out.to(dtype)


def multiply(x: Tensor, words: Tensor, scale: Tensor, bias: Tensor | None, bits: int, offset: float) -> Tensor | None:
    """As in packed.py, of at most `MOST_INPUTS` inputs; None for more, and for groups that do not fit."""
    columns, rows = x.shape[-1], words.shape[0]
    batch, groups = x.numel() // max(1, columns), 1 if scale.dim() == 1 else scale.shape[1]
    if batch > MOST_INPUTS or x.numel() == 0 or rows == 0 or not fits(bits, columns // groups if groups > 1 else None):
        return None
    values = _VALUES[bits]
    blocks = -(-columns // values)
    inputs = x.reshape(batch, columns)
    inputs = F.pad(inputs, (0, blocks * values - columns)) if columns % values else inputs.contiguous()
    at_once = min(_MOST_INPUTS_AT_ONCE, 1 << (batch - 1).bit_length())
    threads, rounds = _tile(blocks, values * bits // 32, at_once)
    out = x.new_empty(*x.shape[:-1], rows)
    with on(x):
        _loaded().multiply[(-(-rows // _ROWS), -(-batch // at_once))](
            inputs, words.contiguous(), scale.contiguous(), None if bias is None else bias.contiguous(), out,
            batch, rows, blocks, words.shape[1], BITS=bits, ZERO=2.0 ** (bits - 1) - offset,
            GROUP=-1 if scale.dim() == 1 else columns // groups // values if groups > 1 else 0,
            V=values, P=16 // x.element_size(), B=at_once, R=_ROWS, C=threads, U=rounds, num_warps=threads // 32,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


@functools.cache
def _tile(blocks: int, words: int, inputs: int) -> tuple[int, int]:
    """Threads, and blocks of `words` words that each takes a round: as many at once as do not mean idle threads."""
    deepest = max(1, _WORDS_AHEAD // (words * inputs))
    shapes = [(threads, depth) for threads in (_MOST_THREADS, 64, 32) for depth in range(deepest, 0, -1)]
    waste = {(threads, depth): -(-blocks // (threads * depth)) * threads * depth / blocks for threads, depth in shapes}
    wide = [shape for shape in shapes if waste[shape] <= _MOST_WASTE]
    return max(wide, key=lambda shape: shape[0] * shape[1]) if wide else min(shapes, key=lambda shape: waste[shape])


def _loaded() -> ModuleType:
    found = kernels()
    assert found is not None
    return found
