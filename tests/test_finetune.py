"""The training loop against plain torch, transformers and PEFT: the gradient, the losses, and what a run leaves."""

import csv
import io
import itertools
import json
import math
import random
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT, write_tiny_tokenizer
from prepared_parts import writer_of
from safetensors.torch import load_file, save_file

import finetune
import lora
import model as model_file
from batching import IGNORE, PLANNERS, open_samples
from finetune import Settings
from ops.attention import Attend
from shell import cli
from shell.cli import UserError
from shell.files import check_manifest, project_version
from text.tokenizer import Tokenizer
from training import build, metrics, run_folder
from training.build import Run
from training.optimizer import StepInBackward
from training.schedule import learning_rate
from training.steps import planned_steps
from weights import peft_format
from weights.checkpoint import load_model, read_config

TIMES = ("seconds", "tokens_per_second", "memory_gb")  # columns that differ between equal runs


SOURCES = ({"name": "gsm8k"}, {"name": "age, gender/v1.5"}, {"path": "/somewhere/t0.jsonl"})  # the last as of old
NAMES = ("gsm8k", "age, gender/v1.5", "t0")


def random_sample(prompt, answer, source=0, vocab_size=512):
    """So many tokens of a prompt and of an answer, of which the last ends it."""
    ids = [random.randrange(3, vocab_size) for _ in range(prompt + answer - 1)] + [2]
    return ids, [i >= prompt for i in range(len(ids))], source


def random_samples(N, longest_prompt=12, longest_answer=10, sources=1):
    """The first ones from a source each, the others from any."""
    return [
        random_sample(
            random.randint(1, longest_prompt),
            random.randint(1, longest_answer),
            i if i < sources else random.randrange(sources),
        )
        for i in range(N)
    ]


def write_data(folder, model_dir, train, val=(), shard_tokens=None):
    """A prepared folder as prepare_data.py would leave it."""
    folder.mkdir(parents=True)
    given = {"train": train, "val": val}
    parts = {part: writer_of(each).save(folder, part, shard_tokens=shard_tokens) for part, each in given.items()}
    sources = SOURCES[: 1 + max(source for _, _, source in (*train, *val))]
    style = {"tokenizer_hash": Tokenizer(model_dir).file_hash(), "prompt_style": "plain"}
    info = {"kind": "samples", **style, "sources": sources, **parts}
    (folder / "data.json").write_text(json.dumps(info))
    return folder


@pytest.fixture
def settings(tmp_path, tiny_model_dir):
    """`settings(train, val, name, **flags)`: those of a run on tmp_path/name; data are written once for each name."""

    def make(train=None, val=(), name="run", **flags):
        data = tmp_path / "data"
        if train is not None:
            shutil.rmtree(data, ignore_errors=True)
            write_data(data, flags.get("checkpoint_dir", tiny_model_dir), train, val)
        defaults = dict(
            checkpoint_dir=tiny_model_dir, data_dir=data, out_dir=tmp_path / name, precision="32-true",
            global_batch_size=4, learning_rate=1e-2, warmup_steps=0,
        )  # fmt: skip
        return Settings(**(defaults | flags))

    return make


@pytest.fixture
def run(settings, monkeypatch):
    """`run(train, val, name, **flags)`: train in this process and return the run's folder."""
    monkeypatch.setattr(metrics, "plot_losses", lambda *_: None)  # takes half a second; one test has it drawn

    def train(*args, **flags):
        s = settings(*args, **flags)
        finetune.main(s)
        return s.out_dir

    return train


def rows(out_dir):
    """metrics.csv as numbers, without what differs between equal runs."""
    with open(out_dir / "metrics.csv", newline="") as file:
        return [
            {key: float(value) for key, value in row.items() if value and key not in TIMES}
            for row in csv.DictReader(file)
        ]


def column(out_dir, name):
    return [row[name] for row in rows(out_dir)]


def final_weights(out_dir):
    (path,) = (out_dir / "final").glob("*.safetensors")
    return path


def random_tokens(B=2, T=9):
    return torch.randint(3, 512, (B, T))


# ---------------------------------------------------------------------------------------------------- the gradient

UNEQUAL = ((30, 2), (5, 50), (3, 10), (8, 400), (60, 1))  # tokens of prompt and of answer


def step_gradient(s, samples, micro_batches, monkeypatch):
    """The gradient that `train_step` hands to the optimiser, by parameter name, its row, and the model."""
    fabric = build.start_fabric(s)
    model, _ = build.build_model(s, fabric.device, None)
    randomise_adapters(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = fabric.setup_optimizers(torch.optim.SGD(trainable.values(), lr=0.0))
    monkeypatch.setattr(optimizer, "zero_grad", lambda: None)
    row = finetune.train_step(Run(s, fabric, model.train(), optimizer, samples), micro_batches, 0, 0.0)
    return {name: p.grad.clone() for name, p in trainable.items()}, row, model


def randomise_adapters(model):
    """As after some training: with B = 0 the gradient of A would be zero."""
    with torch.no_grad():
        for adapter in lora.adapters(model).values():
            values = torch.arange(adapter.lora_B.numel(), dtype=torch.float32).sin()
            adapter.lora_B.copy_(0.1 * values.view_as(adapter.lora_B))


def plain_gradient(model, tokens, targets):
    """Of the sum of losses over the number of targets, in one padded batch, by torch alone."""
    model.zero_grad()
    logits = model(tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    loss = loss / (targets != IGNORE).sum()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}, loss.item()


def distance(a, b):
    """|a - b| / |b| over all tensors together."""
    assert a.keys() == b.keys()
    difference = sum((a[name].double() - b[name].double()).square().sum() for name in b)
    return (difference / sum(b[name].double().square().sum() for name in b)).sqrt().item()


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_the_gradient_does_not_depend_on_the_cut(settings, monkeypatch, tmp_path, method):
    """The decisive one: mean-of-means over micro-batches of 2, 50, 10 and 400 targets would be wrong by 253%."""
    s = settings([random_sample(*sizes) for sizes in UNEQUAL], method=method, max_grad_norm=0.0)
    samples = open_samples(s.data_dir, "train")
    gradients, losses, cuts = [], [], []
    for budget in (1, 500, 10**6):  # one sample each; two and three; all five
        plan = PLANNERS[s.planner].plan(samples, torch.arange(5), budget)
        cuts.append(sorted(map(len, plan)))
        gradient, row, model = step_gradient(s, samples, plan, monkeypatch)
        gradients.append(gradient)
        losses.append(row["loss"])
        assert row["targets"] == 463
    assert cuts[0] == [1] * 5 and cuts[2] == [5] and cuts[0] != cuts[1] != cuts[2]
    expected, loss = plain_gradient(model, *samples.padded(range(5))[:2])
    for gradient in gradients:
        assert distance(gradient, expected) < 1e-6
    assert losses == pytest.approx([loss] * 3, rel=1e-6)
    # That the test can fail: what the mean of the micro-batches' means would have been.
    means = [plain_gradient(model, *samples.padded([i])[:2])[0] for i in range(5)]
    assert distance({n: sum(m[n] for m in means) / 5 for n in expected}, expected) > 0.1


def test_the_gradient_is_that_of_transformers(settings, monkeypatch, tiny_model_dir):
    """Of all weights, against the loss that transformers computes itself from labels."""
    from transformers import LlamaForCausalLM

    written = [random_sample(*sizes) for sizes in UNEQUAL]
    s = settings(written, method="full", max_grad_norm=0.0)
    samples = open_samples(s.data_dir, "train")
    gradient, row, _ = step_gradient(s, samples, [[3], [1, 0], [2, 4]], monkeypatch)
    reference = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    longest = max(len(ids) for ids, _, _ in written)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _, _ in written])
    labels = torch.tensor([
        [id if wanted else -100 for id, wanted in zip(ids, is_target, strict=True)] + [-100] * (longest - len(ids))
        for ids, is_target, _ in written
    ])  # fmt: skip
    loss = reference(input_ids=ids, labels=labels).loss
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert distance(gradient, {name: p.grad for name, p in reference.named_parameters()}) < 2e-6


