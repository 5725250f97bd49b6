"""Addresses in a model store, such as s3://bucket/models/NAME or s3://bucket/models/NAME@0123456789ab.

Beside NAME, in the same place, are the blobs that all names there share:

    bucket/models/blobs/sha256/HASH                  the content of a file
    bucket/models/NAME/versions/0123456789ab.json    the files of a version (version.py)
    bucket/models/NAME/latest.json                   which version the name alone stands for

A version's 12 digits are the first of the SHA-256 of its list of files: the same files have the same version.

In file:///… percent signs are those of a URL: %20 is a space, and a folder's own % is written %25.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from shell.cli import UserError, local_url

PROTOCOLS = ("s3", "gs", "file")
DIGITS = 12
BLOBS, VERSIONS, LATEST = "blobs", "versions", "latest.json"
_URL = re.compile(r"([a-z][a-z0-9+.-]+):(/+)(.*)")  # pathlib makes one slash of two: Path("s3://b/x") is s3:/b/x


class Address(NamedTuple):
    """A name in a store. root: the bucket and the folders before the name; version: its digits, None for the latest."""

    protocol: str
    root: str
    name: str
    version: str | None = None

    def __str__(self) -> str:
        return written(self.protocol, self.path) + (f"@{self.version}" if self.version else "")

    @property
    def path(self) -> str:
        """The name's folder, as fsspec wants it."""
        return f"{self.root}/{self.name}"

    @property
    def latest(self) -> str:
        """The file that says which version is the latest."""
        return f"{self.path}/{LATEST}"

    def version_file(self, version: str) -> str:
        """The file that lists the files of a version."""
        return f"{self.path}/{VERSIONS}/{version}.json"

    def blob(self, sha256: str) -> str:
        """Where the content with this hash is."""
        return f"{self.root}/{BLOBS}/sha256/{sha256}"

    def at(self, version: str | None) -> "Address":
        """The same name, of this version."""
        return self._replace(version=version)


def is_url(path: str | Path) -> bool:
    """Whether a flag's value is s3://…, gs://…, file://… or the like; whole, or as pathlib writes it."""
    return _URL.fullmatch(str(path)) is not None


def parse_place(text: str | Path) -> tuple[str, str]:
    """The protocol and the path of a place in a store: of a name, or of a folder or bucket with names in it.

    A path without a protocol is that of a store on this machine. Raises UserError for another protocol, or for none of
    a path.
    """
    match = _URL.fullmatch(local_url(str(text)))
    if match is None:
        return "file", os.path.abspath(os.path.expanduser(text))
    protocol, slashes, path = match.groups()
    of_files = protocol == "file"
    shown = f"{protocol}:{slashes if len(slashes) > 1 else '///' if of_files else '//'}{path}"
    if protocol not in PROTOCOLS:
        raise UserError(f"{shown}: expected a folder, or an address that begins with s3://, gs:// or file://")
    path = os.fsdecode(unquote_to_bytes(path)) if of_files else path.rstrip("/")
    parts = [part for part in path.split("/") if part or not of_files]  # in a bucket, an empty name is one
    if not parts or any(part in ("", ".", "..") for part in parts):
        form = "file:///FOLDER/NAME" if of_files else f"{protocol}://BUCKET/NAME"
        raise UserError(f"{shown}: expected {form}, with folders between them or without")
    return protocol, "/" * of_files + "/".join(parts)


def written(protocol: str, path: str) -> str:
    """A place as an address."""
    return f"{protocol}://{path.replace('%', '%25') if protocol == 'file' else path}"


def parse(text: str | Path) -> Address:
    """The address that a text stands for. Raises UserError if it is none."""
    protocol, path = parse_place(text)
    root, slash, last = path.rpartition("/")
    name, version = _split(last)
    if not slash or not name or (protocol != "file" and not root):
        raise UserError(f"{written(protocol, path)} names no model: expected {protocol}://BUCKET/NAME")
    if name == BLOBS:
        raise UserError(f"{written(protocol, path)}: the name {BLOBS} is the store's own: choose another")
    return Address(protocol, root, name, version)


def published(folder: str | Path) -> Address | None:
    """The address of what stands at a path, if that is a name in a store on this machine; None for a plain folder."""
    root, _, last = os.path.abspath(folder).rpartition("/")
    # A plain folder may well be called a@0123456789ab.
    name, version = (last, None) if Path(folder).exists() else _split(last)
    address = Address("file", root, name, version)
    pointer = address.version_file(version) if version else address.latest
    return address if Path(pointer).is_file() and Path(address.path, VERSIONS).is_dir() else None


def _split(text):
    """NAME@VERSION in its two parts."""
    name, _, version = text.rpartition("@")
    return (name, version) if name and re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", version) else (text, None)
