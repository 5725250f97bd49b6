"""Fine-tune a model on prepared data: LoRA, QLoRA or all weights, on one device or several.

    python finetune.py --checkpoint_dir checkpoints/ORG/MODEL --data_dir prepared/my --quantize bnb.nf4

The training step is `train_step`. What a run leaves in its folder: `config.yaml` and `source/` (what ran),
`metrics.csv` and `loss.png`, `step-NNNNNN/` (to resume from), `final/` (the adapter in PEFT's format, or the model).
It can be killed at any instant: --resume goes on from the newest checkpoint and ends with the same bytes.
"""

import contextlib
import importlib.util
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shell import cli
from shell.cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        checkpoint_dir: Model folder: config.json, *.safetensors, tokenizer files.
        data_dir: Folder made by prepare_data.py.
        out_dir: Folder for everything the run leaves.
        method: "lora" or "dora" train an adapter, "full" trains all weights.
        quantize: Keep the frozen base in bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8 (QLoRA), or each of its
            layers as a file says that eval/quality.py --sensitivity wrote; the run keeps what is in it.
        precision: Dtype of the weights ("true") or of the products over fp32 weights ("mixed").
        lora_r: Rank of the adapter.
        lora_alpha: Scale of the adapter; its product is multiplied by alpha / r.
        lora_dropout: Share of the adapter's inputs set to zero in training.
        lora_targets: Projections that get an adapter.
        lora_rslora: Multiply by alpha / sqrt(r) instead.
        global_batch_size: Samples in an optimiser step, over all micro-batches and devices.
        micro_batch_tokens: Positions that are in the model at one time, padding included. Does not change the result.
            "auto" takes the most that memory_budget allows.
        planner: How samples are cut into micro-batches (batching.py).
        epochs: Passes over the data, unless max_steps is given.
        max_steps: Optimiser steps.
        time_budget: End after this wall-clock time, such as 24h, 90m or 3600s, with the schedule at its end and final/
            written; earlier if epochs or max_steps are done. Counts from the start, loading and saving included.
        optimizer: AdamW: fused, with 8-bit states, or with states paged out of the GPU's memory (bitsandbytes).
        learning_rate: The highest learning rate; 2e-4 suits adapters, 2e-5 all weights.
        schedule: Its course after the warm-up, down to zero but for "constant".
        warmup_steps: Steps over which it rises.
        weight_decay: Decay of matrices (not of norms and biases).
        beta1: AdamW's decay of the first moment.
        beta2: AdamW's decay of the second moment.
        max_grad_norm: Clip the gradient to this norm; 0 for no clipping.
        recompute: Share of the blocks computed again in the backward pass: less memory, at 1 a third more time.
        compile: Let torch.compile fuse the small operations of a block; takes a while at the start of a run.
        optimizer_in_backward: With "full", let each weight step as soon as its gradient is there, and free that: no
            gradients in memory, but each step must fit one micro-batch, and there is no clipping.
        eval_interval: Validate after every so many steps, and at the end; 0 for never.
        save_interval: Write a checkpoint to resume from after every so many steps; 0 for never.
        keep_last: So many of the newest checkpoints stay; 0 for all.
        keep_best: Keep the checkpoint with the lowest validation loss too.
        seed: Of adapter, order of the data and dropout.
        deterministic: On a GPU, take only algorithms that give the same bits every time; a CPU always does.
        resume: Continue the run in out_dir from its newest checkpoint, or begin it if there is none.
        replay: Run the step in a bad_batch.safetensors again, and print where its numbers go wrong.
        devices: How many GPUs (or CPU processes) share each step.
        plan: Predict memory, arithmetic and time from config.json and the data alone, print them, and stop.
        plan_tflops: The rate that the plan's time assumes, in TFLOP/s; measured if not given.
        memory_budget: What a device may take, such as 24GB, for plan and for micro_batch_tokens auto; by default what
            is free.
    """

    checkpoint_dir: Path
    data_dir: Path
    out_dir: Path = Path("out/finetune")
    method: Literal["lora", "dora", "full"] = "lora"
    quantize: str | dict[str, str] | None = None
    precision: Literal["32-true", "bf16-true", "bf16-mixed", "16-mixed"] = "bf16-true"
    lora_r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    lora_rslora: bool = False
    global_batch_size: int = 32
    micro_batch_tokens: int | Literal["auto"] = 2048
    planner: str = "packed"
    epochs: float = 1.0
    max_steps: int | None = None
    time_budget: str | None = None
    optimizer: Literal["adamw", "adamw-8bit", "adamw-paged", "adamw-8bit-paged"] = "adamw"
    learning_rate: float = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    recompute: float = 0.0
    compile: bool = False
    optimizer_in_backward: bool = False
    eval_interval: int = 100
    save_interval: int = 100
    keep_last: int = 2
    keep_best: bool = False
    seed: int = 1337
    deterministic: bool = False
    resume: bool = False
    replay: Path | None = None
    devices: int = 1
    plan: bool = False
    plan_tflops: float | None = None
    memory_budget: str | None = None

    def __post_init__(self):
        self.started = time.monotonic()  # for time_budget: before the imports, which take a while
        above_zero = ("lora_r", "lora_alpha", "global_batch_size", "micro_batch_tokens", "epochs", "learning_rate")
        cli.check_numbers(self, *above_zero, "devices", "plan_tflops", above=0)
        if self.max_steps is not None and self.max_steps < 1:
            raise UserError(f"--max_steps {self.max_steps}: must be above 0, or left out to use --epochs")
        zero_or_above = ("warmup_steps", "weight_decay", "max_grad_norm", "eval_interval", "save_interval", "keep_last")
        cli.check_numbers(self, *zero_or_above, "seed", least=0)
        cli.check_numbers(self, "lora_dropout", "beta1", "beta2", least=0, below=1)
        cli.check_numbers(self, "recompute", least=0, most=1)
        if self.method == "full" and self.quantize:
            raise UserError("--quantize needs --method lora or dora, not full: quantised weights cannot train")
        if self.time_budget is not None:
            cli.number_of_seconds(self.time_budget, "time_budget")
        if self.keep_best and not (self.eval_interval and self.save_interval and self.keep_last):
            raise UserError("--keep_best needs --eval_interval, --save_interval and --keep_last above 0")
        if self.keep_best and self.save_interval % self.eval_interval:
            raise UserError(
                f"--keep_best needs a validation at each checkpoint: --save_interval {self.save_interval} is not "
                f"a multiple of --eval_interval {self.eval_interval}"
            )
        if self.memory_budget is not None:
            cli.number_of_bytes(self.memory_budget, "memory_budget")
            if not self.plan and self.micro_batch_tokens != "auto":
                raise UserError(f"--memory_budget {self.memory_budget} needs --plan or --micro_batch_tokens auto")
        if self.optimizer_in_backward:
            for name, value in (("method", "full"), ("max_grad_norm", 0), ("devices", 1)):
                if getattr(self, name) != value:
                    raise UserError(f"--optimizer_in_backward needs --{name} {value}, not {getattr(self, name)}")
            if self.precision == "16-mixed":
                raise UserError("--optimizer_in_backward needs another --precision: 16-mixed scales its gradients")
        if not self.lora_targets:
            raise UserError("--lora_targets is empty: name at least one projection, such as [q_proj,v_proj]")


if __name__ == "__main__":
    settings = cli.parse(Settings)

import torch
import yaml
from tqdm import tqdm

import lora
from batching import PLANNERS, Samples, in_order, read_data_info, source_names
from model import Transformer
from ops.attention import Attend
from quantize import read_quantization
from shell.files import new_folder, read_json, whole_file, write_json
from text.tokenizer import Tokenizer
from training import nonfinite, run_folder
from training.memory import budget
from training.memory.budget import DTYPES, adapter_config, autocast_dtype, dropout_seed, planned_steps, total_steps
from training.metrics import (
    Metrics,
    add_by_source,
    flop_counter,
    losses_by_source,
    parameter_counts,
    peak_memory,
    peak_memory_since,
    report,
    targets_by_source,
)
from training.nonfinite import NotFinite, check_finite
from training.optimizer import StepInBackward, TimeBudget, build_optimizer, learning_rate, rate_at
from training.run_folder import explained_write_errors, plain
from weights import peft_format
from weights.checkpoint import NOTES, load_model, load_optimizer, read_config, save_model, save_optimizer

SKIPPED_STEPS = 20  # in a row, after which 16-mixed is no longer looking for its scale


def main(s):
    if s.replay:
        replay(s)
        return
    if s.micro_batch_tokens == "auto":
        budget.steady_memory()
    info, train, val = open_data(s)
    skeleton = check_model(s, train, val)
    if s.plan:
        budget.print_plan(s, train)
        return
    with run_folder.only_process(s.out_dir):
        newest = run_folder.newest_checkpoint(s)
        budget.choose_micro_batch(s, train)
        budget.check_micro_batches(s, train)
        identity = run_folder.identity(s, info)
        if newest:
            run_folder.check_same(s, newest, identity)
        run_folder.check_room(s, skeleton, total_steps(s, train))
        run(s, info, train, val, newest, identity)


def run(s, info, train, val, newest, identity):
    """Train from the start or from the checkpoint `newest`, until the end or until a signal comes."""
    sources = source_names(info, train, val)
    fabric = start_fabric(s)
    before = budget.memory_before(s, fabric.device)
    with budget.explained_shortage(s, train, fabric.device):
        model, adapter = build_model(s, fabric.device, newest)
    optimizer = build_optimizer(s, model)
    optimizer = StepInBackward(model, optimizer) if s.optimizer_in_backward else fabric.setup_optimizers(optimizer)
    if s.compile:
        compile_blocks(model, fabric.device)
    clock = TimeBudget(math.inf, s.started)
    if s.time_budget:
        state = read_json(newest / run_folder.RUN)["clock"] if newest else None
        clock = TimeBudget(cli.number_of_seconds(s.time_budget, "time_budget"), s.started, state)
    if newest:
        load_optimizer(optimizer, newest)
        fabric.strategy.precision.load_state_dict(read_json(newest / "scaler.json"))
    elif fabric.is_global_zero:
        record_run(s)
    trainable, frozen = parameter_counts(model)
    fabric.print(f"{trainable:,} trainable parameters beside {frozen:,} frozen ones")

    def save(path, with_optimizer):
        if fabric.is_global_zero:
            hashes = {}
            with explained_write_errors(s.out_dir), new_folder(path, hashes) as folder:
                hashes |= save_weights(folder, s, info, model, adapter)
                if with_optimizer:
                    hashes |= save_optimizer(optimizer, folder)
                    write_json(folder / "scaler.json", fabric.strategy.precision.state_dict())  # {} but for 16-mixed
                    write_json(folder / run_folder.SETTINGS, plain(s))
                    state = clock.state() if s.time_budget else None
                    write_json(folder / run_folder.RUN, {"identity": identity, "clock": state})

    with run_folder.signals_noted() as signals, budget.explained_shortage(s, train, fabric.device):
        loop = train_loop(fabric, s, model, optimizer, train, val, sources, newest, save, clock, signals)
        metrics, flops_per_token, stopped = loop
        if not stopped:
            save(s.out_dir / "final", with_optimizer=False)
    if stopped:
        fabric.print(f"stopped: --resume goes on from the newest checkpoint in {s.out_dir}")
        sys.exit(128 + stopped)
    if fabric.is_global_zero:
        measured = peak_memory_since(before, fabric.device)  # before the prediction takes some itself
        memory = {"predicted": budget.predicted_peak(s, train), "measured": measured}
        with explained_write_errors(s.out_dir):
            report(s.out_dir, model, metrics, flops_per_token, memory)


def train_loop(fabric, s, model, optimizer, train, val, sources, newest, save, clock, signals):
    """All steps of the run, or those until a signal comes or the time is over.

    sources: names of the sources whose losses are told apart. clock: a `TimeBudget`. signals: those that came.
    Returns the run's `Metrics`, the floating-point operations a token of step 0, if it ran, and the number of the
    signal that stopped it before its end, or 0.
    """
    per_epoch = math.ceil(len(train) / s.global_batch_size)
    total = total_steps(s, train)
    start = run_folder.step_of(newest) if newest else 0
    model.train()
    if start < total:
        rehearse(fabric, s, model, optimizer, train)  # before there is a metrics.csv, which the next run would find
    counts = targets_by_source(train, slice(None), len(sources)).tolist()
    metrics = Metrics(s.out_dir / "metrics.csv", start, dict(zip(sources, counts, strict=True)), fabric.is_global_zero)
    counter, flops_per_token = flop_counter(), 0.0
    intervals = {"validation": s.eval_interval if len(val) else 0, "save": s.save_interval}
    stopped = 0
    with tqdm(total=total, initial=start, unit="step", disable=not fabric.is_global_zero) as bar:
        for step, micro_batches in planned_steps(s, train, start, total):
            rate = rate_at(s, step, clock.progress) if s.time_budget else learning_rate(s, step, total)
            # Never in a resumed run: the counter takes operations apart, which changes their last bits.
            explained = nonfinite.explained(fabric, s, model, optimizer, train, micro_batches, step, sources)
            with explained, counter if step == 0 else contextlib.nullcontext(), clock.measuring("step"):
                row = train_step(fabric, s, model, optimizer, train, micro_batches, step, rate, sources)
            if step == 0:
                flops = torch.tensor(counter.get_total_flops(), device=fabric.device)
                flops_per_token = fabric.all_reduce(flops, reduce_op="sum").item() / row["tokens"]
            done = step + 1
            due = {what for what, interval in intervals.items() if interval and done % interval == 0}
            if done > s.warmup_steps:
                clock.advance(total - done, intervals)
            if intervals["validation"]:
                clock.guess("validation", val.lengths.sum().item() / row["tokens_per_second"])
            stopped, last = agree(fabric, clock, signals, done == total or not clock.another_fits(due))
            if intervals["validation"] and (last or "validation" in due):
                with clock.measuring("validation"):
                    row.update(validate(fabric, s, model, val, sources))
            with explained_write_errors(s.out_dir):
                metrics.add({"step": done, "epoch": done / per_epoch, **row})
            show_progress(bar, row)
            if "save" in due or stopped:
                with clock.measuring("save"):
                    save(run_folder.checkpoint_path(s, done), with_optimizer=True)
                if fabric.is_global_zero:
                    run_folder.rotate(s, *metrics.column("val_loss"))
            if stopped or last:
                break
    return metrics, flops_per_token, stopped


def agree(fabric, clock, signals, last):
    """The number of the signal to stop for, or 0, and whether this was the last step: the same on all devices.

    Any one's signal and any one's clock decide, and all have the progress of the one that is furthest.
    """
    signal = signals[0] if signals else 0
    if fabric.world_size > 1:
        mine = torch.tensor([signal, last, clock.progress], dtype=torch.float64, device=fabric.device)
        signal, last, clock.progress = fabric.all_reduce(mine, reduce_op="max").tolist()
    return 0 if last else int(signal), bool(last)


def train_step(fabric, s, model, optimizer, samples, micro_batches, step, rate, sources=()):
    """One optimiser step over `micro_batches`. Returns its row of the metrics, with a loss for each of `sources`.

    The loss is the sum over all target tokens of the step, in all micro-batches and on all devices, divided by their
    number, which is known beforehand: so the gradient does not depend on how the step is cut. Raises NotFinite, before
    any weight steps, if that loss or the gradient's norm is not finite.
    """
    started = time.perf_counter()
    mine = micro_batches[fabric.global_rank :: fabric.world_size]
    drawn = [i for indices in micro_batches for i in indices]
    target_count = samples.target_counts[drawn].sum().item()
    torch.manual_seed(dropout_seed(s, step, fabric.global_rank, fabric.world_size))
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = torch.zeros((), device=fabric.device)
    sums = torch.zeros(len(sources), dtype=torch.float64, device=fabric.device)
    positions = 0
    for indices in mine:
        summed, losses, size = run_forward(fabric, s, model, samples, indices)
        micro_loss = summed / target_count
        loss += micro_loss.detach()
        if s.optimizer_in_backward:  # there the weights are about to step
            check_finite("the loss", loss)
        fabric.backward(micro_loss)
        positions += size
        add_by_source(sums, losses, samples, indices)
    if fabric.world_size > 1:
        loss = sum_over_devices(fabric, model, loss)
        sums = fabric.all_reduce(sums, reduce_op="sum")
    check_finite("the loss", loss)
    norm = clip_and_step(fabric, s, model, optimizer)
    seconds = time.perf_counter() - started
    tokens, own_tokens = samples.lengths[drawn].sum().item(), sum(samples.lengths[part].sum().item() for part in mine)
    return {
        "loss": loss.item(),
        **losses_by_source("loss", sources, sums, samples, drawn),
        "learning_rate": rate,
        "grad_norm": norm.item(),
        "tokens": tokens,
        "targets": target_count,
        "padding": 1 - own_tokens / max(1, positions),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "memory_gb": peak_memory(fabric.device) / 1e9,
    }


def run_forward(fabric, s, model, samples, indices):
    """The summed loss of a micro-batch, the loss of each of its targets, and how many positions it takes."""
    tokens, targets, offsets = PLANNERS[s.planner].layout(samples, indices)
    tokens, targets = tokens.to(fabric.device), targets.to(fabric.device)
    with fabric.autocast():
        summed, losses = model(tokens, targets, recompute=s.recompute, offsets=offsets, each=True)
    return summed, losses, tokens.numel()


def clip_and_step(fabric, s, model, optimizer):
    """Let the optimiser step. Returns the norm of the gradient before it was clipped, a scalar tensor.

    Raises NotFinite if that is not finite; under 16-mixed not before SKIPPED_STEPS in a row, in which no weight moves.
    """
    name = "the gradient's norm"
    if isinstance(optimizer, StepInBackward):
        norm = optimizer.take_norm()
        check_finite(name, norm)
        return norm
    norm = fabric.clip_gradients(model, optimizer, max_norm=s.max_grad_norm or math.inf, error_if_nonfinite=False)
    scaler = getattr(fabric.strategy.precision, "scaler", None)  # of 16-mixed: it skips the step and lowers its scale
    if scaler is None:
        check_finite(name, norm)
    else:
        scaler.skipped = 0 if norm.isfinite() else getattr(scaler, "skipped", 0) + 1
        if scaler.skipped == SKIPPED_STEPS:
            raise NotFinite(f"after {SKIPPED_STEPS} steps in a row that were skipped {name}", norm.item())
    optimizer.step()
    optimizer.zero_grad()
    return norm


def rehearse(fabric, s, model, optimizer, samples):
    """Run the largest micro-batch of the whole run forward and backward, and forget it: if memory is short, it is now.

    Beside it lies what a later step has and the first has not: moments, gradients of other micro-batches. No number of
    the run changes: not the weights, not the optimiser, not the random numbers.
    """
    indices, most = budget.heaviest_micro_batch(s, samples)
    in_backward = isinstance(optimizer, StepInBackward)
    if in_backward:
        optimizer.stopped = True
    random_state = torch.random.fork_rng([fabric.device] if fabric.device.type == "cuda" else [])
    with random_state, budget.no_more_than_free(fabric.device):
        held = budget.memory_of_later_steps(s, model, optimizer, gradients=most > fabric.world_size)
        summed, _, _ = run_forward(fabric, s, model, samples, indices)
        summed.backward()
    if in_backward:
        optimizer.take_norm()
        optimizer.stopped = False
    model.zero_grad()
    del held


def sum_over_devices(fabric, model, loss):
    """Add up the gradients (in place) and the loss over all devices. One that had no micro-batch adds zeros."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = fabric.all_reduce(grad, reduce_op="sum")
    return fabric.all_reduce(loss, reduce_op="sum")


