"""A conversation in one form, whatever form it came in: OpenAI's, Hugging Face's, with aliases of keys and roles.

The form: a message is a dict of `role` and `content` (both text) and, where there is more to it,

- `input` (of a user): the text that an instruction is about;
- `thinking` (of the assistant): what it thinks before it answers;
- `tool_calls` (of the assistant): a list of {"name": text, "arguments": an object, "id": text, if there is one};
- `tool_call_id` (of a tool): the id of the call that this is the result of;
- `name`: of the speaker; of a tool its function;
- `weight`: 0 where the message is not to be a target. Only answers can be targets, and are without a weight.

A tool is {"type": "function", "function": {"name", perhaps "description", "parameters", …}}.

Every key of a message is understood, or refused by its name, or left out and counted where the caller says so. A key
whose value is null (or an empty list) counts as absent: tables give every row all columns.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from shell.cli import UserError

ROLES = {  # and the role that each stands for
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "function": "tool", "ipython": "tool",
}  # fmt: skip
THINKING = ("thinking", "reasoning_content", "reasoning")  # names of one key
WEIGHTS = ("weight", "train", "loss")  # names of one key
KEYS = {  # that each role may have beside role, content, name and a weight
    "system": (),
    "user": ("input",),
    "assistant": ("thinking", "tool_calls"),
    "tool": ("tool_call_id",),
}
NO_CHARACTER = re.compile("[\ud800-\udfff\ufdd0-\ufdef]")  # surrogates, and what Unicode keeps for programs


class KeyRefused(UserError):
    """A key of a message, or the tools, of which nothing can be made. key: its name, as a caller may leave it out."""

    def __init__(self, message: str, key: str = ""):
        super().__init__(message)
        self.key = key


class Dialog(NamedTuple):
    """A conversation in the form above. template_args: further variables for the checkpoint's chat template.

    open: it stands for a prompt: its last message is an answer that is still to come, or has only begun.
    adapter: the name of the one that is asked, where there are several; None for the first.
    """

    messages: list[dict]
    tools: list[dict] = []
    template_args: dict = {}
    open: bool = False
    adapter: str | None = None


def read_messages(messages: Any, ignored: Collection[str] = (), left_out: Counter | None = None) -> list[dict]:
    """A list of messages in this page's form, a new one. Raises UserError that names the message and the key.

    ignored: keys, as the caller knows them, that are left out where they stand; left_out counts them.
    """
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise UserError("messages must be a list of objects with role and content")
    found, ids = [], set()
    for number, message in enumerate(messages, 1):
        if message.keys() == {"role", "content"} and _is_plain(message):
            found.append(dict(message))
            continue
        try:
            found.append(_read_message(message, ignored, Counter() if left_out is None else left_out))
            _check_call_id(found[-1], ids)
        except KeyRefused as error:
            raise KeyRefused(f"message {number}: {error}", error.key) from None
        except UserError as error:
            raise UserError(f"message {number}: {error}") from None
    return found


def _is_plain(message):
    """Whether a message of two keys is in the form already."""
    text = message["content"]
    return (
        ROLES.get(message["role"] if isinstance(message["role"], str) else "") == message["role"]
        and isinstance(text, str)
        and (text.isascii() or not NO_CHARACTER.search(text))
    )


def _read_message(message, ignored, left_out):
    given = {key: value for key, value in message.items() if value is not None and value != []}
    for key in [key for key in given if key in ignored]:
        del given[key]
        left_out[key] += 1
    role = given.pop("role", None)
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"its role is {_short(role)}: expected one of {', '.join(ROLES)}")
    role = ROLES[role]
    content, thinking = _read_content(given, ignored, left_out)
    wanted = _take(given, WEIGHTS, "weight", _weight)
    if wanted and role != "assistant":
        raise UserError(f"a message of the role {role} cannot be a target, so its weight cannot be above 0")
    if "function_call" in given:  # OpenAI's older form
        given["tool_calls"] = [given.pop("function_call")]
    found = {"thinking": thinking, "weight": 0 if wanted is False else None}
    found |= {key: read(given.pop(key), key) for key, read in _READ.items() if key in given}
    found = {key: value for key, value in found.items() if value not in (None, "", [])}
    _check_keys(role, content, found, given)
    return {"role": role, **found, "content": content or ""}


def _read_content(given, ignored, left_out):
    """Remove a message's content and thinking from what is given. Returns both, None for what is not there."""
    content, thinking = given.pop("content", None), _take(given, THINKING, "thinking", _text)
    if isinstance(content, list):
        content, more = _join_parts(content, ignored, left_out)
        thinking = "\n".join(filter(None, (thinking, more)))
    return content if content is None else _text(content, "content"), thinking


