"""Rows as people have them: the conversation that each shape gives, a word for every column and key that is refused."""

import contextlib
import copy
import json
import random
import re

import pytest

from preparation.mixture import Source
from preparation.reading import BadRow, Row
from preparation.records import describe_row, to_record
from preparation.shapes import SHAPES


def record(row, unit="line", **source):
    data = row if unit == "row" else json.dumps(row).encode()
    return to_record(Source("test", [], **source), Row("rows", 1, data, unit), seed=1)


def facts(row, **options):
    return dict(record(row, **options)["facts"])


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def talk(*texts, system=None):
    """Messages of the user and the assistant in turn."""
    turns = [said(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return [said("system", system), *turns] if system else turns


def sharegpt(*pairs):
    return [{"from": speaker, "value": text} for speaker, text in pairs]


TOOL = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": TOOL}]
CALL = {"name": "look", "arguments": {"at": ["a", None]}}
OPENAI_CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": ["a", null]}'}}

# Each: the row, the messages, what else the record has.
ROWS = {
    "OpenAI": (
        {"messages": [*talk("a"), said("assistant", None, tool_calls=[OPENAI_CALL], refusal=None),
                      said("tool", "1", tool_call_id="c1"), said("assistant", "b", weight=0), *talk("c", "d")],
         "tools": TOOLS, "parallel_tool_calls": False},
        [*talk("a"), said("assistant", "", tool_calls=[CALL | {"id": "c1"}]), said("tool", "1", tool_call_id="c1"),
         said("assistant", "b", weight=0), *talk("c", "d")],
        {"tools": TOOLS, "key": 'a\nlook {"at": ["a", null]}\n1\nb\nc'},
    ),
    "OpenAI, older": (
        {"messages": [*talk("a"), said("assistant", None, function_call={"name": "look", "arguments": "{}"}),
                      said("function", "1", name="look"), said("assistant", "b")], "functions": [TOOL]},
        [*talk("a"), said("assistant", "", tool_calls=[{"name": "look", "arguments": {}}]),
         said("tool", "1", name="look"), said("assistant", "b")],
        {"tools": TOOLS},
    ),
    "TRL": (
        {"prompt": talk("a", "b", "c"), "completion": [said("assistant", "d")], "chat_template_kwargs": {"x": 1}},
        [said("user", "a"), said("assistant", "b", weight=0), *talk("c", "d")], {"template_args": {"x": 1}},
    ),
    "TRL, half": ({"prompt": talk("a"), "completion": "b"}, talk("a", "b"), {}),
    "a system column": ({"messages": talk("a", "b"), "system": "s"}, talk("a", "b", system="s"), {}),
    "ultrachat": ({"prompt": "a", "prompt_id": "0", "messages": talk("a", "b")}, talk("a", "b"), {}),
    "ShareGPT": (
        {"id": 1, "conversations": sharegpt(("system", "s"), ("human", "a"), ("gpt", "b"), ("user", "c"),
                                            ("model", "d"))},
        talk("a", "b", "c", "d", system="s"), {},
    ),
    "ShareGPT with weights": (
        {"conversations": [{"from": "human", "value": "a", "weight": None},
                           {"from": "gpt", "value": "b", "weight": 0.0}, *sharegpt(("human", "c")),
                           {"from": "gpt", "value": "d", "weight": 1.0}]},
        [said("user", "a"), said("assistant", "b", weight=0), *talk("c", "d")], {},
    ),
    "ShareGPT with tools": (
        {"conversations": sharegpt(("human", "a"), ("function_call", json.dumps(CALL)), ("observation", "1"),
                                   ("gpt", "b"), ("human", "c"), ("function_call", json.dumps([CALL, CALL])),
                                   ("tool", "2"), ("function_response", "3"), ("gpt", "d")),
         "system": "s", "tools": json.dumps([TOOL])},
        [*talk("a", system="s"), said("assistant", "", tool_calls=[CALL]), said("tool", "1"), said("assistant", "b"),
         said("user", "c"), said("assistant", "", tool_calls=[CALL] * 2), said("tool", "2"), said("tool", "3"),
         said("assistant", "d")], {"tools": TOOLS},
    ),
    "Hermes": (
        {"conversations": sharegpt(
            ("system", f"Use <tools>{json.dumps(TOOLS)}</tools>"), ("human", "a"),
            ("gpt", f"So:\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{json.dumps(CALL)}\n</tool_call>\n"),
            ("tool", "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"),
            ("gpt", "as <tool_call> says")), "tools": json.dumps(TOOLS), "category": "x"},
        [*talk("a", system=f"Use <tools>{json.dumps(TOOLS)}</tools>"), said("assistant", "So:", tool_calls=[CALL] * 2),
         said("tool", "1"), said("tool", "2"), said("assistant", "as <tool_call> says")], {},
    ),
    "lmsys": ({"conversation": talk("a", "b"), "model": "x"}, talk("a", "b"), {}),
    "dialog": ({"dialog": [*talk("a", "b"), said("Human", "c"), said("bot", "d")]}, talk("a", "b", "c", "d"), {}),
    "Alpaca": (
        {"instruction": "a", "input": "i", "output": "b", "system": "s", "history": [["x", "y"]], "text": "all of it"},
        [*talk("x", "y", system="s"), said("user", "a", input="i"), said("assistant", "b")], {"key": "s\nx\ny\na\ni"},
    ),
    "Alpaca with nothing beside": (
        {"instruction": "a", "input": None, "output": "b", "system": "", "history": []}, talk("a", "b"), {},
    ),
    "Dolly": (
        {"instruction": "a", "context": "i", "response": "b", "category": "qa"},
        [said("user", "a", input="i"), said("assistant", "b")], {},
    ),
    "OpenOrca": (
        {"id": "1", "system_prompt": "s", "question": "a", "response": "b"}, talk("a", "b", system="s"), {},
    ),
    "capitals": ({"Question": "a", "ANSWER": "b", "System": "s"}, talk("a", "b", system="s"), {}),
    "thinking": (
        {"question": "a", "answer": "b", "reasoning": "hm"},
        [said("user", "a"), said("assistant", "b", thinking="hm")], {},
    ),
    "tools beside an answer": ({"prompt": "a", "response": "b", "tools": TOOLS}, talk("a", "b"), {"tools": TOOLS}),
    "raw text": ({"text": "once", "url": "u"}, talk("", "once"), {"style": "plain", "document": True, "key": ""}),
    "nulls of a mixed table": ({"question": "a", "answer": "b", "messages": None, "rejected": None, "images": []},
                               talk("a", "b"), {}),
}  # fmt: skip


def arrow(value, keys):
    """A list of messages as a table gives it: every message has the keys of all."""
    return [{key: message.get(key) for key in keys} for message in value]


@pytest.mark.parametrize("name", ROWS)
def test_what_a_row_becomes(name):
    row, messages, more = ROWS[name]
    got = record(row)
    assert got["messages"] == messages
    assert {part: got.get(part) for part in more} == more
    assert got.keys() - {"messages", "key", "facts"} == more.keys() - {"key"}
    assert got["facts"]["answers", "to train on"] >= 1
    for part, value in row.items():  # the same out of a table, which gives each message all keys
        if isinstance(value, list) and value and isinstance(value[0], dict) and part != "tools":
            row = row | {part: arrow(value, {key for message in value for key in message} | {"odd"})}
    assert record(row, unit="row")["messages"] == messages


def test_a_system_message_may_be_given_twice():
    row = {"messages": talk("a", "b", system="s"), "system": "s"}
    assert record(row)["messages"] == row["messages"]


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_found_whatever_else_is_there(name):
    row = {"id": random.random()}
    for part, column in SHAPES[name].items():
        column = random.choice([column, column.upper(), column.title()])
        row[column] = talk("a", "b") if part == "messages" else part
    row = dict(random.sample(sorted(row.items()), len(row)))
    assert record(row)["facts"]["rows", name] == 1
    assert describe_row(Source("x", []), Row("rows", 1, row)).startswith(f"{name} (columns used: ")
    assert describe_row(Source("x", []), Row("rows", 1, row)).endswith("; unused: id)")


# Each: the row, what is said.
BAD = [
    ({"prompt": "a", "chosen": "b"}, "column 'chosen': a preference pair has both chosen and rejected, and this row"),
    ({"prompt": "a", "rejected": "b", "chosen": None}, "column 'rejected': a preference pair has both"),
    ({"question": "a", "answer": "b", "rejected": "c"}, "column 'rejected': a preference pair has both"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "thinking": "d"}, "column 'thinking': thinking has no place"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "images": ["d"]}, "column 'images': only text"),
    ({"prompt": "a", "chosen": "b", "rejected": 5}, "field 'rejected' must be text, it is a number"),
    ({"chosen": "b", "rejected": talk("c")}, "fields 'chosen' and 'rejected' must both be text, or both messages"),
    ({"chosen": talk("a", "b"), "rejected": talk("c", "d")}, "fields 'chosen' and 'rejected' begin with no message in"),
    ({"prompt": "x", "chosen": talk("a", "b"), "rejected": talk("a", "c")},
     "field 'prompt' is not the first message of the user in 'chosen' and 'rejected'; to leave it out: --ignore"),
    ({"prompt": "a", "chosen": talk("a", "b"), "rejected": talk("a", "c"), "messages": talk("a", "c")},
     "field 'messages' is not the conversation in 'chosen': which of them is meant?; to leave it out: --ignore"),
    ({"prompt": talk("a"), "chosen": talk("b"), "rejected": talk("c")}, "no message has the role assistant"),
    ({"prompt": talk("a"), "chosen": talk("a", "b"), "rejected": []}, "column 'chosen': a preference pair has both"),
    ({"conversations": talk("a"), "chosen": {}, "rejected": {}}, "message 2: its role is missing"),
    ({"prompt": "a", "completion": "b", "label": True}, "column 'label': answers with a verdict are for preference"),
    ({"messages": talk("a", "b"), "kto_tag": True}, "column 'kto_tag': answers with a verdict"),
    ({"question": "a", "answer": "b", "weight": 0.5}, "column 'weight': samples cannot have weights"),
    *[({"question": "a", "answer": "b", name: ["x"]},
       f'column {name!r}: only text can be trained on; to leave it out: --ignore "[{name}]"')
      for name in ("image", "images", "Videos", "audios")],
    ({"messages": talk("a", "b"), "thinking": "c"}, "column 'thinking': thinking has no place beside"),
    ({"messages": talk("a", "b"), "history": [["c", "d"]]}, "column 'history': history has no place beside"),
    ({"text": "a", "tools": TOOLS}, "column 'tools': tools has no place beside the fields 'text'"),
    ({"messages": talk("a", "b"), "conversations": talk("a", "b")}, "columns 'messages' and 'conversations' may both"),
    ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "columns 'input' and 'context' may both be"),
    ({"question": "a", "answer": "b", "Answer": "c"}, "columns 'answer' and 'Answer' mean the same"),
    ({"messages": talk("a", "b"), "prompt": "c"}, "field 'prompt' is not the first message of the user in"),
    ({"messages": talk("a", "b", system="s"), "system": "t"}, "field 'system' and the conversation's own system"),
    ({"instruction": "a", "output": None, "text": "b"}, "field 'output' must be text, it is null"),
    ({"question": "a"}, "no known fields among ['question']: name them with --fields"),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, "field 'history' must be a list of pairs"),
    ({"instruction": "a", "output": "b", "history": "c"}, "field 'history' must be a list of pairs"),
    ({"question": "a", "answer": "b", "system": 5}, "field 'system' must be text, it is a number"),
    ({"question": "a", "answer": "b", "tools": "x"}, "tools: not JSON"),
    ({"question": "a", "answer": "b", "tools": [{}]}, "tool 1 is {}: expected a function with a name"),
    ({"messages": talk("a", "b"), "chat_template_kwargs": "x"}, "field 'chat_template_kwargs' must be an obj"),
    ({"prompt": talk("a"), "completion": "b", "input": "c"}, "field 'prompt' is a list of messages, beside which"),
    ({"prompt": "a", "completion": talk("b", "c"), "thinking": "d"}, "field 'completion' is a list of messages"),
    ({"messages": talk("a")}, "no message has the role assistant: there is no answer to train on"),
    ({"messages": [said("user", "a", mood="good"), said("assistant", "b")]}, "message 1: the key 'mood' is not"),
    ({"conversations": sharegpt(("human", "a"), ("narrator", "b"))}, "message 2: its role is 'narrator'"),
    ({"conversations": [said("user", "a") | {"from": "human"}]}, "message 1: it has both 'from' and 'role'"),
    ({"conversations": sharegpt(("human", "a"), ("function_call", "look()"))}, "message 2: a call must be JSON, it is"),
    ({"conversations": sharegpt(("human", "a"), ("function_call", "5"))}, "message 2: a tool call must be an object"),
    ({"conversations": sharegpt(("human", "a"), ("gpt", "<tool_call>x</tool_call>"))}, "message 2: a call must be"),
    ({"conversations": sharegpt(("human", "a"), ("gpt", f"<tool_call>{CALL}</tool_call> so"))},
     "message 2: text follows a </tool_call>"),
    ({"conversations": sharegpt(("human", "a"), ("gpt", f"<tool_call>{'[' * 10**5}</tool_call>"))},
     "message 2: a call must be JSON"),
]  # fmt: skip


