"""A version of a name in the store: the list of its files, with their hashes and sizes. It never changes."""

import hashlib
import json
import re
from typing import NamedTuple

from shell.cli import UserError
from shell.files import is_below
from store.address import DIGITS

FORMAT = 1


class Entry(NamedTuple):
    """The content of a file: its SHA-256 (hex), and its size in bytes."""

    sha256: str
    size: int


def write(files: dict[str, Entry]) -> bytes:
    """The list, as it is kept: the same for the same files."""
    listed = {name: files[name]._asdict() for name in sorted(files)}
    return (json.dumps({"format": FORMAT, "files": listed}, indent=1) + "\n").encode()


def digits(content: bytes) -> str:
    """The version that a list is of."""
    return hashlib.sha256(content).hexdigest()[:DIGITS]


def read(content: bytes, version: str, where: str) -> dict[str, Entry]:
    """The files of a version. where: names it in messages. Raises UserError if the list is not what was written."""
    if digits(content) != version:
        raise UserError(f"{where} has changed since it was written: publish the folder again")
    values = json.loads(content)
    if values["format"] != FORMAT:
        raise UserError(f"{where} has the format {values['format']}, which a newer version of this program wrote")
    files = {name: Entry(**entry) for name, entry in values["files"].items()}
    for name, entry in files.items():
        if not is_below(name) or not re.fullmatch("[0-9a-f]{64}", entry.sha256) or entry.size < 0:
            raise UserError(f"{where} lists {name}, which cannot be the name of a file in a folder")
    return files


def pointer(version: str) -> bytes:
    """What a name's latest.json holds."""
    return (json.dumps({"format": FORMAT, "version": version}) + "\n").encode()


def pointed_to(content: bytes, where: str) -> str:
    """The version in a latest.json. Raises UserError if there is none in it."""
    try:
        values = json.loads(content)
        version = values["version"] if values["format"] == FORMAT else ""
    except (ValueError, TypeError, KeyError):
        version = ""
    if not re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", str(version)):
        raise UserError(f"{where} does not say which version is the latest: publish the folder again")
    return version
