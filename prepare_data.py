"""Data in, tokens out: read sources, clean, mix, render in a prompt style, tokenise, split, and report.

    python prepare_data.py --data my.jsonl --checkpoint_dir checkpoints/ORG/MODEL
    python prepare_data.py --data mixture.yaml --checkpoint_dir checkpoints/ORG/MODEL --benchmarks "[test.jsonl]"
    python prepare_data.py --show 5 --out_dir prepared/my

The passes: `read_all` turns rows into records on the disk and filters them; `clean` takes out duplicates and leaks;
`draw_parts` holds back a validation part; `tokenize_all` renders and tokenises what is left, with examples before the
question where they are asked for; `mix` says how often each sample is taken. Memory has a few numbers for each sample,
the disk has the rest, so it stays flat. What was dropped, and why, stands in dropped.jsonl.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shell import cli
from shell.cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        data: Files (.json, .jsonl, .csv, .tsv, .parquet, the first four also with .gz), patterns such as "*.jsonl",
            names of Hugging Face datasets, or one mixture (.yaml, see README).
        checkpoint_dir: Model folder, for its tokenizer.
        out_dir: Folder to write; prepared/NAME for NAME.jsonl if not given.
        prompt_style: plain, alpaca, dolly, vicuna, llama2-chat, mistral-instruct, chatml or checkpoint (the model's own
            chat template); checkpoint where the model has a template, otherwise alpaca, if not given.
        max_seq_length: Tokens a sample may have. Of longer ones the prompt is cut from its start, never the answer.
        mask_prompt: Only the answers are targets.
        prompt_field: Name of the field with the prompt, if not one of the usual ones, or a template such as
            "{context} {question}".
        input_field: The same for the text that the prompt is about.
        answer_field: The same for the answer.
        skip_bad: Count and list rows (and rests of files) that cannot be read, instead of stopping at the first.
        drop_duplicates: Of samples with the same prompt keep the one with the longest answer.
        near_duplicates: Drop a sample whose prompt shares this much of its word triples (Jaccard, by MinHash) with an
            earlier one's, such as 0.8; 0 for not at all.
        similar: Drop a sample whose prompt's embedding has a cosine above this to an earlier one's, such as 0.7; 0
            for not at all. Needs requirements-data.txt.
        benchmarks: Files or datasets with the usual field names, or a mixture; none of their samples is trained on.
        leak_words: A sample that has so many words in a row from a benchmark is dropped; 0 for no such check.
        leak_cosine: So is one whose prompt's embedding has at least this cosine to a benchmark's; 0 for no such check.
            Needs requirements-data.txt.
        min_words: Words that prompt and answer must have together.
        max_tokens: Drop samples that are longer, instead of cutting their prompts.
        max_repetition: Drop samples with a larger share of repeated runs of five words.
        mix_by: What the weights of a mixture count: samples or target tokens.
        mix_size: How many of these the weighted sources have together; as many as are there, if not given.
        val_fraction: Share of the samples that is held back for validation.
        seed: Decides which, and everything else that is drawn.
        workers: Processes that tokenise; one for each core, if not given.
        show: Print so many samples of the prepared folder, targets in colour.
    """

    data: list[str] | str = field(default_factory=list)
    checkpoint_dir: Path | None = None
    out_dir: Path | None = None
    prompt_style: str | None = None
    max_seq_length: int = 2048
    mask_prompt: bool = True
    prompt_field: str | None = None
    input_field: str | None = None
    answer_field: str | None = None
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
    seed: int = 1337
    workers: int | None = None
    show: int = 0

    def __post_init__(self):
        for name in ("data", "benchmarks"):
            value = getattr(self, name)
            setattr(self, name, [str(path) for path in (value if isinstance(value, list) else [value])])
        cli.check_numbers(self, "show", "leak_words", "min_words", "seed", least=0)
        cli.check_numbers(self, "max_seq_length", least=2)
        cli.check_numbers(self, "max_tokens", "mix_size", "workers", least=1)
        cli.check_numbers(self, "near_duplicates", "similar", "leak_cosine", "max_repetition", least=0, most=1)
        cli.check_numbers(self, "val_fraction", least=0, below=1)
        if not self.data:
            if not self.show or self.out_dir is None:
                raise UserError("--data is required (or --show N and --out_dir, to look at a prepared folder)")
            return
        if self.checkpoint_dir is None:
            raise UserError("--checkpoint_dir is required")
        if (self.prompt_field is None) != (self.answer_field is None):
            raise UserError("--prompt_field and --answer_field go together: give both or none")


