"""Speed of a process that has the cores for itself, and of each of two that share them.

    python bench/machine/contention.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --data_dir prepared/gsm8k

OpenMP's threads spin while they wait for each other, and so keep cores that a second process needs. Ours spin less then
(ops/core_sharing.py), unless an environment variable says how: --waiting compares both. The peers, transformers + PEFT
for training and transformers for decoding, run as they come. At best each of two processes has half the speed of one;
more than half is time that one process alone leaves unused.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from unittest.mock import patch

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.measuring import OURS, Comparison, alternate, describe, machine_name, print_table, run_job
from shell import cli
from shell.cli import UserError

PEERS = {"training": "peft", "decoding": "transformers"}


@dataclass(kw_only=True)
class Settings(Comparison):
    """The command line.

    Args:
        data_dir: Folder made by prepare_data.py.
        work: What the processes do: LoRA on q and v, or generation for one prompt.
        waiting: How our side's threads wait: "ours", or an environment variable such as OMP_WAIT_POLICY=passive.
        peers: Measure the peers too.
        steps: Optimiser steps of a training; the first two do not count.
        new_tokens: Tokens of a generation.
    """

    data_dir: Path
    work: list[Literal[tuple(PEERS)]] = field(default_factory=lambda: list(PEERS))
    waiting: list[str] = field(
        default_factory=lambda: ["ours", "GOMP_SPINCOUNT=300000", "GOMP_SPINCOUNT=2000", "OMP_WAIT_POLICY=passive"]
    )
    peers: bool = True
    steps: int = 8
    new_tokens: int = 128
    runs: int = 1
    out_file: Path = Path("out/bench/contention.jsonl")

    def __post_init__(self):
        cli.check_numbers(self, "runs", "new_tokens", above=0)
        cli.check_numbers(self, "steps", above=2)
        for waiting in self.waiting:
            if waiting != "ours" and not all(waiting.partition("=")):
                raise UserError(f'--waiting {waiting}: must be "ours" or NAME=VALUE, such as OMP_WAIT_POLICY=passive')


if __name__ == "__main__":
    settings = cli.parse(Settings)

from bench.inference import sides as generation
from bench.inference import speed as generation_speed
from bench.training import peers as training
from bench.training import speed as training_speed
from ops.core_sharing import USERS_CHOICE


def main(s):
    """Measure every side alone and twice at once, in alternating runs, and print the table."""
    jobs = {work: {"training": training_job, "decoding": decoding_job}[work](s) for work in s.work}
    sides = [{"work": work, "side": OURS, "waiting": waiting} for work in s.work for waiting in s.waiting]
    sides += [{"work": work, "side": PEERS[work], "waiting": "as it comes"} for work in s.work if s.peers]
    call, lines = describe(s), []
    for line in alternate(sides, s.runs, lambda **side: measure_side(s, jobs[side["work"]], **side), s, call):
        if "unavailable" in line:
            print(f"{line['side']}, {line['work']}: {line['unavailable']}", file=sys.stderr)
            continue
        line["together"] = " + ".join(f"{rate:,.0f}" for rate in line["at_once"])
        lines.append(line)
    print(f"\n{machine_name(call['machine'])}, tokens/s")
    print_table(
        {"": "{work}", "side": "{side}", "waiting": "{waiting}", "alone": "{alone:,.0f}", "two at once": "{together}"},
        sorted(lines, key=lambda line: line["work"], reverse=True),
    )


def training_job(s):
    """A job for bench/training: steps of eight samples."""
    flags = training_speed.Settings(
        checkpoint_dir=s.checkpoint_dir, data_dir=s.data_dir, dtype=s.dtype, peers=[], steps=s.steps,
        global_batch_size=8,
    )  # fmt: skip
    return training_speed.make_job(flags)


def decoding_job(s):
    """A job for bench/inference/sides.py: one prompt."""
    flags = generation_speed.Settings(checkpoint_dir=s.checkpoint_dir, data_dir=s.data_dir, dtype=s.dtype)
    return {
        "checkpoint_dir": str(s.checkpoint_dir.resolve()), "dtype": s.dtype, "quantize": None, "repeats": 3,
        "prompts": generation_speed.cut_prompts(flags, 1), "new_tokens": s.new_tokens,
    }  # fmt: skip


def measure_side(s, job, work, side, waiting):
    """Tokens a second alone, and of each of two processes at once."""
    job, rate = job | {"side": side}, "tokens_per_second"
    if work == "decoding":
        function, rate = generation.measure, "decode_tokens_per_second"
    elif side == OURS:
        function, job["micro_batch"] = training_speed.measure_ours, next(iter(job["plans"]))  # in positions
    else:
        function, job["micro_batch"] = training.measure_peer, 1  # in samples
    name, _, value = waiting.partition("=")

    def run(process):
        log = s.out_file.parent / f"contention-{process}.log"
        return run_job(function, job, log, ours=side == OURS)[rate]

    with patch.dict(os.environ, {name: value} if value else {}):
        for other in {*USERS_CHOICE} - {name}:  # each row says by itself how threads wait
            os.environ.pop(other, None)
        alone = run("alone")
        with ThreadPoolExecutor(2) as pool:
            return {"alone": alone, "at_once": list(pool.map(run, ("first", "second")))}


if __name__ == "__main__":
    cli.run(main, settings)
