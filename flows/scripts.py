"""Run the project's scripts from a flow, with what they need on this machine."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import yaml
from metaflow.exception import METAFLOW_EXIT_DISALLOW_RETRY, MetaflowException

from shell.cli import ROOT
from shell.files import whole_file

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


def refuse(mistake: str) -> NoReturn:
    """End the step, without another attempt, with the line that says what the user can mend."""
    print(f"error: {mistake}", flush=True)
    sys.exit(METAFLOW_EXIT_DISALLOW_RETRY)


def say_replaced(config: dict, values: dict[str, str]) -> None:
    """Print a line if the flow has other values, by flag, than its config. A script takes the config as it is."""
    replaced = [(flag, value) for flag, value in values.items() if config.get(flag) not in (None, value)]
    if replaced:
        print("; ".join(f"{flag} is {v}, not the config's {config[flag]}" for flag, v in replaced), flush=True)


def fetch_source(source: str, folder: Path) -> str:
    """Copy rows at an address, such as s3://… or https://…, to `folder`/HASH/NAME. Returns the path there.

    HASH is that of the address, since two addresses may end in one name. What has no address stays where it is. An
    address that is wrong ends the step without another attempt.
    """
    if "://" not in source:
        return source
    import fsspec

    name = source.partition("?")[0].rstrip("/").rpartition("/")[2]
    path = folder / hashlib.sha256(source.encode()).hexdigest()[:8] / name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with fsspec.open(source, "rb") as remote, whole_file(path) as temporary, open(temporary, "wb") as file:
            shutil.copyfileobj(remote, file)
    except (FileNotFoundError, PermissionError, IsADirectoryError, ValueError, ImportError) as error:
        refuse(f"data: {source} cannot be fetched: {error}")
    return str(path)


def settings_file(values: dict, path: Path) -> Path:
    """Write a flow's config as the YAML file that a script takes with --config. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False), encoding="utf-8")
    return path
