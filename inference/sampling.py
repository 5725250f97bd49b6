"""From logits to text: rows that are generated together, each with its own prompt, settings, seed and reply.

`Batch` is the loop: rows join it between two steps and leave it when they end, and no row's tokens depend on the other
rows. `generate` is the plain case, all rows at once with the same settings.

Shapes: B rows, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from inference.decode import CHUNK, Decoder, Reading
from inference.prefix_cache import PrefixCache
from shell.cli import UserError
from text.tokenizer import StreamDecoder, Tokenizer

GREEDY_BELOW = 1e-5  # a temperature below this takes the likeliest token: logits divided by it would overflow


class SamplingSettings(Protocol):
    """How a row is sampled, as generate.py's flags of these names say."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float


class GenerationSettings(SamplingSettings, Protocol):
    """How any number of prompts is answered, as generate.py's flags of these names say."""

    stop: list[str]
    batch_size: int
    seed: int


class Score(NamedTuple):
    """The log-probability (natural) of a token, and the likeliest ids at its position with theirs, in order.

    They are the model's own: before penalties, temperature, min_p, top_k and top_p.
    """

    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Row:
    """One prompt and its answer.

    prompt: ids. reply: a `Reply`, or what has its `push`, `finish`, `done` and `length`. top: how many of the likeliest
    ids to keep with each token's log-probability; None for no log-probabilities at all. score_prompt: keep those of the
    prompt, too.

    An ensemble of several adapters is a row and its `members`, rows too, which have it as their `leader`. All are in
    the batch. The mean of their probabilities is what the leader's settings choose from, and all get that token.
    """

    prompt: list[int]
    reply: "Reply"
    settings: SamplingSettings
    seed: int
    top: int | None = None
    score_prompt: bool = False
    dropped: bool = False  # the answer is not wanted any more; set from any thread
    room: int = 0  # tokens that may be generated for it, known once it is in a batch
    generator: torch.Generator | None = None
    scores: list[Score] = field(default_factory=list)  # for each token generated, the one that ends it included
    prompt_scores: list[Score | None] = field(default_factory=list)  # for each token of the prompt; None for the first
    adapter: int = 1  # its number in several.py, where there are several
    leader: "Row | None" = None
    members: list["Row"] = field(default_factory=list)

    @property
    def going(self) -> bool:
        """Whether tokens are still generated for it."""
        return self.leader.going if self.leader else not (self.reply.done or self.dropped)

    def follow(self, prompt: list[int], adapter: int) -> None:
        """Let another adapter vote on each token: `prompt` is this row's as that adapter is asked."""
        self.members.append(Row(prompt, self.reply, self.settings, self.seed, adapter=adapter, leader=self))


