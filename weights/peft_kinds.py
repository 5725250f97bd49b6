"""PEFT's files of adapters that are not LoRA: VeRA, (IA)3, prompt tuning, prefix tuning, LLaMA-Adapter v1.

`KINDS` has a row for each of PEFT's types. Where PEFT cannot have an adapter as it is over a family's layers, or has it
otherwise (`Kind.outside`), it is written as one that is ours alone, as peft_format.py says.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.ia3 import is_feedforward
from adapters.vera import random_projections
from adapters.virtual_tokens import EMBEDDING, attentions
from lora import AdapterConfig
from model import Transformer
from ops.rotation import pairs_apart
from shell.cli import UserError
from weights.peft_layout import Layout, Tensors, ends

PREFIX = "base_model.model."  # PEFT's, before every name in an adapter file
OTHER_BASE = "it belongs to another base model"
# Keys that every kind has and that compute nothing.
COMMON = {"peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
          "peft_version"}  # fmt: skip


class Kind(NamedTuple):
    """One of PEFT's types. kind: the key of `lora.ADAPTERS`.

    keys: of adapter_config.json, those that are understood, beside `COMMON`; another one with a value is refused.
    describe: from an AdapterConfig, a model and the names of the adapted modules to the values of such keys.
    parse: from these to fields of AdapterConfig; raises ValueError for what would compute something else.
    write: from the tensors of adapted modules, by our names, to those in the file.
    read: from a `Found` to the AdapterConfig and the tensors by our names. Raises UserError if they do not fit.
    outside: from the same as `describe` to why PEFT cannot have them, or None.
    """

    kind: str
    keys: frozenset[str]
    describe: Callable[[AdapterConfig, Transformer, list[str]], dict]
    parse: Callable[[dict], dict]
    write: Callable[[Tensors, Transformer], dict[str, Tensor]]
    read: Callable[[Found], tuple[AdapterConfig, Tensors]]
    outside: Callable[[AdapterConfig, Transformer, list[str]], str | None]


class Found(NamedTuple):
    """What an adapter folder has for a model.

    config: with `targets` as in the file. values: adapter_config.json. tensors: by their names in the file. adapted:
    which of our layers had an adapter, if the file is ours. covered: a function that gives of names of modules those
    that PEFT's rules in `values` cover. where: the folder.
    """

    config: AdapterConfig
    values: dict
    tensors: dict[str, Tensor]
    adapted: list[str] | None
    model: Transformer
    layout: Layout
    covered: Callable[[list[str]], list[str]]
    where: str


def parse(values: dict) -> AdapterConfig:
    """The adapter_config.json of a type in `KINDS`. Raises ValueError for what would compute something else."""
    row = KINDS[values["peft_type"]]
    for key in values.keys() - COMMON - row.keys:
        if values[key]:
            raise ValueError(f"{key} is not supported for {values['peft_type']}")
    return AdapterConfig(row.kind, **row.parse(values))


def whole_number(values: dict, key: str, least: int = 1) -> int:
    """A whole number of adapter_config.json. Raises ValueError if it is none."""
    number = values.get(key)
    if type(number) is not int or number < least:
        raise ValueError(f"{key} {number!r} is not a whole number of at least {least}")
    return number


# ------------------------------------------------------------------------------------------- over linear layers


def own_modules(found: Found, keys: tuple[str, ...]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The tensors by PEFT's modules, and the names of our layers in these, which are those that PEFT's rules cover."""
    modules = {}
    for full_name, tensor in found.tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + rf"(.+)\.({'|'.join(keys)})", full_name)
        if match is None:
            raise UserError(f"{found.where}: tensor {full_name} is not one of a {found.config.kind} adapter")
        modules.setdefault(match[1], {})[match[2]] = tensor
    covered = found.covered(found.layout.modules())
    for name in sorted(modules.keys() ^ {*covered}):
        what = "no tensors for" if name in covered else "it adapts"
        then = "says it adapts" if name in covered else "or the base model does not have"
        raise UserError(f"{found.where}: {what} {name}, which adapter_config.json {then}")
    return modules, [name for name in found.layout.linears if found.layout.module(name) in modules]


def modules_of(model: Transformer, names: list[str]) -> tuple[Layout, dict[str, list[str]]]:
    """The layout of a model, and by PEFT's modules those of our layers `names` that are in each."""
    layout, held = layout_of(model), {}
    for name in names:
        held.setdefault(layout.module(name), []).append(name)
    return layout, held


def layout_of(model: Transformer) -> Layout:
    """Where the linear layers of a model's family are in PEFT's files."""
    with torch.device("meta"):
        bare = Transformer(model.config)
    return Layout(bare.config, [name for name, module in bare.named_modules() if hasattr(module, "in_features")])


