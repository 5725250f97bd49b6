"""From files to rows: every format, read strictly and a piece at a time, so that memory does not grow with a file.

A row that is wrong is a `BadRow`, which the caller may make an error or count; where the rest of a file is unreadable,
a `UserError` is raised. records.py finds out what a row means.

To add a format: a function `(path, progress, encoding) -> (number, data), …` and a line in `FORMATS`.
"""

import codecs
import csv
import functools
import gzip
import hashlib
import itertools
import json
import os
import re
import reprlib
import zlib
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any, NamedTuple

from shell import cli
from shell.cli import UserError

CHUNK = 2**15  # bytes of a file that are read at one time
LONGEST_FIELD = 2**27  # characters of a CSV field: a quote that is never closed must not take all memory
TABLE_ROWS = 256  # rows of a parquet file that are unpacked at one time


Progress = Callable[[float], None]


class BadRow(Exception):
    """A row that cannot be a sample; the text says what is wrong, without the place."""


class Row(NamedTuple):
    """A row as it was read.

    file: a path, or the name of a dataset. number: from 1, of what `unit` says: "line" (the first one of a CSV row),
    "item" or "row". data: JSON as undecoded bytes, a dict of columns, or what is wrong with the row.
    """

    file: str
    number: int
    data: bytes | dict | BadRow
    unit: str = "line"

    @property
    def place(self) -> str:
        """Where it is, for messages: "rows.jsonl:7", "rows.json, item 7"."""
        return f"{self.file}:{self.number}" if self.unit == "line" else f"{self.file}, {self.unit} {self.number}"


def read_rows(source: Any, progress: Progress, skip_bad: bool = False) -> Iterator[Row]:
    """Yield each `Row` of a `mixture.Source`, in order.

    progress: called every now and then with the share of the source that has been read, 0 to 1 (always 0 if its length
    is unknown). UserError where the rest of a file cannot be read, and for a file without rows; with `skip_bad` this is
    one more row instead, a `BadRow`.
    """
    if isinstance(source.path, str):
        yield from _read_dataset(source, progress)
        return
    sizes = [path.stat().st_size for path in source.path]
    total, before = max(1, sum(sizes)), 0
    for path, size in zip(source.path, sizes, strict=True):
        format, number = source.format or format_of(path), 0
        rows, unit = FORMATS[format]
        try:
            rows, unit = FORMATS[_format_by_content(path, format, source.encoding)]
            share_of_all = lambda share, a=before, b=size: progress((a + share * b) / total)  # noqa: E731
            for number, data in rows(path, share_of_all, source.encoding):
                yield Row(str(path), number, data, unit)
            if number == 0:
                raise UserError(f"{path} is empty: it holds no row")
        except UserError as error:
            if not skip_bad:
                raise
            yield Row(str(path), number + 1, BadRow(str(error)), unit)
        before += size


# -------------------------------------------------------------------------------------------------------- formats


def format_of(path: Path) -> str | None:
    """The format that a file's ending names, without .gz; None if it is not a known one."""
    endings = [ending.lower() for ending in path.suffixes]
    packed = endings[-1:] == [".gz"]
    name = (endings[:-1] if packed else endings)[-1:] or [""]
    return name[0][1:] if name[0][1:] in FORMATS and not (packed and name[0] == ".parquet") else None


def _pieces(path, progress, read):
    """Yield what `read(file)` returns until it is empty, for a file that may be gzip'd."""
    with open(path, "rb") as raw:
        size = os.fstat(raw.fileno()).st_size
        file = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
        try:
            while piece := read(file):
                yield piece
                progress(raw.tell() / size)
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"{path} cannot be read to its end: {error}") from None


def _lines(path, progress, encoding):
    """Yield each line of a file as bytes of UTF-8, without a byte order mark. encoding: as `_texts` takes it."""
    if encoding:
        yield from _split_lines(_texts(path, progress, encoding))
        return
    for i, lines in enumerate(_pieces(path, progress, lambda file: file.readlines(CHUNK))):
        if i == 0:
            lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
        yield from lines


def _split_lines(texts):
    """Yield the lines of a text in pieces, as UTF-8."""
    begun = []  # the parts of the line at hand
    for text in texts:
        first, *more = text.split("\n")
        begun.append(first)
        for part in more:
            yield ("".join(begun) + "\n").encode()
            begun = [part]
    if last := "".join(begun):
        yield last.encode()


def _format_by_content(path, format, encoding):
    """The format of a file: of JSON and JSON Lines, which are often taken for each other, the one that it holds."""
    if format not in ("json", "jsonl"):
        return format
    line, end, _ = _beginning(path, encoding).partition("\n")
    if not line or line[0] in "[\ufffd":  # the latter stands for what is not UTF-8, as the format's reader will say
        return "json" if line[:1] == "[" else format
    if format == "json" and (line[0] != "{" or (end and not line.rstrip().endswith("}"))):
        number = next(i for i, text in enumerate(_lines(path, _no_progress, encoding), 1) if text.strip())
        raise UserError(
            f"{path}, item 1 (line {number}): not valid JSON: expected a list of objects, or an object on each line"
        )
    return "jsonl"


