"""From rows to records: the dialog that a row of a source holds, by the usual names or by the source's `fields`.

A value in `fields` with a brace in it is a template over the row's columns, "{context} {question}", with {{ and }} for
braces themselves; any other is a column's name.
"""

import functools
import json
import math
import random
import re
import reprlib
import string
from pathlib import Path
from typing import Any

from preparation.reading import BadRow, Row, count

# Names of prompt, text that it is about, and answer, tried in this order.
FIELD_NAMES = (("instruction", "input", "output"), ("prompt", None, "completion"), ("question", None, "answer"))
_SURROGATE = re.compile("[\ud800-\udfff]")
_KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}


def to_record(source: Any, row: Row, seed: int) -> dict:
    """The sample in a row: {"messages": a dialog for prompts.py, "key": the text by which duplicates are found}.

    source: a `mixture.Source`. The key is all before the last answer, with the choices of multiple choice in their
    original order. seed: the order in which they are given follows from it, the source's name, the file's name and the
    row's number. A dialog under "messages" is only known to be a list of objects. Raises BadRow.
    """
    if isinstance(row.data, BadRow):
        raise row.data
    data = parse_object(row.data) if isinstance(row.data, bytes) else row.data
    fields = source.fields or _usual_fields(data)
    if "messages" in fields:
        messages = original = _messages(data, fields["messages"])
    elif "choices" in fields:
        choices, right = _choices(data, fields)
        order = list(range(len(choices)))
        original = messages = _multiple_choice(data, fields, choices, order, right)
        if source.shuffle_choices:
            random.Random(f"{seed}:{source.name}:{Path(row.file).name}:{row.number}").shuffle(order)
            messages = _multiple_choice(data, fields, choices, order, right)
    else:
        messages = original = _question_and_answer(data, fields)
    texts = [text for message in messages for text in message.values() if isinstance(text, str)]
    if any(not text.isascii() and _SURROGATE.search(text) for text in texts):
        raise BadRow("the text holds half a surrogate pair, which is no character")
    return {"messages": messages, "key": _key(original)}


def _key(messages):
    """The contents and inputs before the last answer, a line or more each."""
    last = max((i for i, message in enumerate(messages) if message.get("role") == "assistant"), default=len(messages))
    texts = (message.get(part) for message in messages[:last] for part in ("content", "input"))
    return "\n".join(text for text in texts if isinstance(text, str) and text)


def _no_duplicates(pairs):
    """A dict of the pairs, for the JSON parser."""
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRow(f"key {reprlib.repr(next(key for key in keys if keys.count(key) > 1))} comes twice in one object")
    return data


def _refuse(constant):
    raise BadRow(f"not valid JSON: {constant} is no number in it")


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_refuse)


def parse_object(line: bytes) -> dict:
    """The JSON object in a line. Raises BadRow."""
    try:
        data = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 text: byte {line[error.start]:#04x} at column {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"not valid JSON: {error.msg} at column {error.pos + 1}") from None
    except RecursionError:
        raise BadRow("nested too deeply") from None
    except ValueError:  # int() refuses texts over sys.get_int_max_str_digits()
        raise BadRow("a number has too many digits") from None
    if not isinstance(data, dict):
        raise BadRow(f"expected an object with fields, found {_kind(data)}")
    return data


def _kind(value):
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def _usual_fields(data):
    """The fields of a row as `Source` has them, by the usual names."""
    if "messages" in data:
        return {"messages": "messages"}
    for prompt, extra, answer in FIELD_NAMES:
        if prompt in data and answer in data:
            return {"prompt": prompt, "answer": answer, **({"input": extra} if extra in data else {})}
    raise BadRow(
        f"no known fields among {reprlib.repr(list(data))}: name them with --prompt_field and --answer_field, or "
        "under fields in a mixture"
    )


def _question_and_answer(data, fields):
    question = {"role": "user", "content": _text(data, fields["prompt"])}
    if "input" in fields and (given := _text(data, fields["input"])):
        question["input"] = given
    return [question, {"role": "assistant", "content": _text(data, fields["answer"])}]


def _text(data, field):
    """The text that a column's name or a template gives for a row."""
    if not is_template(field):
        return _column(data, field, str, "text")
    return "".join(
        part if column is None else str(_column(data, column, (str, int, float), "text or a number"))
        for part, column in parse_template(field)
    )


def _column(data, name, types, expected):
    """The value in a column, which must be of one of `types` (true and false are no numbers)."""
    if name not in data:
        raise BadRow(f"field {name!r} is missing")
    value = data[name]
    if not isinstance(value, types) or isinstance(value, bool):
        raise BadRow(f"field {name!r} must be {expected}, it is {_kind(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"field {name!r} must be {expected}, it is {value}")
    return value


def is_template(field: str) -> bool:
    """Whether a field of a mixture is a template, not a column's name."""
    return "{" in field or "}" in field


@functools.cache
def parse_template(template: str) -> list[tuple[str, str | None]]:
    """The parts of a template: pairs (literal text, None) or (anything, a column's name). Raises ValueError."""
    parts = []
    for text, column in re.findall(r"(\{\{|\}\}|\{([^{}]+)\}|[{}]|[^{}]+)", template):
        if text in ("{", "}"):
            raise ValueError(f"template {template!r}: a brace is left open; write {{{{ or }}}} for the brace itself")
        parts.append((text, column) if column else ({"{{": "{", "}}": "}"}.get(text, text), None))
    return parts


def _messages(data, name):
    messages = _column(data, name, list, "a list of messages")
    if not messages or not all(isinstance(message, dict) for message in messages):
        raise BadRow(f"field {name!r} must be a list of messages, each with a role and content")
    return messages


def _choices(data, fields):
    """(texts of the choices, number of the right one, from 0)."""
    names, label = fields["choices"], fields["label"]
    if isinstance(names, list):
        choices = [_text(data, name) for name in names]
    else:
        choices = _column(data, names, list, "a list of choices")
        if not all(isinstance(choice, str) for choice in choices):
            raise BadRow(f"field {names!r} must hold texts, one of them is something else")
    if not 2 <= len(choices) <= len(string.ascii_uppercase):
        raise BadRow(f"{count(choices, 'choice')}: there must be from 2 to {len(string.ascii_uppercase)}")
    value = _column(data, label, (int, str), "the right choice's index, letter or text")
    if isinstance(value, int):
        meant = {value}
    else:
        meant = {i for i, choice in enumerate(choices) if choice == value}
        meant |= {int(value)} if re.fullmatch("[0-9]{1,2}", value) else set()
        meant |= {string.ascii_uppercase.index(value)} if re.fullmatch("[A-Z]", value) else set()
    meant = {i for i in meant if 0 <= i < len(choices)}
    if len(meant) != 1:
        found = "may mean several" if meant else "is none"
        raise BadRow(f"field {label!r}: {reprlib.repr(value)} {found} of the {len(choices)} choices")
    return choices, meant.pop()


def _multiple_choice(data, fields, choices, order, right):
    """The dialog with the choices in the order `order` (numbers from 0), the letter following."""
    letters = string.ascii_uppercase
    listed = "\n".join(f"{letter}. {choices[i]}" for letter, i in zip(letters, order, strict=False))
    data = {**data, "choices": listed, "letter": letters[order.index(right)], "choice": choices[right]}
    messages = _question_and_answer(data, {"answer": "{letter}", **fields})
    templates = [fields[name] for name in ("prompt", "input") if is_template(fields.get(name, ""))]
    if not any(column == "choices" for template in templates for _, column in parse_template(template)):
        messages[0]["content"] += "\n" + listed
    return messages
