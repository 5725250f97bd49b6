"""The learning rate of each step, by the number of steps or by the clock (--time_budget), and when a run ends."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from shell import cli

if TYPE_CHECKING:
    from training.settings import Settings

RECENT = {"step": 50, "validation": 4, "save": 4}  # over how many recent measurements a mean is taken, about
REPORT_SECONDS = 5  # what the prediction, the plot and the summary take at the end of a run, about


# --schedule: the share of the learning rate at a progress from 0 (after the warm-up) to 1.
SCHEDULES = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


def learning_rate(s: Settings, step: int, total: int) -> float:
    """The rate of a step (from 0): a linear warm-up that starts above zero, then the schedule down to zero."""
    return rate_at(s, step, (step - s.warmup_steps) / max(1, total - s.warmup_steps))


def rate_at(s: Settings, step: int, progress: float) -> float:
    """As `learning_rate`, but from the progress after the warm-up, from 0 to 1."""
    if step < s.warmup_steps:
        return s.learning_rate * (step + 1) / (s.warmup_steps + 1)
    return s.learning_rate * SCHEDULES[s.schedule](progress)


class Schedule:
    """Which learning rate a step has, what is due after it, and whether another one follows.

    total: steps of the run at most. validates: whether there is anything to validate on. state: what `state` returned
    at the checkpoint that is resumed.
    """

    def __init__(self, s: Settings, total: int, validates: bool, state: dict | None = None):
        self.s, self.total = s, total
        self.intervals = {"validation": s.eval_interval if validates else 0, "save": s.save_interval}
        seconds = cli.number_of_seconds(s.time_budget, "time_budget") if s.time_budget else math.inf
        self.clock = TimeBudget(seconds, s.started, state)

    def state(self) -> dict | None:
        """What a checkpoint must hold for the time budget to go on; None without one."""
        return self.clock.state() if self.s.time_budget else None

    def rate(self, step: int) -> float:
        """The learning rate of a step (from 0)."""
        if self.s.time_budget:
            return rate_at(self.s, step, self.clock.progress)
        return learning_rate(self.s, step, self.total)

    def timed(self, what: str) -> contextlib.AbstractContextManager:
        """Measure how long a "step", a "validation" or a "save" takes: the block under `with`."""
        return self.clock.measuring(what)

    def due(self, done: int) -> set[str]:
        """What is due after so many steps: "validation", "save"."""
        return {what for what, interval in self.intervals.items() if interval and done % interval == 0}

    def is_over(self, done: int, validation_seconds: float) -> bool:
        """Whether the run ends after so many steps. To be asked once after each step.

        validation_seconds: what a validation would take, for as long as none was measured.
        """
        if done > self.s.warmup_steps:
            self.clock.advance(self.total - done, self.intervals)
        if self.intervals["validation"]:
            self.clock.guess("validation", validation_seconds)
        return done == self.total or not self.clock.another_fits(self.due(done))

    def describe(self) -> str:
        """The course of the learning rate in a line, and in a second one if the run ends within its warm-up."""
        s, steps = self.s, f"{self.total} steps"
        if s.time_budget:
            steps = f"{s.time_budget}, at most {steps}"
        first = learning_rate(s, 0, self.total)
        warmup = f"{s.warmup_steps} warm-up steps from {first:.3g}, " if s.warmup_steps else ""
        course = f"then {s.schedule}" if s.warmup_steps else s.schedule
        line = f"learning rate: {warmup}{course} from {s.learning_rate:.3g}"
        if not s.time_budget:
            line += f", {learning_rate(s, self.total - 1, self.total):.3g} in the last step"
        line += f" ({steps})"
        if s.warmup_steps >= self.total:
            line += (
                f"\nnote: the run ends within its {s.warmup_steps} warm-up steps, below --learning_rate "
                f"{s.learning_rate:g}: lower --warmup_steps"
            )
        return line


class TimeBudget:
    """How far a run is through its wall-clock time: its place on the schedule, and whether another step fits.

    How many steps there will be is not known beforehand. After each step the number still to come is estimated: the
    time left, less the last validation and the saving of `final/`, over the time of a step with its share of the
    periodic validations and saves. The progress moves by a step's share of what is left: evenly when steps take as
    long as they did, never backwards, and to the end with the last step. `mean` has the measured seconds of a "step", a
    "validation" and a "save".

    seconds: of the whole run; infinite if it has no budget. started: time.monotonic() when this session began.
    state: what `state` returned at the checkpoint that is resumed. Time after that, in a session that was killed, is
    not counted.
    """

    def __init__(self, seconds: float, started: float, state: dict | None = None):
        self.seconds, self.started = seconds, started
        state = state or {"spent": 0.0, "progress": 0.0, "mean": {}, "count": {}}
        self._earlier, self.progress = state["spent"], state["progress"]
        self.mean, self._count = dict(state["mean"]), Counter(state["count"])

    def state(self) -> dict:
        """Everything a resumed run must know, as JSON values."""
        return {"spent": self.spent(), "progress": self.progress, "mean": self.mean, "count": dict(self._count)}

    def spent(self) -> float:
        """Seconds since the start, over all sessions of the run."""
        return self._earlier + time.monotonic() - self.started

    @contextlib.contextmanager
    def measuring(self, what: str) -> Iterator[None]:
        """Time the block. The first one, which is slow, is soon forgotten by the mean."""
        before = time.monotonic()
        yield
        seconds = time.monotonic() - before
        weight = max(1 / max(1, self._count[what]), 1 / RECENT[what])
        self.mean[what] = weight * seconds + (1 - weight) * self.mean.get(what, 0.0)
        self._count[what] += 1

    def guess(self, what: str, seconds: float) -> None:
        """Assume this time for as long as none was measured."""
        if not self._count[what]:
            self.mean[what] = seconds

    def _left(self):
        """Seconds for steps."""
        last = 1.25 * (self.mean.get("validation", 0.0) + self.mean.get("save", 0.0))
        return self.seconds - self.spent() - last - REPORT_SECONDS

    def another_fits(self, due: Collection[str] = ()) -> bool:
        """Whether there is time for another step after what is `due` before it."""
        return self._left() >= self.mean["step"] + sum(self.mean.get(what, 0.0) for what in due)

    def advance(self, most: int, intervals: dict[str, int]) -> None:
        """Move the progress past a step. most: steps still to come at most. intervals: steps between what recurs."""
        each = self.mean["step"] + sum(self.mean.get(what, 0.0) / n for what, n in intervals.items() if n)
        still = min(most, max(0.0, self._left() / each))
        self.progress += (1 - self.progress) / (still + 1)