@pytest.mark.parametrize("row, expected", BAD)
def test_what_would_be_lost_is_refused_by_name(row, expected):
    with pytest.raises(BadRow, match="^" + re.escape(expected)) as caught:
        record(row)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_what_is_ignored_is_counted():
    messages = [said("user", "a", name="Ann", mood="good"), said("assistant", "b", name="Bob")]
    row = {"messages": messages, "images": ["x"], "rejected": "y", "prompt": "not a"}
    ignore = ("name", "mood", "images", "rejected", "prompt", "never")
    got = record(row, ignore=ignore)
    assert got["messages"] == talk("a", "b")
    found = {name: times for (group, name), times in got["facts"].items() if group == "left out by --ignore"}
    assert found == {"name": 2, "mood": 1, "images": 1, "rejected": 1, "prompt": 1}
    assert record({"prompt": "a", "chosen": "b", "rejected": "c"}, ignore=("rejected",),
                  fields={"prompt": "prompt", "answer": "chosen"})["messages"] == talk("a", "b")  # fmt: skip


def test_own_fields_say_what_the_main_parts_are():
    row = {"q": "a", "a": "b", "sys": "s", "question": "x", "answer": "y", "input": "z", "tools": TOOLS, "why": "hm"}
    fields = {"prompt": "{q}?", "answer": "a", "system": "sys", "thinking": "why"}
    got = record(row, fields=fields)
    assert got["messages"] == [*talk("a?", system="s"), said("assistant", "b", thinking="hm")]
    assert got["tools"] == TOOLS and got["facts"]["columns not used", "question"] == 1
    assert describe_row(Source("x", [], fields=fields), Row("f", 1, row)) == (
        "own fields (columns used: {q}?, a, sys, why, tools; unused: question, answer, input)"
    )
    assert record({"body": "b", "title": "t"}, fields={"text": "{title}\n{body}"})["messages"] == talk("", "t\nb")
    got = record(
        {"conv": talk("a", "b"), "s": "", "f": TOOLS}, fields={"messages": "conv", "system": "s", "tools": "f"}
    )
    assert got["messages"] == talk("a", "b") and got["tools"] == TOOLS
    with pytest.raises(BadRow, match="column 'images': only text"):
        record({"conv": talk("a", "b"), "images": ["x"]}, fields={"messages": "conv"})


