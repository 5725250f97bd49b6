"""Checkpoints and final/ of a model that is divided, in the very formats of a run on one device.

So a run goes on with any number of devices, and what it leaves is a model or an adapter like any other. A model is
written by all devices at the same time: they take turns in putting a tensor together from the pieces of all, and each
writes its own to a file. Adapters are small: the first device writes them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from shell.files import new_folder
from training.optimizer import parameter_groups
from training.parallel.pieces import Pieces, box_of, take
from training.parallel.ranks import Ranks, local
from weights import peft_format
from weights.checkpoint import (
    OPTIMIZER,
    load_optimizer,
    parameters_of,
    state_layout,
    write_beside_weights,
    write_shard,
    write_state_numbers,
)
from weights.names import Names
from weights.stored import INDEX

if TYPE_CHECKING:
    from lora import AdapterConfig
    from model import Transformer
    from training.settings import Settings

Layout = dict[str, tuple[torch.dtype, tuple]]


@contextlib.contextmanager
def shared_folder(ranks: Ranks, path: Path, hashes: dict[str, str]) -> Iterator[Path]:
    """As `files.new_folder`, for all devices: each may write files, with other names than the others' have.

    It has its name when the last of them leaves the block.
    """
    with new_folder(path, hashes) if ranks.rank == 0 else contextlib.nullcontext() as folder:
        name = [folder and str(folder)]
        dist.broadcast_object_list(name)
        yield Path(name[0])
        every = [None] * ranks.layout.world_size
        dist.all_gather_object(every, hashes)
        for known in every:
            hashes |= known
    dist.barrier()


class Divided(NamedTuple):
    """A model that no device has whole: the whole one with its adapters, without memory, and where its pieces are."""

    whole: Transformer
    pieces: Pieces
    ranks: Ranks

    def shapes(self, chosen: Callable[[str], bool] = lambda name: True) -> Layout:
        """dtype and whole shape of the chosen parameters by name."""
        known = self.pieces.dtypes
        return {n: (known[n], tuple(p.shape)) for n, p in self.whole.named_parameters() if n in known and chosen(n)}


def save_adapter(divided: Divided, config: AdapterConfig, folder: Path, base_model: Path) -> None:
    """As `peft_format.save_adapter`. All devices call it, the first one writes."""
    whole, pieces = divided.whole, divided.pieces
    layout = divided.shapes(is_of_adapter)
    gathered = pieces.gather([(name, 0) for name in layout], pieces.parameters.get, layout)
    tensors = dict(zip(layout, gathered, strict=True))
    if divided.ranks.rank:
        return
    for name, tensor in tensors.items():
        _put(whole, name, tensor.cpu())
    peft_format.save_adapter(whole, config, folder, base_model)
    for name, tensor in tensors.items():
        _put(whole, name, tensor.to("meta"))


def is_of_adapter(name: str) -> bool:
    """Whether a parameter is one of an adapter that can be divided."""
    return name.rpartition(".")[2].startswith("lora_")


def _put(model, name, tensor):
    path, _, leaf = name.rpartition(".")
    trains = model.get_parameter(name).requires_grad
    setattr(model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=trains))


def save_model(divided: Divided, folder: Path, source: Path) -> dict[str, str]:
    """As `checkpoint.save_model`, with a file for each device. Returns the hash of this device's file."""
    whole, pieces, names = divided.whole, divided.pieces, Names(divided.whole.config)
    layout = divided.shapes()
    units = names.theirs([*layout])
    count = min(divided.ranks.layout.world_size, len(units))
    owners = {unit: i % count for i, unit in enumerate(units)}
    in_files = {}
    for unit, ours in units.items():
        shape = names.join(unit, ours, [torch.empty(layout[name][1], device="meta") for name in ours]).shape
        in_files[unit] = layout[ours[0]][0], tuple(shape)
    files = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if divided.ranks.rank == 0:
        total = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in in_files.values())
        weight_map = {unit: files[owner] for unit, owner in owners.items()}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (folder / INDEX).write_text(text + "\n")
        write_beside_weights(whole, folder, source)
    return _write(
        divided, [folder / name for name in files], units, owners, pieces.parameters.get, layout, in_files, names.join
    )


