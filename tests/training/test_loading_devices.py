"""A device that loads its part of a model reads that of the files, and holds it and one tensor at the most."""

import pytest
import torch
from devices import gradients_on
from test_devices import SIZES
from test_finetune import random_samples, settings

from weights.stored import Weights

__all__ = ["settings"]

LAYOUTS = ({"parallel": "tensor=2"}, {"shard": True})
BASES = ({"method": "full"}, {"lora_r": 2}, {"lora_r": 2, "quantize": "bnb.nf4"})


@pytest.fixture
def loaded(settings, model_dirs, tmp_path):
    """Of each layout and base what two devices have found (devices.memory_of_loading), and the model's folder."""
    sizes = SIZES | {"num_hidden_layers": 6}
    folder = model_dirs("llama", **sizes, num_attention_heads=6, num_key_value_heads=3)
    settings(random_samples(4))
    cases = [settings(devices=2, checkpoint_dir=folder, **layout, **base) for layout in LAYOUTS for base in BASES]
    return gradients_on(2, "loading", cases, tmp_path / "found"), folder


def test_a_device_reads_and_holds_its_part(loaded):
    found, folder = loaded
    weights = Weights(folder)
    sizes = [torch.Size(shape).numel() * weights.dtypes[name].itemsize for name, shape in weights.shapes.items()]
    whole, largest = sum(sizes), max(sizes)
    assert whole > 20 * largest, "or the next line would say little"
    for case in found:
        assert (case["peak"] <= case["held"] + largest).all(), case
        assert (case["read"] < 0.7 * whole).all(), case  # heads and blocks are 2 to 1, and 3 to 2
    (full, lora, quantised), shards = found[:3], found[3:]
    for case, one in zip((*found[1:3], *shards[1:]), (full, full, shards[0], shards[0]), strict=True):
        assert torch.equal(case["read"], one["read"]), "whatever becomes of it"
    assert torch.equal(full["read"], full["held"]) and torch.equal(shards[0]["read"], shards[0]["held"])
    assert shards[0]["read"].sum() == whole, "each number by one device"
    assert (quantised["held"] < 0.4 * lora["held"]).all()
