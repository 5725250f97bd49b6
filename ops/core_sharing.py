"""Cores shared with other processes: OpenMP's threads must not keep a core only to wait with it."""

import os
import threading
import time
from pathlib import Path

import torch

# At the end of each operation OpenMP's threads wait for each other. GNU's runtime, which torch brings along, lets them
# spin for 300,000 rounds (1 to 3 ms) before they give up their core. While a run is alone that is fastest: to sleep and
# be woken costs a tenth to a half of the speed. But beside a second busy process the threads that are waited for have
# no core, the spinning ones keep theirs, and both processes become 10 to 30 times slower. So spinning is cut short
# while this process has to wait for cores, and only then (figures: docs/performance.md).
USERS_CHOICE = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # whoever sets one of these variables has decided it
INTERVAL = 0.5  # seconds between two looks
SHARED, ALONE = 0.1, 0.05  # seconds without a core in a second; measured: alone 0.00 to 0.03, beside a run 0.4 to 1.3
CALM_LOOKS = 4  # in a row, before threads spin again

_started = threading.Lock()  # held from the first start on


def share_cores() -> None:
    """From now on a thread watches whether other processes want the same cores, and makes OpenMP's spin less then.

    Does nothing on a second call, where the user has set one of USERS_CHOICE, where torch has but one thread, and where
    the system does not say how long threads wait for a core (Linux does, in /proc).
    """
    decided = any(variable in os.environ for variable in USERS_CHOICE)
    if decided or torch.get_num_threads() == 1 or not time_without_core() or not _started.acquire(blocking=False):
        return
    threading.Thread(target=_watch, name="core sharing", daemon=True).start()


def time_without_core() -> dict[str, int]:
    """Nanoseconds that each thread of this process was ready to run and had no core, by its id; {} if not known."""
    found = {}
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            found[file.parent.name] = int(file.read_text().split()[1])
        except OSError:
            continue  # a thread that has just ended
    return found


def _watch():
    sharing, before, then = Sharing(), time_without_core(), time.monotonic()
    while True:
        time.sleep(INTERVAL)
        after, now = time_without_core(), time.monotonic()
        waited = sum(after[thread] - before[thread] for thread in after.keys() & before.keys())
        sharing.look(waited / 1e9 / (now - then))
        before, then = after, now


class Sharing:
    """Whether cores are shared, and short spinning while they are.

    GNU's OpenMP cuts spinning from 300,000 rounds to 100 by itself as soon as it has more threads than there are cores.
    So threads are added that do nothing: each of a few threads computes something in parallel once, for which OpenMP
    gives it a team of its own, and sleeps. When it ends, so does its team. Other OpenMP runtimes do not mind.
    """

    def __init__(self):
        self.end = None  # set to end the idle teams; None while there are none
        self.calm_looks = 0

    def look(self, share: float) -> None:
        """Take note of the time without a core in the last interval, in seconds a second, of all threads together."""
        if share > SHARED and self.end is None:
            self.end = threading.Event()
            for _ in range(idle_teams(len(os.sched_getaffinity(0)), torch.get_num_threads())):
                threading.Thread(target=_idle_team, args=(self.end,), name="idle team", daemon=True).start()
        self.calm_looks = self.calm_looks + 1 if share < ALONE else 0
        if self.end is not None and self.calm_looks >= CALM_LOOKS:
            self.end.set()
            self.end = None


def idle_teams(cores: int, threads: int) -> int:
    """How many more teams of `threads` it takes for OpenMP to count more threads than there are cores.

    It counts the process's own team in full, and of each other team all but the thread that began it. One thread alone
    waits for no other: none.
    """
    return max(0, cores - threads) // (threads - 1) + 1 if threads > 1 else 0


def _idle_team(end):
    torch.ones(2**16, dtype=torch.int8, device="cpu")  # filled in parallel
    end.wait()
