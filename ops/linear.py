"""Products with weights that are stored in another form than they multiply in, and with LoRA; backward by hand.

Autograd would keep a dequantised weight, or a cast copy, for every layer. Here a function keeps its inputs only, and
dequantises the weight again in the backward pass.

Shapes: N positions (rows of a micro-batch end to end), r rank.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ops.cpp import operator
from ops.dropout import drop, new_seeds
from ops.dtypes import as_multiplied
from ops.gpu import in_triton, launch, power_of_two

TOGETHER = 3  # layers whose thin products linear_gpu.py adds in one launch: queries, keys and values


class _StoredLinear(torch.autograd.Function):
    """x @ W.T for a W that is stored in another form than it multiplies in: `restore(dtype)` makes it.

    The backward pass makes it again: kept for all layers, these weights would take what quantising has saved.
    """

    @staticmethod
    def forward(ctx, x, restore):
        ctx.restore = restore
        return F.linear(x, restore(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.restore(grad.dtype), None


def stored_linear(x: Tensor, restore: Callable[[torch.dtype], Tensor]) -> Tensor:
    """x (..., in) times the frozen weight (out, in) that `restore(dtype)` makes: (..., out)."""
    return _StoredLinear.apply(as_multiplied(x), restore)


class _CastLinear(torch.autograd.Function):
    """x @ W.T for a trainable W of another dtype than x."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear in x's dtype, whatever the weight is stored in, without keeping a cast copy of it."""
    x = as_multiplied(x)
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    y = _CastLinear.apply(x, weight) if weight.requires_grad else stored_linear(x, weight.to)
    return y if bias is None else y + bias.to(y.dtype)


@operator("add_low_rank_(Tensor(a!)[] ys, Tensor small, Tensor[] factors, float[] scales) -> ()")
def _add_low_rank_(ys, small, factors, scales):
    """Each y (N, out) += scale * its part (N, r) of small @ factor.T, for factors (out, r) of any layout, fp32."""
    ranks = [factor.size(1) for factor in factors]
    if in_triton(small):
        for first in range(0, len(ys), TOGETHER):
            some = slice(first, first + TOGETHER)
            part = small if len(ys) <= TOGETHER else small.split(ranks, dim=1)[some]
            part = part if isinstance(part, Tensor) else torch.cat(part, dim=1)
            _launch_add(ys[some], part, factors[some], scales[some])
    else:
        for y, part, factor, scale in zip(ys, small.split(ranks, dim=1), factors, scales, strict=True):
            y.addmm_(part, factor.to(y.dtype).T, alpha=scale)


