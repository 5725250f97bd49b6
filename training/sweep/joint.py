"""One optimiser step of several variants: rows that hold samples of more than one, and one pass over the base for each.

The samples of all variants' steps are put into rows together, so rows are nearly full however small each one's step is,
and when a variant ends or is dropped the others have its place. In a row each variant has one stretch. The loss of a
variant depends on its own stretch and adapter alone, so one backward pass through the sum of all gives each its own
gradient.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from batching import Batch
from ops.devices import to_device
from ops.forks import Forks
from training.metrics import Found, Sums
from training.sweep.layers import VariantModel

if TYPE_CHECKING:
    from training.build import Run

Samples = dict[int, list[int]]  # numbers of samples, by the number of the variant


def joint_rows(runs: dict[int, Run], steps: Samples, budget: int) -> list[Samples]:
    """The rows of at most `budget` positions into which the samples of all steps go; one that is longer has its own.

    Variants follow one another, so that a row has few of them: each one's products in it are then larger. steps: the
    samples of each variant's step. A pure function of its arguments.
    """
    rows, room = [], 0
    for number, samples in steps.items():
        lengths = dict(zip(samples, runs[number].train.lengths[samples].tolist(), strict=True))
        for sample in sorted(samples, key=lambda i: (-lengths[i], i)):
            if lengths[sample] > room:
                rows.append({})
                room = budget
            rows[-1].setdefault(number, []).append(sample)
            room -= lengths[sample]
    return rows


def joint_passes(model: VariantModel, runs: dict[int, Run], steps: Samples, budget: int) -> dict[int, Found]:
    """Leave in each variant's adapter the gradient of its own step: a forward and a backward pass for each row."""
    any_run = next(iter(runs.values()))
    fabric, s = any_run.fabric, any_run.settings
    units = {n: runs[n].train.unit_counts[samples].sum().item() for n, samples in steps.items()}
    losses = {n: torch.zeros((), device=fabric.device) for n in steps}
    sums, positions = {n: Sums(runs[n]) for n in steps}, dict.fromkeys(steps, 0)
    for row in joint_rows(runs, steps, budget):
        batches = {n: own_batch(runs[n], samples) for n, samples in row.items()}
        tokens = torch.cat([batch.tokens for batch in batches.values()], dim=1)
        sizes = [batch.tokens.size(1) for batch in batches.values()]
        model.stretches[:] = zip(row, stretches(sizes), strict=True)
        offsets = joined([batch.offsets for batch in batches.values()])
        trained = torch.zeros((), device=fabric.device)
        with fabric.autocast():
            x = model.model.hidden_states(to_device(tokens, fabric.device), recompute=s.recompute, offsets=offsets)
            for (n, batch), own in zip(batches.items(), x.split(sizes, dim=1), strict=True):
                result = runs[n].objective.losses(model.model, own, batch)
                trained = trained + result.trained / units[n]
                losses[n] += result.summed / units[n]
                sums[n].add(result, runs[n].train, row[n])
                positions[n] += result.positions
        fabric.backward(trained)
    return {n: Found(losses[n], sums[n], positions[n], positions[n]) for n in steps}  # packed: there is no padding


def own_passes(model: VariantModel, runs: dict[int, Run], steps: Samples, budget: int) -> dict[int, Found]:
    """The same with each variant's samples in rows of their own, after joint passes whose gradients are forgotten.

    Where attention to the samples of a row is masked, NaN in one of them makes all of them NaN: 0 * NaN is NaN.
    """
    found = {}
    for number, samples in steps.items():
        for adapter in model.by_variant[number].values():
            adapter.zero_grad()
        found |= joint_passes(model, {number: runs[number]}, {number: samples}, budget)
    return found


def own_batch(run: Run, samples: list[int]) -> Batch:
    """These samples of a variant as a packed row of their own."""
    return Batch(*run.train.packed(samples), run.objective.known(run.train, samples))


def stretches(sizes: list[int]) -> list[slice]:
    """Where stretches of these sizes lie, end to end."""
    return [slice(a, b) for a, b in itertools.pairwise([0, *itertools.accumulate(sizes)])]


def joined(offsets: list[list[int] | Forks]) -> list[int] | Forks:
    """The offsets of rows end to end."""
    if isinstance(offsets[0], Forks):
        return Forks(*(sum(parts, ()) for parts in zip(*offsets, strict=True)))
    starts = itertools.accumulate((each[-1] for each in offsets), initial=0)
    return [0, *(start + end for start, each in zip(starts, offsets, strict=False) for end in each[1:])]
