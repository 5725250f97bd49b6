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
from typing import TYPE_CHECKING

from shell import cli
from training.settings import Settings

if __name__ == "__main__":
    settings = cli.parse(Settings)

import torch
from torch import Tensor
from tqdm import tqdm

from batching import PLANNERS, Samples, in_order
from objectives import Forward
from ops.devices import read_numbers
from shell.progress import bar_of_run
from store import publish
from store.fetch import fetch_folders
from tracking.following import following
from training import build, nonfinite, reference, run_folder, teacher
from training.build import Data, Run
from training.forgetting import forgetting
from training.memory import budget
from training.memory.dry_run import memory_dry_run
from training.metrics import (
    FirstStepFlops,
    Found,
    Metrics,
    Sums,
    largest_of_devices,
    open_metrics,
    parameter_counts,
    peak_memory,
    peak_memory_since,
    report,
)
from training.nonfinite import NotFinite, check_finite
from training.optimizer import InBackward, begin_step, weights_to_keep
from training.parallel.pipeline import pipelined_passes
from training.parallel.watch import watched
from training.run_folder import explained_write_errors
from training.schedule import Schedule
from training.steps import dropout_seed, planned_steps, steps_per_epoch, total_steps
from training.streaming import fetching_ahead, find_data
from training.sweep.loop import SweepFunctions, train_sweep

if TYPE_CHECKING:
    from lightning.fabric import Fabric

SKIPPED_STEPS = 20  # in a row, after which 16-mixed no longer looks for its loss scale


def main(s: Settings) -> None:
    """Check all that can be checked without weights, then train, or do what --plan, --replay or --sweep asks for."""
    fetch_folders(s)
    if s.replay:
        nonfinite.replay(s)
        return
    if s.sweep:
        train_sweep(s, SweepFunctions(finish_step, step_row, validate))
        return
    find_data(s)
    data = build.open_data(s)
    skeleton = build.check_model(s, data)
    if s.plan:
        with fetching_ahead(s, data, 0):
            budget.print_plan(s, data.train, skeleton)
        return
    if s.publish:
        publish.check_reachable(publish.check_address(s.publish, "publish"))  # rather now than after the last step
    with run_folder.only_process(s.out_dir):
        newest = run_folder.newest_checkpoint(s)
        with fetching_ahead(s, data, run_folder.step_of(newest)):
            budget.choose_micro_batch(s, data.train)
            budget.check_micro_batches(s, data.train)
            budget.check_host_memory(s, data.train)
            identity = run_folder.identity(s, data.info)
            if newest:
                run_folder.check_same(s, newest, identity)
            run_folder.check_room(s, skeleton, total_steps(s, data.train))
            with following([s.out_dir], s.logger, s.log_adapter):
                train(s, data, newest, identity)


def train(s: Settings, data: Data, newest: Path | None, identity: dict) -> None:
    """Train from the start, or from the checkpoint folder `newest`, and write final/ and the report."""
    fabric = build.start_fabric(s)
    newest = fabric.broadcast(newest)  # which the first device has found after it had cleared the folder up
    with watched(fabric.global_rank, fabric.world_size, f"--resume goes on from the newest checkpoint in {s.out_dir}"):
        train_on(s, fabric, data, newest, identity)


def train_on(s: Settings, fabric: "Fabric", data: Data, newest: Path | None, identity: dict) -> None:
    """`train` on the devices of `fabric`."""
    run_folder.check_same_everywhere(fabric, identity)
    before = budget.memory_before(s, fabric.device)
    schedule = Schedule(s, total_steps(s, data.train), len(data.val) > 0, run_folder.schedule_state(newest))
    with budget.explained_out_of_memory(s, data.train, fabric.device):
        teacher.prepare(s, fabric, data, identity)
        run = build.build_run(s, fabric, data, newest, identity)
        if fabric.is_global_zero:
            run_folder.record_run(s, newest, identity)
        reference.prepare(run, run_folder.step_of(newest))
        trainable, frozen = parameter_counts(run.whole)
        fabric.print(f"{trainable:,} trainable parameters beside {frozen:,} frozen ones\n{schedule.describe()}")
        if fabric.world_size > 1:
            fabric.print(run.ranks.describe(s, data.train))
        with run_folder.signals_noted() as signals:
            metrics, flops_per_token, signal = train_loop(run, schedule, run_folder.step_of(newest), signals)
            if not signal:
                run_folder.save_final(run)
    if signal:
        fabric.print(f"stopped: --resume goes on from the newest checkpoint in {s.out_dir}")
        sys.exit(128 + signal)
    measured = largest_of_devices(fabric, peak_memory_since(before, fabric.device))  # before predicting takes some
    if fabric.is_global_zero:
        memory = {"predicted": budget.predicted_peak(s, data.train), "measured": measured}
        with explained_write_errors(s.out_dir):
            report(s.out_dir, run.whole, metrics, flops_per_token, memory)
        if s.publish:
            run_folder.publish_final(s)


