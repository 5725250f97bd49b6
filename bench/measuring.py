"""What the scripts of bench/ share: flags, alternating runs, processes, medians, tables and charts.

A script describes its call with `describe`, measures its sides with `alternate`, which appends a JSON line for every
run to a file, and shows the lines with `summarize`, `print_table` and `draw_bars`. `run_job` calls a function in a
process of its own, which is this file, started on a description of the call:

    python bench/measuring.py JOB.json

At its top this file imports nothing but the standard library, because the peers' side of a comparison imports it under
interpreters that have only the peer installed.
"""

import csv
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
OURS = "onetune"
BEFORE = "onetune before"  # the side of --before_dir
PACKAGES = (
    "torch", "lightning", "bitsandbytes", "transformers", "peft", "accelerate", "trl", "litgpt", "torchtune", "torchao",
    "lm_eval",
)  # fmt: skip
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve")


class Unavailable(Exception):
    """A side that cannot be measured here; the text says why."""


@dataclass(kw_only=True)
class Measurement:
    """Flags of nearly every script.

    Args:
        checkpoint_dir: Model folder.
        out_file: A JSON line for every run is added to this file.
    """

    checkpoint_dir: Path
    out_file: Path


@dataclass(kw_only=True)
class Comparison(Measurement):
    """Flags of a script that compares speeds.

    Args:
        dtype: Dtype of the weights.
        runs: Runs of each side; the sides alternate, and the medians count.
    """

    dtype: Literal["bf16", "fp32"] = "bf16"
    runs: int = 3


# ------------------------------------------------------------------------------------------------------ JSON lines


def describe(settings) -> dict:
    """What all lines of a call share: when, with which settings (a dataclass), on which machine, by which code."""
    left_out = ("out_file", "venvs_dir", "report")
    kept = {key: value for key, value in asdict(settings).items() if key not in left_out}
    return {
        "call": datetime.now().isoformat(timespec="seconds"),
        "settings": {
            key.removesuffix("_dir"): value.name if isinstance(value, Path) else value for key, value in kept.items()
        },
        "machine": machine(),
        "versions": installed_versions(),
        "commit": commit(),
    }


