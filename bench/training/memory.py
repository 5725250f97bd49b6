"""Predicted against measured peak memory: method x base x recomputation x micro-batch, each in its own process.

    python bench/training/memory.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --data_dir prepared/gsm8k

A run is a few steps of finetune.py's `train_step`, each of about two micro-batches: samples of the prepared folder,
packed into rows of at most `--micro_batch_tokens`; the table has the positions of the longest row. On a GPU the
measured figure is `max_memory_allocated`, on a CPU the resident memory above that of the imports.
"""

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.measuring import Measurement, alternate, describe, machine_name, print_table, run_job
from shell import cli
from shell.cli import UserError


@dataclass(kw_only=True)
class Settings(Measurement):
    """The command line.

    Args:
        data_dir: Folder made by prepare_data.py.
        methods: Each a --method of finetune.py; "full" is not quantised.
        bases: Each a --precision or a --quantize of finetune.py, also the file of a plan of quantisation.
        recompute: Each a --recompute of finetune.py: shares of the blocks with activation checkpointing.
        micro_batch_tokens: Positions in the model at one time.
        steps: Optimiser steps of a run.
    """

    data_dir: Path
    methods: list[str] = field(default_factory=lambda: ["lora", "full"])
    bases: list[str] = field(default_factory=lambda: ["bf16-true", "32-true", "bnb.nf4"])
    recompute: list[float] = field(default_factory=lambda: [0, 1])
    micro_batch_tokens: list[int] = field(default_factory=lambda: [512, 1024, 2048])
    steps: int = 2
    out_file: Path = Path("out/bench/memory.jsonl")

    def __post_init__(self):
        cli.check_numbers(self, "steps", "micro_batch_tokens", above=0)
        if not self.micro_batch_tokens:
            raise UserError("--micro_batch_tokens must name at least one number")


if __name__ == "__main__":
    settings = cli.parse(Settings)

COLUMNS = {
    "method": "{method}", "base": "{base}", "`--recompute`": "{recompute:g}", "positions": "{positions}",
    "predicted GB": "{predicted_gb:.3f}", "measured GB": "{measured_gb:.3f}", "ratio": "{ratio:.3f}",
}  # fmt: skip


def main(s):
    """Measure all combinations and print their table."""
    names = ("method", "base", "recompute", "micro_batch_tokens")
    combinations = itertools.product(s.methods, s.bases, s.recompute, s.micro_batch_tokens)
    sides = [dict(zip(names, values, strict=True)) for values in combinations]
    sides = [side for side in sides if not (side["method"] == "full" and quantised(side["base"]))]
    paths = {"checkpoint_dir": str(s.checkpoint_dir.resolve()), "data_dir": str(s.data_dir.resolve())}

    def measure_side(**side):
        return run_job(measure, {**side, **paths, "steps": s.steps}, s.out_file.parent / "memory.log")

    call, lines = describe(s), []
    for line in alternate(sides, 1, measure_side, s, call):
        lines.append(line)
        print("{method} {base} {recompute} {micro_batch_tokens}: {measured_gb:.3f} GB".format(**line), flush=True)
    print(f"\n{s.checkpoint_dir.name} on {s.data_dir.name}, {machine_name(call['machine'])}, {call['commit']}")
    print_table(COLUMNS, lines)


def quantised(base):
    """Whether a base is a --quantize, not a --precision."""
    return base.startswith("bnb") or base.endswith(".json")


def measure(job):
    """One run, in its own process. Two micro-batches a step, so that gradients accumulate."""
    from batching import open_samples
    from bench.training import ours
    from training import build, metrics
    from training.memory import budget, plan
    from training.settings import Settings as TrainingSettings
    from training.steps import planned_steps

    samples = open_samples(Path(job["data_dir"]), "train")
    tokens, base = job["micro_batch_tokens"], job["base"]
    settings = TrainingSettings(
        Path(job["checkpoint_dir"]), Path(job["data_dir"]), method=job["method"], recompute=job["recompute"],
        **{"quantize" if quantised(base) else "precision": base}, micro_batch_tokens=tokens, learning_rate=1e-4,
        global_batch_size=max(2, round(1.9 * tokens * len(samples) / samples.positions())), max_steps=job["steps"],
    )  # fmt: skip
    build.check_model(settings, build.Data({"kind": samples.kind}, samples, samples, []))  # which reads a plan's file
    fabric = build.start_fabric(settings)
    before = budget.memory_before(settings, fabric.device)
    step = ours.step_function(ours.build_run(settings, fabric, samples))
    for number, micro_batches in planned_steps(settings, samples, 0, job["steps"]):
        row = step(number, micro_batches)
    if not row["grad_norm"] > 0:
        raise RuntimeError("the gradient is zero, so nothing was measured")
    measured = metrics.peak_memory_since(before, fabric.device)
    planned, steps = budget.planned_job(settings, samples)
    shape = plan.worst(itertools.chain(*steps))
    predicted = plan.Predictor(planned).peak(shape)
    return {
        "positions": shape.positions,
        "predicted_gb": predicted / 1e9,
        "measured_gb": measured / 1e9,
        "ratio": predicted / measured,
        "seconds": row["seconds"],
    }


if __name__ == "__main__":
    cli.run(main, settings)
