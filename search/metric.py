"""What the trials of a search are compared by: a column of metrics.csv, or the exact match of the answers to a file.

    metric: val_loss                                              # the default
    metric: forgetting                                            # another loss in metrics.csv: the lower the better
    metric: {column: teacher_agreement, direction: maximize}      # any column
    metric: {exact_match: test.jsonl, limit: 200, max_new_tokens: 128}   # and other flags of eval/exact_match.py

The value of a trial is that of its last row, so of the weights in its final/.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import exact_match_settings
from search import children
from shell import cli, files
from shell.cli import UserError
from tracking.run_files import METRICS, read_rows

RESULT = "exact_match.json"
OWN = ("data", "checkpoint_dir", "adapter_dir", "out_file")  # flags of exact match that a trial gives it
DIRECTIONS = ("minimize", "maximize")
LOSSES = re.compile(r"(val_)?(loss(/.+)?|cross_entropy|teacher_kl)|val_perplexity|forgetting")  # the lower the better
VALIDATION = "val_loss"  # the rows of metrics.csv that have a value here are the validations


@dataclass(frozen=True)
class Metric:
    """A column of metrics.csv and the direction in which a value of the metric is better.

    exact_match: the flags of eval/exact_match.py, if that is the metric; the column is then what pruning looks at.
    """

    column: str = VALIDATION
    direction: str = "minimize"
    exact_match: dict | None = None

    @property
    def name(self) -> str:
        """What the metric is called."""
        return self.column if self.exact_match is None else "exact match"

    def at_validation(self, value: float) -> float:
        """A value of the column so that the metric's direction is better, for the pruner."""
        return value if self.exact_match is None else -value


def read_metric(value: Any) -> Metric:
    """The metric that the file of a search asks for. Raises UserError if there is no such metric."""
    if value is None:
        return Metric()
    value = {"column": value} if isinstance(value, str) else value
    if not isinstance(value, dict) or ("column" in value) == ("exact_match" in value):
        raise UserError("metric: expected a column of metrics.csv, {column: …, direction: …} or {exact_match: FILE, …}")
    if "exact_match" in value:
        return _read_exact_match(dict(value))
    for key in value:
        if key not in ("column", "direction"):
            raise UserError(f"metric: unknown key {key!r}, there are column and direction")
    column, direction = value["column"], value.get("direction")
    if not isinstance(column, str):
        raise UserError(f"metric: column {column}: expected the name of a column of metrics.csv")
    if direction is None and not LOSSES.fullmatch(column):
        raise UserError(f"metric: which {column} is better? Give {{column: {column}, direction: minimize or maximize}}")
    if direction not in (None, *DIRECTIONS):
        raise UserError(f"metric: direction {direction}: expected {' or '.join(DIRECTIONS)}")
    return Metric(column, direction or "minimize")


def _read_exact_match(flags):
    data = flags.pop("exact_match")
    for flag in flags:
        if flag in OWN:
            raise UserError(f"metric: {flag} is what the trial gives: leave it out")
    where = "metric"
    values = cli.checked_values(exact_match_settings.Settings, flags | {"data": data, "adapter_dir": "."}, where)
    try:
        exact_match_settings.Settings(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Metric(direction="maximize", exact_match=flags | {"data": data})


def read_column(folder: Path, column: str, validations: bool = False) -> list[tuple[int, float]]:
    """(step, value) of each row of a run's metrics.csv that has a value for `column`. A last half line is not read.

    validations: only of the rows of a validation. Raises UserError as soon as it is clear that there will be none.
    """
    names, rows = read_rows(folder / METRICS)
    validated = [row for row in rows if row.get(VALIDATION)]
    never = column.startswith("val_") and validated and not any(row.get(column) for row in validated)
    if names and column not in names or never:
        there = ", ".join(name for name in names if name != column)
        raise UserError(
            f"metric {column}: {folder / METRICS} has no {column}: name another column, and another --out_dir; "
            f"there are {there}"
        )
    return [
        (int(row["step"]), float(row[column]))
        for row in rows
        if row.get(column) and (row.get(VALIDATION) or not validations)
    ]


def final_value(metric: Metric, folder: Path, lock: int, signals: children.Signals) -> float | None:
    """The value of a run that has ended, from its folder. Exact match is measured first, if it was not before.

    Returns None if a signal ended that. Raises UserError if there is no value, or no finite one.
    """
    if metric.exact_match is not None:
        return _exact_match(metric.exact_match, folder, lock, signals)
    values = read_column(folder, metric.column)
    if not values:
        raise UserError(
            f"metric {metric.column}: {folder}/metrics.csv has no value for it; its first line has the names"
        )
    if not math.isfinite(values[-1][1]):
        raise UserError(f"{metric.column} is {values[-1][1]}")
    return values[-1][1]


def _exact_match(flags, folder, lock, signals):
    result, final = folder / RESULT, folder / "final"
    if not result.is_file():
        kind = "adapter_dir" if (final / "adapter_config.json").is_file() else "checkpoint_dir"
        command = ["eval/exact_match.py", *as_arguments(flags | {kind: str(final), "out_file": str(result)})]
        with children.child(command, folder / "output.txt", lock, signals) as process:
            status = process.wait()
        if signals.received:
            return None
        if status:
            raise UserError(f"exact match: {last_error(folder / 'output.txt', status)}")
    return files.read_json(result)["exact_match"]


def as_arguments(flags: dict) -> list[str]:
    """Flags and their values as a command line has them."""
    return [f"--{flag}={value if isinstance(value, str) else json.dumps(value)}" for flag, value in flags.items()]


def last_error(output: Path, status: int) -> str:
    """Why a script ended with a status other than 0, in one line: its error, or the last line of a traceback."""
    lines = output.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines[-1:] if line.startswith("error: ")]
    if errors or status == 1 and lines:
        return (errors or lines)[-1]
    return f"ended with status {status}" if status >= 0 else f"was killed by signal {-status}"
