"""The samples of benchmarks, none of which may be trained on (contamination)."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from preparation import cleaning
from preparation.mixture import Source
from preparation.reading import BadRow, read_rows
from preparation.record_store import Records
from preparation.records import answer_texts, to_record
from shell.cli import UserError
from shell.files import sha256


class BenchmarkSample(NamedTuple):
    """A sample of a benchmark: its file, its place in it, and its texts."""

    file: str
    place: str
    prompt: str
    answer: str


def read_benchmarks(sources: list[Source], seed: int) -> list[BenchmarkSample]:
    """All samples of the benchmarks. UserError for a row that cannot be read."""
    samples = []
    for source in sources:
        for row in read_rows(source, lambda share: None):
            try:
                record = to_record(source, row, seed)
            except (BadRow, UserError) as error:
                raise UserError(f"{row.place}: {error}") from None
            samples.append(BenchmarkSample(row.file, row.place, record["key"], "\n".join(answer_texts(record))))
    return samples


def benchmark_ngrams(samples: list[BenchmarkSample], n: int) -> tuple[cleaning.Ngrams | None, list[str]]:
    """The n-grams of all prompts and of answers of n words or more, and the place of each of these texts.

    (None, []) if there are no samples, or n is 0.
    """
    if not samples or not n:
        return None, []
    long = [sample for sample in samples if len(cleaning.words(sample.answer)) >= n]
    texts = [sample.prompt for sample in samples] + [sample.answer for sample in long]
    return cleaning.Ngrams(texts, n), [sample.place for sample in (*samples, *long)]


def describe_benchmarks(samples: list[BenchmarkSample], records: Records) -> list[dict]:
    """For data.json: each file of the benchmarks, its hash (none for a dataset by name), and how many rows leak it."""
    leaks = Counter()
    for sample in samples:
        leaks[sample.file] += records.leaks[sample.place]
    return [
        {"path": file, "sha256": sha256(file) if Path(file).is_file() else None, "leaks": count}
        for file, count in leaks.items()
    ]
