"""A folder from its address: downloaded into the cache, checked, and from then on a folder like any other.

A file is read in parts, hashed as they come, and written to the cache's partial/; it becomes a blob only if the hash is
right. What a killed process left there is the beginning of the next download. A folder of hard links to its blobs then
appears at once, with a manifest (shell/files.py), so that loading it checks it again.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shell.cli import UserError
from shell.files import THREADS, check_manifest, new_folder, sha256
from shell.progress import bar
from store import address, cache, version
from store.address import Address
from store.remote import PART_BYTES, Remote
from store.version import Entry

FLAGS = ("checkpoint_dir", "adapter_dir", "teacher_dir", "source", "adapters")  # of folders, in all scripts
DOWNLOADS = 2  # of a file whose hash is wrong, before it is refused


def fetch_folders(settings: Any) -> None:
    """Fetch what the settings name by address, and let them name the folders in the cache instead.

    Every script calls this first, for all its flags in `FLAGS`: a path, a list of paths, or paths by name. Records of a
    run name those folders by `cache.address_of`.
    """
    for flag in FLAGS:
        value = getattr(settings, flag, None)
        if isinstance(value, list):
            setattr(settings, flag, [local(path) for path in value])
        elif isinstance(value, dict):
            setattr(settings, flag, {name: local(path) for name, path in value.items()})
        elif value is not None:
            setattr(settings, flag, local(value))


def local(path: str | Path) -> Path:
    """The folder in the cache of what is at an address, fetched if it is not there; a plain folder itself."""
    protocol, place = address.parse_place(path)
    if protocol != "file":
        return fetch(address.parse(path))
    found = address.published(place)
    if found:
        return fetch(found)
    return Path(place) if address.is_url(path) else Path(path)


def fetch(wanted: Address) -> Path:
    """The folder of a version in the cache, which stays there while this process lives. Downloaded if it is not there.

    Only a name without a version needs the store again. Raises UserError if the store cannot give it whole.
    """
    if wanted.version and cache.use(cache.folder_of(wanted)):
        return cache.folder_of(wanted)
    remote = Remote(wanted.protocol)
    wanted = latest(remote, wanted)
    folder = cache.folder_of(wanted)
    while not cache.use(folder):
        fetch_files(remote, wanted, files_of(remote, wanted), folder)
    return folder


def fetch_files(
    remote: Remote,
    wanted: Address,
    files: dict[str, Entry],
    folder: Path,
    add: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Make the cache's folder of these files of a version, unless another process has just made it.

    add: writes what is to be in the folder beside them.
    """
    with cache.making(folder):
        if not folder.is_dir():
            _download(remote, wanted, files, folder, add)


