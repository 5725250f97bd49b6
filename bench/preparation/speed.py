"""Speed and memory of data preparation: the whole command, on a file and on one several times as long.

    python bench/prepare_data.py --data samples.jsonl --checkpoint_dir checkpoints/SmolLM2-135M-Instruct

Each run is `prepare_data.py` in a process of its own, with its workers. Printed, medians over the runs, and added to
--out_file as JSON lines:

tokens      reading, rendering, tokenising, writing, and the report
duplicates  the same with --near_duplicates 0.8: exact and MinHash duplicates
start       the same with ten samples: what the imports and the report take however small the data are
MB/s        size of the file over the time of "tokens", and over that less "start"
memory      the most that all processes together took, pages that they share counted once (GB), sampled every 50 ms
growth      the memory for a file --times as long, over that for the file itself

Needs psutil.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the project's folder, from wherever this is started

from lines import add_line, commit
from shell import cli
from shell.cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        data: JSON Lines with prompt and completion (or other names that prepare_data.py knows).
        checkpoint_dir: Model folder.
        runs: Of each kind; their median counts.
        times: How many times as long the second file is; 1 for none.
        out_file: JSON lines, one a run, are added to this file.
    """

    data: Path
    checkpoint_dir: Path
    runs: int = 3
    times: int = 10
    out_file: Path = Path("out/bench/prepare_data.jsonl")

    def __post_init__(self):
        cli.check_numbers(self, "runs", "times", above=0)
        cli.check_files(self, "data")


if __name__ == "__main__":
    settings = cli.parse(Settings)


def main(s):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = {"start": folder / "start.jsonl", "tokens": s.data, "duplicates": s.data}
        write_copies(s.data, files["start"], 1, most=10)
        kinds = list(files) * s.runs
        if s.times > 1:
            files["longer"] = folder / "longer.jsonl"
            write_copies(s.data, files["longer"], s.times)
            kinds.append("longer")
        lines = []
        for kind in kinds:
            lines.append({"kind": kind, **measure(s, files[kind], folder, kind == "duplicates"), "commit": commit()})
            add_line(s.out_file, lines[-1])
            print(json.dumps(lines[-1]), flush=True)
    print_table(s, lines)


def write_copies(data, path, times, most=None):
    """Write the samples of a file so many times, no two of them the same."""
    with open(data, encoding="utf-8") as file, open(path, "w", encoding="utf-8") as copy:
        for line in islice((line for line in file if line.strip()), most):
            row = json.loads(line)
            name = next(name for name in ("prompt", "question", "instruction") if name in row)
            for i in range(times):
                copy.write(json.dumps({**row, name: f"{i} {row[name]}"}, ensure_ascii=False) + "\n")


def measure(s, data, folder, duplicates):
    """One run of the command: its seconds, the peak memory of its processes, and what it made."""
    out = folder / "prepared"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, str(ROOT / "prepare_data.py"), "--data", str(data), "--out_dir", str(out)]
    command += ["--checkpoint_dir", str(s.checkpoint_dir), "--prompt_style", "plain"]
    command += ["--near_duplicates", "0.8"] * duplicates
    started = time.perf_counter()
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        peak = watch(process)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise UserError(f"prepare_data.py failed: {(folder / 'log').read_text()[-500:]}")
    info = json.loads((out / "data.json").read_text())
    return {
        "seconds": seconds, "peak_gb": peak / 1e9, "megabytes": data.stat().st_size / 1e6, "cores": os.cpu_count(),
        "tokens": info["train"]["tokens"] + info["val"]["tokens"], "counts": info["sources"][0]["counts"],
    }  # fmt: skip


def watch(process):
    """The most bytes that a process and its children took together, until it ends."""
    import psutil

    peak = 0
    while process.poll() is None:
        total = 0
        try:
            top = psutil.Process(process.pid)
            for one in (top, *top.children(recursive=True)):
                total += one.memory_full_info().pss
        except psutil.Error:  # it ended meanwhile
            continue
        peak = max(peak, total)
        time.sleep(0.05)
    return peak


def print_table(s, lines):
    def median(kind, name):
        return statistics.median(line[name] for line in lines if line["kind"] == kind)

    start, tokens, duplicates = (median(kind, "seconds") for kind in ("start", "tokens", "duplicates"))
    size = median("tokens", "megabytes")
    print(f"{s.data.name}, {size:.1f} MB: tokens {tokens:.1f} s, of which start {start:.1f}; {size / tokens:.1f} MB/s, "
          f"without the start {size / (tokens - start):.1f}")  # fmt: skip
    print(f"with exact and MinHash duplicates {duplicates:.1f} s; peak memory {median('duplicates', 'peak_gb'):.2f} GB")
    if s.times > 1:
        growth = median("longer", "peak_gb") / median("tokens", "peak_gb")
        print(f"{s.times} times as long: {median('longer', 'seconds'):.1f} s, {median('longer', 'peak_gb'):.2f} GB, "
              f"{growth:.2f} times the memory")  # fmt: skip


if __name__ == "__main__":
    cli.run(main, settings)
