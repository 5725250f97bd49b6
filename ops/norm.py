"""RMSNorm: the plain form, and on a CPU kernels_cpu.cpp's, forward and backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.cpp import call_cpp, in_cpp, operator


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The reference: x (..., D) and weight (D,), in x's dtype."""
    return F.rms_norm(x, (x.size(-1),), weight.to(x.dtype), eps)


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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467), in x's dtype.

    torch has a fused kernel for CUDA only; on a CPU its backward pass costs seven times LayerNorm's.
    """
    return _RMSNorm.apply(x, weight, eps) if in_cpp(x) else plain_rms_norm(x, weight, eps)
