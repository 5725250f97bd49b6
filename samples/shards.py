"""Prepared data on the disk: the files that a part of them (train, val) is in, and what data.json says of it.

A part is one file, `train.safetensors`, or several of bounded size, `train-00001-of-00007.safetensors` and so on: its
shards. In each all samples lie end to end, memory-mapped: see `COLUMNS`. data.json lists them, with all that a run has
to know at its start (`Listing`), so that nothing is read but the shards' headers, however many samples there are.

Each sample has a checksum (CRC-32) of its tokens and its numbers, compared whenever it is read; each shard has a hash
of these checksums, in its header and in data.json. So damage is found before it is trained on, without reading
everything first. (preparation/record_store.py writes the files.)
"""

import bisect
import hashlib
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shell.cli import UserError
from shell.files import check_listed, read_json
from store.streaming import Stream
from weights.safetensors_format import read_header, read_metadata, read_tensors

DATA_AGAIN = "make it again with prepare_data.py"  # what to do about a damaged prepared folder
DATA = "data.json"
COLUMNS = {  # of N samples: (dtype as safetensors calls it, elements beyond one for each, None for one a token)
    "offsets": ("I64", 1),  # where each sample begins in the shard, and the last one ends
    "tokens": ("I32", None),
    "target_counts": ("I32", 0),  # how many tokens of a sample are targets
    "sources": ("I32", 0),  # which source it is from, by its place in the `sources` of data.json
    "checksums": ("I32", 0),  # see `checksum`
    "is_target": ("BOOL", None),
}
CUTS = ("beginnings", "first_ends")  # further columns of preference pairs, as `sources`: see batching.Pairs


class Listed(NamedTuple):
    """A shard as data.json lists it. hash: `hash_of` its samples."""

    file: str
    samples: int
    tokens: int
    hash: str


class Listing(NamedTuple):
    """What data.json says of a part.

    by_source: for each source by its number, its "samples" and "targets". longest: the most positions that a sample
    takes, and longest_sample the number of such a one; longest_row: the same of a row in `batching.Samples.padded`;
    largest_share: the most targets for each position of a sample. hash: of the shards'.
    """

    samples: int
    tokens: int
    targets: int
    by_source: list[dict[str, int]]
    longest: int
    longest_sample: int
    longest_row: int
    largest_token: int
    largest_share: float
    hash: str
    shards: list[Listed]


def read_listing(folder: Path, part: str) -> tuple[str, Listing]:
    """The kind of samples in a prepared folder, "samples" or "pairs", and the `Listing` of a part of them.

    Raises UserError if data.json is missing or damaged, or was written before there were shards.
    """
    path = Path(folder, DATA)
    check_listed(folder, [DATA], DATA_AGAIN)
    info = read_json(path)
    found = info.get(part)
    try:
        shards = [Listed(**shard) for shard in found["shards"]]
        listing = Listing(**{**found, "shards": shards})
        fits = sum(shard.samples for shard in shards) == listing.samples and all(map(_is_listed, shards))
        fits = fits and sum(shard.tokens for shard in shards) == listing.tokens and _has_numbers(listing)
        kind = info["kind"]
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise UserError(f"{path} does not list the shards of {part}, or is damaged: {DATA_AGAIN}")
    return kind, listing


def _is_listed(shard):
    """Whether the values are of their types, and the file is one in the folder."""
    numbers = all(type(n) is int and n >= 0 for n in (shard.samples, shard.tokens))
    return numbers and type(shard.hash) is str and shard.file == Path(shard.file).name


def _has_numbers(listing):
    counts = [number for source in listing.by_source for number in (source["samples"], source["targets"])]
    numbers = [n for n in listing if not isinstance(n, (str, list, float))] + counts
    return all(type(n) is int and n >= 0 for n in numbers) and 0 <= listing.largest_share <= 1


# --------------------------------------------------------------------------------------------------------- one shard


def checksum(tokens: Any, is_target: Any, numbers: Sequence[int]) -> int:
    """CRC-32 of a sample, as an int32: of its tokens (int32) and its is_target (bytes), both as they lie in the file,

    then of its numbers: how many targets, which source, and a pair's cuts. zlib's; 1 in 4e9 of all damage passes.
    """
    crc = zlib.crc32(is_target, zlib.crc32(tokens))
    return struct.unpack("<i", struct.pack("<I", zlib.crc32(struct.pack(f"<{len(numbers)}i", *numbers), crc)))[0]


def hash_of(offsets: np.ndarray, checksums: np.ndarray) -> str:
    """SHA-256 of a shard's columns of these names: the hash of all samples in their order."""
    return hashlib.sha256(offsets.astype("<i8").tobytes() + checksums.astype("<i4").tobytes()).hexdigest()