def test_recomputing_changes_nothing(run):
    """Nor with dropout, whose masks must come again in the backward pass."""
    train = random_samples(12)
    options = dict(max_steps=5, lora_dropout=0.3, eval_interval=0)
    kept = run(train, name="kept", **options)
    recomputed = run(name="recomputed", recompute=1.0, **options)
    assert column(kept, "loss") == pytest.approx(column(recomputed, "loss"), rel=1e-6)
    a, b = (load_file(final_weights(folder)) for folder in (kept, recomputed))
    assert distance(a, b) < 1e-5
    without = run(name="without", max_steps=5, eval_interval=0)
    assert abs(column(without, "loss")[-1] - column(kept, "loss")[-1]) > 1e-3  # there was dropout


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("flags", [
    {}, {"quantize": "bnb.nf4"}, {"method": "llama-adapter-v2", "virtual_tokens": 3, "adapter_layers": 2},
])  # fmt: skip
def test_compiled_blocks_change_nothing(run, flags, monkeypatch):
    monkeypatch.setattr(Attend, "__call__", Attend.__call__)  # compile_blocks replaces it
    train, options = random_samples(12), dict(max_steps=4, eval_interval=0, precision="32-true", **flags)
    plain = run(train, name="plain", **options)
    compiled = run(name="compiled", compile=True, **options)
    assert column(compiled, "loss") == pytest.approx(column(plain, "loss"), rel=1e-5)
    a, b = (load_file(final_weights(folder)) for folder in (plain, compiled))
    assert distance(a, b) < 1e-4


def test_what_torch_cannot_compile_goes_on_with_one_line(run, capsys):
    run(random_samples(4), max_steps=1, eval_interval=0, compile=True, method="prefix", virtual_tokens=3)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: --compile")]
    assert notes == ["note: --compile: torch cannot compile blocks with these adapters: going on without"]


def test_without_a_compiler_a_run_goes_on_with_one_line(run, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    run(random_samples(4), max_steps=1, eval_interval=0, compile=True)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert notes == ["note: --compile needs no-such-compiler, which is not installed: going on without"]


def test_optimizer_in_the_backward_pass_takes_the_same_steps(run):
    train = random_samples(12)
    options = dict(
        method="full", precision="32-true", max_steps=5, max_grad_norm=0, eval_interval=0, learning_rate=1e-3,
        global_batch_size=4, micro_batch_tokens=1000,
    )  # fmt: skip
    after, inside = run(train, name="after", **options), run(name="inside", optimizer_in_backward=True, **options)
    for name in ("loss", "grad_norm"):
        assert column(inside, name) == pytest.approx(column(after, name), rel=1e-5)
    a, b = (load_file(final_weights(folder)) for folder in (after, inside))
    assert distance(a, b) < 1e-6


def test_optimizer_in_the_backward_pass_holds_one_gradient_at_most(run, monkeypatch):
    held = []
    step = StepInBackward._step

    def counted(self, parameter):
        held.append(sum(p.grad is not None for group in self.param_groups for p in group["params"]))
        step(self, parameter)

    monkeypatch.setattr(StepInBackward, "_step", counted)
    run(
        random_samples(4), method="full", precision="32-true", max_steps=1, max_grad_norm=0, eval_interval=0,
        micro_batch_tokens=1000, optimizer_in_backward=True,
    )  # fmt: skip
    assert set(held) == {1} and len(held) > 10


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(method="lora"), "needs --method full"),
        (dict(max_grad_norm=1.0), "needs --max_grad_norm 0"),
        (dict(devices=2), "needs --devices 1"),
        (dict(precision="16-mixed"), "needs another --precision"),
        (dict(micro_batch_tokens=1), "may not always fit 1 positions"),
    ],
)
def test_what_the_optimizer_in_the_backward_pass_cannot_do(run, flags, words):
    good = dict(method="full", precision="32-true", max_grad_norm=0, micro_batch_tokens=1000)
    with pytest.raises(UserError, match=words):
        run(random_samples(4), max_steps=1, optimizer_in_backward=True, **{**good, **flags})


# --------------------------------------------------------------------------------------------------- every kind of run


