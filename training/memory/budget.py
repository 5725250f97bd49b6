"""From finetune.py's settings to the memory of the run: its steps, their `plan.Job`, the largest micro-batch that fits.

`s` is always the Settings of finetune.py, `train` and `samples` are `batching.Samples`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import sys
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from batching import PLANNERS
from objectives import OBJECTIVES
from quantize import bitsandbytes, describe_quantization
from shell import cli
from shell.cli import UserError
from training.from_settings import DTYPES, adapter_config, autocast_dtype, base_quantization
from training.memory import layouts, machine, plan
from training.metrics import peak_memory, start_measuring
from training.optimizer import OPTIMIZERS, build_optimizer, moment_bytes
from training.parallel.layout import Layout, layout_of
from training.parallel.loading import check_division
from training.parallel.part import check_quantized
from training.steps import LOOKED_AT, looked_at, planned_steps, steps_per_epoch, total_steps
from training.teacher import common_vocabulary, likeliest, teacher_dtype
from weights.checkpoint import read_config

if TYPE_CHECKING:
    from batching import Samples
    from training.settings import Settings

RECOMPUTED = (0.0, 0.25, 0.5, 0.75, 1.0, "offload")  # what --plan tries, for the first one that fits
OUT_OF_MEMORY = re.compile("can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED|std::bad_alloc")  # in a plain RuntimeError


# ------------------------------------------------------------------------------------------------------ predictions


def plan_job(s: Settings, gradients: str = "kept") -> plan.Job:
    """The `plan.Job` of this run."""
    config, layout = read_config(s.checkpoint_dir), layout_of(s)
    adapter = None if s.method == "full" else adapter_config(s, config)
    if layout.splits:
        check_quantized(config, layout.tensor, s.quantize)
    if OPTIMIZERS[s.optimizer].gradient == "forward":
        gradients = "none"
    elif s.optimizer_in_backward or (s.offload and not s.max_grad_norm and gradients == "new"):
        gradients = "freed"
    return plan.Job(
        config=config,
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=DTYPES[s.precision],
        autocast=autocast_dtype(s),
        quantize=base_quantization(s, adapter, config),
        adapter=adapter,
        train=s.train and tuple(s.train),
        optimizer=s.optimizer,
        recompute=s.recompute,
        gradients=gradients,
        offload=s.offload,
        betas=s.betas,
        apollo_rank=s.apollo_rank,
        loss=OBJECTIVES[s.objective](s).traced_loss,
        tensor=layout.tensor,
        shares=layout.data if layout.shard else 1,
        stages=layout.pipeline,
    )


def teacher_peak(s: Settings, train: Samples) -> int:
    """Predicted bytes at the peak of the teacher's reading, before the model to train is there; 0 without one."""
    if s.teacher_dir is None:
        return 0
    tokens = common_vocabulary(s)
    how = min(s.teacher_top_k, tokens), tokens, s.teacher_temperature

    def likeliest_sum(model, x, targets):
        return likeliest(model, x, targets, *how)[1].sum()

    job = plan.Job(
        read_config(s.teacher_dir), plan_job(s).device, teacher_dtype(s), quantize=s.teacher_quantize,
        gradients="none", optimizer="mezo", loss=likeliest_sum,
    )  # fmt: skip
    return plan.Predictor(job).peak(plan.full_shape(train.without_virtual_tokens(), s.micro_batch_tokens))


def planned_job(s: Settings, train: Samples) -> tuple[plan.Job, list[list[plan.Shape]]]:
    """The `plan.Job` of this run, and the shapes of the micro-batches of its first steps, up to an epoch of those that

    `looked_at` has.
    """
    layout, first = PLANNERS[s.planner].layout, itertools.islice(looked_at(s, train), steps_per_epoch(s, train))
    steps = [[plan.shape_of(train, layout, rows) for rows in step] for step in first]
    kept = s.shard or any(len(shapes) > 1 for shapes in steps)  # by FSDP in shares, which are there for as long
    return plan_job(s, "kept" if kept else "new"), steps


