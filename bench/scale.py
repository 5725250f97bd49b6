"""How training scales from one process to several on a CPU, beside transformers + PEFT under accelerate.

    python bench/scale.py
    python bench/scale.py --report out/bench/scale.jsonl

A random Llama in fp32 trains on random samples of one length: the same steps with 1, 2 and 4 processes of one thread
each, so every process has fewer samples the more there are (strong scaling). Ours is `train_step` of finetune.py with
its devices along data, along data with --shard, along tensor, and along pipeline; the peers' are in scaling/sides.py:
accelerate with DistributedDataParallel, and with FSDP2. All cut a step into the same micro-batches, clip at a norm of
1.0, and have the same AdamW, no dropout and no activation checkpointing. The script stops if a gradient is zero, or if
the loss of a first step is not that of the others to 1e-4.

Added to --out_file: a JSON line for every run; the sides take turns. Printed: medians over the runs.

efficiency    t1 / (n tn), tn being the time of the median step of n processes of that side and t1 that of one: the
              median over the rounds, in each of which both were measured. Of c cores more than c / n cannot be had
sent          MB that the first process sends in a step: bytes handed to torch.distributed, as counted by
              scaling/messages.py, by the convention of rings (training/memory/layouts.py). gloo may send more
calculated    the same by training/memory/layouts.py, as --plan calculates it: without losses and norms
memory        GB, the peak of the first process
others        share of the CPUs that other processes took: above a few percent, measure again
"""

import functools
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(ROOT)

from bench.measuring import OURS, alternate, describe, environment, machine_name, print_table, run_job
from bench.scaling import sides
from bench.shapes import SHAPES as PUBLISHED
from bench.training.peers import MODES, PEERS
from shell import cli
from shell.cli import UserError

SHAPES = {  # 28 million parameters, and next to none
    "28M": PUBLISHED["Llama-2-7B"] | dict(
        vocab_size=4096, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4,
    ),
    "tiny": PUBLISHED["Llama-2-7B"] | dict(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
    ),
}  # fmt: skip
PEER = "peft"
# Our layouts, and the peer's that does the same with its devices: what no peer here has, beside the one for data.
LAYOUTS = {"data": "DDP", "shard": "FSDP2", "tensor": "DDP", "pipeline": "DDP"}
TOLERANCE = 1e-4  # of the losses of the first step


@dataclass(kw_only=True)
class Settings:
    """The command line.

    Args:
        mode: What is trained, as in bench/training/speed.py: "lora-all" (rank 16) or "full".
        shape: The random model.
        processes: How many, besides one.
        samples: In a step, of all processes.
        micro_batch: Samples in a micro-batch.
        length: Positions of a sample.
        steps: Optimiser steps of a run; the first two do not count.
        runs: Runs of each side; the sides alternate, and the medians count.
        venvs_dir: Folder of the peers' virtual environment and of the logs.
        out_file: A JSON line for every run is added to this file.
        report: Measure nothing; print the tables of such a file again.
    """

    mode: Literal["lora-all", "full"] = "lora-all"
    shape: Literal[tuple(SHAPES)] = "28M"
    processes: list[int] = field(default_factory=lambda: [2, 4])
    samples: int = 8
    micro_batch: int = 2
    length: int = 128
    steps: int = 5
    runs: int = 3
    venvs_dir: Path = ROOT / "bench" / "venvs"
    out_file: Path = Path("out/bench/scale.jsonl")
    report: Path | None = None

    def __post_init__(self):
        cli.check_numbers(self, "processes", least=2)
        cli.check_numbers(self, "samples", "micro_batch", "length", "runs", above=0)
        cli.check_numbers(self, "steps", above=sides.SKIP)
        heads, layers = (SHAPES[self.shape][name] for name in ("num_key_value_heads", "num_hidden_layers"))
        for count in self.processes:
            if self.samples % (count * self.micro_batch):
                raise UserError(
                    f"--processes {count}: --samples {self.samples} must be a multiple of {count} micro-batches of "
                    f"--micro_batch {self.micro_batch}"
                )
            if heads % count:
                raise UserError(f"--processes {count}: the {heads} heads of keys and values cannot be divided by it")
            if layers < count:
                raise UserError(f"--processes {count}: {layers} layers cannot be divided among so many")


if __name__ == "__main__":
    settings = cli.parse(Settings)


def main(s):
    """Measure and show the new call, or show all calls of the file --report."""
    if not s.report:
        compare(s)
    for call in calls(s.report or s.out_file)[None if s.report else -1 :]:
        show(call)