def pull(wanted: Address, out_dir: Path) -> Address:
    """Copy what is at an address to a folder that is not there yet, or empty. Returns the address with its version."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"--out_dir {out_dir} exists: choose another")
    folder = fetch(wanted)
    hashes = check_manifest(folder, f"delete {folder}, and pull again")
    with new_folder(out_dir) as temporary:
        for name in hashes:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, temporary / name)  # no link: this copy may be changed
    return address.parse(cache.address_of(folder))


# -------------------------------------------------------------------------------------------------- what is there


def latest(remote: Remote, wanted: Address) -> Address:
    """The address with the latest version of its name, if it has none."""
    if wanted.version:
        return wanted
    try:
        content = remote.read(wanted.latest)
    except UserError as error:
        here = cache.versions_here(wanted)
        raise UserError(f"{error}; in the cache there is {wanted.at(here[-1])}" if here else error) from None
    if content is not None:
        return wanted.at(version.pointed_to(content, f"{wanted.protocol}://{wanted.latest}"))
    if remote.listing(wanted.path):
        raise UserError(
            f"{wanted} holds files, but was not published: copy them to a folder, and publish that with "
            f"python store/models.py --push FOLDER --to {wanted}"
        )
    raise UserError(f"{wanted}: there is no such model; python store/models.py --list shows what is there")


def files_of(remote: Remote, wanted: Address) -> dict[str, Entry]:
    """The files of a version."""
    where = wanted.version_file(wanted.version)
    content = remote.read(where)
    if content is None:
        raise UserError(
            f"{wanted}: there is no such version; python store/models.py --list {wanted.at(None)} shows all"
        )
    return version.read(content, wanted.version, f"{wanted.protocol}://{where}")


def verify(wanted: Address) -> tuple[Address, dict[str, Entry]]:
    """Read all of a version where it is, and compare the hashes. Returns its address and files.

    Raises UserError, which names the files, if some are missing or damaged.
    """
    remote = Remote(wanted.protocol)
    wanted = latest(remote, wanted)
    files, broken = files_of(remote, wanted), []
    with bar(what=f"reading {wanted}", total=sum(entry.size for entry in files.values()), unit="B") as read:
        for name, entry in files.items():
            digest, place = hashlib.sha256(), wanted.blob(entry.sha256)
            if remote.size(place) == entry.size:
                for part in _parts(remote, place, 0, entry.size):
                    digest.update(part)
                    read.update(len(part))
            if digest.hexdigest() != entry.sha256:
                broken.append(f"{name} ({wanted.protocol}://{place})")
    if broken:
        raise UserError(f"{wanted}: missing or damaged: {', '.join(broken)}: delete these, and push the folder again")
    return wanted, files


# ------------------------------------------------------------------------------------------------------- downloading


def _download(remote, wanted, files, folder, add):
    """Make the cache's folder of these files of a version."""
    contents = {entry.sha256: entry.size for entry in files.values()}
    missing = {sha256: size for sha256, size in contents.items() if not (cache.root() / "blobs" / sha256).exists()}
    begun = [cache.root() / "partial" / sha256 for sha256 in missing]
    needed = sum(missing.values()) - sum(path.stat().st_size for path in begun if path.is_file())
    cache.make_room(max(0, needed), contents.keys(), str(wanted))
    hashes = {name: entry.sha256 for name, entry in files.items()}
    done = bar(what=f"fetching {wanted}", total=sum(contents.values()), unit="B")
    with done, new_folder(folder, hashes) as temporary:
        add(temporary)
        for name, entry in files.items():
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with cache.blob(entry.sha256) as (whole, partial):
                if not whole.is_file() or sha256(whole) != entry.sha256:
                    fetch_blob(remote, wanted, name, entry, whole, partial, done)
                _link(whole, target)


def fetch_blob(remote: Remote, wanted: Address, name: str, entry: Entry, whole: Path, partial: Path, done: Any) -> None:
    """Write a blob of the cache, if what comes has the right hash. Raises UserError if it has not a second time.

    whole, partial: the paths that `cache.blob` gave. done: its `update` is called with the bytes that have come.
    """
    place = wanted.blob(entry.sha256)
    for _ in range(DOWNLOADS):
        size = remote.size(place)
        if size == entry.size and _continue(remote, place, partial, entry.size, done) == entry.sha256:
            partial.chmod(0o444)
            os.replace(partial, whole)
            return
        partial.unlink(missing_ok=True)
    found = (
        "is missing" if size is None else f"has {size} bytes of {entry.size}" if size != entry.size else "is damaged"
    )
    raise UserError(
        f"{wanted}: {name} {found} ({remote.protocol}://{place}): delete that, and push the folder again; it was not "
        "put into the cache"
    )


def _continue(remote, place, partial, size, done):
    """Write what is missing of a file, flush it, and return the SHA-256 of all of it."""
    digest = hashlib.sha256()
    if partial.exists() and partial.stat().st_size > size:
        partial.unlink()
    try:
        with open(partial, "a+b") as file:
            file.seek(0)
            while piece := file.read(2**20):
                digest.update(piece)
            done.update(file.tell())
            for part in _parts(remote, place, file.tell(), size):
                file.write(part)
                digest.update(part)
                done.update(len(part))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        partial.unlink(missing_ok=True)  # or the disk would stay full
        raise UserError(
            f"{partial} could not be written ({error.strerror}): make room, or name another folder in {cache.FOLDER}"
        ) from None
    return digest.hexdigest()


def _parts(remote, place, start, end):
    """The bytes of an object in order, in parts; a few are on their way at the same time."""
    starts = range(start, end, PART_BYTES)
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(starts), THREADS):
            group = starts[first : first + THREADS]
            yield from pool.map(lambda at: remote.read_part(place, at, min(at + PART_BYTES, end)), group)


def _link(whole, target):
    """A second name for a blob, or a copy where the file system has no hard links."""
    try:
        os.link(whole, target)
    except OSError:
        shutil.copyfile(whole, target)
