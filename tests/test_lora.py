"""Adapters against PEFT, and over every kind of linear layer against what they say they compute."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lora
from lora import ADAPTERS, PROJECTIONS, Adapter, AdapterConfig, DoRALinear, LoRALinear
from model import Linear
from ops.dtypes import compute_dtype
from quantize import QUANTIZERS
from shell.cli import UserError
from weights import peft_format
from weights.checkpoint import find_base, load_model

KINDS = pytest.mark.parametrize("kind", ["lora", "dora"])

# Adapters that PEFT must agree with.
VARIANTS = {
    "lora": AdapterConfig(r=4, alpha=8),
    "rslora": AdapterConfig(r=4, alpha=8, rslora=True),
    "dora": AdapterConfig("dora", r=4, alpha=8),
    "rsdora": AdapterConfig("dora", r=4, alpha=6, rslora=True, targets=("q_proj", "down_proj")),
    "patterns": AdapterConfig(
        r=4,
        alpha=8,
        rank_pattern={r"layers\.1\.mlp\.(up|down)_proj": 2, "model.layers.0.self_attn.q_proj": 3, "q_proj": 7},
        alpha_pattern={"q_proj": 5, "self_attn.v_proj": 1.5},
    ),
    "dora patterns": AdapterConfig("dora", r=4, alpha=8, rank_pattern={"o_proj": 1}, alpha_pattern={"k_proj": 3}),
    "regular expression": AdapterConfig(r=3, alpha=8, targets=r".*\.[02]\..*(q|up)_proj"),
    "head": AdapterConfig("dora", r=3, alpha=8, targets=("lm_head", "model.layers.1.self_attn.k_proj")),
}
variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


def distance(a, b):
    """|a - b| / |b|"""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


def assert_same_gradients(ours, theirs):
    """All gradients as one vector within 1e-5, each by itself within 1e-4: a key's is a difference of larger numbers,
    since the softmax does not see what all scores have in common, and so carries more of fp32's rounding."""
    together = [torch.cat([parameters[name].grad.flatten() for name in theirs]) for parameters in (ours, theirs)]
    assert distance(*together) < 1e-5
    for name in theirs:
        assert distance(ours[name].grad, theirs[name].grad) < 1e-4, name


def randomise(model):
    """Adapters as after some training: B and m no longer where they started."""
    with torch.no_grad():
        for module in lora.adapters(model).values():
            module.lora_B.normal_(std=0.3)
            if isinstance(module, DoRALinear):
                module.lora_magnitude_vector.mul_(torch.rand(module.out_features) + 0.5)


def adapted(folder, config, dtype=torch.float32, quantize=None):
    model = load_model(folder, dtype, quantize=quantize)
    lora.add_lora(model, config)
    randomise(model)
    return model


def base_of_transformers(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def peft_config(config):
    from peft import LoraConfig

    return LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.kind == "dora",
        target_modules=config.targets if isinstance(config.targets, str) else list(config.targets),
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        task_type="CAUSAL_LM",
    )


def by_our_names(peft_model):
    """PEFT's trainable parameters under our names."""
    names = {}
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")
            names[name] = parameter
    return names


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def inputs():
    tokens = torch.randint(512, (2, 10))
    return tokens, torch.randint(512, (2, 10))


# ------------------------------------------------------------------------------------------------------- PEFT


@variant
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_and_gradients_are_pefts(tiny_checkpoint, family, config):
    from peft import get_peft_model

    ours = adapted(tiny_checkpoint(family), config)
    theirs = get_peft_model(base_of_transformers(tiny_checkpoint(family)), peft_config(config))
    parameters, expected = trainable(ours), by_our_names(theirs)
    assert parameters.keys() == expected.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            expected[name].copy_(parameter)
    tokens, targets = inputs()
    logits = theirs(input_ids=tokens).logits
    assert distance(ours(tokens), logits) < 1e-5
    assert distance(load_model(tiny_checkpoint(family), torch.float32)(tokens), logits) > 1e-2
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    ours(tokens, targets).backward()
    assert_same_gradients(parameters, expected)


