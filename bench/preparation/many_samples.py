"""What a run of finetune.py takes to start, as the data grow: time and peak memory up to the end of its first step.

    python bench/preparation/many_samples.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct

The samples are short and synthetic, in shards of prepare_data.py's default size. Each run is a process of its own, of
one step of few samples: what grows with the data is what counts. Its time is that of the processor, user and system:
others on the machine hardly change it. Also measured: planning a step of 128 samples, and reading them.

Printed as JSON. Each run is a line of --out_file.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.measuring import Measurement, add_line, describe, script_command
from shell import cli
from shell.cli import UserError

TOKENS, DISTINCT = 12, 1000  # of a sample; samples, which are then repeated
STEPS, STEP_SAMPLES = 50, 128  # that are planned and read


@dataclass(kw_only=True)
class Settings(Measurement):
    """The command line.

    Args:
        checkpoint_dir: Model folder; a small one, since its own time and memory are in all figures.
        samples: How many samples the data have.
        repeats: Runs of each.
        folder: On a disk with room for the largest data.
    """

    checkpoint_dir: Path
    samples: list[int] = field(default_factory=lambda: [10**4, 10**5, 10**6, 10**7])
    repeats: int = 3
    folder: Path = Path("out")
    out_file: Path = Path("out/bench/many-samples.jsonl")

    def __post_init__(self):
        cli.check_numbers(self, "repeats", least=1)
        if not self.samples or min(self.samples) < STEP_SAMPLES:
            raise UserError(f"--samples {self.samples}: give numbers of {STEP_SAMPLES} or more")


if __name__ == "__main__":
    settings = cli.parse(Settings)

import numpy as np

from batching import PLANNERS, open_samples, order_of
from preparation.record_store import SampleWriter
from prepare_data import Settings as PreparationSettings
from shell.files import new_folder, write_json
from text.tokenizer import Tokenizer


def main(s):
    """Measure all sizes, and print a line for each."""
    s.folder.mkdir(parents=True, exist_ok=True)
    for count in s.samples:
        with tempfile.TemporaryDirectory(dir=s.folder) as place:
            data = Path(place, "data")
            # In a process of its own: a run's peak, as the system has it, begins at that of the process that starts it.
            writing = multiprocessing.get_context("spawn").Process(target=write_samples, args=(data, s, count))
            writing.start()
            writing.join()
            starts = [one_start(data, Path(place, f"run{number}"), s) for number in range(s.repeats)]
            step = one_step(data)  # after all starts: it takes memory, too
            for start in starts:
                found = {"samples": count, **start, **step}
                add_line(s.out_file, describe(s) | found)
                print(json.dumps(found))


def write_samples(folder, s, count):
    """A prepared folder of so many samples."""
    numbers = np.random.default_rng(0)
    ids = numbers.integers(3, 256, (DISTINCT, TOKENS)).tolist()
    is_target = bytes([0] * (TOKENS // 2) + [1] * (TOKENS - TOKENS // 2))
    with new_folder(folder) as temporary:
        writer = SampleWriter(temporary)
        for i in range(count):
            writer.add(ids[i % DISTINCT], is_target, 0)
        train = writer.save(temporary, "train", shard_tokens=PreparationSettings.shard_tokens)
        info = {"tokenizer_hash": Tokenizer(s.checkpoint_dir).file_hash(), "prompt_style": "plain", "kind": "samples"}
        info |= {"sources": [{"name": "random"}], "train": train, "val": SampleWriter().save(temporary, "val")}
        write_json(temporary / "data.json", info)


def one_start(data, out_dir, s):
    """A run of one step: seconds of the processor and of the clock, and the peak of its memory in bytes."""
    flags = {
        "checkpoint_dir": s.checkpoint_dir, "data_dir": data, "out_dir": out_dir, "max_steps": 1, "eval_interval": 0,
        "save_interval": 0, "global_batch_size": 4,
    }  # fmt: skip
    started = time.perf_counter()
    process = subprocess.Popen(script_command("finetune.py", flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    err = process.stderr.read().decode()
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"finetune.py: {err.strip().splitlines()[-1]}")
    seconds, clock = used.ru_utime + used.ru_stime, time.perf_counter() - started
    return {"cpu_seconds": seconds, "seconds": clock, "peak_bytes": used.ru_maxrss * 1024}


def one_step(data):
    """Milliseconds of the processor to draw and plan a step of 128 samples, and to read them: medians."""
    samples, planner = open_samples(data, "train"), PLANNERS["packed"]
    planning, reading = [], []
    for place in range(STEPS):
        times = [time.process_time()]
        order = order_of(samples, 0, 1, place)  # another epoch each time: places that were not read before
        step = planner.plan(samples, order[:STEP_SAMPLES], 4096)
        times.append(time.process_time())
        for indices in step:
            planner.layout(samples, indices)
        times.append(time.process_time())
        planning.append(times[1] - times[0])
        reading.append(times[2] - times[1])
    return {"plan_ms": 1e3 * float(np.median(planning)), "read_ms": 1e3 * float(np.median(reading))}


if __name__ == "__main__":
    cli.run(main, settings)
