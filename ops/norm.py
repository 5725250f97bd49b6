"""RMSNorm and LayerNorm: the plain forms, and on a CPU kernels_cpu.cpp's, forward and backward.

What is normed is multiplied by a gain: `weight`, `weight` + 1 where that is how a family stores it, or nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.cpp import call_cpp, in_cpp, operator


def plain_rms_norm(x: Tensor, weight: Tensor | None, eps: float, plus_one: bool = False) -> Tensor:
    """The reference: x (..., D) and weight (D,), in x's dtype."""
    if plus_one:  # in bf16, 1 + w would lose most of w
        return F.rms_norm(x.float(), (x.size(-1),), weight.float() + 1, eps).to(x.dtype)
    return F.rms_norm(x, (x.size(-1),), None if weight is None else weight.to(x.dtype), eps)


def plain_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, plus_one: bool = False
) -> Tensor:
    """The reference: x (..., D), weight and bias (D,), in x's dtype."""
    if plus_one:
        bias = None if bias is None else bias.float()
        return F.layer_norm(x.float(), (x.size(-1),), weight.float() + 1, bias, eps).to(x.dtype)
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    return F.layer_norm(x, (x.size(-1),), weight, bias, eps)


@operator("norm(Tensor x, Tensor gain, Tensor shift, float eps, bool centred) -> (Tensor, Tensor, Tensor)")
def _norm(x, gain, shift, eps, centred):
    """The norm, the mean (...,) fp32 if `centred` (LayerNorm), and 1 / rms or 1 / standard deviation (...,) fp32."""
    means, inverses = (x.new_empty(x.shape[:-1] if kept else 0, dtype=torch.float32) for kept in (centred, True))
    y = torch.empty_like(x)
    call_cpp("norm", x, gain, shift, eps, y, means, inverses, inverses.numel(), x.size(-1), centred)
    return y, means, inverses


@operator(
    "norm_backward(Tensor grad, Tensor x, Tensor gain, Tensor means, Tensor inverses, bool centred, bool[] trains"
    ") -> (Tensor, Tensor, Tensor)"
)
def _norm_backward(grad, x, gain, means, inverses, centred, trains):
    """The gradients of x, and of gain and shift in fp32 if they train."""
    parts = [torch.get_num_threads() * each for each in trains]  # an empty tensor's address is null: nothing is summed
    gains, shifts = (x.new_zeros((count, x.size(-1)), dtype=torch.float32) for count in parts)
    grad_x, rows = torch.empty_like(x), inverses.numel()
    call_cpp("norm_backward", grad, x, gain, means, inverses, grad_x, gains, shifts, rows, x.size(-1), centred)
    return grad_x, gains.sum(0), shifts.sum(0)


def _gain(x, weight, plus_one):
    """What normed x is multiplied by, (D,) fp32."""
    if weight is None:
        return x.new_ones(x.size(-1), dtype=torch.float32)
    return weight.float() + 1 if plus_one else weight.float()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, plus_one, centred):
        x, gain = x.contiguous(), _gain(x, weight, plus_one)
        shift = gain.new_zeros(gain.shape if centred else 0) if bias is None else bias.float()
        y, means, inverses = _norm(x, gain, shift, eps, centred)
        ctx.save_for_backward(x, weight, bias, means, inverses)
        ctx.known = plus_one, centred
        return y

    @staticmethod
    def backward(ctx, grad):
        (x, *parameters, means, inverses), (plus_one, centred) = ctx.saved_tensors, ctx.known
        gain, trains = _gain(x, parameters[0], plus_one), ctx.needs_input_grad[1:3]
        grad_x, *grads = _norm_backward(grad.contiguous(), x, gain, means, inverses, centred, trains)
        each = zip(grads, parameters, trains, strict=True)
        return grad_x, *(g.to(parameter.dtype) if needed else None for g, parameter, needed in each), None, None, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, plus_one: bool = False) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467), in x's dtype.

    torch has a fused kernel for CUDA only; on a CPU its backward pass costs seven times LayerNorm's.
    """
    if in_cpp(x):
        return _Norm.apply(x, weight, None, eps, plus_one, False)
    return plain_rms_norm(x, weight, eps, plus_one)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, plus_one: bool = False) -> Tensor:
    """(x - mean) / standard deviation * weight + bias over the last dimension (Ba et al. 2016, arXiv 1607.06450)."""
    if in_cpp(x):
        return _Norm.apply(x, weight, bias, eps, plus_one, True)
    return plain_layer_norm(x, weight, bias, eps, plus_one)
