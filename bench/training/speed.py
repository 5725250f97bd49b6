"""Training speed and memory against peers: the same model, samples, steps and adapter, in alternating runs.

    python bench/training/speed.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --data_dir prepared/gsm8k
    python bench/training/speed.py --report out/bench/training_speed.jsonl

Each run is a process of its own. Ours is `train_step` of finetune.py; the peers' are in bench/training/peers.py. A peer
that the running interpreter lacks gets a virtual environment, made on first use by pip (minutes; PIP_INDEX_URL and the
like choose where from). All sides get the same token ids in the same steps, AdamW with one constant learning rate, no
dropout, no weight decay, no clipping, no activation checkpointing. Peers cut a step into micro-batches of a number of
samples, unsorted, padded on the right; 1 means no padding.

Added to --out_file: a JSON line for every run. Printed: medians over the runs, and in a chart beside that file.

tokens/s      positions trained on, padding not counted: the median step after the first two
memory        GB, the peak of the whole process (on a GPU: of tensors)
first step    seconds from the start of the process to the end of its first optimiser step
limit         tokens/s x the FLOPs that a token needs at least, over what the machine can do: 4 (6 for all weights) for
              each weight that multiplies, those of the head only for the targets of the steps that count, because no
              side needs logits elsewhere
others        share of the CPUs that other processes took during the run: above a few percent, measure again
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(ROOT)

from bench.measuring import (
    BEFORE,
    OURS,
    Comparison,
    alternate,
    check_checkout,
    describe,
    device_name,
    draw_bars,
    environment,
    machine_name,
    print_table,
    run_before,
    run_job,
    summarize,
)
from bench.training import peers
from bench.training.peers import MODES, PEERS
from shell import cli
from shell.cli import UserError

TITLES = {OURS: OURS, BEFORE: BEFORE, **{name: peer.title for name, peer in PEERS.items()}}


@dataclass(kw_only=True)
class Settings(Comparison):
    """The command line.

    Args:
        data_dir: Folder made by prepare_data.py.
        mode: LoRA on q and v (rank 8) or on all projections (rank 16), QLoRA (NF4) likewise, or all weights.
        lora_targets: The projections that get an adapter, in place of the mode's; a family's own names for all sides.
        peers: What to measure beside ours; [] for nothing.
        before_dir: A checkout of an earlier commit of this project, to measure beside this one.
        peer_micro_batch: Samples in the peers' micro-batches; each of them is measured.
        micro_batch_tokens: Positions in our micro-batches; each of them is measured.
        planner: How our samples are cut into micro-batches (batching.py).
        compile: Let torch.compile fuse our blocks.
        global_batch_size: Samples in a step.
        mask_prompt: Loss on answers only; false for every token.
        steps: Optimiser steps of a run; the first two do not count.
        venvs_dir: Folder of the peers' virtual environments, their logs and converted models.
        report: Measure nothing; make table and chart from such a file again.
    """

    checkpoint_dir: Path | None = None
    data_dir: Path | None = None
    mode: Literal[tuple(MODES)] = "lora-qv"
    lora_targets: list[str] | None = None
    peers: list[Literal[tuple(PEERS)]] = field(default_factory=lambda: list(PEERS))
    before_dir: Path | None = None
    peer_micro_batch: list[int] = field(default_factory=lambda: [4])
    micro_batch_tokens: list[int] = field(default_factory=lambda: [2048])
    planner: Literal[cli.table_keys("batching.py", "PLANNERS")] = "packed"
    compile: bool = False
    global_batch_size: int = 16
    mask_prompt: bool = True
    steps: int = 6
    venvs_dir: Path = ROOT / "bench" / "venvs"
    out_file: Path = Path("out/bench/training_speed.jsonl")
    report: Path | None = None

    def __post_init__(self):
        if self.report:
            return
        if not self.checkpoint_dir or not self.data_dir:
            raise UserError("--checkpoint_dir and --data_dir are required (or --report)")
        check_checkout(self.before_dir)
        cli.check_numbers(self, "steps", above=peers.SKIP)
        cli.check_numbers(self, "runs", "global_batch_size", "micro_batch_tokens", above=0)
        if self.lora_targets and not MODES[self.mode].lora:
            raise UserError(f"--lora_targets: the mode {self.mode} trains all weights")
        if not self.micro_batch_tokens:
            raise UserError("--micro_batch_tokens must name at least one number")
        for size in self.peer_micro_batch:
            if size < 1 or self.global_batch_size % size:
                raise UserError(f"--peer_micro_batch {size}: must divide --global_batch_size {self.global_batch_size}")


if __name__ == "__main__":
    settings = cli.parse(Settings)


def main(s):
    """Measure and show the new call, or show all calls of the file --report."""
    if not s.report:
        compare(s)
    path = s.report or s.out_file
    found = calls(read_lines(path))
    for call in found if s.report else found[-1:]:
        show(call)
    chart = path.with_suffix(".png")
    draw_chart(found, chart)
    print(f"\nwritten to {chart}")


# ------------------------------------------------------------------------------------------------------ comparing


def compare(s):
    """Measure every side in every setting, in alternating runs, and add the lines to the file."""
    job = make_job(s)
    own = [OURS, BEFORE] if s.before_dir else [OURS]
    sides = [{"side": side, "micro_batch": size} for size in s.micro_batch_tokens for side in own]
    sides += [{"side": peer, "micro_batch": size} for peer in s.peers for size in s.peer_micro_batch]
    first_losses = {}

    def measure(side, micro_batch):
        return run_side(s, job, side, micro_batch)

    for line in alternate(sides, s.runs, measure, s, describe(s) | limit(s, job)):
        print(in_words(line), flush=True)
        if "unavailable" not in line:
            check(line, first_losses)


def make_job(s):
    """What all sides are to do: paths, the mode, and the samples of each step."""
    from batching import PLANNERS, Order

    samples = samples_of(s.data_dir, s.mask_prompt)
    if len(samples) < s.steps * s.global_batch_size:
        raise UserError(
            f"{s.data_dir} has {len(samples)} samples, --steps {s.steps} of {s.global_batch_size} need more"
        )
    planner = PLANNERS[s.planner]
    draw = planner.draw(Order(len(samples), 1, 0), planner.lengths(samples), s.global_batch_size)
    plans = {  # by tokens in a micro-batch; each samples the same for a step
        size: [planner.plan(samples, draw(place), size) for place in range(s.steps)] for size in s.micro_batch_tokens
    }
    steps, *others = [[sorted(sum(step, [])) for step in plan] for plan in plans.values()]
    assert all(other == steps for other in others), "the planner chooses other samples for other micro-batches"
    mode = MODES[s.mode]
    if s.lora_targets:
        mode = mode._replace(lora={**mode.lora, "targets": s.lora_targets})
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
        "steps": [[as_lists(samples, i) for i in step] for step in steps],
    }


def samples_of(data_dir, mask_prompt):
    """The training samples of a prepared folder, every token a target if prompts are not to be masked."""
    from batching import Samples, open_samples

    class Unmasked(Samples):
        """The same samples, with every token as a target."""

        target_counts = Samples.lengths

        def stored(self, i):
            tokens, is_target, cuts = super().stored(i)
            return tokens, is_target.new_ones(len(tokens)), cuts

    samples = open_samples(Path(data_dir), "train")
    return samples if mask_prompt else Unmasked(samples.shards)


def as_lists(samples, i):
    """A sample for the peers: its ids, and labels that are -100 where nothing is to be predicted."""
    tokens, wanted, _ = samples.stored(i)
    ids = tokens.tolist()
    labels = [token if target else -100 for token, target in zip(ids, wanted.tolist(), strict=True)]
    return {"ids": ids, "labels": [-100, *labels[1:]]}  # nothing comes before the first


def run_side(s, job, side, micro_batch):
    """One run of one side in a process of its own: what `peers.measure` returns. Raises Unavailable if it failed."""
    log = s.venvs_dir / f"{side}.log"
    job = job | {"side": side, "micro_batch": micro_batch}
    if side == OURS:
        return run_job(measure_ours, job, log)
    if side == BEFORE:
        return run_before(s.before_dir, measure_ours, job, log)
    python = environment(s.venvs_dir, side, PEERS[side].requirements, log)
    return run_job(peers.measure_peer, job, log, python, ours=False)


def measure_ours(job):
    """One run of our side, in its own process."""
    return peers.measure(job, train_ours)


def train_ours(job, clock):
    """Our side: `finetune.train_step` over the steps of the plan. Returns their losses."""
    from bench.training import ours
    from training import build

    settings = ours.training_settings(
        job,
        micro_batch_tokens=job["micro_batch"],
        planner=job["planner"],
        compile=job["compile"],
        max_grad_norm=0.0,
    )
    samples = samples_of(job["data_dir"], job["mask_prompt"])
    step = ours.step_function(ours.build_run(settings, build.start_fabric(settings), samples))
    return [step(number, part)["loss"] for number, part in enumerate(job["plans"][str(job["micro_batch"])])]


def check(line, first_losses):
    """Raise UserError if a run trained on nothing, or on other samples than the other sides.

    first_losses: the latest by side and setting. All must equal transformers + PEFT's, or without it the first one.
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


