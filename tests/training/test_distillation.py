"""--objective distill: the loss against whole distributions, what is kept of the teacher, runs that learn from one."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, write_tiny_tokenizer
from safetensors.torch import load_file, save_file
from test_finetune import final_weights, random_samples, randomise_adapters, rows, run_on_cpus, write_data

import finetune
from batching import IGNORE, Batch, Samples
from finetune import Settings
from objectives import Distillation, distances_from_teacher
from shell.cli import UserError
from training import build, metrics, teacher
from weights.checkpoint import load_model

MORE = 5  # tokens that only the teacher has
WEIGHT, TEMPERATURE, K = 0.7, 2.5, 6


@pytest.fixture
def teacher_dir(model_dirs):
    """A model of another shape, with a few tokens more, that is surer than the student."""
    return model_dirs("mistral", std=0.4, hidden_size=48, head_dim=12, vocab_size=SMALL["vocab_size"] + MORE)


@pytest.fixture
def settings(tmp_path, model_dirs, teacher_dir, monkeypatch):
    """`settings(name, family, **flags)`: of a run of four steps that learns from the teacher."""
    monkeypatch.setattr(metrics, "plot_losses", lambda *_: None)
    data = write_data(tmp_path / "data", model_dirs("llama"), random_samples(8), random_samples(2))

    def make(name="run", family="llama", **flags):
        defaults = dict(
            checkpoint_dir=model_dirs(family), data_dir=data, out_dir=tmp_path / name, precision="32-true",
            objective="distill", teacher_dir=teacher_dir, teacher_top_k=K, teacher_weight=WEIGHT,
            teacher_temperature=TEMPERATURE, global_batch_size=8, micro_batch_tokens=60, learning_rate=0.02,
            warmup_steps=0, max_steps=4, save_interval=2, eval_interval=2, schedule="constant", lora_r=4,
        )  # fmt: skip
        return Settings(**(defaults | flags))

    return make


@pytest.fixture
def run(settings):
    """`run(name, family, **flags)`: such a run, its folder."""

    def train(*args, **flags):
        s = settings(*args, **flags)
        finetune.main(s)
        return s.out_dir

    return train


# ---------------------------------------------------------------------------------------------------------- the loss


def grouped_kl(teacher_logits, logits, k, temperature):
    """KL(teacher | model) in fp64, where all but the teacher's k likeliest tokens are one; (n,) of logits (n, V)."""
    p, q = ((each.double() / temperature).softmax(-1) for each in (teacher_logits, logits))
    ids = p.argsort(dim=-1, descending=True)
    p, q = p.gather(1, ids), q.gather(1, ids)
    p, q = (torch.cat([each[:, :k], each[:, k:].sum(1, keepdim=True)], dim=1) for each in (p, q))
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(1)


class Given:
    """A teacher whose hidden states are its logits."""

    def at_targets(self, x, targets):
        return x[targets != IGNORE], targets[targets != IGNORE]

    def logits(self, x):
        return x


