"""What a teacher finds likely at each target of the data, computed once and kept: for --objective distill.

Before the first step the teacher reads all samples, and only then the model to train is loaded: the two are never in
memory together. Of each target the teacher's --teacher_top_k likeliest tokens are kept beside the prepared data, in
`teacher-HASH.safetensors`, memory-mapped: `train.ids` (N, k) int32, from the likeliest on, and `train.logps` (N, k + 1)
fp32, the log-probabilities of these tokens and of all others together; the same of `val`. N counts the targets of all
samples in their order. Where k is the whole vocabulary there are no others. The hash is of the teacher, the data, the
temperature, k, and how the teacher is stored. The file can be made on another machine and copied.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from batching import PLANNERS, Batch, Samples, in_order
from objectives import logps_of
from ops.devices import to_device
from ops.loss import LOSS_CHUNK
from shell.cli import UserError
from shell.files import whole_file
from shell.progress import bar
from text.tokenizer import Tokenizer
from training.from_settings import autocast_dtype
from weights.checkpoint import load_model, read_config
from weights.safetensors_format import encode_header, read_tensors

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from model import Transformer
    from training.build import Data
    from training.settings import Settings

TYPES = {"ids": ("I32", np.int32), "logps": ("F32", np.float32)}  # of the file, by safetensors' name and numpy's


class Teacher(NamedTuple):
    """What the teacher knows of a part of the data: ids (N, k), logps (N, k + 1 or k), and where each sample begins."""

    ids: Tensor
    logps: Tensor
    starts: Tensor

    def of_sample(self, i: int) -> tuple[Tensor, Tensor]:
        """Its ids and logps at the targets of sample i."""
        place = slice(self.starts[i], self.starts[i + 1])
        return self.ids[place], self.logps[place]


# --------------------------------------------------------------------------------------------------------- checking


def check_teacher(s: Settings, data: Data) -> None:
    """Raise UserError if --teacher_dir cannot teach on these data; done before any weight is read."""
    if s.teacher_dir is None:
        return
    where = f"--teacher_dir {s.teacher_dir}"
    if (s.teacher_dir / "adapter_config.json").is_file():
        raise UserError(f"{where} is an adapter: make it a model with convert_hf_checkpoint.py --adapter_dir")
    config = read_config(s.teacher_dir)
    if Tokenizer(s.teacher_dir).file_hash() != data.info["tokenizer_hash"]:
        raise UserError(f"{where} has another tokenizer than {s.data_dir}: a teacher must know tokens by the same ids")
    parts = [part.without_virtual_tokens() for part in (data.train, data.val) if len(part)]
    longest = max(part.longest_row() for part in parts)
    if longest > config.max_position_embeddings:
        raise UserError(
            f"{s.data_dir} has a sample of {longest} tokens, the teacher's context is {config.max_position_embeddings}"
        )
    largest = max(part.shards.listing.largest_token for part in parts)
    if largest >= config.vocab_size:
        raise UserError(
            f"{s.data_dir} has the token {largest}, the teacher's vocabulary ends at {config.vocab_size - 1}"
        )


def kept_at(s: Settings, identity: dict) -> Path:
    """Where what this teacher knows of the data is kept. identity: as of `run_folder.identity`."""
    same = {name: value for name, value in identity.items() if name.startswith(("data", "teacher"))}
    how = [s.teacher_top_k, s.teacher_temperature, s.teacher_quantize, str(teacher_dtype(s)), common_vocabulary(s)]
    text = json.dumps([same, how])
    return s.data_dir / f"teacher-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"


def teacher_dtype(s: Settings) -> torch.dtype:
    """The dtype of the teacher's weights: what the student's are multiplied in."""
    return torch.bfloat16 if s.precision == "bf16-true" else autocast_dtype(s) or torch.float32


def common_vocabulary(s: Settings) -> int:
    """How many tokens both models have. What one has beyond it are rows that no text uses."""
    return min(read_config(folder).vocab_size for folder in (s.teacher_dir, s.checkpoint_dir))


# --------------------------------------------------------------------------------------------- computing, and keeping


def prepare(s: Settings, fabric: Fabric, data: Data, identity: dict) -> None:
    """Give the samples of both parts their `teacher`, from the file if it is there, else by the teacher itself."""
    if s.teacher_dir is None:
        return
    path, parts = kept_at(s, identity), {"train": data.train, "val": data.val}
    k = min(s.teacher_top_k, common_vocabulary(s))
    widths = {"ids": k, "logps": k + (k < common_vocabulary(s))}
    rows = {part: samples.shards.listing.targets for part, samples in parts.items()}
    shapes = {f"{part}.{name}": (rows[part], width) for part in parts for name, width in widths.items()}
    if not path.is_file():
        ask_teacher(s, fabric, parts, path, shapes)
    tensors = read_kept(path, shapes)
    for part, samples in parts.items():
        starts = starts_of_targets(samples)
        samples.teacher = Teacher(tensors[f"{part}.ids"], tensors[f"{part}.logps"], starts)


def starts_of_targets(samples: Samples) -> Tensor:
    """(N + 1,) int64: how many targets the samples before each have, and at the end all: 8 bytes a sample in memory."""
    return F.pad(samples.target_counts[:].long().cumsum(0), (1, 0))


def read_kept(path: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """The tensors of the file, memory-mapped. Raises UserError if they do not fit the data."""
    again = f"delete {path}, and the teacher is asked again"
    tensors = read_tensors(path, again)
    for name, shape in shapes.items():
        found, dtype = tensors.get(name), torch.int32 if name.endswith("ids") else torch.float32
        if found is None or tuple(found.shape) != shape or found.dtype != dtype:
            raise UserError(f"{path} is damaged (its {name} does not fit the data): {again}")
    return tensors


def ask_teacher(s: Settings, fabric: Fabric, parts: dict[str, Samples], path: Path, shapes: dict) -> None:
    """Write what the teacher finds at all targets; several devices share the work, and write to one file."""
    try:
        if fabric.is_global_zero:
            with whole_file(path) as temporary:
                make_room(temporary, shapes)
                fill(s, fabric, parts, fabric.broadcast(temporary), shapes)
        else:
            fill(s, fabric, parts, fabric.broadcast(path), shapes)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): --data_dir must have room for it") from None
    fabric.barrier()  # until the file has its name


def make_room(path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """Write a safetensors file of these shapes, all zeros. Raises UserError if the disk has no room for it."""
    nbytes = {name: 4 * rows * width for name, (rows, width) in shapes.items()}
    header = encode_header({name: (dtype_of(name)[0], shape, nbytes[name]) for name, shape in shapes.items()})
    size, free = len(header) + sum(nbytes.values()), shutil.disk_usage(path.parent).free
    if size > free:
        raise UserError(
            f"{path.parent} has room for {free / 1e9:.3g} GB, what the teacher knows takes {size / 1e9:.3g} GB: lower "
            "--teacher_top_k"
        )
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(size)


def dtype_of(name: str) -> tuple[str, type]:
    """safetensors' and numpy's name of the dtype of a tensor of the file."""
    return TYPES[name.rpartition(".")[2]]


def mapped(path: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """The tensors of the file, to be written to."""
    with open(path, "rb") as file:
        place = 8 + int.from_bytes(file.read(8), "little")
    arrays = {}
    for name, (rows, width) in shapes.items():
        arrays[name] = np.memmap(path, dtype_of(name)[1], "r+", place, (rows, width)) if rows else None
        place += 4 * rows * width
    return arrays


@torch.no_grad()
def fill(s: Settings, fabric: Fabric, parts: dict[str, Samples], path: Path, shapes: dict) -> None:
    """Write this device's share of what the teacher finds into the file, whose shapes these are."""
    arrays, planner = mapped(path, shapes), PLANNERS[s.planner]
    teacher = load_model(s.teacher_dir, teacher_dtype(s), fabric.device, s.teacher_quantize).eval()
    how = shapes["train.ids"][1], common_vocabulary(s), s.teacher_temperature
    for part, whole in parts.items():
        samples = whole.without_virtual_tokens()  # which are the student's own
        starts = starts_of_targets(samples)
        micro_batches = in_order(planner, samples, s.micro_batch_tokens)
        mine = micro_batches[fabric.global_rank :: fabric.world_size]
        for indices in bar(mine, f"the teacher reads {part}", shown=fabric.is_global_zero, stays=False):
            batch = Batch(*planner.layout(samples, indices))
            with fabric.autocast():
                x = teacher.hidden_states(to_device(batch.tokens, fabric.device), offsets=batch.offsets)
                found = likeliest(teacher, x, batch.targets, *how)
            counts = samples.target_counts[indices].tolist()
            for name, values in zip(TYPES, found, strict=True):
                for start, own in zip(starts[indices].tolist(), values.cpu().split(counts), strict=True):
                    arrays[f"{part}.{name}"][start : start + len(own)] = own.numpy()
    for array in arrays.values():
        if array is not None:
            array.flush()
    fabric.barrier()


def likeliest(
    teacher: Transformer, x: Tensor, targets: Tensor, k: int, tokens: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """The k likeliest of the first `tokens` tokens at each target: ids (n, k) int32, and logps (n, k + 1 or k) fp32.

    x (B, T, E): what the teacher's head gets. targets (B, T).
    """
    found = []
    for part in teacher.at_targets(x, targets)[0].split(LOSS_CHUNK):
        scaled = teacher.logits(part)[:, :tokens].float() / temperature
        ids = scaled.topk(k, dim=-1).indices
        found.append((ids.int(), logps_of(scaled, ids, others=k < tokens)))
    ids, logps = zip(*found, strict=True)
    return torch.cat(ids), torch.cat(logps)