def save_optimizer(divided: Divided, s: Settings, optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, str]:
    """As `checkpoint.save_optimizer`: in one file with adapters, else with a file for each device."""
    called = {id(parameter): name for name, parameter in divided.pieces.parameters.items()}
    numbers_of = {name: number for number, name in enumerate(state_order(s, divided.whole))}
    states, every = {}, [None] * divided.ranks.layout.world_size
    for parameter in parameters_of(optimizer):
        for key, value in optimizer.state[parameter].items():
            states[f"{numbers_of[called[id(parameter)]]}.{key}"] = value
    dist.all_gather_object(every, {key: _description(value) for key, value in states.items()})
    described = {key: value for each in every for key, value in each.items()}
    parameters, shapes = [*numbers_of], divided.shapes()

    def of(key):
        return parameters[int(key.partition(".")[0])]

    layout = {
        key: (value, shapes[of(key)][1]) if isinstance(value, torch.dtype) else (value.dtype, tuple(value.shape))
        for key, value in described.items()
        if torch.is_tensor(value) or isinstance(value, torch.dtype)
    }
    layout = state_layout(layout)
    count = 1 if s.method != "full" else min(divided.ranks.layout.world_size, max(1, len(layout)))
    files = [
        folder / (OPTIMIZER if count == 1 else f"optimizer-{i + 1:05d}-of-{count:05d}.safetensors")
        for i in range(count)
    ]
    if divided.ranks.rank == 0:
        write_state_numbers(folder, {key: v for key, v in described.items() if key not in layout})
    owners = {key: i % count for i, key in enumerate(layout)}
    known = {key: value for key, value in described.items() if torch.is_tensor(value)}  # the same on all devices

    def join(key, keys, tensors):
        return known[key] if key in known else tensors[0]

    units = {key: [] if key in known else [key] for key in layout}
    return _write(divided, files, units, owners, states.get, layout, layout, join, of)


def _description(value):
    """Of a state, for the others: its dtype if it has a number for each of the parameter's, else the state itself."""
    return value.dtype if torch.is_tensor(value) and value.dim() else value


def _write(divided, files, units, owners, piece, layout, in_files, join, of=lambda name: name):
    """Let each owner write its units to its file. Returns the hash of this device's, by its name.

    units: of each tensor in a file the names of those that it is made of, by `join`.
    """
    rank = divided.ranks.rank
    wanted = [(name, owners[unit]) for unit, names in units.items() for name in names]
    gathered = divided.pieces.gather(wanted, piece, layout, of)
    turns = iter(units.items())

    def read(_):
        for unit, names in turns:
            tensors = [next(gathered) for _ in names]
            if owners[unit] == rank:
                return join(unit, names, tensors)
        raise AssertionError("a file has more tensors than its owner")

    own = {unit: in_files[unit] for unit in units if owners[unit] == rank}
    hashes = {}
    if rank < len(files):
        hashes[files[rank].name] = write_shard(files[rank], own, read)
    for _ in gathered:  # what the others still need of this device
        pass
    return hashes


def state_order(s: Settings, whole: Transformer) -> list[str]:
    """The names of the parameters that train, in the order of the optimiser of a run on one device."""
    return [name for group in parameter_groups(s, whole) for name, _ in group["params"]]


def load_states(divided: Divided, s: Settings, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Of the optimiser's states at a checkpoint, of any number of devices, what this device has pieces of."""
    here, part = divided.pieces.parameters, divided.ranks.part
    names = {id(parameter): name for name, parameter in here.items()}

    def own(parameter, value):
        if value.dim() != parameter.dim() or not value.dim():
            return value
        piece = take(value, box_of(parameter, part.place(names[id(parameter)])))
        if not hasattr(parameter, "placements"):
            return piece.to(parameter.device, copy=True).contiguous()  # fused steps do not look at strides
        state = torch.zeros_like(parameter, dtype=value.dtype).detach()
        local(state).copy_(piece)
        return state

    load_optimizer(optimizer, folder, [here.get(name) for name in state_order(s, divided.whole)], own)
