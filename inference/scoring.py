"""How likely texts are to a model: log-likelihoods of continuations, for multiple choice and perplexity.

`score` takes pairs of ids (context, continuation) in any number and order. Continuations of one context, such as the
options of a question, share a row: the context is computed once, and the continuations are branches that do not see one
another (`model.Places`). Rows are sorted by length and cut into batches; logits are computed only at the positions that
predict a continuation. `plain_score` is the reference, one pair at a time.

Shapes: B rows, T positions of a row, D hidden size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from adapters.virtual_tokens import virtual_ids
from inference.several import use
from model import Places, Transformer
from ops.loss import LOSS_CHUNK
from shell.cli import UserError


class Score(NamedTuple):
    """What a model says of a continuation.

    logprob: log p(continuation | context), in nats. greedy: whether each of its tokens is the likeliest one.
    """

    logprob: float
    greedy: bool


@torch.inference_mode()
def plain_score(model: Transformer, context: list[int], continuation: list[int]) -> Score:
    """The `Score` of one continuation, from a forward pass over context and continuation: the reference for `score`."""
    context, continuation = fit(context, continuation, model.config.max_position_embeddings)
    context = virtual_ids(model) + context
    tokens = torch.tensor([context + continuation], device=device_of(model))
    logits = model(tokens)[0, len(context) - 1 : -1].float()  # position i predicts the token at i + 1
    targets = tokens[0, len(context) :]
    logprobs = logits.log_softmax(dim=-1).gather(1, targets[:, None])
    return Score(logprobs.sum().item(), bool((logits.argmax(dim=-1) == targets).all()))


@torch.inference_mode()
def score(
    model: Transformer,
    requests: list[tuple[list[int], list[int]]],
    batch_tokens: int = 2048,
    progress: Callable[[int], object] = lambda more: None,
    adapters: list[int] | None = None,
) -> list[Score]:
    """The `Score` of each of `requests`, pairs (context, continuation) of lists of ids, in their order.

    model: in evaluation mode. A context needs at least one token; an empty continuation has probability 1. Where a
    pair is longer than the model's context, the beginning of its context is cut off.
    batch_tokens: positions in the model at one time; a row that is longer is a batch of its own.
    progress: called with the number of requests that have just been done.
    adapters: which one each request has, where there are several (several.py); by default the first.
    Raises UserError for a continuation longer than the model's context, and for logits that are not finite.
    """
    config, results = model.config, [Score(0.0, True)] * len(requests)
    fitted, virtual = [fit(*request, config.max_position_embeddings) for request in requests], virtual_ids(model)
    fitted = [(virtual + context, continuation) for context, continuation in fitted]
    rows = share_contexts(fitted, 6 * config.hidden_size, batch_tokens, adapters)
    progress(sum(not continuation for _, continuation in fitted))
    for batch in cut_batches(rows, batch_tokens):
        scored = _score_batch(model, batch)
        for number, result in scored:
            results[number] = result
        progress(len(scored))
    return results


def rolling(
    model: Transformer,
    texts: list[list[int]],
    prefix_id: int,
    length: int | None = None,
    batch_tokens: int = 2048,
    progress: Callable[[int], object] = lambda more: None,
) -> list[float]:
    """log p of each of `texts` (lists of ids), read in windows of `length` tokens, by default the model's context.

    The perplexity of all is exp(-sum of these / sum of their lengths). The other arguments are those of `windows` and
    `score`.
    """
    length = length or model.config.max_position_embeddings
    cut = [list(windows(text, prefix_id, length)) for text in texts]
    scores = iter(score(model, [window for text in cut for window in text], batch_tokens, progress))
    return [sum(next(scores).logprob for _ in text) for text in cut]


def windows(ids: list[int], prefix_id: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield a text as pairs (context, continuation), for `score`, so that each token is predicted once.

    A continuation is the next `length` tokens or what is left of them; its context is `prefix_id`, such as BOS, for the
    first one, and as many of the tokens before it as still fit for the others, at least one. (The windows of lm-eval's
    `get_rolling_token_windows` with context_len 1, after `make_disjoint_window`.)
    """
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        yield ids[end - length - 1 : start] if start else [prefix_id], ids[start:end]


# ----------------------------------------------------------------------------------------------------- rows and batches


def fit(context: list[int], continuation: list[int], limit: int) -> tuple[list[int], list[int]]:
    """The pair, its context cut off at the beginning to what a model of `limit` positions has room for."""
    if not context:
        raise ValueError("a context is empty: put a token such as BOS in it")
    if len(continuation) > limit:
        raise UserError(f"a continuation has {len(continuation)} tokens, the model's context is {limit}: shorten it")
    return context[-(limit + 1 - len(continuation)) :], continuation  # the last token is predicted, but never read


@dataclass
class Row:
    """A context and its continuations, `ends`: pairs (number of the request, ids)."""

    context: list[int]
    adapter: int = 1
    ends: list[tuple[int, list[int]]] = field(default_factory=list)
    length: int = 0  # positions: all tokens but the last one of each continuation