def _launch_add(ys, small, factors, scales):
    columns, ranks = [y.size(1) for y in ys], [factor.size(1) for factor in factors]
    how = {"ROWS": 64, "COLUMNS": 128, "RANK": min(64, max(16, power_of_two(max(ranks))))}
    grid = -(-len(small) // how["ROWS"]), sum(-(-each // how["COLUMNS"]) for each in columns)
    distances = zip(*(factor.stride() for factor in factors), strict=True)
    ys, factors = ([*each, *[None] * (TOGETHER - len(each))] for each in (ys, factors))
    numbers = [[*each, *[0] * (TOGETHER - len(each))] for each in (scales, columns, ranks, *distances)]
    scales, columns, ranks, of_column, of_rank = numbers
    given = (*ys, *factors, *map(float, scales), *columns, *ranks, len(small), *of_column, *of_rank)
    launch("add_low_rank", grid, small, *given, **how)


@register_flop_formula(torch.ops.onetune.add_low_rank_)
def _add_low_rank_flops(ys, small, factors, scales, *_, out_shape=None):
    return sum(2 * y[0] * factor[0] * factor[1] for y, factor in zip(ys, factors, strict=True))


class _LowRankLinears(torch.autograd.Function):
    """x @ W.T + scale * (drop(x) @ A.T) @ B.T for several layers of one input, the small products added in place.

    Without dropout all A are multiplied as one matrix, forward and backward: so thin a product costs as much as reading
    x. With it each layer drops others of x's elements, again in the backward pass. What x @ A.T gives is 0 where
    `mask` says so, if there is one, and so is its gradient.
    """

    @staticmethod
    def forward(ctx, x, restores, scales, drops, mask, *factors):
        a, b = factors[0::2], factors[1::2]
        a = (a[0] if len(a) == 1 else torch.cat(a)).to(x.dtype)
        flat, ranks = x.flatten(0, -2).contiguous(), [factor.size(1) for factor in b]
        if drops:
            small = torch.cat([drop(flat) @ part.T for drop, part in zip(drops, a.split(ranks), strict=True)], dim=1)
        else:
            small = flat @ a.T  # (N, sum of r)
        small = small if mask is None else small.masked_fill_(mask, 0)
        ys = [F.linear(flat, restore(x.dtype)) for restore in restores]
        _add_low_rank_(ys, small, b, scales)
        ctx.save_for_backward(flat, small, a, *b)
        ctx.known, ctx.ranks, ctx.shape = (restores, scales, drops, mask), ranks, x.shape
        return tuple(y.view(*x.shape[:-1], y.size(-1)) for y in ys)

    @staticmethod
    def backward(ctx, *grads):
        (flat, small, a, *b), (restores, scales, drops, mask) = ctx.saved_tensors, ctx.known
        grads = [grad.reshape(-1, grad.size(-1)) for grad in grads]
        grad_small = torch.empty_like(small)
        for grad, part, factor, scale in zip(grads, grad_small.split(ctx.ranks, dim=1), b, scales, strict=True):
            _scaled_product(grad, factor.to(grad.dtype), scale, part)
        grad_small = grad_small if mask is None else grad_small.masked_fill_(mask, 0)
        parts = zip(grads, small.split(ctx.ranks, dim=1), b, scales, strict=True)
        grad_b = [_scaled_gradient(grad.T, part, factor.dtype, scale) for grad, part, factor, scale in parts]
        own = grad_small.split(ctx.ranks, dim=1)
        if drops:
            grad_a = [_scaled_gradient(part.T, drop(flat), b[0].dtype) for part, drop in zip(own, drops, strict=True)]
        else:
            grad_a = _scaled_gradient(grad_small.T, flat, b[0].dtype).split(ctx.ranks)
        grad_x = None
        if ctx.needs_input_grad[0]:
            weights = (restore(grad.dtype) for restore, grad in zip(restores, grads, strict=True))
            grad_x = _sum_of_products(grads, weights)
            if drops:
                for part, factor, drop in zip(own, a.split(ctx.ranks), drops, strict=True):
                    grad_x += drop(part @ factor)  # dropping is its own transpose
            else:
                _add_low_rank_([grad_x], grad_small, [a.T], [1.0])
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, None, None, *(each for pair in zip(grad_a, grad_b, strict=True) for each in pair)


def _scaled_product(a, b, scale, out=None):
    """scale * a @ b, into `out` if there is one: on a GPU such small products take as long as they take to launch."""
    out = a.new_empty(a.size(0), b.size(1)) if out is None else out
    return torch.addmm(out, a, b, beta=0, alpha=scale, out=out)


def _scaled_gradient(a, b, dtype, scale=1.0):
    """scale * a @ b in the dtype of a weight; on a GPU by one kernel, which does not round to a's dtype before."""
    if a.dtype == dtype or a.device.type == "cpu":
        return _scaled_product(a, b, scale).to(dtype)
    out = a.new_empty((a.size(0), b.size(1)), dtype=dtype)
    return torch.addmm(out, a, b, out_dtype=dtype, beta=0, alpha=scale)


def _sum_of_products(xs, weights):
    """The sum of x @ weight; no more than one weight is there at a time."""
    total = None
    for x, weight in zip(xs, weights, strict=True):
        total = x @ weight if total is None else total.addmm_(x, weight)
    return total


def low_rank_linears(
    x: Tensor,
    restores: Sequence[Callable[[torch.dtype], Tensor]],
    scales: Sequence[float],
    factors: Sequence[tuple[Tensor, Tensor]],
    dropouts: Sequence[float] = (),
    mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Frozen linear layers of one input, each with its LoRA: (..., out) for each.

    x (..., in). restores: for each layer a function that gives its weight (out, in) in a dtype. factors: for each layer
    A (r, in) and B (out, r), both trainable and fp32. dropouts: for each layer the share of A's input that is dropped.
    mask: bool (N, sum of r), where x @ A.T is to be 0: where factors of several adapters lie side by side, the columns
    of each at positions that are not its own.
    """
    x = as_multiplied(x)
    drops = [partial(drop, p=p, seeds=new_seeds()) for p in dropouts] if any(dropouts) else None
    return _LowRankLinears.apply(x, restores, scales, drops, mask, *(matrix for pair in factors for matrix in pair))
