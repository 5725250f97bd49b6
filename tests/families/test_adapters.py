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
from training.from_settings import own_targets
from weights.merge import Tuned
from weights.peft_format import load_adapter, save_adapter
from weights.peft_layout import Layout, ends, outside_peft, patterns
from weights.stored import Weights

T = 16
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
FUSED = ["q_proj", "v_proj", "o_proj", "up_proj"]  # parts of what many families have as one


@torch.no_grad()
def adapted(tiny, kind="lora", targets=None, **settings):
    """Our model with adapters, all of their parameters random, and their config."""
    model = tiny.load()
    own = {name.rpartition(".")[2] for name in linear_layers(model)}
    own |= {name for name in targets or () if name.count(".") > 1}
    targets = tuple(name for name in targets or PROJECTIONS if name.removeprefix("model.") in own)
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
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_ours_in_peft_and_back(kind, tiny, family_row, tmp_path):
    """For each row LoRA and DoRA, one of them on all projections; every other row is rsLoRA, and has it vice versa."""
    rslora = family_row[1] % 2 == 1
    all_targets = rslora == (kind == "dora")
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
def test_merged(tiny, family_row, tmp_path):
    """A folder of the family, which transformers loads, with the logits of base and adapter."""
    model, config = adapted(tiny, "dora" if family_row[1] % 2 else "lora")
    folder = saved(model, config, tiny, tmp_path / "adapter")
    merge(Settings(source=tiny.folder, adapter_dir=folder, out_dir=tmp_path / "merged"))
    tokens = random_tokens(2, T)
    merged = tiny.loaded_by_transformers(tmp_path / "merged")
    assert distance(merged(tokens, use_cache=False).logits, model.eval()(tokens)) < 1e-5


@torch.no_grad()
def test_loads_pefts(tiny, family_row, tmp_path):
    bare, dora = tiny.load(), family_row[1] % 2 == 1
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


# ------------------------------------------------------------------------------------------------- single cases


@pytest.fixture
def neox(tiny_models):
    return tiny_models(("gpt_neox", 0))


def change_tensors(folder, change):
    """Lets `change` alter the tensors of a file, whose metadata stays."""
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("targets", [r".*\.[02]\..*query_key_value", ["query_key_value"]], ids=["expression", "list"])
def test_a_fused_layer_is_all_of_its_parts(targets, neox, tmp_path):
    peft_adapter(neox, tmp_path, target_modules=targets)
    model = neox.load(adapter_dir=tmp_path)
    layers = (0, 2) if isinstance(targets, str) else (0, 1, 2)
    assert [*adapters(model)] == [f"model.layers.{n}.self_attn.{x}_proj" for n in layers for x in "qkv"]
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for n in layers:
        A = stored[f"base_model.model.gpt_neox.layers.{n}.attention.query_key_value.lora_A.weight"]
        parts = [model.get_submodule(f"model.layers.{n}.self_attn.{x}_proj").lora_A for x in "qkv"]
        assert all(torch.equal(A, part) for part in parts)


def test_what_is_written(neox, tmp_path):
    """Ranks add up, zeros where a part has no adapter, and the shortest names that are clear."""
    model, config = adapted(neox, targets=("q_proj", "v_proj", "0.self_attn.o_proj", "down_proj"))
    folder = saved(model, config, neox, tmp_path / "adapter")
    values = json.loads((folder / "adapter_config.json").read_text())
    modules = ["query_key_value", "0.attention.dense", "dense_4h_to_h"]
    assert values["target_modules"] == modules and values["r"] == 3 and values["lora_alpha"] == 6
    assert values["rank_pattern"] == {"query_key_value": 6} and values["alpha_pattern"] == {"query_key_value": 12}
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.gpt_neox.layers.1.attention.query_key_value"
    attention = model.model.layers[1].self_attn
    assert torch.equal(tensors[f"{name}.lora_A.weight"], torch.cat([attention.q_proj.lora_A, attention.v_proj.lora_A]))
    B = tensors[f"{name}.lora_B.weight"].unflatten(0, (6, 3, 8))  # heads, their q, k and v, and the rows of each
    q, v = (projection.lora_B.unflatten(0, (6, 8)) for projection in (attention.q_proj, attention.v_proj))
    assert torch.equal(B[:, 0, :, :3], q) and torch.equal(B[:, 2, :, 3:], v)
    assert not B[:, 0, :, 3:].any() and not B[:, 1].any() and not B[:, 2, :, :3].any()


