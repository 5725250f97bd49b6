"""Which layers get adapters, of which rank: against PEFT's own choice over the same model, and through its files."""

import re
import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from families.tiny import distance, random_tokens
from test_memory_plan import tiny_config, tiny_job

import lora
from shell.cli import UserError
from training.from_settings import adapter_config
from training.memory.plan import Predictor
from training.targets import layout_of, own_targets
from weights.peft_format import load_adapter, save_adapter

# PEFT 0.21 takes "all-linear" to experts for Mixtral alone; a regular expression it widens there to all layers.
ROWS = [("llama", 0), ("gpt_neox", 0), ("gpt2", 0), ("opt", 1), ("mixtral", 0)]
row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])


def flags(**changes):
    """The flags of finetune.py that describe an adapter."""
    defaults = dict(
        method="lora", lora_r=3, lora_alpha=6, lora_dropout=0.0, lora_rslora=False, lora_targets=None,
        lora_layers=None, lora_rank_pattern=None, lora_alpha_pattern=None, lora_init="default",
        lora_init_iterations=None, lora_modules_to_save=None, lora_tokens=None, checkpoint_dir=None,
        virtual_tokens=20, adapter_layers=None, seed=0,
    )  # fmt: skip
    return SimpleNamespace(**{**defaults, **changes})


def of_peft(tiny, **settings):
    """The modules that PEFT adapts, with the rank and the scale of each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, **settings)
        model = peft.get_peft_model(tiny.loaded_by_transformers(tiny.folder), config)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): (module.r["default"], module.scaling["default"]) for name, module in layers.items()
    }


def of_ours(tiny, **changes):
    """The same of ours, by PEFT's names of the modules: all layers in one must have the same."""
    config = tiny.load().config
    adapter, layout, found = adapter_config(flags(**changes), config), layout_of(config), {}
    for name in filter(adapter.covers, layout.linears):
        alpha = lora.match_pattern(adapter.alpha_pattern, name, adapter.alpha)
        of_layer = adapter.rank(name), alpha / adapter.rank(name)
        assert found.setdefault(layout.module(name), of_layer) == of_layer
    return found


@row
def test_all_linear_layers_are_pefts(tiny_models, row):
    """But for routers, which are no linear layers to us. Experts' projections have one adapter in PEFT's files."""
    tiny, ours = tiny_models(row), of_ours(tiny_models(row), lora_targets="all-linear")
    theirs = of_peft(tiny, target_modules="all-linear")
    called = layout_of(tiny.load().config).in_file({*ours})
    assert {*called.values()} == {name for name in theirs if not name.endswith("gate")}
    assert all(theirs[name] == ours[module] for module, name in called.items() if ".experts." not in module)
    assert of_ours(tiny, lora_targets="All-Linear") == ours


EXPRESSIONS = {  # of a family: by its own names
    "llama": r".*\.[02]\..*(q|up)_proj", "gpt_neox": r".*\.1\.attention\.(query_key_value|dense)",
    "gpt2": r"transformer\.h\.[01]\.(attn|mlp)\.c_.*", "opt": r".*(fc1|[qv]_proj)",
}  # fmt: skip


@pytest.mark.parametrize("row", [row for row in ROWS if row[0] in EXPRESSIONS], ids=lambda row: row[0])
def test_a_regular_expression_is_pefts(tiny_models, row):
    text = EXPRESSIONS[row[0]]
    assert of_ours(tiny_models(row), lora_targets=text) == of_peft(tiny_models(row), target_modules=text) != {}


def test_an_expression_for_our_own_names(tiny_models):
    """Which the family calls otherwise."""
    found = of_ours(tiny_models(("gpt_neox", 0)), lora_targets=r"model\.layers\.0\.mlp\..*")
    assert [*found] == [f"gpt_neox.layers.0.mlp.dense_{name}" for name in ("h_to_4h", "4h_to_h")]


NARROWED = {  # the flags, and what PEFT calls them
    "layers": (dict(lora_layers=[0, 2]), dict(layers_to_transform=[0, 2])),
    "one layer": (dict(lora_layers=[1]), dict(layers_to_transform=1)),
    "ranks": (dict(lora_rank_pattern={"A": 5}), dict(rank_pattern={"A": 5})),
    "ranks of some": (
        dict(lora_rank_pattern={r"layers\.1\..*": 2, "A": 5}), dict(rank_pattern={r"layers\.1\..*": 2, "A": 5})
    ),
    "alphas": (dict(lora_alpha_pattern={"B": 1.5}), dict(alpha_pattern={"B": 1.5})),
    "all": (
        dict(lora_layers=[1, 2], lora_rank_pattern={"A": 4}, lora_alpha_pattern={"A": 8, "B": 2}),
        dict(layers_to_transform=[1, 2], rank_pattern={"A": 4}, alpha_pattern={"A": 8, "B": 2}),
    ),
}  # fmt: skip
CALLED = {"llama": ("q_proj", "down_proj"), "gpt_neox": ("query_key_value", "dense_4h_to_h"),
          "mixtral": ("q_proj", "o_proj"), "opt": ("fc1", "out_proj")}  # fmt: skip