@torch.no_grad()
def validate(fabric, s, model, val, sources=()):
    """Loss per target token over the whole validation part and over that of each source, and its perplexity."""
    model.eval()
    loss = torch.zeros((), device=fabric.device)
    sums = torch.zeros(len(sources), dtype=torch.float64, device=fabric.device)
    planner = PLANNERS[s.planner]
    for indices in in_order(planner, val.lengths, s.micro_batch_tokens)[fabric.global_rank :: fabric.world_size]:
        tokens, targets, offsets = planner.layout(val, indices)
        with fabric.autocast():
            summed, losses = model(tokens.to(fabric.device), targets.to(fabric.device), offsets=offsets, each=True)
        loss += summed
        add_by_source(sums, losses, val, indices)
    model.train()
    if fabric.world_size > 1:
        loss, sums = (fabric.all_reduce(total, reduce_op="sum") for total in (loss, sums))
    loss = loss.item() / val.target_counts.sum().item()
    by_source = losses_by_source("val_loss", sources, sums, val, slice(None))
    return {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700)), **by_source}


def replay(s):
    """Run the step that --replay names again, from the weights in that file, on one device."""
    step = nonfinite.read_step(s.replay)
    s.devices = 1
    fabric = start_fabric(s)
    model, _ = build_model(s, fabric.device, None)
    nonfinite.read_weights(s.replay, model)
    nonfinite.replay(fabric, s, model.train(), step)