def test_names_that_occur_twice(tiny_models, tmp_path):
    """GPT-2 has a c_proj in attention and one in the MLP."""
    gpt2 = tiny_models(("gpt2", 0))
    for targets, expected in (
        (("o_proj",), ["attn.c_proj"]),
        (("o_proj", "down_proj"), ["c_proj"]),
        (("o_proj", "1.mlp.down_proj"), ["attn.c_proj", "1.mlp.c_proj"]),
    ):
        model, config = adapted(gpt2, targets=targets)
        folder = saved(model, config, gpt2, tmp_path / "-".join(expected))
        values = json.loads((folder / "adapter_config.json").read_text())
        assert values["target_modules"] == expected and values["fan_in_fan_out"]


def test_ends_and_patterns():
    names = ["h.1.a.x", "h.1.b.x", "h.11.a.x", "h.1.b.y", "x"]
    assert ends(["h.1.b.y"], names) == ["y"] and ends(["h.1.a.x", "h.11.a.x"], names) == ["a.x"]
    assert ends(["h.1.a.x"], names) == ["1.a.x"] and ends(["x", "h.1.b.x"], names) == ["x", "b.x"]
    assert patterns({"h.1.a.x": 2, "h.1.b.x": 3, "h.1.b.y": 4}, 4) == {r"a\.x": 2, r"b\.x": 3}


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe", "gpt_oss"])
@torch.no_grad()
def test_some_experts(family, tiny_models, tmp_path):
    """In the others, and in the parts without an adapter, PEFT's computes nothing."""
    tiny = tiny_models((family, 0))
    names = ("model.layers.1.mlp.experts.2.up_proj", "experts.0.up_proj", "2.mlp.experts.1.down_proj", "k_proj")
    model, config = adapted(tiny, targets=names, rank_pattern={"up_proj": 2}, alpha_pattern={"up_proj": 4})
    folder, tokens = saved(model, config, tiny, tmp_path / "adapter"), random_tokens(2, T)
    assert distance(loaded_by_peft(tiny, folder)(tokens, use_cache=False).logits, model.eval()(tokens)) < 1e-5
    again = tiny.load()
    assert load_adapter(again, folder) == config and same_adapters(model, again)


@pytest.mark.parametrize("family", EXPERTS)
@torch.no_grad()
def test_attention_alone_beside_experts(family, tiny_models, tmp_path):
    tiny = tiny_models((family, 0))
    model, config = adapted(tiny, "dora", targets=("q_proj", "o_proj"))
    folder, tokens = saved(model, config, tiny, tmp_path / "adapter"), random_tokens(2, T)
    assert distance(loaded_by_peft(tiny, folder)(tokens, use_cache=False).logits, model.eval()(tokens)) < 1e-5
    assert same_adapters(model, tiny.load(adapter_dir=folder))


@pytest.mark.parametrize(
    "row", [("gpt_neox", 0), ("gpt_neox", 2), ("gpt2", 0), ("gpt2", 2), ("mpt", 0), ("opt", 1), ("phi", 1)]
)
@torch.no_grad()
def test_head_and_projections_of_the_embedding(row, tiny_models, tmp_path):
    """Also where the head is tied: the embedding stays as it was."""
    tiny = tiny_models(row)
    model, config = adapted(tiny, "dora", targets=("q_proj", "lm_head", "model.project_in", "project_out"))
    folder, tokens = saved(model, config, tiny, tmp_path / "adapter"), random_tokens(2, T)
    assert distance(loaded_by_peft(tiny, folder)(tokens, use_cache=False).logits, model.eval()(tokens)) < 1e-5
    assert same_adapters(model, tiny.load(adapter_dir=folder))


