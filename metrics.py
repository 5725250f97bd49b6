"""What a run measures: a row for every step, memory, arithmetic, and the report at its end."""

import csv
import json
import os
import resource
import statistics

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

COLUMNS = (
    "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "targets", "padding",
    "seconds", "tokens_per_second", "memory_gb", "val_loss", "val_perplexity",
)  # fmt: skip


class Metrics:
    """The rows of metrics.csv, each flushed as it comes. A resumed run keeps those up to its checkpoint."""

    def __init__(self, path, start, enabled):
        self.enabled, self.rows = enabled, []
        if not enabled:
            return
        kept = []
        if start and path.exists():
            with open(path, newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= start]
        self.rows = [{key: float(value) for key, value in row.items() if value} for row in kept]
        temporary = path.with_suffix(".tmp")  # takes the place of the old file whole, or not at all
        self.file = open(temporary, "w", newline="")  # noqa: SIM115 (open as long as the run)
        self.writer = csv.DictWriter(self.file, COLUMNS)
        self.writer.writeheader()
        self.writer.writerows(kept)
        self.file.flush()
        os.replace(temporary, path)

    def add(self, row):
        if self.enabled:
            self.rows.append(row)
            self.writer.writerow(row)
            self.file.flush()

    def column(self, name):
        """Steps and values of the rows that have a value for `name`."""
        rows = [row for row in self.rows if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]


def peak_memory(device):
    """Bytes: the most that tensors took on a GPU, or that the process took on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def parameter_counts(model):
    """(trainable, frozen): a quantised weight counts as the weights that it stands for."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    quantized = sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "codes"))
    return sum(n for n, trains in sizes if trains), sum(n for n, trains in sizes if not trains) + quantized


def flop_counter():
    """A context that counts the floating-point operations inside it, with those of padding and recomputation."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the others torch knows by itself
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    counts = {
        attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    return FlopCounterMode(display=False, custom_mapping=counts)


def estimated_flops(model, tokens, targets):
    """Floating-point operations of training on so many tokens, of which so many are targets.

    A weight takes 2 for a token going forward, 2 for the gradient of its input and, if it trains, 2 for its own. The
    head counts at target positions alone; the embedding (a look-up), attention and padding do not count.
    """
    trainable, frozen = parameter_counts(model)
    embedding, head = model.model.embed_tokens.weight, model.config.vocab_size * model.config.hidden_size
    outside = head if model.config.tie_word_embeddings else 2 * head  # counted in the parameters, not in the blocks
    per_weight = 6 if embedding.requires_grad else 4
    in_blocks = per_weight * (frozen - outside) + 6 * trainable if frozen else 6 * (trainable - outside)
    return tokens * in_blocks + targets * per_weight * head


def report(out_dir, model, metrics, flops_per_token):
    """Print what the run came to and write it to `summary.json` and `loss.png` in `out_dir`.

    flops_per_token: floating-point operations as they were counted, 0 if they were not (in a resumed run).
    """
    rows = metrics.rows
    seconds, tokens = (sum(row[name] for row in rows) for name in ("seconds", "tokens"))
    estimated = estimated_flops(model, tokens, sum(row["targets"] for row in rows))
    trainable, frozen = parameter_counts(model)
    summary = {
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
    }
    (out_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_losses(metrics, out_dir / "loss.png")
    for name, value in summary.items():
        print(f"{name.replace('_', ' '):30} {f'{value:,.4g}' if isinstance(value, float) else value}")
    print(f"written to {out_dir}: final/, metrics.csv, loss.png, summary.json")


def plot_losses(metrics, path):
    """Training loss, its running mean, and validation loss against the step, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps, losses = metrics.column("loss")
    span = max(2, len(steps) // 20)
    smooth = [statistics.fmean(losses[max(0, i - span + 1) : i + 1]) for i in range(len(losses))]
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, label="training, each step")
    axes.plot(steps, smooth, color="tab:blue", label=f"training, mean of {span} steps")
    axes.plot(*metrics.column("val_loss"), "o-", color="tab:orange", label="validation")
    axes.set(xlabel="optimiser step", ylabel="loss per target token (nats)", title=path.parent.name, ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
