"""What is at the other end: the few calls of fsspec that a store needs, with retries, and failures in one line.

Endpoint, region and credentials are those of the libraries themselves: AWS_ENDPOINT_URL, AWS_PROFILE, ~/.aws,
GOOGLE_APPLICATION_CREDENTIALS, and fsspec's own configuration, such as the variable FSSPEC_S3.
"""

import errno
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from shell import cli
from shell.cli import UserError
from shell.files import flush

MODULES = {"s3": ("fsspec", "s3fs"), "gs": ("fsspec", "gcsfs"), "file": ("fsspec",)}
OPTIONS = {  # of fsspec's file systems; its listings are not kept: another machine may publish at any time
    "s3": {
        "use_listings_cache": False,
        "max_concurrency": 4,  # parts of a file that are on their way at the same time
        "config_kwargs": {"retries": {"mode": "standard", "max_attempts": 3}},
    },
    "gs": {"use_listings_cache": False},
    "file": {"auto_mkdir": True},
}
PART_BYTES = 16 * 2**20  # a file is sent and read in parts of this size; s3:// takes no smaller ones than 5 MiB
TRIES, FIRST_WAIT = 4, 1.0  # each wait (in seconds) is twice as long as the one before
LIBRARIES = {"botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "google", "fsspec", "requests", "urllib3"}
FINAL = {  # errors that another try does not mend, by their names or numbers
    "NoCredentialsError": "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "PartialCredentialsError": "the credentials are incomplete: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "DefaultCredentialsError": "no credentials were found: set GOOGLE_APPLICATION_CREDENTIALS",
    "ProfileNotFound": None,
    "ParamValidationError": None,
}
FINAL_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EINVAL, errno.ENAMETOOLONG, errno.ENOTDIR)
T = TypeVar("T")


class Listed(NamedTuple):
    """What stands in a folder of the store. changed: seconds since 1970, None where the store does not say."""

    name: str
    is_folder: bool
    changed: float | None


class Remote:
    """One kind of store, "s3", "gs" or "file". Paths are without the protocol.

    Every method raises UserError, which names the path, if the store cannot be reached or refuses.
    """

    def __init__(self, protocol: str):
        cli.check_installed(*MODULES[protocol], where=f"{protocol}://")
        import fsspec

        self.protocol = protocol
        options = OPTIONS[protocol] | fsspec.config.conf.get(protocol, {})
        try:
            self.system = fsspec.filesystem(protocol, **options)  # one for all with the same options
        except Exception as error:
            raise UserError(f"{protocol}:// cannot be used: {_reason(error)}") from None
        if protocol == "s3":
            self.system.retries = 1  # botocore's are enough, and ours

    def size(self, path: str) -> int | None:
        """The bytes of an object; None if it is not there."""
        return self._unless_missing(path, lambda: self.system.info(path)["size"])

    def read(self, path: str) -> bytes | None:
        """A small object; None if it is not there."""
        return self._unless_missing(path, lambda: self.system.cat_file(path))

    def read_part(self, path: str, start: int, end: int) -> bytes:
        """The bytes of an object from `start` up to `end`."""
        return self._patiently(path, lambda: self.system.cat_file(path, start=start, end=end))

    def write(self, path: str, content: bytes) -> None:
        """Write a small object, in place of one that is there: a reader sees the one or the other."""
        self._appearing(path, lambda place: self.system.pipe_file(place, content))

    def upload(self, file: Path, path: str) -> None:
        """Send a file, in parts if it is large; the object appears when all have arrived."""
        self._appearing(path, lambda place: self.system.put_file(str(file), place, chunksize=PART_BYTES))

    def listing(self, path: str) -> list[Listed]:
        """What stands in a folder, by name; nothing if it is not there."""
        found = self._unless_missing(path, lambda: self.system.ls(path, detail=True)) or []
        return sorted(
            Listed(entry["name"].rstrip("/").rpartition("/")[2], entry["type"] == "directory", _changed(entry))
            for entry in found
            if entry["name"].rstrip("/") != path
        )

    def _unless_missing(self, path, action):
        try:
            return self._patiently(path, action, missing_too=False)
        except FileNotFoundError:
            return None

    def _appearing(self, path, write):
        """Buckets show an object when it is whole. In a folder it is written beside its name, and renamed."""
        if self.protocol != "file":
            self._patiently(path, lambda: write(path))
            return
        temporary = f"{path}.{os.getpid()}-{random.SystemRandom().randrange(10**9)}.tmp"
        try:
            self._patiently(path, lambda: write(temporary))
            flush(temporary)
            os.replace(temporary, path)
            flush(Path(path).parent)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def _patiently(self, path: str, action: Callable[[], T], missing_too: bool = True) -> T:
        """What `action` returns. It is tried again, with ever longer waits, unless that would be in vain.

        Raises UserError; but for an object that is not there FileNotFoundError, if `missing_too` is false.
        """
        for number in range(1, TRIES + 1):
            try:
                return action()
            except Exception as error:
                missing = isinstance(error, FileNotFoundError) and not _no_bucket(error)
                if missing and not missing_too or not _is_failure(error):
                    raise
                if _is_final(error) or number == TRIES:
                    raise UserError(f"{self.protocol}://{path}: {_reason(error)}") from None
                time.sleep(FIRST_WAIT * 2 ** (number - 1) * random.SystemRandom().uniform(0.5, 1))
        raise AssertionError("the last try returns or raises")


def _is_failure(error):
    """Whether an error is the store's, the network's or the settings', not one in our code."""
    return isinstance(error, OSError | ValueError) or type(error).__module__.partition(".")[0] in LIBRARIES


def _is_final(error):
    kinds = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
    return isinstance(error, kinds) or _name(error) in FINAL or getattr(error, "errno", None) in FINAL_NUMBERS


def _no_bucket(error):
    """Whether not only the object but its bucket is missing, which S3 says and s3fs puts into the cause."""
    response = getattr(error.__cause__, "response", None) or {}
    return response.get("Error", {}).get("Code") == "NoSuchBucket"


def _name(error):
    return type(error).__name__


def _reason(error):
    """An error in a few words, with what to do where that is known."""
    if FINAL.get(_name(error)):
        return FINAL[_name(error)]
    if isinstance(error, FileNotFoundError):
        return "there is no such bucket" if _no_bucket(error) else "not there"
    text = getattr(error, "strerror", None) or str(error) or _name(error)
    return f"no permission ({text})" if isinstance(error, PermissionError) else text


def _changed(entry):
    """When an object was last written; each file system has its own key for that."""
    value = entry.get("LastModified", entry.get("mtime"))
    return value.timestamp() if hasattr(value, "timestamp") else value
