"""config.json read as transformers reads it: our rows against its classes, our logits against its models'."""

import dataclasses
import itertools
import json
import random
from functools import lru_cache

import pytest
import torch
import transformers
from conftest import FAMILIES as TINY
from conftest import LINEAR_ROPE, LLAMA3_ROPE
from families.rows import ROWS

from shell.cli import UserError
from weights.checkpoint import load_model
from weights.families import COMMON, FAMILIES, FOREIGN, SIZES, config_from_json

LLAMA_2_7B = dict(
    model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-5, max_position_embeddings=4096,
)  # fmt: skip

# Fields of transformers' classes that change nothing here: how to start, to train and to use a model, and its notes.
WITHOUT_MEANING_HERE = {
    "initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp",
    "attention_dropout", "transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype",
    "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type", "is_decoder",
    "classifier_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "emb_pdrop", "attn_pdrop", "residual_dropout",
    "embedding_dropout", "dropout", "layerdrop", "init_std", "init_device", "learned_pos_emb", "slow_but_exact",
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "reorder_and_upcast_attn", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32",
    "use_bidirectional_attention", "output_router_logits", "router_aux_loss_coef",
}  # fmt: skip
# Keys that transformers takes without a field in its class, and those whose default is written out there.
WITHOUT_FIELD = {
    "rope_theta", "partial_rotary_factor", "head_dim", "num_key_value_heads", "rope_keys", "rope_local_base_freq",
    "sliding_window_pattern", "hidden_act", "intermediate_size", "norm_eps", "max_position_embeddings",
}  # fmt: skip
COMPUTED = {
    "rope_parameters", "attn_config", "num_kv_heads", "intermediate_size", "word_embed_proj_dim", "num_key_value_heads",
}  # fmt: skip


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def class_of(family):
    return type(transformers.AutoConfig.for_model(family))


# ------------------------------------------------------------------------------------------------- against its classes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_what_transformers_class_says(family):
    """So that they cannot drift: each default, and each key that the class has."""
    fields = {field.name: field.default for field in dataclasses.fields(class_of(family))}
    if family == "mistral":  # with `layer_types` transformers makes it a Ministral, whose class is the same but for it
        fields = {field.name: field.default for field in dataclasses.fields(class_of("ministral"))}
    spelled = FAMILIES[family].spelled
    row = {spelled.get(key, key): value for key, value in (COMMON | FAMILIES[family].defaults).items()}
    theta = class_of(family).default_theta
    assert row["rope_theta"] == (theta if isinstance(theta, float) else theta["global"])
    common = {own: name for name, own in spelled.items()}
    for name, default in row.items():
        if name not in fields:
            assert common.get(name, name) in WITHOUT_FIELD, name
        elif common.get(name, name) not in COMPUTED or default is not None and name != "rope_parameters":
            assert default == fields[name], name
    sizes = {spelled.get(name, name) for name in SIZES}
    assert fields.keys() - row.keys() - WITHOUT_MEANING_HERE <= {*sizes, "rope_parameters"}
    own = {*row, *FAMILIES[family].older.values()}
    assert {name for name in FOREIGN if name in fields} <= own


# ------------------------------------------------------------------------------------------------- against its models

