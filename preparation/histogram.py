"""Histograms of lengths for the report: the geometry that report.html draws as SVG."""

import itertools
import math

import numpy as np


def short(number: float) -> str:
    """12000 as 12k, 1500000 as 1.5M, for the labels of an axis."""
    return f"{number / 1e6:g}M" if number >= 1e6 else f"{number / 1e3:g}k" if number >= 1e4 else f"{number:,}"


def histograms(names: list[str], lengths: list[tuple[np.ndarray, np.ndarray]]) -> list[dict]:
    """A histogram for each source, as the geometry of an SVG. All have the same horizontal axis.

    lengths: as `details["lengths"]`.
    """
    every = [array for pair in lengths for array in pair if len(array)]
    if not every:
        return []
    longest, shortest = max(int(array.max()) for array in every), min(int(np.percentile(array, 5)) for array in every)
    wide = longest > 20 * (1 + shortest)
    # One source has the page's width, up to four stand in twos, more in threes.
    width, height = (1120, 300) if len(names) == 1 else (548, 240) if len(names) <= 4 else (357, 200)
    frame = {"width": width, "height": height, "left": 52, "right": width - 16, "top": 10, "bottom": height - 38}
    edges = _edges(longest, wide, bins=min(64, width // 10))

    def x(value):
        # A length of 0 has a place on log(1 + length) too.
        share = math.log1p(value) / math.log1p(edges[-1]) if wide else value / edges[-1]
        return frame["left"] + (frame["right"] - frame["left"]) * share

    ticks = _ticks_log(longest, x) if wide else _ticks(longest, count=width // 60)
    x_ticks = [(round(x(tick + 0.5), 1), tick) for tick in ticks]  # below the middle of a bin of one length
    return [
        frame | {"name": name, "log": wide, "x_ticks": x_ticks} | _panel(frame, edges, x, pair)
        for name, pair in zip(names, lengths, strict=True)
    ]


def _panel(frame, edges, x, pair):
    """What one histogram has for itself: curves, vertical axis, and the figures of its caption."""
    counts = [np.histogram(array, edges)[0] for array in pair]
    most = max(1, *(int(count.max()) for count in counts))

    def y(value):
        return frame["bottom"] - (frame["bottom"] - frame["top"]) * value / most

    return {
        "samples": len(pair[0]),
        "curves": [_outline(count, edges, x, y) for count in counts],
        "medians": [float(np.median(array)) if len(array) else 0 for array in pair],
        "longest": [int(array.max(initial=0)) for array in pair],
        "y_ticks": [(round(y(tick), 1), tick) for tick in _ticks(most, count=6)],
    }


def _edges(longest, wide, bins):
    """Edges between whole numbers, evenly spaced or evenly on log(1 + length)."""
    last = math.log1p(longest + 1) if wide else longest + 1
    even = np.expm1(np.linspace(0, last, bins + 1)) if wide else np.linspace(0, last, bins + 1)
    return np.unique(np.ceil(even - 1e-9).astype(np.int64))


def _outline(counts, edges, x, y):
    """An SVG path: the steps of a histogram, each stretch of bins that are not empty from the ground to the ground."""
    path, bins = [], zip(counts.tolist(), edges[:-1], edges[1:], strict=True)
    for filled, stretch in itertools.groupby(bins, lambda bin: bin[0] > 0):
        if filled:
            stretch = list(stretch)
            steps = "".join(f"V{y(count):.1f}H{x(right):.1f}" for count, _, right in stretch)
            path.append(f"M{x(stretch[0][1]):.1f} {y(0):.1f}{steps}V{y(0):.1f}")
    return "".join(path)


def _ticks(last, count):
    """Round numbers from 0 up to `last`, at most about `count` of them."""
    rough = max(1, last / count)
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return list(range(0, last + 1, step))


def _ticks_log(last, x):
    """0, 1, 2, 5, 10, … up to `last`, or coarser where their labels would touch. x: length to pixels."""
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [0, *(f * 10**p for p in range(len(str(last))) for f in factors if f * 10**p <= last)]
        # A digit is 7.6 pixels wide; half of each of two neighbours' labels lies between their ticks.
        letters = [(len(short(a)) + len(short(b))) / 2 for a, b in itertools.pairwise(ticks)]
        gaps = [x(b + 0.5) - x(a + 0.5) for a, b in itertools.pairwise(ticks)]
        if all(gap > 7.6 * n + 3 for gap, n in zip(gaps, letters, strict=True)):
            break
    return ticks
