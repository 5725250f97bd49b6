"""Files that are whole or absent: folders that appear complete or not at all, and the proof that they still are."""

import contextlib
import ctypes
import fnmatch
import hashlib
import json
import os
import shutil
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from shell.cli import UserError

MANIFEST = "manifest.json"
THREADS = 4  # that hash and flush files side by side
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux: renameat2(2)


def project_version() -> str | None:
    """The version in pyproject.toml."""
    path = Path(__file__).resolve().parents[1] / "pyproject.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")).get("project", {}).get("version") if path.is_file() else None


def read_json(path):
    """The parsed JSON object in `path`. Raises UserError if it is missing, broken or something else."""
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


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole_file(path):
    """Write a file that appears whole or not at all, and on the disk: fill the temporary one that this yields."""
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


# ---------------------------------------------------------------------------------------- folders, whole or absent


@contextlib.contextmanager
def new_folder(path, hashes=None):
    """Write a folder that appears whole or not at all: fill the one this yields.

    It is a temporary one beside `path`. When the block ends well, a manifest of SHA-256 hashes is added, all is
    flushed to disk, and it takes the name `path` (and the place of what had it). Otherwise it is removed.

    hashes: a dict that the block fills, file name to SHA-256 (hex), for what it has hashed while writing it.
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
    """Give a folder its name, in one step also where another one has it (that is then at `temporary` or at `old`)."""
    if not path.exists():
        temporary.rename(path)
    elif not _exchange(temporary, path):
        path.rename(old)
        temporary.rename(path)
    flush(path.parent)


def _exchange(one, other):
    """Let two names trade places at one instant. False where the system or the file system cannot."""
    with contextlib.suppress(AttributeError, TypeError):
        names = os.fsencode(one), os.fsencode(other)
        return ctypes.CDLL(None).renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0
    return False


def _put_back(old, path):
    """Undo the first of `_take_place`'s two renames, if the second never came."""
    if old.exists() and not path.exists():
        old.rename(path)


def remove_folder(path):
    """Remove a folder that at no moment looks complete and is not."""
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    path.rename(temporary)
    shutil.rmtree(temporary)


def clear_leftovers(folder, names):
    """Remove what a killed process left in `folder` half-written or half-removed. names: of what it wrote, patterns."""
    for name in names:
        for path in folder.glob(f".{name}.old"):
            _put_back(path, path.with_name(path.name[1:].removesuffix(".old")))
        for path in (*folder.glob(f".{name}.old"), *folder.glob(f".{name}.tmp")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _temporary(path):
    return path.with_name(f".{path.name}.tmp")


# ------------------------------------------------------------------------------------------------- that they still are


def check_manifest(folder, remedy=None):
    """Raise UserError if a file in `folder` is missing or has changed since `new_folder` wrote it.

    remedy: what to do then; by default to make or copy the folder again. Returns the hashes, by file name.
    """
    folder = Path(folder)
    remedy = remedy or f"make or copy {folder} again (or delete its {MANIFEST}, if the change is meant)"
    hashes = _read_manifest(folder / MANIFEST, remedy)
    _check_hashes(folder, hashes, remedy)
    return hashes


def check_listed(folder, patterns, remedy):
    """Check those files of a folder that are about to be read, if it is one that `new_folder` wrote.

    Raises UserError that ends in `remedy` if a file whose name matches one of `patterns` stands in the manifest and is
    missing or has changed. A folder without a manifest is as somebody else made it.
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
def checked(folder):
    """Let the block read a folder, and check it meanwhile if it has a manifest. What the block raises goes first."""
    if folder is None or not Path(folder, MANIFEST).is_file():
        yield
        return
    with ThreadPoolExecutor(1) as pool:
        check = pool.submit(check_manifest, folder)
        yield
        check.result()


@contextlib.contextmanager
def damage_first(folder):
    """Where the block finds something wrong with a folder, say first if a file has changed since it was written."""
    try:
        yield
    except UserError:
        if Path(folder, MANIFEST).is_file():
            check_manifest(folder)
        raise


def _manifest_text(hashes):
    """A manifest, which ends with the hash of itself without that."""
    own = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    return json.dumps({**hashes, MANIFEST: own}, indent=2) + "\n"


def _read_manifest(path, remedy):
    try:
        hashes = read_json(path)
    except UserError as error:
        raise UserError(f"{error}: {remedy}") from None
    own = hashes.pop(MANIFEST, None)  # older ones have none
    if own and path.read_text() != _manifest_text(hashes) or not all(map(_is_below, hashes)):
        raise UserError(f"{path} has changed since it was written: {remedy}")
    return hashes


def _is_below(name):
    """Whether a name in a manifest is that of a file below its folder, and no way out of it."""
    path = PurePosixPath(name)
    return str(path) == name != "." and not path.is_absolute() and ".." not in path.parts


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