def targets_of(values: dict) -> tuple | str:
    """target_modules. Raises ValueError if there are none."""
    targets = values.get("target_modules")
    if not targets:
        raise ValueError("target_modules is missing")
    return targets if isinstance(targets, str) else tuple(targets)


def describe_targets(model: Transformer, names: list[str]) -> dict:
    """target_modules, by PEFT's names, for our layers `names`."""
    layout, held = modules_of(model, names)
    turned = any(row.turned and not row.stacked for row in layout.names.rows)
    return {"target_modules": ends([*held], layout.held), "fan_in_fan_out": turned}


# ------------------------------------------------------------------------------------------------------------ VeRA


def _describe_vera(config, model, names):
    return describe_targets(model, names) | {
        "r": config.r, "vera_dropout": config.dropout, "projection_prng_key": config.seed, "save_projection": True,
        "bias": "none",
    }  # fmt: skip


def _parse_vera(values):
    dropout = values.get("vera_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"vera_dropout {dropout!r} is not a number from 0 to below 1")
    if values.get("bias", "none") != "none":
        raise ValueError(f"bias {values['bias']!r} is not supported for VERA, only none is")
    seed = whole_number({"projection_prng_key": 0, **values}, "projection_prng_key", least=0)
    return {"r": whole_number(values, "r"), "dropout": dropout, "seed": seed, "targets": targets_of(values)}


def _write_vera(tensors, model):
    layout, flat = layout_of(model), {}
    for name, own in tensors.items():
        for key, tensor in own.items():
            if key in ("vera_A", "vera_B"):
                flat[f"base_model.{key}"] = tensor
            else:
                flat[f"{PREFIX}{layout.module(name)}.{key}"] = tensor
    return flat


def _read_vera(found):
    rest = dict(found.tensors)
    projections = {key: rest.pop(f"base_model.{key}", None) for key in ("vera_A", "vera_B")}
    modules, names = own_modules(found._replace(tensors=rest), ("vera_lambda_d", "vera_lambda_b"))
    config = dataclasses.replace(found.config, targets=tuple(ends(names, found.layout.linears)))
    if why := _outside_vera(config, found.model, names):
        raise UserError(f"{found.where}: {why}, so this file fits none of our {found.model.config.family} models")
    if None in projections.values():
        if found.values.get("save_projection", True):
            raise UserError(f"{found.where}: it has no vera_A and vera_B, which adapter_config.json says it has")
        layers = [found.model.get_submodule(name) for name in names]
        sizes = max(layer.in_features for layer in layers), max(layer.out_features for layer in layers)
        if any(own.get("vera_lambda_d", torch.empty(0)).numel() != config.r for own in modules.values()):
            raise UserError(f"{found.where}: its tensors are not of rank {config.r}")
        projections = dict(zip(projections, random_projections(config.r, *sizes, config.seed, "cpu"), strict=True))
    return config, {name: projections | modules[found.layout.module(name)] for name in names}


def _outside_vera(config, model, names):
    layout, held = modules_of(model, names)
    for module, ours in held.items():
        if module in layout.parameters:
            return f"PEFT has no VeRA over {module}, the experts' parameter"
        if len(ours) > 1 or len(layout.held[module][0]) > 1:
            return f"PEFT has one VeRA for all that is in {module}, of which parts are adapted here"
    return None


# ----------------------------------------------------------------------------------------------------------- (IA)3


def _describe_ia3(config, model, names):
    multiplied = [name for name in names if is_feedforward(name, config.feedforward)]
    inputs, outputs = (
        describe_targets(model, part) for part in (multiplied, [n for n in names if n not in multiplied])
    )
    feedforward = inputs["target_modules"]  # which PEFT wants to find in both lists
    return outputs | {"target_modules": outputs["target_modules"] + feedforward, "feedforward_modules": feedforward}


def _parse_ia3(values):
    feedforward = values.get("feedforward_modules") or []
    is_list = isinstance(feedforward, list) and all(isinstance(name, str) for name in feedforward)
    if not isinstance(feedforward, str) and not is_list:
        raise ValueError("feedforward_modules is neither a list of names nor a regular expression")
    return {
        "targets": targets_of(values),
        "feedforward": feedforward if isinstance(feedforward, str) else tuple(feedforward),
    }


def _write_ia3(tensors, model):
    layout, held = modules_of(model, [*tensors])
    flat = {}
    for module, ours in held.items():
        parts = layout.held[module][0].values()
        factors = tensors[ours[0]]["ia3_l"]
        if len(parts) > 1:  # those without an adapter have ones
            own = {name: tensors[name]["ia3_l"] if name in tensors else _ones(model, name) for name in parts}
            factors = sum(layout.spread(name, part) for name, part in own.items())
        flat[f"{PREFIX}{module}.ia3_l"] = factors
    return flat


def _ones(model, name):
    return torch.ones(model.get_submodule(name).out_features, 1)


def _read_ia3(found):
    modules, names = own_modules(found, ("ia3_l",))
    layout, linears = found.layout, found.layout.linears
    inputs = [name for name in names if is_feedforward(layout.module(name), found.config.feedforward)]
    if found.adapted is not None:  # of a module that holds several, the others have ones
        names = [name for name in names if name in found.adapted]
    feedforward = tuple(ends(inputs, linears))
    config = dataclasses.replace(found.config, targets=tuple(ends(names, linears)), feedforward=feedforward)
    tensors = {name: {"ia3_l": modules[layout.module(name)]["ia3_l"]} for name in names}
    for name in set(names).difference(inputs):
        tensors[name]["ia3_l"] = layout.rows_of(name, tensors[name]["ia3_l"], found.where)
    if sum((own["ia3_l"] != 1).sum() for own in tensors.values()) != _count_changed(modules, inputs, layout):
        raise UserError(f"{found.where}: it has values outside of its parts: the file was changed")
    return config, tensors


def _count_changed(modules, inputs, layout):
    """How many factors are not one; those of an input count for each of our layers that get it."""
    times = Counter(layout.module(name) for name in inputs)
    return sum((own["ia3_l"] != 1).sum() * max(1, times[name]) for name, own in modules.items())


def _outside_ia3(config, model, names):
    layout, held = modules_of(model, names)
    for module, ours in held.items():
        if module in layout.parameters:
            return f"PEFT has no (IA)3 over {module}, the experts' parameter"
        if len(layout.held[module][0]) > 1 and any(is_feedforward(name, config.feedforward) for name in ours):
            return f"PEFT has one (IA)3 for the input of all that is in {module}"
    return None


# -------------------------------------------------------------------------------------------------- virtual tokens


def _parse_virtual(values):
    if values.get("num_transformer_submodules") not in (None, 1):
        raise ValueError(f"num_transformer_submodules {values['num_transformer_submodules']!r} is not supported")
    return {"virtual_tokens": whole_number(values, "num_virtual_tokens")}


def _the_tensor(found, shape):
    """The one tensor of virtual tokens in a file, if it is (n, ...) as the model needs it."""
    n, others = found.config.virtual_tokens, sorted(found.tensors.keys() - {"prompt_embeddings"})
    if others or "prompt_embeddings" not in found.tensors:
        raise UserError(
            f"{found.where}: it should have the tensor prompt_embeddings, it has {', '.join(found.tensors)}"
        )
    tensor = found.tensors["prompt_embeddings"]
    if tuple(tensor.shape) != (n, *shape):
        needed = f"{tuple(tensor.shape)} where {n} virtual tokens of this model need {(n, *shape)}"
        raise UserError(f"{found.where}: prompt_embeddings is {needed}: {OTHER_BASE}")
    return tensor


def _describe_virtual(config, model, names):
    c = model.config
    return {
        "num_virtual_tokens": config.virtual_tokens, "num_transformer_submodules": 1, "token_dim": c.hidden_size,
        "num_attention_heads": c.num_attention_heads, "num_layers": c.num_hidden_layers,
    }  # fmt: skip


def _describe_prompt(config, model, names):
    return _describe_virtual(config, model, names) | {"prompt_tuning_init": "RANDOM"}


def _write_prompt(tensors, model):
    return dict(tensors[EMBEDDING])


def _read_prompt(found):
    return found.config, {EMBEDDING: {"prompt_embeddings": _the_tensor(found, [found.model.config.hidden_size])}}


def _outside_prompt(config, model, names):
    return "PEFT's virtual tokens are as wide as the hidden states" if model.config.embedding_size else None


def _describe_prefix(config, model, names):
    K, d = model.config.num_key_value_heads, model.config.head_dim
    values = {"token_dim": K * d, "num_attention_heads": K, "prefix_projection": False}
    return _describe_virtual(config, model, names) | values


def _write_prefix(tensors, model):
    """(n, L * 2 * K * d): for each virtual token key and value of each layer."""
    each = []
    for name, rope in zip(attentions(model), model.config.ropes, strict=True):
        keys, values = tensors[name]["prefix_keys"], tensors[name]["prefix_values"]
        each += [_pairs_together(keys, rope.dims) if rope and rope.interleaved else keys, values]
    return {"prompt_embeddings": torch.stack(each, dim=1).flatten(1)}


def _pairs_together(x, dims):
    """What `ops.rotation.pairs_apart` took apart: after RoPE our keys are in another order than the family's."""
    turned, rest = x[..., :dims], x[..., dims:]
    return torch.cat((turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2), rest), dim=-1)


