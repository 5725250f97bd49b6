"""What the devices of a layout send, and which layout is proposed for a memory: by calculation."""

import dataclasses
import os
import re

import pytest
import torch
from test_finetune import random_sample, random_samples, settings

import finetune
from lora import AdapterConfig
from training import build
from training.memory import layouts, plan
from training.parallel.layout import Layout
from weights.checkpoint import read_config

__all__ = ["settings"]


def sizes_of(job):
    """Bytes of all weights of the blocks, adapters included, of all other weights, and of what trains."""
    with torch.device("meta"):
        model = plan.build(job, range(job.config.num_hidden_layers))
    blocks = sum(p.nbytes for p in model.model.layers.parameters())
    every = [(p.nbytes, p.requires_grad) for p in model.parameters()]
    return blocks, sum(n for n, _ in every) - blocks, sum(n for n, trains in every if trains)


@pytest.mark.parametrize("adapter", [None, AdapterConfig(r=4)])
def test_what_is_sent(tiny_model_dir, adapter):
    config = read_config(tiny_model_dir)
    job = plan.Job(config, "cpu", torch.float32, adapter=adapter)
    blocks, others, trained = sizes_of(job)
    one = layouts.traffic(job, Layout(), 3, 100)
    assert sum(one) == 0
    assert layouts.traffic(job, Layout(data=4), 3, 100) == (2 * 3 / 4 * trained, 0, 0)
    shared = layouts.traffic(job, Layout(data=4, shard=True), 3, 100)
    # Blocks are gathered forward and backward, all else forward only.
    assert shared == (3 * 3 / 4 * trained, 3 * 3 / 4 * (2 * blocks + others), 0)


@pytest.mark.parametrize("adapter", [None, AdapterConfig(r=4)])
def test_what_is_sent_along_tensor(tiny_model_dir, adapter):
    config = read_config(tiny_model_dir)
    job = plan.Job(config, "cpu", torch.float32, adapter=adapter)
    found, L, D = layouts.traffic(job, Layout(tensor=2), 3, 100), config.num_hidden_layers, config.hidden_size
    # Two sums forward and two backward in each block, each of which sends 2 (n - 1) / n of its bytes. Where only
    # adapters train nothing goes backward into the first block.
    one = 2 * 1 / 2 * 100 * D * 4
    assert found.activations == pytest.approx((4 * L - (adapter is not None)) * one)
    # Of adapters devices have alike A of rows (q, k, v, gate, up), and B of columns (o, down).
    assert found.gradients == (2 * 1 / 2 * L * 7 * 4 * D * 4 if adapter else 0) and found.weights == 0
    # Of what is computed again the last sum of a block is left out: nothing after it is needed.
    again = layouts.traffic(dataclasses.replace(job, recompute=1.0), Layout(tensor=2), 3, 100)
    assert again.activations == pytest.approx(found.activations + L * one)
    assert sum(layouts.traffic(dataclasses.replace(job, gradients="none"), Layout(data=2), 3, 100)) == 0


def test_the_fastest_that_fits():
    slow, fast, large = (
        layouts.Proposal({"parallel": "tensor=2", "shard": False}, peak, 64, seconds, 0.5)
        for peak, seconds in ((1.0, 3.0), (2.0, 2.0), (5.0, 1.0))
    )
    assert layouts.fastest([slow, fast, large], 4.0) is fast
    assert layouts.fastest([slow, fast, large], 1.5) is slow
    assert layouts.fastest([slow, fast, large], 0.5) is None
    rows = layouts.table([fast, large], 4.0).splitlines()
    assert ["does not fit" in row for row in rows] == [False, True]
    assert not any("--micro_batch_tokens" in row for row in rows), "all have the same"
    long = large._replace(flags={"parallel": "pipeline=16,data=16,tensor=2", "shard": True}, tokens=128)
    rows = layouts.table([fast, long], 4.0).splitlines()
    assert len({row.index(" GB ") for row in rows}) == 1
    assert [re.search(r"--micro_batch_tokens (\d+) ", row)[1] for row in rows] == ["64", "128"]


def test_a_layout_is_proposed_and_planned(settings, capsys):
    flags = dict(plan=True, plan_tflops=1.0, devices=4, method="full", global_batch_size=8, micro_batch_tokens=40)
    finetune.main(settings(random_samples(12), memory_budget="1GB", **flags))
    out = capsys.readouterr().out
    rows = re.findall(r"^  --parallel (\S+)( --shard)? +(\S+) GB +(\S+) s a step, +(\S+) of it", out, re.MULTILINE)
    assert [row[:2] for row in rows] == [
        ("data=4", ""),
        ("data=4", " --shard"),
        ("data=2,tensor=2", ""),
        ("data=2,tensor=2", " --shard"),
        ("pipeline=2,data=2", ""),
        ("pipeline=2,data=2", " --shard"),
        ("pipeline=2,tensor=2", ""),
    ]  # fmt: skip (three heads of keys and values cannot be divided among four devices)
    proposed = re.search(r"fastest that fits: --parallel (\S+)( --shard)?", out)
    assert float(min(rows, key=lambda row: float(row[3]))[3]) == float(
        next(row[3] for row in rows if row[:2] == (proposed[1], proposed[2] or ""))
    )
    assert "Each device sends" in out and "together" in out
    finetune.main(settings(memory_budget="0.01MB", **flags))
    out = capsys.readouterr().out
    assert out.count("does not fit") == 7 and "no layout fits" in out and "together" not in out


def test_a_layout_in_which_a_stage_would_not_train_is_not_listed(settings, capsys):
    flags = dict(plan=True, plan_tflops=1.0, devices=2, memory_budget="1GB", lora_layers=[0], micro_batch_tokens=40)
    finetune.main(settings(random_samples(12), **flags))
    out = capsys.readouterr().out
    assert "--parallel tensor=2" in out and "pipeline" not in out and "together" in out


def test_micro_batches_that_were_chosen_for_each_layout_are_shown(settings, capsys):
    flags = dict(plan_tflops=1.0, devices=4, method="full", global_batch_size=32, micro_batch_tokens="auto")
    samples = [random_sample(20, 12) for _ in range(64)]
    finetune.main(settings(samples, plan=True, memory_budget="6MB", **flags))
    out = capsys.readouterr().out
    shown = dict(re.findall(r"^  --parallel (.+?) +--micro_batch_tokens (\d+) ", out, re.MULTILINE))
    assert len(shown) == 7 and len({*shown.values()}) > 1, out
    proposed = re.search("fastest that fits: --parallel (.+)", out)[1]
    assert f"--method full on 32-true, --micro_batch_tokens {shown[proposed]} " in out


def test_nothing_is_said_of_srun_where_it_is_not_needed(settings, tmp_path, monkeypatch, recwarn):
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    build.start_fabric(settings())
    assert not [each for each in recwarn if "srun" in str(each.message)]
