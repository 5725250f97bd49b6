"""Steps that are not finite, and out of memory: what is named as the cause, what is kept; no weight changes."""

import contextlib
import dataclasses
import json
import math
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_finetune import column, final_weights, random_sample, random_samples, rows, write_data

import finetune
from batching import PLANNERS, open_samples
from model import Transformer
from shell import files
from shell.cli import UserError
from training import build, metrics, nonfinite
from training.memory import budget, dry_run
from training.nonfinite import FILE
from training.offload import OffloadedAdamW
from weights.checkpoint import load_optimizer, read_config, save_optimizer

BAD_TOKEN = 505  # which only the samples that are to be found have


@pytest.fixture
def settings(tmp_path, tiny_model_dir):
    """`settings(train, **flags)`: those of a run on these samples."""

    def make(train, name="run", **flags):
        folder = tmp_path / f"data-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        write_data(folder, tiny_model_dir, train)
        defaults = dict(
            checkpoint_dir=tiny_model_dir, data_dir=folder, out_dir=tmp_path / name, precision="32-true",
            global_batch_size=6, micro_batch_tokens=24, learning_rate=1e-2, warmup_steps=0, eval_interval=0,
        )  # fmt: skip
        return finetune.Settings(**(defaults | flags))

    return make


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr(metrics, "plot_losses", lambda *_: None)


@pytest.fixture
def spoil(monkeypatch):
    """`spoil(f)` lets f(model) change the model of the runs to come. It gives what there was before the first step."""
    seen = {}

    def watch(change):
        build_model, build_optimizer = build.build_model, build.build_optimizer

        def build_bad_model(*args):
            model, config = build_model(*args)
            with torch.no_grad():
                change(model)
            seen.update(model=model, before=weights(model))
            return model, config

        def build_watched(s, model):
            seen["optimizer"] = build_optimizer(s, model)
            return seen["optimizer"]

        def offload_watched(model, s):
            seen["optimizer"] = OffloadedAdamW(model, s)
            return seen["optimizer"]

        monkeypatch.setattr(build, "OffloadedAdamW", offload_watched)
        monkeypatch.setattr(build, "build_model", build_bad_model)
        monkeypatch.setattr(build, "build_optimizer", build_watched)
        return seen

    return watch


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def with_bad_token(bad, N=6, sources=2):
    """Samples of which those with the numbers `bad` have BAD_TOKEN, in the prompt and in the answer."""
    train = [random_sample(3, 4, source=i % sources, vocab_size=500) for i in range(N)]
    for i in bad:
        train[i][0][1] = train[i][0][4] = BAD_TOKEN
    return train


def stopped(s):
    """The message of a run that must stop."""
    with pytest.raises(UserError) as caught:
        finetune.main(s)
    assert "\n" not in str(caught.value) and not (s.out_dir / "final").exists()
    return str(caught.value)


def blamed(message):
    """The numbers of the samples that a message names."""
    names = message.partition("training samples ")[2].partition(";")[0]
    return sorted(int(n) for n in re.findall(r"(\d+)(?: \([^)]*\))?(?:, |$)", names))


def assert_untouched(seen):
    after = weights(seen["model"])
    assert after.keys() == seen["before"].keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in seen["before"].items())
    assert not any(steps_done(seen))


def steps_done(seen):
    """Of each weight, by the optimiser's state."""
    return [state.get("step", 0) for state in seen["optimizer"].state.values()]


def plant_nan(model):
    model.model.embed_tokens.weight[BAD_TOKEN] = math.nan


def infinite_loss(model):
    """A token that is so unlikely that its loss overflows, while each output of a module is finite."""
    model.model.norm.weight.zero_()[0] = 1.0
    model.model.embed_tokens.weight[:, 0] += 100.0  # so the last norm's first output is far above zero
    model.lm_head.weight.zero_()[BAD_TOKEN, 0] = -3e38


