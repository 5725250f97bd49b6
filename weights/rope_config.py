"""RoPE as config.json describes it, in transformers' old writing and in that of its version 5."""

from collections.abc import Sequence
from math import log, sqrt

from ops.rope import RoPE
from weights.config_keys import check_number, check_size

# Keys that each type of scaling needs, and others that it knows.
NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
KNOWN = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor"),
}
# Those that may be there with any type; `finetuned` and the length that is noted again change nothing.
ALWAYS = (
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "finetuned",
    "factor", "low_freq_factor", "high_freq_factor", "max_position_embeddings",
)  # fmt: skip
KINDS = ("full_attention", "sliding_attention")


def read_rope(keys: dict, head_dim: int, interleaved: bool = False) -> RoPE:
    """The RoPE of all layers, from `rope_scaling` and `rope_theta`, or transformers 5's `rope_parameters`, with both.

    keys: of config.json, completed by defaults; it has "partial_rotary_factor" if the family turns a part of each head.
    As in transformers `rope_scaling` wins where both are there; refused if a rope_theta would be lost by that.
    """
    scaling, parameters = (_checked(keys, name, keys.get(name)) for name in ("rope_scaling", "rope_parameters"))
    values = scaling or parameters
    theta = values.get("rope_theta", keys["rope_theta"])
    check_number("rope_theta", theta)
    if parameters.get("rope_theta", theta) != theta:
        raise ValueError(
            f"rope_scaling and rope_parameters are both set, with rope_theta {theta} and {parameters['rope_theta']}: "
            "write all of it in rope_parameters and remove rope_scaling"
        )
    return _rope(keys, values, theta, head_dim, interleaved)


def read_ropes_by_kind(keys: dict, head_dim: int, kinds: Sequence[str], local_theta: float) -> tuple[RoPE, ...]:
    """The RoPE of each layer where layers with a window have another (Gemma 3, OLMo 3).

    kinds: of `KINDS`, each layer's. local_theta: of layers with a window, unless their own parameters say otherwise.
    """
    both = keys.get("rope_parameters") or {}
    if not isinstance(both, dict) or any(key not in KINDS for key in both):
        raise ValueError(f"rope_parameters is {both!r}: expected one object for each of {', '.join(KINDS)}")
    full, local = (_checked(keys, "rope_parameters", both.get(kind)) for kind in KINDS)
    full = full | _checked(keys, "rope_scaling", keys.get("rope_scaling"))
    ropes = {
        "full_attention": _rope(keys, full, full.get("rope_theta", keys["rope_theta"]), head_dim, False),
        "sliding_attention": _rope(keys, local, local.get("rope_theta", local_theta), head_dim, False),
    }
    return tuple(ropes[kind] for kind in kinds)


def _kind(values):
    kind = values.get("rope_type", values.get("type", "default"))
    return "longrope" if kind == "su" else kind  # Phi-3's first name for it


def _checked(keys, name, values):
    """One of the dicts about RoPE, {} if absent; ValueError for what it says that is not supported."""
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{name} is {values!r}, it must be an object")
    kind = _kind(values)
    if not isinstance(kind, str) or kind not in NEEDED:
        raise ValueError(f"{name}: rope type {kind!r} is not supported, only {', '.join(NEEDED)} are")
    for key, value in values.items():
        if key not in (*ALWAYS, *NEEDED[kind], *KNOWN.get(kind, ()), *keys.get("rope_keys", ())):
            raise ValueError(f"{name}: {key} is not supported")
        if key == "partial_rotary_factor" and "partial_rotary_factor" not in keys and value not in (None, 1.0):
            raise ValueError(f"{name}: {key} {value!r} is not supported")
    return values