def share_contexts(
    requests: list[tuple[list[int], list[int]]],
    position_cost: int,
    batch_tokens: int,
    adapters: list[int] | None = None,
) -> list[Row]:
    """Put requests (context, continuation) that have the same context, and adapter, together into `Row`s.

    Attention computes all T x T products of a row, also those that are masked because they belong to two branches. A
    continuation joins a row where these wasted products cost less than computing the context once more.
    position_cost: how many products of attention cost as much as the rest of a position's work.
    """
    rows, newest = [], {}  # newest: the row that was made last, by adapter and context
    adapters = adapters or [1] * len(requests)
    for number, ((context, continuation), adapter) in enumerate(zip(requests, adapters, strict=True)):
        if not continuation:
            continue
        key = (adapter, *context)
        row, length, more = newest.get(key), len(context), len(continuation) - 1
        wasted = 0 if row is None else 2 * (row.length - length) * more
        if row is None or row.length + more > batch_tokens or wasted > length * (position_cost + length):
            row = newest[key] = Row(context, adapter, length=length)
            rows.append(row)
        row.ends.append((number, continuation))
        row.length += more
    return rows


def cut_batches(rows: list[Row], batch_tokens: int) -> Iterator[list[Row]]:
    """Yield lists of rows, the longest first, of up to `batch_tokens` positions each, padding included."""
    rows = sorted(rows, key=lambda row: -row.length)
    while rows:
        count = max(1, batch_tokens // rows[0].length)
        yield rows[:count]
        rows = rows[count:]


# ----------------------------------------------------------------------------------------------------------- a batch


def _score_batch(model, rows):
    """[(number of a request, its `Score`)] for all requests in these rows."""
    tokens, tree = _lay_out(rows, device_of(model))
    adapters = torch.tensor([row.adapter for row in rows], device=tokens.device)
    use(model, adapters)
    x = model.hidden_states(tokens, tree=tree).flatten(0, 1)  # (B * T, D)
    places, targets = [], []
    for number, row in enumerate(rows):
        start, before = number * tokens.size(1), len(row.context) - 1
        end = before + 1
        for _, continuation in row.ends:  # the context's last position predicts the first token of each
            places += [start + before, *range(start + end, start + end + len(continuation) - 1)]
            targets += continuation
            end += len(continuation) - 1
    logprobs, greedy = _of_targets(model, x, places, targets, adapters.repeat_interleave(tokens.size(1)))
    ends = [end for row in rows for end in row.ends]
    lengths = [len(continuation) for _, continuation in ends]
    parts = zip(ends, logprobs.split(lengths), greedy.split(lengths), strict=True)
    return [(number, Score(sums.sum().item(), bool(hits.all()))) for (number, _), sums, hits in parts]


def _lay_out(rows, device):
    """Rows as tokens (B, T) int64, padded on the right, and their `Places`; None where the causal mask is enough."""
    T = max(row.length for row in rows)
    tokens, positions, branches = (torch.zeros(len(rows), T, dtype=torch.int64) for _ in range(3))
    for row, row_tokens, row_positions, row_branches in zip(rows, tokens, positions, branches, strict=True):
        end = start = len(row.context)
        row_tokens[:start], row_positions[:start] = torch.tensor(row.context), torch.arange(start)
        row_branches[start:] = -1  # what follows the last end is padding
        for branch, (_, continuation) in enumerate(row.ends, start=1):
            part = slice(end, end + len(continuation) - 1)
            row_tokens[part] = torch.tensor(continuation[:-1], dtype=torch.int64)
            row_positions[part] = torch.arange(start, start + len(continuation) - 1)
            row_branches[part] = branch
            end = part.stop
    branching = any(sum(len(continuation) > 1 for _, continuation in row.ends) > 1 for row in rows)
    return tokens.to(device), Places(positions.to(device), branches.to(device)) if branching else None


def _of_targets(model, x, places, targets, adapters):
    """log p (n,) fp64 of targets, and whether each is the likeliest token (n,) bool.

    places: for each target the row of x (B * T, D) that predicts it. adapters (B * T,): which one each row has.
    """
    places, targets = (torch.tensor(numbers, device=x.device) for numbers in (places, targets))
    logprobs, greedy = [], []
    for place, target in zip(places.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
        use(model, adapters[place])
        logits = model.logits(x[place]).float()
        logprobs.append(-F.cross_entropy(logits, target, reduction="none"))
        greedy.append(logits.argmax(dim=-1) == target)
    logprobs, greedy = torch.cat(logprobs).double().cpu(), torch.cat(greedy).cpu()
    if not logprobs.isfinite().all():
        raise UserError("the model's logits are NaN or infinite: its weights or its adapter are damaged")
    return logprobs, greedy


def device_of(model: Transformer) -> torch.device:
    """The device that the model's token ids must be on."""
    return model.model.embed_tokens.weight.device
