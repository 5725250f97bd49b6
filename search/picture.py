"""The picture of a search: the metric of each trial, which flags matter, learning curves, the metric by each flag."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from optuna.trial import FrozenTrial, TrialState

from search.ranges import Choices, Range
from search.search_file import Search
from shell.files import whole_file

PANELS_PER_ROW = 3
DONE, PRUNED, FAILED, BEST = "tab:blue", "tab:gray", "tab:red", "tab:orange"


def draw_search(search: Search, trials: list[FrozenTrial], importances: dict[str, float], path: Path) -> None:
    """Write the picture as a PNG. trials: all, the best first. importances: share by flag, the largest first."""
    rows = 1 + math.ceil(len(search.ranges) / PANELS_PER_ROW)
    figure = Figure(figsize=(15, 4.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, PANELS_PER_ROW, squeeze=False).flat)
    draw_trials(panels[0], search, trials)
    draw_curves(panels[1], search, trials)
    draw_importances(panels[2], importances)
    for panel, each in zip(panels[PANELS_PER_ROW:], search.ranges.values(), strict=False):
        draw_flag(panel, search, trials, each)
    for panel in panels[PANELS_PER_ROW + len(search.ranges) :]:
        panel.set_visible(False)
    for panel in panels:
        panel.grid(alpha=0.3)
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=110)


def draw_trials(panel: Axes, search: Search, trials: list[FrozenTrial]) -> None:
    """The metric of each trial by its number, and the best one up to there."""
    complete = of_state(trials, TrialState.COMPLETE)
    _points(panel, search, trials, lambda trial: trial.number)
    if complete:
        better = min if search.metric.direction == "minimize" else max
        in_order = sorted(complete, key=lambda trial: trial.number)
        best = list(itertools.accumulate((trial.value for trial in in_order), better))
        panel.step([t.number for t in in_order], best, where="post", color=BEST, label="best so far")
    failed = [trial.number for trial in of_state(trials, TrialState.FAIL)]
    if failed:
        bottom = panel.get_xaxis_transform()
        panel.plot(failed, [0.03] * len(failed), "v", color=FAILED, transform=bottom, label="failed")
    panel.set(title="trials", xlabel="trial", ylabel=search.metric.name)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8)


def draw_curves(panel: Axes, search: Search, trials: list[FrozenTrial]) -> None:
    """What the validations of each trial found, by the optimiser step; the pruned ones end in a cross."""
    lines = [trial for trial in trials if trial.intermediate_values]
    best = next(iter(of_state(trials, TrialState.COMPLETE)), None)
    for trial in reversed(lines):
        steps = sorted(trial.intermediate_values)
        values = [search.metric.at_validation(trial.intermediate_values[step]) for step in steps]
        pruned = trial.state == TrialState.PRUNED
        color = BEST if trial is best else PRUNED if pruned else DONE
        panel.plot(steps, values, color=color, linewidth=2 if trial is best else 1, alpha=1 if trial is best else 0.6)
        if pruned or trial is best:
            panel.plot(steps[-1:], values[-1:], "x" if pruned else "*", color=color, markersize=6 if pruned else 12)
    for label, color, mark in (("best", BEST, "*"), ("complete", DONE, ""), ("pruned", PRUNED, "x")):
        panel.plot([], [], color=color, marker=mark, label=label)
    found = [search.metric.at_validation(v) for trial in lines for v in trial.intermediate_values.values()]
    _scale(panel, found)
    panel.set(title="validations", xlabel="optimiser step", ylabel=search.metric.column)
    panel.legend(fontsize=8)


def draw_importances(panel: Axes, importances: dict[str, float]) -> None:
    """The share of each flag in the variance of the metric, as bars, the largest at the top."""
    panel.set(title="share of the variance that a flag explains (fANOVA)", xlim=(0, 1))
    if not importances:
        panel.text(0.5, 0.5, "needs more complete trials", ha="center", va="center", transform=panel.transAxes)
        panel.set_yticks([])
        return
    flags, shares = list(importances)[::-1], list(importances.values())[::-1]
    bars = panel.barh(flags, shares, color=DONE)
    panel.bar_label(bars, [f"{share:.0%}" for share in shares], padding=3, fontsize=9)
    panel.set_xlim(0, 1.12 * max(shares))


def draw_flag(panel: Axes, search: Search, trials: list[FrozenTrial], each: Range) -> None:
    """The metric of each trial by its value of one flag."""
    having = [trial for trial in trials if each.flag in trial.params]
    if isinstance(each, Choices):
        labels = each.grid()
        _points(panel, search, having, lambda trial: labels.index(trial.params[each.flag]))
        panel.set_xticks(range(len(labels)), [_label(value) for value in each.values])
        panel.set_xlim(-0.5, len(labels) - 0.5)
    else:
        _points(panel, search, having, lambda trial: trial.params[each.flag])
        if each.log:
            panel.set_xscale("log", base=2 if each.whole else 10)
            panel.xaxis.set_minor_formatter(NullFormatter())
            if each.whole:
                panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.set(xlabel=each.flag, ylabel=search.metric.name)


def of_state(trials: list[FrozenTrial], state: TrialState) -> list[FrozenTrial]:
    """Those of some trials that are in a state, in their order."""
    return [trial for trial in trials if trial.state == state]


def _points(panel, search, trials, x):
    """A point for each trial that has a value of the metric, at `x` of it. The best, which is the first, is a star."""
    kinds = [("complete", TrialState.COMPLETE, "o", DONE), ("pruned", TrialState.PRUNED, "x", PRUNED)]
    if search.metric.exact_match is not None:  # a pruned trial has none
        del kinds[1]
    for label, state, mark, color in kinds:
        points = [trial for trial in of_state(trials, state) if trial.value is not None]
        if points:
            panel.plot([x(t) for t in points], [t.value for t in points], mark, color=color, label=label, alpha=0.8)
    best = of_state(trials, TrialState.COMPLETE)[:1]
    panel.plot([x(t) for t in best], [t.value for t in best], "*", color=BEST, markersize=14)
    _scale(panel, [trial.value for trial in trials if trial.value is not None])


def _scale(panel, values):
    """A logarithmic axis, if some values would squash all others on a linear one."""
    values = [value for value in values if math.isfinite(value)]
    if values and min(values) > 0 and max(values) > 5 * min(values):
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())


def _label(value):
    """A choice under its points: lists item by item, in lines."""
    text = "\n".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else text[:59] + "…"
