"""What a save costs over a plain write of the same bytes, and what it leaves behind for the steps after it.

    python bench/saving.py --gigabytes 1 --folder out

Weights in bf16 as `--method full` has them, written by turns as a checkpoint (hashed, flushed, renamed, with its
manifest) and in one go by write and fsync. Prints JSON: medians in seconds, and their ratio.
"""

import json
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project's folder, from wherever this is started

import cli


@dataclass
class Settings:
    """The command line.

    Args:
        gigabytes: Size of what is saved.
        repeats: Of either way.
        folder: On the disk to measure.
    """

    gigabytes: float = 1.0
    repeats: int = 5
    folder: Path = Path("out")

    def __post_init__(self):
        cli.check_numbers(self, "gigabytes", "repeats", above=0)


if __name__ == "__main__":
    settings = cli.parse(Settings)

import torch

from checkpoint import write_weights
from files import new_folder

TENSOR_VALUES = 4096 * 4096  # of a projection of a 7B model


def main(s):
    count = max(1, round(s.gigabytes * 1e9 / (2 * TENSOR_VALUES)))
    tensor = torch.randn(TENSOR_VALUES).to(torch.bfloat16)
    tensors = {f"{number}.weight": tensor + number for number in range(count)}
    seconds = {save: [], write: []}
    for _ in range(s.repeats):
        for way in seconds:
            place = s.folder / "saving"
            place.mkdir(parents=True)
            os.sync()
            started = time.perf_counter()
            way(tensors, place)
            seconds[way].append(time.perf_counter() - started)
            shutil.rmtree(place)
    saved, written = (statistics.median(values) for values in seconds.values())
    gigabytes = 2 * TENSOR_VALUES * count / 1e9
    print(json.dumps({"gigabytes": gigabytes, "save": saved, "write": written, "ratio": saved / written}))


def save(tensors, place):
    hashes, layout = {}, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with new_folder(place / "step-000001", hashes) as folder:
        hashes |= write_weights(folder, layout, tensors.__getitem__)


def write(tensors, place):
    with open(place / "plain", "wb") as file:
        for tensor in tensors.values():
            file.write(tensor.view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    cli.run(main, settings)
