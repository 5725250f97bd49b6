"""The cross-entropy at target positions, in chunks, so that the logits of all positions never exist at one time.

Shapes: N positions that have a target, D hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.activation import plain_softcap
from ops.cpp import call_cpp, in_cpp, operator
from ops.dtypes import as_multiplied
from ops.gpu import in_triton, launch, power_of_two

LOSS_CHUNK = 256  # target positions whose logits exist at one time; 256 x 32,000 fp32 logits are 33 MB
BLOCK = 4096  # logits that a program of loss_gpu.py has in registers at one time


def plain_head_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The reference, with the logits of all positions at one time. Shapes as in `head_loss`."""
    logits = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)).float()
    losses, added = plain_losses(plain_softcap(logits, softcap), targets, z_loss)
    return losses.sum() + added.sum(), losses.detach()


def plain_losses(
    logits: Tensor, targets: Tensor, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """-log p(target) for logits (N, V) in fp32; and what is trained beside that, shown nowhere: both (N,).

    z_loss: as in `head_loss`. label_smoothing: the share of the wanted distribution that all tokens have alike, not the
    target (Szegedy et al. 2015, arXiv 1512.00567, section 7).
    """
    losses, added = F.cross_entropy(logits, targets, reduction="none"), logits.new_zeros(len(logits))
    if z_loss:
        added = added + z_loss * logits.logsumexp(dim=-1).square()
    if label_smoothing:
        aim = logits.gather(1, targets[:, None]).squeeze(1)
        added = added + label_smoothing * (aim - logits.mean(dim=-1))
    return losses, added


@operator("loss_(Tensor(a!) logits, Tensor targets, bool backward, float softcap, float z_loss) -> (Tensor, Tensor)")
def _loss_(logits, targets, backward, softcap, z_loss):
    """-log p(target) and log-sum-exp of the logits, (N,) fp32; the logits become their gradient if `backward`."""
    (rows, columns), (losses, log_sums) = logits.shape, logits.new_empty((2, len(logits)), dtype=torch.float32)
    if in_triton(logits):
        how = {"BACKWARD": backward, "CAPPED": softcap != 0, "BLOCK": min(BLOCK, power_of_two(columns)), "num_warps": 8}
        launch("loss", (rows,), logits, targets, losses, log_sums, columns, softcap, z_loss, **how)
    else:
        call_cpp("loss", logits, targets, losses, log_sums, rows, columns, backward, softcap, z_loss)
    return losses, log_sums


def _losses_and_gradient(logits, targets, backward, softcap, z_loss):
    """-log p(target) and log-sum-exp, (n,) fp32, for logits (n, V), which are overwritten, and with `backward` their
    gradient."""
    if in_triton(logits) or in_cpp(logits):
        return *_loss_(logits, targets, backward, softcap or 0.0, z_loss), logits if backward else None
    dtype, logits = logits.dtype, logits.float()  # in place: they are the largest tensor of the step
    share = None if softcap is None else logits.div_(softcap).tanh_()
    capped = logits if share is None else share * softcap
    log_sums = capped.logsumexp(dim=-1)
    losses = log_sums - capped.gather(1, targets[:, None]).squeeze(1)
    if not backward:
        return losses, log_sums, None
    grad = capped.sub_(log_sums[:, None]).exp_().mul_((1 + 2 * z_loss * log_sums)[:, None])
    grad.scatter_add_(1, targets[:, None], grad.new_full((len(grad), 1), -1.0))
    return losses, log_sums, (grad if share is None else grad.mul_(1 - share.square_())).to(dtype)


class _HeadLoss(torch.autograd.Function):
    """The sum: logits and their gradient chunk by chunk, both in the forward pass: no chunk is saved or computed twice.

    That is so because every target counts alike: the gradient is known but for one factor.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, bias, softcap, z_loss):
        cast, shift = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        needed = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if needed[0] else None
        grad_weight = torch.zeros_like(cast) if needed[1] else None
        grad_bias = torch.zeros_like(shift) if needed[3] else None
        losses, log_sums = torch.empty((2, len(x)), dtype=torch.float32, device=x.device)
        for start in range(0, len(x), LOSS_CHUNK):
            chunk = slice(start, start + LOSS_CHUNK)
            logits = F.linear(x[chunk], cast, shift)
            losses[chunk], log_sums[chunk], grad = _losses_and_gradient(
                logits, targets[chunk], any(needed), softcap, z_loss
            )
            if grad_x is not None:
                torch.mm(grad, cast, out=grad_x[chunk])
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, x[chunk])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.grads = grad_x, *(None if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias))
        ctx.mark_non_differentiable(losses)
        added = z_loss * log_sums.square().sum() if z_loss else 0.0
        return losses.sum() + added, losses

    @staticmethod
    def backward(ctx, grad, _):
        grad_x, grad_weight, grad_bias = (None if g is None else g.mul_(grad.to(g.dtype)) for g in ctx.grads)
        ctx.grads = None
        return grad_x, grad_weight, None, grad_bias, None, None


def head_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """-log p(target) for x (N, D) and targets (N,), by a head `weight` (V, D): the sum, and each (N,), both fp32.

    bias: (V,), of the head. softcap: as in `plain_softcap`. z_loss: times the squares of log sum exp(logits) is added
    to the sum, so that these stay near 0 (Chowdhery et al. 2022, arXiv 2204.02311, section 5). Only the sum has a
    gradient.
    """
    return _HeadLoss.apply(as_multiplied(x), weight, targets, bias, softcap, z_loss)


class _EachHeadLoss(torch.autograd.Function):
    """Each loss with a gradient of its own, by a frozen head: that of x has a row for each target, known but for a
    factor, so again nothing is computed twice."""

    @staticmethod
    def forward(ctx, x, weight, targets, bias, softcap):
        cast, shift = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        for start in range(0, len(x), LOSS_CHUNK):
            chunk = slice(start, start + LOSS_CHUNK)
            logits = F.linear(x[chunk], cast, shift)
            losses[chunk], _, grad = _losses_and_gradient(logits, targets[chunk], grad_x is not None, softcap, 0.0)
            if grad_x is not None:
                torch.mm(grad, cast, out=grad_x[chunk])
        ctx.grad_x = grad_x
        return losses

    @staticmethod
    def backward(ctx, grad):
        grad_x, ctx.grad_x = ctx.grad_x, None
        return grad_x.mul_(grad[:, None].to(grad_x.dtype)), None, None, None, None


def each_head_loss(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """-log p(target) of each position, (N,) fp32 with gradient, by a head that does not train. As `head_loss` else."""
    assert not weight.requires_grad and (bias is None or not bias.requires_grad)
    return _EachHeadLoss.apply(as_multiplied(x), weight, targets, bias, softcap)
