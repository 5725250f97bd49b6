"""Progress bars with the time left, on standard error, in one way for all scripts."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

MOMENT = 1.0  # seconds after which a bar that does not stay is shown at all
LINE_SECONDS = 60.0  # between the lines of a long run in a log


def bar(
    items: Iterable | None = None, what: str = "", total: int | None = None, unit: str = "it", shown: bool = True,
    stays: bool = True,
) -> tqdm:  # fmt: skip
    """A progress bar; nothing where standard error is no terminal, as in a log or a pipe.

    It is gone through, `for item in bar(items, "checking")`, or moved: `with bar(total=9) as b: b.update(3)`. shown:
    False in all but the first of several processes. stays: whether it is left on the screen at its end. unit: "B" for
    bytes, which are shown as MB and GB.
    """
    from tqdm import tqdm  # here, so that a script without a bar does without it

    delay = 0.0 if stays else MOMENT
    hidden = None if shown else True  # None: where it is no terminal
    return tqdm(items, what, total, unit=unit, unit_scale=unit == "B", delay=delay, leave=stays, disable=hidden)


def bar_of_run(start: int, total: int, unit: str = "step", layout: str | None = None, shown: bool = True) -> tqdm:
    """The bar of a long run that is moved from `start` to `total`. layout: as tqdm's bar_format.

    Where standard error is no terminal it is a line every `LINE_SECONDS`, and one at the end if there was any.
    """
    from tqdm import tqdm

    log = {} if sys.stderr.isatty() else {"file": _Lines(sys.stderr), "delay": MOMENT, "mininterval": LINE_SECONDS,
                                          "maxinterval": LINE_SECONDS}  # fmt: skip
    return tqdm(total=total, initial=start, unit=unit, bar_format=layout, disable=not shown, **log)


class _Lines:
    """A file to which tqdm writes each state as a line, not over the one before."""

    def __init__(self, file: TextIO):
        self.file, self.encoding = file, getattr(file, "encoding", "utf-8")

    def write(self, text):
        if text := text.strip():
            self.file.write(f"{text}\n")

    def flush(self):
        self.file.flush()
