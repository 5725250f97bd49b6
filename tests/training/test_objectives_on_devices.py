"""What is measured and trained beside the loss of targets, on two devices in each layout: as on one."""

import pytest
from devices import gradients_on
from test_finetune import SOURCES, random_samples, rows, run, settings
from test_preferences import pairs_dir

import finetune
from training.settings import Settings

__all__ = ["pairs_dir", "run", "settings"]

LAYOUTS = {"data": {}, "shard": {"shard": True}, "tensor": {"parallel": "tensor=2"},
           "pipeline": {"parallel": "pipeline=2"}}  # fmt: skip


def check_rows(folder, expected):
    """The rows of metrics.csv are those of one device; padding is of the first device alone.

    And whether a reward is the larger one is by chance while all are zero but for rounding.
    """
    for row, one in zip(rows(folder), rows(expected), strict=True):
        for name in one.keys() - {"padding", "rewards/accuracy", "val_rewards/accuracy"}:
            assert row[name] == pytest.approx(one[name], rel=1e-4, abs=3e-6), name


def test_preferences(tiny_model_dir, pairs_dir, tmp_path):
    """Steps of 5 of 11 pairs: the third of an epoch has one, so a device has none."""
    flags = dict(
        checkpoint_dir=tiny_model_dir, data_dir=pairs_dir, precision="32-true", objective="dpo", global_batch_size=5,
        learning_rate=1e-4, warmup_steps=0, max_steps=4, eval_interval=2, save_interval=0, micro_batch_tokens=60,
    )  # fmt: skip
    cases = [Settings(out_dir=tmp_path / name, devices=2, **layout, **flags) for name, layout in LAYOUTS.items()]
    gradients_on(2, "run", cases, tmp_path / "found")
    for path in pairs_dir.glob("reference-*"):  # so that both have computed it
        path.unlink()
    finetune.main(Settings(out_dir=tmp_path / "one", **flags))
    for s in cases:
        check_rows(s.out_dir, tmp_path / "one")


def test_forgetting_and_sources(run, settings, tmp_path):
    flags = dict(
        forgetting_source=SOURCES[1]["name"], max_steps=4, eval_interval=2, micro_batch_tokens=30, learning_rate=1e-4,
        planner="sorted_in_step",
    )  # fmt: skip
    expected = run(random_samples(9, sources=2), random_samples(7, sources=2), name="one", **flags)
    cases = [settings(name=name, devices=2, **layout, **flags) for name, layout in LAYOUTS.items()]
    gradients_on(2, "run", cases, tmp_path / "found")
    for s in cases:
        check_rows(s.out_dir, expected)
