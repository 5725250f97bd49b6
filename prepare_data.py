"""Data in, tokens out: read sources, clean, mix, render in a prompt style, tokenise, split, and report.

    python prepare_data.py --data my.jsonl --checkpoint_dir checkpoints/ORG/MODEL
    python prepare_data.py --data mixture.yaml --checkpoint_dir checkpoints/ORG/MODEL --benchmarks "[test.jsonl]"
    python prepare_data.py --show 5 --out_dir prepared/my

`prepare` calls the passes in turn: `read_all` parses and filters the rows; `clean` drops duplicates and leaks of a
benchmark; `sample_validation` holds back a validation part; `tokenize_all` renders and tokenises the rest, with
few-shot examples where a source asks for them; `mix` repeats samples by the sources' weights; `write_folder` and
`write_report` write the result. Between passes rows and tokens are on the disk (record_store.py), so memory stays
small however much is read. dropped.jsonl lists each row that was dropped, and why.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shell import cli
from shell.cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        data: Files (.json, .jsonl, .csv, .tsv, .parquet, the first four also with .gz), patterns such as "*.jsonl",
            names of Hugging Face datasets, or one mixture (.yaml, see docs/data.md).
        checkpoint_dir: Model folder, for its tokenizer.
        out_dir: Folder to write; prepared/NAME for NAME.jsonl if not given. {version} in it stands for the first
            characters of a hash of all that the data are made of: files, settings, tokenizer, code. A folder that holds
            the same already is not made again.
        prompt_style: plain, alpaca, dolly, vicuna, llama2-chat, llama3, mistral-instruct, chatml or checkpoint (the
            model's own chat template); checkpoint where the model has a template, otherwise alpaca, if not given.
        template_args: Variables for the model's own chat template, such as {enable_thinking: false}.
        max_seq_length: Tokens a sample may have. Of longer ones the start of the prompt is cut, never the answer.
        overlap: Tokens of a document too long for that which its next piece repeats, not as targets; an eighth of
            max_seq_length if not given.
        mask_prompt: Only the answers are targets.
        answers: Train on all answers of a conversation, or on its last one. Of preference pairs it is always the last.
        fields: Columns with other names than the usual ones, or templates over columns, such as
            {prompt: "{context} {question}", answer: solution} or {messages: talk}. The parts of a sample: prompt,
            input, answer, thinking, history, choices, label; or prompt, chosen, rejected; or messages; or text; beside
            them system and tools.
        ignore: Keys of messages, and columns with a meaning, that are left out and counted in place of an error.
        encoding: Of files of text, as Python calls it, such as cp1252 or utf-16; UTF-8 if not given.
        skip_bad: Count and list rows (and ends of files) that cannot be read, instead of stopping at the first.
        drop_duplicates: Of samples with the same prompt keep the one with the longest answer; of preference pairs drop
            only those that repeat both answers too.
        near_duplicates: Drop a sample whose prompt shares this much of its word triples (Jaccard, by MinHash) with an
            earlier one's, such as 0.8; 0 for not at all.
        similar: Drop a sample whose prompt's embedding has a cosine above this to an earlier one's, such as 0.7; 0
            for not at all. Needs requirements-data.txt.
        benchmarks: Files or datasets with the usual field names, or a mixture; none of their samples is trained on.
        leak_words: Drop a sample that shares so many words in a row with a benchmark; 0 for no such check.
        leak_cosine: Drop a sample whose prompt's embedding has at least this cosine to a benchmark's; 0 for no such
            check. Needs requirements-data.txt.
        min_words: Words that prompt and answer must have together.
        max_tokens: Drop samples that are longer, instead of cutting their prompts.
        max_repetition: Drop samples with a larger share of repeated runs of five words.
        mix_by: What the weights of a mixture count: samples or target tokens.
        mix_size: How many of these the weighted sources have together; as many as they have, if not given.
        val_fraction: Share of the samples that is held back for validation.
        shard_tokens: Tokens that a file of samples may have; larger parts are in several files.
        seed: Of all that is random: the validation part, few-shot examples, the order of choices, the mixture.
        engine: What runs the passes: the processes of this machine, or a Ray cluster, of which the same bytes come.
            ray needs requirements-ray.txt.
        ray_address: Of a Ray cluster: HOST:PORT, or auto for the one of this machine. If not given, one is started on
            this machine and ended.
        workers: Processes that filter and tokenise; one for each core of the machine or cluster, if not given.
        show: Print so many samples of the prepared folder, targets in colour.
    """

    data: list[str] | str = field(default_factory=list)
    checkpoint_dir: Path | None = None
    out_dir: Path | None = None
    prompt_style: str | None = None
    template_args: dict[str, Any] = field(default_factory=dict)
    max_seq_length: int = 2048
    overlap: int | None = None
    mask_prompt: bool = True
    answers: Literal["all", "last"] = "all"
    fields: dict[str, str | list[str]] = field(default_factory=dict)
    ignore: list[str] = field(default_factory=list)
    encoding: str | None = None
    skip_bad: bool = False
    drop_duplicates: bool = True
    near_duplicates: float = 0.0
    similar: float = 0.0
    benchmarks: list[str] | str = field(default_factory=list)
    leak_words: int = 13
    leak_cosine: float = 0.8
    min_words: int = 0
    max_tokens: int | None = None
    max_repetition: float = 1.0
    mix_by: Literal["samples", "targets"] = "samples"
    mix_size: int | None = None
    val_fraction: float = 0.05
    shard_tokens: int = 50_000_000
    seed: int = 1337
    engine: Literal[cli.table_keys("preparation/engines.py", "ENGINES")] = "local"
    ray_address: str | None = None
    workers: int | None = None
    show: int = 0

    def __post_init__(self) -> None:
        for name in ("data", "benchmarks"):
            value = getattr(self, name)
            setattr(self, name, [str(path) for path in (value if isinstance(value, list) else [value])])
        cli.check_numbers(self, "show", "leak_words", "min_words", "seed", least=0)
        cli.check_numbers(self, "max_seq_length", least=2)
        cli.check_numbers(self, "overlap", least=0, below=self.max_seq_length)
        cli.check_numbers(self, "max_tokens", "mix_size", "workers", "shard_tokens", least=1)
        cli.check_numbers(self, "near_duplicates", "similar", "leak_cosine", "max_repetition", least=0, most=1)
        cli.check_numbers(self, "val_fraction", least=0, below=1)
        self._check_ray_address()
        if not self.data:
            if not self.show or self.out_dir is None:
                raise UserError("--data is required (or --show N and --out_dir, to look at a prepared folder)")
            return
        if self.checkpoint_dir is None:
            raise UserError("--checkpoint_dir is required")

    def _check_ray_address(self) -> None:
        """Raise UserError for an address that is none, or that no engine would use."""
        if self.ray_address is None:
            return
        if self.engine != "ray":
            raise UserError(f"--ray_address {self.ray_address}: is for --engine ray")
        if self.ray_address != "auto" and not re.fullmatch(r"[\w.-]+:\d+", self.ray_address):
            raise UserError(f"--ray_address {self.ray_address}: expected HOST:PORT, or auto")


