"""Which columns of a row mean what, told by their names.

To add a shape of rows: a line in `SHAPES`. Every column is used, or refused because it has a meaning that would be
lost, or left out because --ignore says so, or counted as not used.
"""

import functools
import reprlib
from typing import NamedTuple

from preparation.columns import columns_in
from preparation.reading import BadRow
from text.messages import THINKING, WEIGHTS, KeyRefused

PAIR = {"chosen": "chosen", "rejected": "rejected"}
SHAPES = {  # names, and for each part of a sample its column; the first that fits counts
    "preference pairs": {"prompt": "prompt", **PAIR},
    "preference pairs, Alpaca": {"prompt": "instruction", **PAIR},
    "preference pairs with a question": {"prompt": "question", **PAIR},
    "preference pairs with an input": {"prompt": "input", **PAIR},
    "preference pairs, ShareGPT": {"prompt": "conversations", **PAIR},
    "preference pairs, OpenAI": {"prompt": "messages", **PAIR},
    "preference pairs, the prompt in both": PAIR,
    "messages": {"messages": "messages"},
    "ShareGPT conversations": {"messages": "conversations"},
    "conversation": {"messages": "conversation"},
    "dialog": {"messages": "dialog"},
    "dialogue": {"messages": "dialogue"},
    "Alpaca": {"prompt": "instruction", "answer": "output"},
    "Dolly": {"prompt": "instruction", "answer": "response"},
    "prompt and completion": {"prompt": "prompt", "answer": "completion"},
    "prompt and response": {"prompt": "prompt", "answer": "response"},
    "question and answer": {"prompt": "question", "answer": "answer"},
    "question and response": {"prompt": "question", "answer": "response"},
    "query and response": {"prompt": "query", "answer": "response"},
    "problem and solution": {"prompt": "problem", "answer": "solution"},
    "input and output": {"prompt": "input", "answer": "output"},
    "raw text": {"text": "text"},
}
BESIDE = {  # further parts of a sample, and the names that their columns may have
    "input": ("input", "context"),
    "system": ("system", "system_prompt"),
    "tools": ("tools", "functions"),
    "template_args": ("chat_template_kwargs",),
    "thinking": THINKING,
    "history": ("history",),
}
GO_WITH = {  # the further parts that a shape takes, by its main part
    "chosen": ("input", "system", "tools", "template_args", "history"),
    "messages": ("system", "tools", "template_args"),
    "answer": ("input", "system", "tools", "template_args", "thinking", "history"),
    "label": ("system", "tools", "template_args", "thinking", "history"),
    "text": (),
}
PREFERENCE = "a preference pair has both chosen and rejected, and this row has one of them"
UNPAIRED = "answers with a verdict are for preference training without pairs, which is not there yet"
MEDIA = "only text can be trained on"
REFUSED = {  # columns with a meaning that would be lost
    "chosen": PREFERENCE, "rejected": PREFERENCE, "kto_tag": UNPAIRED, "weight": "samples cannot have weights",
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), MEDIA),
}  # fmt: skip


class Columns(NamedTuple):
    """What the columns of a row are.

    name: of its shape. fields: part of a sample -> column, template, or columns. beginning: a column beside a
    conversation that is to repeat the user's first message. facts: what is to be counted of such a row, {(group, name):
    1}.
    """

    name: str
    fields: dict[str, str | tuple[str, ...]]
    unused: list[str]
    beginning: str | None
    facts: dict[tuple[str, str], int]


@functools.lru_cache(256)
def recognise(
    names: tuple[str, ...], empty: tuple[str, ...], fields: tuple | None, ignored: tuple[str, ...]
) -> Columns:
    """The meaning of a row's columns. Raises BadRow for one that would be lost, and if there is no sample in them.

    names: of the columns that hold something; empty: of those that are null. fields: as in `mixture.Source`, as a
    tuple of its items; if given, it says where the main parts are. ignored: columns that are left out.
    """
    known = _by_meaning([name for name in names if name not in ignored])
    if fields:
        shape, parts = "own fields", dict(fields)
        shape = "raw text" if "text" in parts else shape
        _check_kept(known, _columns_of(parts))
    else:
        _check_kept(known, {known[name] for name in PAIR} if PAIR.keys() <= known.keys() else set())
        shape, parts = _find_shape(known, names, empty)
    parts = parts | _parts_beside(parts, known, bool(fields))
    unused = [name for name in names if name not in _columns_of(parts) and name not in ignored]
    _check_unused(unused, parts)
    facts = {("rows", shape): 1}
    facts |= {("columns not used", name): 1 for name in unused}
    facts |= {("left out by --ignore", name): 1 for name in names if name in ignored}
    beginning = known.get("prompt") if "messages" in parts else None
    return Columns(shape, parts, unused, beginning if beginning in unused else None, facts)


