"""Every --method over three kinds of model: it trains, resumes, is planned, merges or says why not, and generates."""

import json
import shutil

import pytest
import torch
from conftest import MODELS, Ids
from test_finetune import random_samples, rows, write_data

import convert_hf_checkpoint
import finetune
from adapters.virtual_tokens import virtual_ids
from batching import open_samples
from inference import decode, scoring
from inference.sampling import generate
from inference.writer import Writer
from lora import ADAPTERS, AdapterConfig, add_lora
from shell.cli import UserError
from training import metrics
from training.memory import plan
from training.settings import Settings
from weights.checkpoint import load_model

UNMERGEABLE = ("prompt", "prefix", "llama-adapter", "llama-adapter-v2")
N = 3  # virtual tokens
HAS_BIASES = ("llama", "gpt_neox")


def all_pairs():
    pairs = [(kind, family) for kind in ADAPTERS for family in MODELS if kind != "bitfit" or family in HAS_BIASES]
    return pytest.mark.parametrize(("kind", "family"), pairs)


HOW = {  # flags that go with each kind of model, so that every method meets each
    "llama": dict(planner="packed", recompute=0.5),
    "gpt_neox": dict(planner="packed", quantize="bnb.nf4"),
    "mixtral": dict(planner="sorted_in_step", quantize="bnb.nf4-dq", recompute=1.0),
}


@pytest.fixture
def settings(tmp_path, model_dirs, monkeypatch):
    monkeypatch.setattr(metrics, "plot_losses", lambda *_: None)

    def make(kind, family, name="run", **flags):
        data, folder = tmp_path / f"data-{family}", model_dirs(family)
        if not data.exists():
            write_data(data, folder, random_samples(8), random_samples(2))
        defaults = dict(
            checkpoint_dir=folder, data_dir=data, out_dir=tmp_path / name, method=kind, precision="32-true",
            global_batch_size=8, micro_batch_tokens=70, learning_rate=0.03, warmup_steps=0, max_steps=6,
            save_interval=3, eval_interval=3, schedule="constant", lora_r=4, lora_alpha=8, virtual_tokens=N,
            adapter_layers=2 if kind.startswith("llama") else None,
        )  # fmt: skip
        if kind == "llama-adapter":  # its gate starts at zero, and so does its prompt's gradient
            defaults["learning_rate"] = 0.2
        return Settings(**(defaults | flags))

    return make


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}


@all_pairs()
def test_trains_resumes_generates_and_merges(kind, family, settings, tmp_path, capsys):
    s = settings(kind, family, **HOW[family])
    finetune.main(s)
    losses = [row["loss"] for row in rows(s.out_dir)]
    assert losses[-1] < losses[0] - 0.02, losses
    shutil.copytree(s.out_dir, tmp_path / "resumed")
    for name in ("final", "step-000006"):
        shutil.rmtree(tmp_path / "resumed" / name)
    finetune.main(settings(kind, family, "resumed", resume=True, **HOW[family]))
    for name in ("final", "step-000006"):
        one, two = bytes_of(s.out_dir / name), bytes_of(tmp_path / "resumed" / name)
        one.pop("settings.json", None), two.pop("settings.json", None)
        one.pop("manifest.json", None), two.pop("manifest.json", None)
        assert one.keys() == two.keys() and [key for key in one if one[key] != two[key] and key != "run.json"] == []
    check_merge(kind, s.out_dir / "final", tmp_path / "merged")
    check_text(Writer(None, s.out_dir / "final", None, "32-true"))


