"""Predicted against measured peak memory: method x base x recomputation x micro-batch, each in its own process.

    python bench/memory.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --data_dir prepared/gsm8k

A run is a few steps of finetune.py's `train_step`, each of about two micro-batches: samples of the prepared folder,
packed into rows of at most `--micro_batch_tokens`; the table has the positions of the longest row. On a GPU the measure
is `max_memory_allocated`, on a CPU the resident memory above that of the imports. Prints JSON lines (and adds them to
`--out_file`), then a table for the README.
"""

import itertools
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project's folder, from wherever this is started

from lines import add_line, commit, installed_versions
from shell import cli
from shell.cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        checkpoint_dir: Model folder.
        data_dir: Folder made by prepare_data.py.
        methods: Of finetune.py; "full" is not quantised.
        bases: Each a --precision or a --quantize of finetune.py, also a plan's file.
        recompute: Shares, of finetune.py.
        micro_batch_tokens: Positions in the model at one time.
        steps: Optimiser steps of a run.
        out_file: JSON lines, one a run, are added to this file.
        only: Used by the script itself: "METHOD BASE RECOMPUTE TOKENS", one run, and print its line.
    """

    checkpoint_dir: Path
    data_dir: Path
    methods: list[str] = field(default_factory=lambda: ["lora", "full"])
    bases: list[str] = field(default_factory=lambda: ["bf16-true", "32-true", "bnb.nf4"])
    recompute: list[float] = field(default_factory=lambda: [0, 1])
    micro_batch_tokens: list[int] = field(default_factory=lambda: [512, 1024, 2048])
    steps: int = 2
    out_file: Path | None = None
    only: str | None = None

    def __post_init__(self):
        cli.check_numbers(self, "steps", "micro_batch_tokens", above=0)
        if not self.micro_batch_tokens:
            raise UserError("--micro_batch_tokens must name at least one number")


if __name__ == "__main__":
    settings = cli.parse(Settings)


def main(s):
    if s.only:
        method, base, recompute, tokens = s.only.split()
        print(json.dumps(measure(s, method, base, float(recompute), int(tokens))))
        return
    rows = []
    for method, base, recompute, tokens in itertools.product(s.methods, s.bases, s.recompute, s.micro_batch_tokens):
        if method == "full" and quantised(base):
            continue
        only = f"{method} {base} {recompute} {tokens}"
        done = subprocess.run(
            [sys.executable, *sys.argv, "--only", only], stdout=subprocess.PIPE, text=True, check=True
        )
        line = done.stdout.splitlines()[-1]
        rows.append(json.loads(line))
        print(line, flush=True)
        if s.out_file:
            add_line(s.out_file, rows[-1])
    print("\n| method | base | `--recompute` | positions | predicted GB | measured GB | ratio |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['method']} | {row['base']} | {row['recompute']:g} | {row['positions']} | "
            f"{row['predicted_gb']:.3f} | {row['measured_gb']:.3f} | {row['ratio']:.3f} |"
        )


def quantised(base):
    return base.startswith("bnb") or base.endswith(".json")


def measure(s, method, base, recompute, tokens):
    """One run, as a dict for its JSON line. Two micro-batches a step, so that gradients accumulate."""
    import torch

    import finetune
    from batching import Samples
    from training import metrics
    from training.memory import budget, plan

    budget.steady_memory()
    samples = Samples(s.data_dir / "train.safetensors")
    base_flags = {"quantize": base} if quantised(base) else {"precision": base}
    settings = finetune.Settings(
        s.checkpoint_dir, s.data_dir, method=method, **base_flags, recompute=recompute, micro_batch_tokens=tokens,
        global_batch_size=max(2, round(1.9 * tokens / samples.lengths.double().mean().item())), max_steps=s.steps,
    )  # fmt: skip
    finetune.check_model(settings, samples, samples)  # which reads a plan's file
    fabric = finetune.start_fabric(settings)
    before = budget.memory_before(settings, fabric.device)
    model, _ = finetune.build_model(settings, fabric.device, newest=None)
    optimizer = fabric.setup_optimizers(finetune.build_optimizer(settings, model))
    model.train()
    for step, micro_batches in finetune.planned_steps(settings, samples, 0, s.steps):
        row = finetune.train_step(fabric, settings, model, optimizer, samples, micro_batches, step, 1e-4)
    if not row["grad_norm"] > 0:
        raise UserError("the gradient is zero, so nothing was measured")
    measured = metrics.peak_memory_since(before, fabric.device)
    job, steps = budget.planned_job(settings, samples)
    shape = plan.worst(itertools.chain(*steps))
    predicted = plan.Predictor(job).peak(shape)
    return {
        "method": method,
        "base": base,
        "recompute": recompute,
        "micro_batch_tokens": tokens,
        "positions": shape.positions,
        "checkpoint": s.checkpoint_dir.name,
        "data": s.data_dir.name,
        "predicted_gb": predicted / 1e9,
        "measured_gb": measured / 1e9,
        "ratio": predicted / measured,
        "seconds": row["seconds"],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "machine": platform.platform(),
        "versions": installed_versions(),
        "commit": commit(),
    }


if __name__ == "__main__":
    cli.run(main, settings)
