"""Every method on the same data for the same number of tokens: what trains, memory, speed, and right answers.

    python bench/methods.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --data_dir prepared/orders

Each method is a run of finetune.py as in the quickstart, in a process of its own, then eval/exact_match.py on questions
that are not in the data. The runs take the same samples in the same order; learning rates are those of `METHODS`, the
best of two or three that were tried on the quickstart's data. The base is in 4 bits, but for those that change it. To
measure a method of your own, add a line to `METHODS`.

Added to --out_file: a JSON line for every run. Drawn beside that file: a chart.

memory        GB, the peak of the whole process (on a GPU: of tensors)
tokens/s      the median step after the first two; two forward passes of mezo count once
val loss      of the samples held back, after the last step
exact match   the share of questions whose answer is right to the letter
others        share of the CPUs that other processes took during the training: above a few percent, measure again
"""

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(ROOT)

from bench.measuring import (
    Measurement,
    alternate,
    cpu_times,
    describe,
    draw_bars,
    machine_name,
    others_share,
    print_table,
    read_metrics,
    run_script,
    summarize,
)
from shell import cli
from shell.cli import UserError

LORA = {"lora_alpha": 16, "learning_rate": 2e-3}
DENSE = {"quantize": None, "precision": "bf16-mixed"}  # of what has to change the base: fp32 weights, bf16 products
# By the name in the table: the flags of finetune.py beside those of `train`.
METHODS = {
    "lora": LORA,
    "lora, LoRA+": {**LORA, "learning_rate": 5e-4, "lora_plus_ratio": 16},
    "lora, PiSSA": {**LORA, "learning_rate": 5e-4, "lora_init": "pissa", "lora_init_iterations": 16},
    "lora, OLoRA": {**LORA, "learning_rate": 5e-4, "lora_init": "olora"},
    "lora, EVA": {**LORA, "lora_init": "eva"},
    "lora, LoftQ": {**LORA, "lora_init": "loftq"},
    "lora, MeZO": {"optimizer": "mezo", "learning_rate": 1e-3, "max_grad_norm": 5},
    "dora": {**LORA, "method": "dora"},
    "lora-fa": {**LORA, "method": "lora-fa", "learning_rate": 5e-3},
    "vera": {"method": "vera", "lora_r": 256, "learning_rate": 3e-2},
    "ia3": {"method": "ia3", "learning_rate": 3e-2},
    "prompt": {"method": "prompt", "learning_rate": 1e-1},
    "prefix": {"method": "prefix", "learning_rate": 1e-1},
    "llama-adapter": {"method": "llama-adapter", "learning_rate": 3e-2},
    "llama-adapter-v2": {"method": "llama-adapter-v2", "learning_rate": 3e-3},
    "full": {**DENSE, "method": "full", "learning_rate": 1e-4},
    "full, last 10 blocks": {
        **DENSE, "method": "full", "learning_rate": 1e-4, "train": [f"layers.{number}.*" for number in range(20, 30)],
    },
}  # fmt: skip
SKIP = 2  # steps at the start that do not count for the speed


@dataclass(kw_only=True)
class Settings(Measurement):
    """The command line.

    Args:
        data_dir: Folder made by prepare_data.py.
        questions: File of questions and right answers.
        methods: Which rows of the table, by name; all by default.
        quantize: The base of adapters, as finetune.py's flag.
        steps: Optimiser steps of a run.
        global_batch_size: Samples in a step.
        micro_batch_tokens: Positions in a micro-batch.
        max_new_tokens: Tokens of an answer at most.
        limit: Ask so many questions; all by default.
        runs: Runs of each method; medians count.
    """

    data_dir: Path
    questions: Path = ROOT / "examples" / "orders" / "test.jsonl"
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    quantize: str = "bnb.nf4"
    steps: int = 80
    global_batch_size: int = 8
    micro_batch_tokens: int = 512
    max_new_tokens: int = 32
    limit: int | None = None
    runs: int = 1
    out_file: Path = Path("out/bench/methods.jsonl")

    def __post_init__(self):
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise UserError(f"--methods: unknown: {unknown[0]}; there are {'; '.join(METHODS)}")
        if not self.methods or len({*self.methods}) < len(self.methods):
            raise UserError(f"--methods {self.methods}: name at least one, and none twice")
        cli.check_files(self, "questions")
        cli.check_numbers(self, "steps", above=SKIP)
        cli.check_numbers(self, "runs", "limit", above=0)