if __name__ == "__main__":
    settings = cli.parse(Settings)

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from preparation import cleaning
from preparation.benchmarks import BenchmarkSample, benchmark_ngrams, read_benchmarks
from preparation.dropping import drop_by_embedding, drop_exact_duplicates, drop_near_duplicates
from preparation.engines import ENGINES
from preparation.filtering import FilteredRow, filter_rows
from preparation.markup import harmless
from preparation.mixture import Source, find_sources
from preparation.prepared_folder import (
    Prepared,
    check_replaceable,
    choose_folder,
    describe_counts,
    next_command,
    print_summary,
    write_folder,
)
from preparation.reading import BadRow, Row, read_rows
from preparation.record_store import Records, TokenizedSamples, count_targets
from preparation.records import describe_row
from preparation.rendering import Rendered, render_records
from preparation.report import report_details, write_report
from preparation.sampling import copies_of_samples, example_pools, resampled_sources, sample_examples, sample_validation
from preparation.shapes import with_aliases
from preparation.show import show_folder
from preparation.version import is_prepared, version_of, with_version
from preparation.workers import Context, chunks
from shell.files import new_folder, read_json
from shell.progress import bar
from store.fetch import fetch_folders
from text.prompts import STYLES
from text.tokenizer import Tokenizer


def main(s: Settings) -> None:
    """Prepare data, show a prepared folder, or both."""
    fetch_folders(s)
    if s.data:
        prepare(s)
    if s.show:
        show_folder(s.out_dir, s.checkpoint_dir, s.show, s.seed)


