"""The optimisers of `--optimizer`, and one that updates each weight within the backward pass.

To add one: a function that makes it, one for the bytes of its states, and a row in `OPTIMIZERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from quantize import bitsandbytes

if TYPE_CHECKING:
    from training.settings import Settings


def build_optimizer(s: Settings, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of `--optimizer` over the trainable parameters; norms and biases do not decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, others = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    groups = [{"params": part, "weight_decay": decay(s, part[0])} for part in (matrices, others) if part]
    return OPTIMIZERS[s.optimizer].build(groups, s)


def decay(s: Settings, parameter: Tensor) -> float:
    """The weight decay of a parameter: norms and biases have none."""
    return s.weight_decay if parameter.dim() >= 2 else 0.0


def begin_step(optimizer: torch.optim.Optimizer | InBackward, rate: float, micro_batches: int) -> None:
    """Before the first micro-batch of a step, of which there are so many: set the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    if isinstance(optimizer, InBackward):
        optimizer.expect(micro_batches)


# -------------------------------------------------------------------------------------------------- AdamW, four times


def fused_adamw(groups: list[dict], s: Settings) -> torch.optim.Optimizer:
    """torch's AdamW, whose states are of the parameters' dtype."""
    # Fabric cannot clip gradients under a loss scaler for the fused one, which would unscale them itself.
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=s.precision != "16-mixed")


def bitsandbytes_optimizer(name: str) -> Callable[[list[dict], Settings], torch.optim.Optimizer]:
    """Of bitsandbytes' optimisers the one of this name."""

    def build(groups, s):
        return getattr(bitsandbytes().optim, name)(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2))

    return build


def moments_as_parameter(parameter: Tensor, device: str) -> int:
    """Two moments in the dtype of the parameter."""
    return 2 * parameter.nbytes


def moments_of_8_bits(parameter: Tensor, device: str) -> int:
    """Two moments of a byte an element, and an fp32 scale for 256; those of small parameters are fp32."""
    n = parameter.numel()
    return 2 * (n + 4 * math.ceil(n / 256)) if n >= 4096 else 8 * n


def paged(moments: Callable[[Tensor, str], int]) -> Callable[[Tensor, str], int]:
    """Moments that bitsandbytes keeps in memory that a full GPU pages out; those of small parameters stay there."""
    return lambda parameter, device: 0 if device != "cpu" and parameter.numel() >= 1e5 else moments(parameter, device)


class Optimizer(NamedTuple):
    """A row of OPTIMIZERS.

    build: makes it from groups of parameters (lists of dicts, as torch's optimisers take them) and the Settings.
    moment_bytes: what it keeps for a parameter on a device of a type ("cpu", "cuda"), in bytes, for the memory plan.
    """

    build: Callable[[list[dict], Settings], torch.optim.Optimizer]
    moment_bytes: Callable[[Tensor, str], int]


OPTIMIZERS = {
    "adamw": Optimizer(fused_adamw, moments_as_parameter),
    "adamw-8bit": Optimizer(bitsandbytes_optimizer("AdamW8bit"), moments_of_8_bits),
    "adamw-paged": Optimizer(
        bitsandbytes_optimizer("PagedAdamW32bit"), paged(lambda parameter, device: 8 * parameter.numel())
    ),
    "adamw-8bit-paged": Optimizer(bitsandbytes_optimizer("PagedAdamW8bit"), paged(moments_of_8_bits)),
}


class InBackward:
    """An optimiser that takes each weight's gradient away in the backward pass.

    After the first gradient that is not finite it is `stopped`: no weight is updated any more.
    early: whether weights may have changed before all gradients of a step are known to be finite.
    """

    stopped: bool
    early: bool

    def expect(self, micro_batches: int) -> None:
        """Before a step: it has so many micro-batches."""

    def take_norm(self) -> Tensor:
        """After the backward passes of a step: finish it. The norm of its gradients, a scalar in fp32."""
        raise NotImplementedError


class StepInBackward(InBackward):
    """Updates each weight as soon as its gradient is complete, then frees it: there is never more than one gradient.

    At that moment no other weight has a gradient, so a step of the whole optimiser is a step of that weight alone.
    """

    early = True

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.optimizer, self.stopped, self._squares = optimizer, False, []
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._step)

    def _step(self, parameter):
        square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()  # and no copy of it in fp32
        self._squares.append(square)
        self.stopped = self.stopped or not square.isfinite()
        if not self.stopped:
            self.optimizer.step()
        parameter.grad = None

    def take_norm(self) -> Tensor:
        """The norm of the gradients of all weights since the last call, a scalar in fp32."""
        norm = torch.stack(self._squares).sum().sqrt()
        self._squares.clear()
        return norm

    @property
    def param_groups(self) -> list[dict]:
        """Those of AdamW."""
        return self.optimizer.param_groups

    @property
    def state(self) -> dict:
        """AdamW's, by parameter."""
        return self.optimizer.state