def test_which_answers_are_trained_on():
    messages = talk("a", "", "b", "c", "d", " \n", "e")
    got = record({"messages": messages})
    assert got["messages"] == [said("user", "a"), said("assistant", "", weight=0), *talk("b", "c")]
    assert got["key"] == "a\nb"
    assert got["facts"]["answers", "empty"] == 2 and got["facts"]["answers", "to train on"] == 1
    assert got["facts"]["samples", "that go on after their last answer"] == 1
    got = record({"messages": [*talk("a"), said("assistant", "b", weight=0)]})
    assert got["messages"][1] == said("assistant", "b", weight=0) and got["key"] == "a"
    assert got["facts"]["answers", "masked (weight 0)"] == 1 and ("answers", "to train on") not in got["facts"]
    only_thinking = record({"messages": [*talk("a"), said("assistant", "", thinking="hm")]})
    assert only_thinking["facts"]["answers", "to train on"] == 1


def test_line_ends_are_made_one_kind_and_counted():
    row = {"instruction": "a\r\nb", "input": "c\rd", "output": "e\n\r\n"}
    got = record(row)
    assert got["messages"] == [said("user", "a\nb", input="c\nd"), said("assistant", "e\n\n")]
    assert got["key"] == "a\nb\nc\nd" and got["facts"]["samples", "with changed line ends"] == 1
    for text in ("a\nb", "a\\r\\nb"):
        same = facts({"question": text, "answer": text, "thinking": text})
        assert ("samples", "with changed line ends") not in same
    call, tool = [{"name": "f", "arguments": {"code": "a\r\nb"}}], {**TOOL, "name": "g\r"}
    got = record({"messages": [*talk("a"), said("assistant", "", tool_calls=call)], "tools": [tool]})
    assert got["messages"][1]["tool_calls"][0]["arguments"] == {"code": "a\nb"}
    assert got["tools"][0]["function"]["name"] == "g\n" and got["facts"]["samples", "with changed line ends"] == 1


