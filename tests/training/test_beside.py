"""Whole modules and rows of tokens that train beside adapters: against PEFT, in runs, and in their folders."""

import json
import shutil
import warnings

import peft
import pytest
import torch
from conftest import SMALL, write_tiny_tokenizer
from families.tiny import distance
from safetensors.torch import load_file
from test_finetune import column, final_weights, random_samples, run, settings  # noqa: F401 (fixtures)

import finetune
import lora
from convert_hf_checkpoint import Settings as Convert
from convert_hf_checkpoint import merge
from quantize import quantized_layers
from shell.cli import UserError
from training import build
from training.memory.budget import plan_job
from training.memory.plan import Predictor
from weights.checkpoint import load_model

IDS = [3, 7, 500]
KINDS = {  # the flags, and what PEFT calls them
    "embedding and head": (dict(lora_modules_to_save=["embed_tokens", "lm_head"]),
                           dict(modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True)),
    "head": (dict(lora_modules_to_save=["lm_head"]), dict(modules_to_save=["lm_head"])),
    "embedding": (dict(lora_modules_to_save=["embed_tokens"]), dict(modules_to_save=["embed_tokens"])),
    "norms": (dict(lora_modules_to_save=["model.norm", "input_layernorm"]),
              dict(modules_to_save=["model.norm", "input_layernorm"])),
    "projections": (dict(lora_modules_to_save=["layers.1.self_attn.o_proj", "layers.0.mlp"]),
                    dict(modules_to_save=["layers.1.self_attn.o_proj", "layers.0.mlp"])),
    "tokens": (dict(lora_tokens=["<|im_end|>", 500, 3, 7, 3]), dict(trainable_token_indices=[2, 3, 7, 500])),
    "much": (dict(lora_tokens=IDS, lora_modules_to_save=["model.norm"], lora_rank_pattern={"q_proj": 5}),
             dict(trainable_token_indices=IDS, modules_to_save=["model.norm"], rank_pattern={"q_proj": 5})),
}  # fmt: skip
FAMILIES = {"llama": "llama", "tied": "llama-tied"}
kinds = pytest.mark.parametrize("flags, theirs", KINDS.values(), ids=KINDS.keys())
models = pytest.mark.parametrize("family", FAMILIES)
warnings.filterwarnings("ignore", category=DeprecationWarning)


@pytest.fixture(scope="module")
def bases(tiny_checkpoint, tmp_path_factory):
    """Model folders with a tokenizer, by name."""
    folder = tmp_path_factory.mktemp("bases")
    for name, family in FAMILIES.items():
        shutil.copytree(tiny_checkpoint(family), folder / name)
        write_tiny_tokenizer(folder / name)
    return {name: folder / name for name in FAMILIES}


def transformers_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def inputs():
    """Tokens and targets, among which are those of IDS."""
    tokens = torch.randint(3, 512, (2, 12))
    tokens[:, 3:6] = torch.tensor(IDS)
    return tokens, tokens.roll(-1, 1)


