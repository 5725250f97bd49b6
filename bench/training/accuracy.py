"""Validation loss after N steps, against transformers + PEFT on the same steps: speed must not cost accuracy.

    python bench/training/accuracy.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --data_dir prepared/gsm8k

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

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.measuring import OURS, Measurement, add_line, describe, device_name, print_table
from bench.training import peers
from shell import cli
from shell.cli import UserError


@dataclass(kw_only=True)
class Settings(Measurement):
    """The command line.

    Args:
        data_dir: Folder made by prepare_data.py, with a validation part.
        mode: LoRA on q and v (rank 8) or on all projections (rank 16), QLoRA (NF4) likewise, or all weights.
        dtype: Dtype of the weights.
        steps: Optimiser steps.
        global_batch_size: Samples in a step.
        micro_batch_tokens: Positions in a micro-batch, on both sides.
    """

    data_dir: Path
    mode: Literal[tuple(peers.MODES)] = "lora-qv"
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
from batching import PLANNERS, in_order
from bench.training import ours
from training import build
from training.steps import planned_steps
from weights import peft_format

PEFT = "transformers + PEFT"
COLUMNS = {
    "side": "{side}", "validation loss before": "{val_loss_before:.4f}", "after": "{val_loss:.4f}",
    "first training loss": "{first_loss:.4f}", "last": "{last_loss:.4f}", "seconds": "{seconds:.0f}",
}  # fmt: skip


def main(s):
    """Train both sides and print how far apart they end."""
    job = {
        "checkpoint_dir": s.checkpoint_dir,
        "data_dir": s.data_dir,
        "dtype": s.dtype,
        **peers.MODES[s.mode]._asdict(),
    }
    training = ours.training_settings(
        job, global_batch_size=s.global_batch_size, micro_batch_tokens=s.micro_batch_tokens, max_grad_norm=1.0
    )
    data = build.open_data(training)
    if not len(data.val):
        raise UserError(f"{s.data_dir} has no validation samples: run prepare_data.py with --val_fraction above 0")
    build.check_model(training, data)
    plan = [micro_batches for _, micro_batches in planned_steps(training, data.train, 0, s.steps)]
    with tempfile.TemporaryDirectory() as adapter_dir:
        sides = {
            OURS: train_ours(training, data, plan, adapter_dir),
            PEFT: train_peft(job, training, data, plan, adapter_dir),
        }
    difference = sides[OURS]["val_loss"] / sides[PEFT]["val_loss"] - 1
    print_table(COLUMNS, [{"side": name, **side} for name, side in sides.items()])
    print(f"relative difference of the validation losses after {s.steps} steps: {difference:+.3%}")
    line = {"onetune": sides[OURS], "peft": sides[PEFT], "relative_difference": difference}
    add_line(s.out_file, describe(s) | line)


def train_ours(training, data, plan, adapter_dir):
    """Train and validate with finetune.py's functions. Writes the adapter, as it was before, into `adapter_dir`."""
    run = build.build_run(training, build.start_fabric(training), data, newest=None, identity={})
    if run.adapter:
        peft_format.save_adapter(run.model, run.adapter, adapter_dir, training.checkpoint_dir)
    step = ours.step_function(run)
    return train_side(
        OURS,
        lambda number, micro_batches: step(number, micro_batches)["loss"],
        lambda: finetune.validate(run)["val_loss"],
        plan,
    )


def train_peft(job, training, data, plan, adapter_dir):
    """The same in a plain loop over transformers' model with PEFT's adapter, loaded from `adapter_dir`."""
    model, device, train, val = peft_model(job, adapter_dir).train(), device_name(), data.train, data.val
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=training.learning_rate, betas=training.betas, weight_decay=0.0, fused=True
    )

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
        parts = in_order(PLANNERS["sorted_in_step"], val, training.micro_batch_tokens)
        total = sum(summed_loss(val, indices).item() for indices in parts)
        model.train()
        return total / val.shards.listing.targets

    return train_side(PEFT, step, validate, plan)


def peft_model(job, adapter_dir):
    """transformers' model, with PEFT's trainable adapter from `adapter_dir` unless all weights are trained."""
    from peft import PeftModel

    model = peers.transformers_model(job)
    return PeftModel.from_pretrained(model, adapter_dir, is_trainable=True) if job["lora"] else model


def train_side(name, step, validate, plan):
    """Take all steps of one side: its losses and time."""
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