IN_BACKWARD = dict(method="full", optimizer_in_backward=True, max_grad_norm=0.0, micro_batch_tokens=1000)
OFFLOADED = dict(method="full", offload="optimizer", max_grad_norm=0.0, micro_batch_tokens=1000)
KINDS = {
    "lora": {},
    "padded": dict(planner="sorted_in_step"),
    "full": dict(method="full"),
    "recomputed": dict(recompute=1.0, lora_dropout=0.2),
    "in backward": IN_BACKWARD,
    "in host memory": OFFLOADED,
    "in host memory, clipped": dict(method="full", offload="optimizer", micro_batch_tokens=20),
}


@pytest.mark.parametrize("flags", KINDS.values(), ids=KINDS)
def test_a_nan_in_a_weight_stops_before_the_step_and_names_the_samples(settings, spoil, flags):
    bad = sorted(random.sample(range(6), 2))
    s, seen = settings(with_bad_token(bad), **flags), spoil(plant_nan)
    message = stopped(s)
    assert message.startswith("step 1: the loss is nan; ") and blamed(message) == bad
    assert "model.embed_tokens.weight holds NaN or infinity" in message
    after = {name: p.nan_to_num(7.0) for name, p in weights(seen["model"]).items()}
    assert all(torch.equal(after[name], p.nan_to_num(7.0)) for name, p in seen["before"].items())
    assert not any(steps_done(seen)) and rows(s.out_dir) == []


@pytest.mark.parametrize("flags", KINDS.values(), ids=KINDS)
def test_an_infinite_loss_is_nobody_elses(settings, spoil, flags):
    """Its gradient may well be finite: an optimiser in the backward pass must have seen the loss before."""
    bad = [random.randrange(6)]
    s, seen = settings(with_bad_token(bad), **flags), spoil(infinite_loss)
    message = stopped(s)
    assert message.startswith("step 1: the loss is inf; ") and blamed(message) == bad
    assert "first in the loss" in message
    assert_untouched(seen)


def test_samples_are_named_by_number_source_and_row(settings, spoil):
    train = with_bad_token([1, 4])
    s = settings(train)
    with open(s.data_dir / "samples.jsonl", "w") as file:
        for part, N in (("train", 7), ("val", 7)):
            file.writelines(json.dumps({"part": part, "id": f"{part}.jsonl:{3 * i}"}) + "\n" for i in range(N))
    spoil(plant_nan)
    message = stopped(s)
    for name in ("1 (age, gender/v1.5, train.jsonl:3)", "4 (gsm8k, train.jsonl:12)"):
        assert name in message
    (s.data_dir / "samples.jsonl").write_text("{broken")
    shutil.rmtree(s.out_dir)
    assert "1 (age, gender/v1.5)" in stopped(s)


def infinite_gradient(model):
    """Positions with BAD_TOKEN get an infinite gradient on their way back through the second block."""
    place = {}
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: place.update(bad=args[0] == BAD_TOKEN))

    def overflow(_, args, output):
        if output.requires_grad:
            output.register_hook(lambda grad: grad.masked_fill(place["bad"][..., None], math.inf))

    model.model.layers[1].mlp.register_forward_hook(overflow)


@pytest.mark.parametrize(
    "flags", [{}, dict(method="full"), KINDS["in host memory, clipped"]], ids=["lora", "full", "in host memory"]
)
def test_an_infinite_gradient_stops_before_the_step_and_names_the_samples(settings, spoil, flags):
    bad = sorted(random.sample(range(6), 2))
    s, seen = settings(with_bad_token(bad), **flags), spoil(infinite_gradient)
    message = stopped(s)
    assert re.match("step 1: the gradient's norm is (nan|inf); ", message) and blamed(message) == bad
    assert "first in the gradient of model.layers.1.mlp.down_proj" in message
    assert_untouched(seen)


@pytest.mark.parametrize("flags", [IN_BACKWARD, OFFLOADED], ids=["in backward", "in host memory"])
def test_in_the_backward_pass_no_weight_steps_from_an_infinite_gradient_on(settings, spoil, flags):
    s, seen = settings(with_bad_token([2]), **flags), spoil(infinite_gradient)
    assert blamed(stopped(s)) == [2]
    after = weights(seen["model"])
    assert all(p.isfinite().all() for p in after.values())
    moved = {name for name, before in seen["before"].items() if not torch.equal(after[name], before)}
    assert moved and not any(".layers.0." in name or ".layers.1." in name for name in moved - {"lm_head.weight"})
    assert json.loads(nonfinite.safe_open(s.out_dir / FILE, "pt").metadata()["step"])["moved"]


