"""Forward and backward of the grid in Triton, each one pass over memory. The mathematics is that of fake_quantize.py.

`x` is `[rows, columns]` in memory, cut into tiles of `[R, C]`, numbered row by row. A program takes `pieces` tiles in
turn, at most 8: under DropBits one call of the counter-based generator gives 128 bits, 16 for an element of each. So
who knows the seed knows every element's bit-width, and none is stored. Arithmetic is float32.

    BY_COLUMN  whether a step size belongs to a column; else to a row (one step size: one row)
    NARROW     whether the grid has only 3 boundaries, or may have for single elements under DropBits
    COUNT      bits that can be dropped; 0 is no DropBits

`hi`, `lo` are the last and the first level of the full grid; `centered_hi` is the last level of the widest grid that
is centred, -1 for none. Each tile writes its sums to a separate cell, and torch adds them up: no order of arrival
changes a result.
"""

import triton
import triton.language as tl

# these change by layer: no kernel is compiled again for them
_PLAIN = ("rows", "pieces", "lo", "hi", "centered_hi")
NAN: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _round_even(v):
    return (v + 12582912.0) - 12582912.0  # 1.5 * 2^23


@triton.jit
def _clamp(v, lo, hi):
    return tl.minimum(tl.maximum(v, lo, propagate_nan=NAN), hi, propagate_nan=NAN)


@triton.jit
def _places(tile, rows, columns, R: tl.constexpr, C: tl.constexpr):
    """First row and first column of a tile; from there, offsets in memory and which of them exist, `[R, C]`."""
    across = tl.cdiv(columns, C)
    first_row, first_column = tile // across * R, tile % across * C
    row, column = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    exists = (row < rows - first_row) & (column < columns - first_column)
    return first_row, first_column, row * columns + column, exists


