"""The memory plan of a pipeline: what its stages hold, and what they keep of the micro-batches that are under way."""

import dataclasses
import re
from collections import Counter

import pytest
import torch
from test_memory_plan import PACKED, tiny_config, tiny_job

import model
from training.memory import plan
from training.memory.plan import Predictor
from training.parallel.part import Part

LINEAR = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def quantized_in(layers, numbers):
    """A plan for the blocks with these numbers."""
    return {f"model.layers.{n}.{name}": "bnb.nf4" if n in numbers else "none" for n in range(layers) for name in LINEAR}


def stages_of(job, count):
    return [Predictor(dataclasses.replace(job, stages=count, stage=stage)) for stage in range(count)]


@pytest.mark.parametrize("quantize", [None, "bnb.nf4"])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_stages_hold_what_the_model_holds(family, kind, quantize):
    if kind == "full" and quantize:
        return
    job = tiny_job(kind, quantize, config=tiny_config(family, layers=5))
    whole, stages = Predictor(job), stages_of(job, 3)
    found = sum((each.fixed for each in stages), Counter())
    if job.config.tie_word_embeddings:  # which two stages have
        vocabulary = job.config.vocab_size * job.config.hidden_size * 4
        twice = {"weights": 1, "gradients": kind == "full", "moments": 2 * (kind == "full")}
        found -= Counter({part: vocabulary * times for part, times in twice.items()})
    assert found == whole.fixed


@pytest.mark.parametrize("recompute", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_stage_keeps_as_many_micro_batches_as_stages_follow(kind, recompute):
    job = tiny_job(kind, config=tiny_config("llama", layers=6), recompute=recompute)
    kept = [each.parts(PACKED)["saved activations"] for each in stages_of(job, 3)]
    whole = Predictor(job).parts(PACKED)["saved activations"]
    output = PACKED.positions * job.config.hidden_size * 4  # of a stage, until its gradient comes back
    assert kept[0] / 3 + kept[1] / 2 + kept[2] == pytest.approx(whole + 2 * output, rel=0.05)
    assert kept[1] / 2 == pytest.approx(whole / 3 + output, rel=0.1)


def test_hidden_states_arrive_in_the_dtype_of_the_weights():
    job = tiny_job("lora", config=tiny_config("llama", layers=4), dtype=torch.bfloat16, device="meta")
    one, two = (each.peak(PACKED) for each in stages_of(job, 2))
    assert plan.predictor_of(dataclasses.replace(job, stages=2)).peak(PACKED) == max(one, two)
    wide = stages_of(dataclasses.replace(job, dtype=torch.float32), 2)
    assert wide[1].parts(PACKED)["weights"] == 2 * stages_of(job, 2)[1].parts(PACKED)["weights"]


def test_a_stage_between_may_take_most():
    quantized = quantized_in(6, {0, 1, 4, 5})
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=4096)
    job = tiny_job("lora", quantized, config=tiny_config("llama", layers=6, **sizes), stages=3)
    short = plan.packed_shape(8, 8, 8)
    alone = [each.peak(short) for each in stages_of(job, 3)]
    assert alone[1] > 1.4 * max(alone[0], alone[2])
    assert plan.predictor_of(job).peak(short) == alone[1]


def test_of_equal_stages_one_is_looked_at():
    job = tiny_job("lora", config=tiny_config("llama", layers=13), stages=6)  # 3, 2, 2, 2, 2, 2
    assert plan.different_stages(job) == [0, 1, 5]
    mixed = dataclasses.replace(job, quantize=quantized_in(13, {7}))
    assert plan.different_stages(mixed) == [0, 1, 3, 5]
    assert plan.different_stages(dataclasses.replace(job, stages=2)) == [0, 1]


def test_the_time_of_a_step_has_the_waiting_in_it():
    job = tiny_job("lora", config=tiny_config("llama", layers=4), stages=2)
    busy, idle = (plan.describe(job, [[PACKED]], 1e9, "", 1, idle) for idle in (0.0, 0.75))
    times = [float(re.search(r"TFLOP a step for a part of the model: (\S+) s,", text)[1]) for text in (busy, idle)]
    assert times[1] == pytest.approx(4 * times[0], rel=0.01)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.67, 1.0])
def test_a_stage_recomputes_its_share_of_its_own_blocks(share, monkeypatch):
    count = []
    monkeypatch.setattr(model, "checkpoint", lambda run, *args, **_: count.append(run) or run(*args))
    config = tiny_config("llama", layers=7)
    for stage, blocks in enumerate((4, 3)):
        part = Part(config, stage=stage, stages=2)
        own = part.model()
        own.embed = lambda tokens, *_: torch.randn(*tokens.shape, config.hidden_size, requires_grad=True)
        own.finish = lambda x: x
        own.hidden_states(torch.zeros(1, 5, dtype=torch.int64), recompute=share)
        assert [[*own.model.layers].index(block) for block in count] == [*part.layers[: round(share * blocks)]]
        count.clear()