if __name__ == "__main__":
    settings = cli.parse(Settings)

COLUMNS = {
    "method": "`{method}`", "rate": "{learning_rate:g}", "trainable": "{trainable:,}", "memory": "{peak_gb:.2f}",
    "tokens/s": "{tokens_per_second:.0f}", "val loss": "{val_loss:.3f}", "exact match": "{exact_match:.1%}",
    "others": "{others_cpu:.0%}",
}  # fmt: skip
MEDIANS = (
    "tokens_per_second", "peak_gb", "val_loss", "exact_match", "others_cpu", "trainable", "learning_rate", "tokens",
)  # fmt: skip


def main(s):
    """Measure every method; print a table, and draw it."""
    call, lines = describe(s), []
    for line in alternate([{"method": name} for name in s.methods], s.runs, lambda method: measure(s, method), s, call):
        lines.append(line)
        print("{method}: {tokens_per_second:.0f} tokens/s, {exact_match:.1%}".format(**line), flush=True)
    rows = summarize(lines, ("method",), MEDIANS)
    print(f"\n{s.checkpoint_dir.name} on {s.data_dir.name}, {machine_name(call['machine'])}, {call['commit']}")
    print_table(COLUMNS, rows)
    chart = s.out_file.with_suffix(".png")
    bars = [{**row, "side": "", "label": row["method"], "percent": 100 * row["exact_match"]} for row in rows[::-1]]
    title = f"{s.checkpoint_dir.name} on {s.data_dir.name}, {rows[0]['tokens']:,} tokens"
    draw_bars([(title, bars)], {
        "percent": ("exact match, %", "{:.0f}"), "tokens_per_second": ("tokens/s", "{:.0f}"),
        "peak_gb": ("peak memory, GB", "{:.2f}"),
    }, chart)  # fmt: skip
    print(f"written to {s.out_file} and {chart}")


def measure(s, method):
    """One run of a method, and the questions after it."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        start = cpu_times()
        train(s, method, run)
        others = others_share(start, cpu_times())
        found = read_run(run) | {"others_cpu": others, "learning_rate": METHODS[method]["learning_rate"]}
        return found | {"exact_match": answer(s, method, run)}


def train(s, method, run):
    """finetune.py with the flags of a method."""
    flags = {
        "checkpoint_dir": s.checkpoint_dir, "data_dir": s.data_dir, "out_dir": run, "quantize": s.quantize,
        "max_steps": s.steps, "warmup_steps": 5, "global_batch_size": s.global_batch_size,
        "micro_batch_tokens": s.micro_batch_tokens, "eval_interval": s.steps, "save_interval": 0,
    } | METHODS[method]  # fmt: skip
    run_script("finetune.py", flags, f"--methods {method}")


def read_run(run):
    """What a run has measured."""
    rows = read_metrics(run)
    summary = json.loads((run / "summary.json").read_text())
    return {
        "trainable": summary["trainable_parameters"],
        "tokens": sum(int(row["tokens"]) for row in rows),
        "peak_gb": summary["peak_memory_gb"],
        "tokens_per_second": statistics.median(float(row["tokens_per_second"]) for row in rows[SKIP:]),
        "val_loss": summary["val_loss"],
    }


def answer(s, method, run):
    """The share of questions that a trained model or adapter answers exactly right."""
    is_model = METHODS[method].get("method") == "full"
    flags = {
        "data": s.questions, "max_new_tokens": s.max_new_tokens, "batch_size": 100, "out_file": run / "answers.json",
        "checkpoint_dir" if is_model else "adapter_dir": run / "final", "limit": s.limit,
    }  # fmt: skip
    run_script("eval/exact_match.py", flags, f"--methods {method}")
    return json.loads((run / "answers.json").read_text())["exact_match"]


if __name__ == "__main__":
    cli.run(main, settings)
