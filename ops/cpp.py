"""C++ beside the Python: compiled once with g++ for this processor, kept in ~/.cache/onetune, called through ctypes."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import torch

OPERATORS = torch.library.Library("onetune", "DEF")
# Not -ffast-math: it would link a start-up routine that changes how the whole process treats tiny numbers.
FLAGS = "-std=c++17 -O3 -march=native -fopenmp -shared -fPIC -fno-math-errno -fno-trapping-math -fno-signed-zeros"
FLAGS = [*FLAGS.split(), "-fassociative-math"]


@lru_cache
def compiled_library(name, *flags):
    """NAME.cpp of this folder as a ctypes library. None, with a line of notice, where it cannot be compiled.

    flags: for the compiler, beside FLAGS.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    try:
        if compiler is None:
            raise OSError("no C++ compiler (g++)")
        return ctypes.CDLL(str(_compile(compiler, Path(__file__).with_name(f"{name}.cpp"), flags)))
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"note: {error}: going on without {name}.cpp, which is slower", file=sys.stderr)
        return None


def _compile(compiler, source, flags):
    """The path of the library for this source and this processor, compiled unless it is there already."""
    processor = Path("/proc/cpuinfo")  # -march=native: a home folder may be shared among unlike machines
    features = next((line for line in processor.read_text().splitlines() if line.startswith("flags")), "")
    code = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    key = hashlib.sha256(code + " ".join([compiler, *FLAGS, *flags, features]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "onetune")
    path = folder / f"{source.stem}-{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *FLAGS, str(source), "-o", str(temporary), *flags], check=True, capture_output=True)
        temporary.replace(path)
    return path


def operator(signature):
    """Make a function torch.ops.onetune's: a step in which what it computes is seen by torch's modes as one operation.

    So a plan, whose tensors have no memory, runs it too, and the memory and the arithmetic it takes are counted. It
    makes its outputs and leaves the rest to `call`.
    """

    def register(function):
        name = OPERATORS.define(signature)
        for device in ("CPU", "Meta"):
            OPERATORS.impl(name, function, device)
        return getattr(torch.ops.onetune, name)

    return register


def call(library, function, *arguments):
    """Call a C++ function with tensors (their addresses), whole numbers (int64), fp (double) and ctypes' own values.

    Tensors have to be contiguous. Without memory (on "meta") nothing happens.
    """
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    assert all(tensor.is_contiguous() for tensor in tensors)
    if not any(tensor.is_meta for tensor in tensors):
        getattr(compiled_library(library), function)(*map(_as_c, arguments))


def _as_c(argument):
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument


def in_cpp(x, dtype=None):
    """Whether kernels_cpu.cpp computes with x, cast to `dtype`: on a CPU in fp32 or bf16, and not in torch.compile."""
    dtype = dtype or x.dtype
    if x.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or torch.compiler.is_compiling():
        return False
    return compiled_library("kernels_cpu") is not None


def call_cpp(function, x, *arguments):
    """Call a function of kernels_cpu.cpp that computes in the dtype of x, its first argument.

    The others are in that dtype too or, as its source says, in fp32.
    """
    in_bf16 = {torch.float32: False, torch.bfloat16: True}[x.dtype]
    call("kernels_cpu", function, in_bf16, x, *arguments, torch.get_num_threads())
