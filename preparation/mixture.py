"""Which sources make up the data: named on the command line, or a mixture in a YAML file, checked key by key.

    sources:
      - path: gsm8k_train.jsonl
        weight: 2
      - name: age
        path: bbq/*.jsonl
        fields: {prompt: "{context} {question}", choices: [ans0, ans1, ans2], label: label}
        few_shot: [0, 5]
      - path: openai/gsm8k
        config: main

A path in a mixture is looked for from the mixture's own folder, then from the current one.
"""

import difflib
import functools
import glob
import math
import os
import re
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from preparation.columns import columns_in, is_template, parse_template
from preparation.reading import FORMATS, check_encoding, format_of
from shell.cli import UserError
from shell.files import read_yaml, sha256


@dataclass
class Source:
    """One source of a mixture.

    Args:
        name: What reports call it; unique.
        path: Files, in the order in which they are read; or text: a Hugging Face dataset's name or folder.
        format: A key of `FORMATS`; by the ending of each file if not given.
        fields: Where the parts of a sample are: for each the name of a column, or a template over columns such as
            "{context} {question}" ({{ and }} for braces). "prompt" and "answer", perhaps with "input", "thinking" and
            "history" (a list of pairs); or "messages"; or "text", which is raw. With "choices" (the name of a column
            with a list, or a list of columns) and "label" (the name of the column with the right one's index from 0,
            letter or text) in place of an answer it is multiple choice: {choices} in the prompt is "A. …\\nB. …",
            added at its end if no template has it; the answer is a template over {letter} and {choice} (the right
            one's), "{letter}" if not given. With "chosen" and "rejected" in place of an answer it is a preference pair,
            where "prompt" may be missing (pairs.py). "system" and "tools" go with all but text. If None, the names of
            the columns tell (shapes.py).
        ignore: Keys of messages, and columns with a meaning, that are left out and counted.
        encoding: Of its text files, as Python calls it; UTF-8 if not given.
        shuffle_choices: Give the choices of each sample an order of their own.
        prompt_style: How its prompts are rendered, if not as all.
        weight: Its share when mixing; not together with `samples`.
        samples: How many samples of it are wanted.
        few_shot: The least and the greatest number of examples, of the same source, before a prompt.
        min_words: This source's own value of the flag of that name.
        max_tokens: As min_words.
        max_repetition: As min_words.
        config: The configuration of a Hugging Face dataset, if it has several.
        split: Its split.
    """

    name: str
    path: list[Path] | str
    format: str | None = None
    fields: dict[str, str | list[str]] | None = None
    ignore: tuple[str, ...] = ()
    encoding: str | None = None
    shuffle_choices: bool = True
    prompt_style: str | None = None
    weight: float | None = None
    samples: int | None = None
    few_shot: tuple[int, int] = (0, 0)
    min_words: int | None = None
    max_tokens: int | None = None
    max_repetition: float | None = None
    config: str | None = None
    split: str = "train"
    rows_hash: str | None = field(default=None, init=False)  # SHA-256 of a dataset's rows, once they are read
    asked_style: str | None = field(default=None, init=False)  # the prompt style that the user named for it

    @functools.cached_property
    def file_hashes(self) -> list[str]:
        """The SHA-256 of each of its files. Not for a dataset by name."""
        return [sha256(path) for path in self.path]


def find_sources(
    data: list[str],
    fields: dict[str, str | list[str]] | None = None,
    ignore: Iterable[str] = (),
    encoding: str | None = None,
    flag: str = "data",
) -> list[Source]:
    """The sources that a list of texts names: one each, or those of a mixture's YAML file, which must be the only text.

    A text is a file; a glob, one source of all its files, sorted; a folder that holds a dataset; or a Hugging Face
    dataset as ORG/NAME or ORG/NAME/CONFIG. After the last two :SPLIT may follow if it is not "train". fields, ignore,
    encoding: as in `Source`, for all of them. flag: what the user calls the list. Raises UserError.
    """
    if not data:
        raise UserError(f"--{flag} is empty: name at least one file")
    mixture = next((text for text in data if text.lower().endswith((".yaml", ".yml"))), None)
    if mixture and len(data) > 1:
        raise UserError(f"--{flag} {mixture}: a mixture cannot be given with other data: name that in it")
    if mixture and fields:
        raise UserError(f"--{flag} {mixture}: a mixture names its fields itself, with fields under a source")
    _check_flags(fields, tuple(ignore), encoding)
    sources = read_mixture(mixture) if mixture else _sources_of(data, fields or None, flag)
    for source in sources:
        source.ignore = tuple(dict.fromkeys([*source.ignore, *ignore]))
        source.encoding = source.encoding or (encoding if _is_text_file(source) else None)
        _check_not_both(source)
    if encoding and not any(source.encoding for source in sources):
        raise UserError(f"--encoding {encoding}: is for files of text, and --{flag} names none")
    return sources