def _read_prefix(found):
    c = found.model.config
    if why := _outside_prefix(found.config, found.model, []):
        raise UserError(f"{found.where}: {why}: it cannot be read for this model")
    sizes = (c.num_hidden_layers, 2, c.num_key_value_heads, c.head_dim)
    stored = _the_tensor(found, [torch.Size(sizes).numel()]).unflatten(1, sizes)
    tensors = {EMBEDDING: {}}
    for name, part, rope in zip(attentions(found.model), stored.unbind(1), c.ropes, strict=True):
        keys, values = part.unbind(1)
        keys = pairs_apart(keys, rope.dims) if rope and rope.interleaved else keys
        tensors[name] = {"prefix_keys": keys, "prefix_values": values}
    return found.config, tensors


def _outside_prefix(config, model, names):
    c = model.config
    if c.family == "falcon" and c.num_key_value_heads not in (1, c.num_attention_heads):
        return "transformers caches a key for each query head of this Falcon"
    return None


# -------------------------------------------------------------------------------------------------- LLaMA-Adapter

PROMPTS = ("adaption_prompt", "adaption_gate")


def _describe_adaption(config, model, names):
    layers = {"adapter_len": config.virtual_tokens, "adapter_layers": config.adapter_layers}
    return {"target_modules": "self_attn", **layers}


