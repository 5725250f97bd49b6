"""Mixtures of experts: routing, the balance loss, gradients, MXFP4, and everything that walks over linear layers."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from families.rows import ROWS
from families.tiny import Tiny, distance, random_tokens
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import experts
import lora
from experts import ExpertConfig, Experts, balance_loss, choose, plain_experts
from model import MLP, Config, Linear, Transformer
from ops.grouping import (
    collect,
    distribute,
    group,
    grouped_linear,
    plain_collect,
    plain_distribute,
    plain_grouped_linear,
)
from shell.cli import UserError
from weights import mxfp4
from weights.checkpoint import load_model, save_model
from weights.families import config_from_json

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
ALL = [(family, number) for family in FAMILIES for number in range(len(ROWS[family]))]
T = 24


def pair(family, number, folder):
    """transformers' model, and ours with its weights."""
    tiny = Tiny((family, number), folder)
    return tiny.reference, tiny.load()


def mixture(count=6, per_token=2, renormalised=True, size=12, **changes):
    """A random mixture of experts of hidden size 16."""
    config = Config(
        32, 16, 24, 1, 2, 2, 8, 1e-5, (None,), (None,), (1.0,), 64, **{"mlp_bias": False, **changes},
    )  # fmt: skip
    module = Experts(ExpertConfig(count, per_token, size, renormalised), 16, lambda inner: MLP(config, inner))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


# ------------------------------------------------------------------------------------------------------------ routing


@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize("N", [1, 2, 37])
def test_tokens_sorted_by_expert_are_all_experts_for_all_tokens(N, renormalised):
    module, x = mixture(renormalised=renormalised), torch.randn(1, N, 16)
    route = choose(module.gate(x[0]), module.config)
    assert route.weights.dtype == torch.float32 and route.experts.shape == (N, 2)
    if renormalised:
        torch.testing.assert_close(route.weights.sum(1), torch.ones(N))
    y, logits = module(x)
    torch.testing.assert_close(y[0], plain_experts(x[0], route, module.experts), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits, x[0] @ module.gate.weight.T)


def test_softmax_over_the_largest_is_softmax_over_all_renormalised():
    logits = torch.randn(9, 7)
    top, chosen = logits.topk(3)
    route = choose(logits, ExpertConfig(7, 3, 1, renormalised=True))
    assert torch.equal(route.experts, chosen)
    torch.testing.assert_close(route.weights, top.softmax(-1))


@pytest.mark.parametrize("multiple", [1, 2, 8])
def test_moving_rows_is_indexing_them(multiple):
    x, k = torch.randn(11, 5, dtype=torch.float64, requires_grad=True), 3
    weights = torch.randn(11, k, dtype=torch.float64, requires_grad=True)
    chosen = torch.rand(11, 6).argsort(dim=1)[:, :k]
    groups = group(chosen, torch.bincount(chosen.flatten(), minlength=6).tolist(), multiple)
    for expert, pairs in enumerate(groups.pairs.split(groups.sizes)):
        mine = (chosen.flatten() == expert).nonzero().flatten()
        assert len(pairs) % multiple == 0 and torch.equal(pairs[: len(mine)], mine) and not pairs[len(mine) :].any()
    results = []
    for there, back in ((distribute, collect), (plain_distribute, plain_collect)):
        rows = there(x, groups, k)
        y = back(rows.sin(), groups, weights)
        results.append([rows, y, *torch.autograd.grad(y.cos().sum(), (x, weights))])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 7], [1, 1, 1, 1]])
def test_one_product_for_all_experts(counts, biased):
    x, weight = torch.randn(sum(counts), 16), torch.randn(4, 24, 16)
    bias, ends = torch.randn(4, 24) if biased else None, torch.tensor(counts).cumsum(0, dtype=torch.int32)
    results = []
    for dtype, product in ((torch.bfloat16, grouped_linear), (torch.float32, plain_grouped_linear)):
        own = x.bfloat16().to(dtype).requires_grad_()
        rest = [None if t is None else t.bfloat16().to(dtype) for t in (weight, bias)]
        y = product(own, *rest, ends)
        results.append([y, torch.autograd.grad((y * y.detach()).sum(), own)[0]])
    for ours, plain in zip(*results, strict=True):
        assert distance(ours.float(), plain) < 0.01


