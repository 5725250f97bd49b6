"""SwiGLU: the plain form, and one that saves only its two inputs for the backward pass."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.cpp import call_cpp, in_cpp, operator
from ops.dtypes import alike


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The reference: silu(gate) * up, of one shape."""
    return F.silu(gate) * up


@operator("swiglu(Tensor gate, Tensor up) -> Tensor")
def _swiglu(gate, up):
    y = torch.empty_like(gate)
    call_cpp("swiglu", gate, up, y, y.numel())
    return y


@operator("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)")
def _swiglu_backward(grad, gate, up):
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    call_cpp("swiglu_backward", grad, gate, up, grad_gate, grad_up, grad.numel())
    return grad_gate, grad_up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        if in_cpp(gate):
            gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)  # autograd would save silu(gate) as well
        return _swiglu(gate, up) if in_cpp(gate) else F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        if in_cpp(gate):
            return _swiglu_backward(grad.contiguous(), gate, up)
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202), of one shape, in the wider of their dtypes."""
    return plain_swiglu(gate, up) if torch.compiler.is_compiling() else _SwiGLU.apply(*alike(gate, up))
