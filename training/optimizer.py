"""AdamW as the command line asks for it, and AdamW that updates each weight within the backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from quantize import bitsandbytes

if TYPE_CHECKING:
    from training.settings import Settings


def build_optimizer(s: Settings, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; norms and biases do not decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": s.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options = {"lr": s.learning_rate, "betas": (s.beta1, s.beta2)}
    if s.optimizer == "adamw":
        # Fabric cannot clip gradients under a loss scaler for the fused one, which would unscale them itself.
        return torch.optim.AdamW(groups, **options, fused=s.precision != "16-mixed")
    optim = bitsandbytes().optim
    kinds = {
        "adamw-8bit": optim.AdamW8bit,
        "adamw-paged": optim.PagedAdamW32bit,
        "adamw-8bit-paged": optim.PagedAdamW8bit,
    }
    return kinds[s.optimizer](groups, **options)


class StepInBackward:
    """Updates each weight as soon as its gradient is complete, then frees it: there is never more than one gradient.

    At that moment no other weight has a gradient, so a step of the whole optimiser is a step of that weight alone.
    After the first gradient that is not finite it is `stopped`: no weight is updated any more.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.optimizer, self.stopped, self._squares = optimizer, False, []
        for parameter in model.parameters():
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
