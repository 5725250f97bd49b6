"""The tensors that a model folder holds: found, checked against what a model needs, read one at a time.

`Weights` has them under the names in the files, `Renamed` under the decoder's; `Unpacked` makes bf16 of MXFP4.
"""

import functools
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import Config
from shell.cli import UserError
from shell.files import read_json
from weights import mxfp4
from weights.families import FAMILIES
from weights.names import BUFFERS, TABLES, Names, Piece
from weights.replaced import EMBEDDING, HEAD
from weights.safetensors_format import read_header

INDEX = "model.safetensors.index.json"
OPTIMIZER = "optimizer.safetensors"  # in a checkpoint to resume from
# Beside a model's weights and no part of them: Mistral's own copy of the weights, adapters, an optimiser's state.
NOT_WEIGHTS = ("consolidated*", "adapter*", "optimizer*")
PIECE = 2**22  # numbers of two tensors that are compared at a time
CHECKPOINT_AGAIN = "download or convert it again"  # how to repair a model folder
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by safetensors' names: those of weights


@functools.cache
def note_once(text: str) -> None:
    """Print a line on standard error, once in a process: a run opens the same folder several times."""
    print(f"note: {text}", file=sys.stderr)


def holds_safetensors(folder: str | Path) -> bool:
    """Whether a folder holds weights of a model in safetensors, and not only what lies beside them (`NOT_WEIGHTS`)."""
    return bool(_weight_files(Path(folder), "*.safetensors"))


def _weight_files(folder, pattern):
    paths = sorted(folder.glob(pattern))
    return [path for path in paths if not any(path.match(other) for other in NOT_WEIGHTS)]


def shard_paths(folder: str | Path, index: str, pattern: str) -> list[Path]:
    """The weight files of a folder, in transformers' order: the one file of a small model, else those that the index
    names; without both, those that match `pattern`, of which those called model* come before all others.

    A line on standard error says what else matches and is left aside. Raises UserError for an index that names anything
    but files in its folder.
    """
    folder, whole = Path(folder), index.removesuffix(".index.json")
    if (folder / whole).is_file():
        paths = [folder / whole]
    elif (folder / index).exists():
        paths = _indexed(folder, index)
    else:
        found = _weight_files(folder, pattern)
        paths = [path for path in found if path.name.startswith("model")] or found
    others = [path.name for path in sorted(folder.glob(pattern)) if path not in paths and path.name != OPTIMIZER]
    if not paths:
        beside = f" (only {', '.join(others)}, which is not read as a model)" if others else ""
        raise UserError(f"{folder} holds no {pattern} file{beside}: make it with convert_hf_checkpoint.py")
    if paths == [folder / whole] and (folder / index).exists():
        others.append(index)
    if others:
        taken = paths[0].name if len(paths) == 1 else f"{len(paths)} files, {paths[0].name} and so on"
        note_once(f"{folder}: the weights are read from {taken}; left aside: {', '.join(others)}")
    return paths


def _indexed(folder, index):
    """The files that an index names, checked."""
    weight_map = read_json(folder / index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / index} names no files: {CHECKPOINT_AGAIN}")
    present = {path.name for path in folder.iterdir() if path.is_file()}
    for name in sorted(set(names)):
        if name not in present:
            raise UserError(f"{folder / index} names {name[:100]!r}, which is not a file in that folder")
        if not _is_inside(folder, name):
            raise UserError(f"{folder / index} names {name}, a link that leads out of the folder: copy the file there")
    return [folder / name for name in sorted(set(names))]


