"""Calls of tools in the text that a model writes, as OpenAI's API has them.

These forms are read:

    <tool_call>                                              Hermes, Qwen, the style chatml: one or several
    {"name": "f", "arguments": {…}}
    </tool_call>
    [TOOL_CALLS] [{"name": "f", "arguments": {…}}, …]        Mistral, the style mistral-instruct
    {"name": "f", "parameters": {…}}                         Llama 3.1, the style llama3: at the end of an answer, one
                                                             or several, perhaps after <|python_tag|>

What is no whole call stays text. So does what stands in a thought (before </think>), and JSON without any mark that
names no tool on offer: it may be an answer.
"""

import json
import re
import uuid
from collections.abc import Collection
from typing import Any, NamedTuple

from shell.cli import UserError
from text.messages import check_json
from text.tokenizer import Tokenizer

HERMES, HERMES_END, MISTRAL, LLAMA = "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"
BARE = '{"name"'  # without blanks: how a call begins that no mark stands before
_BEGINS = re.compile("|".join((*map(re.escape, (HERMES, MISTRAL, LLAMA)), r'^\{\s*"name"')), re.MULTILINE)
_HERMES_END = re.compile(rf"\s*(?:{HERMES_END}|\Z)")
_BLANKS, _BETWEEN = re.compile(r"\s*"), re.compile(r"[\s;]*")
_JSON = json.JSONDecoder()


class Parsed(NamedTuple):
    """An answer: the text that is no call, and the calls in OpenAI's form."""

    content: str
    calls: list[dict]


def mark_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """The special tokens of a vocabulary that mark calls: ids with their texts. Decoding leaves them out, by itself."""
    split = {mark: tokenizer.split(mark, special=True) for mark in (HERMES, HERMES_END, MISTRAL, LLAMA)}
    return {parts[0]: mark for mark, parts in split.items() if isinstance(parts[0], int)}


def parse_calls(text: str, names: Collection[str]) -> Parsed:
    """The calls in an answer's text. names: of the tools on offer.

    The content has no blanks before a call; all of it that `settled` says begins the text.
    """
    place, content, calls = 0, "", []
    for match in _BEGINS.finditer(text, _end_of_thought(text)):
        if match.start() < place:  # inside the call before
            continue
        try:
            found, end = _READERS.get(match[0], _read_bare)(text, match, names)
        except (ValueError, RecursionError, UserError):  # no JSON, or no call
            continue
        content += text[place : match.start()].rstrip()
        calls += found
        place = end
    rest = text[place:] if text[place:].strip() or not calls else ""
    return Parsed(content + rest, calls)


def settled(text: str, before: int = 0) -> int:
    """How many characters of an answer so far are no call, whatever follows, and begin its content.

    before: how many they were when the text was shorter.
    """
    begin = max(before, _end_of_thought(text))
    if match := _BEGINS.search(text, begin):
        return len(text[: match.start()].rstrip())
    end, line = len(text), text.rfind("\n{", begin) + 1
    for mark in (HERMES, MISTRAL, LLAMA):
        end = min([end, *(len(text) - n for n in range(1, len(mark)) if text.endswith(mark[:n]))])
    if text[line : line + 1] == "{" and BARE.startswith("".join(text[line:].split())):
        end = min(end, line)
    return len(text[:end].rstrip())


def _end_of_thought(text):
    return text.find("</think>") + len("</think>") if "</think>" in text else 0


def _read_hermes(text, match, names):
    """(the calls at a mark, where they end). Raises ValueError, as all of these functions do."""
    value, end = _read_json(text, match.end())
    close = _HERMES_END.match(text, end)
    if not close:
        raise ValueError
    return [_call(value)], close.end()


def _read_mistral(text, match, names):
    values, end = _read_json(text, match.end())
    values = values if isinstance(values, list) and values else [values]
    return [_call(value, short=True) for value in values], end


def _read_llama(text, match, names):
    return _read_to_the_end(text, match.end()), len(text)


def _read_bare(text, match, names):
    calls = _read_to_the_end(text, match.start())
    if not {call["function"]["name"] for call in calls} <= set(names):
        raise ValueError
    return calls, len(text)


_READERS = {HERMES: _read_hermes, MISTRAL: _read_mistral, LLAMA: _read_llama}


def _read_to_the_end(text, place):
    """The calls that are all of a text from `place` on, with blanks or semicolons between them."""
    calls = []
    while place < len(text):
        value, place = _read_json(text, place)
        calls.append(_call(value))
        place = _BETWEEN.match(text, place).end()
    if not calls:
        raise ValueError
    return calls


def _read_json(text, place):
    return _JSON.raw_decode(text, _BLANKS.match(text, place).end())


def _call(value: Any, short: bool = False) -> dict:
    """A call in OpenAI's form. short: without an id it gets one of nine characters: Mistral's templates want those."""
    if not isinstance(value, dict):
        raise ValueError
    value = {"parameters" if key == "arguments" else key: part for key, part in value.items()}
    name, arguments, id = value.get("name"), value.get("parameters"), value.get("id")
    known = value.keys() <= {"name", "parameters", "id"} and isinstance(id, str | None)
    if not known or not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError
    check_json(value, "a call")
    id = id or (uuid.uuid4().hex[:9] if short else f"call_{uuid.uuid4().hex}")
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": id, "type": "function", "function": function}
