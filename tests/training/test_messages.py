"""What a step sends, counted at torch.distributed's calls, is what training/memory/layouts.py calculates, to the byte.

Counted is what `finetune.backward_passes` sends. Left out, there and here, are the loss (4 bytes), and what comes after
the gradient: its norm (8 bytes) and numbers for the log. All devices have parts of one size here, and as many
positions: the calculation is for the largest part, and for the mean of positions.
"""

import dataclasses
import itertools

import pytest
import torch
import torch.distributed as dist
from devices import gradients_on
from test_finetune import random_sample, settings

from bench.scaling.messages import Messages
from training import build
from training.memory import budget, layouts
from training.parallel.layout import layout_of

__all__ = ["settings"]

LAYOUTS = {  # by the number of devices
    2: [{}, {"shard": True}, {"parallel": "tensor=2"}, {"parallel": "pipeline=2"}],
    4: [
        {"parallel": "tensor=4"},
        {"parallel": "data=2,tensor=2"},
        {"parallel": "tensor=2", "shard": True},
        {"parallel": "pipeline=2,tensor=2"},
        {"parallel": "pipeline=2", "shard": True},
    ],
    6: [{"parallel": "pipeline=3", "shard": True}],
}
METHODS = [
    {},
    {"method": "full"},
    {"method": "full", "recompute": 1.0, "precision": "bf16-true"},
    {"recompute": 0.34, "precision": "bf16-mixed"},
    {"quantize": "bnb.nf4"},
    {"lora_layers": [2]},  # no gradient goes through the blocks before that
    {"method": "full", "train": ["lm_head.weight"]},
]
# 515 rows cannot be divided by 2: FSDP fills them up. Of four devices two each have the same head of keys and values.
SIZES = dict(
    vocab_size=515, hidden_size=192, intermediate_size=512, num_hidden_layers=3, head_dim=64, num_attention_heads=4,
    num_key_value_heads=2, attention_bias=False, mlp_bias=False,
)  # fmt: skip


def calculated(s):
    """{"STAGE: KIND over DIMENSION": (messages, their bytes)} of the first step of a run."""
    data = build.open_data(s)
    layout = layout_of(s)
    job, (shapes, *_) = budget.planned_job(s, data.train)
    positions = sum(shape.positions for shape in shapes) / layout.data
    found = {}
    for stage in range(layout.pipeline):
        own = dataclasses.replace(job, stage=stage)
        for message in layouts.messages(own, layout, layouts.passes_of(shapes, layout), positions):
            name = f"{stage}: {message.kind} over {message.over}"
            count, nbytes = found.get(name, (0, 0))
            found[name] = count + message.times, nbytes + message.times * message.nbytes
    return found


@pytest.mark.parametrize("devices", [2, 4, pytest.param(6, marks=pytest.mark.slow)])
def test_bytes_are_those_calculated(settings, model_dirs, tmp_path, devices):
    flags = dict(lora_r=4, global_batch_size=8, micro_batch_tokens=24, max_steps=1, devices=devices)
    models = {"llama": METHODS}
    if devices == 2:  # Gemma has norms after attention and the MLP, so more is computed again; its head is tied
        models["gemma2"] = [{"recompute": 1.0}, {"method": "full"}]
    cases = []
    for family, methods in models.items():
        folder = model_dirs(family, std=0.05, **SIZES, tie_word_embeddings=family == "gemma2")
        for method, layout in itertools.product(methods, LAYOUTS[devices]):
            if "pipeline" in layout.get("parallel", "") and ("lora_layers" in method or "train" in method):
                continue  # in each stage something must train
            own = {"precision": "32-true", "checkpoint_dir": folder} | flags | method | layout
            train = own.pop("train", None)
            samples = None if cases else [random_sample(6, 6) for _ in range(8)]
            cases.append(dataclasses.replace(settings(samples, name="two", **own), train=train))
    for found, s in zip(gradients_on(devices, "messages", cases, tmp_path / "found"), cases, strict=True):
        print(s.checkpoint_dir, s.method, s.quantize, s.precision, s.train, s.lora_layers, s.parallel, s.shard)
        assert found or (s.train and not s.shard and layout_of(s).data == 1)  # there a head alone sends nothing
        assert {name: (len(sizes), sizes.sum().item()) for name, sizes in found.items()} == calculated(s)


def test_every_collective_is_noted_or_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x, y = torch.zeros(6), torch.zeros(6, dtype=torch.float64)
        with Messages() as messages:
            dist.all_reduce(x)
            dist.all_reduce(x)
            dist.all_gather_into_tensor(y, y.clone())
            dist.reduce_scatter_tensor(x, x.clone())
            dist.broadcast(y, 0)
            x.add_(1)
            with pytest.raises(NotImplementedError, match="c10d::scatter_ is not counted"):
                dist.scatter(x, [x.clone()], 0)
        counted = [(m["kind"], m["count"], m["nbytes"], m["times"]) for m in messages.counted()]
        expected = [("sum", 1, 24, 2), ("gather", 1, 48, 1), ("share out", 1, 24, 1), ("broadcast", 1, 48, 1)]
        assert counted == expected
    finally:
        dist.destroy_process_group()