# ---------------------------------------------------------------------------------------------------------- measuring


def compare(s):
    """Measure every side with every number of processes, in alternating runs, and add the lines to the file."""
    sides_ = [{"side": side, "layout": "alone", "processes": 1} for side in (OURS, PEER)]
    for count in s.processes:
        sides_ += [{"side": OURS, "layout": layout, "processes": count} for layout in LAYOUTS]
        sides_ += [{"side": PEER, "layout": layout, "processes": count} for layout in ("DDP", "FSDP2")]
    first_losses = {}
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(s, Path(folder))

        def measure(side, layout, processes):
            return run_side(s, job | {"side": side, "layout": layout, "processes": processes})

        for line in alternate(sides_, s.runs, measure, s, describe(s)):
            print(in_words(line), flush=True)
            if "unavailable" not in line:
                check(line, first_losses)


def make_job(s, folder):
    """What all sides are to do: a model folder and prepared data, written into `folder`, and the samples of steps."""
    import torch

    from bench.random_model import write_random_model
    from preparation.record_store import SampleWriter
    from shell.files import write_json

    empty = folder / "no_tokenizer"
    empty.mkdir()
    write_random_model(SHAPES[s.shape], empty, folder / "model")
    generator = torch.Generator().manual_seed(1)
    shape = (s.steps, s.samples, s.length + 1)
    ids = torch.randint(SHAPES[s.shape]["vocab_size"], shape, generator=generator).tolist()
    writer = SampleWriter()
    for sample in sum(ids, []):
        writer.add(sample, [True] * len(sample), source=0)
    data = folder / "data"
    data.mkdir()
    write_json(data / "data.json", {"kind": "samples", "train": writer.save(data, "train")})
    return {
        "checkpoint_dir": str(folder / "model"),
        "data_dir": str(data),
        "dtype": "fp32",
        "length": s.length,
        "micro_batch": s.micro_batch,
        **MODES[s.mode]._asdict(),
        "steps": [[{"ids": sample, "labels": [-100, *sample[1:]]} for sample in step] for step in ids],
    }


def run_side(s, job):
    """One run of one side in processes of its own: what `sides.measure` returns. Raises Unavailable if it failed."""
    log = s.venvs_dir / f"scale-{job['side']}-{job['layout']}-{job['processes']}.log"
    if job["side"] == OURS:
        sizes = s.samples, s.micro_batch, s.length
        found = run_job(sides.measure_ours, job, log, processes=job["processes"])
        return found | {"calculated_mb": calculated(s.shape, s.mode, job["layout"], job["processes"], *sizes) / 1e6}
    python = environment(s.venvs_dir, PEER, PEERS[PEER].requirements, log)
    return run_job(sides.measure_peer, job, log, python, ours=False, processes=job["processes"])


@functools.cache
def calculated(shape, mode, how, count, samples, micro_batch, length):
    """The bytes that the first process of ours sends in a step, by the plan. how: the layout of so many processes."""
    import torch

    from lora import AdapterConfig
    from training.memory import layouts, plan
    from training.parallel.layout import Layout
    from weights.families import config_from_json

    layout = Layout(**{how: count}) if how in ("tensor", "pipeline") else Layout(data=count, shard=how == "shard")
    lora = MODES[mode].lora
    adapter = AdapterConfig(r=lora["r"], alpha=lora["alpha"], targets=tuple(lora["targets"])) if lora else None
    job = plan.Job(config_from_json(SHAPES[shape]), "cpu", torch.float32, adapter=adapter)
    passes = samples // micro_batch // layout.data
    found = layouts.messages(job, layout, max(passes, layout.pipeline), passes * micro_batch * length)
    return sum(message.sent() for message in found)


def check(line, first_losses):
    """Raise UserError if a run trained on nothing, or on something else than the others. first_losses: by side."""
    if not line["grad_norm"] > 0:
        raise UserError(f"{label(line)}: the gradient's norm is {line['grad_norm']}, so nothing was measured")
    first_losses[label(line)] = line["first_loss"]
    reference, loss = next(iter(first_losses.items()))
    if not abs(line["first_loss"] - loss) <= TOLERANCE * loss:
        raise UserError(
            f"{label(line)}: the first loss is {line['first_loss']:.6f}, {reference}'s {loss:.6f}: they do not do the "
            "same"
        )


# ------------------------------------------------------------------------------------------------------------- tables


