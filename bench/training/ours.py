"""Our side of a comparison of training: finetune.py's own functions, with no schedule, checkpoints or metrics."""

from collections.abc import Callable
from pathlib import Path

import finetune
from batching import Samples
from model import Transformer


def training_settings(job: dict, **options) -> finetune.Settings:
    """The flags of finetune.py for a mode of bench/training/peers.py, with other `options` as finetune.py names them.

    job: checkpoint_dir, data_dir, dtype ("bf16" or "fp32"), and the fields of the mode: lora, quantize, learning_rate.
    """
    lora = job["lora"]
    if lora:
        options |= {"lora_r": lora["r"], "lora_alpha": lora["alpha"], "lora_targets": lora["targets"]}
    return finetune.Settings(
        Path(job["checkpoint_dir"]),
        Path(job["data_dir"]),
        method="lora" if lora else "full",
        quantize="bnb.nf4" if job["quantize"] else None,
        precision={"bf16": "bf16-true", "fp32": "32-true"}[job["dtype"]],
        learning_rate=job["learning_rate"],
        **options,
    )


def step_function(fabric, settings: finetune.Settings, model: Transformer, samples: Samples) -> Callable[..., dict]:
    """`step(number, micro_batches)`: an optimiser step at the settings' learning rate; returns its row of metrics."""
    optimizer = fabric.setup_optimizers(finetune.build_optimizer(settings, model))
    model.train()

    def step(number, micro_batches):
        rate = settings.learning_rate
        return finetune.train_step(fabric, settings, model, optimizer, samples, micro_batches, number, rate)

    return step
