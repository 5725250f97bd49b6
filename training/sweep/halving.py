"""Successive halving: at each rung the variants with the lowest validation loss go on, and the others stop.

What was dropped, and what failed, is kept in `sweep.json` of the sweep's folder, so that a resumed sweep goes on with
the same variants. A dropped variant has a checkpoint: a run of its own can go on from it.
"""

import math
from pathlib import Path

from shell.files import read_json, whole_file, write_json
from training.sweep.variants import Halving

FILE = "sweep.json"


def survivors(losses: dict[str, float], keep: float) -> list[str]:
    """The share `keep` of the variants, at least one, with the lowest losses, in the order in which they were given."""
    count = max(1, math.ceil(keep * len(losses)))
    best = sorted(losses, key=lambda name: math.inf if math.isnan(losses[name]) else losses[name])[:count]
    return [name for name in losses if name in best]


def rung(halving: Halving | None, done: int) -> int:
    """How many rungs a variant has reached after so many steps."""
    return done // halving.every if halving else 0


def read_ended(out_dir: Path) -> dict[str, str]:
    """Which variants of the sweep in a folder do not go on, and why, in words."""
    path = out_dir / FILE
    return read_json(path)["ended"] if path.is_file() else {}


def write_ended(out_dir: Path, ended: dict[str, str]) -> None:
    """Keep which variants do not go on."""
    with whole_file(out_dir / FILE) as file:
        write_json(file, {"ended": ended})
