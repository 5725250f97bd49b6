"""finetune.py's flags as objects of torch and lora.py. The flags themselves, in settings.py, are read before torch."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from typing import TYPE_CHECKING

import torch

import lora
from model import Config, Transformer
from ops.dtypes import compute_dtype
from quantize import quantizable_layers
from shell.cli import UserError
from training.initialization import takes_from_base
from training.targets import bare_model, default_targets, layout_of, own_modules, own_pattern, own_targets, token_ids

if TYPE_CHECKING:
    from training.settings import Settings

# Of the weights, by --precision; an adapter's are always fp32.
DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "bf16-mixed": torch.float32, "16-mixed": torch.float32}


def adapter_config(s: Settings, config: Config) -> lora.AdapterConfig:
    """The adapter that the flags describe, for a model of this `Config`. Raises UserError for what does not fit it."""
    own = lora.ADAPTERS[s.method].targets
    defaults = [name for name in default_targets(config) if own is None or name in own]
    adapter = lora.AdapterConfig(
        s.method, s.lora_r, s.lora_alpha, s.lora_dropout, s.lora_rslora,
        targets=own_targets(s.lora_targets or defaults, config),
        virtual_tokens=s.virtual_tokens,
        adapter_layers=s.adapter_layers or max(1, config.num_hidden_layers - 2),
        seed=s.seed,
        layers=own_layers(s.lora_layers, config), residual=takes_from_base(s),
        save=own_modules(s.lora_modules_to_save, config), tokens=token_ids(s.lora_tokens, config, s.checkpoint_dir),
    )  # fmt: skip
    if not (s.lora_rank_pattern or s.lora_alpha_pattern):
        return adapter
    adapted = [name for name in layout_of(config).linears if adapter.covers(name)]
    return dataclasses.replace(
        adapter,
        rank_pattern=own_pattern("lora_rank_pattern", s.lora_rank_pattern, s.lora_r, config, adapted),
        alpha_pattern=own_pattern("lora_alpha_pattern", s.lora_alpha_pattern, s.lora_alpha, config, adapted),
    )


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


def own_layers(layers: list[int] | None, config: Config) -> tuple[int, ...] | None:
    """--lora_layers: the numbers of the blocks with adapters, None for all. Raises UserError if one is not there."""
    for number in layers or ():
        if number >= config.num_hidden_layers:
            raise UserError(f"--lora_layers {number}: the model's layers are 0 to {config.num_hidden_layers - 1}")
    return None if layers is None else tuple(layers)


def base_quantization(s: Settings, adapter: lora.AdapterConfig | None, config: Config) -> str | dict | None:
    """How the base is quantised: as --quantize says, but for modules that train whole. Takes what `check_model` gave s.

    adapter: `adapter_config`'s, or None with --method full.
    """
    saved = {} if adapter is None else {*adapter.save}.intersection(quantizable_layers(bare_model(config)))
    if not saved or s.quantize is None:
        return s.quantize
    every = dict.fromkeys(quantizable_layers(bare_model(config)), s.quantize)
    every = s.quantize if isinstance(s.quantize, dict) else every
    return every | dict.fromkeys(saved, "none")


def autocast_dtype(s: Settings) -> torch.dtype | None:
    """The dtype of products under autocast, or None.

    A CPU without bf16 instructions is faster, and more exact, in fp32.
    """
    slow = not torch.cuda.is_available() and compute_dtype(torch.bfloat16, "cpu") != torch.bfloat16
    return None if slow else {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(s.precision)
