"""Optimisers that neither torch nor bitsandbytes has, and several as one. What they keep is in `state`, by parameter.

Beside tensors that are numbers, so that a checkpoint holds all of it (weights/checkpoint.py) and a resumed run goes on
with the same bits, wherever in an interval it was stopped. Nothing is kept in a group, and a step of one parameter does
not change what another one's does: so each may step when its gradient is there (--optimizer_in_backward).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from training.settings import Settings


def generator_of(device: torch.device, *numbers: int) -> torch.Generator:
    """Random numbers that depend on these whole numbers alone, such as a seed, a step and a parameter's place."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest) >> 1)


class Together(torch.optim.Optimizer):
    """Several optimisers over different parameters as one. Groups and state are those of its parts."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self.optimizers = optimizers
        for optimizer in optimizers:
            optimizer.state = self.state

    def step(self, closure: Callable | None = None) -> None:
        """Let each of them step."""
        for optimizer in self.optimizers:
            optimizer.step()


class Averaging(torch.optim.Optimizer):
    """An optimiser that trains other weights than those to validate and to save, which are an average."""

    def average(self) -> None:
        """Put the average in the weights' place, and keep those exactly in the state, as "y"."""
        raise NotImplementedError

    @torch.no_grad()
    def go_on(self) -> None:
        """Put the weights that train back."""
        for _, parameter in _with_groups(self):
            if "y" in self.state[parameter]:
                parameter.copy_(self.state[parameter].pop("y"))


class ScheduleFreeAdamW(Averaging):
    """AdamW that averages its weights, so that the rate need not fall (Defazio et al. 2024, arXiv 2405.15682).

    The model trains at y = (1 - beta1) z + beta1 x, where z takes AdamW's steps, without a first moment, and x is the
    mean of all z so far, each weighted by the square of the highest rate until then.

    The authors' package (schedulefree) turns y into x and back by arithmetic, which rounds: each validation would move
    the weights. It counts steps for a group, not for a parameter. So these lines are here, and a test compares them.
    """

    def __init__(self, groups: list[dict], s: Settings):
        super().__init__(groups, {"lr": s.learning_rate, "betas": s.betas, "eps": 1e-8, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """Update y and z of all weights that have a gradient."""
        for group, y in _with_groups(self, with_gradient=True):
            (beta1, beta2), rate, state = group["betas"], group["lr"], self.state[y]
            if not state:
                state.update(z=y.clone(), exp_avg_sq=torch.zeros_like(y), step=0, highest=0.0, weights=0.0)
            state["step"] += 1
            state["highest"] = max(state["highest"], rate)
            state["weights"] += state["highest"] ** 2
            c = state["highest"] ** 2 / state["weights"]  # the share of the newest z in the mean
            z, v = state["z"], state["exp_avg_sq"]
            v.mul_(beta2).addcmul_(y.grad, y.grad, value=1 - beta2)
            root = (v / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
            direction = (y.grad / root).add_(y, alpha=group["weight_decay"])
            y.lerp_(z, c).add_(direction, alpha=rate * (beta1 * (1 - c) - 1))
            z.sub_(direction, alpha=rate)

    @torch.no_grad()
    def average(self) -> None:
        """Put x in the place of y, which is kept."""
        for group, y in _with_groups(self):
            state = self.state[y]
            if "z" in state:
                state["y"] = y.clone()
                y.lerp_(state["z"], 1 - 1 / group["betas"][0])


class Apollo(torch.optim.Optimizer):
    """AdamW whose moments are those of a random projection of the gradient (Zhu et al. 2024, arXiv 2412.05270).

    They only say by how much each channel (row or column along the longer side) of the gradient is scaled. So the
    update has full rank, and a matrix (m, n) has moments of r times its longer side. The projection, N(0, 1 / r), is
    drawn anew every INTERVAL steps. It is never kept: a seed, the matrix's place and the step give it again.

    By hand: apollo-torch may not be used commercially and needs transformers; pytorch_optimizer keeps the projector as
    an object in the state, which cannot be saved without pickle.
    """

    INTERVAL = 200  # steps, as in the paper
    GROWTH = 1.01  # by which an update's norm may be larger than the one before (Fira, arXiv 2410.01623)

    def __init__(self, groups: list[dict], s: Settings):
        betas = {"betas": s.betas, "eps": 1e-8}
        super().__init__(groups, {"lr": s.learning_rate, **betas, "weight_decay": 0.0})
        self.rank, self.scale, self.seed = s.apollo_rank, s.apollo_scale, s.seed

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """Update all matrices that have a gradient."""
        for place, (group, weight) in enumerate(_with_groups(self)):
            if weight.grad is not None:
                update = self._update(place, weight, group)
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.to(weight.dtype), alpha=-group["lr"])

    def _update(self, place, weight, group):
        """What is subtracted from the weight, divided by the rate: of its shape, in fp32."""
        tall, state = weight.size(0) >= weight.size(1), self.state[weight]
        turned = (lambda matrix: matrix) if tall else torch.t
        G = turned(weight.grad).float()  # (channels, d)
        if not state:
            zeros = turned(G.new_zeros(len(G), self.rank)).contiguous()
            state.update(exp_avg=zeros, exp_avg_sq=zeros.clone(), norm=G.new_zeros(()), step=0)
        R = G @ self._projection(place, state["step"], G)  # (channels, r)
        state["step"] += 1
        (beta1, beta2), m, v = group["betas"], turned(state["exp_avg"]), turned(state["exp_avg_sq"])
        m.lerp_(R, 1 - beta1)
        v.mul_(beta2).addcmul_(R, R, value=1 - beta2)
        root = (v / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        adapted = m / (1 - beta1 ** state["step"]) / root
        factor = adapted.norm(dim=1, keepdim=True) / (R.norm(dim=1, keepdim=True) + 1e-8)
        update = self.scale * factor * G
        norm = update.norm()
        most = norm if state["step"] == 1 else state["norm"] * self.GROWTH
        limited = torch.minimum(norm, most)
        state["norm"].copy_(limited)
        update *= limited / norm.clamp(min=1e-30)
        return turned(update)

    def _projection(self, place, step, G):
        """(d, r) in fp32, where G is (channels, d)."""
        generator = generator_of(G.device, self.seed, place, step // self.INTERVAL)
        drawn = torch.randn(G.size(1), self.rank, generator=generator, device=G.device)
        return drawn / self.rank**0.5


def _with_groups(optimizer: torch.optim.Optimizer, with_gradient: bool = False) -> Iterator[tuple[dict, Tensor]]:
    """Each parameter of an optimiser after its group; with_gradient: only those that have one."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not with_gradient or parameter.grad is not None:
                yield group, parameter