def predicted_peak(s: Settings, train: Samples) -> int:
    """Predicted bytes at the peak of the run, or of the teacher's reading before it."""
    job, steps = planned_job(s, train)
    own = plan.predictor_of(job).peak(plan.worst([shape for shapes in steps for shape in shapes]))
    return max(own, teacher_peak(s, train))


def largest_planned_micro_batch(s: Settings, samples: Samples) -> tuple[list[int], int]:
    """The micro-batch with the highest peak of the run, as sample numbers, and the most micro-batches of a step.

    Of a run of many steps it is the largest of the first ones, `looked_at`, and of the longest sample by itself: what
    a planner fills to the budget hardly differs, and a sample that exceeds it is never joined by another.
    """
    packed, padded, most = (0, 0, []), (0, 0, []), 0  # the largest by either way to count: positions, targets, samples
    for step in itertools.chain(looked_at(s, samples), longest_alone(s, samples)):
        most = max(most, len(step))
        for indices in step:
            lengths, targets = samples.lengths[indices], samples.target_counts[indices].sum().item()
            packed = max(packed, (lengths.sum().item(), targets, indices))
            rows = samples.rows_per_sample * len(indices)
            padded = max(padded, (rows * samples.row_lengths[indices].max().item(), targets, indices))
    layout = PLANNERS[s.planner].layout
    shapes = {plan.shape_of(samples, layout, indices): indices for _, _, indices in (packed, padded)}
    return shapes[plan.worst(shapes)], most


def longest_alone(s: Settings, samples: Samples) -> Iterator[list[list[int]]]:
    """A step of the longest sample, if it exceeds the budget by itself, and the run may come to it."""
    longest = samples.shards.listing.longest_sample
    few = total_steps(s, samples) <= LOOKED_AT
    if not few and not samples.shards.stream and samples.longest() > s.micro_batch_tokens:
        yield [[longest]]


def memory_of_later_steps(
    s: Settings, model: nn.Module, optimizer: torch.optim.Optimizer, gradients: bool
) -> list[Tensor]:
    """Allocate what later micro-batches find allocated, and the first does not: AdamW's moments.

    With --offload optimizer there is nothing: it allocates its states when it is made.
    Returns tensors of their size, to be held while a micro-batch runs. With `gradients`, those of earlier micro-batches
    too: zeros in their place.
    """
    if s.offload:
        return []
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for _, parameter in trainable if gradients and OPTIMIZERS[s.optimizer].gradient == "backward" else ():
        parameter.grad = torch.zeros_like(parameter)
    missing = [(name, parameter) for name, parameter in trainable if not optimizer.state.get(parameter)]
    return [
        torch.empty(moment_bytes(s, [(name, p)], p.device.type), dtype=torch.uint8, device=p.device)
        for name, p in missing
    ]


# ------------------------------------------------------------------------------------------------------------ what fits


def most_that_fits(s: Settings, train: Samples) -> tuple[int, float]:
    """The largest micro_batch_tokens that fit in the budget (0: none do), and the budget in bytes."""
    job = plan_job(s)
    given = s.memory_budget and cli.number_of_bytes(s.memory_budget, "memory_budget")
    overhead = plan.CPU_OVERHEAD if job.device == "cpu" else plan.CUDA_OVERHEAD
    budget = given or machine.free_memory(job.device) - overhead
    return plan.largest_micro_batch(plan.predictor_of(job), train, s.global_batch_size, budget), budget


