"""Curves of metrics.csv for a reader: smoothed, with fewer points, on an axis for losses."""

import math
from itertools import accumulate
from typing import Any


def running_mean(values: list[float], span: int) -> list[float]:
    """The mean of each value and those before it, `span` of them at most; of those that are finite, NaN if none is."""
    sums = [0.0, *accumulate(value if math.isfinite(value) else 0.0 for value in values)]
    counts = [0, *accumulate(map(math.isfinite, values))]
    first = [max(0, i - span) for i in range(len(sums))]
    pairs = [(sums[i] - sums[first[i]], counts[i] - counts[first[i]]) for i in range(1, len(sums))]
    return [total / count if count else math.nan for total, count in pairs]


def span_of(values: list) -> int:
    """How many losses are meant together where a curve is shown smoothed."""
    return max(2, len(values) // 20)


def log_axis(panel: Any, label: str) -> None:
    """The vertical axis of a panel of matplotlib for losses: on a linear one the first steps squash all others."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    panel.set(yscale="log", ylabel=label)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def thinned(steps: list[int], values: list[float], most: int) -> tuple[list[int], list[float]]:
    """A curve with at most `most` points, 4 or more: its ends, and of each stretch between the lowest and the highest.

    So a spike of one step stays in the picture.
    """
    if len(values) <= most:
        return steps, values
    last, stretches = len(values) - 1, (most - 2) // 2
    kept = {0, last}
    for i in range(stretches):
        stretch = range(1 + i * (last - 1) // stretches, 1 + (i + 1) * (last - 1) // stretches)
        if stretch:
            kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    numbers = sorted(kept)
    return [steps[i] for i in numbers], [values[i] for i in numbers]
