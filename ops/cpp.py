"""C++ beside the Python: compiled once with g++ for this processor, kept in ~/.cache/onetune, called through ctypes.

A compiled file is code that is run, so it is taken only if nobody but this user (or root) can have written it, and
only if it is complete: it ends with the SHA-256 of what stands before. Otherwise it is compiled again.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

OPERATORS = torch.library.Library("onetune", "DEF")
# Not -ffast-math: it would link a start-up routine that changes how the whole process treats tiny numbers.
FLAGS = "-std=c++17 -O3 -march=native -fopenmp -shared -fPIC -fno-math-errno -fno-trapping-math -fno-signed-zeros"
FLAGS = [*FLAGS.split(), "-fassociative-math"]
DIGEST_BYTES = hashlib.sha256().digest_size
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


# ------------------------------------------------------------------------------------------------ compiling and keeping


@lru_cache
def compiled_library(name: str, *flags: str) -> ctypes.CDLL | None:
    """NAME.cpp of this folder as a ctypes library. None, and a note on standard error, where it cannot be compiled.

    flags: for the compiler, beside FLAGS.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    try:
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        if compiler is None:
            raise OSError("no C++ compiler (g++)")
        flags = [*FLAGS, *flags]
        file_name = f"{name}-{_key(compiler, flags, source)}.so"
        return _load_kept(file_name) or _compile_and_load(compiler, flags, source, file_name)
    except OSError as error:
        print(f"note: {error}: going on without {source.name}, which is slower", file=sys.stderr)
        return None


def _key(compiler, flags, source):
    """What the compiled file depends on, as 16 hex digits: a home folder may be shared among unlike machines."""
    processor = Path("/proc/cpuinfo")  # for -march=native
    features = next((line for line in processor.read_text().splitlines() if line.startswith("flags")), "")
    code = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    how = " ".join([compiler, *flags, features, *platform.libc_ver()])
    return hashlib.sha256(code + how.encode()).hexdigest()[:16]


def _load_kept(file_name):
    """The library from the cache folder, or None if it is not there, not complete, or may be another user's."""
    try:
        path = _cache_folder() / file_name
        content = path.read_bytes()
        complete = hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]
        return ctypes.CDLL(str(path)) if complete and _only_ours(path) else None
    except OSError:
        return None


def _compile_and_load(compiler, flags, source, file_name):
    """Compile into a private temporary folder, keep the result in the cache folder, and load it from there.

    Where it cannot be kept, the temporary file is loaded: the process goes on using it after it is removed.
    """
    with tempfile.TemporaryDirectory(prefix="onetune-") as private:
        compiled = Path(private, file_name)
        command = [compiler, str(source), "-o", str(compiled), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or [f"status {done.returncode}"]
            raise OSError(f"{compiler}: {lines[0]}")
        try:
            return ctypes.CDLL(str(_keep(compiled, _cache_folder())))
        except OSError as error:
            print(f"note: {error}: {source.name} is compiled again at each start", file=sys.stderr)
            return ctypes.CDLL(str(compiled))


def _cache_folder():
    """The folder of the compiled files, made if need be. Raises OSError if there is none that only this user writes."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):  # HOME is not set and the user id has no entry in /etc/passwd
        raise OSError("no home folder (set HOME or XDG_CACHE_HOME)")
    folder = Path(cache, "onetune")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid == os.getuid() and status.st_mode & OTHERS_WRITE:
        folder.chmod(status.st_mode & ~OTHERS_WRITE)
    if not _only_ours(folder):
        raise OSError(f"{folder} can be changed by other users (set XDG_CACHE_HOME)")
    return folder


def _only_ours(path):
    """Whether nobody but this user and root can change a file, or what a folder holds."""
    status = path.stat()
    return status.st_uid in (0, os.getuid()) and not status.st_mode & OTHERS_WRITE


def _keep(compiled, folder):
    """Copy a compiled file into a folder, with its SHA-256 at the end, so that it appears complete or not at all."""
    content = compiled.read_bytes()
    # The name is random, not the process id: containers that share the folder may have equal ones.
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{compiled.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(content + hashlib.sha256(content).digest())
        os.replace(temporary, folder / compiled.name)
    except BaseException:
        os.unlink(temporary)
        raise
    return folder / compiled.name


# --------------------------------------------------------------------------------------------------- calling from torch


def operator(signature: str) -> Callable[[Callable], Callable]:
    """Make a function torch.ops.onetune's: a step in which what it computes is seen by torch's modes as one operation.

    signature: as torch.library.Library.define takes it. So a memory dry run, whose tensors have no memory, runs the
    function too, and its memory and arithmetic are counted. It allocates its outputs and leaves the rest to `call`.
    """

    def register(function):
        name = OPERATORS.define(signature)
        for device in ("CPU", "CUDA", "Meta"):
            OPERATORS.impl(name, function, device)
        return getattr(torch.ops.onetune, name)

    return register


def call(library: str, function: str, *arguments: Tensor | int | float | ctypes._SimpleCData) -> None:
    """Call a C++ function with tensors (their addresses), whole numbers (int64), fp (double) and ctypes' own values.

    Tensors have to be contiguous. Where they have no memory (device "meta"), nothing happens.
    """
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    assert all(tensor.is_contiguous() for tensor in tensors)
    if not any(tensor.is_meta for tensor in tensors):
        getattr(compiled_library(library), function)(*map(_as_c, arguments))


def _as_c(argument):
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument


def in_cpp(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether kernels_cpu.cpp computes with x, cast to `dtype`: on a CPU in fp32 or bf16, and not in torch.compile."""
    dtype = dtype or x.dtype
    if x.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or torch.compiler.is_compiling():
        return False
    return compiled_library("kernels_cpu") is not None


def call_cpp(function: str, x: Tensor, *arguments: Tensor | int | float | ctypes._SimpleCData) -> None:
    """Call a function of kernels_cpu.cpp that computes in the dtype of x, its first argument.

    The other tensors are in that dtype too or, as its source says, in fp32.
    """
    in_bf16 = {torch.float32: False, torch.bfloat16: True}[x.dtype]
    call("kernels_cpu", function, in_bf16, x, *arguments, torch.get_num_threads())
