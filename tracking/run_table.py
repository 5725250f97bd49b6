"""Runs as a table: which columns it has, in which order the runs stand, and the table as text and as CSV."""

import csv
import fnmatch
import io
import json
import math
from typing import Any, NamedTuple

from shell.cli import UserError
from tracking.overview import Run, differing_settings

ALWAYS = ("step", "best_val_loss", "val_loss", "tokens", "time")
RESULTS = ("exact_match", "exact_match/*")  # that are shown where a run has them
LONGEST, NARROWEST, HEAD = 40, 10, 12  # characters of a text; of one that is cut for the terminal; of a line of a head


class Column(NamedTuple):
    """A column of the table: its name, and a value for each run, None where it has none."""

    name: str
    values: list[Any]

    @property
    def is_text(self) -> bool:
        """Whether it stands at the left."""
        return any(not is_number(value) for value in self.values if value is not None)


def is_number(value: Any) -> bool:
    """Whether a value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def table_of(runs: list[Run], defaults: dict[str, Any], more: list[str]) -> list[Column]:
    """The columns: name, state, settings that differ, numbers that are `ALWAYS` there, exact match, and more.

    defaults: as in `differing_settings`. more: names of numbers or settings, or patterns as in a shell. Raises
    UserError for one that no run has.
    """
    known = dict.fromkeys(name for run in runs for values in (run.numbers, run.settings) for name in values)
    wanted = [*ALWAYS, *(name for name in known if any(fnmatch.fnmatchcase(name, result) for result in RESULTS))]
    for pattern in more:
        found = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise UserError(f"--columns {pattern}: no run has it: there are {', '.join(known)}")
        wanted += found
    names = dict.fromkeys([*differing_settings(runs, defaults), *wanted])
    shown = [column_of(name, runs, defaults) for name in names]
    return [Column("run", [run.name for run in runs]), Column("state", [run.state for run in runs]), *shown]


def column_of(name: str, runs: list[Run], defaults: dict[str, Any]) -> Column:
    """The numbers of the runs that have this name, or else their settings."""
    if any(name in run.numbers for run in runs):
        return Column(name, [run.numbers.get(name) for run in runs])
    return Column(name, [run.settings.get(name, defaults.get(name)) for run in runs])


def in_order(runs: list[Run], by: str, descending: bool, defaults: dict[str, Any]) -> list[Run]:
    """The runs, sorted by the column of a name; those without a value come last. Raises UserError if none has one."""
    if by in ("run", "state"):
        values = [run.name if by == "run" else run.state for run in runs]
    else:
        values = column_of(by, runs, defaults).values
        known = dict.fromkeys(name for run in runs for part in (run.numbers, run.settings) for name in part)
        if by not in (*known, *ALWAYS):
            raise UserError(f"--sort {by}: no run has it: there are run, state, {', '.join(known)}")
    pairs = list(zip(values, runs, strict=True))
    have = [pair for pair in pairs if not is_missing(pair[0])]
    have.sort(key=lambda pair: sort_key(pair[0]), reverse=descending)
    return [run for _, run in have] + [run for value, run in pairs if is_missing(value)]


def is_missing(value: Any) -> bool:
    """Whether a value is none, or no number, which no order has a place for."""
    return value is None or isinstance(value, float) and math.isnan(value)


def sort_key(value: Any) -> tuple[bool, float, str]:
    """Numbers before texts."""
    return (False, value, "") if is_number(value) else (True, 0, as_text(value))


# -------------------------------------------------------------------------------------------------------------- text


def as_text(value: Any, name: str = "") -> str:
    """A value as a reader wants it, a time in hours, minutes and seconds. name: of its column."""
    if value is None:
        return "-"
    if name == "time":
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
    if is_number(value):
        if isinstance(value, int):
            return f"{value:,}" if abs(value) >= 10_000 else str(value)
        return f"{value:.4f}" if "loss" in name else f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def cut(text: str, most: int) -> str:
    """A text with its middle left out if it is longer than `most`: beginnings and ends tell names apart."""
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def as_csv(columns: list[Column]) -> str:
    """The whole table as CSV, with numbers as they are."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([column.name for column in columns])
    for row in zip(*(column.values for column in columns), strict=True):
        writer.writerow([value if is_number(value) or value is None else as_text(value) for value in row])
    return file.getvalue()


def as_lines(columns: list[Column], width: int | None = None) -> list[str]:
    """The table as lines of text, at most `width` characters wide: texts are cut, then settings are left out.

    The last line names what was left out. Name, state and `ALWAYS` stay in any case.
    """
    columns, left_out = list(columns), []
    first = [column.name for column in columns].index(ALWAYS[0])
    settings = {column.name for column in columns[2:first]}
    cells = [[as_text(value, column.name) for value in column.values] for column in columns]
    while True:
        widths = fitting_widths(columns, cells, width)
        less = [i for i in range(2, len(columns)) if columns[i].name not in ALWAYS]
        if width is None or line_width(widths) <= width or not less:
            break
        last = max([i for i in less if columns[i].name in settings] or less)
        left_out.insert(0, columns[last].name)
        del columns[last], cells[last]
    left = [column.is_text for column in columns]
    lines = [
        "  ".join(map(aligned, row, widths, left)).rstrip() for row in (*heads(columns), *zip(*cells, strict=True))
    ]
    return lines + [f"left out, to fit in {width} columns: {', '.join(left_out)} (--csv has all)"] * bool(left_out)


def line_width(widths: list[int]) -> int:
    """Characters of a line with columns of these widths."""
    return sum(widths) + 2 * (len(widths) - 1)


def fitting_widths(columns: list[Column], cells: list[list[str]], width: int | None) -> list[int]:
    """Widths of the columns, in characters; those of texts become narrower, the widest first, to fit in `width`."""
    least = [max(map(len, head_lines(column.name))) for column in columns]
    widths = [max(head, *map(len, own)) if own else head for head, own in zip(least, cells, strict=True)]
    widths = [min(w, max(head, LONGEST)) if c.is_text else w for w, head, c in zip(widths, least, columns, strict=True)]
    while width is not None and line_width(widths) > width:
        can = [i for i, c in enumerate(columns) if c.is_text and widths[i] > max(NARROWEST, least[i])]
        if not can:
            break
        widths[max(can, key=lambda i: widths[i])] -= 1
    return widths


def heads(columns: list[Column]) -> list[tuple[str, ...]]:
    """The rows above the table. A long name stands in several, so that its column can be narrow."""
    split = [head_lines(column.name) for column in columns]
    height = max(map(len, split))
    return list(zip(*([""] * (height - len(lines)) + lines for lines in split), strict=True))


def head_lines(name: str) -> list[str]:
    """A name in lines of at most `HEAD` characters where its underscores and slashes allow it."""
    lines = [""]
    for part in name.replace("_", "_\n").replace("/", "/\n").split("\n"):
        if lines[-1] and len(lines[-1] + part) > HEAD:
            lines.append("")
        lines[-1] += part
    return lines


def aligned(text: str, width: int, left: bool) -> str:
    """A cell: cut, and filled up with spaces."""
    text = cut(text, width)
    return text.ljust(width) if left else text.rjust(width)
