"""Send to trackers what they have not got of runs: rows of metrics, settings, pictures, results of evaluations.

python tracking/upload.py --run_dirs out/finetune
python tracking/upload.py --run_dirs "[out/a, out/b]" --trackers "[mlflow]"

finetune.py starts it beside a run that has a `--logger`; by hand it sends what could not be sent then.
"""

import os
import select
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shell import cli
from shell.cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        run_dirs: Folders of runs of finetune.py.
        trackers: Where to; if not given, to the trackers that each run had.
        adapter: Send final/ too.
        follow: Go on while standard input is open, and then end the runs with the word that came from there.
    """

    run_dirs: list[Path] | Path
    trackers: list[Literal[cli.table_keys("tracking/trackers.py", "TRACKERS")]] | None = None
    adapter: bool = False
    follow: bool = False

    def __post_init__(self):
        self.run_dirs = self.run_dirs if isinstance(self.run_dirs, list) else [self.run_dirs]
        if not self.run_dirs:
            raise UserError("--run_dirs is empty: name the folder of a run")


if __name__ == "__main__":
    settings = cli.parse(Settings)

from tracking.run_files import RECORD, is_locked
from tracking.sending import Sender, follow, one_line, status_of, trackers_of
from tracking.trackers import followed_by

STATUSES = ("finished", "stopped", "failed")


def main(s: Settings) -> None:
    """Send the runs, or follow them to their end."""
    named = followed_by(s.trackers or ())
    if s.follow:
        os.nice(10)
        senders = [Sender(folder, name, s.adapter) for folder in s.run_dirs for name in named]
        sys.exit(0 if follow(senders, word_from_stdin) else 3)
    for folder in s.run_dirs:
        if not (folder / RECORD).is_file():
            raise UserError(f"--run_dirs {folder}: no run of finetune.py, it has no {RECORD}")
        if is_locked(folder):
            raise UserError(f"--run_dirs {folder}: it is being trained: its own --logger sends it, or this at its end")
        if not (named or trackers_of(folder)):
            raise UserError(f"--run_dirs {folder}: it had no tracker: name one, such as --trackers [mlflow]")
    failed = [send(folder, name, s.adapter) for folder in s.run_dirs for name in named or trackers_of(folder)]
    if any(failed):
        raise UserError(next(filter(None, failed)))


def send(folder: Path, name: str, adapter: bool) -> str | None:
    """Send a run to a tracker. Returns why that did not go well, in words, or None."""
    cli.check_installed(name, where=f"--trackers {name}")
    sender = Sender(folder, name, adapter)
    try:
        sender.send(status_of(folder))
    except Exception as error:  # a library's, of any kind
        return f"{folder} could not be sent to {name}: {one_line(error)}"
    print(f"{folder}: {sender.state['rows']} steps are at {name}: {sender.state['own'].get('where')}")
    return None


def word_from_stdin(seconds: float) -> str | None:
    """The status that standard input says within so many seconds; "failed" if it ends without a word."""
    if not select.select([sys.stdin], [], [], seconds)[0]:
        return None
    word = os.read(sys.stdin.fileno(), 100).decode()
    return word if word in STATUSES else "failed"


if __name__ == "__main__":
    cli.run(main, settings)
