"""Peak memory by part, FLOPs and time of a training step, predicted before it is run and without weights.

The model's own code runs on fake tensors, which have a shape, a dtype and a device but no memory (torch's
FakeTensorMode), under `Allocations` (allocations.py), which adds up what would be allocated. So nothing here knows how
a block or the loss is written. Of equal blocks in a row two are traced, and the second stands for the others. What
torch.compile would fuse (--compile) still counts.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import lora
import model as model_file
import quantize
from ops import attention, devices, dtypes, rope
from ops.forks import Forks
from training.from_settings import train_only
from training.memory.allocations import Allocations, trace_step
from training.offload import GRADIENT_BYTES, STATE_BYTES, buffer_bytes
from training.optimizer import moment_bytes
from training.parallel.part import Part, without_head
from weights.beside import train_beside

if TYPE_CHECKING:
    from batching import Samples

aten = torch.ops.aten
HOST = "host memory"  # no part of the device's
PARTS = ("weights", "adapters", "gradients", "moments", "saved activations", "working set", "loss")
TRACED_BLOCKS = 2  # of equal ones in a row: the input of the very first may need no gradient, so it keeps less
GATHERED_BLOCKS = 3  # by --shard: the one that runs, the next one, and the buffer in which that comes
TOKEN_STEP = 64  # of micro_batch_tokens, between which a budget decides
CUDA_BLOCK = 512  # bytes to whose multiples CUDA's caching allocator rounds
# Assumed, not measured here: what a process takes on a card beside its tensors (context and kernels, holes between
# tensors), and what the driver and a desktop leave it.
CUDA_OVERHEAD = 600e6
# Measured: what a process on a CPU takes at most beside its imports and its tensors (pages of libraries first used in
# training, compiled products, small blocks, and 32 MiB that the allocator keeps): 0.11 to 0.23 GB for SmolLM2-135M on
# GSM8K with 8 to 256 samples in a step, with LoRA and all weights, bf16, fp32 and NF4 (docs/memory.md).
CPU_OVERHEAD = 250e6


def sum_of_losses(model: model_file.Transformer, x: Tensor, targets: Tensor) -> Tensor:
    """The loss of --objective sft for what the head gets, x (B, T, E), and targets (B, T)."""
    return model.target_losses(x, targets)[0]


@dataclass(frozen=True)
class Job:
    """What decides a step's memory, beside the shapes of its micro-batches.

    device: "cpu" or "cuda"; "meta" stands for a CUDA device that this machine lacks. Attention is what it is there, but
        for FlexAttention, which torch cannot trace: `ops.attention.flex_stand_in` takes its place.
    dtype: of the weights. autocast: dtype of the products under torch.autocast, or None.
    quantize: as `quantize.read_quantization` returns it. adapter: a `lora.AdapterConfig`, None to train the weights;
        then train: only those with such names, as --train has them; None for all.
    optimizer, recompute, betas, apollo_rank: as in finetune.py.
    tensor: how many devices have a part of each layer; the plan is for the one with the largest. shares: among how many
        --shard divides weights, gradients and states. stages: how many a pipeline has; stage: which one it is.
    loss: a scalar of the model, of what its head gets (B, T, E) and of the targets (B, T), as
        `objectives.Objective.traced_loss`.
    gradients: "kept" from earlier micro-batches of a step, "new" if it has only one, "freed" one by one if the
        optimiser steps in the backward pass, "none" if there is no backward pass but two forward passes (MeZO).
    offload: "optimizer" if AdamW is in host memory, where `gradients` are then, too; else None.

    Of a CPU, host memory is the device's; of a CUDA device it is counted by itself.
    """

    config: model_file.Config
    device: str
    dtype: torch.dtype
    autocast: torch.dtype | None = None
    quantize: str | dict | None = None
    adapter: lora.AdapterConfig | None = None
    train: tuple[str, ...] | None = None
    optimizer: str = "adamw"
    recompute: float | Literal["offload"] = 0.0
    gradients: str = "kept"
    offload: str | None = None
    betas: tuple[float | None, float | None] = (0.9, 0.999)
    apollo_rank: int = 256
    loss: Callable[[model_file.Transformer, Tensor, Tensor], Tensor] = sum_of_losses
    tensor: int = 1
    shares: int = 1
    stages: int = 1
    stage: int = 0

    @property
    def in_stage(self) -> Part:
        """Which of the layers there are in this stage, and whether embedding and head."""
        return Part(self.config, stage=self.stage, stages=self.stages)


@dataclass(frozen=True)
class Shape:
    """A micro-batch: rows of T positions of which `targets` have a target. offsets: of samples in one packed row."""

    rows: int
    T: int
    targets: int
    offsets: tuple | Forks | None = None

    @property
    def positions(self) -> int:
        """All positions, padding included."""
        return self.rows * self.T


def packed_shape(positions: int, length: int, targets: int) -> Shape:
    """A packed row of samples that are `length` long, but for the last."""
    return Shape(1, positions, targets, (*range(0, positions, length), positions))


# --------------------------------------------------------------------------------------- a model of fake tensors


class NoRandomness(TorchDispatchMode):
    """Leaves out filling tensors with random numbers, which fake tensors of some missing devices refuse."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation, unless it fills a tensor with random numbers."""
        return args[0] if func in (aten.uniform_.default, aten.normal_.default) else func(*args, **(kwargs or {}))