def limit(s, job):
    """What the machine's matrix products do in a second, and what a token takes of them, for the lines of the call."""
    from bench.machine import limits

    shapes = limits.matrix_shapes(s.checkpoint_dir)
    dtypes = ["fp32"] if s.dtype == "fp32" else ["fp32", "bf16"]
    rates = {dtype: limits.matrix_rate(shapes, 512, dtype, device_name()) for dtype in dtypes}
    return {"matrix_flops_per_second": rates, "flops_per_token": flops_per_token(s, job, shapes)}


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


# --------------------------------------------------------------------------------------------------- table and chart

MEDIANS = (
    "tokens_per_second", "peak_gb", "first_step_seconds", "first_loss", "last_loss", "grad_norm", "others_cpu"
)  # fmt: skip
COLUMNS = {
    "side": "{label}{mark}", "tokens/s": "{tokens_per_second:.0f}", "from": "{spread[0]:.0f}", "to": "{spread[1]:.0f}",
    "limit": "{limit:.1%}", "memory": "{peak_gb:.2f}", "first step": "{first_step_seconds:.1f} s",
    "first loss": "{first_loss:.4f}", "last": "{last_loss:.4f}", "grad norm": "{grad_norm:.3f}",
    "others": "{others_cpu:.1%}",
}  # fmt: skip


