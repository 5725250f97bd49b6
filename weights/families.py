"""Model families: what the keys of a checkpoint's config.json mean, as the decoder's `Config`.

A family is defined by its class in transformers: a key that config.json leaves out has that class's default. A value
that is not understood is refused by name, and so is a key of another family that would change what is computed
(`FOREIGN`). As in transformers, a key that no family has is ignored. tests/weights/test_families.py compares each row
here with the class, and the logits with its model's, for files with keys left out, changed, or spelled in two ways.

To add a family: a function that gives what is its own, and a row in `FAMILIES`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from model import Config, RoPE

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OTHER_SIZES = {  # and the least that they may be
    "num_key_value_heads": 1, "head_dim": 1, "max_position_embeddings": 1, "sliding_window": 1, "max_window_layers": 0,
}  # fmt: skip
LARGEST, MOST_LAYERS = 2**24, 1000  # of a size: a damaged file must not cost time or memory
LARGEST_NUMBER = 1e30  # of a number with a fraction

# Defaults that all families share. In num_key_value_heads and head_dim None means: as many as there are
# query heads, and the hidden size divided among them.
COMMON = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0, "head_dim": None,
}  # fmt: skip
MAY_BE_NULL = ("num_key_value_heads", "sliding_window", "layer_types")  # and every key whose default is None

# Keys of other families that change what is computed there, and the values that change nothing.
FOREIGN = {
    "attention_chunk_size": (None,),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "clip_qkv": (None,),
    "embedding_multiplier": (None, 1.0),
    "final_logit_softcapping": (None,),
    "hidden_activation": (None, "silu", "swish"),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "n_routed_experts": (None, 0),
    "no_rope_layers": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "partial_rotary_factor": (None, 1.0),
    "per_layer_config": (None,),
    "qk_layernorm": (None, False),
    "qk_norm": (None, False),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1.0),
    "rope_interleave": (None, False),
    "rope_interleaved": (None, False),
    "rope_local_base_freq": (None,),
    "scale_depth": (None,),
    "scale_emb": (None, 1.0),
    "sliding_window_pattern": (None,),
    "use_parallel_residual": (None, False),
    "use_qk_norm": (None, False),
}


# ---------------------------------------------------------------------------------------------------------- families


def _llama(keys):
    bias = keys["attention_bias"]
    return {"windows": _no_windows(keys), "qkv_bias": bias, "o_bias": bias, "mlp_bias": keys["mlp_bias"]}


def _mistral(keys):
    return {"windows": _windows(keys, keys["sliding_window"])}  # `layer_types` make it a Ministral in transformers


def _qwen2(keys):
    window = keys["sliding_window"] if keys["use_sliding_window"] else None
    return {"windows": _windows(keys, window, keys["max_window_layers"]), "qkv_bias": True}


def _qwen3(keys):
    bias = keys["attention_bias"]
    return {**_qwen2(keys), "qkv_bias": bias, "o_bias": bias, "qk_norm": True}


QWEN = {
    "num_key_value_heads": 32, "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
    "max_window_layers": 28, "layer_types": None,
}  # fmt: skip


class Family(NamedTuple):
    """A model family.

    structure: a function from the keys of a config.json, completed by the defaults, to the fields of `Config` that this
        family sets in its own way.
    defaults: of its transformers class, where they are not those in `COMMON`.
    """

    structure: Callable[[dict], dict]
    defaults: dict[str, Any]


FAMILIES = {
    "llama": Family(
        _llama,
        {"num_key_value_heads": None, "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        _mistral,
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096, "layer_types": None},
    ),
    "qwen2": Family(_qwen2, QWEN),
    "qwen3": Family(_qwen3, {**QWEN, "head_dim": 128, "attention_bias": False}),
}


# ------------------------------------------------------------------------------------------------------------ reading


def config_from_json(values: dict) -> Config:
    """The `Config` of a parsed config.json. Raises ValueError that names the key that is damaged or not supported."""
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"model_type {name!r} is not supported, only {', '.join(FAMILIES)} are")
    family = FAMILIES[name]
    defaults = {**COMMON, **family.defaults}
    keys = {**defaults, **values}
    _check_supported(values, family)
    _check_kinds(keys, defaults)
    heads = keys["num_attention_heads"]
    common = {
        **{key: keys[key] for key in SIZES},
        "num_key_value_heads": heads if keys["num_key_value_heads"] is None else keys["num_key_value_heads"],
        "head_dim": keys["hidden_size"] // heads if keys["head_dim"] is None else keys["head_dim"],
        "rms_norm_eps": keys["rms_norm_eps"],
        "rope": _rope(keys),
        "max_position_embeddings": keys["max_position_embeddings"],
        "tie_word_embeddings": keys["tie_word_embeddings"],
    }
    config = Config(**{**common, **family.structure(keys)})  # what a family sets in its own way wins
    if heads % config.num_key_value_heads or config.head_dim % 2:
        raise ValueError(
            f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads "
            f"({config.num_key_value_heads}), and head_dim ({config.head_dim}) even"
        )
    if heads * config.head_dim > LARGEST:
        raise ValueError(f"num_attention_heads times head_dim is above {LARGEST:,}")
    return config


def _windows(keys, window, first=0):
    """The window of each layer, or None: as `layer_types` says, else in the layers from `first` on."""
    if keys["layer_types"] is None:
        return tuple(window if layer >= first else None for layer in range(keys["num_hidden_layers"]))
    kinds = _layer_types(keys)
    if window is None and "sliding_attention" in kinds:
        raise ValueError("layer_types has 'sliding_attention', but there is no sliding_window (or use_sliding_window)")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _no_windows(keys):
    """No window in any layer, of a family that has none; keys that say otherwise are refused."""
    family, window = keys["model_type"], keys.get("sliding_window")
    if keys.get("layer_types") is not None and "sliding_attention" in _layer_types(keys):
        raise ValueError(f"layer_types has 'sliding_attention', but {family} models have no sliding window")
    if window is not None and not (type(window) is int and window >= keys["max_position_embeddings"]):
        raise ValueError(f"sliding_window is {window!r}, but {family} models have no sliding window: remove it")
    return (None,) * keys["num_hidden_layers"]


def _layer_types(keys):
    """`layer_types`, checked: a list with one of the two supported kinds for each layer."""
    kinds, layers = keys["layer_types"], keys["num_hidden_layers"]
    if not isinstance(kinds, list) or len(kinds) != layers:
        count = len(kinds) if isinstance(kinds, list) else repr(kinds)
        raise ValueError(f"layer_types names {count} layers, num_hidden_layers {layers}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer_types has {kind!r}, only full_attention and sliding_attention are supported")
    return kinds


# --------------------------------------------------------------------------------------------------------------- RoPE

ROPE_KEYS = {  # that each type of scaling needs
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
MORE_ROPE_KEYS = (  # that may be there; `finetuned` changes nothing
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "finetuned",
)  # fmt: skip


def _rope(keys):
    """RoPE from `rope_scaling` and `rope_theta`, or from transformers 5's `rope_parameters`, which hold both.

    As in transformers `rope_scaling` wins where both are there; refused if a rope_theta would be lost by that.
    """
    scaling, parameters = (_rope_dict(keys, name) for name in ("rope_scaling", "rope_parameters"))
    values = scaling or parameters
    theta = values.get("rope_theta", keys["rope_theta"])
    _check_number("rope_theta", theta)
    if parameters.get("rope_theta", theta) != theta:
        raise ValueError(
            f"rope_scaling and rope_parameters are both set, with rope_theta {theta} and {parameters['rope_theta']}: "
            "write all of it in rope_parameters and remove rope_scaling"
        )
    kind = values.get("rope_type", values.get("type", "default"))
    needed = ROPE_KEYS[kind]
    missing = [key for key in needed if key not in values]
    if missing:
        raise ValueError(f"key {missing[0]!r} is missing, which rope type {kind} needs")
    numbers = {"theta": theta} | {key: values[key] for key in needed}
    for name, value in numbers.items():
        _check_number(f"RoPE's {name}", value)
    if kind != "llama3":
        return RoPE(scaling=kind, **numbers)
    if numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise ValueError("RoPE's low_freq_factor must be below its high_freq_factor")
    return RoPE(scaling=kind, **numbers, original_context=_original_context(keys, values))


def _rope_dict(keys, name):
    """One of the two dicts about RoPE, {} if absent; ValueError for what it says that is not supported."""
    values = keys.get(name) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{name} is {values!r}, it must be an object")
    kind = values.get("rope_type", values.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise ValueError(f"{name}: rope type {kind!r} is not supported, only {', '.join(ROPE_KEYS)} are")
    for key, value in values.items():
        if key not in (*ROPE_KEYS["llama3"], *MORE_ROPE_KEYS):
            raise ValueError(f"{name}: {key} is not supported")
        if key == "partial_rotary_factor" and value not in FOREIGN[key]:
            raise ValueError(f"{name}: {key} {value!r} is not supported")
    return values


def _original_context(keys, values):
    """The context of pre-training, which llama3's scaling takes: at either place, else the context now."""
    name = "original_max_position_embeddings"
    context = keys.get(name, values.get(name, keys["max_position_embeddings"]))
    _check_size(name, context)
    return context


