"""From logits to text: rows that are generated together, each with its own prompt, settings, seed and reply.

`Batch` is the loop: rows join it between two steps and leave it when they end, and what a row gets does not depend on
the others. `generate` is the plain case, all rows at once with the same settings.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from shell.cli import UserError
from text.tokenizer import StreamDecoder

GREEDY_BELOW = 1e-5  # a temperature this low takes the likeliest token; lower ones would overflow


class Score(NamedTuple):
    """What the model thought of a token: its log-probability (natural), and the likeliest ids with theirs, in order.

    Of the model's own distribution, before temperature, penalty, top_k and top_p.
    """

    logprob: float
    top: list


@dataclass(eq=False)
class Row:
    """One prompt and the answer to it.

    prompt: ids. reply: a `Reply`, or what has its `push`, `finish`, `done` and `length`. settings: max_new_tokens,
    temperature, top_k, top_p and repetition_penalty, as in generate.py. top: how many of the likeliest ids to note with
    each token's log-probability; None for no log-probabilities at all. score_prompt: note those of the prompt, too.
    """

    prompt: list
    reply: Any
    settings: Any
    seed: int
    top: int | None = None
    score_prompt: bool = False
    dropped: bool = False  # whoever asked does not want it any more; set from any thread
    room: int = 0  # tokens that it may generate, known once it is in a batch
    generator: torch.Generator | None = None
    scores: list = field(default_factory=list)  # a Score for each token generated, the one that ends it included
    prompt_scores: list = field(default_factory=list)  # for each token of the prompt; None for the first

    @property
    def going(self):
        return not (self.reply.done or self.dropped)


class Batch:
    """Rows on their way, a token at a time: `add` them, then `step` while any are `going`. decoder: a `decode.Decoder`.

    Prompts of unequal lengths are padded on the left. Rows that have ended are carried along until half of the batch
    has, or others join: to leave is not free.
    """

    def __init__(self, decoder):
        self.decoder, self.config = decoder, decoder.model.config
        self.device = decoder.model.model.embed_tokens.weight.device
        self.rows = []  # as they stand in the decoder, the ended ones included
        self.ids = None  # (rows,) int64: the last token of each, which the decoder has not read yet
        self.seen = None  # (rows, V) bool: the tokens that have occurred in each

    @property
    def going(self):
        """The rows that have not ended."""
        return [row for row in self.rows if row.going]

    @torch.inference_mode()
    def add(self, rows):
        """Read the prompts of more rows and choose their first tokens. UserError if a prompt is empty or too long."""
        for row in rows:
            row.room = room_for(row.prompt, row.settings.max_new_tokens, self.config.max_position_embeddings)
            row.generator = torch.Generator(self.device).manual_seed(row.seed)
        self._leave(self.going)
        longest = max(len(row.prompt) for row in rows)
        padding = torch.tensor([longest - len(row.prompt) for row in rows], device=self.device)
        tokens = [[0] * (longest - len(row.prompt)) + row.prompt for row in rows]
        more = max(row.room - row.reply.length for row in (*self.rows, *rows))
        decoder = self.decoder
        read = partial(decoder.join, more=more) if self.rows else partial(decoder.start, room=longest + more)
        scored = [i for i, row in enumerate(rows) if row.score_prompt]
        for i in scored:
            rows[i].prompt_scores.append(None)
        score = partial(score_prompt, rows)
        logits = read(torch.tensor(tokens, device=self.device), padding, score=score, scored=scored)
        seen = torch.zeros(len(rows), self.config.vocab_size, dtype=torch.bool, device=self.device)
        for row, row_seen in zip(rows, seen, strict=True):
            row_seen[row.prompt] = True
        ids = self._choose(rows, logits.float(), seen)
        self.ids = torch.cat([self.ids, ids]) if self.rows else ids
        self.seen = torch.cat([self.seen, seen]) if self.rows else seen
        self.rows += rows

    @torch.inference_mode()
    def step(self):
        """Choose the next token of each row that is going. There must be one."""
        going = self.going
        if 2 * len(going) <= len(self.rows):
            self._leave(going)
        self.ids = self._choose(self.rows, self.decoder.step(self.ids).float(), self.seen)

    def _leave(self, going):
        """Go on without the rows that have ended."""
        if len(going) == len(self.rows):
            return
        if going:
            places = torch.tensor([i for i, row in enumerate(self.rows) if row in going], device=self.device)
            self.decoder.keep(places)
            self.ids, self.seen = self.ids[places], self.seen[places]
        self.rows = going

    def _choose(self, rows, logits, seen):
        """The next ids (B,) by logits (B, V) fp32, handed to the replies and entered in `seen`."""
        settings = [row.settings for row in rows]
        changed = penalize(logits, seen, [s.repetition_penalty for s in settings])
        ids = choose(changed, settings, [row.generator for row in rows])
        seen.scatter_(1, ids[:, None], True)
        scored = [i for i, row in enumerate(rows) if row.going and row.room and row.top is not None]
        if scored:
            scores = score(logits[scored], ids[scored], max(rows[i].top for i in scored))
            for i, result in zip(scored, scores, strict=True):
                rows[i].scores.append(result._replace(top=result.top[: rows[i].top]))
        for row, id in zip(rows, ids.tolist(), strict=True):
            if row.going and row.room:
                row.reply.push(id)
            if row.going and row.reply.length == row.room:
                row.reply.finish()
        return ids


def room_for(prompt, max_new_tokens, context):
    """How many tokens can be generated after a prompt (ids) in a context of so many. Raises UserError."""
    if not prompt:
        raise UserError("a prompt is empty, and in its style nothing comes before it: the model needs a token")
    if len(prompt) >= context + (max_new_tokens == 0):
        raise UserError(f"a prompt has {len(prompt)} tokens, the model's context is {context}: shorten it")
    return min(max_new_tokens, context - len(prompt))


def generate(decoder, prompts, replies, s, seeds):
    """Extend each of `replies` with what follows its prompt, token by token; yields after each one.

    prompts: B lists of ids, none empty. seeds: B numbers. s: the settings of all rows (see `Row`).
    """
    batch = Batch(decoder)
    batch.add([Row(*row, s, seed) for *row, seed in zip(prompts, replies, seeds, strict=True)])
    yield
    while batch.going:
        batch.step()
        yield


def generate_all(decoder, prompts, replies, s, progress=lambda more: None):
    """`generate` for any number of prompts, `s.batch_size` of about equal lengths at a time; prompt i has seed + i.

    progress: is called with the number of replies that have just been finished.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for first in range(0, len(order), s.batch_size):
        rows = order[first : first + s.batch_size]
        batch = ([prompts[i] for i in rows], [replies[i] for i in rows], s, [s.seed + i for i in rows])
        for _ in generate(decoder, *batch):
            pass
        progress(len(rows))