def train_loop(run: Run, schedule: Schedule, start: int, signals: list[int]) -> tuple[Metrics, float, int]:
    """The steps from `start` (from 0) to the last one of the schedule, or until a signal is in `signals`.

    Returns the metrics, the FLOPs a token takes (0 if step 0 was not run), and the signal that ended it early, or 0.
    """
    s, fabric = run.settings, run.fabric
    if start < schedule.total:
        memory_dry_run(run, forward)
    metrics = open_metrics(run, start)
    flops, signal = FirstStepFlops(), 0
    validation_tokens = run.val.positions()
    per_epoch = steps_per_epoch(s, run.train)
    with progress_bar(start, schedule.total, fabric.is_global_zero) as bar:
        for step, micro_batches in planned_steps(s, run.train, start, schedule.total):
            explained = nonfinite.explained(run, micro_batches, step)
            with schedule.timed("step"), flops.counted(step), explained:
                row = train_step(run, micro_batches, step, schedule.rate(step))
            done = step + 1
            due, over = schedule.due(done), schedule.is_over(done, validation_tokens / row["tokens_per_second"])
            signal, over = agree(run, schedule, signals, over)
            if schedule.intervals["validation"] and (over or "validation" in due):
                with schedule.timed("validation"), weights_to_keep(run.optimizer):
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

    The loss is the sum over all units of the step (target tokens, or pairs), in all micro-batches and on all devices,
    divided by their number, which is known beforehand: so the gradient does not depend on how the step is cut. Raises
    NotFinite, before a weight is updated with it, if the loss or the gradient's norm is not finite.
    """
    started = time.perf_counter()
    samples, mine = run.train, run.share(micro_batches, run.train)
    all_indices = [i for indices in micro_batches for i in indices]
    begin_step(run.optimizer, rate, len(mine))
    find_gradient = GRADIENTS[run.gradient]
    found = find_gradient(run, mine, step, samples.unit_counts[all_indices].sum().item())
    loss, norm = finish_step(run, found)
    return step_row(run, all_indices, found, loss, norm, rate, time.perf_counter() - started)


def step_row(run: Run, indices: list[int], found: Found, loss: float, norm: float, rate: float, seconds: float) -> dict:
    """A step's row of the metrics: of the samples `indices` on all devices, which took so many seconds."""
    samples, fabric = run.train, run.fabric
    tokens = samples.lengths[indices].sum().item()
    return {
        "loss": loss,
        **found.sums.means(samples, indices),
        "learning_rate": rate,
        "grad_norm": norm,
        "tokens": tokens,
        "targets": samples.target_counts[indices].sum().item(),
        "padding": 1 - found.tokens / max(1, found.positions),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "memory_gb": peak_memory(fabric.device) / 1e9,
    }


def backward_passes(run: Run, mine: list[list[int]], step: int, units: int) -> Found:
    """Leave the gradient of a step in the weights: a forward and a backward pass of each micro-batch of this device."""
    s, fabric, samples = run.settings, run.fabric, run.train
    torch.manual_seed(dropout_seed(s, step, run.ranks))
    loss, sums, positions, tokens = torch.zeros((), device=fabric.device), Sums(run), 0, 0
    for indices in mine:
        result = forward(run, samples, indices)
        loss += result.summed / units
        if s.optimizer_in_backward or s.offload:  # the backward pass is about to change the weights
            check_finite("the loss", loss.item())
        fabric.backward(result.trained / units)
        positions, tokens = positions + result.positions, tokens + samples.lengths[indices].sum().item()
        sums.add(result, samples, indices)
    run.ranks.sum_gradients(run.model)
    return Found(run.ranks.sum(loss), sums, positions, tokens)


