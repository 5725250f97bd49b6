"""Runs on several devices: a step's gradient is that of one process, in every layout."""

import itertools
import shutil

import pytest
import torch
from devices import gradient_of_model, gradient_of_step, gradients_on
from safetensors.torch import load_file
from test_finetune import random_sample, random_samples, rows, run, settings

import finetune
from shell.files import check_manifest
from training.memory import budget, plan
from training.settings import Settings

__all__ = ["run", "settings"]

LAYOUTS = {  # by the number of devices
    2: [{}, {"shard": True}, {"parallel": "tensor=2"}, {"parallel": "pipeline=2"}],
    4: [{"shard": True}, {"parallel": "tensor=4"}, {"parallel": "data=2,tensor=2"},
        {"parallel": "tensor=2", "shard": True}, {"parallel": "pipeline=4"}, {"parallel": "pipeline=2,tensor=2"},
        {"parallel": "data=2,pipeline=2"}, {"parallel": "pipeline=2", "shard": True}],
}  # fmt: skip
EACH_QUANTISER = (  # of even blocks and of odd ones: in layers whose rows are divided, and in those whose columns are
    {"self_attn.q_proj": "bnb.nf4-dq", "self_attn.k_proj": "none", "self_attn.v_proj": "bnb.int8",
     "self_attn.o_proj": "bnb.int8", "mlp.gate_proj": "bnb.fp4-dq", "mlp.up_proj": "bnb.nf4",
     "mlp.down_proj": "bnb.fp4-dq"},
    {"self_attn.q_proj": "bnb.fp4", "self_attn.k_proj": "bnb.nf4-dq", "self_attn.v_proj": "bnb.fp4-dq",
     "self_attn.o_proj": "bnb.nf4", "mlp.gate_proj": "bnb.int8", "mlp.up_proj": "none",
     "mlp.down_proj": "bnb.int8"},
)  # fmt: skip
METHODS = [
    {"lora_init": "orthogonal"},
    {"method": "dora"},
    {"quantize": "bnb.nf4"},
    {"quantize": "bnb.nf4-dq"},
    {"quantize": "each", "method": "dora"},
    {"method": "full", "recompute": 0.5},
]
# Keys and values of each device are those of 1 or 2 heads of 3, or for four devices those that two have in common: of 2
# heads. Rows of weights are whole blocks of 64, and cut there.
SIZES = dict(hidden_size=192, intermediate_size=320, num_hidden_layers=2, head_dim=64)
HEADS = {2: (6, 3), 4: (12, 2)}


def each_quantiser(layers):
    """A plan with `EACH_QUANTISER` for so many blocks."""
    blocks = enumerate(EACH_QUANTISER * layers)
    return {f"model.layers.{n}.{name}": each for n, names in blocks for name, each in names.items() if n < layers}


def check_same(found, expected, tolerance=1e-6):
    """Two gradients are equal to 1e-6 as a whole, and each weight's to ten times that; so are loss and norm.

    Unless it is zero but for rounding, as that of a bias of keys: then to a hundredth of 1e-6 of the whole.
    """
    assert found.keys() == expected.keys()
    squares = {name: (found[name].double() - one.double()).square().sum().item() for name, one in expected.items()}
    sizes = {name: one.double().square().sum().item() for name, one in expected.items()}
    total = sum(sizes.values())
    assert sum(squares.values()) <= tolerance**2 * total
    for name, square in squares.items():
        assert square <= (10 * tolerance) ** 2 * sizes[name] + (1e-2 * tolerance) ** 2 * total, name


