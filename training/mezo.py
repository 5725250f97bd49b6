"""MeZO: training by forward passes alone (Malladi et al. 2023, arXiv 2305.17333), in the memory of inference.

For a random direction z, N(0, 1) in every trainable weight, the loss is computed at theta + epsilon z and at
theta - epsilon z. Their difference over 2 epsilon is the gradient along z, the projected gradient; theta moves along z
by minus that times the learning rate. On average over z that is a step of SGD. No activation, gradient or moment is
kept, and z is never stored: the run's seed, the step and the weight's place give it again (SPSA with the same seed).

Weights are perturbed in place, and are back after the passes up to the rounding of three additions in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training.update_rules import generator_of

if TYPE_CHECKING:
    from training.settings import Settings

PIECE = 2**22  # numbers of z that exist at one time


class MeZO(torch.optim.Optimizer):
    """Moves the weights along z by the projected gradient, which `found` is told. It keeps no state."""

    def __init__(self, groups: list[dict], s: Settings):
        super().__init__(groups, {"lr": s.learning_rate, "weight_decay": 0.0})
        self.epsilon, self.seed, self.most = s.mezo_epsilon, s.seed, s.max_grad_norm
        self.number, self.projected = 0, None

    def sides(self, step: int) -> Iterator[int]:
        """Yield 0 while the weights are theta + epsilon z of a step (from 0), then 1 while theta - epsilon z."""
        self.number = step
        self._move(lambda group: self.epsilon)
        yield 0
        self._move(lambda group: -2 * self.epsilon)
        yield 1
        self._move(lambda group: self.epsilon)

    def found(self, losses: Tensor) -> None:
        """The losses of the step, over all devices, on the two sides: (2,)."""
        self.projected = (losses[0] - losses[1]) / (2 * self.epsilon)

    def take_norm(self) -> Tensor:
        """How large the projected gradient is, a scalar; then it is clipped to --max_grad_norm."""
        norm = self.projected.abs()
        if self.most:
            self.projected = self.projected.clamp(-self.most, self.most)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """Move every weight along z by minus the learning rate times the projected gradient, and let it decay."""
        projected = self.projected.item()
        for group in self.param_groups:
            for parameter in group["params"] if group["weight_decay"] else ():
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
        self._move(lambda group: -group["lr"] * projected)

    @torch.no_grad()
    def _move(self, along: Callable[[dict], float]) -> None:
        """Add z to all weights, times what `along` says for their group."""
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                generator = generator_of(parameter.device, self.seed, self.number, place)
                for piece in parameter.view(-1).split(PIECE):
                    z = torch.randn(piece.shape, generator=generator, device=piece.device)
                    piece.add_(z, alpha=along(group))
                place += 1
