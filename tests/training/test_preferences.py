"""Runs on preference pairs: against the pairs written out in plain torch, resumed, and with the base's own numbers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_finetune import column, final_weights, rows

import finetune
import objectives
import prepare_data
from batching import open_samples
from finetune import Settings
from objectives import PREFERENCE_LOSSES
from shell.cli import UserError
from training import metrics
from weights.checkpoint import load_model

PAIRS = [
    {"prompt": f"What is {i}?", "chosen": "It is " + "a number" * (i % 3), "rejected": "no" * (1 + i % 4)}
    for i in range(14)
]


@pytest.fixture
def pairs_dir(tiny_model_dir, tmp_path):
    """A prepared folder of pairs."""
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    source, out_dir = str(tmp_path / "pairs.jsonl"), tmp_path / "pairs"
    how = dict(data=[source], checkpoint_dir=tiny_model_dir, out_dir=out_dir, val_fraction=0.2)
    prepare_data.main(prepare_data.Settings(**how))
    return out_dir


@pytest.fixture
def run(tiny_model_dir, pairs_dir, tmp_path, monkeypatch):
    """`run(name, **flags)`: a run of three steps, its folder."""
    monkeypatch.setattr(metrics, "plot_losses", lambda *_: None)

    def train(name="run", **flags):
        defaults = dict(
            checkpoint_dir=tiny_model_dir, data_dir=pairs_dir, out_dir=tmp_path / name, precision="32-true",
            objective="dpo", global_batch_size=5, learning_rate=3e-3, warmup_steps=0, max_steps=3, eval_interval=1,
            save_interval=2, micro_batch_tokens=60,
        )  # fmt: skip
        finetune.main(Settings(**(defaults | flags)))
        return tmp_path / name

    return train


def logps(model, pairs, i):
    """log p of the answers of pair i, and how many tokens they have, by a forward pass for each."""
    result = []
    for tokens, is_target in pairs.sequences(i):
        logp = model(tokens[None, :-1])[0].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        result.append((logp[is_target[1:]].sum().item(), is_target.sum().item()))
    return [list(each) for each in zip(*result, strict=True)]


@pytest.mark.parametrize("loss", PREFERENCE_LOSSES)
def test_the_first_step_is_that_of_the_pairs_by_themselves(loss, run, tiny_model_dir, pairs_dir, monkeypatch):
    """And the same in packed rows, where prompts are shared, as in padded ones."""
    packed = rows(run("packed", dpo_loss=loss, global_batch_size=20))
    padded = rows(run("padded", dpo_loss=loss, global_batch_size=20, planner="sorted_in_step"))
    for one, other in zip(packed, padded, strict=True):
        for key in one.keys() - {"tokens", "padding"}:
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=2e-6), key
    model, pairs = load_model(tiny_model_dir, torch.float32), open_samples(pairs_dir, "train")
    with torch.no_grad():
        found = [logps(model, pairs, i) for i in range(len(pairs))]
    sums, lengths = (torch.tensor([pair[k] for pair in found], dtype=torch.float64) for k in (0, 1))
    s = Settings("m", "d", objective="dpo", dpo_loss=loss)
    expected, rewards = PREFERENCE_LOSSES[loss].loss(s, objectives.Pairs(sums, lengths, sums))
    first = packed[0]
    assert first["loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert first["logps/chosen"] == pytest.approx(sums[:, 0].mean().item(), rel=1e-5)
    assert first["rewards/rejected"] == pytest.approx(rewards[:, 1].mean().item(), rel=1e-4, abs=1e-5)
    assert "val_perplexity" not in first and packed[-1]["val_loss"] < packed[0]["val_loss"] * 1.5
    assert packed[-1]["loss"] < packed[0]["loss"]
    assert packed[-1]["rewards/margin"] > packed[0]["rewards/margin"]


def test_the_reference_is_computed_once_and_bound_to_the_base(run, pairs_dir, monkeypatch, tiny_model_dir, tmp_path):
    run("one")
    (path,) = pairs_dir.glob("reference-*.safetensors")
    before = path.read_bytes()
    computed = []
    monkeypatch.setattr("training.reference.logps_by_base", lambda *_: computed.append(1))
    run("two", dpo_loss="ipo")
    assert not computed and path.read_bytes() == before
    path.write_bytes(before[:-4] + b"\xff\xff\xff\x7f")
    with pytest.raises(UserError, match="delete"):
        run("three")
    monkeypatch.undo()
    path.write_bytes(before)
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: w * 1.01 for name, w in weights.items()}, other / "model.safetensors", {"format": "pt"})
    run("four", checkpoint_dir=other)
    assert len([*pairs_dir.glob("reference-*.safetensors")]) == 2


@pytest.mark.parametrize("flags", [
    {}, {"method": "full", "learning_rate": 1e-4}, {"quantize": "bnb.nf4"}, {"lora_init": "eva", "lora_r": 2},
])  # fmt: skip
def test_a_resumed_run_ends_with_the_same_bytes(flags, run):
    whole = run("whole", **flags)
    half = run("half", **flags)
    shutil.rmtree(half / "final")  # its newest checkpoint is of the second step of three
    resumed = run("half", resume=True, **flags)
    assert final_weights(whole).read_bytes() == final_weights(resumed).read_bytes()
    assert rows(whole) == rows(resumed)


def test_a_full_run_whose_base_is_gone_says_so(run, pairs_dir):
    run("full", method="full", learning_rate=1e-4)
    for path in pairs_dir.glob("reference-*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="start the run again"):
        run("full", method="full", learning_rate=1e-4, resume=True)


@pytest.mark.parametrize("flags", [{"recompute": 1.0}, {"recompute": "offload"}, {"planner": "random"}])
def test_the_gradient_is_the_same(flags, run):
    plain, other = rows(run("plain")), rows(run("other", **flags))
    for one, two in zip(plain, other, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def test_what_belongs_to_another_objective_is_refused(run, pairs_dir):
    for flags, message in (
        ({"objective": "sft"}, "holds pairs"),
        ({"z_loss": 1e-4}, "--z_loss"),
        ({"dpo_loss": "ipo", "label_smoothing": 0.1}, "--label_smoothing"),
        ({"simpo_gamma": 0.2}, "--simpo_gamma"),
        ({"lora_init": "olora"}, "--lora_init olora"),
    ):
        with pytest.raises(UserError, match=message):
            run("refused", **flags)


def test_a_plan_of_pairs(run, capsys):
    run("plan", plan=True)
    assert "together" in capsys.readouterr().out
    assert column(run("labels", label_smoothing=0.2), "loss")
