"""Continuous batching: requests that come at any time are answered together, by one thread that owns the model.

Nothing here knows of HTTP. A request is one or more `Task`s; each is a row of a `sampling.Batch`, whose `step` makes a
token for every row. Tasks that wait join the batch between two steps, as soon as it has room, in the order they came;
their prompts are read in chunks, one between two steps, so that a long one does not halt the answers of others.
"""

import collections
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from inference.decode import CHUNK, Decoder
from inference.prefix_cache import PrefixCache
from inference.sampling import Batch, Reply, Row, room_for
from shell.cli import UserError
from text.tokenizer import StreamDecoder, Tokenizer

# Positions of prompts that are read between two decoding steps, padding included: the answers that are being generated
# wait for them. 512 keep a GPU busy with products; the pass then takes about as long as a few steps.
CHUNK_BETWEEN_STEPS = 512


class QueueFull(Exception):
    """The queue has no room for a request now."""


@dataclass(eq=False)
class Task(Row):
    """A row of the batch, as a request asked for it.

    notify: called with the task by the model's thread, after each token and at the end. error: why the task ended
    early, if the model failed.
    """

    notify: Callable[["Task"], None] | None = None
    error: str | None = None

    @property
    def ended(self) -> bool:
        """Whether there will be no more tokens."""
        return self.error is not None or not self.going


