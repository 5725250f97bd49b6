"""The cross-entropy at target positions, in chunks, so that the logits of all positions never exist at one time.

Shapes: N positions that have a target, D hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.activation import plain_softcap
from ops.cpp import call_cpp, in_cpp, operator
from ops.dtypes import as_multiplied

LOSS_CHUNK = 256  # target positions whose logits exist at one time; 256 x 32,000 fp32 logits are 33 MB


def plain_head_loss(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The reference, with the logits of all positions at one time. Shapes as in `head_loss`."""
    logits = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).float()
    losses = F.cross_entropy(plain_softcap(logits, softcap), targets, reduction="none")
    return losses.sum(), losses.detach()


@operator("loss_(Tensor(a!) logits, Tensor targets, bool backward, float softcap) -> Tensor")
def _loss_(logits, targets, backward, softcap):
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    call_cpp("loss", logits, targets, losses, *logits.shape, backward, softcap)
    return losses


def _losses_and_gradient(logits, targets, backward, softcap):
    """-log p(target) (n,) fp32 for logits (n, V), which are overwritten, and with `backward` their gradient."""
    if in_cpp(logits):
        return _loss_(logits, targets, backward, softcap or 0.0), logits if backward else None
    return _in_torch(logits, targets, backward) if softcap is None else _capped(logits, targets, backward, softcap)


def _in_torch(logits, targets, backward):
    dtype, logits = logits.dtype, logits.float()
    log_p = torch.log_softmax(logits, dim=-1, out=logits)  # in place: they are the largest tensor of the step
    losses = -log_p.gather(1, targets[:, None]).squeeze(1)
    if not backward:
        return losses, None
    grad = log_p.exp_()  # the probabilities, less 1 for the target
    return losses, grad.scatter_add_(1, targets[:, None], grad.new_full((len(grad), 1), -1.0)).to(dtype)


def _capped(logits, targets, backward, softcap):
    dtype, share = logits.dtype, logits.float().div_(softcap).tanh_()
    losses, grad = _in_torch(share * softcap, targets, backward)
    return losses, grad.mul_(1 - share.square_()).to(dtype) if backward else None


class _HeadLoss(torch.autograd.Function):
    """Logits and their gradient chunk by chunk, both in the forward pass: no chunk is saved or computed twice."""

    @staticmethod
    def forward(ctx, x, weight, targets, bias, softcap):
        cast, shift = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        needed = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if needed[0] else None
        grad_weight = torch.zeros_like(cast) if needed[1] else None
        grad_bias = torch.zeros_like(shift) if needed[3] else None
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        for start in range(0, len(x), LOSS_CHUNK):
            chunk = slice(start, start + LOSS_CHUNK)
            logits = F.linear(x[chunk], cast, shift)
            losses[chunk], grad = _losses_and_gradient(logits, targets[chunk], any(needed), softcap)
            if grad_x is not None:
                torch.mm(grad, cast, out=grad_x[chunk])
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, x[chunk])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.grads = grad_x, *(None if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias))
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad, _):
        grad_x, grad_weight, grad_bias = (None if g is None else g.mul_(grad.to(g.dtype)) for g in ctx.grads)
        ctx.grads = None
        return grad_x, grad_weight, None, grad_bias, None


def head_loss(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """-log p(target) for x (N, D) and targets (N,), by a head `weight` (V, D): the sum, and each (N,), both fp32.

    bias: (V,), of the head. softcap: as in `plain_softcap`. Only the sum has a gradient.
    """
    return _HeadLoss.apply(as_multiplied(x), weight, targets, bias, softcap)