def prepare(s: Settings) -> None:
    """Make a prepared folder, in one pass after the other."""
    sources = find_sources(s.data, s.fields, s.ignore, s.encoding)
    benchmark_sources = find_sources(s.benchmarks, ignore=s.ignore, flag="benchmarks") if s.benchmarks else []
    check_sources(s, sources, benchmark_sources)
    tokenizer = Tokenizer(s.checkpoint_dir)
    style = choose_styles(s, sources, tokenizer)
    version = version_of(s, sources, benchmark_sources, tokenizer)
    s.out_dir = choose_folder(with_version(s.out_dir, version), s.data, sources)
    if is_prepared(s.out_dir, version):
        info = read_json(s.out_dir / "data.json")
        print(
            f"{s.out_dir} has been made of the same data in the same way: it is used as it is; {next_command(s, info)}"
        )
        return
    check_replaceable(s.out_dir)
    benchmarks = read_benchmarks(benchmark_sources, s.seed)
    context = Context(s, sources, tokenizer, *benchmark_ngrams(benchmarks, s.leak_words))
    with new_folder(s.out_dir.absolute()) as folder, ENGINES[s.engine](context) as parallel_map:
        with open(folder / "dropped.jsonl", "w", encoding="utf-8") as log:
            records = Records(folder.parent, [source.name for source in sources], log)
            read_all(s, sources, records, parallel_map)
            if records.are_pairs and not s.mask_prompt:
                raise UserError("--mask_prompt false: of preference pairs only the last answers can be targets")
            style = settle_styles(sources, records, style)
            close_pairs = clean(s, records, benchmarks)
            in_val = sample_validation(records, s.val_fraction, s.seed)
            samples = TokenizedSamples(folder.parent)
            pools = example_pools(sources, records, in_val)
            tokenizing = Tokenizing(s.seed, sources, records, samples, pools, parallel_map)
            tokenize_all(tokenizing, np.flatnonzero(records.kept()))
            train = mix(s, tokenizing, in_val)
        if not len(train):
            raise UserError("no sample is left: " + describe_counts(records))
        prepared = Prepared(sources, benchmarks, tokenizer, style, records, samples, in_val, train)
        info = write_folder(s, folder, prepared, version)
        write_report(folder / "report.html", info, report_details(prepared, close_pairs, s.seed))
    print_summary(s, info, samples)
    for name in never_seen(sources, info):
        print(f"note: --ignore {harmless(name)}: no row has a column, and no message a key, of that name")


# -------------------------------------------------------------------------------------------------- what is asked for


def check_sources(s: Settings, sources: list[Source], benchmarks: list[Source]) -> None:
    """Raise UserError for what is known to be wrong before anything is read."""
    if s.mix_size and all(source.weight is None for source in sources):
        raise UserError(f"--mix_size {s.mix_size} is for a mixture whose sources have a weight; none has one")
    files = {path.resolve() for source in sources if isinstance(source.path, list) for path in source.path}
    for source in benchmarks:
        for path in source.path if isinstance(source.path, list) else []:
            if path.resolve() in files:
                raise UserError(f"--benchmarks {path} is in --data too: nothing of it would be left")
    if cleaning.needs_embedding(s, benchmarks):
        cleaning.check_embedding()


