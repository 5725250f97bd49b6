"""finetune.py's flags as objects of torch and lora.py. The flags themselves, in settings.py, are read before torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import lora
from ops.dtypes import compute_dtype

if TYPE_CHECKING:
    from model import Config
    from training.settings import Settings

# Of the weights, by --precision; an adapter's are always fp32.
DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "bf16-mixed": torch.float32, "16-mixed": torch.float32}


def adapter_config(s: Settings, config: Config) -> lora.AdapterConfig:
    """The adapter that the flags describe, for a model of this `Config`."""
    targets = tuple(s.lora_targets or default_targets(config))
    return lora.AdapterConfig(s.method, s.lora_r, s.lora_alpha, s.lora_dropout, s.lora_rslora, targets)


def default_targets(config: Config) -> list[str]:
    """All projections that a block has; attention's alone beside experts, of which a model has thousands."""
    left_out = ("gate_proj", "up_proj", "down_proj") if config.experts else () if config.gated else ("gate_proj",)
    return [name for name in lora.PROJECTIONS if name not in left_out]


def autocast_dtype(s: Settings) -> torch.dtype | None:
    """The dtype of products under autocast, or None.

    A CPU without bf16 instructions is faster, and more exact, in fp32.
    """
    slow = not torch.cuda.is_available() and compute_dtype(torch.bfloat16, "cpu") != torch.bfloat16
    return None if slow else {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(s.precision)
