"""Engines in processes of their own, which front.py starts, and starts again when one has ended.

An engine is helm_server.py's service behind a port of this machine. It ends when its front does, also one that was
killed: it waits for that in a thread. Ctrl-C, which a terminal sends to all processes, is the front's to act on.
"""

import asyncio
import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from shell.cli import UserError

SPAWN = multiprocessing.get_context("spawn")
LONGEST_PAUSE = 60  # seconds, before an engine that does not start is tried again


class StartFailed(Exception):
    """An engine has ended before it was ready. status: its exit status, below 0 for a signal."""

    def __init__(self, status: int):
        super().__init__(f"{how(status)} before it was ready")
        self.status = status


class EngineProcess:
    """One of several engines. up: whether it takes requests. names: the models that it serves.

    seconds: how long it took to start.
    """

    def __init__(self, number: int, run: Callable, s: Any, environment: dict[str, str]):
        """run: called in the process with `s` and a connection, to which it sends (port, names) when it is ready.

        Or it sends the UserError or OSError that it cannot start for.
        """
        self.number, self.environment, self._run, self._settings = number, environment, run, s
        self.process: Any = None
        self.port, self.names, self.up, self.seconds = 0, [], False, 1.0

    async def start(self) -> None:
        """Start it, and wait until it is ready. Raises StartFailed, or what it sends."""
        began = time.monotonic()
        told, tell = SPAWN.Pipe(duplex=False)
        self.process = SPAWN.Process(target=self._run, args=(self._settings, tell), daemon=True)
        with inherited(self.environment):
            self.process.start()
        tell.close()
        with told:
            await readable(told.fileno())
            try:
                said = told.recv()
            except EOFError:
                raise StartFailed(await self.ended()) from None
        if isinstance(said, Exception):
            await self.ended()
            raise said
        self.port, self.names = said
        self.up, self.seconds = True, time.monotonic() - began

    async def ended(self) -> int:
        """Wait until it has ended; its exit status, below 0 for a signal."""
        await readable(self.process.sentinel)
        self.up = False
        self.process.join()
        return self.process.exitcode

    async def start_again(self) -> None:
        """Start it until it is ready."""
        pause = 1
        while not self.up:
            try:
                await self.start()
            except (StartFailed, UserError, OSError) as failure:
                note(f"engine {self.number}: {failure}; it is started again in {pause} s")
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def kill(self) -> None:
        """End it at once."""
        self.up = False
        if self.process is not None:
            self.process.kill()
            self.process.join()

    @property
    def retry_after(self) -> int:
        """In how many seconds it is there again if it ends now, as far as that is known."""
        return math.ceil(self.seconds)


def environments(count: int) -> list[dict[str, str]]:
    """For each of several engines the environment variables that give it its part of the machine.

    That is a GPU where there are some, or else a share of the cores. Raises UserError if there are too few GPUs.
    """
    if torch.cuda.is_available():
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
        if count > len(devices):
            raise UserError(f"--engines {count}: each needs a GPU of its own, and there are {len(devices)}")
        return [{"CUDA_VISIBLE_DEVICES": device} for device in devices[:count]]
    return [{"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))}] * count


def begin_in_process() -> None:
    """In an engine, first of all: end this process as soon as its front has ended, however that was."""
    # A lock between processes, as a progress bar makes one, would have a name here, and when this process is killed
    # Python would complain of it at the front's end. Nothing here shares a lock: with "fork" it has no name.
    multiprocessing.set_start_method("fork", force=True)
    front = multiprocessing.parent_process().sentinel

    def wait():
        multiprocessing.connection.wait([front])
        os._exit(1)

    threading.Thread(target=wait, name="end with the front", daemon=True).start()


def how(status: int) -> str:
    """How a process with this exit status has ended, in words."""
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"has ended with status {status}"


def note(text: str) -> None:
    """A line on standard error."""
    print(f"note: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def inherited(variables: dict[str, str]) -> Iterator[None]:
    """What a process inherits that is started in the block: environment variables, and that it does not see SIGINT."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


async def readable(descriptor: int) -> None:
    """Wait until a file descriptor has something to read, or its other end is closed."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)
