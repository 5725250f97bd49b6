"""Stretches of a rendered conversation, and their tokens: which belong to a template, which a user or a model wrote."""

import functools
import itertools
from typing import NamedTuple

from shell.cli import UserError
from text.tokenizer import Tokenizer
from text.word_cache import BETWEEN_WORDS

KINDS = {  # (whether special tokens written out in such a text count, whether it is a target)
    "template": (True, False),  # what a style writes
    "user": (False, False),  # what anyone but the model wrote
    "answer": (False, True),  # what the model is to write
    "mark": (True, True),  # of that, what a style writes, such as the token that begins a call of a tool
    "end": (True, True),  # what ends an answer
}
BROKEN = "\ufdd2"  # stands in the middle of what only looks like a special token; no character of any text


class Segment(NamedTuple):
    """A stretch of a rendered conversation. kind: a key of `KINDS`. trained: False for an answer that is no target."""

    text: str
    kind: str
    trained: bool = True

    @property
    def is_answer(self) -> bool:
        """Whether the model is to write it."""
        return KINDS[self.kind][1]


class Encoded(NamedTuple):
    """A sequence for training: its ids, and for each of them whether it is a target."""

    ids: list[int]
    is_target: list[bool]


def encode_segments(tokenizer: Tokenizer, segments: list[Segment]) -> Encoded:
    """The tokens of a conversation up to the end of its last target.

    The sequence starts with the tokenizer's `begin_ids` (one BOS, mostly); those in the segments are not doubled.
    Answers are encoded apart from what is around them, so no token is part of both.
    """
    ids, is_target, start, prompt, end = [], [], True, [], 0
    for group in _groups(segments):
        parts = [part for segment in group for part in split(tokenizer, segment)]
        if not group[0].is_answer:
            prompt = parts
            continue
        space = _drop_last_space(tokenizer, prompt)
        more, start = tokenizer.encode_parts(prompt, start)
        ids += more
        ids = tokenizer.with_begin(ids)
        is_target += [False] * (len(ids) - len(is_target))
        # An answer's own leading space needs a dummy prefix before it, or decoding would take it for one.
        own_space = group[0].kind == "answer" and group[0].text[:1] == " "
        more, start = tokenizer.encode_parts(parts, start or space or own_space)
        ids += more
        trained, prompt = group[0].trained, []
        is_target += [trained] * len(more)
        end = len(ids) if trained else end
    return Encoded(ids[:end], is_target[:end])


def _groups(segments):
    """The segments in lists: each is one answer with its end, or all that stands between two answers."""
    groups, last = [], None
    for segment in segments:
        if last is None or last.kind == "end" or last.is_answer != segment.is_answer:
            groups.append([])
        groups[-1].append(segment)
        last = segment
    return groups


def split(tokenizer: Tokenizer, segment: Segment) -> list[str | int]:
    """A segment cut at the special tokens that count in it: texts and ids, as `Tokenizer.cut` returns them."""
    parts = tokenizer.cut(segment.text, special=KINDS[segment.kind][0])
    if BROKEN in segment.text:
        return [part.replace(BROKEN, "") if isinstance(part, str) else part for part in parts]
    return parts


def break_special(tokenizer: Tokenizer, text: str) -> str:
    """A text in which nothing is a special token any more, whoever reads it; `split` takes out what breaks it.

    Raises UserError for a special token of one letter, which cannot be broken.
    """

    def broken(match):
        first = len(match[0]) - len(match[0].lstrip()) + 1  # a token may swallow the blanks before it
        return match[0][:first] + BROKEN + match[0][first:]

    if not tokenizer.special_pattern.search(text):
        return text
    text = tokenizer.special_pattern.sub(broken, text)
    if left := tokenizer.special_pattern.search(text):
        raise UserError(f"the text holds {left[0]!r}, a special token of this tokenizer")
    return text


def joins_cleanly(tokenizer: Tokenizer, segments: list[Segment]) -> bool:
    """Whether the segments have the same ids when they are encoded as one text, as other programs do.

    Only where ordinary text stands on both sides of an answer's beginning can there be a difference. It is looked for
    in the words there: what a space divides from them has tokens of its own.
    """
    for before, answer in itertools.pairwise(_groups(segments)):
        if not answer[0].is_answer:
            continue
        ends, begins = Segment(before[-1].text[-NEAR:], before[-1].kind), Segment(answer[0].text[:NEAR], answer[0].kind)
        left = "".join(_leading_texts(split(tokenizer, ends)[::-1])[::-1])
        right = left and "".join(_leading_texts(split(tokenizer, begins)))
        if right and not _joins(tokenizer, _last_word(left), BETWEEN_WORDS.split(right, maxsplit=1)[0]):
            return False
    return True


@functools.lru_cache(2**14)
def _joins(tokenizer, left, right):
    """Whether two texts have the same ids together as they have as a prompt and an answer."""
    apart = encode_segments(tokenizer, [Segment(left, "user"), Segment(right, "mark")]).ids
    return apart[len(tokenizer.begin_ids) :] == tokenizer.encode(left + right)


NEAR = 200  # characters at each side of an answer's beginning


def _last_word(text):
    """What follows the last space between two words, with that space."""
    places = [space.start() for space in BETWEEN_WORDS.finditer(text)]
    return text[places[-1] :] if places else text


def _leading_texts(parts):
    """The parts of a list before its first id."""
    return list(itertools.takewhile(lambda part: isinstance(part, str), parts))


def _drop_last_space(tokenizer, parts):
    """Whether the prompt ends in a space that the answer's dummy prefix replaces; if so, remove it."""
    found = tokenizer.has_prefix and parts and isinstance(parts[-1], str) and parts[-1].endswith(" ")
    if found:
        parts[-1] = parts[-1][:-1]
    return bool(found)
