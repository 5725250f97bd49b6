"""Training speed and memory against transformers + PEFT: the same model, samples, steps and adapter, by turns.

    python bench/finetune.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --data_dir prepared/orders

Needs requirements-dev.txt. Each run is a process of its own. Ours is `train_step` of finetune.py. The peer is a plain
loop over micro-batches of `--peer_micro_batch` samples, unsorted, padded on the right, with all logits; it is right to
try several and to publish its best. Printed for each: the median tokens/s (no padding counted) of the steps after the
first two, peak memory, first and last loss, gradient norm.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project's folder, from wherever this is started

import cli
from cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        checkpoint_dir: Model folder.
        data_dir: Folder made by prepare_data.py.
        quantize: bnb.nf4 for QLoRA.
        steps: Optimiser steps of a run, at least 4.
        runs: Runs of each side; the median counts.
        global_batch_size: Samples in a step.
        micro_batch_tokens: Our micro-batches.
        peer_micro_batch: Samples in the peer's micro-batches.
        out_file: JSON lines, one a run, are added to this file.
        only: Used by the script itself: run one side and print its line.
    """

    checkpoint_dir: Path
    data_dir: Path
    quantize: Literal["bnb.nf4"] | None = None
    steps: int = 12
    runs: int = 3
    global_batch_size: int = 16
    micro_batch_tokens: int = 512
    peer_micro_batch: int = 16
    out_file: Path | None = None
    only: Literal["onetune", "transformers + PEFT"] | None = None

    def __post_init__(self):
        if self.steps < 4 or self.runs < 1:
            raise UserError("--steps must be at least 4 and --runs at least 1")


if __name__ == "__main__":
    settings = cli.parse(Settings)

SIDES = ("onetune", "transformers + PEFT")


def main(s):
    if s.only:
        print(json.dumps(measure(s)))
        return
    results = {side: [] for side in SIDES}
    for _ in range(s.runs):
        for side in SIDES:
            done = subprocess.run(
                [sys.executable, *sys.argv, "--only", side], stdout=subprocess.PIPE, text=True, check=True
            )
            line = done.stdout.splitlines()[-1]
            results[side].append(json.loads(line))
            print(line, flush=True)
            if s.out_file:
                s.out_file.parent.mkdir(parents=True, exist_ok=True)
                with open(s.out_file, "a") as file:
                    file.write(line + "\n")
    first = [results[side][0]["first_loss"] for side in SIDES]
    if abs(first[0] - first[1]) > 0.01 * first[1]:
        raise UserError(f"the first losses differ, {first[0]} and {first[1]}: the two sides do not do the same")
    print(f"\n{'':22}{'tokens/s':>10}{'memory':>10}")
    speeds, peaks = (
        {side: statistics.median(run[key] for run in results[side]) for side in SIDES}
        for key in ("tokens_per_second", "peak_gb")
    )
    for side in SIDES:
        print(f"{side:22}{speeds[side]:10.0f}{peaks[side]:7.2f} GB")
    print(f"{'ratio':22}{speeds[SIDES[0]] / speeds[SIDES[1]]:10.2f}{peaks[SIDES[0]] / peaks[SIDES[1]]:10.2f}")


def measure(s):
    """One run of one side, as a dict for its JSON line."""
    import torch

    from batching import Samples, sorted_in_step

    samples = Samples(s.data_dir / "train.safetensors")
    plan = sorted_in_step(
        samples.lengths, samples.target_counts, s.global_batch_size, s.micro_batch_tokens, seed=1, epoch=0
    )
    step = (ours if s.only == "onetune" else peer)(s, samples)
    rows = []
    for number, micro_batches in enumerate(plan[: s.steps]):
        started = time.perf_counter()
        loss, norm = step(number, micro_batches)
        seconds = time.perf_counter() - started
        tokens = sum(samples.lengths[i].item() for indices in micro_batches for i in indices)
        if not norm > 0:
            raise UserError(f"step {number}: the gradient is zero, so nothing was measured")
        rows.append((tokens / seconds, loss, norm))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    return {
        "side": s.only,
        "tokens_per_second": statistics.median(rate for rate, _, _ in rows[2:]),
        "peak_gb": peak / 1e9,
        "first_loss": rows[0][1],
        "last_loss": rows[-1][1],
        "last_grad_norm": rows[-1][2],
        "settings": {
            key: value.name if isinstance(value, Path) else value
            for key, value in asdict(s).items()
            if key not in ("only", "out_file")
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
    }


def ours(s, samples):
    import finetune

    settings = finetune.Settings(s.checkpoint_dir, s.data_dir, quantize=s.quantize)
    fabric = finetune.start_fabric(settings)
    model, _ = finetune.build_model(settings, fabric.device, newest=None)
    optimizer = fabric.setup_optimizers(finetune.build_optimizer(settings, model))
    model.train()

    def step(number, micro_batches):
        row = finetune.train_step(fabric, settings, model, optimizer, samples, micro_batches, number, 2e-4)
        return row["loss"], row["grad_norm"]

    return step


def peer(s, samples):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"dtype": torch.bfloat16, "device_map": device}
    if s.quantize:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    torch.manual_seed(1337)
    base = AutoModelForCausalLM.from_pretrained(s.checkpoint_dir, **options)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0, fused=True)

    def step(number, micro_batches):
        drawn = sorted(i for indices in micro_batches for i in indices)
        target_count, total = sum(samples.target_counts[i].item() for i in drawn), 0.0
        for start in range(0, len(drawn), s.peer_micro_batch):
            tokens, targets = samples.micro_batch(drawn[start : start + s.peer_micro_batch])
            mask = (torch.arange(tokens.size(1)) < samples.lengths[drawn[start : start + len(tokens)]][:, None]).long()
            out = model(input_ids=tokens.to(device), attention_mask=mask.to(device))
            logits = out.logits.flatten(0, 1).float()
            loss = (
                torch.nn.functional.cross_entropy(logits, targets.flatten().to(device), reduction="sum") / target_count
            )
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total, norm.item()

    return step


if __name__ == "__main__":
    cli.run(main, settings)