def test_peft_has_none_outside(tiny_models):
    """What `outside_peft` says. If this fails with a newer PEFT, it can go."""
    olmoe, qwen = tiny_models(("olmoe", 0)), tiny_models(("qwen3_moe", 1))
    with pytest.raises(ValueError, match="does not work with use_dora"):
        settings = peft.LoraConfig(use_dora=True, target_modules=[], target_parameters=["experts.down_proj"])
        peft.get_peft_model(olmoe.loaded_by_transformers(olmoe.folder), settings)
    settings = peft.LoraConfig(target_modules=["q_proj", "layers.0.mlp.down_proj"])
    model = peft.get_peft_model(qwen.loaded_by_transformers(qwen.folder), settings)
    assert not any("layers.0.mlp" in name for name, p in model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
@torch.no_grad()
def test_pefts_from_when_experts_were_modules(family, tiny_models, tmp_path):
    tiny = tiny_models((family, 0))
    bare = tiny.load()
    layout = Layout(bare.config, linear_layers(bare), in_files=True)
    tensors = {}
    for name, layer in linear_layers(bare).items():
        if ".experts." in name or name.endswith("q_proj"):
            path = f"base_model.model.{layout.module(name)}"
            tensors[f"{path}.lora_A.weight"] = 0.2 * torch.randn(3, layer.in_features)
            tensors[f"{path}.lora_B.weight"] = 0.2 * torch.randn(layer.out_features, 3)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    modules = sorted({path.split(".")[-3] for path in tensors})
    peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=modules).save_pretrained(tmp_path)
    model, tokens = tiny.load(adapter_dir=tmp_path), random_tokens(2, T)
    expected = loaded_by_peft(tiny, tmp_path)(tokens, use_cache=False).logits
    assert distance(model(tokens), expected) < 1e-5 and distance(bare(tokens), expected) > 0.01


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(rank_pattern={"q_proj": 5}, alpha_pattern={"q_proj": 9}), "one scale for all its parts"),
        (dict(rank_pattern={"q_proj": 5}, alpha_pattern={"q_proj": 10}), None),
    ],
)
def test_parts_have_one_scale(change, says, neox, tmp_path):
    model, config = adapted(neox, targets=("q_proj", "k_proj"), **change)
    if says is None:
        saved(model, config, neox, tmp_path / "adapter")
    else:
        with pytest.raises(UserError, match=says):
            saved(model, config, neox, tmp_path / "adapter")


def test_experts_have_one_rank(tiny_models, tmp_path):
    tiny = tiny_models(("olmoe", 0))
    model, config = adapted(tiny, targets=("up_proj",), rank_pattern={"3.up_proj": 2}, alpha_pattern={"3.up_proj": 4})
    with pytest.raises(UserError, match="one rank for all experts"):
        saved(model, config, tiny, tmp_path / "adapter")


FUSED_A = "base_model.model.gpt_neox.layers.1.attention.query_key_value.lora_A.weight"
FUSED_B = FUSED_A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda folder: change_config(folder, lora_alpha=7), "lora_alpha is 7"),
        (lambda folder: change_config(folder, target_modules=["dense"]), "target_modules is"),
        (lambda folder: change_config(folder, layers_to_transform=[0]), "layers_to_transform is"),
        (lambda folder: change_tensors(folder, lambda t: t[FUSED_B].add_(1)), "outside of its parts"),
        (lambda folder: change_tensors(folder, lambda t: t.pop(FUSED_A)), "do not fit each other"),
        (lambda folder: change_tensors(folder, lambda t: (t.pop(FUSED_A), t.pop(FUSED_B))), "no tensors for"),
        (lambda folder: change_tensors(folder, lambda t: t.update({FUSED_B: t[FUSED_B][1:]})), "another base model"),
        (lambda folder: change_tensors(folder, lambda t: t[FUSED_A].fill_(torch.nan)), "NaN"),
    ],
    ids=["alpha", "targets", "layers", "values", "no A", "no module", "rows", "NaN"],
)
def test_changed_files_are_refused(damage, says, neox, tmp_path):
    folder = saved(*adapted(neox, targets=("q_proj", "v_proj")), neox, tmp_path / "adapter")
    damage(folder)
    with pytest.raises(UserError, match=says):
        neox.load(adapter_dir=folder)


@pytest.mark.parametrize("text", ["{", "5", "null", "{}", '{"peft_type": "LORA", "r": 0}'])
def test_damaged_metadata_is_refused(text, neox, tmp_path):
    folder = saved(*adapted(neox, targets=("q_proj",)), neox, tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, {"onetune": text})
    with pytest.raises(UserError, match="metadata"):
        neox.load(adapter_dir=folder)


