"""What a run measures: a row for every step, memory, FLOPs, and the report at its end."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ops.devices import to_device
from quantize import quantized_layers
from shell.cli import UserError
from shell.files import project_version, whole_file
from tracking.curves import log_axis, running_mean, span_of
from tracking.run_files import read_rows

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from batching import Samples
    from objectives import Forward
    from training.build import Run

COLUMNS = (
    "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "targets", "padding",
    "seconds", "tokens_per_second", "memory_gb", "val_loss", "val_perplexity",
)  # fmt: skip


SHOWN = 10  # sources in a plot or on the screen: as many as there are colours


class Metrics:
    """The rows of metrics.csv, each on the disk when `add` returns. A resumed run keeps those up to its checkpoint.

    The rows after it are computed again, with the same result; metrics-redone.csv keeps the old ones. A file only ever
    grows by a line, or is replaced whole.

    sources: the number of training units of each source that has a loss of its own, by its name.
    more: names of more columns. unit: what losses are means over, in words.
    """

    def __init__(
        self,
        path: Path,
        start: int,
        sources: dict[str, int],
        enabled: bool,
        more: Sequence[str] = (),
        unit: str = "target token",
    ):
        self.path, self.sources, self.enabled, self.rows = path, sources, enabled, []
        self.unit = unit
        if not enabled:
            return
        columns = [*COLUMNS, *(f"{kind}/{name}" for kind in ("loss", "val_loss") for name in sources)]
        columns += more
        before, rows = read_rows(path)
        kept, later = ([row for row in rows if (int(row["step"]) <= start) is early] for early in (True, False))
        if later:
            redone = path.with_name("metrics-redone.csv")
            names, known = read_rows(redone)
            all_names = [*names, *(name for name in before if name not in names)]
            write_rows(redone, all_names, [*known, *(row for row in later if row not in known)])[0].close()
        if len(kept) < start:
            print(
                f"note: {path} has {len(kept)} of the {start} steps before, the report lacks the others",
                file=sys.stderr,
            )
        columns += [name for name in before if name not in columns and kept]
        self.rows = [{key: float(value) for key, value in row.items() if value} for row in kept]
        self.file, self.writer = write_rows(path, columns, kept)

    def add(self, row: dict) -> None:
        """Append a row. Raises UserError if the file was removed."""
        if not self.enabled:
            return
        if not self.path.exists():
            raise UserError(f"{self.path} is gone: the run's folder was removed or renamed, so the run stops")
        self.rows.append(row)
        self.writer.writerow(row)
        self.file.flush()
        os.fsync(self.file.fileno())

    def column(self, name: str) -> tuple[list, list]:
        """Steps and values of the rows that have a value for `name`."""
        rows = [row for row in self.rows if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]


def open_metrics(run: Run, start: int) -> Metrics:
    """The `Metrics` of a run that goes on after `start` steps."""
    s, objective = run.settings, run.objective
    more = [prefix + name for prefix in ("", "val_") for name in objective.columns]
    more += ["forgetting"] * (s.forgetting_source is not None)
    sources, path = units_by_source_name(run), s.out_dir / "metrics.csv"
    return Metrics(path, start, sources, run.fabric.is_global_zero, more, objective.unit)


def write_rows(path: Path, columns: list[str], rows: list[dict]) -> tuple:
    """Replace `path` by a CSV file of these rows. Returns it, open for appending, and its csv.DictWriter."""
    with whole_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
    return file, csv.DictWriter(file, columns)


class Sums:
    """Losses by source, and what the objective measures, added up over the micro-batches of a step or a validation.

    weight: what each micro-batch counts. numbers: both sums, once they have been read from the device: of each source,
    of each of the objective's columns.
    """

    def __init__(self, run: Run, weight: float = 1.0):
        self.run, self.weight, self.numbers = run, weight, []
        sizes = len(run.sources), len(run.objective.columns)
        self.by_source, self.measured = (
            torch.zeros(n, dtype=torch.float64, device=run.fabric.device) for n in sizes
        )  # fmt: skip

    def add(self, result: Forward, samples: Samples, indices: list[int]) -> None:
        """Add those of a micro-batch of the samples `indices`, whose units lie in their order, as in both layouts."""
        if len(self.by_source):
            sources = samples.sources[indices].repeat_interleave(samples.unit_counts[indices])
            sources = to_device(sources, self.by_source.device)
            self.by_source.index_add_(0, sources, result.losses.double(), alpha=self.weight)
        if result.measured is not None:
            self.measured.add_(result.measured, alpha=self.weight)

    def over_devices(self) -> list[Tensor]:
        """The sums over all devices: (sources,) and (columns,) fp64."""
        return [self.run.ranks.sum(each) for each in (self.by_source, self.measured)]

    def means(self, samples: Samples, indices: list[int] | None, prefix: str = "") -> dict[str, float]:
        """The means of `numbers` over the units of the samples `indices`, by the name of their column.

        Sources without a unit have none. indices: None for all samples. prefix: before each name, such as "val_".
        """
        by_source, measured = self.numbers
        counts = units_by_source(samples, indices, len(self.run.sources))
        units = sum(samples.units_by_source()) if indices is None else samples.unit_counts[indices].sum()
        losses = means_of(by_source, counts)
        row = {f"{prefix}loss/{name}": losses[i] for i, name in enumerate(self.run.sources) if counts[i]}
        measured = means_of(measured, units)
        return row | {f"{prefix}{name}": mean for name, mean in zip(self.run.objective.columns, measured, strict=True)}


class Found(NamedTuple):
    """What the passes of a step found beside its gradient: the loss (a scalar) and the `Sums`; and of this device its

    positions, padding included, and the tokens in them.
    """

    loss: Tensor
    sums: Sums
    positions: int
    tokens: int


def means_of(sums: list[float], counts: Tensor) -> list[float]:
    """sums / counts, rounded to fp32: on a GPU the last bits of `sums` vary."""
    return (torch.tensor(sums, dtype=torch.float64) / counts).float().tolist()


def units_by_source(samples: Samples, indices: list[int] | None, source_count: int) -> Tensor:
    """How many units (target tokens, or pairs) the samples `indices`, None for all, have of each source: int64."""
    if indices is None:
        counts = samples.units_by_source()
        return torch.tensor([*counts, *[0] * source_count][:source_count], dtype=torch.int64)
    counts = samples.unit_counts[indices].double()
    return samples.sources[indices].bincount(counts, source_count)[:source_count].long()


def units_by_source_name(run: Run) -> dict[str, int]:
    """How many training units each source of a run has: target tokens, or pairs."""
    counts = units_by_source(run.train, None, len(run.sources)).tolist()
    return dict(zip(run.sources, counts, strict=True))


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_memory("VmHWM")


def start_measuring(device: torch.device) -> int:
    """Reset the peak, before the model is built. Returns the bytes that are used already, by the imports."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    with contextlib.suppress(OSError):  # not everywhere allowed: then the peak of the imports counts too
        Path("/proc/self/clear_refs").write_text("5")
    return resident_memory("VmRSS")


