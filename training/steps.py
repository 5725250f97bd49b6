"""The steps of a run: how many, and which micro-batches each one has. Pure functions of the settings and the data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from batching import PLANNERS, Samples, Step
from shell.cli import UserError

if TYPE_CHECKING:
    from training.settings import Settings


def steps_per_epoch(s: Settings, samples: Samples) -> int:
    """Optimiser steps that it takes to see every sample once."""
    return math.ceil(len(samples) / s.global_batch_size)


def total_steps(s: Settings, train: Samples) -> int:
    """The optimiser steps of the run, at most."""
    return s.max_steps or math.ceil(s.epochs * steps_per_epoch(s, train))


def planned_steps(s: Settings, samples: Samples, start: int, total: int) -> Iterator[tuple[int, Step]]:
    """The number and the micro-batches of each step from `start` to before `total`.

    Raises UserError if the planner breaks its contract (`batching.Planner`).
    """
    per_epoch = steps_per_epoch(s, samples)
    planned = None
    for step in range(start, total):
        epoch, place = divmod(step, per_epoch)
        if planned is None or place == 0:
            arguments = samples.lengths, samples.target_counts, s.global_batch_size, s.micro_batch_tokens, s.seed, epoch
            planned = PLANNERS[s.planner].plan(*arguments)
            if len(planned) != per_epoch:
                raise UserError(f"--planner {s.planner}: it planned {len(planned)} steps for an epoch of {per_epoch}")
        yield step, planned[place]


def dropout_seed(s: Settings, step: int, rank: int, world_size: int) -> int:
    """torch's random seed on a device for a step (from 0)."""
    return s.seed + 1_000_003 * (1 + step * world_size + rank)
