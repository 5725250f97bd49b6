"""Fine-tune a model on prepared data: LoRA, QLoRA or all weights, on one device or several.

    python finetune.py --checkpoint_dir checkpoints/ORG/MODEL --data_dir prepared/my --quantize bnb.nf4

One optimiser step is `train_step`; the model is in model.py, and batching.py decides which samples make up a step. The
flags are in training/settings.py; training/__init__.py is the map of everything around the loop.

A run leaves in its folder: `config.yaml` and `source/` (what ran), `metrics.csv` and `loss.png`, `step-NNNNNN/`
(checkpoints), `final/` (the adapter in PEFT's format, or the model). It can be killed at any moment: --resume continues
from the newest checkpoint and ends with the same bytes.
"""

import math
import sys
import time
from pathlib import Path

from shell import cli
from training.settings import Settings

if __name__ == "__main__":
    settings = cli.parse(Settings)

from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from batching import IGNORE, PLANNERS, Samples, in_order
from experts import balance_loss
from ops.devices import read_numbers, to_device
from training import build, nonfinite, run_folder
from training.build import Data, Run
from training.memory import budget
from training.memory.dry_run import memory_dry_run
from training.metrics import (
    FirstStepFlops,
    Metrics,
    add_by_source,
    losses_by_source,
    parameter_counts,
    peak_memory,
    peak_memory_since,
    report,
    targets_by_source_name,
)
from training.noise import neftune_sizes
from training.nonfinite import NotFinite, check_finite
from training.optimizer import InBackward, begin_step
from training.run_folder import explained_write_errors
from training.schedule import Schedule
from training.steps import dropout_seed, planned_steps, steps_per_epoch, total_steps

SKIPPED_STEPS = 20  # in a row, after which 16-mixed no longer looks for its loss scale


def main(s: Settings) -> None:
    """Check everything that can be checked without weights, then train, or do what --plan or --replay asks for."""
    if s.replay:
        nonfinite.replay(s, objective)
        return
    data = build.open_data(s)
    skeleton = build.check_model(s, data)
    if s.plan:
        budget.print_plan(s, data.train)
        return
    with run_folder.only_process(s.out_dir):
        newest = run_folder.newest_checkpoint(s)
        budget.choose_micro_batch(s, data.train)
        budget.check_micro_batches(s, data.train)
        budget.check_host_memory(s, data.train)
        identity = run_folder.identity(s, data.info)
        if newest:
            run_folder.check_same(s, newest, identity)
        run_folder.check_room(s, skeleton, total_steps(s, data.train))
        train(s, data, newest, identity)


def train(s: Settings, data: Data, newest: Path | None, identity: dict) -> None:
    """Train from the start, or from the checkpoint folder `newest`, and write final/ and the report."""
    fabric = build.start_fabric(s)
    before = budget.memory_before(s, fabric.device)
    schedule = Schedule(s, total_steps(s, data.train), len(data.val) > 0, run_folder.schedule_state(newest))
    with budget.explained_out_of_memory(s, data.train, fabric.device):
        run = build.build_run(s, fabric, data, newest, identity)
        if not newest and fabric.is_global_zero:
            run_folder.record_run(s)
        trainable, frozen = parameter_counts(run.model)
        fabric.print(f"{trainable:,} trainable parameters beside {frozen:,} frozen ones\n{schedule.describe()}")
        with run_folder.signals_noted() as signals:
            metrics, flops_per_token, signal = train_loop(run, schedule, run_folder.step_of(newest), signals)
            if not signal:
                run_folder.save_final(run)
    if signal:
        fabric.print(f"stopped: --resume goes on from the newest checkpoint in {s.out_dir}")
        sys.exit(128 + signal)
    if fabric.is_global_zero:
        measured = peak_memory_since(before, fabric.device)  # before the prediction takes some itself
        memory = {"predicted": budget.predicted_peak(s, data.train), "measured": measured}
        with explained_write_errors(s.out_dir):
            report(s.out_dir, run.model, metrics, flops_per_token, memory)


def train_loop(run: Run, schedule: Schedule, start: int, signals: list[int]) -> tuple[Metrics, float, int]:
    """The steps from `start` (from 0) to the last one of the schedule, or until a signal is in `signals`.

    Returns the metrics, the FLOPs a token takes (0 if step 0 was not run), and the signal that ended it early, or 0.
    """
    s, fabric = run.settings, run.fabric
    if start < schedule.total:
        memory_dry_run(run, forward)
    metrics = Metrics(s.out_dir / "metrics.csv", start, targets_by_source_name(run), fabric.is_global_zero)
    flops, signal = FirstStepFlops(), 0
    validation_tokens = run.val.lengths.sum().item()
    per_epoch = steps_per_epoch(s, run.train)
    with progress_bar(start, schedule.total, fabric.is_global_zero) as bar:
        for step, micro_batches in planned_steps(s, run.train, start, schedule.total):
            explained = nonfinite.explained(run, micro_batches, step, objective)
            with schedule.timed("step"), flops.counted(step), explained:
                row = train_step(run, micro_batches, step, schedule.rate(step))
            done = step + 1
            due, over = schedule.due(done), schedule.is_over(done, validation_tokens / row["tokens_per_second"])
            signal, over = agree(run, schedule, signals, over)
            if schedule.intervals["validation"] and (over or "validation" in due):
                with schedule.timed("validation"):
                    row |= validate(run)
            with explained_write_errors(s.out_dir):
                metrics.add({"step": done, "epoch": done / per_epoch, **row})
            show_progress(bar, row)
            if "save" in due or signal:
                with schedule.timed("save"):
                    run_folder.save_checkpoint(run, done, schedule.state(), metrics)
            if over or signal:
                break
    return metrics, flops.per_token(fabric, metrics), signal


