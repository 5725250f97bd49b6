"""What the comparisons share: their JSON lines, what these say of a process, and processes with a peer installed.

Imports nothing of the project, for it is used under interpreters that have nothing but a peer installed, too.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch", "lightning", "bitsandbytes", "transformers", "peft", "accelerate", "trl", "litgpt", "torchtune", "torchao",
)  # fmt: skip


class Unavailable(Exception):
    """A side that cannot be measured here; the text says why."""


# ------------------------------------------------------------------------------------------------------ JSON lines


def commit():
    """The project's commit, with "+" if files were changed since; None outside a repository."""
    done = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty=+", "--exclude=*"], capture_output=True, text=True
    )
    return done.stdout.strip() or None


def add_line(path, line):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def installed_versions():
    """{package: version} of what a measurement may depend on, where it is installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


# ------------------------------------------------------------------------------------------------- of this process


def busy_seconds():
    """CPU seconds that all processes have used since the machine started; 0 where the system does not say."""
    try:
        user, nice, system, _idle, _iowait, irq, softirq, steal = Path("/proc/stat").read_text().split()[1:9]
    except OSError:
        return 0.0
    return sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf("SC_CLK_TCK")


def own_seconds():
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_memory():
    """Bytes: the most that tensors took on a GPU, or that the whole process took on a CPU.

    Not getrusage's figure where there is a better one: a child process starts with its parent's peak in that.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ------------------------------------------------------------------------------------------ processes with a peer


def environment(venvs_dir, name, requirements, log):
    """An interpreter with exactly these requirements: this one, or that of a virtual environment made for them.

    Raises Unavailable if pip fails.
    """
    if all(map(installed, requirements)):
        return sys.executable
    folder = venvs_dir / name
    python, stamp = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join(requirements) + "\n"
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"making the virtual environment {folder}", file=sys.stderr)
        with open(log, "w") as output:
            for command in ([sys.executable, "-m", "venv", folder], [python, "-m", "pip", "install", *requirements]):
                if subprocess.run(command, stdout=output, stderr=output).returncode:
                    raise Unavailable(f"cannot be installed: {last_line(log)} ({log})")
        stamp.write_text(wanted)
    return python


def installed(requirement):
    name, _, wanted = requirement.partition("==")
    try:
        return version(name).partition("+")[0] == wanted  # "2.13.0+cpu" is 2.13.0
    except PackageNotFoundError:
        return False


def run_job(command, job, log):
    """Run `command` on a file with `job`, and what it prints into `log`: the dict that it leaves at job["result"].

    Raises Unavailable if it leaves none.
    """
    with tempfile.TemporaryDirectory() as work_dir, open(log, "w") as output:
        path, result = Path(work_dir, "job.json"), Path(work_dir, "result.json")
        job = job | {"work_dir": work_dir, "result": str(result)}
        path.write_text(json.dumps(job | {"started": time.time()}))
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            [*command, path], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **offline}
        )
        if not result.is_file():
            raise Unavailable(f"{last_line(log)} (exit status {done.returncode}, {log})")
        return json.loads(result.read_text())


def last_line(log):
    """The last line that says something: of a traceback the error itself."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"
