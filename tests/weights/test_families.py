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

from model import Transformer
from weights.families import COMMON, FAMILIES, FOREIGN, SIZES, config_from_json

LLAMA_2_7B = dict(
    model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-5, max_position_embeddings=4096,
)  # fmt: skip

# Fields of transformers' classes that change nothing here: how to start, to train and to use a model, and its notes.
WITHOUT_MEANING_HERE = {
    "initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp",
    "attention_dropout", "transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype",
    "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type",
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
    row = COMMON | FAMILIES[family].defaults
    if family == "mistral":  # with `layer_types` transformers makes it a Ministral, whose class is the same but for it
        fields = {field.name: field.default for field in dataclasses.fields(class_of("ministral"))}
    assert row.pop("rope_theta") == class_of(family).default_theta
    if "head_dim" not in fields:  # Qwen2's model asks for it all the same
        assert row.pop("head_dim") is None
    assert row == {name: fields[name] for name in row}
    assert fields.keys() - row.keys() - WITHOUT_MEANING_HERE == {*SIZES, "rope_parameters"}
    assert not FOREIGN.keys() & row.keys()


# ------------------------------------------------------------------------------------------------- against its models

BASE = dict(vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
T = 24


def write_values(family, changes):
    """A config.json of a tiny model that has every key of its family, with changes; ... removes a key."""
    values = {
        **BASE, "model_type": family, "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu",
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 500.0, "rope_scaling": None,
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        "use_cache": True, "torch_dtype": "float32", "pretraining_tp": 1, "eos_token_id": 2,
    } | {
        "llama": {},
        "mistral": {"sliding_window": 6},
        "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        "qwen3": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "head_dim": 16},
    }[family]  # fmt: skip
    return {key: value for key, value in {**values, **changes}.items() if value is not ...}


@lru_cache
def tokens():
    return torch.randint(BASE["vocab_size"], (2, T))


@torch.no_grad()
def logits_of_transformers(values, folder):
    """transformers' logits and weights, from a config.json with these values. None where it fails."""
    (folder / "config.json").write_text(json.dumps(values))
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name), std=0.4)
        return model(tokens(), use_cache=False).logits, model.state_dict()
    except Exception:  # its checks, and whatever a model runs into that they let pass
        return None


@torch.no_grad()
def verdict(values, folder):
    """ "equal" or "different" logits, "refused" by us, or "neither": transformers fails, we do not."""
    try:
        config = config_from_json(values)
    except ValueError as error:
        assert "\n" not in str(error)
        return "refused", str(error)
    theirs = logits_of_transformers(values, folder)
    if theirs is None:
        return "neither", ""
    expected, weights = theirs
    model = Transformer(config).eval()
    model.load_state_dict(weights)
    difference = ((model(tokens()) - expected).norm() / expected.norm()).item()
    return ("equal" if difference < 1e-5 else "different"), f"{difference:.1e}"


LINEAR, YARN = {"type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}
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
    (ALL, {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}}),
    (ALL, {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 16}}),
    (ALL, {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16}),
    (ALL, {"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    (ALL, {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"rope_theta": 77.0, **LINEAR}}),
    (ALL, {"rope_theta": ..., "rope_parameters": {"rope_type": "default"}}),
    (ALL, {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    (ALL, {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    (ALL, {"rope_scaling": {**LINEAR, "rope_theta": 9.0}, "rope_parameters": {"rope_theta": 9.0}}),
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
    (ALL, {"hidden_act": ...}),
    (ALL, {"rms_norm_eps": ...}),
    (ALL, {"max_position_embeddings": ...}),
    (ALL, {"dtype": "float32", "torch_dtype": "bfloat16"}),
    (ALL, {"pretraining_tp": 2, "attention_dropout": 0.5, "auto_map": {}, "rope_interleaved": False}),
]
REFUSED = [  # families, changes, what is named
    (ALL, {"rope_scaling": YARN}, "rope_scaling: rope type 'yarn'"),
    (ALL, {"rope_parameters": YARN}, "rope_parameters: rope type 'yarn'"),
    (ALL, {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "yarn"),
    (ALL, {"rope_scaling": LINEAR, "rope_parameters": YARN}, "yarn"),
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
    """Alone, and any two together: the same logits, or refused."""
    values = write_values(family, {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 4})
    keys = [key for key in values if key != "model_type"]
    left_out = [(key,) for key in keys] + random.sample([*itertools.combinations(keys, 2)], 20)
    outcomes = []
    for names in left_out:
        outcomes.append(verdict({key: value for key, value in values.items() if key not in names}, tmp_path))
        assert outcomes[-1][0] in ("equal", "refused"), (names, outcomes[-1])
    assert [outcome for outcome, _ in outcomes].count("equal") > len(left_out) / 4


@pytest.mark.parametrize("family", FAMILIES)
def test_odd_values(family, tmp_path):
    """Where transformers computes something, ours is the same or refused; where it fails, anything but a crash."""
    odd = [None, True, False, -1, 0, 1, 2, 7, 2.5, "", "odd", "silu", [], {}, [None, FULL], {"rope_theta": 9.0}, LINEAR,
           {**LINEAR, "rope_type": None}, {"rope_type": "linear"}, [SLIDING, FULL], [SLIDING] * 2, 1e-3]  # fmt: skip
    values = write_values(family, {})
    keys = [*values, "layer_types", "sliding_window", "rope_parameters", "use_sliding_window", *FOREIGN]
    for _ in range(60):
        changes = {key: random.choice(odd) for key in random.sample(keys, random.choice([1, 1, 2]))}
        if changes.get("model_type", family) != family:
            continue
        outcome = verdict({**values, **changes}, tmp_path)
        assert outcome[0] != "different", (changes, outcome)


# ------------------------------------------------------------------------------------------------- of whole files


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(model_type="gpt_neox"), "gpt_neox"),
        (dict(model_type=None), "model_type None"),
        (dict(hidden_act="gelu"), "gelu"),
        (dict(rope_scaling={"type": "yarn", "factor": 2.0}), "yarn"),
        (dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "dynamic"),
        (dict(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "longrope"),
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


@pytest.mark.parametrize("key", ["model_type", *SIZES])
def test_config_names_a_missing_key(key):
    with pytest.raises(ValueError, match=key):
        config_from_json({name: value for name, value in LLAMA_2_7B.items() if name != key})


def test_epsilon_and_theta_come_from_the_file():
    config = config_from_json({**LLAMA_2_7B, "rms_norm_eps": 3e-4, "rope_theta": 123.0})
    assert (config.rms_norm_eps, config.rope.theta) == (3e-4, 123.0)
    assert config_from_json(LLAMA_2_7B).rope.theta == 10000.0


def test_defaults_are_those_of_the_family():
    sizes = {name: LLAMA_2_7B[name] for name in SIZES}
    llama, mistral, qwen3 = (config_from_json({**sizes, "model_type": name}) for name in ("llama", "mistral", "qwen3"))
    assert (llama.max_position_embeddings, mistral.max_position_embeddings) == (2048, 131072)
    assert (llama.num_key_value_heads, mistral.num_key_value_heads, qwen3.num_key_value_heads) == (32, 8, 32)
    assert (llama.windows[0], mistral.windows[0], qwen3.windows[0]) == (None, 4096, None)
    assert config_from_json({**sizes, "model_type": "qwen3", "hidden_size": 2048}).head_dim == 128
    assert {config.rms_norm_eps for config in (llama, mistral, qwen3)} == {1e-6}


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
