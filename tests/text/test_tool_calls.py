"""text/tool_calls.py: every form of call, texts that are none, and what can be shown of an answer as it grows."""

import json
import re

import pytest

from text.tokenizer import Tokenizer
from text.tool_calls import mark_tokens, parse_calls, settled

F, G = ("f", {"a": [1, {"b": "ü — \n }"}]}), ("g", {})
NAMES = {"f", "g"}


def as_json(call, key="arguments", **more):
    return json.dumps({"name": call[0], key: call[1], **more}, ensure_ascii=False)


def hermes(*calls):
    return "\n".join(f"<tool_call>\n{as_json(call)}\n</tool_call>" for call in calls)


def mistral(*calls):
    return f"[TOOL_CALLS] [{', '.join(map(as_json, calls))}]"


def llama(*calls):
    return "; ".join(as_json(call, "parameters") for call in calls)


CALLS = [  # (an answer, its content, its calls)
    (hermes(F), "", [F]),
    (hermes(F, G, F), "", [F, G, F]),
    (f"Let me see.\n\n{hermes(F)}", "Let me see.", [F]),
    (f"{hermes(F)} and\n{hermes(G)}\nThat is all.", " and\nThat is all.", [F, G]),
    (
        hermes(("f", {"a": "<tool_call> [TOOL_CALLS]"})),
        "",
        [("f", {"a": "<tool_call> [TOOL_CALLS]"})],
    ),
    (hermes(("h", {})), "", [("h", {})]),  # of no tool on offer: the client is told what the model wants
    (f"<tool_call>{as_json(F)}</tool_call>", "", [F]),
    (f"<tool_call>\n{as_json(F)}\n", "", [F]),  # the end is missing, the call is whole
    (f"<think>\nIs it {hermes(G)}?\n</think>\n\n{hermes(F)}", f"<think>\nIs it {hermes(G)}?\n</think>", [F]),
    (f"{hermes(F)}\n<tool_call>\nf(a=1)\n</tool_call>", "\n<tool_call>\nf(a=1)\n</tool_call>", [F]),
    (mistral(F), "", [F]),
    (mistral(F, G), "", [F, G]),
    (f"Hm. {mistral(G)}", "Hm.", [G]),
    (f"[TOOL_CALLS]{as_json(F)}", "", [F]),
    (llama(F), "", [F]),
    (llama(F, G), "", [F, G]),
    (f"{as_json(F)}\n{as_json(G)}", "", [F, G]),
    (f"Well,\n{llama(F)}\n", "Well,", [F]),
    (json.dumps({"name": "f", "parameters": {"a": 1}}, indent=2), "", [("f", {"a": 1})]),
    (f"<|python_tag|>{llama(F, G)}", "", [F, G]),
]
NO_CALLS = [
    "", " ", "It is wet. ", "a < b", "{", '{"name"', "[TOOL_CALLS]", "[TOOL_CALLS] []", "[TOOL_CALLS] [1]",
    "<tool_call>", "<|python_tag|>print(1)", f"Try {llama(F)}", f"{llama(F)} is a call", as_json(("Bob", {})),
    '{"name": "f"}', as_json(F, "kwargs"), as_json(("f", "a")), as_json(F, colour="red"), as_json(F, id=5),
    as_json(F)[:-1], hermes(F)[:-20], hermes(F).replace("arguments", "args"),
    f"<tool_call>{as_json(F)} {as_json(F)}</tool_call>",
    hermes(("f", {"a": float("nan")})), '<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>',
    f"<tool_call>{'[' * 100_000}", f"<think>\n{hermes(F)}\n</think>\n", f"Look:\n```\n{llama(F)}\n```\n",
    f"{llama(F)}\n{as_json(('Bob', {}))}",
]  # fmt: skip


def calls_of(parsed):
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in parsed.calls]


@pytest.mark.parametrize("text, content, calls", CALLS, ids=range(len(CALLS)))
def test_calls(text, content, calls):
    parsed = parse_calls(text, NAMES)
    assert (parsed.content, calls_of(parsed)) == (content, calls)
    for call in parsed.calls:
        assert call.keys() == {"id", "type", "function"} and call["type"] == "function"
        assert re.fullmatch("[0-9a-f]{9}" if "[TOOL" in text[:10] else "call_[0-9a-f]{32}|[0-9a-f]{9}", call["id"])
    assert len({call["id"] for call in parsed.calls}) == len(calls)


@pytest.mark.parametrize("text", NO_CALLS, ids=range(len(NO_CALLS)))
def test_text_that_is_no_call_stays_as_it_is(text):
    assert parse_calls(text, NAMES) == (text, [])


def test_an_id_that_the_model_writes_is_kept():
    parsed = parse_calls(f"[TOOL_CALLS] [{as_json(F, id='abcDEF123')}]", NAMES)
    assert [call["id"] for call in parsed.calls] == ["abcDEF123"]


@pytest.mark.parametrize("text", [*(row[0] for row in CALLS), *NO_CALLS], ids=range(len(CALLS) + len(NO_CALLS)))
def test_what_is_settled_begins_the_content(text):
    """At every length of the text: so nothing that a stream has sent has to be taken back."""
    text, shown = text[:2000], 0
    content = parse_calls(text, NAMES).content
    for length in range(len(text) + 1):
        now = settled(text[:length], shown)
        assert shown <= now == settled(text[:length]) and content.startswith(text[:now])
        shown = now


def test_ordinary_text_is_settled_at_once():
    """All but blanks, and but what may be the beginning of a mark."""
    text = "It is 5 < 6, {as} [you] said.\n{a: 1}\n<b>Yes</b>"
    held = [settled(text[:n]) for n in range(len(text) + 1)]
    assert [n for n in range(len(text) + 1) if held[n] < len(text[:n].rstrip())] == [
        n for n in range(len(text) + 1) if text[:n].endswith(("<", "[", "\n{"))
    ]


def test_the_marks_of_a_vocabulary(tmp_path, tiny_model_dir):
    """Only those that are special tokens: the others are text already."""
    for file in tiny_model_dir.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert mark_tokens(Tokenizer(tmp_path)) == {}
    names = json.loads((tmp_path / "tokenizer_config.json").read_text())
    names["added_tokens_decoder"] = {"510": {"content": "[TOOL_CALLS]", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    assert mark_tokens(Tokenizer(tmp_path)) == {510: "[TOOL_CALLS]"}