def choose_styles(s: Settings, sources: list[Source], tokenizer: Tokenizer) -> str:
    """Give a prompt style to the sources that name none. Returns that style, or the first source's if all name one."""
    style = s.prompt_style or ("checkpoint" if tokenizer.chat_template else "alpaca")
    for source in sources:
        source.asked_style = source.prompt_style or s.prompt_style
        source.prompt_style = source.prompt_style or style
        if source.prompt_style not in STYLES:
            where = "--prompt_style" if source.prompt_style == s.prompt_style else f"source {source.name}: prompt_style"
            raise UserError(f"{where} {source.prompt_style}: expected one of {', '.join(STYLES)}")
    return style if any(source.prompt_style == style for source in sources) else sources[0].prompt_style


# -------------------------------------------------------------------------------------------------- read and clean


def read_all(s: Settings, sources: list[Source], records: Records, parallel_map: Callable) -> None:
    """Read all rows, parse and filter them on all cores, and add them to `records`."""
    for number, source in enumerate(sources):
        with bar(what=f"reading {harmless(source.name)}", unit=" samples") as progress:
            rows = read_rows(source, lambda share, progress=progress: set_total(progress, share), s.skip_bad)
            rows = describe_first(source, rows)
            tasks = ((number, chunk) for chunk in chunks(rows, size_of_row))
            for filtered in parallel_map(filter_rows, tasks):
                for row in filtered:
                    add_row(s, records, number, row)
                progress.update(len(filtered))


def settle_styles(sources: list[Source], records: Records, style: str) -> str:
    """Give style plain to sources of nothing but raw text, which is rendered so. Returns the style of the others."""
    for source, facts in zip(sources, records.facts, strict=True):
        if {name for group, name in facts if group == "rows"} == {"raw text"}:
            source.prompt_style = "plain"
    return style if any(source.prompt_style == style for source in sources) else sources[0].prompt_style


def never_seen(sources: list[Source], info: dict) -> list[str]:
    """The names to be ignored that no source has."""
    names = dict.fromkeys(name for source in sources for name in source.ignore)
    seen = {name for source in info["sources"] for name in source["contents"].get("left out by --ignore", ())}
    return [name for name in names if seen.isdisjoint(with_aliases((name,)))]


