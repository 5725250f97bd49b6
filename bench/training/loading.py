"""What each device reads of a model's files, holds of them, and takes at the peak of loading: layout x base.

    python bench/training/loading.py
    python bench/training/loading.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --runs 1

Devices are processes on a CPU, which load as finetune.py does, with LoRA. The peak is the resident memory above that of
the imports: what is held, the tensor that is under way, and what of the file is mapped meanwhile. What is read are the
bytes of the tensors that are taken from the files. Without --checkpoint_dir the model is a random Llama in bf16, which
is made for it.
"""

import itertools
import multiprocessing
import os
import socket
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(ROOT)

from bench.measuring import Measurement, alternate, describe, machine_name, print_table, run_job, summarize
from shell import cli

LAYOUTS = {  # number of devices, --parallel, --shard
    "one device": (1, None, False),
    "`--parallel tensor=2`": (2, "tensor=2", False),
    "`--shard`, 2 devices": (2, None, True),
    "`--shard`, 4 devices": (4, None, True),
}


@dataclass(kw_only=True)
class Settings(Measurement):
    """The command line.

    Args:
        bases: Each a --precision or a --quantize of finetune.py.
        layers: Blocks of the random model, of width 1,024.
        runs: Of each; the medians count.
    """

    checkpoint_dir: Path | None = None
    bases: list[str] = field(default_factory=lambda: ["bf16-true", "bnb.nf4"])
    layers: int = 20
    runs: int = 3
    out_file: Path = Path("out/bench/loading.jsonl")

    def __post_init__(self):
        cli.check_numbers(self, "layers", "runs", above=0)


if __name__ == "__main__":
    settings = cli.parse(Settings)

GIGABYTES = ("held_gb", "largest_gb", "peak_gb", "read_gb")
COLUMNS = {
    "layout": "{layout}", "base": "{base}", "reads GB": "{read_gb:.3f}", "holds GB": "{held_gb:.3f}",
    "largest tensor GB": "{largest_gb:.3f}", "peak GB": "{peak_gb:.3f}", "from": "{spread[0]:.3f}",
    "to": "{spread[1]:.3f}",
}  # fmt: skip


def main(s: Settings) -> None:
    """Measure all combinations and print their table: of each run the device that takes most."""
    with tempfile.TemporaryDirectory() as work_dir:
        folder = s.checkpoint_dir or random_llama(Path(work_dir), s.layers)
        sides = [{"layout": name, "base": base} for name, base in itertools.product(LAYOUTS, s.bases)]

        def measure_side(layout, base):
            job = {"layout": layout, "base": base, "checkpoint_dir": str(folder.resolve())}
            return run_job(measure, job, s.out_file.parent / "loading.log")

        call, lines = describe(s), []
        for line in alternate(sides, s.runs, measure_side, s, call):
            lines.append(line)
            print("{layout}, {base}: {peak_gb:.3f} GB".format(**line), flush=True)
    print(
        f"\n{folder.name if s.checkpoint_dir else 'A random Llama'}, {machine_name(call['machine'])}, {call['commit']}"
    )
    print_table(COLUMNS, summarize(lines, ("layout", "base"), ("peak_gb", *GIGABYTES)))


def random_llama(folder: Path, layers: int) -> Path:
    """Write a Llama of random weights in bf16, a tensor at a time. Returns its folder."""
    import torch

    from bench.gpu.random_models import random_weight
    from bench.shapes import SHAPES
    from model import Transformer
    from shell.files import write_json
    from weights.checkpoint import write_shard
    from weights.families import config_from_json

    shape = SHAPES["Llama-2-7B"] | dict(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=16,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Transformer(config_from_json(shape)).named_parameters()}
    write_json(folder / "config.json", shape)
    layout = {name: (torch.bfloat16, each) for name, each in shapes.items()}
    write_shard(folder / "model.safetensors", layout, lambda name: random_weight(name, shapes[name], "cpu"))
    return folder


def measure(job: dict) -> dict:
    """Load on all devices of a layout at once: the largest figures among them."""
    count = LAYOUTS[job["layout"]][0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(load, [job | {"rank": rank, "count": count, "port": port} for rank in range(count)]))
    return {key: max(each[key] for each in found) for key in GIGABYTES} | {"devices": found}


def load(job: dict) -> dict:
    """Load on one device: what was read, is held, was taken at the peak, and the largest tensor of the model."""
    rank, count = job["rank"], job["count"]
    torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
    torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job["port"], "TORCHELASTIC_RUN_ID": "bench"}
    os.environ.update({name: str(value) for name, value in torchrun.items()} if count > 1 else {})

    import torch.distributed.fsdp  # which is no part of loading

    from training import build
    from training.memory import budget
    from training.metrics import peak_memory_since, weight_bytes
    from training.parallel import loading
    from training.parallel.layout import layout_of
    from training.parallel.ranks import local, make_ranks
    from training.settings import Settings as TrainingSettings
    from weights.stored import Weights

    _, parallel, shard = LAYOUTS[job["layout"]]
    base = {"quantize" if job["base"].startswith("bnb") else "precision": job["base"]}
    s = TrainingSettings(
        Path(job["checkpoint_dir"]), Path("no data"), devices=count, parallel=parallel, shard=shard, **base
    )
    fabric, layout, read = build.start_fabric(s), layout_of(s), []
    loading.read_box = counted(loading.read_box, read)
    Weights.read = counted(Weights.read, read)
    ranks = make_ranks(layout, s.checkpoint_dir, fabric.device)
    before = budget.memory_before(s, fabric.device)
    if layout.splits:
        model = loading.load_part(s, ranks, fabric.device, None)[0]
        held = sum(local(tensor).nbytes for tensor in (*model.parameters(), *model.buffers()))  # those in 4 bits too
    else:
        model = build.build_model(s, fabric.device, None)[0]
        held = weight_bytes(model)
    figures = {
        "peak_gb": peak_memory_since(before, fabric.device),
        "read_gb": sum(read),
        "held_gb": held,
        "largest_gb": max(2 * shape.numel() for shape in map(torch.Size, Weights(s.checkpoint_dir).shapes.values())),
    }
    return {key: value / 1e9 for key, value in figures.items()}


def counted(function: object, read: list[int]) -> object:
    """The same function, which also notes the bytes of each tensor that it returns."""

    def reading(*args):
        tensor = function(*args)
        read.append(tensor.nbytes)
        return tensor

    return reading


if __name__ == "__main__":
    cli.run(main, settings)