def machine() -> dict:
    """What speeds depend on: the processor with its extensions for arithmetic, and the GPU if there is one."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    info = dict((part.strip() for part in line.split(":", 1)) for line in lines if ":" in line)
    flags = (info.get("flags") or info.get("Features") or "").split()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def machine_name(machine: dict) -> str:
    """The machine of a line, for a title."""
    return machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"


def installed_versions() -> dict[str, str]:
    """{package: version} of what a measurement may depend on, where it is installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit(root: Path = ROOT) -> str | None:
    """A checkout's commit, with "+" if files were changed since; None without git or outside a repository."""
    command = ["git", "-C", root, "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def check_checkout(folder: Path | None) -> None:
    """Raise UserError if the folder of --before_dir is not a checkout of the project."""
    if folder and not (folder / "bench" / "measuring.py").is_file():
        from shell.cli import UserError  # not at the top: the peers' interpreters lack what it imports

        raise UserError(f"--before_dir {folder}: not a checkout of this project: it has no bench/measuring.py")


def add_line(path: Path, line: dict) -> None:
    """Append `line` to a file of JSON lines, made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


# -------------------------------------------------------------------------------------------------- alternating runs


def alternate(sides: list[dict], runs: int, measure: Callable[..., dict], settings, call: dict) -> Iterator[dict]:
    """Measure all sides one after the other, and that `runs` times, so that a machine that slows down does so for all.

    sides: the fields that name a side, such as {"side": "peft", "micro_batch": 4}; `measure(**side)` returns the other
    fields of its line. Each line is appended to `settings.out_file`, together with the fields of `call`, and yielded.

    A side whose `measure` raises Unavailable gets one line with the reason as "unavailable" and is not tried again. If
    it is ours, there is nothing to compare: raises UserError.
    """
    sides = list(sides)
    for run in range(runs):
        for side in list(sides):
            line = {**side, "run": run}
            try:
                line |= measure(**side)
            except Unavailable as error:
                if side.get("side", OURS) == OURS:
                    from shell.cli import UserError  # not at the top: the peers' interpreters lack what it imports

                    raise UserError(f"{' '.join(map(str, side.values()))}: {error}") from None
                line["unavailable"] = str(error)
                sides.remove(side)
            add_line(settings.out_file, {**call, **line})  # a peer's own versions over those of this interpreter
            yield line


# -------------------------------------------------------------------------------------------- of the running process


def cpu_times() -> tuple[float, float, float]:
    """Seconds: the time, the CPU time of all processes since the machine started, and that of this one."""
    own = os.times()
    try:
        user, nice, system, _idle, _iowait, irq, softirq, steal = Path("/proc/stat").read_text().split()[1:9]
        busy = sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf("SC_CLK_TCK")
    except OSError:
        busy = 0.0  # where the system does not say
    return time.time(), busy, own.user + own.system + own.children_user + own.children_system


def others_share(start: tuple, end: tuple) -> float:
    """The share of the machine's CPUs that other processes took between two `cpu_times`."""
    seconds, busy, own = (b - a for a, b in zip(start, end, strict=True))
    return max(0.0, busy - own) / (seconds * (os.cpu_count() or 1))


def device_name() -> str:
    """ "cuda" if there is a GPU, else "cpu": the same for every side."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def peak_memory() -> int:
    """Peak memory in bytes: of tensors on a GPU, of the whole process on a CPU.

    getrusage is the last resort: the figure of a child process starts at its parent's peak.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ------------------------------------------------------------------------------------------------ starting processes


def run_job(
    function: Callable[[dict], dict], job: dict, log: Path, python: str | Path = sys.executable, ours: bool = True,
    root: Path = ROOT, processes: int | None = None,
) -> dict:  # fmt: skip
    """Call `function(job)` in a new process of the interpreter `python` and return its result; `log` gets its output.

    ours: whether the process has the environment variables that our scripts set (shell/process.py).
    root: the checkout of the project whose function of that name is called.
    processes: how many call it together, each with one thread, started by torchrun if there are several; the result is
        that of the first one. None: one process, with the threads that it chooses.

    function: defined at the top level of a file in bench/. job, result: dicts that JSON can hold. The function finds
    two more keys: "work_dir", a temporary folder, and "started", the time at which its process was started.
    Raises Unavailable if the function does, or if it returns nothing.
    """
    from shell import process  # not at the top: a peer's interpreter reads this file, too

    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work_dir, open(log, "w") as output:
        path, result = Path(work_dir, "job.json"), Path(work_dir, "result.json")
        file = Path(function.__code__.co_filename).resolve().relative_to(ROOT)  # its __module__ may be "__main__"
        place = {"module": ".".join(file.with_suffix("").parts), "function": function.__name__}
        path.write_text(json.dumps({**job, **place, "work_dir": work_dir, "started": time.time()}))
        environment = os.environ if ours else process.environment_without_defaults()
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if processes:
            offline["OMP_NUM_THREADS"] = "1"
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = subprocess.run(
            [python, *(torchrun if (processes or 1) > 1 else []), root / "bench" / "measuring.py", path],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**environment, **offline},
        )  # fmt: skip
        if not result.is_file():
            raise Unavailable(f"{last_line(log)} (exit status {done.returncode}, {log})")
        found = json.loads(result.read_text())
    if "unavailable" in found:
        raise Unavailable(found["unavailable"])
    return found


def run_before(root: Path, function: Callable[[dict], dict], job: dict, log: Path) -> dict:
    """`run_job` in the checkout of --before_dir, whose commit the result has."""
    return run_job(function, job, log, root=root) | {"commit": commit(root)}


def do_job(path: Path) -> None:
    """In the process of `run_job`: call the function that the file `path` names, and write its result beside that.

    Of several processes the first one writes.
    """
    job = json.loads(path.read_text())
    function = getattr(importlib.import_module(job["module"]), job["function"])
    try:
        result = function(job)
    except Unavailable as error:
        result = {"unavailable": str(error)}
    if os.environ.get("RANK", "0") == "0":
        path.with_name("result.json").write_text(json.dumps(result))


def environment(venvs_dir: Path, name: str, requirements: tuple[str, ...], log: Path) -> str | Path:
    """An interpreter with exactly these requirements: this one if it has them, else a virtual environment's.

    The environment is made on first use, which takes minutes.

    Raises Unavailable if pip fails.
    """
    if all(map(installed, requirements)):
        return sys.executable
    folder = venvs_dir / name
    python, stamp = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join(requirements) + "\n"
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"making the virtual environment {folder}", file=sys.stderr)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as output:
            for command in ([sys.executable, "-m", "venv", folder], [python, "-m", "pip", "install", *requirements]):
                if subprocess.run(command, stdout=output, stderr=output).returncode:
                    raise Unavailable(f"cannot be installed: {last_line(log)} ({log})")
        stamp.write_text(wanted)
    return python


