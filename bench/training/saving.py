"""What a save costs over a plain write of the same bytes, and whether it slows the steps after it.

    python bench/training/saving.py --gigabytes 1 --folder out
    python bench/training/saving.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --steps 320

The first: weights in bf16 as `--method full` has them, written alternately as a checkpoint (hashed, flushed, renamed,
with its manifest) and in one go by write and fsync. Prints medians in seconds, and their ratio.

The second: a run of finetune.py on samples of one length, so that all steps have the same work, which saves after every
fourth step. Prints the median seconds of the steps right after a save and of the others (of the two in the middle
between saves, since a machine that drifts drifts for both), their ratio, and its standard error by bootstrap.

Printed as JSON. Each save, or the whole run, is a line of --out_file.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.measuring import Measurement, add_line, alternate, describe, script_command, summarize
from shell import cli
from shell.cli import UserError

INTERVAL = 4  # steps from save to save


@dataclass(kw_only=True)
class Settings(Measurement):
    """The command line.

    Args:
        gigabytes: Size of what is saved.
        repeats: Saves, and plain writes.
        folder: On the disk to measure.
        checkpoint_dir: Model folder; with it, the steps after a save are measured, not the save.
        steps: Of that run; the first eight do not count.
        tokens: Of each of its samples.
    """

    gigabytes: float = 1.0
    repeats: int = 5
    folder: Path = Path("out")
    checkpoint_dir: Path | None = None
    steps: int = 320
    tokens: int = 256
    out_file: Path = Path("out/bench/saving.jsonl")

    def __post_init__(self):
        cli.check_numbers(self, "gigabytes", "repeats", above=0)
        cli.check_numbers(self, "steps", least=4 * INTERVAL)
        cli.check_numbers(self, "tokens", least=2)


if __name__ == "__main__":
    settings = cli.parse(Settings)

import numpy as np
import torch

from preparation.record_store import SampleWriter
from shell.files import new_folder, write_json
from text.tokenizer import Tokenizer
from weights.checkpoint import write_weights

TENSOR_VALUES = 4096 * 4096  # of a projection of a 7B model


def main(s):
    """Measure one of the two and print it."""
    print(json.dumps(steps_after_saves(s) if s.checkpoint_dir else one_save(s)))


# -------------------------------------------------------------------------------------------------------- one save


def one_save(s):
    """Median seconds of a save and of a plain write of the same tensors."""
    count = max(1, round(s.gigabytes * 1e9 / (2 * TENSOR_VALUES)))
    tensor = torch.randn(TENSOR_VALUES).to(torch.bfloat16)
    tensors = {f"{number}.weight": tensor + number for number in range(count)}
    ways = {"save": save, "write": write}

    def measure(way):
        place = s.folder / "saving"
        place.mkdir(parents=True)
        os.sync()
        started = time.perf_counter()
        ways[way](tensors, place)
        seconds = time.perf_counter() - started
        shutil.rmtree(place)
        return {"seconds": seconds}

    sides = [{"way": way} for way in ways]
    rows = summarize(alternate(sides, s.repeats, measure, s, describe(s)), ("way",), ("seconds",))
    saved, written = (row["seconds"] for row in rows)
    gigabytes = 2 * TENSOR_VALUES * count / 1e9
    return {"gigabytes": gigabytes, "save": saved, "write": written, "ratio": saved / written}


def save(tensors, place):
    """Write tensors as a checkpoint."""
    hashes, layout = {}, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with new_folder(place / "step-000001", hashes) as folder:
        hashes |= write_weights(folder, layout, tensors.__getitem__)


def write(tensors, place):
    """Write the same bytes into one file."""
    with open(place / "plain", "wb") as file:
        for tensor in tensors.values():
            file.write(tensor.view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


# -------------------------------------------------------------------------------------------- the steps after a save


def steps_after_saves(s):
    """Median seconds of the steps right after a save and of those between, in one run of finetune.py."""
    s.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=s.folder) as place:
        data, run = Path(place, "data"), Path(place, "run")
        write_samples(data, s)
        flags = {
            "checkpoint_dir": s.checkpoint_dir, "data_dir": data, "out_dir": run, "max_steps": s.steps,
            "eval_interval": 0, "save_interval": INTERVAL, "global_batch_size": 1,
        }  # fmt: skip
        done = subprocess.run(script_command("finetune.py", flags), capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"finetune.py failed: {done.stderr.strip()[-500:]}")
        with open(run / "metrics.csv", newline="") as file:
            seconds = np.array([float(row["seconds"]) for row in csv.DictReader(file) if row["loss"]])
    rounds = seconds[2 * INTERVAL : len(seconds) // INTERVAL * INTERVAL].reshape(-1, INTERVAL)  # begin after a save
    after, others = rounds[:, 0], rounds[:, 1:-1].mean(axis=1)
    picks = np.random.default_rng(0).integers(len(rounds), size=(2000, len(rounds)))
    ratios = np.median(after[picks], axis=1) / np.median(others[picks], axis=1)
    after, others = np.median(after), np.median(others)
    found = {
        "saves": len(rounds), "after": after, "others": others, "ratio": after / others, "error": ratios.std(),
    }  # fmt: skip
    add_line(s.out_file, describe(s) | found)
    return found


def write_samples(folder, s):
    """A prepared folder of random samples of one length."""
    folder.mkdir()
    numbers, info = np.random.default_rng(0), {"tokenizer_hash": Tokenizer(s.checkpoint_dir).file_hash()}
    for part, count in (("train", s.steps), ("val", 0)):
        writer = SampleWriter(folder)
        for _ in range(count):
            writer.add(numbers.integers(3, 256, s.tokens).tolist(), [i > 0 for i in range(s.tokens)], 0)
        info[part] = writer.save(folder, part)
    more = {"kind": "samples", "prompt_style": "plain", "sources": [{"name": "random"}]}
    write_json(folder / "data.json", info | more)


if __name__ == "__main__":
    cli.run(main, settings)
