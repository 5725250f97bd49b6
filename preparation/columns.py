"""Values in the columns of a row, and templates over columns.

A value in `fields` with a brace in it is a template over the row's columns, "{context} {question}", with {{ and }} for
braces themselves; any other is a column's name.
"""

import functools
import json
import math
import re
from typing import Any

from preparation.reading import BadRow

KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}


def kind_of(value: Any) -> str:
    """What a value is, for messages: "text", "a list", "null", "NaN"."""
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)  # NaN, Infinity
    return "null" if value is None else KINDS.get(type(value), type(value).__name__)


def text_of(data: dict, field: str) -> str:
    """The text that a column's name or a template gives for a row. Raises BadRow."""
    if not is_template(field):
        return value_of(data, field, str, "text")
    return "".join(
        part if column is None else str(value_of(data, column, (str, int, float), "text or a number"))
        for part, column in parse_template(field)
    )


def value_of(data: dict, name: str, types: type | tuple[type, ...], expected: str) -> Any:
    """The value in a column, which must be of one of `types` (true and false are no numbers). Raises BadRow."""
    if name not in data:
        raise BadRow(f"field {name!r} is missing")
    value = data[name]
    if isinstance(value, types) and type(value) is not bool and (type(value) is not float or math.isfinite(value)):
        return value
    raise BadRow(f"field {name!r} must be {expected}, it is {kind_of(value)}")


def is_template(field: str | list[str]) -> bool:
    """Whether a value in `fields` is a template, not a column's name (or a list of names)."""
    return isinstance(field, str) and ("{" in field or "}" in field)


@functools.cache
def parse_template(template: str) -> list[tuple[str, str | None]]:
    """The parts of a template: pairs (literal text, None) or (anything, a column's name). Raises ValueError."""
    parts = []
    for text, column in re.findall(r"(\{\{|\}\}|\{([^{}]+)\}|[{}]|[^{}]+)", template):
        if text in ("{", "}"):
            raise ValueError(f"template {template!r}: a brace is left open; write {{{{ or }}}} for the brace itself")
        parts.append((text, column) if column else ({"{{": "{", "}}": "}"}.get(text, text), None))
    return parts


def columns_in(field: str | list[str]) -> set[str]:
    """The columns that a value in `fields` names: itself, those of its list, or those in its template."""
    if isinstance(field, list | tuple):
        return set().union(*map(columns_in, field))
    return {column for _, column in parse_template(field) if column} if is_template(field) else {field}