class Batch:
    """Rows that are generated a token at a time: `add` them, then `step` while any are `going`.

    Or `begin` with them and `read` their prompts a chunk at a time, between steps of the rows that are there.

    Prompts of unequal lengths are padded on the left. Rows that have ended stay until half of the batch has ended, or
    until others join, if taking them out copies the cache. Where positions are learned they leave at once.

    prefixes: what prompts share is taken from it and not read again; what is read goes into it.
    """

    def __init__(self, decoder: Decoder, prefixes: PrefixCache | None = None):
        self.decoder, self.config, self.prefixes = decoder, decoder.model.config, prefixes
        self.device = decoder.model.model.embed_tokens.weight.device
        self.rows: list[Row] = []  # in the decoder's order, those included that have ended
        self.joining: list[Row] = []  # whose prompts are being read, in the order of `reading`
        self.reading: Reading | None = None
        self.ids: Tensor | None = None  # (B,) int64: the last token of each, which the decoder has not read yet
        self.seen: Tensor | None = None  # (B, V) bool: the tokens that have occurred in each
        self.counts: Tensor | None = None  # (B, V) int32: how often each token was generated

    @property
    def going(self) -> list[Row]:
        """The rows that have not ended."""
        return [row for row in self.rows if row.going]

    def add(self, rows: list[Row]) -> None:
        """Read the prompts of more rows and choose their first tokens. UserError if a prompt is empty or too long."""
        self.begin(rows)
        while self.joining:
            self.read()

    def begin(self, rows: list[Row]) -> None:
        """Begin to read the prompts of more rows, when none are being read. UserError as in `add`."""
        for row in rows:
            each, limits = (row, *row.members), (row.settings.max_new_tokens, self.config.max_position_embeddings)
            row.room = min(room_for(one.prompt, *limits) for one in each)
            for one in each:
                one.room, one.generator = row.room, torch.Generator(self.device).manual_seed(row.seed)
        rows = [one for row in rows for one in (row, *row.members)]
        self._remove_ended(self.going)
        longest = max(len(row.prompt) for row in rows)
        tokens = torch.tensor([[0] * (longest - len(row.prompt)) + row.prompt for row in rows], device=self.device)
        padding = torch.tensor([longest - len(row.prompt) for row in rows], device=self.device)
        for row in rows:
            row.prompt_scores += [None] * row.score_prompt
        scores = {i: partial(score_prompt, row) for i, row in enumerate(rows) if row.score_prompt}
        room = longest if self.rows else longest + max(row.room for row in rows)
        adapters = torch.tensor([row.adapter for row in rows], device=self.device)
        self.joining, self.reading = rows, self.decoder.read(tokens, padding, room, scores, adapters)
        if self.prefixes is not None:
            self.reading.reuse(self.prefixes)

    def read(self, positions: int = CHUNK) -> list[Row]:
        """Read at most so many positions more of the prompts; returns the rows that have joined, when all are read.

        Rows that are not wanted any more are read no further.
        """
        wanted = [i for i, row in enumerate(self.joining) if row.going]
        if wanted and len(wanted) < len(self.joining):
            self.joining = [self.joining[i] for i in wanted]
            self.reading.keep(wanted)
        if wanted:
            self.reading.advance(positions)
            if not self.reading.done:
                return []
            self._join()
        joined, self.joining, self.reading = self.joining, [], None
        return joined if wanted else []

    def unread(self, row: Row) -> int:
        """How many tokens of a row's prompt have to be read, as far as that is known before it is begun with."""
        if self.prefixes is None or row.score_prompt:
            return len(row.prompt)
        text = self.decoder.text(self.decoder.virtual + row.prompt, row.adapter)
        return len(text.ids) - self.prefixes.held(text)

    @torch.inference_mode()
    def _join(self):
        """The rows whose prompts have been read become part of the batch, with their first tokens."""
        rows = self.joining
        self._remove_ended(self.going)
        if self.prefixes is not None:
            self.reading.hold(self.prefixes)
        more = max(row.room - row.reply.length for row in (*self.rows, *rows))
        logits = self.decoder.take(self.reading, more)
        seen = torch.zeros(len(rows), self.config.vocab_size, dtype=torch.bool, device=self.device)
        for row, row_seen in zip(rows, seen, strict=True):
            for one in (row.leader or row, *(row.leader or row).members):
                row_seen[one.prompt] = True
        counts = torch.zeros_like(seen, dtype=torch.int32)
        state = (self._choose(rows, logits.float(), seen, counts), seen, counts)
        if self.rows:
            state = map(torch.cat, zip((self.ids, self.seen, self.counts), state, strict=True))
        self.ids, self.seen, self.counts = state
        self.rows += rows

    @torch.inference_mode()
    def step(self) -> None:
        """Choose the next token of each row that is going."""
        going = self.going
        if not going:  # another thread has dropped them since the caller looked
            return
        # A row that stays goes on, and may come past the last position that is learned.
        at_once = self.decoder.keeps_cheaply or self.config.learned_positions
        if at_once or 2 * len(going) <= len(self.rows):
            self._remove_ended(going)
        self.ids = self._choose(self.rows, self.decoder.step(self.ids).float(), self.seen, self.counts)

    def _remove_ended(self, going):
        """Keep only the rows `going`."""
        if not going:
            self.decoder.forget()
        elif len(going) < len(self.rows):
            kept = torch.tensor([i for i, row in enumerate(self.rows) if row in going], device=self.device)
            self.decoder.keep(kept)
            self.ids, self.seen, self.counts = self.ids[kept], self.seen[kept], self.counts[kept]
        self.rows = going

    def _choose(self, rows, logits, seen, counts):
        """The next ids (B,) int64 by logits (B, V) fp32; they are added to the replies, `seen` and `counts` (B, V)."""
        logits = average(logits, rows)
        settings = [row.settings for row in rows]
        changed = penalize_seen(logits, seen, settings)
        changed = penalize_generated(changed, counts, settings)
        ids = choose(changed, settings, [row.generator for row in rows])
        ids = ids[leaders(rows)] if any(row.leader for row in rows) else ids
        seen.scatter_(1, ids[:, None], True)
        counts.scatter_add_(1, ids[:, None], torch.ones_like(ids[:, None], dtype=counts.dtype))
        scored = [i for i, row in enumerate(rows) if row.going and row.room and row.top is not None]
        if scored:
            scores = score(logits[scored], ids[scored], max(rows[i].top for i in scored))
            for i, result in zip(scored, scores, strict=True):
                rows[i].scores.append(result._replace(top=result.top[: rows[i].top]))
        for row, id in zip(rows, ids.tolist(), strict=True):
            if row.leader:
                continue
            if row.going and row.room:
                row.reply.push(id)
            if row.going and row.reply.length == row.room:
                row.reply.finish()
        return ids