def _is_inside(folder, name):
    """Whether a file of a folder lies in it, or in the store of the hub's cache to whose snapshots the folder belongs.

    There REPO/snapshots/COMMIT holds links to REPO/blobs (huggingface_hub.constants.HF_HUB_CACHE).
    """
    folder = folder.resolve()
    homes = [folder, folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [folder]
    return (folder / name).resolve().parent in homes


class Weights:
    """The tensors of a model folder: `shapes` and `dtypes` by name (None: not in `DTYPES`), and `read(name)`.

    They are read, not memory-mapped: that is a copy less, and pages of a map would count as used memory.

    In a folder that onetune wrote, `files.checked` finds a changed byte by the manifest. A folder from elsewhere has no
    manifest: there a flipped bit is only found in a header, or where it makes NaN or infinity.

    Raises UserError for a folder without weights, for a damaged file, and for a tensor that is there twice.

    where: the folder or file, for messages. has_our_names: whether they have the decoder's names in every family.
    """

    has_our_names = False
    _bytes = frozenset()  # names of tensors of plain bytes

    def __init__(self, folder: str | Path):
        self.where = folder = Path(folder)
        self.shapes, self.dtypes, self._places = {}, {}, {}
        self._bytes = set()
        for path in shard_paths(folder, INDEX, "*.safetensors"):
            start, header = read_header(path, CHECKPOINT_AGAIN)
            for name, entry in header.items():
                if name in self._places:
                    raise UserError(f"{path}: tensor {name} is in {self._places[name][0].name} too")
                self._places[name] = path, start + entry["data_offsets"][0]
                self.shapes[name], self.dtypes[name] = tuple(entry["shape"]), DTYPES.get(entry["dtype"])
                if entry["dtype"] == "U8":
                    self._bytes.add(name)

    def read(self, name: str) -> Tensor:
        """The tensor `name`, as stored. Raises UserError if it holds NaN or infinity, or is of another type."""
        path, start = self._place(name)
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        rest = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            while rest:  # the system reads 2 GB at a time, at most
                rest = rest[file.readinto(rest) or _ended_early(path) :]
        if not all(extreme.isfinite() for extreme in tensor.aminmax()):
            raise UserError(f"{path}: tensor {name} holds NaN or infinity")
        return tensor

    def _place(self, name):
        """The file of a tensor of a type that weights have, and its first byte there."""
        path, start = self._places[name]
        if self.dtypes[name] is None:
            raise UserError(f"{path}: tensor {name} is not in {', '.join(DTYPES)}")
        return path, start

    def view(self, name: str) -> Tensor:
        """The tensor `name` without its values in memory: what is used of it is read from the file then."""
        return self._mapped(name, *self._place(name), self.dtypes[name])

    def part(self, name: str, index: int) -> Tensor:
        """One of the tensors that the tensor `name` stacks, as `view`."""
        return self.view(name)[index]

    def codes(self, name: str) -> Tensor:
        """The tensor `name` of bytes, which stand for numbers in a packed format, as `view`."""
        if name not in self._bytes:
            raise UserError(f"{self.where}: tensor {name} is not in U8")
        return self._mapped(name, *self._places[name], torch.uint8)

    def _mapped(self, name, path, start, dtype):
        size = torch.Size(self.shapes[name]).numel() * dtype.itemsize
        if start + size > path.stat().st_size:
            _ended_early(path)
        # Private: nobody writes to it, and torch warns of memory that may not be written.
        content = np.memmap(path, np.uint8, "c", start, (size,))
        return torch.from_numpy(content).view(dtype).view(self.shapes[name])

    def ties_head(self, tied: bool) -> bool:
        """Whether the head is the embedding's tensor, in a model whose config.json says that it is (`tied`) or not.

        As in transformers 5. Weights that hold both, with different values, are of a model that is not tied: both are
        kept, and a line on standard error says so. If only the head is there, it is the embedding too, from then on
        also here.
        """
        if not tied or HEAD not in self.shapes:
            return tied
        if EMBEDDING not in self.shapes:
            self._take_head_for_embedding()
            return True
        if self._same(HEAD, EMBEDDING):
            return True
        note_once(
            f"{self.where}: config.json ties the head to the embedding, but there is a {self.called(HEAD)} that "
            'differs: it is kept, as with "tie_word_embeddings": false'
        )
        return False

    def _take_head_for_embedding(self):
        for table in (self.shapes, self.dtypes, self._places):
            table[EMBEDDING] = table[HEAD]

    def _same(self, one, other):
        """Whether two tensors are equal. Compared in pieces, so that the first difference ends it."""
        if self.shapes[one] != self.shapes[other]:
            return False
        pairs = zip(*(self.view(name).flatten().split(PIECE) for name in (one, other)), strict=True)
        return all(torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.float(), b.float()) for a, b in pairs)

    def called(self, name: str) -> str:
        """What the files call a tensor."""
        return name

    def check(self, expected: dict[str, torch.Size | tuple]) -> None:
        """Compare with the shapes that a model needs. Raises UserError that names the first few that differ."""
        surplus = [n for n in self.shapes if n not in expected and not n.endswith(BUFFERS) and n != HEAD]
        missing = [*dict.fromkeys(self.called(n) for n in expected if n not in self.shapes)]
        misshapen = [
            f"{self.called(n)} {self.shapes[n]} instead of {tuple(expected[n])}"
            for n in expected
            if n in self.shapes and self.shapes[n] != tuple(expected[n])
        ]
        for what, names in (("missing", missing), ("surplus", surplus), ("misshapen", misshapen)):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise UserError(f"the weights do not fit config.json: {what} {', '.join(names[:3])}{more}")


def _ended_early(path):
    raise UserError(f"{path} is damaged (it ends early): {CHECKPOINT_AGAIN}")


