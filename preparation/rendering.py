"""A record as tokens: rendered in its source's prompt style, tokenised, cut to length. Done in worker processes."""

import pickle
from array import array
from typing import Any, NamedTuple

from preparation.mixture import Source
from preparation.workers import Context
from shell.cli import UserError
from text.prompts import encode_dialog
from text.tokenizer import Tokenizer

LONGEST_TOKEN = 512  # characters: no vocabulary has a longer one


class Rendered(NamedTuple):
    """A record as tokens. outcome: "whole", "prompt cut", or why there are none. examples: how many stand before it."""

    outcome: str
    ids: array = array("i")
    is_target: bytes = b""
    examples: int = 0


def render_records(context: Context, task: list[tuple[int, bytes, list[bytes]]]) -> list[Rendered]:
    """The task gives each record as (number of its source, pickled record, pickled records of its examples)."""
    return [render_record(context, context.sources[number], record, examples) for number, record, examples in task]


def render_record(context: Context, source: Source, record: bytes, examples: list[bytes]) -> Rendered:
    """One pickled record, with as many of the examples before it as leave it whole."""
    s, record, examples = context.settings, pickle.loads(record), [pickle.loads(example) for example in examples]
    most = limit_of(source, s, "max_tokens")
    try:
        for count in range(len(examples), -1, -1):  # better fewer examples than a question that is cut
            messages = with_examples(record, examples[:count], source.prompt_style)
            ids, is_target, outcome = tokenize(context.tokenizer, messages, source.prompt_style, s.max_seq_length)
            if outcome == "whole" and (not most or len(ids) <= most):
                break
    except UserError as error:
        if not s.skip_bad:
            raise UserError(f"{record['id']}: {error}") from None
        return Rendered(f"cannot be rendered: {error}")
    cut_below = outcome == "prompt cut" and most and most <= s.max_seq_length
    if ids and most and (cut_below or len(ids) > most):
        return Rendered("too many tokens")
    if not ids:
        return Rendered(outcome)
    is_target = is_target if s.mask_prompt else [i > 0 for i in range(len(ids))]
    return Rendered(outcome, array("i", ids), bytes(is_target), count)


def limit_of(source: Source, settings: Any, name: str) -> float | None:
    """A filter's limit: the source's own if it has one, otherwise that of the command line."""
    own = getattr(source, name)
    return getattr(settings, name) if own is None else own


def with_examples(record: dict, examples: list[dict], style: str) -> list[dict]:
    """The messages of a record, with the questions and answers of the examples before its question.

    The answer of each example is on a line of its own; so is the record's in style plain, which adds nothing before it.
    """
    if not examples:
        return record["messages"]
    question, answer = record["messages"]
    turns = (example["messages"] for example in examples)
    blocks = ["\n".join(filter(None, (q["content"], q.get("input"), a["content"]))) for q, a in turns]
    asked = "\n\n".join([*blocks, question["content"]]) + ("\n" if style == "plain" else "")
    return [{**question, "content": asked}, answer]


def tokenize(
    tokenizer: Tokenizer, messages: list[dict], style: str, max_seq_length: int
) -> tuple[list[int] | None, list[bool] | None, str]:
    """(ids, is_target, what was done): "whole", "prompt cut", or with no ids "answer too long".

    If a dialog is too long, the longest text that is not an answer is cut at its start, by no more than needed. If that
    is not enough even with all of it gone, the next longest text is cut too.
    """
    messages = [dict(message) for message in messages]
    places = [(m, key) for m in messages if m["role"] != "assistant" for key in ("content", "input") if m.get(key)]
    places.sort(key=lambda place: -len(place[0][place[1]]))
    outcome = "whole"
    for message, key in places:  # what is far too long need not be tokenised to know it
        if len(message[key]) > max_seq_length * LONGEST_TOKEN:
            message[key], outcome = message[key][-max_seq_length * LONGEST_TOKEN :], "prompt cut"
    ids, is_target = encode_dialog(tokenizer, messages, style)
    if len(ids) <= max_seq_length:
        return ids, is_target, outcome
    bare = [m if m["role"] == "assistant" else {**m, "content": "", "input": ""} for m in messages]
    if len(encode_dialog(tokenizer, bare, style)[0]) > max_seq_length:
        return None, None, "answer too long"
    for message, key in places:
        best = _cut_start(tokenizer, messages, style, max_seq_length, message, key, len(ids))
        if best:
            return *best, "prompt cut"
        ids, _ = encode_dialog(tokenizer, messages, style)
    return None, None, "answer too long"


def _cut_start(tokenizer, messages, style, max_seq_length, message, key, length):
    """(ids, is_target) with as much of the end of one text as fits; None, and the text empty, if nothing of it does.

    length: the tokens with all of it. The search is by false position, as tokens are about proportional to characters;
    every third try is a bisection, as they are not quite.
    """
    text = message[key]
    message[key] = ""
    best = encode_dialog(tokenizer, messages, style)
    if len(best[0]) > max_seq_length:
        return None
    fits, at_fits, exceeds, at_exceeds = 0, len(best[0]), len(text), length
    turn = 0
    while exceeds - fits > 1 and at_fits < max_seq_length:
        share = 0.5 if turn % 3 == 2 else (max_seq_length - at_fits) / (at_exceeds - at_fits)
        kept = min(max(fits + int(share * (exceeds - fits)), fits + 1), exceeds - 1)
        message[key] = text[len(text) - kept :]
        tried = encode_dialog(tokenizer, messages, style)
        if len(tried[0]) <= max_seq_length:
            best, fits, at_fits = tried, kept, len(tried[0])
        else:
            exceeds, at_exceeds = kept, len(tried[0])
        turn += 1
    return best
