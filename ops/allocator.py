"""Memory of tensors on a CPU: an allocator that leaves no holes, and what stands in for it without a compiler."""

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ops.cpp import compiled_library

TORCH = Path(torch.__file__).parent
# The version: a library made for another torch must not be loaded from the cache folder.
FLAGS = (f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}", "-lc10", "-std=c++20", f'-DVERSION="{torch.__version__}"')
M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 2**20  # of mallopt(3)
_in_use = []  # the library, once torch allocates by it


def keep_freed_memory() -> None:
    """Let torch allocate CPU tensors by allocator_cpu.cpp from now on, in which peak memory follows from the tensors.

    Without a C++ compiler glibc is told to map each block of MAPPED_BYTES or more by itself, which is a tenth slower.
    Left alone it raises that size to that of the largest block yet freed, up to 32 MiB, and the holes in its heap make
    the process twice as large as its tensors.
    """
    library = compiled_library("allocator_cpu", *FLAGS)
    if library is not None:
        library.use_keeping_allocator()
        library.limit_growth.argtypes = [ctypes.c_int64]
        _in_use[:] = [library]
        return
    with contextlib.suppress(AttributeError, TypeError):  # other C libraries have no such function
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


@contextlib.contextmanager
def no_more_than(nbytes: int) -> Iterator[None]:
    """Make tensors on the CPU that take more than `nbytes` beside those there are fail inside, as out of memory.

    Linux would grant them, and kill the process when it uses them. Without allocator_cpu.cpp the limit is one on all
    addresses of the process.
    """
    with contextlib.ExitStack() as at_the_end:
        if _in_use:
            _in_use[0].limit_growth(nbytes)
            at_the_end.callback(_in_use[0].limit_growth, -1)
        elif sys.platform == "linux":
            before = resource.getrlimit(resource.RLIMIT_AS)
            at_the_end.callback(resource.setrlimit, resource.RLIMIT_AS, before)
            resource.setrlimit(resource.RLIMIT_AS, (address_space() + nbytes, before[1]))
        yield


def address_space() -> int:
    """Bytes of this process's address space, used or not: what `ulimit -v` limits."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def allocated() -> tuple[int, int, int]:
    """Bytes of tensors of 128 KiB and more: now, at their peak, and of the memory that they and kept blocks take.

    Only after `keep_freed_memory`.
    """
    counts = [ctypes.c_int64() for _ in range(3)]
    _in_use[0].allocator_counts(*map(ctypes.byref, counts))
    return tuple(count.value for count in counts)
