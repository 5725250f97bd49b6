"""Every optimiser: its formula written out in a few lines, its bytes, training, resuming; and LoRA+'s two rates."""

import math

import pytest
import torch
from conftest import SEED
from safetensors.torch import load_file
from test_finetune import (  # noqa: F401 (fixtures)
    column,
    distance,
    final_weights,
    random_sample,
    random_samples,
    rows,
    run,
    run_and_kill,
    settings,
)

import finetune
from shell import cli
from shell.cli import UserError
from training import build
from training.build import Run
from training.memory import budget
from training.optimizer import (
    OPTIMIZERS,
    StepInBackward,
    begin_step,
    build_optimizer,
    is_hidden_matrix,
    moment_bytes,
    weights_to_keep,
)
from training.update_rules import Apollo, generator_of
from weights.checkpoint import load_model, load_optimizer, save_optimizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore:Paged optimizers")
]  # fmt: skip

SHAPES = {
    "model.embed_tokens.weight": (30, 24),
    "model.layers.0.mlp.up_proj.weight": (40, 24),
    "model.layers.0.mlp.down_proj.weight": (24, 40),
    "model.layers.0.mlp.down_proj.bias": (24,),
    "model.layers.1.self_attn.q_proj.weight": (24, 24),
    "model.norm.weight": (24,),
}
# What each optimiser takes beside its name, in all tests.
FLAGS = {"apollo": dict(apollo_rank=4), "schedule-free": dict(schedule="constant")}
# Rates at which the tiny model learns, of adapters and of all weights.
RATES = {
    "lion": (2e-3, 1e-3), "lion-8bit": (2e-3, 1e-3), "muon": (2e-2, 1e-2), "apollo": (2e-2, 1e-2),
    "schedule-free": (2e-2, 1e-2), "adafactor": (2e-2, 1e-2), "sgd": (0.6, 2.0),
}  # fmt: skip
NEW = [*RATES]


