"""How far a model is from another one on the same text: KL divergence, agreement of the likeliest token, perplexity.

Of the reference its final hidden state at each target position is kept, (N, D) fp32, and its head, (V, D); the
log-probabilities (N, V) are computed from them again, a chunk at a time. Stored themselves they would take V / D times
as much (85 for SmolLM2, 8 for Llama-2-7B), or be rounded to 16 bits, in which a divergence below 1e-4 is noise. And the
two models need not be in memory at the same time.

A text is a list of sequences, each a pair of tokens and targets, both (T,) int64; targets are IGNORE where the position
does not count. Shapes: N targets of a text, n of them, D hidden size, V vocabulary.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import IGNORE, Transformer
from ops.activation import plain_softcap
from ops.loss import LOSS_CHUNK

Text = list[tuple[Tensor, Tensor]]


class Head(NamedTuple):
    """A model's head in fp32, with an adapter's part of it. weight: (V, D). bias: (V,) or None. softcap: () or None."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: Tensor | None = None

    def log_probabilities(self, hidden: Tensor) -> Tensor:
        """(n, V) fp32 of final hidden states (n, D) fp32."""
        return plain_softcap(F.linear(hidden, self.weight, self.bias), self.softcap).log_softmax(dim=-1)

    def to(self, device: torch.device | str) -> "Head":
        """The same on another device."""
        return Head(*(None if tensor is None else tensor.to(device) for tensor in self))

    def equals(self, other: "Head") -> bool:
        """Whether both are the same."""
        pairs = zip(self, other, strict=True)
        return all(a is b is None or a is not None is not b and torch.equal(a, b) for a, b in pairs)


class Reference(NamedTuple):
    """What is kept of a model on a text. hidden: (N, D) fp32, its final hidden states at the targets, in order."""

    hidden: Tensor
    head: Head

    def log_probabilities(self, rows: slice, device: torch.device) -> Tensor:
        """The log-probabilities (n, V) fp32 at the targets `rows`."""
        return self.head.log_probabilities(self.hidden[rows].to(device))


def micro_batches(text: Text, positions: int) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Yield micro-batches: tokens and targets (1, T) of sequences end to end, in order, and the offsets of each.

    T is at most `positions`, but a sequence that is longer is a micro-batch by itself.
    """
    waiting, length = [], 0
    for sequence in text:
        if waiting and length + len(sequence[0]) > positions:
            yield _end_to_end(waiting)
            waiting, length = [], 0
        waiting.append(sequence)
        length += len(sequence[0])
    if waiting:
        yield _end_to_end(waiting)


def _end_to_end(sequences):
    tokens, targets = (torch.cat(parts)[None] for parts in zip(*sequences, strict=True))
    ends = torch.tensor([len(tokens) for tokens, _ in sequences]).cumsum(0)
    return tokens, targets, [0, *ends.tolist()]


@torch.inference_mode()
def target_states(model: Transformer, text: Text, positions: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each micro-batch the final hidden states (n, D) at its targets, and the targets (n,) int64."""
    device = model.model.embed_tokens.weight.device
    for tokens, targets, offsets in micro_batches(text, positions):
        hidden = model.hidden_states(tokens.to(device), offsets=offsets)
        rows = targets.flatten() != IGNORE
        yield hidden.flatten(0, 1)[rows.to(device)], targets.flatten()[rows].to(device)


def make_reference(model: Transformer, text: Text, positions: int) -> Reference:
    """The `Reference` of a model on a text, in the CPU's memory. positions: of a micro-batch."""
    hidden = [states.float().cpu() for states, _ in target_states(model, text, positions)]
    return Reference(torch.cat(hidden), head_of(model).to("cpu"))


def head_of(model: Transformer) -> Head:
    """The head of a model."""
    layer, softcap = model.lm_head, model.config.logit_softcap
    weight = layer.merged_weight() if hasattr(layer, "merged_weight") else layer.dequantize(torch.float32)
    bias = getattr(layer, "base", layer).bias
    softcap = None if softcap is None else torch.tensor(softcap, device=weight.device)
    return Head(weight.detach(), None if bias is None else bias.detach().float(), softcap)


def save_references(path: Path, references: dict[str, Reference]) -> None:
    """Write `Reference`s, by name, to a file. A head that several of them have is written once."""
    tensors, heads = {}, []
    for name, reference in references.items():
        number = next((n for n, head in enumerate(heads) if head.equals(reference.head)), len(heads))
        heads[number:] = heads[number:] or [reference.head]
        tensors[f"hidden/{number}/{name}"] = reference.hidden
    for number, head in enumerate(heads):
        parts = head._asdict().items()
        tensors |= {f"head/{number}/{part}": tensor for part, tensor in parts if tensor is not None}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def load_references(path: Path, device: torch.device) -> dict[str, Reference]:
    """Read what `save_references` wrote: the hidden states memory-mapped, the heads on the device."""
    tensors = load_file(path)
    heads = {}
    for name, tensor in tensors.items():
        if name.startswith("head/"):
            _, number, part = name.split("/")
            heads.setdefault(number, {})[part] = tensor
    heads = {number: Head(**parts).to(device) for number, parts in heads.items()}
    hidden = {name: t for name, t in tensors.items() if name.startswith("hidden/")}
    return {name.split("/", 2)[2]: Reference(t, heads[name.split("/")[1]]) for name, t in hidden.items()}


@torch.inference_mode()
def compare(model: Transformer, text: Text, positions: int, references: dict[str, Reference]) -> dict:
    """A model's loss on a text, and how far it is from each of `references` (by name) there.

    The model's logits are computed by its own head in its own precision. Returns a dict: the number of "targets",
    "loss" (nats a target), "perplexity", and for each reference a dict of "kl", KL(reference || model) in nats a
    target, and "agreement", the share of targets where both have the same likeliest token.
    """
    count, loss = 0, 0.0
    kl, agreed = dict.fromkeys(references, 0.0), dict.fromkeys(references, 0)
    for states, targets in target_states(model, text, positions):
        for part, wanted in zip(states.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
            log_q = model.logits(part).float().log_softmax(dim=-1)
            loss -= log_q.gather(1, wanted[:, None]).double().sum().item()
            for name, reference in references.items():
                log_p = reference.log_probabilities(slice(count, count + len(part)), part.device)
                kl[name] += divergence(log_p, log_q).double().sum().item()
                agreed[name] += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
            count += len(part)
    distances = {name: {"kl": kl[name] / count, "agreement": agreed[name] / count} for name in references}
    return {"targets": count, "loss": loss / count, "perplexity": math.exp(min(loss / count, 700)), **distances}


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, in nats: (n,) from log-probabilities (n, V) and (n, V), all fp32.

    The sum of q - p over a row is 0 but for rounding, and cancels the error that the rounded normalisation of log_p and
    log_q has left in the whole row: without it a divergence is off by 3e-7, with it by 3e-8 (more if it is large).
    """
    p = log_p.exp()
    return (p * (log_p - log_q) + (log_q.exp() - p)).sum(dim=-1)