def peak_memory_since(before: int, device: torch.device) -> int:
    """Peak memory in bytes: of tensors on a GPU, of the process above `before` on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_memory("VmHWM") - before


def largest_of_devices(fabric: Fabric, number: float) -> float:
    """The largest of the numbers of all devices of a run, at each of them."""
    if fabric.world_size > 1:
        numbers = torch.tensor(number, dtype=torch.float64, device=fabric.device)
        number = fabric.all_reduce(numbers, reduce_op="max").item()
    return number


def resident_memory(key: str) -> int:
    """Bytes of this process in memory: now ("VmRSS"), or the most since that was reset ("VmHWM").

    Not from getrusage, where a child begins at its parent's peak; that is for systems that are no Linux.
    """
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return 1024 * int(status[key].split()[0])


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, frozen): a quantised weight counts as the weights that it stands for."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    quantized = sum(layer.in_features * layer.out_features for layer in quantized_layers(model))
    return sum(n for n, trains in sizes if trains), sum(n for n, trains in sizes if not trains) + quantized


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all of a model's weights, adapters included: quantised ones with their scales, shared ones once."""
    quantized = sum(layer.nbytes() for layer in quantized_layers(model))
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) + quantized


def flop_counter() -> FlopCounterMode:
    """A context that counts the FLOPs inside it, with those of padding and recomputation.

    Fused attention counts as if every position attended to its whole sample, as in torch; and in a plan for CUDA, where
    offsets have no values, as if every sample of a packed row were as long as the longest.
    """
    import torch.nn.attention.varlen

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the others torch knows by itself
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    add_product = lambda _, a, b, *__, **___: 2 * a[0] * a[1] * b[1]  # noqa: E731 (torch's takes no out_dtype)
    counts = {
        torch.ops.aten.addmm: add_product,
        torch.ops.aten.addmm_: add_product,
        attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    counter = FlopCounterMode(display=False, custom_mapping=counts)
    counter.mod_tracker = _WholeModel()
    return counter


class _WholeModel(contextlib.nullcontext):
    """In the place of torch's ModuleTracker, whose hooks on every module torch.compile cannot trace (ops/flex.py)."""

    parents = ("Global",)


class FirstStepFlops:
    """Counts the FLOPs of step 0: `with flops.counted(step):` around every step.

    Never in a resumed run: counting takes fused operations apart, which changes their last bits.
    """

    def __init__(self):
        self.counter = flop_counter()

    def counted(self, step: int) -> contextlib.AbstractContextManager:
        """The counter for step 0 (from 0), nothing for all others."""
        return self.counter if step == 0 else contextlib.nullcontext()

    def per_token(self, fabric: Fabric, metrics: Metrics) -> float:
        """FLOPs for each token of step 0, over all devices; 0 if it was not run in this session."""
        total = torch.tensor(float(self.counter.get_total_flops()), device=fabric.device)
        if fabric.world_size > 1:
            total = fabric.all_reduce(total, reduce_op="sum")
        tokens = metrics.rows[0]["tokens"] if metrics.rows else 1
        return total.item() / tokens


def estimated_flops(model: nn.Module, tokens: int, targets: int) -> float:
    """FLOPs of training on so many tokens, of which so many are targets.

    A weight takes 2 for a token going forward, 2 for the gradient of its input and, if it trains, 2 for its own. The
    head counts at target positions alone; the embedding (a look-up), attention and padding do not count.
    """
    trainable, frozen = parameter_counts(model)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.in_features * model.lm_head.out_features
    looked_up = [module.weight for module in model.model.values() if hasattr(module, "num_embeddings")]
    outside = sum(map(torch.numel, looked_up)) + (0 if model.config.tie_word_embeddings else head)  # not in the blocks
    per_weight = 6 if embedding.requires_grad else 4
    in_blocks = per_weight * (frozen - outside) + 6 * trainable if frozen else 6 * (trainable - outside)
    return tokens * in_blocks + targets * per_weight * head


def report(out_dir: Path, model: nn.Module, metrics: Metrics, flops_per_token: float, memory: dict[str, int]) -> None:
    """Print a summary of the run and write it as `write_report` does, which has the arguments."""
    if not metrics.rows:  # all steps were done before, and metrics.csv was taken away
        return
    summary = write_report(out_dir, model, metrics, flops_per_token, memory)
    sources = summary.pop("sources", {})
    for name, value in summary.items():
        print(f"{name.replace('_', ' '):30} {f'{value:,.4g}' if isinstance(value, float) else value}")
    print_sources(sources)
    print(f"written to {out_dir}: final/, metrics.csv, loss.png, summary.json")


def write_report(
    out_dir: Path, model: nn.Module, metrics: Metrics, flops_per_token: float, memory: dict[str, int]
) -> dict:
    """Write the summary of a run that has rows to `summary.json` in `out_dir`, and `loss.png`. Returns the summary.

    flops_per_token: as counted in the first step, 0 if they were not counted (in a resumed run).
    memory: the peak as "predicted" and as "measured" (on a CPU above that of the imports), in bytes.
    """
    rows = metrics.rows
    seconds, tokens = (sum(row[name] for row in rows) for name in ("seconds", "tokens"))
    estimated = estimated_flops(model, tokens, sum(row["targets"] for row in rows))
    trainable, frozen = parameter_counts(model)
    summary = {
        "version": project_version(),
        "trainable_parameters": trainable,
        "frozen_parameters": frozen,
        "steps": int(rows[-1]["step"]),
        "loss_first": rows[0]["loss"],
        "loss_last": rows[-1]["loss"],
        "val_loss": rows[-1].get("val_loss"),
        "training_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "padding": 1 - tokens / sum(row["tokens"] / (1 - row["padding"]) for row in rows),
        "estimated_tflops_per_second": estimated / seconds / 1e12,
        "measured_tflops_per_second": flops_per_token * tokens / seconds / 1e12 or None,
        "peak_memory_gb": max(row["memory_gb"] for row in rows),
        "predicted_memory_gb": memory["predicted"] / 1e9,
        "measured_memory_gb": memory["measured"] / 1e9,
        "predicted_over_measured": memory["predicted"] / max(1, memory["measured"]),
    }
    if sources := summarize_sources(metrics):
        summary["sources"] = sources
    with whole_file(out_dir / "summary.json") as file:
        file.write_bytes((json.dumps(summary, indent=2) + "\n").encode())
    plot_losses(metrics, out_dir / "loss.png")
    return summary


def summarize_sources(metrics: Metrics) -> dict[str, dict]:
    """Of each source its last training loss, its first and last validation loss, and if it "got" better or worse."""
    result = {}
    for name in metrics.sources:
        losses, evaluations = (metrics.column(f"{kind}/{name}")[1] for kind in ("loss", "val_loss"))
        first, last = (evaluations[0], evaluations[-1]) if evaluations else (None, None)
        got = (
            None if len(evaluations) < 2 else "worse" if last > first else "better" if last < first else "no different"
        )
        result[name] = {
            "loss_last": losses[-1] if losses else None, "val_loss_first": first, "val_loss_last": last, "got": got,
        }  # fmt: skip
    return result


def print_sources(sources: dict[str, dict]) -> None:
    """Print the first and last validation loss of at most SHOWN sources, beginning with those that got worse."""
    judged = [name for name in sources if sources[name]["got"]]
    judged.sort(key=lambda name: sources[name]["val_loss_first"] - sources[name]["val_loss_last"])
    for name in judged[:SHOWN]:
        first, last = sources[name]["val_loss_first"], sources[name]["val_loss_last"]
        print(f"{name + ' validation loss':30} {first:.4g}, then {last:.4g}: {sources[name]['got']}")
    if len(judged) > SHOWN:
        print(f"and those of {len(judged) - SHOWN} more sources in summary.json")


def plot_losses(metrics: Metrics, path: Path) -> None:
    """Losses against the step as a PNG, below them learning rate and gradient norm, and the losses of each source."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = sorted(metrics.sources, key=metrics.sources.get, reverse=True)[:SHOWN]
    evaluated = any(metrics.column(f"val_loss/{name}")[0] for name in shown)
    by_source = [["loss", "val_loss" if evaluated else "loss"]] if shown else []
    rows = [["losses", "losses"], ["rate", "norm"], *by_source]
    figure, axes = plt.subplot_mosaic(
        rows, figsize=(11, 4 + 3 * (len(rows) - 1)), height_ratios=[4, 2, *([4] if shown else [])], layout="constrained"
    )
    span = span_of(metrics.rows)
    _plot_all_losses(axes["losses"], metrics, span)
    axes["losses"].set(title=path.parent.name)
    axes["rate"].plot(*metrics.column("learning_rate"), color="tab:green")
    axes["rate"].set(ylabel="learning rate", ylim=(0, None))
    axes["rate"].ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    axes["norm"].plot(*metrics.column("grad_norm"), color="tab:red")
    axes["norm"].set(ylabel="gradient norm", yscale="log")
    if shown:
        _plot_sources(axes, metrics, shown, plt.colormaps["tab10"].colors, span)
        figure.legend(*axes["loss"].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    for panel in axes.values():
        panel.set(xlabel="optimiser step")
        panel.grid(alpha=0.3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    plt.close(figure)
    with whole_file(path) as file:
        file.write_bytes(image.getvalue())


def _plot_all_losses(panel, metrics, span):
    steps, losses = metrics.column("loss")
    panel.plot(steps, losses, color="tab:blue", alpha=0.25, label="training, each step")
    panel.plot(steps, running_mean(losses, span), color="tab:blue", label=f"training, mean of {span} steps")
    panel.plot(*metrics.column("val_loss"), "o-", color="tab:orange", label="validation")
    log_axis(panel, _label(metrics))
    panel.legend()


def _plot_sources(axes, metrics, shown, colors, span):
    several = f"the {SHOWN} largest of {len(metrics.sources)} sources" if len(metrics.sources) > SHOWN else "by source"
    axes["loss"].set(title=f"training, mean of {span} steps, {several}")
    for name, color in zip(shown, colors, strict=False):
        steps, losses = metrics.column(f"loss/{name}")
        axes["loss"].plot(steps, running_mean(losses, span), color=color, label=name)
    if "val_loss" in axes:
        axes["val_loss"].set(title=f"validation, {several}")
        axes["val_loss"].sharey(axes["loss"])
        axes["val_loss"].sharex(axes["loss"])
        for name, color in zip(shown, colors, strict=False):
            axes["val_loss"].plot(*metrics.column(f"val_loss/{name}"), "o-", markersize=4, color=color)
    log_axis(axes["loss"], _label(metrics))


def _label(metrics):
    return f"loss per {metrics.unit} (nats)"