class Engine:
    """A queue of tasks and the thread with the model. max_batch_size: rows at one time. max_queue: tasks that wait.

    prefix_bytes: of keys and values of prompts that are kept for later ones that begin alike; 0 for none.
    """

    def __init__(self, decoder: Decoder, max_batch_size: int, max_queue: int, prefix_bytes: int = 0):
        self.decoder, self.max_batch_size, self.max_queue = decoder, max_batch_size, max_queue
        self.prefixes = PrefixCache(prefix_bytes) if prefix_bytes else None
        self.waiting, self.batch = collections.deque(), Batch(decoder, self.prefixes)
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the model's thread runs, as it does until `close`."""
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """How many rows are in the batch, or will be when their prompts have been read."""
        rows = (*self.batch.rows, *self.batch.joining)
        return len({row for row in rows if row.going and row.leader is None})

    def submit(self, tasks: list[Task]) -> None:
        """Put tasks into the queue, all or none. Raises QueueFull."""
        with self._changed:
            if self._closing or len(self.waiting) + len(tasks) > self.max_queue:
                raise QueueFull
            self.waiting.extend(tasks)
            self._changed.notify()

    def cancel(self, tasks: Iterable[Task]) -> None:
        """Remove tasks from the queue, and from the batch with its next step; no more of their prompts is read."""
        with self._changed:
            for task in tasks:
                task.dropped = True
            if any(task.dropped for task in self.waiting):
                self.waiting = collections.deque(task for task in self.waiting if not task.dropped)

    def close(self) -> None:
        """Cancel all tasks and stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self.cancel([*self.waiting, *self.batch.joining, *self.batch.rows])
        self._thread.join()

    def _run(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.waiting or self.batch.joining or self.batch.going or self._closing)
                if self._closing:
                    return
                new = [] if self.batch.joining else self._take()
            try:
                self._advance(new)
            except Exception as error:  # whatever it is, the thread goes on: later requests are to be answered
                traceback.print_exc(file=sys.stderr)
                self._fail(
                    [*self.batch.going, *self.batch.joining, *new], f"the model failed: {error or type(error).__name__}"
                )

    def _take(self):
        """Take from the queue the tasks that the batch has room for, and whose prompts fit one pass; or one task.

        Of a prompt counts what is to be read. So one that is held is not read with one that is not, which is long.
        """
        taken, longest, rows, places = [], 0, 0, self.max_batch_size - len(self.batch.going)
        while self.waiting:
            each = (self.waiting[0], *self.waiting[0].members)
            rows += len(each)
            if rows > places:
                break
            longest = max(longest, *map(self.batch.unread, each))
            if taken and longest * rows > CHUNK:
                break
            taken.append(self.waiting.popleft())
        return taken

    def _advance(self, new):
        """One token for all rows in the batch, and a chunk of the prompts of new ones, in the end their first token."""
        moved = self.batch.going
        if moved:
            self.batch.step()
            self._notify(moved)
        if new:
            self.batch.begin(new)
        if self.batch.joining:
            self._notify(self.batch.read(CHUNK_BETWEEN_STEPS if self.batch.going else CHUNK))

    def _fail(self, tasks, why):
        self.batch = Batch(self.decoder, self.prefixes)
        for task in dict.fromkeys(tasks):
            task.error = why
        self._notify(dict.fromkeys(tasks))

    @staticmethod
    def _notify(tasks):
        for task in tasks:
            if task.leader is None and not task.dropped:
                task.notify(task)


# ----------------------------------------------------------------------------------------------------- prompts to tasks


def encode_text(tokenizer: Tokenizer, text: str) -> tuple[list[int], int]:
    """The ids of a prompt that is continued as it is, and how many of them were added before it, such as a BOS."""
    added = list(tokenizer.begin_ids)
    return added + tokenizer.encode(text), len(added)


def check_ids(writer: Any, ids: list[int]) -> None:
    """Raise UserError for ids that are not in the vocabulary. writer: a `writer.Writer`."""
    size = min(writer.tokenizer.vocab_size, writer.model.config.vocab_size)
    wrong = [id for id in ids if not 0 <= id < size]
    if wrong:
        raise UserError(f"{wrong[0]} is no token: ids are from 0 to {size - 1}")


def make_tasks(
    writer: Any,
    ids: list[int] | list[list[int]],
    asked: object,
    n: int,
    top: int | None = None,
    echo: bool = False,
    start: bool = False,
    shown: dict[int, str] | None = None,
    voices: list[Any] | None = None,
) -> list[Task]:
    """n tasks that answer one prompt. Raises UserError if it is empty or too long.

    writer: a `writer.Writer`. asked: has the settings of a `Row` as attributes, and seed (None for a random one) and
    stop. top: as in `Row`. echo: also compute the prompt's log-probabilities (of the first task: they are the same for
    all). start, shown: as in `Reply`. voices: which adapters answer (`Writer.voices`), by default the first. ids is one
    prompt for all of them, or a list of one for each.
    """
    voices = voices or writer.voices(None)
    prompts = ids if ids and isinstance(ids[0], list) else [ids] * len(voices)
    for prompt in prompts:
        room_for(prompt, asked.max_new_tokens, writer.model.config.max_position_embeddings)
    scored = echo and top is not None
    if scored and len(voices) > 1:
        raise UserError("an ensemble gives no log-probabilities of a prompt: ask without echo, or without logprobs")
    seed = random.SystemRandom().randrange(2**62) if asked.seed is None else asked.seed
    stop_ids, tasks = set().union(*(voice.stop_ids for voice in voices)), []
    for i in range(n):
        reply = Reply(writer.tokenizer, stop_ids, asked.stop, start, shown)
        task = Task(list(prompts[0]), reply, asked, (seed + i) % 2**63, top, scored and i == 0)
        task.adapter = voices[0].number
        for prompt, voice in zip(prompts[1:], voices[1:], strict=True):
            task.follow(list(prompt), voice.number)
        tasks.append(task)
    return tasks


# ------------------------------------------------------------------------------------------------------ tokens as text


class Token(NamedTuple):
    """A token of an answer or a prompt: its text, its log-probability, and those of the likeliest tokens by their text.

    The texts of all tokens, joined, are the whole text. A token that ends inside a character has the text "", and the
    token that completes the character has all of it. The first token of a text that nothing comes before, not even a
    BOS, has None and {}: no distribution predicted it.
    """

    text: str
    logprob: float | None
    top: dict[str, float]


def answer_tokens(tokenizer: Tokenizer, task: Task, first: int = 0) -> list[Token]:
    """The tokens of an answer so far, from number `first` on. Without `top` log-probabilities are None and {}."""
    pieces = task.reply.pieces[first:]
    scores = task.scores[first:] or [None] * len(pieces)  # one more than pieces, if a stop id ended the answer
    return [_token(tokenizer, *pair) for pair in zip(pieces, scores, strict=False)]


def prompt_tokens(tokenizer: Tokenizer, task: Task, skip: int) -> list[Token]:
    """The tokens of a prompt without its first `skip` ids: the BOS that was added."""
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
