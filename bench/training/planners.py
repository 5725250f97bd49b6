"""What a step's choice of samples does to the loss: the same model, data, seed and steps with several planners.

    python bench/training/planners.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --data_dir prepared/mixture

Each run is finetune.py itself, in a process of its own. `grouped` (neighbours in length share a step) is there for its
zig-zag: compare it with `packed` or `sorted_in_step`, whose steps are sampled from the whole set. The mixture should
have tasks of unlike lengths.

Added to --out_file: a JSON line for every run. In a chart beside that file: the training losses of all of them.

deviation     nats, the standard deviation of the step losses around their running mean (of 21 steps, centred)
val_loss      after the last step, if the data have a validation part
"""

import json
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.measuring import Measurement, alternate, describe, print_table, read_metrics, run_script
from shell import cli
from shell.cli import UserError

SPAN = 21  # steps in a running mean


@dataclass(kw_only=True)
class Settings(Measurement):
    """The command line.

    Args:
        data_dir: Folder made by prepare_data.py.
        planners: How samples are cut into steps and micro-batches (batching.py), a run for each.
        steps: Optimiser steps of a run.
        global_batch_size: Samples in a step.
        micro_batch_tokens: Positions in a micro-batch.
        learning_rate: The highest learning rate.
        precision: Dtype of the weights ("true") or of the products over fp32 weights ("mixed").
        seed: Of adapter and order of the data.
    """

    data_dir: Path
    planners: list[Literal[cli.table_keys("batching.py", "PLANNERS")]] = field(
        default_factory=lambda: ["packed", "grouped"]
    )
    steps: int = 200
    global_batch_size: int = 32
    micro_batch_tokens: int = 2048
    learning_rate: float = 2e-4
    precision: Literal["32-true", "bf16-true", "bf16-mixed", "16-mixed"] = "bf16-true"
    seed: int = 1337
    out_file: Path = Path("out/bench/planners.jsonl")

    def __post_init__(self):
        if not self.planners or len(set(self.planners)) < len(self.planners):
            raise UserError(f"--planners {self.planners}: name at least one, and none twice")
        cli.check_numbers(self, "steps", least=2)


if __name__ == "__main__":
    settings = cli.parse(Settings)

COLUMNS = {
    "planner": "{planner}", "first loss": "{losses[0]:.3f}", "last": "{last:.3f}",
    "around its running mean": "{deviation:.4f}", "validation loss": "{validation}", "padding": "{padding:.1%}",
    "seconds": "{training_seconds:.0f}",
}  # fmt: skip


def main(s):
    """Train with every planner; print a table, and draw the losses."""
    call = describe(s)
    lines = list(
        alternate([{"planner": planner} for planner in s.planners], 1, lambda planner: train(s, planner), s, call)
    )
    for line in lines:
        line["last"], loss = line["losses"][-1], line["val_loss"]
        line["validation"] = "" if loss is None else f"{loss:.4f}"
    print_table(COLUMNS, lines)
    chart = s.out_file.with_suffix(".png")
    draw(lines, call["settings"], chart)
    print(f"written to {s.out_file} and {chart}")


def train(s, planner):
    """One run of finetune.py: its step losses, their deviation, and what its summary says."""
    flags = {name: value for name, value in asdict(s).items() if name not in ("planners", "steps", "out_file")}
    flags |= {"planner": planner, "max_steps": s.steps, "eval_interval": s.steps, "save_interval": 0}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, planner)
        run_script("finetune.py", flags | {"out_dir": run}, f"--planners {planner}")
        losses = [float(row["loss"]) for row in read_metrics(run)]
        summary = json.loads((run / "summary.json").read_text())
    kept = {key: summary[key] for key in ("val_loss", "padding", "training_seconds", "tokens_per_second")}
    return {"deviation": deviation(losses), **kept, "losses": losses}


def deviation(losses):
    """The standard deviation of the losses around their running mean."""
    return statistics.pstdev(loss - mean for loss, mean in zip(losses, running_mean(losses), strict=True))


def running_mean(losses):
    """For each loss the mean of those in the SPAN of steps around it."""
    half = SPAN // 2
    return [statistics.fmean(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]


def draw(lines, settings, path):
    """The step losses of all runs, thin, and their running means, as a PNG. The run that varies most is at the back."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    colors = dict(zip([line["planner"] for line in lines], plt.colormaps["tab10"].colors, strict=False))
    for line in sorted(lines, key=lambda line: -line["deviation"]):
        steps, color = range(1, len(line["losses"]) + 1), colors[line["planner"]]
        axes.plot(steps, line["losses"], color=color, linewidth=0.8, alpha=0.6)
        label = f"{line['planner']}: {line['deviation']:.3f} around the mean of {SPAN} steps"
        axes.plot(steps, running_mean(line["losses"]), color=color, linewidth=2, label=label)
    axes.set(
        title="{checkpoint} on {data}, {global_batch_size} samples a step".format(**settings),
        xlabel="optimiser step", ylabel="training loss per target token (nats)",
    )  # fmt: skip
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(main, settings)
