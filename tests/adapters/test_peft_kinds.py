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


# Where PEFT cannot have what we have. Of LLaMA-Adapter it has Llama's and Mistral's alone, without biases.
OUTSIDE = {
    ("vera", "gpt_neox"), ("vera", "falcon"), ("vera", "gpt2"), ("vera", "phi3"), ("prefix", "falcon"),
    ("prompt", "opt"),
}  # fmt: skip

# A few rows of the table of families: plain ones, and each way in which a family's files differ from our layers.
ROWS = [
    ("llama", 1), ("llama", 2), ("mistral", 0), ("gpt_neox", 1), ("mixtral", 0), ("cohere", 0), ("falcon", 1),
    ("gpt2", 0), ("phi3", 1), ("granite", 0), ("gemma2", 0), ("opt", 1), ("qwen3", 1),
]  # fmt: skip


@pytest.fixture(params=ROWS, ids=lambda row: f"{row[0]}-{row[1]}")
def tiny(request, tiny_models):
    """The model of a row."""
    return tiny_models(request.param)


def present(model, names):
    own = {name.rpartition(".")[2] for name in linear_layers(model)}
    return tuple(name for name in names if name in own)


def has_llama_adapter(model):
    return model.config.family in ("llama", "mistral") and not model.config.o_bias


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
def test_ours_in_peft_and_back(kind, tiny, tmp_path):
    model, config = adapted(tiny, kind)
    folder, tokens = saved(model, config, tiny, tmp_path / "adapter"), random_tokens(2, T)
    expected = our_logits(model.eval(), tokens)
    assert distance(expected, tiny.load()(tokens)) > 0.003
    if peft_type(folder).startswith("ONETUNE"):
        assert (kind, tiny.family) in OUTSIDE or kind == "llama-adapter" and not has_llama_adapter(model)
    else:
        found = their_logits(loaded_by_peft(tiny, folder), tokens)
        assert distance(found, expected) < 1e-5
    again = tiny.load()
    loaded = load_adapter(again, folder)
    assert loaded.kind == kind
    one, two = model.state_dict(), again.state_dict()
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
def test_loads_pefts(kind, tiny, tmp_path):
    bare = tiny.load()
    if (
        (kind, tiny.family) in OUTSIDE - {("vera", tiny.family)}
        or kind == "llama-adapter"
        and not has_llama_adapter(bare)
    ):
        pytest.skip("PEFT has none here")
    config = theirs(kind, bare)
    model = peft_adapter(tiny, tmp_path, config)
    tokens = random_tokens(2, T)
    found = our_logits(tiny.load(adapter_dir=tmp_path), tokens)
    expected = their_logits(model, tokens)
    assert distance(found, expected) < 1e-5 and distance(bare(tokens), expected) > 0.003


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_pefts(kind, tiny_checkpoint, tmp_path):
    """Of a loss over the last tokens, by all ways to hold a sample: Llama with GQA, without biases."""
    base = tiny_checkpoint("llama-tied")
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    reference.set_attn_implementation("eager")
    ours = load_model(base, torch.float32)
    config = {
        "vera": peft.VeraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "down_proj"]),
        "ia3": peft.IA3Config(task_type="CAUSAL_LM"),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N),
        "llama-adapter": peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=N, adapter_layers=2),
    }[kind]
    model = peft.get_peft_model(reference, config)
    randomise(model)
    model.save_pretrained(tmp_path)
    config = load_adapter(ours, tmp_path)
    for parameter in ours.parameters():
        parameter.requires_grad_(False)
    for adapter in adapters(ours).values():
        for name, parameter in adapter.named_parameters():
            parameter.requires_grad_(not name.startswith("base."))
    tokens, targets = torch.randint(3, 512, (2, T)), torch.randint(3, 512, (2, T))
    for logits in (their_logits(model, tokens), our_logits(ours, tokens)):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    # Written as a file, the gradients lie as the parameters do.
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    save_adapter(ours, config, tmp_path, base)
    found = load_file(tmp_path / "adapter_model.safetensors")
    expected = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
    if kind in ("prompt", "prefix"):
        (expected,) = expected.values()
        expected = {"prompt_embeddings": expected}
    assert expected.keys() == {name for name in found if "vera_A" not in name and "vera_B" not in name}
    together = [torch.cat([each[name].flatten() for name in expected]) for each in (found, expected)]
    assert distance(*together) < 1e-5
    for name, gradient in expected.items():  # a small one has more of the rounding of large numbers
        assert distance(found[name], gradient) < 1e-4, name