def test_an_overflow_in_bf16_names_the_module(settings, spoil):
    """Finite weights whose product is too large."""

    def enlarge(model):
        model.model.embed_tokens.weight[BAD_TOKEN] *= 1e20
        model.model.layers[1].post_attention_layernorm.weight.fill_(1e15)
        model.model.layers[1].mlp.gate_proj.weight.fill_(1e15)
        model.model.layers[1].mlp.gate_proj.weight[::2] *= -1  # some gate is open, whatever the sign of its input
        model.model.layers[1].mlp.up_proj.weight.fill_(1e15)

    s = settings(with_bad_token([3]), precision="bf16-true", method="full")
    spoil(enlarge)
    message = stopped(s)
    assert "the loss is nan" in message and "holds NaN" not in message
    assert "first in the output of model.layers.1.mlp" in message


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"])
def test_an_overflow_in_one_of_several_adapted_layers_names_that_layer(settings, spoil, name):
    """Which LoRA computes together in training: their own forward would not run, nor a hook on them."""
    s = settings(with_bad_token([3]), precision="bf16-true")
    spoil(lambda model: model.model.layers[1].get_submodule(name).base.weight.fill_(3e38))
    assert f"first in the output of model.layers.1.{name}" in stopped(s)


def scaled(monkeypatch, **options):
    """Let runs in 16-mixed have a loss scaler on the CPU, where Fabric has none."""
    from lightning.fabric.plugins.precision import MixedPrecision

    start_fabric = build.start_fabric

    def start(s):
        fabric = start_fabric(s)
        scaler = torch.amp.GradScaler("cpu", growth_interval=10**6, **options)
        fabric.strategy.precision = fabric._precision = MixedPrecision("16-mixed", "cpu", scaler)
        return fabric

    monkeypatch.setattr(build, "start_fabric", start)


def test_a_loss_scale_may_be_searched_but_not_for_ever(settings, monkeypatch, spoil):
    monkeypatch.setattr(finetune, "SKIPPED_STEPS", 4)
    seen = spoil(lambda model: None)
    options = dict(precision="16-mixed", max_steps=9)
    with monkeypatch.context() as patch:
        scaled(patch, init_scale=2.0**120, backoff_factor=0.5)
        message = stopped(settings(random_samples(6), name="never", **options))
    assert message.startswith("step 4: after 4 steps in a row that were skipped the gradient's norm is ")
    assert len(blamed(message)) == 6
    assert_untouched(seen)
    scaled(monkeypatch, init_scale=2.0**60, backoff_factor=2.0**-16)
    s = settings(random_samples(6), name="found", **options)
    finetune.main(s)
    norms = column(s.out_dir, "grad_norm")
    assert 1 <= sum(not math.isfinite(norm) for norm in norms) <= 3 and math.isfinite(norms[-1])


# --------------------------------------------------------------------------------------------------- the kept step


def run_and_stop(s, monkeypatch, step):
    """Let a sound run stop at the end of a step (from 0), as if it were not. Returns that step's loss and norm."""
    calls, check = {"the loss": [], "the gradient's norm": []}, finetune.check_finite

    def find_fault(what, value):
        check(what, value)
        calls[what].append(value)
        if what == "the gradient's norm" and len(calls[what]) == step + 1:
            raise nonfinite.NotFinite(what, value)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "check_finite", find_fault)
        assert "no single sample causes it" in stopped(s)
    return calls["the loss"][-1], calls["the gradient's norm"][-1]