def built(s):
    torch.manual_seed(s.seed)
    return build.build_model(s, torch.device("cpu"), None)


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def by_our_names(model):
    """PEFT's trainable parameters under our names."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = (
                name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".default", "")
            )
            name = name.replace("token_adapter.trainable_tokens_delta", "rows")
            found[name.removesuffix(".weight") if "lora_" in name else name] = parameter
    return found


@models
@kinds
def test_logits_and_gradients_are_pefts(settings, bases, family, flags, theirs):  # noqa: F811
    s = settings(random_samples(4), checkpoint_dir=bases[family], lora_r=3, lora_targets=["q_proj", "up_proj"], **flags)
    model, config = built(s)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        more = peft.LoraConfig(
            r=3, lora_alpha=32, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **theirs
        )
        reference = peft.get_peft_model(transformers_model(bases[family]), more)
    ours, expected = trainable(model), by_our_names(reference)
    assert ours.keys() == expected.keys()
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.add_(torch.randn_like(parameter) * 0.1)
            expected[name].copy_(parameter)
    tokens, targets = inputs()
    logits = reference(input_ids=tokens).logits
    assert distance(model(tokens), logits) < 1e-5
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    model.train()(tokens, targets).backward()
    one, other = (torch.cat([part[name].grad.flatten() for name in ours]) for part in (ours, expected))
    assert distance(one, other) < 1e-5
    for name, parameter in ours.items():
        assert parameter.grad is not None and distance(parameter.grad, expected[name].grad) < 1e-4, name


@models
@kinds
@torch.no_grad()
def test_what_a_run_leaves(run, settings, tmp_path, bases, family, flags, theirs):  # noqa: F811
    """final/ in PEFT and in ours, merged, and what its adapter_config.json says."""
    flags = flags | dict(checkpoint_dir=bases[family], lora_targets=["q_proj", "up_proj"], lora_r=3)
    with torch.enable_grad():
        folder = run(random_samples(16), max_steps=3, **flags) / "final"
    tokens, _ = inputs()
    ours = load_model(bases[family], torch.float32, adapter_dir=folder)
    expected = ours(tokens)
    assert distance(expected, load_model(bases[family], torch.float32)(tokens)) > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(transformers_model(bases[family]), folder).eval()
    assert distance(loaded(input_ids=tokens).logits, expected) < 1e-5
    merge(Convert(source=bases[family], adapter_dir=folder, out_dir=tmp_path / "merged"))
    assert distance(load_model(tmp_path / "merged", torch.float32)(tokens), expected) < 1e-5
    tied = family == "tied" and len({"embed_tokens", "lm_head"} & {*flags.get("lora_modules_to_save", ())}) != 1
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("planner", ["packed", "sorted_in_step"])
@models
@pytest.mark.parametrize("kind", ["embedding and head", "projections", "much"])
def test_a_run_resumes_bit_for_bit(run, bases, family, kind, planner):  # noqa: F811
    """In bf16, where these weights are fp32, with recomputation; and over 4 bits."""
    flags = KINDS[kind][0] | dict(
        checkpoint_dir=bases[family], planner=planner, recompute=0.5, precision="bf16-true", learning_rate=1e-3,
        save_interval=2, max_steps=4, eval_interval=2, quantize="bnb.nf4" if planner == "packed" else None,
    )  # fmt: skip
    whole = run(random_samples(16), random_samples(4), name="whole", **flags)
    stopped = run(name="stopped", **flags)
    shutil.rmtree(stopped / "final")
    shutil.rmtree(stopped / "step-000004")
    resumed = run(name="stopped", resume=True, **flags)
    assert final_weights(resumed).read_bytes() == final_weights(whole).read_bytes()
    assert column(whole, "loss")[-2:] == column(resumed, "loss")[-2:]
    tensors = load_file(final_weights(whole))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantize", [None, "bnb.nf4"])
def test_only_that_trains_and_the_plan_counts_it(settings, bases, kind, quantize):  # noqa: F811
    """In bf16 the rest stays in bf16; what trains whole is not quantised."""
    s = settings(
        random_samples(4), checkpoint_dir=bases["tied"], precision="bf16-true", quantize=quantize, **KINDS[kind][0]
    )
    model, config = built(s)
    assert model.hidden_dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
    tokens, targets = inputs()
    model.train()(tokens, targets).backward()
    assert all(parameter.grad.isfinite().all() for parameter in trainable(model).values())
    quantized = 0 if quantize is None else 21 - sum(path in lora.linear_layers(model) for path in config.save)
    quantized += "lm_head" in config.save and quantize is not None
    assert len(quantized_layers(model)) == quantized
    data = build.open_data(s)
    build.check_model(s, data)
    fixed = Predictor(plan_job(s)).fixed
    assert fixed["adapters"] == sum(parameter.nbytes for parameter in trainable(model).values())
    frozen = sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
    frozen += sum(layer.nbytes() for layer in quantized_layers(model))
    assert abs(fixed["weights"] - frozen) <= 64  # the numbers of tokens


@torch.no_grad()
@pytest.mark.parametrize(
    "row, save", [(("gpt_neox", 0), ["embed_in", "lm_head", "final_layer_norm"]), (("mixtral", 0), ["lm_head", "norm"]),
                  (("gpt2", 0), ["wte", "ln_f"]), (("gemma", 0), ["embed_tokens", "lm_head"])]
)  # fmt: skip
@pytest.mark.parametrize("tokens", [None, (3, 5)])
def test_other_families(tiny_models, tmp_path, row, save, tokens):
    """By the family's own names: in PEFT and back."""
    from training.targets import own_modules
    from weights.beside import train_beside
    from weights.peft_format import load_adapter, save_adapter

    tiny = tiny_models(row)
    model, x = tiny.load(), torch.randint(3, 160, (2, 9))
    x[:, 2:4] = torch.tensor([3, 5])
    save = () if tokens else own_modules(save, model.config)
    config = lora.AdapterConfig(r=2, alpha=3, targets=("q_proj", "o_proj"), save=save, tokens=tokens or ())
    lora.add_lora(model, config)
    train_beside(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_adapter(model, config, tmp_path, tiny.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(tiny.loaded_by_transformers(tiny.folder), tmp_path).eval()
    assert distance(model(x), theirs(x, use_cache=False).logits) < 1e-5
    again = tiny.load()
    assert load_adapter(again, tmp_path) == config
    assert distance(again(x), model(x)) < 1e-6
    merge(Convert(source=tiny.folder, adapter_dir=tmp_path, out_dir=tmp_path / "merged"))
    assert distance(load_model(tmp_path / "merged", torch.float32)(x), model(x)) < 1e-5


@torch.no_grad()
def test_we_load_what_peft_saves_of_another_family(tiny_models, tmp_path):
    tiny, x = tiny_models(("gpt_neox", 0)), torch.randint(3, 160, (2, 9))
    for number, more in enumerate((
        dict(modules_to_save=["lm_head"]), dict(trainable_token_indices=[3, 5]),
        dict(trainable_token_indices={"embed_in": [3, 5]}, modules_to_save=["final_layer_norm"]),
    )):  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(r=2, target_modules=["query_key_value"], task_type="CAUSAL_LM", **more)
            theirs = peft.get_peft_model(tiny.loaded_by_transformers(tiny.folder), config).eval()
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            theirs.save_pretrained(tmp_path / str(number))
        x[:, 2:4] = torch.tensor([3, 5])
        ours = tiny.load(adapter_dir=tmp_path / str(number))
        assert distance(ours(x), theirs(x, use_cache=False).logits) < 1e-5


@pytest.mark.parametrize(
    "flags, says",
    [
        (dict(lora_modules_to_save=["embed"]), "no module 'embed'"),
        (dict(lora_modules_to_save=["rotary"]), "no module 'rotary'"),
        (dict(lora_tokens=["<|tool|>"]), "'<|tool|>' is no added token .* --add_tokens"),
        (dict(lora_tokens=[512]), "512 is beyond the embedding, whose last row is 511"),
        (dict(lora_tokens=[3], lora_modules_to_save=["embed_tokens"]), "trains already"),
        (dict(lora_tokens=[3], lora_targets=["q_proj", "lm_head"]), "the head is the embedding"),
        (dict(lora_modules_to_save=["q_proj"], lora_targets=["q_proj"]), "no linear layer"),
    ],
)
def test_what_cannot_train_is_refused(settings, bases, flags, says):  # noqa: F811
    with pytest.raises(UserError, match=says.replace("|", r"\|")):
        finetune.main(settings(random_samples(4), checkpoint_dir=bases["tied"], max_steps=1, **flags))


def test_a_part_of_a_fused_layer_is_refused(tiny_models):
    from training.targets import own_modules

    with pytest.raises(UserError, match="q_proj is a part of gpt_neox.*query_key_value"):
        own_modules(["q_proj"], tiny_models(("gpt_neox", 0)).load().config)


def test_the_small_sizes_of_the_file(run, bases):  # noqa: F811
    """Rows of three tokens, not the whole embedding."""
    folder = run(random_samples(8), max_steps=1, checkpoint_dir=bases["llama"], lora_tokens=IDS)
    tensors = load_file(final_weights(folder))
    (name,) = (name for name in tensors if "lora_" not in name)
    assert name == "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert tensors[name].shape == (3, SMALL["hidden_size"])
    config = json.loads((folder / "final" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": IDS}
