"""Training speed and memory against peers: the same model, samples, steps and adapter, by turns.

    python bench/finetune.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --data_dir prepared/gsm8k --mode lora-qv
    python bench/finetune.py --report out/bench/finetune.jsonl

Each run is a process of its own. Ours is `train_step` of finetune.py; the peers' are in bench/peers.py. A peer that the
running interpreter lacks gets a virtual environment, made on first use by pip (minutes; PIP_INDEX_URL and its like
choose where from). All sides get the same token ids in the same steps, AdamW with one constant learning rate, no
dropout, no weight decay, no clipping, no recomputation. Peers cut a step into micro-batches of a number of samples,
unsorted, padded on the right; 1 means no padding.

Added to --out_file: a JSON line for every run. Printed: medians over the runs, and in a chart beside that file.

tokens/s      positions trained on, padding not counted: the median step after the first two
memory        GB, the most that the whole process took (on a GPU: that tensors took)
first step    seconds from the start of the process to the end of its first optimiser step
limit         tokens/s x the FLOPs that a token needs at least, over what the machine can do: 4 (6 for all weights) for
              each weight that multiplies, those of the head only for the targets of the steps that count, because no
              side needs logits elsewhere
others        share of the CPUs that other processes took meanwhile: above some percent, measure again
"""

import json
import statistics
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the project's folder, from wherever this is started

import peers
from lines import Unavailable, add_line, commit, environment, run_job
from shell import cli
from shell.cli import UserError

OURS = "onetune"
TITLES = {OURS: OURS, **{name: peer.title for name, peer in peers.PEERS.items()}}


@dataclass
class Settings:
    """The command line.

    Args:
        checkpoint_dir: Model folder.
        data_dir: Folder made by prepare_data.py.
        mode: LoRA on q and v (rank 8) or on all projections (rank 16), QLoRA (NF4) likewise, or all weights.
        dtype: Of the weights.
        peers: Whom to measure beside ours; [] for nobody.
        peer_micro_batch: Samples in the peers' micro-batches; each of them is measured.
        micro_batch_tokens: Positions in our micro-batches; each of them is measured.
        planner: How our samples are cut into micro-batches (batching.py).
        compile: Let torch.compile fuse our blocks.
        global_batch_size: Samples in a step.
        mask_prompt: Loss on answers only; false for every token.
        steps: Optimiser steps of a run; the first two do not count.
        runs: Runs of each side and setting; their median counts.
        venvs_dir: Folder of the peers' virtual environments, their logs and converted models.
        out_file: JSON lines are added to this file.
        report: Measure nothing; make table and chart from such a file again.
        job: Used by the script itself: our side of one run, as this file describes it.
    """

    checkpoint_dir: Path | None = None
    data_dir: Path | None = None
    mode: Literal["lora-qv", "lora-all", "qlora-qv", "qlora-all", "full"] = "lora-qv"
    dtype: Literal["bf16", "fp32"] = "bf16"
    peers: list[Literal["peft", "trl", "litgpt", "torchtune"]] = field(default_factory=lambda: list(peers.PEERS))
    peer_micro_batch: list[int] = field(default_factory=lambda: [4])
    micro_batch_tokens: list[int] = field(default_factory=lambda: [1024])
    planner: str = "packed"
    compile: bool = False
    global_batch_size: int = 16
    mask_prompt: bool = True
    steps: int = 6
    runs: int = 3
    venvs_dir: Path = ROOT / "bench" / "venvs"
    out_file: Path = Path("out/bench/finetune.jsonl")
    report: Path | None = None
    job: Path | None = None

    def __post_init__(self):
        if self.report or self.job:
            return
        if not self.checkpoint_dir or not self.data_dir:
            raise UserError("--checkpoint_dir and --data_dir are required (or --report)")
        cli.check_numbers(self, "steps", above=peers.SKIP)
        cli.check_numbers(self, "runs", "global_batch_size", "micro_batch_tokens", above=0)
        if not self.micro_batch_tokens:
            raise UserError("--micro_batch_tokens must name at least one number")
        for size in self.peer_micro_batch:
            if size < 1 or self.global_batch_size % size:
                raise UserError(f"--peer_micro_batch {size}: must divide --global_batch_size {self.global_batch_size}")


if __name__ == "__main__":
    settings = cli.parse(Settings)


def main(s):
    if s.job:
        run_ours(s.job)
        return
    path = s.report or s.out_file
    if not s.report:
        compare(s)
    found = calls(read_lines(path))
    for call in found if s.report else found[-1:]:
        print_table(call)
    chart = path.with_suffix(".png")
    draw_chart(found, chart)
    print(f"\nwritten to {chart}")


