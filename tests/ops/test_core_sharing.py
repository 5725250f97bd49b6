"""Cores shared with other processes: when threads are told to spin less, and that OpenMP is really told."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from ops import core_sharing
from ops.core_sharing import ALONE, CALM_LOOKS, SHARED, Sharing

NEEDS_PROC = pytest.mark.skipif(not core_sharing.time_without_core(), reason="no schedstat in /proc")

# Prints how many threads there are: one, with idle teams, after they have ended, and with them once more.
TEAMS = """
import os, sys, time
import torch
from ops.core_sharing import ALONE, CALM_LOOKS, SHARED, Sharing

def threads(expected):
    end = time.monotonic() + 20
    while len(os.listdir("/proc/self/task")) != expected and time.monotonic() < end:
        time.sleep(0.01)
    return len(os.listdir("/proc/self/task"))

cores = len(os.sched_getaffinity(0))
torch.set_num_threads(cores)
torch.ones(2**20)
alone, sharing = len(os.listdir("/proc/self/task")), Sharing()
for _ in range(2):
    sharing.look(2 * SHARED)
    print(threads(alone + cores) - alone)
    for _ in range(CALM_LOOKS):
        sharing.look(0.0)
    print(threads(alone) - alone)
"""

# Computes among other processes that take all cores, and prints the names of its threads every moment.
CROWDED = """
import subprocess, sys, threading, time
import torch
from ops.core_sharing import share_cores

torch.set_num_threads(2)
share_cores()
share_cores()
names = lambda: [thread.name for thread in threading.enumerate()]
print(names().count("core sharing"), flush=True)
busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * int(sys.argv[1]))]
matrix, end, found = torch.ones(512, 512), time.monotonic() + 60, False
while not found and time.monotonic() < end:
    matrix @ matrix
    found = "idle team" in names()
for process in busy:
    process.kill()
    process.wait()
print(found)
"""


@pytest.fixture
def teams(monkeypatch):
    """A list of the idle teams that were started, as the events that end them, by a process of two threads."""
    started = []
    monkeypatch.setattr(core_sharing.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(core_sharing, "_idle_team", started.append)
    return started


def run(code, *args, **variables):
    """The lines that `code` prints in a process of its own."""
    clean = {key: value for key, value in os.environ.items() if key not in core_sharing.USERS_CHOICE}
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, env=clean | variables, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout.split()


def test_idle_teams_start_when_cores_are_shared_and_end_after_some_calm_looks(teams):
    sharing = Sharing()
    for share in (0.0, ALONE, SHARED):
        sharing.look(share)
    assert sharing.end is None and not teams
    sharing.look(SHARED + 0.01)
    end, count = sharing.end, len(teams)
    assert count >= 1 and set(teams) == {end} and not end.is_set()
    sharing.look(1.5)
    for _ in range(3):  # a look that is not calm begins the count again
        for _ in range(CALM_LOOKS - 1):
            sharing.look(0.0)
        sharing.look(ALONE)
    assert len(teams) == count and sharing.end is end and not end.is_set()
    for _ in range(CALM_LOOKS):
        sharing.look(ALONE - 0.01)
    assert sharing.end is None and end.is_set()
    sharing.look(SHARED + 0.01)
    assert sharing.end is not end and len(teams) == 2 * count


@pytest.mark.parametrize("cores", range(2, 33))
def test_there_are_just_enough_idle_teams_for_openmp_to_count_more_threads_than_cores(cores):
    for threads in range(2, 40):
        count = core_sharing.idle_teams(cores, threads)
        counted = [threads + (threads - 1) * teams for teams in (count - 1, count)]
        assert counted[1] > cores and (count == 1 or counted[0] <= cores), (threads, counted)
    assert core_sharing.idle_teams(cores, 1) == 0


@NEEDS_PROC
def test_an_idle_team_has_openmp_threads_of_its_own_until_it_ends():
    cores = len(os.sched_getaffinity(0))
    if cores == 1:
        pytest.skip("one core: OpenMP starts no threads")
    assert run(TEAMS) == [str(cores), "0"] * 2


@NEEDS_PROC
def test_a_process_that_waits_for_cores_notices_it():
    assert run(CROWDED, len(os.sched_getaffinity(0))) == ["1", "True"]


@pytest.mark.parametrize("variables", [{name: "passive"} for name in core_sharing.USERS_CHOICE] + [{"none": ""}])
def test_nothing_watches_where_the_user_has_decided_or_one_thread_computes(variables):
    threads = "2" if variables.keys() & set(core_sharing.USERS_CHOICE) else "1"
    code = (
        "import threading, torch; from ops.core_sharing import share_cores; torch.set_num_threads("
        f"{threads}); share_cores(); print(threading.active_count())"
    )
    assert run(code, **variables) == ["1"]