# ------------------------------------------------------------------------------------------------------- setting up


def open_data(s):
    """data.json and the two parts of the prepared folder. Raises UserError if it was made for another tokenizer."""
    info = read_data_info(s.data_dir)
    read_config(s.checkpoint_dir)
    if Tokenizer(s.checkpoint_dir).file_hash() != info["tokenizer_hash"]:
        raise UserError(
            f"{s.data_dir} was made with another tokenizer: run prepare_data.py again with "
            f"--checkpoint_dir {s.checkpoint_dir}"
        )
    train, val = (Samples(s.data_dir / f"{part}.safetensors") for part in ("train", "val"))
    for part, samples in (("training", train), ("validation", val)):
        if dropped := samples.drop_without_target():
            print(f"note: {dropped} {part} samples have no target token and are left out", file=sys.stderr)
    if not len(train):
        raise UserError(f"{s.data_dir} has no training sample with a target token: see how prepare_data.py was run")
    return info, train, val


def check_model(s, train, val):
    """Refuse what cannot work before any weight is read, on a model without memory. Returns that.

    A file that --quantize names is read here, and `s` then has what is in it: that is what the run keeps.
    """
    config = read_config(s.checkpoint_dir)
    if s.planner not in PLANNERS:
        raise UserError(f"--planner {s.planner}: expected one of {', '.join(PLANNERS)}")
    with torch.device("meta"):
        model = Transformer(config)
        s.quantize = read_quantization(s.quantize, model)
        if s.method != "full":
            lora.add_lora(model, adapter_config(s))
    if s.method == "full" and s.precision == "bf16-true":
        print(
            "note: small steps on bf16 weights round to nothing; --precision bf16-mixed trains fp32 ones",
            file=sys.stderr,
        )
    longest = max(part.lengths.max().item() for part in (train, val) if len(part))
    if longest > config.max_position_embeddings:
        raise UserError(
            f"{s.data_dir} has a sample of {longest} tokens, the model's context is {config.max_position_embeddings}: "
            "run prepare_data.py with a smaller --max_seq_length"
        )
    largest = max(part.tokens.max().item() for part in (train, val) if len(part))
    if largest >= config.vocab_size:
        raise UserError(f"{s.data_dir} has the token {largest}, the model's vocabulary ends at {config.vocab_size - 1}")
    if s.keep_best and not len(val):
        raise UserError(
            f"--keep_best needs validation samples, {s.data_dir} has none: see prepare_data.py --val_fraction"
        )
    return model


