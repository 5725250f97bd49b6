"""Data that a run reads from an address: which shards it will need, and when.

A shard is fetched ahead into --data_cache and removed when the run has passed it, with all of its processes on the
machine. Every step of a run draws from all shards that are shuffled together (--shuffle_window), so these have to be
there at once, and the next ones in time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from batching import PLANNERS, Samples, order_of, shuffled
from shell import cli
from shell.cli import UserError
from store.streaming import Stream, without_shards
from training.steps import steps_per_epoch, total_steps

if TYPE_CHECKING:
    from objectives import Objective
    from training.build import Data
    from training.settings import Settings

Window = tuple[int, int]  # the number of an epoch, and of a window in it (batching.OrderInWindows)


def find_data(s: Settings) -> None:
    """Let --data_dir name the folder in the cache, which has no shards yet, where it is an address."""
    s.data_dir = without_shards(s.data_dir)


def check_streaming(s: Settings, train: Samples, objective: Objective) -> None:
    """Raise UserError if a run over streamed data needs all samples before its first step, or its disk is too small."""
    stream = train.shards.stream
    if stream is None:
        return
    needs_all = {
        f"--objective {s.objective}": s.teacher_dir or objective.references(),
        f"--planner {s.planner}": PLANNERS[s.planner].draw is not shuffled,
    }
    for flag, needed in needs_all.items():
        if needed:
            raise UserError(
                f"{flag} with data at an address: it reads all samples before the first step; copy them to a folder "
                f"with python store/models.py --pull {stream.wanted} --out_dir FOLDER"
            )


def check_room(s: Settings, data: Data) -> int:
    """Raise UserError unless --data_cache has room for what a step may need. Returns the bytes for training shards."""
    shards, val = data.train.shards, data.val.shards
    room = cli.number_of_bytes(s.data_cache, "data_cache") - val.stream.size()
    stream, most = shards.stream, largest_window(shards.stream, room)
    if stream.size() <= room:
        return room
    where = f"{stream.wanted} has {stream.size() / 1e9:.3g} GB in {len(shards)} shards, --data_cache {s.data_cache}"
    if not most:
        need = val.stream.size() + 2 * max(entry.size for entry in stream.entries)
        raise UserError(
            f"{where} is too small for two of them and the validation part: give {need / 1e9:.3g} GB or more, or "
            "prepare the data with a smaller --shard_tokens"
        )
    if not 0 < s.shuffle_window <= most:
        raise UserError(
            f"{where} has room for fewer: give --shuffle_window {most} or less (which changes the order of samples), "
            "or a larger --data_cache"
        )
    fewest = sum(sorted(shard.samples for shard in shards.listing.shards)[: s.shuffle_window])
    if fewest < s.global_batch_size:
        raise UserError(
            f"--shuffle_window {s.shuffle_window}: so few shards may have {fewest} samples, less than the "
            f"{s.global_batch_size} of a step: raise it"
        )
    return room


def largest_window(stream: Stream, room: int) -> int:
    """How many shards may be shuffled together, so that two windows of them fit into so many bytes."""
    largest_first = sorted((entry.size for entry in stream.entries), reverse=True)
    return int(np.searchsorted(2 * np.cumsum(largest_first), room, "right"))


@contextlib.contextmanager
def fetching_ahead(s: Settings, data: Data, start: int) -> Iterator[None]:
    """Fetch the shards that a run needs from step `start` (from 0) on, in a thread, while the block runs."""
    stream = data.train.shards.stream
    if stream is None:
        yield
        return
    room = check_room(s, data)
    stream.step = min(start, total_steps(s, data.train) - 1)
    stream.follow(windows(s, data.train, stream.step), room, run=str(s.out_dir.absolute()))
    try:
        yield
    finally:
        stream.close()


def windows(s: Settings, samples: Samples, start: int) -> Iterator[tuple[Window, list[int]]]:
    """The windows of shards that the steps from `start` to the run's last one read, and the numbers of their shards."""
    per_epoch, total = steps_per_epoch(s, samples), total_steps(s, samples)
    every = np.arange(len(samples.shards))
    for epoch in range(start // per_epoch, -(-total // per_epoch)):
        order = order_of(samples, s.shuffle_window, s.seed, epoch)
        first = max(0, start - epoch * per_epoch) * s.global_batch_size
        last = min(len(samples), (total - epoch * per_epoch) * s.global_batch_size) - 1
        for window in range(order.window_of(first), order.window_of(last) + 1):
            yield (epoch, window), every[order.windows[window]].tolist()
