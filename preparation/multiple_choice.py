"""Questions with several answers to choose from: the choices listed in an order, and the letter of the right one."""

import re
import reprlib
import string

from preparation.columns import columns_in, is_template, text_of, value_of
from preparation.reading import BadRow, count


def choices_of(data: dict, fields: dict) -> tuple[list[str], int]:
    """The texts of a row's choices, and the number of the right one, from 0. Raises BadRow."""
    names, label = fields["choices"], fields["label"]
    if isinstance(names, str):
        choices = value_of(data, names, list, "a list of choices")
        if not all(isinstance(choice, str) for choice in choices):
            raise BadRow(f"field {names!r} must hold texts, one of them is something else")
    else:
        choices = [text_of(data, name) for name in names]
    if not 2 <= len(choices) <= len(string.ascii_uppercase):
        raise BadRow(f"{count(choices, 'choice')}: there must be from 2 to {len(string.ascii_uppercase)}")
    value = value_of(data, label, (int, str), "the right choice's index, letter or text")
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


def with_choices(
    data: dict, fields: dict, choices: list[str], order: list[int], right: int
) -> tuple[dict, dict[str, str], str]:
    """A row and its fields as those of a question and its answer, with the choices in the order `order`, from 0.

    The row gets the columns that templates may name: choices, letter and choice. The third value is what the question
    ends with: the choices, if no template has them.
    """
    letters = string.ascii_uppercase
    listed = "\n".join(f"{letter}. {choices[i]}" for letter, i in zip(letters, order, strict=False))
    data = {**data, "choices": listed, "letter": letters[order.index(right)], "choice": choices[right]}
    templates = [fields[name] for name in ("prompt", "input") if is_template(fields.get(name, ""))]
    shown = any("choices" in columns_in(template) for template in templates)
    return data, {"answer": "{letter}", **fields}, "" if shown else "\n" + listed
