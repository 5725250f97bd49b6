"""finetune.py's flags as objects of torch and lora.py. The flags themselves, in settings.py, are read before torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import lora
from model import Config, Transformer
from ops.dtypes import compute_dtype
from weights.peft_layout import Layout

if TYPE_CHECKING:
    from training.settings import Settings

# Of the weights, by --precision; an adapter's are always fp32.
DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "bf16-mixed": torch.float32, "16-mixed": torch.float32}


def adapter_config(s: Settings, config: Config) -> lora.AdapterConfig:
    """The adapter that the flags describe, for a model of this `Config`."""
    targets = own_targets(s.lora_targets or default_targets(config), config)
    return lora.AdapterConfig(s.method, s.lora_r, s.lora_alpha, s.lora_dropout, s.lora_rslora, targets)


def default_targets(config: Config) -> list[str]:
    """All projections that a block has; attention's alone beside experts, of which a model has thousands."""
    left_out = ("gate_proj", "up_proj", "down_proj") if config.experts else () if config.gated else ("gate_proj",)
    return [name for name in lora.PROJECTIONS if name not in left_out]


def own_targets(targets: list[str], config: Config) -> tuple[str, ...]:
    """`targets` with the family's own names, such as query_key_value, replaced by those of all layers in them."""
    if {*targets} <= {*lora.PROJECTIONS}:
        return tuple(targets)
    with torch.device("meta"):
        layout = Layout(config, lora.linear_layers(Transformer(config)))
    return tuple(dict.fromkeys(own for target in targets for own in layout.own_targets(target)))


def autocast_dtype(s: Settings) -> torch.dtype | None:
    """The dtype of products under autocast, or None.

    A CPU without bf16 instructions is faster, and more exact, in fp32.
    """
    slow = not torch.cuda.is_available() and compute_dtype(torch.bfloat16, "cpu") != torch.bfloat16
    return None if slow else {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(s.precision)