class Weights(torch.nn.Module):
    """Random parameters with the names and shapes of SHAPES."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.named = {name: torch.nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in SHAPES.items()}

    def named_parameters(self):
        return iter(self.named.items())

    def parameters(self):
        return iter(self.named.values())


@pytest.fixture
def flags_of(tmp_path):
    """`flags_of("lion")`: Settings of a run with this optimiser, of which nothing else matters."""

    def make(optimizer, **flags):
        flags = dict(precision="32-true", learning_rate=1e-2, weight_decay=0.1, seed=SEED) | flags
        flags |= FLAGS.get(optimizer, {})
        return finetune.Settings(tmp_path, tmp_path, method="full", optimizer=optimizer, **flags)

    return make


# ---------------------------------------------------------------------------------------------------------- formulas


def adamw(w, grads, rates, s, decay, **_):
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        m, v = s.betas[0] * m + (1 - s.betas[0]) * g, s.betas[1] * v + (1 - s.betas[1]) * g * g
        m_hat, v_hat = m / (1 - s.betas[0] ** t), v / (1 - s.betas[1] ** t)
        w = w - rate * decay * w - rate * m_hat / (v_hat.sqrt() + 1e-8)
    return w


def lion(w, grads, rates, s, decay, **_):
    """Chen et al. 2023, arXiv 2302.06675, algorithm 2."""
    m = torch.zeros_like(w)
    for g, rate in zip(grads, rates, strict=True):
        w = w - rate * ((s.betas[0] * m + (1 - s.betas[0]) * g).sign() + decay * w)
        m = s.betas[1] * m + (1 - s.betas[1]) * g
    return w


def sgd(w, grads, rates, s, decay, **_):
    v = torch.zeros_like(w)
    for g, rate in zip(grads, rates, strict=True):
        v = s.betas[0] * v + g + decay * w
        w = w - rate * v
    return w


def adafactor(w, grads, rates, s, decay, **_):
    """Shazeer and Stern 2018, arXiv 1804.04235, algorithms 4 and 5, with the rate as the size of a step."""
    rows, columns, v = 0.0, 0.0, 0.0
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        new = t**-0.8
        if g.dim() == 2:
            rows = (1 - new) * rows + new * g.square().sum(dim=1, keepdim=True)
            columns = (1 - new) * columns + new * g.square().sum(dim=0, keepdim=True)
            v = rows * columns / rows.sum()
        else:
            v = (1 - new) * v + new * g.square()
        u = g / v.sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item())
        size = max(1.0, w.square().mean().sqrt().item())
        w = (1 - rate * decay) * w - size * rate * u
    return w


def muon(w, grads, rates, s, decay, name, **more):
    """Jordan et al. 2024 with the steps of Liu et al. 2025, arXiv 2502.16982; in bf16 where they are."""
    if not is_hidden_matrix(name, w):
        return adamw(w, grads, rates, s, decay)
    w, b = w.float(), torch.zeros_like(w, dtype=torch.float32)
    for g, rate in zip(grads, rates, strict=True):
        b = torch.lerp(b, g.float(), 0.05)
        x = torch.lerp(g.float(), b, 0.95).bfloat16()
        x = x.T if w.size(0) > w.size(1) else x
        x = x / x.norm()
        for _ in range(5):
            a = x @ x.T
            x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        x = x.T if w.size(0) > w.size(1) else x
        w = w * (1 - rate * decay) - 0.2 * math.sqrt(max(w.shape)) * rate * x
    return w


def apollo(w, grads, rates, s, decay, name, place):
    """Zhu et al. 2024, arXiv 2412.05270, algorithm 1, channels along the longer side; a growth of 1% at most."""
    if not is_hidden_matrix(name, w):
        return adamw(w, grads, rates, s, decay)
    m = v = before = None
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        G = g if w.size(0) >= w.size(1) else g.T
        generator = generator_of(w.device, s.seed, place, (t - 1) // Apollo.INTERVAL)
        P = torch.randn(G.size(1), s.apollo_rank, generator=generator) / math.sqrt(s.apollo_rank)
        R = G @ P.double()
        m = (1 - s.betas[0]) * R if m is None else s.betas[0] * m + (1 - s.betas[0]) * R
        v = (1 - s.betas[1]) * R**2 if v is None else s.betas[1] * v + (1 - s.betas[1]) * R**2
        adapted = m / (1 - s.betas[0] ** t) / ((v / (1 - s.betas[1] ** t)).sqrt() + 1e-8)
        update = s.apollo_scale * adapted.norm(dim=1, keepdim=True) / R.norm(dim=1, keepdim=True) * G
        if before is not None and update.norm() > 1.01 * before:
            update = update * 1.01 * before / update.norm()
        before = update.norm()
        w = w - rate * decay * w - rate * (update if w.size(0) >= w.size(1) else update.T)
    return w


def schedule_free(w, grads, rates, s, decay, averages, **_):
    """Defazio et al. 2024, arXiv 2405.15682, algorithm 1: x is kept, y is computed. The average goes to `averages`."""
    x, z, v, weights = w, w, torch.zeros_like(w), 0.0
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        y = (1 - s.betas[0]) * z + s.betas[0] * x
        v = s.betas[1] * v + (1 - s.betas[1]) * g * g
        z = z - rate * (g / ((v / (1 - s.betas[1] ** t)).sqrt() + 1e-8) + decay * y)
        weights += max(rates[:t]) ** 2
        c = max(rates[:t]) ** 2 / weights
        x = (1 - c) * x + c * z
    averages.append(x)
    return (1 - s.betas[0]) * z + s.betas[0] * x


FORMULAS = {
    "lion": lion, "sgd": sgd, "adafactor": adafactor, "muon": muon, "apollo": apollo, "schedule-free": schedule_free
}  # fmt: skip
STEPS = 8


def stepped(s, model, optimizer=None):
    """Let the optimiser of `s` take STEPS steps of random gradients and rates; the gradients by name, and the rates."""
    optimizer = optimizer or build_optimizer(s, model)
    rates = [s.learning_rate * rate for rate in (0.3, 0.6, *torch.rand(STEPS - 2).tolist())]
    grads = {name: [torch.randn_like(p) * (0.1 + torch.rand(())) for _ in rates] for name, p in model.named.items()}
    for step, rate in enumerate(rates):
        for name, parameter in model.named.items():
            parameter.grad = grads[name][step].clone()
        begin_step(optimizer, rate, 1)
        optimizer.step()
    return optimizer, grads, rates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMULAS)
def test_it_is_its_formula(flags_of, name, dtype, monkeypatch):
    monkeypatch.setattr(Apollo, "INTERVAL", 3)
    in_bf16 = dtype == torch.bfloat16
    s, model = flags_of(name, learning_rate=0.3 if in_bf16 else 0.01), Weights(dtype)
    before = {key: p.detach().clone() for key, p in model.named.items()}
    optimizer, grads, rates = stepped(s, model)
    projected = [key for key in SHAPES if is_hidden_matrix(key, before[key])]
    averages = []
    for key, w in before.items():
        expected = FORMULAS[name](
            w.double(), [g.double() for g in grads[key]], rates, s, 0.1 if w.dim() == 2 else 0.0,
            **{"name": key, "place": projected.index(key) if key in projected else None} if name in ("muon", "apollo")
            else {"averages": averages} if name == "schedule-free" else {},
        )  # fmt: skip
        moved = (expected - w).norm()
        tolerance = 0.02 if name == "muon" and key in projected else 1e-4  # which multiplies in bf16
        tolerance = 0.1 if in_bf16 else tolerance
        assert (model.named[key].detach() - expected).norm() < tolerance * moved, key
    if name == "schedule-free" and not in_bf16:
        with weights_to_keep(optimizer):
            for p, x in zip(model.named.values(), averages, strict=True):
                assert (p.detach() - x).norm() < 1e-4 * x.norm()


def test_schedule_free_is_the_authors(flags_of):
    """Their package, whose weights after eval() are the average."""
    import schedulefree

    s, ours = flags_of("schedule-free"), Weights()
    theirs = [p.detach().clone().requires_grad_() for p in ours.parameters()]
    optimizer, grads, rates = stepped(s, ours)
    groups = [
        {"params": [p for p in theirs if p.dim() == d], "weight_decay": decay} for d, decay in ((2, 0.1), (1, 0.0))
    ]
    reference = schedulefree.AdamWScheduleFree(groups, lr=1.0, betas=s.betas)
    reference.train()
    for step, rate in enumerate(rates):
        for p, own in zip(theirs, grads.values(), strict=True):
            p.grad = own[step].clone()
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
    for ours_now, p in zip(ours.parameters(), theirs, strict=True):
        torch.testing.assert_close(ours_now, p, rtol=1e-5, atol=1e-5)
    reference.eval()
    with weights_to_keep(optimizer):
        for ours_now, p in zip(ours.parameters(), theirs, strict=True):
            torch.testing.assert_close(ours_now, p, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NEW)
def test_a_step_in_the_backward_pass_is_the_same(flags_of, name):
    """Parameters step one after the other, each when it alone has a gradient."""
    s = flags_of(name)
    torch.manual_seed(SEED)
    together = Weights()
    torch.manual_seed(SEED)
    alone = Weights()
    optimizer, grads, rates = stepped(s, together)
    single = StepInBackward(alone, build_optimizer(s, alone))
    for step, rate in enumerate(rates):
        begin_step(single, rate, 1)
        for key in reversed(SHAPES):
            (alone.named[key] * grads[key][step]).sum().backward()
        single.take_norm()
    for key in SHAPES:
        assert torch.equal(alone.named[key], together.named[key]), key


# ----------------------------------------------------------------------------------------------------- bytes of states


@pytest.mark.parametrize("device", ["cpu", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*NEW, "mezo", "sgd without momentum"])
def test_moments_take_what_an_optimiser_makes(flags_of, name, dtype, device, monkeypatch):
    monkeypatch.setitem(SHAPES, "model.layers.1.mlp.up_proj.weight", (120, 50))  # large enough for 8 bits
    s = flags_of("sgd", beta1=0.0) if name == "sgd without momentum" else flags_of(name)
    model = Weights(dtype)
    optimizer = build_optimizer(s, model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    if name == "mezo":
        list(optimizer.sides(0))
        optimizer.found(torch.randn(2))
    optimizer.step()
    if device == "disk" and name == "schedule-free":
        optimizer.average()
    shared = ("step", "qmap1")  # a number, and a table that all parameters share
    for key, parameter in model.named.items():
        state = optimizer.state[parameter]
        taken = sum(v.nbytes for k, v in state.items() if k not in shared and torch.is_tensor(v))
        assert moment_bytes(s, [(key, parameter)], device) == taken, key


@pytest.mark.parametrize("name", NEW)
def test_its_states_are_read_back_bit_for_bit(flags_of, name, tmp_path):
    s, model = flags_of(name), Weights()
    optimizer, *_ = stepped(s, model)
    save_optimizer(optimizer, tmp_path)
    again = build_optimizer(s, model)
    load_optimizer(again, tmp_path)
    for parameter in model.parameters():
        before, after = optimizer.state[parameter], again.state[parameter]
        assert before.keys() == after.keys() and before
        for key, value in before.items():
            assert torch.equal(value, after[key]) if torch.is_tensor(value) else value == after[key], key


def test_states_of_other_matrices_are_refused(flags_of, tmp_path, monkeypatch):
    for name in ("apollo", "adafactor", "lion"):
        s = flags_of(name)
        save_optimizer(stepped(s, Weights())[0], tmp_path)
        with monkeypatch.context() as patch:
            patch.setitem(SHAPES, "model.layers.0.mlp.up_proj.weight", (16, 20))
            with pytest.raises(UserError, match="it belongs to another run"):
                load_optimizer(build_optimizer(s, Weights()), tmp_path)


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("method", ["lora", "dora", "full", "lora over NF4", "full in bf16"])
@pytest.mark.parametrize("name", NEW)
def test_a_few_samples_are_learnt(run, name, method):  # noqa: F811
    more = {
        "lora over NF4": dict(quantize="bnb.nf4", precision="bf16-true"),
        "full in bf16": dict(precision="bf16-true"),
    }
    out_dir = run(
        [random_sample(3, 5) for _ in range(4)], optimizer=name, method=method.split()[0], max_steps=25,
        learning_rate=RATES[name]["full" in method], eval_interval=0, save_interval=0,
        **{"schedule": "constant"} | FLAGS.get(name, {}) | more.get(method, {}),
    )  # fmt: skip
    losses = column(out_dir, "loss")
    assert losses[0] > 5 and losses[-1] < 0.6 * losses[0], losses
    assert all(tensor.isfinite().all() for tensor in load_file(final_weights(out_dir)).values())


RESUMED = [dict(quantize="bnb.nf4", lora_dropout=0.2, lora_plus_ratio=4.0), dict(method="full", weight_decay=0.1)]
IN_BACKWARD = dict(method="full", optimizer_in_backward=True, max_grad_norm=0.0, micro_batch_tokens=1000)


@pytest.mark.parametrize("flags", [*RESUMED, IN_BACKWARD], ids=["lora", "full", "in backward"])
@pytest.mark.parametrize("name", NEW)
def test_it_resumes_to_the_same_bytes(run, settings, monkeypatch, name, flags):  # noqa: F811
    """From step 4: in the middle of an interval of APOLLO's projection, and of the average of schedule-free AdamW."""
    monkeypatch.setattr(Apollo, "INTERVAL", 3)
    options = dict(max_steps=6, save_interval=2, eval_interval=3, optimizer=name, learning_rate=1e-3)
    options |= FLAGS.get(name, {}) | flags
    whole = run(random_samples(10), random_samples(3), name="whole", **options)
    run_and_kill(settings(name="killed", **options), monkeypatch, 5)
    resumed = run(name="killed", resume=True, **options)
    assert final_weights(resumed).read_bytes() == final_weights(whole).read_bytes()
    assert rows(resumed) == rows(whole)
    for file in ("optimizer.safetensors", "optimizer.json"):
        assert (resumed / "step-000006" / file).read_bytes() == (whole / "step-000006" / file).read_bytes()