def room_for(prompt: list[int], max_new_tokens: int, context: int) -> int:
    """How many tokens can be generated after a prompt (ids), if a model's context has so many. Raises UserError."""
    if not prompt:
        raise UserError("the prompt is empty, and its style adds no token: the model needs at least one")
    if len(prompt) >= context + (max_new_tokens == 0):
        raise UserError(f"the prompt has {len(prompt)} tokens, the model's context is {context}: shorten it")
    return min(max_new_tokens, context - len(prompt))


def leaders(rows: list[Row]) -> list[int]:
    """For each of a batch's rows the place of its leader: its own, if it has none."""
    places = {row: place for place, row in enumerate(rows)}
    return [places[row.leader or row] for row in rows]


def average(logits: Tensor, rows: list[Row]) -> Tensor:
    """Logits (B, V) fp32, where those of an ensemble's rows are log of the mean of their probabilities.

    That is an ensemble's own distribution; penalties, temperature, min_p, top_k and top_p then do with it what they do
    with a model's.
    """
    groups = {}
    for place, leader in enumerate(leaders(rows)):
        groups.setdefault(leader, []).append(place)
    groups = [places for places in groups.values() if len(places) > 1]
    logits = logits.clone() if groups else logits
    for places in groups:
        logits[places] = logits[places].log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(places))
    return logits


def generate(
    decoder: Decoder, prompts: list[list[int]], replies: list["Reply"], s: SamplingSettings, seeds: list[int]
) -> Iterator[None]:
    """Extend each of `replies` with what follows its prompt, token by token; yields after each token.

    prompts: B lists of ids, none empty. seeds: B numbers. s: the settings of all rows.
    """
    yield from generate_rows(decoder, [Row(*row, s, seed) for *row, seed in zip(prompts, replies, seeds, strict=True)])


def generate_rows(decoder: Decoder, rows: list[Row]) -> Iterator[None]:
    """Extend the replies of all rows, token by token; yields after each token."""
    batch = Batch(decoder)
    batch.add(rows)
    yield
    while batch.going:
        batch.step()
        yield


def generate_all(
    decoder: Decoder,
    prompts: list[list[int]],
    replies: list["Reply"],
    s: GenerationSettings,
    progress: Callable[[int], None] = lambda more: None,
) -> None:
    """`generate` for any number of prompts, `s.batch_size` of about equal length at a time; prompt i has seed + i.

    progress: called with the number of replies that have just been finished.
    """
    pairs = enumerate(zip(prompts, replies, strict=True))
    run_all(decoder, [Row(*pair, s, (s.seed + i) % 2**63) for i, pair in pairs], s.batch_size, progress)


def run_all(
    decoder: Decoder, rows: list[Row], batch_size: int, progress: Callable[[int], None] = lambda more: None
) -> None:
    """Generate any number of rows, `batch_size` with prompts of about equal length at a time; an ensemble is one."""
    rows = sorted(rows, key=lambda row: -len(row.prompt))
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        for _ in generate_rows(decoder, batch):
            pass
        progress(len(batch))


# ----------------------------------------------------------------------------------------------- log-probabilities


def score(logits: Tensor, ids: Tensor, top: int) -> list[Score]:
    """A `Score` for each of ids (n,), by logits (n, V), with the `top` likeliest ids."""
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(1, ids[:, None])[:, 0].tolist()
    values, likeliest = logprobs.topk(min(top, logprobs.size(1)), dim=-1)
    pairs = zip(likeliest.tolist(), values.tolist(), strict=True)
    return [Score(value, list(zip(*pair, strict=True))) for value, pair in zip(chosen, pairs, strict=True)]


def score_prompt(row: Row, position: int, logits: Tensor) -> None:
    """Keep the scores of prompt tokens of a row, given the logits (n, V) after its tokens from `position` on."""
    following = row.prompt[position + 1 : position + 1 + len(logits)]
    ids = torch.tensor(following, dtype=torch.int64, device=logits.device)
    row.prompt_scores += score(logits[: len(ids)], ids, row.top or 0)


# -------------------------------------------------------------------------------------------------------- sampling


# In vLLM's order: penalties, temperature, min_p, top_k, top_p.


def penalize_seen(logits: Tensor, seen: Tensor, settings: list[SamplingSettings]) -> Tensor:
    """Logits (B, V) with each row's repetition_penalty on those of `seen` (B, V) bool, the prompt's included.

    A logit above 0 is divided by it, one below is multiplied by it: Keskar et al. 2019, CTRL, section 4.1.
    """
    penalties = [s.repetition_penalty for s in settings]
    if all(penalty == 1.0 for penalty in penalties):
        return logits
    penalties = torch.tensor(penalties, device=logits.device)[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / penalties, logits * penalties), logits)


def penalize_generated(logits: Tensor, counts: Tensor, settings: list[SamplingSettings]) -> Tensor:
    """Logits (B, V), less the penalties of OpenAI's API for what was generated. counts: (B, V), how often it was.

    frequency_penalty counts for each time that a token was generated, presence_penalty once.
    """
    if not any(s.frequency_penalty or s.presence_penalty for s in settings):
        return logits
    frequency = torch.tensor([s.frequency_penalty for s in settings], device=logits.device)[:, None]
    presence = torch.tensor([s.presence_penalty for s in settings], device=logits.device)[:, None]
    return logits - frequency * counts - presence * (counts > 0)


def choose(logits: Tensor, settings: list[SamplingSettings], generators: list[torch.Generator]) -> Tensor:
    """One token for each row of logits (B, V) fp32, by its own settings and generator: ids (B,) int64."""
    if not logits.isfinite().all():
        raise UserError("the model's logits are NaN or infinite: its weights or its adapter are damaged")
    ids = logits.argmax(dim=-1)
    sampled = [i for i, s in enumerate(settings) if s.temperature >= GREEDY_BELOW and s.top_p > 0]
    if sampled:
        ids[sampled] = sample(logits[sampled], [settings[i] for i in sampled], [generators[i] for i in sampled])
    return ids


def sample(logits: Tensor, settings: list[SamplingSettings], generators: list[torch.Generator]) -> Tensor:
    """The random part of `choose`, for rows whose temperature and top_p are above 0."""
    logits = logits / torch.tensor([s.temperature for s in settings], device=logits.device)[:, None]
    logits = keep_min_p(logits, [s.min_p for s in settings])
    logits = keep_top_k(logits, [s.top_k for s in settings])
    probabilities = keep_top_p(logits.softmax(dim=-1), [s.top_p for s in settings])
    rows = zip(probabilities, generators, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])


