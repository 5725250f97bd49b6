"""The training loop of a sweep: finetune.py's, for several variants side by side.

Each variant is a `Run` of its own, with its optimiser, schedule and metrics, and its folder is what a run of its own
would have written; one can go on from it. Only the passes over the base are made together (joint.py). What ends for one
variant, by its last step, by halving or by a loss that is no number, the others go on without.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from adapters.adapter import adapters
from model import Transformer
from shell.cli import UserError
from shell.progress import bar_of_run
from tracking.following import following
from training import build, nonfinite, reference, run_folder, teacher
from training.build import Data, Run
from training.from_settings import DTYPES, adapter_config
from training.memory import budget
from training.metrics import Metrics, open_metrics, parameter_counts, peak_memory_since, write_report
from training.nonfinite import NotFinite
from training.optimizer import begin_step, weights_to_keep
from training.run_folder import explained_write_errors
from training.schedule import Schedule
from training.steps import planned_steps, steps_per_epoch, total_steps
from training.sweep import report
from training.sweep.halving import read_ended, rung, survivors, write_ended
from training.sweep.joint import joint_passes, own_passes
from training.sweep.layers import VariantModel
from training.sweep.plan import predicted_peak, print_plan
from training.sweep.variants import Sweep, check_together, read_sweep
from weights.checkpoint import load_model, read_config
from weights.peft_format import load_adapter

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from training.settings import Settings


class SweepFunctions(NamedTuple):
    """What finetune.py does of a step, for one variant: its functions of these names."""

    finish_step: Callable
    step_row: Callable
    validate: Callable


@dataclass
class Variant:
    """A variant in training. number: its place in the sweep. done: how many steps it has. ended: why it does not go on.

    rungs: how many rungs of the halving it has passed.
    """

    name: str
    number: int
    run: Run
    schedule: Schedule
    metrics: Metrics
    done: int
    steps: Iterator = field(repr=False)
    ended: str = ""
    rungs: int = 0
    row: dict | None = None  # of metrics.csv, of the step just done

    @property
    def trains(self) -> bool:
        """Whether it has steps to do."""
        return not self.ended and self.done < self.schedule.total

    def val_loss(self) -> float | None:
        """Its last validation loss."""
        losses = self.metrics.column("val_loss")[1]
        return losses[-1] if losses else None


def train_sweep(s: Settings, functions: SweepFunctions) -> None:
    """Check everything that can be checked without weights, then train all variants, or print their plan."""
    check_together(s)
    sweep = read_sweep(s)
    data = open_all(sweep)
    skeletons = {name: build.check_model(own, data[name]) for name, own in sweep.variants.items()}
    check_places(skeletons)
    if s.plan:
        print_plan(s, sweep, {name: each.train for name, each in data.items()})
        return
    with contextlib.ExitStack() as locks:
        for own in (s, *sweep.variants.values()):
            locks.enter_context(run_folder.only_process(own.out_dir))
        newest, identities = {}, {}
        for name, own in sweep.variants.items():
            newest[name] = run_folder.newest_checkpoint(own)
            identities[name] = run_folder.identity(own, data[name].info)
            if newest[name]:
                run_folder.check_same(own, newest[name], identities[name])
        check_room(sweep, skeletons, data)
        with following([own.out_dir for own in sweep.variants.values()], s.logger, s.log_adapter):
            _train(s, sweep, data, newest, identities, functions)


def open_all(sweep: Sweep) -> dict[str, Data]:
    """The prepared data of each variant; variants with one folder share it."""
    opened = {}
    for own in sweep.variants.values():
        if own.data_dir not in opened:
            opened[own.data_dir] = build.open_data(own)
    return {name: opened[own.data_dir] for name, own in sweep.variants.items()}


def check_places(skeletons: dict[str, Transformer]) -> None:
    """Raise UserError if a variant trains anything but adapters over linear layers that see all positions."""
    for name, model in skeletons.items():
        found = adapters(model)
        inside = [place for place in found if ".experts." in place]
        if inside:
            raise UserError(
                f"--sweep: {name} adapts {inside[0]}: an expert does not see a variant's positions together"
            )
        own = {id(parameter) for adapter in found.values() for parameter in adapter.parameters()}
        others = [key for key, p in model.named_parameters() if p.requires_grad and id(p) not in own]
        others += [place for place, adapter in found.items() if not hasattr(adapter.base, "in_features")]
        if others:
            raise UserError(f"--sweep: {name} trains {others[0]}, which is no adapter over a linear layer")


def check_room(sweep: Sweep, skeletons: dict, data: dict[str, Data]) -> None:
    """Raise UserError if the disk has no room for the files of all variants."""
    beside = 0
    for name, own in sweep.variants.items():
        beside += run_folder.check_room(own, skeletons[name], total_steps(own, data[name].train), beside)


def _train(s, sweep, data, newest, identities, functions):
    fabric = build.start_fabric(s)
    before = budget.memory_before(s, fabric.device)
    first = next(iter(data.values())).train
    with budget.explained_out_of_memory(s, first, fabric.device):
        model, variants = start(s, sweep, fabric, data, newest, identities)
        with run_folder.signals_noted() as signals:
            signal = train_loop(s, sweep, model, variants, functions, signals)
    if signal:
        fabric.print(f"stopped: --resume goes on from the newest checkpoints in {s.out_dir}")
        sys.exit(128 + signal)
    measured = peak_memory_since(before, fabric.device)
    memory = {"predicted": predicted_peak(s, sweep, {n: each.train for n, each in data.items()}), "measured": measured}
    with explained_write_errors(s.out_dir):
        for variant in variants:
            if variant.metrics.rows and not variant.ended:
                with model.only(variant.number) as own:
                    write_report(variant.run.settings.out_dir, own, variant.metrics, 0.0, memory)
        report.write(s.out_dir, sweep, variants, memory)


def start(s: Settings, sweep: Sweep, fabric: Fabric, data: dict, newest: dict, identities: dict) -> tuple:
    """The base with the adapters of all variants, and the `Variant`s, at their start or their newest checkpoints."""
    for name, own in sweep.variants.items():
        teacher.prepare(own, fabric, data[name], identities[name])
    base = load_model(s.checkpoint_dir, DTYPES[s.precision], fabric.device, s.quantize)
    model, variants, ended = VariantModel(base), [], read_ended(s.out_dir) if s.resume else {}
    for number, (name, own) in enumerate(sweep.variants.items()):
        torch.manual_seed(own.seed)  # as a run of its own does
        place, d = newest[name], data[name]
        if place:
            load_adapter(base, place)
        else:
            build.adapt(own, base)
        run_folder.record_run(own, place, identities[name])
        optimizer = build.place_optimizer(own, fabric, base)
        if place:
            build.load_states(own, optimizer, place)
        adapter = adapter_config(own, read_config(own.checkpoint_dir))
        run = Run(own, fabric, base.train(), optimizer, d.train, d.val, d.sources, d.info, adapter, identities[name])
        done = run_folder.step_of(place)
        reference.prepare(run, done)
        print(f"{name}: {parameter_counts(base)[0]:,} trainable parameters")
        schedule = Schedule(own, total_steps(own, d.train), len(d.val) > 0, run_folder.schedule_state(place))
        metrics = open_metrics(run, done)
        steps = planned_steps(own, d.train, done, schedule.total)
        rungs = rung(sweep.halving, done)
        variants.append(Variant(name, number, run, schedule, metrics, done, steps, ended.get(name, ""), rungs))
        model.take()
    if s.compile:
        build.compile_blocks(base, fabric.device)
    model.share()
    return model, variants


def train_loop(
    s: Settings, sweep: Sweep, model: VariantModel, variants: list[Variant], functions: SweepFunctions, signals: list
) -> int:
    """Train all variants to their ends, or until a signal is in `signals`: that is returned, else 0."""
    total = sum(variant.schedule.total - variant.done for variant in variants if variant.trains)
    for variant in variants:
        if not variant.trains and not variant.ended:
            save_final(model, variant)
    with bar_of_run(0, total) as bar:
        while active := [variant for variant in variants if variant.trains]:
            stepping = [v for v in active if v.rungs == rung(sweep.halving, v.done)]
            if not stepping:
                halve(s, sweep, model, variants, active)
                continue
            done_before = sum(variant.done for variant in stepping)
            step_together(s, model, stepping, functions)
            bar.update(sum(variant.done for variant in stepping) - done_before)
            bar.set_postfix_str(", ".join(f"{v.name} {v.row['loss']:.3f}" for v in stepping if v.row), refresh=False)
            for variant in stepping:
                after_step(model, variant, functions)
            for variant in stepping:
                save_what_is_due(model, variant, bool(signals))
            if any(variant.ended for variant in stepping):
                write_ended(s.out_dir, {v.name: v.ended for v in variants if v.ended})
            if signals:
                return signals[0]
    return 0


def step_together(s: Settings, model: VariantModel, stepping: list[Variant], functions: SweepFunctions) -> None:
    """One optimiser step of each of these variants. What is no number ends the variant that has it."""
    started = time.perf_counter()
    plans = {variant.number: next(variant.steps) for variant in stepping}
    samples = {n: [i for micro_batch in plan for i in micro_batch] for n, (_, plan) in plans.items()}
    rates = {variant.number: variant.schedule.rate(plans[variant.number][0]) for variant in stepping}
    for variant in stepping:
        begin_step(variant.run.optimizer, rates[variant.number], 1)
    runs = {variant.number: variant.run for variant in stepping}
    found = joint_passes(model, runs, samples, s.micro_batch_tokens)
    if not all(each.loss.isfinite() for each in found.values()):
        found = own_passes(model, runs, samples, s.micro_batch_tokens)
    numbers, seconds = {}, 0.0
    for variant in stepping:
        n = variant.number
        try:
            with model.only(n), nonfinite.explained(variant.run, plans[n][1], plans[n][0]):
                numbers[n] = functions.finish_step(variant.run, found[n])
        except UserError as error:
            if not isinstance(error.__context__, NotFinite):
                raise
            variant.ended = str(error)
            print(f"{variant.name} ends: {error}", file=sys.stderr)
    seconds = time.perf_counter() - started
    for variant in stepping:
        n = variant.number
        if n in numbers:
            row = functions.step_row(variant.run, samples[n], found[n], *numbers[n], rates[n], seconds)
            variant.done += 1
            per_epoch = steps_per_epoch(variant.run.settings, variant.run.train)
            variant.row = {"step": variant.done, "epoch": variant.done / per_epoch, **row}


def after_step(model: VariantModel, variant: Variant, functions: SweepFunctions) -> None:
    """What is due after a variant's step but saving: validation, and its row of metrics.csv."""
    if variant.ended:
        return
    run, schedule = variant.run, variant.schedule
    due, over = schedule.due(variant.done), variant.done == schedule.total
    if schedule.intervals["validation"] and (over or "validation" in due):
        with model.only(variant.number), weights_to_keep(run.optimizer):
            variant.row |= functions.validate(run)
    with explained_write_errors(run.settings.out_dir):
        variant.metrics.add(variant.row)


