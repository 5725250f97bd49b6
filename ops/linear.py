"""What training computes most often, forward and backward written out by hand, each beside its plain reference.

Autograd keeps more than it needs and makes a new tensor for every small step. Written by hand, a function keeps only
its inputs, computes the rest again where that is cheap, and works in place. `plain_*` is the same in a few lines of
ordinary torch: what the tests compare with, what `torch.compile` gets, which fuses by itself, and what is left on a CPU
without a C++ compiler. With one, what is not a product of matrices is kernels_cpu.cpp's there.

Shapes: N positions (rows of a micro-batch end to end), D hidden size, d head size, r rank, V vocabulary.
"""

import os
from functools import lru_cache, reduce

import torch
import torch.nn.functional as F

import compiled

# oneDNN, which multiplies bf16 on a CPU, compiles each product for its very shape and keeps the last 1,024 of them: up
# to 0.4 GB, since each row of samples has a length of its own. A block forward and backward has fewer than 64.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

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


def in_cpp(x, dtype=None):
    """Whether kernels_cpu.cpp computes with x, cast to `dtype`: on a CPU in fp32 or bf16, and not in torch.compile."""
    dtype = dtype or x.dtype
    if x.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or torch.compiler.is_compiling():
        return False
    return compiled.compiled_library("kernels_cpu") is not None


def call_cpp(function, x, *arguments):
    """Call a function of kernels_cpu.cpp that computes in the dtype of x, its first argument.

    The others are in that dtype too or, as its source says, in fp32.
    """
    in_bf16 = {torch.float32: False, torch.bfloat16: True}[x.dtype]
    compiled.call("kernels_cpu", function, in_bf16, x, *arguments, torch.get_num_threads())


def alike(*tensors):
    """The tensors in one dtype, the widest of theirs: under autocast some come in bf16 and some in fp32."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return [tensor.to(dtype) for tensor in tensors]


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


@compiled.operator("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
def _rms_norm(x, weight, eps):
    """The norm, and 1 / rms (...,) fp32."""
    y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    call_cpp("rms_norm", x, weight.float(), eps, y, inverse, inverse.numel(), x.size(-1))
    return y, inverse


@compiled.operator(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse, bool trains) -> (Tensor, Tensor)"
)
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


def rms_norm(x, weight, eps):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467), in x's dtype.

    torch has a fused kernel for CUDA only; on a CPU its backward pass costs seven times LayerNorm's.
    """
    return _RMSNorm.apply(x, weight, eps) if in_cpp(x) else plain_rms_norm(x, weight, eps)


def plain_swiglu(gate, up):
    return F.silu(gate) * up


@compiled.operator("swiglu(Tensor gate, Tensor up) -> Tensor")
def _swiglu(gate, up):
    y = torch.empty_like(gate)
    call_cpp("swiglu", gate, up, y, y.numel())
    return y


@compiled.operator("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)")
def _swiglu_backward(grad, gate, up):
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    call_cpp("swiglu_backward", grad, gate, up, grad_gate, grad_up, grad.numel())
    return grad_gate, grad_up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        if in_cpp(gate):
            gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)  # and not silu(gate), which autograd would keep too
        return _swiglu(gate, up) if in_cpp(gate) else F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        if in_cpp(gate):
            return _swiglu_backward(grad.contiguous(), gate, up)
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def swiglu(gate, up):
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202)."""
    return plain_swiglu(gate, up) if torch.compiler.is_compiling() else _SwiGLU.apply(*alike(gate, up))


def plain_rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@compiled.operator("rotate(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor")
def _rotate(x, cos, sin, back):
    """x (B, T, heads, d) turned, in its own layout; cos, sin ((1 or B) * T * d/2 numbers)."""
    y, (B, T, heads, d) = torch.empty_like(x), x.shape
    same_in_batch = cos.numel() == T * (d // 2)
    call_cpp("rotate", x, cos.float(), sin.float(), -1.0 if back else 1.0, y, B, T, heads, d, same_in_batch)
    return y


def _turn(x, cos, sin, back):
    if in_cpp(x):
        return _rotate(x.transpose(1, 2).contiguous(), cos, sin, back).transpose(1, 2)
    half, sin = x.size(-1) // 2, -sin if back else sin
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(x[..., :half], cos, out=y[..., :half]).addcmul_(x[..., half:], sin, value=-1)
    torch.mul(x[..., half:], cos, out=y[..., half:]).addcmul_(x[..., :half], sin)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, back=False)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, back=True), None, None  # a rotation's gradient is turned back


def rotate(x, cos, sin):
    """Turn x (B, heads, T, d), whose dimension i pairs with i + d/2 (Hugging Face's layout, not Meta's), by angles

    whose cosines and sines are (T, d/2), or (B, 1, T, d/2).
    """
    return plain_rotate(x, cos, sin) if torch.compiler.is_compiling() else _Rotate.apply(x, cos, sin)


# ------------------------------------------------------------------------------------------------------------- the loss


def plain_head_loss(x, weight, targets):
    losses = F.cross_entropy(F.linear(x, weight.to(x.dtype)).float(), targets, reduction="none")
    return losses.sum(), losses.detach()


@compiled.operator("loss_(Tensor(a!) logits, Tensor targets, bool backward) -> Tensor")
def _loss_(logits, targets, backward):
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    call_cpp("loss", logits, targets, losses, *logits.shape, backward)
    return losses


def _losses_and_gradient(logits, targets, backward):
    """-log p(target) (n,) fp32 for logits (n, V), which are used up, and with `backward` their gradient, else None."""
    if in_cpp(logits):
        return _loss_(logits, targets, backward), logits if backward else None
    dtype, logits = logits.dtype, logits.float()
    log_p = torch.log_softmax(logits, dim=-1, out=logits)  # in place: they are the largest tensor of the step
    losses = -log_p.gather(1, targets[:, None]).squeeze(1)
    if not backward:
        return losses, None
    grad = log_p.exp_()  # the probabilities, less 1 for the target
    return losses, grad.scatter_add_(1, targets[:, None], grad.new_full((len(grad), 1), -1.0)).to(dtype)


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
            logits = F.linear(x[chunk], cast)
            losses[chunk], grad = _losses_and_gradient(logits, targets[chunk], any(ctx.needs_input_grad[:2]))
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
