"""The runs below a folder, and what a reader wants to know of each: state, settings, final numbers, curves."""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shell.cli import UserError
from shell.files import read_json
from tracking.run_files import (
    FINAL,
    METRICS,
    RESULTS,
    SOURCE,
    SUMMARY,
    TRACKING,
    is_locked,
    is_run,
    read_columns,
    read_results,
    read_settings,
)
from tracking.sending import status_of

NUMBERS = ("val_loss", "tokens", "seconds")  # columns of metrics.csv from which `numbers_of` are
WITHIN = {FINAL, SOURCE, RESULTS, TRACKING}  # folders of a run in which no other run is
SAME_RESULT = {  # settings that say where things lie or what is kept, not what a run is
    "out_dir", "resume", "replay", "plan", "plan_tflops", "plan_link", "memory_budget", "save_interval", "keep_last",
    "keep_best", "logger", "log_adapter", "sweep",
}  # fmt: skip


class Run(NamedTuple):
    """A run as its folder tells it. name: its path from the folder in which it was looked for.

    state: "finished", "running" or "stopped". settings: by the flag's name. numbers: by name, see `numbers_of`.
    curves: steps and values of columns of metrics.csv.
    """

    folder: Path
    name: str
    state: str
    settings: dict[str, Any]
    numbers: dict[str, float]
    curves: dict[str, tuple[list[int], list[float]]]


def find_runs(folder: Path) -> Iterator[Path]:
    """The folders of runs in `folder` and below it, in the order of their names; links to folders are followed."""
    seen = set()
    for place, below, _ in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # by another link, perhaps to a folder above it
            below.clear()
            continue
        seen.add(real)
        if is_run(Path(place)):
            yield Path(place)
            below[:] = [name for name in below if name not in WITHIN and not re.fullmatch(r"step-\d+", name)]
        below[:] = sorted(name for name in below if name[0] != ".")


def read_runs(folder: Path, damaged: Callable[[UserError], None], curves: Iterable[str] = ()) -> list[Run]:
    """All runs in and below a folder. damaged: is told of each that cannot be read. curves: as in `read_run`."""
    runs = []
    for path in find_runs(folder):
        try:
            runs.append(read_run(path, str(path.relative_to(folder)) if path != folder else path.name, curves))
        except (UserError, OSError) as error:  # the latter of one that is removed just now
            damaged(UserError(error))
    return runs


def read_run(folder: Path, name: str, curves: Iterable[str] = ()) -> Run:
    """A run, with these columns of metrics.csv. Raises UserError for damaged files."""
    columns = read_columns(folder / METRICS, {*NUMBERS, "step", *curves})
    shown = {name: columns[name] for name in curves if name in columns}
    state = "running" if is_locked(folder) else status_of(folder)
    return Run(folder, name, state, read_settings(folder), numbers_of(folder, columns), shown)


def numbers_of(folder: Path, columns: dict[str, tuple[list[int], list[float]]]) -> dict[str, float]:
    """The numbers that a run has come to, by name: of its steps, of summary.json, and results of evaluations.

    columns: "step" and `NUMBERS` of metrics.csv.
    """
    steps, losses = columns.get("step", ([], []))[0], columns.get("val_loss", ([], []))[1]
    real = [loss for loss in losses if not math.isnan(loss)]
    found = {
        "step": steps[-1] if steps else 0,
        "best_val_loss": min(real, default=None),
        "val_loss": losses[-1] if losses else None,
        "tokens": int(sum(columns.get("tokens", ((), ()))[1])),
        "time": sum(columns.get("seconds", ((), ()))[1]),
    }
    summary = read_json(folder / SUMMARY) if (folder / SUMMARY).is_file() else {}
    kinds = int | float
    found = {name: value for name, value in summary.items() if isinstance(value, kinds) and name != "steps"} | found
    for result in read_results(folder):
        found |= result.names()
    return {name: value for name, value in found.items() if value is not None}


def differing_settings(runs: list[Run], defaults: dict[str, Any]) -> list[str]:
    """The settings that are not the same in all runs, but for those that cannot change a result.

    defaults: by flag; a run from a time when a flag was not there counts as one with its default.
    """
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [run.settings.get(name, defaults.get(name)) for run in runs] for name in names}
    return [name for name, own in values.items() if name not in SAME_RESULT and any(v != own[0] for v in own)]
