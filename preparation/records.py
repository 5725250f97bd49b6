"""From rows to records: the conversation that a row of a source holds, by the usual names or by the source's `fields`.

shapes.py finds out which columns mean what, dialects.py reads other notations of a conversation, and text/messages.py
has the one form that comes out.
"""

import json
import random
import re
import reprlib
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preparation.columns import is_template, kind_of, text_of, value_of
from preparation.dialects import conversation, listed_tools, without_nulls
from preparation.multiple_choice import choices_of, with_choices
from preparation.pairs import ANSWERS, common_beginning, take_apart
from preparation.reading import BadRow, Row, encoding_hint
from preparation.shapes import Columns, how_to_ignore, ignore_hint, recognise, with_aliases
from shell.cli import UserError
from text.messages import change_texts, check_json, is_empty, read_messages, read_tools


def to_record(source: Any, row: Row, seed: int) -> dict:
    """The sample in a row, a dict. Raises BadRow.

    - "messages": in the form of text/messages.py, up to the last answer that is a target; "tools" and "template_args"
      where there are any;
    - "key": the text by which duplicates are found: all before that answer, with the choices of multiple choice in
      their original order;
    - "style" and "document": "plain" and True for raw text, which is an answer to nothing, and may be cut;
    - "rejected": of a preference pair. Its "messages" are the prompt and the chosen answer, these the prompt and the
      rejected one; of both only the last answer can be a target;
    - "facts": what is to be counted, {(group, name): times}.

    source: a `mixture.Source`. seed: the order in which choices are given follows from it, the source's name, the
    file's name and the row's number.
    """
    try:
        return _to_record(source, row, parse_row(row), seed)
    except UserError as error:  # text/messages.py's
        raise BadRow(f"{error}{ignore_hint(error)}") from None


def _to_record(source, row, data, seed):
    columns = columns_of(source, data)
    facts = defaultdict(int, columns.facts)
    if "chosen" in columns.fields:
        return _pair(source, row, data, columns, facts)
    messages, original = _messages(source, row, data, columns, seed)
    record = {"messages": _read_messages(messages, with_aliases(source.ignore), facts)}
    record |= _tools(row, data, columns.fields, facts)
    _drop_listed_tools(record, facts)
    _mend_line_ends(record, facts)
    end = _weigh_answers(record["messages"], facts)
    original = record["messages"] if original is messages else read_messages(original)
    record |= {"messages": record["messages"][:end], "key": _key(original[: end - 1]), "facts": facts}
    if "text" in columns.fields:
        return record | {"style": "plain", "document": True}
    _count(record["messages"], facts)
    return record


def _pair(source, row, data, columns, facts):
    """The record of a row with a preference pair."""
    data, fields, counted = take_apart(row, data, columns)
    facts.update({("samples", what): 1 for what in counted})
    record = {}
    for part, answer in zip(("messages", "rejected"), ANSWERS, strict=True):
        messages = _question_and_answer(row, data, {**fields, "answer": fields[answer]})
        record[part] = _read_messages(messages, with_aliases(source.ignore), facts)
    record |= _tools(row, data, fields, facts)
    _drop_listed_tools(record, facts)
    _mend_line_ends(record, facts)
    _weigh_pair(record, facts)
    shared = shared_messages(record)
    _count(record["messages"] + record["rejected"][shared:], facts)
    return record | {"key": _key(record["messages"][:shared]), "facts": facts}


def _read_messages(messages, ignored, facts):
    """The messages in the form of text/messages.py; counts the keys that are left out."""
    left_out = Counter() if ignored else None
    messages = read_messages(messages, ignored, left_out)
    for key, times in (left_out or {}).items():
        facts["left out by --ignore", key] += times
    return messages


# ------------------------------------------------------------------------------------------------ the row as columns


def parse_row(row: Row) -> dict:
    """The columns of a row. Raises BadRow."""
    if isinstance(row.data, BadRow):
        raise row.data
    if isinstance(row.data, bytes):
        return parse_object(row.data, encoding_hint)
    return row.data