@pytest.mark.parametrize(
    "flags",
    [
        dict(method="lora"),
        dict(method="lora", lora_rslora=True, lora_r=4, lora_targets=["q_proj", "v_proj"]),
        dict(method="lora", lora_targets=["lm_head", "down_proj"]),
        dict(method="dora"),
        dict(method="full"),
        dict(method="lora", schedule="linear", warmup_steps=3),
        dict(quantize="bnb.nf4"),
        dict(quantize="bnb.nf4-dq", precision="bf16-true"),
        dict(quantize="bnb.int8"),
        dict(quantize="bnb.nf4", precision="bf16-mixed", method="dora"),
        dict(precision="bf16-true"),
        dict(precision="bf16-mixed"),
        dict(precision="16-mixed"),
        dict(precision="bf16-true", method="full", recompute=1.0),
        dict(precision="bf16-mixed", method="full"),
        dict(precision="bf16-true", method="full", offload="optimizer", recompute="offload"),
        dict(optimizer="adamw-8bit", method="full"),
        dict(optimizer="adamw-8bit"),
        dict(optimizer="adamw-paged"),
        dict(optimizer="adamw-8bit-paged", method="full"),
    ],
    ids=lambda flags: " ".join(f"{name}={value}" for name, value in flags.items()),
)
def test_a_few_samples_are_learnt_by_heart(run, flags):
    """The loss falls to a fraction of what it was; the result is whole and finite."""
    train = [random_sample(3, 5) for _ in range(4)]
    out_dir = run(train, **{"max_steps": 25, "eval_interval": 0, "save_interval": 0, "schedule": "constant", **flags})
    losses = column(out_dir, "loss")
    assert losses[0] > 5 and losses[-1] < 0.4 * losses[0], losses
    check_manifest(out_dir / "final")
    weights = load_file(final_weights(out_dir))
    assert all(tensor.isfinite().all() for tensor in weights.values())
    if flags.get("method") != "full":
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_the_adapters_states_are_fp32_and_8_bit_ones_are_8_bit(run):
    train = random_samples(8)
    options = dict(max_steps=1, save_interval=1, eval_interval=0)
    adapter = run(train, name="lora", precision="bf16-true", **options)
    states = load_file(adapter / "step-000001" / "optimizer.safetensors")
    assert {t.dtype for name, t in states.items() if "exp_avg" in name} == {torch.float32}
    full = run(name="full", method="full", optimizer="adamw-8bit", **options)
    states = load_file(full / "step-000001" / "optimizer.safetensors")
    assert torch.uint8 in {t.dtype for name, t in states.items() if "state1" in name}


# --------------------------------------------------------------------------------------------------------- schedules


def test_learning_rate_by_hand(settings):
    def rates(total, **flags):
        s = settings(learning_rate=1.0, **flags)
        return [learning_rate(s, step, total) for step in range(total)]

    assert rates(4, schedule="constant", warmup_steps=0) == [1, 1, 1, 1]
    assert rates(5, schedule="constant", warmup_steps=3) == [0.25, 0.5, 0.75, 1, 1]
    assert rates(4, schedule="linear", warmup_steps=0) == [1, 0.75, 0.5, 0.25]
    assert rates(4, schedule="cosine", warmup_steps=0) == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert rates(6, schedule="linear", warmup_steps=2) == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])
    assert rates(1, schedule="cosine", warmup_steps=0) == [1]
    assert rates(3, schedule="cosine", warmup_steps=10) == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert rates(3, schedule="linear", warmup_steps=3) == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_no_step_is_lost_to_the_schedule(settings, schedule):
    for warmup_steps, total in itertools.product((0, 1, 7), (1, 2, 7, 30)):
        s = settings(learning_rate=3e-4, schedule=schedule, warmup_steps=warmup_steps)
        rates = [learning_rate(s, step, total) for step in range(total)]
        assert all(0 < rate <= 3e-4 for rate in rates)
        peak = rates.index(max(rates))
        assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)


def test_epochs_and_steps(run, capsys):
    """10 samples by 4 are 3 steps an epoch, the last of them with 2; each epoch is drawn anew."""
    train = random_samples(10)
    out_dir = run(train, name="one", epochs=2)
    assert column(out_dir, "step") == [1, 2, 3, 4, 5, 6]
    assert column(out_dir, "epoch") == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    tokens = column(out_dir, "tokens")
    assert sum(tokens[:3]) == sum(tokens[3:]) == sum(len(ids) - 1 for ids, _, _ in train)
    assert sum(column(out_dir, "targets")) == 2 * sum(sum(wanted) for _, wanted, _ in train)
    assert len(rows(run(name="half", epochs=0.5))) == 2
    assert len(rows(run(name="steps", epochs=2, max_steps=5))) == 5


# --------------------------------------------------------------------------------------------- golden loss sequences


