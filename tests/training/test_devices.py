"""Runs on several devices: a step's gradient is that of one process, in every layout."""

import pytest
import torch
from devices import gradient_of, gradients_on
from test_finetune import random_sample, settings

__all__ = ["settings"]

LAYOUTS = {2: [{}, {"shard": True}, {"parallel": "tensor=2"}]}  # by the number of devices
METHODS = [{}, {"method": "dora"}, {"quantize": "bnb.nf4"}, {"method": "full"}]
# Six heads of which each two share keys and values: 1 and 2 of these for two devices. Rows are whole blocks of 64.
SIZES = dict(
    hidden_size=192, intermediate_size=192, num_attention_heads=6, num_key_value_heads=3, head_dim=32,
    num_hidden_layers=2, attention_bias=True, mlp_bias=True,
)  # fmt: skip


def same(found, expected):
    """Whether two gradients are equal to 1e-6 of the largest number of each weight, with the same loss and norm."""
    assert found.keys() == expected.keys()
    assert expected["norm"] > 0.01
    for name, one in expected.items():
        distance = (found[name].float() - one.float()).abs().max().item()
        assert distance <= 1e-6 * max(1.0, one.abs().max().item()), (name, distance)


@pytest.mark.parametrize("devices", LAYOUTS)
def test_the_gradient_is_that_of_one_process(settings, model_dirs, tmp_path, devices):
    train = [random_sample(*sizes) for sizes in ((3, 9), (9, 4), (2, 3), (7, 12), (1, 6), (4, 4), (11, 1))]
    flags = dict(lora_r=4, global_batch_size=7, micro_batch_tokens=24, max_steps=1, max_grad_norm=0)
    flags["checkpoint_dir"] = model_dirs("llama", **SIZES)
    cases, expected = [], []
    for method in METHODS:
        alone = settings(train if not cases else None, name="one", **flags, **method)
        expected += [gradient_of(alone)] * len(LAYOUTS[devices])
        for layout in LAYOUTS[devices]:
            s = settings(name="two", devices=devices, **flags, **method, **layout)
            cases.append({name: value for name, value in vars(s).items() if name != "started"})
    for found, one, case in zip(gradients_on(devices, cases, tmp_path / "found"), expected, cases, strict=True):
        print(case["method"], case["quantize"], case["parallel"], case["shard"])
        same(found, one)