@pytest.mark.parametrize("k", [1, 6, 29, 30])
@pytest.mark.parametrize("spread", [0.1, 3, 40])
def test_the_distance_is_that_of_whole_distributions(k, spread):
    """And of its gradient; however sure teacher and model are."""
    of_teacher, logits = spread * torch.randn(1, 11, 30), (spread * torch.randn(11, 30)).requires_grad_()
    targets = torch.randint(30, (11,))
    ids, logps = teacher.likeliest(Given(), of_teacher, targets[None], k, 30, TEMPERATURE)
    assert ids.shape == (11, k) and logps.shape == (11, k + (k < 30))
    torch.testing.assert_close(logps.exp().sum(1), torch.ones(11))
    cross_entropy, kl, agrees = distances_from_teacher(logits, targets, ids, logps, TEMPERATURE)
    torch.testing.assert_close(cross_entropy, F.cross_entropy(logits, targets, reduction="none"))
    expected = grouped_kl(of_teacher[0], logits, k, TEMPERATURE)
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(agrees, of_teacher[0].argmax(-1) == logits.argmax(-1))
    ours, theirs = (torch.autograd.grad(each.sum(), logits)[0] for each in (kl, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_distance_grows_with_k_to_that_over_all_tokens():
    of_teacher, logits = 2 * torch.randn(1, 50, 30), 2 * torch.randn(50, 30)
    targets, found = torch.randint(30, (50,)), []
    for k in (1, 3, 10, 29, 30):
        known = teacher.likeliest(Given(), of_teacher, targets[None], k, 30, 1.0)
        found.append(distances_from_teacher(logits, targets, *known, 1.0)[1].mean().item())
    assert found == sorted(found) and found[-2] == pytest.approx(found[-1], rel=1e-4)
    whole = F.kl_div(logits.log_softmax(-1), of_teacher[0].log_softmax(-1), reduction="none", log_target=True)
    assert found[-1] == pytest.approx(whole.sum(1).mean().item(), rel=1e-5)


def written_out(student, teacher_model, samples):
    """-log p, KL and the combined loss of every target of all samples in turn, with logits of all positions."""
    losses, distances, vocab_size = [], [], SMALL["vocab_size"]
    for i in range(len(samples)):
        inputs, targets = samples.inputs_and_targets(i)
        counts = targets != IGNORE
        logits = student(inputs[None])[0][counts]
        with torch.no_grad():
            of_teacher = teacher_model(inputs[inputs < vocab_size][None])[0, -len(targets) :, :vocab_size]
        of_teacher = of_teacher[counts[-len(of_teacher) :]]
        losses.append(F.cross_entropy(logits, targets[counts], reduction="none"))
        distances.append(grouped_kl(of_teacher, logits, K, TEMPERATURE))
    losses, distances = torch.cat(losses), torch.cat(distances)
    return losses, distances, (1 - WEIGHT) * losses + WEIGHT * TEMPERATURE**2 * distances


@pytest.mark.parametrize("flags", [{}, {"planner": "sorted_in_step"}, {"method": "prefix", "virtual_tokens": 3}])
def test_the_first_step_is_that_written_out(flags, run, settings, teacher_dir):
    """In packed and padded rows; virtual tokens are the student's alone. The loss then falls."""
    first, *_, last = rows(run(**flags))
    s = settings(**flags)
    torch.manual_seed(s.seed)
    student, _ = build.build_model(s, torch.device("cpu"), None)
    samples = build.open_data(s).train
    losses, distances, combined = written_out(student.eval(), load_model(teacher_dir, torch.float32), samples)
    assert first["cross_entropy"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert first["teacher_kl"] == pytest.approx(distances.mean().item(), rel=1e-5)
    assert first["loss"] == pytest.approx(combined.mean().item(), rel=1e-5)
    assert last["loss"] < first["loss"] - 0.01
    assert 0 <= first["teacher_agreement"] <= 1 and "val_teacher_kl" in last and "val_perplexity" not in last


def test_the_gradient_is_that_written_out(settings, teacher_dir, monkeypatch):
    monkeypatch.setattr("model.LOSS_CHUNK", 5)
    s = settings()
    data, fabric = build.open_data(s), build.start_fabric(s)
    teacher.prepare(s, fabric, data, {"data": "some"})
    student, _ = build.build_model(s, fabric.device, None)
    randomise_adapters(student)
    trainable = [p for p in student.parameters() if p.requires_grad]
    combined = written_out(student, load_model(teacher_dir, torch.float32), data.train)[2]
    theirs = torch.autograd.grad(combined.sum(), trainable)
    objective, everything = Distillation(s), [*range(len(data.train))]
    batch = Batch(*data.train.packed(everything), objective.known(data.train, everything))
    ours = torch.autograd.grad(objective(student, batch).trained, trainable)
    for one, two in zip(ours, theirs, strict=True):
        assert one.norm() > 0
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5 * two.abs().max().item())


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("flags", [
    {"family": "llama", "recompute": 0.5}, {"family": "llama", "method": "full", "learning_rate": 1e-3},
    {"family": "gpt_neox", "quantize": "bnb.nf4", "teacher_quantize": "bnb.nf4"},
    {"family": "mixtral", "quantize": "bnb.nf4-dq", "recompute": "offload", "balance_loss": 0.01},
    {"family": "llama", "optimizer": "mezo", "learning_rate": 1e-3},
])  # fmt: skip
def test_learns_and_resumes_to_the_same_bytes(flags, run):
    whole = run("whole", **flags)
    first, *_, last = rows(whole)
    assert last["loss"] < first["loss"] or flags.get("optimizer") == "mezo"
    half = run("half", **flags)
    shutil.rmtree(half / "final")
    shutil.rmtree(half / "step-000004")
    resumed = run("half", resume=True, **flags)
    assert final_weights(whole).read_bytes() == final_weights(resumed).read_bytes()
    assert rows(whole) == rows(resumed)


def test_the_head_learns_too(run):
    flags = {"lora_targets": ["q_proj", "lm_head"], "teacher_weight": 1.0}
    first, *_, last = rows(run(**flags))
    assert last["teacher_kl"] < first["teacher_kl"]


def test_two_devices_share_the_reading(run, settings, run_script):
    """And the file is the same, but for the rounding of other micro-batches."""
    flags = dict(max_steps=3, micro_batch_tokens=30, learning_rate=1e-3)
    one = run("one", **flags)
    (path,) = settings().data_dir.glob("teacher-*.safetensors")
    alone = load_file(path)
    path.unlink()
    s = settings("two", devices=2, **flags)
    run_on_cpus(run_script, s)
    together = load_file(path)
    for name, tensor in alone.items():
        assert tensor.abs().sum() > 0
        torch.testing.assert_close(together[name], tensor, rtol=1e-5, atol=1e-5)
    for row, expected in zip(rows(s.out_dir), rows(one), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------------------- what is kept


def test_the_teacher_reads_once_and_is_known_by_its_weights(run, settings, teacher_dir, monkeypatch, tmp_path):
    first = run("one")
    data_dir = settings().data_dir
    (path,) = data_dir.glob("teacher-*.safetensors")
    before, asked = path.read_bytes(), []
    fill = teacher.fill
    monkeypatch.setattr(teacher, "fill", lambda *args: (asked.append(1), fill(*args)))
    run("two", teacher_weight=0.2)
    assert not asked and path.read_bytes() == before
    moved = tmp_path / "moved"
    shutil.copytree(teacher_dir, moved)
    assert rows(run("three", teacher_dir=moved)) == rows(first) and not asked
    for number, flags in enumerate(
        ({"teacher_temperature": 1.0}, {"teacher_top_k": 4}, {"teacher_quantize": "bnb.nf4"})
    ):
        run(f"other-{number}", **flags)
        assert len(asked) == number + 1
    weights = load_file(moved / "model.safetensors")
    save_file({name: w * 1.01 for name, w in weights.items()}, moved / "model.safetensors", {"format": "pt"})
    run("four", teacher_dir=moved)
    assert len(asked) == 4 and len([*data_dir.glob("teacher-*.safetensors")]) == 5
    with pytest.raises(UserError, match=r"teacher \(model.safetensors\)"):
        run("one", teacher_dir=moved, resume=True)


def test_a_damaged_file_is_refused(run, settings):
    run("one", max_steps=1)
    (path,) = settings().data_dir.glob("teacher-*.safetensors")
    tensors = load_file(path)
    save_file({**tensors, "train.ids": tensors["train.ids"][1:].contiguous()}, path)
    with pytest.raises(UserError, match=r"train\.ids does not fit.*delete"):
        run("two")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="delete"):
        run("three")


def test_without_validation_samples_nothing_is_kept_of_them(run, settings, model_dirs):
    s = settings()
    shutil.rmtree(s.data_dir)
    write_data(s.data_dir, model_dirs("llama"), random_samples(8))
    assert len(rows(run())) == 4


def test_a_disk_without_room_says_so_and_nothing_is_left(run, settings, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(teacher.shutil, "disk_usage", lambda _: usage._replace(free=100))
    monkeypatch.setattr(finetune.run_folder, "check_room", lambda *_: 0)  # which looks there too
    with pytest.raises(UserError, match="room for 1e-07 GB.*--teacher_top_k"):
        run()
    assert not [path for path in settings().data_dir.iterdir() if "teacher" in path.name]


def test_what_cannot_teach_is_refused(run, settings, teacher_dir, tmp_path):
    other, short, adapter, small = (tmp_path / name for name in ("other", "short", "adapter", "small"))
    for folder in (other, short, small):
        shutil.copytree(teacher_dir, folder)
    write_tiny_tokenizer(other, vocab_size=400)
    for folder, changes in ((short, {"max_position_embeddings": 8}), (small, {"vocab_size": 20})):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for flags, words in (
        ({"teacher_dir": other}, "another tokenizer"), ({"teacher_dir": short}, "the teacher's context is 8"),
        ({"teacher_dir": small}, "vocabulary ends at 19"), ({"teacher_dir": adapter}, "is an adapter"),
        ({"teacher_dir": None}, "--teacher_dir"), ({"objective": "sft"}, "--teacher_dir"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            run("refused", **flags)


def test_a_plan_counts_the_teacher(run, capsys):
    run(plan=True)
    out = capsys.readouterr().out
    assert "The teacher takes 0.00" in out and "together" in out


def test_samples_without_virtual_tokens(settings):
    s = settings(method="prompt", virtual_tokens=3)
    samples = build.open_data(s).train
    bare = samples.without_virtual_tokens()
    assert isinstance(bare, Samples) and len(samples.before) == 3
    for i in range(len(samples)):
        torch.testing.assert_close(bare.inputs_and_targets(i)[0], samples.inputs_and_targets(i)[0][3:])
    assert torch.equal(bare.lengths[:], samples.lengths[:] - 3)
