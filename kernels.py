"""What training computes most often, forward and backward written out by hand, each beside its plain reference.

Autograd keeps more than it needs and makes a new tensor for every small step. Written by hand, a function keeps only
its inputs, computes the rest again where that is cheap, and works in place. `plain_*` is the same in a few lines of
ordinary torch: what the tests compare with, and what `torch.compile` gets, which fuses by itself.

Shapes: N positions (rows of a micro-batch end to end), D hidden size, d head size, r rank, V vocabulary.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

LOSS_CHUNK = 256  # target positions whose logits exist at one time; 256 x 32,000 fp32 logits are 33 MB


@lru_cache
def compute_dtype(dtype, device_type):
    """The dtype to multiply in, for weights of `dtype`.

    A CPU without bf16 instructions multiplies bf16 at a tenth of its fp32 speed (20 against 180 GFLOP/s on two Zen 3
    cores), so there weights are only kept in 16 bits, and cast where they are used. fp16 is slow on every CPU.
    """
    if device_type != "cpu" or dtype == torch.float32:
        return dtype
    fast = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype if fast else torch.float32


def as_multiplied(x):
    """x in the dtype that autocast, where it is on, multiplies in. The functions below then know nothing of it."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


# ----------------------------------------------------------------------------------------------------- linear layers