# ------------------------------------------------------------------------------------------------------ comparing


def compare(s):
    """Measure every side in every setting, by turns, and add the lines to the file."""
    job = make_job(s)
    call = describe_call(s, job)
    sides = [(OURS, size) for size in s.micro_batch_tokens]
    sides += [(peer, size) for peer in s.peers for size in s.peer_micro_batch]
    first_losses = {}
    for run in range(s.runs):
        for side, size in list(sides):
            line = {"side": side, "micro_batch": size, "run": run}
            try:
                line |= run_side(s, job, side, size)
            except Unavailable as error:
                if side == OURS:
                    raise UserError(f"{OURS}: {error}") from None
                line["unavailable"] = str(error)
                sides.remove((side, size))
            add_line(s.out_file, line | call)
            print(in_words(line), flush=True)
            if "unavailable" not in line:
                check(line, first_losses)


def make_job(s):
    """What all sides are to do: paths, the mode, and the samples of each step."""
    from batching import PLANNERS

    if s.planner not in PLANNERS:
        raise UserError(f"--planner {s.planner}: expected one of {', '.join(PLANNERS)}")
    samples = open_samples(s.data_dir, s.mask_prompt)
    if len(samples) < s.steps * s.global_batch_size:
        raise UserError(
            f"{s.data_dir} has {len(samples)} samples, --steps {s.steps} of {s.global_batch_size} need more"
        )
    arguments = (samples.lengths, samples.target_counts, s.global_batch_size)
    plans = {  # by tokens in a micro-batch; each draws the same samples for a step
        size: PLANNERS[s.planner].plan(*arguments, size, seed=1, epoch=0)[: s.steps] for size in s.micro_batch_tokens
    }
    drawn, *others = [[sorted(sum(step, [])) for step in plan] for plan in plans.values()]
    assert all(other == drawn for other in others), "the planner draws other samples for other micro-batches"
    mode = peers.MODES[s.mode]
    return {
        "checkpoint_dir": str(s.checkpoint_dir.resolve()),
        "data_dir": str(s.data_dir.resolve()),
        "cache_dir": str(s.venvs_dir.resolve()),
        "mask_prompt": s.mask_prompt,
        "planner": s.planner,
        "compile": s.compile,
        "dtype": s.dtype,
        **mode._asdict(),
        "plans": plans,
        "steps": [[as_lists(samples, i) for i in step] for step in drawn],
    }


def open_samples(data_dir, mask_prompt):
    """The training samples of a prepared folder, every token a target if prompts are not to be masked."""
    import torch

    from batching import Samples

    samples = Samples(Path(data_dir) / "train.safetensors")
    if not mask_prompt:
        samples.is_target = torch.ones_like(samples.is_target)
        samples.target_counts = samples.lengths.int()
    return samples


def as_lists(samples, i):
    """A sample for the peers: its ids, and labels that are -100 where nothing is to be predicted."""
    start, end = samples.offsets[i].item(), samples.offsets[i + 1].item()
    ids, wanted = samples.tokens[start:end].tolist(), samples.is_target[start:end].tolist()
    labels = [token if target else -100 for token, target in zip(ids, wanted, strict=True)]
    return {"ids": ids, "labels": [-100, *labels[1:]]}  # nothing comes before the first


def run_side(s, job, side, size):
    """One run of one side in a process of its own: what `peers.measure` returns. Raises Unavailable if it failed."""
    log = s.venvs_dir / f"{side}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--job"]
    if side != OURS:
        command = [environment(s.venvs_dir, side, peers.PEERS[side].requirements, log), peers.__file__]
    return run_job(command, job | {"side": side, "micro_batch": size}, log)


def check(line, first_losses):
    """Raise UserError if a run trained on nothing, or on something else than the other sides.

    first_losses: the latest by side and setting. The one to equal is transformers + PEFT's, else the first of all.
    """
    name = f"{TITLES[line['side']]}, micro-batch {line['micro_batch']}"
    if not line["grad_norm"] > 0:
        raise UserError(f"{name}: the gradient's norm is {line['grad_norm']}, so nothing was measured")
    first_losses[line["side"], line["micro_batch"]] = line["first_loss"]
    reference = next((side for side in first_losses if side[0] == "peft"), next(iter(first_losses)))
    for side, loss in first_losses.items():
        if not abs(loss - first_losses[reference]) <= 0.01 * first_losses[reference]:
            raise UserError(
                f"{TITLES[side[0]]}, micro-batch {side[1]}: the first loss is {loss:.4f}, {TITLES[reference[0]]}'s "
                f"{first_losses[reference]:.4f}: they do not do the same"
            )