@variant
def test_peft_loads_what_we_save(tiny_checkpoint, tmp_path, config):
    from peft import PeftModel

    ours = adapted(tiny_checkpoint("llama"), config)
    peft_format.save_adapter(ours, config, tmp_path, "some/base")
    theirs = PeftModel.from_pretrained(base_of_transformers(tiny_checkpoint("llama")), tmp_path).eval()
    tokens, _ = inputs()
    with torch.no_grad():
        assert distance(ours(tokens), theirs(input_ids=tokens).logits) < 1e-5
    assert theirs.peft_config["default"].base_model_name_or_path == "some/base"


def test_peft_finds_the_base_from_any_folder(tiny_checkpoint, tmp_path, monkeypatch):
    """Though the path was given relative to where the run was started."""
    from peft import AutoPeftModelForCausalLM

    folder = tiny_checkpoint("llama")
    ours, adapter, elsewhere = adapted(folder, VARIANTS["lora"]), tmp_path / "adapter", tmp_path / "elsewhere"
    adapter.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(folder.parent)
    peft_format.save_adapter(ours, VARIANTS["lora"], adapter, Path(folder.name))
    (adapter / "onetune.json").write_text(json.dumps({"checkpoint_dir": folder.name}))
    assert find_base(adapter) == Path(folder.name)
    monkeypatch.chdir(elsewhere)
    theirs = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()
    tokens, _ = inputs()
    with torch.no_grad():
        assert distance(ours(tokens), theirs(input_ids=tokens).logits) < 1e-5
    assert find_base(adapter) == folder.resolve()