# ------------------------------------------------------------------------------------------------------------- checks


def _check_supported(values, family):
    """Raise ValueError for keys that would change the computation in a way that the decoder does not have."""
    if values.get("quantization_config"):
        raise ValueError("the weights are already quantised (quantization_config): take the original ones")
    for key, harmless in FOREIGN.items():
        if key in values and key not in family.defaults and values[key] not in harmless:
            raise ValueError(f"{key} {values[key]!r} is not supported for model_type {values['model_type']!r}")
    if values.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise ValueError(f"hidden_act {values['hidden_act']!r} is not supported, only silu is")


def _check_kinds(keys, defaults):
    """Raise ValueError for a value of the wrong kind. keys: of the file, completed by `defaults`."""
    for key in SIZES:
        if key not in keys:
            raise ValueError(f"key {key!r} is missing")
        _check_size(key, keys[key], most=MOST_LAYERS if key == "num_hidden_layers" else LARGEST)
    _check_number("rms_norm_eps", keys["rms_norm_eps"])
    for key, default in defaults.items():
        may_be_null = default is None or key in MAY_BE_NULL
        if type(default) is bool and type(keys[key]) is not bool:
            raise ValueError(f"{key} is {keys[key]!r}, it must be true or false")
        if key in OTHER_SIZES and not (may_be_null and keys[key] is None):
            _check_size(key, keys[key], least=OTHER_SIZES[key])


def _check_size(name, value, least=1, most=LARGEST):
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}, it must be a whole number from {least} to {most:,}")


def _check_number(name, value):
    if type(value) not in (int, float) or not 0 < value < LARGEST_NUMBER:
        raise ValueError(f"{name} is {value!r}, it must be a number above 0 and below {LARGEST_NUMBER:g}")
