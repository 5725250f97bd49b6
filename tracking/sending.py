"""What a tracker has not got of a run yet is sent there; how far that is, is kept in the run's folder.

tracking/NAME.json has for a tracker the last step of metrics.csv that it has, and the hashes of the files and results
that it has. Whatever fails is done again: from what the tracker itself says that it has, where that can be asked. If a
tracker that is `late` was not closed, nobody knows which files it has, and it gets them all again.
"""

import contextlib
import fcntl
import math
import os
import signal
import time
import traceback
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from shell.files import read_json, whole_file, write_json
from tracking import run_files
from tracking.run_files import FINAL, METRICS, RECORD, SUMMARY, TRACKING
from tracking.trackers import TRACKERS, Tracked

INTERVAL, LONGEST_INTERVAL = 1.0, 60.0  # seconds between looks into the folder; after failures up to the second
PATIENCE = 10.0  # seconds for which sending is tried again after the end of the run
LONGEST_SENDING = 600.0  # seconds after which a process that still sends is ended
ROWS = 500  # that are sent before the state is written


def state_path(folder: Path, name: str) -> Path:
    """Where the state of a run's tracker is kept."""
    return folder / TRACKING / f"{name}.json"


def trackers_of(folder: Path) -> list[str]:
    """The trackers that a run has been sent to, or was to be."""
    return [name for name in TRACKERS if state_path(folder, name).is_file()]


def status_of(folder: Path) -> str:
    """How a run that no process trains has ended, by its files."""
    return "finished" if (folder / FINAL).is_dir() and (folder / SUMMARY).is_file() else "stopped"


class Busy(Exception):
    """Another process sends this run to this tracker."""


class Sender:
    """What one tracker has of one run, and how the rest gets there. adapter: whether it gets final/ too."""

    def __init__(self, folder: Path, name: str, adapter: bool):
        self.folder, self.name = folder, name
        self.path = state_path(folder, name)
        self.state: dict[str, Any] = {
            "rows": 0, "files": {}, "own": {}, "adapter": adapter, "open": False, "error": None
        }  # fmt: skip
        self.tracker, self.lock, self.rows_seen = None, None, None

    def send(self, status: str) -> None:
        """Send what is new; after a status that is not "running" close the run there. Raises what the library does."""
        if not (self.folder / RECORD).is_file():  # the run has not begun, and perhaps never will
            return
        try:
            self._open()
            self._send_rows()
            self._send_files()
            self._send_results()
            if status != "running":
                self._send_final()
                self.tracker.close(status)
                self.state["open"] = False
            self.state["error"] = None
        except Exception as error:
            self.state["error"] = one_line(error)
            status = "failed"
            raise
        finally:
            self._keep()
            if status != "running":
                self._let_go()

    def _open(self):
        if self.tracker is not None:
            return
        record, settings = read_json(self.folder / RECORD), run_files.read_settings(self.folder)
        self.path.parent.mkdir(exist_ok=True)
        self._take_lock()
        if self.path.is_file():
            kept = read_json(self.path)
            self.state |= kept | {"adapter": kept["adapter"] or self.state["adapter"]}
        self._keep()
        tracker = TRACKERS[self.name](Tracked(self.folder, record, settings), self.state["own"])
        last = tracker.open()
        self.data_dir = run_files.data_of_run(self.folder)
        self.state["rows"] = self.state["rows"] if last is None else last
        if last == 0 or tracker.late and self.state["open"]:  # it has nothing, or what it was given last may be lost
            self.state["files"] = {}
        self.state["open"] = True
        self.tracker, self.rows_seen = tracker, None

    def _take_lock(self):
        self.lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.lock)
            self.lock = None
            raise Busy(f"another process sends {self.folder} to {self.name}") from None
        except OSError:
            pass  # some network file systems have no locks

    def _let_go(self):
        self.tracker = None
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def _keep(self):
        if self.lock is not None:
            with whole_file(self.path) as file:
                write_json(file, self.state)

    def _send_rows(self):
        path = self.folder / METRICS
        if not path.exists() or _version(path) == self.rows_seen:
            return
        seen = _version(path)
        rows = [run_files.numbers(row) for row in run_files.read_rows(path)[1]]
        new = [row for row in rows if row["step"] > self.state["rows"]]
        for first in range(0, len(new), ROWS):
            part = new[first : first + ROWS]
            self.tracker.log_rows(part)
            self.state["rows"] = part[-1]["step"]
            self._keep()
        self.rows_seen = seen

    def _send_files(self):
        for name, path in run_files.files_to_show(self.folder, self.data_dir).items():
            self._send_once(name, _version(path), lambda name=name, path=path: self.tracker.log_file(name, path))

    def _send_results(self):
        for each in run_files.read_results(self.folder):
            step = each.model.removeprefix("step-")
            step = int(step) if step.isdecimal() else self.state["rows"]
            name = f"{each.kind} of {each.model} on {each.data}"
            self._send_once(name, str(each.metrics), lambda r=each, step=step: self.tracker.log_result(r, step))

    def _send_final(self):
        final = self.folder / FINAL
        if self.state["adapter"] and final.is_dir():
            self._send_once(FINAL, _version(final), lambda: self.tracker.log_folder(FINAL, final))

    def _send_once(self, name, version, send):
        if self.state["files"].get(name) != version:
            send()
            self.state["files"][name] = version
            self._keep()


def _version(path: Path) -> str:
    """Another text whenever a file or folder has been written again."""
    status = path.stat()
    return f"{status.st_size} bytes, {status.st_mtime_ns}"


def one_line(error: BaseException) -> str:
    """An error as one line that is not too long."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 300 else f"{line[:300]} […]"


def follow(senders: list[Sender], ended: Callable[[float], str | None]) -> bool:
    """Send what is new as long as a run lasts, and the rest at its end. Returns whether everything was sent.

    ended: waits so many seconds at most for the end of the run, and returns its status, or None if it still lasts.
    """
    wait, status, last = INTERVAL, None, math.inf
    while True:
        failed = [sender for sender in senders if not _attempt(sender, status or "running")]
        if status is not None and (not failed or time.monotonic() > last):
            return not failed
        senders = failed if status is not None else senders
        wait = min(2 * wait, LONGEST_INTERVAL) if failed and status is None else INTERVAL
        if status is None:
            status = ended(wait)
            last = math.inf if status is None else time.monotonic() + PATIENCE
            if status is not None:
                signal.alarm(round(PATIENCE + LONGEST_SENDING))
        else:
            time.sleep(wait)


def _attempt(sender, status):
    try:
        sender.send(status)
    except Exception:  # a library's, of any kind: it is written down, and what was to be sent stays where it is
        with contextlib.suppress(OSError), open(sender.path.with_suffix(".log"), "a", encoding="utf-8") as log:
            log.write(f"{datetime.now().isoformat(timespec='seconds')} {traceback.format_exc()}\n")
        return False
    return True
