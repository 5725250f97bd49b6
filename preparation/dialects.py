"""Lists of turns in other notations, as messages in OpenAI's: ShareGPT's keys and speakers, Hermes' calls in text."""

import ast
import json
import re
from typing import Any

from preparation.columns import value_of
from preparation.reading import BadRow, Row
from text.messages import ROLES

KEYS = {"from": "role", "value": "content"}  # ShareGPT's, and the same in OpenAI's notation
SPEAKERS = {  # and the role that each stands for
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "assistant", "tool_call": "assistant", "observation": "tool", "function_response": "tool",
    "tool_response": "tool",
}  # fmt: skip
CALLS = ("function_call", "tool_call")  # speakers whose text is a call as JSON
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_RESULT = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)
_LISTED = re.compile(r"<tools>(.*?)</tools>", re.DOTALL)
_NAME = re.compile(r"""["']name["']\s*:\s*["']([^"']+)["']""")


def conversation(row: Row, data: dict, name: str) -> list[dict]:
    """The conversation in a column of a row, in OpenAI's notation. Raises BadRow.

    data: the row's columns. name: the column's.
    """
    turns = value_of(data, name, list, "a list of messages")
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow(f"field {name!r} must be a list of messages, each with a role and content")
    return to_messages(without_nulls(turns) if row.unit == "row" else turns)


def to_messages(turns: list[dict]) -> list[dict]:
    """The turns of a conversation in any known notation, in OpenAI's. Raises BadRow that names the turn.

    What is in neither notation is left as it is, for `text.messages.read_messages` to refuse.
    """
    messages = []
    for number, turn in enumerate(turns, 1):
        if "from" not in turn and turn.get("role") in ROLES:
            messages.append(turn)
            continue
        try:
            messages += _translate(turn)
        except BadRow as error:
            raise BadRow(f"message {number}: {error}") from None
    return messages


def _translate(turn):
    """The messages that a turn stands for: one, but for several results of tools in one text."""
    turn = {key: value for key, value in turn.items() if value is not None}
    for theirs, ours in KEYS.items():
        if theirs in turn and ours in turn:
            raise BadRow(f"it has both {theirs!r} and {ours!r}, which mean the same")
    message = {KEYS.get(key, key): value for key, value in turn.items()}
    speaker, text = message.get("role"), message.get("content")
    if not isinstance(speaker, str):
        return [message]
    speaker = speaker.lower()
    message["role"] = role = SPEAKERS.get(speaker, speaker)
    if speaker in CALLS:
        calls = _read_json(text)
        return [{**message, "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}]
    if "from" not in turn or not isinstance(text, str):
        return [message]
    if role == "assistant" and _CALL.search(text):
        return [{**message, **_calls_in_text(text)}]
    if role == "tool" and not _RESULT.sub("", text).strip():
        return [{**message, "content": result.strip()} for result in _RESULT.findall(text)] or [message]
    return [message]


def _calls_in_text(text):
    """{"content", "tool_calls"} of an answer that writes its calls out between tags, as Hermes' do."""
    content, *rest = _CALL.split(text)
    if any(between.strip() for between in rest[1::2]):
        raise BadRow("text follows a </tool_call>: calls must be the end of an answer")
    return {"content": content.strip(), "tool_calls": [_read_json(call) for call in rest[::2]]}


def _read_json(text):
    """A call or a list of calls from JSON, or from Python's notation, in which Hermes' data have many."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (AttributeError, ValueError, SyntaxError, MemoryError, RecursionError):
        raise BadRow(f"a call must be JSON, it is {text!r:.80}") from None


def listed_tools(messages: list[dict]) -> set[str]:
    """The names of the functions that the system message lists between <tools> and </tools>, as Hermes' data do."""
    first = messages[0].get("content")
    if messages[0].get("role") != "system" or not isinstance(first, str) or "<tools>" not in first:
        return set()
    return {name for block in _LISTED.findall(first) for name in _NAME.findall(block)}


def without_nulls(value: Any) -> Any:
    """A value without the keys that are null, at any depth: tables give every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value