BASE = dict(vocab_size=160, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
T = 24


def write_values(family, changes):
    """A config.json of a tiny model that has every key of its family, with changes; ... removes a key."""
    own = {
        "llama": {},
        "mistral": {"sliding_window": 6},
        "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        "qwen3": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "head_dim": 16},
    }  # fmt: skip
    if family in own:
        values = {
            **BASE, "model_type": family, "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu",
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 500.0, "rope_scaling": None,
            "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
            "use_cache": True, "torch_dtype": "float32", "pretraining_tp": 1, "eos_token_id": 2, **own[family],
        }  # fmt: skip
    else:
        values = written_by_transformers(family)
    return {key: value for key, value in {**values, **changes}.items() if value is not ...}


@lru_cache
def written_by_transformers(family):
    """The config.json of the family's first tiny model, without what has no meaning here."""
    values = transformers.AutoConfig.for_model(family, **ROWS[family][0]).to_dict()
    tokens = ("pad_token_id", "bos_token_id", "eos_token_id")  # their defaults may be beyond a small vocabulary
    kept = {k: v for k, v in values.items() if k in tokens or k not in WITHOUT_MEANING_HERE and k[0] != "_"}
    return {"model_type": family, **kept}


@lru_cache
def tokens():
    return torch.randint(3, BASE["vocab_size"], (2, T))


@torch.no_grad()
def logits_of_transformers(values, folder):
    """transformers' logits from a config.json with these values, and its weights in `folder`. None where it fails."""
    (folder / "config.json").write_text(json.dumps(values))
    attention = "sdpa" if values["model_type"] == "falcon" else "eager"  # whose eager way adds ALiBi twice
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name or "ln_" in name), std=0.3)
        logits = model(tokens(), use_cache=False).logits
        model.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(values))
        return logits
    except Exception:  # its checks, and whatever a model runs into that they let pass
        return None


def verdict(values, folder, tolerance=1e-5):
    """ "equal" or "different" logits, "refused" by us, or "neither": transformers fails, we do not.

    With experts two draws of weights must differ: rounding decides a near tie in one, a wrong reading differs in each.
    """
    outcome = compare(values, folder, tolerance)
    if outcome[0] == "different" and config_from_json(values).experts:
        return compare(values, folder, tolerance)
    return outcome


@torch.no_grad()
def compare(values, folder, tolerance):
    """The verdict on one draw of weights."""
    try:
        config_from_json(values)
    except ValueError as error:
        assert "\n" not in str(error)
        return "refused", str(error)
    expected = logits_of_transformers(values, folder)
    if expected is None:
        return "neither", ""
    try:
        model = load_model(folder, torch.float32)
    except UserError as error:
        return "different", str(error)
    difference = ((model(tokens()) - expected).norm() / expected.norm().clamp(min=1e-9)).item()
    return ("equal" if difference < tolerance else "different"), f"{difference:.1e}"


