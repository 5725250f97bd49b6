"""Triton's kernels: for which tensors they compute, and how they are launched.

They stand in the files called ..._gpu.py, each beside the file with its plain reference. Those files are imported on
the first launch alone: a machine without a GPU need not have Triton. With TRITON_INTERPRET=1 in the environment before
its first import Triton runs them as numpy, slowly: so the tests try them on a CPU (`on_cpu`).
"""

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEWEST_ELEMENTS = 2048  # that a program works on at a time where a row is short: so each of its threads has several
on_cpu = False  # whether they compute with tensors of a CPU too, which takes Triton's interpreter
# Functions that are called with each launch: (name, grid, arguments, how). bench/machine/kernels.py compiles what a
# step of a model launches, for cards that are not there.
observers: list[Callable] = []


def in_triton(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether Triton's kernels compute with x, cast to `dtype`: on CUDA, and not in torch.compile.

    "meta" stands for a CUDA device that is not there, in the prediction of memory.
    """
    if (dtype or x.dtype) not in DTYPES or torch.compiler.is_compiling():
        return False
    device = x.device.type
    return device == "meta" or (device == "cuda" and has_triton()) or (device == "cpu" and on_cpu)


@lru_cache
def has_triton() -> bool:
    """Whether Triton is installed. It comes with torch's CUDA build for Linux."""
    return importlib.util.find_spec("triton") is not None


def launch(name: str, grid: tuple[int, ...], *arguments: Tensor | float | None, **how: Any) -> None:
    """Run the kernel called `name` in a `grid` of so many programs. Tensors have to be contiguous.

    arguments: tensors, numbers, and None for a tensor that is not there. how: the kernel's constants, and num_warps.
    Where tensors have no memory (fake ones, or on device "meta") nothing happens.
    """
    for observe in observers:
        observe(name, grid, arguments, how)
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    if 0 not in grid and not any(tensor.is_meta or is_fake(tensor) for tensor in tensors):
        kernel(name)[grid](*arguments, **how)


@lru_cache
def kernel(name: str) -> Any:
    """The Triton function of this name."""
    from ops import activation_gpu, dequantize_gpu, dropout_gpu, loss_gpu, low_rank_gpu, norm_gpu, rotation_gpu

    files = (activation_gpu, dequantize_gpu, dropout_gpu, loss_gpu, low_rank_gpu, norm_gpu, rotation_gpu)
    return next(getattr(file, name) for file in files if hasattr(file, name))


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def tile(columns: int) -> dict[str, int]:
    """Rows and columns of a tile that has whole rows of `columns` elements, and the warps for it."""
    width = power_of_two(columns)
    rows = max(1, FEWEST_ELEMENTS // width)
    return {"ROWS": rows, "COLUMNS": width, "num_warps": min(16, max(4, rows * width // 512))}


def tiles(rows: int, how: dict[str, int]) -> int:
    """How many tiles have so many rows."""
    return -(-rows // how["ROWS"])