def _check_keys(role, content, found, left):
    """Raise UserError for a key that is not understood, one that the role cannot have, and for want of a content."""
    if left:
        known = ", ".join(("role", "content", *_READ, *THINKING, *WEIGHTS, "function_call"))
        key = next(iter(left))
        raise KeyRefused(f"the key {_short(key)} is not understood: known are {known}", str(key))
    if content is None and not ({"thinking", "tool_calls"} & found.keys()):
        raise UserError("it has no content")
    if wrong := found.keys() - {"name", "weight", *KEYS[role]}:
        raise KeyRefused(f"a message of the role {role} cannot have {min(wrong)}", min(wrong))


def _take(given, names, meaning, read):
    """Remove the aliases of one key. Returns the value that they agree on, None without any."""
    values = [read(given.pop(name), name) for name in names if name in given]
    if any(value != values[0] for value in values):
        raise UserError(f"it has several of {', '.join(names)}, which all mean its {meaning}, and they differ")
    return values[0] if values else None


def _text(value, key):
    if not isinstance(value, str):
        raise UserError(f"its {key} must be text, it is {_short(value)}")
    if not value.isascii() and (wrong := NO_CHARACTER.search(value)):
        kind = "half a surrogate pair" if wrong[0] < "\ue000" else "a code for programs' own use"
        raise UserError(f"its {key} holds {wrong[0]!a}, {kind}, which is no character")
    return value


def _weight(value, key):
    """Whether a message is to be trained on."""
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise UserError(f"its {key} is {_short(value)}: expected 0 or 1, or false or true")
    return bool(value)


def _join_parts(parts, ignored, left_out):
    """(text, thinking) of a content that is a list of parts."""
    texts = {"text": [], "thinking": []}
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in texts:
            raise UserError(f"a part of its content is {_short(kind or part)}: only parts of text are supported")
        more = [key for key, value in part.items() if key not in ("type", kind) and value is not None]
        for key in more:
            if key not in ignored:
                raise KeyRefused(f"the key {_short(key)} of a part of its content is not understood", str(key))
            left_out[key] += 1
        value = part.get(kind)
        if isinstance(value, list) and kind == "thinking":  # Mistral's: a thought is a list of parts in its turn
            value = _join_parts(value, ignored, left_out)[0]
        texts[kind].append(_text(value, f"{kind} part"))
    return "".join(texts["text"]), "\n".join(texts["thinking"])


def _read_calls(calls, key):
    if not isinstance(calls, list):
        raise UserError(f"its {key} must be a list of calls, it is {_short(calls)}")
    return [_read_call(call) for call in calls]