LINEAR, UNKNOWN = {"type": "linear", "factor": 4.0}, {"rope_type": "spiral", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}
LLAMA3 = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
SLIDING, FULL = "sliding_attention", "full_attention"
ALL, QWEN = ("llama", "mistral", "qwen2", "qwen3"), ("qwen2", "qwen3")
EQUAL = [  # families, changes to a config.json
    (ALL, {}),
    # Two spellings of RoPE, and both at a time.
    (ALL, {"rope_theta": ...}),
    (ALL, {"rope_theta": 3}),
    (ALL, {"rope_scaling": LINEAR}),
    (ALL, {"rope_scaling": {"rope_type": "linear", "type": "default", "factor": 4.0}}),
    (ALL, {"rope_scaling": {**LINEAR, "rope_theta": 77.0}}),
    (ALL, {"rope_scaling": LLAMA3}),
    (ALL, {"rope_scaling": YARN}),
    (ALL, {"rope_scaling": {**YARN, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": True}}),
    (ALL, {"rope_scaling": {**YARN, "mscale": 1.5, "mscale_all_dim": 0.5}}),
    (ALL, {"rope_scaling": {**YARN, "attention_factor": 1.7, "mscale": 2.0}}),
    (ALL, {"rope_scaling": {k: v for k, v in YARN.items() if k[:4] != "orig"}, "max_position_embeddings": 16}),
    (ALL, {"rope_parameters": {**YARN, "rope_theta": 77.0, "truncate": False}, "rope_scaling": ...}),
    (ALL, {"rope_scaling": DYNAMIC, "max_position_embeddings": 16}),
    (ALL, {"rope_scaling": DYNAMIC}),
    (
        ("llama", "mistral", "qwen2"),
        {
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0, 2.0, 2.5, 3.0],
                "long_factor": [1.0, 3.0, 4.0, 5.0],
                "original_max_position_embeddings": 16,
            }
        },
    ),
    (ALL, {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}}),
    (ALL, {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}}),
    (ALL, {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16}),
    (ALL, {"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    (ALL, {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"rope_theta": 77.0, **LINEAR}}),
    (ALL, {"rope_theta": ..., "rope_parameters": {"rope_type": "default"}}),
    (ALL, {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    (ALL, {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    (ALL, {"rope_scaling": {**LINEAR, "rope_theta": 9.0}, "rope_parameters": {"rope_theta": 9.0}}),
    ((*ALL, "ministral3", "gemma3_text", "olmo3", "gpt_oss"), {"rope_parameters": None}),
    (("gpt_oss", "ministral3"), {"rope_parameters": None, "rope_theta": 777.0}),
    (("gpt_oss",), {"rope_parameters": None, "rope_scaling": YARN, "rope_theta": 777.0}),
    # Windows.
    (ALL, {"sliding_window": ...}),
    (("mistral",), {"sliding_window": None}),
    (("mistral",), {"layer_types": [SLIDING] * 2}),
    (("mistral",), {"layer_types": [FULL, SLIDING]}),
    (("mistral",), {"sliding_window": 1}),
    (("llama",), {"layer_types": [FULL] * 2}),
    (("llama",), {"sliding_window": 64, "use_sliding_window": True}),
    (QWEN, {"use_sliding_window": False}),
    (QWEN, {"use_sliding_window": ...}),
    (QWEN, {"sliding_window": None}),
    (QWEN, {"max_window_layers": 0}),
    (QWEN, {"max_window_layers": ...}),
    (QWEN, {"layer_types": [SLIDING, FULL]}),
    (QWEN, {"layer_types": None}),
    (QWEN, {"layer_types": [FULL] * 2, "use_sliding_window": False}),
    # Heads, biases, the rest.
    (("llama",), {"num_key_value_heads": None}),
    (("llama", "mistral"), {"head_dim": None}),
    (("llama", "mistral", "qwen2"), {"head_dim": ...}),
    (("llama", "mistral", "qwen2"), {"head_dim": 12}),
    (("qwen3",), {"head_dim": ..., "hidden_size": 40}),
    (("mistral",), {"num_key_value_heads": ..., "num_attention_heads": 8}),
    (QWEN, {"num_key_value_heads": ..., "num_attention_heads": 32, "head_dim": 4}),
    (ALL, {"attention_bias": True}),
    (ALL, {"attention_bias": ...}),
    (ALL, {"mlp_bias": True}),
    (ALL, {"tie_word_embeddings": True}),
    (ALL, {"hidden_act": "swish"}),
    (ALL, {"hidden_act": "gelu"}),
    (ALL, {"hidden_act": "relu2"}),
    (ALL, {"hidden_act": ...}),
    (ALL, {"rms_norm_eps": ...}),
    (ALL, {"max_position_embeddings": ...}),
    (ALL, {"dtype": "float32", "torch_dtype": "bfloat16"}),
    (ALL, {"pretraining_tp": 2, "attention_dropout": 0.5, "auto_map": {}, "rope_interleaved": False}),
]
REFUSED = [  # families, changes, what is named
    (ALL, {"rope_scaling": UNKNOWN}, "rope_scaling: rope type 'spiral'"),
    (ALL, {"rope_parameters": UNKNOWN}, "rope_parameters: rope type 'spiral'"),
    (ALL, {"rope_scaling": UNKNOWN, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "spiral"),
    (ALL, {"rope_scaling": LINEAR, "rope_parameters": UNKNOWN}, "spiral"),
    (ALL, {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}, "both set"),
    (ALL, {"rope_scaling": {**LINEAR, "attention_factor": 2.0}}, "attention_factor"),
    (ALL, {"rope_scaling": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    (ALL, {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "low_freq_factor"),
    (ALL, {"rope_scaling": {**LLAMA3, "factor": ...}}, "'factor' is missing"),
    (ALL, {"rope_theta": None}, "rope_theta is None"),
    (ALL, {"rope_theta": float("nan")}, "rope_theta is nan"),
    (ALL, {"rope_parameters": {FULL: {"rope_theta": 77.0}}}, "full_attention is not supported"),
    (QWEN, {"layer_types": [FULL] * 2, "rope_parameters": {FULL: {"rope_theta": 77.0}}}, "full_attention"),
    (ALL, {"layer_types": ["chunked_attention"] * 2}, "'chunked_attention'"),
    (ALL, {"layer_types": [FULL, "linear_attention"]}, "'linear_attention'"),
    (ALL, {"layer_types": ["nonsense"] * 2}, "'nonsense'"),
    (ALL, {"layer_types": [FULL] * 3}, "names 3 layers, num_hidden_layers 2"),
    (ALL, {"layer_types": []}, "names 0 layers"),
    (ALL, {"layer_types": "full_attention"}, "layer_types names 'full_attention'"),
    (("llama",), {"layer_types": [SLIDING] * 2}, "llama models have no sliding window"),
    (("llama",), {"sliding_window": 6}, "llama models have no sliding window"),
    (("mistral",), {"layer_types": [SLIDING] * 2, "sliding_window": None}, "there is no sliding_window"),
    (
        QWEN,
        {"layer_types": [SLIDING, FULL], "use_sliding_window": False},
        "there is no sliding_window (or use_sliding_window)",
    ),
    (QWEN, {"layer_types": [SLIDING, FULL], "sliding_window": None}, "there is no sliding_window"),
    (("qwen3",), {"head_dim": None}, "head_dim is None"),
    (QWEN, {"num_key_value_heads": ...}, "num_key_value_heads"),
    (ALL, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (ALL, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    (ALL, {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar"),
    (ALL, {"qk_norm": True}, "qk_norm"),
    (ALL, {"hidden_activation": "gelu_pytorch_tanh"}, "hidden_activation"),
    (ALL, {"rope_interleaved": True}, "rope_interleaved"),
    (ALL, {"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config"),
    (ALL, {"rms_norm_eps": None}, "rms_norm_eps is None"),
    (ALL, {"max_position_embeddings": None}, "max_position_embeddings is None"),
    (ALL, {"tie_word_embeddings": None}, "tie_word_embeddings is None"),
]


def each_family(rows):
    for families, changes, *more in rows:
        for family in families:
            words = ", ".join(f"{key}={'absent' if value is ... else value}" for key, value in changes.items())
            yield pytest.param(family, changes, *more, id=f"{family}: {words}"[:100])


@pytest.mark.parametrize("family, changes", [*each_family(EQUAL)])
def test_the_same_logits_from_the_same_file(family, changes, tmp_path):
    assert verdict(write_values(family, changes), tmp_path)[0] == "equal"


@pytest.mark.parametrize("family, changes, named", [*each_family(REFUSED)])
def test_refused_by_name(family, changes, named, tmp_path):
    scaling = {key: value for key, value in (changes.get("rope_scaling") or {}).items() if value is not ...}
    values = write_values(family, {**changes, "rope_scaling": scaling})
    outcome, message = verdict(values, tmp_path)
    assert outcome == "refused" and named in message


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_left_out(family, tmp_path):
    """Alone, and any two together: the same logits, or refused, or of no use to transformers either."""
    changes = {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 4}
    values = write_values(family, changes if family in (*ALL,) else {})
    keys = [key for key in values if key != "model_type"]
    left_out = [(key,) for key in keys] + random.sample([*itertools.combinations(keys, 2)], 20)
    outcomes = []
    for names in left_out:
        kept = {key: value for key, value in values.items() if key not in names}
        outcomes.append(verdict(kept, tmp_path, tolerance=1e-4))  # heads of 256 round more than those of 8
        assert outcomes[-1][0] != "different", (names, outcomes[-1])
    assert [outcome for outcome, _ in outcomes].count("equal") > len(left_out) / 6


@pytest.mark.parametrize("family", FAMILIES)
def test_odd_values(family, tmp_path):
    """Where transformers computes something, ours is the same or refused; where it fails, anything but a crash."""
    odd = [None, True, False, -1, 0, 1, 2, 7, 2.5, "", "odd", "silu", [], {}, [None, FULL], {"rope_theta": 9.0}, LINEAR,
           {**LINEAR, "rope_type": None}, {"rope_type": "linear"}, [SLIDING, FULL], [SLIDING] * 2, 1e-2]  # fmt: skip
    values = write_values(family, {})
    keys = [*values, "layer_types", "sliding_window", "rope_parameters", "use_sliding_window", *FOREIGN]
    for _ in range(60):
        changes = {key: random.choice(odd) for key in random.sample(keys, random.choice([1, 1, 2]))}
        if changes.get("model_type", family) != family:
            continue
        if family == "mpt" and changes.get("max_seq_len") == 1:
            continue  # transformers broadcasts its single ALiBi distance, 0, over all keys
        outcome = verdict({**values, **changes}, tmp_path, tolerance=1e-4)  # a soft cap of 0.01 enlarges rounding
        assert outcome[0] != "different", (changes, outcome)


PARTIAL = "partial_rotary_factor"
OTHERS = {  # values that no tiny model has
    "norm_eps": 0.3, "hidden_act": "relu2", "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 40, "hidden_size": 64, "num_experts": 3, PARTIAL: 1.0, "rope_theta": 7.0,
}  # fmt: skip
# As transformers 4 wrote it: beside each other, not in one object.
OLD_ROPE = [
    {}, {"rope_theta": 77.0}, {"rope_scaling": {}, "rope_theta": 77.0}, {"rope_scaling": YARN, "rope_theta": 77.0},
    {"rope_scaling": {**LINEAR, "rope_type": "linear"}}, {"rope_scaling": {**YARN, "rope_theta": 77.0}},
    {"partial_rotary_factor": 0.5, "rope_theta": 77.0}, {"partial_rotary_factor": 0.5, "rope_scaling": YARN},
    {"rotary_pct": 1.0, "rotary_emb_base": 77}, {"rotary_pct": 1.0, "rope_theta": 77.0}, {"rope_local_base_freq": 33.0},
    {"rope_local_base_freq": 33.0, "rope_theta": 77.0, "rope_scaling": YARN},
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_rope_as_transformers_4_wrote_it(family, tmp_path):
    """The same logits, or refused; without any change the same."""
    values = write_values(family, {"rope_parameters": ...})
    outcomes = []
    for changes in OLD_ROPE:
        if family == "olmo3":  # transformers 5 gives its layers with a window the default theta; 4 gave them this one
            changes = {key: 5e5 if key == "rope_theta" else value for key, value in changes.items()}
        outcomes.append(verdict({**values, **changes}, tmp_path, tolerance=1e-4))
        assert outcomes[-1][0] != "different", (changes, outcomes[-1])
    assert outcomes[0][0] == "equal" and [outcome for outcome, _ in outcomes].count("equal") > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_other_families(family, tmp_path):
    """A key that the family calls by another name: the same logits as transformers, which may know both, or refused."""
    for common, own in {**FAMILIES[family].older, **FAMILIES[family].spelled}.items():
        changes = {common: OTHERS[common]} | ({"rope_parameters": ...} if common in ("rope_theta", PARTIAL) else {})
        for more in ({}, {own: ...}):
            outcome = verdict(write_values(family, {**changes, **more}), tmp_path, tolerance=1e-4)
            assert outcome[0] != "different", (changes, more, outcome)


# ------------------------------------------------------------------------------------------------- of whole files


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(model_type="t5"), "t5"),
        (dict(model_type=None), "model_type None"),
        (dict(hidden_act="laplace"), "laplace"),
        (dict(rope_scaling={"type": "yarn"}), "factor"),
        (dict(rope_scaling={"rope_type": "dynamic", "factor": 0}), "factor"),
        (dict(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "short_factor"),
        (dict(rope_scaling={"type": "linear"}), "factor"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(quantization_config={"quant_method": "gptq"}), "quantization_config"),
        (dict(num_key_value_heads=5), "num_key_value_heads"),
        (dict(head_dim=7), "head_dim"),
        (dict(num_attention_heads=2**13, head_dim=2**12), "num_attention_heads times head_dim"),
        (dict(num_hidden_layers=1001), "num_hidden_layers is 1001"),
        (dict(vocab_size=2**25), "vocab_size is 33554432"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_config_refuses_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        config_from_json({**LLAMA_2_7B, **change})


@pytest.mark.parametrize(
    "name, keys, kind",
    [
        ("t5", {}, "an encoder-decoder"),
        ("mllama", {}, "with a vision tower"),
        ("qwen2_5_vl", {}, "with a vision tower"),
        ("deepseek_v3", {}, "with latent attention"),
        ("mamba", {}, "with state-space layers"),
        ("jamba", {}, "with state-space layers"),
        ("qwen3_5_text", {}, "with linear attention"),
        ("gemma3n_text", {}, "with an embedding for each layer"),
        ("chatglm", {"auto_map": {"AutoModel": "modeling_chatglm.ChatGLMModel"}}, "whose code comes with it"),
    ],
)
def test_a_model_of_another_kind_is_called_what_it_is(name, keys, kind):
    """The message says what is supported, too."""
    values = {"model_type": name, **keys} if keys else transformers.AutoConfig.for_model(name).to_dict()
    with pytest.raises(ValueError, match=f"'{name}', {kind}.*, is not supported, only llama, .*gpt_oss.* are"):
        config_from_json(values)


@pytest.mark.parametrize("key", ["model_type", *SIZES])
def test_config_names_a_missing_key(key):
    with pytest.raises(ValueError, match=key):
        config_from_json({name: value for name, value in LLAMA_2_7B.items() if name != key})


def test_epsilon_and_theta_come_from_the_file():
    config = config_from_json({**LLAMA_2_7B, "rms_norm_eps": 3e-4, "rope_theta": 123.0})
    assert (config.norm_eps, config.ropes[0].theta) == (3e-4, 123.0)
    assert config_from_json(LLAMA_2_7B).ropes[-1].theta == 10000.0


def test_defaults_are_those_of_the_family():
    sizes = {name: LLAMA_2_7B[name] for name in SIZES}
    llama, mistral, qwen3 = (config_from_json({**sizes, "model_type": name}) for name in ("llama", "mistral", "qwen3"))
    assert (llama.max_position_embeddings, mistral.max_position_embeddings) == (2048, 131072)
    assert (llama.num_key_value_heads, mistral.num_key_value_heads, qwen3.num_key_value_heads) == (32, 8, 32)
    assert (llama.windows[0], mistral.windows[0], qwen3.windows[0]) == (None, 4096, None)
    assert config_from_json({**sizes, "model_type": "qwen3", "hidden_size": 2048}).head_dim == 128
    assert {config.norm_eps for config in (llama, mistral, qwen3)} == {1e-6}


@pytest.mark.parametrize("family", TINY)
def test_old_and_new_spellings_give_the_same_config(tiny_checkpoint, family):
    """transformers 5 writes `rope_parameters` and `layer_types`; files from before it have other keys."""
    new = read_config(tiny_checkpoint(family))
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "layer_types")}
    rope = dict(new["rope_parameters"])
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    if kind == "default":
        old["rope_scaling"] = None
        assert config_from_json(old) == config_from_json(new)
    else:
        assert rope in [{k: v for k, v in x.items() if k[:5] != "rope_"} for x in (LLAMA3_ROPE, LINEAR_ROPE)]
        for spelling in ("type", "rope_type"):
            old["rope_scaling"] = {spelling: kind, **rope}
            assert config_from_json(old) == config_from_json(new)


def test_windows_of_each_layer(tiny_checkpoint):
    windows = {name: config_from_json(read_config(tiny_checkpoint(name))).windows for name in TINY}
    assert windows["mistral"] == (7, 7, 7)
    assert windows["qwen2"] == (None, 6, 6)
    assert windows["llama"] == windows["qwen3"] == (None, None, None)