class Unpacked(Weights):
    """Other `Weights`, with parameters that lie there in MXFP4 in bf16, in the layout that GPT-OSS has otherwise.

    A parameter X (E, in, out) is stored as X_blocks and X_scales; an expert's is made of them when it is read.
    """

    def __init__(self, weights: Weights):
        self.weights, self.where = weights, weights.where
        ends = ("_blocks", "_scales")
        found = [name.removesuffix(ends[0]) for name in weights.shapes if name.endswith(ends[0])]
        self._codes = {name: (name + ends[0], name + ends[1]) for name in found if name + ends[1] in weights.shapes}
        used = {code for codes in self._codes.values() for code in codes}
        self.shapes = {name: shape for name, shape in weights.shapes.items() if name not in used}
        self.dtypes = {name: dtype for name, dtype in weights.dtypes.items() if name not in used}
        for name, codes in self._codes.items():
            self.shapes[name] = self._shape(*(weights.shapes[code] for code in codes))
            self.dtypes[name] = torch.bfloat16
        self._newest = None, None  # an expert that was made last: gate and up are read one after the other

    def _shape(self, blocks, scales):
        if len(blocks) != 4 or blocks[:3] != scales or blocks[3] != mxfp4.BLOCK // 2:
            raise UserError(f"{self.where}: blocks {blocks} and scales {scales} are no MXFP4")
        return blocks[0], blocks[2] * mxfp4.BLOCK, blocks[1]

    def read(self, name: str) -> Tensor:
        """As in `Weights`."""
        return self.view(name) if name in self._codes else self.weights.read(name)

    def view(self, name: str) -> Tensor:
        """As in `Weights`, but what is packed is made."""
        if name not in self._codes:
            return self.weights.view(name)
        return torch.stack([self.part(name, expert) for expert in range(self.shapes[name][0])])

    def part(self, name: str, index: int) -> Tensor:
        """As in `Weights`."""
        if name not in self._codes:
            return self.weights.part(name, index)
        if self._newest[0] != (name, index):
            codes = [self.weights.codes(code)[index] for code in self._codes[name]]
            self._newest = (name, index), mxfp4.dequantize(*codes).T
        return self._newest[1]


class Renamed(Weights):
    """The tensors of other `Weights` under the decoder's names, and each by itself where the family joins several."""

    def __init__(self, weights: Weights, config: Config, ours: Iterable[str]):
        self.weights, self.names, self.where = weights, Names(config), weights.where
        pieces = {name: self._as_stored(self.names.piece(name)) for name in ours}
        self._pieces = {name: piece for name, piece in pieces.items() if all(t in weights.shapes for t in piece.theirs)}
        used = {theirs for piece in self._pieces.values() for theirs in piece.theirs}
        self.shapes = {name: self._shape(piece) for name, piece in self._pieces.items()}
        self.dtypes = {name: weights.dtypes[piece.theirs[0]] for name, piece in self._pieces.items()}
        self.shapes |= {name: shape for name, shape in weights.shapes.items() if name not in used}

    def _as_stored(self, piece):
        """A piece, without the first part of its name where the files leave that out, as GPT-2's and BLOOM's do."""
        if piece.theirs[0] in self.weights.shapes:
            return piece
        short = tuple(name.partition(".")[2] for name in piece.theirs)
        return piece._replace(theirs=short) if short[0] in self.weights.shapes else piece

    def _shape(self, piece):
        try:
            stored = [torch.empty(self.weights.shapes[name], device="meta") for name in piece.theirs]
            own = stored if piece.expert is None else [tensor[piece.expert] for tensor in stored]
            return tuple(self.names.take(piece, own).shape)
        except (IndexError, RuntimeError, ValueError) as error:
            raise UserError(f"{self.where}: the weights do not fit config.json: {error}") from None

    def read(self, name: str) -> Tensor:
        """As in `Weights`."""
        piece: Piece = self._pieces[name]
        if piece.row.is_whole:
            return self.weights.read(piece.theirs[0])
        tensor = self.view(name).clone(memory_format=torch.contiguous_format)
        if not all(extreme.isfinite() for extreme in tensor.aminmax()):
            raise UserError(f"{self.where}: tensor {piece.theirs[0]} holds NaN or infinity")
        return tensor

    def view(self, name: str) -> Tensor:
        """As in `Weights`."""
        piece, weights = self._pieces[name], self.weights
        if piece.expert is None:
            return self.names.take(piece, [weights.view(theirs) for theirs in piece.theirs])
        return self.names.take(piece, [weights.part(theirs, piece.expert) for theirs in piece.theirs])

    def called(self, name: str) -> str:
        """As in `Weights`."""
        return self.names.piece(name).theirs[0]

    def _take_head_for_embedding(self):
        for table in (self.shapes, self.dtypes, self._pieces):
            table[EMBEDDING] = table[HEAD]


def under_our_names(weights: Weights, config: Config, ours: Iterable[str]) -> Weights:
    """Weights under the decoder's names `ours`: as they are where the family has the same, or where they were turned
    into ours when they were read."""
    if weights.has_our_names or config.family not in TABLES:
        return weights
    return Renamed(Unpacked(weights) if FAMILIES[config.family].packed else weights, config, ours)
