"""What quality.py found, as tables on the terminal and as charts."""

from matplotlib.figure import Figure

from lora import PROJECTIONS
from quantize import QUANTIZERS
from shell.files import whole_file

LEAST = 1e-8  # nats: below it divergences are the rounding of fp32, and a logarithmic axis needs an end


def show(report):
    """Print a line for each variant, and what the adapter did to general text."""
    columns = {title: values for title, (values, _) in columns_of(report).items()}
    width = max(len(row["variant"]) for row in report["variants"])
    print(f"{'':{width}}  " + "  ".join(columns))
    for number, row in enumerate(report["variants"]):
        cells = (f"{cell(values[number]):>{len(title)}}" for title, values in columns.items())
        print(f"{row['variant']:{width}}  " + "  ".join(cells))
    how = report["reference"]
    for name in ("task", "general"):
        if name in how:
            print(f"reference, on {how[name]['targets']} {name} targets: perplexity {how[name]['perplexity']:.4g}")
    if "base general" in how:
        print(f"without the adapter: perplexity {how['base general']['perplexity']:.4g} on the general text")


def cell(value):
    if value is None:
        return ""
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"


def columns_of(report):
    """{title: (a value for each variant, whether its axis is logarithmic)} of what was measured."""
    rows = report["variants"]

    def column(*keys, scale=1.0):
        values = []
        for row in rows:
            for key in keys:
                row = row.get(key) if isinstance(row, dict) else None
            values.append(None if row is None else scale * row)
        return values

    columns = {
        "weights MB": (column("weight_bytes", scale=1e-6), False),
        "peak MB": (column("peak_bytes", scale=1e-6), False),
        "tokens/s": (column("tokens_per_second"), False),
        "exact match %": (column("exact_match", scale=100), False),
    }
    for name in ("task", "general"):
        columns[f"{name} perplexity"] = column(name, "perplexity"), False
        columns[f"{name} KL"] = column(name, "reference", "kl"), True
        columns[f"{name} agreement %"] = column(name, "reference", "agreement", scale=100), False
    columns["forgotten KL"] = column("general", "base", "kl"), True
    return {title: column for title, column in columns.items() if any(value is not None for value in column[0])}


def draw(report, path):
    """A panel for each column, a bar in it for each variant, as a PNG."""
    columns, names = columns_of(report), [row["variant"] for row in report["variants"]]
    per_row = 4
    height = -(-len(columns) // per_row)
    figure = Figure(figsize=(15, 0.8 + height * (0.9 + 0.26 * len(names))), layout="constrained")
    panels = figure.subplots(height, per_row, sharey=True, squeeze=False)
    for panel, (title, (values, logarithmic)) in zip(panels.flat, columns.items(), strict=False):
        draw_bars(panel, title, values, logarithmic)
        panel.set_yticks(range(len(names)), names)
    panels[0, 0].invert_yaxis()
    for panel in list(panels.flat)[len(columns) :]:
        panel.set_visible(False)
    figure.suptitle(f"{report['settings']['adapter_dir'] or report['settings']['checkpoint_dir']}: "
                    "KL from the adapter as trained, in fp32, nats a token")  # fmt: skip
    save(figure, path)


def draw_bars(panel, title, values, logarithmic):
    """Horizontal bars with their numbers beside them."""
    lengths = [0 if value is None else max(value, LEAST) if logarithmic else value for value in values]
    bars = panel.barh(range(len(values)), lengths, color="tab:blue", log=logarithmic)
    panel.bar_label(bars, ["" if value is None else cell(value) for value in values], padding=3, fontsize=8)
    panel.set_title(title, fontsize=10)
    panel.margins(x=0.25)
    if logarithmic:
        left, right = LEAST / 2, max(lengths)
        panel.set_xlim(left, max(right, 10 * LEAST) * (right / left) ** 0.35)
        panel.locator_params(axis="x", numticks=5)
    panel.grid(axis="x", alpha=0.3)


def save(figure, path):
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


# --------------------------------------------------------------------------------------------------------- sensitivity


def show_layers(found, most=10):
    """Print the layers that suffer most for the bytes that quantising them saves, and what whole plans come to."""
    rows = sorted(found["layers"], key=lambda row: -per_megabyte(row))
    print("layers that suffer most, KL in nats a token, alone and for each MB saved:")
    for row in rows[:most]:
        print(f"  {row['layer']:40} {row['quantizer']:11} {row['kl']:.2e} {per_megabyte(row):.2e}")
    print("all layers by a plan: MB of the layers, bits a weight, KL, and the sum of the layers' own:")
    for name, plan in found["plans"].items():
        print(
            f"  {name:11} {plan['bytes'] / 1e6:10.3f} {plan['bits_per_weight']:6.3f} {plan['kl']:.2e} "
            f"{plan['kl_of_layers_alone']:.2e}"
        )


def per_megabyte(row):
    """Divergence for each 10^6 bytes that the quantiser saves of 16 bits a weight."""
    return 1e6 * row["kl"] / (2 * row["weights"] - row["bytes"])


def draw_layers(found, path):
    """For each quantiser a map of what the projections of each block suffer, as a PNG."""
    from matplotlib.colors import LogNorm

    names = [name for name in QUANTIZERS if any(row["quantizer"] == name for row in found["layers"])]
    blocks = 1 + max(int(row["layer"].split(".")[2]) for row in found["layers"])
    figure = Figure(figsize=(max(7, 1.5 + 0.3 * blocks), 0.8 + 2.4 * len(names)), layout="constrained")
    kls = [max(row["kl"], LEAST) for row in found["layers"]]
    for panel, name in zip(figure.subplots(len(names), 1, squeeze=False).flat, names, strict=True):
        grid = [[LEAST] * blocks for _ in PROJECTIONS]
        for row in found["layers"]:
            if row["quantizer"] == name:
                _, _, block, *_, projection = row["layer"].split(".")
                grid[PROJECTIONS.index(projection)][int(block)] = max(row["kl"], LEAST)
        norm = LogNorm(min(kls), max(max(kls), 1.01 * min(kls)))
        image = panel.imshow(grid, norm=norm, cmap="viridis", aspect="auto")
        panel.set_yticks(range(len(PROJECTIONS)), PROJECTIONS)
        panel.set(title=f"only this layer in {name}", xlabel="block")
        figure.colorbar(image, ax=panel, label="KL, nats a token")
    save(figure, path)