def test_of_schedule_free_the_average_is_validated_and_saved(run, settings):  # noqa: F811
    """Looking at it changes nothing: more validations and checkpoints give the same bits."""
    flags = dict(method="full", optimizer="schedule-free", schedule="constant", max_steps=6, learning_rate=1e-3)
    seldom = run(random_samples(10), random_samples(3), name="seldom", eval_interval=6, save_interval=6, **flags)
    often = run(name="often", eval_interval=1, save_interval=1, **flags)
    assert final_weights(often).read_bytes() == final_weights(seldom).read_bytes()
    assert column(often, "loss") == column(seldom, "loss")
    checkpoint = load_file(seldom / "step-000006" / "model.safetensors")
    final = load_file(final_weights(seldom))
    assert all(torch.equal(final[key], checkpoint[key]) for key in final)
    trained = load_file(seldom / "step-000006" / "optimizer.safetensors")
    assert any(not torch.equal(trained[key], x) for key in trained if key.endswith(".y")
               for x in final.values() if x.shape == trained[key].shape)  # fmt: skip
    s = settings(name="seldom", **flags)
    data, fabric = build.open_data(s), build.start_fabric(s)
    model = load_model(seldom / "final", torch.float32)
    validated = finetune.validate(Run(s, fabric, model, None, data.train, data.val, data.sources))
    assert validated["val_loss"] == pytest.approx(rows(seldom)[-1]["val_loss"], rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- LoRA+


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_plus_has_the_rates_of_peft(settings, method):  # noqa: F811
    import peft
    from peft.optimizers import create_loraplus_optimizer
    from transformers import LlamaForCausalLM

    s = settings(random_samples(4), method=method, lora_plus_ratio=16.0, learning_rate=1e-3, weight_decay=0.1)
    model, config = build.build_model(s, torch.device("cpu"), None)
    ours = build_optimizer(s, model)
    begin_step(ours, 1e-3, 1)
    rates = {id(p): group["lr"] for group in ours.param_groups for p in group["params"]}
    ours = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    base = LlamaForCausalLM.from_pretrained(s.checkpoint_dir, dtype=torch.float32)
    reference = peft.get_peft_model(
        base, peft.LoraConfig(r=s.lora_r, target_modules=list(config.targets), use_dora=method == "dora")
    )
    theirs = create_loraplus_optimizer(reference, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    rates = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"]}
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): rates[id(p)]
        for name, p in reference.named_parameters() if p.requires_grad
    }  # fmt: skip
    assert ours == pytest.approx(theirs) and len({*ours.values()}) == 2