def named(settings, family):
    """`settings` with a family's names for A and B, two of its layers."""
    a, b = CALLED[family]
    of_pattern = lambda pattern: {key.replace("A", a).replace("B", b): value for key, value in pattern.items()}  # noqa: E731
    return {key: of_pattern(value) if isinstance(value, dict) else value for key, value in settings.items()}


@pytest.mark.parametrize("row", [row for row in ROWS if row[0] in CALLED], ids=lambda row: row[0])
@pytest.mark.parametrize("ours, theirs", NARROWED.values(), ids=NARROWED.keys())
def test_patterns_and_layers_are_pefts(tiny_models, row, ours, theirs):
    ours, theirs = named(ours, row[0]), named(theirs, row[0])
    found = of_ours(tiny_models(row), lora_targets=[*CALLED[row[0]]], **ours)
    assert found == of_peft(tiny_models(row), target_modules=[*CALLED[row[0]]], **theirs)


@torch.no_grad()
@pytest.mark.parametrize("row", [row for row in ROWS if row[0] in CALLED], ids=lambda row: row[0])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_it_and_it_comes_back(tiny_models, tmp_path, row, rslora):
    tiny = tiny_models(row)
    model, tokens = tiny.load(), random_tokens(2, 9)
    changes = named(NARROWED["all"][0], row[0]) | {"lora_targets": [*CALLED[row[0]]], "lora_rslora": rslora}
    config = adapter_config(flags(**changes), model.config)
    lora.add_lora(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.2)
    save_adapter(model, config, tmp_path, tiny.folder)
    theirs = peft.PeftModel.from_pretrained(tiny.loaded_by_transformers(tiny.folder), tmp_path).eval()
    assert theirs.peft_config["default"].layers_to_transform == [1, 2]
    assert distance(model(tokens), theirs(tokens, use_cache=False).logits) < 1e-5
    again = tiny.load()
    assert load_adapter(again, tmp_path) == config
    assert torch.equal(again(tokens), model(tokens))


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(lora_targets="q_proj"), "--lora_targets q_proj: no linear layer.*\\[q_proj,v_proj\\]"),
        (dict(lora_targets="("), "--lora_targets: \\( is not a regular expression"),
        (dict(lora_layers=[0, 3]), "--lora_layers 3: the model's layers are 0 to 2"),
        (dict(lora_rank_pattern={"down_proj": 3, "c_attn": 2}), "--lora_rank_pattern: c_attn is no end"),
        (dict(lora_alpha_pattern={"q_proj": 3}, lora_targets=["v_proj"]), "--lora_alpha_pattern: q_proj is no end"),
        (dict(lora_rank_pattern={r"layers\.0\..*": 3}, lora_layers=[1]), "--lora_rank_pattern"),
        (dict(lora_rank_pattern={"*": 3}), "--lora_rank_pattern: .* is not a regular expression"),
    ],
)
def test_what_fits_nothing_is_refused(tiny_models, changes, says):
    with pytest.raises(UserError, match=says):
        adapter_config(flags(**changes), tiny_models(("llama", 0)).load().config)


def test_names_of_projections_need_no_model(monkeypatch):
    """A model of thousands of experts is not built for the usual targets."""
    monkeypatch.setattr("training.targets.layout_of", None)
    assert own_targets(["q_proj", "down_proj"], tiny_config()) == ("q_proj", "down_proj")


@pytest.mark.parametrize("quantize", [None, "bnb.nf4"])
def test_the_plan_counts_the_adapters_that_are_there(quantize):
    """Though it traces two blocks of equal ones in a row alone."""
    config = tiny_config(layers=9)
    changes = dict(
        layers=(0, 1, 4, 5, 6, 8), targets=("q_proj", "down_proj", "model.layers.2.mlp.up_proj"),
        rank_pattern={r"layers\.[456]\.mlp\.down_proj": 11, "layers.8.self_attn.q_proj": 1},
    )  # fmt: skip
    adapter = lora.AdapterConfig(r=4, **changes)
    job = tiny_job("lora", quantize, config=config, adapter=adapter)
    D, inner = config.hidden_size, config.intermediate_size
    down, out = D + inner, config.num_attention_heads * config.head_dim
    expected = 4 * (4 * (6 * (D + out) + 6 * down + D + inner) + 7 * 3 * down - 3 * (D + out))
    assert Predictor(job).fixed["adapters"] == expected
    assert re.search("'model.layers.2.mlp.up_proj'", repr(job.adapter.targets))
