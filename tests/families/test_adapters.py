"""Adapter folders of every family: PEFT's, under the family's own names, and ours."""

import warnings

import peft
import pytest
import torch
import transformers
from families.rows import ROWS
from safetensors.torch import load_file

from lora import AdapterConfig, adapters, add_lora, linear_layers
from shell.cli import UserError
from training.from_settings import default_targets
from weights.checkpoint import load_model
from weights.merge import Tuned
from weights.names import Names
from weights.peft_format import load_adapter, save_adapter
from weights.stored import Weights

TOKENS = torch.arange(3, 27)[None]


def family_model(family, folder, row=0):
    """A random model of transformers, saved to `folder`."""
    config = transformers.AutoConfig.for_model(family, **ROWS[family][row])
    attention = "sdpa" if family == "falcon" else "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = name.endswith("weight") and ("norm" in name or "ln_" in name)
            parameter.normal_(std=0.3).add_(float(is_norm))
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def peft_adapter(model, folder, **settings):
    """PEFT's adapter over `model`, all of its parameters random, saved to `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, which PEFT sets by itself
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=3, **settings)).eval()
        for name, parameter in adapted.named_parameters():
            if ".lora_A" in name or ".lora_B" in name:
                parameter.normal_(std=0.2)
            elif "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
        adapted.save_pretrained(folder)
    return adapted


def close(ours, theirs):
    return (ours - theirs).norm() <= 1e-5 * theirs.norm()


@torch.no_grad()
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ROWS)
def test_loads_pefts(family, dora, tmp_path):
    hf = family_model(family, tmp_path / "base")
    bare = load_model(tmp_path / "base", torch.float32)
    names = Names(bare.config)
    modules = {names.module(name)[0].rpartition(".")[2] for name in linear_layers(bare) if name != "lm_head"}
    peft_model = peft_adapter(
        hf, tmp_path / "adapter", target_modules=sorted(modules), use_dora=dora, use_rslora=dora,
        layers_to_transform=[0, 2], rank_pattern={sorted(modules)[0]: 5}, alpha_pattern={sorted(modules)[-1]: 7},
    )  # fmt: skip
    model = load_model(tmp_path / "base", torch.float32, adapter_dir=tmp_path / "adapter")
    expected = peft_model(TOKENS, use_cache=False).logits
    assert close(model(TOKENS), expected) and not close(bare(TOKENS), expected)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "base").to_dict()
    tuned = Tuned(config, Weights(tmp_path / "base"), adapter_dir=tmp_path / "adapter")
    for name, adapter in adapters(model).items():
        assert close(tuned.merged(f"{name}.weight")[0], adapter.merged_weight())


@torch.no_grad()
@pytest.mark.parametrize("family", ROWS)
def test_ours_comes_back_bit_for_bit(family, tmp_path):
    family_model(family, tmp_path / "base")
    model, other = (load_model(tmp_path / "base", torch.float32) for _ in range(2))
    config = AdapterConfig("dora", r=2, targets=tuple(default_targets(model.config)))
    add_lora(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_()
    (tmp_path / "adapter").mkdir()
    save_adapter(model, config, tmp_path / "adapter", tmp_path / "base")
    load_adapter(other, tmp_path / "adapter")
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    assert all(name == again and torch.equal(a, b) for (name, a), (again, b) in pairs)


@pytest.mark.parametrize("targets", [r".*\.[02]\..*query_key_value", ["query_key_value"]], ids=["expression", "list"])
def test_a_fused_layer_is_all_of_its_parts(targets, tmp_path):
    peft_adapter(family_model("gpt_neox", tmp_path / "base"), tmp_path / "adapter", target_modules=targets)
    model = load_model(tmp_path / "base", torch.float32, adapter_dir=tmp_path / "adapter")
    layers = (0, 2) if isinstance(targets, str) else (0, 1, 2)
    assert [*adapters(model)] == [f"model.layers.{n}.self_attn.{x}_proj" for n in layers for x in "qkv"]
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for n in layers:
        A = stored[f"base_model.model.gpt_neox.layers.{n}.attention.query_key_value.lora_A.weight"]
        parts = [model.get_submodule(f"model.layers.{n}.self_attn.{x}_proj").lora_A for x in "qkv"]
        assert all(torch.equal(A, part) for part in parts)


@pytest.mark.parametrize(
    "settings",
    [dict(modules_to_save=["wte"]), dict(trainable_token_indices={"wte": [3, 4]}), dict(bias="all")],
    ids=["module", "tokens", "bias"],
)
def test_what_is_beside_adapters_is_refused(settings, tmp_path):
    peft_adapter(family_model("gpt2", tmp_path / "base"), tmp_path / "adapter", target_modules=["c_attn"], **settings)
    with pytest.raises(UserError):
        load_model(tmp_path / "base", torch.float32, adapter_dir=tmp_path / "adapter")


def test_a_norm_of_another_name_is_refused(tmp_path):
    """Gemma's post_attention_layernorm is not what we call so."""
    settings = dict(target_modules=["q_proj"], modules_to_save=["post_attention_layernorm"])
    peft_adapter(family_model("gemma2", tmp_path / "base"), tmp_path / "adapter", **settings)
    with pytest.raises(UserError, match="not supported for gemma2 models"):
        load_model(tmp_path / "base", torch.float32, adapter_dir=tmp_path / "adapter")
