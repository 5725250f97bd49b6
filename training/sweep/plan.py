"""Peak memory of a sweep, predicted: the plan of its largest variant, and what the others keep beside it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

from training.memory import budget, plan
from training.steps import total_steps
from training.sweep.variants import Sweep

if TYPE_CHECKING:
    from batching import Samples
    from training.settings import Settings

OWN = ("adapters", "gradients", "moments")  # of each variant; all else is shared


def predicted_parts(s: Settings, sweep: Sweep, train: dict[str, Samples]) -> tuple[Counter, str]:
    """Bytes by part at the peak of a joint step, and the name of the variant whose plan that begins with.

    A row may hold the longest samples of all: of the most positions, each variant's targets may be in it.
    """
    own = {}
    for name, settings in sweep.variants.items():
        fixed = plan.Predictor(budget.plan_job(settings)).fixed
        own[name] = Counter({part: fixed[part] for part in OWN})
    largest = max(own, key=lambda name: own[name].total())
    samples = train[largest]
    longest = max(each.longest() for each in train.values())
    settings = dataclasses.replace(sweep.variants[largest])
    together = sum(each.positions() for each in train.values())
    positions = max(longest, min(s.micro_batch_tokens, together))
    parts = plan.Predictor(budget.plan_job(settings)).parts(plan.full_shape(samples, positions))
    return sum((own[name] for name in own if name != largest), parts), largest


def predicted_peak(s: Settings, sweep: Sweep, train: dict[str, Samples]) -> int:
    """Predicted bytes at the peak of the sweep."""
    return predicted_parts(s, sweep, train)[0].total()


def print_plan(s: Settings, sweep: Sweep, train: dict[str, Samples]) -> None:
    """Print for --plan the memory of all variants together, beside that of the largest alone."""
    parts, largest = predicted_parts(s, sweep, train)
    alone = budget.predicted_peak(sweep.variants[largest], train[largest])
    print(f"{len(sweep.variants)} variants in rows of {s.micro_batch_tokens} positions:")
    print("\n".join(f"  {part:18} {parts[part] / 1e9:9.3f} GB" for part in plan.PARTS))
    print(f"  {'together':18} {parts.total() / 1e9:9.3f} GB; {largest} alone: {alone / 1e9:.3f} GB")
    for name, own in sweep.variants.items():
        print(f"{name}: {total_steps(own, train[name])} steps")