def read_lines(path):
    """The lines of a file that this script wrote."""
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


def table_rows(call):
    """A row for each side and setting of a call, the fastest first, with its share of the limit.

    "mark" is a star at the fastest setting of a side.
    """
    first, best = call[0], {}
    rate = max(first["matrix_flops_per_second"].values())  # of bf16 weights too: they can be multiplied in fp32
    rows = sorted(summarize(call, ("side", "micro_batch"), MEDIANS), key=lambda row: -row["tokens_per_second"])
    for row in rows:
        fastest = best.setdefault(row["side"], row)
        row |= {"label": label(row), "mark": " *" if row is fastest else ""}
        row["limit"] = row["tokens_per_second"] * first["flops_per_token"] / rate
    return rows


def label(row):
    """Side and setting of a row or a line."""
    unit = "tokens" if row["side"] in (OURS, BEFORE) else "samples" if row["micro_batch"] > 1 else "sample"
    return f"{TITLES[row['side']]}, {row['micro_batch']} {unit}"


def title(call):
    """What was measured, and where."""
    s = call[0]["settings"]
    masked = "answers" if s["mask_prompt"] else "all tokens"
    what = f"{s['mode']} {s['dtype']}, {s['checkpoint']} on {s['data']} ({masked})"
    return f"{what}, steps of {s['global_batch_size']}, {machine_name(call[0]['machine'])}"


def in_words(line):
    """A run as it ends."""
    if "unavailable" in line:
        return f"{label(line)}: not measured: {line['unavailable']}"
    return (
        f"{label(line)}: {line['tokens_per_second']:.0f} tokens/s, {line['peak_gb']:.2f} GB, loss "
        f"{line['first_loss']:.4f} to {line['last_loss']:.4f}"
    )


def show(call):
    """Print the table of a call, what could not be measured, and ours against the fastest peers."""
    rows = table_rows(call)
    print(f"\n{title(call)}, commit {call[0]['commit']}, {call[0]['call']}")
    print_table(COLUMNS, rows)
    print("* the best setting of each side")
    for line in call:
        if "unavailable" in line:
            print(in_words(line))
    print_ratios(rows)


def print_ratios(rows):
    """Ours against the fastest peer in each setting of the peers' micro-batches."""
    ours = next((row for row in rows if row["side"] == OURS), None)
    fastest = {row["micro_batch"]: row for row in reversed(rows) if row["side"] != OURS}  # rows begin with the fastest
    for peer in fastest.values() if ours else ():
        print(
            f"{ours['label']}, against {peer['label']}: {ours['tokens_per_second'] / peer['tokens_per_second']:.2f} "
            f"times the speed, {ours['peak_gb'] / peer['peak_gb']:.2f} times the memory"
        )


def draw_chart(calls, path):
    """Bars for speed and memory of every side and setting, a row of two panels for each call, as a PNG."""
    tables = [(title(call), rows[::-1]) for call in calls if (rows := table_rows(call))]
    if not tables:
        raise UserError(f"there is nothing to draw in {path}: no run was measured")
    draw_bars(tables, {"tokens_per_second": ("tokens/s", "{:,.0f}"), "peak_gb": ("peak memory, GB", "{:.2f}")}, path)


if __name__ == "__main__":
    cli.run(main, settings)