# ------------------------------------------------------------------------------------------- what is refused


def vera_folder(tiny_models, folder):
    tiny = tiny_models(("llama", 2))
    model, config = adapted(tiny, "vera")
    return tiny, saved(model, config, tiny, folder / "adapter")


def damaged(folder, config=(), tensors=()):
    """Change keys of adapter_config.json, and tensors by a part of their names (None removes them)."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))
    stored = load_file(folder / "adapter_model.safetensors")
    for part, change in dict(tensors).items():
        for name in [name for name in stored if part in name]:
            value = stored.pop(name)
            if change is not None:
                stored[name] = change(value).contiguous()
    save_file(stored, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("kind", "config", "tensors", "says"),
    [
        ("vera", {"modules_to_save": ["norm"]}, {}, "modules_to_save is not supported for VERA"),
        ("vera", {"velocity": 3}, {}, "velocity is not supported for VERA"),
        ("vera", {"bias": "all"}, {}, "bias 'all' is not supported"),
        ("vera", {"r": 2}, {}, "rank"),
        ("vera", {"r": 0}, {}, "r 0 is not a whole number"),
        ("vera", {}, {"vera_A": None}, "no vera_A and vera_B"),
        ("vera", {}, {"1.self_attn.q_proj.vera_lambda_b": None}, "q_proj: it should have the tensors"),
        ("vera", {}, {"vera_B": lambda t: t * torch.nan}, "NaN"),
        ("vera", {"target_modules": ["q_proj"]}, {}, "it adapts model"),
        ("vera", {"vera_dropout": 2}, {}, "vera_dropout 2"),
        ("ia3", {"feedforward_modules": 3}, {}, "feedforward_modules is neither"),
        ("ia3", {"feedforward_modules": "(a+"}, {}, "no.* regular expression"),
        ("ia3", {}, {"0.self_attn.q_proj.ia3_l": lambda t: t[1:]}, "where the model needs"),
        ("prompt", {"num_virtual_tokens": 4}, {}, "4 virtual tokens of this model need"),
        ("prompt", {"num_virtual_tokens": 10**12}, {}, "virtual tokens of this model need"),
        ("prompt", {"num_transformer_submodules": 2}, {}, "num_transformer_submodules 2"),
        ("prompt", {}, {"prompt": lambda t: t * torch.inf}, "infinity"),
        ("prefix", {}, {"prompt": lambda t: t[:, 1:]}, "where 3 virtual tokens"),
        ("llama-adapter", {"adapter_layers": 9}, {}, "the model has 3 layers"),
        ("llama-adapter", {"adapter_layers": 1}, {}, "it adapts model.layers.1"),
        ("llama-adapter", {"target_modules": "mlp"}, {}, "target_modules 'mlp'"),
        ("llama-adapter", {}, {"gate": lambda t: t.repeat(2)}, "where the model needs"),
    ],
)
def test_what_does_not_fit_is_refused(kind, config, tensors, says, tiny_models, tmp_path):
    tiny = tiny_models(("llama", 2))
    model, written = adapted(tiny, kind)
    folder = saved(model, written, tiny, tmp_path / "adapter")
    damaged(folder, config, tensors)
    with pytest.raises(UserError, match=says):
        tiny.load(adapter_dir=folder)


def test_virtual_tokens_must_fit_the_context(tiny_models, tmp_path):
    tiny = tiny_models(("llama", 2))
    model = tiny.load()
    config = AdapterConfig("prompt", virtual_tokens=64)
    add_lora(model, config)
    folder = saved(model, config, tiny, tmp_path / "adapter")
    with pytest.raises(UserError, match="64 virtual tokens fill the model's context of 64"):
        tiny.load(adapter_dir=folder)


def test_lora_fa_is_lora_for_peft_and_itself_for_us(tiny_models, tmp_path):
    tiny = tiny_models(("llama", 2))
    model = tiny.load()
    config = AdapterConfig("lora-fa", 3, 6)
    add_lora(model, config)
    randomise(model)
    folder, tokens = saved(model, config, tiny, tmp_path / "adapter"), random_tokens(2, T)
    assert peft_type(folder) == "LORA"
    with torch.no_grad():
        found = loaded_by_peft(tiny, folder)(tokens, use_cache=False).logits
        assert distance(found, model.eval()(tokens)) < 1e-5
    again = tiny.load()
    assert load_adapter(again, folder) == config
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    assert not any("lora_A" in name for name, p in again.named_parameters() if p.requires_grad)
