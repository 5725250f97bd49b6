"""Files in, rows out: the same rows from every format, a word for everything that is wrong, and flat memory."""

import csv
import gzip
import io
import json
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from preparation import reading
from preparation.mixture import Source, find_sources
from preparation.reading import BadRow, read_rows
from preparation.records import to_record
from shell.cli import UserError

FORMATS = ["json", "jsonl", "csv", "tsv", "parquet"]
NOT_A_CHARACTER = "\0" + "".join(map(chr, range(0xFDD0, 0xFDF0)))
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=NOT_A_CHARACTER), min_size=1, max_size=12)


def content(rows, format):
    """Rows of text in a format, as bytes."""
    if format == "json":
        return json.dumps(rows, ensure_ascii=random.random() < 0.5, indent=random.choice([None, 1])).encode()
    if format == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=random.random() < 0.5) + "\n" for row in rows).encode()
    if format == "parquet":
        import pyarrow
        import pyarrow.parquet

        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=3 if len(rows) < 100 else 500)
        return file.getvalue()
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if format == "tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def write(path, data):
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path, format=None):
    return list(read_rows(Source("test", [path], format), lambda share: None))


def records(path, format=None):
    source = Source("test", [path], format)
    return [to_record(source, row, seed=1) for row in read(path, format)]


def pairs(path):
    """(question, answer) of each sample."""
    return [tuple(message["content"] for message in record["messages"]) for record in records(path)]


def complaints(path, format=None):
    """What is wrong with each bad row of a file, and with the file itself, each as a user sees it."""
    found, source = [], Source("test", [path], format)
    try:
        for row in read_rows(source, lambda share: None):
            try:
                to_record(source, row, seed=1)
            except BadRow as error:
                found.append(f"{row.place}: {error}")
    except UserError as error:
        found.append(str(error))
    assert not any("\n" in text for text in found)
    return [text.replace(str(path), path.name) for text in found]


# ------------------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@given(rows=st.lists(st.fixed_dictionaries({"question": TEXT, "answer": TEXT}), min_size=1, max_size=9))
@settings(max_examples=15, deadline=None)
def test_every_format_gives_the_rows_that_were_written(tmp_path_factory, format, packed, rows):
    if packed and format == "parquet":
        return
    path = tmp_path_factory.mktemp("any") / f"rows.{format}{'.gz' if packed else ''}"
    expected = [tuple(re.sub("\r\n?", "\n", row[name]) for name in ("question", "answer")) for row in rows]
    assert pairs(write(path, content(rows, format))) == expected


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv", "json.gz", "jsonl.gz", "csv.gz", "tsv.gz"])
def test_marks_line_ends_and_blank_lines_make_no_difference(tmp_path, ending):
    """A byte order mark, CRLF, blank lines anywhere, no line end at the end."""
    texts = {
        "json": '\r\n [{"question": "a", "answer": "b"}\r\n\r\n,\r\n{"question": "c", "answer": "d"}\r\n]\r\n \r\n',
        "jsonl": '\r\n{"question": "a", "answer": "b"}\r\n \t\r\n\r\n{"question": "c", "answer": "d"}',
        "csv": '\r\nquestion,answer\r\na,b\r\n   \r\n\r\n"c",d',
        "tsv": '\r\nquestion\tanswer\r\na\tb\r\n   \r\n\r\n"c"\td',
    }
    path = write(tmp_path / f"rows.{ending}", b"\xef\xbb\xbf" + texts[ending.removesuffix(".gz")].encode())
    assert pairs(path) == [("a", "b"), ("c", "d")]


def test_the_places_of_rows(tmp_path):
    text = 'question,answer\n"two\nlines",b\n\nc,d\ne,"f\r\n\r\n"\ng,h'
    rows = read(write(tmp_path / "a.csv", text.encode()))
    assert [(row.number, row.data["question"]) for row in rows] == [(2, "two\nlines"), (5, "c"), (6, "e"), (9, "g")]
    assert rows[1].place == f"{tmp_path}/a.csv:5" and rows[2].data["answer"] == "f\r\n\r\n"
    rows = read(write(tmp_path / "a.jsonl", b'\n{"a": 1}\n\n{"a": 2}\n'))
    assert [row.place for row in rows] == [f"{tmp_path}/a.jsonl:2", f"{tmp_path}/a.jsonl:4"]
    rows = read(write(tmp_path / "a.json", b'[\n{"a": 1},\n\n{"a": 2}]\n'))
    assert [row.place for row in rows] == [f"{tmp_path}/a.json, item 1", f"{tmp_path}/a.json, item 2"]
    rows = read(write(tmp_path / "a.parquet", content([{"a": "b"}] * 700, "parquet")))
    assert [row.place for row in rows] == [f"{tmp_path}/a.parquet, row {i}" for i in range(1, 701)]


