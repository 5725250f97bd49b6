"""What each device of a layout sends in a step, by calculation: for --plan, and to propose the fastest that fits.

The messages are those that a step hands to torch.distributed: tests/training/test_messages.py counts them, and finds
these bytes. What a device sends of a message is a convention, that of rings (Patarasuk and Yuan 2009): of a sum over n
devices 2 (n - 1) / n of its bytes, of what is gathered or shared out (n - 1) / n. Times are as if nothing were sent
while a device computes. Left out are single numbers (losses, norms), DoRA's row norms over tensor, and the means of a
norm over all heads together.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from quantize import BLOCKS
from training.memory import plan
from training.parallel.layout import Layout
from training.parallel.part import Part
from training.parallel.ranks import BUCKET
from training.parallel.shard import as_parameters

RING = {"sum": 2.0, "gather": 1.0, "share out": 1.0}  # times (n - 1) / n
TRACED = 64  # positions of the row that is traced


class Message(NamedTuple):
    """So many bytes that `count` devices along a dimension add up, gather or share out together, `times` in a step.

    Or that one of them passes on to the next. over: "kv" stands for those along tensor that have the same keys and
    values, "ends" for the first and the last stage of a pipeline. nbytes: of the whole, as one device
    would have it; a mean where messages differ.
    """

    what: Literal["gradients", "weights", "activations"]
    kind: Literal["sum", "gather", "share out", "pass on"]
    over: Literal["data", "tensor", "kv", "pipeline", "ends"]
    count: int
    nbytes: float
    times: int

    def sent(self) -> float:
        """The bytes that each device sends of all of them."""
        return self.times * sent_in_ring(self.kind, self.count, self.nbytes)


def sent_in_ring(kind: str, count: int, nbytes: float) -> float:
    """The bytes that each of `count` devices sends of a message of so many bytes."""
    return nbytes if kind == "pass on" else RING[kind] * (count - 1) / count * nbytes


class Traffic(NamedTuple):
    """Bytes that a device sends in a step: gradients, weights over data, activations over tensor and pipeline."""

    gradients: float
    weights: float
    activations: float

    def seconds(self, link: float) -> float:
        """How long that takes at so many bytes a second."""
        return sum(self) / link


def traffic(job: plan.Job, layout: Layout, passes: int, positions: float) -> Traffic:
    """The `Traffic` of a run whose devices have so many micro-batches in a step, of so many positions together."""
    stages = plan.different_stages(dataclasses.replace(job, stages=layout.pipeline))
    found = [messages(dataclasses.replace(job, stage=stage), layout, passes, positions) for stage in stages]
    most = max(found, key=lambda messages: sum(m.sent() for m in messages))
    return Traffic(*(sum(m.sent() for m in most if m.what == what) for what in Traffic._fields))


# ----------------------------------------------------------------------------------------------------------- messages


def messages(job: plan.Job, layout: Layout, passes: int, positions: float) -> list[Message]:
    """The messages of a step, of the device of this stage that has the largest part along tensor. As for `traffic`."""
    if layout.world_size == 1:
        return []
    gradients, loss = "none" if job.gradients == "none" else "kept", plan.sum_of_losses  # no objective sends anything
    job = dataclasses.replace(
        job, tensor=layout.tensor, stages=layout.pipeline, shares=1, gradients=gradients, loss=loss
    )  # fmt: skip
    predictor = plan.Predictor(job)
    found = []
    if layout.data > 1 and not layout.shard:
        found += _in_buckets("data", layout.data, predictor.fixed["gradients"])
    if layout.splits:
        seen = _watch(predictor)
        if layout.shard:
            found += _of_shards(predictor, seen, layout, passes)
        if layout.tensor > 1:
            found += _of_activations(predictor, seen, layout, passes, positions)
        if layout.pipeline > 1:
            found += _of_stages(predictor, layout, passes, positions)
        found += _of_what_is_alike(predictor, layout)
    return [message for message in found if message.nbytes]


class _Seen:
    """Of a block in a micro-batch of `TRACED` positions: bytes of what leaves attention and the MLP going forward, each

    time, of what enters them and has a gradient, and whether the backward pass goes through the block.
    """

    def __init__(self):
        self.leaving: list[int] = []
        self.entering: dict[nn.Module, int] = {}
        self.passed = False

    def watch(self, block):
        """Hooks on a block, as `tensor.connect` has them."""
        for module in (block.self_attn, block.mlp):
            yield module.register_forward_pre_hook(self.enter)
            yield module.register_forward_hook(self.leave)
        yield block.register_forward_hook(self.end)

    def enter(self, module, args):
        """A gradient is added up once, even if what it is of is computed again."""
        self.entering.setdefault(module, args[0].nbytes if args[0].requires_grad else 0)

    def leave(self, module, args, result):
        self.leaving.append((result[0] if isinstance(result, tuple) else result).nbytes)

    def end(self, block, args, result):
        self.passed |= (result[0] if isinstance(result, tuple) else result).requires_grad


def _watch(predictor):
    """What is seen of each block of a model of fake tensors, when it trains on a micro-batch."""
    blocks = predictor.model.model["layers"]
    seen = [_Seen() for _ in blocks]
    handles = [handle for one, block in zip(seen, blocks, strict=True) for handle in one.watch(block)]
    predictor.trace(plan.packed_shape(TRACED, TRACED, TRACED))
    for handle in handles:
        handle.remove()
    return seen


def _parameters(predictor) -> Iterator[tuple[int | None, int, dict[str, Tensor]]]:
    """The number of each traced block, for how many blocks it stands, and its parameters; last, as None, all others."""
    for number, block in enumerate(predictor.model.model["layers"]):
        yield number, 1 + predictor.left_out.get(number, 0), dict(block.named_parameters())
    yield None, 1, {name: p for name, p in predictor.model.named_parameters() if not name.startswith(BLOCKS)}


def _of_shards(predictor, seen, layout, passes):
    """A block is gathered for each pass through it, all else once forward and kept; gradients are shared out.

    While a block goes backward FSDP fetches the one before it, also where no gradient goes further: so one more.
    """
    with plan.fake_tensors(predictor.mode, predictor.job.device):
        as_parameters(predictor.model)
    count = layout.data
    first = next((number for number, block in enumerate(seen) if block.passed), 0)
    for number, alike, parameters in _parameters(predictor):
        stored = count * sum(_in_rows(p, count) for p in parameters.values())
        trained = count * sum(_in_rows(p, count) for p in parameters.values() if p.requires_grad)
        times = alike * (2 if number is not None and seen[number].passed else 1) + (number == first - 1)
        yield Message("weights", "gather", "data", count, stored, times * passes)
        yield Message("gradients", "share out", "data", count, trained, alike * passes)


def _in_rows(parameter, count):
    """The bytes that the first of `count` devices has of a parameter that is divided by its rows: the most."""
    rows = parameter.shape[0]
    return math.ceil(rows / count) * (parameter.nbytes // rows)


def _in_buckets(over, count, nbytes):
    """Sums of many gradients at one time (`ranks.add_up`)."""
    times = math.ceil(nbytes / BUCKET)
    return [Message("gradients", "sum", over, count, nbytes / times, times)] if times else []


def _of_activations(predictor, seen, layout, passes, positions):
    """What leaves attention and the MLP of each block, and the gradients of what enters them."""
    for number, alike, _ in _parameters(predictor):
        for nbytes in () if number is None else (*seen[number].leaving, *seen[number].entering.values()):
            in_pass = nbytes / TRACED * positions / passes
            yield Message("activations", "sum", "tensor", layout.tensor, in_pass, alike * passes)


def _of_stages(predictor, layout, passes, positions):
    """Hidden states to the next stage, and their gradients back to the one before."""
    job = predictor.job
    width = job.config.hidden_size * predictor.model.block_dtype(torch.device(job.device)).itemsize
    times = passes * ((not job.in_stage.is_last) + (not job.in_stage.is_first))
    yield Message("activations", "pass on", "pipeline", layout.pipeline, positions / passes * width, times)


def _of_what_is_alike(predictor, layout):
    """Gradients of what several devices have alike, where each finds a part of them."""
    job = predictor.job
    in_block, outside = Part(job.config, layout.tensor - 1, layout.tensor), job.in_stage
    sizes = {"tensor": 0, "kv": 0, "ends": 0}
    for number, alike, parameters in _parameters(predictor):
        for name, parameter in parameters.items():
            summed = (outside if number is None else in_block).place(name).summed
            if parameter.requires_grad and summed:
                here = _in_rows(parameter, layout.data) if layout.shard else parameter.nbytes
                sizes[summed] += alike * here
    counts = {"tensor": layout.tensor, "kv": in_block.sharers, "ends": 2}
    return [message for over, nbytes in sizes.items() for message in _in_buckets(over, counts[over], nbytes)]


# ------------------------------------------------------------------------------------------------------------- layouts


def divisions(world_size: int, devices: int) -> Iterator[dict]:
    """The flags of each layout of so many devices, `devices` of them on a node, beyond which tensor does not go."""
    for pipeline, tensor in itertools.product(range(1, world_size + 1), range(1, devices + 1)):
        if world_size % (pipeline * tensor) == 0 and devices % tensor == 0:
            sizes = {"pipeline": pipeline, "data": world_size // (pipeline * tensor), "tensor": tensor}
            for shard in (False, True) if sizes["data"] > 1 else (False,):
                parallel = ",".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
                yield {"parallel": parallel, "shard": shard}


class Proposal(NamedTuple):
    """A layout by its flags, a device's peak in bytes, --micro_batch_tokens, and a step's seconds: all, and sending."""

    flags: dict
    peak: float
    tokens: int
    seconds: float
    sending: float

    def layout(self) -> str:
        """Its flags as on the command line."""
        return f"--parallel {self.flags['parallel']}" + " --shard" * self.flags["shard"]

    def row(self, budget: float, width: int, with_tokens: bool) -> str:
        """A line of a table. width: of its first column. with_tokens: whether it is to have --micro_batch_tokens."""
        fits = "" if self.peak <= budget else "  does not fit"
        tokens = f" --micro_batch_tokens {self.tokens:<7}" * with_tokens
        step = f"{self.seconds:9.3g} s a step, {self.sending:8.3g} of it sending"
        return f"  {self.layout():{width}}{tokens} {self.peak / 1e9:8.2f} GB {step}{fits}"


def table(proposals: list[Proposal], budget: float) -> str:
    """Their rows. Those whose micro-batches were chosen to fit show of how many tokens they are."""
    with_tokens = len({each.tokens for each in proposals}) > 1
    width = max((len(each.layout()) for each in proposals), default=0)
    return "\n".join(each.row(budget, width, with_tokens) for each in proposals)


def fastest(proposals: list[Proposal], budget: float) -> Proposal | None:
    """Of those that fit the one with the shortest step; None if none fits."""
    return min((each for each in proposals if each.peak <= budget), key=lambda each: each.seconds, default=None)


def passes_of(shapes: list[plan.Shape], layout: Layout) -> int:
    """How many micro-batches a device has, of those of a step: one for each stage at least."""
    return max(layout.pipeline, math.ceil(len(shapes) / layout.data))


def idle(layout: Layout, steps: list[list[plan.Shape]]) -> float:
    """The share of a step in which a device of a pipeline waits for others, on average."""
    turns = [passes_of(shapes, layout) + layout.pipeline - 1 for shapes in steps]
    return sum((layout.pipeline - 1) / each for each in turns) / len(turns)