def peft_losses(s, steps):
    """The losses of a run, by transformers, PEFT and a training loop written for nothing else."""
    import peft
    from transformers import LlamaForCausalLM

    fabric = build.start_fabric(s)
    model, config = build.build_model(s, fabric.device, None)
    start = s.out_dir.with_name("start")
    start.mkdir()
    peft_format.save_adapter(model, config, start, "the same")
    base = LlamaForCausalLM.from_pretrained(s.checkpoint_dir, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, start, is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [  # DoRA's magnitudes do not decay
        {"params": [p for p in parameters if p.dim() == 2], "weight_decay": s.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=s.betas, eps=1e-8, foreach=False)
    samples, losses = open_samples(s.data_dir, "train"), []
    for step, micro_batches in planned_steps(s, samples, 0, steps):
        summed, count = 0.0, 0
        for i in (i for micro_batch in micro_batches for i in micro_batch):
            ids, wanted, _ = samples.stored(i)
            likelihoods = model(input_ids=ids[None]).logits[0, :-1].log_softmax(dim=-1)
            for position in range(1, len(ids)):
                if wanted[position]:
                    summed = summed - likelihoods[position - 1, ids[position]]
                    count += 1
        optimizer.zero_grad()
        (summed / count).backward()
        norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
        if norm > s.max_grad_norm:
            for p in parameters:
                p.grad.mul_(s.max_grad_norm / norm)
        warm = (step + 1) / (s.warmup_steps + 1)
        cosine = 0.5 + 0.5 * math.cos(math.pi * (step - s.warmup_steps) / (steps - s.warmup_steps))
        for group in optimizer.param_groups:
            group["lr"] = s.learning_rate * (warm if step < s.warmup_steps else cosine)
        optimizer.step()
        losses.append(summed.item() / count)
    return losses, model


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_losses_are_those_of_an_independent_loop(run, settings, method):
    """Ten steps of a loop over transformers and PEFT: the same losses, and in the end the same model."""
    flags = dict(
        method=method, max_steps=10, warmup_steps=2, weight_decay=0.1, max_grad_norm=0.5, beta2=0.95, lora_r=4,
        micro_batch_tokens=40, global_batch_size=6,
    )  # fmt: skip
    s = settings(random_samples(20), **flags)
    expected, reference = peft_losses(s, 10)
    out_dir = run(**flags)
    assert column(out_dir, "loss") == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.5
    assert any(norm > 0.5 for norm in column(out_dir, "grad_norm"))  # it was clipped
    model, tokens = load_model(s.checkpoint_dir, torch.float32, adapter_dir=out_dir / "final"), random_tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference.eval()(tokens).logits, atol=3e-3, rtol=1e-3)


def formula(shape, salt):
    """Values in [-0.5, 0.5) by integer arithmetic: the same on every machine and in every version."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    return (((i * 7919 + salt * 104_729 + i * i * 31) % 1009).double() / 1009 - 0.5).float().view(shape)


@pytest.fixture(scope="session")
def formula_model_dir(tmp_path_factory):
    """A tiny Llama whose every weight is a formula."""
    folder = tmp_path_factory.mktemp("formula")
    config = dict(
        model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=1e4,
        eos_token_id=2,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    write_tiny_tokenizer(folder)
    with torch.device("meta"):
        model = model_file.Transformer(read_config(folder))
    weights = {
        name: 1 + 0.1 * formula(p.shape, salt) if p.dim() == 1 else formula(p.shape, salt) * 3 / p.size(1) ** 0.5
        for salt, (name, p) in enumerate(model.named_parameters())
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# Ten losses of the run below. They change only with a change of what is computed, which should be meant: then measure
# again, and say why in docs/LOG.md.
GOLDEN = {
    "lora": [4.53863, 4.49878, 4.41461, 4.28006, 4.14716, 4.02958, 3.93480, 3.86601, 3.82304, 3.80229],
    "full": [4.53863, 4.16439, 3.60123, 3.08441, 2.69879, 2.40311, 2.18306, 2.02819, 1.93109, 1.88255],
}


@pytest.mark.parametrize("method", GOLDEN)
def test_golden_losses(run, formula_model_dir, monkeypatch, method):
    """Weights, data and adapter by formula, all samples in every step: no library's random numbers are in it."""
    salts = itertools.count(144)
    monkeypatch.setattr(
        lora.nn.init, "kaiming_uniform_", lambda t, **_: t.data.copy_(formula(t.shape, next(salts)) / 3)
    )
    train = []
    for j in range(8):
        ids = [(i * i * 5 + 11 * j + 7 * i) % 61 + 3 for i in range(4 + 3 * j)]
        train.append((ids, [i > j for i in range(len(ids))], 0))
    out_dir = run(
        train, checkpoint_dir=formula_model_dir, method=method, global_batch_size=8, micro_batch_tokens=50,
        max_steps=10, learning_rate=5e-3, warmup_steps=2, weight_decay=0.1, lora_r=4, lora_alpha=8,
    )  # fmt: skip
    assert column(out_dir, "loss") == pytest.approx(GOLDEN[method], abs=1e-4)


# -------------------------------------------------------------------------------------------------------- validation


def summed_losses(model, samples):
    """(sum of losses, number of targets) of each sample, one by one, by torch alone."""
    result = []
    for ids, wanted, _ in samples:
        with torch.no_grad():
            likelihoods = model(torch.tensor([ids]))[0, :-1].log_softmax(dim=-1)
        losses = [-likelihoods[i - 1, ids[i]].item() for i in range(1, len(ids)) if wanted[i]]
        result.append((sum(losses), len(losses)))
    return result


def test_validation_loss_is_per_token(run, tiny_model_dir):
    val = [random_sample(3, 1), random_sample(2, 40), random_sample(9, 2), random_sample(1, 15)]
    out_dir = run(random_samples(10), val, max_steps=3, eval_interval=2, micro_batch_tokens=30, lora_dropout=0.5)
    validated = [row for row in rows(out_dir) if "val_loss" in row]
    assert [row["step"] for row in validated] == [2, 3]  # every second, and the last
    model = load_model(tiny_model_dir, torch.float32, adapter_dir=out_dir / "final")
    losses, counts = zip(*summed_losses(model, val), strict=True)
    assert validated[-1]["val_loss"] == pytest.approx(sum(losses) / sum(counts), rel=1e-5)
    assert validated[-1]["val_perplexity"] == pytest.approx(math.exp(sum(losses) / sum(counts)), rel=1e-4)
    by_sample = sum(loss / count for loss, count in zip(losses, counts, strict=True)) / 4
    assert abs(by_sample - sum(losses) / sum(counts)) > 1e-3  # the test can tell


def test_validation_does_not_disturb_the_training(run):
    train, val = random_samples(10), random_samples(4)
    often = run(train, val, name="often", max_steps=4, eval_interval=1, lora_dropout=0.3)
    never = run(name="never", max_steps=4, eval_interval=0, lora_dropout=0.3)
    assert final_weights(often).read_bytes() == final_weights(never).read_bytes()
    assert "val_loss" not in rows(never)[-1]


# --------------------------------------------------------------------------------------------------- loss by source


def means_by_source(kind, model, samples):
    """ "kind/name": loss per target token of the samples of each source, one by one, by torch alone."""
    result = {}
    for number, name in enumerate(NAMES):
        own = [sample for sample in samples if sample[2] == number]
        losses, counts = map(sum, zip(*summed_losses(model, own), strict=True)) if own else (0, 0)
        if counts:
            result[f"{kind}/{name}"] = losses / counts
    return result


@pytest.mark.parametrize(
    "flags",
    [
        dict(planner="packed"),
        dict(planner="sorted_in_step", micro_batch_tokens=70),
        dict(planner="random", recompute=1.0),
        dict(planner="grouped", method="full"),
        dict(lora_targets=["q_proj", "lm_head"]),  # an adapter on the head takes another way to the loss
        dict(compile=True),
    ],
    ids=str,
)
def test_losses_by_source(run, settings, tiny_model_dir, monkeypatch, flags):
    """At the first step and at the last evaluation those of plain torch; at every step they add up to the loss."""
    if "compile" in flags:
        if shutil.which("g++") is None:
            pytest.skip("torch.compile needs a C++ compiler on a CPU")
        monkeypatch.setattr(Attend, "__call__", Attend.__call__)  # compile_blocks replaces it
    train, val = random_samples(14, sources=3), random_samples(7, sources=2)
    flags = dict(max_steps=5, micro_batch_tokens=40, eval_interval=2) | flags
    out_dir = run(train, val, **flags)
    s, written = settings(**flags), rows(out_dir)
    samples = open_samples(s.data_dir, "train")
    for step, micro_batches in planned_steps(s, samples, 0, 5):
        drawn = [train[i] for i in itertools.chain(*micro_batches)]
        targets = [sum(sum(wanted[1:]) for _, wanted, source in drawn if source == number) for number in range(3)]
        losses = [written[step].get(f"loss/{name}") for name in NAMES]
        assert [loss is not None for loss in losses] == [count > 0 for count in targets]  # an empty place, and no zero
        total = sum(loss * count for loss, count in zip(losses, targets, strict=True) if count)
        assert total / sum(targets) == pytest.approx(written[step]["loss"], rel=1e-5)
        if step == 0:
            base = means_by_source("loss", load_model(tiny_model_dir, torch.float32), drawn)
            assert {name: written[0][name] for name in base} == pytest.approx(base, rel=1e-5)
    full = flags.get("method") == "full"
    final = out_dir / "final"
    model = load_model(final, torch.float32) if full else load_model(tiny_model_dir, torch.float32, adapter_dir=final)
    expected = means_by_source("val_loss", model, val)
    assert {name: value for name, value in written[-1].items() if name.startswith("val_loss/")} == pytest.approx(
        expected, rel=1e-5
    )
    assert len(expected) == 2 and abs(expected["val_loss/gsm8k"] - written[-1]["val_loss"]) > 1e-4  # it can tell


def test_losses_by_source_are_no_second_pass(run, monkeypatch):
    """The head is applied once to each micro-batch, however many sources there are."""
    calls, head_loss = [], model_file.head_loss

    def counted(x, *args):
        calls.append(len(x))
        return head_loss(x, *args)

    monkeypatch.setattr(model_file, "head_loss", counted)
    monkeypatch.setattr(finetune.budget, "predicted_peak", lambda *_: 0)  # it tries the model without memory
    monkeypatch.setattr(finetune, "memory_dry_run", lambda *_: None)  # it tries one micro-batch more
    train = random_samples(8, sources=3)
    out_dir = run(train, max_steps=2, global_batch_size=8, micro_batch_tokens=1000, eval_interval=0)
    assert calls == column(out_dir, "targets") and f"loss/{NAMES[2]}" in rows(out_dir)[0]


def test_columns_of_sources_come_back_in_a_resumed_run(tmp_path):
    """In a file with them, and in one from before they were told apart."""
    path = tmp_path / "metrics.csv"
    for first in ({}, {"a": 5, "b, c": 7}, {"of old": 3}):
        metrics.Metrics(path, 0, first, True).add({"step": 1, "loss": 2.0, **{f"loss/{name}": 2.5 for name in first}})
        resumed = metrics.Metrics(path, 1, {"a": 5, "b, c": 7}, True)
        resumed.add({"step": 2, "loss": 1.0, "loss/b, c": 1.5})
        with open(path, newline="") as file:
            one, two = csv.DictReader(file)
        assert [one[f"loss/{name}"] for name in first] == ["2.5"] * len(first)
        assert (two["loss/b, c"], two["loss/a"], one["val_loss/a"]) == ("1.5", "", "")
        assert resumed.column("loss/b, c") == (([1, 2], [2.5, 1.5]) if "a" in first else ([2], [1.5]))


def measured(sources, evaluations=True):
    """Made-up `Metrics` of 30 steps; the first source gets worse."""
    result = metrics.Metrics(None, 0, {f"source {i}": 100 * i + 1 for i in range(sources)}, enabled=False)
    for step in range(1, 31):
        row = {"step": step, "loss": 3 / step, "learning_rate": 1e-4 * step, "grad_norm": 1 / step}
        for i, name in enumerate(result.sources):
            if (step + i) % 3:
                row[f"loss/{name}"] = i + 3 / step
            if evaluations and step % 10 == 0:
                row[f"val_loss/{name}"] = i + (step / 10 if i == 0 else 3 / step)
        result.rows.append(row)
    return result


def test_which_source_got_better(capsys):
    sources = metrics.summarize_sources(measured(3))
    assert sources["source 0"] == {"loss_last": 3 / 29, "val_loss_first": 1.0, "val_loss_last": 3.0, "got": "worse"}
    assert [source["got"] for source in sources.values()] == ["worse", "better", "better"]
    metrics.print_sources(sources)
    first, *others = capsys.readouterr().out.splitlines()
    assert first.split(maxsplit=4) == ["source", "0", "validation", "loss", "1, then 3: worse"] and len(others) == 2
    metrics.print_sources(metrics.summarize_sources(measured(12)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and "worse" in lines[0] and lines[-1] == "and those of 2 more sources in summary.json"
    assert {source["got"] for source in metrics.summarize_sources(measured(2, evaluations=False)).values()} == {None}


@pytest.mark.parametrize("sources, evaluations, panels", [(0, False, 3), (3, False, 4), (3, True, 5), (12, True, 5)])
def test_the_plot_has_the_largest_sources(tmp_path, monkeypatch, sources, evaluations, panels):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda figure: figures.append(figure))
    figures = []
    metrics.plot_losses(measured(sources, evaluations), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (figure,) = figures
    assert len(figure.axes) == panels
    if sources:
        legend, panel = [text.get_text() for text in figure.legends[0].get_texts()], figure.axes[3]
        assert legend == [f"source {i}" for i in reversed(range(sources))][:10]
        assert len(panel.lines) == min(sources, 10) and ("the 10 largest of 12" in panel.get_title()) == (sources > 10)


def test_the_first_steps_do_not_squash_the_rest_of_the_plot(tmp_path, monkeypatch):
    """The lower half of a loss that begins at 10 takes about as much of the axis as it would have steps."""
    import matplotlib.pyplot as plt

    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    made = measured(0)
    for row in made.rows:
        row["loss"] = 10.0 if row["step"] < 3 else 1.0 / row["step"]
    metrics.plot_losses(made, tmp_path / "loss.png")
    panel = figures[0].axes[0]
    bottom, top = (panel.transData.transform((0, y))[1] for y in (1 / 30, 1 / 3))
    assert top - bottom > 0.25 * panel.bbox.height


@pytest.mark.parametrize("validated", [False, True])
def test_the_losses_fit_a_terminal_of_80_columns(monkeypatch, validated):
    monkeypatch.setenv("COLUMNS", "80")
    screen = io.StringIO()
    row = dict(loss=10.123, tokens_per_second=123456.7, memory_gb=23.45, learning_rate=2e-4, padding=0.034)
    with finetune.progress_bar(99_000, 100_000, shown=True) as bar:
        bar.fp, bar.ncols, bar.mininterval = screen, 80, 0
        finetune.show_progress(bar, row | (dict(val_loss=9.876, val_perplexity=19_456.0) if validated else {}))
        finetune.show_progress(bar, row)
        line = str(bar)
    assert len(line) <= 80 and "loss 10.123" in line and ("val 9.876" in line) == validated and "tok/s" in line


# ------------------------------------------------------------------------------------------------- what a run leaves


def test_what_a_run_leaves(settings, tiny_model_dir, capsys):
    s = settings(random_samples(10), random_samples(3), max_steps=4, save_interval=2, eval_interval=3, lora_r=3)
    finetune.main(s)
    out = s.out_dir
    uncommitted = json.loads((out / "record.json").read_text())["git"] or {"changed": False}
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "final", "loss.png", "metrics.csv", "record.json", "source", "step-000002", "step-000004",
        "summary.json", *["git.diff"] * uncommitted["changed"],
    }  # fmt: skip
    with open(out / "metrics.csv", newline="") as file:
        header, *lines = csv.reader(file)
    assert tuple(header) == metrics.COLUMNS and [line[0] for line in lines] == ["1", "2", "3", "4"]
    for row in rows(out):
        assert row.keys() - {"val_loss", "val_perplexity"} == set(metrics.COLUMNS[:-2]) - set(TIMES)
        assert row["loss"] > 0 and row["grad_norm"] > 0 and 0 <= row["padding"] < 1
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() == {
        "trainable_parameters", "frozen_parameters", "steps", "loss_first", "loss_last", "val_loss",
        "training_seconds", "tokens_per_second", "padding", "estimated_tflops_per_second",
        "measured_tflops_per_second", "peak_memory_gb", "predicted_memory_gb", "measured_memory_gb",
        "predicted_over_measured", "version",
    }  # fmt: skip
    assert summary["steps"] == 4 and summary["loss_first"] == rows(out)[0]["loss"]
    assert summary["loss_last"] == rows(out)[-1]["loss"] and summary["val_loss"] == rows(out)[-1]["val_loss"]
    assert summary.pop("padding") == 0  # rows of whole samples
    assert summary.pop("version") == project_version()
    assert all(value > 0 for value in summary.values() if value is not None)
    # The counts: r (in + out) for each of seven projections in three layers, beside all weights of the model.
    weights = load_file(tiny_model_dir / "model.safetensors")
    trainable = sum(3 * sum(w.shape) for name, w in weights.items() if "proj.weight" in name)
    frozen = sum(w.numel() for w in weights.values())
    assert (summary["trainable_parameters"], summary["frozen_parameters"]) == (trainable, frozen)
    printed = capsys.readouterr().out
    assert f"{trainable:,} trainable parameters beside {frozen:,} frozen" in printed and str(out) in printed
    assert (out / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for path in run_folder.source_files():
        assert (out / "source" / path).read_bytes() == (ROOT / path).read_bytes()
    done = subprocess.run([sys.executable, out / "source" / "finetune.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--micro_batch_tokens" in done.stdout, done.stderr
    for name in ("final", "step-000002", "step-000004"):
        check_manifest(out / name)
    assert json.loads((out / "final" / "onetune.json").read_text()) == {
        "prompt_style": "plain", "template_args": {}, "checkpoint_dir": str(tiny_model_dir), "quantize": None,
    }  # fmt: skip


def test_a_quantised_base_is_counted_as_the_weights_it_stands_for(run, tiny_model_dir):
    out_dir = run(random_samples(4), max_steps=1, quantize="bnb.nf4")
    weights = load_file(tiny_model_dir / "model.safetensors")
    summary = json.loads((out_dir / "summary.json").read_text())
    assert summary["frozen_parameters"] == sum(w.numel() for w in weights.values())


def test_config_yaml_gives_the_same_settings(run, settings):
    flags = dict(max_steps=1, lora_targets=["q_proj", "up_proj"], lora_dropout=0.25, weight_decay=1e-3, epochs=0.5)
    out_dir = run(random_samples(4), **flags)
    assert cli.parse(Settings, ["--config", str(out_dir / "config.yaml")]) == settings(**flags)
    changed = cli.parse(Settings, ["--config", str(out_dir / "config.yaml"), "--learning_rate", "0.5"])
    assert changed == settings(**flags, learning_rate=0.5)


def test_peft_loads_the_adapter(run, tiny_model_dir):
    import peft
    from transformers import LlamaForCausalLM

    out_dir = run(random_samples(10), max_steps=5, lora_rslora=True, lora_targets=["k_proj", "down_proj"])
    base = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    reference = peft.PeftModel.from_pretrained(base, out_dir / "final").eval()
    model, tokens = load_model(tiny_model_dir, torch.float32, adapter_dir=out_dir / "final"), random_tokens()
    bare = load_model(tiny_model_dir, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(input_ids=tokens).logits, atol=1e-4, rtol=1e-4)
        assert (model(tokens) - bare(tokens)).abs().max() > 0.1


def test_transformers_loads_the_model_of_a_full_run(run, tiny_model_dir):
    from transformers import LlamaForCausalLM

    out_dir = run(random_samples(10), max_steps=5, method="full")
    final = out_dir / "final"
    assert (final / "tokenizer.json").read_bytes() == (tiny_model_dir / "tokenizer.json").read_bytes()
    before, after = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (tiny_model_dir, final))
    assert after.pop("chat_template") != before.pop("chat_template") and after == before  # that of the prompt style
    assert json.loads((final / "config.json").read_text())["torch_dtype"] == "float32"
    reference, tokens = LlamaForCausalLM.from_pretrained(final, dtype=torch.float32).eval(), random_tokens()
    model, before = load_model(final, torch.float32), load_model(tiny_model_dir, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(input_ids=tokens).logits, atol=1e-4, rtol=1e-4)
        assert (model(tokens) - before(tokens)).abs().max() > 0.1
    changed, original = load_file(final / "model.safetensors"), load_file(tiny_model_dir / "model.safetensors")
    assert changed.keys() == original.keys()
    assert not any(torch.equal(changed[name], original[name]) for name in original)  # all weights trained


def test_a_tied_head_stays_tied_in_a_full_run(run, tiny_checkpoint, tmp_path):
    folder = tmp_path / "tied"
    shutil.copytree(tiny_checkpoint("llama-tied"), folder)
    write_tiny_tokenizer(folder)
    out_dir = run(random_samples(4), checkpoint_dir=folder, method="full", max_steps=2, save_interval=1)
    assert "lm_head.weight" not in load_file(out_dir / "final" / "model.safetensors")
    summary = json.loads((out_dir / "summary.json").read_text())
    weights = load_file(folder / "model.safetensors")
    assert summary["trainable_parameters"] == sum(w.numel() for w in weights.values())
    assert summary["frozen_parameters"] == 0 and summary["estimated_tflops_per_second"] > 0


def test_weights_keep_the_dtype_of_the_run(run):
    out_dir = run(random_samples(4), method="full", precision="bf16-true", max_steps=1, eval_interval=0)
    assert {w.dtype for w in load_file(final_weights(out_dir)).values()} == {torch.bfloat16}


# ---------------------------------------------------------------------------------------------------------- resuming


class Killed(BaseException):
    pass


def run_and_kill(s, monkeypatch, step):
    """Train until `step` (from 0) is to begin, and die there."""
    train_step = finetune.train_step

    def deadly_step(run, micro_batches, number, rate):
        if number == step:
            raise Killed
        return train_step(run, micro_batches, number, rate)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "train_step", deadly_step)
        with pytest.raises(Killed):
            finetune.main(s)


@pytest.mark.parametrize(
    "flags",
    [
        dict(lora_dropout=0.3),
        dict(lora_dropout=0.3, precision="bf16-true", quantize="bnb.nf4", method="dora"),
        dict(method="full"),
        dict(method="full", precision="bf16-true"),
        dict(method="full", optimizer="adamw-8bit"),
        dict(lora_dropout=0.1, optimizer="adamw-8bit", weight_decay=0.1),
        dict(precision="16-mixed", lora_dropout=0.3),
    ],
    ids=lambda flags: " ".join(map(str, flags.values())),
)
def test_a_resumed_run_ends_as_one_never_interrupted(settings, run, monkeypatch, flags):
    """Killed in step 5 of 6, resumed from step 3, in the second epoch: the same bytes, the same rows."""
    if (
        flags.get("precision") == "16-mixed"
    ):  # Fabric has none on a CPU; a loss scale that overflows at first, and that a checkpoint must keep
        start_fabric = build.start_fabric

        def start(s):
            fabric = start_fabric(s)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-6, growth_interval=2)
            fabric.strategy.precision = fabric._precision = MixedPrecision("16-mixed", "cpu", scaler)
            return fabric

        from lightning.fabric.plugins.precision import MixedPrecision

        monkeypatch.setattr(build, "start_fabric", start)
    train, val = random_samples(10, sources=3), random_samples(3, sources=2)
    options = dict(max_steps=6, save_interval=3, eval_interval=2, **flags)
    whole = run(train, val, name="whole", **options)
    s = settings(name="killed", **options)
    run_and_kill(s, monkeypatch, 4)
    assert column(s.out_dir, "step") == [1, 2, 3, 4] and not (s.out_dir / "final").exists()
    resumed = run(name="killed", resume=True, **options)
    if flags.get("precision") == "16-mixed":
        assert {math.isfinite(norm) for norm in column(whole, "grad_norm")} == {True, False}
    assert final_weights(resumed).read_bytes() == final_weights(whole).read_bytes()
    assert str(rows(resumed)) == str(rows(whole))  # as text: NaN is not equal to itself
    for name in ("optimizer.safetensors", "optimizer.json"):
        assert (resumed / "step-000006" / name).read_bytes() == (whole / "step-000006" / name).read_bytes()
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, resumed)]
    for name in ("steps", "loss_first", "loss_last", "val_loss", "padding", "trainable_parameters"):
        assert summaries[0][name] == summaries[1][name], name


