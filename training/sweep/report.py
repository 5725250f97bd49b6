"""What a sweep leaves beside its variants' folders: a table of all of them, and a picture of their losses."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from shell.files import whole_file
from tracking.curves import running_mean, span_of
from training.run_folder import plain
from training.sweep.variants import Sweep

if TYPE_CHECKING:
    from training.sweep.loop import Variant

NUMBERS = ("steps", "tokens", "loss_last", "val_loss", "best_val_loss")


def write(out_dir: Path, sweep: Sweep, variants: list[Variant], memory: dict[str, int]) -> None:
    """Print the table of all variants, the best first, and write `sweep.csv` and `sweep.png`.

    memory: the peak of the whole process as "predicted" and as "measured", in bytes.
    """
    rows = sorted(
        map(table_row, variants), key=lambda row: (bool(row["ended"]), row["val_loss"] or row["loss_last"] or 0)
    )
    differing = differing_flags(sweep)
    for row in rows:
        row.update({flag: plain(sweep.variants[row["variant"]])[flag] for flag in differing})
    columns = ["variant", *differing, *NUMBERS, "ended"]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(out_dir / "sweep.csv") as file:
        file.write_bytes(text.getvalue().encode())
    plot(out_dir / "sweep.png", variants)
    print(as_text(rows, columns))
    peaks = ", ".join(f"{memory[kind] / 1e9:.2f} GB {kind}" for kind in ("predicted", "measured"))
    print(f"peak memory of all together: {peaks}")
    print(f"written to {out_dir}: a folder for each variant, sweep.csv, sweep.png")


def table_row(variant: Variant) -> dict:
    """What the table says of a variant beside its settings."""
    rows, losses = variant.metrics.rows, variant.metrics.column("val_loss")[1]
    return {
        "variant": variant.name,
        "steps": variant.done,
        "tokens": int(sum(row["tokens"] for row in rows)),
        "loss_last": rows[-1]["loss"] if rows else None,
        "val_loss": losses[-1] if losses else None,
        "best_val_loss": min(losses) if losses else None,
        "ended": variant.ended,
    }


def differing_flags(sweep: Sweep) -> list[str]:
    """The flags in which variants differ, but for their folders."""
    settings = [plain(own) for own in sweep.variants.values()]
    values = {flag: {json.dumps(each[flag], default=str) for each in settings} for flag in settings[0]}
    return [flag for flag, found in values.items() if len(found) > 1 and flag != "out_dir"]


def as_text(rows: list[dict], columns: list[str]) -> str:
    """The table for the screen: columns as wide as they need to be, those that are empty left out."""
    shown = [column for column in columns if any(row.get(column) not in (None, "") for row in rows)]
    cells = [shown, *([_cell(row.get(column)) for column in shown] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(shown))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _cell(value):
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(path: Path, variants: list[Variant]) -> None:
    """Training losses (running means) and validation losses of all variants in one picture each, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    unit = variants[0].metrics.unit
    figure, (training, validation) = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    colors = plt.colormaps["tab10" if len(variants) <= 10 else "tab20"].colors
    for variant in variants:
        color = colors[variant.number % len(colors)]
        steps, losses = variant.metrics.column("loss")
        training.plot(steps, running_mean(losses, span_of(losses)), color=color, label=variant.name)
        line = "o--" if variant.ended else "o-"
        validation.plot(*variant.metrics.column("val_loss"), line, markersize=4, color=color)
    training.set(title="training (running mean)", ylabel=f"loss per {unit} (nats)", yscale="log")
    validation.set(title="validation (dashed: dropped)")
    for panel in (training, validation):
        panel.set(xlabel="optimiser step")
        panel.grid(alpha=0.3, which="both")
    figure.legend(*training.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(variants)))
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    plt.close(figure)
    with whole_file(path) as file:
        file.write_bytes(image.getvalue())