# ----------------------------------------------------------------------------------------------- log-probabilities


def score(logits, ids, top):
    """A `Score` for each of ids (n,), by logits (n, V), with the `top` likeliest ids."""
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    values, places = logprobs.topk(min(top, logprobs.size(1)), dim=-1)
    pairs = zip(places.tolist(), values.tolist(), strict=True)
    return [Score(value, list(zip(*pair, strict=True))) for value, pair in zip(chosen, pairs, strict=True)]


def score_prompt(rows, i, position, logits):
    """Note what the logits (n, V) after the tokens from `position` on say of the tokens that follow these."""
    row = rows[i]
    following = row.prompt[position + 1 : position + 1 + len(logits)]
    ids = torch.tensor(following, dtype=torch.int64, device=logits.device)
    row.prompt_scores += score(logits[: len(ids)], ids, row.top or 0)


# -------------------------------------------------------------------------------------------------------- sampling


def penalize(logits, seen, penalties):
    """Make the tokens in `seen` (B, V) less likely: by the row's penalty, divided or, below 0, multiplied.

    logits (B, V); penalties: B numbers.
    """
    if all(penalty == 1.0 for penalty in penalties):
        return logits
    penalties = torch.tensor(penalties, device=logits.device)[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / penalties, logits * penalties), logits)


