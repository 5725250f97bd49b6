"""The processes beside a training run that send it to its trackers, one for each tracker.

Each reads from its standard input how the run ends. If that ends without a word, the run was killed. So it needs no
help to notice, sends what is left, and ends by itself.
"""

import contextlib
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from shell.cli import ROOT, UserError
from shell.files import read_json
from shell.process import is_first
from tracking.record import separate_copy
from tracking.run_files import is_locked
from tracking.sending import state_path, status_of, trackers_of
from tracking.trackers import followed_by

UPLOAD = ROOT / "tracking" / "upload.py"
WAIT, WAIT_IF_STOPPED = 60.0, 5.0  # seconds at the end of a run, for its trackers; the latter after a signal


@contextlib.contextmanager
def following(folders: list[Path], trackers: Sequence[str], adapter: bool) -> Iterator[None]:
    """While the block trains the runs in `folders`, their trackers get to see them; at its end, how it ended.

    Nothing that a tracker does can make the block slower or end it. Of the processes of several devices the first one
    has them started. adapter: whether they get final/ too.
    """
    names = followed_by(trackers) if is_first() else []
    if is_first():
        for folder in folders:
            separate_copy(folder)
    if "wandb" in names and subprocess.run([sys.executable, "-m", "tracking.to_wandb"], cwd=ROOT).returncode:
        raise UserError("--logger wandb: nobody is logged in: run wandb login, or set WANDB_MODE=offline")
    processes = {name: _start(folders, name, adapter) for name in names}
    status = "failed"
    try:
        yield
        status = "finished"
    except SystemExit as end:
        status = "stopped" if isinstance(end.code, int) and end.code > 128 else "failed"
        raise
    except KeyboardInterrupt:
        status = "stopped"
        raise
    finally:
        _end(processes, status, folders, WAIT if status == "finished" else WAIT_IF_STOPPED)


def send_now(folder: Path) -> None:
    """Send what is new of a run to the trackers that it has, and print where; if it is being trained, that does it."""
    if is_locked(folder):
        return
    processes = {name: _start([folder], name, False) for name in trackers_of(folder)}
    _end(processes, status_of(folder), [folder], WAIT)


def _start(folders, name, adapter):
    """A process that sends the runs to a tracker; in a session of its own, so that Ctrl-C is not for it."""
    command = [sys.executable, str(UPLOAD), "--follow", "--run_dirs", _as_list(folders), "--trackers", f"[{name}]"]
    command += ["--adapter"] * adapter
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _as_list(folders):
    return "[" + ", ".join(f"'{str(folder).replace(chr(39), 2 * chr(39))}'" for folder in folders) + "]"


def _end(processes, status, folders, seconds):
    """Tell the processes how the run ended, wait for them, and print what became of it."""
    for process in processes.values():
        with contextlib.suppress(OSError):
            process.stdin.write(status.encode())
        with contextlib.suppress(OSError):
            process.stdin.close()
    until = time.monotonic() + seconds
    for name, process in processes.items():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
        for folder in folders:
            _print_outcome(folder, name, process.returncode)


def _print_outcome(folder, name, code):
    path = state_path(folder, name)
    state = read_json(path) if path.is_file() else {}
    if not state:
        return
    later = f"python tracking/upload.py --run_dirs {shlex.quote(str(folder))} sends the rest"
    if code is None:
        print(f"{name}: still sending beside this; if it does not end well, {later}", file=sys.stderr)
    elif code:
        print(f"{name}: not all of {folder} was sent ({state['error'] or 'it was ended'}): {later}", file=sys.stderr)
    else:
        print(f"{name}: {state['own'].get('where')}")