def test_resuming_a_finished_run_changes_nothing(run):
    out_dir = run(random_samples(8), max_steps=4, save_interval=2)
    before, written = rows(out_dir), final_weights(out_dir).read_bytes()
    assert run(max_steps=4, save_interval=2, resume=True) == out_dir
    assert (rows(out_dir), final_weights(out_dir).read_bytes()) == (before, written)


def test_resuming_without_a_checkpoint_begins_anew(run, settings, monkeypatch):
    train = random_samples(8)
    whole = run(train, name="whole", max_steps=4)
    s = settings(name="killed", max_steps=4)
    run_and_kill(s, monkeypatch, 2)
    resumed = run(name="killed", max_steps=4, resume=True)
    assert rows(resumed) == rows(whole)
    assert final_weights(resumed).read_bytes() == final_weights(whole).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [dict(learning_rate=5e-3), dict(seed=7, lora_r=2), dict(global_batch_size=5), dict(quantize="bnb.nf4")],
    ids=str,
)
def test_resuming_with_other_settings_is_refused_by_name(run, settings, changes):
    out_dir = run(random_samples(8), max_steps=2, save_interval=1)
    before = {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")}
    with pytest.raises(UserError) as caught:
        finetune.main(settings(**{"max_steps": 2, "save_interval": 1, "resume": True, **changes}))
    for name, value in changes.items():
        assert f"--{name}" in str(caught.value) and str(value) in str(caught.value)
    assert len([word for word in str(caught.value).split() if word.startswith("--")]) == len(changes)
    assert {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")} == before


def test_saving_and_validating_at_other_steps_is_allowed_on_resuming(run, settings, monkeypatch):
    train = random_samples(8)
    whole = run(train, name="whole", max_steps=4, save_interval=2)
    run_and_kill(settings(name="killed", max_steps=4, save_interval=2), monkeypatch, 3)
    resumed = run(name="killed", max_steps=4, save_interval=1, eval_interval=1, resume=True)
    assert final_weights(resumed).read_bytes() == final_weights(whole).read_bytes()
    assert (resumed / "step-000003").is_dir()


def test_a_damaged_checkpoint_is_refused(run, settings):
    out_dir = run(random_samples(8), max_steps=2, save_interval=1)
    path = out_dir / "step-000002" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="step-000002/optimizer.safetensors has changed"):
        finetune.main(settings(max_steps=2, save_interval=1, resume=True))
    path.unlink()
    with pytest.raises(UserError, match="step-000002/optimizer.safetensors is missing"):
        finetune.main(settings(max_steps=2, save_interval=1, resume=True))


def test_a_run_is_not_overwritten(run, settings):
    out_dir = run(random_samples(8), max_steps=2)
    before = {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")}
    with pytest.raises(UserError, match="--resume"):
        finetune.main(settings(max_steps=2))
    assert {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")} == before


# --------------------------------------------------------------------------------------------------- several devices


def run_on_cpus(run_script, s):
    """A run with these settings in processes of its own, which see no GPU: what it prints."""
    s.out_dir.with_suffix(".yaml").write_text(yaml.safe_dump(run_folder.plain(s)))
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    code, out, err = run_script("finetune.py", "--config", s.out_dir.with_suffix(".yaml"), env=environment)
    assert code == 0, out + err
    return out


def test_two_devices_do_what_one_does(run, run_script, settings):
    """Five samples by four: the second step of an epoch has one micro-batch, which leaves a device with none."""
    flags = dict(max_steps=4, lora_r=4, micro_batch_tokens=20, eval_interval=2, learning_rate=1e-3)
    train = [random_sample(*sizes) for sizes in ((3, 9), (9, 4, 1), (2, 3, 2), (7, 12, 1), (1, 6))]
    one = run(train, random_samples(3, sources=2), name="one", **flags)
    s = settings(name="two", devices=2, **flags)
    out = run_on_cpus(run_script, s)
    a, b = (load_file(final_weights(folder)) for folder in (s.out_dir, one))
    assert distance(a, b) < 1e-6
    for name in ("loss", "tokens", "targets", "padding", "grad_norm", "learning_rate"):
        assert column(s.out_dir, name) == pytest.approx(column(one, name), rel=1e-5), name
    for row, expected in zip(rows(s.out_dir), rows(one), strict=True):  # and the losses by source, and of validation
        assert row == pytest.approx(expected, rel=1e-5)
    assert f"val_loss/{NAMES[1]}" in expected
    assert out.count("trainable parameters beside") == 1  # only the first of them speaks


# ------------------------------------------------------------------------------------------------- mixtures of experts


@pytest.fixture
def experts_dir(tmp_path, tiny_model_dir):
    """A tiny random Qwen3-MoE, with the tokenizer of the tiny Llama."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "experts"
    shutil.copytree(tiny_model_dir, folder)
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=512, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=8, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("flags", [{}, {"recompute": 1.0}, {"planner": "sorted_in_step"}])
def test_the_balance_loss_is_trained_and_not_shown(run, settings, experts_dir, flags):
    """The gradient of several micro-batches is that of their task loss and of the balance loss, each with its share."""
    from experts import balance_loss

    samples = random_samples(4)
    flags = dict(flags, checkpoint_dir=experts_dir, method="full", max_steps=1, micro_batch_tokens=32, max_grad_norm=0)
    plain = rows(run(samples, name="plain", **flags))[0]
    balanced = rows(run(samples, name="balanced", balance_loss=70, **flags))[0]
    assert balanced["loss"] == plain["loss"]
    s = settings(name="expected", **flags)
    data = build.open_data(s)
    model = load_model(experts_dir, torch.float32).requires_grad_(True)
    ((_, micro_batches),) = planned_steps(s, data.train, 0, 1)
    total, targets = 0.0, data.train.target_counts[:].sum().item()
    for indices in micro_batches:
        routed, (tokens, wanted, offsets) = [], PLANNERS[s.planner].layout(data.train, indices)
        task, lengths = model(tokens, wanted, offsets=offsets, routed=routed), data.train.lengths[indices]
        counted = None if offsets else (torch.arange(tokens.size(1)) < lengths[:, None]).flatten()
        total = total + task + 70 * (wanted != IGNORE).sum() * balance_loss(routed, 2, counted)
    (total / targets).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert len(micro_batches) > 1
    assert balanced["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert abs(balanced["grad_norm"] - plain["grad_norm"]) > 1e-3 * plain["grad_norm"]


@pytest.mark.parametrize(("targets", "count"), [(None, 8), (["down_proj", "q_proj"], 14)])
def test_experts_are_only_adapted_if_that_is_asked_for(run, experts_dir, targets, count):
    out_dir = run(
        random_samples(4), checkpoint_dir=experts_dir, max_steps=2, lora_targets=targets, micro_batch_tokens=8
    )
    model = load_model(experts_dir, torch.float32, adapter_dir=out_dir / "final")
    assert len(lora.adapters(model)) == count


def test_dora_over_experts_is_noted(run, experts_dir, capsys):
    """PEFT has none: the adapter is for onetune alone."""
    flags = dict(checkpoint_dir=experts_dir, method="dora", max_steps=1)
    for name, targets, noted in (("attention", None, False), ("experts", ["down_proj"], True)):
        out_dir = run(random_samples(2), name=name, lora_targets=targets, **flags)
        assert ("note: PEFT has no DoRA over experts" in capsys.readouterr().err) == noted
        values = json.loads((out_dir / "final" / "adapter_config.json").read_text())
        assert values["peft_type"] == ("ONETUNE_OUTSIDE_PEFT" if noted else "LORA") and values["use_dora"]
        assert lora.adapters(load_model(experts_dir, torch.float32, adapter_dir=out_dir / "final"))


# ------------------------------------------------------------------------------------------- families of other names


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_run_of_a_family_with_fused_layers_resumes(run, settings, monkeypatch, tmp_path, tiny_model_dir, method):
    """Its adapter is stacked to what PEFT has, and comes back from a checkpoint bit for bit."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(tiny_model_dir, tmp_path / "neox")
    sizes = dict(hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, vocab_size=512)
    config = AutoConfig.for_model("gpt_neox", max_position_embeddings=256, bos_token_id=0, eos_token_id=2, **sizes)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path / "neox")
    flags = dict(checkpoint_dir=tmp_path / "neox", method=method, lora_targets=["query_key_value", "up_proj"])
    flags |= dict(max_steps=4, save_interval=2)
    whole = run(random_samples(8), name="whole", **flags)
    run_and_kill(settings(name="killed", **flags), monkeypatch, 3)
    resumed = run(name="killed", resume=True, **flags)
    assert final_weights(resumed).read_bytes() == final_weights(whole).read_bytes() and rows(resumed) == rows(whole)
    values = json.loads((whole / "final" / "adapter_config.json").read_text())
    assert values["target_modules"] == ["query_key_value", "dense_h_to_4h"]
