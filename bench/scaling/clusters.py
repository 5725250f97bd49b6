"""How training would scale over 8 to 512 H100s: calculated, and nothing of it was run.

    python bench/scaling/clusters.py

The same step of --samples samples is shared out among more and more devices, a sample in each micro-batch, all blocks
recomputed. Messages, FLOPs and memory are those of --plan (training/memory/); tests hold the bytes of messages to what
is counted. The rest is published or assumed: devices compute at a share --reached of the data sheet's bf16 FLOP/s.
Eight of them are linked by NVLink, at 450 GB/s in each direction, and each has a network card of 50 GB/s (InfiniBand
NDR, 400 Gb/s). Rings leave a node through all eight cards, as NCCL lays them, so where there are several nodes a device
sends at 400 GB/s at most. A message takes a time to set off and one for each hop of its ring, as NCCL's own estimate
has them (`PROTOCOLS`). No link is shared with others, no device waits for a slower one, reading samples takes no time,
and nor does dequantising.

efficiency    of a step: computing over computing and sending. Without --shard gradients are added up after the last
              backward pass, so nothing is hidden. With --shard blocks are fetched while others compute: two figures, as
              if nothing were hidden, and as if all were that can be
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.measuring import add_line, describe, print_table
from bench.shapes import SHAPES
from shell import cli
from shell.cli import UserError

NODE = 8  # devices
NVLINK, NETWORK = 450e9, 50e9  # bytes a second of a device in each direction: NVIDIA's data sheets of H100 SXM, NDR


class Protocol(NamedTuple):
    """Seconds to set off, for a hop within a node and for one between nodes; the share of a link that carries data."""

    start: float
    inside: float
    between: float
    share: float


# NCCL 2.28, src/graph/tuning.cc: of rings, in its protocols for large and middling messages. It takes the faster one.
PROTOCOLS = (Protocol(8.4e-6, 3.4e-6, 14e-6, 1.0), Protocol(14e-6, 1.9e-6, 4e-6, 0.92))


class Case(NamedTuple):
    """A model, --method, --quantize and --shard."""

    model: str
    method: str = "lora"
    quantize: str | None = None
    shard: bool = False


CASES = {
    "Llama-2-7B, LoRA": Case("Llama-2-7B"),
    "Llama-2-7B, LoRA, `--quantize bnb.nf4`": Case("Llama-2-7B", quantize="bnb.nf4"),
    "Llama-2-7B, `--method full --shard`": Case("Llama-2-7B", "full", shard=True),
    "Llama-2-70B, `--method full --shard`": Case("Llama-2-70B", "full", shard=True),
}


@dataclass(kw_only=True)
class Settings:
    """The command line.

    Args:
        devices: How many H100s: whole nodes of 8.
        samples: In a step, of all devices.
        length: Positions of a sample.
        reached: The share of an H100's 989 TFLOP/s that training reaches.
        out_file: A JSON line for every case and number of devices is added to this file.
    """

    devices: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128, 256, 512])
    samples: int = 512
    length: int = 4096
    reached: float = 0.5
    out_file: Path = Path("out/bench/clusters.jsonl")

    def __post_init__(self):
        cli.check_numbers(self, "devices", "samples", "length", "reached", above=0)
        cli.check_numbers(self, "reached", most=1)
        for count in self.devices:
            if count % NODE or self.samples % count:
                raise UserError(
                    f"--devices {count}: must be a multiple of {NODE} that divides --samples {self.samples}"
                )


if __name__ == "__main__":
    settings = cli.parse(Settings)


def main(s):
    """Calculate all cases, print the table and add the lines to the file."""
    from tqdm import tqdm

    call, table = describe(s), []
    for name, case in tqdm(CASES.items(), unit="case", leave=False):
        lines = [line_of(case, count, s) for count in s.devices]
        for line in lines:
            add_line(s.out_file, {**call, "calculated": True, "case": name, **line})
        table.append({"case": name} | {f"on_{line['devices']}": cell(line) for line in lines})
    print("Calculated: nothing of this was run.\n")
    print_table({"H100s": "{case}"} | {str(count): f"{{on_{count}}}" for count in s.devices}, table)


def line_of(case, count, s):
    """What becomes of the step on so many devices: bytes, seconds and efficiency."""
    import torch

    import lora
    from bench.roofline import CARDS
    from training.from_settings import default_targets
    from training.memory import layouts, plan
    from training.parallel.layout import Layout
    from weights.families import config_from_json

    config, passes = config_from_json(SHAPES[case.model]), s.samples // count
    adapter = lora.AdapterConfig(targets=tuple(default_targets(config))) if case.method == "lora" else None
    job = plan.Job(
        config, "meta", torch.bfloat16, quantize=case.quantize, adapter=adapter, recompute=1.0,
        gradients="kept" if passes > 1 or case.shard else "new", shares=count if case.shard else 1,
    )  # fmt: skip
    predictor, shape = plan.Predictor(job), plan.packed_shape(s.length, s.length, s.length)
    messages = layouts.messages(job, Layout(data=count, shard=case.shard), passes, passes * s.length)
    computing = passes * predictor.flops(shape) / (s.reached * CARDS["H100"].tflops * 1e12)
    sending = sum(seconds(message) for message in messages)
    peak = predictor.peak(shape) + plan.CUDA_OVERHEAD
    return {
        "devices": count,
        "peak_gb": peak / 1e9,
        "fits": peak <= CARDS["H100"].memory * 1e9,
        "sent_gb": sum(message.sent() for message in messages) / 1e9,
        "messages": sum(message.times for message in messages),
        "computing_seconds": computing,
        "sending_seconds": sending,
        "efficiency": computing / (computing + sending),
        "efficiency_all_hidden": computing / max(computing, sending) if case.shard else None,
    }


def seconds(message):
    """What all the times of a `layouts.Message` take, one after the other."""
    from training.memory.layouts import RING, sent_in_ring

    nodes = math.ceil(message.count / NODE)
    link = NVLINK if nodes == 1 else min(NVLINK, NODE * NETWORK)
    rounds, sent = RING[message.kind], sent_in_ring(message.kind, message.count, message.nbytes)
    between = rounds * (nodes - 1)
    inside = rounds * (message.count - 1) - between
    each = (p.start + inside * p.inside + between * p.between + sent / (link * p.share) for p in PROTOCOLS)
    return message.times * min(each)


def cell(line):
    """The efficiency of a line, in the table."""
    if not line["fits"]:
        return f"no: {line['peak_gb']:.0f} GB"
    hidden = line["efficiency_all_hidden"]
    return f"{line['efficiency']:.0%}" + (f" to {hidden:.0%}" if hidden else "")


if __name__ == "__main__":
    cli.run(main, settings)
