"""Files and folders that appear complete or not at all, and the check by SHA-256 that they have not changed since."""

import contextlib
import ctypes
import fnmatch
import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import yaml

from shell.cli import ROOT, UserError

MANIFEST = "manifest.json"
PIECES, PIECE_BYTES = 256, 2**16  # of a weights file: what is hashed of it
THREADS = 4  # that hash and flush files side by side
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux: renameat2(2)


def project_version() -> str | None:
    """The version in pyproject.toml."""
    path = ROOT / "pyproject.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")).get("project", {}).get("version") if path.is_file() else None


def read_json(path: str | Path) -> dict:
    """The JSON object in a file. Raises UserError if the file is missing or broken, or holds anything else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except RecursionError:
        raise UserError(f"{path} cannot be read: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object")
    return value


class _YamlLoader(yaml.SafeLoader):
    """PyYAML takes the last of several equal keys; this refuses them."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for i, (key, _) in enumerate(node.value):
            if key.value in keys[:i]:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} comes twice", key.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> object:
    """What a YAML file has. Raises UserError if the file is missing or broken, or has a key twice in one place."""
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), _YamlLoader)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def write_json(path: str | Path, value: object) -> None:
    """Write a value as indented JSON."""
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Write a file that appears complete or not at all: write the temporary file whose path this yields.

    When the block ends well, that is flushed to the disk and gets its name. Otherwise it is removed.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


# ------------------------------------------------------------------------------ folders that are complete or absent


@contextlib.contextmanager
def new_folder(path: str | Path, hashes: dict[str, str] | None = None) -> Iterator[Path]:
    """Write a folder that appears complete or not at all: write into the temporary folder whose path this yields.

    When the block ends well, a manifest of SHA-256 hashes is added, everything is flushed to the disk, and the folder
    gets its name, in place of the one that had it. Otherwise it is removed.

    hashes: file name to SHA-256 (hex), which the block may fill for files that it has hashed while it wrote them.
    """
    path, hashes = Path(path), {} if hashes is None else hashes
    temporary, old = _temporary(path), path.with_name(f".{path.name}.old")
    _put_back(old, path)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _seal(temporary, hashes)
        _take_place(temporary, path, old)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        _put_back(old, path)
        raise
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)


def _seal(folder, hashes):
    """Flush all files below a folder, hash those that are not in `hashes` at the same time, and write the manifest."""
    below = sorted(folder.rglob("*"))
    names = {path.relative_to(folder).as_posix(): path for path in below if path.is_file()}
    with ThreadPoolExecutor(THREADS) as pool:
        flushed = [pool.submit(flush, path) for path in below]
        missing = {name: path for name, path in names.items() if name not in hashes}
        hashes.update(zip(missing, pool.map(sha256, missing.values()), strict=True))
        for future in flushed:
            future.result()
    (folder / MANIFEST).write_text(_manifest_text({name: hashes[name] for name in names}))
    for path in (folder / MANIFEST, folder):
        flush(path)


def _take_place(temporary, path, old):
    """Give a folder its name. One that has it already is moved to `temporary`, in the same instant, or to `old`."""
    if not path.exists():
        temporary.rename(path)
    elif not _exchange(temporary, path):
        path.rename(old)
        temporary.rename(path)
    flush(path.parent)


def _exchange(one, other):
    """Exchange two names in one instant. False where the system or the file system cannot."""
    with contextlib.suppress(AttributeError, TypeError):
        names = os.fsencode(one), os.fsencode(other)
        return ctypes.CDLL(None).renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0
    return False


def _put_back(old, path):
    """Undo the first of the two renames of `_take_place`, if the process was killed before the second."""
    if old.exists() and not path.exists():
        old.rename(path)


def remove_folder(path: Path) -> None:
    """Remove a folder so that it is never there in part: it loses its name first."""
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    path.rename(temporary)
    shutil.rmtree(temporary)


