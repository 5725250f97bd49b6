"""Our side of a comparison of training: finetune.py's own step, with no schedule, checkpoints or metrics."""

from collections.abc import Callable
from pathlib import Path

import finetune
from batching import Samples
from training import build
from training.settings import Settings


def training_settings(job: dict, **options) -> Settings:
    """The flags of finetune.py for a mode of bench/training/peers.py, with other `options` as finetune.py names them.

    job: checkpoint_dir, data_dir, dtype ("bf16" or "fp32"), and the fields of the mode: lora, quantize, learning_rate.
    """
    lora = job["lora"]
    if lora:
        options |= {"lora_r": lora["r"], "lora_alpha": lora["alpha"], "lora_targets": lora["targets"]}
    return Settings(
        Path(job["checkpoint_dir"]),
        Path(job["data_dir"]),
        method="lora" if lora else "full",
        quantize="bnb.nf4" if job["quantize"] else None,
        precision={"bf16": "bf16-true", "fp32": "32-true"}[job["dtype"]],
        learning_rate=job["learning_rate"],
        **options,
    )


def build_run(settings: Settings, fabric, samples: Samples) -> build.Run:
    """A run at its start that trains on `samples` and does not validate."""
    return build.build_run(settings, fabric, build.Data({}, samples, None, []), newest=None, identity={})


def step_function(run: build.Run) -> Callable[[int, list[list[int]]], dict]:
    """`step(number, micro_batches)`: an optimiser step at the settings' learning rate; returns its row of metrics."""
    return lambda number, micro_batches: finetune.train_step(run, micro_batches, number, run.settings.learning_rate)
