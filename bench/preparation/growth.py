"""How time and memory of data preparation grow with the rows, with each engine.

    python bench/preparation/growth.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct

Made for each of --sizes: rows of a question and an answer of made-up words (about 250 bytes). One in ten nearly repeats
an earlier question, one in fifty repeats it whole, and one in a hundred has words of a benchmark in it. Each run is
`prepare_data.py` in a process of its own, with exact and MinHash duplicates, leaks, and a validation part. Every engine
has two workers. Printed, and added to --out_file as JSON lines:

seconds         of the whole command; what others do on the machine shows in it
driver s        processor time of the process that reads, decides and writes, its start included; workers s: that of
                all that filter and tokenise together, without the last quarter of a second
driver MB       the most that the first took, worker MB: that one of the others took; without what processes share, but
                what the first has read of Ray's object store is its own once Ray's processes have ended
total MB        the most that all took together, shared pages counted once

Then what follows for --predicted rows from the largest two sizes, by a straight line through them: not measured.

Needs psutil, and for the engine ray requirements-ray.txt.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.measuring import Measurement, alternate, describe, machine_name, print_table, script_command
from shell import cli
from shell.cli import UserError


@dataclass(kw_only=True)
class Settings(Measurement):
    """The command line.

    Args:
        sizes: Rows of each file.
        engines: To be measured.
        predicted: Rows to calculate the same for; 0 for none.
    """

    sizes: list[int] = field(default_factory=lambda: [10**4, 10**5, 10**6])
    engines: list[str] = field(default_factory=lambda: ["local", "ray"])
    predicted: int = 10**7
    out_file: Path = Path("out/bench/preparation_growth.jsonl")

    def __post_init__(self):
        cli.check_numbers(self, "sizes", above=0)
        cli.check_numbers(self, "predicted", least=0)
        known = cli.table_keys("preparation/engines.py", "ENGINES")
        if unknown := [engine for engine in self.engines if engine not in known]:
            raise UserError(f"--engines {unknown[0]}: expected some of {', '.join(known)}")


if __name__ == "__main__":
    settings = cli.parse(Settings)

import psutil

COLUMNS = {
    "engine": "{engine}", "rows": "{rows:,}", "seconds": "{seconds:.0f}", "driver s": "{driver_seconds:.1f}",
    "workers s": "{worker_seconds:.1f}", "driver MB": "{driver_mb:.0f}", "worker MB": "{worker_mb:.0f}",
    "total MB": "{total_mb:.0f}",
}  # fmt: skip


def main(s):
    """Measure all sizes with all engines, and print the table."""
    call, lines = describe(s), []
    with tempfile.TemporaryDirectory() as folder:
        for rows in s.sizes:
            data, benchmark = write_rows(Path(folder), rows)
            sides = [{"engine": engine, "rows": rows} for engine in s.engines]
            measured = alternate(sides, 1, partial(measure, s, data, benchmark), s, call)
            for line in measured:
                lines.append(line)
                print(json.dumps(line), flush=True)
            data.unlink()
    print(f"\n{s.checkpoint_dir.name}, {machine_name(call['machine'])}, {call['commit']}")
    print_table(COLUMNS, lines)
    if s.predicted and len(s.sizes) > 1:
        print(f"\ncalculated for {s.predicted:,} rows, not measured")
        print_table(COLUMNS, [predict(lines, engine, s.predicted) for engine in s.engines])


def write_rows(folder, count):
    """The files of so many rows, and of a benchmark of 200."""
    generator = random.Random(count)
    letters = "abcdefghijklmnoprstuvwy"
    vocabulary = ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(20000)]
    asked = [" ".join(generator.choices(vocabulary, k=20)) for _ in range(200)]
    data, benchmark = folder / "rows.jsonl", folder / "benchmark.jsonl"
    benchmark.write_text("".join(json.dumps({"question": text, "answer": "yes"}) + "\n" for text in asked))
    before = generator.choices(vocabulary, k=20)
    with open(data, "w") as file:
        for number in range(count):
            words = generator.choices(vocabulary, k=20)
            if number % 10 == 5:
                words = [*before[:19], "otherwise"]
            elif number % 50 == 7:
                words = before
            elif number % 100 == 9:
                words[3:17] = generator.choice(asked).split()[:14]
            before = words
            answer = " ".join(generator.choices(vocabulary, k=20))
            file.write(json.dumps({"question": " ".join(words), "answer": answer}) + "\n")
    return data, benchmark


def measure(s, data, benchmark, engine, rows):
    """One run of the command with an engine: its time, and what its processes took. rows: those of `data`."""
    out = data.parent / "prepared"
    shutil.rmtree(out, ignore_errors=True)
    flags = {"data": data, "checkpoint_dir": s.checkpoint_dir, "out_dir": out, "prompt_style": "plain", "workers": 2}
    flags |= {"near_duplicates": 0.8, "benchmarks": benchmark, "leak_cosine": 0, "engine": engine}
    started = time.perf_counter()
    with open(data.parent / "log", "w") as log:
        process = subprocess.Popen(script_command("prepare_data.py", flags), stdout=log, stderr=log)
        taken = watch(process)
    if process.returncode:
        raise UserError(f"prepare_data.py failed: {(data.parent / 'log').read_text()[-500:]}")
    if (counts := json.loads((out / "data.json").read_text())["sources"][0]["counts"])["read"] != rows:
        raise UserError(f"prepare_data.py has read {counts['read']} of {rows} rows")
    return {"seconds": time.perf_counter() - started, **taken, "megabytes": data.stat().st_size / 1e6, "counts": counts}


def watch(process):
    """What a process and those below it took until it ends: the most memory in MB, and processor time in seconds."""
    peaks, seconds, total = {}, {}, 0
    top = psutil.Process(process.pid)
    while process.poll() is None:
        together = 0
        for one in (top, *top.children(recursive=True)):
            try:
                memory, times = one.memory_full_info(), one.cpu_times()
                kind = "driver" if one == top else "worker" if is_worker(one, process.args) else "other"
            except psutil.Error:  # it ended meanwhile
                continue
            together += memory.pss
            peaks[kind] = max(peaks.get(kind, 0), memory.uss)
            seconds[kind, one.pid] = times.user + times.system
        total = max(total, together)
        time.sleep(0.25)
    spent = {kind: sum(taken for (of, _), taken in seconds.items() if of == kind) for kind in ("driver", "worker")}
    return {
        "driver_mb": peaks["driver"] / 1e6, "worker_mb": peaks.get("worker", 0) / 1e6, "total_mb": total / 1e6,
        "driver_seconds": spent["driver"], "worker_seconds": spent["worker"],
    }  # fmt: skip


def is_worker(process, command):
    """Whether a process below the command is one that filters and tokenises: of Ray's own, none else does."""
    found = process.cmdline()
    return found == command or found[:1] in (["ray::MapBatches(_work)"], ["ray::IDLE"])


def predict(lines, engine, rows):
    """A line for so many rows, on the straight line through an engine's last two."""
    before, last = [line for line in lines if line["engine"] == engine][-2:]
    share = (rows - last["rows"]) / (last["rows"] - before["rows"])
    names = ("seconds", "driver_seconds", "worker_seconds", "driver_mb", "worker_mb", "total_mb")
    line = {name: last[name] + share * (last[name] - before[name]) for name in names}
    return line | {"engine": engine, "rows": rows}


if __name__ == "__main__":
    cli.run(main, settings)