def columns_of(source: Any, data: dict) -> Columns:
    """What the columns of a row of a `mixture.Source` mean. Raises BadRow."""
    names = tuple([name for name, value in data.items() if value is not None and value != []])
    empty = () if len(names) == len(data) else tuple(name for name, value in data.items() if value in (None, []))
    fields = source.fields and tuple(
        (part, tuple(field) if isinstance(field, list) else field) for part, field in source.fields.items()
    )
    return recognise(names, empty, fields or None, with_aliases(source.ignore))


def describe_row(source: Any, row: Row) -> str:
    """The shape of a row, in words: "question and answer (columns used: question, answer; unused: id)"."""
    columns = columns_of(source, parse_row(row))
    fields = (field if isinstance(field, str) else "|".join(field) for field in columns.fields.values())
    used = f"columns used: {_listed(fields)}"
    unused = f"; unused: {_listed(columns.unused)}" if columns.unused else ""
    return f"{columns.name} ({used}{unused})"


def _listed(names, most=12):
    names = [" ".join(name.split())[:60] for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _no_duplicates(pairs):
    """A dict of the pairs, for the JSON parser."""
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [key for key, _ in pairs]
        raise BadRow(f"key {reprlib.repr(next(key for key in keys if keys.count(key) > 1))} comes twice in one object")
    return data


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates)


def parse_object(line: bytes, hint: Callable[[bytes], str] = lambda line: "") -> dict:
    """The JSON object in a line; NaN and Infinity in it are for the user of the value to refuse. Raises BadRow.

    hint: gives the end of the message on a line that is not UTF-8.
    """
    try:
        data = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        byte = f"byte {line[error.start]:#04x} at column {error.start + 1}"
        raise BadRow(f"not UTF-8 text: {byte}{hint(line)}") from None
    except json.JSONDecodeError as error:
        raise BadRow(f"not valid JSON: {error.msg} at column {error.pos + 1}") from None
    except RecursionError:
        raise BadRow("nested too deeply") from None
    except ValueError:  # int() refuses texts over sys.get_int_max_str_digits()
        raise BadRow("a number has too many digits") from None
    if not isinstance(data, dict):
        raise BadRow(f"expected an object with fields, found {kind_of(data)}")
    return data


# ---------------------------------------------------------------------------------------------- columns as messages


def _messages(source, row, data, columns, seed):
    """(messages, the same with multiple choice's choices in their original order) of a row, not yet checked."""
    fields = columns.fields
    if "text" in fields:
        messages = [_message("user", ""), _message("assistant", text_of(data, fields["text"]))]
        return messages, messages
    if "messages" in fields:
        messages = _with_system(conversation(row, data, fields["messages"]), data, fields)
        _check_beginning(data, columns, messages)
        return messages, messages
    if "choices" not in fields:
        messages = _question_and_answer(row, data, fields)
        return messages, messages
    choices, right = choices_of(data, fields)
    order = list(range(len(choices)))
    original = messages = _question_and_answer(row, *with_choices(data, fields, choices, order, right))
    if source.shuffle_choices:
        random.Random(f"{seed}:{source.name}:{Path(row.file).name}:{row.number}").shuffle(order)
        messages = _question_and_answer(row, *with_choices(data, fields, choices, order, right))
    return messages, original


def _message(role, content):
    return {"role": role, "content": content}


def _check_beginning(data, columns, messages):
    """Raise BadRow for a prompt beside a conversation that does not begin with it."""
    first = next((message.get("content") for message in messages if message.get("role") == "user"), None)
    if columns.beginning and data[columns.beginning] != first:
        raise BadRow(
            f"field {columns.beginning!r} is not the first message of the user in {columns.fields['messages']!r}"
            + how_to_ignore(columns.beginning)
        )


