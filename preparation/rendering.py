"""What is done with each row by itself, on all cores: from a row to a record, from a record to tokens.

`each_core` calls one of the functions here with many tasks in worker processes and gives their results in order:

- `examine`: rows of a source as records, with what the passes of prepare_data.py must know of them.
- `render`: records as token ids, with examples before the question where the source asks for them.
"""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
from array import array
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, NamedTuple

from preparation import cleaning
from preparation.reading import BadRow
from preparation.records import to_record
from shell.cli import UserError
from text.prompts import check_dialog, encode_dialog

LONGEST_TOKEN = 512  # characters: no vocabulary has a longer one
SLACK = 256  # tokens that a template may add to a sample's text


class Job(NamedTuple):
    """What every task needs: the settings, the sources, the tokenizer, and what is looked for in each row.

    ngrams: the cleaning.Ngrams of all benchmarks' texts, or None. places: where each of those texts comes from.
    """

    settings: Any
    sources: list
    tokenizer: Any
    ngrams: Any
    places: list


# -------------------------------------------------------------------------------------------------- on all cores

_job = None  # a worker process has one, from its start


@contextlib.contextmanager
def each_core(job, workers):
    """Yields `each(function, tasks)`, an iterator over function(job, task), in order, by so many processes.

    Only a few tasks are taken ahead, so that they can come from a file of any size. With one worker all is done in
    this process.
    """
    if workers == 1:
        yield lambda function, tasks: map(partial(function, job), tasks)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(job,))

    def each(function, tasks):
        waiting = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(_work, function, task))
                if len(waiting) > 3 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError("a worker process was killed, perhaps for want of memory: try --workers 1") from None

    try:
        yield each
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(job):
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process to answer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken already
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """A killed process cannot end its workers; so they look after themselves."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(function, task):
    return function(_job, task)


# ------------------------------------------------------------------------------------------------- row to record


class Examined(NamedTuple):
    """A row that was read. bad: what is wrong with it; then there is nothing else but its place.

    record: {"id": place, "key": its prompt (its text, if that is blank), "messages": dialog}, pickled. answer:
    characters of its answers. prompt_hash: 64 bits, of the key. reason: why it is dropped, or "". of: the place of the
    benchmark's sample whose words it has; detail: those words. signature: its MinHash as bytes, if one is wanted.
    """

    place: str
    bad: str = ""
    record: bytes = b""
    answer: int = 0
    prompt_hash: int = 0
    reason: str = ""
    of: str | None = None
    detail: str | None = None
    signature: bytes = b""


def examine(job, task):
    """(number of the source, its rows) as a list of `Examined`."""
    number, rows = task
    return [_examine_row(job, job.sources[number], row) for row in rows]


def _examine_row(job, source, row):
    s = job.settings
    try:
        record = {"id": row.place, **to_record(source, row, s.seed)}
        check_dialog(record["messages"], last="assistant")
        if source.few_shot[1]:
            check_single(record)
    except (BadRow, UserError) as error:
        return Examined(row.place, bad=str(error))
    answer = "\n".join(m["content"] for m in record["messages"] if m["role"] == "assistant")
    if not record["key"].strip():
        record["key"] = answer  # a text without a prompt is known by itself
    needs_words = s.near_duplicates or job.ngrams or _looks_at_words(s, source)
    asked, answered = (cleaning.words(text) if needs_words else [] for text in (record["key"], answer))
    data = pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
    reason, of, detail = _why_not(job, source, record, data, asked, answered), None, None
    if not reason and job.ngrams and (found := _find_leak(job, record, asked, answered)):
        reason, of, detail = "words of a benchmark", job.places[found[0]], found[1]
    return Examined(
        place=row.place,
        record=data,
        answer=len(answer),
        prompt_hash=cleaning.prompt_hash(record["key"]),
        reason=reason,
        of=of,
        detail=detail,
        signature=cleaning.signature(asked).tobytes() if s.near_duplicates else b"",
    )


def _find_leak(job, record, asked, answered):
    """The number of the benchmark's text of which a record has enough words in a row, and those; or None.

    Looked for in what users say and in the answers; a system message is often one for all.
    """
    if any(message["role"] == "system" for message in record["messages"]):
        users = (m for m in record["messages"] if m["role"] == "user")
        asked = cleaning.words("\n".join(m["content"] + "\n" + (m.get("input") or "") for m in users))
    found = job.ngrams.find(asked)
    return job.ngrams.find(answered) if found is None and len(answered) >= job.settings.leak_words else found


def _limit(source, settings, name):
    """A filter's limit: the source's own if it has one, otherwise that of the command line."""
    own = getattr(source, name)
    return getattr(settings, name) if own is None else own


def _looks_at_words(s, source):
    return _limit(source, s, "min_words") > 0 or _limit(source, s, "max_repetition") < 1


def _why_not(job, source, record, data, asked, answered):
    """Why a row is not fit to train on, or ""."""
    s = job.settings
    if not record["messages"][-1]["content"].strip():
        return "empty answer"
    if _looks_at_words(s, source):
        if len(asked) + len(answered) < _limit(source, s, "min_words"):
            return "too few words"
        if max(cleaning.repetition(asked), cleaning.repetition(answered)) > _limit(source, s, "max_repetition"):
            return "repetitive"
    return _too_long(job, source, record, data)


def _too_long(job, source, record, data):
    """Why a row has too many tokens, or "". Known before duplicates are looked for: such a row must not win.

    Only what may be too long is tokenised here: a token has at least a byte.
    """
    texts = [(m["role"], m["content"] + (m.get("input") or "")) for m in record["messages"]]
    answers = sum(len(text.encode()) for role, text in texts if role == "assistant")
    everything = sum(len(text.encode()) for _, text in texts)
    most = _limit(source, job.settings, "max_tokens")
    if answers + SLACK <= job.settings.max_seq_length and (not most or everything + SLACK <= most):
        return ""
    rendered = _render_record(job, source, data, [])
    return "" if rendered.ids else rendered.outcome.partition(": ")[0]


# ---------------------------------------------------------------------------------------------- record to tokens


class Rendered(NamedTuple):
    """A record as tokens. outcome: "whole", "prompt cut", or why there are none; examples: how many are before it."""

    outcome: str
    ids: array = array("i")
    is_target: bytes = b""
    examples: int = 0


def render(job, task):
    """[(number of the source, record, records of its examples), ...] as a list of `Rendered`."""
    return [_render_record(job, job.sources[number], record, examples) for number, record, examples in task]


def _render_record(job, source, record, examples):
    s, record, examples = job.settings, pickle.loads(record), [pickle.loads(example) for example in examples]
    most = _limit(source, s, "max_tokens")
    try:
        for count in range(len(examples), -1, -1):  # rather fewer examples than half a question
            messages = with_examples(record, examples[:count], source.prompt_style)
            ids, is_target, outcome = tokenize(job.tokenizer, messages, source.prompt_style, s.max_seq_length)
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


def check_single(record):
    """Raise UserError unless a record is one question and one answer, as few_shot needs it."""
    if [message["role"] for message in record["messages"]] != ["user", "assistant"]:
        raise UserError("few_shot needs samples of one question and one answer")


def with_examples(record, examples, style):
    """The messages of a record, the texts and answers of the examples put before its question.

    Each example's answer stands on a line of its own; so does the record's, in the style that has nothing before it.
    """
    if not examples:
        return record["messages"]
    question, answer = record["messages"]
    turns = (example["messages"] for example in examples)
    blocks = ["\n".join(filter(None, (q["content"], q.get("input"), a["content"]))) for q, a in turns]
    asked = "\n\n".join([*blocks, question["content"]]) + ("\n" if style == "plain" else "")
    return [{**question, "content": asked}, answer]


def tokenize(tokenizer, messages, style, max_seq_length):
    """(ids, is_target, what was done): "whole", "prompt cut", or with no ids "answer too long".

    Of a dialog that is too long, the longest text that is no answer is cut from its start, so that as much of it stays
    as fits; where none may stay, the next longest as well.
    """
    messages = [dict(message) for message in messages]
    places = [(m, key) for m in messages if m["role"] != "assistant" for key in ("content", "input") if m.get(key)]
    places.sort(key=lambda place: -len(place[0][place[1]]))
    outcome = "whole"
    for message, key in places:  # what cannot fit by far is not worth the tokenizer's time
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

    length: the tokens with all of it. Found by false position, since tokens grow about evenly with characters, and by
    bisection in turns, since not quite evenly.
    """
    text = message[key]
    message[key] = ""
    best = encode_dialog(tokenizer, messages, style)
    if len(best[0]) > max_seq_length:
        return None
    fits, at_fits, exceeds, at_exceeds = 0, len(best[0]), len(text), length
    for turn in itertools.count():
        if exceeds - fits <= 1 or at_fits == max_seq_length:
            return best
        share = 0.5 if turn % 3 == 2 else (max_seq_length - at_fits) / (at_exceeds - at_fits)
        kept = min(max(fits + int(share * (exceeds - fits)), fits + 1), exceeds - 1)
        message[key] = text[len(text) - kept :]
        tried = encode_dialog(tokenizer, messages, style)
        if len(tried[0]) <= max_seq_length:
            best, fits, at_fits = tried, kept, len(tried[0])
        else:
            exceeds, at_exceeds = kept, len(tried[0])
