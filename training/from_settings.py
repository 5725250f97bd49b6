"""finetune.py's flags as objects of torch and lora.py. The flags themselves, in settings.py, are read before torch."""

from __future__ import annotations

import fnmatch
import re
from typing import TYPE_CHECKING

import torch

import lora
from model import Config, Transformer
from ops.dtypes import compute_dtype
from shell.cli import UserError
from weights.peft_layout import Layout

if TYPE_CHECKING:
    from training.settings import Settings

# Of the weights, by --precision; an adapter's are always fp32.
DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "bf16-mixed": torch.float32, "16-mixed": torch.float32}


def adapter_config(s: Settings, config: Config) -> lora.AdapterConfig:
    """The adapter that the flags describe, for a model of this `Config`."""
    own = lora.ADAPTERS[s.method].targets
    defaults = [name for name in default_targets(config) if own is None or name in own]
    return lora.AdapterConfig(
        s.method, s.lora_r, s.lora_alpha, s.lora_dropout, s.lora_rslora,
        targets=own_targets(s.lora_targets or defaults, config),
        virtual_tokens=s.virtual_tokens,
        adapter_layers=s.adapter_layers or max(1, config.num_hidden_layers - 2),
        seed=s.seed,
    )  # fmt: skip


def virtual_ids(s: Settings, config: Config) -> list[int]:
    """The ids of the virtual tokens that stand before every sample; [] for most methods."""
    if s.method == "full":
        return []
    number = lora.ADAPTERS[s.method].number_of_virtual_tokens(adapter_config(s, config))
    return [config.vocab_size + i for i in range(number)]


def idle_flags(s: Settings) -> list[str]:
    """The flags of adapters that were given and change nothing with this --method."""
    used = () if s.method == "full" else lora.ADAPTERS[s.method].flags
    given = [flag for prefix in ("lora_", "virtual_tokens", "adapter_layers") for flag in s.changed(prefix)]
    return [flag for flag in given if flag.removeprefix("--") not in used]


def train_only(model: Transformer, patterns: list[str] | None) -> None:
    """Let only those parameters train whose names --train names, all without it. UserError if it names none."""
    model.requires_grad_(not patterns)
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns or ():
        expression, found = pattern_of_names(pattern), False
        for name, parameter in model.named_parameters():
            if expression.fullmatch(name):
                found = parameter.requires_grad_(True) is not None
        if not found:
            some = ", ".join(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))
            raise UserError(
                f"--train {pattern}: no parameter of the model has such a name; there are {some} and others"
            )


def pattern_of_names(pattern: str) -> re.Pattern:
    """What --train says as an expression for a whole name. Raises UserError if it is none.

    A pattern as a shell has it, or a regular expression if it has characters that only those have; it is for the whole
    name or for all from one of its dots on.
    """
    is_expression = set(pattern) & set("\\|()+^$")
    try:
        return re.compile(rf"(.*\.)?({pattern if is_expression else fnmatch.translate(pattern)})")
    except re.error as error:
        raise UserError(f"--train {pattern}: no regular expression ({error})") from None


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
