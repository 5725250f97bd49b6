"""Runs on several devices: a step's gradient is that of one process, in every layout."""

import pytest
from devices import gradient_of_step, gradients_on
from test_finetune import random_sample, settings

__all__ = ["settings"]

LAYOUTS = {  # by the number of devices
    2: [{}, {"shard": True}, {"parallel": "tensor=2"}],
    4: [{"shard": True}, {"parallel": "tensor=4"}, {"parallel": "data=2,tensor=2"},
        {"parallel": "tensor=2", "shard": True}],
}  # fmt: skip
METHODS = [{}, {"method": "dora"}, {"quantize": "bnb.nf4"}, {"method": "full", "recompute": 0.5}]
# Keys and values of each device are those of 1 or 2 heads of 3, or for four devices those that two have in common: of 2
# heads. Rows of weights are whole blocks of 64, and cut there.
SIZES = dict(hidden_size=192, intermediate_size=320, num_hidden_layers=2, head_dim=64)
HEADS = {2: (6, 3), 4: (12, 2)}


def check_same(found, expected, tolerance=1e-6):
    """Two gradients are equal to 1e-6 as a whole, and each weight's to ten times that; so are loss and norm.

    Unless it is zero but for rounding, as that of a bias of keys: then to a thousandth of 1e-6 of the whole.
    """
    assert found.keys() == expected.keys()
    squares = {name: (found[name].double() - one.double()).square().sum().item() for name, one in expected.items()}
    sizes = {name: one.double().square().sum().item() for name, one in expected.items()}
    total = sum(sizes.values())
    assert sum(squares.values()) <= tolerance**2 * total
    for name, square in squares.items():
        assert square <= (10 * tolerance) ** 2 * sizes[name] + (1e-3 * tolerance) ** 2 * total, name


@pytest.mark.parametrize("devices", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_gradient_is_that_of_one_process(settings, model_dirs, tmp_path, devices):
    train = [random_sample(*sizes) for sizes in ((3, 9), (9, 4), (2, 3), (7, 12), (1, 6), (4, 4), (11, 1))]
    flags = dict(lora_r=4, global_batch_size=7, micro_batch_tokens=24, max_steps=1, max_grad_norm=0)
    H, K = HEADS[devices]
    own = SIZES | {"num_attention_heads": H, "num_key_value_heads": K, "hidden_size": SIZES["hidden_size"] * H // 6}
    flags["checkpoint_dir"] = model_dirs("llama", std=0.05, **own)
    cases, expected = [], []
    for method in METHODS:
        alone = settings(train if not cases else None, name="one", **flags, **method)
        expected += [gradient_of_step(alone)] * len(LAYOUTS[devices])
        cases += [settings(name="two", devices=devices, **flags, **method, **layout) for layout in LAYOUTS[devices]]
    for found, one, s in zip(gradients_on(devices, "step", cases, tmp_path / "found"), expected, cases, strict=True):
        print(s.method, s.quantize, s.parallel, s.shard)
        assert one["norm"] > 0.01
        check_same(found, one)