if __name__ == "__main__":
    settings = cli.parse(Settings)

import contextlib
import os
import sys
import tempfile
from collections import Counter
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from preparation import cleaning, report
from preparation.mixture import find_sources, free_name
from preparation.reading import BadRow, read_rows
from preparation.record_store import Records, Tokenized
from preparation.records import to_record
from preparation.rendering import Job, each_core, examine, render
from preparation.sampling import choose_examples, draw_validation, example_pools, how_often, redrawn
from shell.files import new_folder, read_json, sha256, write_json
from text.prompts import STYLES, check_dialog
from text.tokenizer import Tokenizer

CHUNK = 128  # rows that a worker gets at a time
EMBEDDED = 32  # texts that the embedding model gets at a time
BIG = 2**20  # bytes of input that are worth another process
CLEANING = (  # settings that data.json keeps, as the steps of the cleaning
    "skip_bad", "min_words", "max_repetition", "leak_words", "drop_duplicates", "near_duplicates", "similar",
    "leak_cosine", "max_tokens",
)  # fmt: skip
EXAMPLES = 10  # samples that the report shows
REPORTED_BATCH, REPORTED_BUDGETS, REPORTED_STEPS = 128, (1024, 2048, 4096, 8192), 20


def main(s):
    if s.data:
        prepare(s)
    if s.show:
        show(s)


def prepare(s):
    fields = {"prompt": s.prompt_field, "input": s.input_field, "answer": s.answer_field}
    sources = find_sources(s.data, {role: name for role, name in fields.items() if name} or None)
    choose_folder(s, sources)
    benchmarks = find_sources(s.benchmarks, flag="benchmarks") if s.benchmarks else []
    check_sources(s, sources, benchmarks)
    tokenizer = Tokenizer(s.checkpoint_dir)
    style = choose_styles(s, sources, tokenizer)
    items = read_benchmarks(s, benchmarks)
    job = Job(s, sources, tokenizer, *words_to_avoid(s, items))
    with new_folder(s.out_dir.absolute()) as folder, each_core(job, worker_count(s, sources)) as each:
        with open(folder / "dropped.jsonl", "w", encoding="utf-8") as log:
            records = Records(folder.parent, [source.name for source in sources], log)
            read_all(s, sources, records, each)
            pairs = clean(s, records, items)
            in_val = draw_validation(s, records)
            samples = Tokenized(folder.parent)
            tokenize_all(s, sources, records, samples, in_val, np.flatnonzero(records.alive()), each)
            train = mix(s, sources, records, samples, in_val, each)
        if not len(train):
            raise UserError("no sample is left: " + describe_counts(sources, records))
        info = write_folder(s, folder, sources, items, records, samples, in_val, train, tokenizer, style)
        report.write_report(folder / "report.html", info, details(s, records, samples, train, pairs, tokenizer))
    describe(s, info, samples, sources, records)


def choose_folder(s, sources):
    """Set `out_dir` if it is not given. Raises UserError where that would replace what is not meant."""
    given, s.out_dir = s.out_dir, s.out_dir or Path("prepared", default_name(s.data[0]))
    if not s.out_dir.exists():
        return
    if not (s.out_dir / "data.json").is_file():
        raise UserError(
            f"--out_dir {s.out_dir} exists and is no prepared folder: choose another, nothing is overwritten"
        )
    here = {Path(path).resolve() for source in sources for path in input_paths(source)}
    if given is None and paths_of(s.out_dir) != here:
        raise UserError(f"{s.out_dir} was made of other data: name a folder with --out_dir (that one, to replace it)")


def paths_of(folder):
    """What a prepared folder was made of, as full paths; None if its data.json is not one that this file writes."""
    try:
        return {Path(path).resolve() for x in read_json(folder / "data.json")["sources"] for path in x["paths"]}
    except (KeyError, TypeError):
        return None


def default_name(text):
    """The name of the prepared folder for the first text of --data."""
    return Path(text).stem if text.lower().endswith((".yaml", ".yml")) else free_name(text.partition(":")[0], set())


