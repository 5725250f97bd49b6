"""The plan before the run: traced without memory against the same code on real tensors, budgets, and the command."""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import FAMILIES, ROOT, SMALL, write_tiny_tokenizer
from test_finetune import random_samples, write_data

import finetune
import lora
import model as model_file
from batching import open_samples
from bench.shapes import SHAPES as PUBLISHED
from model import IGNORE
from ops.cpp import compiled_library
from quantize import bitsandbytes
from shell.cli import UserError
from training.memory import budget, plan
from training.memory.allocations import Allocations, trace_step
from training.memory.plan import Job, Predictor, Shape
from training.metrics import read_rows
from training.optimizer import moment_bytes
from weights.checkpoint import load_model
from weights.families import config_from_json


def tiny_config(family="llama", layers=3, **changes):
    return config_from_json(
        {"model_type": family.partition("-")[0], **SMALL, **FAMILIES[family][1], "num_hidden_layers": layers, **changes}
    )


def tiny_job(kind, quantize=None, **changes):
    """lora, dora or full on three blocks: one more than is traced."""
    adapter = None if kind == "full" else lora.AdapterConfig(kind, r=4)
    return Job(**{"config": tiny_config(), "device": "cpu", "dtype": torch.float32, "quantize": quantize,
                  "adapter": adapter, **changes})  # fmt: skip


def real_model(job):
    """The model that `job` describes, with all its blocks, in memory."""
    model = plan.build(job, range(job.config.num_hidden_layers))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def real_batch(shape):
    tokens = torch.randint(3, SMALL["vocab_size"], (shape.rows, shape.T))
    targets = tokens.flatten().clone()
    targets[shape.targets :] = IGNORE
    return tokens, targets.view_as(tokens), shape.offsets and list(shape.offsets)


def real_trace(job, shape):
    """The `Allocations` of real tensors and all blocks, and for each block what it kept and its FLOPs."""
    model, allocations = real_model(job), Allocations()
    return allocations, trace_step(model, real_batch(shape), allocations, job)


def activations(predictor, shape):
    return predictor.peak(shape) - predictor.fixed.total()


SHAPES = (Shape(3, 24, 30), plan.packed_shape(150, 140, 100))  # padded rows, and a packed one
PACKED = SHAPES[1]
CASES = [
    ("lora", None, 0.0), ("lora", None, 0.5), ("lora", None, 1.0), ("dora", None, 0.5), ("dora", "bnb.nf4", 0.0),
    ("lora", "bnb.nf4", 0.5), ("lora", "bnb.nf4-dq", 1.0), ("lora", "bnb.int8", 0.0),
    ("full", None, 0.0), ("full", None, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "quantize", "recompute"), CASES)
def test_a_trace_without_memory_counts_what_real_tensors_take(kind, quantize, recompute):
    layers = 3 if recompute in (0, 1) else 6  # a run of like blocks, or two
    assert_traced_as_real(tiny_job(kind, quantize, config=tiny_config(layers=layers), recompute=recompute), PACKED)


def assert_traced_as_real(job, shape):
    (allocations, blocks), predictor = real_trace(job, shape), Predictor(job)
    assert blocks[1] == blocks[2] and blocks[4:5] == blocks[5:6]  # so two may stand for the others
    assert activations(predictor, shape) == pytest.approx(allocations.at_peak.total(), abs=64)
    assert predictor.flops(shape) == allocations.flops


@pytest.mark.parametrize("compiler", ["g++", "no-such-compiler"])
def test_bf16_on_a_cpu(compiler, monkeypatch):
    """With bf16 instructions, which this CPU may lack, and with and without compiled kernels."""
    monkeypatch.setattr("model.compute_dtype", lambda dtype, device: dtype)
    monkeypatch.setenv("CXX", compiler)
    compiled_library.cache_clear()
    assert_traced_as_real(tiny_job("lora", dtype=torch.bfloat16), PACKED)
    compiled_library.cache_clear()