def describe_first(source: Source, rows: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows, and print what the first of them is taken for."""
    for first in rows:
        with contextlib.suppress(BadRow):  # which is for whoever reads the row to report
            tqdm.write(f"{harmless(source.name)}: {harmless(describe_row(source, first))}")
        yield first
        break
    yield from rows


def size_of_row(row: Row) -> int:
    """Bytes of a row that is not parsed yet."""
    return len(row.data) if isinstance(row.data, bytes) else 0


def set_total(progress: tqdm, share: float) -> None:
    """Estimate a progress bar's total, from the share of the source that its rows so far were read from."""
    progress.total = round(progress.n / share) if share and progress.n else None


def add_row(s: Settings, records: Records, source: int, row: FilteredRow) -> None:
    """Add a row of a source, by its number. UserError for one that cannot be read, or with --skip_bad a line of log."""
    records.counts[source]["read"] += 1
    if not row.bad:
        records.add(source, row)
    elif s.skip_bad:
        records.log(row.place, source, "bad", detail=row.bad)
    else:
        raise UserError(f"{row.place}: {row.bad}")


def clean(s: Settings, records: Records, benchmarks: list[BenchmarkSample]) -> list[dict]:
    """Drop duplicates and benchmark leaks. Returns the pairs nearest to the thresholds, for the report."""
    pairs = []
    if not len(records):
        return pairs
    if s.drop_duplicates:
        drop_exact_duplicates(records)
    if s.near_duplicates:
        pairs += drop_near_duplicates(records, s.near_duplicates)
    if cleaning.needs_embedding(s, benchmarks):
        pairs += drop_by_embedding(records, benchmarks, s.leak_cosine, s.similar, s.out_dir.parent)
    return pairs


# ------------------------------------------------------------------------------------------------- tokenise and mix


class Tokenizing(NamedTuple):
    """What `tokenize_all` reads and writes. pools: for each source the records that may be examples, or None."""

    seed: int
    sources: list[Source]
    records: Records
    samples: TokenizedSamples
    pools: list[np.ndarray | None]
    parallel_map: Callable


def tokenize_all(tokenizing: Tokenizing, numbers: np.ndarray, copy: int = 0) -> None:
    """Render and tokenise the records with these numbers and add them to the samples; drop those that do not fit.

    copy: counts the copies that the mixture has of a sample: each gets other few-shot examples.
    """
    seed, sources, records, samples, pools, parallel_map = tokenizing
    waiting = deque()  # the chunks in work: numbers of records, and for each those of its examples

    def tasks():
        for chunk in chunks(map(int, numbers)):  # not all of them as objects at once
            of = [records.sources[number] for number in chunk]
            examples = [sample_examples(sources[i], pools[i], seed, n, copy) for i, n in zip(of, chunk, strict=True)]
            waiting.append((chunk, examples))
            yield [
                (source, records.raw(number), [records.raw(i) for i in before])
                for source, number, before in zip(of, chunk, examples, strict=True)
            ]

    with bar(what="tokenising", unit=" samples", total=len(numbers)) as progress:
        for rendered in parallel_map(render_records, tasks()):
            for number, examples, result in zip(*waiting.popleft(), rendered, strict=True):
                add_sample(records, samples, number, examples, result, copy)
            progress.update(len(rendered))


def add_sample(
    records: Records, samples: TokenizedSamples, number: int, examples: list[int], result: Rendered, copy: int
) -> None:
    """Add what was rendered of record `number`, or drop the record with the reason why nothing was."""
    source = records.sources[number]
    trained = [each for each in result.samples if all(count_targets(each.is_target, each.beginning, each.first_end))]
    if not trained:
        reason, _, detail = ("no target" if result.samples else result.outcome).partition(": ")
        records.drop(number, reason, detail=detail or None)
        return
    if not copy:
        records.cut[source] += result.outcome == "prompt cut"
        records.notes[source].update(result.notes)
        records.notes[source]["documents cut into pieces"] += result.outcome == "cut into pieces"
        records.notes[source]["pieces without a target, left out"] += len(result.samples) - len(trained)
    for tokens in trained:
        samples.add(source, number, examples[: result.examples], tokens)


def mix(s: Settings, tokenizing: Tokenizing, in_val: np.ndarray) -> np.ndarray:
    """The numbers of the samples to train on, each as often as its source's weight or number of samples says."""
    sources, samples = tokenizing.sources, tokenizing.samples
    candidates = np.flatnonzero(~in_val[samples.records()])
    source_of = samples.sources()[candidates]
    sizes = samples.target_counts()[candidates] if s.mix_by == "targets" else np.ones(len(candidates), int)
    copies = copies_of_samples(s, sources, source_of, sizes)
    resampled = resampled_sources(sources)[source_of]
    order = [np.repeat(candidates, np.where(resampled, np.minimum(copies, 1), copies))]
    copies = np.where(resampled, copies, 0)
    for copy in range(1, copies.max(initial=0)):  # with other few-shot examples, each copy is a sample of its own
        before, again = len(samples), samples.records()[candidates[copies > copy]]
        tokenize_all(tokenizing, again, copy)
        order.append(np.arange(before, len(samples)))
    return np.concatenate(order)


if __name__ == "__main__":
    cli.run(main, settings)
