"""Files of a folder in a store that come when they are needed: shards of prepared data larger than the disk.

The folder in the cache has the small files alone. A shard is a blob of the cache like any other (fetch.py), with its
hash checked, but in no folder: who needs it opens it, and whoever makes room may remove it; then it is fetched again.
`Stream` fetches ahead in a thread, in the order in which a run will read, into a bounded room.
"""

import contextlib
import itertools
import threading
import time
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
INTERVAL = 0.1  # seconds between two looks at whether other processes have read a file
PATIENCE = 300.0  # seconds, after which what they have not read is no longer waited for: rather too much than a hang


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

    The processes of a run on one machine have the files together: each comes once, and goes when all have read it.

    room: bytes that they may take on the disk at one time. A file that is asked for out of turn is fetched at once, and
    stays. step: the step that the run has come to. on_release: called with the number of a file before it is removed.
    """

    def __init__(self, folder: Path, names: list[str]):
        values = read_json(Path(folder, REST))
        self.folder, self.wanted = Path(folder), address.parse(values["address"])
        absent = next((name for name in names if name not in values["files"]), None)
        if absent:
            raise UserError(f"{self.wanted} has no {absent}, which its data.json lists: publish the folder again")
        self.names, self.entries = names, [Entry(**values["files"][name]) for name in names]
        self.room, self.step, self.on_release = 0, 0, lambda number: None
        # By their numbers: files that have come, that are to come next, and that this process has read, but maybe not
        # all others.
        self._here, self._coming, self._leaving = set(), set(), set()
        self._held = Counter()  # how many of the groups that are not done yet have a file
        self._groups, self._changed, self._thread, self._readers = {}, threading.Condition(), None, None
        self._busy, self._failed, self._stop = False, None, False  # the thread: it neither waits for room nor is over

    def size(self) -> int:
        """The bytes of all files."""
        return sum(entry.size for entry in self.entries)

    def follow(self, groups: Iterable[tuple[Any, list[int]]], room: int, run: str) -> None:
        """Fetch files ahead, in a thread: groups of them, by a key each, in the order in which they will be read.

        Where all fit into `room`, each is fetched once; otherwise those of a group make room when it is done. run: what
        the processes that follow the same groups at the same time have in common.
        """
        self.room, keep, groups = room, self.size() <= room, iter(groups)
        self._readers = cache.Readers(self.folder, len(self.names), run)
        first = list(itertools.islice(groups, 1))
        with self._changed:
            if not keep:
                self._leaving = {*range(len(self.names))}.difference(*(numbers for _, numbers in first))
                self._clear_up()  # what a run that was killed left
                self._leaving = set()  # others have come to these already
            self._busy = True
        chained = itertools.chain(first, groups)
        self._thread = threading.Thread(target=self._fetch_all, args=(chained, keep), daemon=True)
        self._thread.start()

    def place(self, number: int) -> Path:
        """The path of a file, which is there. Waits for it if it is on its way. Raises UserError if it cannot come."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._failed or number in self._here or not (number in self._coming or self._busy)
            )
            if self._failed:
                raise UserError(self._failed)
        if number not in self._here or not self._blob(number).is_file():  # out of turn, or another run has made room
            self._fetch(number)
        return self._blob(number)

    def done(self, before: Any) -> None:
        """The groups that were to be read before the one with this key are done: their files may be removed."""
        with self._changed:
            for key in [key for key in self._groups if key < before]:
                for number in self._groups.pop(key):
                    self._held[number] -= 1
                    if number in self._here:
                        self._leave(number)
            self._clear_up()
            self._changed.notify_all()

    def close(self) -> None:
        """Fetch nothing more."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()
            self._readers.close()

    def _fetch_all(self, groups: Iterator, keep: bool) -> None:
        try:
            for key, numbers in groups:
                for number in self._announce(key, numbers, keep):
                    self._wait_for_room(number)
                    self._fetch(number)
                    with self._changed:
                        self._here.add(number)
                        self._coming.discard(number)
                        self._leave(number)
                        self._changed.notify_all()
                if keep and len(self._here) == len(self.names):
                    return
        except _Stopped:
            pass
        except Exception as error:  # for the thread that waits for the file
            self._failed = str(error) or type(error).__name__
        finally:
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _announce(self, key, numbers, keep):
        """Say that a group comes next. Returns those of its files that no group before it has."""
        with self._changed:
            new = [number for number in numbers if not self._held[number]]
            self._held.update(numbers)
            self._coming.update(new)
            self._leaving.difference_update(new)
            for number in new if not keep else ():
                self._readers.add(number)
            if not keep:
                self._groups[key] = numbers
            self._changed.notify_all()
        return new

    def _leave(self, number):
        """Let go of a file that no group has any more."""
        if not self._held[number]:
            self.on_release(number)
            self._here.discard(number)
            self._leaving.add(number)
            self._readers.remove(number)

    def _clear_up(self):
        """Remove of the files that are leaving those that nobody reads any more. Inside of `_changed`."""
        for number in [*self._leaving]:
            with contextlib.suppress(BlockingIOError), self._readers.none(number):
                self._remove(number)
                self._leaving.discard(number)

    def _wait_for_room(self, number):
        """Until a file fits, or is there, as another process has fetched it."""
        others_go_on = time.monotonic() + PATIENCE
        with self._changed:
            while not self._stop:
                self._clear_up()
                counted = self._here | self._coming | (self._leaving if time.monotonic() < others_go_on else set())
                taken = sum(self.entries[n].size for n in counted - {number} if self._blob(n).is_file())
                if taken + self.entries[number].size <= self.room or self._blob(number).is_file():
                    break
                self._busy = False
                self._changed.notify_all()
                self._changed.wait(INTERVAL if self._leaving else None)
            self._busy = True
            self.update(0)

    def update(self, _: int) -> None:
        """Called as bytes come, in the place of a progress bar: leaves the download if it is no longer wanted."""
        if self._stop:
            raise _Stopped

    def _blob(self, number):
        return cache.root() / "blobs" / self.entries[number].sha256

    def _fetch(self, number):
        """Bring a file into the cache's blobs, unless it is there whole."""
        name, entry = self.names[number], self.entries[number]
        if _is_whole(self._blob(number), entry):
            return
        with cache.blob(entry.sha256) as (whole, partial):
            if _is_whole(whole, entry):  # now: another process has fetched it
                return
            begun = partial.stat().st_size if partial.is_file() else 0
            kept = {self.entries[each].sha256 for each in self._here | self._coming | self._leaving}
            cache.make_room(max(0, entry.size - begun), kept | {entry.sha256}, f"{self.wanted}: {name}")
            fetch_blob(Remote(self.wanted.protocol), self.wanted, name, entry, whole, partial, self)

    def _remove(self, number):
        """Remove a file, and the beginning of one, from the cache's blobs, unless a folder has it too."""
        with cache.blob(self.entries[number].sha256) as (whole, partial):
            partial.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                if whole.stat().st_nlink == 1:
                    whole.unlink()


def _is_whole(path, entry):
    try:
        return sha256(path) == entry.sha256
    except FileNotFoundError:
        return False


class _Stopped(Exception):
    """The thread is to end."""
