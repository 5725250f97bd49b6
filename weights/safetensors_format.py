"""safetensors files, read strictly: a file that is damaged or made to deceive is refused before memory is allocated.

A file is the header's length (8 bytes), the header (JSON: dtype, shape and place of each tensor by name), the tensors
end to end. The safetensors library checks that these fit each other and the file's size; here is what it leaves out.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shell.cli import UserError


def read_header(path: str | Path, remedy: str) -> tuple[int, dict[str, dict]]:
    """Where the tensors of a file begin, and its header: {name: {"dtype", "shape", "data_offsets"}}.

    Raises UserError that ends in `remedy`, what to do, if the file is missing or damaged.
    """
    try:
        # The library refuses headers that are too long or nested too deeply, unknown dtypes, shapes that do not make
        # up the bytes, and bytes that are in two tensors or in none. Of equal names it takes the last.
        with safe_open(path, "pt"), open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {remedy}") from None
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        why = "it is a folder" if Path(path).is_dir() else error
        raise UserError(f"{path} is damaged ({why}): {remedy}") from None
    header.pop("__metadata__", None)
    return 8 + size, header


def read_metadata(path: str | Path, remedy: str) -> dict[str, str]:
    """What a file says of itself beside its tensors. Raises UserError as `read_header`."""
    read_header(path, remedy)
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def encode_header(layout: dict[str, tuple[str, tuple, int]], metadata: dict[str, str] | None = None) -> bytes:
    """How a file begins: the header's length and the header, so that the tensors start at a multiple of 8.

    layout: for each tensor by name, in order, its dtype by safetensors' name, its shape, and its bytes.
    """
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, (dtype, shape, nbytes) in layout.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    return _encode(header)


def _encode(header):
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file whose bytes follow from its content: the library itself writes metadata in a random order."""
    data = memoryview(save(tensors))
    start = 8 + int.from_bytes(data[:8], "little")
    with open(path, "wb") as file:
        file.write(_encode({"__metadata__": metadata, **json.loads(bytes(data[8:start]))}))
        file.write(data[start:])


def _without_duplicates(pairs):
    """The pairs of a JSON object as a dict; ValueError where a name comes twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} comes twice in its header")
    return values


def read_tensors(path: str | Path, remedy: str) -> dict[str, Tensor]:
    """The tensors of a file by name, memory-mapped. Raises UserError as `read_header`."""
    _, header = read_header(path, remedy)
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in header}
