"""Triton's dequantisation, and products with a weight in 4 bits. dequantize.py has what they compute.

Codes of 4 bits are read as numbers of 32, eight at a time; of each byte the high half comes first. The 16 values are
looked up in shared memory: picked by the bits of the code, each would take 15 selections.
"""

import triton
import triton.language as tl


@triton.jit
def _scale(absmax, nested_values, nested, offset, block, inside):
    """The scales of blocks: as they are, or codes of 8 bits."""
    if nested is None:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    else:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        shared = tl.load(nested + block // 256, mask=inside, other=0.0)
        scale = tl.load(nested_values + code) * shared + tl.load(offset)
    return scale


@triton.jit
def _look_up(values, code):
    """values[code], of a table of 16 and a tile of places in it."""
    size: tl.constexpr = code.numel
    return tl.gather(tl.load(values + tl.arange(0, 16)), code.reshape(size), 0).reshape(code.shape)


@triton.jit
def _unpack(word):
    """The eight codes of each word of a tile (R, W): (R, W, 8)."""
    place = tl.arange(0, 8)
    return (word[:, :, None] >> (place // 2 * 8 + (1 - place % 2) * 4)[None, None]) & 15


@triton.jit
def dequantize_4bit(codes, absmax, nested_values, nested, offset, values, weight, weights, BLOCKS: tl.constexpr):
    """weight = values[codes] times the scale of each block. Exactly what bitsandbytes' dequantisation gives.

    Moves 2.56 bytes a weight to bf16, or 2.52 with scales in 8 bits; the tables stay in the cache.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block * 64 < weights
    word = block[:, None] * 8 + tl.arange(0, 8)[None]
    value = _look_up(values, _unpack(tl.load(codes + word, mask=inside[:, None], other=0)))
    value *= _scale(absmax, nested_values, nested, offset, block, inside)[:, None, None]
    place = word[:, :, None] * 8 + tl.arange(0, 8)[None, None]
    tl.store(weight + place, value.to(weight.dtype.element_ty), mask=place < weights)


@triton.jit
def dequantize_rows(codes, scales, weight, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """weight = codes * scales / 127, of int8 with a scale for each row. Moves 3 bytes a weight to bf16."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None]
    inside, place = (row < rows) & (column < columns), row.to(tl.int64) * columns + column
    scale = tl.load(scales + row, mask=row < rows, other=0.0)
    # In this order, and by the reciprocal, as bitsandbytes does.
    value = tl.load(codes + place, mask=inside, other=0).to(tl.float32) * scale * 0.007874015748031496
    tl.store(weight + place, value.to(weight.dtype.element_ty), mask=inside)


@triton.jit
def multiply_4bit_sums(
    x, codes, absmax, nested_values, nested, offset, values, y, rows, n, k, part,
    ROWS: tl.constexpr, NS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """y (parts, rows, n) = x (rows, k) times the transposed 4-bit weight (n, k), each part from `part` blocks of a row.

    For a few rows: multiplied and added one by one. Moves 1.08 bytes a weight for one row, or 1.16 with
    scales in 8 bits: 0.56 or 0.52 of codes and scales; the rest is x and the tables, from a cache.
    """
    out, blocks, m = tl.program_id(0) * NS + tl.arange(0, NS), k // 64, tl.arange(0, ROWS)
    inside, start = (out < n)[:, None], out[:, None].to(tl.int64) * blocks
    total = tl.zeros((ROWS, NS, BLOCKS * 8), tl.float32)
    first = tl.program_id(1) * part
    for step in tl.range(first, tl.minimum(first + part, blocks), BLOCKS, num_stages=3):
        block, word = step + tl.arange(0, BLOCKS)[None], step * 8 + tl.arange(0, BLOCKS * 8)
        scale = _scale(absmax, nested_values, nested, offset, start + block, inside & (block < blocks))
        scale = tl.broadcast_to(scale[:, :, None], (NS, BLOCKS, 8)).reshape(1, NS, BLOCKS * 8)
        there = (word < blocks * 8)[None]
        value = _look_up(values, _unpack(tl.load(codes + start * 8 + word[None], mask=inside & there, other=0)))
        column = word[None, None, :, None] * 8 + tl.arange(0, 8)[None, None, None]
        known = (m < rows)[:, None, None, None] & (column < k)
        factor = tl.load(x + m[:, None, None, None] * k + column, mask=known, other=0.0).to(tl.float32)
        total += tl.sum(value[None] * factor, axis=3) * scale
    place = (tl.program_id(1) * rows + m[:, None]) * n + out[None]
    tl.store(y + place, tl.sum(total, axis=2).to(y.dtype.element_ty), mask=(m < rows)[:, None] & (out < n)[None])


@triton.jit
def multiply_4bit_dots(
    x, codes, absmax, nested_values, nested, offset, values, y, rows, n, k, part,
    ROWS: tl.constexpr, NS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """As `multiply_4bit_sums`, for more rows: on tensor cores, with the weight rounded to x's dtype.

    Moves 1.57 bytes a weight for 16 rows: 0.56 of codes and scales; the rest is x and the tables, from a cache.
    """
    out, blocks, m = tl.program_id(0) * NS + tl.arange(0, NS), k // 64, tl.arange(0, ROWS)[None]
    inside, start = (out < n)[:, None], out[:, None].to(tl.int64) * blocks
    total = tl.zeros((NS, ROWS), tl.float32)
    first = tl.program_id(1) * part
    for step in tl.range(first, tl.minimum(first + part, blocks), BLOCKS, num_stages=3):
        block, byte = step + tl.arange(0, BLOCKS)[None], step * 32 + tl.arange(0, BLOCKS * 32)
        scale = _scale(absmax, nested_values, nested, offset, start + block, inside & (block < blocks))
        scale = tl.broadcast_to(scale[:, :, None], (NS, BLOCKS, 32)).reshape(NS, BLOCKS * 32)
        there = byte < blocks * 32
        pair = tl.load(codes + start * 32 + byte[None], mask=inside & there[None], other=0).to(tl.int32)
        # The first of two codes, in the high half, multiplies an even column, the second an odd one.
        column, known = x + m * k + 2 * byte[:, None], there[:, None] & (m < rows)
        even, odd = tl.load(column, mask=known, other=0.0), tl.load(column + 1, mask=known, other=0.0)
        high, low = _look_up(values, pair >> 4) * scale, _look_up(values, pair & 15) * scale
        total = tl.dot(high.to(x.dtype.element_ty), even, total, input_precision="ieee")
        total = tl.dot(low.to(x.dtype.element_ty), odd, total, input_precision="ieee")
    place = (tl.program_id(1) * rows + m) * n + out[:, None]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside & (m < rows))
