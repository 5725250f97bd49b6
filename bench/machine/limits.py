"""What the machine can do at most: matrix products at the shapes of a model, copying and reading memory.

    python bench/limits.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct

Every figure is the best of as many repetitions as fit in half a second: what nothing disturbed. On a GPU fp32 means
what finetune.py lets it mean, products of TF32. bench/finetune.py prints each speed as a share of "all products".
"""

import os
import platform
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder, from wherever this is started

from shell import cli


@dataclass
class Settings:
    """The command line.

    Args:
        checkpoint_dir: Model folder; only its config.json is read.
        tokens: Rows of the products: positions that are in the model at one time.
        megabytes: Size of what is copied and read; more than any cache.
    """

    checkpoint_dir: Path
    tokens: int = 512
    megabytes: int = 512

    def __post_init__(self):
        cli.check_numbers(self, "tokens", "megabytes", above=0)


if __name__ == "__main__":
    settings = cli.parse(Settings)

import torch
import torch.nn.functional as F

from model import Transformer
from weights.checkpoint import read_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve")  # of a CPU
SECONDS = 0.5  # spent on each figure


def main(s):
    for name, value in machine().items():
        print(f"{name:34} {value}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = matrix_shapes(s.checkpoint_dir)
    for dtype in DTYPES:
        for shape in shapes:
            rate = matrix_rate({shape: 1}, s.tokens, dtype, device)
            print(f"{f'{dtype}, {s.tokens} x {shape[1]} x {shape[0]}':34} {rate / 1e9:,.0f} GFLOP/s")
        rate = matrix_rate(shapes, s.tokens, dtype, device)
        print(f"{f'{dtype}, all products of the model':34} {rate / 1e9:,.0f} GFLOP/s")
    print(f"{'copy (bytes read and written)':34} {copy_rate(s.megabytes, device) / 1e9:,.1f} GB/s")
    print(f"{'read':34} {read_rate(s.megabytes, device) / 1e9:,.1f} GB/s")


def machine():
    """What the figures depend on: the processor with its extensions for arithmetic, and the GPU if there is one."""
    try:
        info = dict(
            (part.strip() for part in line.split(":", 1))
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if ":" in line
        )
    except OSError:
        info = {}
    flags = (info.get("flags") or info.get("Features") or "").split()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def matrix_shapes(checkpoint_dir):
    """How many products with a weight (out, in) the forward pass of a model has, head included: {(out, in): count}."""
    with torch.device("meta"):
        model = Transformer(read_config(checkpoint_dir))
    layers = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    return Counter(tuple(layer.weight.shape) for layer in layers)


def matrix_rate(shapes, tokens, dtype, device):
    """FLOP/s of all products x W^T in `shapes` ({(out, in): count}), one after the other, for x of (tokens, in)."""
    torch.set_float32_matmul_precision("high")  # as finetune.py does
    flops = seconds = 0.0
    for (rows, columns), count in shapes.items():
        x = torch.randn(tokens, columns, dtype=DTYPES[dtype], device=device)
        weight = torch.randn(rows, columns, dtype=DTYPES[dtype], device=device)
        flops += count * 2 * tokens * rows * columns
        seconds += count * best_seconds(lambda: F.linear(x, weight), device)  # noqa: B023 (called before it changes)
    return flops / seconds


def copy_rate(megabytes, device):
    """Bytes per second, those read and those written counted together."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)


def read_rate(megabytes, device):
    """Bytes per second of a sum."""
    source = torch.ones(megabytes * 2**18, device=device)
    return source.nbytes / best_seconds(source.sum, device)


def best_seconds(work, device):
    """The shortest time that `work()` took, of at least three."""
    work()
    times, until = [], time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < until:
        times.append(cuda_seconds(work) if device.type == "cuda" else cpu_seconds(work))
    return min(times)


def cpu_seconds(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def cuda_seconds(work):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


if __name__ == "__main__":
    cli.run(main, settings)