def test_what_peft_saves_of_ours_is_pefts(neox, tmp_path):
    """It leaves out the metadata, and each part gets the whole rank."""
    model, config = adapted(neox, "dora", targets=("q_proj", "v_proj"))
    folder, tokens = saved(model, config, neox, tmp_path / "adapter"), random_tokens(2, T)
    loaded_by_peft(neox, folder).save_pretrained(tmp_path / "again")
    again = neox.load(adapter_dir=tmp_path / "again")
    with torch.no_grad():
        assert distance(again(tokens), model.eval()(tokens)) < 1e-5
    assert len(adapters(again)) == 3 * 3 and again.model.layers[0].self_attn.k_proj.lora_A.size(0) == 6


def test_biases_under_other_names_are_refused(tiny_models, tmp_path):
    gpt2 = tiny_models(("gpt2", 0))
    peft_adapter(gpt2, tmp_path, target_modules=["c_attn"], bias="all")
    with pytest.raises(UserError, match="bias is not supported for gpt2"):
        gpt2.load(adapter_dir=tmp_path)


LLAMAS = dict(
    target_modules=["o_proj"], modules_to_save=["lm_head", "norm"], trainable_token_indices={"embed_tokens": [3, 9]}
)


@pytest.mark.parametrize(
    "row, settings",
    [
        *((row, LLAMAS) for row in (("phi3", 0), ("glm", 0), ("mixtral", 0), ("qwen3_moe", 0), ("gemma2", 2))),
        (("gemma2", 0), dict(target_modules=["q_proj"], modules_to_save=["post_attention_layernorm"])),
        (("gpt2", 0), dict(target_modules=["c_attn"], modules_to_save=["wte", "ln_1"])),
        (("gpt2", 2), dict(target_modules=["c_attn"], trainable_token_indices={"wte": [3, 9]})),
        (("opt", 0), dict(target_modules=["fc1"], modules_to_save=["norm"], trainable_token_indices=[3, 9])),
    ],
)
@torch.no_grad()
def test_what_is_beside_adapters(row, settings, tiny_models, tmp_path):
    """Whole parameters and rows of tokens, by the names of the family; PEFT takes the ends of names."""
    tiny = tiny_models(row)
    model = tiny.loaded_by_transformers(tiny.folder)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=3, **settings)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    tokens = random_tokens(2, T)
    tokens[0, 1] = 9
    expected = model(tokens, use_cache=False).logits
    assert distance(tiny.load(adapter_dir=tmp_path)(tokens), expected) < 1e-5


def test_other_parameters_are_refused(tiny_models, tmp_path):
    olmoe = tiny_models(("olmoe", 0))
    peft_adapter(olmoe, tmp_path, target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])
    with pytest.raises(UserError, match=r"target_parameters: mlp\.gate\.weight is not supported"):
        olmoe.load(adapter_dir=tmp_path)


@pytest.mark.parametrize(
    "row, target, expected",
    [
        (("gpt_neox", 0), "query_key_value", {"q_proj", "k_proj", "v_proj"}),
        (("gpt2", 0), "c_proj", {"o_proj", "down_proj"}),
        (("gpt2", 0), "attn.c_proj", {"o_proj"}),
        (("phi3", 0), "gate_up_proj", {"gate_proj", "up_proj"}),
        (("mpt", 0), "up_proj", {"up_proj"}),
        (("olmoe", 0), "experts.gate_up_proj", {"gate_proj", "up_proj"}),
        (("gpt_neox", 0), "1.attention.dense", {"1.self_attn.o_proj"}),
        (("llama", 0), "lm_head", {"lm_head"}),
    ],
)
def test_targets_by_the_familys_names(row, target, expected, tiny_models):
    config = tiny_models(row).load().config
    assert {*own_targets([target], config)} == expected


def test_an_unknown_target_names_both_kinds_of_choices(neox):
    with pytest.raises(UserError) as error:
        own_targets(["c_attn"], neox.load().config)
    assert all(name in str(error.value) for name in ("--lora_targets", "c_attn", "q_proj", "query_key_value"))
