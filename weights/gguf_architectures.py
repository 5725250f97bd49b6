"""llama.cpp's architectures: what the metadata and the tensors of each mean, one row an architecture.

How each is stored is that of llama.cpp's converter (convert_hf_to_gguf.py and the folder conversion/, July 2025 to
2026), and where a file leaves a setting open, what llama.cpp computes (src/models/): the window of every second layer
of Gemma 2 and GPT-OSS, of five in six of Gemma 3, of three in four of Cohere 2; no RoPE in every fourth layer of
SmolLM3; the scale of Gemma's scores. docs/formats.md says which tensors the converter changes. Activations are those
of the family in transformers: for GELU llama.cpp computes its approximation everywhere.

To add an architecture: a row in `LAYOUTS`, and a class in `CLASSES`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from shell.cli import UserError
from weights.config_keys import MOST_LAYERS, check_size
from weights.families import FAMILIES

# transformers' class of each family, without its end.
CLASSES = {
    "bloom": "Bloom", "cohere": "Cohere", "cohere2": "Cohere2", "falcon": "Falcon", "gemma": "Gemma",
    "gemma2": "Gemma2", "gemma3_text": "Gemma3", "glm": "Glm", "glm4": "Glm4", "gpt2": "GPT2",
    "gpt_bigcode": "GPTBigCode", "gpt_neox": "GPTNeoX", "gpt_oss": "GptOss", "granite": "Granite", "llama": "Llama",
    "ministral3": "Ministral3", "mistral": "Mistral", "mixtral": "Mixtral", "mpt": "Mpt", "nemotron": "Nemotron",
    "olmo": "Olmo", "olmo2": "Olmo2", "olmo3": "Olmo3", "olmoe": "Olmoe", "phi": "Phi", "phi3": "Phi3",
    "qwen2": "Qwen2", "qwen2_moe": "Qwen2Moe", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "seed_oss": "SeedOss",
    "smollm3": "SmolLM3", "stablelm": "StableLm", "starcoder2": "Starcoder2",
}  # fmt: skip

# --------------------------------------------------------------------------------------------------------- tensors

NAMES = {
    "token_embd": "model.embed_tokens", "token_embd_norm": "model.embed_norm", "position_embd": "model.embed_positions",
    "output_norm": "model.norm", "output": "lm_head",
}  # fmt: skip
LAYER_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "post_attention_norm": "attention_output_norm",
    "post_ffw_norm": "mlp_output_norm", "ffn_gate_inp": "mlp.gate", "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj", "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}  # fmt: skip
QKV, SINKS = "attn_qkv", "attn_sinks"
# Tensors with those of all experts of a layer, one after the other.
STACKED = {f"ffn_{part}_exps": f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")}
ROPE_FACTORS = "rope_freqs.weight"  # what Llama 3's scaling divides each frequency by
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"  # the same of longrope

# Names that mean something else in some architectures.
SECOND_NORM = {"post_attention_norm": "post_attention_layernorm"}
TWO_FALCON_NORMS = {"attn_norm": "post_attention_layernorm", "attn_norm_2": "input_layernorm"}


# ------------------------------------------------------------------------------------------------------- settings
# A function gets the `GGUFWeights` and returns keys of config.json under their common names (`FAMILIES`).

EMBEDDING, FIRST = "model.embed_tokens.weight", "model.layers.0."
# Keys that say whether there are biases, by the bias that tells.
BIASES = {
    "attention_bias": "self_attn.q_proj", "attention_out_bias": "self_attn.o_proj", "bias": "self_attn.q_proj",
    "mlp_bias": "mlp.up_proj", "qkv_bias": "self_attn.q_proj", "use_bias": "self_attn.q_proj",
    "use_qkv_bias": "self_attn.q_proj",
}  # fmt: skip


def has(weights: Any, name: str) -> bool:
    """Whether the first layer has a tensor."""
    return FIRST + name in weights.shapes


def biases(weights: Any, family: str) -> dict[str, bool]:
    """The keys of a family that say which biases there are."""
    own = FAMILIES[family].defaults
    return {key: has(weights, f"{module}.bias") for key, module in BIASES.items() if key in own}


def only(weights: Any, key: str, found: Any, *allowed: Any) -> None:
    """Raise UserError, which names the key, for another value than those."""
    if found not in allowed:
        raise UserError(f"{weights.path}: {key} = {found} is not supported, only {', '.join(map(str, allowed))}")


def layer_types(weights: Any, every: int) -> list[str]:
    """The kind of each layer: as the file says, else all but every `every`-th have a window."""
    layers, key = weights.number("block_count"), "attention.sliding_window_pattern"
    check_size("block_count", layers, most=MOST_LAYERS)
    pattern = weights.get(key, every)
    if not isinstance(pattern, list):
        pattern = [bool((layer + 1) % pattern) for layer in range(layers)]
    if len(pattern) != layers:
        raise UserError(f"{weights.path}: {key} is of {len(pattern)} layers, there are {layers}")
    return ["sliding_attention" if sliding else "full_attention" for sliding in pattern]


def _nothing_more(weights):
    return {}


def _window(weights):
    return {"sliding_window": weights.number("attention.sliding_window", 0) or None}


def _llama_family(weights):
    if weights.number("expert_count", 0):
        return "mixtral"
    return "mistral" if weights.number("attention.sliding_window", 0) else "llama"


def _llama(weights):
    family = _llama_family(weights)
    weights.number("expert_used_count", 0)  # 0 in old files of models without experts
    if family == "llama":
        return {}
    return _window(weights) if family == "mistral" else {**_window(weights), **_experts(weights)}


def _mistral3_family(weights):
    return "ministral3" if weights.number("attention.temperature_scale", 0) else "mistral"


SOFTMAX, SOFTMAX_OF_CHOSEN = 1, 3  # llama.cpp's numbers of how a router's scores become weights


def _experts(weights, gating=SOFTMAX):
    only(weights, "expert_gating_func", weights.number("expert_gating_func", gating), gating)
    only(weights, "expert_weights_scale", weights.number("expert_weights_scale", 1.0), 0.0, 1.0)
    return {"num_experts": weights.number("expert_count"), "num_experts_per_tok": weights.number("expert_used_count")}


def _renormalised(weights, default):
    """Experts, and whether the weights of the chosen ones are made to sum to 1."""
    return {**_experts(weights), "norm_topk_prob": bool(weights.number("expert_weights_norm", default))}


def _qwen2_moe(weights):
    return {
        **_renormalised(weights, False), "moe_intermediate_size": weights.number("expert_feed_forward_length"),
        "shared_expert_intermediate_size": weights.number("expert_shared_feed_forward_length"),
    }  # fmt: skip


def _qwen3_moe(weights):
    return {**_renormalised(weights, True), "moe_intermediate_size": weights.number("expert_feed_forward_length")}


def _olmoe(weights):
    return _renormalised(weights, False)


def _gpt_oss(weights):
    return {
        **_window(weights), "layer_types": layer_types(weights, every=2), **_experts(weights, SOFTMAX_OF_CHOSEN),
        "intermediate_size": weights.number("expert_feed_forward_length"),
    }  # fmt: skip


def _gemma2(weights):
    softcaps = {
        "attn_logit_softcapping": weights.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": weights.number("final_logit_softcapping", 30.0),
    }
    kinds = {"sliding_window": weights.number("attention.sliding_window", 4096), "layer_types": layer_types(weights, 2)}
    return {**softcaps, **kinds, "query_pre_attn_scalar": _scalar(weights, layers_of_27b=46)}


def _gemma3(weights):
    window = _window(weights)["sliding_window"]
    return {
        "final_logit_softcapping": weights.number("final_logit_softcapping", 0) or None,
        "sliding_window": window or 4096, "layer_types": layer_types(weights, every=6 if window else 1),
        "rope_local_base_freq": weights.number("rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": _scalar(weights, layers_of_27b=62),
    }  # fmt: skip


def _scalar(weights, layers_of_27b):
    """Gemma's query_pre_attn_scalar. Not in the file: llama.cpp knows the one model where it is not the head's size."""
    if weights.number("block_count") == layers_of_27b:
        return weights.number("embedding_length") // weights.number("attention.head_count")
    return weights.head_dim


def _phi3(weights):
    # The context of pre-training is in every file.
    return {**_window(weights), "original_max_position_embeddings": weights.number(ORIGINAL_CONTEXT)}


def _olmo(weights):
    only(weights, "attention.layer_norm_epsilon", weights.number("attention.layer_norm_epsilon"), 1e-5)
    # The converter puts rows of q and k in another order, but not their biases, which no OLMo has.
    return {"clip_qkv": weights.number("attention.clamp_kqv", 0) or None, "attention_bias": False}


def _olmo2_family(weights):
    return "olmo3" if weights.number("attention.sliding_window", 0) else "olmo2"


def _olmo2(weights):
    if _olmo2_family(weights) == "olmo2":
        return {}
    theta = weights.number("rope.freq_base", 10000.0)
    only(weights, "rope.freq_base_swa", weights.number("rope.freq_base_swa", theta), theta)
    return {**_window(weights), "layer_types": layer_types(weights, every=4)}


def _granite(weights):
    return {
        "attention_multiplier": weights.number("attention.scale", 1.0),
        "embedding_multiplier": weights.number("embedding_scale", 1.0),
        "residual_multiplier": weights.number("residual_scale", 1.0),
        "logits_scaling": weights.number("logit_scale", 1.0),
    }


def _command_r(weights):
    return {"logit_scale": weights.number("logit_scale"), "use_qk_norm": has(weights, "self_attn.q_norm.weight")}


def _cohere2(weights):
    return {
        "logit_scale": weights.number("logit_scale"), "sliding_window": weights.number("attention.sliding_window"),
        "layer_types": layer_types(weights, every=4),
    }  # fmt: skip


def _stablelm(weights):
    return {  # as in llama.cpp, which does not read the key of the same name
        "use_parallel_residual": not has(weights, "post_attention_layernorm.weight"),
        "qk_layernorm": has(weights, "self_attn.q_norm.weight"),
    }


def _gpt_neox(weights):
    return {**_equal_heads(weights), "use_parallel_residual": bool(weights.number("use_parallel_residual"))}


def _falcon(weights):
    key_heads, two_norms = weights.number("attention.head_count_kv", 1), has(weights, "post_attention_layernorm.weight")
    if key_heads == 1 and not two_norms:
        return {"new_decoder_architecture": False, "multi_query": True}
    return {
        "new_decoder_architecture": True, "num_kv_heads": key_heads, "num_ln_in_parallel_attn": 2 if two_norms else 1,
    }  # fmt: skip


def _mpt(weights):
    bias = weights.number("attention.max_alibi_bias")
    if not bias:
        raise UserError(f"{weights.path}: attention.max_alibi_bias = 0 (an MPT without ALiBi) is not supported")
    attention = {
        "alibi_bias_max": int(bias) if bias == int(bias) else bias,
        "clip_qkv": weights.number("attention.clamp_kqv", 0) or None,
    }
    return {**_equal_heads(weights), "attn_config": {"alibi": True, **attention}}


def _equal_heads(weights):
    heads = weights.number("attention.head_count")
    only(weights, "attention.head_count_kv", weights.number("attention.head_count_kv", heads), heads)
    return {}


def _starcoder(weights):
    only(weights, "attention.head_count_kv", weights.number("attention.head_count_kv"), 1)
    return {"multi_query": True}


# ------------------------------------------------------------------------------------------------------------ RoPE

ORIGINAL_CONTEXT = "rope.scaling.original_context_length"
# YaRN's settings in config.json, by the key in a file.
YARN = {
    "rope.scaling.yarn_attn_factor": "attention_factor", "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}  # fmt: skip


def yarn(weights: Any) -> dict[str, Any]:
    """YaRN as config.json says it. Llama.cpp takes mscale as 1 where a file has mscale_all_dim, its log_multiplier."""
    found = {name: weights.number(key, None) for key, name in YARN.items()}
    scaling = {
        "rope_type": "yarn", "factor": weights.number("rope.scaling.factor"),
        "original_max_position_embeddings": weights.number(ORIGINAL_CONTEXT),
        **{name: value for name, value in found.items() if value is not None},
    }  # fmt: skip
    if multiplier := weights.number("rope.scaling.yarn_log_multiplier", 0):
        scaling |= {"mscale": 1.0, "mscale_all_dim": multiplier}
    if beta := weights.number("attention.temperature_scale", 0):
        scaling["llama_4_scaling_beta"] = beta
    if weights.get("general.architecture") == "gpt-oss":
        scaling["truncate"] = False  # of every GPT-OSS; llama.cpp rounds, and files have no key for it
    return scaling


def longrope(weights: Any, long: list[float], short: list[float]) -> dict[str, Any]:
    """longrope as config.json says it. Raises UserError for a gain of attention that is not the formula's."""
    context, original = weights.number("context_length"), weights.number(ORIGINAL_CONTEXT)
    gain = math.sqrt(1 + math.log(context / original) / math.log(original)) if context > original else 1.0
    found = weights.number("rope.scaling.attn_factor", gain)
    if not math.isclose(found, gain, rel_tol=1e-5):
        raise UserError(f"{weights.path}: rope.scaling.attn_factor = {found} is not supported, only {gain:.6g} is")
    return {"rope_type": "longrope", "long_factor": long, "short_factor": short}


