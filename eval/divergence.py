"""How far a model is from another one on the same text: KL divergence, agreement of the likeliest token, perplexity.

What is kept of the reference is its final hidden state at each position that counts, (N, D) fp32, and its head, (V, D):
the log-probabilities (N, V) are computed from them again, a chunk at a time. Written down, they would take V / D times
as much (85 for SmolLM2, 8 for Llama-2-7B), or be rounded to 16 bits, in which a divergence below 1e-4 is noise; and the
two models need not be in memory at one time.

A text is a list of sequences, each a pair of tokens and targets, both (T,) int64; targets are IGNORE where none counts.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from model import IGNORE

CHUNK = 256  # positions whose log-probabilities exist at one time


class Reference(NamedTuple):
    """hidden: (N, D) fp32, at the positions with a target, in their order. head: (V, D) fp32."""

    hidden: torch.Tensor
    head: torch.Tensor

    def log_probabilities(self, rows, device):
        """(n, V) fp32, at the positions `rows`, a slice."""
        return F.linear(self.hidden[rows].to(device), self.head).log_softmax(dim=-1)


def micro_batches(text, positions):
    """Yield tokens and targets (1, T) and offsets: sequences end to end, in their order, in at most so many positions.

    A sequence that is longer is a micro-batch by itself.
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
def target_states(model, text, positions):
    """Yield for each micro-batch the final hidden states (n, D) at its targets, and the targets (n,)."""
    device = model.model.embed_tokens.weight.device
    for tokens, targets, offsets in micro_batches(text, positions):
        hidden = model.hidden_states(tokens.to(device), offsets=offsets)
        rows = targets.flatten() != IGNORE
        yield hidden.flatten(0, 1)[rows.to(device)], targets.flatten()[rows].to(device)


def make_reference(model, text, positions):
    """What is kept of a model, on the CPU."""
    hidden = [states.float().cpu() for states, _ in target_states(model, text, positions)]
    return Reference(torch.cat(hidden), head_weight(model).cpu())


def head_weight(model):
    """The head's weight, (V, D) fp32, with what an adapter adds to it."""
    head = model.lm_head
    weight = head.merged_weight() if hasattr(head, "merged_weight") else head.dequantize(torch.float32)
    return weight.detach()


def save_references(path, references):
    """Write `Reference`s, by name, to a file. Those that have the same head share it there."""
    tensors, heads = {}, []
    for name, reference in references.items():
        number = next((n for n, head in enumerate(heads) if torch.equal(head, reference.head)), len(heads))
        heads[number:] = heads[number:] or [reference.head]
        tensors[f"hidden/{number}/{name}"] = reference.hidden
        tensors[f"head/{number}"] = reference.head
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def load_references(path, device):
    """What `save_references` wrote: the hidden states memory-mapped, the heads on the device."""
    tensors = load_file(path)
    heads = {name.split("/")[1]: t.to(device) for name, t in tensors.items() if name.startswith("head/")}
    hidden = {name: t for name, t in tensors.items() if name.startswith("hidden/")}
    return {name.split("/", 2)[2]: Reference(t, heads[name.split("/")[1]]) for name, t in hidden.items()}


@torch.inference_mode()
def compare(model, text, positions, references):
    """How a model does on a text, and how far it is from each of `references` (by name) there.

    The model's logits are its own head's, in its own precision. Returns a dict: the number of "targets", "loss" (nats a
    target), "perplexity", and for each reference KL(reference || model) in nats a target, "kl", and the share of
    targets where both have the same likeliest token, "agreement".
    """
    count, loss = 0, 0.0
    kl, agreed = dict.fromkeys(references, 0.0), dict.fromkeys(references, 0)
    for states, targets in target_states(model, text, positions):
        for part, wanted in zip(states.split(CHUNK), targets.split(CHUNK), strict=True):
            log_q = model.lm_head(part).float().log_softmax(dim=-1)
            loss -= log_q.gather(1, wanted[:, None]).double().sum().item()
            for name, reference in references.items():
                log_p = reference.log_probabilities(slice(count, count + len(part)), part.device)
                kl[name] += divergence(log_p, log_q).double().sum().item()
                agreed[name] += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
            count += len(part)
    far = {name: {"kl": kl[name] / count, "agreement": agreed[name] / count} for name in references}
    return {"targets": count, "loss": loss / count, "perplexity": math.exp(min(loss / count, 700)), **far}


def divergence(log_p, log_q):
    """KL(p || q) of each row, in nats: (n, V) fp32 and (n, V) fp32 give (n,).

    q - p adds up to nothing, but takes away the error that log_p and log_q have in common for a whole row, from the
    rounding of their normalisation: without it a divergence is off by 3e-7, with it by 3e-8 (and more if it is large).
    """
    p = log_p.exp()
    return (p * (log_p - log_q) + (log_q.exp() - p)).sum(dim=-1)