def installed(requirement: str) -> bool:
    """Whether this interpreter has the version that a requirement such as "peft==0.21.2" names."""
    name, _, wanted = requirement.partition("==")
    try:
        return version(name).partition("+")[0] == wanted  # "2.13.0+cpu" is 2.13.0
    except PackageNotFoundError:
        return False


def last_line(log: Path) -> str:
    """The last line of a log that is not blank: the error, if it ends with a traceback."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def script_command(script: str, flags: dict) -> list[str]:
    """The command that runs one of the project's scripts, such as "finetune.py", under this interpreter."""
    return [sys.executable, str(ROOT / script), *(f"--{name}={value}" for name, value in flags.items())]


def run_script(script: str, flags: dict, side: str = "") -> None:
    """Run one of the project's scripts, without showing its output; flags that are None are left out.

    Raises UserError, which begins with `side`, if it fails. What it says on standard error is shown.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if subprocess.run(script_command(script, given), stdout=subprocess.PIPE).returncode:
        from shell.cli import UserError  # not at the top: the peers' interpreters lack what it imports

        raise UserError(f"{side}{': ' if side else ''}{script} failed, for the reason above")


def read_metrics(run: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv. Raises UserError if a step had no gradient: then nothing was measured."""
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    if not all(float(row["grad_norm"]) > 0 for row in rows):
        from shell.cli import UserError

        raise UserError("the gradient's norm is 0, so nothing was measured")
    return rows


# ------------------------------------------------------------------------------------------- medians, table and chart


def summarize(lines: Iterable[dict], by: tuple[str, ...], medians: tuple[str, ...]) -> list[dict]:
    """A row for each side: its fields `by`, the number of its "runs", and the median of each field in `medians`.

    "spread" is the lowest and the highest value of the first field in `medians`. Unavailable sides have no row.
    """
    sides = {}
    for line in lines:
        if "unavailable" not in line:
            sides.setdefault(tuple(line[key] for key in by), []).append(line)
    rows = []
    for names, runs in sides.items():
        row = {key: statistics.median(run[key] for run in runs) for key in medians}
        first = [run[medians[0]] for run in runs]
        rows.append({**dict(zip(by, names, strict=True)), **row, "runs": len(runs), "spread": (min(first), max(first))})
    return rows


def print_table(columns: dict[str, str], rows: list[dict]) -> None:
    """Print a Markdown table with aligned columns.

    columns: the format of the cells under each heading, such as {"tokens/s": "{tokens_per_second:,.0f}"}.
    """
    table = [list(columns), *([cell.format(**row) for cell in columns.values()] for row in rows)]
    numbers = [
        all(cell[:1].isdigit() or cell[:1] in "+-" for cell in column[1:]) for column in zip(*table, strict=True)
    ]
    widths = [max(3, *map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * (width - right) + ":" * right for width, right in zip(widths, numbers, strict=True)])
    for cells in table:
        places = zip(cells, widths, numbers, strict=True)
        print("| " + " | ".join(f"{cell:{'>' if right else '<'}{width}}" for cell, width, right in places) + " |")


def draw_bars(tables: list[tuple[str, list[dict]]], columns: dict[str, tuple[str, str]], path: Path) -> None:
    """Draw bars as a PNG, ours in orange: a row of panels for each table, a panel for each column.

    tables: (title, rows); a row has a "side" and a "label". columns: (unit, format of the figures) by field of a row.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [len(rows) + 2 for _, rows in tables]  # in bars; 2 for title and axis
    figure, axes = plt.subplots(
        len(tables), len(columns), figsize=(12, 0.35 * sum(heights) + 0.6), layout="constrained", squeeze=False,
        height_ratios=heights,
    )  # fmt: skip
    for (title, rows), panels in zip(tables, axes, strict=True):
        colours = ["tab:orange" if row["side"] == OURS else "tab:blue" for row in rows]
        for panel, (key, (unit, form)) in zip(panels, columns.items(), strict=True):
            bars = panel.barh(range(len(rows)), [row[key] for row in rows], color=colours)
            panel.bar_label(bars, fmt=form, padding=3)
            panel.set(xlabel=unit, xmargin=0.12, yticks=[])
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_yticks(range(len(rows)), [row["label"] for row in rows])
        panels[0].set_title(title, loc="left", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    from bench.measuring import do_job

    do_job(Path(sys.argv[1]))
