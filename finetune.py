"""Fine-tune a model on prepared data: LoRA, QLoRA or all weights, on one device or several.

    python finetune.py --checkpoint_dir checkpoints/ORG/MODEL --data_dir prepared/my --quantize bnb.nf4

The training step is `train_step`. What a run leaves in its folder: `config.yaml` and `source/` (what ran),
`metrics.csv` and `loss.png`, `step-NNNNNN/` (to resume from), `final/` (the adapter in PEFT's format, or the model).
"""

import contextlib
import dataclasses
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import cli
from cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        checkpoint_dir: Model folder: config.json, *.safetensors, tokenizer files.
        data_dir: Folder made by prepare_data.py.
        out_dir: Folder for everything the run leaves.
        method: "lora" or "dora" train an adapter, "full" trains all weights.
        quantize: Keep the frozen base in bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8 (QLoRA).
        precision: Dtype of the weights ("true") or of the products over fp32 weights ("mixed").
        lora_r: Rank of the adapter.
        lora_alpha: Scale of the adapter; its product is multiplied by alpha / r.
        lora_dropout: Share of the adapter's inputs set to zero in training.
        lora_targets: Projections that get an adapter.
        lora_rslora: Multiply by alpha / sqrt(r) instead.
        global_batch_size: Samples in an optimiser step, over all micro-batches and devices.
        micro_batch_tokens: Positions that are in the model at one time, padding included. Does not change the result.
        planner: How samples are cut into micro-batches (batching.py).
        epochs: Passes over the data, unless max_steps is given.
        max_steps: Optimiser steps.
        optimizer: AdamW: fused, with 8-bit states, or with states paged out of the GPU's memory (bitsandbytes).
        learning_rate: The highest learning rate; 2e-4 suits adapters, 2e-5 all weights.
        schedule: Its course after the warm-up, down to zero but for "constant".
        warmup_steps: Steps over which it rises.
        weight_decay: Decay of matrices (not of norms and biases).
        beta1: AdamW's decay of the first moment.
        beta2: AdamW's decay of the second moment.
        max_grad_norm: Clip the gradient to this norm; 0 for no clipping.
        activation_checkpointing: Compute each block again in the backward pass: less memory, a third more time.
        eval_interval: Validate after every so many steps, and at the end; 0 for never.
        save_interval: Write a checkpoint to resume from after every so many steps; 0 for never.
        seed: Of adapter, order of the data and dropout.
        resume: Continue the run in out_dir from its newest checkpoint.
        devices: How many GPUs (or CPU processes) share each step.
    """

    checkpoint_dir: Path
    data_dir: Path
    out_dir: Path = Path("out/finetune")
    method: Literal["lora", "dora", "full"] = "lora"
    quantize: str | None = None
    precision: Literal["32-true", "bf16-true", "bf16-mixed", "16-mixed"] = "bf16-true"
    lora_r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    lora_rslora: bool = False
    global_batch_size: int = 32
    micro_batch_tokens: int = 2048
    planner: str = "sorted_in_step"
    epochs: float = 1.0
    max_steps: int | None = None
    optimizer: Literal["adamw", "adamw-8bit", "adamw-paged", "adamw-8bit-paged"] = "adamw"
    learning_rate: float = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    activation_checkpointing: bool = False
    eval_interval: int = 100
    save_interval: int = 100
    seed: int = 1337
    resume: bool = False
    devices: int = 1

    def __post_init__(self):
        above_zero = ("lora_r", "lora_alpha", "global_batch_size", "micro_batch_tokens", "epochs", "learning_rate")
        for name in (*above_zero, "devices"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be above 0")
        if self.max_steps is not None and self.max_steps < 1:
            raise UserError(f"--max_steps {self.max_steps}: must be above 0, or left out to use --epochs")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "eval_interval", "save_interval", "seed"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be 0 or above")
        for name in ("lora_dropout", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: must be at least 0 and below 1")
        if self.method == "full" and self.quantize:
            raise UserError(f"--quantize {self.quantize} needs --method lora or dora, not full: they cannot train")
        if not self.lora_targets:
            raise UserError("--lora_targets is empty: name at least one projection, such as [q_proj,v_proj]")


if __name__ == "__main__":
    settings = cli.parse(Settings)

import torch
import yaml
from tqdm import tqdm

import lora
from batching import PLANNERS, Samples, in_order, read_data_info
from checkpoint import NOTES, load_model, load_optimizer, read_config, save_model, save_optimizer
from files import check_manifest, new_folder, read_json
from metrics import Metrics, flop_counter, parameter_counts, peak_memory, report
from model import Transformer
from quantize import QUANTIZERS, bitsandbytes
from tokenizer import Tokenizer

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "bf16-mixed": torch.float32, "16-mixed": torch.float32}
HARMLESS = ("resume", "save_interval", "eval_interval", "out_dir")  # settings that may change for a resumed run


def main(s):
    info, train, val = open_data(s)
    check_model(s, train, val)
    newest = newest_checkpoint(s)
    fabric = start_fabric(s)
    model, adapter = build_model(s, fabric.device, newest)
    optimizer = fabric.setup_optimizers(build_optimizer(s, model))
    if newest:
        load_optimizer(optimizer, newest)
        fabric.strategy.precision.load_state_dict(read_json(newest / "scaler.json"))
    elif fabric.is_global_zero:
        record_run(s)
    trainable, frozen = parameter_counts(model)
    fabric.print(f"{trainable:,} trainable parameters beside {frozen:,} frozen ones")

    def save(name, with_optimizer):
        if fabric.is_global_zero:
            with new_folder(s.out_dir / name) as folder:
                save_weights(folder, s, info, model, adapter)
                if with_optimizer:
                    save_optimizer(optimizer, folder)
                    scaler = fabric.strategy.precision.state_dict()  # {} but for 16-mixed
                    (folder / "scaler.json").write_text(json.dumps(scaler) + "\n")
                    (folder / "settings.json").write_text(json.dumps(plain(s), indent=2) + "\n")

    metrics, flops_per_token = train_loop(fabric, s, model, optimizer, train, val, newest, save)
    save("final", with_optimizer=False)
    if fabric.is_global_zero:
        report(s.out_dir, model, metrics, flops_per_token)


def train_loop(fabric, s, model, optimizer, train, val, newest, save):
    """All steps of the run. Returns its `Metrics` and the floating-point operations a token of step 0, if it ran."""
    per_epoch = math.ceil(len(train) / s.global_batch_size)
    total = s.max_steps or math.ceil(s.epochs * per_epoch)
    start = int(newest.name.removeprefix("step-")) if newest else 0
    metrics = Metrics(s.out_dir / "metrics.csv", start, enabled=fabric.is_global_zero)
    counter, flops_per_token = flop_counter(), 0.0
    model.train()
    with tqdm(total=total, initial=start, unit="step", disable=not fabric.is_global_zero) as bar:
        for step, micro_batches in planned_steps(s, train, start, total):
            # Never in a resumed run: the counter takes operations apart, which changes their last bits.
            with counter if step == 0 else contextlib.nullcontext():
                row = train_step(fabric, s, model, optimizer, train, micro_batches, step, learning_rate(s, step, total))
            if step == 0:
                flops = torch.tensor(counter.get_total_flops(), device=fabric.device)
                flops_per_token = fabric.all_reduce(flops, reduce_op="sum").item() / row["tokens"]
            done = step + 1
            if s.eval_interval and len(val) and (done == total or done % s.eval_interval == 0):
                row.update(validate(fabric, s, model, val))
            metrics.add({"step": done, "epoch": done / per_epoch, **row})
            show_progress(bar, row)
            if s.save_interval and done % s.save_interval == 0:
                save(f"step-{done:06d}", with_optimizer=True)
    return metrics, flops_per_token


def train_step(fabric, s, model, optimizer, samples, micro_batches, step, rate):
    """One optimiser step over `micro_batches`. Returns its row of the metrics.

    The loss is the sum over all target tokens of the step, in all micro-batches and on all devices, divided by their
    number, which is known beforehand: so the gradient does not depend on how the step is cut.
    """
    started = time.perf_counter()
    mine = micro_batches[fabric.global_rank :: fabric.world_size]
    target_count = sum(samples.target_counts[i].item() for indices in micro_batches for i in indices)
    torch.manual_seed(s.seed + 1_000_003 * (1 + step * fabric.world_size + fabric.global_rank))  # dropout
    loss = torch.zeros((), device=fabric.device)
    for indices in mine:
        tokens, targets = (tensor.to(fabric.device) for tensor in samples.micro_batch(indices))
        with fabric.autocast():
            micro_loss = model(tokens, targets, recompute=s.activation_checkpointing) / target_count
        fabric.backward(micro_loss)
        loss += micro_loss.detach()
    if fabric.world_size > 1:
        loss = sum_over_devices(fabric, model, loss)
    if not loss.isfinite():
        raise UserError(f"step {step + 1}: the loss is {loss.item()}; {blame(fabric, model, samples, mine)}")
    for group in optimizer.param_groups:
        group["lr"] = rate
    norm = fabric.clip_gradients(model, optimizer, max_norm=s.max_grad_norm or math.inf, error_if_nonfinite=False)
    scaler = getattr(fabric.strategy.precision, "scaler", None)  # of 16-mixed: it skips the step and lowers its scale
    if not norm.isfinite() and scaler is None:
        raise UserError(
            f"step {step + 1}: the gradient's norm is {norm.item()}; lower --learning_rate, or see the data"
        )
    optimizer.step()
    optimizer.zero_grad()
    seconds = time.perf_counter() - started
    lengths = [samples.lengths[indices].tolist() for indices in micro_batches]
    tokens, positions = sum(map(sum, lengths)), sum(max(ls) * len(ls) for ls in lengths)
    return {
        "loss": loss.item(),
        "learning_rate": rate,
        "grad_norm": norm.item(),
        "tokens": tokens,
        "targets": target_count,
        "padding": 1 - tokens / positions,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "memory_gb": peak_memory(fabric.device) / 1e9,
    }


def sum_over_devices(fabric, model, loss):
    """Add up the gradients (in place) and the loss over all devices. One that had no micro-batch adds zeros."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = fabric.all_reduce(grad, reduce_op="sum")
    return fabric.all_reduce(loss, reduce_op="sum")


