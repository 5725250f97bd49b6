"""Prepared folders of given samples, written as prepare_data.py writes them, for tests that need no tokenizer."""

from pathlib import Path

from preparation.record_store import SampleWriter
from shell.files import read_json, write_json


def writer_of(samples) -> SampleWriter:
    """A writer with these samples: the arguments of `SampleWriter.add`."""
    writer = SampleWriter()
    for sample in samples:
        writer.add(*sample)
    return writer


def write_part(
    folder: Path, samples, part: str = "train", kind: str = "samples", shard_tokens: int | None = None
) -> Path:
    """Write a part, and list it in the folder's data.json, which is made if it is not there. Returns the folder."""
    path = Path(folder, "data.json")
    info = read_json(path) if path.exists() else {"kind": kind}
    write_json(path, info | {part: writer_of(samples).save(Path(folder), part, shard_tokens=shard_tokens)})
    return folder