@pytest.mark.parametrize("changes", [{}, {"mlp_bias": True}, {"activation": "clamped_swiglu"}, {"gated": False}])
def test_experts_together_are_experts_one_by_one(changes):
    """What runs on CUDA, on a CPU: in bf16, beside the same in fp32."""
    module = mixture(size=24, **changes).bfloat16().requires_grad_(False)
    assert not module.are_together(torch.bfloat16)
    module.lay_together()
    assert module.are_together(torch.bfloat16) and not module.are_together(torch.float32)
    exact = copy.deepcopy(module).float()
    x, seen = torch.randn(37, 16).bfloat16(), []
    route = choose(module.gate(x), module.config)
    for way, dtype in ((module.chosen_together, torch.bfloat16), (exact.chosen, torch.float32)):
        own = x.to(dtype).requires_grad_()
        y = way(own, route)
        seen.append([y, torch.autograd.grad((y * y.detach()).sum(), own)[0]])
    for ours, right in zip(*seen, strict=True):
        assert distance(ours.float(), right) < 0.02
    parameters = [name for name, _ in module.named_parameters()]
    assert parameters == [name for name, _ in mixture(size=24, **changes).named_parameters()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_experts_together_on_a_gpu():
    module, x = mixture(size=24).bfloat16().requires_grad_(False), torch.randn(2, 19, 16)
    exact = copy.deepcopy(module).float()(x)[0]
    module.cuda().lay_together()
    own = x.cuda().bfloat16().requires_grad_()
    assert module.are_together(own.dtype)
    y = module(own)[0]
    y.square().sum().backward()
    assert own.grad.isfinite().all() and own.grad.norm() > 0
    far = (y.float().cpu() - exact).norm(dim=-1) > 0.05 * exact.norm(dim=-1)
    assert far.float().mean() < 0.3  # rounding sends a few tokens to other experts


def test_experts_are_not_together_if_something_lies_over_them():
    def together(change):
        module = mixture(size=24).bfloat16().requires_grad_(False)
        module.lay_together()
        change(module)
        return module.are_together(torch.bfloat16)

    assert together(lambda module: None)
    adapter = lora.AdapterConfig(r=2, alpha=4)
    assert not together(lambda module: lora.wrap(module, adapter, ["experts.2.up_proj"]))
    assert not together(lambda module: module.experts[3].requires_grad_(True))
    assert not together(lambda module: module.experts[3].down_proj.register_forward_hook(lambda *_: None))
    moved = torch.nn.Parameter(torch.zeros(16, 24).bfloat16(), requires_grad=False)
    assert not together(lambda module: setattr(module.experts[5].down_proj, "weight", moved))


@pytest.mark.parametrize("adapted", [False, True])
def test_an_expert_without_a_token_gets_zeros_if_it_trains_and_is_not_run_else(adapted):
    module, x, run = mixture(per_token=1), torch.randn(2, 5, 16), []
    x[..., 0] = x[..., 0].abs() + 1
    with torch.no_grad():
        module.gate.weight.zero_()
        module.gate.weight[3, 0] = 9.0  # all tokens go to the fourth
    for number, expert in enumerate(module.experts):
        expert.register_forward_hook(lambda *_, number=number: run.append(number))
    module.requires_grad_(False)
    if adapted:
        lora.wrap(module, lora.AdapterConfig(r=2, alpha=4), [*lora.linear_layers(module)])
    module(x.requires_grad_(True))[0].square().sum().backward()
    assert run == ([*range(6)] if adapted else [3])
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            used = name.startswith("experts.3.") and name.endswith("lora_B")  # B is zero, and so A's gradient
            assert parameter.grad is not None and parameter.grad.any() == used, name


# ------------------------------------------------------------------------------------------------ against transformers


@pytest.mark.parametrize(("family", "number"), ALL)
def test_loss_gradients_and_balance_loss(family, number, tmp_path):
    """Task loss and balance loss, of which padding does not count, and the gradient of their sum for each parameter."""
    theirs, ours = pair(family, number, tmp_path)
    tokens = random_tokens(2, T)
    mask = torch.ones(2, T, dtype=torch.int64)
    mask[1, -5:] = 0
    targets = torch.where(mask.bool(), random_tokens(2, T), -100)
    output = theirs(tokens, attention_mask=mask, output_router_logits=True, use_cache=False)
    task = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
    (task + 7 * output.aux_loss).backward()
    ours.requires_grad_(True)
    routed = []
    loss = ours(tokens, targets, routed=routed, recompute=0.5)
    balance = balance_loss(routed, ours.config.experts.per_token, mask.flatten().bool())
    assert len(routed) == sum(ours.config.sparse)
    torch.testing.assert_close(loss, task, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(balance, output.aux_loss, rtol=1e-5, atol=1e-5)
    (loss + 7 * balance).backward()
    with torch.no_grad():  # a model whose weights are its gradients, written under the names of the family
        for parameter in (*ours.parameters(), *theirs.parameters()):
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    (tmp_path / "ours").mkdir()
    save_model(ours, tmp_path / "ours", tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    got, expected = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert got.keys() == expected.keys()
    scale = max(tensor.norm() for tensor in expected.values())
    for name, tensor in expected.items():
        assert (got[name] - tensor).norm() < 1e-5 * tensor.norm() + 1e-6 * scale, name


@pytest.mark.parametrize("counted", [True, False])
def test_balance_loss_is_transformers(counted):
    logits = tuple(torch.randn(10, 7) for _ in range(3))
    mask = torch.randint(2, (2, 5)) if counted else None
    if counted:
        mask[0, 0] = 1
    expected = load_balancing_loss_func(logits, 7, 3, mask)
    got = balance_loss([*logits], 3, mask.flatten().bool() if counted else None)
    torch.testing.assert_close(got, expected)


def test_balance_loss_is_least_where_experts_are_chosen_alike():
    logits = 20 * torch.eye(6).repeat(4, 1)
    torch.testing.assert_close(balance_loss([logits], 1), torch.tensor(1.0))
    assert balance_loss([logits[:1].repeat(24, 1)], 1) > 5.9


@pytest.mark.parametrize(("family", "number"), ALL)
@torch.no_grad()
def test_packed_rows_are_single_samples_and_one_token_is_a_sample(family, number, tmp_path):
    _, model = pair(family, number, tmp_path)
    samples = [random_tokens(1, length) for length in (7, 1, 12)]
    packed = model(torch.cat(samples, dim=1), offsets=[0, 7, 8, 20])
    assert distance(packed, torch.cat([model(sample) for sample in samples], dim=1)) < 1e-5


# ------------------------------------------------------------------------------------------------------ GPT-OSS, MXFP4


def packed_gpt_oss(folder):
    """A GPT-OSS as published, with random experts in MXFP4. Returns their tensors as transformers unpacks them."""
    sizes = dict(hidden_size=64, intermediate_size=32)
    Tiny(("gpt_oss", 0), folder, sizes).reference.bfloat16().save_pretrained(folder)
    tensors, unpacked = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        E, inside, outside = tensors.pop(name).shape
        blocks = torch.randint(256, (E, outside, inside // 32, 16), dtype=torch.uint8)
        scales = torch.randint(119, 127, (E, outside, inside // 32), dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        unpacked[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return unpacked


def change_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


@torch.no_grad()
def test_mxfp4_is_what_transformers_unpacks(tmp_path):
    unpacked = packed_gpt_oss(tmp_path)
    model = load_model(tmp_path, torch.bfloat16)
    for name, stacked in unpacked.items():
        layer, which = name.split(".")[2], name.rpartition(".")[2]
        for number, expert in enumerate(model.model.layers[int(layer)].mlp.experts):
            if which == "down_proj":
                ours = expert.down_proj.weight
            else:
                ours = torch.stack((expert.gate_proj.weight, expert.up_proj.weight), dim=1).flatten(0, 1)
            assert torch.equal(ours, stacked[number].T)
    (tmp_path / "plain").mkdir()
    save_model(model, tmp_path / "plain", tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    tokens = random_tokens(2, T)
    assert distance(load_model(tmp_path, torch.float32)(tokens), theirs(tokens, use_cache=False).logits) < 1e-5


def test_every_byte_and_scale_of_mxfp4():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16).repeat(1, 1, 200, 1)
    scales = torch.arange(20, 220, dtype=torch.uint8).repeat(1, 16, 1)
    expected = convert_moe_packed_tensors(blocks, scales)[0].T
    assert torch.equal(mxfp4.dequantize(blocks[0], scales[0]), expected)


@pytest.mark.parametrize(
    "quantization",
    [{"quant_method": "gptq"}, {"quant_method": "mxfp4", "bits": 3}, {"modules_to_not_convert": []}, "mxfp4"],
)
def test_other_quantised_files_are_refused(quantization, tmp_path):
    packed_gpt_oss(tmp_path)
    change_config(tmp_path, quantization_config=quantization)
    with pytest.raises(UserError, match="quantization_config"):
        load_model(tmp_path, torch.bfloat16)


def test_damaged_mxfp4_is_refused(tmp_path):
    packed_gpt_oss(tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    name = next(name for name in good if name.endswith("down_proj_scales"))
    for bad in (good[name].float(), good[name][:, :-1].clone(), torch.full_like(good[name], 255)):
        save_file(good | {name: bad}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"U8|MXFP4|NaN"):
            load_model(tmp_path, torch.bfloat16)


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("mixtral", dict(router_jitter_noise=0.1), "router_jitter_noise"),
        ("mixtral", dict(num_experts_per_tok=9), "num_experts_per_tok"),
        ("olmoe", dict(num_experts=2, num_experts_per_tok=3), "num_experts_per_tok"),
        ("qwen3_moe", dict(mlp_only_layers=["1"]), "mlp_only_layers"),
        ("qwen3_moe", dict(decoder_sparse_step=0), "decoder_sparse_step"),
        ("gpt_oss", dict(swiglu_limit=5.0), "swiglu_limit"),
        ("llama", dict(num_experts=4), "num_experts"),
        ("qwen2", dict(num_local_experts=4), "num_local_experts"),
    ],
)
def test_what_is_not_supported_is_named(family, changes, named):
    values = {key: value for key, value in ROWS[family][0].items() if key not in changes}
    config_from_json({**values, "model_type": family})
    with pytest.raises(ValueError, match=named):
        config_from_json({**values, **changes, "model_type": family})


# ---------------------------------------------------------------------------------------------- adapters and quantisers


@pytest.mark.parametrize("kind", ["lora", "dora"])
@torch.no_grad()
def test_merged_adapters_on_experts_compute_what_the_adapters_do(kind, tmp_path):
    _, model = pair("qwen2_moe", 2, tmp_path)
    lora.add_lora(model, lora.AdapterConfig(kind, r=3, alpha=7))
    adapted = [name for name in lora.adapters(model) if ".experts." in name]
    assert len(adapted) == 3 * model.config.experts.count * sum(model.config.sparse)
    assert not [name for name in lora.adapters(model) if name.endswith(("gate", "shared_expert_gate"))]
    for adapter in lora.adapters(model).values():
        adapter.lora_B.normal_(std=0.2)
    tokens = random_tokens(2, T)
    expected = model(tokens)
    merged = Transformer(model.config)
    state = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
    merged.load_state_dict({name.replace(".base.", "."): value for name, value in state.items()})
    before = merged(tokens)
    for name, adapter in lora.adapters(model).items():
        merged.get_submodule(name).weight.copy_(adapter.merged_weight())
    assert distance(merged(tokens), expected) < 1e-5 < distance(before, expected)


@pytest.mark.parametrize("quantizer", ["bnb.nf4", "bnb.int8"])
@torch.no_grad()
def test_quantised_experts(quantizer, tmp_path):
    _, dense = pair("gpt_oss", 0, tmp_path)
    model = load_model(tmp_path, torch.float32, quantize=quantizer)
    for name, layer in lora.linear_layers(model).items():
        if name != "lm_head":
            assert not isinstance(layer, Linear)
            dense.get_submodule(name).weight.copy_(layer.dequantize(torch.float32))
    tokens = random_tokens(1, T)
    assert distance(model(tokens), dense(tokens)) < 1e-5


def test_memory_is_predicted_with_equally_many_tokens_for_all():
    pairs = torch.empty(10, 3, dtype=torch.int64, device="meta")
    counts = experts.how_many(pairs, 7)
    assert sum(counts) == 30 and max(counts) - min(counts) == 1
