"""Multiple choice under lm-eval: our model class against lm-eval's own `hf`, on the same questions, by turns.

    python bench/harness.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --data bbq_age.jsonl

Needs requirements-eval.txt and requirements-dev.txt. Each run is a process that loads the model, scores a few questions
uncounted, and then all of them: what is timed is lm-eval's `loglikelihood`, from texts to figures. Both have the same
budget of positions in a batch. It stops if the two differ. Results are added to --out_file as JSON lines.
"""

import json
import statistics
import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the project's folder, from wherever this is started

from lines import Unavailable, add_line, commit, run_job
from shell import cli
from shell.cli import UserError

SIDES = ("onetune", "hf")


@dataclass
class Settings:
    """The command line.

    Args:
        data: JSON Lines with the columns of BBQ: context, question, ans0, ans1, ans2.
        checkpoint_dir: Model folder.
        dtype: Of the weights and the computation.
        questions: How many of the file's, evenly spread.
        batch_tokens: Positions in the model at one time; for hf as many texts as have so many tokens on average.
        runs: Processes for each side, by turns; their median counts.
        out_file: JSON lines, one a run, are added to this file.
    """

    data: Path
    checkpoint_dir: Path
    dtype: Literal["fp32", "bf16"] = "fp32"
    questions: int = 100
    batch_tokens: int = 2048
    runs: int = 3
    out_file: Path = Path("out/bench/harness.jsonl")

    def __post_init__(self):
        cli.check_numbers(self, "questions", "batch_tokens", "runs", above=0)
        cli.check_files(self, "data")


if __name__ == "__main__":
    settings = cli.parse(Settings)


def main(s):
    call, runs = describe_call(s), {side: [] for side in SIDES}
    pairs = read_questions(s)
    for run in range(s.runs):
        for side in SIDES:
            line = {"side": side, "run": run, **run_side(s, side, pairs)}
            runs[side].append(line)
            add_line(s.out_file, {key: value for key, value in line.items() if key != "scores"} | call)
            print(
                f"{side}: {line['seconds']:.2f} s, {line['cpu_seconds']:.2f} of CPU, {line['peak_gb']:.2f} GB",
                flush=True,
            )
        check(s, runs)
    print_table(s, call, runs)


def read_questions(s):
    """The pairs (context, continuation) of the questions: lists of two texts, the options of each side by side."""
    rows = [json.loads(line) for line in s.data.read_text(encoding="utf-8").splitlines() if line.strip()]
    missing = {"context", "question", "ans0", "ans1", "ans2"} - (rows[0].keys() if rows else set())
    if missing or len(rows) < s.questions:
        what = f"no column {min(missing)}" if missing else f"only {len(rows)} rows"
        raise UserError(f"--data {s.data}: {what}")
    chosen = [rows[i * len(rows) // s.questions] for i in range(s.questions)]
    return [
        (f"{row['context']} {row['question']}\nAnswer:", f" {row[option]}")
        for row in chosen
        for option in ("ans0", "ans1", "ans2")
    ]


def run_side(s, side, pairs):
    """What `harness_side.measure` returns."""
    log = s.out_file.parent / f"harness-{side}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    job = {
        "side": side, "checkpoint_dir": str(s.checkpoint_dir.resolve()), "dtype": s.dtype, "pairs": pairs,
        "batch_tokens": s.batch_tokens,
    }  # fmt: skip
    try:
        return run_job([sys.executable, Path(__file__).with_name("harness_side.py")], job, log)
    except Unavailable as error:
        raise UserError(f"{side}: {error}") from None


def check(s, runs):
    """Raise UserError if the two do not compute the same; in bf16 they round at other places."""
    ours, theirs = (runs[side][-1]["scores"] for side in SIDES)
    worst = max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True))
    if worst > {"fp32": 1e-3, "bf16": 1.0}[s.dtype]:
        raise UserError(f"the log-likelihoods of the two differ by up to {worst:.3g}: this is no comparison")
    runs["onetune"][-1]["worst"] = worst


def describe_call(s):
    import limits

    return {
        "call": datetime.now().isoformat(timespec="seconds"),
        "settings": {key: value.name if isinstance(value, Path) else value for key, value in asdict(s).items()},
        "machine": limits.machine(),
        "commit": commit(),
    }


def print_table(s, call, runs):
    machine = call["machine"]
    where = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    print(f"\n{s.checkpoint_dir.name}, {s.dtype}, {s.questions} questions of {s.data.name}, {where}, {call['commit']}")
    medians = {side: statistics.median(line["seconds"] for line in lines) for side, lines in runs.items()}
    for side, lines in runs.items():
        times, others = [line["seconds"] for line in lines], max(line["others_cpu"] for line in lines)
        cpu, peak = (statistics.median(line[key] for line in lines) for key in ("cpu_seconds", "peak_gb"))
        print(
            f"{side:8} {s.questions / medians[side]:7.2f} questions/s  {min(times):.2f} to {max(times):.2f} s  "
            f"{cpu:.2f} s of CPU  {peak:.2f} GB  others took up to {others:.0%} of the CPU"
        )
    worst = max(line["worst"] for line in runs["onetune"])
    print(f"{medians['hf'] / medians['onetune']:.2f} times as fast as hf; log-likelihoods within {worst:.2g}")


if __name__ == "__main__":
    cli.run(main, settings)
