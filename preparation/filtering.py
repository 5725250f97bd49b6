"""A row as a record: parsed, checked, and filtered by what the row alone shows. Done in worker processes.

Duplicates, which only a look at all rows can find, are for dropping.py.
"""

import pickle
from typing import NamedTuple

from preparation import cleaning
from preparation.reading import BadRow, Row
from preparation.records import to_record
from preparation.rendering import limit_of, render_record
from preparation.workers import Context
from shell.cli import UserError
from text.prompts import check_dialog

TEMPLATE_TOKENS = 256  # that a prompt style may add to a sample's text, at most


class FilteredRow(NamedTuple):
    """A row after the filters. bad: what is wrong with it; then there is nothing else but its place.

    record: {"id": place, "key": its prompt (its answers, if that is blank), "messages": dialog}, pickled.
    answer_length: characters of its answers. prompt_hash: 64 bits, of the key. reason: why it is dropped, or "".
    of: the place of the benchmark sample whose words it has; detail: those words. signature: its MinHash as bytes, if
    one is wanted.
    """

    place: str
    bad: str = ""
    record: bytes = b""
    answer_length: int = 0
    prompt_hash: int = 0
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
        check_dialog(record["messages"], last="assistant")
        if source.few_shot[1]:
            _check_single(record)
    except (BadRow, UserError) as error:
        return FilteredRow(row.place, bad=str(error))
    answer = "\n".join(m["content"] for m in record["messages"] if m["role"] == "assistant")
    if not record["key"].strip():
        record["key"] = answer  # of a text without a prompt
    needs_words = s.near_duplicates or context.ngrams or _has_word_filters(s, source)
    prompt_words, answer_words = (cleaning.words(text) if needs_words else [] for text in (record["key"], answer))
    data = pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
    reason, of, detail = _why_dropped(context, source, record, data, prompt_words, answer_words), None, None
    if not reason and context.ngrams and (found := _find_leak(context, record, prompt_words, answer_words)):
        reason, of, detail = "words of a benchmark", context.places[found[0]], found[1]
    return FilteredRow(
        place=row.place,
        record=data,
        answer_length=len(answer),
        prompt_hash=cleaning.prompt_hash(record["key"]),
        reason=reason,
        of=of,
        detail=detail,
        signature=cleaning.signature(prompt_words).tobytes() if s.near_duplicates else b"",
    )


def _check_single(record):
    """Raise UserError unless a record is one question and one answer, as few_shot needs it."""
    if [message["role"] for message in record["messages"]] != ["user", "assistant"]:
        raise UserError("few_shot needs samples of one question and one answer")


def _find_leak(context, record, prompt_words, answer_words):
    """The number of the benchmark text of which a record has enough words in a row, and those words; or None.

    Searched are the user's messages and the answers; a system message is often the same in all samples.
    """
    if any(message["role"] == "system" for message in record["messages"]):
        users = (m for m in record["messages"] if m["role"] == "user")
        prompt_words = cleaning.words("\n".join(m["content"] + "\n" + (m.get("input") or "") for m in users))
    found = context.ngrams.find(prompt_words)
    if found is None and len(answer_words) >= context.settings.leak_words:
        return context.ngrams.find(answer_words)
    return found


def _has_word_filters(s, source):
    return limit_of(source, s, "min_words") > 0 or limit_of(source, s, "max_repetition") < 1


def _why_dropped(context, source, record, data, prompt_words, answer_words):
    """Why a row is not fit to train on, or ""."""
    s = context.settings
    if not record["messages"][-1]["content"].strip():
        return "empty answer"
    if _has_word_filters(s, source):
        if len(prompt_words) + len(answer_words) < limit_of(source, s, "min_words"):
            return "too few words"
        repetition = max(cleaning.repetition(prompt_words), cleaning.repetition(answer_words))
        if repetition > limit_of(source, s, "max_repetition"):
            return "repetitive"
    return _why_too_long(context, source, record, data)


def _why_too_long(context, source, record, data):
    """Why a row has too many tokens, or "". Asked before duplicates are dropped: of those, one that fits must stay.

    Only what may be too long is tokenised here: a token has at least a byte.
    """
    texts = [(m["role"], m["content"] + (m.get("input") or "")) for m in record["messages"]]
    answers = sum(len(text.encode()) for role, text in texts if role == "assistant")
    everything = sum(len(text.encode()) for _, text in texts)
    most = limit_of(source, context.settings, "max_tokens")
    answers_fit = answers + TEMPLATE_TOKENS <= context.settings.max_seq_length
    if answers_fit and (not most or everything + TEMPLATE_TOKENS <= most):
        return ""
    rendered = render_record(context, source, data, [])
    return "" if rendered.ids else rendered.outcome.partition(": ")[0]