def check_merge(kind, adapter_dir, out_dir):
    """Base and adapter as one model, or one line that says why not, and nothing written."""
    s = convert_hf_checkpoint.Settings(adapter_dir=adapter_dir, out_dir=out_dir)
    if kind in UNMERGEABLE:
        with pytest.raises(UserError, match=f"a {kind} adapter cannot be merged"):
            convert_hf_checkpoint.main(s)
        assert not out_dir.exists()
        return
    convert_hf_checkpoint.main(s)
    tokens = torch.randint(3, 512, (2, 17))
    base = json.loads((adapter_dir / "onetune.json").read_text())
    with torch.no_grad():
        tuned = load_model(base["checkpoint_dir"], torch.float32, "cpu", base["quantize"], adapter_dir)(tokens)
        plain = load_model(base["checkpoint_dir"], torch.float32, "cpu", base["quantize"])(tokens)
        merged = load_model(out_dir, torch.float32)(tokens)
    assert (merged - tuned).norm() / tuned.norm() < 1e-4 < 5e-3 < (plain - tuned).norm() / tuned.norm()


@torch.no_grad()
def check_text(writer):
    """What a decoder goes on with is what whole forward passes do, alone and in a batch, chunk by chunk."""
    prompts = [torch.randint(3, 512, (length,)).tolist() for length in (1, 9, 4)]
    for decoder in (writer.decoder, decode.StaticDecoder(writer.model), decode.PlainDecoder(writer.model)):
        for given in (prompts, prompts[1:2]):
            found = greedy(decoder, given)
            for prompt, ids in zip(given, found, strict=True):
                check_greedy(writer.model, prompt, ids)
    requests = [(prompts[1], prompts[0]), (prompts[1], prompts[2]), (prompts[2], prompts[1])]
    for one, two in zip(
        scoring.score(writer.model, requests), (scoring.plain_score(writer.model, *r) for r in requests), strict=True
    ):
        assert one.logprob == pytest.approx(two.logprob, abs=1e-3)
    ids = torch.tensor([virtual_ids(writer.model) + sum(requests[0], [])])
    logprobs = writer.model(ids)[0, -2].log_softmax(-1)
    assert scoring.plain_score(writer.model, *requests[0]).logprob == pytest.approx(
        logprobs[ids[0, -1]].item(), abs=1e-3
    )


class Greedy:
    max_new_tokens, temperature, top_k, top_p, min_p = 5, 0.0, 0, 1.0, 0.0
    repetition_penalty, frequency_penalty, presence_penalty = 1.0, 0.0, 0.0


def greedy(decoder, prompts):
    replies = [Ids() for _ in prompts]
    for _ in generate(decoder, prompts, replies, Greedy(), [0] * len(prompts)):
        pass
    return [reply.ids for reply in replies]


def check_greedy(model, prompt, ids):
    """Each id is the likeliest by a forward pass over all before it, or as good as that."""
    before = virtual_ids(model) + prompt
    logits = model(torch.tensor([before + ids]))[0, len(before) - 1 : -1]
    best, chosen = logits.amax(-1), logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert (chosen > best - 2e-3).all()


@pytest.fixture
def with_adapter(model_dirs):
    """`with_adapter(kind, family)`: a model in training, all of its trained numbers away from their start."""

    def make(kind, family, quantize=None):
        torch.manual_seed(7)
        model = load_model(model_dirs(family), torch.float32, quantize=quantize)
        targets = ("q_proj", "v_proj", "o_proj") if family == "mixtral" else ("q_proj", "v_proj", "down_proj")
        add_lora(model, AdapterConfig(kind, 3, 6, targets=targets, virtual_tokens=N, adapter_layers=2))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model.train()

    return make


def gradients(model, micro_batches, **how):
    model.zero_grad()
    for tokens, targets, offsets in micro_batches:
        model(tokens, targets, offsets=offsets, **how).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@all_pairs()
def test_the_gradient_is_the_same_for_every_layout(kind, family, with_adapter, tmp_path, model_dirs):
    """One sample by one, packed, padded, recomputed; the second and the third are also cut."""
    model = with_adapter(kind, family, "bnb.nf4" if family == "mixtral" else None)
    samples = open_samples(write_data(tmp_path / "data", model_dirs(family), random_samples(5)), "train")
    lengths = samples.lengths[:]
    samples.prepend(virtual_ids(model))
    assert (samples.lengths[:] == lengths + len(virtual_ids(model))).all()
    every = list(range(5))
    expected = gradients(model, [samples.padded([i]) for i in every])
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for batches, how in (
        ([samples.packed(every)], {}), ([samples.padded(every)], {}), ([samples.packed(every)], {"recompute": 1.0}),
        ([samples.packed([0, 3]), samples.padded([4, 2, 1])], {"recompute": 0.4}),
        ([samples.packed(every)], {"recompute": "offload"}),
    ):  # fmt: skip
        found = gradients(model, batches, **how)
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


