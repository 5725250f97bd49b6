"""The cache: folders that were fetched from a store, each whole or absent, shared by all processes of this machine.

    folders/s3/bucket/models/NAME@0123456789ab/    a fetched folder: hard links to blobs, where that works
    folders/s3/…/.NAME@0123456789ab.lock           who uses it; changed whenever it is used
    folders/s3/…/.NAME@0123456789ab.making         who makes it
    streamed/…                                     the same without large files, which are blobs alone (streaming.py)
    streamed/…/.NAME@0123456789ab.readers          who is still to read which of these
    blobs/HASH                                     the content of a file, checked, read only
    partial/HASH                                   the beginning of one that is being fetched
    locks/00 … locks/ff                            for blobs, by the first two digits of their hash

Locks are the system's (flock), so those of a process that was killed are gone. A process that uses a folder shares its
first lock for as long as it lives. Who makes the folder has the second one alone, who removes it both.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from shell import cli
from shell.cli import UserError
from shell.files import clear_leftovers, remove_folder
from store.address import Address, written

FOLDER, LIMIT = "ONETUNE_STORE_CACHE", "ONETUNE_STORE_LIMIT"  # environment variables
DEFAULT_LIMIT = "200GB"
WHOLE, STREAMED = "folders", "streamed"
_in_use = []  # descriptors of the locks of this process, which are open until it ends


def root() -> Path:
    """The cache's folder: $ONETUNE_STORE_CACHE, or ~/.cache/onetune/models."""
    return Path(os.environ.get(FOLDER) or "~/.cache/onetune/models").expanduser().absolute()


def limit() -> int:
    """The most bytes that the cache may have: $ONETUNE_STORE_LIMIT, or 200GB. Raises UserError if that is no size."""
    text = os.environ.get(LIMIT) or DEFAULT_LIMIT
    try:
        return cli.number_of_bytes(text, LIMIT)
    except UserError:
        raise UserError(f"{LIMIT}={text}: expected a size such as 200GB, 24GiB or 800MB") from None


# ------------------------------------------------------------------------------------------- folders and addresses


def folder_of(address: Address, kind: str = WHOLE) -> Path:
    """Where the cache has a version, or would have it. kind: WHOLE, or STREAMED for one without its large files."""
    return root() / kind / address.protocol / address.root.lstrip("/") / f"{address.name}@{address.version}"


def address_of(folder: str | Path) -> str:
    """How records name a folder: by the address and version that it was fetched from, or else by its path as given."""
    for folders in (root() / WHOLE, root() / STREAMED):
        if Path(folder).absolute().is_relative_to(folders):
            protocol, *path = Path(folder).absolute().relative_to(folders).parts
            return written(protocol, f"{'/' if protocol == 'file' else ''}{'/'.join(path)}")
    return str(folder)


def versions_here(address: Address) -> list[str]:
    """The versions of a name that are in the cache, the one used last at the end."""
    parent = folder_of(address.at("-")).parent
    found = [path for path in parent.glob(f"{address.name}@*") if path.is_dir()]
    return [path.name.rpartition("@")[2] for path in sorted(found, key=lambda path: _last_use(_lock_of(path)))]


# ------------------------------------------------------------------------------------------------------------ locks


def use(folder: Path) -> bool:
    """Keep a folder from being removed while this process lives. False if it is not there."""
    lock = _lock_of(folder)
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _locked(lock, fcntl.LOCK_SH)
    if not folder.is_dir():
        os.close(descriptor)
        return False
    os.utime(lock)
    _in_use.append(descriptor)
    return True


@contextlib.contextmanager
def making(folder: Path) -> Iterator[None]:
    """Be the one process that makes a folder; others wait."""
    lock = _lock_of(folder).with_suffix(".making")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with _alone(lock):
        yield


@contextlib.contextmanager
def blob(sha256: str) -> Iterator[tuple[Path, Path]]:
    """The paths of a blob and of its beginning, while no other process or thread has them."""
    whole, partial, lock = root() / "blobs" / sha256, root() / "partial" / sha256, root() / "locks" / sha256[:2]
    for path in (whole, partial, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(lock):
        yield whole, partial


@contextlib.contextmanager
def _alone(lock, or_not_at_all=False):
    """Have a lock alone. or_not_at_all: raise BlockingIOError where another has it, and do not wait."""
    descriptor = _locked(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if or_not_at_all else 0))
    try:
        yield
    finally:
        os.close(descriptor)


