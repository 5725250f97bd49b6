"""Products with weights that are stored in another form than they multiply in, and with LoRA; backward by hand.

Autograd would keep a dequantised weight, or a cast copy, for every layer. Here a function keeps its inputs only, and
dequantises the weight again in the backward pass.

Shapes: N positions (rows of a micro-batch end to end), r rank.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.dtypes import as_multiplied


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


class _LowRankLinears(torch.autograd.Function):
    """x @ W.T + scale * (x @ A.T) @ B.T for several layers of one input, the small products added in place.

    All A are multiplied as one matrix, forward and backward: so thin a product costs as much as reading x.
    """

    @staticmethod
    def forward(ctx, x, restores, scales, *factors):
        a, b = torch.cat(factors[0::2]).to(x.dtype), factors[1::2]
        flat, ranks = x.flatten(0, -2), [factor.size(1) for factor in b]
        small = flat @ a.T  # (N, sum of r)
        ys = [F.linear(flat, restore(x.dtype)) for restore in restores]
        for y, part, factor, scale in zip(ys, small.split(ranks, dim=1), b, scales, strict=True):
            y.addmm_(part, factor.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(flat, small, a, *b)
        ctx.restores, ctx.scales, ctx.ranks, ctx.shape = restores, scales, ranks, x.shape
        return tuple(y.view(*x.shape[:-1], y.size(-1)) for y in ys)

    @staticmethod
    def backward(ctx, *grads):
        flat, small, a, *b = ctx.saved_tensors
        grads = [grad.reshape(-1, grad.size(-1)) for grad in grads]
        grad_small = torch.empty_like(small)
        for grad, part, factor, scale in zip(grads, grad_small.split(ctx.ranks, dim=1), b, ctx.scales, strict=True):
            part.copy_(grad @ factor.to(grad.dtype)).mul_(scale)
        parts = zip(grads, small.split(ctx.ranks, dim=1), b, ctx.scales, strict=True)
        grad_b = [(grad.T @ part).to(factor.dtype).mul_(scale) for grad, part, factor, scale in parts]
        grad_a = (grad_small.T @ flat).to(b[0].dtype).split(ctx.ranks)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_small @ a
            for grad, restore in zip(grads, ctx.restores, strict=True):
                grad_x.addmm_(grad, restore(grad.dtype))
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, *(gradient for pair in zip(grad_a, grad_b, strict=True) for gradient in pair)


def low_rank_linears(
    x: Tensor,
    restores: Sequence[Callable[[torch.dtype], Tensor]],
    scales: Sequence[float],
    factors: Sequence[tuple[Tensor, Tensor]],
) -> tuple[Tensor, ...]:
    """Frozen linear layers of one input, each with its LoRA: (..., out) for each.

    x (..., in). restores: for each layer a function that gives its weight (out, in) in a dtype. factors: for each layer
    A (r, in) and B (out, r), both trainable and fp32.
    """
    return _LowRankLinears.apply(as_multiplied(x), restores, scales, *(matrix for pair in factors for matrix in pair))
