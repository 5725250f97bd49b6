"""The largest micro-batch of a run, once before the first step: if memory is short, it is now."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from ops.allocator import no_more_than
from training.memory import budget
from training.memory.machine import free_memory
from training.optimizer import OPTIMIZERS, InBackward
from training.parallel.pipeline import pipelined_passes

if TYPE_CHECKING:
    from collections.abc import Callable

    from training.build import Run


def memory_dry_run(run: Run, forward: Callable) -> None:
    """Run the largest micro-batch of all epochs through `forward(run, samples, indices)` and backward, and forget it.

    Memory is allocated for what a later step has and the first has not: AdamW's moments, and the gradients of earlier
    micro-batches. No number of the run changes: not the weights, not the optimiser, not the random numbers.
    """
    s, model, device = run.settings, run.model, run.fabric.device
    indices, most = budget.largest_planned_micro_batch(s, run.train)
    in_backward = isinstance(run.optimizer, InBackward)
    if in_backward:
        run.optimizer.stopped = True
        run.optimizer.expect(most)
    random_state = torch.random.fork_rng([device] if device.type == "cuda" else [])
    limit = no_more_than(free_memory("cpu")) if device.type == "cpu" else contextlib.nullcontext()
    with random_state, limit, torch.set_grad_enabled(OPTIMIZERS[s.optimizer].gradient == "backward"):
        held = budget.memory_of_later_steps(s, model, run.optimizer, gradients=most > run.ranks.layout.data)
        if run.ranks.link:  # as many as a stage holds at one time, at most
            pipelined_passes(run, [indices] * run.ranks.layout.pipeline, 0, 1)
        else:
            trained = forward(run, run.train, indices).trained
            if trained.requires_grad:
                trained.backward()
    if in_backward:
        run.optimizer.take_norm()
        run.optimizer.stopped = False
    model.zero_grad()
    del held