def test_an_adapter_whose_base_has_moved_with_the_project(tmp_path, monkeypatch):
    """The path as it was given still holds; the absolute one does not."""
    project = tmp_path / "moved"
    for name in ("checkpoints/model", "out/final"):
        (project / name).mkdir(parents=True)
    (project / "out/final/onetune.json").write_text(json.dumps({"checkpoint_dir": "checkpoints/model"}))
    (project / "out/final/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/gone/model"}))
    monkeypatch.chdir(project)
    assert find_base("out/final") == Path("checkpoints/model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"was trained on checkpoints/model, which is not here"):
        find_base("moved/out/final")


@variant
def test_we_load_what_peft_saves(tiny_checkpoint, tmp_path, config):
    from peft import get_peft_model

    theirs = get_peft_model(base_of_transformers(tiny_checkpoint("llama")), peft_config(config)).eval()
    with torch.no_grad():
        for name, parameter in by_our_names(theirs).items():
            if not name.endswith("lora_A"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tiny_checkpoint("llama"), torch.float32, adapter_dir=tmp_path)
    tokens, _ = inputs()
    with torch.no_grad():
        assert distance(ours(tokens), theirs(input_ids=tokens).logits) < 1e-5


@variant
def test_saved_and_loaded_is_the_same(tiny_checkpoint, tmp_path, config):
    ours = adapted(tiny_checkpoint("llama"), config)
    peft_format.save_adapter(ours, config, tmp_path, "base")
    again = load_model(tiny_checkpoint("llama"), torch.float32)
    assert peft_format.load_adapter(again, tmp_path) == config
    tokens, _ = inputs()
    assert torch.equal(ours(tokens), again(tokens))
    before, after = trainable(ours), trainable(again)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with open(tmp_path / "adapter_config.json") as file:
        assert json.load(file)["peft_type"] == "LORA"


def test_an_expression_of_ours_is_for_linear_layers(tiny_checkpoint, tmp_path):
    """It may fit the embedding's name too, on which our training puts no adapter."""
    config = AdapterConfig(r=3, targets=r"model\..*")
    ours = adapted(tiny_checkpoint("llama"), config)
    peft_format.save_adapter(ours, config, tmp_path, "base")
    again = load_model(tiny_checkpoint("llama"), torch.float32)
    assert peft_format.load_adapter(again, tmp_path) == config
    tokens, _ = inputs()
    assert torch.equal(ours(tokens), again(tokens))


# ------------------------------------------------------------------------------------------------- at the start


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantizer", [None, "bnb.nf4", "bnb.nf4-dq", "bnb.int8"])
@torch.no_grad()
def test_step_0_is_the_base_bit_for_bit(tiny_checkpoint, kind, dtype, quantizer):
    model = load_model(tiny_checkpoint("llama"), dtype, quantize=quantizer)
    tokens, _ = inputs()
    base = model(tokens)
    lora.add_lora(model, AdapterConfig(kind, r=4, alpha=64, targets=(*PROJECTIONS, "lm_head")))
    assert torch.equal(model.eval()(tokens), base)
    assert torch.equal(model.train()(tokens), base)
    randomise(model)
    assert not torch.equal(model.eval()(tokens), base)


@KINDS
@pytest.mark.parametrize("quantizer", [None, "bnb.nf4"])
def test_only_the_adapters_train_and_they_are_fp32(tiny_checkpoint, kind, quantizer):
    model = adapted(tiny_checkpoint("llama"), AdapterConfig(kind, r=4), torch.bfloat16, quantizer)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    per_layer = 2 if kind == "lora" else 3
    assert len(trainable(model)) == per_layer * 7 * model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0)
    model.train()(*inputs()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.count_nonzero() > 0, name
        else:
            assert parameter.grad is None, name
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name
    assert model(inputs()[0]).dtype == compute_dtype(torch.bfloat16, "cpu")


def test_a_small_step_is_not_rounded_away(tiny_checkpoint):
    """In bf16, most weights of size 1 would not move by 1e-4 at all."""
    model = load_model(tiny_checkpoint("llama"), torch.bfloat16)
    lora.add_lora(model, AdapterConfig(r=4))
    module = model.model.layers[0].self_attn.q_proj
    nn.init.normal_(module.lora_A)
    nn.init.normal_(module.lora_B)
    before = module.lora_A.clone()
    model(*inputs()).backward()
    torch.optim.AdamW([module.lora_A], lr=1e-4, weight_decay=0).step()
    assert ((module.lora_A - before).abs() > 0.5e-4).float().mean() > 0.9


def test_hooks_on_adapted_layers_run_and_change_no_number(tiny_checkpoint):
    """In training several layers are computed together; those that someone looks at are called."""
    model = adapted(tiny_checkpoint("llama"), AdapterConfig()).train()
    tokens, seen = inputs()[0], []
    before = model(tokens)
    layer = model.model.layers[1]
    layer.self_attn.q_proj.register_forward_hook(lambda *_: seen.append("forward"))
    layer.self_attn.v_proj.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.mlp.gate_proj.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer.mlp.up_proj.register_full_backward_pre_hook(lambda *_: seen.append("before backward"))
    after = model(tokens)
    after.sum().backward()
    assert sorted(seen) == ["backward", "before", "before backward", "forward"]
    assert distance(after, before) < 1e-6


def test_no_gradient_of_the_frozen_weights_is_computed(tiny_checkpoint):
    """Counted in products: training frozen layers costs two forward passes, not three."""

    def ratio(model):
        tokens, targets = inputs()
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model(tokens, targets)
        with FlopCounterMode(display=False) as training:
            model(tokens, targets).backward()
        return training.get_total_flops() / forward.get_total_flops()

    full = load_model(tiny_checkpoint("llama"), torch.float32).requires_grad_(True)
    assert ratio(full) > 2.6
    assert ratio(adapted(tiny_checkpoint("llama"), AdapterConfig(r=1))) < 2.2


def test_the_start_of_a_and_b():
    base = Linear(400, 300, bias=False)
    module = LoRALinear(base, 8, 16)
    assert module.lora_A.shape == (8, 400) and module.lora_B.shape == (300, 8)
    assert module.lora_B.count_nonzero() == 0
    bound = 400**-0.5  # PEFT's: kaiming_uniform with a = sqrt(5) is uniform within 1 / sqrt(in)
    assert 0.95 * bound < module.lora_A.abs().max() <= bound
    assert module.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert (module.in_features, module.out_features) == (400, 300)


# ---------------------------------------------------------------------------------------------------- the layers


def some_base(quantizer, bias, dtype=torch.float32):
    weight = torch.randn(40, 64, dtype=dtype) / 8
    bias = nn.Parameter(torch.randn(40, dtype=dtype), requires_grad=False) if bias else None
    if quantizer:
        return QUANTIZERS[quantizer](weight, bias)
    linear = Linear(64, 40, bias=bias is not None)
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), bias
    return linear


