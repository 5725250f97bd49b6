"""The prepared folder: where it goes, and the files in it. samples/shards.py describes the tensors.

train.safetensors and val.safetensors, or shards of them, hold the samples; samples.jsonl names the row, and the
examples, that each was made of; data.json has settings, hashes and counts. (dropped.jsonl is record_store.py's,
report.html is report.py's.)
"""

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from preparation.benchmarks import BenchmarkSample, describe_benchmarks
from preparation.markup import harmless
from preparation.mixture import Source, free_name
from preparation.record_store import Records, TokenizedSamples
from shell.cli import UserError
from shell.files import MANIFEST, read_json, write_json
from store.cache import address_of
from text.tokenizer import Tokenizer

CLEANING = (  # settings that data.json keeps, as the steps of the cleaning
    "skip_bad", "min_words", "max_repetition", "leak_words", "drop_duplicates", "near_duplicates", "similar",
    "leak_cosine", "max_tokens",
)  # fmt: skip
WRITTEN = (  # the last two are finetune.py's, and are of no use for other data
    "train.safetensors", "val.safetensors", "train-*-of-*.safetensors", "val-*-of-*.safetensors", "data.json",
    "samples.jsonl", "dropped.jsonl", "report.html", MANIFEST,
    "reference-*.safetensors", "teacher-*.safetensors",
)  # fmt: skip
UNTRAINED = ("empty", "masked (weight 0)")  # kinds of answers
REMARKABLE = ("samples", "left out by --ignore", "rendering")  # groups of contents that the terminal shows


# ------------------------------------------------------------------------------------------------ where it goes


def choose_folder(out_dir: Path | None, data: list[str], sources: list[Source]) -> Path:
    """`out_dir`, or the default for this data. Raises UserError if that would replace a folder it should not."""
    folder = out_dir or Path("prepared", default_name(data[0]))
    if not folder.exists():
        return folder
    if not (folder / "data.json").is_file():
        raise UserError(f"--out_dir {folder} exists and is no prepared folder: choose another, nothing is overwritten")
    if out_dir is None and _paths_in(folder) != {Path(path).resolve() for x in sources for path in _input_paths(x)}:
        raise UserError(f"{folder} was made of other data: name a folder with --out_dir (that one, to replace it)")
    return folder


def check_replaceable(folder: Path) -> None:
    """Raise UserError if a folder that is about to be replaced holds what prepare_data.py did not write."""
    found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    others = [name for name in found if not any(fnmatchcase(name, pattern) for pattern in WRITTEN)]
    if others:
        raise UserError(
            f"--out_dir {folder} is made again, and holds {others[0]}, which prepare_data.py did not write: move it "
            "away, or choose another folder"
        )


def default_name(text: str) -> str:
    """The name of the prepared folder for the first text of --data."""
    return Path(text).stem if text.lower().endswith((".yaml", ".yml")) else free_name(text.partition(":")[0], set())


def _paths_in(folder):
    """What a prepared folder was made of, as full paths; None if its data.json is not one that this file writes."""
    try:
        return {Path(path).resolve() for x in read_json(folder / "data.json")["sources"] for path in x["paths"]}
    except (KeyError, TypeError):
        return None


# ------------------------------------------------------------------------------------------------ what is in it


class Prepared(NamedTuple):
    """What the passes made of the data. in_val: (N,) bool, the records held back for validation.

    style: the prompt style of the sources that name none. train: the numbers of the samples to train on, each as often
    as the mixture takes it.
    """

    sources: list[Source]
    benchmarks: list[BenchmarkSample]
    tokenizer: Tokenizer
    style: str
    records: Records
    samples: TokenizedSamples
    in_val: np.ndarray
    train: np.ndarray


def write_folder(s: Any, folder: Path, prepared: Prepared, version: str | None) -> dict:
    """Write both parts, samples.jsonl and data.json, whose content is returned.

    s: the Settings of prepare_data.py. version: of the data (version.py), None if they have none.
    """
    records, samples, tokenizer, sizes = prepared.records, prepared.samples, prepared.tokenizer, {}
    parts = {"train": prepared.train, "val": np.flatnonzero(prepared.in_val[samples.records()])}
    with open(folder / "samples.jsonl", "w", encoding="utf-8") as file:
        for part, numbers in parts.items():
            sizes[part] = samples.writer.save(folder, part, numbers, s.shard_tokens)
            file.writelines(_origin(records, samples, part, number) for number in numbers.tolist())
    in_template = any(source.prompt_style == "checkpoint" for source in prepared.sources)
    info = {
        "version": version,
        "kind": "pairs" if records.are_pairs else "samples",
        "tokenizer_hash": tokenizer.file_hash(),
        **({"chat_template_hash": tokenizer.template_hash()} if in_template else {}),
        "checkpoint_dir": address_of(s.checkpoint_dir),
        "prompt_style": prepared.style,
        "template_args": s.template_args,
        "max_seq_length": s.max_seq_length,
        "overlap": s.overlap,
        "mask_prompt": s.mask_prompt,
        "answers": s.answers,
        "cleaning": {name: getattr(s, name) for name in CLEANING},
        "mix_by": s.mix_by,
        "mix_size": s.mix_size,
        "val_fraction": s.val_fraction,
        "seed": s.seed,
        "sources": [_describe_source(prepared, number) for number in range(len(prepared.sources))],
        "benchmarks": describe_benchmarks(prepared.benchmarks, records),
        **sizes,
    }
    write_json(folder / "data.json", info)
    return info


def _origin(records, samples, part, number):
    """The line of samples.jsonl for one sample: the id of its row, and of the examples before its question."""
    record = samples.record(number)
    line = {"part": part, "source": records.names[records.sources[record]], "id": records[record]["id"]}
    if examples := samples.examples(number):
        line["examples"] = [records[i]["id"] for i in examples]
    return json.dumps(line, ensure_ascii=False) + "\n"


def _describe_source(prepared, number):
    """A source as data.json keeps it: its files, how it was used, how many of its rows went where."""
    source, records, samples = prepared.sources[number], prepared.records, prepared.samples
    mine = prepared.train[samples.sources()[prepared.train] == number]
    kept = records.kept() & (np.array(records.sources, np.int64) == number)
    used = ("fields", "ignore", "encoding", "prompt_style", "weight", "samples", "few_shot", "min_words", "max_tokens",
            "max_repetition")  # fmt: skip
    return {
        **_input_files(source),
        **{name: value for name in used if (value := getattr(source, name)) not in (None, (), (0, 0))},
        **({} if source.shuffle_choices else {"shuffle_choices": False}),
        "counts": {**records.counts[number], "kept": int(kept.sum()), "mixed": len(mine)},
        "held_back": int((prepared.in_val & kept).sum()),
        "prompts_cut": records.cut[number],
        "contents": _describe_contents(records, number),
        "tokens": int(samples.lengths()[mine].sum()),
        "targets": int(samples.target_counts()[mine].sum()),
    }


def _describe_contents(records, number):
    """{group: {name: how often}}: what the rows of a source hold, and under "rendering" what became of it."""
    groups = {}
    for (group, name), times in records.facts[number].items():
        groups.setdefault(group, {})[name] = times
    notes = {name: times for name, times in records.notes[number].items() if times}
    return {**dict(sorted(groups.items())), **({"rendering": notes} if notes else {})}


def _input_files(source):
    """The name, paths and hashes of what a source was read from; of a dataset by name the hash of its rows."""
    paths = _input_paths(source)
    if isinstance(source.path, str):
        which = {"config": source.config, "split": source.split}
        return {"name": source.name, "paths": paths, "sha256": [source.rows_hash], **which}
    return {"name": source.name, "paths": paths, "sha256": source.file_hashes}


def _input_paths(source):
    return [source.path] if isinstance(source.path, str) else [str(path) for path in source.path]


# ------------------------------------------------------------------------------------------------ on the terminal


def print_summary(s: Any, info: dict, samples: TokenizedSamples) -> None:
    """Print what is in the folder and what to do next. s: the Settings of prepare_data.py. info: that of data.json."""
    for source in info["sources"]:
        counts = {**source["counts"], "with a cut prompt": source["prompts_cut"]}
        print(f"{source['name']}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items() if count))
        if remarks := _remarks(source["contents"]):
            print("  " + "; ".join(remarks))
    lengths = samples.lengths()
    length = f"median {np.median(lengths):.0f}, longest {lengths.max()}"
    print(f"prompt style {info['prompt_style']}; tokens a sample: {length}")
    for part in ("train", "val"):
        print("{}: {samples:,} samples, {tokens:,} tokens, {targets:,} of them targets".format(part, **info[part]))
    print(f"written to {s.out_dir}, with report.html; {next_command(s, info)}")


def next_command(s: Any, info: dict) -> str:
    """What to do with a prepared folder, in words."""
    model, objective = address_of(s.checkpoint_dir), " --objective dpo" if info["kind"] == "pairs" else ""
    return f"next: python finetune.py --checkpoint_dir {model} --data_dir {s.out_dir}{objective}"


def _remarks(contents):
    """What a user should know of a source's contents, in words: what was left out or changed."""
    answers = {name: times for name, times in contents.get("answers", {}).items() if name in UNTRAINED}
    groups = {"answers": answers} | {name: contents.get(name, {}) for name in REMARKABLE}
    return [
        harmless(f"{group}: " + ", ".join(f"{times:,} {name}" for name, times in counts.items()))
        for group, counts in groups.items()
        if counts
    ]


def describe_counts(records: Records) -> str:
    """How many rows of each source went where, in a line."""
    return "; ".join(
        f"{name}: " + (", ".join(f"{count:,} {what}" for what, count in counts.items()) or "nothing read")
        for name, counts in zip(records.names, records.counts, strict=True)
    )
