"""Adapters whose start was taken from the base's weights, as PiSSA's and OLoRA's: in a folder that any base takes.

Such an adapter starts at A_0 and B_0 over the rest of the base, W - s B_0 A_0, and is trained to A and B. Over the base
as it was it is an ordinary LoRA of twice the rank, which PEFT calls a converted one and every program loads:

    W - s B_0 A_0 + s B A = W + s [B, -B_0] [A; A_0]

That is what a folder holds. Beside it, in the tensors' metadata, is what A and B alone are like, so that our loading
takes A_0 and B_0 from the base again: a run resumes bit for bit, and the rest of a base that was quantised is quantised
again, of which the sum above knows nothing.
"""

import dataclasses
import json
import math

import torch
from torch import Tensor

from lora import AdapterConfig

METADATA = "onetune.residual"  # the key in the tensors' metadata
KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")  # what it says, as adapter_config.json calls it
Tensors = dict[str, dict[str, Tensor]]  # those of each adapter, by its layer and by their own names


def doubled(tensors: Tensors, config: AdapterConfig) -> tuple[Tensors, AdapterConfig]:
    """Adapters with a start (`start_A`, `start_B`) as ordinary LoRA of twice the rank, and the config of these."""
    both = {
        name: {
            "lora_A": torch.cat([own["lora_A"], own["start_A"]]),
            "lora_B": torch.cat([own["lora_B"], -own["start_B"]], dim=1),
        }
        for name, own in tensors.items()
    }
    return both, _doubled_config(config)


def _doubled_config(config):
    """The same scales at twice the ranks."""
    more = math.sqrt(2) if config.rslora else 2
    return dataclasses.replace(
        config,
        residual=False,
        r=2 * config.r,
        alpha=more * config.alpha,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: more * alpha for key, alpha in config.alpha_pattern.items()},
    )


def describe(config: AdapterConfig) -> str:
    """What the metadata say of adapters with a start: their ranks and alphas, by adapter_config.json's keys."""
    values = config.r, config.alpha, config.rank_pattern, config.alpha_pattern
    return json.dumps(dict(zip(KEYS, values, strict=True)))


def halved(tensors: Tensors, config: AdapterConfig, start: AdapterConfig) -> tuple[Tensors, AdapterConfig]:
    """What `doubled` was given, bit for bit. start: with the ranks and alphas that `describe` wrote.

    Raises ValueError if the adapters are not such.
    """
    own = dataclasses.replace(
        config, residual=True, r=start.r, alpha=start.alpha, rank_pattern=start.rank_pattern,
        alpha_pattern=start.alpha_pattern,
    )  # fmt: skip
    if _doubled_config(own) != config:
        raise ValueError("ranks and alphas are not twice those that the tensors were saved with")
    parts = {}
    for name, both in tensors.items():
        r, (A, B) = own.rank(name), (both.get(f"lora_{letter}") for letter in "AB")
        if A is None or B is None or both.keys() != {"lora_A", "lora_B"} or (A.size(0), B.size(1)) != (2 * r, 2 * r):
            raise ValueError(f"{name} is no LoRA of rank {2 * r}")
        parts[name] = {"lora_A": A[:r], "lora_B": B[:, :r], "start_A": A[r:], "start_B": -B[:, r:]}
    return parts, own


def rest(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W - scale * B A, in fp32 on the weight's device. weight (out, in) in any dtype, A (r, in), B (out, r)."""
    return weight.float().addmm(B.to(weight.device), A.to(weight.device), alpha=-scale)