def _parse_adaption(values):
    if values.get("target_modules") not in (None, "self_attn"):
        raise ValueError(f"target_modules {values['target_modules']!r} is not supported for ADAPTION_PROMPT")
    numbers = (whole_number(values, key) for key in ("adapter_len", "adapter_layers"))
    return dict(zip(("virtual_tokens", "adapter_layers"), numbers, strict=True))


def _write_adaption(tensors, model):
    return {f"{PREFIX}{name}.{key}": tensor for name, own in tensors.items() for key, tensor in own.items()}


def _read_adaption(found):
    if why := _outside_adaption(found.config, found.model, []):
        raise UserError(f"{found.where}: {why}: it cannot be read for this model")
    tensors = {}
    for full_name, tensor in found.tensors.items():
        name, _, key = full_name.removeprefix(PREFIX).rpartition(".")
        if key not in PROMPTS or not full_name.startswith(PREFIX):
            raise UserError(f"{found.where}: tensor {full_name} is not one of a {found.config.kind} adapter")
        tensors.setdefault(name, {})[key] = tensor
    return found.config, tensors


def _outside_adaption(config, model, names):
    c = model.config
    if c.family not in ("llama", "mistral"):
        return f"PEFT has no LLaMA-Adapter for {c.family} models"
    if c.o_bias:
        return "PEFT adds the bias of o_proj twice"
    groups = c.hidden_size // (c.num_key_value_heads * c.head_dim)  # as PEFT counts them
    if groups * c.num_key_value_heads != c.num_attention_heads:
        return "PEFT's LLaMA-Adapter needs heads that share the hidden size"
    return None


LINEARS = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"})
VIRTUAL = frozenset(
    {"num_virtual_tokens", "num_transformer_submodules", "token_dim", "num_attention_heads", "num_layers"}
)
KINDS = {
    "VERA": Kind(
        "vera",
        LINEARS | {"r", "vera_dropout", "d_initial", "init_weights", "projection_prng_key", "save_projection", "bias"},
        _describe_vera, _parse_vera, _write_vera, _read_vera, _outside_vera,
    ),
    "IA3": Kind(
        "ia3",
        LINEARS | {"feedforward_modules", "init_ia3_weights"},
        _describe_ia3, _parse_ia3, _write_ia3, _read_ia3, _outside_ia3,
    ),
    "PROMPT_TUNING": Kind(
        "prompt",
        VIRTUAL | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"},
        _describe_prompt, _parse_virtual, _write_prompt, _read_prompt, _outside_prompt,
    ),
    "PREFIX_TUNING": Kind(
        "prefix",
        VIRTUAL | {"encoder_hidden_size", "prefix_projection", "init_weights"},  # the file has what these made
        _describe_prefix, _parse_virtual, _write_prefix, _read_prefix, _outside_prefix,
    ),
    "ADAPTION_PROMPT": Kind(
        "llama-adapter",
        frozenset({"target_modules", "adapter_len", "adapter_layers"}),
        _describe_adaption, _parse_adaption, _write_adaption, _read_adaption, _outside_adaption,
    ),
}  # fmt: skip
PEFT_TYPES = {row.kind: peft_type for peft_type, row in KINDS.items()}
