"""Which linear layers get an adapter, and of which rank and scale: what --lora_targets and the patterns say.

As PEFT takes them: names or the ends of names, one regular expression, or "all-linear". Each may be in our names or in
those of the model's family, such as query_key_value, which is all layers that it holds.
"""

import functools
import re
from collections.abc import Iterable
from pathlib import Path

import torch

import lora
from model import Config, Transformer
from shell.cli import UserError
from text.tokenizer import Tokenizer
from weights.beside import family_names, modules_named
from weights.peft_layout import Layout, ends, patterns

ALL_LINEAR = "all-linear"


def default_targets(config: Config) -> list[str]:
    """All projections that a block has; attention's alone beside experts, of which a model has thousands."""
    left_out = ("gate_proj", "up_proj", "down_proj") if config.experts else () if config.gated else ("gate_proj",)
    return [name for name in lora.PROJECTIONS if name not in left_out]


def own_targets(targets: list[str] | str, config: Config) -> tuple[str, ...]:
    """`targets` in our names: all layers that a family's own name holds, or those that a regular expression fits.

    Raises UserError if there are none.
    """
    if not isinstance(targets, str) and {*targets} <= {*lora.PROJECTIONS}:
        return tuple(targets)
    layout = layout_of(config)
    if isinstance(targets, str):
        return tuple(ends(_matching(targets, layout), layout.linears))
    return tuple(dict.fromkeys(own for target in targets for own in layout.own_targets(target)))


@functools.cache
def bare_model(config: Config) -> Transformer:
    """A model of this `Config` without values, to look at and not to change."""
    with torch.device("meta"):
        return Transformer(config)


@functools.cache
def layout_of(config: Config) -> Layout:
    """Where the adapters of a model of this `Config` are in PEFT's files."""
    return Layout(config, lora.linear_layers(bare_model(config)))


def own_modules(names: list[str] | None, config: Config) -> tuple[str, ...]:
    """--lora_modules_to_save: the paths of all modules with parameters that these names mean, in the model's order.

    Raises UserError for a name of none, or of one that PEFT cannot save by itself, as the family has it in another.
    """
    model = bare_model(config)
    found, unknown = modules_named(model, names or ())
    if unknown:
        raise UserError(f"--lora_modules_to_save: the model has no module {unknown[0]!r} with parameters of its own")
    apart = family_names(model)
    for path in found:
        if path not in apart:
            layout = layout_of(config)
            whole = layout.module(path) if path in layout.linears else "a parameter of the family"
            raise UserError(f"--lora_modules_to_save: {path} is a part of {whole}, which cannot be saved in parts")
    return tuple(found)


def token_ids(tokens: list[int | str] | None, config: Config, checkpoint_dir: Path) -> tuple[int, ...]:
    """--lora_tokens: the ids of added tokens that are given as texts, and those given, in order.

    Raises UserError for a text that is no added token of the tokenizer in `checkpoint_dir`, or an id without a row.
    """
    if not tokens:
        return ()
    added = Tokenizer(checkpoint_dir).added_tokens
    for token in tokens:
        if isinstance(token, str) and token not in added:
            raise UserError(
                f"--lora_tokens: {token!r} is no added token of {checkpoint_dir}: give its id, or add it "
                "(convert_hf_checkpoint.py --add_tokens)"
            )
    ids = sorted({added[token]["id"] if isinstance(token, str) else token for token in tokens})
    for id in ids:
        if not 0 <= id < config.vocab_size:
            raise UserError(f"--lora_tokens: {id} is beyond the embedding, whose last row is {config.vocab_size - 1}")
    return tuple(ids)


def _matching(text, layout):
    """The linear layers that "all-linear" or a regular expression means."""
    if text.lower() == ALL_LINEAR:
        return [name for name in layout.linears if name != "lm_head"]
    expression = compiled(text, "lora_targets")
    found = [n for n in layout.linears if expression.fullmatch(n) or expression.fullmatch(layout.module(n))]
    if not found:
        choices = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layout.linears))
        raise UserError(
            f"--lora_targets {text}: no linear layer has a whole name that this regular expression fits, such as "
            f"{layout.linears[0]}; a list, as [q_proj,v_proj], names the ends of names: {choices}"
        )
    return found


def own_pattern(flag: str, pattern: dict, default: float, config: Config, adapted: Iterable[str]) -> dict:
    """--lora_rank_pattern or --lora_alpha_pattern, in our names, as `AdapterConfig` has it.

    flag: its name. default: what a layer has that no key fits. adapted: the names of the layers with an adapter. The
    first key that fits the end of a layer's name decides. Raises UserError for a key that fits none of them.
    """
    if not pattern:
        return {}
    layout, values, used = layout_of(config), {}, set()
    expressions = {key: compiled(rf"(.*\.)?({key})", flag) for key in pattern}
    for name in adapted:
        called = dict.fromkeys((name, layout.module(name)))
        key = next((key for key, expression in expressions.items() if any(map(expression.fullmatch, called))), None)
        values[name] = default if key is None else pattern[key]
        used |= {key for key, expression in expressions.items() if any(map(expression.fullmatch, called))}
    for key in pattern:
        if key not in used:
            raise UserError(f"--{flag}: {key} is no end of the name of a layer with an adapter (see --lora_targets)")
    by_our_names = all(lora.match_pattern(pattern, name, default) == value for name, value in values.items())
    return dict(pattern) if by_our_names else patterns(values, default)


def compiled(text: str, flag: str) -> re.Pattern:
    """A regular expression. Raises UserError, which names the flag, if the text is none."""
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"--{flag}: {text} is not a regular expression ({error})") from None
