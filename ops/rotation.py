"""Rotary position embedding applied to queries and keys: the plain form, and one whose backward pass turns back."""

import torch
from torch import Tensor

from ops.cpp import call_cpp, in_cpp, operator


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The reference. Shapes as in `rotate`."""
    half = cos.size(-1)
    first, second, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def pairs_apart(x: Tensor, dims: int) -> Tensor:
    """Of x (..., d) the first `dims` dimensions in another order: pairs (2i, 2i + 1) become (i, i + dims/2).

    That turns a family's interleaved layout into the one of `rotate`. Both queries and keys in it have the same scores.
    """
    turned, rest = x[..., :dims], x[..., dims:]
    return torch.cat((turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), rest), dim=-1)


@operator("rotate(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor")
def _rotate(x, cos, sin, back):
    """x (B, T, heads, d) turned, in its own layout; cos, sin (T, r/2) or (B or 1, 1, T, r/2)."""
    y, half = torch.empty_like(x), cos.size(-1)
    same_in_batch = cos.numel() == x.size(1) * half
    call_cpp("rotate", x, cos.float(), sin.float(), -1.0 if back else 1.0, y, *x.shape, half, same_in_batch)
    return y


def _turn(x, cos, sin, back):
    if in_cpp(x):
        return _rotate(x.transpose(1, 2).contiguous(), cos, sin, back).transpose(1, 2)
    half, sin = cos.size(-1), -sin if back else sin
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    (first, second, rest), (to_first, to_second, to_rest) = (t.tensor_split((half, 2 * half), dim=-1) for t in (x, y))
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin)
    to_rest.copy_(rest)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, back=False)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, back=True), None, None  # the gradient of a rotation is the rotation back


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, heads, T, d) turned by angles whose cosines and sines are (T, r/2) or (B or 1, 1, T, r/2), r at most d.

    Of the first r dimensions i pairs with i + r/2: Hugging Face's layout, not Meta's. The others stay as they are.
    """
    if torch.compiler.is_compiling():
        return plain_rotate(x, cos, sin)
    return _Rotate.apply(x, cos, sin)