def start_fabric(s):
    from lightning.fabric import Fabric

    # The model is loaded in its dtype. Fabric's own "bf16-true" would cast the fp32 adapter too.
    precision = s.precision if autocast_dtype(s) else "32-true"
    try:
        fabric = Fabric(devices=s.devices, precision=precision, strategy="ddp" if s.devices > 1 else "auto")
    except Exception as error:
        raise UserError(f"--devices {s.devices}: {error}") from None
    fabric.launch()
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is first used
        torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(s.seed)
    return fabric


def build_model(s, device, newest):
    """The model to train, from the checkpoint `newest` if there is one, and its AdapterConfig (None for "full")."""
    dtype = DTYPES[s.precision]
    if s.method == "full":
        return load_model(newest or s.checkpoint_dir, dtype, device).requires_grad_(True), None
    config = adapter_config(s)
    model = load_model(s.checkpoint_dir, dtype, device, s.quantize, adapter_dir=newest)
    if not newest:
        lora.add_lora(model, config)
    return model, config


def compile_blocks(model, device):
    """Let torch.compile fuse the small operations of a block: one graph for all blocks and all lengths."""
    compiler = "triton" if device.type == "cuda" else os.environ.get("CXX", "g++")
    if not (importlib.util.find_spec(compiler) if device.type == "cuda" else shutil.which(compiler)):
        print(f"note: --compile needs {compiler}, which is not installed: going on without", file=sys.stderr)
        return
    Attend.__call__ = torch.compiler.disable(Attend.__call__)  # not where it is defined: that takes a second to import
    for block in model.model.layers:
        block.compile(dynamic=True)