def clear_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove the temporary files and folders that a killed process left in `folder`.

    names: of the files and folders that it wrote, or patterns of them.
    """
    for name in names:
        for path in folder.glob(f".{name}.old"):
            _put_back(path, path.with_name(path.name[1:].removesuffix(".old")))
        for path in (*folder.glob(f".{name}.old"), *folder.glob(f".{name}.tmp")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _temporary(path):
    return path.with_name(f".{path.name}.tmp")


# ------------------------------------------------------------------------------------------------------------- checks


def check_manifest(folder: str | Path, remedy: str | None = None) -> dict[str, str]:
    """Raise UserError if a file in `folder` is missing or has changed since `new_folder` wrote it.

    remedy: what to do then, for the message; by default to make or copy the folder again. Returns file name to hash.
    """
    folder = Path(folder)
    remedy = remedy or f"make or copy {folder} again (or delete its {MANIFEST}, if the change is meant)"
    hashes = _read_manifest(folder / MANIFEST, remedy)
    _check_hashes(folder, hashes, remedy)
    return hashes


def check_listed(folder: str | Path, patterns: Iterable[str], remedy: str) -> None:
    """Check the files of a folder that are about to be read, if `new_folder` wrote it.

    Raises UserError, which ends in `remedy`, if a file that the manifest lists and whose name matches one of `patterns`
    is missing or has changed. A folder without a manifest was made by another program, and is not checked.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        hashes = _read_manifest(folder / MANIFEST, remedy)
        names = [name for name in hashes if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        _check_hashes(folder, {name: hashes[name] for name in names}, remedy)


def _check_hashes(folder, hashes, remedy):
    for name in hashes:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: {remedy}")
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(sha256, [folder / name for name in hashes]))
    for (name, expected), actual in zip(hashes.items(), found, strict=True):
        if actual != expected:
            raise UserError(f"{folder / name} has changed since it was written: {remedy}")


@contextlib.contextmanager
def checked(folder: str | Path | None) -> Iterator[None]:
    """Check a folder that has a manifest in a thread, while the block reads it.

    Raises UserError at the end of the block if a file has changed; an error that the block raises has precedence.
    """
    if folder is None or not Path(folder, MANIFEST).is_file():
        yield
        return
    with ThreadPoolExecutor(1) as pool:
        check = pool.submit(check_manifest, folder)
        yield
        check.result()


@contextlib.contextmanager
def damage_first(folder: str | Path) -> Iterator[None]:
    """If the block raises UserError about a folder, raise that a file has changed since it was written, if one has."""
    try:
        yield
    except UserError:
        if Path(folder, MANIFEST).is_file():
            check_manifest(folder)
        raise


def _manifest_text(hashes):
    """A manifest. Its last entry is the hash of the others."""
    own = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    return json.dumps({**hashes, MANIFEST: own}, indent=2) + "\n"


def _read_manifest(path, remedy):
    try:
        hashes = read_json(path)
    except UserError as error:
        raise UserError(f"{error}: {remedy}") from None
    own = hashes.pop(MANIFEST, None)  # older ones have none
    if own and path.read_text() != _manifest_text(hashes) or not all(map(is_below, hashes)):
        raise UserError(f"{path} has changed since it was written: {remedy}")
    return hashes


def is_below(name: str) -> bool:
    """Whether a name in a manifest is that of a file below its folder, not of one elsewhere."""
    path = PurePosixPath(name)
    return str(path) == name != "." and not path.is_absolute() and ".." not in path.parts


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of_pieces(path: Path) -> str:
    """SHA-256 (hex) of a file's size and of PIECES pieces, evenly spread from its first to its last byte."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}".encode())
    if size <= PIECES * PIECE_BYTES:
        digest.update(path.read_bytes())
        return digest.hexdigest()
    with open(path, "rb") as file:
        for number in range(PIECES):
            file.seek((size - PIECE_BYTES) * number // (PIECES - 1))
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def flush(path: str | Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