@contextlib.contextmanager
def fake_tensors(mode: FakeTensorMode, device: str) -> Iterator[None]:
    """Tensors created inside are fake. Caches of functions are cleared, so that a real run finds no fake ones."""
    modules = (model_file, attention, devices, dtypes, rope, lora, quantize)
    cached = {f for module in modules for f in vars(module).values() if hasattr(f, "cache_clear")}
    autocast = torch.is_autocast_enabled
    with contextlib.ExitStack() as stack:
        for function in cached:
            function.cache_clear()
            stack.callback(function.cache_clear)
        stack.enter_context(mode)
        if device == "meta":  # of which autocast knows nothing, and says so with an error
            answer = lambda kind: kind != "meta" and autocast(kind)  # noqa: E731
            stack.enter_context(patch.object(torch, "is_autocast_enabled", answer))
        yield


def chosen_parts(job: Job) -> list[str]:
    """In the whole model of `job`, the names of the modules that get an adapter, or of the parameters that train."""
    with torch.device("meta"):
        model = model_file.Transformer(job.config)
    if job.adapter:
        return lora.places(model, job.adapter)
    train_only(model, job.train)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def chosen_in_block(job: Job, names: list[str], number: int) -> tuple:
    """Those of the names that are in block `number`, in a form that is equal for blocks that have the same ones.

    With the ranks of adapters, and the modules beside them that train whole.
    """
    start, config = f"{quantize.BLOCKS}{number}.", job.adapter
    here = [name for name in names if name.startswith(start)]
    whole = [name for name in (config.save if config else ()) if name.startswith(start)]
    ranks = [config and config.rank(name) for name in here] + [None] * len(whole)
    return tuple(zip((name.removeprefix(start) for name in here + whole), ranks, strict=True))


class Kind(NamedTuple):
    """What decides what a block takes: its part of the config, and what the job does with it."""

    config: tuple
    recomputed: bool
    quantizers: tuple
    chosen: tuple