def _check_flags(fields, ignore, encoding):
    """Raise UserError, which names the flag, for fields, keys to ignore, or an encoding that cannot be."""
    try:
        _check_fields(fields or None)
    except UserError as error:
        raise UserError(f"--fields: {error}") from None
    if not all(map(_is_text, ignore)):
        raise UserError("--ignore: expected names of columns and of keys, one is empty")
    if encoding is not None:
        try:
            check_encoding(encoding)
        except UserError as error:
            raise UserError(f"--encoding {error}") from None


def _check_not_both(source):
    """Raise UserError for a column that is named in both `fields` and `ignore`."""
    for part, value in (source.fields or {}).items():
        if twice := columns_in(value) & set(source.ignore):
            raise UserError(f"source {source.name}: {sorted(twice)[0]} is to be ignored, and is its {part} in fields")


def _is_text_file(source):
    """Whether any of a source's files is of a format with an encoding."""
    paths = source.path if isinstance(source.path, list) else []
    return any((source.format or format_of(path)) != "parquet" for path in paths)


def _sources_of(data, fields, flag):
    """A source for each text of `data`, which is no mixture."""
    sources = []
    for text in data:
        try:
            found = _locate([text], [Path()], None)
            name = free_name(found["path"] if isinstance(found["path"], str) else text, {x.name for x in sources})
            sources.append(Source(name, fields=fields, **found))
            _check_given_once(sources)
        except UserError as error:
            raise UserError(f"--{flag} {error}") from None
    return sources


def read_mixture(path: str) -> list[Source]:
    """The sources of a mixture's YAML file. Raises UserError that names the file, the source and the key."""
    path, sources = Path(path), []
    entries = _read_entries(path)
    names = [entry["name"] for entry in entries if "name" in entry]
    for number, entry in enumerate(entries, start=1):
        try:
            _check_entry(entry)
            if names.count(entry.get("name")) > 1:
                raise UserError("name: another source has the same")
            sources.append(_to_source(entry, path.parent, {*names, *(source.name for source in sources)}))
            _check_given_once(sources)
        except UserError as error:
            raise UserError(f"{path}: source {entry.get('name', number)}: {error}") from None
    return sources


def _to_source(entry, folder, names):
    """The source that an entry of a mixture in `folder` describes; `names` are taken."""
    texts = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
    found = _locate(texts, [folder, Path()], entry.get("format"))
    of_dataset = isinstance(found["path"], str)
    for key in ("format",) if of_dataset else ("config", "split"):
        if key in entry:
            raise UserError(f"{key}: is for {'files' if of_dataset else 'datasets'}, and {texts[0]} is none")
    for key in found.keys() & entry.keys() - {"path"}:
        raise UserError(f"{key}: is given in the path too")
    few_shot = entry.get("few_shot", 0)
    few_shot = tuple(few_shot) if isinstance(few_shot, list) else (few_shot, few_shot)
    name = free_name(found["path"] if of_dataset else texts[0], names)
    more = {"few_shot": few_shot, "ignore": tuple(entry.get("ignore", ()))}
    source = Source(**{"name": name, **entry, **found, **more})
    if source.encoding and not _is_text_file(source):
        raise UserError(f"encoding: is for files of text, and {texts[0]} is none")
    return source


# -------------------------------------------------------------------------------------------------- paths and names


def _locate(texts, folders, format):
    """What `texts` stand for, seen from the first of `folders` that has it: "path", and of a dataset what is known."""
    files = []
    for text in texts:
        found = _files(text, folders)
        dataset = None if found else _dataset(text, folders)
        if dataset and len(texts) == 1:
            return dataset
        if not found:
            raise UserError(f"{text}: no file matches" if glob.has_magic(text) else f"{text}: no such file")
        files += found
    for file in files:
        if not format and not format_of(file):
            endings = ", ".join(f".{name}" for name in FORMATS)
            raise UserError(f"{file}: expected a file ending in {endings} or, but for parquet, the same with .gz")
    return {"path": files}


def _files(text, folders):
    """The file of that name, or those that match, sorted."""
    text = os.path.expanduser(text)
    for folder in folders:
        if (folder / text).is_file():
            return [folder / text]
        found = glob.glob(os.path.join(glob.escape(str(folder)), text), recursive=True)
        if files := sorted(path for path in map(Path, found) if path.is_file()):
            return files
    return []


def _dataset(text, folders):
    """The dataset in a folder, or of a name at Hugging Face; None if it can be neither."""
    base, _, split = os.path.expanduser(text).partition(":")
    more = {"split": split} if split else {}
    for folder in folders:
        if base and (folder / base).is_dir():
            return {"path": str(folder / base), **more}
    name = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w.-]*))?", base)
    if not name or format_of(Path(base)):
        return None
    return {"path": name[1], **({"config": name[2]} if name[2] else {}), **more}


def free_name(text: str, taken: set[str]) -> str:
    """A name for a source, by its path: that of the file without its ending, with a number if it is among `taken`."""
    path = Path(text.partition("*")[0].partition("?")[0].partition("[")[0] if glob.has_magic(text) else text)
    stem = path.name
    while format_of(path) or path.suffix.lower() == ".gz":
        path = path.with_suffix("")
        stem = path.name
    stem = stem.strip("-_. ") or "data"
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    return name


def _check_given_once(sources):
    """A file may be in two sources only if these make different samples of it."""
    seen = set()
    for source in sources:
        for path in source.path if isinstance(source.path, list) else [source.path]:
            where = path.resolve() if isinstance(path, Path) else f"{path} {source.config} {source.split}"
            how = repr((where, source.fields, source.few_shot, source.prompt_style))
            if how in seen:
                raise UserError(f"{path}: is given twice")
            seen.add(how)


# ------------------------------------------------------------------------------------------------ checks of a mixture


def _read_entries(path):
    """The list of dicts under `sources` in a YAML file."""
    value = read_yaml(path)
    if not isinstance(value, dict) or "sources" not in value:
        raise UserError(f"{path}: expected the key sources with a list under it")
    try:
        _check_known(value, ["sources"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    entries = value["sources"]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: sources must be a list of at least one source, each with keys such as path")
    return entries


def _is_text(value):
    return isinstance(value, str) and bool(value.strip())


def _is_texts(value, least=1):
    return isinstance(value, list) and len(value) >= least and all(map(_is_text, value))


def _is_whole(value, least=0):
    return type(value) is int and value >= least


def _is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def _is_range(value):
    return isinstance(value, list) and len(value) == 2 and all(map(_is_whole, value)) and value[0] <= value[1]


# The keys of a source: what is good, and how to say it.
KEYS = {
    "name": (_is_text, "text"),
    "path": (lambda value: _is_text(value) or _is_texts(value), "text or a list of texts"),
    "format": (lambda value: value in list(FORMATS), f"one of {', '.join(FORMATS)}"),
    "fields": (lambda value: isinstance(value, dict), "keys such as prompt and answer"),
    "ignore": (_is_texts, "a list of names such as [name, images]"),
    "encoding": (_is_text, "text"),
    "shuffle_choices": (lambda value: isinstance(value, bool), "true or false"),
    "prompt_style": (_is_text, "text"),
    "weight": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "samples": (lambda value: _is_whole(value, 1), "a whole number above 0"),
    "few_shot": (lambda value: _is_whole(value) or _is_range(value), "a whole number, or two as in [0, 5]"),
    "min_words": (_is_whole, "a whole number, at least 0"),
    "max_tokens": (lambda value: _is_whole(value, 2), "a whole number, at least 2"),
    "max_repetition": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "config": (_is_text, "text"),
    "split": (_is_text, "text"),
}
FIELDS = (
    "prompt", "input", "answer", "choices", "label", "messages", "text", "system", "tools", "thinking", "history",
    "chosen", "rejected",
)  # fmt: skip
BESIDE = {  # the fields that may stand beside those that make a sample
    ("messages",): ("system", "tools"),
    ("text",): (),
    ("prompt", "choices", "label"): ("input", "answer", "system", "tools", "thinking", "history"),
    ("prompt", "answer"): ("input", "system", "tools", "thinking", "history"),
    ("chosen", "rejected"): ("prompt", "input", "system", "tools", "history"),
}


def _check_entry(entry):
    """Raise UserError if an entry of a mixture has an unknown key, a wrong value, or keys that do not go together."""
    _check_known(entry, KEYS)
    for key, value in entry.items():
        good, expected = KEYS[key]
        if not good(value):
            raise UserError(f"{key}: expected {expected}, not {reprlib.repr(value)}")
    if "path" not in entry:
        raise UserError("path: is missing")
    if "weight" in entry and "samples" in entry:
        raise UserError("weight and samples: one of the two says how much of it is wanted")
    try:
        _check_fields(entry.get("fields"))
    except UserError as error:
        raise UserError(f"fields: {error}") from None
    if "encoding" in entry:
        try:
            check_encoding(entry["encoding"])
        except UserError as error:
            raise UserError(f"encoding: {error}") from None


def _check_fields(fields):
    """Raise UserError if the `fields` of a source cannot make a sample."""
    if fields is None:
        return
    _check_known(fields, FIELDS)
    kinds = {name: names for names in BESIDE for name in names if name not in ("prompt", "answer")}
    needed = next((kind for name, kind in kinds.items() if name in fields), ("prompt", "answer"))
    for name in needed:
        if name not in fields:
            raise UserError(f"{name}: is missing, {' and '.join(needed)} go together")
    for name in fields:
        if name not in (*needed, *BESIDE[needed]):
            raise UserError(f"{name}: has no place beside {' and '.join(needed)}")
    for name, value in fields.items():
        _check_field(name, value)


def _check_field(name, value):
    """Raise UserError if a value in `fields` cannot be that part of a sample."""
    if not (_is_text(value) or name == "choices" and _is_texts(value, 2)):
        expected = "a column with a list, or a list of columns" if name == "choices" else "a column or a template"
        raise UserError(f"{name}: expected {expected}, not {reprlib.repr(value)}")
    try:
        for field in value if isinstance(value, list) else [value]:
            parse_template(field)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
    if name in ("messages", "tools", "history", "label") and is_template(value):
        raise UserError(f"{name}: expected a column, and {reprlib.repr(value)} is a template")


def _check_known(keys, known):
    """Raise UserError for a key that is not among `known`, with the nearest that is."""
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise UserError(f"{key}: unknown key, {hint}")
