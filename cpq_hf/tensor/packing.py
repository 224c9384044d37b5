"""Turn rows of integer levels into rows of 32-bit words and back, exactly.

Layout (that of compressed-tensors' `pack-quantized` since version 0.17): a level `q` of `bits` bits is stored as
`u = q + 2^(bits-1)`. The `u` of one row form a bit stream, least significant bit first: value `i` occupies the bits
`[i*bits, (i+1)*bits)`. Consecutive slices of 32 bits of that stream are the words; a value may lie across two of
them. The end of a row is filled up with zeros, so that each row starts at a word:

    [rows, columns] of levels  ->  int32 [rows, ceil(columns * bits / 32)]

32 values fill exactly `bits` words. That is the block in which both directions work: a loop over the 32 places of a
block, each handling all blocks at once, in 64-bit arithmetic so that a shift never overflows. The price is 8 bytes of
scratch an element, bounded by working on `ELEMENTS_AT_ONCE` of them at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32
ELEMENTS_AT_ONCE = 1 << 22


def words_per_row(columns: int, bits: int) -> int:
    """Number of 32-bit words that hold one row."""
    return -(-columns * bits // WORD)


def pack(levels: Tensor, bits: int) -> Tensor:
    """Pack signed levels.

    Args:
        levels (`Tensor` of shape `[rows, columns]`, any integer dtype): Values in `-2^(bits-1) .. 2^(bits-1)-1`.
        bits (`int`): Bit-width, 2 to 8.

    Returns:
        `Tensor` of shape `[rows, ceil(columns*bits/32)]`, int32.
    """
    rows, columns = levels.shape
    words = levels.new_empty((rows, words_per_row(columns, bits)), dtype=torch.int32)
    for piece in _row_pieces(rows, columns):
        words[piece] = _pack_piece(levels[piece], bits)
    return words


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of [`pack`].

    Args:
        words (`Tensor` of shape `[rows, ceil(columns*bits/32)]`, int32): Packed rows.
        bits (`int`): Bit-width, 2 to 8.
        columns (`int`): Values per row.

    Returns:
        `Tensor` of shape `[rows, columns]`, int8.
    """
    rows = words.shape[0]
    levels = words.new_empty((rows, columns), dtype=torch.int8)
    for piece in _row_pieces(rows, columns):
        levels[piece] = _unpack_piece(words[piece], bits, columns)
    return levels


def _row_pieces(rows: int, columns: int) -> list[slice]:
    step = max(1, ELEMENTS_AT_ONCE // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _places(bits: int) -> list[tuple[int, int, int]]:
    """`(place in the block, word in the block, shift in the word)` of each of the 32 values."""
    return [(place, place * bits // WORD, place * bits % WORD) for place in range(WORD)]


def _pack_piece(levels: Tensor, bits: int) -> Tensor:
    rows, columns = levels.shape
    blocks = -(-columns // WORD)
    values = levels.new_zeros((rows, blocks * WORD), dtype=torch.int64)
    values[:, :columns] = levels
    values[:, :columns] += 1 << (bits - 1)
    values = values.view(rows, blocks, WORD)
    words = values.new_zeros((rows, blocks, bits))
    for place, word, shift in _places(bits):
        words[..., word] |= values[..., place] << shift
        if shift + bits > WORD:  # the value reaches into the next word
            words[..., word + 1] |= values[..., place] >> (WORD - shift)
    words = words.view(rows, blocks * bits)[:, : words_per_row(columns, bits)]
    words = words & 0xFFFFFFFF
    return (words - ((words >> 31) << 32)).to(torch.int32)  # the same 32 bits, read as a signed number


def _unpack_piece(words: Tensor, bits: int, columns: int) -> Tensor:
    rows = words.shape[0]
    blocks = -(-columns // WORD)
    stream = words.new_zeros((rows, blocks * bits), dtype=torch.int64)
    stream[:, : words.shape[1]] = words
    stream = (stream & 0xFFFFFFFF).view(rows, blocks, bits)
    levels = stream.new_empty((rows, blocks, WORD), dtype=torch.int8)
    for place, word, shift in _places(bits):
        value = stream[..., word] >> shift
        if shift + bits > WORD:
            value = value | (stream[..., word + 1] << (WORD - shift))
        levels[..., place] = (value & ((1 << bits) - 1)) - (1 << (bits - 1))
    return levels.view(rows, blocks * WORD)[:, :columns]
