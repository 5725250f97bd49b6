"""A device that has died, or hangs, ends the others within a minute, with a line that names it.

A collective operation waits for all processes, so the death of one leaves the others waiting: for NCCL's time limit of
ten minutes, or for ever. So each process tells the others that it lives, through a store of torch's own that the first
one keeps, and a thread of each looks for who does not.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

INTERVAL = 2.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one, after which a process counts as dead
FAILED = 70  # exit status of a process that ends because another has died


class Watch:
    """The signs of life of all processes of a run.

    store: torch's, that all of them reach. go_on: what to tell the user to do, at the end of the line.
    """

    def __init__(self, store, rank: int, world_size: int, machines: list[tuple], go_on: str):
        self.store, self.rank, self.world_size, self.go_on = store, rank, world_size, go_on
        self.ended = threading.Event()
        self.seen = {}  # by rank: its last sign of life, and when it was new
        self.machines = machines  # by rank: where the process runs, and its number there

    def start(self) -> None:
        """Begin to give signs of life, and to look for those of the others."""
        threading.Thread(target=self._watch, name="watch over devices", daemon=True).start()

    def leave(self, reason: str) -> None:
        """Tell the others that this process ends before its work is done, and why."""
        self.ended.set()
        with contextlib.suppress(Exception):
            self.store.set(f"end/{self.rank}", reason)

    def part(self) -> None:
        """End the watch of all processes together."""
        import torch.distributed as dist

        dist.barrier()  # from here on nobody waits for another
        self.ended.set()

    def _watch(self):
        beat = 0
        while not self.ended.wait(INTERVAL):
            beat += 1
            try:
                self.store.set(f"beat/{self.rank}", str(beat))
                found = self.look()
            except Exception:  # the store is gone, and it was the first device's
                found = self.first_is_gone()
            if found and not self.ended.is_set():
                print(found, file=sys.stderr, flush=True)
                if self.rank == 0:  # the store is this process's: the others are to see for themselves who has died
                    time.sleep(2 * INTERVAL)
                os._exit(FAILED)

    def look(self) -> str | None:
        """A line about a process that has ended, or gives no sign of life; None if all is well."""
        now = time.monotonic()
        for other in range(self.world_size):
            if other == self.rank:
                continue
            if self.store.check([f"end/{other}"]):
                reason = self.store.get(f"end/{other}").decode()
                return f"{self.name(other)} has ended ({reason}), so {self.own_name()} ends: {self.go_on}"
            beat = self.store.get(f"beat/{other}") if self.store.check([f"beat/{other}"]) else b""
            if self.seen.get(other, (None,))[0] != beat:
                self.seen[other] = beat, now
            if now - self.seen[other][1] > SILENCE or self._is_dead(other):
                first = self.first_to_die(other)
                return f"{self.name(first)} has died, or hangs, so {self.own_name()} ends: {self.go_on}"
        return None

    def first_to_die(self, found: int) -> int:
        """The process whose death was found first, by anybody. The one found here may have ended because of it."""
        first = int(self.store.compare_set("first to die", "", str(found)))
        return found if first == self.rank else first

    def first_is_gone(self) -> str:
        """The line about the first process, which kept the store."""
        return f"{self.name(0)} has died, so {self.own_name()} ends: {self.go_on}"

    def own_name(self) -> str:
        """Which of the devices this is, in words."""
        return f"device {self.rank + 1}"

    def name(self, rank: int) -> str:
        """Which of the devices another is, and where it runs."""
        (host, _), process = self.machines[rank]
        return f"device {rank + 1} of {self.world_size} ({host}, process {process})"

    def _is_dead(self, rank):
        """Whether a process of this machine is no more: then there is no need to wait."""
        machine, process = self.machines[rank]
        if machine != self.machines[self.rank][0]:
            return False
        try:
            with open(f"/proc/{process}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] == "Z"  # dead, and nobody has asked how it ended
        except FileNotFoundError:
            return True
        except OSError:
            return False


@contextlib.contextmanager
def watched(rank: int, world_size: int, go_on: str) -> Iterator[None]:
    """Inside, this process and the others of a run watch each other. Does nothing for one that is alone.

    An error that another's death causes, in a collective operation, waits for the line that names it.
    """
    if world_size == 1:
        yield
        return
    import torch.distributed as dist

    machines = [None] * world_size
    dist.all_gather_object(machines, (_machine(), os.getpid()))
    watch = Watch(_store(rank, world_size), rank, world_size, machines, go_on)
    watch.start()
    stopped = None
    try:
        try:
            yield
        except SystemExit as error:  # after a signal, for which all stop at the same step
            stopped = error
        watch.part()
    except BaseException as error:
        if _is_of_others(error):
            time.sleep(SILENCE + 5 * INTERVAL)  # in which the thread ends this process
        watch.leave(str(error).splitlines()[0][:200] if str(error) else type(error).__name__)
        if rank == 0:  # the store is this process's: the others are to read why it ends
            time.sleep(2 * INTERVAL)
        raise
    if stopped:
        raise stopped


def _machine():
    """The name of this machine, and which of its containers sees the same numbers of processes."""
    try:
        return socket.gethostname(), os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        return socket.gethostname(), str(os.getpid())


def _is_of_others(error):
    """Whether an error may be the death of another process, as a collective operation meets it."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _store(rank, world_size):
    """A store beside that of the process group, whose operations would wait for each other."""
    import torch.distributed as dist

    port = [None]
    if rank == 0:
        store = dist.TCPStore("0.0.0.0", 0, world_size, True, timedelta(seconds=SILENCE), wait_for_workers=False)
        port = [store.port]
    dist.broadcast_object_list(port)
    if rank:
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        store = dist.TCPStore(address, port[0], world_size, False, timedelta(seconds=SILENCE), wait_for_workers=False)
    return store