@all_pairs()
def test_a_run_is_planned(kind, family, settings, with_adapter, capsys):
    """--plan counts what trains; the model that it traces has just the parameters of the real one."""
    s = settings(kind, family, plan=True, **HOW[family])
    finetune.main(s)
    out = capsys.readouterr().out
    assert "adapters" in out and f"--method {kind}" in out
    from training.memory.budget import plan_job

    job = plan_job(s)
    predictor = plan.Predictor(job)
    skeleton = load_model(s.checkpoint_dir, torch.float32, quantize=s.quantize)
    add_lora(skeleton, job.adapter)
    trained = sum(p.nbytes for p in skeleton.parameters() if p.requires_grad)
    assert predictor.fixed["adapters"] == trained
    assert predictor.fixed["moments"] == 2 * trained


def test_what_changes_nothing_is_noted(settings, capsys):
    finetune.main(settings("ia3", "llama", plan=True))
    err = capsys.readouterr().err
    assert "note: --lora_r, --lora_alpha, --virtual_tokens change nothing with --method ia3" in err


def test_a_model_without_biases(settings):
    with pytest.raises(UserError, match="--method bitfit: this mixtral model has no biases"):
        finetune.main(settings("bitfit", "mixtral"))


# -------------------------------------------------------------------------------------------- freezing by pattern


@pytest.mark.parametrize(
    "flags", [{}, {"optimizer_in_backward": True, "max_grad_norm": 0.0, "micro_batch_tokens": 900}]
)
@pytest.mark.parametrize(
    ("family", "train", "expected"),
    [
        ("llama", "layers.1.*", lambda name: ".layers.1." in name),
        ("gpt_neox", ["*norm*", "lm_head.weight"], lambda name: "norm" in name or name == "lm_head.weight"),
        ("mixtral", r"layers\.(0|2)\..*_proj\.weight", lambda name: name[13] in "02" and name.endswith("_proj.weight")),
    ],
)
def test_only_what_is_named_trains(family, train, expected, flags, settings, model_dirs, tmp_path, capsys):
    flags = {"train": train, "learning_rate": 0.01, **flags}
    finetune.main(settings("full", family, plan=True, **flags))
    s = settings("full", family, **flags)
    finetune.main(s)
    before, after = load_model(model_dirs(family), torch.float32), load_model(s.out_dir / "final", torch.float32)
    changed = {
        n for (n, p), q in zip(before.named_parameters(), after.parameters(), strict=True) if not torch.equal(p, q)
    }
    assert changed == {name for name, _ in before.named_parameters() if expected(name)}
    losses = [row["loss"] for row in rows(s.out_dir)]
    assert losses[-1] < losses[0] - 0.02
    shutil.copytree(s.out_dir, tmp_path / "resumed")
    for name in ("final", "step-000006"):
        shutil.rmtree(tmp_path / "resumed" / name)
    finetune.main(settings("full", family, "resumed", resume=True, **flags))
    one, two = ((folder / "final" / "model.safetensors").read_bytes() for folder in (s.out_dir, tmp_path / "resumed"))
    assert one == two


def test_the_plan_counts_only_what_trains(settings):
    from training.memory.budget import plan_job

    s = settings("full", "llama", train="layers.1.mlp.*")
    predictor, model = plan.Predictor(plan_job(s)), load_model(s.checkpoint_dir, torch.float32)
    trained = sum(p.nbytes for name, p in model.named_parameters() if ".layers.1.mlp." in name)
    assert predictor.fixed["moments"] == 2 * trained and predictor.fixed["gradients"] == trained
    assert predictor.fixed["weights"] == sum(p.nbytes for p in model.parameters())
