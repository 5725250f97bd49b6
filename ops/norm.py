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
        return F.layer_norm(x.float(), (x.size(-1),), weight.float() + 1, bias.float(), eps).to(x.dtype)
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    return F.layer_norm(x, (x.size(-1),), weight, bias, eps)


@operator("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
def _rms_norm(x, weight, eps):
    """The norm, and 1 / rms (...,) fp32."""
    y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    call_cpp("rms_norm", x, weight.float(), eps, y, inverse, inverse.numel(), x.size(-1))
    return y, inverse


@operator("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse, bool trains) -> (Tensor, Tensor)")
def _rms_norm_backward(grad, x, weight, inverse, trains):
    """The gradients of x, and of the weight in fp32 if it trains."""
    parts = torch.get_num_threads() if trains else 0  # an empty tensor's address is null: then nothing is summed
    grad_x, sums = torch.empty_like(x), x.new_zeros((parts, x.size(-1)), dtype=torch.float32)
    call_cpp("rms_norm_backward", grad, x, weight.float(), inverse, grad_x, sums, inverse.numel(), x.size(-1))
    return grad_x, sums.sum(0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x = x.contiguous()
        y, inverse = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        trains = ctx.needs_input_grad[1]
        grad_x, grad_weight = _rms_norm_backward(grad.contiguous(), x, weight, inverse, trains)
        return grad_x, grad_weight.to(weight.dtype) if trains else None, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, plus_one: bool = False) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467), in x's dtype.

    torch has a fused kernel for CUDA only; on a CPU its backward pass costs seven times LayerNorm's.
    """
    if not in_cpp(x) or weight is None or plus_one:
        return plain_rms_norm(x, weight, eps, plus_one)
    return _RMSNorm.apply(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, plus_one: bool = False) -> Tensor:
    """(x - mean) / standard deviation * weight + bias over the last dimension (Ba et al. 2016, arXiv 1607.06450)."""
    return plain_layer_norm(x, weight, bias, eps, plus_one)