def choose(logits, settings, generators):
    """Draw one token for each row of logits (B, V) fp32, with its own settings and generator: ids (B,) int64."""
    if not logits.isfinite().all():
        raise UserError("the model's logits are NaN or infinite: its weights or its adapter are damaged")
    ids = logits.argmax(dim=-1)
    drawn = [i for i, s in enumerate(settings) if s.temperature >= GREEDY_BELOW and s.top_p > 0]
    if drawn:
        ids[drawn] = draw(logits[drawn], [settings[i] for i in drawn], [generators[i] for i in drawn])
    return ids


def draw(logits, settings, generators):
    """The random part of `choose`, for rows whose temperature and top_p are above 0."""
    V, device = logits.size(-1), logits.device
    logits = logits / torch.tensor([s.temperature for s in settings], device=device)[:, None]
    top_k = torch.tensor([s.top_k if 0 < s.top_k < V else V for s in settings], device=device)
    limited = top_k < V
    if limited.any():
        best = logits.topk(int(top_k[limited].max())).values  # (B, the largest top_k)
        least = best.gather(1, (top_k.clamp(max=best.size(1)) - 1)[:, None])
        logits = logits.masked_fill((logits < least) & limited[:, None], -torch.inf)
    probabilities = logits.softmax(dim=-1)
    top_p = torch.tensor([s.top_p if s.top_p < 1 else torch.inf for s in settings], device=device)[:, None]
    if not top_p.isinf().all():
        ordered, places = probabilities.sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p  # the tokens before it have reached top_p already
        probabilities = ordered.masked_fill(outside, 0).gather(1, places.argsort(dim=-1))
    rows = zip(probabilities, generators, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])


# --------------------------------------------------------------------------------------------------------- replies


class Reply:
    """One answer as it grows: `text`, and `done` once a stop id or a stop text has ended it (neither is kept).

    pieces: what each token added to the text, together all of it; a token that leaves a character unfinished adds "".
    stopped: whether a stop id or text ended it, and not the limit of tokens.
    """

    def __init__(self, tokenizer, stop_ids, stop_texts=(), start=True):
        """start: the answer begins a text; False: it continues one, and a space at its beginning counts."""
        self.text, self.pieces, self.done, self.stopped, self.length = "", [], False, False, 0
        self._decoder, self._stop_ids, self._stop_texts = StreamDecoder(tokenizer, start=start), stop_ids, stop_texts

    def push(self, id):
        """Take the next token."""
        self.length += 1
        if id in self._stop_ids:
            self.finish()
            self.stopped = True
            return
        self.pieces.append("")
        self._append(self._decoder.push(id))

    def finish(self):
        if not self.done:
            self._append(self._decoder.flush())
            self.done = True

    def _append(self, piece):
        if piece:
            self.pieces[-1] += piece
        self.text += piece
        found = [position for stop in self._stop_texts if (position := self.text.find(stop)) >= 0]
        if found:
            self.text, self.done, self.stopped = self.text[: min(found)], True, True
            self.pieces = clip(self.pieces, len(self.text))

    @property
    def safe_length(self):
        """How many characters can be shown: what may be the beginning of a stop text is held back."""
        if self.done:
            return len(self.text)
        held = [n for stop in self._stop_texts for n in range(1, len(stop)) if self.text.endswith(stop[:n])]
        return len(self.text) - max(held, default=0)


def clip(pieces, length):
    """The pieces of the first `length` characters: those that begin later are left out, the last may be shortened."""
    kept = []
    for piece in pieces:
        if length <= 0:
            break
        kept.append(piece[:length])
        length -= len(piece)
    return kept
