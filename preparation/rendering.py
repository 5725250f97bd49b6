"""A record as tokens: rendered in its source's prompt style, tokenised, cut to length. Done in worker processes.

Most records make one sample; so does a preference pair, whose two answers follow one beginning. A conversation makes
several where a chat template changes earlier turns (text/template_style.py), and a document that is too long is cut
into pieces.
"""

import pickle
from array import array
from collections import Counter
from typing import Any, NamedTuple

from preparation.mixture import Source
from preparation.pairs import common_beginning
from preparation.records import conversations
from preparation.shapes import ignore_hint
from preparation.workers import Context
from shell.cli import UserError
from text.messages import is_empty, target_numbers
from text.prompts import encode_dialog
from text.segments import Encoded
from text.tokenizer import Tokenizer

SAME_ANSWERS = "both answers the same"  # why a pair is dropped
LONGEST_TOKEN = 512  # characters: no vocabulary has a longer one


class Tokens(NamedTuple):
    """A sample: its ids, and for each of them whether it is a target.

    Those of a preference pair are a beginning, its chosen end, its rejected end. beginning, first_end: the tokens of
    the first two; 0 for what is no pair.
    """

    ids: array
    is_target: bytes
    beginning: int = 0
    first_end: int = 0


class Rendered(NamedTuple):
    """A record as samples of tokens.

    outcome: "whole", "prompt cut", "cut into pieces", or why there are none. examples: how many stand before the
    question. notes: what a reader of the data should know of, counted.
    """

    outcome: str
    samples: list[Tokens] = []
    examples: int = 0
    notes: dict[str, int] = {}


def render_records(context: Context, task: list[tuple[int, bytes, list[bytes]]]) -> list[Rendered]:
    """The task gives each record as (number of its source, pickled record, pickled records of its examples)."""
    return [render_record(context, context.sources[number], record, examples) for number, record, examples in task]


def render_record(context: Context, source: Source, record: bytes, examples: list[bytes]) -> Rendered:
    """One pickled record, with as many of the examples before it as leave it whole."""
    s, record, examples = context.settings, pickle.loads(record), [pickle.loads(example) for example in examples]
    most, notes = limit_of(source, s, "max_tokens"), Counter()
    try:
        for count in range(len(examples), -1, -1):  # better fewer examples than a question that is cut
            notes.clear()
            encoded, outcome = _encode(context, source, record, examples[:count], notes)
            if outcome == "whole" and (not most or _longest(encoded) <= most):
                break
    except UserError as error:
        if not s.skip_bad:
            raise UserError(f"{record['id']}: {error}{ignore_hint(error)}") from None
        return Rendered(f"cannot be rendered: {error}")
    if not encoded:
        return Rendered(outcome)
    cut_below = outcome != "whole" and most and most <= s.max_seq_length
    if most and (cut_below or _longest(encoded) > most):
        return Rendered("too many tokens")
    if "rejected" in record:
        samples, outcome = _fork(*encoded, outcome, notes)
    else:
        masks = (is_target if s.mask_prompt else [i > 0 for i in range(len(ids))] for ids, is_target in encoded)
        samples = [Tokens(array("i", ids), bytes(mask)) for (ids, _), mask in zip(encoded, masks, strict=True)]
    return Rendered(outcome, samples, count, {what: number for what, number in notes.items() if number})


def _fork(chosen, rejected, outcome, notes):
    """([the Tokens of a pair], `outcome`); or with none in the list, why. chosen, rejected: its two sequences.

    The ends begin with the last token that both sequences have before the first target of either: the one that predicts
    the first token in which they differ.
    """
    if chosen.ids == rejected.ids:
        return [], SAME_ANSWERS
    first_targets = [sequence.is_target.index(True) for sequence in (chosen, rejected)]
    common = min(common_beginning(chosen.ids, rejected.ids), *first_targets)
    notes["pairs whose answers follow different contexts"] += [common] * 2 != first_targets
    beginning = max(0, common - 1)
    ends = [Encoded(ids[beginning:], is_target[beginning:]) for ids, is_target in (chosen, rejected)]
    if not all(any(is_target[1:]) for _, is_target in ends):  # without a prompt an empty answer has no such token
        return [], "empty answer"
    ids = array("i", [*chosen.ids[:beginning], *ends[0].ids, *ends[1].ids])
    is_target = bytes([*chosen.is_target[:beginning], *ends[0].is_target, *ends[1].is_target])
    return [Tokens(ids, is_target, beginning, len(ends[0].ids))], outcome


def _longest(encoded):
    return max((len(ids) for ids, _ in encoded), default=0)


def limit_of(source: Source, settings: Any, name: str) -> float | None:
    """A filter's limit: the source's own if it has one, otherwise that of the command line."""
    own = getattr(source, name)
    return getattr(settings, name) if own is None else own


def _encode(context, source, record, examples, notes):
    """As `tokenize`: the samples of a record with some examples before its question, and what was done."""
    s, style = context.settings, record.get("style", source.prompt_style)
    messages = with_examples(record, examples, style)
    if not s.mask_prompt and any(message.get("weight") == 0 and not is_empty(message) for message in messages):
        raise UserError("an answer that is not to be trained on needs --mask_prompt true")
    if s.answers == "last":
        messages = with_last_answer(messages)
    more = {"tools": record.get("tools", ()), "template_args": template_args(s, record, style), "notes": notes}
    if record.get("document"):
        [whole] = encode_dialog(context.tokenizer, messages, style, **more)
        pieces = cut_document(whole.ids, s.max_seq_length, s.overlap, context.tokenizer)
        return pieces, "whole" if len(pieces) == 1 else "cut into pieces"
    return tokenize(context.tokenizer, [messages, *conversations(record)[1:]], style, s.max_seq_length, **more)