def replayed(s, capsys, **flags):
    capsys.readouterr()
    s.replay = s.out_dir / FILE
    finetune.main(s)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [
        dict(lora_dropout=0.3),
        dict(lora_dropout=0.3, recompute=1.0, quantize="bnb.nf4", method="dora", precision="bf16-true"),
        dict(method="full", planner="sorted_in_step"),
    ],
    ids=lambda flags: " ".join(map(str, flags.values())),
)
def test_the_replay_shows_the_same_numbers(settings, monkeypatch, capsys, flags):
    s = settings(random_samples(14), max_steps=5, **flags)
    loss, norm = run_and_stop(s, monkeypatch, 3)
    out = replayed(s, capsys)
    found = re.search(r"^loss (\S+), norm of the gradient (\S+)$", out, re.MULTILINE)
    assert float(found[1]) == loss and float(found[2]) == pytest.approx(norm, rel=1e-6)
    assert out.startswith(f"step 4, when the gradient's norm is {norm}: ") and out.endswith("not finite: nothing\n")
    assert len(re.findall(r"^sample \d+: loss", out, re.MULTILINE)) == 6
    modules = dict(re.findall(r"^  (\S+): (\S+)$", out, re.MULTILINE))
    assert math.hypot(*map(float, modules.values())) == pytest.approx(norm, rel=1e-4)
    assert any(name.endswith("layers.2.mlp.down_proj") for name in modules)


def test_the_replay_shows_who_is_to_blame(settings, spoil, capsys, monkeypatch):
    s = settings(with_bad_token([4]))
    with monkeypatch.context():
        spoil(infinite_loss)
        stopped(s)
        out = replayed(s, capsys)
    lines = {line.split()[1]: line for line in out.splitlines() if line.startswith("sample ")}
    assert sorted(lines) == list("012345")
    assert [number for number, line in lines.items() if "loss inf" in line or "loss nan" in line] == ["4"]
    assert out.startswith("step 1, when the loss is inf") and out.endswith("first not finite: the loss\n")


def test_the_kept_step_has_the_weights_before_it(settings, monkeypatch):
    s = settings(random_samples(9), max_steps=3, save_interval=1)
    run_and_stop(s, monkeypatch, 1)
    kept = load_file(s.out_dir / FILE)
    model, _ = build.build_model(s, "cpu", newest=s.out_dir / "step-000001")
    assert {name for name in kept if name.startswith("weights.")} == {f"weights.{name}" for name in weights(model)}
    assert all(torch.equal(kept[f"weights.{name}"], p) for name, p in weights(model).items())


def test_a_step_that_cannot_be_kept_leaves_nothing_and_is_explained_all_the_same(settings, spoil, monkeypatch):
    s = settings(with_bad_token([1]))
    spoil(plant_nan)

    flush = files.flush

    def fail(path):
        if FILE in path.name:
            raise OSError(28, "No space left on device")
        flush(path)

    monkeypatch.setattr(files, "flush", fail)
    message = stopped(s)
    assert blamed(message) == [1] and "could not be kept" in message and "No space left" in message
    assert not [path for path in s.out_dir.iterdir() if "bad_batch" in path.name]


def test_what_cannot_be_replayed_is_refused(settings, monkeypatch, tmp_path):
    s = settings(random_samples(9), max_steps=3)
    run_and_stop(s, monkeypatch, 1)
    kept = s.out_dir / FILE
    other = settings(random_samples(9), lora_r=3, replay=kept)
    with pytest.raises(UserError, match="lora_A is not as in this model"):
        finetune.main(other)
    broken = tmp_path / "broken.safetensors"
    for content in (None, b"", kept.read_bytes()[:-9], b"x" * 100, (s.data_dir / "train.safetensors").read_bytes()):
        if content is not None:
            broken.write_bytes(content)
        with pytest.raises(UserError, match="broken.safetensors is missing, damaged, or no bad_batch.safetensors"):
            finetune.main(settings(random_samples(9), replay=broken))


# ------------------------------------------------------------------------------------------------- what never starts


