"""runs.html, the page of all runs: a table, curves that can be hovered, and what each run was made of.

The page is one file: style, data and script (runs.js) are inline, nothing is loaded, and its policy lets no other
script run. All text is escaped by the template beside this file.
"""

import base64
import hashlib
import math
import os
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from shell.files import read_json, whole_file
from tracking.curves import running_mean, span_of, thinned
from tracking.overview import SAME_RESULT, Run
from tracking.run_files import RECORD, data_of_run, read_results
from tracking.run_table import Column, as_text, is_number


class ChartOf(NamedTuple):
    """A chart of the page: a column of metrics.csv, how its axis is, whether its curves are running means."""

    column: str
    title: str
    log: bool = False
    smooth: bool = False


CHARTS = (
    ChartOf("loss", "training loss, running mean (nats)", log=True, smooth=True),
    ChartOf("val_loss", "validation loss (nats)", log=True),
    ChartOf("loss", "training loss, each step (nats)", log=True),
    ChartOf("grad_norm", "gradient norm", log=True),
    ChartOf("learning_rate", "learning rate"),
    ChartOf("tokens_per_second", "tokens/s"),
    ChartOf("memory_gb", "memory (GB)"),
)
COLUMNS = tuple(dict.fromkeys(chart.column for chart in CHARTS))
POINTS, ALL_POINTS, FEWEST_POINTS = 1000, 200_000, 100  # of a curve, of the page (3 MB), of a curve of very many
HERE = Path(__file__).parent


def write_page(path: Path, runs: list[Run], table: list[Column], defaults: dict[str, Any]) -> None:
    """Write the page. runs: with the columns of `CHARTS`. table: as `table_of` returns it, rows as in `runs`.

    defaults: of the settings, for what a run has changed.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=lambda value: printable(value) if type(value) is str else value,
    )  # fmt: skip
    script = (HERE / "runs.js").read_text(encoding="utf-8")
    page = environment.get_template("runs.html").render(
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        table=[[cell_of(column, i) for column in table] for i in range(len(runs))],
        columns=table,
        runs=[details(run, path.absolute().parent, defaults) for run in runs],
        charts=[chart.title for chart in CHARTS],
        data={"runs": [printable(run.name) for run in runs], "charts": charts(runs)},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write_text(page, encoding="utf-8", newline="\n")


def printable(text: str) -> str:
    """A text without control characters, nor halves of surrogate pairs, which no file can hold."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def cell_of(column: Column, i: int) -> dict[str, Any]:
    """A cell: its text, whether it is a text, and what it is sorted by, "" if it has no value."""
    value = column.values[i]
    key = "" if value is None else value if is_number(value) else as_text(value)
    return {"text": as_text(value, column.name), "is_text": column.is_text, "key": key}


def charts(runs: list[Run]) -> list[dict[str, Any]]:
    """What the script draws: of each chart whether its axis is logarithmic, and of each run a curve, or null."""
    curves = sum(chart.column in run.curves for run in runs for chart in CHARTS)
    most = max(FEWEST_POINTS, min(POINTS, ALL_POINTS // max(1, curves)))
    return [{"log": chart.log, "curves": [curve(run, chart, most) for run in runs]} for chart in CHARTS]


def curve(run: Run, chart: ChartOf, most: int) -> list[list[float]] | None:
    """Steps and values of a run, thinned to so many points, values to five digits; null for what is no number."""
    if chart.column not in run.curves:
        return None
    steps, values = run.curves[chart.column]
    steps, values = thinned(steps, running_mean(values, span_of(values)) if chart.smooth else values, most)
    return [steps, [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]]


def details(run: Run, page_dir: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    """What the page tells of a run below the curves; texts by name. page_dir: from which links lead."""
    record = read_json(run.folder / RECORD) if (run.folder / RECORD).is_file() else {}
    environment = dict(record.get("environment", {}))
    packages = environment.pop("packages", {})
    settings = {
        name: {"text": as_text(value), "changed": name not in SAME_RESULT and value != defaults.get(name, value)}
        for name, value in run.settings.items()
    }
    results = [
        {"kind": r.kind, "model": r.model, "data": r.data, "metrics": {n: as_text(v) for n, v in r.metrics.items()}}
        for r in read_results(run.folder)
    ]
    return {
        "name": run.name,
        "state": run.state,
        "settings": settings,
        "hashes": record.get("hashes", {}),
        "git": {name: as_text(value) for name, value in (record.get("git") or {}).items()},
        "environment": {name: as_text(value) for name, value in environment.items()},
        "packages": {name: as_text(value) for name, value in packages.items()},
        "results": results,
        "links": links(run, page_dir),
    }


def links(run: Run, page_dir: Path) -> dict[str, str]:
    """Relative addresses, by what they lead to, of the files of a run that are there."""
    data_dir = data_of_run(run.folder)
    files = {"losses by matplotlib": run.folder / "loss.png"}
    files |= {"report of its data": data_dir / "report.html"} if data_dir else {}
    found = {what: path for what, path in files.items() if path.is_file()}
    return {what: quote(os.path.relpath(path.absolute(), page_dir)) for what, path in found.items()}