def _question_and_answer(row, data, fields, ending=""):
    """The messages of a row with a prompt and an answer; each may be a list of messages, as TRL has them.

    ending: text after the question.
    """
    prompt, answer = data.get(fields["prompt"]), data.get(fields["answer"])
    if isinstance(prompt, list):
        _refuse_beside_list(data, fields, "prompt", "input", "history", "choices")
        messages = [_not_trained(message) for message in conversation(row, data, fields["prompt"])]
    else:
        messages = [*_history(data, fields), _message("user", text_of(data, fields["prompt"]) + ending)]
        if "input" in fields and (given := _optional_text(data, fields["input"])):
            messages[-1]["input"] = given
    if isinstance(answer, list):
        _refuse_beside_list(data, fields, "answer", "thinking")
        return _with_system([*messages, *conversation(row, data, fields["answer"])], data, fields)
    messages.append(_message("assistant", text_of(data, fields["answer"])))
    if "thinking" in fields and (thinking := _optional_text(data, fields["thinking"])):
        messages[-1]["thinking"] = thinking
    return _with_system(messages, data, fields)


def _refuse_beside_list(data, fields, part, *others):
    """Raise BadRow if there are parts of a sample that have no place beside a prompt or answer of messages."""
    for other in others:
        if other in fields and (is_template(fields[other]) or other == "choices" or data.get(fields[other])):
            raise BadRow(f"field {fields[part]!r} is a list of messages, beside which {other} has no place")


def _not_trained(message):
    return {**message, "weight": 0} if message.get("role") == "assistant" else message


def _optional_text(data, field):
    """As `text_of`, but "" where the column is null."""
    return "" if not is_template(field) and data.get(field, "") is None else text_of(data, field)


def _history(data, fields):
    """The turns before a question: from a list of pairs [question, answer]."""
    if "history" not in fields or data.get(fields["history"]) is None:
        return []
    pairs = value_of(data, fields["history"], list, "a list of pairs [question, answer]")
    if not all(isinstance(pair, list) and [type(text) for text in pair] == [str, str] for pair in pairs):
        raise BadRow(f"field {fields['history']!r} must be a list of pairs [question, answer], each of two texts")
    return [_message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]


def _with_system(messages, data, fields):
    """The messages after the system message that a column holds, if it is not theirs already."""
    system = _optional_text(data, fields["system"]) if "system" in fields else ""
    if not system:
        return messages
    if messages[0].get("role") != "system":
        return [_message("system", system), *messages]
    if messages[0].get("content") != system:
        raise BadRow(f"field {fields['system']!r} and the conversation's own system message differ")
    return messages


# ------------------------------------------------------------------------------------------------ tools and the like


def _tools(row, data, fields, facts):
    """{"tools", "template_args"} of a row, those that it has."""
    if "tools" not in fields and "template_args" not in fields:
        return {}
    values = {part: data.get(fields[part]) for part in ("tools", "template_args") if part in fields}
    values = {part: without_nulls(value) if row.unit == "row" else value for part, value in values.items() if value}
    if "tools" in values:
        values["tools"] = read_tools(values["tools"])
        facts["tools", "samples with tools"] += 1
    if "template_args" in values:
        name = fields["template_args"]
        value_of(data, name, dict, "an object")
        check_json(values["template_args"], f"field {name!r}")
        facts["samples", "with variables of the chat template"] += 1
    return {part: value for part, value in values.items() if value}


def _drop_listed_tools(record, facts):
    """Drop tools that the system message lists already: the model would read them twice."""
    if "tools" not in record:
        return
    if {tool["function"]["name"] for tool in record["tools"]} <= listed_tools(record["messages"]):
        del record["tools"]
        facts["tools", "samples whose system message has the tools"] += 1


_LINE_END = re.compile("\r\n?")


def _mend_line_ends(record, facts):
    """Make \\n of every \\r\\n and \\r: a model would learn to write one or the other by chance."""
    mended = False
    for part in ("messages", "rejected", "tools"):
        if part in record and any(map(_may_have_return, record[part])):
            before, record[part] = record[part], change_texts(record[part], lambda text: _LINE_END.sub("\n", text))
            mended = mended or record[part] != before
    if mended:
        facts["samples", "with changed line ends"] += 1


