"""Packed weights in Triton: written out, or multiplied on the spot. Layout of the words: packing.py.

Multiplying a few inputs is reading words and unpacking them, so both are kept cheap. V consecutive values of a row
fill N whole words, whatever the width (8 values of 4 bits one word, 32 values of 3 bits three): a block. C threads
take C neighbouring blocks, U times a round, in R rows: they ask for all these words before they use one, and load an
input once for R rows, 16 bytes a thread at a time. Every tensor of the loop is a vector of C, one element a thread, so
nothing changes threads before the sums are added up at the end. No program waits for another, and no sum depends on
an order of arrival.

A value takes one AND, and its bits stay where they are: under the exponent of 2^23 the low 23 bits of a word, and the
word shifted by 9, are whole numbers of a float32, and `number * 2^-p - (2^(23-p) + ZERO)` is the level at the place p.
Levels, `code - ZERO`, are whole or half numbers and exact; products are added up in float32 and scaled where their
scale ends, once per row or once per group.

    GROUP  blocks that share a scale; 0: a scale a row, -1: one for all
    P      inputs that make 16 bytes
    B      inputs that a program multiplies
"""

import triton
import triton.language as tl

_PLAIN = ("batch", "rows", "blocks", "row_words", "groups")  # no kernel is compiled again when these change


@triton.jit
def _four(x, C: tl.constexpr):
    """The columns of `[C, 4]`."""
    even, odd = tl.split(tl.reshape(x, (C, 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _eight(x, C: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, (C, 4, 2)))
    a, c, e, g = _four(even, C)
    b, d, f, h = _four(odd, C)
    return a, b, c, d, e, f, g, h


@triton.jit
def _joined(parts, HALF: tl.constexpr):
    """Pairs of tensors, `[..., 2]`: the first half of `parts` with the second."""
    pairs = ()
    for i in tl.static_range(HALF):
        pairs = pairs + (tl.join(parts[i], parts[i + HALF]),)
    return pairs


@triton.jit
def _level(words, first: tl.constexpr, place: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr):
    """The level at a place of a block, whose words are `words[first:]`."""
    n: tl.constexpr = first + place * BITS // 32
    at: tl.constexpr = place * BITS % 32
    p: tl.constexpr = at if at + BITS <= 23 else at - 9 if at + BITS <= 32 else 0
    mask: tl.constexpr = (1 << BITS) - 1
    if at + BITS <= 23:
        number = (words[n] & 0x7FFFFF) | 0x4B000000
    elif at + BITS <= 32:
        number = (words[n] >> 9) | 0x4B000000
    else:
        number = (((words[n] >> at) | (words[n + 1] << (32 - at))) & mask) | 0x4B000000
    number = (number & (0x7F800000 | (mask << p))).to(tl.float32, bitcast=True)
    if p == 0 and ZERO % 1 != 0:  # 2^23 + 1.5 is no float32
        return number - 8388608.0 - ZERO
    return number * 0.5**p - (8388608.0 * 0.5**p + ZERO)


@triton.jit(do_not_specialize=_PLAIN)
def multiply(
    x, words, scale, bias, out, batch, rows, blocks, row_words,
    BITS: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, V: tl.constexpr, P: tl.constexpr,
    B: tl.constexpr, R: tl.constexpr, C: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """`out[batch, rows]` from `x[batch, blocks * V]`."""
    N: tl.constexpr = V * BITS // 32
    first_row, first_input = tl.program_id(0) * R, tl.program_id(1) * B
    total = ()
    for _ in tl.static_range(B * R):
        total = total + (tl.zeros((C,), tl.float32),)
    for start in range(0, blocks, C * U):
        asked = ()
        for u in tl.static_range(U):
            word = (start + u * C + tl.arange(0, C)) * N
            for r in tl.static_range(R):
                row = words + tl.minimum(first_row + r, rows - 1).to(tl.int64) * row_words
                for n in tl.static_range(N):
                    loaded = tl.load(row + word + n, mask=word + n < row_words)
                    asked = asked + (loaded.to(tl.uint32, bitcast=True),)
        for u in tl.static_range(U):
            block = start + u * C + tl.arange(0, C)
            part = total
            if GROUP > 0:
                part = ()
                for _ in tl.static_range(B * R):
                    part = part + (tl.zeros((C,), tl.float32),)
            for piece in tl.static_range(V // P):
                levels = ()
                for r in tl.static_range(R):
                    for v in tl.static_range(P):
                        levels = levels + (_level(asked, (u * R + r) * N, piece * P + v, BITS, ZERO),)
                column = block[:, None] * V + piece * P + tl.arange(0, P)[None, :]
                added = ()
                for b in tl.static_range(B):
                    inside = (block < tl.where(first_input + b < batch, blocks, 0))[:, None]
                    input = x + (first_input + b).to(tl.int64) * (blocks * V)
                    inputs = tl.load(input + column, mask=inside, other=0.0).to(tl.float32)
                    planes = _eight(inputs, C) if P == 8 else _four(inputs, C)
                    for r in tl.static_range(R):
                        sum = part[b * R + r]
                        for v in tl.static_range(P):
                            sum += planes[v] * levels[r * P + v]
                        added = added + (sum,)
                part = added
            if GROUP > 0:
                scaled = ()
                for i in tl.static_range(B * R):
                    row = scale + tl.minimum(first_row + i % R, rows - 1) * tl.cdiv(blocks, GROUP)
                    steps = tl.load(row + tl.minimum(block, blocks - 1) // GROUP)
                    scaled = scaled + (total[i] + part[i] * steps,)
                part = scaled
            total = part
    for level in tl.static_range(5):
        if (B * R) >> (level + 1) > 0:
            total = _joined(total, (B * R) >> (level + 1))
    result = tl.reshape(tl.sum(tl.reshape(total[0], (C, B * R)), axis=0), (B, R))
    row, input = first_row + tl.arange(0, R), first_input + tl.arange(0, B)
    if GROUP == 0:
        result *= tl.load(scale + tl.minimum(row, rows - 1))[None, :]
    elif GROUP < 0:
        result *= tl.load(scale)
    if bias is not None:
        result += tl.load(bias + tl.minimum(row, rows - 1)).to(tl.float32)[None, :]
    exists = (input < batch)[:, None] & (row < rows)[None, :]
    place = input.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=_PLAIN)
def dequantize(
    words, scale, out, columns, row_words, group, groups,
    BITS: tl.constexpr, ZERO: tl.constexpr, GROUPED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`out[rows, columns]`, C columns a program: `(code - ZERO) * scale`, rounded once to float32, then to its dtype.

    `groups` of `group` columns share a scale; where they are not GROUPED, it is 1, or 0 for one scale for all rows.
    """
    across = tl.cdiv(columns, C)
    row, column = (tl.program_id(0) // across).to(tl.int64), tl.program_id(0) % across * C + tl.arange(0, C)
    exists = column < columns
    at, shift = words + row * row_words + column * BITS // 32, column * BITS % 32
    code = tl.load(at, mask=exists, other=0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        reaches_on = exists & (shift + BITS > 32)
        following = tl.load(at + 1, mask=reaches_on, other=0).to(tl.uint32, bitcast=True)
        code |= tl.where(reaches_on, following << (32 - shift), 0)
    level = (code & ((1 << BITS) - 1)).to(tl.float32) - ZERO
    if GROUPED:
        steps = tl.load(scale + row * groups + column // group, mask=exists, other=0.0)
    else:
        steps = tl.load(scale + row * groups)
    tl.store(out + row * columns + column, (level * steps).to(out.dtype.element_ty), mask=exists)