@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_gradient_is_that_of_one_process(settings, model_dirs, tmp_path, devices):
    train = [random_sample(*sizes) for sizes in ((3, 9), (9, 4), (2, 3), (7, 12), (1, 6), (4, 4), (11, 1))]
    flags = dict(lora_r=4, lora_alpha=2, global_batch_size=7, micro_batch_tokens=24, max_steps=1, max_grad_norm=0)
    H, K = HEADS[devices]
    own = SIZES | {"num_attention_heads": H, "num_key_value_heads": K, "hidden_size": SIZES["hidden_size"] * H // 6}
    own["num_hidden_layers"] = devices + 1  # so that stages differ
    flags["checkpoint_dir"] = model_dirs("llama", std=0.05, **own)
    cases, expected = [], []
    for method in METHODS:
        if method.get("quantize") == "each":
            method = method | {"quantize": each_quantiser(own["num_hidden_layers"])}
        alone = settings(train if not cases else None, name="one", **flags, **method)
        expected += [gradient_of_step(alone)] * len(LAYOUTS[devices])
        cases += [settings(name="two", devices=devices, **flags, **method, **layout) for layout in LAYOUTS[devices]]
    for found, one, s in zip(gradients_on(devices, "step", cases, tmp_path / "found"), expected, cases, strict=True):
        print(s.method, s.quantize, s.parallel, s.shard)
        assert one["norm"] > 0.01
        check_same(found, one, tolerance=2e-6)  # measured: 3e-8 to 1.2e-6, as sums are taken in another order


def test_stages_whose_hidden_states_change_their_dtype(settings, model_dirs, tmp_path):
    """OPT-350M's projection after the embedding leaves bf16 under autocast, where other models have fp32."""
    sizes = dict(word_embed_proj_dim=32, do_layer_norm_before=False, ffn_dim=80, num_hidden_layers=2)
    sizes["num_key_value_heads"] = 6
    flags = dict(checkpoint_dir=model_dirs("opt", std=0.05, **sizes), precision="bf16-mixed", max_steps=1)
    alone = settings(random_samples(6), name="one", **flags)
    expected = gradient_of_step(alone)
    staged = settings(name="two", devices=2, parallel="pipeline=2", **flags)
    (found,) = gradients_on(2, "step", [staged], tmp_path / "found")
    assert expected["norm"] > 0.01
    check_same(found, expected, tolerance=0.02)  # as bf16 rounds


@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sums_over_devices(settings, tmp_path, devices):
    s = settings(devices=devices)
    ((sums,), (largest,)) = (gradients_on(devices, kind, [s], tmp_path / kind) for kind in ("sums", "largest"))
    for number in range(len(sums) // 2):
        torch.testing.assert_close(sums[f"found {number}"], sums[f"sum {number}"])
    assert largest["largest"] == devices - 1


def test_where_the_head_alone_trains(settings, model_dirs, tmp_path):
    """No gradient goes into what FSDP knows as the model's forward pass."""
    flags = dict(method="full", precision="32-true", global_batch_size=6, micro_batch_tokens=24, max_steps=1)
    flags["checkpoint_dir"] = model_dirs("llama", std=0.05, tie_word_embeddings=False)
    alone = settings(random_samples(6), name="one", **flags)
    shared = settings(name="two", devices=2, shard=True, **flags)
    alone.train = shared.train = ["lm_head.weight"]
    expected, (found,) = gradient_of_step(alone), gradients_on(2, "step", [shared], tmp_path / "found")
    assert expected["norm"] > 0.01 and "lm_head.weight" in found
    check_same(found, expected, tolerance=2e-6)


@pytest.mark.slow
def test_a_device_without_a_row_of_a_layer(model_dirs, tmp_path):
    """Six rows of keys and values are at three of four devices; the last takes part in quantising them."""
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=6)
    flags = dict(checkpoint_dir=model_dirs("llama", **sizes), data_dir=tmp_path, out_dir=tmp_path)
    layers = dict.fromkeys(each_quantiser(1), "none")
    layers |= {"model.layers.0.self_attn.k_proj": "bnb.nf4-dq", "model.layers.0.self_attn.v_proj": "bnb.int8"}
    flags |= dict(quantize=layers, method="dora", lora_targets="all-linear", precision="32-true")
    found = gradients_on(4, "model", [Settings(devices=4, shard=True, **flags)], tmp_path / "found")
    check_same(found[0], gradient_of_model(Settings(**flags)), tolerance=2e-6)


def test_a_device_keeps_what_the_plan_says(settings, model_dirs, tmp_path):
    """Of a model in equal parts. By --shard all keep the scales of scales, which the plan counts as divided."""
    sizes = dict(hidden_size=256, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    sizes |= dict(attention_bias=False, mlp_bias=False)  # those of outputs are at the first device alone
    flags = dict(checkpoint_dir=model_dirs("llama", **sizes), devices=2, precision="bf16-true")
    layouts = itertools.product(("bnb.nf4-dq", "bnb.int8"), ({"parallel": "tensor=2"}, {"shard": True}))
    cases = [settings(quantize=name, **layout, **flags) for name, layout in layouts]
    for s, found in zip(cases, gradients_on(2, "stored", cases, tmp_path / "found"), strict=True):
        planned = plan.Predictor(budget.plan_job(s)).fixed["weights"]
        assert planned <= found["bytes"].item() <= (1.001 if s.shard else 1) * planned


def weights_of(folder):
    """The tensors of a model or adapter, in one file or several, by name."""
    files = sorted(folder.glob("*model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def check_same_run(found, expected, step):
    """Two run folders have the same weights at a step and at the end, up to what AdamW makes of rounding."""
    for name in (f"step-{step:06d}", "final"):
        check_manifest(found / name)
        ours, theirs = weights_of(found / name), weights_of(expected / name)
        assert ours.keys() == theirs.keys()
        squares = [((ours[key] - one).square().sum(), one.square().sum()) for key, one in theirs.items()]
        distance, size = map(torch.stack, zip(*squares, strict=True))
        assert (distance.sum() / size.sum()).sqrt() < 1e-4, name
    for row, one in zip(rows(found), rows(expected), strict=True):  # with validation losses where there are some
        assert row == pytest.approx(one, rel=1e-4)


def cut_back(folder, step):
    """Leave a run's folder as it was after a step."""
    shutil.rmtree(folder / "final")
    for path in folder.glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


def test_a_run_goes_on_with_another_number_of_devices(settings, run, model_dirs, tmp_path):
    """On two devices in one layout, from its second step on one, from its fourth on two in another layout."""
    flags = dict(max_steps=6, save_interval=2, keep_last=0, eval_interval=3, micro_batch_tokens=40, learning_rate=1e-3)
    # Without a bias of keys: its gradient is nothing but rounding, of which AdamW makes steps of full size.
    sizes = SIZES | dict(num_attention_heads=6, num_key_value_heads=3, attention_bias=False)
    flags["checkpoint_dir"] = model_dirs("llama", **sizes)
    methods = {
        "lora": {"optimizer": "schedule-free", "schedule": "constant"},
        "dora": {"method": "dora", "quantize": "bnb.nf4-dq"},
        "full": {"method": "full", "optimizer": "sgd", "learning_rate": 0.1},
        "averaged": {"method": "full", "optimizer": "schedule-free", "schedule": "constant"},
    }  # fmt: skip
    samples = random_samples(20), random_samples(5)
    expected = {name: run(*samples, name=f"{name}-one", **(flags | own)) for name, own in methods.items()}
    layouts = {"parallel": "tensor=2"}, {"shard": True}, {"parallel": "pipeline=2"}
    for number, devices in enumerate((2, 1, 2)):
        cases = []
        for i, (name, own) in enumerate(methods.items()):
            layout = layouts[(number // 2 + i) % 3] if devices == 2 else {}
            cases.append(settings(name=name, devices=devices, resume=number > 0, **layout, **(flags | own)))
            if number:
                cut_back(cases[-1].out_dir, 2 * number)
        if devices == 2:
            gradients_on(2, "run", cases, tmp_path / f"found-{number}")
        else:
            for s in cases:
                finetune.main(s)
        for s, folder in zip(cases, expected.values(), strict=True):
            check_same_run(s.out_dir, folder, 2 * number + 2)