def _may_have_return(value):
    """Whether \\r is in the texts of a message or tool; perhaps also where a text has a backslash and an r."""
    if len(value) == 2 and "content" in value:
        return "\r" in value["content"]
    return "\\r" in json.dumps(value)


# --------------------------------------------------------------------------------------------------- answers and key


def _weigh_answers(messages, facts):
    """Count the answers, and give empty ones a weight of 0: nothing is to be learnt from them.

    Returns the number of messages up to the last answer, one to train on if there is any. Raises BadRow without one.
    """
    last = end = 0
    for number, message in enumerate(messages, 1):
        if message["role"] != "assistant":
            continue
        last = number
        if message.get("weight") == 0:
            facts["answers", "masked (weight 0)"] += 1
        elif is_empty(message):
            facts["answers", "empty"] += 1
            message["weight"] = 0
        else:
            facts["answers", "to train on"] += 1
            end = number
    if not last:
        raise BadRow("no message has the role assistant: there is no answer to train on")
    if last < len(messages):
        facts["samples", "that go on after their last answer"] += 1
    return end or last


def _weigh_pair(record, facts):
    """Cut both conversations of a pair after their last answers, and give all answers before a weight of 0.

    An empty answer is to be learnt from too, as there may be nothing to say; but not two of them.
    """
    for part in ("messages", "rejected"):
        record[part] = _up_to_last_answer(record[part], facts)
    last = [messages[-1] for messages in conversations(record)]
    both_empty = all(map(is_empty, last))
    for message in last:
        if message.get("weight") == 0:
            facts["answers", "masked (weight 0)"] += 1
        elif both_empty:
            facts["answers", "empty"] += 1
            message["weight"] = 0
        else:
            facts["answers", "empty, the other of the pair is not" if is_empty(message) else "to train on"] += 1


def _up_to_last_answer(messages, facts):
    """New messages up to the last answer, those before it with a weight of 0. Raises BadRow without an answer."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise BadRow("no message has the role assistant: there is no answer to train on")
    if last + 1 < len(messages):
        facts["samples", "that go on after their last answer"] += 1
    return [*(_not_trained(message) for message in messages[:last]), dict(messages[last])]


def conversations(record: dict) -> list[list[dict]]:
    """The conversations of a record: one, or of a preference pair that with the chosen and that with the rejected."""
    return [record["messages"]] + ([record["rejected"]] if "rejected" in record else [])


def shared_messages(record: dict) -> int:
    """The number of messages with which both conversations of a pair begin, before the last answer of either."""
    both = conversations(record)
    return min(common_beginning(*both), *(len(messages) - 1 for messages in both))


def answer_texts(record: dict) -> list[str]:
    """The text that is to be learnt of each of a record's conversations."""
    return ["\n".join(message_text(m) for m in messages if is_target(m)) for messages in conversations(record)]


def is_target(message: dict) -> bool:
    """Whether a message of a record is an answer to train on."""
    return message["role"] == "assistant" and message.get("weight") != 0


def message_text(message: dict) -> str:
    """All text of a message, calls of tools as JSON, a line or more each."""
    if len(message) == 2:
        return message["content"]
    texts = [message.get("thinking"), message["content"], message.get("input")]
    calls = message.get("tool_calls", ())
    texts += [f"{call['name']} {json.dumps(call['arguments'], ensure_ascii=False)}" for call in calls]
    return "\n".join(text for text in texts if text)


def _key(messages):
    return "\n".join(text for message in messages if (text := message_text(message)))


def _count(messages, facts):
    """Count the messages by role, and what else they hold."""
    for message in messages:
        facts["messages", message["role"]] += 1
        if len(message) == 2:
            continue
        if calls := message.get("tool_calls"):
            facts["tools", "calls"] += len(calls)
        if message.get("thinking"):
            facts["answers", "with thinking"] += 1
