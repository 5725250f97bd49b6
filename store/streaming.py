"""Files of a folder in a store that come when they are needed: shards of prepared data larger than the disk.

The folder in the cache has the small files alone. A shard is a blob of the cache like any other (fetch.py), with its
hash checked, but in no folder: who needs it opens it, and whoever makes room may remove it; then it is fetched again.
`Stream` fetches ahead in a thread, in the order in which a run will read, into a bounded room.
"""

import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shell.cli import UserError
from shell.files import read_json, sha256, write_json
from store import address, cache
from store.fetch import fetch_blob, fetch_files, files_of, latest
from store.remote import Remote
from store.version import Entry

SMALL = ("data.json", "report.html")  # of prepared data: what is fetched at once
REST = "elsewhere.json"  # in the cache's folder: the address, and the other files' hashes and sizes


def without_shards(path: Path) -> Path:
    """The folder in the cache of prepared data at an address, without its shards; a plain folder itself.

    Raises UserError if the store does not have it.
    """
    protocol, place = address.parse_place(path)
    wanted = address.parse(path) if protocol != "file" else address.published(place)
    if wanted is None:
        return Path(place) if address.is_url(path) else Path(path)
    remote = Remote(wanted.protocol)
    wanted = latest(remote, wanted)
    folder = cache.folder_of(wanted, cache.STREAMED)
    while not cache.use(folder):
        files = files_of(remote, wanted)
        rest = {name: entry._asdict() for name, entry in files.items() if name not in SMALL}

        def add(temporary, rest=rest):
            write_json(temporary / REST, {"address": str(wanted), "files": rest})

        fetch_files(remote, wanted, {name: files[name] for name in SMALL if name in files}, folder, add)
    return folder


def is_streamed(folder: Path) -> bool:
    """Whether a folder is one that `without_shards` made: some of its files are elsewhere."""
    return Path(folder, REST).is_file()


class Stream:
    """The files `names` of a folder that `without_shards` made, fetched when they are asked for, or ahead of that.

    room: bytes that they may take on the disk at one time. A file that is asked for out of turn is fetched at once, and
    stays. step: the step that the run has come to. on_release: called with the number of a file before it is removed.
    """

    def __init__(self, folder: Path, names: list[str]):
        values = read_json(Path(folder, REST))
        self.wanted = address.parse(values["address"])
        absent = next((name for name in names if name not in values["files"]), None)
        if absent:
            raise UserError(f"{self.wanted} has no {absent}, which its data.json lists: publish the folder again")
        self.names, self.entries = names, [Entry(**values["files"][name]) for name in names]
        self.room, self.step, self.on_release = 0, 0, lambda number: None
        self._here, self._coming, self._failed, self._stop = set(), set(), None, False
        self._held = Counter()  # how many of the groups that are not done yet have a file
        self._groups, self._changed, self._thread = {}, threading.Condition(), None

    def size(self) -> int:
        """The bytes of all files."""
        return sum(entry.size for entry in self.entries)

    def follow(self, groups: Iterable[tuple[Any, list[int]]], room: int) -> None:
        """Fetch files ahead, in a thread: groups of them, by a key each, in the order in which they will be read.

        Where all fit into `room`, each is fetched once; otherwise those of a group make room when it is done.
        """
        self.room, keep, groups = room, self.size() <= room, iter(groups)
        first = list(itertools.islice(groups, 1))
        if not keep:
            for number in {*range(len(self.names))}.difference(*(numbers for _, numbers in first)):
                self._remove(number)  # what a run that was killed left
        chained = itertools.chain(first, groups)
        self._thread = threading.Thread(target=self._fetch_all, args=(chained, keep), daemon=True)
        self._thread.start()

    def place(self, number: int) -> Path:
        """The path of a file, which is there. Waits for it if it is on its way. Raises UserError if it cannot come."""
        with self._changed:
            self._changed.wait_for(lambda: number in self._here or number not in self._coming or self._failed)
            if self._failed:
                raise UserError(self._failed)
        path = cache.root() / "blobs" / self.entries[number].sha256
        if number not in self._here or not path.is_file():  # out of turn, or another process has made room
            self._fetch(number)
        return path

    def done(self, before: Any) -> None:
        """The groups that were to be read before the one with this key are done: their files may be removed."""
        with self._changed:
            for key in [key for key in self._groups if key < before]:
                for number in self._groups.pop(key):
                    self._held[number] -= 1
                    if not self._held[number] and number in self._here:
                        self.on_release(number)
                        self._remove(number)
                        self._here.discard(number)
            self._changed.notify_all()

    def close(self) -> None:
        """Fetch nothing more."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()

    def _fetch_all(self, groups: Iterator, keep: bool) -> None:
        try:
            for key, numbers in groups:
                with self._changed:
                    new = [number for number in numbers if not self._held[number]]
                    self._held.update(numbers)
                    self._coming.update(new)
                    if not keep:
                        self._groups[key] = numbers
                    self._changed.notify_all()
                for number in new:
                    self._wait_for_room(number)
                    self._fetch(number)
                    with self._changed:
                        self._here.add(number)
                        self._coming.discard(number)
                        self._changed.notify_all()
                if keep and len(self._here) == len(self.names):
                    return
        except _Stopped:
            pass
        except Exception as error:  # for the thread that waits for the file
            with self._changed:
                self._failed = str(error) or type(error).__name__
                self._changed.notify_all()

    def _wait_for_room(self, number):
        def fits():
            taken = sum(self.entries[each].size for each in self._here)
            return self._stop or taken + self.entries[number].size <= self.room

        with self._changed:
            self._changed.wait_for(fits)
            self.update(0)

    def update(self, _: int) -> None:
        """Called as bytes come, in the place of a progress bar: leaves the download if it is no longer wanted."""
        if self._stop:
            raise _Stopped

    def _fetch(self, number):
        """Bring a file into the cache's blobs, unless it is there whole."""
        name, entry = self.names[number], self.entries[number]
        with cache.blob(entry.sha256) as (whole, partial):
            if whole.is_file() and sha256(whole) == entry.sha256:
                return
            begun = partial.stat().st_size if partial.is_file() else 0
            kept = {self.entries[each].sha256 for each in self._here | self._coming}
            cache.make_room(max(0, entry.size - begun), kept | {entry.sha256}, f"{self.wanted}: {name}")
            fetch_blob(Remote(self.wanted.protocol), self.wanted, name, entry, whole, partial, self)

    def _remove(self, number):
        """Remove a file from the cache's blobs, unless a folder has it too."""
        with cache.blob(self.entries[number].sha256) as (whole, _), contextlib.suppress(FileNotFoundError):
            if whole.stat().st_nlink == 1:
                whole.unlink()


class _Stopped(Exception):
    """The thread is to end."""
