"""Tensors on a CPU in memory that is used again: their contents, how much is kept, and what stands in for it."""

import os
import random
import subprocess
import sys

import pytest
from conftest import ROOT, SEED

# What each child process runs first: the allocator is the whole process's, and other tests are to have torch's own.
BEGIN = f"""
import random, sys, threading
import torch
sys.path.insert(0, {str(ROOT)!r})
from ops import allocator
random.seed({SEED})
torch.set_num_threads(1)
before = torch.arange(300_000)
allocator.keep_freed_memory()
MB = 2**20
"""

# Tensors of random sizes come and go; each holds a number of its own, which no other may overwrite.
CHURN = """
def churn(rounds, largest):
    kept = []
    for number in range(rounds):
        tensor = torch.full((random.randint(0, largest),), number, dtype=torch.int64)
        kept.append((number, tensor))
        while sum(t.nbytes for _, t in kept) > 60 * MB:
            number, tensor = kept.pop(random.randrange(len(kept)))
            assert (tensor == number).all(), number
    assert all((tensor == number).all() for number, tensor in kept)
"""


def run(code, env=None):
    """Standard error of `code` in a child process, which must end well."""
    command = [sys.executable, "-c", BEGIN + CHURN + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **(env or {})})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def test_tensors_keep_their_contents_and_all_memory_is_counted():
    run(
        """
churn(600, 500_000)
assert torch.equal(before, torch.arange(300_000))
del before  # made by torch's own allocator, freed by that
live, peak, kept = allocator.allocated()
assert live == 0 < peak <= 70 * MB and 0 < kept <= peak + 33 * MB, (live, peak, kept)
"""
    )


def test_threads_share_the_memory():
    run(
        """
failed = []
threading.excepthook = lambda args: failed.append(args.exc_value)
threads = [threading.Thread(target=churn, args=(150, 300_000)) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failed, failed
assert allocator.allocated()[0] == 0
"""
    )


def test_lengths_that_change_do_not_add_to_the_process():
    """Like micro-batches: many tensors at one time, of one length, which is another each time, the longest first. Each
    leaves small blocks that stay. The kept memory may exceed the peak by the allocator's slack of 32 MiB."""
    run(
        """
from training.metrics import resident_memory
small, start = [], None
for number in range(25):
    T = random.randint(700, 1000) if number else 1000
    saved = []
    for _ in range(40):
        saved += [torch.ones(T, 576), torch.ones(T, 192), torch.ones(T, 1536).mul(2).sum()]
        small.append(torch.ones(1000))
    del saved
    if number == 0:
        start = resident_memory("VmRSS")
most = 40 * 1000 * 4 * (576 + 192) + 1000 * 1536 * 4 * 2
grown = resident_memory("VmRSS") - start
assert grown < 45 * MB, grown / MB
assert allocator.allocated()[2] <= most + 40 * 3 * 8192 + 33 * MB
"""
    )


def test_small_blocks_in_the_place_of_large_ones_do_not_hold_their_memory():
    """Like AdamW's moments, which are made after the first micro-batch: small blocks, which take the place of large
    ones that were freed, stay for good."""
    run(
        """
large, size = [torch.ones(4 * MB // 4) for _ in range(40)], random.randint(320, 380) * 1024
del large
small = [torch.ones(size // 4) for _ in range(120)]  # more than fit beside what is kept
large = [torch.ones(4 * MB // 4) for _ in range(27)]
live, peak, resident = allocator.allocated()
assert live <= resident <= peak + 32 * MB, (live / MB, peak / MB, resident / MB)
assert all((tensor == 1).all() for tensor in small + large)
"""
    )


def test_memory_that_runs_out_is_torchs_error_and_leaves_nothing_behind():
    run(
        """
import resource
live, peak, _ = allocator.allocated()
resource.setrlimit(resource.RLIMIT_AS, (2**34, -1))
try:
    torch.empty(2**36, dtype=torch.uint8)
except RuntimeError as error:
    assert "can't allocate memory" in str(error), error  # budget.OUT_OF_MEMORY looks for it
    assert "68719476736 bytes" in str(error), error
else:
    raise AssertionError("it was granted")
assert allocator.allocated()[:2] == (live, peak)
churn(100, 500_000)
"""
    )


def test_kept_memory_makes_way_for_a_larger_block_under_a_limit():
    run(
        """
import resource
from ops.allocator import address_space
kept = [torch.ones(30 * MB // 4) for _ in range(8)]
resource.setrlimit(resource.RLIMIT_AS, (address_space() + 100 * MB, -1))
del kept
assert torch.ones(200 * MB // 4).sum() == 200 * MB // 4
"""
    )


def test_addresses_that_blocks_in_use_do_not_need_make_way_too():
    """Each block has an eighth more than it takes, which counts under a limit as if it were used."""
    run(
        """
import resource
from ops.allocator import address_space
held = [torch.ones(16 * MB // 4) for _ in range(20)]
resource.setrlimit(resource.RLIMIT_AS, (address_space() + 5 * MB, -1))
more = torch.ones(36 * MB // 4)  # of 40 that the held ones do not need
assert all((tensor == 1).all() for tensor in held + [more])
"""
    )


LIMITED = """
def refused(nbytes):
    try:
        torch.empty(nbytes, dtype=torch.uint8)
    except RuntimeError as error:
        assert "can't allocate memory" in str(error), error
        return True
    return False

held = [torch.ones(8 * MB // 4) for _ in range(10)]
with allocator.no_more_than(60 * MB):
    assert not refused(50 * MB)
    more = torch.ones(20 * MB // 4)
    assert not refused(35 * MB) and refused(70 * MB)
    del held[5:]
    assert not refused(74 * MB) and refused(90 * MB)
assert not refused(90 * MB)
churn(100, 300_000)
assert all((tensor == 1).all() for tensor in held + [more])
"""


def test_memory_can_be_limited_to_what_is_free():
    run(LIMITED)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_without_a_compiler_all_addresses_are_limited():
    code = LIMITED.replace("del held[5:]\n    assert not refused(74 * MB) and refused(90 * MB)", "pass")
    assert "del held" not in code
    assert "going on without allocator_cpu.cpp" in run(code, {"CXX": "no-such-compiler"})


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
def test_without_a_compiler_glibc_maps_large_blocks():
    seed = random.randint(0, 99)
    notes = run(f"random.seed({seed})\nchurn(100, 300_000)", {"CXX": "no-such-compiler"})
    assert "going on without allocator_cpu.cpp" in notes