def test_optimiser_states_that_are_not_finite_are_refused(settings, tmp_path):
    s = settings(random_samples(6), max_steps=1, save_interval=1)
    finetune.main(s)
    folder = s.out_dir / "step-000001"
    model, _ = build.build_model(s, "cpu", newest=folder)
    optimizer = build.build_optimizer(s, model)
    load_optimizer(optimizer, folder)
    states = [state["exp_avg"] for state in optimizer.state.values()]
    random.choice(states).view(-1)[0] = math.inf
    save_optimizer(optimizer, tmp_path)
    (tmp_path / "scaler.json").write_text("{}")
    with pytest.raises(UserError, match=r"optimizer.safetensors: \d+.exp_avg holds NaN or infinity"):
        load_optimizer(build.build_optimizer(s, model), tmp_path)


# ------------------------------------------------------------------------------------------------- the memory dry run


def tokens_in(samples, indices):
    return samples.lengths[indices].sum().item()


@pytest.mark.parametrize("planner", PLANNERS)
def test_the_first_micro_batch_is_the_largest_of_the_whole_run(settings, monkeypatch, planner):
    s = settings(random_samples(25, 40, 40), epochs=3, global_batch_size=5, micro_batch_tokens=100, planner=planner)
    seen, forward, train_step = [], finetune.forward, finetune.train_step

    def watch(run, samples, indices):
        result = forward(run, samples, indices)
        seen.append(result.positions)
        return result

    monkeypatch.setattr(finetune, "forward", watch)
    monkeypatch.setattr(finetune, "train_step", lambda *args: seen.append("step") or train_step(*args))
    finetune.main(s)
    assert seen[1] == "step" and seen.count("step") == 15
    assert seen[0] == max(positions for positions in seen[1:] if positions != "step")


@pytest.mark.parametrize(
    "flags",
    [
        dict(lora_dropout=0.3),
        dict(method="dora", lora_dropout=0.3, recompute=1.0, precision="bf16-true", quantize="bnb.nf4"),
        dict(method="full", optimizer="adamw-8bit"),
        IN_BACKWARD,
    ],
    ids=lambda flags: " ".join(map(str, flags.values())),
)
def test_the_dry_run_changes_no_bit(settings, monkeypatch, flags):
    train, folders = random_samples(10), []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(finetune, "memory_dry_run", lambda *_: None)
        s = settings(train, name=name, max_steps=4, save_interval=4, **flags)
        finetune.main(s)
        folders.append(s.out_dir)
    a, b = folders
    assert rows(a) == rows(b) and final_weights(a).read_bytes() == final_weights(b).read_bytes()
    optimizers = [(folder / "step-000004" / "optimizer.safetensors").read_bytes() for folder in folders]
    assert optimizers[0] == optimizers[1]


def test_the_dry_run_holds_what_later_steps_hold(settings, monkeypatch):
    """Moments of as many bytes as the optimiser makes, and gradients; none of it once there are moments."""
    held, memory = [], budget.memory_of_later_steps

    def watch(s, model, optimizer, gradients):
        tensors = memory(s, model, optimizer, gradients)
        held.append((sum(t.nbytes for t in tensors), gradients))
        return tensors

    monkeypatch.setattr(budget, "memory_of_later_steps", watch)
    s = settings(random_samples(12), max_steps=1, save_interval=1, method="full")
    finetune.main(s)
    states = load_file(s.out_dir / "step-000001" / "optimizer.safetensors")
    moments = sum(t.nbytes for name, t in states.items() if "exp_avg" in name)
    assert held == [(moments, True)]


# ------------------------------------------------------------------------------------------------- out of memory

OUT_OF_MEMORY = """
import resource, sys
sys.path.insert(0, {root!r})
import finetune
from shell import cli
from ops.allocator import address_space
from pathlib import Path
s = finetune.Settings(checkpoint_dir=Path({model!r}), data_dir=Path({data!r}), out_dir=Path({out!r}), {flags})
dry_run = finetune.memory_dry_run
def limited(*args):
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + 150 * 2**20,) * 2)
    dry_run(*args)
finetune.memory_dry_run = limited
cli.run(finetune.main, s)
"""


