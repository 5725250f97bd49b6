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
# The gradient of x from that of activation(x), and x.
BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
    "relu2": lambda grad, x: grad * F.relu(x).mul_(2),
}
IN_CPP = ("silu", "gelu", "gelu_tanh", "relu", "relu2")  # in the order of kernels_cpu.cpp's `in_activation`


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


@operator("activate(str name, Tensor x, Tensor? up) -> Tensor")
def _activate(name, x, up):
    y = torch.empty_like(x)
    call_cpp("activate", x, x.new_empty(0) if up is None else up, y, IN_CPP.index(name), y.numel())
    return y


@operator("activate_backward(str name, Tensor grad, Tensor x, Tensor? up) -> (Tensor, Tensor)")
def _activate_backward(name, grad, x, up):
    """The gradients of x and up; the latter is empty if there is no up."""
    up = x.new_empty(0) if up is None else up  # its address is null
    grad_x, grad_up = torch.empty_like(x), torch.empty_like(up)
    call_cpp("activate_backward", grad, x, up, grad_x, grad_up, IN_CPP.index(name), grad.numel())
    return grad_x, grad_up


class _Activation(torch.autograd.Function):
    """activation(x), times `up` if that is given. Autograd would save the activation as well."""

    @staticmethod
    def forward(ctx, name, x, up):
        ctx.name, ctx.gated, ctx.in_cpp = name, up is not None, in_cpp(x)
        if ctx.in_cpp:
            x, up = x.contiguous(), up.contiguous() if ctx.gated else None
        ctx.save_for_backward(x, up)
        if ctx.in_cpp:
            return _activate(name, x, up)
        y = ACTIVATIONS[name](x)
        return y.mul_(up) if ctx.gated else y

    @staticmethod
    def backward(ctx, grad):
        x, up = ctx.saved_tensors
        if ctx.in_cpp:
            grad_x, grad_up = _activate_backward(ctx.name, grad.contiguous(), x, up)
            return None, grad_x, grad_up if ctx.gated else None
        grad_up = ACTIVATIONS[ctx.name](x).mul_(grad) if ctx.gated else None
        return None, BACKWARD[ctx.name](grad * up if ctx.gated else grad, x), grad_up


def gated(name: str, gate: Tensor, up: Tensor) -> Tensor:
    """`plain_gated` (Shazeer 2020, arXiv 2002.05202), of one shape, in the wider of their dtypes."""
    if torch.compiler.is_compiling() or name not in IN_CPP:
        return plain_gated(name, *alike(gate, up))
    return _Activation.apply(name, *alike(gate, up))


def activate(name: str, x: Tensor) -> Tensor:
    """activation(x)."""
    return ACTIVATIONS[name](x) if torch.compiler.is_compiling() else _Activation.apply(name, x, None)
