"""Rotary position embedding applied to queries and keys: the plain form, and one whose backward pass turns back."""

import torch
from torch import Tensor

from ops.cpp import call_cpp, in_cpp, operator


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The reference. Shapes as in `rotate`."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@operator("rotate(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor")
def _rotate(x, cos, sin, back):
    """x (B, T, heads, d) turned, in its own layout; cos, sin ((1 or B) * T * d/2 numbers)."""
    y, (B, T, heads, d) = torch.empty_like(x), x.shape
    same_in_batch = cos.numel() == T * (d // 2)
    call_cpp("rotate", x, cos.float(), sin.float(), -1.0 if back else 1.0, y, B, T, heads, d, same_in_batch)
    return y


def _turn(x, cos, sin, back):
    if in_cpp(x):
        return _rotate(x.transpose(1, 2).contiguous(), cos, sin, back).transpose(1, 2)
    half, sin = x.size(-1) // 2, -sin if back else sin
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(x[..., :half], cos, out=y[..., :half]).addcmul_(x[..., half:], sin, value=-1)
    torch.mul(x[..., half:], cos, out=y[..., half:]).addcmul_(x[..., :half], sin)
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
    """x (B, heads, T, d) turned by angles whose cosines and sines are (T, d/2) or (B or 1, 1, T, d/2).

    Dimension i pairs with i + d/2: Hugging Face's layout, not Meta's.
    """
    return plain_rotate(x, cos, sin) if torch.compiler.is_compiling() else _Rotate.apply(x, cos, sin)