def save_what_is_due(model: VariantModel, variant: Variant, stops: bool) -> None:
    """Write a variant's checkpoint if it is due, or if the sweep stops; after its last step `final/` too."""
    if variant.ended:
        return
    if stops or "save" in variant.schedule.due(variant.done):
        save(model, variant)
    if variant.done == variant.schedule.total:
        save_final(model, variant)


def save(model: VariantModel, variant: Variant) -> None:
    """Write a checkpoint of a variant."""
    with model.only(variant.number):
        run_folder.save_checkpoint(variant.run, variant.done, variant.schedule.state(), variant.metrics)


def save_final(model: VariantModel, variant: Variant) -> None:
    """Write a variant's `final/`."""
    with model.only(variant.number):
        run_folder.save_final(variant.run)


def halve(s: Settings, sweep: Sweep, model: VariantModel, variants: list[Variant], active: list[Variant]) -> None:
    """All variants that train have reached a rung: the worse ones are dropped, with a checkpoint."""
    losses = {variant.name: variant.val_loss() for variant in active}
    kept = survivors(losses, sweep.halving.keep)
    for variant in active:
        variant.rungs = rung(sweep.halving, variant.done)
        if variant.name not in kept:
            variant.ended = f"dropped after {variant.done} steps, at a validation loss of {losses[variant.name]:.4f}"
            save(model, variant)
            print(f"{variant.name} is {variant.ended}", file=sys.stderr)
    write_ended(s.out_dir, {v.name: v.ended for v in variants if v.ended})