def template_args(settings: Any, record: dict, style: str) -> dict:
    """The variables of a record's chat template: its own before those of the command line, which other styles lack."""
    return {**(settings.template_args if style == "checkpoint" else {}), **record.get("template_args", {})}


def with_last_answer(messages: list[dict]) -> list[dict]:
    """The messages of which only the last answer that was to be a target is one."""
    wanted = target_numbers(messages)
    return [{**m, "weight": 0} if i in wanted[:-1] else m for i, m in enumerate(messages)]


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


def cut_document(ids: list[int], longest: int, overlap: int | None, tokenizer: Tokenizer) -> list[Encoded]:
    """A document's ids in pieces of at most `longest`, each after the first beginning with the end of the one before.

    overlap: tokens that a piece repeats, as context and not as targets; an eighth of `longest` if None. Every piece
    starts as the document does, with BOS or what the tokenizer has for it; only the last has the end token.
    """
    start = ids[: len(tokenizer.begin_ids)]
    ids, room = ids[len(start) :], longest - len(start)
    overlap = room // 8 if overlap is None else min(overlap, room - 1)
    pieces, begin = [], 0
    while True:
        repeated = overlap if begin else 0
        piece = ids[begin - repeated : begin - repeated + room]
        context = len(start) + repeated
        pieces.append(Encoded(start + piece, [False] * context + [True] * (len(piece) - repeated)))
        begin += len(piece) - repeated
        if begin >= len(ids):
            return pieces


def tokenize(
    tokenizer: Tokenizer, dialogs: list[list[dict]], style: str, max_seq_length: int, **more: Any
) -> tuple[list[Encoded], str]:
    """(the samples, what was done): "whole", "prompt cut", or with no samples "answer too long".

    dialogs: the messages of one, or of the two of a pair, which have their prompt in common and lose the same of it.
    If a sample is too long, the longest text that is not an answer is cut at its start, by no more than needed. If that
    is not enough even with all of it gone, the next longest text is cut too. more: as `encode_dialog` takes it.
    """
    dialogs = _copies(dialogs)
    messages = {id(message): message for dialog in dialogs for message in dialog}.values()
    places = [(m, key) for m in messages if m["role"] != "assistant" for key in ("content", "input") if m.get(key)]
    places.sort(key=lambda place: -len(place[0][place[1]]))
    outcome = "whole"
    for message, key in places:  # what is far too long need not be tokenised to know it
        if len(message[key]) > max_seq_length * LONGEST_TOKEN:
            message[key], outcome = message[key][-max_seq_length * LONGEST_TOKEN :], "prompt cut"
    encoded = _encode_all(tokenizer, dialogs, style, more)
    if _longest(encoded) <= max_seq_length:
        return encoded, outcome
    again = more | {"notes": None}  # what is to be noted was, for the whole
    bare = [
        [m if m["role"] == "assistant" else {**m, "content": "", "input": ""} for m in dialog] for dialog in dialogs
    ]
    if _longest(_encode_all(tokenizer, bare, style, again)) > max_seq_length:
        return [], "answer too long"
    for message, key in places:
        best = _cut_start(tokenizer, dialogs, style, max_seq_length, message, key, _longest(encoded), again)
        if best:
            return best, "prompt cut"
        encoded = _encode_all(tokenizer, dialogs, style, again)
    return [], "answer too long"


def _copies(dialogs):
    """New dialogs, whose messages may be changed: those with which all of them begin are the same ones in each."""
    first, *others = ([dict(message) for message in dialog] for dialog in dialogs)
    shared = (common_beginning(first, other) for other in others)
    return [first, *(first[:n] + other[n:] for n, other in zip(shared, others, strict=True))]


def _encode_all(tokenizer, dialogs, style, more):
    return [one for messages in dialogs for one in encode_dialog(tokenizer, messages, style, **more)]


def _cut_start(tokenizer, dialogs, style, max_seq_length, message, key, length, more):
    """The samples with as much of the end of one text as fits; None, and the text empty, if nothing of it does.

    length: the tokens with all of it. The search is by false position, as tokens are about proportional to characters;
    every third try is a bisection, as they are not quite.
    """
    text = message[key]
    message[key] = ""
    best = _encode_all(tokenizer, dialogs, style, more)
    if _longest(best) > max_seq_length:
        return None
    fits, at_fits, exceeds, at_exceeds = 0, _longest(best), len(text), length
    turn = 0
    while exceeds - fits > 1 and at_fits < max_seq_length:
        share = 0.5 if turn % 3 == 2 else (max_seq_length - at_fits) / (at_exceeds - at_fits)
        kept = min(max(fits + int(share * (exceeds - fits)), fits + 1), exceeds - 1)
        message[key] = text[len(text) - kept :]
        tried = _encode_all(tokenizer, dialogs, style, more)
        if _longest(tried) <= max_seq_length:
            best, fits, at_fits = tried, kept, _longest(tried)
        else:
            exceeds, at_exceeds = kept, _longest(tried)
        turn += 1
    return best
