"""Triton's RMSNorm and LayerNorm, forward and backward. norm.py has what they compute.

A program has whole rows: it reads each once. Arithmetic is in fp32; what is None is left out when it is compiled.
"""

import triton
import triton.language as tl


@triton.jit
def _gain(weight, column, inside, plus_one: tl.constexpr):
    if weight is None:
        return tl.full(column.shape, 1.0, tl.float32)
    return tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + plus_one


@triton.jit
def norm(
    x, added, scale, weight, bias, eps, total, y, means, inverses, rows, columns,
    plus_one: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """total = x + scale * added, and y = its norm, with the mean (if `means` is given) and 1 / deviation of each row.

    Moves 6 bytes an element in bf16, or 10 with `added`; 2 of them are the gain's, which stays in a cache.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None]
    inside, place = (row < rows) & (column < columns), row.to(tl.int64) * columns + column
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if added is not None:
        value += scale * tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=inside)
        value = rounded.to(tl.float32)
    if means is not None:
        mean = tl.sum(value, axis=1, keep_dims=True) / columns
        tl.store(means + row, mean, mask=row < rows)
        value = tl.where(inside, value - mean, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(value * value, axis=1, keep_dims=True) / columns + eps)
    tl.store(inverses + row, inverse, mask=row < rows)
    normed = value * inverse * _gain(weight, column, column < columns, plus_one)
    if bias is not None:
        normed += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(y + place, normed.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(
    grad, grad_total, x, weight, means, inverses, grad_x, gains, shifts, rows, columns, rounds,
    plus_one: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_x of x, with grad_total added; in `gains` and `shifts` (programs, columns) sums of what weight and bias get.

    Each program has `rounds` tiles of rows, one after the other. Moves 8 bytes an element in bf16, or 10 with
    `grad_total`; 2 of them are the gain's, which stays in a cache.
    """
    column = tl.arange(0, COLUMNS)[None]
    gain = _gain(weight, column, column < columns, plus_one)
    gain_sum = tl.zeros((1, COLUMNS), tl.float32)
    shift_sum = tl.zeros((1, COLUMNS), tl.float32)
    for round in range(rounds):
        row = (tl.program_id(0) * rounds + round) * ROWS + tl.arange(0, ROWS)[:, None]
        inside, place = (row < rows) & (column < columns), row.to(tl.int64) * columns + column
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        upper = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverses + row, mask=row < rows, other=0.0)
        if means is not None:
            value -= tl.load(means + row, mask=row < rows, other=0.0)
        normed = tl.where(inside, value * inverse, 0.0)
        inner = upper * gain
        lower = inner - normed * (tl.sum(inner * normed, axis=1, keep_dims=True) / columns)
        if means is not None:
            lower -= tl.sum(inner, axis=1, keep_dims=True) / columns
        lower *= inverse
        if grad_total is not None:
            lower += tl.load(grad_total + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + place, lower.to(grad_x.dtype.element_ty), mask=inside)
        if gains is not None:
            gain_sum += tl.sum(upper * normed, axis=0, keep_dims=True)
        if shifts is not None:
            shift_sum += tl.sum(upper, axis=0, keep_dims=True)
    own = tl.program_id(0) * columns + column
    if gains is not None:
        tl.store(gains + own, gain_sum, mask=column < columns)
    if shifts is not None:
        tl.store(shifts + own, shift_sum, mask=column < columns)