@torch.no_grad()
def blame(fabric, model, samples, micro_batches):
    """Name the samples, run one by one, whose loss is not finite."""
    bad = []
    for i in (i for indices in micro_batches for i in indices):
        tokens, targets = (tensor.to(fabric.device) for tensor in samples.micro_batch([i]))
        with fabric.autocast():
            if not model(tokens, targets).isfinite():
                bad.append(i)
    if not bad:
        return "no single sample does it: it may be the learning rate"
    return f"training samples {', '.join(map(str, bad[:10]))}{' and others' if len(bad) > 10 else ''} do it"


@torch.no_grad()
def validate(fabric, s, model, val):
    """Loss per target token over the whole validation part, and its perplexity."""
    model.eval()
    loss = torch.zeros((), device=fabric.device)
    for indices in in_order(val.lengths, s.micro_batch_tokens)[fabric.global_rank :: fabric.world_size]:
        tokens, targets = (tensor.to(fabric.device) for tensor in val.micro_batch(indices))
        with fabric.autocast():
            loss += model(tokens, targets)
    model.train()
    if fabric.world_size > 1:
        loss = fabric.all_reduce(loss, reduce_op="sum")
    loss = loss.item() / val.target_counts.sum().item()
    return {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700))}


def planned_steps(s, samples, start, total):
    """The number and the micro-batches of each step from `start` to before `total`."""
    per_epoch = math.ceil(len(samples) / s.global_batch_size)
    plan = None
    for step in range(start, total):
        epoch, place = divmod(step, per_epoch)
        if plan is None or place == 0:
            lengths, counts = samples.lengths, samples.target_counts
            plan = PLANNERS[s.planner](lengths, counts, s.global_batch_size, s.micro_batch_tokens, s.seed, epoch)
        yield step, plan[place]


