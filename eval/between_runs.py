"""How far the models of two runs are from each other, and each from its base, on the first one's validation samples.

One model is in memory at a time: of each only what a `Reference` keeps (divergence.py) stays.
"""

from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import torch

from batching import open_samples, read_data_info, shift
from eval.divergence import Reference, Text, divergence, make_reference
from eval.quality_texts import check_text, first_positions
from ops.core_sharing import share_cores
from ops.loss import LOSS_CHUNK
from shell.cli import UserError
from text.tokenizer import Tokenizer
from weights.checkpoint import find_base, load_model, read_config, trained_quantization


class Trained(NamedTuple):
    """The model that a run ended with. adapter_dir: None if all weights were trained; then they are in `weights_dir`.

    base_dir: the model folder that it was trained on, quantised as `quantize` says.
    """

    name: str
    base_dir: Path
    quantize: Any
    adapter_dir: Path | None
    weights_dir: Path


class Distance(NamedTuple):
    """KL(one || other) in nats a target, and the share of targets where both have the same likeliest token."""

    one: str
    other: str
    kl: float
    agreement: float


def trained(name: str, final: Path, settings: dict[str, Any]) -> Trained:
    """The model in the folder `final` of a run with these settings. Raises UserError if it or its base is not there."""
    if not final.is_dir():
        raise UserError(f"{name} has no final/: it has not finished")
    if (final / "adapter_config.json").is_file():
        base = find_base(final)
        return Trained(name, base, trained_quantization(final, None), final, base)
    return Trained(name, Path(settings["checkpoint_dir"]), None, None, final)


def distances(a: Trained, b: Trained, data_dir: Path, max_tokens: int, positions: int) -> tuple[int, list[Distance]]:
    """The number of targets, and how far the models are from each other, and from their bases.

    data_dir: prepared data, of whose validation samples up to `max_tokens` positions are read. positions: of a
    micro-batch. Raises UserError for models that do not have the same tokens, and for data that are not theirs.
    """
    check_same_tokens(a, b)
    text = validation_text(a, data_dir, max_tokens)
    share_cores()
    made = {}  # by what is loaded: runs may share their base

    def reference(folder: Path, quantize: Any, adapter_dir: Path | None) -> Reference:
        key = folder.resolve(), str(quantize), adapter_dir
        if key not in made:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = load_model(folder, torch.float32, device, quantize, adapter_dir)
            made[key] = with_shared_head(make_reference(model, text, positions), list(made.values()))
        return made[key]

    pairs = list(permutations([a, b]))
    of = {run.name: reference(run.weights_dir, run.quantize, run.adapter_dir) for run in (a, b)}
    found = [distance(one.name, of[one.name], other.name, of[other.name]) for one, other in pairs]
    for run in (a, b):
        base = reference(run.base_dir, run.quantize, None)
        found.append(distance(f"base of {run.name}", base, run.name, of[run.name]))
    return len(of[a.name].hidden), found


def with_shared_head(new: Reference, others: list[Reference]) -> Reference:
    """The same, but a head that one of the others has is in memory once."""
    return new._replace(head=next((other.head for other in others if new.head.equals(other.head)), new.head))


@torch.inference_mode()
def distance(name: str, one: Reference, other_name: str, other: Reference) -> Distance:
    """How far two models are from each other on a text, by what was kept of them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kl, agreed, count = 0.0, 0, len(one.hidden)
    one, other = (reference._replace(head=reference.head.to(device)) for reference in (one, other))
    for first in range(0, count, LOSS_CHUNK):
        rows = slice(first, first + LOSS_CHUNK)
        log_p, log_q = (reference.log_probabilities(rows, device) for reference in (one, other))
        kl += divergence(log_p, log_q).double().sum().item()
        agreed += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
    return Distance(name, other_name, kl / count, agreed / count)


def check_same_tokens(a: Trained, b: Trained) -> None:
    """Raise UserError unless both models have one tokenizer and one vocabulary."""
    sizes, hashes = zip(*[(read_config(t.weights_dir).vocab_size, Tokenizer(t.weights_dir).file_hash())
                          for t in (a, b)], strict=True)  # fmt: skip
    if sizes[0] != sizes[1]:
        raise UserError(f"{a.name} has a vocabulary of {sizes[0]} tokens, {b.name} of {sizes[1]}")
    if hashes[0] != hashes[1]:
        raise UserError(f"{a.name} and {b.name} have different tokenizers")


def validation_text(a: Trained, data_dir: Path, max_tokens: int) -> Text:
    """The first validation samples of prepared data; of a preference pair both answers."""
    if not Tokenizer(a.base_dir).fits(read_data_info(data_dir)):
        raise UserError(f"{data_dir} was made with another tokenizer or chat template than the model of {a.name} has")
    samples = open_samples(data_dir, "val")
    if not len(samples):
        raise UserError(f"{data_dir} has no validation samples")
    sequences = (shift(*sequence) for i in range(len(samples)) for sequence in samples.sequences(i))
    text = first_positions(sequences, max_tokens)
    check_text(text, read_config(a.base_dir), str(data_dir))
    return text