def test_a_ratio_of_1_changes_nothing_and_another_does(run):  # noqa: F811
    flags = dict(max_steps=4, eval_interval=0, weight_decay=0.1)
    plain = run(random_samples(8), name="plain", **flags)
    one, four = (run(name=str(ratio), lora_plus_ratio=ratio, **flags) for ratio in (1.0, 4.0))
    assert final_weights(one).read_bytes() == final_weights(plain).read_bytes()
    a, b = (load_file(final_weights(folder)) for folder in (plain, four))
    assert distance(b, a) > 0.01
    assert column(four, "learning_rate") == column(plain, "learning_rate")


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(optimizer="sgd", beta2=0.9), "--beta2 0.9: --optimizer sgd has no beta2"),
        (dict(optimizer="adafactor", beta1=0.9), "--optimizer adafactor has no beta1"),
        (dict(optimizer="mezo", beta1=0.5), "--optimizer mezo has no beta1"),
        (dict(optimizer="schedule-free"), "needs --schedule constant"),
        (dict(optimizer="schedule-free", schedule="constant", beta1=0.0), "needs --beta1 above 0"),
        (dict(apollo_rank=8), "--apollo_rank needs --optimizer apollo, not adamw"),
        (dict(optimizer="lion", mezo_epsilon=1e-2), "--mezo_epsilon needs --optimizer mezo, not lion"),
        (dict(optimizer="lion", method="full", offload="optimizer"), "needs --optimizer adamw, not lion"),
        (dict(optimizer="apollo", apollo_rank=0), "--apollo_rank 0"),
        (dict(lora_plus_ratio=0.0), "--lora_plus_ratio 0"),
    ],
)
def test_flags_without_a_use_are_refused(settings, flags, words):  # noqa: F811
    with pytest.raises(UserError, match=words):
        settings(**flags)


def test_what_trains_nothing_such_is_refused_before_weights_are_read(run):  # noqa: F811
    with pytest.raises(UserError, match="no matrix .* more than --apollo_rank 256 rows"):
        run(random_samples(4), optimizer="apollo")
    with pytest.raises(UserError, match="--lora_plus_ratio 2: --method full trains no matrix B"):
        run(method="full", lora_plus_ratio=2.0)


def test_betas_are_the_optimisers_own(settings):  # noqa: F811
    for name, betas in {"adamw": (0.9, 0.999), "lion": (0.9, 0.99), "sgd": (0.9, None), "mezo": (None, None)}.items():
        s = settings(optimizer=name)
        assert s.betas == betas
    assert settings(optimizer="lion", beta2=0.95).betas == (0.9, 0.95)
    variant = cli.changed(settings(), {"optimizer": "lion"}, "variant")  # of a sweep whose other variants have AdamW
    assert variant.betas == (0.9, 0.99)
    assert cli.changed(settings(), {"optimizer": "adafactor"}, "variant").betas == (None, None)


def test_the_plan_counts_the_states(settings):  # noqa: F811
    """Of all weights, in fp32: the moments of each are those of its parameters, in the plan and in a real model."""
    for name in OPTIMIZERS:
        s = settings(random_samples(4), optimizer=name, method="full", **FLAGS.get(name, {}))
        model = build.check_model(s, build.open_data(s))
        planned = budget.plan.Predictor(budget.plan_job(s)).fixed["moments"]
        device = budget.plan_job(s).device
        assert planned == moment_bytes(s, model.named_parameters(), device), name