@triton.jit
def _alphas(alpha, first_row, first_column, rows, columns, BY_COLUMN: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Step sizes of a tile, `[1, C]` or `[R, 1]`."""
    if BY_COLUMN:
        index = first_column + tl.arange(0, C)[None, :]
        steps = tl.load(alpha + index, mask=index < columns, other=1.0)
    else:
        index = first_row + tl.arange(0, R)[:, None]
        steps = tl.load(alpha + index, mask=index < rows, other=1.0)
    return steps


@triton.jit
def _random_words(seed, program, R: tl.constexpr, C: tl.constexpr):
    """128 random bits for each place of a tile: what the elements there share in the program's tiles."""
    counter = program * (R * C) + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    return tl.randint4x(tl.load(seed), counter)


@triton.jit
def _finer(a, b, c, d, piece, keep, COUNT: tl.constexpr):
    """Steps of its own grid in one step of the full grid, for each element: 2^-(bits that it drops)."""
    word = tl.where(piece < 2, a, tl.where(piece < 4, b, tl.where(piece < 6, c, d)))
    u = tl.where(piece % 2 == 0, word & 0xFFFF, word >> 16).to(tl.int32)
    finer = tl.full(u.shape, 0.5**COUNT, tl.float32)
    for j in tl.static_range(COUNT):
        kept = u < (tl.load(keep + j) * 65536.0 + 0.5).to(tl.int32)
        finer = tl.where(kept, finer * 2.0, finer)
    return finer


@triton.jit(do_not_specialize=_PLAIN)
def forward(
    x, alpha, keep, seed, out, rows, columns, pieces, lo, hi, centered_hi,
    BY_COLUMN: tl.constexpr, COUNT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if COUNT > 0:
        a, b, c, d = _random_words(seed, program, R, C)
    for piece in range(pieces):
        tile = program * pieces + piece
        first_row, first_column, place, exists = _places(tile, rows, columns, R, C)
        start = tl.cast(first_row, tl.int64) * columns + first_column
        step = _alphas(alpha, first_row, first_column, rows, columns, BY_COLUMN, R, C)
        position = tl.div_rn(tl.load(x + start + place, mask=exists, other=0.0).to(tl.float32), step)
        last, first = hi.to(tl.float32), lo.to(tl.float32)
        if COUNT > 0:
            finer = _finer(a, b, c, d, piece, keep, COUNT)
            position, step = position * finer, step / finer  # by powers of two: exact
            last, first = (last + 1.0) * finer - 1.0, first * finer
        offset = tl.where(last <= centered_hi, 0.5, 0.0)
        level = _round_even(_clamp(position - offset, first, last)) + offset
        tl.store(out + start + place, (level * step).to(out.dtype.element_ty), mask=exists)


@triton.jit
def _pair(e, cosh):
    """Two boundaries at the same distance from the middle: `e` is exp(-|t|), see fake_quantize.py on the window."""
    u = 2.0 * cosh * e
    u = u / (1.0 + e * e + u)
    inverse = 1.0 / cosh
    return u + u * u * (inverse * inverse - 1.0)


@triton.jit
def _cosh(z):
    return 0.5 * (tl.exp(z) + tl.exp(-z))


@triton.jit
def _slope(v, nearest, first, last, inverse, NARROW: tl.constexpr, COUNT: tl.constexpr):
    """D(v); `inverse` is 1/s."""
    half: tl.constexpr = 1.5 if NARROW and COUNT == 0 else 2.0
    t = (v - _clamp(nearest, first + half, last - half)) * inverse
    e = tl.exp(-tl.abs(t))
    if NARROW and COUNT == 0:
        total = e / ((1.0 + e) * (1.0 + e)) + _pair(e, _cosh(inverse))
    else:
        total = _pair(e, _cosh(0.5 * inverse)) + _pair(e, _cosh(1.5 * inverse))
    if NARROW and COUNT > 0:  # an element of 2 bits has one boundary less than its window
        outside = tl.exp(-tl.abs(t + 1.5 * inverse))
        outside = outside / ((1.0 + outside) * (1.0 + outside))
        total -= tl.where(last - first == 3.0, outside, 0.0)
    return total * inverse


@triton.jit
def _at_width(position, lo, hi, centered_hi, finer: tl.constexpr):
    """Return what the grid with `finer` of its steps in one full step makes of a position, in full steps."""
    last = (hi.to(tl.float32) + 1.0) * finer - 1.0
    offset = tl.where(last <= centered_hi, 0.5, 0.0)
    level = _round_even(_clamp(position * finer - offset, lo.to(tl.float32) * finer, last))
    return (level + offset) / finer


@triton.jit(do_not_specialize=_PLAIN)
def backward(
    x, alpha, keep, seed, noise, g, grad_x, alpha_sums, keep_sums, rows, columns, pieces, lo, hi, centered_hi, scale,
    rarest, BY_COLUMN: tl.constexpr, NARROW: tl.constexpr, COUNT: tl.constexpr, KEEP_GRADIENT: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`alpha_sums` is `[tiles along a step size, step sizes]`, times `scale`; `keep_sums` is `[tiles, COUNT]`."""
    program = tl.program_id(0)
    inverse = 1.0 / tl.load(noise)
    if COUNT > 0:
        a, b, c, d = _random_words(seed, program, R, C)
    for piece in range(pieces):
        tile = program * pieces + piece
        first_row, first_column, place, exists = _places(tile, rows, columns, R, C)
        start = tl.cast(first_row, tl.int64) * columns + first_column
        step = _alphas(alpha, first_row, first_column, rows, columns, BY_COLUMN, R, C)
        values = tl.load(x + start + place, mask=exists, other=0.0).to(tl.float32)
        gradient = tl.load(g + start + place, mask=exists, other=0.0).to(tl.float32)
        position = tl.div_rn(values, step)
        own, of_alpha = position, gradient
        last, first = hi.to(tl.float32), lo.to(tl.float32)
        if COUNT > 0:
            finer = _finer(a, b, c, d, piece, keep, COUNT)
            own, of_alpha = position * finer, gradient / finer
            last, first = (last + 1.0) * finer - 1.0, first * finer
        offset = tl.where(last <= centered_hi, 0.5, 0.0)
        v = _clamp(own - offset, first - 3.0, last + 3.0)
        nearest = _round_even(v)
        density = _slope(v, nearest, first, last, inverse, NARROW, COUNT)
        tl.store(grad_x + start + place, (density * gradient).to(grad_x.dtype.element_ty), mask=exists)
        of_alpha *= (_clamp(nearest, first, last) + offset) - (v + offset) * density
        if BY_COLUMN:
            column = first_column + tl.arange(0, C)
            cell = alpha_sums + first_row // R * columns + column
            inside = column < tl.where(first_row < rows, columns, 0)
            tl.store(cell, tl.sum(of_alpha, axis=0) * scale, mask=inside)
        else:
            row = first_row + tl.arange(0, R)
            cell = alpha_sums + first_column // C * rows + row
            tl.store(cell, tl.sum(of_alpha, axis=1) * scale, mask=row < rows)
        if KEEP_GRADIENT:
            below = _at_width(position, lo, hi, centered_hi, 0.5**COUNT)
            for j in tl.static_range(COUNT):
                here = _at_width(position, lo, hi, centered_hi, 0.5 ** (COUNT - 1 - j))
                p = _clamp(tl.load(keep + j), rarest, 1.0 - rarest)
                weight = tl.where(finer >= 0.5 ** (COUNT - 1 - j), 0.5 / p, 0.5 / (1.0 - p))
                sum = tl.sum(tl.sum(gradient * step * (here - below) * weight, axis=1), axis=0)
                tl.store(keep_sums + tile * COUNT + j, sum)
                below = here
