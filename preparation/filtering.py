"""A row as a record: parsed, checked, and filtered by what the row alone shows. Done in worker processes.

Duplicates, which only a look at all rows can find, are for dropping.py.
"""

import itertools
import json
import pickle
from typing import NamedTuple

from preparation import cleaning
from preparation.reading import BadRow, Row
from preparation.records import answer_texts, conversations, is_target, message_text, to_record
from preparation.rendering import SAME_ANSWERS, limit_of, render_record
from preparation.workers import Context
from shell.cli import UserError
from text.messages import ROLES, joined

TEMPLATE_TOKENS = 256  # that a prompt style may add to the text of a question and its answer, at most
TURN_TOKENS = 32  # and to that of each further message


class FilteredRow(NamedTuple):
    """A row after the filters. bad: what is wrong with it; then there is nothing else but its place.

    record: as `records.to_record` has it, with "id", its place; "key" is its answers, if its prompt is blank; pickled.
    facts: what is to be counted of it, {(group, name): times}. answer_length: characters of its answers. prompt_hash:
    64 bits, of all that it is to be answered from. reason: why it is dropped, or "".
    of: the place of the benchmark sample whose words it has; detail: those words. signature: its MinHash as bytes, if
    one is wanted.
    """

    place: str
    bad: str = ""
    record: bytes = b""
    facts: dict[tuple[str, str], int] | None = None
    answer_length: int = 0
    prompt_hash: int = 0
    answers_hash: int = 0
    reason: str = ""
    of: str | None = None
    detail: str | None = None
    signature: bytes = b""


def filter_rows(context: Context, task: tuple[int, list[Row]]) -> list[FilteredRow]:
    """The rows of a source, which the task gives by its number."""
    number, rows = task
    return [_filter_row(context, context.sources[number], row) for row in rows]


def _filter_row(context, source, row):
    s = context.settings
    try:
        record = {"id": row.place, **to_record(source, row, s.seed)}
        facts = dict(record.pop("facts"))
        if source.few_shot[1]:
            _check_single(record)
        if "style" in record:
            _check_style(record, source)
    except (BadRow, UserError) as error:
        return FilteredRow(row.place, bad=str(error))
    answers = answer_texts(record)
    if not record["key"].strip():
        record["key"] = "\n".join(answers)  # of a text without a prompt
    needs_words = s.near_duplicates or context.ngrams or _has_word_filters(s, source)
    prompt_words, *answer_words = (cleaning.words(text) if needs_words else [] for text in (record["key"], *answers))
    data = pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
    reason = _why_unusable(record, facts) or _why_dropped(context, source, record, data, prompt_words, answer_words)
    of = detail = None
    if not reason and context.ngrams and (found := _find_leak(context, record, prompt_words, answer_words)):
        reason, of, detail = "words of a benchmark", context.places[found[0]], found[1]
    return FilteredRow(
        place=row.place,
        record=data,
        facts=facts,
        answer_length=sum(map(len, answers)),
        prompt_hash=_hash_of(record),
        answers_hash=_hash_of_answers(record),
        reason=reason,
        of=of,
        detail=detail,
        signature=cleaning.signature(prompt_words).tobytes() if s.near_duplicates else b"",
    )


def _check_single(record):
    """Raise UserError unless a record is one question and one answer in words, as few_shot needs it."""
    question, *answer = record["messages"]
    simple = [question["role"], *(message["role"] for message in answer)] == ["user", "assistant"]
    if not simple or record.keys() & {"tools", "document", "rejected"} or answer[0].keys() & {"thinking", "tool_calls"}:
        raise UserError("few_shot needs samples of one question and one answer, without thinking or tools")


def _check_style(record, source):
    """Raise UserError for a record that has a style of its own, where the user has asked for another."""
    if source.asked_style not in (None, record["style"]):
        raise UserError(
            f"a row of raw text is rendered in the style {record['style']}, but its prompt_style is given as "
            f"{source.asked_style}: leave that out, or say which column is the prompt"
        )


def _hash_of(record):
    """The hash by which duplicates are found: of the key, and of the tools and the like if there are any."""
    more = [json.dumps(record[part], sort_keys=True) for part in ("tools", "template_args") if part in record]
    return cleaning.prompt_hash("\n".join([record["key"], *more]))


def _hash_of_answers(record):
    """The hash by which pairs with the same prompt are told apart: of both conversations."""
    if "rejected" not in record:
        return 0
    texts = ("\n".join(map(message_text, messages)) for messages in conversations(record))
    return cleaning.prompt_hash(" \0 ".join(texts))


def _find_leak(context, record, prompt_words, answer_words):
    """The number of the benchmark text of which a record has enough words in a row, and those words; or None.

    Searched are the messages of the user and of tools, and the answers; a system message is often the same in all
    samples.
    """
    messages = list(itertools.chain(*conversations(record)))
    if "rejected" in record or any(message["role"] == "system" for message in messages):
        asked = (message for message in messages if message["role"] in ("user", "tool"))
        prompt_words = cleaning.words("\n".join(map(joined, asked)))
    long = (words for words in answer_words if len(words) >= context.settings.leak_words)
    return next((found for words in (prompt_words, *long) if (found := context.ngrams.find(words)) is not None), None)


def _has_word_filters(s, source):
    return limit_of(source, s, "min_words") > 0 or limit_of(source, s, "max_repetition") < 1


def _why_unusable(record, facts):
    """Why nothing of a row can be a target, or ""."""
    if record["messages"] == record.get("rejected"):
        return "empty answer" if facts.get(("answers", "empty")) else SAME_ANSWERS
    if all(any(map(is_target, messages)) for messages in conversations(record)):
        return ""
    return "empty answer" if facts.get(("answers", "empty")) else "no answer to train on"


def _why_dropped(context, source, record, data, prompt_words, answer_words):
    """Why a row's text is not fit to train on, or ""."""
    s = context.settings
    if _has_word_filters(s, source):
        if len(prompt_words) + max(map(len, answer_words)) < limit_of(source, s, "min_words"):
            return "too few words"
        repetition = max(map(cleaning.repetition, (prompt_words, *answer_words)))
        if repetition > limit_of(source, s, "max_repetition"):
            return "repetitive"
    return _why_too_long(context, source, record, data)


def _why_too_long(context, source, record, data):
    """Why a row has too many tokens, or "". Asked before duplicates are dropped: of those, one that fits must stay.

    Only what may be too long is tokenised here: a token has at least a byte.
    """
    most = limit_of(source, context.settings, "max_tokens")
    if "document" in record and not most:
        return ""  # it is cut into pieces
    answers_fit = _most_tokens(record, "assistant") <= context.settings.max_seq_length
    if answers_fit and (not most or _most_tokens(record, *ROLES) <= most):
        return ""
    rendered = render_record(context, source, data, [])
    return "" if rendered.samples else rendered.outcome.partition(": ")[0]


def _most_tokens(record, *roles):
    """Tokens that a conversation's messages of some roles cannot exceed, with its tools and what a style adds."""
    tools = len(json.dumps(record["tools"])) if "tools" in record else 0
    most = 0
    for messages in conversations(record):
        texts = sum(len(message_text(message).encode()) for message in messages if message["role"] in roles)
        most = max(most, texts + TURN_TOKENS * (len(messages) - 2))
    return most + 2 * tools + TEMPLATE_TOKENS
