"""Variants trained together (finetune.py --sweep) against the same variants as runs one after another.

    python bench/training/sweep.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --data_dir prepared/orders

Each side is finetune.py itself, in processes of its own: one for the sweep, one for each variant. The variants are LoRA
with other learning rates on the same data. What a sweep shares is what a pass over the base takes however few positions
it has: reading and dequantising weights, starting operations. So the gain is large where steps are small, and the
script takes several sizes of steps.

Added to --out_file: a JSON line for every run of a side.

tokens/s      of all variants: their tokens over the seconds of their steps, the median step after the first two
memory        GB, the peak of a process: of the sweep, or the largest of the runs
minutes       of the processes from start to end, with loading and saving
others        share of the CPUs that other processes took: above a few percent, measure again
"""

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.measuring import (
    Measurement,
    alternate,
    cpu_times,
    describe,
    machine_name,
    others_share,
    print_table,
    read_metrics,
    run_script,
    summarize,
)
from shell import cli

TOGETHER, ALONE = "together", "one after another"
SKIP = 2  # steps at the start that do not count


@dataclass(kw_only=True)
class Settings(Measurement):
    """The command line.

    Args:
        data_dir: Folder made by prepare_data.py.
        variants: How many variants.
        global_batch_size: Samples in a step of a variant; each of them is measured.
        micro_batch_tokens: Positions in a micro-batch, of the sweep and of each run.
        quantize: The base in 4 or 8 bits, as finetune.py's flag; "none" for bf16.
        lora_targets: The projections that get an adapter; by default all.
        lora_r: Rank of the adapters.
        recompute: As finetune.py's flag.
        steps: Optimiser steps of each variant; the first two do not count.
        runs: Runs of each side; the sides alternate, and the medians count.
    """

    data_dir: Path
    variants: int = 4
    global_batch_size: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    micro_batch_tokens: int = 1024
    quantize: Literal[(*cli.table_keys("quantize.py", "QUANTIZERS"), "none")] = "bnb.nf4"
    lora_targets: list[str] | None = None
    lora_r: int = 16
    recompute: float = 0.0
    steps: int = 12
    runs: int = 3
    out_file: Path = Path("out/bench/sweep.jsonl")

    def __post_init__(self):
        cli.check_numbers(self, "steps", above=SKIP)
        cli.check_numbers(self, "variants", least=2)
        cli.check_numbers(self, "global_batch_size", "runs", above=0)


if __name__ == "__main__":
    settings = cli.parse(Settings)

COLUMNS = {
    "samples a step": "{samples}", "side": "{side}", "tokens/s": "{tokens_per_second:.0f}", "from": "{spread[0]:.0f}",
    "to": "{spread[1]:.0f}", "memory": "{peak_gb:.2f}", "minutes": "{minutes:.2f}", "others": "{others_cpu:.1%}",
}  # fmt: skip


def main(s):
    """Measure both sides for each size of steps; print the table and the ratios."""
    sides = [{"samples": size, "side": side} for size in s.global_batch_size for side in (TOGETHER, ALONE)]
    call, lines = describe(s), []
    for line in alternate(sides, s.runs, lambda samples, side: measure(s, samples, side), s, call):
        lines.append(line)
        print("{samples} samples a step, {side}: {tokens_per_second:.0f} tokens/s, {peak_gb:.2f} GB".format(**line))
    rows = summarize(lines, ("samples", "side"), ("tokens_per_second", "peak_gb", "minutes", "others_cpu"))
    print(f"\n{s.variants} variants, {s.checkpoint_dir.name} on {s.data_dir.name}, {machine_name(call['machine'])}")
    print_table(COLUMNS, rows)
    for size in s.global_batch_size:
        ours, theirs = (
            next(r for r in rows if (r["samples"], r["side"]) == (size, side)) for side in (TOGETHER, ALONE)
        )
        faster, larger = (ours[key] / theirs[key] for key in ("tokens_per_second", "peak_gb"))
        print(f"{size} samples a step: {faster:.2f} times the tokens/s, {larger:.2f} times the memory")


def measure(s, samples, side):
    """A run of one side: the sweep, or each variant as a run of its own."""
    names = [f"rate-{number}" for number in range(s.variants)]
    changes = {name: {"learning_rate": 1e-4 * (1 + number)} for number, name in enumerate(names)}
    with tempfile.TemporaryDirectory() as folder:
        out, start, started = Path(folder, "out"), cpu_times(), time.time()
        if side == TOGETHER:
            file = Path(folder, "sweep.yaml")
            file.write_text(json.dumps({"variants": changes}))  # which is YAML, too
            train(s, samples, out, {"sweep": file})
        else:
            for name in names:
                train(s, samples, out / name, changes[name])
        minutes, others = (time.time() - started) / 60, others_share(start, cpu_times())
        rows = [read_metrics(out / name) for name in names]
        peaks = [max(float(row["memory_gb"]) for row in own) for own in rows]
    return {
        "tokens_per_second": speed(rows, together=side == TOGETHER),
        "peak_gb": max(peaks),
        "minutes": minutes,
        "others_cpu": others,
    }


def train(s, samples, out, flags):
    """finetune.py with these flags beside those that both sides have."""
    flags = {
        "checkpoint_dir": s.checkpoint_dir, "data_dir": s.data_dir, "out_dir": out, "max_steps": s.steps,
        "global_batch_size": samples, "micro_batch_tokens": s.micro_batch_tokens, "lora_r": s.lora_r,
        "recompute": s.recompute, "eval_interval": 0, "save_interval": 0, "warmup_steps": 0,
    } | flags  # fmt: skip
    flags["quantize"] = None if s.quantize == "none" else s.quantize
    flags["lora_targets"] = json.dumps(s.lora_targets) if s.lora_targets else None
    run_script("finetune.py", flags)


def speed(runs, together):
    """Tokens of all variants over the seconds of their steps: the median over the steps that count.

    runs: the rows of each variant. A step of a sweep takes as long as each of its variants says.
    """
    found = []
    for rows in zip(*(rows[SKIP:] for rows in runs), strict=True):
        seconds = [float(row["seconds"]) for row in rows]
        found.append(sum(int(row["tokens"]) for row in rows) / (max(seconds) if together else sum(seconds)))
    return statistics.median(found)


if __name__ == "__main__":
    cli.run(main, settings)
