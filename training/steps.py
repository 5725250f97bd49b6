"""The steps of a run: how many, and which micro-batches each one has. Pure functions of the settings and the data."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from batching import PLANNERS, BadPlan, Samples, Step, order_of
from shell.cli import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from training.parallel.ranks import Ranks
    from training.settings import Settings


LOOKED_AT = 1000  # steps, of which memory is predicted


def steps_per_epoch(s: Settings, samples: Samples) -> int:
    """Optimiser steps that it takes to see every sample once."""
    return math.ceil(len(samples) / s.global_batch_size)


def total_steps(s: Settings, train: Samples) -> int:
    """The optimiser steps of the run, at most."""
    return s.max_steps or math.ceil(s.epochs * steps_per_epoch(s, train))


def planned_steps(s: Settings, samples: Samples, start: int, total: int) -> Iterator[tuple[int, Step]]:
    """The number and the micro-batches of each step from `start` to before `total`, each planned when it is its turn.

    Shards that are streamed make room for others once a step has passed them. Raises UserError if the planner breaks
    its contract (`batching.Planner`).
    """
    stream = samples.shards.stream
    for step, window, planned in _planned(s, samples, start, total):
        if stream:
            stream.step = step
            stream.done(before=window)
        yield step, planned()


def looked_at(s: Settings, samples: Samples) -> Iterator[Step]:
    """The micro-batches of the first steps of a run, LOOKED_AT at most: those of which memory is predicted.

    Of a run whose shards are streamed, the next steps as far as their shards are here.
    """
    stream, total = samples.shards.stream, total_steps(s, samples)
    start, here = stream.step if stream else 0, None
    for _, window, planned in _planned(s, samples, start, min(start + LOOKED_AT, total)):
        here = here or window
        if stream and window != here:
            return
        yield planned()


def _planned(s, samples, start, total):
    """Of each step its number, the window in which it begins, and a function that plans it."""
    planner, per_epoch = PLANNERS[s.planner], steps_per_epoch(s, samples)

    def plan(place, draw, seen):
        drawn = draw(place)
        try:
            seen.check(drawn, place)
            return planner.plan(samples, drawn, s.micro_batch_tokens)
        except BadPlan as error:
            raise UserError(f"--planner {s.planner}: {error}") from None

    for step in range(start, total):
        epoch, place = divmod(step, per_epoch)
        if step == start or place == 0:
            order = order_of(samples, s.shuffle_window, s.seed, epoch)
            draw = planner.draw(order, planner.lengths(samples), s.global_batch_size)
            seen = Seen(len(samples), s.global_batch_size)
        window = epoch, order.window_of(place * s.global_batch_size)
        yield step, window, functools.partial(plan, place, draw, seen)


class Seen:
    """What can be seen of an epoch's samples without remembering them: whether each may be in one step, and just one.

    In each step they are distinct samples, and as many as there should be. Over an epoch that is seen from its
    beginning, their numbers and squares add up to those of all: samples that are left out, with others in their place,
    hardly ever do.
    """

    def __init__(self, N: int, global_batch_size: int):
        self.N, self.size, self.steps, self.sums = N, global_batch_size, 0, [0, 0]

    def check(self, drawn: Tensor, place: int) -> None:
        """Raise BadPlan unless `drawn` may be the samples of the step at this place in the epoch."""
        wrong = drawn[(drawn < 0) | (drawn >= self.N)]
        if len(wrong):
            raise BadPlan(f"sample {wrong[0]} of {self.N} is in a step")
        expected = min(self.size, self.N - place * self.size)
        short = self.N % self.size  # any step of the epoch may be the one that has fewer
        if len(drawn.unique()) != len(drawn) or len(drawn) not in (expected, self.size, short):
            raise BadPlan(f"step {place + 1} of an epoch has {len(drawn.unique())} samples, not {expected}")
        if place != self.steps:
            return
        self.steps += 1
        self.sums = [self.sums[0] + sum(drawn.tolist()), self.sums[1] + sum(i * i for i in drawn.tolist())]
        N = self.N
        if place == math.ceil(N / self.size) - 1 and self.sums != [N * (N - 1) // 2, (N - 1) * N * (2 * N - 1) // 6]:
            raise BadPlan("not each sample was in one step of the epoch")


def dropout_seed(s: Settings, step: int, ranks: Ranks) -> int:
    """torch's random seed on a device for a step (from 0): another one for each along data and pipeline."""
    data, stages = ranks.layout.data, ranks.layout.pipeline
    return seeds_of_step(s, step, data * stages)[ranks.stage * data + ranks.data_rank]


def seeds_of_step(s: Settings, step: int, count: int) -> range:
    """The random seeds of so many devices for a step."""
    first = s.seed + 1_000_003 * (1 + step * count)
    return range(first, first + 1_000_003 * count, 1_000_003)