@torch.no_grad()
def forward_passes(run: Run, mine: list[list[int]], step: int, units: int) -> Found:
    """Tell MeZO (training/mezo.py) the losses on both sides of the weights, by forward passes alone.

    What is found are means over the two sides. Both have the same dropout.
    """
    fabric, samples = run.fabric, run.train
    trained, loss = torch.zeros(2, 2, dtype=torch.float64, device=fabric.device)
    sums = Sums(run, weight=1 / 2)
    for side in run.optimizer.sides(step):
        torch.manual_seed(dropout_seed(run.settings, step, run.ranks))
        positions = tokens = 0
        for indices in mine:
            result = forward(run, samples, indices)
            trained[side] += result.trained / units
            loss[side] += result.summed / units
            positions, tokens = positions + result.positions, tokens + samples.lengths[indices].sum().item()
            sums.add(result, samples, indices)
    run.optimizer.found(run.ranks.sum(trained))
    return Found(run.ranks.sum(loss).mean(), sums, positions, tokens)


GRADIENTS = {"backward": backward_passes, "forward": forward_passes, "pipeline": pipelined_passes}


def finish_step(run: Run, found: Found) -> tuple[float, float]:
    """Let the optimiser step with the gradient that was found. Returns the step's loss and the gradient's norm.

    The one place in a step where the host waits for the device: before what is no number can change a weight.
    """
    (loss,), (norm,), *found.sums.numbers = read_numbers(found.loss, gradient_norm(run), *found.sums.over_devices())
    check_finite("the loss", loss)
    update(run, norm)
    return loss, norm


def forward(run: Run, samples: Samples, indices: list[int]) -> Forward:
    """What the run's objective makes of a micro-batch: of the samples with these numbers."""
    if not indices:  # others have one more micro-batch, in which this device takes part
        return forward(run, samples, [samples.shards.at_hand()]).uncounted()
    with run.fabric.autocast():
        return run.objective(run.model, run.batch(samples, indices))


def gradient_norm(run: Run) -> Tensor:
    """The gradient's norm, a scalar; then the gradient is clipped."""
    if hasattr(run.optimizer, "take_norm"):  # which clips by itself
        return run.optimizer.take_norm()
    most = run.settings.max_grad_norm or math.inf
    if run.divided:
        return run.ranks.clip_gradients(run.model, most)
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


@torch.no_grad()
def validate(run: Run) -> dict:
    """The mean loss of the whole validation part and of that of each source, and what else the objective measures."""
    s, fabric, val = run.settings, run.fabric, run.val
    run.model.eval()
    loss = torch.zeros((), device=fabric.device)
    sums = Sums(run)
    micro_batches = in_order(PLANNERS[s.planner], val, s.micro_batch_tokens)
    for indices in run.share(micro_batches, val):
        result = forward(run, val, indices)
        loss += result.summed
        sums.add(result, val, indices)
    run.model.train()
    (loss,), *sums.numbers = read_numbers(run.ranks.sum(loss), *sums.over_devices())
    loss = loss / sum(val.units_by_source())
    perplexity = {"val_perplexity": math.exp(min(loss, 700))} if run.objective.is_likelihood else {}
    row = {"val_loss": loss, **perplexity, **sums.means(val, None, "val_"), **forgetting(run)}
    run.ranks.give_back(run.model)
    return row


def progress_bar(start: int, total: int, shown: bool) -> tqdm:
    """A bar that leaves 80 columns to the numbers that matter most, the losses first; in a log a line now and then."""
    layout = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    return bar_of_run(start, total, layout=layout, shown=shown)


def show_progress(bar: tqdm, row: dict) -> None:
    """Move the bar by a step, with its losses; the last validation loss stays on it."""
    if bar.disable:
        return
    if "val_loss" in row:
        bar.val_loss = row["val_loss"]
        perplexity = f", perplexity {row['val_perplexity']:.3f}" if "val_perplexity" in row else ""
        bar.write(f"step {bar.n + 1}: validation loss {row['val_loss']:.4f}{perplexity}")
    validation = f", val {bar.val_loss:.3f}" if hasattr(bar, "val_loss") else ""
    bar.set_postfix_str(
        f"loss {row['loss']:.3f}{validation}, {row['tokens_per_second']:,.0f} tok/s, {row['memory_gb']:.2f} GB, "
        f"lr {row['learning_rate']:.1e}, padding {row['padding']:.0%}",
        refresh=False,
    )
    bar.update()


if __name__ == "__main__":
    cli.run(main, settings)