def _read_call(call):
    """{"name", "arguments", perhaps "id"} of a call in OpenAI's form, or in that form already."""
    if not isinstance(call, dict):
        raise UserError(f"a tool call must be an object, it is {_short(call)}")
    outer = {key: value for key, value in call.items() if value is not None and key != "index"}
    kind, function = outer.pop("type", "function"), outer.pop("function", None)
    inner = dict(outer) if function is None else function
    id = outer.pop("id", None)
    if kind != "function" or not isinstance(inner, dict) or (function is not None and outer):
        raise UserError(f"a tool call is {_short(call)}: expected a type of function, an id, and the function")
    inner = {key: value for key, value in inner.items() if key != "id" or function is not None}
    if not isinstance(inner.get("name"), str) or not inner["name"] or inner.keys() - {"name", "arguments"}:
        raise UserError(f"a tool call is {_short(call)}: expected a function's name and arguments")
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parse(arguments or "{}", f"the arguments of {_short(inner['name'])}")
    if not isinstance(arguments, dict):
        raise UserError(f"the arguments of {_short(inner['name'])} must be an object, they are {_short(arguments)}")
    check_json(arguments, f"the arguments of {_short(inner['name'])}")
    return {"name": inner["name"], "arguments": arguments} | ({} if id is None else {"id": _text(id, "call's id")})


_READ = {
    "input": _text,
    "tool_calls": _read_calls,
    "tool_call_id": _text,
    "name": _text,
}


def _check_call_id(message, ids):
    """Raise UserError for the result of a call that no message has made. ids: of the calls before, added to."""
    ids.update(call["id"] for call in message.get("tool_calls", ()) if "id" in call)
    if ids and message.get("tool_call_id", next(iter(ids), None)) not in ids:
        raise UserError(f"its tool_call_id {_short(message['tool_call_id'])} is of no call before it")


def read_tools(tools: Any) -> list[dict]:
    """The tools of a conversation in this page's form: from a list of tools or functions, or JSON text of one.

    Raises UserError that names the tool.
    """
    tools = _parse(tools or "[]", "tools") if isinstance(tools, str) else tools
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise UserError(f"tools must be a list, or JSON text of one, it is {_short(tools)}")
    found = []
    for number, tool in enumerate(tools, 1):
        tool = _parse(tool, f"tool {number}") if isinstance(tool, str) else tool
        function = tool.get("function", tool if "name" in tool else None) if isinstance(tool, dict) else None
        named = isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]
        if not named or (function is not tool and tool.get("type", "function") != "function"):
            raise UserError(f"tool {number} is {_short(tool)}: expected a function with a name")
        check_json(tool, f"tool {number}")
        found.append({"type": "function", "function": function} if function is tool else {"type": "function"} | tool)
    return found


def check_json(value: Any, where: str) -> None:
    """Raise UserError, naming `where`, unless a value can be written as JSON and its texts as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        reason = "half a surrogate pair" if isinstance(error, UnicodeError) else str(error).partition(":")[0]
        raise UserError(f"{where}: not JSON ({reason})") from None


def _parse(text, where):
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({str(error) or 'nested too deeply'})") from None


def _refuse_constant(name):
    raise ValueError(f"{name} is no number in it")


def _short(value):
    try:
        text = "missing" if value is None else repr(value)
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        text = f"a {type(value).__name__} that is too long"
    return text if len(text) <= 80 else text[:77] + "..."


def check_last(messages: list[dict], *roles: str) -> None:
    """Raise UserError unless the last message is of one of `roles`."""
    if messages[-1]["role"] not in roles:
        raise UserError(f"the messages must end with one whose role is {' or '.join(roles)}")


def is_empty(message: dict) -> bool:
    """Whether an answer has nothing to learn: no content but white space, no thinking, no calls."""
    return not message["content"].strip() and not ({"thinking", "tool_calls"} & message.keys())


def joined(message: dict) -> str:
    """A message's content with its input, if it has one, as a paragraph of its own."""
    return message["content"] + ("\n\n" + message["input"] if message.get("input") else "")


def change_texts(messages: list[dict], change: Callable[[str], str]) -> list[dict]:
    """New messages with `change` applied to every text in them, keys of arguments included, but roles and ids."""

    def changed(value, key=None):
        if isinstance(value, dict):
            return {change(k): changed(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [changed(v) for v in value]
        return change(value) if isinstance(value, str) and key not in ("role", "id", "tool_call_id") else value

    return [changed(message) for message in messages]


def target_numbers(messages: list[dict]) -> list[int]:
    """The numbers of the answers to train on."""
    return [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") != 0]
