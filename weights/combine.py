"""Several LoRA adapters over one base as one: `COMBINATIONS` has the ways, those of PEFT's `add_weighted_adapter`.

Each layer is combined by itself, from the adapters that are on it. With s = alpha / r, an adapter adds s B A to a
weight. There are three places to combine them in:

- cat: end to end, [w1 s1 A1; w2 s2 A2] and [B1, B2]: exactly the sum of all w s B A, which is task arithmetic (Ilharco
  et al. 2022, arXiv 2212.04089). The rank is the sum of theirs.
- the factors: all A become one and all B become one, each weighted by sqrt|w s|. Ranks must be equal. B A then has
  products of one adapter's B with another's A: a rough way, but PEFT's usual one.
- the products (..._svd): all s B A become one matrix, of which the largest singular values are kept.

How several matrices become one is a merge, a function like `ties`. To add a way: a merge, and a line in `COMBINATIONS`.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora import AdapterConfig, adapters, linear_layers, match_pattern, wrap
from model import Transformer
from shell.cli import UserError
from shell.progress import bar
from weights import peft_format
from weights.peft_layout import ends, patterns
from weights.replaced import EMBEDDING
from weights.stored import Weights


@dataclass
class Options:
    """What a combination may ask for. density: the share of values that is kept. sign: how `majority_sign` counts.

    rank: of the result of an SVD. generator: of what is drawn.
    """

    density: float | None = None
    sign: str = "total"
    rank: int | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)


class LowRank(NamedTuple):
    """What an adapter adds to a layer: scale * B A. A (r, in), B (out, r), fp32."""

    A: Tensor
    B: Tensor
    scale: float


Merge = Callable[[Tensor, Tensor, Options], Tensor]  # stacked (K, ...) and weights (K,) to one (...)


# -------------------------------------------------------------------------------------------------------------- merges


def weighted_sum(tensors: Tensor, weights: Tensor, o: Options) -> Tensor:
    """The sum over K of weights (K,) * tensors (K, ...)."""
    return (tensors * _over(weights, tensors)).sum(0)


def ties(tensors: Tensor, weights: Tensor, o: Options) -> Tensor:
    """TIES (Yadav et al. 2023, arXiv 2306.01708): trim, elect a sign, and take the mean of those that have it."""
    return _elected(trim(tensors, o), weights, o)


def dare_linear(tensors: Tensor, weights: Tensor, o: Options) -> Tensor:
    """DARE (Yu et al. 2023, arXiv 2311.03099): drop values at random, scale the others up, and add."""
    return weighted_sum(drop(tensors, o), weights, o)


def dare_ties(tensors: Tensor, weights: Tensor, o: Options) -> Tensor:
    """DARE's dropping in the place of TIES's trimming."""
    return _elected(drop(tensors, o), weights, o)


def magnitude_prune(tensors: Tensor, weights: Tensor, o: Options) -> Tensor:
    """Trim as in TIES, and add."""
    return weighted_sum(trim(tensors, o), weights, o)


def trim(tensors: Tensor, o: Options) -> Tensor:
    """Tensors (K, ...), zero but for the share `density` of each that is largest by its absolute value."""
    flat = tensors.flatten(1)
    largest = flat.abs().topk(int(o.density * flat.size(1)), dim=1).indices
    return torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest)).view_as(tensors)


def drop(tensors: Tensor, o: Options) -> Tensor:
    """Tensors (K, ...), each value zero with the probability 1 - `density`, and else divided by `density`."""
    if o.density >= 1:
        return tensors
    kept = [torch.bernoulli(torch.full_like(tensor, o.density), generator=o.generator) for tensor in tensors]
    return tensors * torch.stack(kept) / o.density


def majority_sign(tensors: Tensor, how: str) -> Tensor:
    """The sign (...) that most of tensors (K, ...) have: by their sum ("total") or by their number ("frequency")."""
    votes = tensors if how == "total" else tensors.sign()
    return torch.where(votes.sum(0) >= 0, 1, -1)


def _elected(tensors, weights, o):
    agree = tensors.sign() == majority_sign(tensors, o.sign)
    return (tensors * _over(weights, tensors) * agree).sum(0) / agree.sum(0).clamp(min=1)


def _over(weights, tensors):
    return weights.view(-1, *[1] * (tensors.dim() - 1))


# -------------------------------------------------------------------------------------------------------- combinations


def concatenate(parts: list[LowRank], weights: list[float], o: Options) -> tuple[Tensor, Tensor]:
    """A and B of all adapters of a layer end to end."""
    A = [part.A * (weight * part.scale) for part, weight in zip(parts, weights, strict=True)]
    return torch.cat(A), torch.cat([part.B for part in parts], dim=1)


def by_factors(merge: Merge) -> Callable:
    """Merge all A to one, and all B to one. A weight below 0 turns the sign of A alone."""

    def combine(parts, weights, o):
        scales = torch.tensor([weight * part.scale for part, weight in zip(parts, weights, strict=True)])
        roots = scales.abs().sqrt()
        signs = torch.where(scales >= 0, 1, -1)
        A = merge(torch.stack([part.A for part in parts]), roots * signs, o)
        return A, merge(torch.stack([part.B for part in parts]), roots, o)

    return combine


def by_products(merge: Merge) -> Callable:
    """Merge all scale * B A to one, and keep the largest singular values: A has the right vectors, B the rest."""

    def combine(parts, weights, o):
        products = torch.stack([part.scale * (part.B @ part.A) for part in parts])
        U, S, V = torch.linalg.svd(merge(products, torch.tensor(weights), o), full_matrices=False)
        return V[: o.rank].contiguous(), U[:, : o.rank] * S[: o.rank]

    return combine


COMBINATIONS = {
    "linear": by_factors(weighted_sum),
    "cat": concatenate,
    "svd": by_products(weighted_sum),
    "ties": by_factors(ties),
    "ties_svd": by_products(ties),
    "dare_linear": by_factors(dare_linear),
    "dare_linear_svd": by_products(dare_linear),
    "dare_ties": by_factors(dare_ties),
    "dare_ties_svd": by_products(dare_ties),
    "magnitude_prune": by_factors(magnitude_prune),
    "magnitude_prune_svd": by_products(magnitude_prune),
}


def check_options(kind: str, weights: list[float] | None, options: dict, number: int) -> None:
    """Raise UserError for a flag that a combination of `number` adapters needs and has not, or does not look at.

    options: the flags density, majority_sign, svd_rank and seed, None where they are not given.
    """
    if weights is None or len(weights) != number:
        count = "none" if weights is None else len(weights)
        raise UserError(f"--weights: there are {number} adapters, and {count} of these: give one for each")
    if not all(map(math.isfinite, weights)):
        raise UserError(f"--weights {weights}: they must be numbers")
    prunes, signs = kind.startswith(("ties", "dare", "magnitude")), "ties" in kind
    asked = {"density": prunes, "majority_sign": signs, "svd_rank": kind.endswith("svd"), "seed": "dare" in kind}
    for flag, used in asked.items():
        if options[flag] is not None and not used:
            raise UserError(f"--{flag} does nothing with --combine {kind}: leave it out")
    if prunes and options["density"] is None:
        raise UserError(f"--combine {kind} needs --density, the share of values to keep, such as 0.5")


# ----------------------------------------------------------------------------------------------------- whole adapters


def combine(
    model: Transformer, base: Weights, folders: list[Path], kind: str, weights: list[float], o: Options
) -> AdapterConfig:
    """Put the combination of the adapters in `folders` over a model without memory. Returns its `AdapterConfig`.

    base: the model's weights. Raises UserError for what cannot be combined: other kinds than LoRA, and what PEFT
    refuses too: unequal ranks where factors are merged, and parameters of the base that were trained whole.
    """
    names, each = list(linear_layers(model)), [_low_ranks(model, base, folder) for folder in folders]
    ranks = [max(len(part.A) for part in own.values()) for own in each]
    if kind.endswith("svd") and o.rank is None:
        o.rank = max(ranks)
    found = {}
    for name in bar(names, "combining"):
        own = [(parts[name], weight) for parts, weight in zip(each, weights, strict=True) if name in parts]
        if own:
            parts, used = zip(*own, strict=True)
            if COMBINATIONS[kind] is not concatenate and not kind.endswith("svd"):
                _check_ranks(name, kind, [len(part.A) for part in parts])
            found[name] = COMBINATIONS[kind](list(parts), list(used), o)
    config = _config_of({name: len(A) for name, (A, _) in found.items()}, names)
    wrap(model, config, list(found))
    for name, adapter in adapters(model).items():
        adapter.lora_A, adapter.lora_B = (nn.Parameter(factor.contiguous()) for factor in found[name])
    return config


def _config_of(ranks: dict[str, int], names: Collection[str]) -> AdapterConfig:
    """The `AdapterConfig` of adapters with these ranks, by layer, and a scale of 1. names: of all linear layers."""
    r = max(ranks.values())
    other = patterns(ranks, r)
    return AdapterConfig(r=r, alpha=r, targets=tuple(ends(ranks, names)), rank_pattern=other, alpha_pattern=dict(other))


def _low_ranks(model, base, folder):
    """What the adapter in a folder adds to each of a model's layers: a `LowRank` by name."""
    stored = peft_format.read_for(model, folder)
    if stored.config.kind != "lora":
        raise UserError(f"{folder} is a {stored.config.kind} adapter: only LoRA can be combined")
    replaced = stored.replaced
    changed = replaced.names() - replaced.base.keys()
    changed |= {name for name, tensor in replaced.base.items() if not _is_as_in(base, name, tensor)}
    if changed:
        raise UserError(f"{folder} changes {', '.join(sorted(changed))} as a whole: that cannot be combined")
    peft_format.load_adapter(_without_adapters(model), folder)  # into no memory, for its checks
    parts = {}
    for name, tensors in stored.tensors.items():
        A, B = (tensors[key].float() for key in ("lora_A", "lora_B"))
        alpha = match_pattern(stored.config.alpha_pattern, name, stored.config.alpha)
        parts[name] = LowRank(A, B, alpha / (math.sqrt(len(A)) if stored.config.rslora else len(A)))
    return parts


def _is_as_in(base, name, tensor):
    """Whether the base has this tensor too: PEFT saves embedding and head beside an adapter on them."""
    stored = base.read(name if name in base.dtypes else EMBEDDING)  # of a tied head
    return stored.shape == tensor.shape and torch.equal(stored.float(), tensor.float())


def _without_adapters(model):
    with torch.device("meta"):
        return Transformer(model.config)


def _check_ranks(name, kind, ranks):
    if len(set(ranks)) > 1:
        numbers = " and ".join(map(str, ranks))
        raise UserError(
            f"--combine {kind}: the adapters have the ranks {numbers} on {name}: they must be equal (cat and those "
            "with svd take unequal ones)"
        )
