"""Adapter folders of every family: PEFT's go in, ours go to PEFT, and ours come back bit for bit."""

import json
import warnings

import peft
import pytest
import torch
from families.tiny import distance, random_tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from convert_hf_checkpoint import Settings, merge
from lora import PROJECTIONS, AdapterConfig, adapters, add_lora, linear_layers
from shell.cli import UserError
from weights.merge import Tuned
from weights.peft_format import load_adapter, save_adapter
from weights.peft_layout import Layout, ends, outside_peft, patterns
from weights.stored import Weights

T = 16
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
FUSED = ["q_proj", "v_proj", "o_proj", "up_proj"]  # parts of what many families have as one
COMBINATIONS = [("lora", False, True), ("lora", True, False), ("dora", False, False), ("dora", True, True)]


@torch.no_grad()
def adapted(tiny, kind="lora", targets=None, **settings):
    """Our model with adapters, all of their parameters random, and their config."""
    model = tiny.load()
    own = {name.rpartition(".")[2] for name in linear_layers(model)}
    targets = tuple(name for name in targets or PROJECTIONS if name in own or "." in name)
    config = AdapterConfig(kind, 3, 6, targets=targets, **settings)
    add_lora(model, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(
                parameter * (torch.rand_like(parameter) + 0.5)
                if "magnitude" in name
                else 0.2 * torch.randn_like(parameter)
            )
    return model, config


def saved(model, config, tiny, folder):
    """The folder, with the model's adapters in it."""
    folder.mkdir()
    save_adapter(model, config, folder, tiny.folder)
    return folder


def loaded_by_peft(tiny, folder):
    """PEFT's model of our folder, in which it misses nothing, and from which it leaves out nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "(?i).*(missing|unexpected).*")
        return peft.PeftModel.from_pretrained(tiny.loaded_by_transformers(tiny.folder), folder).eval()


@torch.no_grad()
def peft_adapter(tiny, folder, **settings):
    """PEFT's adapter over transformers' model, all of its parameters random, saved to `folder`."""
    model = tiny.loaded_by_transformers(tiny.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, which PEFT sets by itself
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=3, **settings)).eval()
        for name, parameter in model.named_parameters():
            if ".lora_A" in name or ".lora_B" in name:
                parameter.normal_(std=0.2)
            elif "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
        model.save_pretrained(folder)
    return model


def same_adapters(model, other):
    """Whether two models have the same adapters, bit for bit."""
    one, two = ({n: p for n, p in m.named_parameters() if "lora_" in n} for m in (model, other))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@torch.no_grad()
@pytest.mark.parametrize("kind, rslora, all_targets", COMBINATIONS)
def test_ours_in_peft_and_back(kind, rslora, all_targets, tiny, tmp_path):
    more = {} if all_targets else {"targets": FUSED, "rank_pattern": {"o_proj": 5}, "alpha_pattern": {"o_proj": 7}}
    model, config = adapted(tiny, kind, rslora=rslora, dropout=0.1, **more)
    folder = saved(model, config, tiny, tmp_path / "adapter")
    tokens = random_tokens(2, T)
    expected = model.eval()(tokens)
    assert distance(expected, tiny.load()(tokens)) > 0.01
    if outside_peft(model.config, kind, adapters(model)):
        assert tiny.family in EXPERTS
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "ONETUNE_OUTSIDE_PEFT"
    else:
        assert distance(loaded_by_peft(tiny, folder)(tokens, use_cache=False).logits, expected) < 1e-5
    again = tiny.load()
    assert load_adapter(again, folder) == config
    assert same_adapters(model, again)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_merged(kind, tiny, tmp_path):
    """A folder of the family, which transformers loads, with the logits of base and adapter."""
    model, config = adapted(tiny, kind)
    folder = saved(model, config, tiny, tmp_path / "adapter")
    merge(Settings(source=tiny.folder, adapter_dir=folder, out_dir=tmp_path / "merged"))
    tokens = random_tokens(2, T)
    merged = tiny.loaded_by_transformers(tmp_path / "merged")
    assert distance(merged(tokens, use_cache=False).logits, model.eval()(tokens)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_loads_pefts(dora, tiny, tmp_path):
    bare = tiny.load()
    layout = Layout(bare.config, [name for name in linear_layers(bare) if name != "lm_head"])
    modules = sorted({module.rpartition(".")[2] for module in layout.modules()})
    more = {} if dora or not bare.config.experts else {"target_parameters": ["experts.gate_up_proj", "down_proj"]}
    if tiny.family == "qwen3_moe":  # PEFT takes the names of its dense MLPs for the experts'
        modules = [name for name in modules if name in PROJECTIONS[:4]]
    peft_model = peft_adapter(
        tiny, tmp_path, target_modules=modules, use_dora=dora, use_rslora=dora, layers_to_transform=[0, 2],
        rank_pattern={modules[0]: 5, "gate_up_proj": 4}, alpha_pattern={modules[-1]: 7}, **more,
    )  # fmt: skip
    tokens, model = random_tokens(2, T), tiny.load(adapter_dir=tmp_path)
    expected = peft_model(tokens, use_cache=False).logits
    assert distance(model(tokens), expected) < 1e-5 and distance(bare(tokens), expected) > 0.01
    config = json.loads((tiny.folder / "config.json").read_text())
    tuned = Tuned(config, Weights(tiny.folder), adapter_dir=tmp_path)
    for name, adapter in adapters(model).items():
        assert distance(tuned.merged(f"{name}.weight")[0], adapter.merged_weight()) < 1e-5
