"""The MLP's activations, gated (SwiGLU and its kin) and not: the plain forms, and ones that save only their inputs."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.cpp import call_cpp, in_cpp, operator
from ops.dtypes import alike
from ops.gpu import in_triton, launch

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
IN_KERNELS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")  # in the order of kernels_cpu.cpp's `in_activation`
BLOCK = 1024  # elements of a program of activation_gpu.py


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
    if in_triton(x):
        launch("activate", _blocks(y), x, up, y, y.numel(), NAME=name, BLOCK=BLOCK)
    else:
        call_cpp("activate", x, x.new_empty(0) if up is None else up, y, IN_KERNELS.index(name), y.numel())
    return y


@operator(
    "activate_backward(str name, Tensor grad, Tensor x, Tensor? up, Tensor(a!) grad_x, Tensor(b!)? grad_up) -> ()"
)
def _activate_backward(name, grad, x, up, grad_x, grad_up):
    """Put the gradients of x and up into grad_x and grad_up, which may be x and up themselves."""
    if in_triton(x):
        launch("activate_backward", _blocks(x), grad, x, up, grad_x, grad_up, x.numel(), NAME=name, BLOCK=BLOCK)
    else:
        up, grad_up = (x.new_empty(0) if given is None else given for given in (up, grad_up))  # whose address is null
        call_cpp("activate_backward", grad, x, up, grad_x, grad_up, IN_KERNELS.index(name), grad.numel())


def _blocks(x):
    """The grid of programs that have BLOCK elements each."""
    return (-(-x.numel() // BLOCK),)


class _Activation(torch.autograd.Function):
    """activation(x), times `up` if that is given. Autograd would save the activation as well."""

    @staticmethod
    def forward(ctx, name, x, up, reuse):
        ctx.name, ctx.reuse, ctx.in_kernel = name, reuse, in_triton(x) or in_cpp(x)
        if ctx.in_kernel:
            x, up = x.contiguous(), None if up is None else up.contiguous()
        ctx.save_for_backward(x, up)
        if ctx.in_kernel:
            return _activate(name, x, up)
        y = ACTIVATIONS[name](x)
        return y if up is None else y.mul_(up)

    @staticmethod
    def backward(ctx, grad):
        x, up = ctx.saved_tensors
        if ctx.in_kernel:
            return None, *_gradients(ctx.name, grad.contiguous(), x, up, ctx.reuse), None
        grad_up = None if up is None else ACTIVATIONS[ctx.name](x).mul_(grad)
        return None, BACKWARD[ctx.name](grad if up is None else grad * up, x), grad_up, None


def _gradients(name, grad, x, up, reuse):
    """Those of x and up; with `reuse` in the memory of x and up."""
    grads = tuple(each if each is None or reuse else torch.empty_like(each) for each in (x, up))
    _activate_backward(name, grad, x, up, *grads)
    if reuse:  # a second backward pass, or whoever needs them for another gradient, is told so by an error
        torch.autograd.graph.increment_version([each for each in grads if each is not None])
    return grads


def gated(name: str, gate: Tensor, up: Tensor, reuse: bool = False) -> Tensor:
    """`plain_gated` (Shazeer 2020, arXiv 2002.05202), of one shape, in the wider of their dtypes.

    reuse: whether the backward pass may put gradients into the memory of gate and up: if nobody else looks at them.
    """
    if torch.compiler.is_compiling() or name not in IN_KERNELS:
        return plain_gated(name, *alike(gate, up))
    return _Activation.apply(name, *alike(gate, up), reuse)


def activate(name: str, x: Tensor, reuse: bool = False) -> Tensor:
    """activation(x). reuse: as in `gated`."""
    return ACTIVATIONS[name](x) if torch.compiler.is_compiling() else _Activation.apply(name, x, None, reuse)
