"""The lines of gpu.jsonl as a table of one part, and as a picture of all: tokens/s by side, and shares of limits."""

import json

from bench.measuring import OURS, machine_name, print_table, summarize

# For each part: what a panel shows of a line, its axis, and how a figure is written. The medians of a name count.
PANELS = {
    "training": (("tokens_per_second", "tokens/s", "{:,.0f}"), ("share", "share of the product measured", "{:.1%}")),
    "decoding": (("tokens_per_second", "tokens/s", "{:,.0f}"), ("share", "share of the bandwidth", "{:.1%}")),
    "kernels": (("microseconds", "microseconds", "{:,.1f}"), ("share", "share of the bandwidth", "{:.1%}")),
}
OTHER_COLUMNS = {
    "mfu": ("MFU", "{:.1%}"), "peak_gb": ("GB", "{:.2f}"), "plan": ("predicted / measured GB", "{:.3f}"),
    "first_loss": ("first loss", "{:.3f}"),
}  # fmt: skip


def read_lines(path):
    """The lines of a file, [] if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def of_part(lines, part):
    """The lines of a part."""
    return [line for line in lines if line["part"] == part]


def medians(lines, part):
    """A row for each name of the part's lines that have what its panels show."""
    keys = tuple(key for key, *_ in PANELS[part])
    return summarize(
        [line for line in lines if all(isinstance(line.get(k), int | float) for k in keys)], ("name",), keys
    )


def print_rows(lines):
    """Print a table of the lines of one part, and what has no place in it in words."""
    part = lines[0]["part"] if lines else None
    panels = PANELS.get(part, ())
    first = {line["name"]: line for line in reversed(lines)}
    rows = medians(lines, part) if panels else []
    columns = {"median": "{name}", "runs": "{runs}"}
    for key, heading, form in panels:
        columns[heading] = form.replace("{", "{" + key)
    for key, (heading, form) in OTHER_COLUMNS.items():
        if any(first[row["name"]].get(key) is not None for row in rows):
            columns[heading] = "{" + key + "}"
            for row in rows:
                value = first[row["name"]].get(key)
                row[key] = "" if value is None else form.format(value)
    if rows:
        print_table(columns, rows)
    known = {row["name"] for row in rows}
    for line in lines:
        if line["name"] not in known:
            said = line.get("skipped") or line.get("failed")
            print(f"{line['name']}: {said or in_words(line)}")


def in_words(line):
    """The figures of a line that has no place in a table."""
    left_out = (
        "call",
        "settings",
        "machine",
        "versions",
        "commit",
        "nominal_tflops",
        "part",
        "name",
        "kernels",
        "sha256",
    )
    return ", ".join(f"{key} {value}" for key, value in line.items() if key not in left_out)


def draw(lines, path):
    """Draw all parts that have lines, one below the other, ours in orange."""
    parts = {part: medians(of_part(lines, part), part) for part in PANELS}
    parts = {part: rows for part, rows in parts.items() if rows}
    if not parts:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [len(rows) + 2 for rows in parts.values()]  # in bars; 2 for title and axis
    figure, axes = plt.subplots(
        len(parts), 2, figsize=(14, 0.3 * sum(heights) + 1), layout="constrained", squeeze=False, height_ratios=heights,
    )  # fmt: skip
    figure.suptitle(machine_name(next(line["machine"] for line in lines if "machine" in line)), fontsize=11)
    for (part, rows), panels in zip(parts.items(), axes, strict=True):
        draw_part(part, rows, panels)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_part(part, rows, panels):
    """Draw the two panels of a part; in training the peer's bars are blue."""
    colours = ["tab:blue" if part == "training" and OURS not in row["name"] else "tab:orange" for row in rows]
    for panel, (key, unit, form) in zip(panels, PANELS[part], strict=True):
        bars = panel.barh(range(len(rows)), [row[key] for row in rows], color=colours)
        panel.bar_label(bars, labels=[form.format(row[key]) for row in rows], padding=3, fontsize=8)
        panel.set(xlabel=unit, xmargin=0.12, yticks=[])
        panel.invert_yaxis()  # the first at the top
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    panels[0].set_title(part, loc="left", fontsize=10)
