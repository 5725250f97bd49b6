"""Run the project's scripts from a flow."""

import json
import subprocess
import sys
from pathlib import Path

import yaml
from metaflow.exception import METAFLOW_EXIT_DISALLOW_RETRY, MetaflowException

from shell.cli import ROOT

PROJECT = "onetune"
MISTAKE = 2  # the exit status of a script whose user has made one
EVENT = "onetune-data"  # data have been prepared; its payload: "data", where they are, and "version"


class ScriptError(MetaflowException):
    """A script ended with a status other than 0. Its text is the script's own error line."""

    headline = "A script of the project failed"


class NotGoodEnough(MetaflowException):
    """The flow ends because of what a step has found."""

    headline = "Not good enough to go on"


def run_script(script: str, *switches: str, may_refuse: bool = False, **flags: object) -> str:
    """Run a script with flags; what it prints goes to this process's output too. Returns its standard output.

    Flags with the value None are left out. Raises ScriptError with the script's last line if it fails; but after a
    mistake in the flags or data (status 2), which a second attempt would make again, the step ends without one, unless
    the caller `may_refuse` for itself.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    values = [v if isinstance(v, str) else str(v) if isinstance(v, Path) else json.dumps(v) for v in given.values()]
    command = [sys.executable, str(ROOT / script), *switches]
    command += [f"--{name}={value}" for name, value in zip(given, values, strict=True)]
    print("$ " + " ".join(command[1:]), flush=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait() == MISTAKE and not may_refuse:
        sys.exit(METAFLOW_EXIT_DISALLOW_RETRY)
    if process.returncode:
        last = lines[-1].strip() if lines else "it printed nothing"
        raise ScriptError(f"{script} ended with status {process.returncode}: {last}")
    return "".join(lines)


def settings_file(values: dict, path: Path) -> Path:
    """Write a flow's config as the YAML file that a script takes with --config. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False), encoding="utf-8")
    return path
