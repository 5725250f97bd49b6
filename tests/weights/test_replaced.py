"""Folders of PEFT's that change more than linear layers: loaded and merged, against PEFT itself."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert_hf_checkpoint
from quantize import QuantizedLinear
from shell.cli import UserError
from weights import peft_format
from weights.checkpoint import load_model
from weights.merge import Tuned
from weights.stored import Weights

IDS = [3, 7, 500]
KINDS = {  # of folders, by the arguments of PEFT's LoraConfig
    "embedding and head": dict(modules_to_save=["embed_tokens", "lm_head"]),
    "embedding": dict(modules_to_save=["embed_tokens"]),
    "head": dict(modules_to_save=["lm_head"]),
    "norms": dict(modules_to_save=["norm", "input_layernorm"]),
    "projections": dict(modules_to_save=["o_proj"], target_modules=["q_proj", "o_proj"]),
    "an MLP": dict(modules_to_save=["layers.1.mlp"], target_modules=["down_proj"]),
    "both as one": dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "LoRA on the embedding": dict(target_modules=["q_proj", "embed_tokens"], rank_pattern={"embed_tokens": 4}),
    "rsLoRA on the embedding": dict(
        target_modules=["embed_tokens"], use_rslora=True, alpha_pattern={"embed_tokens": 3}
    ),
    "DoRA on the embedding": dict(target_modules=["q_proj", "embed_tokens"], use_dora=True),
    "LoRA on both": dict(target_modules=["embed_tokens", "lm_head"]),
    "LoRA on both as one": dict(target_modules=["embed_tokens"], ensure_weight_tying=True),
    "tokens": dict(trainable_token_indices=IDS),
    "tokens of the head": dict(trainable_token_indices={"lm_head": IDS}),
    "tokens of both": dict(trainable_token_indices={"embed_tokens": IDS, "lm_head": [5]}),
    "the same tokens of both": dict(trainable_token_indices={"embed_tokens": IDS, "lm_head": IDS}),
    "all biases": dict(bias="all"),
    "biases of LoRA": dict(bias="lora_only", target_modules=["q_proj", "down_proj"]),
    "layer 0": dict(layers_to_transform=0),
    "layers": dict(layers_to_transform=[0, 2]),
    "layers by pattern": dict(layers_to_transform=[1], layers_pattern="layers"),
    "a full name beside layers": dict(
        layers_to_transform=[1], target_modules=["k_proj", "model.layers.0.self_attn.q_proj"]
    ),
    "without some": dict(
        exclude_modules=["layers.0.self_attn.q_proj", "lm_head"], target_modules=["q_proj", "up_proj"]
    ),
    "without an expression": dict(exclude_modules=r".*\.[12]\..*", target_modules=r".*(q|v)_proj"),
    "much of it": dict(
        modules_to_save=["norm"], bias="all", trainable_token_indices=IDS, layers_to_transform=[1], use_rslora=True
    ),
}


def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def make(base, folder, settings):
    """An adapter folder as PEFT writes it after some training, and its logits (of the model that PEFT loads)."""
    from peft import LoraConfig, PeftModel, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **settings})
        theirs = get_peft_model(transformers_model(base), config)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        theirs.save_pretrained(folder)
        return PeftModel.from_pretrained(transformers_model(base), folder).eval()


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def inputs():
    """Tokens among which are those of IDS."""
    tokens = torch.randint(512, (2, 16))
    tokens[:, 3:6] = torch.tensor(IDS)
    return tokens


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3"])
@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
@torch.no_grad()
def test_logits_are_pefts_before_and_after_merging(tiny_checkpoint, tmp_path, family, settings):
    base, tokens = tiny_checkpoint(family), inputs()
    theirs = make(base, tmp_path / "adapter", settings)
    expected = theirs(input_ids=tokens).logits
    ours = load_model(base, torch.float32, adapter_dir=tmp_path / "adapter")
    assert distance(ours(tokens), expected) < 1e-5
    assert distance(load_model(base, torch.float32)(tokens), expected) > 1e-3
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    merged = load_model(tmp_path / "merged", torch.float32)
    assert distance(merged(tokens), expected) < 1e-5
    assert distance(transformers_model(tmp_path / "merged")(input_ids=tokens).logits, expected) < 1e-5
    tied = json.loads((tmp_path / "merged" / "config.json").read_text()).get("tie_word_embeddings", False)
    assert tied == (merged.lm_head.weight is merged.model.embed_tokens.weight)
    assert tied == ("lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors"))
    # Of LoRA and tokens on one of two tied tensors PEFT's own merge changes both; ours is its model before merging.
    if tied or family == "llama" or "modules_to_save" in settings:
        assert distance(theirs.merge_and_unload()(input_ids=tokens).logits, expected) < 1e-5


def merge(base, adapter, folder):
    settings = convert_hf_checkpoint.Settings(source=base, adapter_dir=adapter, out_dir=folder)
    convert_hf_checkpoint.merge(settings)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@torch.no_grad()
def test_the_tie_holds_where_nothing_unties_it(tiny_checkpoint, tmp_path, family):
    for name, tied in (
        ("tokens", True), ("the same tokens of both", True), ("norms", True), ("both as one", True),
        ("tokens of both", False), ("embedding", False), ("head", False), ("LoRA on the embedding", False),
    ):  # fmt: skip
        make(tiny_checkpoint(family), tmp_path / name, KINDS[name])
        model = load_model(tiny_checkpoint(family), torch.float32, adapter_dir=tmp_path / name)
        one = model.lm_head.weight is model.model.embed_tokens.weight
        assert one == model.config.tie_word_embeddings == (tied and family == "llama-tied"), name


@torch.no_grad()
def test_a_base_in_nf4_keeps_what_is_replaced_whole_dense(tiny_checkpoint, tmp_path):
    base, tokens = tiny_checkpoint("llama"), inputs()
    make(base, tmp_path, dict(modules_to_save=["o_proj", "lm_head"], bias="all"))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    model = load_model(base, torch.float32, quantize="bnb.nf4", adapter_dir=tmp_path)
    attention = model.model.layers[1].self_attn
    assert isinstance(attention.k_proj, QuantizedLinear) and not isinstance(attention.o_proj, QuantizedLinear)
    prefix = "base_model.model.model.layers.1.self_attn"
    assert torch.equal(attention.o_proj.weight, stored[f"{prefix}.o_proj.weight"])
    assert torch.equal(attention.k_proj.bias, stored[f"{prefix}.k_proj.bias"])
    assert torch.equal(attention.q_proj.base.bias, stored[f"{prefix}.q_proj.base_layer.bias"])
    config = json.loads((base / "config.json").read_text())
    assert distance(Tuned(config, Weights(base), "bnb.nf4", tmp_path).logits(tokens[:1]), model(tokens[:1])) < 1e-5


@pytest.mark.parametrize("infix", ["modules_to_save.", ""])
@torch.no_grad()
def test_both_spellings_of_saved_modules(tiny_checkpoint, tmp_path, infix):
    make(tiny_checkpoint("llama"), tmp_path, KINDS["head"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"base_model.model.lm_head.{infix}weight"] = tensors.pop("base_model.model.lm_head.weight")
    save_file(tensors, path)
    model = load_model(tiny_checkpoint("llama"), torch.float32, adapter_dir=tmp_path)
    assert torch.equal(model.lm_head.weight, tensors[f"base_model.model.lm_head.{infix}weight"])


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("kind", ["LoRA on the embedding", "LoRA on both"])
@torch.no_grad()
def test_the_base_that_a_folder_brings_is_taken(tiny_checkpoint, tmp_path, family, kind):
    """PEFT saves embedding and head beside LoRA on them, and loads them over the base's."""
    from peft import PeftModel

    base, tokens = tiny_checkpoint(family), inputs()
    before = make(base, tmp_path / "adapter", KINDS[kind])(input_ids=tokens).logits
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    other = torch.randn(512, 48) / 7
    names = [name for name in tensors if name.endswith("base_layer.weight")]
    save_file({**tensors, **{name: other.clone() for name in names}}, path)
    expected = PeftModel.from_pretrained(transformers_model(base), path.parent).eval()(input_ids=tokens).logits
    assert distance(load_model(base, torch.float32, adapter_dir=path.parent)(tokens), expected) < 1e-5
    assert distance(before, expected) > 1e-2
    merge(base, path.parent, tmp_path / "merged")
    assert distance(load_model(tmp_path / "merged", torch.float32)(tokens), expected) < 1e-5