@KINDS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantizer", [None, "bnb.nf4", "bnb.int8"])
def test_merged_weight_is_what_forward_does(kind, bias, quantizer):
    base = some_base(quantizer, bias)
    module = ADAPTERS[kind](base, 4, 8.0).eval()
    assert distance(module.merged_weight(), base.dequantize(torch.float32)) < 1e-6
    randomise(nn.ModuleList([module]))
    x = torch.randn(2, 5, 64)
    merged = module.merged_weight()
    assert merged.shape == (40, 64) and merged.dtype == torch.float32 and not merged.requires_grad
    assert distance(F.linear(x, merged, base.bias), module(x)) < 1e-5
    assert distance(base(x), module(x)) > 1e-2


@KINDS
@pytest.mark.parametrize("quantizer", [None, "bnb.nf4"])
def test_merged_weight_is_fp32_whatever_the_base(kind, quantizer):
    module = ADAPTERS[kind](some_base(quantizer, False, torch.bfloat16), 4, 8.0)
    randomise(nn.ModuleList([module]))
    x = torch.randn(2, 5, 64)
    assert module.merged_weight().dtype == torch.float32
    assert distance(F.linear(x, module.merged_weight()), module(x.bfloat16())) < 0.02


@KINDS
def test_input_gradient_is_that_of_the_merged_weight(kind):
    module = ADAPTERS[kind](some_base("bnb.nf4", True), 4, 8.0)
    randomise(nn.ModuleList([module]))
    x = torch.randn(3, 64, requires_grad=True)
    y = module(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert distance(x.grad, grad @ module.merged_weight()) < 1e-5


def test_dora_keeps_row_norms_at_its_magnitude():
    module = DoRALinear(some_base(None, False), 4, 8.0)
    randomise(nn.ModuleList([module]))
    assert distance(module.merged_weight().norm(dim=1), module.lora_magnitude_vector) < 1e-5


def test_dora_over_a_row_of_zeros():
    """Padded vocabularies have some; 0 / 0 would make the whole model NaN."""
    base = some_base(None, False)
    base.weight[3] = 0
    module = DoRALinear(base, 4, 8.0)
    x = torch.randn(5, 64)
    assert torch.equal(module(x), base(x))
    randomise(nn.ModuleList([module]))
    y = module(x)
    y.square().sum().backward()
    assert y.isfinite().all() and module.merged_weight().isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in trainable(module).values())


@KINDS
@torch.no_grad()
def test_dropout_only_while_training(kind):
    base = some_base(None, True)
    module = ADAPTERS[kind](base, 4, 8.0, dropout=0.5)
    randomise(nn.ModuleList([module]))
    x = torch.randn(5, 64)
    module.eval()
    assert torch.equal(module(x), module(x))
    assert distance(module(x), F.linear(x, module.merged_weight(), base.bias)) < 1e-5
    module.train()
    assert not torch.equal(module(x), module(x))
    mean = torch.stack([module(x) for _ in range(4000)]).mean(0)
    assert distance(mean, module.eval()(x)) < 0.1  # right on average; what it drops it makes up for


@torch.no_grad()
def test_dropout_leaves_the_base_alone():
    module = LoRALinear(some_base(None, True), 4, 8.0, dropout=0.5).train()
    x = torch.randn(5, 64)
    assert torch.equal(module(x), module.base(x))


class Steep(LoRALinear):
    """Overrides one method; not linear."""

    def low_rank(self, x):
        y = super().low_rank(x)
        return y + y.square()


class Gains(Adapter):
    """(IA)^3, Liu et al. 2022, arXiv 2205.05638: a factor for each output."""

    def __init__(self, base, r, alpha, dropout=0.0, rslora=False):
        super().__init__(base)
        self.gains = nn.Parameter(torch.ones(self.out_features, device=self.device))

    def forward(self, x):
        return self.base(x) * self.gains.to(x.dtype)


class Inner(Adapter):
    """Whose parts are modules, and which has a buffer that is saved."""

    def __init__(self, base, r, alpha, dropout=0.0, rslora=False):
        super().__init__(base)
        self.down = nn.Linear(self.in_features, r, bias=False, device=self.device)
        self.up = nn.Linear(r, self.out_features, bias=False, device=self.device)
        self.register_buffer("sign", torch.randn(self.out_features, device=self.device).sign())

    def forward(self, x):
        return self.base(x) + self.sign.to(x.dtype) * self.up(self.down(x.float())).to(x.dtype)


