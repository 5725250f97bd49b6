"""A folder to an address: first the contents that are not there yet, then the list of files, at last the name.

So a reader never sees half a folder, and a push that was cut off is gone on with by pushing again. Two machines that
publish under one name at once both write whole versions; the name is that of the one that came last.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

from shell.cli import UserError
from shell.files import MANIFEST, THREADS, check_manifest, sha256
from shell.progress import bar
from store import version
from store.address import LATEST, VERSIONS, Address, parse
from store.remote import Remote
from store.version import Entry


def check_address(text: str, flag: str) -> Address:
    """The address of a flag that says where to publish. Raises UserError if it is none, or has a version."""
    try:
        address = parse(text)
    except UserError as error:
        raise UserError(f"--{flag} {error}") from None
    if address.version:
        raise UserError(f"--{flag} {text}: give the name alone; the version comes from the files")
    return address


def check_place(address: Address, folder: Path) -> None:
    """Raise UserError if publishing `folder` there would put a name among other files, which nobody would then read."""
    if address.protocol != "file":
        return
    again = "publish under a name that is not there yet"
    place, folder = Path(address.path).resolve(), folder.resolve()
    if place.is_relative_to(folder) or folder.is_relative_to(place):
        raise UserError(f"{address} is, holds or lies in {folder}, which is to be published: {again}")
    try:
        found = sorted(path.name for path in place.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{address}: {error.strerror}: {again}") from None
    others = [name for name in found if name not in (VERSIONS, LATEST) and not fnmatch(name, f"{LATEST}.*.tmp")]
    if others:
        raise UserError(f"{address} is a folder with files of its own, such as {others[0]}: {again}")


def check_reachable(address: Address) -> None:
    """Raise UserError if nothing can be read where something is to be published later."""
    Remote(address.protocol).read(address.latest)


def publish(folder: Path, address: Address) -> Address:
    """Publish a folder under a name. Returns the address with the version.

    Raises UserError if the folder is damaged or changes meanwhile, if other files are in the place of the name, or if
    the store cannot take it; then the name stands for what it stood for before.
    """
    paths = files_in(folder)
    check_place(address, folder)
    stamps = {name: _stamp(path) for name, path in paths.items()}
    remote = Remote(address.protocol)
    before = remote.read(address.latest)
    files = hashed(folder, paths)
    _send_contents(remote, address, paths, files)
    changed = [name for name, path in paths.items() if _stamp(path) != stamps[name]]
    if changed:
        raise UserError(f"{folder / changed[0]} changed while it was published: push again when nobody writes there")
    content = version.write(files)
    number = version.digits(content)
    if remote.read(address.version_file(number)) != content:
        remote.write(address.version_file(number), content)
    if before != version.pointer(number):
        remote.write(address.latest, version.pointer(number))
    return address.at(number)


def files_in(folder: Path) -> dict[str, Path]:
    """The files below a folder that are published, by name: all but its manifest, which is made again, and hidden ones.

    Raises UserError if there are none, or something that is no file. Says which hidden ones are left out.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist, or is no folder")
    if (folder / LATEST).is_file() and (folder / VERSIONS).is_dir():
        raise UserError(f"{folder} is a name in a store: push a folder of files, such as one that --pull made")
    paths, hidden = {}, set()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        dotted = [part for part in name.parts if part[0] == "."]
        if dotted:
            hidden.add(dotted[0])
        elif path.is_file():
            paths[name.as_posix()] = path
        elif not path.is_dir() or path.is_symlink():
            raise UserError(f"{path} is neither a file nor a folder: remove it, or put what it points to in its place")
    paths.pop(MANIFEST, None)
    if not paths:
        raise UserError(f"{folder} has no files to publish")
    if hidden:
        print(f"left out of {folder}: {', '.join(sorted(hidden))}")
    return paths


def hashed(folder: Path, paths: dict[str, Path]) -> dict[str, Entry]:
    """The hash and the size of each file. Raises UserError if the folder's manifest, if it has one, says otherwise."""
    again = "make it again before it is published"
    known = check_manifest(folder, again) if (folder / MANIFEST).is_file() else {}
    rest = [name for name in paths if name not in known]
    with ThreadPoolExecutor(THREADS) as pool:
        known |= zip(rest, pool.map(lambda name: sha256(paths[name]), rest), strict=True)
    return {name: Entry(known[name], path.stat().st_size) for name, path in paths.items()}


def _send_contents(remote, address, paths, files):
    """Send the contents that are not at the store, each once."""
    contents = {entry.sha256: (paths[name], entry.size) for name, entry in files.items()}
    with bar(what=f"publishing {address}", total=sum(size for _, size in contents.values()), unit="B") as sent:
        for digest, (path, size) in contents.items():
            place = address.blob(digest)
            if remote.size(place) != size:
                remote.upload(path, place)
                if (arrived := remote.size(place)) != size:
                    raise UserError(f"{remote.protocol}://{place} has {arrived} bytes of {size}: push again")
            sent.update(size)


def _stamp(path):
    """What tells whether a file was written to."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino
