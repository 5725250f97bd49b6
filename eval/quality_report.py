"""What quality.py found, as tables on the terminal and as charts."""

import math
from pathlib import Path
from typing import Literal, NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lora import PROJECTIONS
from quantize import QUANTIZERS
from shell.files import whole_file

LEAST = 1e-8  # nats: divergences below it are fp32's rounding; a logarithmic axis begins here
PANELS_PER_ROW = 4


class Column(NamedTuple):
    """A measurement of all variants: a value for each, None where there is none, and the axis to draw them on."""

    values: list[float | None]
    axis: Literal["linear", "log", "percent"]


def metrics_of(report: dict) -> dict[str, float]:
    """Every measurement of every variant by a name such as adapter:bnb.nf4/task/reference/kl."""
    found, waiting = (
        {},
        {row["variant"]: {k: v for k, v in row.items() if k != "variant"} for row in report["variants"]},
    )
    while waiting:
        name, value = waiting.popitem()
        if isinstance(value, dict):
            waiting |= {f"{name}/{key}": below for key, below in value.items()}
        elif value is not None:
            found[name] = value
    return dict(sorted(found.items()))


def show_report(report: dict) -> None:
    """Print a line for each variant, and what the adapter did to general text."""
    columns = columns_of(report)
    width = max(len(row["variant"]) for row in report["variants"])
    print(f"{'':{width}}  " + "  ".join(columns))
    for number, row in enumerate(report["variants"]):
        cells = (f"{cell(column.values[number]):>{len(title)}}" for title, column in columns.items())
        print(f"{row['variant']:{width}}  " + "  ".join(cells))
    reference = report["reference"]
    for name in ("task", "general"):
        if name in reference:
            found = reference[name]
            print(f"reference, on {found['targets']} {name} targets: perplexity {found['perplexity']:.4g}")
    if "base general" in reference:
        print(f"without the adapter: perplexity {reference['base general']['perplexity']:.4g} on the general text")


def cell(value: float | None) -> str:
    """A value as the table and the chart show it."""
    if value is None:
        return ""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def columns_of(report: dict) -> dict[str, Column]:
    """The columns of a report that have any value, by title."""
    rows = report["variants"]

    def values(*keys, scale=1.0):
        found = []
        for row in rows:
            for key in keys:
                row = row.get(key) if isinstance(row, dict) else None
            found.append(None if row is None else scale * row)
        return found

    columns = {
        "weights MB": Column(values("weight_bytes", scale=1e-6), "linear"),
        "peak MB": Column(values("peak_bytes", scale=1e-6), "linear"),
        "tokens/s": Column(values("tokens_per_second"), "linear"),
        "exact match %": Column(values("exact_match", scale=100), "percent"),
    }
    for name in ("task", "general"):
        columns[f"{name} perplexity"] = Column(values(name, "perplexity"), "linear")
        columns[f"{name} KL"] = Column(values(name, "reference", "kl"), "log")
        columns[f"{name} agreement %"] = Column(values(name, "reference", "agreement", scale=100), "percent")
    columns["forgotten KL"] = Column(values("general", "base", "kl"), "log")
    return {title: column for title, column in columns.items() if any(value is not None for value in column.values)}


def draw_report(report: dict, path: Path) -> None:
    """A panel for each column, with a bar for each variant, as a PNG."""
    columns, names = columns_of(report), [row["variant"] for row in report["variants"]]
    height = -(-len(columns) // PANELS_PER_ROW)
    figure = Figure(figsize=(15, 0.8 + height * (0.9 + 0.26 * len(names))), layout="constrained")
    panels = figure.subplots(height, PANELS_PER_ROW, sharey=True, squeeze=False)
    for panel, (title, column) in zip(panels.flat, columns.items(), strict=False):
        draw_bars(panel, column)
        panel.set_title(title, fontsize=10)
        panel.set_yticks(range(len(names)), names)
    panels[0, 0].invert_yaxis()
    for panel in list(panels.flat)[len(columns) :]:
        panel.set_visible(False)
    model = report["settings"]["adapter_dir"] or report["settings"]["checkpoint_dir"]
    figure.suptitle(f"{model}: KL (nats a token) and agreement with the reference in fp32; forgotten: KL from the base")
    save(figure, path)


def draw_bars(panel: Axes, column: Column) -> None:
    """Horizontal bars with their numbers beside them, or inside where a bar leaves no room for its number."""
    least = LEAST if column.axis == "log" else 0
    lengths = [least if value is None else max(value, least) for value in column.values]
    bars = panel.barh(range(len(lengths)), lengths, color="tab:blue", log=column.axis == "log")
    if column.axis == "percent":
        limits = (0, 100)
        panel.set_xticks(range(0, 101, 20))
    elif column.axis == "log":
        longest = max(*lengths, 10 * LEAST)
        limits = (LEAST, longest * (longest / LEAST) ** 0.35)
        panel.locator_params(axis="x", numticks=5)
    else:
        limits = (0, 1.3 * max(lengths) or 1)
    panel.set_xlim(limits)
    for bar, value in zip(bars, column.values, strict=True):
        inside = column.axis == "percent" and bar.get_width() > 75
        panel.annotate(
            cell(value),
            (bar.get_width(), bar.get_y() + bar.get_height() / 2),
            xytext=(-3 if inside else 3, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=8,
            color="white" if inside else "black",
        )
    panel.grid(axis="x", alpha=0.3)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG."""
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


# --------------------------------------------------------------------------------------------------------- sensitivity


def show_layers(found: dict, most: int = 10) -> None:
    """Print the layers that suffer most for the bytes that quantising them saves, and the bytes and KL of plans."""
    rows = sorted(found["layers"], key=lambda row: -per_megabyte(row))
    print("layers that suffer most, KL in nats a token, and that for each MB saved:")
    for row in rows[:most]:
        print(f"  {row['layer']:40} {row['quantizer']:11} {row['kl']:.2e} {per_megabyte(row):.2e}")
    print("plans for all layers: MB of the layers, bits a weight, KL, and the sum of KL of each layer alone:")
    for name, plan in found["plans"].items():
        print(
            f"  {name:11} {plan['bytes'] / 1e6:10.3f} {plan['bits_per_weight']:6.3f} {plan['kl']:.2e} "
            f"{plan['kl_of_layers_alone']:.2e}"
        )


def per_megabyte(row: dict) -> float:
    """Divergence for each 10^6 bytes that the quantiser saves of 16 bits a weight."""
    return 1e6 * row["kl"] / (2 * row["weights"] - row["bytes"])


def draw_layers(found: dict, path: Path) -> None:
    """For each quantiser a map of the divergence that each layer causes, block by projection, as a PNG."""
    names = [name for name in QUANTIZERS if any(row["quantizer"] == name for row in found["layers"])]
    blocks = 1 + max(int(row["layer"].split(".")[2]) for row in found["layers"])
    figure = Figure(figsize=(max(7, 1.5 + 0.3 * blocks), 0.8 + 2.4 * len(names)), layout="constrained")
    kls = [max(row["kl"], LEAST) for row in found["layers"]]
    for panel, name in zip(figure.subplots(len(names), 1, squeeze=False).flat, names, strict=True):
        grid = [[math.nan] * blocks for _ in PROJECTIONS]
        for row in found["layers"]:
            if row["quantizer"] == name:
                _, _, block, *_, projection = row["layer"].split(".")
                grid[PROJECTIONS.index(projection)][int(block)] = max(row["kl"], LEAST)
        norm = LogNorm(min(kls), max(max(kls), 1.01 * min(kls)))
        image = panel.imshow(grid, norm=norm, cmap="viridis", aspect="auto")
        panel.set_yticks(range(len(PROJECTIONS)), PROJECTIONS)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set(title=f"only this layer in {name}", xlabel="block")
        figure.colorbar(image, ax=panel, label="KL, nats a token")
    save(figure, path)
