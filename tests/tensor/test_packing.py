"""Integer levels to words and back, against golden vectors and compressed-tensors' own packing."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from cpq_hf.tensor.packing import pack, unpack, words_per_row
from cpq_hf.tensor.spec import Grid

BITS = [2, 3, 4, 5, 6, 7, 8]
COLUMNS = [1, 7, 31, 32, 33, 64, 100]

GOLDEN = {
    2: ([-2, -1, 0, 1] * 4, ["e4e4e4e4"]),
    4: ([-8, -7, 0, 7] * 2, ["f810f810"]),
    3: ([-4, -3, -2, -1, 0, 1, 2, 3] * 4, ["88fac688", "c688fac6", "fac688fa"]),
}


def random_levels(rows: int, columns: int, bits: int) -> torch.Tensor:
    lo, hi = Grid(bits, True).bounds
    return torch.randint(lo, hi + 1, (rows, columns), dtype=torch.int8)


@pytest.mark.parametrize("bits", GOLDEN)
def test_golden_vectors(bits):
    levels, words = GOLDEN[bits]
    got = pack(torch.tensor([levels]), bits)
    assert [f"{word & 0xFFFFFFFF:08x}" for word in got[0].tolist()] == words


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bits", BITS)
def test_unpack_inverts_pack(bits, columns):
    levels = random_levels(5, columns, bits)
    words = pack(levels, bits)
    assert words.shape == (5, words_per_row(columns, bits))
    assert words.dtype == torch.int32
    assert torch.equal(unpack(words, bits, columns), levels)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bits", BITS)
def test_layout_is_that_of_compressed_tensors(bits, columns):
    levels = random_levels(3, columns, bits)
    assert torch.equal(pack(levels, bits), pack_to_int32(levels, bits))
    assert torch.equal(unpack_from_int32(pack(levels, bits), bits, levels.shape), levels)


def test_padding_of_a_row_is_zero():
    words = pack(torch.full((1, 3), 3, dtype=torch.int8), 3)
    assert words.tolist() == [[0b111_111_111]]


def test_large_weights_are_packed_in_pieces(monkeypatch):
    levels = random_levels(50, 40, 3)
    whole = pack(levels, 3)
    monkeypatch.setattr("cpq_hf.tensor.packing.ELEMENTS_AT_ONCE", 100)
    assert torch.equal(pack(levels, 3), whole)
    assert torch.equal(unpack(whole, 3, 40), levels)


def test_no_rows():
    assert unpack(pack(torch.zeros(0, 9, dtype=torch.int8), 5), 5, 9).shape == (0, 9)