@pytest.mark.parametrize("family", [*FAMILIES])
def test_every_family_and_its_windows(family):
    job = tiny_job("lora", config=tiny_config(family, layers=4))
    predictor = Predictor(job)
    for shape in SHAPES if any(job.config.windows) else SHAPES[:1]:
        assert activations(predictor, shape) == pytest.approx(real_trace(job, shape)[0].at_peak.total(), abs=64)


@pytest.mark.parametrize("gradients", ["new", "freed"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_gradients_that_come_as_activations_go(kind, gradients):
    job = tiny_job(kind, config=tiny_config(layers=4), gradients=gradients)
    predictor = Predictor(job)
    for shape in (Shape(1, 4, 2), PACKED):  # few positions: the gradients are larger than the activations
        real = real_trace(job, shape)[0].at_peak.total()
        assert activations(predictor, shape) == pytest.approx(real, rel=0.02, abs=64)


@pytest.mark.parametrize("chunk", [4096, 64])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_parked_inputs_and_chunks_are_counted(kind, chunk, monkeypatch):
    """On a CPU, where what is parked takes memory, too."""
    monkeypatch.setattr(model_file, "MLP_CHUNK", chunk)
    assert_traced_as_real(tiny_job(kind, config=tiny_config(layers=4), recompute="offload"), PACKED)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gradients", ["kept", "new", "freed"])
def test_gradients_on_their_way_to_host_memory_are_counted(gradients, shape):
    job = tiny_job("full", config=tiny_config(layers=4), gradients=gradients, offload="optimizer")
    assert activations(Predictor(job), shape) == pytest.approx(real_trace(job, shape)[0].at_peak.total(), abs=64)


def test_what_a_card_has_in_host_memory_is_counted_by_itself(capsys):
    """Block inputs of 192 positions, 48 wide, in bf16: 18,432 bytes, in pinned buffers of 32,768."""
    shape = plan.packed_shape(192, 192, 100)
    job = tiny_job("lora", config=tiny_config(layers=9), device="meta", dtype=torch.bfloat16, recompute=1.0)
    there, away = Predictor(job), Predictor(dataclasses.replace(job, recompute="offload"))
    assert there.host_peak(shape) == 0 and away.host_peak(shape) == 9 * 32768
    kept = [predictor.parts(shape)["saved activations"] for predictor in (there, away)]
    assert kept[0] - kept[1] >= 8 * 18432  # at the peak at least those of all blocks but one or two wait outside
    text = plan.describe(dataclasses.replace(job, recompute="offload"), [[shape]], 1e12, "a guess", 1)
    assert f"host memory            {9 * 32768 / 1e9:.3f} GB" in text
    assert "host memory" not in plan.describe(job, [[shape]], 1e12, "a guess", 1)


CARD = 24e9 - plan.CUDA_OVERHEAD


def largest_tensor(predictor, shape, monkeypatch):
    """Bytes of the largest tensor that a step creates."""
    sizes, add = [], Allocations._add
    with monkeypatch.context() as patch:
        patch.setattr(Allocations, "_add", lambda self, storage, counts: sizes.append(storage.nbytes()) or add(
            self, storage, counts))  # fmt: skip
        predictor.peak(shape)
    return max(sizes)


def test_a_context_of_32768_tokens_fits_a_card_of_24_gb(monkeypatch):
    """QLoRA of Llama-3.1-8B on all projections; nothing has a size of tokens times tokens or times vocabulary."""
    config, T = config_from_json(PUBLISHED["Llama-3.1-8B"]), 32768
    adapter = lora.AdapterConfig(r=16)
    job = Job(config, "meta", torch.bfloat16, quantize="bnb.nf4-dq", adapter=adapter, recompute="offload")
    predictor, shape = Predictor(job), plan.packed_shape(T, T, T - 1)
    largest = largest_tensor(predictor, shape, monkeypatch)
    peak, host = predictor.peak(shape), predictor.host_peak(shape)
    print(f"{peak / 1e9:.2f} GB on the card, {host / 1e9:.2f} GB in host memory, largest tensor {largest / 1e9:.2f} GB")
    assert peak < CARD / 1.7
    assert host == 32 * T * 4096 * 2
    assert largest <= T * 4096 * 4  # hidden states in fp32; an MLP's are 3.5 times as wide
    alone = Predictor(dataclasses.replace(job, recompute=1.0))
    assert largest_tensor(alone, shape, monkeypatch) >= T * 14336 * 2
    assert alone.peak(shape) - peak > 8e9


def test_full_finetuning_of_7b_fits_a_card_of_24_gb():
    """Llama-2-7B in bf16, with its AdamW in host memory: without, the states alone take twice as much as the card."""
    config, shape = config_from_json(PUBLISHED["Llama-2-7B"]), plan.packed_shape(2048, 2048, 2047)
    job = Job(config, "meta", torch.bfloat16, recompute=1.0, offload="optimizer")
    predictor = Predictor(job)
    peak, host, weights = predictor.peak(shape), predictor.host_peak(shape), 6_738_415_616
    print(f"{peak / 1e9:.2f} GB on the card, {host / 1e9:.2f} GB in host memory")
    assert 2 * weights < peak < 2 * weights + 2e9 < CARD
    assert 16 * weights < host < 16 * weights + 1e9
    once = Predictor(dataclasses.replace(job, gradients="freed"))
    assert 12 * weights < once.host_peak(shape) < 12 * weights + 2e9 and once.peak(shape) == peak
    assert Predictor(dataclasses.replace(job, offload=None)).peak(shape) > 2 * CARD


def test_a_allocations_counts_a_storage_once_and_until_it_dies():
    x = torch.ones(1000)
    with Allocations() as allocations:
        y = x * 2
        view = y[:10].view(2, 5)
        assert allocations.live.total() == 4000
        z = y + 1
        del y
        assert allocations.live.total() == 8000
        del view, z
        assert x.view(10, 100) is not None
    assert allocations.live.total() == 0
    assert allocations.at_peak.total() == 8000


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "adamw-paged"])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_moments_take_what_an_optimiser_makes(optimizer):
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((100, 50), (64, 64), (40,), (3, 700))]
    optim = bitsandbytes().optim
    kinds = {"adamw": torch.optim.AdamW, "adamw-8bit": optim.AdamW8bit, "adamw-paged": optim.PagedAdamW32bit}
    real = kinds[optimizer](parameters, lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    real.step()
    shared = ("step", "qmap1", "qmap2")  # a number, and tables that all parameters share
    for parameter in parameters:
        taken = sum(value.nbytes for key, value in real.state[parameter].items() if key not in shared)
        assert moment_bytes(tiny_job("full", optimizer=optimizer), [("", parameter)], "cpu") == taken


def test_weights_and_adapters_take_what_a_loaded_model_takes(tiny_model_dir):
    config = config_from_json(json.loads((tiny_model_dir / "config.json").read_text()))
    for quantize in (None, "bnb.nf4-dq"):
        model = load_model(tiny_model_dir, torch.bfloat16, quantize=quantize)
        lora.add_lora(model, lora.AdapterConfig())
        job = Job(config, "cpu", torch.bfloat16, quantize=quantize, adapter=lora.AdapterConfig())
        assert Predictor(job).fixed == plan.parameter_bytes(model, job)


def test_a_cuda_card_that_is_not_here_takes_no_square_of_the_length():
    predictor = Predictor(tiny_job("lora", config=tiny_config("llama-tied"), device="meta", dtype=torch.bfloat16))
    one, two = (predictor.parts(plan.packed_shape(T, T, T // 2))["saved activations"] for T in (512, 1024))
    assert two == pytest.approx(2 * one, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_on_a_card_that_is_not_here_is_counted(dtype):
    """A row in two samples or in one: forward two products of each sample's square, backward five, as a fused kernel
    makes the weights again."""
    job = tiny_job("lora", config=tiny_config("mistral"), device="meta", dtype=dtype)
    predictor = Predictor(job)
    one, two = (predictor.flops(plan.packed_shape(128, length, 60)) for length in (128, 64))
    heads, size = job.config.num_attention_heads, job.config.head_dim
    assert one - two == job.config.num_hidden_layers * 7 * 2 * heads * size * (128**2 - 2 * 64**2)


def test_planning_leaves_nothing_without_memory_behind(tiny_model_dir):
    config = config_from_json(json.loads((tiny_model_dir / "config.json").read_text()))
    state = torch.get_rng_state()
    Predictor(Job(config, "cpu", torch.float32, quantize="bnb.nf4-dq", adapter=lora.AdapterConfig())).peak(SHAPES[0])
    assert torch.equal(state, torch.get_rng_state())
    model = load_model(tiny_model_dir, torch.float32, quantize="bnb.nf4-dq")
    assert model(real_batch(SHAPES[0])[0]).isfinite().all()


# ------------------------------------------------------------------------------------------------------- operations


def test_operations_of_many_shapes_from_one():
    predictor = Predictor(tiny_job("lora", config=tiny_config(layers=1)))
    shapes = [plan.packed_shape(420, 140, 200), Shape(2, 170, 90), plan.packed_shape(300, 300, 20)]
    exact = sum(predictor.flops(shape) for shape in shapes)
    assert plan.step_flops(predictor, shapes) == pytest.approx(exact, rel=0.02)


# ---------------------------------------------------------------------------------------------------------- budgets


def test_the_largest_micro_batch_fits_and_a_larger_one_does_not(settings):
    samples = open_samples(settings().data_dir, "train")
    predictor = Predictor(tiny_job("lora", config=tiny_config(layers=1)))
    longest, found = samples.lengths[:].max().item(), []
    for extra in (0, 200):
        budget = predictor.peak(plan.full_shape(samples, longest + extra)) + 1
        tokens = plan.largest_micro_batch(predictor, samples, 6, budget)
        assert predictor.peak(plan.full_shape(samples, tokens)) <= budget
        assert predictor.peak(plan.full_shape(samples, tokens + plan.TOKEN_STEP)) > budget
        found.append(tokens)
    assert longest == found[0] < found[1]
    assert (
        plan.largest_micro_batch(predictor, samples, 6, 1e12) >= samples.lengths[:].topk(6).values.sum()
    )  # all of a step
    assert plan.largest_micro_batch(predictor, samples, 6, 1e5) == 0


@pytest.fixture
def settings(tmp_path, tiny_model_dir):
    """Settings over a folder without weights, unless `checkpoint_dir` says otherwise."""
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model_dir, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    data = write_data(tmp_path / "data", tiny_model_dir, random_samples(16, 60, 40))

    def make(**flags):
        defaults = dict(checkpoint_dir=bare, data_dir=data, out_dir=tmp_path / "run", precision="32-true",
                        global_batch_size=8, learning_rate=1e-2)  # fmt: skip
        return finetune.Settings(**(defaults | flags))

    return make


def test_what_fits_in_a_budget_fits_with_the_samples_of_the_run(settings):
    s = settings(micro_batch_tokens="auto", memory_budget="4MB")
    samples = open_samples(s.data_dir, "train")
    budget.choose_micro_batch(s, samples)
    assert isinstance(s.micro_batch_tokens, int) and s.memory_budget is None
    assert budget.predicted_peak(s, samples) <= 4e6


def test_a_budget_that_nothing_fits_names_the_way_out(settings):
    s = settings(micro_batch_tokens="auto", memory_budget="0.1MB")
    with pytest.raises(UserError, match="0.00 GB: raise --recompute"):
        finetune.main(s)
    assert not s.out_dir.exists()


# ------------------------------------------------------------------------------------------------------ the command


def test_a_plan_needs_no_weights_and_writes_nothing(settings, capsys):
    s = settings(plan=True, plan_tflops=0.5)
    finetune.main(s)
    out = capsys.readouterr().out
    for words in (*plan.PARTS, "TFLOP a step", "2 steps", "0.5 TFLOP/s (--plan_tflops)"):
        assert words in out
    assert not s.out_dir.exists()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_flags_of_adapters_that_change_nothing_are_named(settings, capsys, method):
    s = settings(plan=True, plan_tflops=1, method=method, lora_r=3, lora_targets=["q_proj"])
    finetune.main(s)
    note = "note: --lora_r, --lora_targets change nothing with --method full"
    assert (note in capsys.readouterr().err) == (method == "full")
    assert settings(method="full").changed("lora_") == []


def test_the_time_of_a_plan_is_of_all_devices(settings, capsys):
    for devices in (1, 4):
        finetune.main(settings(plan=True, plan_tflops=0.5, devices=devices))
    one, four = capsys.readouterr().out.split("TFLOP a step: ")[1:]
    assert float(one.split()[0]) == pytest.approx(4 * float(four.split()[0]), rel=0.02)
    assert "(--plan_tflops, times 4 devices)" in four and "devices" not in one


def test_a_plan_says_how_much_recomputation_is_needed(settings, capsys):
    s = settings(plan=True, plan_tflops=1, quantize="bnb.nf4", recompute=0.75, global_batch_size=2)
    samples = open_samples(s.data_dir, "train")
    longest = plan.full_shape(samples, samples.lengths[:].max().item())
    most_of_them, all_of_them = (
        Predictor(budget.plan_job(dataclasses.replace(s, recompute=share))).peak(longest) for share in (0.75, 1.0)
    )
    assert all_of_them < most_of_them
    finetune.main(dataclasses.replace(s, memory_budget=f"{(all_of_them + 8) / 1e6:.6f}MB"))
    first, *_, last = capsys.readouterr().out.partition("\n--method")[0].splitlines()
    assert "with --recompute 0.75 the longest sample does not fit" in first
    assert "--micro_batch_tokens" in last and "fit" in last


def test_auto_lands_in_the_run_and_resumes(settings, tiny_model_dir, monkeypatch):
    monkeypatch.setattr("training.metrics.plot_losses", lambda *_: None)
    flags = dict(checkpoint_dir=tiny_model_dir, micro_batch_tokens="auto", save_interval=2)
    s = settings(**flags, memory_budget="4MB", max_steps=2)
    finetune.main(s)
    tokens = json.loads((s.out_dir / "step-000002" / "settings.json").read_text())["micro_batch_tokens"]
    assert (
        tokens == s.micro_batch_tokens and f"micro_batch_tokens: {tokens}\n" in (s.out_dir / "config.yaml").read_text()
    )
    summary = json.loads((s.out_dir / "summary.json").read_text())
    ratio = summary["predicted_memory_gb"] / summary["measured_memory_gb"]
    assert summary["predicted_over_measured"] == pytest.approx(ratio)
    again = settings(**flags, memory_budget="3MB", max_steps=2, resume=True)  # the run keeps its own
    finetune.run_folder.newest_checkpoint(again)
    assert again.micro_batch_tokens == tokens


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory):
    """`wide_run(*flags)`: 24 steps of finetune.py, whose micro-batches take 0.2 GB and more, as its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, runs = tmp_path_factory.mktemp("wide"), itertools.count()
    config = LlamaConfig(**SMALL | dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=4))
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    write_tiny_tokenizer(folder / "model")
    write_data(folder / "data", folder / "model", random_samples(400, 120, 100))

    def run(*flags):
        out = folder / f"run-{next(runs)}"
        steps = ["--max_steps", "24", "--global_batch_size", "12", "--eval_interval", "0", "--save_interval", "0"]
        folders = ["--checkpoint_dir", folder / "model", "--data_dir", folder / "data", "--out_dir", out]
        command = [sys.executable, ROOT / "finetune.py", *folders, *steps, *flags]
        # As many threads as a user's run has: conftest.py's one thread is for the speed of the other tests.
        users = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT, env=users)
        assert done.returncode == 0, done.stderr[-2000:]
        return out

    return run


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--lora_dropout", "0.1"),
        ("--precision", "32-true", "--lora_dropout", "0.1", "--micro_batch_tokens", "1024"),
        ("--quantize", "bnb.nf4", "--precision", "32-true"),
        ("--micro_batch_tokens", "auto", "--memory_budget", "200MB"),
        ("--recompute", "offload"),
        ("--method", "full", "--offload", "optimizer", "--learning_rate", "1e-4"),
    ],
)
def test_a_run_takes_what_the_plan_says_and_no_more_with_every_step(flags, wide_run):
    """Rows of ever new lengths once left holes in the heap: twice the memory, and more with each step."""
    out = wide_run(*flags)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["measured_memory_gb"] <= summary["predicted_memory_gb"] + plan.CPU_OVERHEAD / 1e9
    peaks = [float(row["memory_gb"]) for row in read_rows(out / "metrics.csv")[1]]
    assert peaks[-1] - peaks[11] < 0.02  # the first steps still bring pages of libraries, and blocks of new sizes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--memory_budget", "24"), "expected a size such as 24GB"),
        (("--memory_budget", "0GB"), "expected a size such as 24GB"),
        (("--memory_budget", "24GB"), "needs --plan or --micro_batch_tokens auto"),
        (("--micro_batch_tokens", "many"), "expected a whole number or one of auto"),
        (("--plan", "--plan_tflops", "0"), "--plan_tflops 0"),
        (("--plan_tflops", "3"), "--plan_tflops 3 needs --plan"),
        (("--devices", "2", "--micro_batch_tokens", "auto"), "auto needs --memory_budget with several --devices"),
        (("--devices", "2", "--micro_batch_tokens", "auto", "--plan"), "y/data.json does not exist"),  # made by one
    ],
)
def test_bad_flags_are_one_line(flags, message, run_script):
    code, out, err = run_script("finetune.py", "--checkpoint_dir", "x", "--data_dir", "y", *flags)
    assert (code, len(err.splitlines())) == (2, 1), err
    assert message in err


@functools.cache
def shared_matrix(in_features, device):
    return torch.zeros(1000, in_features, device=device)


class Shared(lora.Adapter):
    """Its matrix is one for all layers of a size, as VeRA's."""

    def __init__(self, base, r, alpha, dropout=0.0, rslora=False):
        super().__init__(base)
        self.register_buffer("A", shared_matrix(self.in_features, self.device), persistent=False)
        self.b = torch.nn.Parameter(torch.zeros(self.out_features, device=self.device))

    def forward(self, x):
        return self.base(x) + (x @ self.A.T).sum(-1, keepdim=True) * self.b


def test_what_adapters_share_counts_once(monkeypatch):
    """Of five like blocks two are traced, and the second stands for three more."""
    monkeypatch.setitem(lora.ADAPTERS, "shared", Shared)
    monkeypatch.setattr(lora, "shared_matrix", shared_matrix, raising=False)  # where a plan finds it, to forget it
    config = tiny_config(layers=5)
    with_shared, without = (
        Predictor(Job(config, "cpu", torch.float32, adapter=lora.AdapterConfig(kind, r=1, targets=("q_proj",)))).fixed
        for kind in ("shared", "lora")
    )
    assert with_shared["weights"] - without["weights"] == 4 * 1000 * config.hidden_size
