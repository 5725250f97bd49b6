"""The steps of a run: how many, and which micro-batches each one has. Pure functions of the settings and the data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from batching import PLANNERS, Samples, Step
from shell.cli import UserError

if TYPE_CHECKING:
    from training.parallel.ranks import Ranks
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
            planner = PLANNERS[s.planner]
            lengths, counts = planner.lengths(samples), samples.target_counts
            planned = planner.plan(lengths, counts, s.global_batch_size, s.micro_batch_tokens, s.seed, epoch)
            if len(planned) != per_epoch:
                raise UserError(f"--planner {s.planner}: it planned {len(planned)} steps for an epoch of {per_epoch}")
            _check_samples(s, planned, len(samples))
        yield step, planned[place]


def dropout_seed(s: Settings, step: int, ranks: Ranks) -> int:
    """torch's random seed on a device for a step (from 0): another one for each along data."""
    return seeds_of_step(s, step, ranks.layout.data)[ranks.data_rank]


def seeds_of_step(s: Settings, step: int, count: int) -> range:
    """The random seeds of so many devices along data for a step."""
    first = s.seed + 1_000_003 * (1 + step * count)
    return range(first, first + 1_000_003 * count, 1_000_003)


def _check_samples(s, planned, N):
    """Raise UserError unless each of N samples is in one micro-batch of an epoch, and no micro-batch is empty."""
    micro_batches = [micro_batch for step in planned for micro_batch in step]
    counts = Counter(sample for micro_batch in micro_batches for sample in micro_batch)
    wrong = next((sample for sample in (*range(N), *counts) if counts[sample] != (0 <= sample < N)), None)
    if wrong is not None:
        raise UserError(f"--planner {s.planner}: sample {wrong} of {N} is in an epoch {counts[wrong]} times, not once")
    if not all(micro_batches):
        raise UserError(f"--planner {s.planner}: it planned a micro-batch without samples")
