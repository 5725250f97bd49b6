"""record.json: what a run was made of, beside its settings. git.diff: what was not committed."""

import importlib.metadata
import os
import platform
import re
import secrets
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from shell.cli import ROOT
from shell.files import MANIFEST, project_version, read_json, sha256, whole_file, write_json
from tracking.run_files import DIFF, RECORD, SOURCE, TRACKING


def record_session(folder: Path, hashes: dict[str, str], devices: Iterable[str], after_step: int) -> None:
    """Note in a run's folder that a process begins to train it, or goes on after so many steps.

    The first one gives the run its id, and notes what does not change: hashes, commit, environment. Later ones are
    added to "sessions".

    hashes: of the data, the base and all else the result depends on, by what they are of. devices: names of the GPUs.
    """
    path = folder / RECORD
    if path.exists():
        record = read_json(path)
    else:
        code = folder / SOURCE / MANIFEST
        commit, diff = git_state(ROOT)
        record = {
            "id": secrets.token_hex(4),
            "hashes": {**hashes, **({"code": sha256(code)} if code.exists() else {})},
            "git": commit,
            "environment": environment(devices),
            "sessions": [],
        }
        if diff:
            with whole_file(folder / DIFF) as file:
                file.write_bytes(diff)
    session = {
        "began": datetime.now(UTC).isoformat(timespec="milliseconds"), "after_step": after_step,
        "command": shlex.join(sys.argv), "host": socket.gethostname(), "process": os.getpid(),
        "version": project_version(), "folder": str(folder.absolute()),
    }  # fmt: skip
    record["sessions"] = [*record["sessions"], session]
    with whole_file(path) as file:
        write_json(file, record)


def separate_copy(folder: Path) -> None:
    """Give the copy of a run's folder an id of its own, if there is such a run and the original is still there.

    Otherwise trackers would have the steps of both in one run. A folder that was only moved keeps its id.
    """
    if not (folder / RECORD).is_file():
        return
    record = read_json(folder / RECORD)
    original = Path(record["sessions"][-1]["folder"])
    if not (original / RECORD).is_file() or original.samefile(folder):
        return
    if read_json(original / RECORD)["id"] != record["id"]:
        return
    for state in (folder / TRACKING).glob("*.json"):  # what trackers have of the original
        state.unlink()
    with whole_file(folder / RECORD) as file:
        write_json(file, record | {"id": secrets.token_hex(4)})
    print(f"{folder} is a copy of {original}: trackers see a run of its own from here on")


def git_state(folder: Path) -> tuple[dict | None, bytes]:
    """The commit and branch of the checkout in `folder`, with whether it was changed; and the changes, as a diff.

    (None, b"") if that is no checkout, or git is not there.
    """
    if not (folder / ".git").exists():
        return None, b""
    try:
        commit, branch = _git(folder, "rev-parse", "HEAD"), _git(folder, "rev-parse", "--abbrev-ref", "HEAD")
        diff = _git(folder, "diff", "HEAD", "--binary")
    except (OSError, subprocess.SubprocessError):
        return None, b""
    return {"commit": commit.decode().strip(), "branch": branch.decode().strip(), "changed": bool(diff)}, diff


def _git(folder, *args):
    return subprocess.run(["git", "-C", str(folder), *args], check=True, capture_output=True, timeout=30).stdout


def environment(devices: Iterable[str]) -> dict:
    """What the process runs on: system, processor, memory, devices, Python and the packages that are required."""
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": list(devices),
        "packages": _packages(),
    }


def _processor():
    try:
        match = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def _packages():
    """The installed versions of what requirements.txt names; nothing in a copy of the code without it."""
    path = ROOT / "requirements.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    versions = {}
    for name in [line.partition("==")[0] for line in lines if line and line[0] != "#"]:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions
