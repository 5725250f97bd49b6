"""MeZO: a step written out, the direction it takes on average, weights that come back, and whole runs."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from test_finetune import (  # noqa: F401 (fixtures)
    column,
    distance,
    final_weights,
    plain_gradient,
    random_sample,
    random_samples,
    randomise_adapters,
    rows,
    run,
    run_and_kill,
    run_on_cpus,
    settings,
)
from test_memory_plan import SHAPES, activations, real_trace, tiny_job

import finetune
from batching import IGNORE, open_samples
from model import Transformer
from shell.cli import UserError
from training import build, mezo
from training.build import Run
from training.memory import budget
from training.memory.allocations import Allocations
from training.memory.plan import Predictor
from training.optimizer import begin_step
from training.steps import planned_steps

MEZO = dict(optimizer="mezo", schedule="constant", warmup_steps=0)


def started(s):
    """A run of `s` at its start, its adapters random, and its samples."""
    fabric = build.start_fabric(s)
    model, _ = build.build_model(s, fabric.device, None)
    if s.method != "full":
        randomise_adapters(model)
    samples = open_samples(s.data_dir, "train")
    return Run(s, fabric, model.train(), build.place_optimizer(s, fabric, model), samples), samples


def directions(run, step):  # noqa: F811
    """z of a step by parameter, drawn as MeZO says: by the seed, the step and the parameter's place."""
    place, drawn = 0, {}
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            generator = mezo.generator_of(parameter.device, run.settings.seed, step, place)
            drawn[parameter] = torch.randn(parameter.numel(), generator=generator).view_as(parameter)
            place += 1
    return drawn


@torch.no_grad()
def mean_loss(model, samples, indices):
    """Over all targets of these samples, each run alone, in plain torch."""
    total, count = 0.0, 0
    for i in indices:
        tokens, targets, _ = samples.padded([i])
        logits = model(tokens)[targets != IGNORE].double()
        total += torch.nn.functional.cross_entropy(logits, targets[targets != IGNORE], reduction="sum").item()
        count += (targets != IGNORE).sum().item()
    return total / count


# ------------------------------------------------------------------------------------------------------------ a step


@pytest.mark.parametrize("most", [0.0, 0.01])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_is_the_papers(settings, method, most):  # noqa: F811
    """Two losses of a copy of the model, moved along z; then one step of the weights, with decay and clipping."""
    s = settings(
        random_samples(5), method=method, mezo_epsilon=1e-2, weight_decay=0.5, max_grad_norm=most, global_batch_size=5,
        micro_batch_tokens=30, lora_plus_ratio=3.0 if method == "lora" else 1.0, **MEZO
    )  # fmt: skip
    run, samples = started(s)  # noqa: F811
    ((_, micro_batches),) = planned_steps(s, samples, 0, 1)
    assert len(micro_batches) > 1
    zs, names = directions(run, 4), {p: name for name, p in run.model.named_parameters()}
    losses = []
    for sign in (1, -1):
        moved = copy.deepcopy(run.model)
        for parameter, z in zs.items():
            moved.get_parameter(names[parameter]).data.add_(sign * 1e-2 * z)
        losses.append(mean_loss(moved, samples, range(5)))
    projected = (losses[0] - losses[1]) / 2e-2
    before = {parameter: parameter.detach().clone() for parameter in zs}
    row = finetune.train_step(run, micro_batches, 4, 1e-3)
    assert row["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(abs(projected), rel=1e-2, abs=1e-3)
    clipped = max(-most, min(most, projected)) if most else projected
    for parameter, z in zs.items():
        rate = 1e-3 * (3 if names[parameter].endswith("lora_B") else 1)
        decay = 0.5 if parameter.dim() > 1 else 0.0
        expected = before[parameter] * (1 - rate * decay) - rate * clipped * z
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=2e-5 * rate / 1e-3)


def test_on_average_it_goes_along_the_gradient(settings):  # noqa: F811
    """The mean of projected * z over n directions: its cosine with the gradient is about sqrt(n / (n + d))."""
    s = settings(random_samples(4), lora_r=1, lora_targets=["v_proj"], max_grad_norm=0.0, learning_rate=1.0, **MEZO)
    run, samples = started(s)  # noqa: F811
    ((_, micro_batches),) = planned_steps(s, samples, 0, 1)
    trainable = [p for p in run.model.parameters() if p.requires_grad]
    d, n = sum(p.numel() for p in trainable), 400
    run.model.zero_grad()
    (sum(finetune.forward(run, samples, indices).trained for indices in micro_batches)).backward()
    gradient = torch.cat([p.grad.flatten() for p in trainable])
    run.model.zero_grad()
    total = torch.zeros(d)
    for step in range(n):
        zs = directions(run, step)
        finetune.forward_passes(run, micro_batches, step, samples.target_counts[:].sum().item())
        total += run.optimizer.projected.item() * torch.cat([zs[p].flatten() for p in trainable])
    cosine = torch.nn.functional.cosine_similarity(total, gradient, dim=0).item()
    expected = (n / (n + d)) ** 0.5
    assert cosine > 0.8 * expected > 0.4, (cosine, expected, d)


def test_weights_come_back(settings):  # noqa: F811
    """After the passes, up to fp32's rounding; pieces of any size draw what the whole would."""
    s = settings(random_samples(4), method="full", **MEZO)
    run, _ = started(s)  # noqa: F811
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    copied = lambda: {name: p.detach().clone() for name, p in run.model.named_parameters()}  # noqa: E731
    sides = [copied() for _ in run.optimizer.sides(0)]
    zs, names = directions(run, 0), {p: name for name, p in run.model.named_parameters()}
    for parameter, z in zs.items():
        name = names[parameter]
        torch.testing.assert_close(sides[0][name], before[name] + 1e-3 * z, rtol=0, atol=1e-6)
        torch.testing.assert_close(sides[1][name], before[name] - 1e-3 * z, rtol=0, atol=1e-6)
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=1e-6)


def test_nothing_of_a_large_weight_is_drawn_twice(monkeypatch):
    """Pieces go on where the one before ended, and no more than a piece exists at one time."""
    monkeypatch.setattr(mezo, "PIECE", 1000)
    sizes, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda shape, **more: sizes.append(shape.numel()) or randn(shape, **more))
    weight = torch.nn.Parameter(torch.zeros(70, 50))
    s = finetune.Settings("a", "b", method="full", precision="32-true", optimizer="mezo")
    optimizer = mezo.MeZO([{"params": [weight], "weight_decay": 0.0}], s)
    next(optimizer.sides(3))
    assert sizes == [1000, 1000, 1000, 500]
    z = weight.detach() / 1e-3
    assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1 and len(z.unique()) > 3400


# -------------------------------------------------------------------------------------------------------- whole runs

