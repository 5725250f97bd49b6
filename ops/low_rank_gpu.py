"""Triton's thin products of LoRA, added to what the base gives. low_rank.py has what they compute."""

import triton
import triton.language as tl


@triton.jit
def _add(
    y, small, factor, scale, columns, rank, rows, width, of_column, of_rank, first,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """A tile of y (rows, columns) += scale * small (rows, rank) @ factor.T. `small` is in rows of `width` elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = first * COLUMNS + tl.arange(0, COLUMNS)[None]
    inside, place = (row < rows) & (column < columns), row * columns + column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rank, RANK):
        left, upper = start + tl.arange(0, RANK)[None], start + tl.arange(0, RANK)[:, None]
        a = tl.load(small + row * width + left, mask=(row < rows) & (left < rank), other=0.0)
        known = (upper < rank) & (column < columns)
        b = tl.load(factor + column.to(tl.int64) * of_column + upper * of_rank, mask=known, other=0.0)
        # In fp32 exactly, not as TF32: plain sums of products in bf16 have fp32's range of error as well.
        total = tl.dot(a, b.to(a.dtype), total, input_precision="ieee")
    total = tl.load(y + place, mask=inside, other=0.0).to(tl.float32) + scale * total
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def add_low_rank(
    small, y0, y1, y2, factor0, factor1, factor2, scale0, scale1, scale2, columns0, columns1, columns2,
    rank0, rank1, rank2, rows, of_column0, of_column1, of_column2, of_rank0, of_rank1, of_rank2,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """y += scale * small @ factor.T for up to three projections; `small` (rows, all ranks) has theirs side by side.

    factor: (columns, rank), whose elements are of_column and of_rank apart. A program has a tile of one projection.
    Moves 4.6 bytes an element of y in bf16 at rank 8, 0.6 of them for `small` and the factors, which stay in a cache.
    """
    width, tile = rank0 + rank1 + rank2, tl.program_id(1)
    end0 = tl.cdiv(columns0, COLUMNS)
    end1 = end0 + tl.cdiv(columns1, COLUMNS)
    if tile < end0:
        _add(
            y0, small, factor0, scale0, columns0, rank0, rows, width, of_column0, of_rank0, tile, ROWS, COLUMNS, RANK
        )  # fmt: skip
    if y1 is not None:
        if (tile >= end0) & (tile < end1):
            _add(
                y1, small + rank0, factor1, scale1, columns1, rank1, rows, width, of_column1, of_rank1, tile - end0,
                ROWS, COLUMNS, RANK,
            )  # fmt: skip
    if y2 is not None:
        if tile >= end1:
            _add(
                y2, small + rank0 + rank1, factor2, scale2, columns2, rank2, rows, width, of_column2, of_rank2,
                tile - end1, ROWS, COLUMNS, RANK,
            )  # fmt: skip
