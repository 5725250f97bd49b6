"""Triton's activations of MLPs, gated or not, forward and backward. activation.py has what they compute."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh(x); near 0, where exp(-2|x|) loses digits, by Lambert's continued fraction."""
    size, z = tl.abs(x), x * x
    e = tl.exp(-2 * size)
    near = x * (945 + z * (105 + z)) / (945 + z * (420 + z * 15))
    return tl.where(size < 0.6, near, tl.where(x < 0, e - 1, 1 - e) / (1 + e))


@triton.jit
def _activation(x, NAME: tl.constexpr):
    if NAME == "silu":
        return x * tl.sigmoid(x)
    elif NAME == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == "relu":
        return tl.where(x <= 0, 0.0, x)
    else:
        tl.static_assert(NAME == "relu2")
        return tl.where(x <= 0, 0.0, x * x)


@triton.jit
def _slope(x, NAME: tl.constexpr):
    """The derivative of the activation."""
    if NAME == "silu":
        share = tl.sigmoid(x)
        return share * (1 + x * (1 - share))
    elif NAME == "gelu":
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":
        t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 0.134145 * x * x)
    elif NAME == "relu":
        return tl.where(x <= 0, 0.0, 1.0)
    else:
        tl.static_assert(NAME == "relu2")
        return tl.where(x <= 0, 0.0, 2 * x)


@triton.jit
def activate(x, up, y, elements, NAME: tl.constexpr, BLOCK: tl.constexpr):
    """y = activation(x), times `up` if that is given. Moves 4 bytes an element in bf16, or 6 with `up`."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    value = _activation(tl.load(x + place, mask=inside, other=0.0).to(tl.float32), NAME)
    if up is not None:
        value *= tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def activate_backward(grad, x, up, grad_x, grad_up, elements, NAME: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients of x and, if it is given, of `up`; they may have the memory of x and up, or of grad.

    Moves 6 bytes an element in bf16, or 10 with `up`.
    """
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    upper = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    lower = upper * _slope(value, NAME)
    if up is not None:
        lower *= tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_up + place, (upper * _activation(value, NAME)).to(grad_up.dtype.element_ty), mask=inside)
    tl.store(grad_x + place, lower.to(grad_x.dtype.element_ty), mask=inside)
