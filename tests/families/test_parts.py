"""Every family divided among devices: along tensor, along pipeline, and by FSDP."""

from devices import gradient_of_model, gradients_on
from families.rows import each_row
from test_devices import check_same

from training.settings import Settings

LAYOUTS = {"parallel": "tensor=2"}, {"shard": True}, {"parallel": "pipeline=2"}
METHODS = (
    {"method": "full"}, {"method": "lora", "lora_r": 2, "lora_targets": "all-linear"}, {"method": "dora", "lora_r": 3},
    {"method": "dora", "lora_r": 2, "quantize": "bnb.int8"},
)  # fmt: skip


def test_the_gradient_is_that_of_the_whole_model(tiny_models, tmp_path):
    """Each row of the table in one layout and with one method, in turn."""
    rows = each_row()
    how = [(METHODS[number % 4], LAYOUTS[(number + number // 4) % 3]) for number, _ in enumerate(rows)]
    flags = [
        dict(checkpoint_dir=tiny_models(row).folder, data_dir=tmp_path, out_dir=tmp_path, precision="32-true", **method)
        for row, (method, _) in zip(rows, how, strict=True)
    ]
    alone = [Settings(**own) for own in flags]
    divided = [Settings(devices=2, **own, **layout) for own, (_, layout) in zip(flags, how, strict=True)]
    found = gradients_on(2, "model", divided, tmp_path / "found")
    for row, own, s, gradient in zip(rows, alone, divided, found, strict=True):
        print(*row, s.method, s.quantize, s.parallel, s.shard)
        check_same(gradient, gradient_of_model(own), tolerance=4e-6)  # whose random weights enlarge rounding