# ------------------------------------------------------------------------------------------------ what the run leaves


def record_run(s):
    """Keep what ran: the resolved settings, to be given to --config, and the code."""
    with explained_write_errors(s.out_dir):
        with new_folder(s.out_dir / "source") as folder:
            for path in run_folder.source_files():
                (folder / path.parent).mkdir(parents=True, exist_ok=True)
                shutil.copy(run_folder.ROOT / path, folder / path)
        with whole_file(s.out_dir / "config.yaml") as file:
            file.write_bytes(yaml.safe_dump(plain(s), sort_keys=False).encode())


def save_weights(folder, s, info, model, adapter):
    """Write the adapter, or all weights, and `onetune.json`: what generate.py must know to match the training.

    Returns the hashes that are known already, by file name.
    """
    notes = {"prompt_style": info["prompt_style"], "checkpoint_dir": str(s.checkpoint_dir), "quantize": s.quantize}
    write_json(folder / NOTES, notes)
    if not adapter:
        return save_model(model, folder, source=s.checkpoint_dir)
    peft_format.save_adapter(model, adapter, folder, s.checkpoint_dir)
    return {}


def show_progress(bar, row):
    bar.set_postfix_str(
        f"loss {row['loss']:.3f}, lr {row['learning_rate']:.1e}, {row['tokens_per_second']:,.0f} tok/s, "
        f"padding {row['padding']:.0%}, {row['memory_gb']:.2f} GB"
        + (f", val loss {row['val_loss']:.3f} (perplexity {row['val_perplexity']:.2f})" if "val_loss" in row else ""),
        refresh=False,
    )
    bar.update()
    if "val_loss" in row:
        bar.write(f"step {bar.n}: validation loss {row['val_loss']:.4f}, perplexity {row['val_perplexity']:.3f}")


if __name__ == "__main__":
    cli.run(main, settings)
