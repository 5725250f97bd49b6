"""params.json, Meta's and Mistral's, as a config.json: what each key must be, and what the file leaves open.

A key that is not listed is refused by name, unless it is null. A file with hidden_dim is Mistral's.
"""

from pathlib import Path
from typing import Any

from shell.cli import UserError
from shell.files import read_json
from weights.config_keys import LARGEST, LARGEST_NUMBER
from weights.replaced import EMBEDDING, HEAD
from weights.stored import Weights


def _size(value):
    return type(value) is int and 1 <= value <= LARGEST


def _number(value):
    return type(value) in (int, float) and 0 < value < LARGEST_NUMBER


BOTH = {  # keys by what their value must be; those without a default below are needed
    "dim": _size, "n_layers": _size, "n_heads": _size, "n_kv_heads": _size, "norm_eps": _number, "rope_theta": _number,
    "max_seq_len": _size, "max_batch_size": _size,  # the latter is of a run, no part of the model
}  # fmt: skip
META = BOTH | {
    "multiple_of": _size,
    "ffn_dim_multiplier": _number,
    "use_scaled_rope": lambda value: type(value) is bool,
    "vocab_size": lambda value: value == -1 or _size(value),  # -1: as many as the tokenizer has
}
MISTRAL = BOTH | {
    "hidden_dim": _size,
    "head_dim": _size,
    "vocab_size": _size,
    "sliding_window": _size,
    "max_position_embeddings": _size,
    "tied_embeddings": lambda value: type(value) is bool,
    "model_type": lambda value: value == "transformer",
    "causal": lambda value: value is True,
    "use_biases": lambda value: value is False,
}
NEEDED = ("dim", "n_layers", "n_heads", "norm_eps")
MISTRAL_NEEDED = (*NEEDED, "hidden_dim", "head_dim", "vocab_size")
MISTRAL_CONTEXT = 32768  # Mistral 7B's, v0.1 to v0.3


def read_params(path: Path) -> dict[str, Any]:
    """The values in a params.json, without those that are null. Raises UserError for one that is not supported."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: get it from where the weights are from")
    values = read_json(path)
    if values.keys() == {"model"} and isinstance(values["model"], dict):  # Code Llama 70B
        values = values["model"]
    values = {key: value for key, value in values.items() if value is not None}
    known, needed = (MISTRAL, MISTRAL_NEEDED) if "hidden_dim" in values else (META, NEEDED)
    for key, value in values.items():
        if key not in known or not known[key](value):
            raise UserError(f"{path}: {key} = {str(value)[:100]} is not supported")
    missing = [key for key in needed if key not in values]
    if missing:
        raise UserError(f"{path}: key {missing[0]!r} is missing")
    if "head_dim" not in values and values["dim"] % (2 * values["n_heads"]):
        raise UserError(f"{path}: dim {values['dim']} is not n_heads {values['n_heads']} times an even number")
    return values


def config_json(path: Path, params: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """The config.json, a dict, of the model with these `read_params` and weights under Hugging Face's names.

    A line says which context length is written, if the file does not. Raises UserError if the two do not fit.
    """
    dtype = weights.dtypes.get(EMBEDDING)
    tied = params.get("tied_embeddings", True)  # Meta's has no such key
    if params.get("tied_embeddings") and HEAD in weights.shapes:
        raise UserError(f"{path}: tied_embeddings is true, but output.weight differs from tok_embeddings.weight")
    common = {
        "hidden_size": params["dim"],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads", params["n_heads"]),
        "hidden_act": "silu",
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": float(params.get("rope_theta", 10000.0)),
        "tie_word_embeddings": tied and HEAD not in weights.shapes,
        "torch_dtype": str(dtype).removeprefix("torch.") if dtype else "float32",
    }
    return common | (_mistral(path, params) if "hidden_dim" in params else _llama(path, params, weights, common))


def _llama(path, params, weights, common):
    """What config.json says of a model of Meta's, beside what `common` has."""
    rows = weights.shapes.get(EMBEDDING, (0,))[0]
    size = weights.shapes.get("model.layers.0.mlp.gate_proj.weight", (0,))[0]
    if not rows or not size:
        name = "layers.0.feed_forward.w1.weight" if rows else "tok_embeddings.weight"
        raise UserError(f"{path.parent}: the weights have no tensor {name}")
    if "multiple_of" in params and size != (expected := _feed_forward_size(params)):
        raise UserError(f"{path}: multiple_of and ffn_dim_multiplier say that w1 has {expected} rows, it has {size}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": rows if params.get("vocab_size", -1) == -1 else params["vocab_size"],
        "intermediate_size": size,
        "max_position_embeddings": params.get("max_seq_len") or _llama_context(path, params, common),
        "rope_scaling": _llama3_scaling(path, common) if params.get("use_scaled_rope") else None,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _feed_forward_size(params):
    """The rows of w1 by Meta's rule: two thirds of 4 dim, times the multiplier, rounded up to a multiple."""
    size = int(params.get("ffn_dim_multiplier", 1) * int(8 * params["dim"] / 3))
    return -(-size // params["multiple_of"]) * params["multiple_of"]


def _llama_context(path, params, common):
    """The context length, which Meta's file does not have, by what is peculiar to each of its models."""
    theta = common["rope_theta"]
    is_65b = params["n_layers"] == 80 and "n_kv_heads" not in params  # whose norm_eps is that of Llama 2
    if params.get("use_scaled_rope"):
        name, length = "Llama 3.2" if common["tie_word_embeddings"] else "Llama 3.1", 131072
    elif theta == 500000:
        name, length = "Llama 3", 8192
    elif theta > 10000:
        name, length = "Code Llama", 16384
    elif params["norm_eps"] >= 1e-5 and not is_65b:
        name, length = "Llama 2", 4096
    else:
        name, length = "Llama 1", 2048
    print(f"note: {path} names no context length: {length} is written, that of {name}")
    return length


def _llama3_scaling(path, common):
    """RoPE's scaling. The file has no factor, in Meta's code it is 8; on the hub it is 32 for Llama 3.2 1B and 3B.

    Meta confirms 32 (github.com/meta-llama/llama-models/issues/166). These two are the only ones whose head is tied.
    """
    factor, why = (32.0, "tied, as Llama 3.2's") if common["tie_word_embeddings"] else (8.0, "not tied, as Llama 3.1's")
    print(f"note: {path} names no factor for RoPE: {factor:g} is written, as the head is {why}")
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


def _mistral(path, params):
    """What config.json says of a model of Mistral's."""
    context = params.get("max_seq_len", params.get("max_position_embeddings"))
    if context is None:
        context = MISTRAL_CONTEXT
        print(f"note: {path} names no context length: {context} is written, that of Mistral 7B")
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": params["vocab_size"],
        "intermediate_size": params["hidden_dim"],
        "head_dim": params["head_dim"],
        "max_position_embeddings": context,
        "sliding_window": params.get("sliding_window"),
    }
