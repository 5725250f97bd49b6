"""Triton's cross-entropy over a chunk of logits, which become their gradient. loss.py has what it computes."""

import triton
import triton.language as tl

from ops.activation_gpu import tanh


@triton.jit
def _share(logit, softcap, CAPPED: tl.constexpr):
    """What a logit is of the soft cap: tanh(logit / softcap)."""
    return tanh(logit / softcap) if CAPPED else logit


@triton.jit
def loss(
    logits, targets, losses, log_sums, columns, softcap, z_loss,
    BACKWARD: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses = -log softmax(logits)[target], log_sums = log sum exp(logits) of each row, NaN if it has no such logit.

    With BACKWARD the logits of other rows become the gradient of losses + z_loss * log_sums^2. If CAPPED, the softmax
    is of softcap * tanh(logits / softcap). A program has a row. Moves 6 bytes a logit in bf16, or 2 without BACKWARD.
    """
    row, target = tl.program_id(0).to(tl.int64), tl.load(targets + tl.program_id(0))
    start, column = logits + row * columns, tl.arange(0, BLOCK)
    if (target < 0) | (target >= columns):
        tl.store(losses + row, float("nan"))
        tl.store(log_sums + row, float("nan"))
    else:
        factor = softcap if CAPPED else 1.0
        aim = _share(tl.load(start + target).to(tl.float32), softcap, CAPPED)
        # Each lane has its own maximum and sum so far: no round waits for the others. The start is finite, as -inf less
        # -inf would be NaN.
        tops, sums = tl.full((BLOCK,), -3e38, tl.float32), tl.zeros((BLOCK,), tl.float32)
        for first in range(0, columns, BLOCK):
            inside = first + column < columns
            logit = tl.load(start + first + column, mask=inside, other=0.0).to(tl.float32)
            value = tl.where(inside, factor * _share(logit, softcap, CAPPED), -float("inf"))
            higher = tl.maximum(tops, value)
            sums = sums * tl.exp(tops - higher) + tl.exp(value - higher)
            tops = higher
        top = tl.max(tops, axis=0)
        total = tl.sum(sums * tl.exp(tops - top), axis=0)
        log_sum = top + tl.log(total)
        tl.store(losses + row, log_sum - factor * aim)
        tl.store(log_sums + row, log_sum)
        if BACKWARD:
            pull = 1 + 2 * z_loss * log_sum
            for first in range(0, columns, BLOCK):
                inside = first + column < columns
                logit = tl.load(start + first + column, mask=inside, other=0.0).to(tl.float32)
                share = _share(logit, softcap, CAPPED)
                grad = pull * tl.exp(factor * share - log_sum) - tl.where(first + column == target, 1.0, 0.0)
                if CAPPED:
                    grad *= 1 - share * share
                tl.store(start + first + column, grad.to(logits.dtype.element_ty), mask=inside)