def learning_rate(s, step, total):
    """The rate of a step (from 0): a linear warm-up that starts above zero, then the schedule down to zero."""
    if step < s.warmup_steps:
        return s.learning_rate * (step + 1) / (s.warmup_steps + 1)
    progress = (step - s.warmup_steps) / max(1, total - s.warmup_steps)
    course = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return s.learning_rate * course[s.schedule]


# ------------------------------------------------------------------------------------------------------- setting up


def open_data(s):
    """data.json and the two parts of the prepared folder. Raises UserError if it was made for another tokenizer."""
    info = read_data_info(s.data_dir)
    read_config(s.checkpoint_dir)
    if Tokenizer(s.checkpoint_dir).file_hash() != info["tokenizer_hash"]:
        raise UserError(
            f"{s.data_dir} was made with another tokenizer: run prepare_data.py again with "
            f"--checkpoint_dir {s.checkpoint_dir}"
        )
    train, val = (Samples(s.data_dir / f"{part}.safetensors") for part in ("train", "val"))
    if not train.target_counts.any():
        raise UserError(f"{s.data_dir} has no training sample with a target token: see how prepare_data.py was run")
    return info, train, val


def check_model(s, train, val):
    """Refuse what cannot work before any weight is read, on a model without memory."""
    config = read_config(s.checkpoint_dir)
    for flag, choices in (("quantize", QUANTIZERS), ("planner", PLANNERS)):
        if getattr(s, flag) not in (None, *choices):
            raise UserError(f"--{flag} {getattr(s, flag)}: expected one of {', '.join(choices)}")
    with torch.device("meta"):
        model = Transformer(config)
        if s.method != "full":
            lora.add_lora(model, adapter_config(s))
    if s.method == "full" and s.precision == "bf16-true":
        print(
            "note: small steps on bf16 weights round to nothing; --precision bf16-mixed trains fp32 ones",
            file=sys.stderr,
        )
    longest = max(part.lengths.max().item() for part in (train, val) if len(part))
    if longest > config.max_position_embeddings:
        raise UserError(
            f"{s.data_dir} has a sample of {longest} tokens, the model's context is {config.max_position_embeddings}: "
            "run prepare_data.py with a smaller --max_seq_length"
        )
    largest = max(part.tokens.max().item() for part in (train, val) if len(part))
    if largest >= config.vocab_size:
        raise UserError(f"{s.data_dir} has the token {largest}, the model's vocabulary ends at {config.vocab_size - 1}")