def widen(folder, source, intermediate_size=20_000):
    """A copy of a model with so wide a feed-forward that a few positions take much memory."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": intermediate_size}
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Transformer(read_config(folder))
    save_file({name: 0.02 * torch.randn(p.shape) for name, p in model.named_parameters()}, folder / "model.safetensors")
    return folder


def test_memory_that_runs_out_on_a_cpu_is_one_line(settings, tmp_path, tiny_model_dir):
    """In a process whose addresses are limited, before the first step, with nothing in the next run's way."""
    s = settings([random_sample(100, 100) for _ in range(6)], checkpoint_dir=widen(tmp_path / "wide", tiny_model_dir))
    code = OUT_OF_MEMORY.format(
        root=str(ROOT), model=str(s.checkpoint_dir), data=str(s.data_dir), out=str(s.out_dir),
        flags="precision='32-true', global_batch_size=6, micro_batch_tokens=1200",
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert re.match(
        r"error: out of memory: \d+\.\d+ GB were taken, \d+\.\d+ GB more asked for, \d+\.\d+ GB free; ", line
    )
    assert len(re.findall(r"--(?:micro_batch_tokens \d+|recompute 1|quantize bnb.nf4-dq) \([\d.]+ GB\)", line)) >= 2
    assert "Traceback" not in done.stderr and not (s.out_dir / "metrics.csv").exists()


CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is "
    "free. Including non-PyTorch memory, this process has 77.9 GiB memory in use."
)


@pytest.mark.parametrize(
    "flags, ways",
    [
        (dict(), ["--micro_batch_tokens", "--recompute 1", "--quantize bnb.nf4-dq"]),
        (dict(method="full"), ["--micro_batch_tokens", "--recompute 1", "--optimizer adamw-8bit"]),
        (dict(method="full", recompute=1.0), ["--micro_batch_tokens", "--optimizer adamw-8bit"]),
        (dict(micro_batch_tokens=1), ["--recompute 1", "--quantize bnb.nf4-dq", "prepare_data.py --max_seq_length"]),
        (IN_BACKWARD, ["--recompute 1", "--optimizer adamw-8bit"]),
    ],
    ids=str,
)
def test_the_suggestions_help(settings, monkeypatch, flags, ways):
    """Each with the peak that the plan predicts for a run which takes it."""

    def run_out(*_):
        raise torch.OutOfMemoryError(CUDA_MESSAGE)

    s = settings(random_samples(12, 60, 60), **{"micro_batch_tokens": 300, **flags})
    monkeypatch.setattr(finetune, "forward", run_out)
    message = stopped(s)
    assert "2.68 GB more asked for" in message
    found = re.findall(r"((?:prepare_data.py )?--\S+ \S+) \((\S+) GB\)", message)
    assert [way for way, _ in found if any(way.startswith(name) for name in ways)] == [way for way, _ in found]
    assert len(found) == len(ways)
    train, now = open_samples(s.data_dir, "train"), float(re.search(r"peak of (\S+) GB", message)[1])
    for way, predicted in found:
        assert float(predicted) < now
        flag, value = way.removeprefix("prepare_data.py ").removeprefix("--").split()
        if flag != "max_seq_length":
            value = value if not value.isdigit() else type(getattr(s, flag))(value)
            changed = dataclasses.replace(s, **{flag: value})
            assert budget.predicted_peak(changed, train) / 1e9 <= 1.02 * float(predicted)


def test_other_errors_are_not_taken_for_a_lack_of_memory(settings, monkeypatch):
    def fail(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(finetune, "forward", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        finetune.main(settings(random_samples(4)))


def test_the_dry_run_takes_no_more_than_is_free(settings, monkeypatch):
    """Linux would grant it, and kill the process when it is used."""
    limits, seen = [], []

    @contextlib.contextmanager
    def limit(nbytes):
        limits.append(nbytes)
        yield
        limits.append(None)

    def watched(*args, forward=finetune.forward):
        seen.append(list(limits))
        return forward(*args)

    monkeypatch.setattr(dry_run, "free_memory", {"cpu": 12345}.get)
    monkeypatch.setattr(dry_run, "no_more_than", limit)
    monkeypatch.setattr(finetune, "forward", watched)
    finetune.main(settings(random_samples(4), max_steps=1))
    assert seen[0] == [12345] and len(seen) > 1 and all(later == [12345, None] for later in seen[1:])