def _columns_of(parts):
    """The columns that the parts of a sample are made of."""
    return set().union(*map(columns_in, parts.values()))


def _check_kept(known, taken):
    """Raise BadRow for a column, of those known by meaning and not taken, that no shape has a use for."""
    for meaning, name in known.items():
        reason = UNPAIRED if meaning == "label" and "completion" in known else REFUSED.get(meaning)
        if reason and name not in taken:
            raise BadRow(f"column {name!r}: {reason}{how_to_ignore(name)}")


def _check_unused(unused, parts):
    """Raise BadRow for a column that would be a part of a sample, but has no place beside its others."""
    meanings = {alias: part for part, aliases in BESIDE.items() if part != "input" for alias in aliases}
    for name in unused:
        if part := meanings.get(name.lower()):
            others = reprlib.repr(sorted(_columns_of(parts))).strip("[]")
            raise BadRow(f"column {name!r}: {part} has no place beside the fields {others}{how_to_ignore(name)}")


@functools.cache
def with_aliases(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of columns and keys, with the other names of what each of them means."""
    groups = (THINKING, WEIGHTS, BESIDE["tools"], BESIDE["system"], ("tool_calls", "function_call"))
    return tuple(dict.fromkeys(alias for name in names for alias in _group_of(name, groups)))


def _group_of(name, groups):
    return next((group for group in groups if name in group), (name,))


def how_to_ignore(name: str) -> str:
    """The end of a message on a column or key: what to do."""
    return f'; to leave it out: --ignore "[{name}]", or ignore in a mixture'


KNOWN = {
    *(column for parts in SHAPES.values() for column in parts.values()),
    *(name for names in BESIDE.values() for name in names), *REFUSED, "label",
}  # fmt: skip


def ignore_hint(error: Exception) -> str:
    """What to do about an error, where it is about a key that can be left out; otherwise ""."""
    return how_to_ignore(error.key) if isinstance(error, KeyRefused) else ""


def _by_meaning(names):
    """{known name: the column of that name, however it is capitalised}."""
    known = {}
    for name in names:
        if name.lower() in KNOWN and known.setdefault(name.lower(), name) != name:
            raise BadRow(f"columns {known[name.lower()]!r} and {name!r} mean the same{how_to_ignore(name)}")
    return known


def _find_shape(known, names, empty):
    """(name of the shape, its parts) of columns known by meaning; names, empty: as in `recognise`.

    Where no shape has all that it needs, one that has null somewhere is taken, so that this can be named.
    """
    full, with_empty = _fitting(known), _fitting(known | {name.lower(): name for name in empty})
    if not with_empty:
        raise BadRow(
            f"no known fields among {reprlib.repr([*names, *empty])}: name them with "
            '--fields "{prompt: COLUMN, answer: COLUMN}", or under fields in a mixture'
        )
    best = with_empty[0] if not full or "text" in full[0][1] else full[0]  # raw text is what is nothing else
    others = [parts["messages"] for _, parts in full[1:] if "messages" in parts and "messages" in best[1]]
    if others:
        raise BadRow(
            f"columns {best[1]['messages']!r} and {others[0]!r} may both be the dialog{how_to_ignore(others[0])}"
        )
    return best


def _fitting(known):
    """[(name, parts)] of the shapes whose columns are all there."""
    return [
        (shape, {part: known[column] for part, column in parts.items()})
        for shape, parts in SHAPES.items()
        if all(column in known for column in parts.values())
    ]


def _parts_beside(parts, known, given):
    """{part: column} of the further parts that a shape takes, of columns that have no other use."""
    found, taken = {}, _columns_of(parts)
    main = next(name for name in GO_WITH if name in parts)
    for part in GO_WITH[main]:
        columns = [known[name] for name in BESIDE[part] if name in known and known[name] not in taken]
        if part in parts or not columns or (given and part == "input"):
            continue
        if len(columns) > 1:
            raise BadRow(f"columns {columns[0]!r} and {columns[1]!r} may both be the {part}{how_to_ignore(columns[1])}")
        found[part] = columns[0]
    return found