class _StoredLinear(torch.autograd.Function):
    """x @ W.T for a W that is stored in another form than it multiplies in: `restore(dtype)` gives it.

    The backward pass restores it again: kept for all layers, the restored weights would undo all the saving.
    """

    @staticmethod
    def forward(ctx, x, restore):
        ctx.restore = restore
        return F.linear(x, restore(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.restore(grad.dtype), None


def stored_linear(x, restore):
    """x (..., in) times the frozen weight (out, in) that `restore(dtype)` makes: (..., out)."""
    return _StoredLinear.apply(as_multiplied(x), restore)


class _CastLinear(torch.autograd.Function):
    """x @ W.T for a trainable W of another dtype than x."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)


def linear(x, weight, bias=None):
    """F.linear in x's dtype, whatever the weight is stored in, without keeping a cast copy of it."""
    x = as_multiplied(x)
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    y = _CastLinear.apply(x, weight) if weight.requires_grad else stored_linear(x, weight.to)
    return y if bias is None else y + bias.to(y.dtype)


class _LowRankLinears(torch.autograd.Function):
    """For several layers of one input x @ W.T + scale * (x @ A.T) @ B.T, the small products added in place.

    All A are multiplied as one matrix, in both directions; a product so thin costs what it takes to read x.
    """

    @staticmethod
    def forward(ctx, x, restores, scales, *factors):
        a, b = torch.cat(factors[0::2]).to(x.dtype), factors[1::2]
        flat, ranks = x.flatten(0, -2), [factor.size(1) for factor in b]
        small = flat @ a.T  # (N, sum of r)
        ys = [F.linear(flat, restore(x.dtype)) for restore in restores]
        for y, part, factor, scale in zip(ys, small.split(ranks, dim=1), b, scales, strict=True):
            y.addmm_(part, factor.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(flat, small, a, *b)
        ctx.restores, ctx.scales, ctx.ranks, ctx.shape = restores, scales, ranks, x.shape
        return tuple(y.view(*x.shape[:-1], -1) for y in ys)

    @staticmethod
    def backward(ctx, *grads):
        flat, small, a, *b = ctx.saved_tensors
        grads = [grad.reshape(-1, grad.size(-1)) for grad in grads]
        grad_small = torch.empty_like(small)
        for grad, part, factor, scale in zip(grads, grad_small.split(ctx.ranks, dim=1), b, ctx.scales, strict=True):
            part.copy_(grad @ factor.to(grad.dtype)).mul_(scale)
        parts = zip(grads, small.split(ctx.ranks, dim=1), b, ctx.scales, strict=True)
        grad_b = [(grad.T @ part).to(factor.dtype).mul_(scale) for grad, part, factor, scale in parts]
        grad_a = (grad_small.T @ flat).to(b[0].dtype).split(ctx.ranks)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_small @ a
            for grad, restore in zip(grads, ctx.restores, strict=True):
                grad_x.addmm_(grad, restore(grad.dtype))
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, *(gradient for pair in zip(grad_a, grad_b, strict=True) for gradient in pair)


def low_rank_linears(x, restores, scales, factors):
    """Frozen linear layers of one input, each with its LoRA: a tuple with (..., out) for each.

    x (..., in). restores: functions that give the weight (out, in) in a dtype. factors: for each layer A (r, in) and
    B (out, r), both trainable and fp32.
    """
    return _LowRankLinears.apply(as_multiplied(x), restores, scales, *(matrix for pair in factors for matrix in pair))


# --------------------------------------------------------------------------------------------- norm, SwiGLU, rotation


def plain_rms_norm(x, weight, eps):
    return F.rms_norm(x, (x.size(-1),), weight.to(x.dtype), eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = (norm.square_() / x.size(-1)).add_(eps).rsqrt_()  # 1 / rms, (..., 1) fp32
        ctx.save_for_backward(x, inverse, weight)
        return (x * inverse).mul_(weight).to(x.dtype)  # rounded once

    @staticmethod
    def backward(ctx, grad):
        x, inverse, weight = ctx.saved_tensors
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * (x * inverse)).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight.to(grad.dtype)
        along = (grad * x).sum(-1, keepdim=True, dtype=torch.float32).mul_(inverse.pow(3)).div_(-x.size(-1))
        grad = grad * inverse
        return torch.addcmul(grad, x, along.to(grad.dtype)).to(x.dtype), grad_weight, None


def rms_norm(x, weight, eps):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467), in x's dtype.

    torch has a fused kernel for CUDA only; on a CPU its backward pass costs seven times LayerNorm's.
    """
    fused = x.device.type == "cuda" or torch.compiler.is_compiling()
    return plain_rms_norm(x, weight, eps) if fused else _RMSNorm.apply(x, weight, eps)


def plain_swiglu(gate, up):
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)  # and not silu(gate), which autograd would keep too
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def swiglu(gate, up):
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202)."""
    return plain_swiglu(gate, up) if torch.compiler.is_compiling() else _SwiGLU.apply(gate, up)


def plain_rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _turn(x, cos, sin):
    half = x.size(-1) // 2
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(x[..., :half], cos, out=y[..., :half]).addcmul_(x[..., half:], sin, value=-1)
    torch.mul(x[..., half:], cos, out=y[..., half:]).addcmul_(x[..., :half], sin)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None  # a rotation's gradient is turned back


def rotate(x, cos, sin):
    """Turn x (..., d), whose dimension i pairs with i + d/2 (Hugging Face's layout, not Meta's), by angles whose

    cosines and sines (..., d/2) broadcast with x.
    """
    return plain_rotate(x, cos, sin) if torch.compiler.is_compiling() else _Rotate.apply(x, cos, sin)


# ------------------------------------------------------------------------------------------------------------- the loss


def plain_head_loss(x, weight, targets):
    losses = F.cross_entropy(F.linear(x, weight.to(x.dtype)).float(), targets, reduction="none")
    return losses.sum(), losses.detach()


class _HeadLoss(torch.autograd.Function):
    """Logits and their gradient chunk by chunk, both in the forward pass: no chunk is kept or computed twice."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        cast = weight.to(x.dtype)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(cast) if ctx.needs_input_grad[1] else None
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        for start in range(0, len(x), LOSS_CHUNK):
            chunk = slice(start, start + LOSS_CHUNK)
            logits = F.linear(x[chunk], cast).float()
            log_p = torch.log_softmax(logits, dim=-1, out=logits)  # in place: they are the largest tensor of the step
            losses[chunk] = -log_p.gather(1, targets[chunk, None]).squeeze(1)
            if grad_x is None and grad_weight is None:
                continue
            grad = log_p.exp_()  # the gradient of the logits: the probabilities, less 1 for the target
            grad.scatter_add_(1, targets[chunk, None], grad.new_full((len(grad), 1), -1.0))
            grad = grad.to(x.dtype)
            if grad_x is not None:
                torch.mm(grad, cast, out=grad_x[chunk])
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, x[chunk])
        ctx.grads = grad_x, None if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad, _):
        grad_x, grad_weight = ctx.grads
        ctx.grads = None
        return *(None if g is None else g.mul_(grad.to(g.dtype)) for g in (grad_x, grad_weight)), None


def head_loss(x, weight, targets):
    """-log p(target) for x (N, D) and targets (N,), by a head `weight` (V, D): the sum, and each (N,), both fp32.

    Only the sum has a gradient.
    """
    return _HeadLoss.apply(as_multiplied(x), weight, targets)