KINDS = {
    "lora": dict(learning_rate=1e-3),
    "lora over NF4": dict(learning_rate=1e-3, quantize="bnb.nf4", precision="bf16-true"),
    "full": dict(learning_rate=1e-3, method="full"),
    "full in bf16-mixed": dict(learning_rate=1e-3, method="full", precision="bf16-mixed"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls(run, kind):  # noqa: F811
    train = [random_sample(3, 5) for _ in range(4)]
    out_dir = run(train, max_steps=120, eval_interval=0, save_interval=0, max_grad_norm=0.0, **MEZO | KINDS[kind])
    losses = column(out_dir, "loss")
    first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
    assert last < first - 0.2, (first, last)


@pytest.mark.parametrize(
    "flags",
    [
        dict(quantize="bnb.nf4", precision="bf16-true", lora_dropout=0.3, weight_decay=0.1, lora_plus_ratio=4.0),
        dict(method="full", weight_decay=0.1, z_loss=1e-3),
        dict(planner="sorted_in_step", method="dora"),
    ],
    ids=lambda flags: flags.get("method", "lora"),
)
def test_it_resumes_to_the_same_bytes(run, settings, monkeypatch, flags):  # noqa: F811
    options = dict(max_steps=6, save_interval=2, eval_interval=3, micro_batch_tokens=30, **MEZO | flags)
    whole = run(random_samples(10), random_samples(3), name="whole", **options)
    run_and_kill(settings(name="killed", **options), monkeypatch, 5)
    resumed = run(name="killed", resume=True, **options)
    assert final_weights(resumed).read_bytes() == final_weights(whole).read_bytes()
    assert rows(resumed) == rows(whole)
    assert load_file(whole / "step-000006" / "optimizer.safetensors") == {}


def test_another_seed_takes_other_directions(run):  # noqa: F811
    flags = dict(max_steps=2, eval_interval=0, method="full", global_batch_size=8, **MEZO)
    one, two = (run(random_samples(8) if seed == 1 else None, name=str(seed), seed=seed, **flags) for seed in (1, 2))
    assert final_weights(one).read_bytes() != final_weights(two).read_bytes()


def test_both_sides_have_the_same_dropout(settings):  # noqa: F811
    """Else masks, not z, would make the difference: with an epsilon of almost nothing it vanishes."""
    s = settings(random_samples(4), lora_dropout=0.5, mezo_epsilon=1e-12, **MEZO)
    run, samples = started(s)  # noqa: F811
    losses = []
    run.optimizer.found = losses.append
    ((_, micro_batches),) = planned_steps(s, samples, 0, 1)
    finetune.forward_passes(run, micro_batches, 0, 1)
    (both,) = losses
    assert both[0] == both[1]


def test_two_devices_do_what_one_does(run, run_script, settings):  # noqa: F811
    flags = dict(max_steps=3, lora_r=4, micro_batch_tokens=20, eval_interval=0, learning_rate=1e-3, **MEZO)
    one = run([random_sample(*sizes) for sizes in ((3, 9), (9, 4), (2, 3), (7, 12), (1, 6))], name="one", **flags)
    s = settings(name="two", devices=2, **flags)
    run_on_cpus(run_script, s)
    a, b = (load_file(final_weights(folder)) for folder in (s.out_dir, one))
    assert distance(a, b) < 1e-4
    assert column(s.out_dir, "loss") == pytest.approx(column(one, "loss"), rel=1e-5)


def test_no_gradient_is_ever_made(run, monkeypatch):  # noqa: F811
    """Nor anything that a backward pass would need: also in the dry run before the first step."""
    hidden_states, seen = Transformer.hidden_states, []

    def watched(self, *args, **more):
        result = hidden_states(self, *args, **more)
        seen.append(result.requires_grad)
        return result

    monkeypatch.setattr(Transformer, "hidden_states", watched)
    run(random_samples(4), max_steps=1, eval_interval=0, method="full", **MEZO)
    assert len(seen) >= 3 and not any(seen)


def test_a_loss_that_is_not_finite_changes_no_weight(settings, monkeypatch):  # noqa: F811
    s = settings(random_samples(4), max_steps=2, save_interval=1, eval_interval=0, **MEZO)
    forward, seen = finetune.forward, []

    def broken(run, samples, indices):  # noqa: F811
        result = forward(run, samples, indices)
        seen.append(1)
        return result._replace(trained=result.trained * float("nan")) if len(seen) > 4 else result

    monkeypatch.setattr(finetune, "forward", broken)
    with pytest.raises(UserError, match="the gradient's norm is nan"):
        finetune.main(s)


# ------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["lora", "dora", "full", "lora over NF4"])
def test_the_plan_is_of_forward_passes(kind, shape):
    job = tiny_job(kind.split()[0], "bnb.nf4" if "NF4" in kind else None, optimizer="mezo", gradients="none")
    predictor = Predictor(job)
    real, _ = real_trace(job, shape)
    assert activations(predictor, shape) == pytest.approx(real.at_peak.total(), abs=64)
    parts = predictor.parts(shape)
    assert parts["saved activations"] == parts["gradients"] == parts["moments"] == 0 < parts["working set"]
    assert predictor.flops(shape) == 2 * real.flops


@torch.no_grad()
def test_a_step_allocates_what_inference_does(settings):  # noqa: F811
    """Real tensors: the peak of a whole step, perturbing included, is that of one forward pass."""
    s = settings([random_sample(100, 100)], method="full", **MEZO)
    run, samples = started(s)  # noqa: F811
    with Allocations() as inference:
        finetune.forward(run, samples, [0])
    with Allocations() as step:
        finetune.forward_passes(run, [[0]], 0, 100)
        begin_step(run.optimizer, 1e-3, 1)
        finetune.gradient_norm(run)
        run.optimizer.step()
    largest = max(4 * p.numel() for p in run.model.parameters())
    assert step.at_peak.total() <= inference.at_peak.total() + largest


def test_plan_and_automatic_micro_batches(run, settings, capsys):  # noqa: F811
    s = settings(random_samples(8), plan=True, plan_tflops=1.0, method="full", **MEZO)
    finetune.main(s)
    text = capsys.readouterr().out
    assert "gradients              0.000 GB" in text and "saved activations      0.000 GB" in text
    job = budget.plan_job(s)
    assert job.gradients == "none" and budget.more_recomputed(s) == [0.0]
    out_dir = run(max_steps=1, eval_interval=0, name="auto", micro_batch_tokens="auto", memory_budget="1GB", **MEZO)
    assert len(rows(out_dir)) == 1


# ------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(recompute=1.0), "needs --recompute 0: it has no backward pass"),
        (dict(recompute="offload"), "needs --recompute 0: it has no backward pass"),
        (dict(method="full", precision="bf16-true"), "needs --precision bf16-mixed or 32-true with --method full"),
        (dict(precision="16-mixed"), "needs another --precision"),
        (dict(method="full", optimizer_in_backward=True, max_grad_norm=0), "needs --optimizer_in_backward false"),
        (dict(method="full", offload="optimizer"), "--offload optimizer needs --optimizer adamw, not mezo"),
        (dict(mezo_epsilon=0), "--mezo_epsilon 0"),
    ],
)
def test_what_mezo_cannot_do(settings, flags, words):  # noqa: F811
    with pytest.raises(UserError, match=words):
        settings(**{**MEZO, **flags})
