"""Two runs side by side: what differs in their settings and in what they were made of, their numbers, their losses."""

import io
import textwrap
from pathlib import Path
from typing import Any

from shell.files import read_json, whole_file
from tracking.curves import log_axis, running_mean, span_of
from tracking.overview import Run, differing_settings
from tracking.run_files import RECORD
from tracking.run_table import as_text, cut

COMPARED = ("loss", "val_loss")  # columns of metrics.csv that the picture has
LONGEST = 48  # characters of a value
HASH = 12  # digits of a hash that are shown
Rows = list[tuple[str, str, str]]


def compared(a: Run, b: Run, defaults: dict[str, Any]) -> list[str]:
    """What differs between two runs, and their numbers, as lines. defaults: as in `differing_settings`."""
    records = [read_json(run.folder / RECORD) if (run.folder / RECORD).is_file() else {} for run in (a, b)]
    differing, same = made_of(*records)
    numbers = [name for name in dict.fromkeys([*a.numbers, *b.numbers]) if name != "version"]
    sections = {
        "settings that differ": [
            (name, *(as_text(run.settings.get(name, defaults.get(name))) for run in (a, b)))
            for name in differing_settings([a, b], defaults)
        ],
        "what else they were made of that differs": differing,
        "numbers": [(name, *(as_text(run.numbers.get(name), name) for run in (a, b))) for name in numbers],
    }
    lines = side_by_side([("run", a.name, b.name), ("state", a.state, b.state)], sections)
    named = textwrap.wrap(f"the same: {', '.join(same)}", 100, initial_indent="  ", subsequent_indent="    ")
    place = lines.index("numbers") - 1
    return lines[:place] + (named if same else []) + lines[place:]


def made_of(a: dict, b: dict) -> tuple[Rows, list[str]]:
    """From two contents of record.json: rows of what differs in hashes, commit and environment; names of what does not.

    What neither has is left out.
    """
    flat = [flat_record(record) for record in (a, b)]
    names = dict.fromkeys(name for record in flat for name in record)
    values = {name: [record.get(name) for record in flat] for name in names}
    rows = [(name, as_text(one), as_text(other)) for name, (one, other) in values.items() if one != other]
    return rows, [name for name, (one, other) in values.items() if one == other and not name.startswith("package ")]


def flat_record(record: dict) -> dict[str, Any]:
    """The parts of a record.json that tell what a run was made of, each by a name; of packages "package NAME"."""
    hashes, git = record.get("hashes", {}), record.get("git") or {}
    environment = dict(record.get("environment", {}))
    packages = environment.pop("packages", {})
    found = {name: value[:HASH] if len(value) == 64 else value for name, value in hashes.items()}
    if git:
        found["commit"] = git.get("commit", "")[:HASH] + (" and changes" if git.get("changed") else "")
    return found | environment | {f"package {name}": version for name, version in packages.items()}


def side_by_side(head: Rows, sections: dict[str, Rows]) -> list[str]:
    """Lines: a name and two values in each row; the sections, each with its title, below the head."""
    rows = head + [row for own in sections.values() for row in own]
    first, second = (max(len(cut(row[i], LONGEST)) for row in rows) for i in (0, 1))

    def line(row: tuple[str, str, str], indent: int) -> str:
        name, one, other = (cut(text, LONGEST) for text in row)
        return f"{' ' * indent}{name.ljust(first + 2 - indent)}  {one.ljust(second)}  {other}"

    lines = [line(row, 0) for row in head]
    for title, own in sections.items():
        lines += ["", title, *(line(row, 2) for row in own)] if own else ["", title, "  none"]
    return lines


def draw_losses(runs: list[Run], path: Path) -> None:
    """Draw the training losses, smoothed, and the validation losses of runs, which have `COMPARED`, in one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(11, 6), layout="constrained")
    for run, color in zip(runs, ("tab:blue", "tab:orange"), strict=True):
        steps, losses = run.curves.get("loss", ([], []))
        panel.plot(steps, running_mean(losses, span_of(losses)), color=color, alpha=0.6, label=f"{run.name}, training")
        label = f"{run.name}, validation"
        panel.plot(*run.curves.get("val_loss", ([], [])), "o-", color=color, markersize=5, linewidth=2, label=label)
    log_axis(panel, "loss (nats)")
    panel.set(xlabel="optimiser step", title="training (running mean) and validation")
    panel.grid(alpha=0.3)
    panel.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write_bytes(image.getvalue())
