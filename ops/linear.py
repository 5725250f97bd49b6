"""Products with weights that are stored in another form than they multiply in, and with LoRA; backward by hand.

Autograd would keep a dequantised weight, or a cast copy, for every layer. Here a function keeps its inputs only, and
dequantises the weight again in the backward pass.

Shapes: N positions (rows of a micro-batch end to end), r rank.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

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


class Part(NamedTuple):
    """Positions whose rows of x go through the same factors: several adapters over one base have a part each.

    rows: which positions. layers: the numbers of the layers that have factors for them. scales: of each of these.
    drops: of each, what drops elements of its input, None if none does.
    """

    rows: slice
    layers: Sequence[int]
    scales: Sequence[float]
    drops: Sequence[Callable[[Tensor], Tensor]] | None = None


class _LowRankLinears(torch.autograd.Function):
    """x @ W.T for several layers of one input, all positions together; then to each `Part` of the positions is added

    scale * (drop(x) @ A.T) @ B.T, in place. Without dropout all A of a part are multiplied as one matrix, forward and
    backward: so thin a product costs as much as reading x. With it each layer drops others of x's elements, again in
    the backward pass.
    """

    @staticmethod
    def forward(ctx, x, restores, rows, layers, scales, drops, *factors):
        parts = [Part(*each) for each in zip(rows, layers, scales, drops, strict=True)]
        flat, saved = x.flatten(0, -2).contiguous(), []
        ys = [F.linear(flat, restore(x.dtype)) for restore in restores]
        for part, pairs in _by_part(parts, factors):
            b, own_x = [pair[1] for pair in pairs], flat[part.rows]
            a = (pairs[0][0] if len(pairs) == 1 else torch.cat([pair[0] for pair in pairs])).to(x.dtype)
            if part.drops:
                each = zip(part.drops, a.split(_ranks(b)), strict=True)
                small = torch.cat([drop(own_x) @ own.T for drop, own in each], dim=1)
            else:
                small = own_x @ a.T  # (N, sum of r)
            _add_low_rank_([ys[layer][part.rows] for layer in part.layers], small, b, part.scales)
            saved += [small, a, *b]
        ctx.save_for_backward(flat, *saved)
        ctx.known, ctx.shape = (restores, parts), x.shape
        return tuple(y.view(*x.shape[:-1], y.size(-1)) for y in ys)

    @staticmethod
    def backward(ctx, *grads):
        (flat, *saved), (restores, parts) = ctx.saved_tensors, ctx.known
        grads = [grad.reshape(-1, grad.size(-1)) for grad in grads]
        grad_x, of_factors = None, []
        if ctx.needs_input_grad[0]:
            weights = (restore(grad.dtype) for restore, grad in zip(restores, grads, strict=True))
            grad_x = _sum_of_products(grads, weights)
        for part in parts:
            (small, a, *b), saved = saved[: 2 + len(part.layers)], saved[2 + len(part.layers) :]
            own = None if grad_x is None else grad_x[part.rows]
            of_layers = [grads[layer][part.rows] for layer in part.layers]
            of_factors += _part_backward(part, of_layers, flat[part.rows], small, a, b, own)
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, None, None, None, *of_factors


def _by_part(parts, factors):
    """Each part with its pairs (A, B), of all factors in the order of parts and their layers."""
    pairs = list(zip(factors[0::2], factors[1::2], strict=True))
    for part in parts:
        own, pairs = pairs[: len(part.layers)], pairs[len(part.layers) :]
        yield part, own


def _ranks(b):
    return [factor.size(1) for factor in b]


def _part_backward(part, grads, x, small, a, b, grad_x):
    """The gradients of A and B of each layer of a part in turn; what they add to that of x is added to `grad_x`."""
    grad_small, ranks = torch.empty_like(small), _ranks(b)
    own = grad_small.split(ranks, dim=1)
    for grad, each, factor, scale in zip(grads, own, b, part.scales, strict=True):
        _scaled_product(grad, factor.to(grad.dtype), scale, each)
    layers = zip(grads, small.split(ranks, dim=1), b, part.scales, strict=True)
    grad_b = [_scaled_gradient(grad.T, each, factor.dtype, scale) for grad, each, factor, scale in layers]
    if part.drops:
        grad_a = [_scaled_gradient(each.T, drop(x), b[0].dtype) for each, drop in zip(own, part.drops, strict=True)]
    else:
        grad_a = _scaled_gradient(grad_small.T, x, b[0].dtype).split(ranks)
    if grad_x is not None and part.drops:
        for each, factor, drop in zip(own, a.split(ranks), part.drops, strict=True):
            grad_x += drop(each @ factor)  # dropping is its own transpose
    elif grad_x is not None:
        _add_low_rank_([grad_x], grad_small, [a.T], [1.0])
    return [each for pair in zip(grad_a, grad_b, strict=True) for each in pair]


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
    parts: Sequence[Part],
    factors: Sequence[tuple[Tensor, Tensor]],
) -> tuple[Tensor, ...]:
    """Frozen linear layers of one input, each with its LoRA, of which parts of the positions have one each.

    x (..., in), or (N, in) in effect. restores: for each layer a function that gives its weight (out, in) in a dtype.
    factors: for each part, and in it for each of its layers, A (r, in) and B (out, r), both trainable and fp32. Returns
    (..., out) for each layer; positions that are in no part have the frozen layers' own.
    """
    known = ([getattr(part, name) for part in parts] for name in Part._fields)  # torch.compile takes lists alone
    return _LowRankLinears.apply(as_multiplied(x), restores, *known, *(matrix for pair in factors for matrix in pair))


def drops(dropouts: Sequence[float]) -> list[Callable[[Tensor], Tensor]] | None:
    """What drops such a share of each layer's input, the same elements forward and backward; None if none does."""
    return [partial(drop, p=p, seeds=new_seeds()) for p in dropouts] if any(dropouts) else None
