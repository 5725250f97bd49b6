"""What one pass of prepare_data.py leaves for the next: rows as records, then samples as tokens.

Both are in temporary files without a name, which the system removes when the process ends, even if it is killed.
Memory has a few numbers for each, in columns, so it stays small however much is read.
"""

import hashlib
import json
import os
import pickle
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from preparation.cleaning import SIGNATURE
from preparation.filtering import FilteredRow
from preparation.rendering import Tokens
from samples.shards import COLUMNS, CUTS, checksum, hash_of
from shell.cli import UserError
from weights.safetensors_format import encode_header

LEAKS = ("words of a benchmark", "similar to a benchmark")  # the reasons for which a line names a benchmark's sample
WIDTHS = {"I64": 8, "I32": 4, "BOOL": 1}  # bytes of safetensors' dtypes
SHOWN = 300  # characters of a dropped prompt that are written down


class Records:
    """Every row that was read: its record on the disk, and in columns what the passes need to know of it.

    sources, answer_lengths (characters), hashes (of prompts), answers_hashes (of pairs' answers): arrays with an
    element for each. counts: for each source, how many of its rows were read, and dropped for which reason; facts: what
    its rows hold, how often, a Counter of (group, name); cut: of how many the prompt had to be cut; notes: what
    rendering has to tell, how often. leaks: for the place of a benchmark's sample, how many rows leaked from it.
    folder: a place on the disk with room for the records. names: of the sources. log: an open file, for a line of JSON
    on each row that is dropped.
    """

    def __init__(self, folder: Path, names: list[str], log: IO[str]):
        self._texts, self._signatures = (tempfile.TemporaryFile(dir=folder) for _ in range(2))  # noqa: SIM115 (nameless)
        self._offsets, self._kept = array("q", [0]), array("b")
        self.sources, self.answer_lengths = array("i"), array("i")
        self.hashes, self.answers_hashes = array("Q"), array("Q")
        self.names, self.cut, self.leaks, self._log = names, [0 for _ in names], Counter(), log
        self.counts, self.facts, self.notes = ([Counter() for _ in names] for _ in range(3))

    def __len__(self):
        return len(self.sources)

    def add(self, source: int, row: FilteredRow) -> None:
        """Append a row of the source with this number. UserError if it is a pair and others are not, or the reverse."""
        self._check_kind(source, row)
        self._texts.write(row.record)
        self._signatures.write(row.signature)
        self._offsets.append(self._offsets[-1] + len(row.record))
        self.sources.append(source)
        self.answer_lengths.append(row.answer_length)
        self.hashes.append(row.prompt_hash)
        self.answers_hashes.append(row.answers_hash)
        self._kept.append(1)
        self.facts[source].update(row.facts)
        if row.reason:
            self.drop(len(self) - 1, row.reason, of=row.of, detail=row.detail)

    @property
    def are_pairs(self) -> bool:
        """Whether the records are preference pairs."""
        return bool(len(self) and self.answers_hashes[0])

    def _check_kind(self, source, row):
        if not len(self) or bool(row.answers_hash) == self.are_pairs:
            return
        first, this = (self[0]["id"], self.names[self.sources[0]]), (row.place, self.names[source])
        pair, other = (first, this) if self.are_pairs else (this, first)
        raise UserError(
            f"{pair[0]} (source {pair[1]}) is a preference pair, {other[0]} (source {other[1]}) is none: "
            "prepare them in folders of their own"
        )

    def raw(self, number: int) -> bytes:
        """The record as it was added, pickled."""
        return _read(self._texts, 1, self._offsets[number], self._offsets[number + 1])

    def __getitem__(self, number):
        return pickle.loads(self.raw(number))

    def kept(self) -> np.ndarray:
        """(N,) bool: which are not dropped."""
        return np.array(self._kept, np.bool_)

    def signatures(self) -> np.ndarray:
        """(N, SIGNATURE) uint32, on the disk: the MinHash of each prompt's words."""
        self._signatures.flush()
        return np.memmap(self._signatures, np.uint32, "r", shape=(len(self), SIGNATURE))

    def drop(self, number: int, reason: str, **more: Any) -> None:
        """Drop a row and log why. more: "of", the id of what it is too similar to, and "score"; "detail"."""
        self._kept[number] = 0
        if reason in LEAKS:
            self.leaks[more["of"]] += 1
        record = self[number]
        self.log(record["id"], self.sources[number], reason, **more, prompt=record["key"][:SHOWN])

    def log(self, id: str, source: int, reason: str, **more: Any) -> None:
        """Count a row that is not used, and log it."""
        self.counts[source][reason] += 1
        line = {"id": id, "source": self.names[source], "reason": reason, **more}
        line = {key: value for key, value in line.items() if value is not None}
        self._log.write(json.dumps(line, ensure_ascii=False) + "\n")


