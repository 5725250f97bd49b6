"""Rotary position embedding applied to queries and keys: the plain form, and one whose backward pass turns back."""

import torch
from torch import Tensor

from ops.cpp import call_cpp, in_cpp, operator
from ops.gpu import FEWEST_ELEMENTS, in_triton, launch, power_of_two


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The reference, of queries or of keys x (B, heads, T, d). Shapes as in `rotate`."""
    half = cos.size(-1)
    first, second, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def pairs_apart(x: Tensor, dims: int) -> Tensor:
    """Of x (..., d) the first `dims` dimensions in another order: pairs (2i, 2i + 1) become (i, i + dims/2).

    That turns a family's interleaved layout into the one of `rotate`. Both queries and keys in it have the same scores.
    """
    turned, rest = x[..., :dims], x[..., dims:]
    return torch.cat((turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), rest), dim=-1)


@operator("rotate(Tensor q, Tensor k, Tensor cos, Tensor sin, bool back) -> (Tensor, Tensor)")
def _rotate(q, k, cos, sin, back):
    """q (B, T, H, d) and k (B, T, K, d) turned, in their own layout; cos, sin (T, r/2) or (B or 1, 1, T, r/2)."""
    half, sign, (B, T, _, d) = cos.size(-1), -1.0 if back else 1.0, q.shape
    turned = torch.empty_like(q), torch.empty_like(k)
    if in_triton(q):
        pairs, rest = power_of_two(half), d - 2 * half
        heads = min(max(1, FEWEST_ELEMENTS // (2 * pairs)), power_of_two(q.size(2)))
        grid = B * T, sum(-(-x.size(2) // heads) for x in (q, k))
        given = (q, k, cos, sin, sign, *turned, q.size(2), k.size(2), d, half, cos.numel() // half)
        launch("rotate", grid, *given, HEADS=heads, HALF=pairs, REST=rest and power_of_two(rest))
    else:
        cos, sin = cos.float(), sin.float()
        for x, y in zip((q, k), turned, strict=True):
            call_cpp("rotate", x, cos, sin, sign, y, *x.shape, half, cos.numel() == T * half)
    return turned


def _turn(q, k, cos, sin, back):
    if in_triton(q) or in_cpp(q):
        q, k = (x.transpose(1, 2).contiguous() for x in (q, k))
        return tuple(x.transpose(1, 2) for x in _rotate(q, k, cos.contiguous(), sin.contiguous(), back))
    return tuple(_turn_in_torch(x, cos, sin, back) for x in (q, k))


def _turn_in_torch(x, cos, sin, back):
    half, sin = cos.size(-1), -sin if back else sin
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    (first, second, rest), (to_first, to_second, to_rest) = (t.tensor_split((half, 2 * half), dim=-1) for t in (x, y))
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin)
    to_rest.copy_(rest)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(q, k, cos, sin, back=False)

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        return *_turn(*grads, cos, sin, back=True), None, None  # the gradient of a rotation is the rotation back


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, H, T, d) and k (B, K, T, d) turned by angles whose cosines and sines are (T, r/2) or (B or 1, 1, T, r/2).

    Of the first r dimensions, r at most d, i pairs with i + r/2: Hugging Face's layout, not Meta's. The others stay as
    they are.
    """
    if torch.compiler.is_compiling():
        return plain_rotate(q, cos, sin), plain_rotate(k, cos, sin)
    return _Rotate.apply(q, k, cos, sin)
