"""Adapters that are not LoRA in PEFT's files: PEFT's go in, ours go to PEFT, with the same logits and gradients."""

import json
import warnings

import peft
import pytest
import torch
from conftest import SEED
from families.tiny import distance, random_tokens
from safetensors.torch import load_file, save_file

from adapters.virtual_tokens import virtual_ids
from lora import AdapterConfig, adapters, add_lora, linear_layers
from shell.cli import UserError
from weights.checkpoint import load_model
from weights.peft_format import load_adapter, save_adapter
from weights.peft_layout import Layout

T, N = 14, 3  # tokens of a text, virtual ones before it
KINDS = ("vera", "ia3", "prompt", "prefix", "llama-adapter")
PEFT_TYPES = {
    "vera": "VERA", "ia3": "IA3", "prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING",
    "llama-adapter": "ADAPTION_PROMPT",
}  # fmt: skip


def present(model, names):
    own = {name.rpartition(".")[2] for name in linear_layers(model)}
    return tuple(name for name in names if name in own)


def config_of(kind, model):
    """A config of adapters that this model can have."""
    targets = ("q_proj", "v_proj", "o_proj", "down_proj")
    if model.config.experts:
        targets = targets[:3]
    return AdapterConfig(
        kind, 3, 6, targets=present(model, targets), virtual_tokens=N, adapter_layers=2, seed=SEED % 1000
    )


@torch.no_grad()
def randomise(model):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            around = float("ia3" in name or "scale" in name)
            parameter.copy_(around + 0.3 * torch.randn_like(parameter))


def adapted(tiny, kind):
    """Our model with random adapters, and their config."""
    model = tiny.load()
    config = config_of(kind, model)
    add_lora(model, config)
    randomise(model)
    return model, config


def our_logits(model, tokens):
    """Logits after the real tokens."""
    ids = torch.tensor(virtual_ids(model), dtype=torch.int64).expand(len(tokens), -1)
    return model(torch.cat([ids, tokens], dim=1))[:, ids.size(1) :]


def their_logits(model, tokens):
    kind = model.active_peft_config.peft_type
    cached = {} if kind in ("PREFIX_TUNING", "ADAPTION_PROMPT") else {"use_cache": False}
    return model(tokens, **cached).logits[:, -tokens.size(1) :]


def saved(model, config, tiny, folder):
    folder.mkdir()
    save_adapter(model, config, folder, tiny.folder)
    return folder


def loaded_by_peft(tiny, folder, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", "(?i).*(missing|unexpected).*")
        return peft.PeftModel.from_pretrained(tiny.loaded_by_transformers(tiny.folder), folder, **more).eval()


def peft_type(folder):
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


def tensors_of(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad or any(x in n for x in ("prefix", "prompt"))}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_ours_in_peft_and_back(kind, tiny, family_row, tmp_path):
    model, config = adapted(tiny, kind)
    folder, tokens = saved(model, config, tiny, tmp_path / "adapter"), random_tokens(2, T)
    expected = our_logits(model.eval(), tokens)
    assert distance(expected, tiny.load()(tokens)) > 0.003
    if peft_type(folder).startswith("ONETUNE"):
        print("OUTSIDE", kind, family_row)
    else:
        found = their_logits(loaded_by_peft(tiny, folder), tokens)
        assert distance(found, expected) < 1e-5
    again = tiny.load()
    loaded = load_adapter(again, folder)
    assert loaded.kind == kind
    one, two = ({n: p for n, p in m.state_dict().items()} for m in (model, again))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@torch.no_grad()
def peft_adapter(tiny, folder, config):
    """PEFT's adapter over transformers' model, all of its parameters random, saved to `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny.loaded_by_transformers(tiny.folder), config).eval()
        randomise(model)
        model.save_pretrained(folder)
    return model


def theirs(kind, model):
    """PEFT's config for a model of ours; None if PEFT cannot have it."""
    layout = Layout(model.config, [name for name in linear_layers(model) if name != "lm_head"])
    modules = sorted({module.rpartition(".")[2] for module in layout.modules()})
    alone = sorted({m.rpartition(".")[2] for m in layout.modules() if len(layout.held[m][0]) == 1})
    if kind == "vera":
        more = {"target_modules": alone, "layers_to_transform": [0, 2], "save_projection": SEED % 2 == 0}
        return peft.VeraConfig(task_type="CAUSAL_LM", r=3, projection_prng_key=SEED % 77, **more)
    if kind == "ia3":
        return peft.IA3Config(task_type="CAUSAL_LM", target_modules=modules, feedforward_modules=alone[-1:])
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": N}
    if kind == "prompt":
        return peft.PromptTuningConfig(**virtual)
    if kind == "prefix":
        return peft.PrefixTuningConfig(**virtual)
    return peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=N, adapter_layers=2)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_loads_pefts(kind, tiny, family_row, tmp_path):
    bare = tiny.load()
    config = theirs(kind, bare)
    model = peft_adapter(tiny, tmp_path, config)
    tokens = random_tokens(2, T)
    found = our_logits(tiny.load(adapter_dir=tmp_path), tokens)
    expected = their_logits(model, tokens)
    assert distance(found, expected) < 1e-5 and distance(bare(tokens), expected) > 0.003