@pytest.fixture
def new_kinds(monkeypatch):
    for kind in (Steep, Gains, Inner):
        monkeypatch.setitem(ADAPTERS, kind.__name__, kind)


@pytest.mark.parametrize("quantizer", [None, "bnb.nf4"])
@pytest.mark.parametrize("kind", [Gains, Inner])
def test_the_merged_weight_of_a_new_kind_is_found(new_kinds, kind, quantizer):
    base = some_base(quantizer, kind is Inner)
    module = AdapterConfig(kind.__name__, r=4).adapt(base, "q_proj").train()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(3, 64)
    assert distance(F.linear(x, module.merged_weight(), base.bias), module(x)) < 1e-5
    assert module.training and not module.standard


@pytest.mark.parametrize("kind, bias", [(Steep, False), (Gains, True)])
def test_what_no_weight_does_is_not_merged(new_kinds, kind, bias):
    module = AdapterConfig(kind.__name__, r=4).adapt(some_base(None, bias), "q_proj")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    with pytest.raises(UserError, match=f"{kind.__name__} does what no single weight does"):
        module.merged_weight()


@pytest.mark.parametrize("quantizer", [None, "bnb.nf4"])
@pytest.mark.parametrize("kind", ["Steep", "Gains", "Inner"])
def test_a_new_kind_is_trained_saved_and_loaded(new_kinds, tiny_checkpoint, tmp_path, kind, quantizer):
    config = AdapterConfig(kind, r=4, targets=("q_proj", "up_proj", "lm_head"))
    model = load_model(tiny_checkpoint("llama"), torch.float32, quantize=quantizer)
    lora.add_lora(model, config)
    tokens, targets = inputs()
    before = model.eval()(tokens)
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(tokens, targets).backward()
        torch.nn.utils.clip_grad_norm_(trainable(model).values(), 1.0)
        optimizer.step()
    logits = model.eval()(tokens)
    assert distance(logits, before) > 1e-4
    assert set(lora.linear_layers(model)) == set(
        lora.linear_layers(load_model(tiny_checkpoint("llama"), torch.float32))
    )
    peft_format.save_adapter(model, config, tmp_path, "base")
    again = load_model(tiny_checkpoint("llama"), torch.float32, quantize=quantizer, adapter_dir=tmp_path)
    assert torch.equal(again(tokens), logits)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == f"ONETUNE_{kind}"


class Unseeded(Adapter):
    """A mistake: its random matrix is not saved, and is another each time."""

    def __init__(self, base, r, alpha, dropout=0.0, rslora=False):
        super().__init__(base)
        self.register_buffer("A", torch.randn(self.in_features, device=self.device), persistent=False)
        self.b = nn.Parameter(torch.ones(self.out_features, device=self.device))

    def forward(self, x):
        return self.base(x) + (x @ self.A)[..., None] * self.b