def build(job: Job, numbers: Sequence[int]) -> model_file.Transformer:
    """The model of `job` with only those of its blocks that have these numbers; to be called in `fake_tensors`."""
    here = {number: place for place, number in enumerate(numbers)}

    def in_whole_model(name):
        return re.sub(r"(?<=^model\.layers\.)\d+", lambda place: str(numbers[int(place[0])]), name)

    def in_this_model(name):
        block = re.match(r"model\.layers\.(\d+)\.", name)
        if block is None:
            return name
        number = here.get(int(block[1]))
        return None if number is None else f"{quantize.BLOCKS}{number}.{name[block.end() :]}"

    stage = job.in_stage
    config = (job.config if stage.is_last else without_head(job.config)).of_layers(numbers)
    part = Part(config, job.tensor - 1, job.tensor)
    with torch.device("meta"):
        model, whole = part.model(), Part(config).model()
        stage.leave_out_ends(model)
    for name, parameter in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        tensor = torch.empty(parameter.shape, dtype=job.dtype, device=job.device)
        linear = leaf == "weight" and isinstance(module, nn.Linear) and path.startswith(quantize.BLOCKS)
        if linear and (quantizer := quantize.quantizer_of(job.quantize, in_whole_model(path))):
            parent, _, leaf = path.rpartition(".")
            cut = {"cut": part.cut(path, whole.get_submodule(path).weight.shape)} if job.tensor > 1 else {}
            setattr(model.get_submodule(parent), leaf, quantizer(tensor, module.bias, **cut))
        else:
            setattr(module, leaf, nn.Parameter(tensor))
    model.tie_weights()
    model.hidden_dtype = job.dtype  # also where no embedding is
    if not stage.is_first:
        arrive_from_nowhere(model, job)
    names = {own: name for name in chosen_parts(job) if stage.has(name) and (own := in_this_model(name)) is not None}
    if job.adapter:
        with NoRandomness():
            lora.wrap(model, job.adapter, [*names], [*names.values()])
            train_beside(model, job.adapter, called=in_whole_model)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
    return model.train()


def arrive_from_nowhere(model: model_file.Transformer, job: Job) -> None:
    """Let hidden states be there without an embedding, as they arrive at a later stage of a pipeline."""
    dtype, width = model.block_dtype(torch.device(job.device)), job.config.hidden_size

    def embed(tokens, positions, noise=None):
        shape, trains = (*tokens.shape, width), torch.is_grad_enabled()
        return torch.empty(shape, dtype=dtype, device=tokens.device, requires_grad=trains)

    model.embed = embed


def gradient_arrives(model: model_file.Transformer, x: Tensor, targets: Tensor) -> Tensor:
    """In the place of a loss: a scalar whose backward pass begins with a gradient of x, as the next stage sends it."""
    return (x * torch.empty_like(x)).sum()


def parameter_bytes(module: nn.Module, job: Job, elsewhere: Collection[int] = ()) -> Counter:
    """What a module holds all the time, in bytes by part, without activations. HOST: in host memory.

    elsewhere: the ids of tensors that do not count, because another module that is counted has them too.
    """
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in elsewhere]
    frozen = sum(tensor.nbytes for tensor in tensors if not tensor.requires_grad)
    frozen += sum(layer.nbytes() for layer in quantize.quantized_layers(module))
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad and id(p) not in elsewhere]
    training = sum(p.nbytes for _, p in trainable)
    if job.offload:
        of_element = STATE_BYTES + (0 if job.gradients == "freed" else GRADIENT_BYTES)
        return Counter({"weights": frozen + training, HOST: of_element * sum(p.numel() for _, p in trainable)})
    return Counter(
        {
            "weights": frozen + (0 if job.adapter else training),
            "adapters": training if job.adapter else 0,
            "gradients": training if job.gradients == "kept" else 0,
            "moments": moment_bytes(job, trainable, job.device),
        }
    )


# ------------------------------------------------------------------------------------------------------- predicting


def kinds_of_blocks(job: Job, chosen: list[str]) -> dict[int, Kind]:
    """Of each block of the stage of `job`, by its number, what decides what it takes: equal blocks take the same.

    chosen: its `chosen_parts`.
    """
    layers, config = job.in_stage.layers, job.config.kinds_of_layers()
    recomputed = len(layers) if job.recompute == "offload" else round(job.recompute * len(layers))
    return {
        number: Kind(
            config[number],
            place < recomputed,
            quantize.quantizers_in_block(job.quantize, number),
            chosen_in_block(job, chosen, number),
        )
        for place, number in enumerate(layers)
    }


class Predictor:
    """Predicts for a `Job` the peak memory and the FLOPs of micro-batches. Every shape is traced once."""

    def __init__(self, job: Job):
        kinds, self.layers = kinds_of_blocks(job, chosen_parts(job)), job.in_stage.layers
        runs = [list(run) for _, run in itertools.groupby(kinds, key=kinds.get)]  # numbers of equal blocks
        traced = [number for run in runs for number in run[:TRACED_BLOCKS]]
        last = itertools.accumulate(len(run[:TRACED_BLOCKS]) for run in runs)  # of each run, counted from 1
        more = [len(run) - TRACED_BLOCKS for run in runs]
        self.left_out = {end - 1: count for end, count in zip(last, more, strict=True) if count > 0}
        recomputed = sum(kinds[number].recomputed for number in traced)
        share = job.recompute if job.recompute == "offload" else recomputed / len(traced)
        loss = job.loss if job.in_stage.is_last else gradient_arrives
        self.job = dataclasses.replace(job, recompute=share, loss=loss)
        self.traces = {}
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with fake_tensors(self.mode, job.device):
            self.model = build(job, traced)
        self.fixed = parameter_bytes(self.model, job)
        for number, count in self.left_out.items():
            before = self.model.model["layers"][number - 1]  # an equal one: an adapter may share tensors among layers
            shared = {id(tensor) for tensor in (*before.parameters(), *before.buffers())}
            block = parameter_bytes(self.model.model["layers"][number], job, shared)
            self.fixed.update({part: count * nbytes for part, nbytes in block.items()})
        if job.shares > 1:
            self._divide()
        self.host = self.fixed.pop(HOST, 0) + self._host_working_bytes()
        if job.device == "cpu":  # there it is all one memory
            self.fixed["moments"] += self.host

    def _divide(self):
        """Leave a device's share of what --shard divides, and add what is gathered at one time.

        That is embedding, norm and head from the beginning to the end of a micro-batch; the block that runs, the one
        that is fetched meanwhile, and the buffer it comes in. Gradients of these are whole too, until they are shared,
        and those of embedding, norm and head are copied for that.
        """
        blocks = [parameter_bytes(block, self.job) for block in self.model.model.layers]
        stored = [sum(block[part] for part in ("weights", "adapters")) for block in blocks]
        inside = {id(tensor) for tensor in self.model.model.layers.parameters()}
        outside = [p for p in self.model.parameters() if id(p) not in inside]
        gathered = sum(p.nbytes for p in outside) + GATHERED_BLOCKS * max(stored)
        training = [sum(p.nbytes for p in block.parameters() if p.requires_grad) for block in self.model.model.layers]
        gradients = 2 * sum(p.nbytes for p in outside if p.requires_grad) + GATHERED_BLOCKS * max(training)
        self.fixed = Counter({part: -(-nbytes // self.job.shares) for part, nbytes in self.fixed.items()})
        self.fixed["working set"] += gathered + gradients

    def _host_working_bytes(self):
        """What --offload optimizer takes in host memory beside states and gradients that stay."""
        if not self.job.offload:
            return 0
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        one = GRADIENT_BYTES * max(p.numel() for p in trainable) if self.job.gradients == "freed" else 0
        return buffer_bytes(trainable, pinned=self.job.device != "cpu") + one

    def trace(self, shape: Shape) -> tuple[Counter, int, int]:
        """Of a micro-batch: bytes by part at the peak of all blocks, the FLOPs of all, and bytes in host memory."""
        if shape not in self.traces:
            rounding = 1 if self.job.device == "cpu" else CUDA_BLOCK
            allocations = Allocations(shape.targets, rounding, self.job.device)
            with fake_tensors(self.mode, self.job.device):
                tokens = torch.empty((shape.rows, shape.T), dtype=torch.int64, device=self.job.device)
                offsets = shape.offsets if isinstance(shape.offsets, Forks) else shape.offsets and list(shape.offsets)
                blocks = trace_step(self.model, (tokens, tokens, offsets), allocations, self.job, self.left_out)
            more = sum(count * blocks[number][1] for number, count in self.left_out.items())
            # Of the blocks' inputs, which are of one size, the trace has seen those of the traced blocks.
            parked = allocations.host_peak * len(self.layers) // len(self.model.model["layers"])
            at_peak, flops = allocations.at_peak, allocations.flops + more
            if self.job.gradients == "none":  # nothing is saved, and there are two passes
                at_peak["working set"] += at_peak.pop("saved activations", 0)
                flops *= 2
            at_peak["saved activations"] *= self.job.stages - self.job.stage  # micro-batches that wait for the others
            self.traces[shape] = at_peak, flops, parked
        return self.traces[shape]

    def parts(self, shape: Shape) -> Counter:
        """Bytes by part at the peak of a step, with micro-batches of `shape`."""
        return self.fixed + self.trace(shape)[0]

    def peak(self, shape: Shape) -> int:
        """Bytes at the peak of a step, with micro-batches of `shape`."""
        return self.parts(shape).total()

    def host_peak(self, shape: Shape) -> int:
        """Bytes of host memory that a CUDA device uses at the peak of a step, with micro-batches of `shape`."""
        return 0 if self.job.device == "cpu" else self.host + self.trace(shape)[2]

    def flops(self, shape: Shape) -> int:
        """FLOPs of a micro-batch, forward and backward, or twice forward."""
        return self.trace(shape)[1]


def different_stages(job: Job) -> list[int]:
    """The first and the last stage of a pipeline, and of those between that have the same blocks the first.

    That one keeps the activations of the most micro-batches.
    """
    found, chosen = {}, chosen_parts(job)
    for stage in range(1, job.stages - 1):
        kinds = kinds_of_blocks(dataclasses.replace(job, stage=stage), chosen)
        found.setdefault((*kinds.values(),), stage)
    return sorted({0, job.stages - 1, *found.values()})


class Stages:
    """Predicts as `Predictor` does, for the stage of a pipeline that takes most.

    Mostly that is the first one, with the embedding and the activations of as many micro-batches as there are stages,
    or the last one, with the head. One between them may have larger blocks.
    """

    def __init__(self, job: Job):
        self.stages = [Predictor(dataclasses.replace(job, stage=stage)) for stage in different_stages(job)]

    def parts(self, shape: Shape) -> Counter:
        """Bytes by part at the peak of a step."""
        return max((stage.parts(shape) for stage in self.stages), key=Counter.total)

    def peak(self, shape: Shape) -> int:
        """Bytes at the peak of a step."""
        return self.parts(shape).total()

    def host_peak(self, shape: Shape) -> int:
        """Bytes of host memory that a CUDA device uses at the peak of a step."""
        return max(stage.host_peak(shape) for stage in self.stages)

    def flops(self, shape: Shape) -> int:
        """FLOPs of a micro-batch, forward and backward."""
        return max(stage.flops(shape) for stage in self.stages)


def predictor_of(job: Job) -> Predictor | Stages:
    """What predicts for the device that takes most."""
    return Stages(job) if job.stages > 1 else Predictor(job)


# ------------------------------------------------------------------------------------------------ shapes and budgets


def sample_lengths(shape: Shape) -> list[int]:
    """How many positions each sample of a micro-batch takes, padding included."""
    if shape.offsets is None:
        return [shape.T] * shape.rows
    offsets = shape.offsets.offsets() if isinstance(shape.offsets, Forks) else shape.offsets
    return [b - a for a, b in itertools.pairwise(offsets)]


def shape_of(samples: Samples, layout: Callable, indices: list[int]) -> Shape:
    """The shape of the micro-batch of these samples. layout: a `batching.Planner`'s."""
    tokens, _, offsets = layout(samples, indices)
    offsets = offsets if offsets is None or isinstance(offsets, Forks) else tuple(offsets)
    return Shape(*tokens.shape, samples.target_counts[indices].sum().item(), offsets)


def worst(shapes: Iterable[Shape]) -> Shape:
    """Of many micro-batches the one with the highest peak. Positions decide: targets and lengths add about 1%."""
    return max(shapes, key=lambda shape: (shape.positions, shape.targets, max(sample_lengths(shape))))


def step_flops(predictor: Predictor | Stages, shapes: list[Shape]) -> float:
    """FLOPs of all these micro-batches, from one of about their mean size, cut into samples of one length.

    Attention takes the square of a sample's length, so the mean of lengths is one over positions, not over samples.
    """
    positions = sum(shape.positions for shape in shapes)
    length = round(sum(length**2 for shape in shapes for length in sample_lengths(shape)) / positions)
    samples = max(
        1, round(positions / len(shapes) / length)
    )  # whole ones: in a part of one, attention would be cheaper
    share = samples * length / positions
    targets = round(share * sum(shape.targets for shape in shapes))
    return predictor.flops(packed_shape(samples * length, length, targets)) / share


def full_shape(samples: Samples, positions: int) -> Shape:
    """The most expensive micro-batch of so many positions: every sample is as long as the longest of `samples`,

    and has as large a share of targets as any of them.
    """
    listing = samples.shards.listing
    targets, length = math.ceil(positions * listing.largest_share), samples.longest()
    if samples.rows_per_sample > 1:  # pairs, which have whole samples in attention beside the row
        return forked_shape(positions, samples.packed([listing.longest_sample])[2], targets)
    return packed_shape(positions, length, targets)


def forked_shape(positions: int, forks: Forks, targets: int) -> Shape:
    """A packed row of so many samples like the one in `forks` as fit into `positions`, one at least."""
    times = max(1, positions // forks.offsets()[-1])
    forks = Forks(times * forks.beginnings, times * forks.ends)
    return Shape(1, forks.offsets()[-1], targets, forks)


def largest_micro_batch(predictor: Predictor | Stages, samples: Samples, most_rows: int, budget: float) -> int:
    """The largest micro_batch_tokens whose peak, whatever the samples, stays within `budget` bytes; 0 if none does.

    most_rows: samples in a step. The answer is the longest sample's length or more, in steps of TOKEN_STEP.
    """
    longest, largest = samples.longest(), min(samples.positions(), most_rows * samples.longest())
    choices = range(longest, largest + TOKEN_STEP, TOKEN_STEP)
    fitting = bisect.bisect_right(choices, budget, key=lambda n: predictor.peak(full_shape(samples, n)))
    return choices[fitting - 1] if fitting else 0


# --------------------------------------------------------------------------------------------------------- the plan


def describe(
    job: Job, steps: list[list[Shape]], flops_per_second: float, source: str, total: int, idle: float = 0.0
) -> str:
    """The plan as text: peak memory by part, FLOPs and time of a step, time of the run.

    steps: the `Shape`s of the micro-batches of some steps. source: where `flops_per_second` comes from. total: steps of
    the run. idle: the share of a step in which a device waits for others.
    """
    predictor, shapes = predictor_of(job), [shape for shapes in steps for shape in shapes]
    shape = worst(shapes)
    parts = predictor.parts(shape)
    flops = step_flops(predictor, shapes) / len(steps)
    seconds = flops / flops_per_second / (1 - idle)
    part = " for a part of the model" if job.tensor * job.stages > 1 else ""
    largest = f"{len(sample_lengths(shape))} samples in {shape.positions} positions, {shape.targets} of them targets"
    lines = [
        f"{largest}, take the most memory:",
        *(f"  {part:18} {parts[part] / 1e9:9.3f} GB" for part in PARTS),
        f"  {'together':18} {parts.total() / 1e9:9.3f} GB",
        f"{flops / 1e12:.4g} TFLOP a step{part}: {seconds:.3g} s, {seconds * total / 60:.3g} min for {total} steps,",
    ]
    if host := predictor.host_peak(shape):
        lines.insert(-1, f"  {'host memory':18} {host / 1e9:9.3f} GB beside that, pinned or of the optimiser")
    if job.device == "cpu":
        lines.insert(-1, f"The process takes up to {CPU_OVERHEAD / 1e9:.2f} GB beside these tensors and its imports.")
    lines[-1] += f" at {flops_per_second / 1e12:.3g} TFLOP/s ({source}); a real step reaches a part of that speed"
    return "\n".join(lines)
