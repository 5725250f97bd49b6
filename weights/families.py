"""Model families: what the keys of a checkpoint's config.json mean, as the decoder's `Config`.

A family is defined by its class in transformers: a key that config.json leaves out has that class's default. A value
that is not understood is refused by name, and so is a key of another family that would change what is computed
(`FOREIGN`). As in transformers, a key that no family has is ignored. tests/weights/test_families.py compares each row
here with the class, and the logits with its model's, for files with keys left out, changed, or spelled in two ways.

To add a family: a function that gives what is its own, a row in `FAMILIES`, and if its tensors are not called like
Llama's, a table in names.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from experts import ExpertConfig
from model import Config
from ops.alibi import alibi_slopes, mpt_slopes
from weights.config_keys import LARGEST, MOST_EXPERTS, MOST_LAYERS, check_number, check_size
from weights.rope_config import read_rope, read_ropes_by_kind

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OTHER_SIZES = {  # and the least that they may be
    "num_key_value_heads": 1, "head_dim": 1, "max_position_embeddings": 1, "sliding_window": 1, "max_window_layers": 0,
    "word_embed_proj_dim": 1, "no_rope_layer_interval": 1, "sliding_window_pattern": 1, "num_experts": 0,
    "num_experts_per_tok": 1, "moe_intermediate_size": 1, "shared_expert_intermediate_size": 1,
    "decoder_sparse_step": 1,
}  # fmt: skip
NUMBERS = (
    "norm_eps", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv",
    "embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier", "logit_scale",
    "rope_local_base_freq", "swiglu_alpha", "swiglu_limit",
)  # fmt: skip

# Defaults that all families share. In num_key_value_heads and head_dim None means: as many as there are query heads,
# and the hidden size divided among them; in intermediate_size four times the hidden size.
COMMON = {
    "hidden_act": "silu", "norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0, "head_dim": None,
}  # fmt: skip
# Where a family has another name for these, transformers passes over the common one; for sizes it knows both.
NO_ALIASES = ("norm_eps", "hidden_act", "intermediate_size", "rope_theta", "partial_rotary_factor")
# These may be null, and every key whose default is None.
MAY_BE_NULL = (
    "num_key_value_heads", "sliding_window", "layer_types", "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip

# config.json's names of activations, and the decoder's.
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu2",
}  # fmt: skip

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


# Kinds of models that the decoder does not compute, and keys of config.json by which they are known.
KINDS_LEFT_OUT = {
    "an encoder-decoder": ("is_encoder_decoder",),
    "with a vision tower": ("vision_config",),
    "with an encoder of sound": ("audio_config",),
    "with latent attention (MLA)": ("kv_lora_rank",),
    "with state-space layers (Mamba)": ("state_size", "ssm_cfg", "mamba_d_state", "mamba_num_heads", "ssm_state_size"),
    "with linear attention": ("linear_num_value_heads",),
    "with an embedding for each layer": ("hidden_size_per_layer_input",),
    "whose code comes with it (auto_map) and is not run": ("auto_map",),
}

# ---------------------------------------------------------------------------------------------------------- families
# A function gets the keys of a config.json, completed by defaults and under their common names, and returns the fields
# of `Config` that its family sets in its own way.

LAYER_NORM = {"norm": "layer", "norm_bias": True}
PLAIN_MLP = {"gated": False}


def _llama(keys):
    return {"windows": _no_windows(keys), **_attention_biases(keys), "mlp_bias": keys["mlp_bias"]}


def _mistral(keys):
    return {"windows": _windows(keys, keys["sliding_window"])}  # `layer_types` make it a Ministral in transformers


def _one_window(keys):
    return {"windows": (keys["sliding_window"],) * keys["num_hidden_layers"]}


def _qwen2(keys):
    window = keys["sliding_window"] if keys["use_sliding_window"] else None
    return {"windows": _windows(keys, window, keys["max_window_layers"]), "qkv_bias": True}


def _qwen3(keys):
    return {**_qwen2(keys), **_attention_biases(keys), "qk_norm": "head"}


def _seed_oss(keys):
    return {"qkv_bias": keys["attention_bias"], "o_bias": keys["attention_out_bias"], "mlp_bias": keys["mlp_bias"]}


def _smollm3(keys):
    layers, turns = keys["num_hidden_layers"], keys["no_rope_layers"]
    if turns is None:
        turns = [int((layer + 1) % keys["no_rope_layer_interval"] != 0) for layer in range(layers)]
    if not isinstance(turns, list) or len(turns) != layers or any(turn not in (0, 1) for turn in turns):
        raise ValueError(f"no_rope_layers must be a list of {layers} numbers, 1 for a layer with RoPE and 0 without")
    window = keys["sliding_window"] if keys["use_sliding_window"] else None
    if keys["layer_types"] is None:
        windows = tuple(None if turn else window for turn in turns)
    else:
        windows = _windows(keys, window)
    ropes = tuple(_rope(keys) if turn else None for turn in turns)
    return {"windows": windows, "ropes": ropes, **_attention_biases(keys), "mlp_bias": keys["mlp_bias"]}


def _granite(keys):
    return {
        "scales": (float(keys["attention_multiplier"]),) * keys["num_hidden_layers"],
        "embedding_scale": keys["embedding_multiplier"], "residual_scale": keys["residual_multiplier"],
        "logit_scale": 1 / keys["logits_scaling"], **_attention_biases(keys), "mlp_bias": keys["mlp_bias"],
    }  # fmt: skip


def _gemma(keys):
    return {"norm_gain": "1 + weight", "embedding_scale": keys["hidden_size"] ** 0.5, **_attention_biases(keys)}


def _gemma2(keys):
    return {
        **_gemma(keys), "norm_places": "both",
        "windows": _windows(keys, keys["sliding_window"], every=keys.get("sliding_window_pattern", 2)),
        "scales": (keys["query_pre_attn_scalar"] ** -0.5,) * keys["num_hidden_layers"],
        "softcap": keys["attn_logit_softcapping"], "logit_softcap": keys["final_logit_softcapping"],
    }  # fmt: skip


def _gemma3(keys):
    _only(keys, {"attn_logit_softcapping": None})  # transformers' Gemma 3 passes over it
    kinds = _kinds(keys, every=keys["sliding_window_pattern"])
    ropes = read_ropes_by_kind(keys, _head_dim(keys), kinds, keys["rope_local_base_freq"])
    return {**_gemma2(keys), "ropes": ropes, "qk_norm": "head"}


def _phi(keys):
    return {
        **LAYER_NORM, **PLAIN_MLP, **_all_biases(True), "head_bias": True, "parallel_residual": True,
        "shared_norm": True, "qk_norm": "head" if keys["qk_layernorm"] else None,
    }  # fmt: skip


def _olmo(keys):
    return {"norm": "layer", "norm_gain": None, "clip_qkv": keys["clip_qkv"], **_attention_biases(keys)}


def _olmo2(keys):
    return {"norm_places": "after", "qk_norm": "joint", **_attention_biases(keys)}


def _olmo3(keys):
    ropes = read_ropes_by_kind(keys, _head_dim(keys), _kinds(keys, every=4), keys["rope_theta"])
    return {**_olmo2(keys), "windows": _windows(keys, keys["sliding_window"], every=4), "ropes": ropes}


def _cohere(keys):
    return {
        "norm": "layer", "parallel_residual": True, "shared_norm": True, "logit_scale": keys["logit_scale"],
        "ropes": (_rope(keys, interleaved=True),) * keys["num_hidden_layers"], **_attention_biases(keys),
        "qk_norm": "each head" if keys.get("use_qk_norm") else None,
    }  # fmt: skip


def _cohere2(keys):
    kinds, rope = _kinds(keys, every=keys["sliding_window_pattern"]), _rope(keys, interleaved=True)
    ropes = tuple(rope if kind == "sliding_attention" else None for kind in kinds)
    windows = _windows(keys, keys["sliding_window"], every=keys["sliding_window_pattern"])
    return {**_cohere(keys), "ropes": ropes, "windows": windows}


def _glm(keys):
    ropes = (_rope(keys, interleaved=True),) * keys["num_hidden_layers"]
    return {"ropes": ropes, "qkv_bias": keys["attention_bias"]}


def _glm4(keys):
    return {**_glm(keys), "norm_places": "both"}


def _nemotron(keys):
    biases = {**_attention_biases(keys), "mlp_bias": keys["mlp_bias"]}
    return {**LAYER_NORM, **PLAIN_MLP, "norm_gain": "1 + weight", **biases}


def _starcoder2(keys):
    return {**LAYER_NORM, **PLAIN_MLP, **_all_biases(keys["use_bias"]), **_one_window(keys)}


def _stablelm(keys):
    parallel = keys["use_parallel_residual"]
    return {
        **LAYER_NORM, "qkv_bias": keys["use_qkv_bias"], "parallel_residual": parallel, "shared_norm": parallel,
        "qk_norm": "each head" if keys["qk_layernorm"] else None,
    }  # fmt: skip


def _gpt_neox(keys):
    return {
        **LAYER_NORM, **PLAIN_MLP, **_all_biases(True), **_attention_biases(keys),
        "parallel_residual": keys["use_parallel_residual"],
    }  # fmt: skip


def _falcon(keys):
    new, parallel, norms = keys["new_decoder_architecture"], keys["parallel_attn"], keys["num_ln_in_parallel_attn"]
    norms = (2 if new else 1) if norms is None else norms
    if norms not in (1, 2) or (norms == 2 and parallel and not new) or (new and not parallel):
        raise ValueError(
            f"num_ln_in_parallel_attn {norms} with parallel_attn {parallel} and new_decoder_architecture {new} is not "
            "supported: transformers has no such Falcon either"
        )
    heads = keys["num_attention_heads"]
    fields = {
        **LAYER_NORM, **PLAIN_MLP, **_all_biases(keys["bias"]), "parallel_residual": parallel,
        "shared_norm": parallel and norms == 1,
        "num_key_value_heads": (keys["num_kv_heads"] or heads) if new else 1 if keys["multi_query"] else heads,
    }  # fmt: skip
    if keys["alibi"]:
        slopes = tuple(slope * _head_dim(keys) ** -0.5 for slope in alibi_slopes(heads))
        fields |= {"slopes": slopes, "ropes": (None,) * keys["num_hidden_layers"]}
    return fields


def _opt(keys):
    affine, before = keys["layer_norm_elementwise_affine"], keys["do_layer_norm_before"]
    size = keys["word_embed_proj_dim"] or keys["hidden_size"]
    return {
        **PLAIN_MLP, **_all_biases(keys["enable_bias"]), **_learned(keys, offset=2), "norm": "layer",
        "norm_bias": affine, "norm_gain": "weight" if affine else None, "norm_places": "before" if before else "sum",
        "final_norm": before and not keys["_remove_final_layer_norm"],
        "embedding_size": None if size == keys["hidden_size"] else size,
    }  # fmt: skip


def _mpt(keys):
    attention = {**MPT_ATTENTION, **_object(keys, "attn_config")}
    _only(
        keys,
        {"no_bias": True, "expansion_ratio": 4, "logit_scale": None, "embedding_fraction": 1.0,
         "norm_type": "low_precision_layernorm"},
    )  # fmt: skip
    _only(attention, {"alibi": True, "qk_ln": False, "prefix_lm": False, "attn_type": "multihead_attention",
                      "attn_uses_sequence_id": False})  # fmt: skip
    for name in ("clip_qkv", "softmax_scale", "alibi_bias_max"):
        if attention[name] is not None:
            check_number(f"attn_config: {name}", attention[name])
    layers, scale = keys["num_hidden_layers"], attention["softmax_scale"] or _head_dim(keys) ** -0.5
    return {
        **PLAIN_MLP, "norm": "layer", "clip_qkv": attention["clip_qkv"], "scales": (scale,) * layers,
        "ropes": (None,) * layers, "slopes": mpt_slopes(keys["num_attention_heads"], attention["alibi_bias_max"]),
    }  # fmt: skip


MPT_ATTENTION = {
    "alibi": True, "qk_ln": False, "prefix_lm": False, "attn_type": "multihead_attention", "clip_qkv": None,
    "attn_uses_sequence_id": False, "softmax_scale": None, "alibi_bias_max": 8,
}  # fmt: skip


def _bloom(keys):
    _only(keys, {"apply_residual_connection_post_layernorm": False})
    return {
        **LAYER_NORM, **PLAIN_MLP, **_all_biases(True), "embedding_norm": True, "activation": "gelu_tanh",
        "ropes": (None,) * keys["num_hidden_layers"], "slopes": alibi_slopes(keys["num_attention_heads"]),
    }  # fmt: skip


def _gpt2(keys):
    _only(keys, {"add_cross_attention": False})
    scale = _head_dim(keys) ** -0.5 if keys["scale_attn_weights"] else 1.0
    by_layer = keys.get("scale_attn_by_inverse_layer_idx", False)
    scales = tuple(scale / (layer + 1) if by_layer else scale for layer in range(keys["num_hidden_layers"]))
    return {**LAYER_NORM, **PLAIN_MLP, **_all_biases(True), **_learned(keys), "scales": scales}


def _gpt_bigcode(keys):
    return {**_gpt2(keys), "num_key_value_heads": 1 if keys["multi_query"] else keys["num_attention_heads"]}


def _experts(keys, size, renormalised, **more):
    """Fields of a mixture of experts of this inner size, in all layers."""
    count, chosen = keys["num_experts"], keys["num_experts_per_tok"]
    if not chosen <= count <= MOST_EXPERTS:
        raise ValueError(
            f"num_experts_per_tok {chosen} of {count} experts is not supported: there must be at least as many, and at "
            f"most {MOST_EXPERTS}"
        )
    experts = ExpertConfig(count, chosen, size, renormalised, **more)
    return {"experts": experts, "sparse": (True,) * keys["num_hidden_layers"]}


def _qwen_experts(keys, **more):
    """The same for Qwen, whose models have dense layers among the others."""
    dense, step = keys["mlp_only_layers"] or [], keys["decoder_sparse_step"]
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise ValueError(f"mlp_only_layers is {dense!r}, it must be a list of layers' numbers")
    sparse = [(layer + 1) % step == 0 and layer not in dense for layer in range(keys["num_hidden_layers"])]
    if keys["num_experts"] == 0 or not any(sparse):
        return {}
    fields = _experts(keys, keys["moe_intermediate_size"], keys["norm_topk_prob"], **more)
    return {**fields, "sparse": tuple(sparse)}


def _mixtral(keys):
    if keys["router_jitter_noise"] != 0:
        raise ValueError(f"router_jitter_noise {keys['router_jitter_noise']!r} is not supported, only 0.0 is")
    return {**_one_window(keys), **_experts(keys, keys["intermediate_size"], True)}


def _qwen2_moe(keys):
    layers, window = keys["num_hidden_layers"], keys["sliding_window"] if keys["use_sliding_window"] else None
    if keys["layer_types"] is not None:
        windows = _windows(keys, window)
    else:
        slides = (layer % 2 == 0 and layer < keys["max_window_layers"] for layer in range(layers))
        windows = tuple(window if sliding else None for sliding in slides)
    experts = _qwen_experts(keys, shared_size=keys["shared_expert_intermediate_size"])
    return {"windows": windows, "qkv_bias": keys["qkv_bias"], **experts}


def _qwen3_moe(keys):
    windows = _one_window(keys) if keys["use_sliding_window"] else {}
    return {**windows, **_attention_biases(keys), "qk_norm": "head", **_qwen_experts(keys)}


def _olmoe(keys):
    return {
        "qk_norm": "joint", "clip_qkv": keys["clip_qkv"], **_attention_biases(keys),
        **_experts(keys, keys["intermediate_size"], keys["norm_topk_prob"]),
    }  # fmt: skip


def _gpt_oss(keys):
    _only(keys, {"swiglu_alpha": 1.702, "swiglu_limit": 7.0})
    return {
        **_attention_biases(keys), "mlp_bias": True, "windows": _windows(keys, keys["sliding_window"], every=2),
        "sinks": True, "activation": "clamped_swiglu",
        **_experts(keys, keys["intermediate_size"], True, router_bias=True),
    }  # fmt: skip


# What a config.json may say of weights that are stored in MXFP4 and loaded in bf16.
MXFP4_KEYS = {"quant_method", "modules_to_not_convert", "dequantize"}


class Family(NamedTuple):
    """A model family.

    structure: a function from the keys of a config.json, completed by the defaults, to the fields of `Config` that this
        family sets in its own way.
    defaults: of its transformers class, where they are not those in `COMMON`.
    spelled: what the family calls keys that have another name elsewhere, by their common name.
    older: names of keys in older files, by the family's or the common name.
    packed: whether its weights may be in MXFP4.
    """

    structure: Callable[[dict], dict]
    defaults: dict[str, Any]
    spelled: dict[str, str] = {}
    older: dict[str, str] = {}
    packed: bool = False


MISTRAL = {
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096, "layer_types": None,
}  # fmt: skip
QWEN = {
    "num_key_value_heads": 32, "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
    "max_window_layers": 28, "layer_types": None,
}  # fmt: skip
OLMO = {"num_key_value_heads": None, "max_position_embeddings": 2048, "attention_bias": False, "norm_eps": 1e-5}
GEMMA = {
    "max_position_embeddings": 8192, "tie_word_embeddings": True, "attention_bias": False, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
GEMMA2 = {
    **GEMMA, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096, "layer_types": None,
    "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
}  # fmt: skip
COHERE = {
    "num_key_value_heads": None, "max_position_embeddings": 8192, "attention_bias": False, "logit_scale": 0.0625,
    "norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
GLM = {
    "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072, "attention_bias": True,
    "norm_eps": 1.5625e-7, "partial_rotary_factor": 0.5,
}  # fmt: skip
GPT2 = {
    "max_position_embeddings": 1024, "norm_eps": 1e-5, "tie_word_embeddings": True, "intermediate_size": None,
    "hidden_act": "gelu_new", "scale_attn_weights": True, "add_cross_attention": False,
}  # fmt: skip
GPT2_SPELLED = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions", "intermediate_size": "n_inner", "hidden_act": "activation_function",
    "norm_eps": "layer_norm_epsilon",
}  # fmt: skip
RMS, LN, LN_EPSILON = {"norm_eps": "rms_norm_eps"}, {"norm_eps": "layer_norm_eps"}, {"norm_eps": "layer_norm_epsilon"}

QWEN_MOE = {
    "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096, "decoder_sparse_step": 1,
    "norm_topk_prob": False, "mlp_only_layers": None,
}  # fmt: skip

FAMILIES = {
    "llama": Family(
        _llama,
        {"num_key_value_heads": None, "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
        RMS,
    ),
    "mistral": Family(_mistral, MISTRAL, RMS),
    "ministral": Family(_mistral, MISTRAL, RMS),
    "ministral3": Family(
        _one_window,
        {
            "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144, "sliding_window": None,
            "norm_eps": 1e-5, "rope_keys": ("llama_4_scaling_beta",), "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
                "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
            },
        },
        RMS,
    ),
    "qwen2": Family(_qwen2, QWEN, RMS),
    "qwen3": Family(_qwen3, {**QWEN, "head_dim": 128, "attention_bias": False}, RMS),
    "seed_oss": Family(
        _seed_oss,
        {
            "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524288, "attention_bias": True,
            "attention_out_bias": False, "mlp_bias": False,
        },
        RMS,
    ),
    "smollm3": Family(
        _smollm3,
        {
            "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6, "no_rope_layers": None,
            "no_rope_layer_interval": 4, "use_sliding_window": False, "sliding_window": None, "layer_types": None,
            "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
        },
        RMS,
    ),
    "granite": Family(
        _granite,
        {
            "num_key_value_heads": None, "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False,
            "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0,
        },
        RMS,
    ),
    "gemma": Family(_gemma, {**GEMMA, "num_key_value_heads": 16}, RMS),
    "gemma2": Family(_gemma2, GEMMA2, {**RMS, "hidden_act": "hidden_activation"}),
    "gemma3_text": Family(
        _gemma3,
        {
            **GEMMA2, "max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
            "final_logit_softcapping": None, "attn_logit_softcapping": None, "sliding_window_pattern": 6,
        },
        {**RMS, "hidden_act": "hidden_activation"},
    ),
    "phi": Family(
        _phi,
        {
            "num_key_value_heads": None, "max_position_embeddings": 2048, "hidden_act": "gelu_new", "norm_eps": 1e-5,
            "partial_rotary_factor": 0.5, "qk_layernorm": False,
        },
        LN,
    ),
    "phi3": Family(
        _one_window,
        {
            "num_key_value_heads": None, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
            "norm_eps": 1e-5, "partial_rotary_factor": 1.0, "sliding_window": None,
        },
        RMS,
    ),
    "olmo": Family(_olmo, {**OLMO, "clip_qkv": None}),
    "olmo2": Family(_olmo2, OLMO, RMS),
    "olmo3": Family(
        _olmo3, {**OLMO, "rope_theta": 5e5, "sliding_window": 4096, "layer_types": None}, RMS,
    ),
    "cohere": Family(_cohere, {**COHERE, "rope_theta": 5e5, "use_qk_norm": False}, LN),
    "cohere2": Family(
        _cohere2, {**COHERE, "sliding_window": 4096, "layer_types": None, "sliding_window_pattern": 4}, LN,
    ),
    "glm": Family(_glm, GLM, RMS),
    "glm4": Family(_glm4, GLM, RMS),
    "nemotron": Family(
        _nemotron,
        {
            "num_key_value_heads": None, "max_position_embeddings": 4096, "hidden_act": "relu2",
            "norm_eps": 1e-5, "partial_rotary_factor": 0.5, "attention_bias": False, "mlp_bias": False,
        },
    ),
    "starcoder2": Family(
        _starcoder2,
        {
            "num_key_value_heads": 2, "max_position_embeddings": 4096, "hidden_act": "gelu_pytorch_tanh",
            "norm_eps": 1e-5, "sliding_window": None, "use_bias": True, "tie_word_embeddings": True,
        },
        {"norm_eps": "norm_epsilon"},
    ),
    "stablelm": Family(
        _stablelm,
        {
            "num_key_value_heads": 32, "max_position_embeddings": 4096, "norm_eps": 1e-5, "use_qkv_bias": False,
            "partial_rotary_factor": 0.25, "qk_layernorm": False, "use_parallel_residual": False,
        },
        LN,
    ),
    "gpt_neox": Family(
        _gpt_neox,
        {
            "num_key_value_heads": None, "max_position_embeddings": 2048, "hidden_act": "gelu", "norm_eps": 1e-5,
            "partial_rotary_factor": 0.25, "attention_bias": True, "use_parallel_residual": True,
        },
        LN,
        {"partial_rotary_factor": "rotary_pct", "rope_theta": "rotary_emb_base"},
    ),
    "falcon": Family(
        _falcon,
        {
            "num_key_value_heads": None, "max_position_embeddings": 2048, "hidden_act": "gelu", "norm_eps": 1e-5,
            "tie_word_embeddings": True, "intermediate_size": None, "num_kv_heads": None, "alibi": False,
            "new_decoder_architecture": False, "multi_query": True, "parallel_attn": True, "bias": False,
            "num_ln_in_parallel_attn": None,
        },
        {**LN_EPSILON, "hidden_act": "activation", "intermediate_size": "ffn_hidden_size"},
        {"hidden_size": "n_embed"},
    ),
    "opt": Family(
        _opt,
        {
            "num_key_value_heads": None, "max_position_embeddings": 2048, "hidden_act": "relu", "norm_eps": 1e-5,
            "tie_word_embeddings": True, "do_layer_norm_before": True, "_remove_final_layer_norm": False,
            "word_embed_proj_dim": None, "enable_bias": True, "layer_norm_elementwise_affine": True,
        },
        {"hidden_act": "activation_function", "intermediate_size": "ffn_dim"},
    ),
    "mpt": Family(
        _mpt,
        {
            "num_key_value_heads": None, "max_position_embeddings": 2048, "hidden_act": "gelu", "norm_eps": 1e-5,
            "tie_word_embeddings": True, "intermediate_size": None, "attn_config": None, "no_bias": True,
            "expansion_ratio": 4, "logit_scale": None, "embedding_fraction": 1.0,
            "norm_type": "low_precision_layernorm",
        },
        {
            **LN_EPSILON, "hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
            "max_position_embeddings": "max_seq_len",
        },
    ),
    "bloom": Family(
        _bloom,
        {
            "num_key_value_heads": None, "max_position_embeddings": 2048, "hidden_act": "gelu", "norm_eps": 1e-5,
            "tie_word_embeddings": True, "intermediate_size": None, "apply_residual_connection_post_layernorm": False,
        },
        {
            **LN_EPSILON, "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
            "max_position_embeddings": "seq_length",
        },
        {"hidden_size": "n_embed"},
    ),
    "gpt2": Family(
        _gpt2, {**GPT2, "num_key_value_heads": None, "scale_attn_by_inverse_layer_idx": False}, GPT2_SPELLED,
    ),
    "gpt_bigcode": Family(
        _gpt_bigcode,
        {**GPT2, "num_key_value_heads": None, "hidden_act": "gelu_pytorch_tanh", "multi_query": True},
        GPT2_SPELLED,
    ),
    "mixtral": Family(
        _mixtral,
        {
            "num_key_value_heads": 8, "max_position_embeddings": 131072, "norm_eps": 1e-5, "rope_theta": 1e6,
            "sliding_window": None, "num_experts_per_tok": 2, "num_experts": 8, "router_jitter_noise": 0.0,
        },
        {**RMS, "num_experts": "num_local_experts"},
    ),
    "qwen2_moe": Family(
        _qwen2_moe,
        {
            **QWEN_MOE, "num_key_value_heads": 16, "max_window_layers": 28, "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60, "qkv_bias": True,
            "layer_types": None,
        },
        RMS,
    ),
    "qwen3_moe": Family(
        _qwen3_moe,
        {
            **QWEN_MOE, "num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts_per_tok": 8,
            "num_experts": 128, "attention_bias": False,
        },
        RMS, {"num_experts": "num_local_experts"},
    ),
    "olmoe": Family(
        _olmoe,
        {
            "num_key_value_heads": None, "max_position_embeddings": 4096, "norm_eps": 1e-5, "attention_bias": False,
            "clip_qkv": None, "num_experts_per_tok": 8, "num_experts": 64, "norm_topk_prob": False,
        },
        RMS, {"num_experts": "num_local_experts"},
    ),
    "gpt_oss": Family(
        _gpt_oss,
        {
            "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072, "norm_eps": 1e-5,
            "rope_theta": 150000.0, "sliding_window": 128, "num_experts_per_tok": 4, "num_experts": 128,
            "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "layer_types": None, "attention_bias": True,
            "rope_parameters": {
                "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
                "beta_slow": 1.0, "truncate": False,
            },
        },
        {**RMS, "num_experts": "num_local_experts"}, packed=True,
    ),
}  # fmt: skip

# What older files call a family, and what was built into that name.
OLDER_NAMES = {"RefinedWebModel": ("falcon", {}), "RefinedWeb": ("falcon", {"new_decoder_architecture": True})}
REFINED_WEB = {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "n_head_kv": "num_kv_heads"}


# ------------------------------------------------------------------------------------------------------------ reading


def current_values(values: dict) -> dict:
    """config.json's values as transformers' newest version writes them, where an older name of a family stands there.

    So a model that is written from them is one that transformers knows.
    """
    name = values.get("model_type")
    if not isinstance(name, str) or name not in OLDER_NAMES:
        return values
    name, built_in = OLDER_NAMES[name]
    renamed = {REFINED_WEB.get(key, key): value for key, value in values.items() if key != "auto_map"}
    return {**built_in, **renamed, "model_type": name, "architectures": ["FalconForCausalLM"]}


def config_from_json(values: dict) -> Config:
    """The `Config` of a parsed config.json. Raises ValueError that names the key that is damaged or not supported."""
    values = current_values(values)
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        why = next((f", {kind}," for kind, keys in KINDS_LEFT_OUT.items() if any(map(values.get, keys))), "")
        raise ValueError(f"model_type {name!r}{why} is not supported, only {', '.join(FAMILIES)} are")
    family = FAMILIES[name]
    keys = {**COMMON, **family.defaults, **_under_common_names(values, family)}
    if values.get("rope_parameters") is None:  # null is as if the key were absent; rope_scaling takes their place
        keys["rope_parameters"] = None if keys.get("rope_scaling") else family.defaults.get("rope_parameters")
    _check_supported(values, family)
    _check_kinds(keys, family)
    _check_activation(keys, family)
    heads = keys["num_attention_heads"]
    common = {
        **{key: keys[key] for key in SIZES},
        "num_key_value_heads": heads if keys["num_key_value_heads"] is None else keys["num_key_value_heads"],
        "head_dim": _head_dim(keys),
        "norm_eps": keys["norm_eps"],
        "max_position_embeddings": keys["max_position_embeddings"],
        "tie_word_embeddings": keys["tie_word_embeddings"],
        "activation": ACTIVATIONS[keys["hidden_act"]],
        "windows": (None,) * keys["num_hidden_layers"],
        "scales": (_head_dim(keys) ** -0.5,) * keys["num_hidden_layers"],
        "family": name,
    }
    if common["intermediate_size"] is None:
        common["intermediate_size"] = 4 * keys["hidden_size"]
    own = family.structure(keys)  # what a family sets in its own way wins
    if "ropes" not in own:
        own["ropes"] = (_rope(keys),) * keys["num_hidden_layers"]
    config = Config(**{**common, **own})
    if heads % config.num_key_value_heads or (config.head_dim % 2 and any(config.ropes)):
        raise ValueError(
            f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads "
            f"({config.num_key_value_heads}), and head_dim ({config.head_dim}) even"
        )
    if heads * config.head_dim > LARGEST:
        raise ValueError(f"num_attention_heads times head_dim is above {LARGEST:,}")
    return config


def _under_common_names(values, family):
    """The values with the keys that a family spells in its own way, or once did, under their common names."""
    values, defaults, names = dict(values), {**COMMON, **family.defaults}, {**family.older, **family.spelled}
    for common in NO_ALIASES:
        own = names.get(common, common)
        if common in values and own not in values and values[common] != defaults.get(common):
            raise ValueError(f"{common} is not a key of {values['model_type']} models: write {own}, or remove it")
    for common, own in (*family.older.items(), *family.spelled.items()):
        if own not in values or own == common:
            continue
        value = values.pop(own)
        if values.setdefault(common, value) != value:
            raise ValueError(f"{own} is {value!r}, but {common} is {values[common]!r}: remove one of the two")
    return values


def _rope(keys, interleaved=False):
    return read_rope(keys, _head_dim(keys), interleaved)


def _head_dim(keys):
    return keys["hidden_size"] // keys["num_attention_heads"] if keys["head_dim"] is None else keys["head_dim"]


def _attention_biases(keys):
    return {"qkv_bias": keys["attention_bias"], "o_bias": keys["attention_bias"]}


def _all_biases(there):
    return {"qkv_bias": there, "o_bias": there, "mlp_bias": there}


def _learned(keys, offset=0):
    """Fields of a family that adds a learned embedding of each position, and turns nothing."""
    return {
        "learned_positions": keys["max_position_embeddings"], "position_offset": offset,
        "ropes": (None,) * keys["num_hidden_layers"],
    }  # fmt: skip


def _object(keys, name):
    value = {} if keys[name] is None else keys[name]
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}, it must be an object")
    return value


def _only(keys, supported):
    """Raise ValueError for a key with another value than the one that is supported."""
    for name, value in supported.items():
        if keys[name] != value:
            raise ValueError(f"{name} {keys[name]!r} is not supported, only {value!r} is")


def _kinds(keys, every):
    """The kind of each layer: as `layer_types` says, else every `every`-th sees all tokens."""
    if keys["layer_types"] is not None:
        return _layer_types(keys)
    layers = range(1, keys["num_hidden_layers"] + 1)
    return ["sliding_attention" if layer % every else "full_attention" for layer in layers]


def _windows(keys, window, first=0, every=None):
    """The window of each layer, or None: as `layer_types` says, else in the layers from `first` on.

    every: without `layer_types`, every `every`-th layer sees all tokens.
    """
    if keys["layer_types"] is None and every is None:
        return tuple(window if layer >= first else None for layer in range(keys["num_hidden_layers"]))
    kinds = _layer_types(keys) if every is None else _kinds(keys, every)
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


# ------------------------------------------------------------------------------------------------------------- checks


def _check_supported(values, family):
    """Raise ValueError for keys that would change the computation in a way that the decoder does not have."""
    if values.get("quantization_config") and not (family.packed and _is_mxfp4(values["quantization_config"])):
        raise ValueError("the weights are already quantised (quantization_config): take the original ones")
    own = {*family.defaults, *family.spelled.values(), *family.older.values()}
    for key, harmless in FOREIGN.items():
        if key in values and key not in own and values[key] not in harmless:
            raise ValueError(f"{key} {values[key]!r} is not supported for model_type {values['model_type']!r}")
    if values.get("use_bidirectional_attention"):
        raise ValueError("use_bidirectional_attention is not supported: each token sees those before it")


def _is_mxfp4(quantization):
    known = isinstance(quantization, dict) and quantization.keys() <= MXFP4_KEYS
    return known and quantization.get("quant_method") == "mxfp4"


def _check_kinds(keys, family):
    """Raise ValueError for a value of the wrong kind, under the name that the family gives it.

    keys: of the file, completed by defaults, under their common names.
    """
    defaults = {**COMMON, **family.defaults}
    for key in SIZES:
        name = family.spelled.get(key, key)
        if key not in keys:
            raise ValueError(f"key {name!r} is missing")
        if not (keys[key] is None and key in defaults and defaults[key] is None):
            check_size(name, keys[key], most=MOST_LAYERS if key == "num_hidden_layers" else LARGEST)
    for key, default in defaults.items():
        name, value = family.spelled.get(key, key), keys[key]
        if value is None and (default is None or key in MAY_BE_NULL):
            continue
        if type(default) is bool and type(value) is not bool:
            raise ValueError(f"{name} is {value!r}, it must be true or false")
        if key in OTHER_SIZES:
            unused = key == "sliding_window" and "use_sliding_window" in defaults and not keys["use_sliding_window"]
            check_size(name, value, least=0 if unused else OTHER_SIZES[key])  # Qwen2-MoE's class writes 0 then
        if key in NUMBERS:
            check_number(name, value)
    if _head_dim(keys) < 1:
        raise ValueError(f"hidden_size is {keys['hidden_size']}, less than one for each of the heads")


def _check_activation(keys, family):
    activation = keys["hidden_act"]
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        name = family.spelled.get("hidden_act", "hidden_act")
        raise ValueError(f"{name} {activation!r} is not supported, only {', '.join(ACTIVATIONS)} are")
