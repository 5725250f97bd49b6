"""Memory of tensors on a CPU: an allocator that leaves no holes, and what stands in for it without a compiler."""

import contextlib
import ctypes
from pathlib import Path

import torch

from ops.cpp import compiled_library

TORCH = Path(torch.__file__).parent
# The version: a library made for another torch must not be loaded from the cache folder.
FLAGS = (f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}", "-lc10", "-std=c++20", f'-DVERSION="{torch.__version__}"')
M_MMAP_THRESHOLD, MAPPED_BYTES = -3, 2**20  # of mallopt(3)


def keep_freed_memory() -> None:
    """Let torch allocate CPU tensors by allocator_cpu.cpp from now on, in which peak memory follows from the tensors.

    Without a C++ compiler glibc is told to map each block of MAPPED_BYTES or more by itself, which is a tenth slower.
    Left alone it raises that size to that of the largest block yet freed, up to 32 MiB, and the holes in its heap make
    the process twice as large as its tensors.
    """
    library = compiled_library("allocator_cpu", *FLAGS)
    if library is not None:
        library.use_keeping_allocator()
        return
    with contextlib.suppress(AttributeError, TypeError):  # other C libraries have no such function
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def allocated() -> tuple[int, int, int]:
    """Bytes of tensors of 128 KiB and more: now, at their peak, and of the memory that they and kept blocks take.

    Only after `keep_freed_memory`.
    """
    counts = [ctypes.c_int64() for _ in range(3)]
    compiled_library("allocator_cpu", *FLAGS).allocator_counts(*map(ctypes.byref, counts))
    return tuple(count.value for count in counts)
