"""The MLP's activations, gated (SwiGLU and its kin) and not: the plain forms, and ones that save only their inputs."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.cpp import call_cpp, in_cpp, operator
from ops.dtypes import alike

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, arXiv 2109.08668
}


def plain_gated(name: str, gate: Tensor, up: Tensor) -> Tensor:
    """The reference: activation(gate) * up, of one shape, or GPT-OSS's `clamped_swiglu`."""
    if name == "clamped_swiglu":
        return clamped_swiglu(gate, up)
    return ACTIVATIONS[name](gate) * up


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float = 7.0) -> Tensor:
    """GPT-OSS's: (up + 1) * gate * sigmoid(1.702 gate), gate at most and up within `limit`."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def plain_softcap(x: Tensor, softcap: float | None) -> Tensor:
    """Scores or logits, kept within `softcap` if there is one: softcap * tanh(x / softcap) (Gemma 2)."""
    return x if softcap is None else softcap * torch.tanh(x / softcap)


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


def gated(name: str, gate: Tensor, up: Tensor) -> Tensor:
    """`plain_gated` (Shazeer 2020, arXiv 2002.05202), of one shape, in the wider of their dtypes."""
    if torch.compiler.is_compiling() or name != "silu":
        return plain_gated(name, *alike(gate, up))
    return _SwiGLU.apply(*alike(gate, up))


def activate(name: str, x: Tensor) -> Tensor:
    """activation(x)."""
    return ACTIVATIONS[name](x)
