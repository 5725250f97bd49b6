"""Products with weights that are stored in another form than they multiply in; backward by hand.

Autograd would keep a dequantised weight, or a cast copy, for every layer. Here a function keeps its inputs only, and
dequantises the weight again in the backward pass.
"""

from collections.abc import Callable

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