# -------------------------------------------------------------------------------------------------------- our side


def run_ours(path):
    job = json.loads(path.read_text())
    Path(job["result"]).write_text(json.dumps(peers.measure(job, train_ours)))


def train_ours(job, clock):
    """The runner of our side: `finetune.train_step` over the steps of the plan. Returns their losses."""
    import finetune

    lora = job["lora"]
    options = {"lora_r": lora["r"], "lora_alpha": lora["alpha"], "lora_targets": lora["targets"]} if lora else {}
    settings = finetune.Settings(
        Path(job["checkpoint_dir"]),
        Path(job["data_dir"]),
        method="lora" if lora else "full",
        quantize="bnb.nf4" if job["quantize"] else None,
        precision={"bf16": "bf16-true", "fp32": "32-true"}[job["dtype"]],
        learning_rate=job["learning_rate"],
        micro_batch_tokens=job["micro_batch"],
        planner=job["planner"],
        max_grad_norm=0.0,
        **options,
    )
    fabric = finetune.start_fabric(settings)
    model, _ = finetune.build_model(settings, fabric.device, newest=None)
    optimizer = fabric.setup_optimizers(finetune.build_optimizer(settings, model))
    if job["compile"]:
        finetune.compile_blocks(model, fabric.device)
    samples = open_samples(job["data_dir"], job["mask_prompt"])
    model.train()
    return [
        finetune.train_step(
            fabric, settings, model, optimizer, samples, micro_batches, step, settings.learning_rate
        )["loss"]
        for step, micro_batches in enumerate(job["plans"][str(job["micro_batch"])])
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------- what is kept


def describe_call(s, job):
    """What all lines of this call share: when, on what, with which settings, and what the machine can do at most."""
    import torch

    import limits

    shapes = limits.matrix_shapes(s.checkpoint_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = ["fp32"] if s.dtype == "fp32" else ["fp32", "bf16"]
    rates = {dtype: limits.matrix_rate(shapes, 512, dtype, device) for dtype in dtypes}
    kept = ("mode", "dtype", "planner", "compile", "global_batch_size", "mask_prompt", "steps", "runs")
    return {
        "call": datetime.now().isoformat(timespec="seconds"),
        "settings": {
            "checkpoint": s.checkpoint_dir.name, "data": s.data_dir.name, **{key: asdict(s)[key] for key in kept},
        },
        "machine": limits.machine(),
        "matrix_flops_per_second": rates,
        "flops_per_token": flops_per_token(s, job, shapes),
        "commit": commit(),
    }  # fmt: skip


def flops_per_token(s, job, shapes):
    """The least that a token of the steps that count takes: the head's product for their targets alone.

    shapes: how many weights (out, in) the model multiplies by, {(out, in): count}.
    """
    from weights.checkpoint import read_config

    samples = [sample for step in job["steps"][peers.SKIP :] for sample in step]
    tokens = sum(len(sample["ids"]) - 1 for sample in samples)
    targets = sum(label != -100 for sample in samples for label in sample["labels"])
    config = read_config(s.checkpoint_dir)
    head = config.vocab_size * config.hidden_size
    weights = sum(count * rows * columns for (rows, columns), count in shapes.items())
    return (6 if s.mode == "full" else 4) * (weights - head + head * targets / tokens)


def read_lines(path):
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not lines or not all("call" in line for line in lines):
        raise UserError(f"{path} holds no results of this script")
    return lines


def calls(lines):
    """The lines of each call of this script, oldest first."""
    found = {}
    for line in lines:
        found.setdefault(line["call"], []).append(line)
    return list(found.values())


# --------------------------------------------------------------------------------------------------- table and chart

MEDIANS = (
    "tokens_per_second", "peak_gb", "first_step_seconds", "first_loss", "last_loss", "grad_norm", "others_cpu"
)  # fmt: skip


def summarize(call):
    """A dict for each side and setting of a call: the medians over its runs, their spread, the share of the limit."""
    found = {}
    for line in call:
        if "unavailable" not in line:
            found.setdefault((line["side"], line["micro_batch"]), []).append(line)
    rows = []
    for (side, size), runs in found.items():
        row = {key: statistics.median(run[key] for run in runs) for key in MEDIANS}
        speeds = [run["tokens_per_second"] for run in runs]
        row |= {"side": side, "micro_batch": size, "runs": len(runs), "spread": (min(speeds), max(speeds))}
        limit = max(runs[0]["matrix_flops_per_second"].values())  # of bf16 weights too: they can be multiplied in fp32
        row["limit"] = row["tokens_per_second"] * runs[0]["flops_per_token"] / limit
        rows.append(row)
    for row in rows:
        row["best"] = row["tokens_per_second"] == max(
            other["tokens_per_second"] for other in rows if other["side"] == row["side"]
        )
    return rows


def label(row):
    unit = "tokens" if row["side"] == OURS else "samples" if row["micro_batch"] > 1 else "sample"
    return f"{TITLES[row['side']]}, {row['micro_batch']} {unit}"


def title(call):
    s, machine = call[0]["settings"], call[0]["machine"]
    where = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    masked = "answers" if s["mask_prompt"] else "all tokens"
    what = f"{s['mode']} {s['dtype']}, {s['checkpoint']} on {s['data']} ({masked})"
    return f"{what}, steps of {s['global_batch_size']}, {where}"


def in_words(line):
    """A run as it ends."""
    if "unavailable" in line:
        return f"{label(line)}: not measured: {line['unavailable']}"
    return (
        f"{label(line)}: {line['tokens_per_second']:.0f} tokens/s, {line['peak_gb']:.2f} GB, loss "
        f"{line['first_loss']:.4f} to {line['last_loss']:.4f}"
    )


def print_table(call):
    rows = summarize(call)
    print(f"\n{title(call)}, commit {call[0]['commit']}, {call[0]['call']}")
    print(
        f"{'':33} {'tokens/s':>9} {'from':>7} {'to':>7} {'limit':>6} {'memory':>7} {'first step':>10} "
        f"{'first loss':>10} {'last':>7} {'grad norm':>9} {'others':>6}"
    )
    for row in sorted(rows, key=lambda row: -row["tokens_per_second"]):
        low, high = row["spread"]
        print(
            f"{'*' if row['best'] else ' '} {label(row):31} {row['tokens_per_second']:9.0f} {low:7.0f} {high:7.0f} "
            f"{row['limit']:6.1%} {row['peak_gb']:7.2f} {row['first_step_seconds']:8.1f} s {row['first_loss']:10.4f} "
            f"{row['last_loss']:7.4f} {row['grad_norm']:9.3f} {row['others_cpu']:6.1%}"
        )
    for line in call:
        if "unavailable" in line:
            print(f"  {in_words(line)}")
    print_ratios(rows)


def print_ratios(rows):
    """Ours against the fastest peer, and against the fastest one in each setting of the peers' micro-batches."""
    ours = max((row for row in rows if row["side"] == OURS), key=lambda row: row["tokens_per_second"], default=None)
    theirs = [row for row in rows if row["side"] != OURS]
    if not ours or not theirs:
        return
    print(f"* the best setting of each side. {label(ours)}, against the fastest peer:")
    for size in dict.fromkeys(row["micro_batch"] for row in theirs):
        peer = max((row for row in theirs if row["micro_batch"] == size), key=lambda row: row["tokens_per_second"])
        print(
            f"  {label(peer):31} {ours['tokens_per_second'] / peer['tokens_per_second']:5.2f} times the speed, "
            f"{ours['peak_gb'] / peer['peak_gb']:5.2f} times the memory"
        )


def draw_chart(calls, path):
    """Bars for speed and memory of every side and setting, a row of two panels for each call, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = [(title(call), summarize(call)) for call in calls]
    tables = [(name, sorted(rows, key=lambda row: row["tokens_per_second"])) for name, rows in tables if rows]
    if not tables:
        raise UserError(f"there is nothing to draw in {path}: no run was measured")
    heights = [len(rows) + 2 for _, rows in tables]  # in bars; 2 for title and axis
    figure, axes = plt.subplots(
        len(tables), 2, figsize=(12, 0.35 * sum(heights) + 0.6), layout="constrained", squeeze=False,
        height_ratios=heights,
    )  # fmt: skip
    keys, units = ("tokens_per_second", "peak_gb"), ("tokens/s", "peak memory, GB")
    for (name, rows), panels in zip(tables, axes, strict=True):
        colours = ["tab:orange" if row["side"] == OURS else "tab:blue" for row in rows]
        for panel, key, unit in zip(panels, keys, units, strict=True):
            bars = panel.barh(range(len(rows)), [row[key] for row in rows], color=colours)
            panel.bar_label(bars, fmt="{:,.0f}" if key == "tokens_per_second" else "{:.2f}", padding=3)
            panel.set(xlabel=unit, xmargin=0.12)
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_yticks(range(len(rows)), [label(row) for row in rows])
        panels[0].set_title(name, loc="left", fontsize=10)
        panels[1].set_yticks([])
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(main, settings)
