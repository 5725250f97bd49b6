"""The memory plan of a pipeline: what its stages hold, and what they keep of the micro-batches that are under way."""

import dataclasses
from collections import Counter

import pytest
import torch
from test_memory_plan import PACKED, tiny_config, tiny_job

from training.memory import plan
from training.memory.plan import Predictor


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
    assert plan.predictor_of(dataclasses.replace(job, stages=3)).fixed in (stages[0].fixed, stages[2].fixed)


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