def _rope(keys, values, theta, head_dim, interleaved):
    kind = _kind(values)
    check_number("rope_theta", theta)
    missing = [key for key in NEEDED[kind] if key not in values]
    if missing:
        raise ValueError(f"key {missing[0]!r} is missing, which rope type {kind} needs")
    numbers = {key: values[key] for key in NEEDED[kind] if not key.endswith(("short_factor", "long_factor"))}
    for name, value in numbers.items():
        check_number(f"RoPE's {name}", value)
    dims = _dims(keys, values, head_dim)
    rope = {"theta": theta, "dims": dims, "scaling": kind, "interleaved": interleaved, **numbers}
    if kind == "dynamic":
        return RoPE(**rope, original_context=keys["max_position_embeddings"])
    if kind in ("default", "linear"):
        return RoPE(**rope, **_query_growth(keys, values))
    more = {"llama3": _llama3, "yarn": _yarn, "longrope": _longrope}[kind](keys, values, dims)
    return RoPE(**{**rope, **more, **_query_growth(keys, values)})


def _dims(keys, values, head_dim):
    """How many dimensions of each head turn."""
    factor = values.get("partial_rotary_factor", keys.get("partial_rotary_factor"))
    if factor is None:
        return head_dim
    check_number("partial_rotary_factor", factor)
    dims = int(head_dim * factor)
    if not 0 < dims <= head_dim or dims % 2:
        raise ValueError(f"partial_rotary_factor {factor} of head_dim {head_dim} is {dims}: expected an even number")
    return dims


def _query_growth(keys, values):
    """Of Ministral 3: {} without it."""
    beta = values.get("llama_4_scaling_beta")
    if not beta:
        return {}
    check_number("llama_4_scaling_beta", beta)
    return {"query_growth": beta, "original_context": _original_context(keys, values)}


def _llama3(keys, values, dims):
    if values["low_freq_factor"] >= values["high_freq_factor"]:
        raise ValueError("RoPE's low_freq_factor must be below its high_freq_factor")
    return {"original_context": _original_context(keys, values)}


def _yarn(keys, values, dims):
    """transformers' rules for what the file leaves out."""
    factor, gain = values["factor"], values.get("attention_factor")
    scale, scale_all = (values.get(key) for key in ("mscale", "mscale_all_dim"))
    more = {name: values.get(name) or default for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))}
    for name, value in {**more, "attention_factor": gain, "mscale": scale, "mscale_all_dim": scale_all}.items():
        if value is not None and value != 0:
            check_number(f"RoPE's {name}", value)
    if gain is None and scale and scale_all:
        gain = _yarn_gain(factor, scale) / _yarn_gain(factor, scale_all)
    elif gain is None:
        gain = _yarn_gain(factor, 1.0)
    truncate = values.get("truncate", True)
    if type(truncate) is not bool:
        raise ValueError(f"RoPE's truncate is {truncate!r}, it must be true or false")
    return {**more, "gain": gain, "truncate": truncate, "original_context": _original_context(keys, values)}


def _yarn_gain(factor, scale):
    return 1.0 if factor <= 1 else 0.1 * scale * log(factor) + 1.0


def _longrope(keys, values, dims):
    context = _original_context(keys, values)
    factors = {}
    for name in ("short_factor", "long_factor"):
        numbers = values[name]
        if not isinstance(numbers, list) or len(numbers) != dims // 2:
            raise ValueError(f"RoPE's {name} must be a list of {dims // 2} numbers, one for each pair of dimensions")
        for number in numbers:
            check_number(f"RoPE's {name}", number)
        factors[f"{name}s"] = tuple(float(number) for number in numbers)
    factor, gain = values.get("factor"), values.get("attention_factor")
    factor = keys["max_position_embeddings"] / context if factor is None else factor
    check_number("RoPE's factor", factor)
    if gain is None:
        gain = 1.0 if factor <= 1 else sqrt(1 + log(factor) / log(context))
    check_number("RoPE's attention_factor", gain)
    return {**factors, "gain": gain, "original_context": context}


def _original_context(keys, values):
    """The context of pre-training: at either place, else the context now."""
    name = "original_max_position_embeddings"
    context = keys.get(name, values.get(name, keys["max_position_embeddings"]))
    check_size(name, context, least=2)
    return context
