"""Which piece of each parameter a device has, and whole tensors made of the pieces of all.

A piece is a box of the whole parameter: tensor parallelism cuts it along one dimension, FSDP what is left of it along
its rows. All devices know all boxes, so that a tensor can be put together wherever it is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.parallel.part import Place
from training.parallel.ranks import Ranks, local

Box = tuple[tuple[int, int], ...]  # along each dimension: from, to before


def box_of(parameter: Tensor, place: Place) -> Box:
    """Which box of the whole parameter this device has. parameter: its part along tensor, maybe sharded by FSDP."""
    box = [(0, size) for size in parameter.shape]
    if place.dim is not None:
        box[place.dim] = place.start, place.stop
    if hasattr(parameter, "placements") and box:
        start, stop = rows_here(parameter)
        box[0] = box[0][0] + start, box[0][0] + stop
    return tuple(box)


def rows_here(parameter: Tensor) -> tuple[int, int]:
    """The rows of a parameter that FSDP has given this device: from, to before."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return offset[0], offset[0] + shape[0]


def take(tensor: Tensor, box: Box) -> Tensor:
    """The box of a whole tensor."""
    return tensor[tuple(slice(*each) for each in box)]


class Source(NamedTuple):
    """A device that has a box of a tensor, the first of those that have the same."""

    rank: int
    box: Box


class Pieces:
    """Where the pieces of all parameters are. Made by all devices together."""

    def __init__(self, model: nn.Module, ranks: Ranks):
        self.ranks, self.parameters = ranks, dict(model.named_parameters())
        self.device = next(iter(self.parameters.values())).device
        boxes = {name: box_of(p, ranks.part.place(name)) for name, p in self.parameters.items()}
        every = [None] * ranks.layout.world_size
        dist.all_gather_object(every, (boxes, {name: p.dtype for name, p in self.parameters.items()}))
        self.sources: dict[str, list[Source]] = {}
        self.dtypes: dict[str, torch.dtype] = {}  # of all parameters, also of those that are elsewhere
        for rank, (boxes, dtypes) in enumerate(every):
            self.dtypes |= dtypes
            for name, box in boxes.items():
                known = self.sources.setdefault(name, [])
                if box not in [source.box for source in known] and all(stop > start for start, stop in box):
                    known.append(Source(rank, box))

    def gather(
        self,
        wanted: Iterable[tuple[str, int]],
        piece: Callable[[str], Tensor | None],
        layout: dict[str, tuple[torch.dtype, tuple]],
        of: Callable[[str], str] = lambda name: name,
    ) -> Iterator[Tensor | None]:
        """For each pair of a name and its owner, a device, the whole tensor there and None elsewhere.

        All devices call this alike. piece: what this device has for a name: its parameter, or a state of that shape.
        layout: dtype and whole shape by name. of: the parameter whose pieces those of a name lie like. A few pairs are
        under way at one time: so owners should take turns. Then all send and receive at once, as NCCL would wait for
        ever where two devices first send to each other.
        """
        for pairs in _rounds(wanted, self.ranks.layout.world_size):
            exchange = _Exchange(self.ranks.rank, self.device)
            wholes = []
            for name, owner in pairs:
                sources = self.sources[of(name)]
                exchange.send(sources, owner, lambda name=name: piece(name))
                mine = owner == self.ranks.rank
                wholes.append(exchange.receive(sources, lambda name=name: piece(name), *layout[name]) if mine else None)
            exchange.run()
            yield from wholes


class _Exchange:
    """What a device sends to others and receives from them at one time."""

    def __init__(self, rank, device):
        self.rank, self.device = rank, device
        self.operations, self.copies = [], []

    def send(self, sources, owner, piece):
        """Send what the owner needs of this device."""
        for _ in [each for each in sources if each.rank == self.rank != owner]:
            self.operations.append(dist.P2POp(dist.isend, local(piece()).detach().contiguous(), owner))

    def receive(self, sources, piece, dtype, shape):
        """The whole tensor, whose boxes are filled by `run`."""
        whole = torch.empty(shape, dtype=dtype, device=self.device)
        for rank, box in sources:
            target = take(whole, box)
            if rank == self.rank:
                target.copy_(local(piece()).detach())
                continue
            received = target if target.is_contiguous() else torch.empty(target.shape, dtype=dtype, device=self.device)
            self.operations.append(dist.P2POp(dist.irecv, received, rank))
            self.copies.append((target, received))
        return whole

    def run(self):
        """Wait until all is sent and received."""
        for request in dist.batch_isend_irecv(self.operations) if self.operations else ():
            request.wait()
        for target, received in self.copies:
            if received is not target:
                target.copy_(received)


def _rounds(wanted, size):
    """Lists of `size` pairs, the last one shorter."""
    wanted = list(wanted)
    return [wanted[i : i + size] for i in range(0, len(wanted), size)]
