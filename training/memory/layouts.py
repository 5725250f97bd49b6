"""What each device of a layout sends in a step, by calculation: for --plan, and to propose the fastest that fits.

Nothing here is measured. A sum over n devices sends 2 (n - 1) / n of its bytes from each, gathering or sharing out
(n - 1) / n (ring algorithms: Patarasuk and Yuan 2009). Times are as if nothing were sent while a device computes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from training.memory import plan
from training.parallel.layout import Layout


class Traffic(NamedTuple):
    """Bytes that a device sends in a step: gradients and weights over data, activations over tensor and pipeline."""

    gradients: float
    weights: float
    activations: float

    def seconds(self, link: float) -> float:
        """How long that takes at so many bytes a second."""
        return sum(self) / link


def traffic(job: plan.Job, layout: Layout, passes: int, positions: int) -> Traffic:
    """The `Traffic` of a run whose devices have so many micro-batches in a step, of so many positions together."""
    data, tensor = layout.data, layout.tensor
    held = plan.predictor_of(dataclasses.replace(job, shares=1, gradients="kept")).fixed
    stored, gradients = held["weights"] + held["adapters"], held["gradients"]
    ring = (data - 1) / data
    # With --shard weights are gathered for each pass, forward and backward, and gradients shared out after it.
    over_data = (passes * ring * gradients, 2 * passes * ring * stored) if layout.shard else (2 * ring * gradients, 0.0)
    # Attention and the MLP of each block: a sum going forward and one backward, and those going forward once more where
    # they are computed again.
    again = 1.0 if job.recompute == "offload" else job.recompute
    sums = 2 * len(job.in_stage.layers) * (2 + again)
    width = job.config.hidden_size * (job.autocast or job.dtype).itemsize
    over_pipeline = min(2, layout.pipeline - 1)  # to the next stage, and back to the one before
    return Traffic(*over_data, (sums * 2 * (tensor - 1) / tensor + over_pipeline) * positions * width)


def divisions(world_size: int, devices: int) -> Iterator[dict]:
    """The flags of each layout of so many devices, `devices` of them on a node, beyond which tensor does not go."""
    for pipeline, tensor in itertools.product(range(1, world_size + 1), range(1, devices + 1)):
        if world_size % (pipeline * tensor) == 0 and devices % tensor == 0:
            sizes = {"pipeline": pipeline, "data": world_size // (pipeline * tensor), "tensor": tensor}
            for shard in (False, True) if sizes["data"] > 1 else (False,):
                parallel = ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
                yield {"parallel": parallel, "shard": shard}


class Proposal(NamedTuple):
    """A layout by its flags, a device's peak in bytes, --micro_batch_tokens, and a step's seconds: all, and sending."""

    flags: dict
    peak: float
    tokens: int
    seconds: float
    sending: float

    def row(self, budget: float, with_tokens: bool) -> str:
        """A line of a table. with_tokens: whether it is to have --micro_batch_tokens."""
        fits = "" if self.peak <= budget else "  does not fit"
        flags = f"--parallel {self.flags['parallel']}" + " --shard" * self.flags["shard"]
        tokens = f" --micro_batch_tokens {self.tokens:<7}" * with_tokens
        step = f"{self.seconds:9.3g} s a step, {self.sending:8.3g} of it sending"
        return f"  {flags:38}{tokens} {self.peak / 1e9:8.2f} GB {step}{fits}"


def table(proposals: list[Proposal], budget: float) -> str:
    """Their rows. Those whose micro-batches were chosen to fit show of how many tokens they are."""
    with_tokens = len({each.tokens for each in proposals}) > 1
    return "\n".join(each.row(budget, with_tokens) for each in proposals)


def fastest(proposals: list[Proposal], budget: float) -> Proposal | None:
    """Of those that fit the one with the shortest step; None if none fits."""
    return min((each for each in proposals if each.peak <= budget), key=lambda each: each.seconds, default=None)


def passes_of(shapes: list[plan.Shape], layout: Layout) -> int:
    """How many micro-batches a device has, of those of a step: one for each stage at least."""
    return max(layout.pipeline, math.ceil(len(shapes) / layout.data))


def idle(layout: Layout, steps: list[list[plan.Shape]]) -> float:
    """The share of a step in which a device of a pipeline waits for others, on average."""
    turns = [passes_of(shapes, layout) + layout.pipeline - 1 for shapes in steps]
    return sum((layout.pipeline - 1) / each for each in turns) / len(turns)