class Shard:
    """A file of samples, memory-mapped: an array for each column, by its name. Raises UserError if the file is not the

    one that is listed. Only the header is read here; a sample is checked when it is read.
    """

    def __init__(self, path: Path, listed: Listed, cuts: Sequence[str] = ()):
        self.path, self.listed, self.cuts = path, listed, cuts
        _, header = read_header(path, DATA_AGAIN)
        found = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
        columns = COLUMNS | dict.fromkeys(cuts, ("I32", 0))
        for name, (dtype, more) in columns.items():
            shape = [listed.tokens if more is None else listed.samples + more]
            if found.pop(name, None) != (dtype, shape):
                raise UserError(f"{path} is damaged (it has no {shape[0]} {dtype} called {name}): {DATA_AGAIN}")
        if found:
            raise UserError(f"{path} holds {', '.join(found)}: is it of another kind of samples? {DATA_AGAIN}")
        if read_metadata(path, DATA_AGAIN).get("hash") != listed.hash:
            raise UserError(f"{path} has changed since {DATA} was written: {DATA_AGAIN}")
        self.columns = {name: tensor.numpy() for name, tensor in read_tensors(path, DATA_AGAIN).items()}

    def sizes(self, places: np.ndarray) -> np.ndarray:
        """(n,) int64: the tokens of the samples at these places, from 0."""
        offsets = self.columns["offsets"]
        return offsets[places + 1] - offsets[places]

    def sample(self, place: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """A sample's tokens (n,) int32, is_target (n,) bool, and cuts. Raises UserError if it is damaged."""
        columns = self.columns
        start, end = columns["offsets"][place : place + 2].tolist()
        if not 0 <= start < end <= self.listed.tokens:
            self._refuse(place)
        tokens, is_target = columns["tokens"][start:end], columns["is_target"][start:end]
        cuts = [columns[name][place].item() for name in self.cuts]
        numbers = (columns["target_counts"][place].item(), columns["sources"][place].item(), *cuts)
        if checksum(tokens, is_target, numbers) != columns["checksums"][place]:
            self._refuse(place)
        return tokens, is_target, cuts

    def _refuse(self, place):
        raise UserError(f"{self.path} is damaged (its sample {place} does not have its checksum): {DATA_AGAIN}")


# -------------------------------------------------------------------------------------------------------- all shards


class Shards:
    """The shards of a part: its samples by their numbers, from 0, over all shards in their order.

    place: a function from a shard's number to the path of its file, which may first have to be fetched. Shards are
    opened when a sample of theirs is asked for. stream: what fetches them, None if they are here.
    """

    def __init__(
        self, listing: Listing, place: Callable[[int], Path], cuts: Sequence[str] = (), stream: Stream | None = None
    ):
        self.listing, self.place, self.cuts, self.stream = listing, place, cuts, stream
        self.starts = np.cumsum([0] + [shard.samples for shard in listing.shards])
        self._starts = self.starts.tolist()
        self.opened = {}

    def __len__(self):
        return len(self.listing.shards)

    def open(self, number: int) -> Shard:
        """The shard with this number, opened once."""
        if number not in self.opened:
            self.opened[number] = Shard(self.place(number), self.listing.shards[number], self.cuts)
        return self.opened[number]

    def close(self, number: int) -> None:
        """Forget a shard, so that its file's room is free when the file is removed."""
        self.opened.pop(number, None)

    def at_hand(self) -> int:
        """The number of a sample that is here already: the first of a shard that is open."""
        return int(self.starts[min(self.opened)])

    def of(self, samples: np.ndarray) -> np.ndarray:
        """(n,) int64: the number of the shard that each of these samples is in. Raises IndexError beyond the last."""
        if len(samples) and not 0 <= samples.min() <= samples.max() < self.starts[-1]:
            raise IndexError(f"samples {samples.min()} to {samples.max()}, of {self.starts[-1]}")
        return np.searchsorted(self.starts, samples, "right") - 1

    def gather(self, samples: np.ndarray, of: Callable[[Shard, np.ndarray], np.ndarray]) -> np.ndarray:
        """(n,): `of(shard, places)` of samples that may be in several shards, in the order given."""
        numbers = self.of(samples)
        if len(self) == 1 and len(samples):
            return of(self.open(0), samples)
        result = None
        for number in np.unique(numbers):
            here = numbers == number
            values = of(self.open(int(number)), samples[here] - self.starts[number])
            result = np.empty(len(samples), values.dtype) if result is None else result
            result[here] = values
        return np.empty(0, np.int64) if result is None else result

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """`Shard.sample` of sample i."""
        if not 0 <= i < self.listing.samples:
            raise IndexError(f"sample {i} of {self.listing.samples}")
        number = bisect.bisect_right(self._starts, i) - 1  # ten times as quick as numpy's, for a single one
        return self.open(number).sample(i - self._starts[number])


def streamed_shards(folder: Path, listing: Listing, cuts: Sequence[str] = ()) -> Shards:
    """The shards of a part that are in a store, in place of `folder`: each comes when a sample of it is asked for."""
    stream = Stream(folder, [shard.file for shard in listing.shards])
    shards = Shards(listing, stream.place, cuts, stream)
    stream.on_release = shards.close
    return shards


def local_shards(folder: Path, listing: Listing, cuts: Sequence[str] = ()) -> Shards:
    """The shards of a part in a folder, all opened, so that one that is missing or cut off is found at once."""
    shards = Shards(listing, lambda number: Path(folder, listing.shards[number].file), cuts)
    for number in range(len(shards)):
        shards.open(number)
    return shards