@torch.no_grad()
def test_in_bf16_they_are_as_in_peft(tiny_checkpoint, tmp_path):
    """The embedding with its LoRA merged is rounded as PEFT's sum of the two is."""
    make(tiny_checkpoint("llama"), tmp_path, KINDS["LoRA on the embedding"])
    full = load_model(tiny_checkpoint("llama"), torch.float32, adapter_dir=tmp_path).model.embed_tokens.weight
    half = load_model(tiny_checkpoint("llama"), torch.bfloat16, adapter_dir=tmp_path).model.embed_tokens.weight
    assert half.dtype == torch.bfloat16 and distance(half, full) < 4e-3


@pytest.mark.parametrize("kind", ["layers", "layer 0", "layers by pattern", "without some"])
@torch.no_grad()
def test_what_covers_only_some_layers_is_saved_so(tiny_checkpoint, tmp_path, kind):
    """By their numbers where only these narrow it, else by the layers' names."""
    make(tiny_checkpoint("llama"), tmp_path, KINDS[kind])
    model = load_model(tiny_checkpoint("llama"), torch.float32)
    config = peft_format.load_adapter(model, tmp_path)
    assert config.layers == {"layers": (0, 2), "layer 0": (0,)}.get(kind)
    if config.layers:
        assert config.targets == ("q_proj",)
    else:
        assert all(target.startswith("model.layers.") for target in config.targets)
    (tmp_path / "again").mkdir()
    peft_format.save_adapter(model, config, tmp_path / "again", "base")
    again, tokens = load_model(tiny_checkpoint("llama"), torch.float32, adapter_dir=tmp_path / "again"), inputs()
    assert torch.equal(model(tokens), again(tokens))


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "kind, changes, named",
    [
        ("embedding", dict(trainable_token_indices=[3]), "the file has no rows"),
        ("tokens", dict(trainable_token_indices=[3, 7]), "names 2 tokens, the file has 3 rows"),
        ("tokens", dict(trainable_token_indices=[3, 7, 512]), "has 512, the model's last token is 511"),
        ("tokens", dict(trainable_token_indices=[3, 7, -1]), "trainable_token_indices"),
        ("LoRA on the embedding", dict(rank_pattern={"embed_tokens": 3}), r"lora_embedding_A is \(4, 512\)"),
        ("LoRA on the embedding", dict(use_dora=True), "lora_magnitude_vector"),
        ("norms", dict(modules_to_save=["model.norm"]), "brings model.layers.0.input_layernorm.weight"),
        ("layer 0", dict(exclude_modules="(a+)+$"), None),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tiny_checkpoint, tmp_path, kind, changes, named):
    make(tiny_checkpoint("llama"), tmp_path, KINDS[kind])
    change_config(tmp_path, **changes)
    if named is None:
        load_model(tiny_checkpoint("llama"), torch.float32, adapter_dir=tmp_path)
        return
    with pytest.raises(UserError, match=named) as error:
        load_model(tiny_checkpoint("llama"), torch.float32, adapter_dir=tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_an_old_adapter_file_says_how_to_convert_it(tiny_checkpoint, tmp_path):
    import subprocess
    import sys

    theirs = make(tiny_checkpoint("llama"), tmp_path, {})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"convert adapter_model.bin with: python -c") as error:
        load_model(tiny_checkpoint("llama"), torch.float32, adapter_dir=tmp_path)
    code = str(error.value).partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", code], check=True)
    tokens = inputs()
    ours = load_model(tiny_checkpoint("llama"), torch.float32, adapter_dir=tmp_path)
    with torch.no_grad():
        assert distance(ours(tokens), theirs(input_ids=tokens).logits) < 1e-5
