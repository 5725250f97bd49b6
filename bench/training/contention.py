"""Training speed of a run alone and of two runs at once on the same cores, under several settings of OpenMP.

    python bench/training/contention.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --data_dir prepared/gsm8k

OpenMP's threads spin while they wait for each other; what they may do is said by environment variables. Each row has
the speed of the median step of a run that has the machine for itself, and of each of two that share it: at best half
as much. "ours" is what shell/process.py sets; transformers + PEFT runs with OpenMP as it comes, and with ours.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.measuring import Comparison, alternate, describe, machine_name, print_table, run_job
from shell import cli, process

OPENMP = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@dataclass(kw_only=True)
class Settings(Comparison):
    """The command line.

    Args:
        data_dir: Folder made by prepare_data.py.
        waiting: Settings of OpenMP to compare: "ours", "none" for its own, or a variable such as
            OMP_WAIT_POLICY=passive.
        peft: Measure transformers + PEFT too, with "none" and "ours".
        global_batch_size: Samples in a step.
        steps: Optimiser steps of a run; the first two do not count.
    """

    data_dir: Path
    waiting: list[str] = field(default_factory=lambda: ["ours", "none", "OMP_WAIT_POLICY=passive"])
    peft: bool = True
    global_batch_size: int = 8
    steps: int = 6
    runs: int = 1
    out_file: Path = Path("out/bench/contention.jsonl")

    def __post_init__(self):
        cli.check_numbers(self, "runs", "global_batch_size", above=0)
        cli.check_numbers(self, "steps", above=2)


if __name__ == "__main__":
    settings = cli.parse(Settings)

from bench.training import peers, speed


def main(s):
    """Measure every side alone and twice at once, in alternating runs, and print the table."""
    flags = speed.Settings(
        checkpoint_dir=s.checkpoint_dir, data_dir=s.data_dir, dtype=s.dtype, steps=s.steps, peers=[],
        global_batch_size=s.global_batch_size, micro_batch_tokens=[2048],
    )  # fmt: skip
    job = speed.make_job(flags)
    sides = [{"side": "onetune", "waiting": waiting} for waiting in s.waiting]
    sides += [{"side": "peft", "waiting": waiting} for waiting in ("none", "ours") if s.peft]
    lines = list(alternate(sides, s.runs, lambda side, waiting: measure_side(s, job, side, waiting), s, describe(s)))
    for line in lines:
        line["together"] = " + ".join(f"{rate:,.0f}" for rate in line["at_once"])
    print(f"\n{machine_name()}, tokens/s")
    print_table({"side": "{side}", "OpenMP": "{waiting}", "alone": "{alone:,.0f}", "two at once": "{together}"}, lines)


def measure_side(s, job, side, waiting):
    """Tokens a second alone, and of each of two runs at once."""
    set_waiting(waiting)
    job = job | {"side": side, "micro_batch": 2048 if side == "onetune" else 1}
    function = speed.measure_ours if side == "onetune" else peers.measure_peer

    def run(name):
        log = s.out_file.parent / f"contention-{name}.log"
        return run_job(function, job, log, ours=True)["tokens_per_second"]  # the environment is as set_waiting left it

    alone = run("alone")
    with ThreadPoolExecutor(2) as pool:
        return {"alone": alone, "at_once": list(pool.map(run, ("first", "second")))}


def set_waiting(waiting):
    """Put one setting of OpenMP into the environment of the runs to come."""
    for name in OPENMP:
        os.environ.pop(name, None)
    if waiting == "ours":
        process.set_defaults()
    elif waiting != "none":
        name, _, value = waiting.partition("=")
        os.environ[name] = value


if __name__ == "__main__":
    cli.run(main, settings)