def _locked(lock, kind):
    """The descriptor of a lock that this process now has. Raises BlockingIOError under LOCK_NB if another has it."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass  # some network file systems have no locks
    return descriptor


class Readers:
    """Which large files of a streamed folder are still to be read, by all processes of a run on this machine.

    Each is a byte in one file, locked by those that are to read it. (These locks are POSIX's, which belong to a process
    and can be of a byte; the others, flock's, belong to a descriptor.) run: what the processes have in common, such as
    the folder that they write: the readers of other runs are not seen. count: how many files there are.
    """

    def __init__(self, folder: Path, count: int, run: str):
        lock = _lock_of(folder).with_suffix(".readers")
        lock.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        self._first = int(hashlib.sha256(run.encode()).hexdigest()[:8], 16) * count

    def add(self, number: int) -> None:
        """This process is to read a file. Waits while another removes it."""
        self._lock(number, fcntl.LOCK_SH)

    def remove(self, number: int) -> None:
        """This process has read it."""
        self._lock(number, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def none(self, number: int) -> Iterator[None]:
        """While nobody reads a file. Raises BlockingIOError if another process is to; this one must not be."""
        self._lock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            self._lock(number, fcntl.LOCK_UN)

    def close(self) -> None:
        """This process reads no more."""
        os.close(self._descriptor)

    def _lock(self, number, kind):
        try:
            fcntl.lockf(self._descriptor, kind, 1, self._first + number)
        except (BlockingIOError, PermissionError):  # by either of which POSIX lets a system say it
            raise BlockingIOError from None
        except OSError:
            pass  # some network file systems have no locks


def _lock_of(folder):
    return folder.with_name(f".{folder.name}.lock")


def _last_use(lock):
    return lock.stat().st_mtime if lock.exists() else 0.0


# -------------------------------------------------------------------------------------------------------------- size


def size() -> int:
    """The bytes of all files in the cache; one that has several names counts once."""
    found = {}
    for path in root().rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            status = path.lstat()
            found[status.st_ino] = status.st_size if path.is_file() else 0
    return sum(found.values())


def make_room(needed: int, keep: Collection[str], what: str) -> None:
    """Remove what was used least recently until `needed` bytes more fit under the limit and on the disk.

    keep: hashes of blobs that are about to be used. Raises UserError, which names `what`, if they do not fit.
    """
    root().mkdir(parents=True, exist_ok=True)
    most, now = limit(), size()
    trim(min(most - needed, now + shutil.disk_usage(root()).free - needed), keep)
    now, free = size(), shutil.disk_usage(root()).free
    if now + needed > most:
        rest = f", beside {now / 1e9:.2f} GB that are in use" if now else ""
        raise UserError(f"{what} has {needed / 1e9:.2f} GB{rest}, the cache may have {most / 1e9:.2f}: raise {LIMIT}")
    if needed > free:
        raise UserError(
            f"{what} has {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free in {root()}: make room, or name another "
            f"folder in {FOLDER}"
        )


def trim(most: int, keep: Collection[str] = ()) -> list[Path]:
    """Remove blobs that no folder has, then folders, those first that were used least recently, down to `most` bytes.

    What a living process uses stays, and so do blobs with the hashes in `keep`. Returns the folders that were removed.
    """
    removed = []
    if size() > most:
        _remove_unlinked(keep)
    locks = [lock for kind in (WHOLE, STREAMED) for lock in (root() / kind).rglob(".*.lock")]
    for lock in sorted(locks, key=_last_use):
        if size() <= most:
            break
        folder = lock.with_name(lock.name[1:].removesuffix(".lock"))
        if _remove_idle(folder, lock):
            removed.append(folder)
            _remove_unlinked(keep)
    return removed


def _remove_idle(folder, lock):
    """Remove a folder that no process uses or makes, and what one that was killed left. Whether it was there."""
    try:
        with _alone(lock, or_not_at_all=True), _alone(lock.with_suffix(".making"), or_not_at_all=True):
            clear_leftovers(folder.parent, [folder.name])
            there = folder.is_dir()
            if there:
                remove_folder(folder)
            return there
    except BlockingIOError:
        return False


def _remove_unlinked(keep):
    """Remove blobs, and beginnings of blobs, that no folder has and no process is writing."""
    for path in (*(root() / "blobs").glob("*"), *(root() / "partial").glob("*")):
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            if path.name not in keep and path.stat().st_nlink == 1:
                with _alone(root() / "locks" / path.name[:2], or_not_at_all=True):
                    if path.stat().st_nlink == 1:  # still, now that nobody can link it
                        path.unlink()
