"""Which records are dropped once all are read: duplicates, and those too similar to a benchmark's samples.

cleaning.py finds them; here they are dropped, and the pairs nearest to a threshold collected for the report.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from preparation import cleaning
from preparation.benchmarks import BenchmarkSample
from preparation.record_store import Records
from preparation.workers import chunks
from shell.progress import bar

EMBEDDED = 32  # texts that the embedding model gets at a time


def drop_exact_duplicates(records: Records) -> None:
    """Of records with the same prompt keep the one with the longest answer; of pairs with the same answers too, one."""
    columns = np.array(records.hashes) ^ np.array(records.answers_hashes), np.array(records.answer_lengths)
    duplicate_of = cleaning.exact_duplicates(*columns, records.kept())
    for number in np.flatnonzero(duplicate_of >= 0):
        records.drop(number, "duplicate", of=records[duplicate_of[number]]["id"])


def drop_near_duplicates(records: Records, threshold: float) -> list[dict]:
    """Drop records whose prompts share this much of their words with an earlier one's. Returns pairs for the report."""
    matches = cleaning.near_duplicates(records.signatures(), records.kept(), threshold)
    return _drop(records, matches, "near duplicate", threshold)


def drop_by_embedding(
    records: Records, benchmarks: list[BenchmarkSample], leak_cosine: float, similar: float, folder: Path
) -> list[dict]:
    """Drop records whose prompt's embedding is too near to a benchmark's, or to an earlier record's; 0 for no check.

    Leaks come first: if a record were dropped as similar to one that leaks, both would be gone. folder: a place on the
    disk with room for the embeddings. Returns pairs for the report.
    """
    pairs, asked = [], [sample for sample in benchmarks if sample.prompt.strip()]
    with tempfile.TemporaryFile(dir=folder) as file:
        embeddings = _embed_prompts(records, file)
        if asked and leak_cosine:
            forbidden = cleaning.embed([sample.prompt for sample in asked], EMBEDDED)
            matches = cleaning.leaks(embeddings, records.kept(), forbidden, leak_cosine)
            texts = [{"id": sample.place, "text": sample.prompt} for sample in asked]
            pairs += _drop(records, matches, "similar to a benchmark", leak_cosine, texts.__getitem__)
        if similar:
            matches = cleaning.similar(embeddings, records.kept(), similar)
            pairs += _drop(records, matches, "similar", similar)
    return pairs


def _embed_prompts(records: Records, file: IO[bytes]) -> np.ndarray:
    """(N, 384) float16 in `file`: the embedding of each prompt that is not dropped, zeros for the others."""
    embeddings = np.memmap(file, np.float16, "w+", shape=(max(1, len(records)), 384))
    with bar(what="embedding", unit=" samples", total=int(records.kept().sum())) as progress:
        for numbers in chunks(map(int, np.flatnonzero(records.kept()))):
            texts = [records[number]["key"] for number in numbers]
            embeddings[numbers] = cleaning.embed(texts, EMBEDDED)
            progress.update(len(numbers))
    return embeddings[: len(records)]


def _drop(
    records: Records,
    matches: cleaning.Matches,
    step: str,
    threshold: float,
    first: Callable[[int], dict] | None = None,
) -> list[dict]:
    """Drop what `matches` found. Returns its pairs near the threshold as the report wants them.

    first: what the first number of a match stands for, as {"id", "text"}, if not a record.
    """

    def record(number):
        return {"id": records[number]["id"], "text": records[number]["key"]}

    first = first or record
    for number in np.flatnonzero(matches.of >= 0):
        records.drop(number, step, of=first(matches.of[number])["id"], score=_rounded(matches.score[number]))
    return [
        {
            "step": step, "score": _rounded(score), "threshold": threshold, "dropped": bool(matches.of[other] >= 0),
            "kept": first(kept), "other": record(other),
        }
        for kept, other, score in matches.close
    ]  # fmt: skip


def _rounded(score):
    return round(float(score), 4)