def test_random_numbers_that_are_lost_are_noticed(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(ADAPTERS, "unseeded", Unseeded)
    config = AdapterConfig("unseeded", targets=("q_proj",))
    model = load_model(tiny_checkpoint("llama"), torch.float32)
    lora.add_lora(model, config)
    peft_format.save_adapter(model, config, tmp_path, "base")
    with pytest.raises(UserError, match=r"layers\.0.*not saved differ.*Unseeded"):
        load_model(tiny_checkpoint("llama"), torch.float32, adapter_dir=tmp_path)


def test_the_fast_way_is_for_lora_itself(monkeypatch):
    """In training `together` stands in for a LoRALinear, and for nothing else; it would give the wrong numbers here."""
    monkeypatch.setattr(LoRALinear, "together", staticmethod(lambda x, layers: [x.sum() for _ in layers]))
    base, x = some_base(None, False), torch.randn(3, 64)
    LoRALinear.is_standard.__func__.cache_clear()
    try:
        module = AdapterConfig("lora", r=4).adapt(base, "q_proj")
        assert not module.standard and distance(module(x), base(x)) < 1e-6  # B is zero; and `together` was tried
    finally:
        LoRALinear.is_standard.__func__.cache_clear()


def test_a_subclass_is_trained_by_its_own_methods(new_kinds, tiny_checkpoint):
    model = load_model(tiny_checkpoint("llama"), torch.float32)
    lora.add_lora(model, AdapterConfig("Steep", r=4, alpha=8))
    randomise(model)
    tokens, targets = inputs()
    with torch.no_grad():
        expected = model(tokens, targets)  # without gradients there is no fast way
    assert model(tokens, targets).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("config, expected", [(dict(r=4, alpha=8), 2.0), (dict(r=16, alpha=8, rslora=True), 2.0)])
def test_scale(config, expected):
    assert AdapterConfig(**config).adapt(some_base(None, False), "model.q_proj").scale == expected


# --------------------------------------------------------------------------------------------------- the targets


@pytest.mark.parametrize(
    "targets, count",
    [
        (("q_proj",), 3),
        (("gate_proj", "up_proj", "down_proj"), 9),
        (PROJECTIONS, 21),
        (("lm_head",), 1),
        (("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"), 2),
        (("layers.1.self_attn.o_proj",), 1),
        (("q_proj", "lm_head", "layers.0.self_attn.q_proj"), 4),
        (r"model\.layers\.[01]\..*", 14),
    ],
)
def test_targets(tiny_checkpoint, targets, count):
    model = load_model(tiny_checkpoint("mistral"), torch.float32)
    before = dict(model.named_modules())
    lora.add_lora(model, AdapterConfig(r=2, targets=targets))
    adapters = lora.adapters(model)
    assert len(adapters) == count and len(trainable(model)) == 2 * count
    for name, module in adapters.items():
        assert module.base is before[name]
        if isinstance(targets, tuple):
            assert any(name.endswith(target) for target in targets)


def test_a_name_is_matched_whole(tiny_checkpoint):
    """`proj` is no projection, though the names of all end so."""
    model = load_model(tiny_checkpoint("mistral"), torch.float32)
    for targets in (("proj",), ("q_proj", "_proj"), ("c_attn",), ("norm",), ("embed_tokens",), r".*c_attn"):
        with pytest.raises(UserError, match=re.escape(str(targets[-1] if isinstance(targets, tuple) else targets))):
            lora.add_lora(model, AdapterConfig(targets=targets))
    assert not lora.adapters(model)


def test_unknown_target_names_the_choices(tiny_checkpoint):
    model = load_model(tiny_checkpoint("llama"), torch.float32)
    with pytest.raises(UserError) as error:
        lora.add_lora(model, AdapterConfig(targets=("q_proj", "qproj")))
    assert all(name in str(error.value) for name in ("'qproj'", "q_proj", "down_proj", "lm_head"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_every_family_can_be_adapted(tiny_checkpoint, family):
    model = load_model(tiny_checkpoint(family), torch.float32)
    layers = lora.linear_layers(model)
    assert {name.rpartition(".")[2] for name in layers} == {*PROJECTIONS, "lm_head"}


# ------------------------------------------------------------------------------------------------ damaged files


@pytest.fixture
def adapter(tiny_checkpoint, tmp_path):
    config = AdapterConfig("dora", r=4, targets=("q_proj", "up_proj"))
    peft_format.save_adapter(adapted(tiny_checkpoint("llama"), config), config, tmp_path, "base")
    return tmp_path


NAME = "base_model.model.model.layers.1.self_attn.q_proj"
EMBEDDING = "base_model.model.model.embed_tokens"


def change_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))


def truncate(folder, name, size):
    path = folder / name
    path.write_bytes(path.read_bytes()[:size])


def without(name):
    return lambda folder: change_tensors(folder, lambda tensors: tensors.pop(name))


def with_tensor(name, make):
    return lambda folder: change_tensors(folder, lambda tensors: tensors.update({name: make(tensors)}))


def poison(value):
    def change(tensors):
        tensors[f"{NAME}.lora_B.weight"][3, 1] = value

    return lambda folder: change_tensors(folder, change)


def rename_all(old, new):
    def change(tensors):
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return lambda folder: change_tensors(folder, change)


def without_module(tensors):
    for key in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"):
        del tensors[f"{NAME}.{key}"]


DAMAGES = {
    "one tensor missing": (without(f"{NAME}.lora_A.weight"), "layers.1.self_attn.q_proj.*lora_A"),
    "magnitude missing": (without(f"{NAME}.lora_magnitude_vector"), "layers.1.self_attn.q_proj.*magnitude"),
    "module missing": (lambda folder: change_tensors(folder, without_module), "layers.1.self_attn.q_proj"),
    "all missing": (lambda folder: change_tensors(folder, dict.clear), "layers.0.self_attn.q_proj"),
    "surplus module": (
        with_tensor("base_model.model.model.layers.1.mlp.gate_proj.lora_A.weight", lambda _: torch.zeros(4, 48)),
        "layers.1.mlp.gate_proj",
    ),
    "surplus layer": (
        with_tensor("base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", lambda _: torch.zeros(4, 48)),
        "layers.9.mlp.up_proj",
    ),
    "surplus kind": (with_tensor(f"{NAME}.lora_bias", lambda _: torch.zeros(48)), "lora_bias"),
    "full weights": (with_tensor("base_model.model.lm_head.weight", lambda _: torch.zeros(2, 2)), "lm_head.weight"),
    "NaN": (poison(float("nan")), "q_proj.lora_B.*NaN"),
    "infinity": (poison(float("inf")), "q_proj.lora_B.*infinity"),
    "another rank": (with_tensor(f"{NAME}.lora_B.weight", lambda _: torch.zeros(48, 5)), r"q_proj.lora_B.*\(48, 5\)"),
    "transposed": (with_tensor(f"{NAME}.lora_A.weight", lambda _: torch.zeros(48, 4)), r"q_proj.lora_A.*\(48, 4\)"),
    "wrong prefix": (rename_all("base_model.model.", ""), "model.layers.0.*lora_A.weight"),
    "prefix twice": (rename_all("base_model.model.", "base_model.model.base_model.model."), "base_model.model.model"),
    "adapter name inside": (rename_all("lora_A.weight", "lora_A.default.weight"), "lora_A.default.weight"),
    "truncated": (lambda folder: truncate(folder, "adapter_model.safetensors", -10), "adapter_model.safetensors"),
    "header truncated": (lambda folder: truncate(folder, "adapter_model.safetensors", 50), "adapter_model.safetensors"),
    "empty file": (lambda folder: truncate(folder, "adapter_model.safetensors", 0), "adapter_model.safetensors"),
    "config truncated": (lambda folder: truncate(folder, "adapter_config.json", 60), "adapter_config.json"),
    "config a list": (lambda folder: (folder / "adapter_config.json").write_text("[1]"), "adapter_config.json"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json does not exist"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors does"),
    "dora off": (lambda folder: change_config(folder, use_dora=False), "lora_magnitude_vector"),
    "another target": (lambda folder: change_config(folder, target_modules=["k_proj", "up_proj"]), "self_attn.q_proj"),
    "unknown target": (lambda folder: change_config(folder, target_modules=["c_attn"]), "proj"),
    "prompt tuning": (lambda folder: change_config(folder, peft_type="PROMPT_TUNING"), "PROMPT_TUNING"),
    "no peft_type": (lambda folder: change_config(folder, peft_type="absent"), "peft_type"),
    "no r": (lambda folder: change_config(folder, r="absent"), "json: r is missing"),
    "no alpha": (lambda folder: change_config(folder, lora_alpha=None), "lora_alpha is missing"),
    "no targets": (lambda folder: change_config(folder, target_modules=None), "target_modules is missing"),
    "bias": (lambda folder: change_config(folder, bias="most"), "bias 'most'"),
    "no biases": (lambda folder: change_config(folder, bias="all"), "no tensor for model.layers.0.*bias"),
    "no saved modules": (lambda folder: change_config(folder, modules_to_save=["lm_head"]), "no tensor for lm_head"),
    "a module that is not saved": (
        with_tensor("base_model.model.model.norm.weight", lambda _: torch.ones(48)),
        "brings model.norm.weight",
    ),
    "some layers": (lambda folder: change_config(folder, layers_to_transform=[1]), "adapts model.layers.0"),
    "layer 0": (lambda folder: change_config(folder, layers_to_transform=0), "adapts model.layers.1"),
    "layers of words": (lambda folder: change_config(folder, layers_to_transform="all"), "layers_to_transform 'all'"),
    "layers of an expression": (
        lambda folder: change_config(folder, layers_to_transform=[1], target_modules=".*(q|up)_proj"),
        "layers_to_transform needs a list",
    ),
    "excluded": (
        lambda folder: change_config(folder, exclude_modules=["up_proj"]),
        "adapts model.layers.0.mlp.up_proj",
    ),
    "excluded by no expression": (lambda folder: change_config(folder, exclude_modules="(("), "not a regular expr"),
    "tokens without rows": (lambda folder: change_config(folder, trainable_token_indices=[1]), "the file has no rows"),
    "tokens of words": (lambda folder: change_config(folder, trainable_token_indices=["a"]), "trainable_token_indices"),
    "rows without tokens": (
        with_tensor(f"{EMBEDDING}.token_adapter.trainable_tokens_delta", lambda _: torch.ones(2, 48)),
        "trainable_token_indices names 0 tokens, the file has 2 rows",
    ),
    "a grown vocabulary": (
        with_tensor(f"{EMBEDDING}.weight", lambda _: torch.ones(514, 48)),
        r"\(514, 48\).*resize_token_embeddings",
    ),
    "NaN in an embedding": (
        with_tensor(f"{EMBEDDING}.weight", lambda _: torch.full((512, 48), torch.nan)),
        "embed_tokens.weight holds NaN",
    ),
    "an embedding of integers": (
        with_tensor(f"{EMBEDDING}.weight", lambda _: torch.ones(512, 48, dtype=torch.int8)),
        "embed_tokens.weight is torch.int8",
    ),
    "LoRA on the embedding that is not named": (
        with_tensor(f"{EMBEDDING}.lora_embedding_A", lambda _: torch.ones(4, 512)),
        "adapts model.embed_tokens",
    ),
    "no LoRA on the embedding": (
        lambda folder: change_config(folder, target_modules=["q_proj", "up_proj", "embed_tokens"]),
        "no tensors for model.embed_tokens",
    ),
    "LoRA's bias": (lambda folder: change_config(folder, lora_bias=True), "lora_bias is not supported"),
    "experts": (lambda folder: change_config(folder, target_parameters=["x"]), "target_parameters: x is not supported"),
    "layers twice": (lambda folder: change_config(folder, layer_replication=[[0, 2]]), "layer_replication is not"),
    "fan": (lambda folder: change_config(folder, fan_in_fan_out=True), "fan_in_fan_out"),
    "pissa": (lambda folder: change_config(folder, init_lora_weights="pissa"), "pissa"),
    "aLoRA": (lambda folder: change_config(folder, alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
}


@pytest.mark.parametrize("damage, named", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_adapter_is_refused_in_one_line(tiny_checkpoint, adapter, damage, named):
    load_model(tiny_checkpoint("llama"), torch.float32, adapter_dir=adapter)
    damage(adapter)
    with pytest.raises(UserError, match=named) as error:
        load_model(tiny_checkpoint("llama"), torch.float32, adapter_dir=adapter)
    assert "\n" not in str(error.value) and str(adapter) in str(error.value)


def test_adapter_of_another_model_is_refused(tiny_checkpoint, adapter):
    with pytest.raises(UserError, match="lora_B.*another base model"):
        load_model(tiny_checkpoint("mistral"), torch.float32, adapter_dir=adapter)


def test_adapter_in_half_precision_is_trained_in_fp32(tiny_checkpoint, adapter):
    def halve(tensors):
        tensors.update({name: tensor.half() for name, tensor in tensors.items()})

    change_tensors(adapter, halve)
    model = load_model(tiny_checkpoint("llama"), torch.bfloat16, adapter_dir=adapter)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}


def test_another_scale_is_no_longer_peft_s(monkeypatch):
    """adapter_config.json has r and lora_alpha, from which PEFT would compute the published one."""
    made = LoRALinear.__init__

    def edited(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.scale *= 2

    with torch.no_grad():
        assert lora._follows_formula(LoRALinear)
        monkeypatch.setattr(LoRALinear, "__init__", edited)
        assert not lora._follows_formula(LoRALinear)
