"""Child processes, and the signals that are passed on to them.

A child has a session of its own: Ctrl-C, which a terminal sends to all processes in its foreground, reaches the search
alone, which passes it on once. A second one would end finetune.py without a checkpoint (training/run_folder.py).
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from shell.cli import ROOT


class Signals:
    """The signals that came, and the child that gets them."""

    def __init__(self):
        self.received, self.child = [], None

    def note(self, number: int, frame: object) -> None:
        """Keep a signal and pass it on."""
        self.received.append(number)
        self.pass_on(number)

    def pass_on(self, number: int) -> None:
        """Send a signal to the child, if it is there."""
        if self.child and self.child.poll() is None:
            self.child.send_signal(number)


@contextlib.contextmanager
def child(command: list[str], output: Path, lock: int, signals: Signals) -> Iterator[subprocess.Popen]:
    """Run a script of the project in a child process. It has ended when the block has, with a signal if need be.

    output: a file, to which all that it prints is added. lock: the descriptor of the trial's lock, which the child
    inherits: it holds as long as one of both processes is alive.
    """
    command = [sys.executable, str(ROOT / command[0]), *command[1:]]
    with open(output, "ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, pass_fds=[lock], start_new_session=True
        )
    signals.child = process
    try:
        for number in signals.received[:1]:  # it came just before
            signals.pass_on(number)
        yield process
    except BaseException:
        process.terminate()
        raise
    finally:
        process.wait()
        signals.child = None