class SampleWriter:
    """Collects samples and writes them as prepared files. Tokens are on the disk; memory has a few numbers for each.

    folder: a place on the disk with room for them until they are saved; by default that of temporary files.
    """

    def __init__(self, folder: Path | None = None):
        self._tokens, self._is_target = (tempfile.TemporaryFile(dir=folder) for _ in range(2))  # noqa: SIM115 (nameless)
        self.offsets, self.target_counts, self.sources = array("q", [0]), array("i"), array("i")
        self.beginnings, self.first_ends = array("i"), array("i")
        self.checksums, self.largest = array("i"), array("i")  # the latter: the largest token of each

    def __len__(self):
        return len(self.target_counts)

    def add(
        self, ids: Iterable[int], is_target: Iterable[bool], source: int, beginning: int = 0, first_end: int = 0
    ) -> None:
        """Add one sample: token ids, for each of them whether it is a target, and the number of its source.

        beginning, first_end: of a pair, where its tokens are cut: see `rendering.Tokens`. Raises ValueError for a
        sample without a target: nothing can be learned of it, and what reads the files counts on that there is one.
        """
        counts = count_targets(is_target, beginning, first_end)
        if not all(counts):
            raise ValueError(f"sample {len(self)} has no target")
        tokens, marks = array("i", ids), bytes(is_target)
        cuts = (beginning, first_end) if first_end else ()
        self._tokens.write(tokens)
        self._is_target.write(marks)
        self.offsets.append(self.offsets[-1] + len(tokens))
        self.target_counts.append(sum(counts))
        self.sources.append(source)
        self.beginnings.append(beginning)
        self.first_ends.append(first_end)
        self.checksums.append(checksum(tokens, marks, (sum(counts), source, *cuts)))
        self.largest.append(max(tokens))

    def read(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The sequence that a sample is, or the two of a pair, by its number: ids (n,) int32, is_target (n,) bool."""
        span = self.offsets[number], self.offsets[number + 1]
        ids = np.frombuffer(_read(self._tokens, 4, *span), np.int32)
        is_target = np.frombuffer(_read(self._is_target, 1, *span), np.bool_)
        if not self.first_ends[number]:
            return [(ids, is_target)]
        fork = self.beginnings[number]
        second = fork + self.first_ends[number]
        joined = (np.r_[0:second], np.r_[0:fork, second : len(ids)])
        return [(ids[places], is_target[places]) for places in joined]

    def save(
        self, folder: Path, part: str, order: Iterable[int] | None = None, shard_tokens: int | None = None
    ) -> dict[str, Any]:
        """Write the samples with the numbers `order`, by default all, as a part of a prepared folder.

        shard_tokens: a shard ends before the sample with which it would have more tokens; None for one shard. Returns
        what data.json is to say of the part: `shards.Listing`, as plain values.
        """
        order = np.arange(len(self)) if order is None else np.asarray(order, np.int64)
        ends = _shard_ends(np.diff(self.offsets)[order], shard_tokens)
        names = [f"{part}-{k:05}-of-{len(ends):05}" for k in range(1, len(ends) + 1)] if len(ends) > 1 else [part]
        shards = [
            self._save_shard(folder / f"{name}.safetensors", order[start:end])
            for name, start, end in zip(names, [0, *ends], ends, strict=False)
        ]
        whole = hashlib.sha256("\n".join(shard["hash"] for shard in shards).encode()).hexdigest()
        return {**self._describe(order), "hash": whole, "shards": shards}

    def _describe(self, order):
        """What data.json says of a part beside its shards."""
        sizes, targets = np.diff(self.offsets)[order], np.array(self.target_counts, np.int64)[order]
        sources = np.array(self.sources, np.int64)[order]
        lengths = rows = sizes - 1  # the last token is only ever a target
        if self._are_pairs():
            beginnings, first_ends = (
                np.array(column, np.int64)[order] for column in (self.beginnings, self.first_ends)
            )
            lengths = sizes - 2
            rows = beginnings + np.maximum(first_ends, sizes - beginnings - first_ends) - 1
        counts = np.bincount(sources), np.bincount(sources, targets).astype(int)
        return {
            "samples": len(order),
            "tokens": int(sizes.sum()),
            "targets": int(targets.sum()),
            "by_source": [{"samples": int(n), "targets": int(t)} for n, t in zip(*counts, strict=True)],
            "longest": int(lengths.max(initial=0)),
            "longest_sample": int(lengths.argmax()) if len(order) else 0,
            "longest_row": int(rows.max(initial=0)),
            "largest_token": int(np.array(self.largest)[order].max(initial=0)),
            "largest_share": float((targets / lengths).max(initial=0.0)),
        }

    def _are_pairs(self):
        return any(self.first_ends)

    def _save_shard(self, path, order):
        """Write a file. Returns it as `shards.Listed`, as plain values.

        Written one sample at a time, since safetensors' own writer wants whole tensors in memory.
        """
        offsets = np.array(self.offsets)
        starts, ends = offsets[:-1][order], offsets[1:][order]
        total, own = int((ends - starts).sum()), np.concatenate([[0], (ends - starts).cumsum()])

        def pieces(file, width):
            return (_read(file, width, int(start), int(end)) for start, end in zip(starts, ends, strict=True))

        contents = {"offsets": [own.astype("<i8")], "tokens": pieces(self._tokens, 4)}
        contents["is_target"] = pieces(self._is_target, 1)
        columns = COLUMNS | (dict.fromkeys(CUTS, ("I32", 0)) if self._are_pairs() else {})
        lengths = {name: total if more is None else len(order) + more for name, (_, more) in columns.items()}
        # The widest first, so that each begins at a multiple of its width.
        columns = dict(sorted(columns.items(), key=lambda item: -WIDTHS[item[1][0]]))
        layout = {name: (dtype, [lengths[name]], lengths[name] * WIDTHS[dtype]) for name, (dtype, _) in columns.items()}
        hash = hash_of(own, np.array(self.checksums)[order])
        with open(path, "wb") as file:
            file.write(encode_header(layout, {"hash": hash}))
            for name in columns:
                file.writelines(contents.get(name) or [np.array(getattr(self, name), "<i4")[order]])
        return {"file": path.name, "samples": len(order), "tokens": total, "hash": hash}


def count_targets(is_target: Iterable[bool], beginning: int = 0, first_end: int = 0) -> list[int]:
    """How many targets a sample has, or each end of a pair, which is cut there: [n] or [n, m].

    Nothing precedes a first token, to predict it from; an end begins with a token that belongs to what is before it.
    """
    second = beginning + first_end
    ends = [is_target[beginning:second], is_target[second:]] if first_end else [is_target]
    return [sum(end[1:]) for end in ends]


def _shard_ends(sizes, shard_tokens):
    """Where each shard ends, of samples of these numbers of tokens: the last number at the end, at least one shard."""
    totals, ends = np.cumsum(sizes), [len(sizes)] if shard_tokens is None else []
    while not ends or ends[-1] < len(sizes):
        start = ends[-1] if ends else 0
        before = totals[start - 1] if start else 0
        fitting = int(np.searchsorted(totals, before + shard_tokens, "right"))
        ends.append(min(len(sizes), max(fitting, start + 1)))
    return ends


def _read(file, width, start, end):
    """The bytes of the elements start to end, `width` bytes each."""
    file.flush()
    return os.pread(file.fileno(), (end - start) * width, start * width)


class TokenizedSamples:
    """The samples as tokens, with the number of the record that each was made of, and of its examples' records."""

    def __init__(self, folder: Path):
        self.writer = SampleWriter(folder)
        self._records, self._examples, self._ends = array("q"), array("q"), array("q", [0])

    def __len__(self):
        return len(self._records)

    def add(self, source: int, record: int, examples: list[int], tokens: Tokens) -> None:
        """Append a sample of a source, made of a record and of examples before it, all by their numbers."""
        self.writer.add(tokens.ids, tokens.is_target, source, tokens.beginning, tokens.first_end)
        self._records.append(record)
        self._examples.extend(examples)
        self._ends.append(len(self._examples))

    def record(self, number: int) -> int:
        """The number of the record that a sample was made of."""
        return self._records[number]

    def examples(self, number: int) -> array:
        """The numbers of the records that stand before the question of a sample."""
        return self._examples[self._ends[number] : self._ends[number + 1]]

    def records(self) -> np.ndarray:
        """(M,) int64: the number of each sample's record."""
        return np.array(self._records, np.int64)

    def sources(self) -> np.ndarray:
        """(M,) int64: the number of each sample's source."""
        return np.array(self.writer.sources, np.int64)

    @property
    def are_pairs(self) -> bool:
        """Whether the samples are preference pairs."""
        return any(self.writer.first_ends)

    def cuts(self) -> tuple[np.ndarray, np.ndarray]:
        """Two (M,) int64: the tokens of each pair's beginning, and of its chosen end."""
        return np.array(self.writer.beginnings, np.int64), np.array(self.writer.first_ends, np.int64)

    def lengths(self) -> np.ndarray:
        """(M,) int64: the tokens of each sample."""
        return np.diff(self.writer.offsets)

    def target_counts(self) -> np.ndarray:
        """(M,) int64: the target tokens of each sample."""
        return np.array(self.writer.target_counts, np.int64)
