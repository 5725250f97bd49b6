"""Variants trained together against runs of their own: gradients, steps, folders, resuming; and halving."""

import csv
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import SEED
from test_finetune import column, final_weights, random_samples, rows
from test_finetune import settings as settings

import finetune
from finetune import Settings
from ops.forks import Forks
from shell import cli
from shell.cli import UserError
from training import metrics
from training.sweep import report
from training.sweep.halving import survivors
from training.sweep.joint import joined, joint_rows
from training.sweep.variants import read_sweep
from weights.peft_format import read_adapter

VARIANTS = {  # under SGD, as AdamW's first steps make whole ones of a gradient that is rounding alone
    "low": {"learning_rate": 0.03},
    "wide": {"lora_r": 3, "lora_alpha": 7.5, "lora_targets": ["q_proj", "down_proj"], "schedule": "linear"},
    "dora": {"method": "dora", "seed": 5, "max_grad_norm": 0.01},
    "small": {"global_batch_size": 2, "max_steps": 5, "weight_decay": 0.1, "warmup_steps": 2},
    "adamw": {"optimizer": "adamw", "learning_rate": 1e-3},
}


@pytest.fixture
def sweep(settings, tmp_path, monkeypatch):
    """`sweep(changes, ...)`: the folder of a sweep of these variants; `sweep.alone(name)`: a run of its own of one."""
    monkeypatch.setattr(metrics, "plot_losses", lambda *_: None)
    monkeypatch.setattr(report, "plot", lambda *_: None)
    samples = random_samples(18), random_samples(5)
    defaults = dict(
        max_steps=4, eval_interval=2, save_interval=2, micro_batch_tokens=60, learning_rate=0.3, optimizer="sgd"
    )

    def train(variants=None, name="sweep", more=None, **flags):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"variants": VARIANTS if variants is None else variants} | (more or {})))
        s = settings(*(() if (tmp_path / "data").exists() else samples), name=name, sweep=path, **(defaults | flags))
        finetune.main(s)
        return s.out_dir

    def alone(change, name="alone", **flags):
        s = settings(*(() if (tmp_path / "data").exists() else samples), name=name, **(defaults | flags | change))
        finetune.main(s)
        return s.out_dir

    train.alone = alone
    return train


def check_alike(one, other, within=1e-4):
    """The adapters and the metrics of two runs, to fp32 rounding."""
    tensors, expected = (read_adapter(folder / "final").tensors for folder in (one, other))
    assert tensors.keys() == expected.keys()
    for name, own in expected.items():
        for key, tensor in own.items():
            assert (tensors[name][key] - tensor).norm() < within * tensor.norm() + 1e-7, (name, key)
    for row, wanted in zip(rows(one), rows(other), strict=True):
        assert row.keys() == wanted.keys()
        for key in row.keys() - {"padding"}:
            assert row[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-7), key


@pytest.mark.parametrize("flags", [{}, {"quantize": "bnb.nf4"}, {"recompute": 1.0}], ids=["dense", "nf4", "recompute"])
def test_each_variant_is_as_a_run_of_its_own(flags, sweep):
    out = sweep(**flags)
    for name, change in VARIANTS.items():
        within = 0.02 if name == "adamw" else 1e-4
        check_alike(out / name, sweep.alone(change, name=f"alone-{name}", **flags), within)
    with open(out / "sweep.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert {row["variant"] for row in table} == VARIANTS.keys()
    assert [float(row["val_loss"]) for row in table] == sorted(float(row["val_loss"]) for row in table)
    assert all(int(row["steps"]) == VARIANTS[row["variant"]].get("max_steps", 4) for row in table)


@pytest.mark.parametrize("family", ["gpt_neox", "mixtral"])
def test_variants_of_other_families(family, sweep, model_dirs):
    """Attention's layers, fused in GPT-NeoX; a mixture's experts see all variants' positions, and train with none."""
    variants = {
        "one": {"lora_targets": ["q_proj", "o_proj"], "lora_r": 5},
        "other": {"lora_targets": ["v_proj"], "method": "dora", "learning_rate": 0.1, "seed": 3},
    }
    flags = {"checkpoint_dir": model_dirs(family), "quantize": "bnb.nf4", "recompute": 0.5}
    out = sweep(variants, **flags)
    for name, change in variants.items():
        check_alike(out / name, sweep.alone(change, name=f"alone-{name}", **flags))


def test_variants_that_learn_from_a_teacher(sweep, model_dirs):
    variants = {"more": {"teacher_weight": 0.9}, "less": {"teacher_weight": 0.2, "lora_r": 3}}
    teacher_dir = model_dirs("mistral", std=0.4)
    flags = {"objective": "distill", "teacher_dir": teacher_dir, "teacher_top_k": 4, "learning_rate": 0.05}
    out = sweep(variants, **flags)
    assert len([*(out.parent / "data").glob("teacher-*")]) == 1
    for name, change in variants.items():
        check_alike(out / name, sweep.alone(change, name=f"alone-{name}", **flags))
    with pytest.raises(UserError, match="teacher_top_k is the same for all variants"):
        sweep({"a": {"teacher_top_k": 3}}, name="refused", **flags)


def test_a_resumed_sweep_ends_with_the_same_bytes(sweep):
    whole = sweep(name="whole")
    half = sweep(name="half")
    for name in VARIANTS:
        shutil.rmtree(half / name / "final")
    again = sweep(name="half", resume=True)
    for name in VARIANTS:
        assert final_weights(whole / name).read_bytes() == final_weights(again / name).read_bytes()
        assert rows(whole / name) == rows(again / name)


def test_a_run_of_its_own_goes_on_from_a_variant(sweep):
    out = sweep()
    shutil.rmtree(out / "wide" / "final")
    before = column(out / "wide", "loss")
    values = yaml.safe_load((out / "wide" / "config.yaml").read_text())
    assert values["sweep"] is None
    finetune.main(cli.parse(Settings, ["--config", str(out / "wide" / "config.yaml"), "--resume"]))
    assert column(out / "wide", "loss") == pytest.approx(before, rel=1e-4)


def test_halving_drops_the_worst(sweep, capsys):
    variants = {f"v{i}": {"learning_rate": rate} for i, rate in enumerate((1e-7, 0.5, 2e-7, 0.2))}
    halving = {"halving": {"every": 2, "keep": 0.5}}
    out = sweep(variants, more=halving, max_steps=6)
    ended = json.loads((out / "sweep.json").read_text())["ended"]
    assert {"v0", "v2"} < {*ended} and len(ended) == 3
    assert all("after 2 steps" in ended[name] for name in ("v0", "v2"))
    assert (out / "v0" / "step-000002").is_dir() and not (out / "v0" / "final").exists()
    survivor = ({*variants} - {*ended}).pop()
    assert len(rows(out / survivor)) == 6
    check_alike(out / survivor, sweep.alone(variants[survivor], max_steps=6))
    capsys.readouterr()
    shutil.rmtree(out / survivor / "final")
    sweep(variants, more=halving, max_steps=6, resume=True)
    assert len(rows(out / "v0")) == 2 and final_weights(out / survivor).is_file()


def test_a_variant_whose_loss_is_no_number_ends_alone(sweep, capsys):
    variants = {"good": {}, "bad": {"learning_rate": 1e30, "max_grad_norm": 0}}
    out = sweep(variants)
    assert "bad ends: step" in capsys.readouterr().err
    assert (out / "good" / "final").is_dir() and not (out / "bad" / "final").exists()
    assert (out / "bad" / "bad_batch.safetensors").is_file()
    check_alike(out / "good", sweep.alone({}))


def test_a_signal_stops_with_checkpoints(sweep, monkeypatch):
    validate, sent = finetune.validate, []

    def interrupted(run):
        if not sent:  # a second one would end the process at once
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return validate(run)

    monkeypatch.setattr(finetune, "validate", interrupted)
    with pytest.raises(SystemExit) as status:
        sweep(name="stopped", eval_interval=1, save_interval=0)
    assert status.value.code == 128 + signal.SIGTERM
    monkeypatch.undo()
    monkeypatch.setattr(metrics, "plot_losses", lambda *_: None)
    monkeypatch.setattr(report, "plot", lambda *_: None)
    again, whole = sweep(name="stopped", eval_interval=1, resume=True), sweep(name="whole", eval_interval=1)
    for name in VARIANTS:
        assert final_weights(again / name).read_bytes() == final_weights(whole / name).read_bytes()


def test_rows_hold_every_sample_once_and_variants_together(sweep):
    torch.manual_seed(SEED)
    train = SimpleNamespace(lengths=torch.randint(1, 30, (40,)))
    runs = {n: SimpleNamespace(train=train) for n in (0, 2, 5)}
    steps = {n: torch.randperm(40)[: 3 + n].tolist() for n in runs}
    found = joint_rows(runs, steps, 64)
    for n, samples in steps.items():
        assert sorted(i for row in found for i in row.get(n, [])) == sorted(samples)
    assert all(sum(train.lengths[i] for own in row.values() for i in own) <= 64 for row in found)
    total = sum(train.lengths[i].item() for samples in steps.values() for i in samples)
    assert len(found) <= -(-total // 64) + 1


def test_offsets_of_rows_end_to_end():
    assert joined([[0, 3, 7], [0, 2], [0, 1, 5]]) == [0, 3, 7, 9, 10, 14]
    forks = [Forks((1, 2), ((3, 4), (5, 6))), Forks((0,), ((1, 1),))]
    assert joined(forks) == Forks((1, 2, 0), ((3, 4), (5, 6), (1, 1)))


def test_who_survives():
    assert survivors({"a": 3.0, "b": 1.0, "c": 2.0, "d": float("nan")}, 0.5) == ["b", "c"]
    assert survivors({"a": 3.0, "b": 1.0, "c": 2.0}, 0.1) == ["b"]


@pytest.mark.parametrize("values, message", [
    ({"variants": {"a": {"lora_r": "x"}}}, "a: --lora_r x: expected a whole number"),
    ({"variants": {"a": {"lora_rank": 3}}}, "did you mean --lora_r"),
    ({"variants": {"a": {"precision": "32-true"}}}, "precision is the same for all"),
    ({"variants": {"a": {"method": "full"}}}, "full"),
    ({"variants": {"a": {"lora_dropout": 0.1}}}, "dropout"),
    ({"variants": {"a": {"lora_init": "pissa"}}}, "looks at the base"),
    ({"variants": {"a": {"neftune_alpha": 5}}}, "neftune_alpha"),
    ({"variants": {"a": {"optimizer": "mezo"}}}, "mezo"),
    ({"variants": {"../a": {}}}, "folder"),
    ({"variants": {"a": 3}}, "flags and their values"),
    ({"variants": {}}, "no variant"),
    ({"wariants": {}}, "unknown key 'wariants'"),
    ({"grid": {"lora_r": 3}}, "list of values"),
    ({"variants": {"a": {}}, "halving": {"every": 3}}, "multiple of --eval_interval"),
    ({"variants": {"a": {}}, "halving": {"evry": 2}}, "halving"),
    ([1], "not a YAML file of variants"),
])  # fmt: skip
def test_a_file_that_is_no_sweep(values, message, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=message):
        read_sweep(Settings("m", "d", eval_interval=2, sweep=path))


def test_a_grid_has_every_combination(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("grid: {learning_rate: [1e-4, 3.0e-4], lora_targets: [[q_proj], [q_proj, v_proj]]}")
    variants = read_sweep(Settings("m", "d", out_dir=tmp_path, sweep=path)).variants
    assert len(variants) == 4 and all((tmp_path / name) == own.out_dir for name, own in variants.items())
    assert {(own.learning_rate, len(own.lora_targets)) for own in variants.values()} == {
        (1e-4, 1), (1e-4, 2), (3e-4, 1), (3e-4, 2),
    }  # fmt: skip


@pytest.mark.parametrize("flags, message", [
    ({"planner": "random"}, "--planner packed"),
    ({"micro_batch_tokens": "auto"}, "number"),
    ({"devices": 2}, "--devices 1"),
    ({"time_budget": "1h"}, "time_budget"),
    ({"precision": "16-mixed"}, "16-mixed"),
])  # fmt: skip
def test_what_cannot_be_trained_together(flags, message, sweep):
    with pytest.raises(UserError, match=message):
        sweep(**flags)


def test_a_plan_of_a_sweep(sweep, capsys):
    sweep(plan=True)
    out = capsys.readouterr().out
    assert f"{len(VARIANTS)} variants" in out and "together" in out and "small: 5 steps" in out