def choose_micro_batch(s: Settings, train: Samples) -> None:
    """Make --micro_batch_tokens a number if it is "auto"."""
    if s.micro_batch_tokens != "auto":
        return
    s.micro_batch_tokens, budget = most_that_fits(s, train)
    if not s.micro_batch_tokens:
        hint = "raise --recompute, or see --plan" if len(more_recomputed(s)) > 2 else "see --plan"
        raise UserError(f"the longest sample does not fit in {budget / 1e9:.2f} GB: {hint}")
    print(f"--micro_batch_tokens {s.micro_batch_tokens}: the most that fits in {budget / 1e9:.2f} GB", file=sys.stderr)
    s.memory_budget = None  # it has done its work: a run from this one's config.yaml takes the number


def check_micro_batches(s: Settings, train: Samples) -> None:
    """Refuse steps of several micro-batches with --optimizer_in_backward: the second would find the weights changed."""
    if not s.optimizer_in_backward or s.global_batch_size * train.padded_longest() <= s.micro_batch_tokens:
        return
    steps = planned_steps(s, train, 0, total_steps(s, train))  # all of them: it takes as long as it takes
    if train.shards.stream or any(len(micro_batches) > 1 for _, micro_batches in steps):
        raise UserError(
            f"--optimizer_in_backward: {s.global_batch_size} samples may not always fit {s.micro_batch_tokens} "
            "positions; raise --micro_batch_tokens or lower --global_batch_size"
        )


def more_recomputed(s: Settings) -> list[float | str]:
    """This --recompute and, of `RECOMPUTED`, those that keep less on the device."""
    if s.recompute == "offload" or OPTIMIZERS[s.optimizer].gradient == "forward":  # which keeps nothing anyway
        return [s.recompute]
    return [s.recompute, *(share for share in RECOMPUTED if share == "offload" or share > s.recompute)]


def described(value: float | str) -> str:
    """The value of a flag as on the command line."""
    return value if isinstance(value, str) else f"{value:g}"


def check_host_memory(s: Settings, train: Samples) -> None:
    """Raise UserError if host memory has no room for what a run on a GPU keeps there; Linux would kill the process."""
    if not s.offload and s.recompute != "offload":
        return
    job, steps = planned_job(s, train)
    need = s.devices * plan.predictor_of(job).host_peak(plan.worst([shape for shapes in steps for shape in shapes]))
    free = machine.free_memory("cpu")
    if need > free:
        flags = ["--offload optimizer"] * bool(s.offload) + ["--recompute offload"] * (s.recompute == "offload")
        raise UserError(f"{' and '.join(flags)}: {need / 1e9:.3g} GB of host memory are needed, {free / 1e9:.3g} free")


def print_plan(s: Settings, train: Samples, model: nn.Module) -> None:
    """Print for --plan what fits in the budget, if there is one, then the prediction for the run.

    With several devices and a budget, but no layout, the fastest that fits is proposed and planned.
    model: the whole one without memory, ready to train.
    """
    if s.memory_budget and s.devices * s.nodes > 1 and not (s.parallel or s.shard) and not propose(s, train, model):
        return
    if s.memory_budget or s.micro_batch_tokens == "auto":
        for recompute in more_recomputed(s):
            s.recompute = recompute
            tokens, budget = most_that_fits(s, train)
            fits = f"at most --micro_batch_tokens {tokens} fit" if tokens else "the longest sample does not fit"
            print(f"in {budget / 1e9:.2f} GB with --recompute {described(recompute)} {fits}")
            if tokens:
                break
        if not tokens:
            return
        s.micro_batch_tokens = tokens
    job, steps = planned_job(s, train)
    rate, source = device_rate(s, job)
    layout = layout_of(s)
    if layout.data > 1 and (s.plan_tflops or job.device == "cuda"):  # processes on a CPU share its cores
        rate, source = rate * layout.data, f"{source}, times {layout.data} devices"
    base = describe_quantization(s.quantize) if s.quantize else s.precision
    print(
        f"--method {s.method} on {base}, --micro_batch_tokens {s.micro_batch_tokens} "
        f"--recompute {described(s.recompute)}, {job.device}"
    )
    print(plan.describe(job, steps, rate, source, total_steps(s, train), layouts.idle(layout, steps)))
    if layout.world_size > 1:
        print(describe_traffic(s, job, layout, steps))
    if s.teacher_dir:
        peak = teacher_peak(s, train) / 1e9
        print(f"The teacher takes {peak:.3f} GB to read the data, before this model is loaded.")