def keep_min_p(logits: Tensor, min_p: list[float]) -> Tensor:
    """Logits (B, V), -inf where the probability is below `min_p` times that of the row's likeliest; 0 keeps all.

    From Nguyen et al. 2024, Turning Up the Heat: Min-p Sampling.
    """
    if not any(min_p):
        return logits
    least = logits.amax(dim=-1, keepdim=True) + torch.tensor(min_p, device=logits.device).log()[:, None]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_k(logits: Tensor, top_k: list[int]) -> Tensor:
    """Logits (B, V), of which all but each row's `top_k` largest are -inf; 0 keeps all."""
    V = logits.size(-1)
    top_k = torch.tensor([k if 0 < k < V else V for k in top_k], device=logits.device)
    limited = top_k < V
    if not limited.any():
        return logits
    largest = logits.topk(int(top_k[limited].max())).values  # (B, the largest top_k)
    least = largest.gather(1, (top_k.clamp(max=largest.size(1)) - 1)[:, None])
    return logits.masked_fill((logits < least) & limited[:, None], -torch.inf)


def keep_top_p(probabilities: Tensor, top_p: list[float]) -> Tensor:
    """Probabilities (B, V), 0 but for each row's likeliest tokens that together have `top_p`; 1 keeps all.

    What remains need not add up to 1 (`torch.multinomial` takes weights).
    """
    top_p = torch.tensor([p if p < 1 else torch.inf for p in top_p], device=probabilities.device)[:, None]
    if top_p.isinf().all():
        return probabilities
    ordered, places = probabilities.sort(dim=-1, descending=True)
    outside = ordered.cumsum(dim=-1) - ordered >= top_p  # the tokens before it have reached top_p already
    return ordered.masked_fill(outside, 0).gather(1, places.argsort(dim=-1))


# --------------------------------------------------------------------------------------------------------- replies


class Reply:
    """One answer as it grows: `text`, and `done` once it has ended. The stop id or text that ends it is not kept.

    pieces: what each token added to the text, together all of it; a token that leaves a character unfinished adds "".
    stopped: a stop id or text ended it, not the limit of tokens. length: tokens so far, the stop id included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_ids: set[int],
        stop_texts: list[str] | tuple = (),
        start: bool = True,
        shown: dict[int, str] | None = None,
    ):
        """start: the answer begins a text; False: it continues one, and a space at its beginning counts.

        shown: special tokens (ids with their texts) that are part of the text; the others are not.
        """
        self.text, self.pieces, self.done, self.stopped, self.length = "", [], False, False, 0
        self._decoder, self._stop_ids, self._stop_texts = StreamDecoder(tokenizer, start=start), stop_ids, stop_texts
        self._shown = shown or {}

    def push(self, id: int) -> None:
        """Take the next token."""
        self.length += 1
        if id in self._stop_ids:
            self.finish()
            self.stopped = True
            return
        self.pieces.append("")
        if id in self._shown:
            self._append(self._decoder.flush() + self._shown[id])
        else:
            self._append(self._decoder.push(id))

    def finish(self) -> None:
        """End the answer, if it has not ended: what its last tokens left unfinished becomes text."""
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
    def safe_length(self) -> int:
        """How many characters can be shown: what may be the beginning of a stop text is held back."""
        if self.done:
            return len(self.text)
        held = [n for stop in self._stop_texts for n in range(1, len(stop)) if self.text.endswith(stop[:n])]
        return len(self.text) - max(held, default=0)


def clip(pieces: list[str], length: int) -> list[str]:
    """The pieces of the first `length` characters: those that begin later are left out, the last may be shortened."""
    kept = []
    for piece in pieces:
        if length <= 0:
            break
        kept.append(piece[:length])
        length -= len(piece)
    return kept