def test_a_format_may_be_said_in_place_of_an_ending(tmp_path):
    path = write(tmp_path / "rows.txt", b"question\tanswer\na\tb\n")
    assert [row.data for row in read(path, "tsv")] == [{"question": "a", "answer": "b"}]


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv", "jsonl.gz", "json.gz", "parquet"])
def test_a_text_of_ten_megabytes(tmp_path, ending):
    long = "wörd " * (2 * 10**6)
    rows = [{"question": "a", "answer": "b"}, {"question": long, "answer": "c"}, {"question": "d", "answer": "e"}]
    got = pairs(write(tmp_path / f"rows.{ending}", content(rows, ending.removesuffix(".gz"))))
    assert got == [("a", "b"), (long, "c"), ("d", "e")]


def test_parquet_with_more_than_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    dialog = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    columns = {
        "messages": [dialog, dialog],
        "question": pyarrow.array(["x", "x"]).dictionary_encode(),
        "info": [{"n": 1, "tags": ["p", "q"]}, None],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    assert [record["messages"] for record in records(tmp_path / "rows.parquet")] == [dialog, dialog]
    assert read(tmp_path / "rows.parquet")[0].data == {
        "messages": dialog, "question": "x", "info": {"n": 1, "tags": ["p", "q"]}
    }  # fmt: skip
    columns = {
        "question": pyarrow.array(["x", "x", None]).dictionary_encode(),
        "answer": ["y", None, "z"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "null.parquet")
    assert complaints(tmp_path / "null.parquet") == [
        "null.parquet, row 2: field 'answer' must be text, it is null",
        "null.parquet, row 3: field 'question' must be text, it is null",
    ]


def test_parquet_that_is_not_utf_8_costs_only_its_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    broken = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    table = pyarrow.table({"question": broken, "answer": ["b"] * 3})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert complaints(tmp_path / "rows.parquet") == ["rows.parquet, row 2: not UTF-8 text"]


@pytest.mark.parametrize("missing", ["pyarrow", "datasets"])
def test_a_library_that_is_missing_is_named(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    path = [write(tmp_path / "rows.parquet", b"PAR1")] if missing == "pyarrow" else "some/where"
    with pytest.raises(UserError, match=f"{missing} is not installed: pip install -r requirements"):
        list(read_rows(Source("test", path), lambda share: None))


# ------------------------------------------------------------------------------------------------ the JSON's buffer

ITEM = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(items=st.lists(ITEM, max_size=5), chunk=st.integers(1, 40), indent=st.sampled_from([None, 0, 3]))
@settings(max_examples=200, deadline=None)
def test_an_item_may_lie_over_the_buffers_edge_anywhere(tmp_path_factory, items, chunk, indent):
    path = tmp_path_factory.getbasetemp() / "edge.json"
    text = json.dumps(items, ensure_ascii=random.random() < 0.5, indent=indent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK", chunk)
        path.write_text(text.encode("utf-8", "surrogatepass").decode("utf-8", "replace"), encoding="utf-8")
        got = [(number, json.loads(item)) for number, item in reading.read_json_list(path, lambda share: None)]
        expected = json.loads(path.read_text(encoding="utf-8"))
    assert got == list(enumerate(expected, start=1))


@given(data=st.data(), chunk=st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_a_spoilt_list_never_passes(tmp_path_factory, data, chunk):
    """Whatever one character more, less or other does to a list: Python's own parser agrees on whether it is one."""
    text = json.dumps([{"a": "b\n\\", "c": [1.5e3, True]}, {"d": None}, {"e": "é"}], ensure_ascii=False, indent=1)
    place = data.draw(st.integers(0, len(text) - 1))
    text = text[:place] + data.draw(st.sampled_from(["", *'[]{},:"\\ \n0-e.aé\0'])) + text[place + 1 :]
    path = tmp_path_factory.getbasetemp() / "spoilt.json"
    path.write_text(text, encoding="utf-8")
    try:
        expected = json.loads(text)
        expected = expected if isinstance(expected, list) else None
    except ValueError:
        expected = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK", chunk)
        try:
            got = [json.loads(item) for _, item in reading.read_json_list(path, lambda share: None)]
        except UserError:
            got = None
    assert got == expected


# ------------------------------------------------------------------------------------------------------ bad input

GOOD = b'{"question": "a", "answer": "b"}'
DEEP = b'{"question": "a", "answer": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"
# Each: the file's name, its bytes, and every complaint about it. The text of a complaint may go on.
BAD = [
    # broken lines
    ("a.jsonl", GOOD + b'\n{"question": "a"', ["a.jsonl:2: not valid JSON: Expecting ',' delimiter at column 17"]),
    ("a.jsonl", GOOD + b"\n" + GOOD + b" x\n" + GOOD, ["a.jsonl:2: not valid JSON: Extra data at column 34"]),
    ("a.jsonl", b"\n\n{'a': 1}\n", ["a.jsonl:3: not valid JSON: Expecting property name"]),
    ("a.jsonl", b'{"question": "a\tb", "answer": ""}', ["a.jsonl:1: not valid JSON: Invalid control character"]),
    ("a.jsonl", b'{"question": "a\0", "answer": ""}', ["a.jsonl:1: not valid JSON: Invalid control character"]),
    ("a.jsonl", DEEP + b"\n" + GOOD, ["a.jsonl:1: nested too deeply"]),
    ("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}", ["a.jsonl:1: a number has too many digits"]),
    ("a.jsonl", b'{"question": NaN, "answer": "b"}\n', ["a.jsonl:1: field 'question' must be text, it is NaN"]),
    ("a.jsonl", b'{"question": "a", "answer": -Infinity}', ["a.jsonl:1: field 'answer' must be text, it is -Infinity"]),
    ("a.jsonl", b'{"question": "a", "answer": "b", "score": [NaN, Infinity]}', []),
    # wrong types
    ("a.jsonl", b"5\n" + GOOD + b"\n[]\nnull\n", [
        "a.jsonl:1: expected an object with fields, found a number",
        "a.jsonl:3: expected an object with fields, found a list",
        "a.jsonl:4: expected an object with fields, found null",
    ]),
    ("a.jsonl", b'{"question": 1, "answer": "b"}', ["a.jsonl:1: field 'question' must be text, it is a number"]),
    ("a.jsonl", b'{"question": "", "answer": true}', ["a.jsonl:1: field 'answer' must be text, it is true or false"]),
    ("a.jsonl", b'{"question": "", "answer": null}', ["a.jsonl:1: field 'answer' must be text, it is null"]),
    ("a.jsonl", b'{"messages": null}', ["a.jsonl:1: field 'messages' must be a list of messages, it is null"]),
    ("a.jsonl", b'{"messages": []}', ["a.jsonl:1: field 'messages' must be a list of messages, each with a role"]),
    ("a.jsonl", b'{"messages": ["a"]}', ["a.jsonl:1: field 'messages' must be a list of messages, each with a role"]),
    # nested JSON where text is expected
    ("a.jsonl", b'{"prompt": {"a": 1}, "completion": ""}', ["a.jsonl:1: field 'prompt' must be text, it is an object"]),
    ("a.jsonl", b'{"instruction": "", "input": {}, "output": ""}', ["a.jsonl:1: field 'input' must be text, it is an"]),
    ("a.jsonl", b'{"instruction": "", "input": null, "output": ""}', []),
    # bytes and characters
    ("a.jsonl", GOOD + b'\n{"question": "\xe9", "answer": ""}', ["a.jsonl:2: not UTF-8 text: byte 0xe9 at column 15"]),
    ("a.jsonl", b'{"question": "\xed\xa0\xbd", "answer": ""}', ["a.jsonl:1: not UTF-8 text: byte 0xed at column 15"]),
    ("a.jsonl", b'{"question": "\\ud83d", "answer": ""}', ["a.jsonl:1: message 1: its content holds '\\ud83d'"]),
    ("a.jsonl", b'{"messages": [{"role": "user", "content": "\\ude00"}]}', ["a.jsonl:1: message 1: its content holds"]),
    ("a.jsonl", '{"question": "a", "answer": ""}'.encode("utf-16"), ["a.jsonl:1: not UTF-8 text: byte 0xff at column"]),
    # keys and columns
    ("a.jsonl", GOOD + b'\n{"a": 1, "b": {"c": 1, "c": 1}}', ["a.jsonl:2: key 'c' comes twice in one object"]),
    ("a.jsonl", b'{"question": "a", "reply": "b"}', ["a.jsonl:1: no known fields among ['question', 'reply']"]),
    ("a.jsonl", b"{}", ["a.jsonl:1: no known fields among []"]),
    # nothing
    *[(f"a.{format}", data, [f"a.{format} is empty"])
      for format in ("jsonl", "csv", "tsv") for data in (b"", b"\n \n\r\n", b"\xef\xbb\xbf")],
    ("a.csv", b"question,answer\n\n", ["a.csv is empty"]),
    ("a.json", b" [\n ]\n", ["a.json is empty"]),
    # JSON lists
    ("a.json", b"", ["a.json, item 1 (line 1): not valid JSON: expected a list of objects"]),
    ("a.json", b'\n{\n"data": [' + GOOD + b"]\n}\n", ["a.json, item 1 (line 2): not valid JSON: expected a list of"]),
    ("a.json", b"5\n", ["a.json, item 1 (line 1): not valid JSON: expected a list of objects, or an object on each"]),
    ("a.json", GOOD + b"\n\n" + GOOD[:-1], ["a.json:3: not valid JSON: Expecting ',' delimiter"]),
    ("a.jsonl", b"\n [" + GOOD + b",\n5]", ["a.jsonl, item 2: expected an object with fields, found a number"]),
    ("a.json", b"[" + GOOD + b",\n" + GOOD[:20], ["a.json, item 2 (line 2): not valid JSON: "]),
    ("a.json", b"[" + GOOD + b",\n" + GOOD, ["a.json, item 3 (line 2): not valid JSON: expected ',' or ']'"]),
    ("a.json", b"[" + GOOD + b",\n]", ["a.json, item 2 (line 2): not valid JSON: Expecting value"]),
    ("a.json", b"[" + GOOD + b"\n\n" + GOOD + b"]", ["a.json, item 2 (line 3): not valid JSON: expected ',' or ']'"]),
    ("a.json", b"[" + GOOD + b"] ]", ["a.json: something follows after the end of the list, item 1"]),
    ("a.json", b"[" + GOOD + b"]" + b" " * 10**5 + b"x", ["a.json: something follows after the end of the list, item"]),
    ("a.json", b"[" + GOOD + b",\n\n" + GOOD + b"\n}" * 10**5, ["a.json, item 3 (line 4): not valid JSON: expected"]),
    ("a.json", b"[" + b",\n".join([GOOD] * 4000) + b",\n\n}]", ["a.json, item 4001 (line 4002): not valid JSON: Exp"]),
    ("a.json", b"[" + GOOD + b"," + DEEP + b"]", ["a.json, item 2: nested too deeply"]),
    ("a.json", b"[" + GOOD + b",\n\n" + b'"\xff"]', ["a.json:3: not UTF-8 text: byte 0xff"]),
    ("a.json", b"[" + GOOD + b"\n]\n\xc3", ["a.json:3: not UTF-8 text: byte 0xc3"]),
    ("a.json", b'[5, {"question": 1, "answer": ""}, {"a": 1, "a": 2}, {"question": NaN}, ' + GOOD + b"]", [
        "a.json, item 1: expected an object with fields, found a number",
        "a.json, item 2: field 'question' must be text, it is a number",
        "a.json, item 3: key 'a' comes twice in one object",
        "a.json, item 4: no known fields among ['question']",
    ]),
    ("a.json", b'[{"n": ' + b"1" * 50000 + b"}, " + GOOD + b"]", ["a.json, item 1: a number has too many digits"]),
    # CSV
    ("a.csv", b'question,answer\n"a\n\nb",c\nd\ne,f,g\nh,i\n', [
        "a.csv:5: 1 field, but the header has 2 columns", "a.csv:6: 3 fields, but the header has 2 columns",
    ]),
    ("a.tsv", b"question\tanswer\na,b\n", ["a.tsv:2: 1 field, but the header has 2 columns"]),
    ("a.csv", b'question,answer\na,"b\n\n\xff"\nc,d\ne,\xfe\n', [
        "a.csv:2: line 4 is not UTF-8 text", "a.csv:6: line 6 is not UTF-8 text",
    ]),
    ("a.csv", b'question,answer\na,"b"c\nd,e\n', ["a.csv:2: not valid CSV: "]),
    ("a.csv", b'question,answer\na,b\nc,"d\ne,f\n', ["a.csv:3: not valid CSV: unexpected end of data"]),
    ("a.csv", b"question,answer\na,b\0\nc,d\n", ["a.csv:2: a field holds a NUL character"]),
    ("a.csv", b"question,answer\ra,b\rc,d\r", ["a.csv:1: not valid CSV: new-line character seen in unquoted field"]),
    ("a.csv", b"question,answer,,\na,b,1,2\nc,d,1\n", ["a.csv:3: 3 fields, but the header has 4 columns"]),
    ("a.csv", b"question,answer,question\na,b,c\n", ["a.csv:1: two columns are called 'question'"]),
    ("a.csv", b"question,\xff\na,b\n", ["a.csv:1: line 1 is not UTF-8 text"]),
    ("a.csv", b"question,reply\na,b\n", ["a.csv:2: no known fields among ['question', 'reply']"]),
    ("a.csv", b"messages\nhi\n", ["a.csv:2: field 'messages' must be a list of messages, it is text"]),
]  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name, data, expected", BAD, ids=[f"{i}-{name}" for i, (name, _, _) in enumerate(BAD)])
def test_what_is_wrong_is_said_with_its_place(tmp_path, packed, name, data, expected):
    path = write(tmp_path / (name + ".gz" * packed), data)
    got = complaints(path)
    assert len(got) == len(expected), got
    for text, start in zip(got, expected, strict=True):
        assert text.replace(path.name, name).startswith(start)
        assert len(text) < 250


def test_files_that_are_not_what_their_ending_says(tmp_path):
    rows = GOOD * 3000 + b"\n"
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(rows)
    assert complaints(path) == ["a.jsonl.gz cannot be read to its end: Not a gzipped file (b'{\"')"]
    path.write_bytes(gzip.compress(random.randbytes(10**4))[:-2000])
    assert complaints(path)[-1].startswith("a.jsonl.gz cannot be read to its end: Compressed file ended before")
    spoilt = bytearray(gzip.compress(random.randbytes(10**4)))
    spoilt[5000] ^= 1
    path.write_bytes(spoilt)
    assert complaints(path)[-1].startswith("a.jsonl.gz cannot be read to its end: ")
    whole = content([{"question": f"a{i}", "answer": "b"} for i in range(2000)], "parquet")
    for data in (b"", rows, whole[: len(whole) // 2]):
        found = complaints(write(tmp_path / "a.parquet", data))
        assert len(found) == 1 and found[0].startswith("a.parquet cannot be read as parquet after row 0")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], ["question", "question"]), tmp_path / "a.parquet")
    assert complaints(tmp_path / "a.parquet") == ["a.parquet: two columns are called 'question'"]
    pyarrow.parquet.write_table(pyarrow.table({"question": pyarrow.array([], "string")}), tmp_path / "a.parquet")
    assert complaints(tmp_path / "a.parquet") == ["a.parquet is empty: it holds no row"]


def test_a_quote_that_is_never_closed_takes_no_more_than_its_share(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST_FIELD", 10**4)
    before = csv.field_size_limit()
    found = complaints(write(tmp_path / "a.csv", b'question,answer\na,"b\n' + b"c,d\n" * 10**4))
    csv.field_size_limit(before)
    assert found[0].startswith("a.csv:2: not valid CSV: field larger than field limit")


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_json_and_json_lines_are_told_by_their_content(tmp_path, packed):
    rows = [{"question": f"q{i}", "answer": "[{" * i} for i in range(1, 4)]
    for ending, format, unit in (("json", "jsonl", "line"), ("jsonl", "json", "item")):
        for blank in (b"", b"\xef\xbb\xbf", b" \n" * 20000):
            path = write(tmp_path / f"rows.{ending}{packed}", blank + content(rows, format))
            assert pairs(path) == [(row["question"], row["answer"]) for row in rows]
            assert read(path)[0].unit == unit
    long = [{"question": "a" * 10**5, "answer": "b"}] * 2
    assert len(records(write(tmp_path / f"long.json{packed}", content(long, "jsonl")))) == 2


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-8", "utf-8-sig", "shift_jis"])
@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv", "json.gz", "csv.gz"])
def test_files_in_another_encoding(tmp_path, ending, encoding):
    strange = {"cp1252": "Zürich – “é”", "shift_jis": "日本語"}.get(encoding, "é\u2028日本🎉")
    rows = [{"question": f"{strange}\n{i}", "answer": random.choice("abc") * 40} for i in range(2000)]
    text = content(rows, ending.removesuffix(".gz")).decode()
    if ending.startswith("json"):
        dumps = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = "[" + ",\n".join(dumps) + "]" if ending.startswith("json.") or ending == "json" else "\n".join(dumps)
    path = write(tmp_path / f"rows.{ending}", text.encode(encoding))
    (source,) = find_sources([str(path)], encoding=encoding)
    got = [to_record(source, row, 1)["messages"][0]["content"] for row in read_rows(source, lambda share: None)]
    assert got == [row["question"] for row in rows]


# Each: the file's name, its bytes, the encoding, what is said.
HINT = "; name the file's encoding with --encoding (or encoding in a mixture), such as "
BAD_ENCODING = [
    ("a.jsonl", b'{"a": 1}\n{"b": "\xe9"}', None, f"a.jsonl:2: not UTF-8 text: byte 0xe9 at column 8{HINT}cp1252"),
    ("a.csv", b"question,answer\na,b\n\xe9,c\n", None, f"a.csv:3: line 3 is not UTF-8 text: byte 0xe9{HINT}cp1252"),
    ("a.json", b'[\n"\xe9"]', None, f"a.json:2: not UTF-8 text: byte 0xe9{HINT}cp1252"),
    ("a.json", '[{"a": 1}]'.encode("utf-16"), None, f"a.json:1: not UTF-8 text: byte 0xff{HINT}utf-16"),
    ("a.csv", "q,a\nb,c".encode("utf-16-le"), None, "a.csv:1: a field holds a NUL character: is this UTF-16? Then"),
    ("a.csv", b"question,answer\na,\x81\n", "cp1252", "a.csv:2: not cp1252 text: byte 0x81; see --encoding"),
    ("a.jsonl", b"x\n\n\x80", "ascii", "a.jsonl:3: not ascii text: byte 0x80; see --encoding"),
    ("a.json", "[{}]".encode("utf-16")[:-1], "utf-16", "a.json:1: not utf-16 text: byte 0x5d; see --encoding"),
]


@pytest.mark.parametrize("name, data, encoding, expected", BAD_ENCODING)
def test_bytes_that_are_not_of_the_encoding(tmp_path, name, data, encoding, expected):
    path = write(tmp_path / name, data)
    (source,) = find_sources([str(path)], encoding=encoding)
    found = []
    try:
        for row in read_rows(source, lambda share: None):
            try:
                to_record(source, row, 1)
            except BadRow as error:
                found.append(f"{row.place}: {error}")
    except UserError as error:
        found.append(str(error))
    assert found[-1].replace(str(path), name).startswith(expected), found


def test_an_encoding_that_cannot_be(tmp_path):
    path = write(tmp_path / "a.parquet", content([{"question": "a", "answer": "b"}], "parquet"))
    for name in ("latin-7x", "base64", "rot13", "", "x\0"):
        with pytest.raises(UserError, match="--encoding .*no text encoding of that name"):
            find_sources([str(path)], encoding=name)
    with pytest.raises(UserError, match="--encoding cp1252: is for files of text, and --data names none"):
        find_sources([str(path)], encoding="cp1252")


# ------------------------------------------------------------------------------------------- progress and memory


@pytest.mark.parametrize(
    "ending", ["json", "jsonl", "csv", "tsv", "json.gz", "jsonl.gz", "csv.gz", "tsv.gz", "parquet"]
)
def test_progress_goes_from_0_to_1(tmp_path, ending):
    rows = [{"question": random.randbytes(40).hex(), "answer": str(i)} for i in range(3000)]
    paths = [write(tmp_path / f"{i}.{ending}", content(rows, ending.removesuffix(".gz"))) for i in range(2)]
    seen, steps, read_so_far = [0.0], [], 0
    for read_so_far, _ in enumerate(read_rows(Source("test", paths), lambda share: seen.append(share)), start=1):
        if len(seen) > len(steps) + 1:
            steps += [read_so_far] * (len(seen) - len(steps) - 1)
    assert seen == sorted(seen) and seen[-1] == 1 and read_so_far == 6000
    if not ending.endswith(".gz"):  # of a packed file the share is of its packed bytes, a buffer ahead
        assert all(abs(share - rows_read / 6000) < 0.25 for share, rows_read in zip(seen[1:], steps, strict=False))


# The peak is that of the process image (VmHWM): resource's starts with the peak of the process it was forked from.
PEAK = """
import re, sys
from pathlib import Path
from preparation.mixture import Source
from preparation.reading import read_rows
from preparation.records import to_record
source, rows = Source("test", [Path(sys.argv[1])]), 0
for row in read_rows(source, lambda share: None):
    to_record(source, row, 1)
    rows += 1
print(rows, re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "jsonl.gz", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, ending):
    """Ten times the file, of some 20 MB, in a process of its own: at most 1.2 times the memory."""
    rows = [{"question": random.randbytes(1000).hex(), "answer": str(i)} for i in range(10000)]
    peaks = []
    for count in (1000, 10000):
        path = write(tmp_path / f"{count}.{ending}", content(rows[:count], ending.removesuffix(".gz")))
        command = [sys.executable, "-c", PEAK, path]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        read, peak = map(int, done.stdout.split())
        assert read == count
        peaks.append(peak)
    assert peaks[1] < 1.2 * peaks[0], peaks


# ------------------------------------------------------------------------------------------ Hugging Face datasets


def test_a_folder_with_a_dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"q{i}", "answer": str(i)} for i in range(600)]
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", content(rows, "jsonl"))
    write(tmp_path / "files" / "test.jsonl", content(rows[:5], "jsonl"))
    parts = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:5])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "both"))
    parts["train"].save_to_disk(str(tmp_path / "one"))
    monkeypatch.chdir(tmp_path)
    for text, expected in (("files", rows), ("files:test", rows[:5]), ("both", rows), ("both:test", rows[:5]),
                           ("one", rows)):  # fmt: skip
        seen = []
        (source,) = find_sources([text])
        got = list(read_rows(source, seen.append))
        assert [row.data for row in got] == expected
        assert seen == sorted(seen) and seen[-1] == 1
        assert got[-1].place == f"{source.path}, row {len(expected)}"
    with pytest.raises(UserError, match="dataset files, after row 0: .*validation"):
        list(read_rows(find_sources(["files:validation"])[0], lambda share: None))
    with pytest.raises(UserError, match="dataset both, after row 0: .*validation"):
        list(read_rows(find_sources(["both:validation"])[0], lambda share: None))


def test_a_dataset_that_cannot_be_loaded_or_breaks_off(monkeypatch):
    datasets = pytest.importorskip("datasets")

    class Rows:
        info = datasets.DatasetInfo()

        def __iter__(self):
            yield {"question": "a", "answer": "b"}
            raise ConnectionError("the line\nis down")

    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: calls.append((args, options)) or Rows())
    rows = read_rows(Source("test", "org/name", config="main", split="test"), lambda share: None)
    assert next(rows).data == {"question": "a", "answer": "b"}
    with pytest.raises(UserError, match="^dataset org/name, after row 1: the line is down$"):
        next(rows)
    assert calls == [(("org/name", "main"), {"split": "test", "streaming": True})]