def agree(run: Run, schedule: Schedule, signals: list[int], over: bool) -> tuple[int, bool]:
    """The signal to stop for, or 0, and whether the run is over: the same on all devices.

    Any device's signal and any device's clock decide, and all take the progress of the one that is furthest.
    """
    signal = signals[0] if signals else 0
    if run.fabric.world_size > 1:
        mine = torch.tensor([signal, over, schedule.clock.progress], dtype=torch.float64, device=run.fabric.device)
        signal, over, schedule.clock.progress = run.fabric.all_reduce(mine, reduce_op="max").tolist()
    return 0 if over else int(signal), bool(over)


def train_step(run: Run, micro_batches: list[list[int]], step: int, rate: float) -> dict:
    """One optimiser step over `micro_batches`. Returns its row of the metrics.

    The loss is the sum over all target tokens of the step, in all micro-batches and on all devices, divided by their
    number, which is known beforehand: so the gradient does not depend on how the step is cut. Raises NotFinite, before
    a weight is updated with it, if the loss or the gradient's norm is not finite.
    """
    started = time.perf_counter()
    s, fabric, samples = run.settings, run.fabric, run.train
    mine = micro_batches[fabric.global_rank :: fabric.world_size]
    all_indices = [i for indices in micro_batches for i in indices]
    target_count = samples.target_counts[all_indices].sum().item()
    torch.manual_seed(dropout_seed(s, step, fabric.global_rank, fabric.world_size))
    begin_step(run.optimizer, rate, len(mine))
    loss = torch.zeros((), device=fabric.device)
    sums = torch.zeros(len(run.sources), dtype=torch.float64, device=fabric.device)
    positions = 0
    for indices in mine:
        result = forward(run, samples, indices)
        loss += result.summed / target_count
        if s.optimizer_in_backward or s.offload:  # the backward pass is about to change the weights
            check_finite("the loss", loss.item())
        fabric.backward(result.trained / target_count)
        positions += result.positions
        add_by_source(sums, result.losses, samples, indices)
    if fabric.world_size > 1:
        loss = sum_over_devices(run, loss)
        sums = fabric.all_reduce(sums, reduce_op="sum")
    # The one place in a step where the host waits for the device: before what is no number can change a weight.
    (loss,), (norm,), sums = read_numbers(loss, gradient_norm(run), sums)
    check_finite("the loss", loss)
    update(run, norm)
    seconds = time.perf_counter() - started
    tokens = samples.lengths[all_indices].sum().item()
    own_tokens = sum(samples.lengths[indices].sum().item() for indices in mine)
    return {
        "loss": loss,
        **losses_by_source("loss", run.sources, sums, samples, all_indices),
        "learning_rate": rate,
        "grad_norm": norm,
        "tokens": tokens,
        "targets": target_count,
        "padding": 1 - own_tokens / max(1, positions),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "memory_gb": peak_memory(fabric.device) / 1e9,
    }


class Forward(NamedTuple):
    """Of a micro-batch: the scalar whose gradient is taken, the loss of each target (n,), and its number of positions.

    trained: the sum of the losses, and what is trained beside it but shown nowhere (--z_loss, --balance_loss).
    """

    trained: Tensor
    losses: Tensor
    positions: int

    @property
    def summed(self) -> Tensor:
        """The sum of the losses, without gradient."""
        return self.losses.sum()


def forward(run: Run, samples: Samples, indices: list[int]) -> Forward:
    """The losses of a micro-batch: those of the samples with these numbers."""
    return objective(run, PLANNERS[run.settings.planner].layout(samples, indices))


def objective(run: Run, batch: tuple) -> Forward:
    """What training minimises, of a micro-batch as a planner lays it out: tokens, targets, offsets (batching.py).

    The memory plan runs the model alone (training/memory/plan.py): what another objective adds, it does not see.
    """
    tokens, targets, offsets = batch
    s, recompute = run.settings, run.settings.recompute
    routed = [] if s.balance_loss and run.model.training else None
    with run.fabric.autocast():
        trained, losses = run.model(
            to_device(tokens, run.fabric.device), targets, recompute=recompute, offsets=offsets, each=True,
            routed=routed, z_loss=s.z_loss, noise=embedding_noise(run, targets, offsets),
        )  # fmt: skip
    if routed:
        trained = trained + unevenness(run, routed, targets, offsets)
    return Forward(trained, losses, tokens.numel())


