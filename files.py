"""Files that are whole or absent: folders that appear complete or not at all, and the proof that they still are."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

from cli import UserError

MANIFEST = "manifest.json"


def read_json(path):
    """The parsed JSON object in `path`. Raises UserError if it is missing, broken or something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object")
    return value


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(path):
    """Write a folder that appears whole or not at all: fill the one this yields.

    It is a temporary one beside `path`. When the block ends well, a manifest of SHA-256 hashes is added, all is
    flushed to disk, and it takes the name `path` (and the place of what had it). Otherwise it is removed.
    """
    path = Path(path)
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    _put_back(old, path)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        hashes = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n")
        for file in (*temporary.iterdir(), temporary):
            flush(file)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _put_back(old, path)
        raise


def _put_back(old, path):
    """Undo the first of `new_folder`'s two renames, if the second never came."""
    if old.exists() and not path.exists():
        old.rename(path)


def check_manifest(folder):
    """Raise UserError if a file in `folder` is missing or has changed since `new_folder` wrote it."""
    folder = Path(folder)
    for name, expected in read_json(folder / MANIFEST).items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: delete {folder} to go on from an earlier one")
        if sha256(folder / name) != expected:
            raise UserError(
                f"{folder / name} has changed since it was written: delete {folder} to go on from an earlier one"
            )


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