def adapter_config(s):
    return lora.AdapterConfig(s.method, s.lora_r, s.lora_alpha, s.lora_dropout, s.lora_rslora, tuple(s.lora_targets))


def newest_checkpoint(s):
    """The folder to resume from, checked whole; None for a new run. Raises UserError if that would overwrite one."""
    if s.out_dir.exists() and not s.out_dir.is_dir():
        raise UserError(f"--out_dir {s.out_dir} is a file: choose another")
    if not s.resume:
        if (s.out_dir / "metrics.csv").exists():
            raise UserError(
                f"{s.out_dir} holds a run already: add --resume to continue it, or choose another --out_dir"
            )
        return None
    complete = sorted(s.out_dir.glob("step-*/manifest.json"))
    if not complete:
        return None
    newest = complete[-1].parent
    check_manifest(newest)
    before, now = read_json(newest / "settings.json"), plain(s)
    changed = [name for name in now if before.get(name) != now[name] and name not in HARMLESS]
    if changed:
        differences = ", ".join(f"--{name} {now[name]} (it was {before.get(name)})" for name in changed)
        raise UserError(f"{newest} cannot be resumed with {differences}")
    return newest


def start_fabric(s):
    from lightning.fabric import Fabric

    # The model is loaded in its dtype. Fabric's own "bf16-true" would cast the fp32 adapter too.
    precision = s.precision if s.precision.endswith("mixed") else "32-true"
    try:
        fabric = Fabric(devices=s.devices, precision=precision, strategy="ddp" if s.devices > 1 else "auto")
    except Exception as error:
        raise UserError(f"--devices {s.devices}: {error}") from None
    fabric.launch()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(s.seed)
    return fabric