COLUMNS = {
    "side": "{label}", "s a step": "{seconds:.3f}", "from": "{spread[0]:.3f}", "to": "{spread[1]:.3f}",
    "efficiency": "{efficiency:.0%}", "lowest": "{lowest:.0%}", "highest": "{highest:.0%}", "MB sent": "{sent_mb:.3f}",
    "calculated": "{calculated}", "memory": "{peak_gb:.2f}", "others": "{others_cpu:.0%}",
}  # fmt: skip


def label(line):
    """The side of a line, in words."""
    name = "onetune" if line["side"] == OURS else PEERS[PEER].title
    flags = {"alone": "", "data": "", "shard": " --shard"}
    flags |= {layout: f" --parallel {layout}" for layout in ("tensor", "pipeline")}
    return f"{name}{flags.get(line['layout'], ', ' + line['layout'])}, {line['processes']}"


def in_words(line):
    """A run as it ends."""
    if "unavailable" in line:
        return f"{label(line)}: not measured: {line['unavailable']}"
    return f"{label(line)}: {line['seconds']:.3f} s a step, loss {line['first_loss']:.6f} to {line['last_loss']:.4f}"


def calls(path):
    """The lines of each call of this script in a file, oldest first."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found = {}
        for line in lines:
            found.setdefault(line["call"], []).append(line)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read as results of this script: {error}") from None
    if not found:
        raise UserError(f"{path} holds no results of this script")
    return list(found.values())


def rows_of(call):
    """A row for each side of a call: medians, with its efficiency in each round."""
    measured, grouped = [line for line in call if "unavailable" not in line], {}
    alone = {(line["side"], line["run"]): line["seconds"] for line in measured if line["processes"] == 1}
    for line in measured:
        grouped.setdefault(label(line), []).append(line)
    return [row_of(lines, alone) for lines in grouped.values()]


def row_of(lines, alone):
    """The row of the runs of a side. alone: the seconds of one process by side and round."""
    first, seconds = lines[0], [line["seconds"] for line in lines]
    rounds = [line for line in lines if (line["side"], line["run"]) in alone]
    shares = [alone[line["side"], line["run"]] / (line["processes"] * line["seconds"]) for line in rounds]
    return {
        "label": label(first), **{key: first[key] for key in ("side", "layout", "processes")},
        "seconds": statistics.median(seconds), "spread": (min(seconds), max(seconds)),
        "efficiency": statistics.median(shares), "lowest": min(shares), "highest": max(shares),
        "sent_mb": sent_bytes(first["messages"]) / 1e6,
        "calculated": f"{first['calculated_mb']:.3f}" if "calculated_mb" in first else "",
        **{key: statistics.median(line[key] for line in lines) for key in ("peak_gb", "others_cpu")},
    }  # fmt: skip


def sent_bytes(messages):
    """The bytes that a process sends of these messages: in rings, and all of those that go from one to all."""
    from training.memory.layouts import RING, sent_in_ring

    return sum(
        m["times"] * (sent_in_ring(m["kind"], m["count"], m["nbytes"]) if m["kind"] in RING else m["nbytes"])
        for m in messages
    )


def show(call):
    """Print the table of a call, what could not be measured, the bound of the cores, and ours against the peers."""
    s, cores, rows = call[0]["settings"], call[0]["machine"]["cores"], rows_of(call)
    print(
        f"\n{s['mode']} in fp32, random Llama of {s['shape']}, steps of {s['samples']} samples of {s['length']} "
        f"positions, {machine_name(call[0]['machine'])}, commit {call[0]['commit']}, {call[0]['call']}"
    )
    print_table(COLUMNS, rows)
    for line in call:
        if "unavailable" in line:
            print(in_words(line))
    for count in s["processes"]:
        print(f"{count} processes of one thread on {cores} cores: {min(1, cores / count):.0%} efficiency at most")
    print_ratios(rows)


def print_ratios(rows):
    """Efficiency and speed of ours against those of the peer that does the same."""
    found = {(row["side"], row["layout"], row["processes"]): row for row in rows}
    for (side, layout, count), row in found.items():
        peer = found.get((PEER, LAYOUTS.get(layout), count))
        if side == OURS and peer:
            print(
                f"{row['label']} processes, against {peer['label']}: {row['efficiency'] / peer['efficiency']:.2f} "
                f"times the efficiency, {peer['seconds'] / row['seconds']:.2f} times the speed"
            )


if __name__ == "__main__":
    cli.run(main, settings)
