"""A pool of worker processes, which parse, filter and tokenise chunks of rows on all cores and keep their order."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, NamedTuple

from preparation.cleaning import Ngrams
from preparation.mixture import Source
from shell.cli import UserError
from text.tokenizer import Tokenizer

CHUNK = 128  # rows that a worker gets at a time
BIG = 2**20  # bytes of input that are worth another process


class Context(NamedTuple):
    """What a worker needs for any row: the Settings of prepare_data.py, the sources, the tokenizer, the benchmarks.

    ngrams: the n-grams of all benchmarks' texts, or None. places: where each of those texts comes from.
    """

    settings: Any
    sources: list[Source]
    tokenizer: Tokenizer
    ngrams: Ngrams | None
    places: list[str]


_context = None  # a worker process has one, from its start


@contextlib.contextmanager
def local_workers(context: Context) -> Iterator[Callable]:
    """Yields `parallel_map(function, tasks)`: the results of function(context, task), in order, by several processes.

    Only a few tasks are taken ahead, so that they can come from a file of any size. With one worker all is done in
    this process.
    """
    workers = worker_count(context.settings.workers, context.sources)
    if workers == 1:
        yield lambda function, tasks: map(partial(function, context), tasks)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(context,))

    def parallel_map(function, tasks):
        waiting = deque()
        try:
            for task in tasks:
                with _no_interrupt():  # as it may fork
                    waiting.append(pool.submit(_call, function, task))
                if len(waiting) > 3 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError("a worker process was killed, perhaps for want of memory: try --workers 1") from None

    try:
        yield parallel_map
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _no_interrupt():
    """Let Ctrl-C wait until the end of the block: Python's own functions around a fork would swallow it."""
    if threading.current_thread() is not threading.main_thread():  # others get no signals
        yield
        return
    waiting = []
    before = signal.signal(signal.SIGINT, lambda *_: waiting.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        raise KeyboardInterrupt


def _start_worker(context):
    global _context
    _context = context
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process to answer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken already
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent():
    """A parent that was killed cannot end its workers, so each waits for that itself."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(function, task):
    return function(_context, task)


def worker_count(workers: int | None, sources: list[Source]) -> int:
    """`workers` if given; otherwise as many as this process has cores, or fewer for little data."""
    if any(isinstance(source.path, str) for source in sources):  # a dataset's name: its size is not known
        return workers or cores()
    size = sum(path.stat().st_size for source in sources for path in source.path)
    return workers or min(cores(), 1 + size // BIG)


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def chunks(values: Iterable, size: Callable[[Any], int] = lambda value: 0) -> Iterator[list]:
    """Yield lists of `CHUNK` values, or of fewer where their sizes add up to more than `BIG` before."""
    chunk, total = [], 0
    for value in values:
        chunk.append(value)
        total += size(value)
        if len(chunk) == CHUNK or total > BIG:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk
