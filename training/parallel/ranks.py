"""This process among the others of a run: its place in the layout, and what is added up over whom."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from batching import PLANNERS, Samples, Step
from training.parallel.layout import DIMENSIONS, Layout
from training.parallel.part import Part
from training.parallel.shard import give_back
from training.parallel.sharing import share_out, surplus
from training.parallel.stages import Link
from training.steps import looked_at
from weights.checkpoint import read_config

if TYPE_CHECKING:
    from pathlib import Path

    from torch.distributed.device_mesh import DeviceMesh

    from training.settings import Settings

BUCKET = 25 * 2**20  # bytes of gradients that are added up at one time
IN_FP64 = 2**20  # numbers that are copied in fp64 at one time, as a norm on a CPU does
STEPS_LOOKED_AT = 100  # for how evenly they are shared out


@dataclass
class Ranks:
    """This process in its layout. Of a run on one device nothing here does anything.

    mesh: torch's, of the dimensions of the layout; None on one device. part: of the model. link: to the other stages.
    kv_group: the processes along tensor that have the same keys and values, if there are others. ends_group: the first
    and the last stage, if both have the embedding.
    """

    layout: Layout = field(default_factory=Layout)
    rank: int = 0
    mesh: DeviceMesh | None = None
    part: Part | None = None
    kv_group: Any = None
    ends_group: Any = None
    link: Link | None = None

    @property
    def stage(self) -> int:
        """The place along pipeline: which of the layers are this device's."""
        return self.layout.place(self.rank).pipeline

    @property
    def data_rank(self) -> int:
        """The place along data: which of the samples are this device's."""
        return self.layout.place(self.rank).data

    @property
    def tensor_rank(self) -> int:
        """The place along tensor: which part of the layers this device has."""
        return self.layout.place(self.rank).tensor

    def group(self, dimension: str) -> Any:
        """torch's process group of the devices along a dimension that differ in nothing else."""
        return self.mesh.get_group(dimension)

    def share(self, s: Settings, micro_batches: Step, samples: Samples) -> Step:
        """The micro-batches of this device, of those of a step or a validation."""
        return self.shares(s, micro_batches, samples)[self.data_rank]

    def shares(self, s: Settings, micro_batches: Step, samples: Samples) -> list[Step]:
        """The micro-batches of each device along data."""
        data, stages = self.layout.data, self.layout.pipeline
        if data == stages == 1:
            return [micro_batches]
        planner = PLANNERS[s.planner]
        padded = planner.layout is Samples.padded
        least = stages if stages > 1 else 0
        return share_out(
            micro_batches, planner.lengths(samples), s.micro_batch_tokens, data, self.layout.shard, padded, least
        )

    def describe(self, s: Settings, samples: Samples) -> str:
        """How the devices are divided, and how evenly the tokens of the first steps are, in words."""
        if self.layout.data == 1:
            return self._division()
        steps = itertools.islice(looked_at(s, samples), STEPS_LOOKED_AT)
        found = surplus([self.shares(s, step, samples) for step in steps], PLANNERS[s.planner].lengths(samples))
        division = self._division()
        each = f", for each of which {division}" if division else ""
        return (
            f"{self.layout.data} shares of each step's tokens{each}: the largest has {found.mean:.1%} more than the "
            f"mean, {found.worst:.1%} at the worst"
        )

    def _division(self):
        """How the devices that have the same samples divide the model, in words."""
        stages, tensor = self.layout.pipeline, self.layout.tensor
        layer = f"{tensor} devices share each layer" if tensor > 1 else ""
        if stages == 1:
            return layer
        return f"the layers are in {stages} stages" + (f", {layer}" if layer else "")

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of the devices' numbers, over the samples of all. The last stage's count: it has the losses."""
        if self.layout.data > 1 or self.layout.pipeline > 1:
            numbers = numbers.clone() if self.part.is_last else torch.zeros_like(numbers)
        for dimension in ("data", "pipeline"):
            if getattr(self.layout, dimension) > 1:
                dist.all_reduce(numbers, group=self.group(dimension))
        return numbers

    def all_sum(self, numbers: Tensor) -> Tensor:
        """The sum of the numbers of all devices, whatever they share."""
        if self.layout.world_size > 1:
            numbers = numbers.clone()
            dist.all_reduce(numbers)
        return numbers

    def give_back(self, model: nn.Module) -> None:
        """After passes without a backward one: keep nothing that was gathered, as weights may change, or sent on."""
        if self.layout.shard:
            give_back(model)
        if self.link:
            self.link.flush()

    # ------------------------------------------------------------------------------------------------------ gradients

    def sum_gradients(self, model: nn.Module) -> None:
        """Make the gradient of each weight that of the whole step. A device without a micro-batch adds zeros.

        FSDP has added up those of what it shards, over data.
        """
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for _, parameter in trained if self.layout.world_size > 1 else ():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.layout.data > 1 and not self.layout.shard:
            add_up([p.grad for _, p in trained], self.group("data"))
        if self.part and (self.layout.tensor > 1 or self.layout.pipeline > 1):
            groups = {"tensor": self.group("tensor"), "kv": self.kv_group, "ends": self.ends_group}
            for summed, group in groups.items():
                add_up([local(p.grad) for name, p in trained if self.part.place(name).summed == summed], group)

    def clip_gradients(self, model: nn.Module, most: float) -> Tensor:
        """The norm of the gradient, a scalar; then it is clipped to `most`. For models that are divided."""
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        squares = [self._square(name, p) for name, p in trained]
        norm = self.all_sum(torch.stack(squares).sum()).sqrt().float()
        if most < math.inf:
            factor = (most / (norm + 1e-6)).clamp(max=1.0)
            for _, parameter in trained:
                local(parameter.grad).mul_(factor.to(parameter.dtype))
        return norm

    def _square(self, name, parameter):
        """The sum of the squares of a gradient, of what is counted at this device and no other."""
        pieces = local(parameter.grad).flatten().split(IN_FP64)
        square = sum(torch.linalg.vector_norm(piece, dtype=torch.float64).square() for piece in pieces)
        return square if self.counts(name) else torch.zeros_like(square)

    def counts(self, name: str) -> bool:
        """Whether this device is the first of those that have the same numbers of a parameter."""
        if self.data_rank and not self.layout.shard:
            return False
        place = self.part.place(name)
        if place.summed == "ends" and not self.part.is_first:
            return False
        if place.dim is not None:
            return place.summed != "kv" or self.tensor_rank % self.part.sharers == 0
        return self.tensor_rank == 0 or ".experts." in name


def local(tensor: Tensor) -> Tensor:
    """The numbers of a tensor that are here: all of it, or the piece that FSDP has given this device."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def add_up(tensors: list[Tensor], group: Any) -> None:
    """Replace tensors by their sums over a process group: many small ones at one time, a large one where it is."""
    for bucket in _buckets(tensors):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.all_reduce(bucket[0], group=group)
            continue
        flat = torch.cat([each.flatten() for each in bucket])
        dist.all_reduce(flat, group=group)
        for each, summed in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
            each.copy_(summed.view_as(each))


def _buckets(tensors):
    """Neighbours of one dtype, together no larger than BUCKET, or alone."""
    bucket, size = [], 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def make_ranks(layout: Layout, checkpoint_dir: Path, device: torch.device) -> Ranks:
    """The `Ranks` of this process, after torch's process group was made. checkpoint_dir: of the whole model."""
    if layout.world_size == 1:
        return Ranks()
    from torch.distributed.device_mesh import init_device_mesh

    rank = dist.get_rank()
    here = layout.place(rank)
    mesh = init_device_mesh(
        device.type, (layout.pipeline, layout.data, layout.tensor), mesh_dim_names=DIMENSIONS
    )  # fmt: skip
    part = Part(read_config(checkpoint_dir), here.tensor, layout.tensor, here.pipeline, layout.pipeline)
    ranks = Ranks(layout, rank, mesh, part)
    if layout.pipeline > 1:
        ranks.link = Link(here.pipeline, layout.pipeline, ranks.group("pipeline"))
        # NCCL connects a group when it is first used, for which all of its devices must come, not two that send.
        dist.all_reduce(torch.zeros(1, device=device), group=ranks.group("pipeline"))
    if part.sharers > 1:
        ranks.kv_group = _group_of(rank, layout, lambda place: (*place[:2], place.tensor // part.sharers))
    if part.config.tie_word_embeddings and layout.pipeline > 1:
        ends = 0, layout.pipeline - 1
        ranks.ends_group = _group_of(rank, layout, lambda place: place.pipeline in ends and place[1:])
    return ranks


def _group_of(rank, layout, key):
    """The process group of those whose places have the same key as this device's; None if that is False."""
    members, found = {}, None
    for other in range(layout.world_size):
        members.setdefault(key(layout.place(other)), []).append(other)
    for ranks in (members[key] for key in members if key is not False):
        group = dist.new_group(ranks)  # every process takes part in making every group
        found = group if rank in ranks else found
    return found