def build_model(s, device, newest):
    """The model to train, from the checkpoint `newest` if there is one, and its AdapterConfig (None for "full")."""
    dtype = DTYPES[s.precision]
    if s.method == "full":
        return load_model(newest or s.checkpoint_dir, dtype, device).requires_grad_(True), None
    config = adapter_config(s)
    model = load_model(s.checkpoint_dir, dtype, device, s.quantize, adapter_dir=newest)
    if not newest:
        lora.add_lora(model, config)
    return model, config


def build_optimizer(s, model):
    """AdamW over the trainable parameters; norms and biases do not decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": s.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options = {"lr": s.learning_rate, "betas": (s.beta1, s.beta2)}
    if s.optimizer == "adamw":
        # Fabric cannot clip gradients under a loss scaler for the fused one, which would unscale them itself.
        return torch.optim.AdamW(groups, **options, fused=s.precision != "16-mixed")
    optim = bitsandbytes().optim
    kinds = {
        "adamw-8bit": optim.AdamW8bit,
        "adamw-paged": optim.PagedAdamW32bit,
        "adamw-8bit-paged": optim.PagedAdamW8bit,
    }
    return kinds[s.optimizer](groups, **options)


# ------------------------------------------------------------------------------------------------ what the run leaves


def plain(s):
    """The settings as plain values for JSON and YAML."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(s).items()}


def record_run(s):
    """Keep what ran: the resolved settings, to be given to --config, and the code."""
    (s.out_dir / "source").mkdir(parents=True, exist_ok=True)
    (s.out_dir / "config.yaml").write_text(yaml.safe_dump(plain(s), sort_keys=False))
    for path in Path(__file__).parent.glob("*.py"):
        shutil.copy(path, s.out_dir / "source")


def save_weights(folder, s, info, model, adapter):
    """Write the adapter, or all weights, and `onetune.json`: what generate.py must know to match the training."""
    if adapter:
        lora.save_adapter(model, adapter, folder, s.checkpoint_dir)
    else:
        save_model(model, folder, source=s.checkpoint_dir)
    notes = {"prompt_style": info["prompt_style"], "checkpoint_dir": str(s.checkpoint_dir), "quantize": s.quantize}
    (folder / NOTES).write_text(json.dumps(notes, indent=2) + "\n")


def show_progress(bar, row):
    bar.set_postfix_str(
        f"loss {row['loss']:.3f}, lr {row['learning_rate']:.1e}, {row['tokens_per_second']:,.0f} tok/s, "
        f"padding {row['padding']:.0%}, {row['memory_gb']:.2f} GB"
        + (f", val loss {row['val_loss']:.3f} (perplexity {row['val_perplexity']:.2f})" if "val_loss" in row else ""),
        refresh=False,
    )
    bar.update()
    if "val_loss" in row:
        bar.write(f"step {bar.n}: validation loss {row['val_loss']:.4f}, perplexity {row['val_perplexity']:.3f}")


if __name__ == "__main__":
    cli.run(main, settings)
