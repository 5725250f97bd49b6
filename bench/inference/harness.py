"""Multiple choice under lm-eval: our model class against lm-eval's own `hf`, on the same questions.

    python bench/inference/harness.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --data bbq_age.jsonl

Needs requirements-eval.txt and requirements-dev.txt. Each run is a process that loads the model, scores a few questions
uncounted, and then all of them: what is timed is lm-eval's `loglikelihood`, from texts to figures. Both have the same
budget of positions in a batch. It stops if the two differ. Results are added to --out_file as JSON lines.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.measuring import (
    OURS,
    Comparison,
    alternate,
    cpu_times,
    describe,
    device_name,
    installed_versions,
    machine_name,
    others_share,
    peak_memory,
    print_table,
    run_job,
    summarize,
)
from shell import cli
from shell.cli import UserError


@dataclass(kw_only=True)
class Settings(Comparison):
    """The command line.

    Args:
        data: JSON Lines with the columns of BBQ: context, question, ans0, ans1, ans2.
        questions: How many of the file's, evenly spread.
        batch_tokens: Positions in the model at one time; for hf as many texts as have so many tokens on average.
    """

    data: Path
    dtype: Literal["bf16", "fp32"] = "fp32"
    questions: int = 100
    batch_tokens: int = 2048
    out_file: Path = Path("out/bench/harness.jsonl")

    def __post_init__(self):
        cli.check_numbers(self, "questions", "batch_tokens", "runs", above=0)
        cli.check_files(self, "data")


if __name__ == "__main__":
    settings = cli.parse(Settings)

COLUMNS = {
    "side": "{side}", "questions/s": "{rate:.2f}", "seconds from": "{spread[0]:.2f}", "to": "{spread[1]:.2f}",
    "CPU seconds": "{cpu_seconds:.2f}", "memory": "{peak_gb:.2f}", "others": "{others_cpu:.1%}",
}  # fmt: skip


def main(s):
    """Measure both sides in alternating runs and print their table."""
    call, pairs, scores, lines = describe(s), read_questions(s), {}, []
    paths = {"checkpoint_dir": str(s.checkpoint_dir.resolve()), "dtype": s.dtype, "batch_tokens": s.batch_tokens}

    def measure_side(side):
        line = run_job(
            measure,
            {"side": side, "pairs": pairs, **paths},
            s.out_file.parent / f"harness-{side}.log",
            ours=side == OURS,
        )
        scores[side] = line.pop("scores")
        return line | {"worst": largest_difference(scores, s.dtype)}

    for line in alternate([{"side": OURS}, {"side": "hf"}], s.runs, measure_side, s, call):
        if "unavailable" in line:
            raise UserError(f"{line['side']}: {line['unavailable']}")
        lines.append(line)
        print("{side}: {seconds:.2f} s, {cpu_seconds:.2f} of CPU, {peak_gb:.2f} GB".format(**line), flush=True)
    rows = summarize(lines, ("side",), ("seconds", "cpu_seconds", "peak_gb", "others_cpu"))
    where = machine_name(call["machine"])
    print(f"\n{s.checkpoint_dir.name}, {s.dtype}, {s.questions} questions of {s.data.name}, {where}, {call['commit']}")
    print_table(COLUMNS, [row | {"rate": s.questions / row["seconds"]} for row in rows])
    ours, theirs = (row["seconds"] for row in rows)
    worst = max(line["worst"] for line in lines)
    print(f"{theirs / ours:.2f} times as fast as hf; log-likelihoods within {worst:.2g}")


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


def largest_difference(scores, dtype):
    """Between the log-likelihoods of the two sides, or 0 while there is one. Raises UserError if it is too large.

    In bf16 the two round at other places.
    """
    ours, theirs = (scores.get(side, scores[OURS]) for side in (OURS, "hf"))
    worst = max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True))
    if worst > {"fp32": 1e-3, "bf16": 1.0}[dtype]:
        raise UserError(f"the log-likelihoods of the two differ by up to {worst:.3g}: this is no comparison")
    return worst


# ------------------------------------------------------------------------------------- the sides, in their processes


def ours(job):
    """The class behind eval/lm_eval_harness.py."""
    from eval.lm_eval_harness import OnetuneLM
    from inference.writer import Writer

    precision = {"fp32": "32-true", "bf16": "bf16-true"}[job["dtype"]]
    return OnetuneLM(Writer(job["checkpoint_dir"], None, None, precision), job["batch_tokens"])


def hf(job):
    """lm-eval's class for transformers' models."""
    from lm_eval.models.huggingface import HFLM

    dtype = {"fp32": "float32", "bf16": "bfloat16"}[job["dtype"]]
    model = HFLM(pretrained=job["checkpoint_dir"], dtype=dtype, device=device_name())
    tokens = sum(len(model.tok_encode(context + continuation)) for context, continuation in job["pairs"])
    model.batch_size_per_gpu = max(1, job["batch_tokens"] * len(job["pairs"]) // tokens)
    return model


def measure(job):
    """Seconds for all pairs (context, continuation), after three questions that are not counted."""
    from lm_eval.api.instance import Instance

    model = {OURS: ours, "hf": hf}[job["side"]](job)
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=tuple(pair), idx=i)
        for i, pair in enumerate(job["pairs"])
    ]
    model.loglikelihood(requests[:9], disable_tqdm=True)
    start = cpu_times()
    scores = model.loglikelihood(requests, disable_tqdm=True)
    end = cpu_times()
    return {
        "seconds": end[0] - start[0],
        "cpu_seconds": end[2] - start[2],
        "peak_gb": peak_memory() / 1e9,
        "others_cpu": others_share(start, end),
        "versions": installed_versions(),
        "scores": scores,
    }


if __name__ == "__main__":
    cli.run(main, settings)