def test_a_table_fills_tools_and_calls_with_nulls():
    call = {"name": "look", "arguments": {"at": "a", "for": None, "more": {"x": None, "y": [{"z": None}]}}}
    tool = {
        "type": "function",
        "function": TOOL | {"parameters": {"properties": {"at": {"type": "string"}, "b": None}}},
    }
    row = {"messages": [*talk("a"), said("assistant", None, tool_calls=[call])], "tools": [tool]}
    got, kept = record(row, unit="row"), record(row)
    assert got["messages"][1]["tool_calls"] == [{"name": "look", "arguments": {"at": "a", "more": {"y": [{}]}}}]
    assert got["tools"][0]["function"]["parameters"] == {"properties": {"at": {"type": "string"}}}
    assert kept["messages"][1]["tool_calls"] == [call] and kept["tools"] == [tool]


def test_tools_that_the_system_message_lists_are_not_given_twice():
    for listed, given in ((TOOLS, False), ([TOOL], False), ([], True), ([TOOL | {"name": "other"}], True)):
        system = f"<tools>\n{json.dumps(listed)}\n</tools>"
        got = record({"messages": talk("a", "b", system=system), "tools": TOOLS})
        assert ("tools" in got) is given
        assert got["facts"]["tools", "samples whose system message has the tools"] == (not given)


REQUIRED = {"role", "content", "from", "value", "function", "arguments"}


def places(value, path=()):
    """The paths of all keys in a row that may be left out."""
    if isinstance(value, dict):
        yield from ((*path, key) for key, part in value.items() if key not in REQUIRED and part is not None)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


@pytest.mark.parametrize("name", ROWS)
def test_nothing_is_passed_over_in_silence(name):
    """Whatever key is taken away from a row: its record or what is counted of it changes, or it is refused."""
    row = ROWS[name][0]
    whole = record(row)
    for path in places(row):
        less = copy.deepcopy(row)
        inner = less
        for key in path[:-1]:
            inner = inner[key]
        if inner.pop(path[-1]) in ("", [], 1.0, "function"):  # what says nothing
            continue
        with contextlib.suppress(BadRow):
            assert record(less) != whole, path


def test_recognition_does_not_depend_on_the_rows_before():
    rows = [ROWS[name] for name in ROWS] * 2
    random.shuffle(rows)
    for row, messages, _ in rows:
        assert record(row)["messages"] == messages