def embedding_noise(run: Run, targets: Tensor, offsets: list[int] | None) -> Tensor | None:
    """--neftune_alpha: the size of the noise on each embedded token of a micro-batch, in training; else None."""
    alpha, c = run.settings.neftune_alpha, run.model.config
    if not alpha or not run.model.training:
        return None
    return to_device(neftune_sizes(alpha, c.embedding_size or c.hidden_size, targets, offsets), run.fabric.device)


def unevenness(run: Run, routed: list[Tensor], targets: Tensor, offsets: list[int] | None) -> Tensor:
    """--balance_loss times the balance loss of a micro-batch, times its number of targets.

    So a step, whose sum is divided by all its targets, has each micro-batch's with its share of them. routed: router
    logits (B * T, E) of each mixture. In padded rows (no offsets) tokens up to the last target of targets (B, T), which
    are on the CPU, count.
    """
    is_target, counted = targets != IGNORE, None
    if offsets is None:
        rows = is_target.flip(1).cummax(1).values.flip(1).flatten().nonzero().squeeze(1)
        counted = to_device(rows, run.fabric.device)
    loss = balance_loss(routed, run.model.config.experts.per_token, counted)
    return run.settings.balance_loss * is_target.sum().item() * loss


def gradient_norm(run: Run) -> Tensor:
    """The gradient's norm, a scalar; then the gradient is clipped."""
    if isinstance(run.optimizer, InBackward):  # which clips by itself
        return run.optimizer.take_norm()
    most = run.settings.max_grad_norm or math.inf
    return run.fabric.clip_gradients(run.model, run.optimizer, max_norm=most, error_if_nonfinite=False)


def update(run: Run, norm: float) -> None:
    """Let the optimiser step, if it has not in the backward pass. norm: the gradient's.

    Raises NotFinite if that is not finite; under 16-mixed only after SKIPPED_STEPS in a row, which change no weight.
    """
    optimizer, name = run.optimizer, "the gradient's norm"
    scaler = getattr(run.fabric.strategy.precision, "scaler", None)  # of 16-mixed: it skips the step, lowers its scale
    if scaler is None:
        check_finite(name, norm)
    else:
        scaler.skipped = 0 if math.isfinite(norm) else getattr(scaler, "skipped", 0) + 1
        if scaler.skipped == SKIPPED_STEPS:
            raise NotFinite(f"after {SKIPPED_STEPS} steps in a row that were skipped {name}", norm)
    if not isinstance(optimizer, InBackward):
        optimizer.step()
        optimizer.zero_grad()


def sum_over_devices(run: Run, loss: Tensor) -> Tensor:
    """Add up the gradients (in place) and the loss over all devices. A device without a micro-batch adds zeros."""
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = run.fabric.all_reduce(grad, reduce_op="sum")
    return run.fabric.all_reduce(loss, reduce_op="sum")


@torch.no_grad()
def validate(run: Run) -> dict:
    """Loss per target token over the whole validation part and over that of each source, and the perplexity."""
    s, fabric, val = run.settings, run.fabric, run.val
    run.model.eval()
    loss = torch.zeros((), device=fabric.device)
    sums = torch.zeros(len(run.sources), dtype=torch.float64, device=fabric.device)
    micro_batches = in_order(PLANNERS[s.planner], val.lengths, val.target_counts, s.micro_batch_tokens)
    for indices in micro_batches[fabric.global_rank :: fabric.world_size]:
        result = forward(run, val, indices)
        loss += result.summed
        add_by_source(sums, result.losses, val, indices)
    run.model.train()
    if fabric.world_size > 1:
        loss, sums = (fabric.all_reduce(total, reduce_op="sum") for total in (loss, sums))
    (loss,), sums = read_numbers(loss, sums)
    loss = loss / val.target_counts.sum().item()
    by_source = losses_by_source("val_loss", run.sources, sums, val, slice(None))
    return {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700)), **by_source}


def progress_bar(start: int, total: int, shown: bool) -> tqdm:
    """A bar that leaves 80 columns to the numbers that matter most, the losses first."""
    layout = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    return tqdm(total=total, initial=start, bar_format=layout, disable=not shown)


def show_progress(bar: tqdm, row: dict) -> None:
    """Move the bar by a step, with its losses; the last validation loss stays on it."""
    if "val_loss" in row:
        bar.val_loss = row["val_loss"]
        perplexity = f"perplexity {row['val_perplexity']:.3f}"
        bar.write(f"step {bar.n + 1}: validation loss {row['val_loss']:.4f}, {perplexity}")
    validation = f", val {bar.val_loss:.3f}" if hasattr(bar, "val_loss") else ""
    bar.set_postfix_str(
        f"loss {row['loss']:.3f}{validation}, {row['tokens_per_second']:,.0f} tok/s, {row['memory_gb']:.2f} GB, "
        f"lr {row['learning_rate']:.1e}, padding {row['padding']:.0%}",
        refresh=False,
    )
    bar.update()


if __name__ == "__main__":
    cli.run(main, settings)
