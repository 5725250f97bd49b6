"""What an adapter_config.json says: as an `AdapterConfig`, checked. What would compute something else is refused."""

import math
import re

from lora import ADAPTERS, AdapterConfig, DoRALinear, LoRALinear, is_named
from weights.peft_kinds import KINDS, whole_number
from weights.peft_kinds import parse as parse_kind
from weights.replaced import EMBEDDING, HEAD

OURS = "ONETUNE_"  # before the kind, in the peft_type of an adapter that is not PEFT's
OUTSIDE = f"{OURS}OUTSIDE_PEFT"  # the peft_type of LoRA and DoRA over layers where PEFT cannot have them
OWN_NUMBERS = {"virtual_tokens": 1, "adapter_layers": 1, "seed": 0}  # fields of AdapterConfig, and the least of each
EMBEDDING_MODULE, HEAD_MODULE = (name.removesuffix(".weight") for name in (EMBEDDING, HEAD))

# Settings of PEFT's that change what an adapter computes, and that we do not have.
UNSUPPORTED = (
    "lora_bias", "layer_replication", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip


def parse_adapter_config(values: dict) -> AdapterConfig:
    """adapter_config.json as an AdapterConfig. Raises ValueError for what would compute something else."""
    if isinstance(values.get("peft_type"), str) and values["peft_type"] in KINDS:
        _check_targets(values)
        return parse_kind(values)
    kind = _kind(values)
    _check_supported(values)
    for key in ("r", "lora_alpha", "target_modules"):
        if not values.get(key) and not (key == "target_modules" and values.get("target_parameters")):
            raise ValueError(f"{key} is missing")
    _check_numbers(values)
    _check_targets(values)
    targets = values.get("target_modules") or []
    return AdapterConfig(
        kind=kind,
        r=values["r"],
        alpha=values["lora_alpha"],
        dropout=values.get("lora_dropout", 0.0),
        rslora=values.get("use_rslora", False),
        targets=targets if isinstance(targets, str) else tuple(targets),
        rank_pattern=values.get("rank_pattern") or {},
        alpha_pattern=values.get("alpha_pattern") or {},
        layers=_layers(values),
        **_own_fields(values),
    )


def own_description(config: AdapterConfig) -> dict:
    """What adapter_config.json has of an adapter of ours beside PEFT's keys."""
    feedforward = config.feedforward if isinstance(config.feedforward, str) else [*config.feedforward]
    return {**{key: getattr(config, key) for key in OWN_NUMBERS}, "feedforward": feedforward}


def _own_fields(values):
    """What `own_description` says, as fields of AdapterConfig."""
    fields = {key: whole_number(values, key, least) for key, least in OWN_NUMBERS.items() if key in values}
    if "feedforward" in values:
        feedforward = values["feedforward"]
        if not isinstance(feedforward, str) and not _is_list_of(str, feedforward):
            raise ValueError("feedforward is neither a list of names nor a regular expression")
        fields["feedforward"] = feedforward if isinstance(feedforward, str) else tuple(feedforward)
    return fields


def _layers(values):
    """`layers_to_transform`, None for all blocks; also where `layers_pattern` says otherwise what counts as one."""
    layers = values.get("layers_to_transform")
    if layers in (None, []) or values.get("layers_pattern"):
        return None
    return (layers,) if type(layers) is int else tuple(layers)


def _kind(values):
    """The key of `ADAPTERS` for an adapter_config.json. Raises ValueError if it is of a kind that is not there."""
    peft_type = values.get("peft_type")
    if peft_type in ("LORA", OUTSIDE):
        wanted = DoRALinear if values.get("use_dora") else LoRALinear
        if wanted.is_standard():
            for kind, adapter in ADAPTERS.items():
                if adapter is wanted:
                    return kind
        raise ValueError(f"lora.py has no {wanted.__name__} as published, which peft_type LORA stands for")
    if not isinstance(peft_type, str) or not peft_type.startswith(OURS):
        choices = ", ".join(("LORA", *KINDS))
        raise ValueError(f"peft_type {str(peft_type)[:80]!r} is not supported, only {choices} are")
    kind = peft_type.removeprefix(OURS)
    if kind not in ADAPTERS:
        raise ValueError(f"it is an adapter of the kind {kind[:80]!r}, lora.py has only {', '.join(ADAPTERS)}")
    if ADAPTERS[kind].is_standard():
        raise ValueError(f"it was trained with another {ADAPTERS[kind].__name__} than lora.py's: take that lora.py")
    return kind


def _check_supported(values):
    """Raise ValueError if an adapter_config.json has a setting that alters the computation and that we do not have."""
    for key in UNSUPPORTED:
        if values.get(key):
            raise ValueError(f"{key} is not supported")
    if values.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ValueError(f"init_lora_weights {values['init_lora_weights']!r} alters the base model: not supported")
    if values.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ValueError(f"bias {values['bias']!r} is not supported, only none, all and lora_only are")
    for key in ("use_dora", "use_rslora"):
        if type(values.get(key, False)) is not bool:
            raise ValueError(f"{key} {values[key]!r} is not true or false")


def _check_numbers(values):
    """Raise ValueError if a rank, an alpha or the dropout in an adapter_config.json is none."""
    ranks, alphas = (_pattern(values, key) for key in ("rank_pattern", "alpha_pattern"))
    for rank in (values["r"], *ranks.values()):
        if type(rank) is not int or rank < 1:
            raise ValueError(f"a rank of {rank!r} is not a whole number above 0")
    for alpha in (values["lora_alpha"], *alphas.values()):
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise ValueError(f"an alpha of {alpha!r} is not a number")
    dropout = values.get("lora_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout {dropout!r} is not a number from 0 to below 1")


def _check_targets(values):
    """Raise ValueError unless modules are named by lists or regular expressions, and all expressions are good."""
    targets, layers = values.get("target_modules") or [], values.get("layers_to_transform")
    if not isinstance(targets, str) and not _is_list_of(str, targets):
        raise ValueError("target_modules is neither a list of names nor a regular expression")
    for key in ("exclude_modules", "layers_pattern"):
        if not isinstance(values.get(key), str | None) and not _is_list_of(str, values[key]):
            raise ValueError(f"{key} is neither a list of names nor a regular expression")
    if layers is not None and type(layers) is not int and not _is_list_of(int, layers):
        raise ValueError(f"layers_to_transform {layers!r} is neither a number nor a list of numbers")
    if layers not in (None, []) and isinstance(targets, str):
        raise ValueError("layers_to_transform needs a list of names in target_modules")
    for key in ("modules_to_save", "target_parameters"):
        if not _is_list_of(str, values.get(key) or []):
            raise ValueError(f"{key} is no list of names")
    if not all(_is_list_of(int, ids) for ids in token_ids(values).values()):
        raise ValueError("trainable_token_indices is neither a list of numbers nor an object of such lists")
    patterns = [key for name in ("rank_pattern", "alpha_pattern") for key in _pattern(values, name)]
    expressions = ("target_modules", "exclude_modules", "feedforward_modules")
    patterns += [values.get(key) for key in expressions if isinstance(values.get(key), str)]
    patterns += [*(values.get("modules_to_save") or []), *layer_patterns(values)]
    for pattern in patterns:
        _check_pattern(pattern)


def _is_list_of(kind, value):
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _check_pattern(pattern):
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern[:80]!r} is not a regular expression ({error})") from None


def _pattern(values, key):
    """`rank_pattern` or `alpha_pattern`, which may be left out."""
    pattern = values.get(key) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{key} must be an object")
    return pattern


def layer_patterns(values: dict) -> list[str]:
    """The names of what numbers the layers, regular expressions; by default any name."""
    patterns = values.get("layers_pattern") or [r"[^.]*"]
    return [patterns] if isinstance(patterns, str) else patterns


def token_ids(values: dict) -> dict[str, list[int]]:
    """The tokens whose rows were trained, {module: ids}: of a plain list the module is the embedding."""
    indices = values.get("trainable_token_indices") or {}
    indices = indices if isinstance(indices, dict) else {EMBEDDING_MODULE: indices}
    modules = (EMBEDDING_MODULE, HEAD_MODULE)
    return {next((module for module in modules if is_named(module, [key])), key): ids for key, ids in indices.items()}
