"""Requests that come at any time, answered together: one thread owns the model and moves all rows a token at a time.

Nothing here knows of HTTP. A request is one or more `Task`s; each is a row of a `sampling.Batch`. Those that wait join
the batch between two steps, as soon as there is a place for them, in the order in which they came.
"""

import collections
import random
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from inference.sampling import Batch, Reply, Row, room_for
from shell.cli import UserError
from text.tokenizer import StreamDecoder

PREFILL_TOKENS = 8192  # of prompts that are read together, padding included: what bounds the memory that it takes


class Full(Exception):
    """The queue has no room for a request now."""


@dataclass(eq=False)
class Task(Row):
    """A row that somebody waits for. tell: called with it, by the model's thread, after each token and at its end."""

    tell: Callable | None = None
    error: str | None = None  # why it ended early: the model failed

    @property
    def ended(self):
        return self.error is not None or not self.going


class Engine:
    """A queue of tasks before a model. max_batch_size: rows at one time. max_queue: tasks that may wait."""

    def __init__(self, decoder, max_batch_size, max_queue):
        self.decoder, self.max_batch_size, self.max_queue = decoder, max_batch_size, max_queue
        self.waiting, self.batch = collections.deque(), Batch(decoder)
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def alive(self):
        """Whether the model's thread runs, as it does until `close`."""
        return self._thread.is_alive()

    @property
    def running(self):
        """How many rows are being generated."""
        return len(self.batch.going)

    def submit(self, tasks):
        """Put tasks into the queue, all or none. Raises Full."""
        with self._changed:
            if self._closing or len(self.waiting) + len(tasks) > self.max_queue:
                raise Full
            self.waiting.extend(tasks)
            self._changed.notify()

    def cancel(self, tasks):
        """Let go of tasks, wherever they are: those in the batch leave it with the next step."""
        with self._changed:
            for task in tasks:
                task.dropped = True
            if any(task.dropped for task in self.waiting):
                self.waiting = collections.deque(task for task in self.waiting if not task.dropped)

    def close(self):
        """Drop what there is and stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self.cancel([*self.waiting, *self.batch.rows])
        self._thread.join()

    def _run(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.waiting or self.batch.going or self._closing)
                if self._closing:
                    return
                new = self._take()
            try:
                self._advance(new)
            except Exception as error:  # whatever it is, the requests to come shall be answered
                traceback.print_exc(file=sys.stderr)
                self._fail([*self.batch.going, *new], f"the model failed: {error or type(error).__name__}")

    def _take(self):
        """Take those from the queue that fit: into the batch, and into one reading of prompts."""
        taken, longest, places = [], 0, self.max_batch_size - len(self.batch.going)
        while self.waiting and len(taken) < places:
            longest = max(longest, len(self.waiting[0].prompt))
            if taken and longest * (len(taken) + 1) > PREFILL_TOKENS:
                break
            taken.append(self.waiting.popleft())
        return taken

    def _advance(self, new):
        """A step for all rows in the batch; new ones get their first token."""
        if self.batch.going:
            moved = self.batch.going
            self.batch.step()
            self._tell(moved)
        if new:
            self.batch.add(new)
            self._tell(new)

    def _fail(self, tasks, why):
        self.batch = Batch(self.decoder)
        for task in dict.fromkeys(tasks):
            task.error = why
        self._tell(dict.fromkeys(tasks))

    @staticmethod
    def _tell(tasks):
        for task in tasks:
            if not task.dropped:
                task.tell(task)


# ----------------------------------------------------------------------------------------------------- prompts to tasks


def encode_text(tokenizer, text):
    """The ids of a prompt that is continued as it stands, and how many of them were put before it: BOS, or nothing."""
    added = [tokenizer.bos_id] if tokenizer.add_bos else []
    return added + tokenizer.encode(text), len(added)


def check_ids(writer, ids):
    """Raise UserError for ids that are no tokens. writer: a `generate.Writer`."""
    size = min(writer.tokenizer.vocab_size, writer.model.config.vocab_size)
    wrong = [id for id in ids if not 0 <= id < size]
    if wrong:
        raise UserError(f"{wrong[0]} is no token: ids are from 0 to {size - 1}")


def make_tasks(writer, ids, asked, n, top=None, echo=False, start=False):
    """n tasks that answer one prompt. Raises UserError if it is empty or too long.

    writer: a `generate.Writer`. asked: the settings of a `Row`, with seed (None for any) and stop. top: as in `Row`.
    echo: the first task notes the prompt's log-probabilities, which are those of all. start: as in `Reply`.
    """
    room_for(ids, asked.max_new_tokens, writer.model.config.max_position_embeddings)
    seed = random.SystemRandom().randrange(2**62) if asked.seed is None else asked.seed
    tasks = []
    for i in range(n):
        reply = Reply(writer.tokenizer, writer.stop_ids, asked.stop, start=start)
        scored = echo and top is not None and i == 0
        tasks.append(Task(list(ids), reply, asked, (seed + i) % 2**63, top, scored))
    return tasks


# ------------------------------------------------------------------------------------------------------ tokens as text


class Token(NamedTuple):
    """A token of an answer or a prompt, for people: its text, its log-probability, and {text: log-probability}.

    The texts of all tokens, joined, are the whole text: one that leaves a character unfinished has "", the next one
    the character. A text's first token has None and {}, if nothing comes before it: then nothing predicted it.
    """

    text: str
    logprob: float | None
    top: dict


def answer_tokens(tokenizer, task, first=0):
    """The `Token`s of an answer so far, from one on. A task without `top` has no log-probabilities: None and {}."""
    pieces = task.reply.pieces[first:]
    scores = task.scores[first:] or [None] * len(pieces)  # one more, if a stop id ended it
    return [_token(tokenizer, *pair) for pair in zip(pieces, scores, strict=False)]


def prompt_tokens(tokenizer, task, skip):
    """The `Token`s of a prompt without its first `skip` ids: the BOS that was put there."""
    decoder = StreamDecoder(tokenizer, skip_special=False)
    pieces = [decoder.push(id) for id in task.prompt[skip:]]
    if pieces:
        pieces[-1] += decoder.flush()
    scores = task.prompt_scores[skip:] or [None] * len(pieces)
    return [_token(tokenizer, *pair) for pair in zip(pieces, scores, strict=True)]


def _token(tokenizer, text, score):
    if score is None:
        return Token(text, None, {})
    likeliest = {}
    for id, logprob in score.top:  # several ids may have one text, such as parts of characters: the likeliest
        likeliest.setdefault(tokenizer.token_bytes(id).decode("utf-8", "replace"), logprob)
    return Token(text, score.logprob, likeliest)
