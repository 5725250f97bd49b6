"""Nothing is traded for speed: after N steps the validation loss is that of transformers + PEFT on the same steps.

    python bench/accuracy.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --data_dir prepared/gsm8k

Needs requirements-dev.txt. Both sides start from the same adapter, take the same steps at one constant learning rate
with AdamW and clipping at 1, and validate on the same samples. Ours trains and validates with finetune.py's own
functions; the other side is a plain loop over transformers' model, PEFT's adapter and all logits.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the project's folder, from wherever this is started

from shell import cli
from shell.cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        checkpoint_dir: Model folder.
        data_dir: Folder made by prepare_data.py, with a validation part.
        mode: LoRA on q and v (rank 8) or on all projections (rank 16), QLoRA (NF4) likewise, or all weights.
        dtype: Of the weights.
        steps: Optimiser steps.
        global_batch_size: Samples in a step.
        micro_batch_tokens: Positions in a micro-batch, on both sides.
        out_file: A JSON line is added to this file.
    """

    checkpoint_dir: Path
    data_dir: Path
    mode: Literal["lora-qv", "lora-all", "qlora-qv", "qlora-all", "full"] = "lora-qv"
    dtype: Literal["bf16", "fp32"] = "fp32"
    steps: int = 200
    global_batch_size: int = 8
    micro_batch_tokens: int = 1024
    out_file: Path = Path("out/bench/accuracy.jsonl")

    def __post_init__(self):
        cli.check_numbers(self, "steps", "global_batch_size", "micro_batch_tokens", above=0)


if __name__ == "__main__":
    settings = cli.parse(Settings)

import torch
import torch.nn.functional as F
from tqdm import tqdm

import finetune
import limits
import peers
from batching import PLANNERS, in_order
from lines import add_line, installed_versions
from weights import peft_format


def main(s):
    training = training_settings(s)
    _, train, val = finetune.open_data(training)
    if not len(val):
        raise UserError(f"{s.data_dir} has no validation samples: run prepare_data.py with --val_fraction above 0")
    finetune.check_model(training, train, val)
    fabric = finetune.start_fabric(training)
    plan = [micro_batches for _, micro_batches in finetune.planned_steps(training, train, 0, s.steps)]
    with tempfile.TemporaryDirectory() as adapter_dir:
        ours = train_ours(fabric, training, train, val, plan, adapter_dir)
        theirs = train_peft(s, training, fabric.device, train, val, plan, adapter_dir)
    difference = ours["val_loss"] / theirs["val_loss"] - 1
    for name, side in (("onetune", ours), ("transformers + PEFT", theirs)):
        print(
            f"{name:20} validation loss {side['val_loss_before']:.4f} before, {side['val_loss']:.4f} after {s.steps} "
            f"steps; training loss {side['first_loss']:.4f} to {side['last_loss']:.4f}, {side['seconds']:.0f} s"
        )
    print(f"relative difference  {difference:+.3%}")
    kept = ("mode", "dtype", "steps", "global_batch_size", "micro_batch_tokens")
    line = {
        "settings": {
            "checkpoint": s.checkpoint_dir.name, "data": s.data_dir.name, **{key: getattr(s, key) for key in kept},
        },
        "onetune": ours, "peft": theirs, "relative_difference": difference,
        "machine": limits.machine(), "versions": installed_versions(),
    }  # fmt: skip
    add_line(s.out_file, line)


def training_settings(s):
    """The command line of finetune.py that trains as `s` says."""
    mode = peers.MODES[s.mode]
    adapter = {}
    if mode.lora:
        adapter = {f"lora_{key}": mode.lora[key] for key in ("r", "alpha", "targets")}
    return finetune.Settings(
        s.checkpoint_dir,
        s.data_dir,
        method="lora" if mode.lora else "full",
        quantize="bnb.nf4" if mode.quantize else None,
        precision={"bf16": "bf16-true", "fp32": "32-true"}[s.dtype],
        learning_rate=mode.learning_rate,
        global_batch_size=s.global_batch_size,
        micro_batch_tokens=s.micro_batch_tokens,
        max_grad_norm=1.0,
        **adapter,
    )


def train_ours(fabric, training, train, val, plan, adapter_dir):
    """Train and validate with finetune.py's functions. Leaves the adapter, as it was before, in `adapter_dir`."""
    model, adapter = finetune.build_model(training, fabric.device, newest=None)
    if adapter:
        peft_format.save_adapter(model, adapter, adapter_dir, training.checkpoint_dir)
    optimizer = fabric.setup_optimizers(finetune.build_optimizer(training, model))
    model.train()

    def step(number, micro_batches):
        rate = training.learning_rate
        return finetune.train_step(fabric, training, model, optimizer, train, micro_batches, number, rate)["loss"]

    return train_side("onetune", step, lambda: finetune.validate(fabric, training, model, val)["val_loss"], plan)


def train_peft(s, training, device, train, val, plan, adapter_dir):
    """The same in a plain loop over transformers' model with PEFT's adapter, loaded from `adapter_dir`."""
    model = peft_model(s, device, adapter_dir).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = (training.beta1, training.beta2)
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, betas=betas, weight_decay=0.0, fused=True)

    def summed_loss(samples, indices):
        tokens, targets, _ = samples.padded(indices)
        mask = torch.arange(tokens.size(1)) < samples.lengths[indices][:, None]
        logits = model(input_ids=tokens.to(device), attention_mask=mask.long().to(device)).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().to(device), reduction="sum")

    def step(number, micro_batches):
        count, total = sum(train.target_counts[i].item() for part in micro_batches for i in part), 0.0
        for indices in micro_batches:
            loss = summed_loss(train, indices) / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return total

    @torch.no_grad()
    def validate():
        model.eval()
        parts = in_order(PLANNERS["sorted_in_step"], val.lengths, training.micro_batch_tokens)
        total = sum(summed_loss(val, indices).item() for indices in parts)
        model.train()
        return total / val.target_counts.sum().item()

    return train_side("transformers + PEFT", step, validate, plan)


def peft_model(s, device, adapter_dir):
    """transformers' model, with PEFT's trainable adapter from `adapter_dir` unless all weights are trained."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    mode, job = peers.MODES[s.mode], {"dtype": s.dtype}
    options = {"dtype": peers.torch_dtype(job), "device_map": str(device)}
    if mode.quantize:
        options["quantization_config"] = peers.nf4_config(job)
    model = AutoModelForCausalLM.from_pretrained(s.checkpoint_dir, **options)
    return PeftModel.from_pretrained(model, adapter_dir, is_trainable=True) if mode.lora else model


def train_side(name, step, validate, plan):
    """Take all steps of one side and describe how it went."""
    before, started = validate(), time.perf_counter()
    losses = [step(number, part) for number, part in enumerate(tqdm(plan, desc=name, unit="step", leave=False))]
    seconds = time.perf_counter() - started
    return {
        "val_loss_before": before,
        "val_loss": validate(),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "seconds": seconds,
    }


if __name__ == "__main__":
    cli.run(main, settings)
