"""RMSNorm and LayerNorm: the plain forms, and norm_gpu.py's or, on a CPU, kernels_cpu.cpp's, forward and backward.

What is normed is multiplied by a gain: `weight`, `weight` + 1 where that is how a family stores it, or nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.cpp import call_cpp, in_cpp, operator
from ops.dtypes import alike
from ops.gpu import in_triton, launch, tile, tiles

LARGEST = 16384  # elements of a row that a program of norm_gpu.py can hold
PROGRAMS = 512  # that add up the gradients of weight and bias, each of its rows: about four for each processor of a GPU


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


@operator(
    "norm(Tensor x, Tensor? added, float scale, Tensor? weight, Tensor? bias, float eps, bool plus_one, bool centred"
    ") -> (Tensor, Tensor, Tensor, Tensor)"
)
def _norm(x, added, scale, weight, bias, eps, plus_one, centred):
    """x + scale * added, (0,) if nothing is added; its norm; the mean (...,) fp32 if `centred` (LayerNorm), else (0,);
    and 1 / rms or 1 / standard deviation (...,) fp32."""
    means, inverses = (x.new_empty(x.shape[:-1] if kept else 0, dtype=torch.float32) for kept in (centred, True))
    rows, size, y = inverses.numel(), x.size(-1), torch.empty_like(x)
    total = x.new_empty(0) if added is None else torch.empty_like(x)
    if in_triton(x):
        how = tile(size)
        given = (x, added, scale, weight, bias, eps, total, y, means if centred else None, inverses, rows, size)
        launch("norm", (tiles(rows, how),), *given, plus_one=plus_one, **how)
    else:
        summed = x if added is None else torch.add(x, added, alpha=scale, out=total)
        gain = _gain(x, weight, plus_one)
        shift = gain.new_zeros(gain.shape if centred else 0) if bias is None else bias.float()
        call_cpp("norm", summed, gain, shift, eps, y, means, inverses, rows, size, centred)
    return total, y, means, inverses


@operator(
    "norm_backward(Tensor grad, Tensor? grad_total, Tensor x, Tensor? weight, Tensor means, Tensor inverses, "
    "bool plus_one, bool[] trains) -> (Tensor, Tensor, Tensor)"
)
def _norm_backward(grad, grad_total, x, weight, means, inverses, plus_one, trains):
    """The gradients of x (`grad_total` is added to it), and of weight and bias in fp32 if they train, else (0,)."""
    rows, size, grad_x, centred = inverses.numel(), x.size(-1), torch.empty_like(x), means.numel() > 0
    in_gpu, how = in_triton(x), tile(size)
    # Each program or thread has a sum of its own. An empty tensor's address is null: nothing is summed.
    rounds = max(1, -(-tiles(rows, how) // PROGRAMS)) if any(trains) else 1
    parts = -(-tiles(rows, how) // rounds) if in_gpu else torch.get_num_threads()
    gains, shifts = (x.new_zeros((parts * each, size), dtype=torch.float32) for each in trains)
    if in_gpu:
        given = (grad, grad_total, x, weight, means if centred else None, inverses, grad_x)
        sums = (part if each else None for part, each in zip((gains, shifts), trains, strict=True))
        launch("norm_backward", (parts,), *given, *sums, rows, size, rounds, plus_one=plus_one, **how)
    else:
        gain = _gain(x, weight, plus_one)
        call_cpp("norm_backward", grad, x, gain, means, inverses, grad_x, gains, shifts, rows, size, centred)
        if grad_total is not None:
            grad_x += grad_total
    return grad_x, *(
        sums.sum(0) if each else x.new_empty(0) for sums, each in zip((gains, shifts), trains, strict=True)
    )


def _gain(x, weight, plus_one):
    """What normed x is multiplied by, (D,) fp32."""
    if weight is None:
        return x.new_ones(x.size(-1), dtype=torch.float32)
    return weight.float() + 1 if plus_one else weight.float()


class _Norm(torch.autograd.Function):
    """The norm of x, or with `added` the sum x + scale * added and the norm of that."""

    @staticmethod
    def forward(ctx, x, added, scale, weight, bias, eps, plus_one, centred):
        x, added = x.contiguous(), None if added is None else added.contiguous()
        total, y, means, inverses = _norm(x, added, scale, weight, bias, eps, plus_one, centred)
        ctx.save_for_backward(x if added is None else total, weight, bias, means, inverses)
        ctx.known = scale, plus_one
        ctx.set_materialize_grads(False)
        return y if added is None else (total, y)

    @staticmethod
    def backward(ctx, *grads):
        (x, weight, bias, means, inverses), (scale, plus_one) = ctx.saved_tensors, ctx.known
        grad_total, grad = (None, *grads)[-2:]
        if grad is None:  # nothing used the norm
            grad_x, *grads = grad_total, None, None
        else:
            grad_total, trains = None if grad_total is None else grad_total.contiguous(), ctx.needs_input_grad[3:5]
            given = (grad.contiguous(), grad_total, x, weight, means, inverses, plus_one, trains)
            grad_x, *grads = _norm_backward(*given)
            each = zip(grads, (weight, bias), trains, strict=True)
            grads = [g.to(parameter.dtype) if needed else None for g, parameter, needed in each]
        grad_added = None
        if grad_x is not None and ctx.needs_input_grad[1]:
            grad_added = grad_x if scale == 1 else grad_x * scale
        return grad_x, grad_added, None, *grads, None, None, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, plus_one: bool = False) -> Tensor:
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467), in x's dtype."""
    if _fits(x):
        return _Norm.apply(x, None, 1.0, weight, None, eps, plus_one, False)
    return plain_rms_norm(x, weight, eps, plus_one)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, plus_one: bool = False) -> Tensor:
    """(x - mean) / standard deviation * weight + bias over the last dimension (Ba et al. 2016, arXiv 1607.06450)."""
    if _fits(x):
        return _Norm.apply(x, None, 1.0, weight, bias, eps, plus_one, True)
    return plain_layer_norm(x, weight, bias, eps, plus_one)


def rms_norm_of_sum(
    x: Tensor, added: Tensor, scale: float, weight: Tensor | None, eps: float, plus_one: bool = False
) -> tuple[Tensor, Tensor]:
    """x + scale * added (the hidden states and what a branch adds to them), and its `rms_norm`."""
    x, added = alike(x, added)
    if _fits(x):
        return _Norm.apply(x, added, scale, weight, None, eps, plus_one, False)
    total = x.add(added, alpha=scale)
    return total, plain_rms_norm(total, weight, eps, plus_one)


def layer_norm_of_sum(
    x: Tensor,
    added: Tensor,
    scale: float,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    plus_one: bool = False,
) -> tuple[Tensor, Tensor]:
    """x + scale * added (the hidden states and what a branch adds to them), and its `layer_norm`."""
    x, added = alike(x, added)
    if _fits(x):
        return _Norm.apply(x, added, scale, weight, bias, eps, plus_one, True)
    total = x.add(added, alpha=scale)
    return total, plain_layer_norm(total, weight, bias, eps, plus_one)


def _fits(x):
    """Whether norm_gpu.py or kernels_cpu.cpp computes the norms of the rows of x."""
    return (in_triton(x) and x.size(-1) <= LARGEST) or in_cpp(x)