def check_sources(s, sources, benchmarks):
    """Raise UserError for what can be known to be wrong before anything is read."""
    if s.mix_size and all(source.weight is None for source in sources):
        raise UserError(f"--mix_size {s.mix_size} is for a mixture whose sources have a weight; none has one")
    files = {path.resolve() for source in sources if isinstance(source.path, list) for path in source.path}
    for source in benchmarks:
        for path in source.path if isinstance(source.path, list) else []:
            if path.resolve() in files:
                raise UserError(f"--benchmarks {path} is in --data too: nothing of it would be left")
    if s.similar or (benchmarks and s.leak_cosine):
        cleaning.check_embedding()


def show(s):
    from batching import Samples, read_data_info

    if not (s.out_dir / "data.json").is_file():
        raise UserError(
            f"{s.out_dir / 'data.json'} does not exist: --show needs a folder made by prepare_data.py as --out_dir"
        )
    info = read_data_info(s.out_dir)
    folder = s.checkpoint_dir or info.get("checkpoint_dir")
    if folder is None or not Path(folder).is_dir():
        raise UserError(
            f"--show needs the model folder whose tokenizer {s.out_dir} was made with: give --checkpoint_dir"
        )
    tokenizer = Tokenizer(folder)
    if tokenizer.file_hash() != info["tokenizer_hash"]:
        raise UserError(f"{s.out_dir} was made with another tokenizer than {folder}'s: see --checkpoint_dir")
    with contextlib.suppress(AttributeError):  # where the output is no terminal or file
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    report.show(tokenizer, Samples(s.out_dir / "train.safetensors"), info, s.show, s.seed, color)


def choose_styles(s, sources, tokenizer):
    """Give a prompt style to the sources that name none. Returns it, or if all do, that of the first."""
    style = s.prompt_style or ("checkpoint" if tokenizer.chat_template else "alpaca")
    for source in sources:
        source.prompt_style = source.prompt_style or style
        if source.prompt_style not in STYLES:
            where = "--prompt_style" if source.prompt_style == s.prompt_style else f"source {source.name}: prompt_style"
            raise UserError(f"{where} {source.prompt_style}: expected one of {', '.join(STYLES)}")
    return style if any(source.prompt_style == style for source in sources) else sources[0].prompt_style


def worker_count(s, sources):
    """So many processes as there are cores for this one, or fewer for little data."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if any(isinstance(source.path, str) for source in sources):  # a dataset's name: its size is not known
        return s.workers or cores
    size = sum(path.stat().st_size for source in sources for path in source.path)
    return s.workers or min(cores, 1 + size // BIG)


def chunks(values, size=lambda value: 0):
    """Lists of `CHUNK` values or fewer; so many fewer that their sizes add up to no more than `BIG` and one of them."""
    chunk, total = [], 0
    for value in values:
        chunk.append(value)
        total += size(value)
        if len(chunk) == CHUNK or total > BIG:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk


# -------------------------------------------------------------------------------------------------------- reading


def read_all(s, sources, records, each):
    """Read all rows, examine them on all cores, and add them to `records`."""
    for number, source in enumerate(sources):
        with tqdm(desc=f"reading {source.name}", unit=" samples") as bar:
            rows = read_rows(source, lambda share, bar=bar: expect(bar, share), s.skip_bad)
            tasks = ((number, chunk) for chunk in chunks(rows, size_of_row))
            for examined in each(examine, tasks):
                for row in examined:
                    add_row(s, records, number, row)
                bar.update(len(examined))


def size_of_row(row):
    """Bytes of a row that is still text."""
    return len(row.data) if isinstance(row.data, bytes) else 0


def expect(bar, share):
    """Tell a progress bar how many rows there must be, if this share of the source gave those that were read."""
    bar.total = round(bar.n / share) if share and bar.n else None


def add_row(s, records, source, row):
    records.counts[source]["read"] += 1
    if not row.bad:
        records.add(source, row)
    elif s.skip_bad:
        records.note(row.place, source, "bad", detail=row.bad)
    else:
        raise UserError(f"{row.place}: {row.bad}")


class Item(NamedTuple):
    """A sample of a benchmark."""

    file: str
    place: str
    prompt: str
    answer: str


def read_benchmarks(s, benchmarks):
    """An `Item` for everything that must not be trained on."""
    items = []
    for source in benchmarks:
        for row in read_rows(source, lambda share: None):
            try:
                record = to_record(source, row, s.seed)
                check_dialog(record["messages"], last="assistant")
            except (BadRow, UserError) as error:
                raise UserError(f"{row.place}: {error}") from None
            answers = [message["content"] for message in record["messages"] if message["role"] == "assistant"]
            items.append(Item(row.file, row.place, record["key"], "\n".join(answers)))
    return items


def words_to_avoid(s, items):
    """The benchmarks' prompts and long answers as `cleaning.Ngrams`, None if there are none, and where each is from."""
    if not items or not s.leak_words:
        return None, []
    long = [item for item in items if len(cleaning.words(item.answer)) >= s.leak_words]
    texts = [item.prompt for item in items] + [item.answer for item in long]
    return cleaning.Ngrams(texts, s.leak_words), [item.place for item in (*items, *long)]


# ------------------------------------------------------------------------------------------------------- cleaning


def clean(s, records, items):
    """Drop duplicates and leaks. Returns the pairs near the thresholds, for the report."""
    pairs = []
    if s.drop_duplicates and len(records):
        columns = np.array(records.hashes), np.array(records.answers)
        of = cleaning.exact_duplicates(*columns, records.alive())
        for number in np.flatnonzero(of >= 0):
            records.drop(number, "duplicate", of=records[of[number]]["id"])
    if s.near_duplicates and len(records):
        matches = cleaning.near_duplicates(records.signatures(), records.alive(), s.near_duplicates)
        pairs += drop_matches(records, matches, "near duplicate", s.near_duplicates)
    if s.similar or (items and s.leak_cosine):
        pairs += clean_by_meaning(s, records, items)
    return pairs


def clean_by_meaning(s, records, items):
    """The steps that compare embeddings of prompts: `leak_cosine`, then `similar`, which no leak shall win."""
    pairs, asked = [], [item for item in items if item.prompt.strip()]
    with tempfile.TemporaryFile(dir=s.out_dir.parent) as file:
        embeddings = embed_prompts(records, file)
        if asked and s.leak_cosine:
            forbidden = cleaning.embed([item.prompt for item in asked], EMBEDDED)
            matches = cleaning.leaks(embeddings, records.alive(), forbidden, s.leak_cosine)
            texts = [{"id": item.place, "text": item.prompt} for item in asked]
            pairs += drop_matches(records, matches, "similar to a benchmark", s.leak_cosine, texts)
        if s.similar:
            matches = cleaning.similar(embeddings, records.alive(), s.similar)
            pairs += drop_matches(records, matches, "similar", s.similar)
    return pairs


def embed_prompts(records, file):
    """(N, 384) float16 in `file`: the embedding of each prompt that is still there, zeros for the others."""
    embeddings = np.memmap(file, np.float16, "w+", shape=(max(1, len(records)), 384))
    with tqdm(desc="embedding", unit=" samples", total=int(records.alive().sum())) as bar:
        for numbers in chunks(np.flatnonzero(records.alive()).tolist()):
            texts = [records[number]["key"] for number in numbers]
            embeddings[numbers] = cleaning.embed(texts, EMBEDDED)
            bar.update(len(numbers))
    return embeddings[: len(records)]


def drop_matches(records, matches, step, threshold, benchmark=None):
    """Drop what `matches` found. Returns its pairs near the threshold as the report wants them.

    benchmark: what the first numbers of the matches stand for, if not for records.
    """

    def text(number):
        return {"id": records[number]["id"], "text": records[number]["key"]}

    def first(number):
        return benchmark[number] if benchmark else text(number)

    for number in np.flatnonzero(matches.of >= 0):
        records.drop(number, step, of=first(matches.of[number])["id"], score=rounded(matches.score[number]))
    return [
        {
            "step": step, "score": rounded(score), "threshold": threshold, "dropped": bool(matches.of[other] >= 0),
            "kept": first(kept), "other": text(other),
        }
        for kept, other, score in matches.close
    ]  # fmt: skip


def rounded(score):
    return round(float(score), 4)


# ---------------------------------------------------------------------------------------------- tokens and mixing