def _beginning(path, encoding):
    """The first piece of a file's text that is not blank, without white space before it."""
    if encoding:
        texts = _texts(path, _no_progress, encoding)
    else:
        pieces = _pieces(path, _no_progress, lambda file: file.read(CHUNK))
        texts = (piece.removeprefix(codecs.BOM_UTF8).decode(errors="replace") for piece in pieces)
    return next(filter(None, (text.lstrip() for text in texts)), "")


def _no_progress(share):
    pass


def read_json_lines(path: Path, progress: Progress, encoding: str | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield (line, the line's bytes) for each line of a JSON Lines file that is not blank."""
    for number, line in enumerate(_lines(path, progress, encoding), start=1):
        if line.strip():
            yield number, line


def read_json_list(path: Path, progress: Progress, encoding: str | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield (item, its bytes) for each item of a JSON file that holds a list.

    What is in memory is a piece of the file, or an item if that is longer, twice.
    """
    texts = _texts(path, progress, encoding)
    buffer, position, number, line, ended = "", 0, 0, 1, False
    while True:
        try:
            begin, end = _find_item(buffer, position, number)
            problem, sure = None, end
        except json.JSONDecodeError as error:
            problem, sure = error, len(buffer) if error.msg.startswith("Unterminated") else error.pos
        except RecursionError:
            raise UserError(f"{path}, item {number + 1}: nested too deeply") from None
        if sure + 16 > len(buffer) and not ended:  # what lies at the buffer's edge could go on behind it
            more = "".join(itertools.islice(texts, 1 + (len(buffer) - position) // CHUNK))
            line += buffer.count("\n", 0, position)
            buffer, position, ended = buffer[position:] + more, 0, not more
            continue
        if problem:
            line += buffer.count("\n", 0, problem.pos)
            raise UserError(f"{path}, item {number + 1} (line {line}): not valid JSON: {problem.msg}")
        position = end
        if begin == end:
            break
        number += 1
        yield number, buffer[begin:end].encode()
    if any(text.strip() for text in itertools.chain([buffer[end:]], texts)):
        raise UserError(f"{path}: something follows after the end of the list, item {number}")


# Only finds where an item ends; `records.to_record` parses it again, strictly, in another process.
_SCANNER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)
_SPACE = re.compile(r"[ \t\n\r]*")


def _find_item(text, position, number):
    """(begin, end) of the item of a list after its first `number` ones, which end at `position`; (end, end) for "]".

    JSONDecodeError if there is none, and also if `text` stops too early.
    """
    position = _SPACE.match(text, position).end()
    found = text[position : position + 1]
    if found == "]" and number:
        return position + 1, position + 1
    if found != ("," if number else "["):
        raise json.JSONDecodeError("expected " + ("',' or ']'" if number else "a list of objects"), text, position)
    begin = _SPACE.match(text, position + 1).end()
    if text[begin : begin + 1] == "]" and not number:
        return begin + 1, begin + 1
    return begin, _SCANNER.raw_decode(text, begin)[1]


def _texts(path, progress, encoding):
    """Yield a file's text in pieces, none of them empty, without a byte order mark.

    encoding: a name that `check_encoding` passes; UTF-8 if None.
    """
    decoder, line = codecs.getincrementaldecoder(encoding or "utf-8-sig")(), 1
    for piece in itertools.chain(_pieces(path, progress, lambda file: file.read(CHUNK)), [b""]):
        try:
            text = decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].decode(encoding or "utf-8", "replace").count("\n")
            hint = "; see --encoding" if encoding else encoding_hint(error.object)
            raise UserError(
                f"{path}:{line}: not {encoding or 'UTF-8'} text: byte {error.object[error.start]:#04x}{hint}"
            ) from None
        except UnicodeError as error:  # of UTF-16 and UTF-32 without a mark at their start
            raise UserError(f"{path}:{line}: not {encoding} text: {error}; see --encoding") from None
        line += text.count("\n")
        if text := text.removeprefix("\ufeff") if encoding else text:
            yield text


def encoding_hint(data: bytes) -> str:
    """The end of a message that bytes are not UTF-8: what to do."""
    known = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "cp1252"
    return f"; name the file's encoding with --encoding (or encoding in a mixture), such as {known}"


def check_encoding(name: str) -> None:
    """Raise UserError unless Python knows a text encoding of that name."""
    try:
        text = codecs.getincrementaldecoder(name)().decode(b"", final=True)
    except (LookupError, TypeError, ValueError):
        text = None
    if not isinstance(text, str):
        raise UserError(f"{name}: no text encoding of that name, expected one such as utf-8, utf-16, cp1252, latin-1")


def read_csv(
    path: Path, progress: Progress, encoding: str | None = None, delimiter: str = ","
) -> Iterator[tuple[int, dict | BadRow]]:
    """Yield (first line, columns by name) for each row of a CSV file whose first row names the columns.

    Quotes are as spreadsheets and pandas write them, also with tabs. A column without a name is left out.
    """
    csv.field_size_limit(LONGEST_FIELD)
    broken = []  # what is wrong with the lines of the row at hand that are not UTF-8
    reader = csv.reader(_decode_lines(_lines(path, progress, encoding), broken), delimiter=delimiter, strict=True)
    header, end = None, 0
    while True:
        try:
            row, problem = next(reader, None), None
        except csv.Error as error:
            row, problem = [], f"not valid CSV: {error}"
        if row is None:
            return
        begin, end = end + 1, reader.line_num
        if not problem and not broken and (not row or len(row) == 1 and not row[0].strip()):
            continue  # a blank line
        if broken:
            problem = broken[0]
            broken.clear()
        elif not problem and any("\0" in field for field in row):
            problem = "a field holds a NUL character: is this UTF-16? Then give --encoding utf-16"
        if header is None:
            named = [name for name in row if name]
            twice = next((name for name in named if named.count(name) > 1), None)
            if problem or twice:
                raise UserError(f"{path}:{begin}: {problem or f'two columns are called {reprlib.repr(twice)}'}")
            header = row
        elif problem or len(row) != len(header):
            yield begin, BadRow(problem or f"{count(row, 'field')}, but the header has {count(header, 'column')}")
        else:
            yield begin, {name: field for name, field in zip(header, row, strict=True) if name}


def _decode_lines(lines, broken):
    """Yield lines as text; what is wrong with those that are not UTF-8 is added to the list `broken`."""
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            byte = f"byte {line[error.start]:#04x}"
            broken.append(f"line {number} is not UTF-8 text: {byte}{encoding_hint(line)}")
            text = line.decode(errors="replace")
        yield text


def count(items: Sized, what: str) -> str:
    """ "3 fields", "1 field"."""
    return f"{len(items)} {what}" + ("s" if len(items) != 1 else "")


def read_parquet(path: Path, progress: Progress, encoding: None = None) -> Iterator[tuple[int, dict | BadRow]]:
    """Yield (row, columns by name) for each row of a parquet file, whose texts are always UTF-8."""
    cli.check_installed("pyarrow", where=str(path))
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # With a buffer size, column chunks are read bit by bit, not whole.
        with pyarrow.parquet.ParquetFile(path, buffer_size=CHUNK, pre_buffer=False) as file:
            names = file.schema_arrow.names
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise UserError(f"{path}: two columns are called {reprlib.repr(twice)}")
            for batch in file.iter_batches(TABLE_ROWS):
                for data in _unpack(batch):
                    number += 1
                    yield number, data
                progress(number / file.metadata.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet after row {number}: {_one_line(error)}") from None


def _unpack(batch):
    """The rows of an Arrow batch as dicts; where the text of one is not UTF-8, a `BadRow`."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [BadRow("not UTF-8 text")]
        return [row for i in range(len(batch)) for row in _unpack(batch.slice(i, 1))]


FORMATS = {
    "jsonl": (read_json_lines, "line"),
    "json": (read_json_list, "item"),
    "csv": (read_csv, "line"),
    "tsv": (functools.partial(read_csv, delimiter="\t"), "line"),
    "parquet": (read_parquet, "row"),
}


def _read_dataset(source, progress):
    """Yield each `Row` of a Hugging Face dataset as it comes over the network, or out of a folder."""
    cli.check_installed("datasets", where=f"{source.path}, a dataset of the hub")
    import datasets

    number = 0
    try:
        if Path(source.path, "state.json").is_file():  # a folder written by save_to_disk
            rows = datasets.load_from_disk(source.path)
        elif Path(source.path, "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(source.path)[source.split]
        else:
            rows = datasets.load_dataset(source.path, source.config, split=source.split, streaming=True)
        split = (rows.info.splits or {}).get(source.split)
        digest = hashlib.sha256()
        for number, data in enumerate(rows, start=1):
            digest.update(repr(data).encode())
            yield Row(source.path, number, data, "row")
            if number % TABLE_ROWS == 0:
                progress(min(1.0, number / split.num_examples) if split and split.num_examples else 0.0)
    except Exception as error:  # files of any kind, the network: it can fail in any way
        raise UserError(f"dataset {source.path}, after row {number}: {_one_line(error)}") from None
    if number == 0:
        raise UserError(f"dataset {source.path}, split {source.split!r}, is empty")
    source.rows_hash = digest.hexdigest()
    progress(1.0)


def _one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__