def device_rate(s: Settings, job: plan.Job) -> tuple[float, str]:
    """FLOP/s of a device, as --plan_tflops says or as measured here, and which of both, in words."""
    if s.plan_tflops:
        return s.plan_tflops * 1e12, "--plan_tflops"
    return machine.measured_flops(job.device, job.autocast or job.dtype), "measured in matrix products"


def describe_traffic(s: Settings, job: plan.Job, layout: Layout, steps: list[list[plan.Shape]]) -> str:
    """What each device sends in a step of a layout, and how long that takes, in words."""
    found = traffic_of_step(job, layout, steps)
    parts = ", ".join(f"{name} {nbytes / 1e9:.3g}" for name, nbytes in found._asdict().items() if nbytes)
    idle = f"Each device is idle for {layouts.idle(layout, steps):.0%} of a step.\n" if layout.pipeline > 1 else ""
    return (
        f"{idle}Each device sends {sum(found) / 1e9:.3g} GB a step ({parts}): "
        f"{found.seconds(s.plan_link * 1e9):.3g} s at {s.plan_link:g} GB/s (--plan_link), "
        "if nothing is computed meanwhile."
    )


def traffic_of_step(job: plan.Job, layout: Layout, steps: list[list[plan.Shape]]) -> layouts.Traffic:
    """The mean of some steps' `layouts.Traffic`, at each device."""
    passes = max(layouts.passes_of(shapes, layout) for shapes in steps)
    positions = sum(shape.positions for shapes in steps for shape in shapes) / len(steps) / layout.data
    return layouts.traffic(job, layout, passes, positions)


def propose(s: Settings, train: Samples, model: nn.Module) -> bool:
    """Print for each layout of the devices what it holds and sends, and let `s` have the fastest that fits.

    Returns whether one does. model: the whole one, ready to train.
    """
    budget, found = cli.number_of_bytes(s.memory_budget, "memory_budget"), []
    rate, _ = device_rate(s, plan_job(s))
    for flags in layouts.divisions(s.devices * s.nodes, s.devices):
        with contextlib.suppress(UserError):  # the model, or another flag, does not go with it
            own = dataclasses.replace(s, **flags)
            check_division(own, model)
            found.append(proposal(own, flags, train, budget, rate))
    print(f"{s.devices * s.nodes} devices of {budget / 1e9:.2f} GB, by calculation:")
    print(layouts.table(found, budget))
    chosen = layouts.fastest(found, budget)
    if chosen is None:
        print("no layout fits: see --recompute, --quantize and --micro_batch_tokens, or more --devices")
        return False
    s.parallel, s.shard = chosen.flags["parallel"], chosen.flags["shard"]
    print(f"the fastest that fits: {chosen.layout()}")
    return True


def proposal(s: Settings, flags: dict, train: Samples, budget: float, rate: float) -> layouts.Proposal:
    """What becomes of a run in the layout of these flags, which `s` has too. rate: FLOP/s of a device."""
    layout = layout_of(s)
    if s.micro_batch_tokens == "auto":
        s.micro_batch_tokens = most_that_fits(s, train)[0] or train.longest()
    job, steps = planned_job(s, train)
    predictor, shapes = plan.predictor_of(job), [shape for shapes in steps for shape in shapes]
    computing = plan.step_flops(predictor, shapes) / len(steps) / rate / layout.data
    computing /= 1 - layouts.idle(layout, steps)
    sending = traffic_of_step(job, layout, steps).seconds(s.plan_link * 1e9)
    peak = predictor.peak(plan.worst(shapes))
    return layouts.Proposal(flags, peak, s.micro_batch_tokens, computing + sending, sending)


# -------------------------------------------------------------------------------------------------------- out of memory


@contextlib.contextmanager
def explained_out_of_memory(s: Settings, train: Samples, device: torch.device) -> Iterator[None]:
    """Turn running out of memory inside into a UserError that says what was needed, what was free, and what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not OUT_OF_MEMORY.search(str(error)):
            raise
        taken, free, asked = peak_memory(device), machine.free_memory(device.type), asked_bytes(str(error))
        more = f"{asked / 1e9:.3g} GB" if asked else "some"
        traceback.clear_frames(error.__traceback__)  # which hold the activations: planning needs a little memory too
        raise UserError(
            f"out of memory: {taken / 1e9:.3g} GB were taken, {more} more asked for, {free / 1e9:.3g} GB free; "
            + suggestions(s, train, free + taken)
        ) from None


def asked_bytes(message: str) -> float | None:
    """The bytes that an allocator says it could not allocate, None if it does not say."""
    match = re.search(r"(?:tried to|to) allocate (\d+(?:\.\d+)?) (bytes|[KMG]iB)", message, re.IGNORECASE)
    return match and float(match[1]) * {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[match[2]]


def suggestions(s: Settings, train: Samples, available: float) -> str:
    """At most three changes that lower the predicted peak of the run, each with the peak it leads to, in words.

    available: bytes that the largest micro-batch should fit in, if a smaller one can.
    """
    indices, most = largest_planned_micro_batch(s, train)
    shape, longest = plan.shape_of(train, PLANNERS[s.planner].layout, indices), train.longest()
    gradients = "kept" if most > 1 else "new"

    def peak(shape, **flags):
        return plan.predictor_of(plan_job(dataclasses.replace(s, **flags), gradients)).peak(shape)

    now, changes = peak(shape), {}
    if longest < shape.positions and not s.optimizer_in_backward:
        predictor, tokens = plan.predictor_of(plan_job(s)), max(longest, shape.positions // 2)
        while tokens > longest and predictor.peak(plan.full_shape(train, tokens)) > available:
            tokens = max(longest, tokens // 2)
        changes[f"--micro_batch_tokens {tokens}"] = predictor.peak(plan.full_shape(train, tokens))
    flags = [("recompute", 1.0), ("optimizer", "adamw-8bit") if s.method == "full" else ("quantize", "bnb.nf4-dq")]
    if plan_job(s).device != "cpu":  # whose memory is that of the host
        flags += [("recompute", "offload"), ("offload", "optimizer")]
    for flag, value in flags:
        with contextlib.suppress(UserError):  # it does not go with another flag of the run
            if flag != "recompute" or value in more_recomputed(s):
                changes[f"--{flag} {described(value)}"] = peak(shape, **{flag: value})
    half = max(1, longest // 2)
    shorter = plan.Shape(1, half, min(half, shape.targets))
    if shape.positions == longest:
        changes[f"prepare_data.py --max_seq_length {half + 1}"] = peak(shorter)
    effects = [f"{change} ({after / 1e9:.3g} GB)" for change, after in changes.items() if after < 0.99 * now]
    if not effects:
        return f"the plan predicts a peak of {now / 1e9:.3g} GB, and no flag lowers it: take a smaller model"
    return f"instead of a predicted peak of {now / 1e9:.3g} GB: " + ", ".join(effects[:3])


# ------------------------------------------------------------------------------------------------ memory of the process


def memory_before(s: Settings, device: torch.device) -> int:
    """Bytes that the process takes before the model is built, with imports that come later: they are no training."""
    if s.quantize:
        bitsandbytes()
    if layout_of(s).pipeline > 1:
        from torch.distributed import pipelining  # noqa: F401
    build_optimizer(s, nn.ParameterList([torch.zeros(2, 2)]))  # which imports what it needs
    return start_measuring(device)
