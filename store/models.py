"""Models and adapters in a store: publish a folder, copy one back, see what is there, check it, trim the cache.

python store/models.py --push out/RUN/final --to s3://bucket/adapters/NAME
python store/models.py --list s3://bucket/adapters
python store/models.py --pull s3://bucket/adapters/NAME --out_dir adapters/NAME
python store/models.py --verify s3://bucket/adapters/NAME@0123456789ab
python store/models.py --trim 20GB
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shell import cli
from shell.cli import UserError

ACTIONS = ("push", "pull", "list", "verify", "trim")


@dataclass
class Settings:
    """The command line. One of push, pull, list, verify and trim is given.

    Args:
        push: Folder to publish; what the store has already is not sent again.
        to: The address to publish it at, such as s3://bucket/models/NAME; gs://, file:// or a folder's path do too.
        pull: Address to copy to out_dir; NAME@VERSION for another version than the latest.
        out_dir: Folder for what is pulled. Without it, it goes into the cache alone, where scripts find it.
        list: Address of a name, for its versions, or of a bucket or folder, for the names in it.
        verify: Address whose files are to be read where they are, and compared with their hashes.
        trim: Remove from the cache what was used least recently, until it has no more than this, such as 20GB.
    """

    push: Path | None = None
    to: str | None = None
    pull: str | None = None
    out_dir: Path | None = None
    list: str | None = None
    verify: str | None = None
    trim: str | None = None

    def __post_init__(self):
        given = [name for name in ACTIONS if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(f"give one of {', '.join('--' + name for name in ACTIONS)}, not {len(given)} of them")
        if (self.push is None) != (self.to is None):
            raise UserError("--push FOLDER and --to ADDRESS go together")
        if self.out_dir is not None and self.pull is None:
            raise UserError("--out_dir goes with --pull")
        if self.trim is not None:
            cli.number_of_bytes(self.trim, "trim")


if __name__ == "__main__":
    settings = cli.parse(Settings)

import datetime

from store import cache
from store.address import BLOBS, LATEST, VERSIONS, Address, parse, parse_place, written
from store.fetch import fetch, files_of, latest, pull, verify
from store.publish import check_address, publish
from store.remote import Remote
from store.version import Entry


def main(s: Settings) -> None:
    """Do what is asked for, and print what came of it."""
    if s.push is not None:
        print(f"published {publish(s.push, check_address(s.to, 'to'))}")
    elif s.pull is not None and s.out_dir is not None:
        print(f"wrote {s.out_dir}: {pull(parse(s.pull), s.out_dir)}")
    elif s.pull is not None:
        print(fetch(parse(s.pull)))
    elif s.list is not None:
        show(*parse_place(s.list))
    elif s.verify is not None:
        address, files = verify(parse(s.verify))
        print(f"whole: {address}, {describe(files)}")
    else:
        removed = cache.trim(cli.number_of_bytes(s.trim, "trim"))
        for folder in removed:
            print(f"removed {cache.address_of(folder)}")
        print(f"{cache.root()} has {cache.size() / 1e9:.2f} GB")


def show(protocol: str, path: str) -> None:
    """Print the versions of a name, the newest last, or the names and folders at a place."""
    remote = Remote(protocol)
    found = remote.listing(path)
    names = {entry.name for entry in found}
    if {LATEST, VERSIONS} <= names:
        show_versions(remote, parse(written(protocol, path)))
        return
    if not found:
        raise UserError(f"{written(protocol, path)}: nothing is there")
    for entry in found:
        if entry.is_folder and entry.name != BLOBS:
            published = remote.size(f"{path}/{entry.name}/{LATEST}") is not None
            print(written(protocol, f"{path}/{entry.name}{'' if published else '/'}"))
    files = [entry.name for entry in found if not entry.is_folder]
    if files:
        print(f"and {len(files)} files that are in no store, such as {files[0]}")


def show_versions(remote: Remote, address: Address) -> None:
    """Print a line for each version of a name."""
    newest = latest(remote, address).version
    versions = remote.listing(f"{address.path}/{VERSIONS}")
    for entry in sorted(versions, key=lambda entry: entry.changed or 0):
        version = entry.name.removesuffix(".json")
        when = datetime.datetime.fromtimestamp(entry.changed).isoformat(" ", "minutes") if entry.changed else ""
        mark = ", the latest" if version == newest else ""
        print(f"{address.at(version)}  {when}  {describe(files_of(remote, address.at(version)))}{mark}")


def describe(files: dict[str, Entry]) -> str:
    """The number and size of files."""
    return f"{len(files)} files, {sum(entry.size for entry in files.values()) / 1e9:.2f} GB"


if __name__ == "__main__":
    cli.run(main, settings)
