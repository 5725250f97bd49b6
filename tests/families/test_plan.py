"""The memory of every family, predicted without weights, against the same step on real tensors."""

import pytest
import torch
from families.tiny import random_tokens
from test_memory_plan import activations, real_model

import lora
from training.memory import plan
from training.memory.allocations import Allocations, trace_step

T = 2048
SHAPE = plan.packed_shape(64, 30, 64)  # each token a target
KINDS = (("lora", None), ("lora", "bnb.nf4"), ("full", None))  # in turn, over a family's rows


def test_the_peak_is_what_real_tensors_take(tiny, family_row):
    kind, quantize = KINDS[family_row[1] % len(KINDS)]
    config = tiny.load().config
    names = {name.rpartition(".")[2] for name in lora.linear_layers(tiny.load()) if name.startswith("model.layers.")}
    adapter = None if kind == "full" else lora.AdapterConfig("lora", r=4, targets=tuple(sorted(names)))
    job = plan.Job(config, "cpu", torch.float32, quantize=quantize, adapter=adapter)
    predictor, model, allocations = plan.Predictor(job), real_model(job), Allocations()
    tokens = random_tokens(SHAPE.rows, SHAPE.T)
    trace_step(model, (tokens, tokens, list(SHAPE.offsets)), allocations, job)
    assert activations(predictor, SHAPE) == pytest.approx(allocations.at_peak.total(), rel=0.02)
    assert predictor.flops(SHAPE) == pytest.approx(allocations.flops, rel=0.02)


def test_on_a_card_no_tensor_has_all_pairs_of_positions(tiny, family_row, monkeypatch):
    """A mask would take a byte a pair, and the scores of one head two or four. In turn in bf16 and in fp32."""
    dtype = (torch.bfloat16, torch.float32)[family_row[1] % 2]
    job, add, made = plan.Job(tiny.load().config, "meta", dtype), Allocations._add, []

    def noted(self, storage, *rest):
        made.append(storage.nbytes())
        add(self, storage, *rest)

    monkeypatch.setattr(Allocations, "_add", noted)
    predictor = plan.Predictor(job)
    for shape in (plan.Shape(2, T, 100), plan.packed_shape(2 * T, T, 100)):
        made.clear()
        predictor.peak(shape)
        assert 2 * T * job.config.hidden_size * dtype.itemsize <= max(made) < T * T  # hidden states are seen