# ----------------------------------------------------------------------------------------------------------- table


class Layout(NamedTuple):
    """How models of an architecture are stored.

    family: the `model_type`, or a function from the weights to it. settings: keys of config.json that are its own.
    epsilon: the key of the norms' epsilon; None: it is none of config.json's. names: those that differ from
    `LAYER_NAMES`. interleaved: whether the rows of q and k are in Meta's RoPE layout. norms_plus_one: whether the norms
    hold 1 + weight. fused_mlp: whether ffn_up is gate and up. rope: whether it has any. grouped: whether config.json
    says how many key heads there are and how large a head is.
    """

    family: str | Callable[[Any], str]
    settings: Callable[[Any], dict[str, Any]] = _nothing_more
    epsilon: str | None = "attention.layer_norm_rms_epsilon"
    names: dict[str, str] = {}
    interleaved: bool = False
    norms_plus_one: bool = False
    fused_mlp: bool = False
    rope: bool = True
    grouped: bool = True


LAYER_NORM = "attention.layer_norm_epsilon"

LAYOUTS = {
    "bloom": Layout("bloom", _equal_heads, LAYER_NORM, rope=False, grouped=False),
    "chatglm": Layout("glm", fused_mlp=True),
    "cohere2": Layout("cohere2", _cohere2, LAYER_NORM),
    "command-r": Layout("cohere", _command_r, LAYER_NORM),
    "falcon": Layout("falcon", _falcon, LAYER_NORM, grouped=False),
    "gemma": Layout("gemma", norms_plus_one=True),
    "gemma2": Layout("gemma2", _gemma2, norms_plus_one=True),
    "gemma3": Layout("gemma3_text", _gemma3, norms_plus_one=True),
    "glm4": Layout("glm4", fused_mlp=True),
    "gpt2": Layout("gpt2", _equal_heads, LAYER_NORM, rope=False, grouped=False),
    "gpt-oss": Layout("gpt_oss", _gpt_oss, names=SECOND_NORM),
    "gptneox": Layout("gpt_neox", _gpt_neox, LAYER_NORM, grouped=False),
    "granite": Layout("granite", _granite, interleaved=True),
    "llama": Layout(_llama_family, _llama, interleaved=True),
    "mistral3": Layout(_mistral3_family, _window, interleaved=True),
    "mpt": Layout("mpt", _mpt, LAYER_NORM, rope=False, grouped=False),
    "nemotron": Layout("nemotron", epsilon=LAYER_NORM, norms_plus_one=True),
    "olmo": Layout("olmo", _olmo, None, interleaved=True),
    "olmo2": Layout(_olmo2_family, _olmo2),
    "olmoe": Layout("olmoe", _olmoe),
    "phi2": Layout("phi", epsilon=LAYER_NORM),
    "phi3": Layout("phi3", _phi3, fused_mlp=True),
    "qwen2": Layout("qwen2"),
    "qwen2moe": Layout("qwen2_moe", _qwen2_moe),
    "qwen3": Layout("qwen3"),
    "qwen3moe": Layout("qwen3_moe", _qwen3_moe),
    "seed_oss": Layout("seed_oss", names=SECOND_NORM),
    "smollm3": Layout("smollm3", interleaved=True),
    "stablelm": Layout("stablelm", _stablelm, LAYER_NORM),
    "starcoder": Layout("gpt_bigcode", _starcoder, LAYER_NORM, rope=False, grouped=False),
    "starcoder2": Layout("starcoder2", epsilon=LAYER_NORM),
}

# Keys of an architecture that change nothing here: what is noted again, or of what llama.cpp does when it loads.
HARMLESS = ("vocab_size", "tensor_data_layout", "use_parallel_residual", "rope.scaling.finetuned", ORIGINAL_CONTEXT)
