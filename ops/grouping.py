"""Rows of tokens sorted by the expert that they go to, and back; the backward passes only move rows, in a fixed order.

A plain index would add its gradients up row by row, on a GPU in an order that changes from run to run.

Shapes: N tokens, D hidden size, k experts of each token, P places: the rows of an expert lie together, and a few may
follow that belong to no token.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.devices import numbers_on


class Groups(NamedTuple):
    """Where pairs of a token and an expert lie: pair number n * k + i is token n with its i-th expert.

    sizes: how many places each expert has, [] if nobody counted. pairs: the pair in each place, (P,) int64, pair 0
    where there is none. places: the place of each pair, (N * k,) int64.
    """

    sizes: list[int]
    pairs: Tensor
    places: Tensor


def group(experts: Tensor, counts: list[int] | None = None, multiple: int = 1) -> Groups:
    """The pairs sorted by expert, for the experts (N, k) of each token.

    counts: how often each number is there; needed if the number of places of an expert is to be rounded up to a
    `multiple`.
    """
    experts, device = experts.flatten(), experts.device
    order = experts.argsort(stable=True)
    if counts is None:
        return Groups([], order, torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device)))
    sizes = [-(-count // multiple) * multiple for count in counts]
    unused = numbers_on(device, [size - count for size, count in zip(sizes, counts, strict=True)])
    before = unused.cumsum(0) - unused  # unused places before those of each expert
    sorted_places = torch.arange(len(order), device=device) + before[experts[order]]
    pairs = order.new_zeros(sum(sizes)).scatter_(0, sorted_places, order)
    return Groups(sizes, pairs, torch.empty_like(order).scatter_(0, order, sorted_places))


def plain_distribute(x: Tensor, groups: Groups, k: int) -> Tensor:
    """The reference of `distribute`."""
    return x[groups.pairs // k]


def plain_collect(y: Tensor, groups: Groups, weights: Tensor) -> Tensor:
    """The reference of `collect`."""
    return (y[groups.places].view(*weights.shape, -1) * weights[..., None]).sum(1)


class _Distribute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pairs, places, k):
        ctx.save_for_backward(places)
        ctx.k = k
        return x.index_select(0, pairs // k)

    @staticmethod
    def backward(ctx, grad):
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places).unflatten(0, (-1, ctx.k)).sum(1), None, None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, places):
        ctx.save_for_backward(places)
        ctx.rows = len(y)
        return y.index_select(0, places)

    @staticmethod
    def backward(ctx, grad):
        (places,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, grad.size(1)).index_copy_(0, places, grad), None


def distribute(x: Tensor, groups: Groups, k: int) -> Tensor:
    """Each token's row of x (N, D) in the places of its k experts, and any row where there is no pair: (P, D)."""
    return _Distribute.apply(x, groups.pairs, groups.places, k)


def collect(y: Tensor, groups: Groups, weights: Tensor) -> Tensor:
    """The sums (N, D) of each token's k rows of y (P, D) times their weights (N, k)."""
    by_token = _Permute.apply(y, groups.places).view(*weights.shape, -1)
    return torch.bmm(weights[:, None], by_token).squeeze(1)


def plain_grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """The reference of `grouped_linear`."""
    ys = []
    for expert, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        ys.append(F.linear(x[start:end], weight[expert], None if bias is None else bias[expert]))
    return torch.cat(ys)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """A linear layer for each expert, in one product: (P, out) for x (P, in) in bf16, sorted by expert.

    weight: (E, out, in), frozen. bias: (E, out) or None. ends: (E,) int32, where the rows of each expert end. Nothing
    waits for a device.
    """
    y = torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)
    if bias is None:
        return y
    places = torch.arange(len(x), device=x.device, dtype=ends.dtype)
    return y + bias[torch.searchsorted(ends, places, right=True)]
