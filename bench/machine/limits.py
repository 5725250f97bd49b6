"""What the machine can do at most: matrix products at the shapes of a model, copying and reading memory.

    python bench/machine/limits.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct

Every figure is the best of as many repetitions as fit in half a second: the one that nothing disturbed. On a GPU fp32
means what finetune.py lets it mean, products of TF32. bench/training/speed.py prints each speed as a share of "all
products".
"""

import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.measuring import device_name, machine, print_table
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
SECONDS = 0.5  # spent on each figure


def main(s):
    """Print what the machine is, and its limits."""
    for name, value in machine().items():
        print(f"{name:6} {value}")
    rows, device, shapes = [], device_name(), matrix_shapes(s.checkpoint_dir)
    for dtype in DTYPES:
        parts = {f"{s.tokens} x {shape[1]} x {shape[0]}": {shape: 1} for shape in shapes}
        for name, part in {**parts, "all products of the model": shapes}.items():
            rate = matrix_rate(part, s.tokens, dtype, device) / 1e9
            rows.append({"what": f"{dtype}, {name}", "rate": rate, "unit": "GFLOP/s"})
    copy, read = (rate(s.megabytes, device) / 1e9 for rate in (copy_rate, read_rate))
    rows.append({"what": "copy (bytes read and written)", "rate": copy, "unit": "GB/s"})
    rows.append({"what": "read", "rate": read, "unit": "GB/s"})
    print_table({"what": "{what}", "rate": "{rate:,.1f}", "unit": "{unit}"}, rows)


def matrix_shapes(checkpoint_dir: Path) -> Counter:
    """How many products with a weight (out, in) the forward pass of a model has, head included: {(out, in): count}."""
    with torch.device("meta"):
        model = Transformer(read_config(checkpoint_dir))
    layers = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
    return Counter(tuple(layer.weight.shape) for layer in layers)


def matrix_rate(shapes: dict[tuple[int, int], int], tokens: int, dtype: str, device: str) -> float:
    """FLOP/s of all products x W^T in `shapes` ({(out, in): count}), one after the other, for x of (tokens, in)."""
    torch.set_float32_matmul_precision("high")  # as finetune.py does
    flops = seconds = 0.0
    for (rows, columns), count in shapes.items():
        x = torch.randn(tokens, columns, dtype=DTYPES[dtype], device=device)
        weight = torch.randn(rows, columns, dtype=DTYPES[dtype], device=device)
        flops += count * 2 * tokens * rows * columns
        seconds += count * best_seconds(lambda: F.linear(x, weight), device)  # noqa: B023 (called before it changes)
    return flops / seconds


def copy_rate(megabytes: int, device: str) -> float:
    """Bytes per second, those read and those written counted together."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)


def read_rate(megabytes: int, device: str) -> float:
    """Bytes per second of a sum."""
    source = torch.ones(megabytes * 2**18, device=device)
    return source.nbytes / best_seconds(source.sum, device)


def best_seconds(work: Callable, device: str) -> float:
    """The shortest time that `work()` took, of at least three."""
    work()
    times, until = [], time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < until:
        times.append(cuda_seconds(work) if device == "cuda" else cpu_seconds(work))
    return min(times)


def cpu_seconds(work: Callable) -> float:
    """The time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def cuda_seconds(work: Callable) -> float:
    """The GPU's time for what one call launches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


if __name__ == "__main__":
    cli.run(main, settings)
