"""Speed and memory of data preparation: the whole command, on a file and on one several times as long.

    python bench/preparation/speed.py --data samples.jsonl --checkpoint_dir checkpoints/SmolLM2-135M-Instruct

Each run is `prepare_data.py` in a process of its own, with its workers. Printed, medians over the runs, and added to
--out_file as JSON lines:

tokens      reading, rendering, tokenising, writing, and the report
duplicates  the same with --near_duplicates 0.8: exact and MinHash duplicates
start       the same with ten samples: what the imports and the report take however small the data are
longer      "tokens" on a file --times as long, once
MB/s        size of the file over its time, and over that less the time of "start"
memory      the most that all processes together took, pages that they share counted once (GB), sampled every 50 ms
growth      the memory of "longer", over that of "tokens"

Needs psutil.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.measuring import Measurement, alternate, describe, machine_name, print_table, script_command, summarize
from shell import cli
from shell.cli import UserError


@dataclass(kw_only=True)
class Settings(Measurement):
    """The command line.

    Args:
        data: JSON Lines with prompt and completion (or other names that prepare_data.py knows).
        runs: Of each kind; their median counts.
        times: How many times as long the second file is; 1 for none.
    """

    data: Path
    runs: int = 3
    times: int = 10
    out_file: Path = Path("out/bench/preparation_speed.jsonl")

    def __post_init__(self):
        cli.check_numbers(self, "runs", "times", above=0)
        cli.check_files(self, "data")


if __name__ == "__main__":
    settings = cli.parse(Settings)

COLUMNS = {
    "kind": "{kind}", "runs": "{runs}", "seconds": "{seconds:.1f}", "from": "{spread[0]:.1f}", "to": "{spread[1]:.1f}",
    "MB": "{megabytes:.1f}", "MB/s": "{rate:.1f}", "without start": "{rate_without_start}", "memory": "{peak_gb:.2f}",
}  # fmt: skip


def main(s):
    """Measure all kinds of runs and print their table."""
    call, lines = describe(s), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = {"start": folder / "start.jsonl", "tokens": s.data, "duplicates": s.data}
        write_copies(s.data, files["start"], 1, most=10)
        kinds = [{"kind": kind} for kind in files]
        files["longer"] = folder / "longer.jsonl"

        def measure_kind(kind):
            return measure(s, files[kind], folder, kind == "duplicates")

        for line in alternate(kinds, s.runs, measure_kind, s, call):
            lines.append(line)
            print(json.dumps(line), flush=True)
        if s.times > 1:
            write_copies(s.data, files["longer"], s.times)
            lines += alternate([{"kind": "longer"}], 1, measure_kind, s, call)
    show(s, call, summarize(lines, ("kind",), ("seconds", "peak_gb", "megabytes")))


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
    flags = {"data": data, "checkpoint_dir": s.checkpoint_dir, "out_dir": out, "prompt_style": "plain"}
    flags |= {"near_duplicates": 0.8} if duplicates else {}
    started = time.perf_counter()
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(script_command("prepare_data.py", flags), stdout=log, stderr=log)
        peak = watch(process)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise UserError(f"prepare_data.py failed: {(folder / 'log').read_text()[-500:]}")
    info = json.loads((out / "data.json").read_text())
    return {
        "seconds": seconds, "peak_gb": peak / 1e9, "megabytes": data.stat().st_size / 1e6,
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


def show(s, call, rows):
    """Print the table, and how memory grows with the file."""
    by_kind = {row["kind"]: row for row in rows}
    start = by_kind["start"]["seconds"]
    for row in rows:
        row["rate"] = row["megabytes"] / row["seconds"]
        row["rate_without_start"] = (
            "" if row["kind"] == "start" else f"{row['megabytes'] / (row['seconds'] - start):.1f}"
        )
    print(f"\n{s.data.name}, {s.checkpoint_dir.name}, {machine_name(call['machine'])}, {call['commit']}")
    print_table(COLUMNS, rows)
    if "longer" in by_kind:
        growth = by_kind["longer"]["peak_gb"] / by_kind["tokens"]["peak_gb"]
        print(f"growth: {growth:.2f} times the memory for a file {s.times} times as long")


if __name__ == "__main__":
    cli.run(main, settings)
