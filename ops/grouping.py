"""Rows of tokens sorted by the expert that they go to, and back; the backward passes only move rows, in a fixed order.

A plain index would add its gradients up row by row, on a GPU in an order that changes from run to run.

Shapes: N tokens, D hidden size, k experts of each token. Pair number n * k + i is token n with its i-th expert.
"""

import torch
from torch import Tensor


def plain_distribute(x: Tensor, order: Tensor, k: int) -> Tensor:
    """The reference of `distribute`."""
    return x[order // k]


def plain_collect(y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """The reference of `collect`."""
    N, k = weights.shape
    sums = y.new_zeros(N, y.size(1))
    return sums.index_add(0, order // k, y * weights.flatten()[order, None])


def _inverse(order):
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


class _Distribute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, k):
        ctx.save_for_backward(order)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx, grad):
        (order,) = ctx.saved_tensors
        return grad.index_select(0, _inverse(order)).unflatten(0, (-1, ctx.k)).sum(1), None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, order):
        ctx.save_for_backward(order)
        return y.index_select(0, _inverse(order))

    @staticmethod
    def backward(ctx, grad):
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order), None


def distribute(x: Tensor, order: Tensor, k: int) -> Tensor:
    """Each token's row of x (N, D) once for each of its k experts, pairs in this order (N * k,): (N * k, D)."""
    return _Distribute.apply(x, order, k)


def collect(y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """The sums (N, D) of each token's k rows times their weights (N, k), for rows y (N * k, D) in this order."""
    by_token = _Permute.apply(y, order).view(*weights.shape, -1)
    return torch.bmm(weights[:, None], by_token).squeeze(1)