def tokenize_all(s, sources, records, samples, in_val, numbers, each, copy=0):
    """Render and tokenise the records with these numbers and add them to `samples`; what cannot be, is dropped.

    copy: each copy of a sample gets other examples before its question.
    """
    pools = example_pools(sources, records, in_val)
    waiting = []  # the numbers of the chunks that are being worked on, with those of their examples

    def tasks():
        for chunk in chunks(numbers.tolist()):
            chosen = [choose_examples(s, sources, records, pools, number, copy) for number in chunk]
            waiting.append((chunk, chosen))
            yield [
                (records.sources[number], records.raw(number), [records.raw(i) for i in examples])
                for number, examples in zip(chunk, chosen, strict=True)
            ]

    with tqdm(desc="tokenising", unit=" samples", total=len(numbers)) as bar:
        for rendered in each(render, tasks()):
            for number, examples, result in zip(*waiting.pop(0), rendered, strict=True):
                add_sample(records, samples, number, examples, result, copy)
            bar.update(len(rendered))


def add_sample(records, samples, number, examples, result, copy):
    source = records.sources[number]
    if not result.ids:
        reason, _, detail = result.outcome.partition(": ")
        records.drop(number, reason, detail=detail or None)
        return
    records.cut[source] += result.outcome == "prompt cut" and not copy
    samples.add(source, number, examples[: result.examples], result.ids, result.is_target)


def mix(s, sources, records, samples, in_val, each):
    """The numbers of the samples to train on, each as often as its source's weight or number of samples says."""
    candidates = np.flatnonzero(~in_val[samples.records()])
    of = samples.sources()[candidates]
    times = how_often(s, sources, of, samples.targets()[candidates] if s.mix_by == "targets" else np.ones(len(of), int))
    order = [np.repeat(candidates, np.where(redrawn(sources)[of], np.minimum(times, 1), times))]
    times = np.where(redrawn(sources)[of], times, 0)
    for copy in range(1, times.max(initial=0)):  # with other examples before the question, each copy is a new sample
        before, again = len(samples), samples.records()[candidates[times > copy]]
        tokenize_all(s, sources, records, samples, in_val, again, each, copy)
        order.append(np.arange(before, len(samples)))
    return np.concatenate(order)


# -------------------------------------------------------------------------------------------------------- writing


def write_folder(s, folder, sources, items, records, samples, in_val, train, tokenizer, style):
    """Write both parts, samples.jsonl (what each sample was made of) and data.json. Returns the content of the last."""
    parts, sizes = {"train": train, "val": np.flatnonzero(in_val[samples.records()])}, {}
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as file:
        for part, numbers in parts.items():
            samples.writer.save(folder / f"{part}.safetensors", numbers)
            lengths, targets = np.diff(samples.writer.offsets)[numbers], samples.targets()[numbers]
            sizes[part] = {"samples": len(numbers), "tokens": int(lengths.sum()), "targets": int(targets.sum())}
            file.writelines(origin(records, samples, part, number) for number in numbers.tolist())
    info = {
        "tokenizer_hash": tokenizer.file_hash(),
        "checkpoint_dir": str(s.checkpoint_dir),
        "prompt_style": style,
        "max_seq_length": s.max_seq_length,
        "mask_prompt": s.mask_prompt,
        "cleaning": {name: getattr(s, name) for name in CLEANING},
        "mix_by": s.mix_by,
        "mix_size": s.mix_size,
        "val_fraction": s.val_fraction,
        "seed": s.seed,
        "sources": [describe_source(source, i, records, samples, in_val, train) for i, source in enumerate(sources)],
        "benchmarks": describe_benchmarks(items, records),
        **sizes,
    }
    write_json(folder / "data.json", info)
    return info


def origin(records, samples, part, number):
    """The line of samples.jsonl for one sample: the id of its row, and of the examples before its question."""
    record = samples.record(number)
    line = {"part": part, "source": records.names[records.sources[record]], "id": records[record]["id"]}
    if examples := samples.examples(number):
        line["examples"] = [records[i]["id"] for i in examples]
    return json.dumps(line, ensure_ascii=False) + "\n"


def input_files(source):
    """The name, paths and hashes of what a source was read from; of a dataset by name the hash of its rows."""
    paths = input_paths(source)
    if isinstance(source.path, str):
        which = {"config": source.config, "split": source.split}
        return {"name": source.name, "paths": paths, "sha256": [source.rows_hash], **which}
    return {"name": source.name, "paths": paths, "sha256": [sha256(path) for path in paths]}


def input_paths(source):
    return [source.path] if isinstance(source.path, str) else [str(path) for path in source.path]


def describe_benchmarks(items, records):
    """For each file of the benchmarks its hash (none for a dataset by name) and how many rows leaked from it."""
    leaks = Counter()
    for item in items:
        leaks[item.file] += records.leaks[item.place]
    return [
        {"path": file, "sha256": sha256(file) if Path(file).is_file() else None, "leaks": count}
        for file, count in leaks.items()
    ]


def describe_source(source, number, records, samples, in_val, train):
    """A source as data.json keeps it: its files, how it was used, what became of its rows."""
    mine = train[samples.sources()[train] == number]
    used = ("fields", "prompt_style", "weight", "samples", "few_shot", "min_words", "max_tokens", "max_repetition")
    return {
        **input_files(source),
        **{name: value for name in used if (value := getattr(source, name)) not in (None, (0, 0))},
        **({} if source.shuffle_choices else {"shuffle_choices": False}),
        "counts": {
            **records.counts[number],
            "kept": int((np.array(records.sources, np.int64)[records.alive()] == number).sum()),
            "mixed": len(mine),
        },
        "held_back": int((in_val & records.alive() & (np.array(records.sources, np.int64) == number)).sum()),
        "prompts_cut": records.cut[number],
        "tokens": int(np.diff(samples.writer.offsets)[mine].sum()),
        "targets": int(samples.targets()[mine].sum()),
    }


# ------------------------------------------------------------------------------------------------------ reporting


def details(s, records, samples, train, pairs, tokenizer):
    """What the report shows beside data.json: see `report.write_report`."""
    lengths, targets = np.diff(samples.writer.offsets)[train], samples.targets()[train]
    of = samples.sources()[train]
    shown = sorted(random.Random(s.seed).sample(range(len(train)), min(EXAMPLES, len(train))))
    return {
        "lengths": [((lengths - targets)[of == i], targets[of == i]) for i in range(len(records.names))],
        "padding": padding(s, lengths),
        "pairs": pairs,
        "examples": [example(records, samples, train[i], tokenizer) for i in shown],
    }


def example(records, samples, number, tokenizer):
    ids, is_target = samples.writer.read(number)
    return {
        "id": records[samples.record(number)]["id"],
        "source": records.names[samples.writer.sources[number]],
        "tokens": len(ids),
        "segments": report.segments(tokenizer, ids.tolist(), is_target.tolist()),
    }


def padding(s, lengths):
    """What each planner leaves unused in steps from a random draw, for several budgets."""
    import torch

    from batching import PLANNERS, Samples

    drawn = np.random.default_rng(s.seed).permutation(lengths)[: REPORTED_BATCH * REPORTED_STEPS]
    lengths, rows = torch.from_numpy(drawn - 1), []  # the last token is only ever a target
    for name, planner in PLANNERS.items():
        for budget in REPORTED_BUDGETS:
            steps = planner.plan(lengths, None, REPORTED_BATCH, budget, s.seed, 0)
            sizes = [lengths[micro_batch] for step in steps for micro_batch in step]
            tokens = sum(int(x.sum()) for x in sizes)
            padded = planner.layout is Samples.padded
            positions = sum(len(x) * int(x.max()) for x in sizes) if padded else tokens
            row = {"planner": name, "micro_batch_tokens": budget, "padding": 1 - tokens / positions}
            rows.append({**row, "filled": tokens / (budget * len(sizes)), "micro_batches": len(sizes) / len(steps)})
    return rows


def describe_counts(sources, records):
    return "; ".join(
        f"{source.name}: " + (", ".join(f"{count:,} {what}" for what, count in counts.items()) or "nothing read")
        for source, counts in zip(sources, records.counts, strict=True)
    )


def describe(s, info, samples, sources, records):
    for source in info["sources"]:
        counts = {**source["counts"], "with a cut prompt": source["prompts_cut"]}
        print(f"{source['name']}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items() if count))
    lengths = np.diff(samples.writer.offsets)
    length = f"median {np.median(lengths):.0f}, longest {lengths.max()}"
    print(f"prompt style {info['prompt_style']}; tokens a sample: {length}")
    for part in ("train", "val"):
        print("{}: {samples:,} samples, {tokens:,} tokens, {targets:,} of them targets".format(part, **info[part]))
    print(
        f"written to {s.out_dir}, with report.html; next: python finetune.py --checkpoint_dir {s.checkpoint_dir} "
        f"--data_dir {s.out_dir}"
    )


if __name__ == "__main__":
    cli.run(main, settings)
