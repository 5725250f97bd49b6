"""Training at 7B shapes against the device's limits, with transformers + PEFT beside it.

Ours is finetune.py's own step. FLOPs count 2 operations for each weight of a matrix, token and product: 4 N a token for
an adapter (forward, and the gradient of the input), 6 N for all weights. Attention and the adapters themselves count
for nothing. "mfu" is these over the data sheet's rate, where it is known. "share" is of the matrix product measured in
the same run, and counts 2 N more where blocks are computed again. "plan" is the peak that plan.py predicts for our step
over the measured one; on a CPU that is the whole process', so there it means nothing.
"""

import importlib.util
import time
import traceback
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

import lora
from bench.gpu import profiling
from bench.gpu.device import synchronize
from bench.gpu.random_models import MICRO_BATCHES, SHAPES, random_model, random_samples, random_weight
from bench.measuring import OURS, peak_memory
from bench.roofline import matrix_weights
from bench.training import ours, peers
from quantize import bitsandbytes
from training import build
from training.from_settings import adapter_config
from training.memory import plan
from training.steps import planned_steps
from weights.families import config_from_json

# The peer's sides: how transformers computes attention, and whether under autocast, as its Trainer does for `bf16`.
PEER = "transformers + PEFT"
SDPA, FLASH, AUTOCAST = f"{PEER}, SDPA", f"{PEER}, FlashAttention", f"{PEER}, SDPA, autocast"
ATTENTION = {SDPA: "sdpa", FLASH: "flash_attention_2", AUTOCAST: "sdpa"}
SIDES = (OURS, *ATTENTION)
WARM_UP = 2  # steps


@dataclass(frozen=True)
class Training:
    """One training run."""

    shape: str
    kind: Literal["lora", "qlora", "full"]  # an adapter of rank 16 on all projections, over NF4, or all weights
    recompute: bool
    side: str
    seconds = 20  # to be left on the clock when it is started; what it takes at most is about this

    def __str__(self):
        return f"{self.shape} {self.kind}{', recomputing' if self.recompute else ''}: {self.side}"

    def about(self):
        """What its line says of it."""
        return vars(self)

    def measure(self, s, limits):
        """Its row."""
        if self.side == FLASH and not importlib.util.find_spec("flash_attn"):
            return {"skipped": "flash-attn is not installed"}
        return measure_training(s, self, limits)


@dataclass(frozen=True)
class Profiling:
    """One step of ours, by kernel."""

    shape: str
    kind: Literal["lora", "qlora", "full"]
    seconds = 20

    def __str__(self):
        return f"{self.shape} {self.kind}: profile of a step"

    def about(self):
        """What its line says of it."""
        return vars(self)

    def measure(self, s, limits):
        """Its row. The whole table goes to a file."""
        step = start_step(s, Training(self.shape, self.kind, self.kind == "full", OURS))[0]
        for number in range(WARM_UP):
            step(number)
        path = s.out_dir / f"profile-{self.shape}-{self.kind}.txt"
        return profiling.profile(lambda: step(WARM_UP), torch.device(s.device), path)


def measurements(s):
    """All, the most important first: each kind once on every side, profiles, and then again."""
    first, *others = SHAPES[s.shape]

    def sides(shape, recompute=False, kinds=("lora", "qlora")):
        return [Training(shape, kind, recompute, side) for kind in kinds for side in SIDES]

    def full(shape):
        return [Training(shape, "full", True, side) for side in SIDES if side != AUTOCAST]

    yield from [*sides(first), *full(first)]
    yield from (Profiling(first, kind) for kind in ("lora", "qlora", "full"))
    for _ in range(1, s.repetitions):
        yield from sides(first)
    yield from sides(first, recompute=True)
    yield Training(first, "full", False, OURS)
    for shape in others:
        yield from [*sides(shape), *full(shape)]


def measure_training(s, run, limits):
    """The row of a `Training`."""
    device = torch.device(s.device)
    step, samples = start_step(s, run)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started, losses, norms = time.perf_counter(), [], []
    for number in range(WARM_UP + s.steps):
        if number == WARM_UP:
            synchronize(device)
            started = time.perf_counter()
        loss, norm = step(number)
        assert norm > 0, "the gradient is zero, so nothing was measured"
        losses.append(loss)
        norms.append(norm)
    synchronize(device)
    seconds = time.perf_counter() - started
    rate = s.steps * samples.positions() / seconds
    useful = rate * {"lora": 4, "qlora": 4, "full": 6}[run.kind]  # operations a second for each weight
    weights, nominal = matrix_weights(config_from_json(SHAPES[s.shape][run.shape])), limits["nominal_tflops"]
    row = {
        "tokens_per_second": rate,
        "mfu": useful * weights / (nominal * 1e12) if nominal else None,
        "share": (useful + rate * 2 * run.recompute) * weights / (limits["tflops"] * 1e12),
        "peak_gb": peak_memory() / 1e9,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "grad_norm": norms[-1],
        "step_seconds": seconds / s.steps,
        "micro_batch_tokens": s.tokens,
        "sample_tokens": s.sample_tokens,
    }
    return row | prediction(s, run, row["peak_gb"]) if run.side == OURS else row


def start_step(s, run):
    """A function that takes the step of a number, and the samples that each step trains on."""
    shape, device = SHAPES[s.shape][run.shape], torch.device(s.device)
    samples = random_samples(s, shape["vocab_size"])
    return (our_step if run.side == OURS else peer_step)(s, run, shape, samples, device), samples


def our_settings(s, run):
    """The flags of finetune.py for a `Training`."""
    mode = peers.MODES[run.kind if run.kind == "full" else f"{run.kind}-all"]
    return ours.training_settings(
        {"checkpoint_dir": "random", "data_dir": "random", "dtype": "bf16", **mode._asdict()},
        optimizer="adamw-8bit" if run.kind == "full" else "adamw",
        global_batch_size=MICRO_BATCHES * s.tokens // s.sample_tokens,
        micro_batch_tokens=s.tokens,
        recompute=float(run.recompute),
    )


def prediction(s, run, peak_gb):
    """The predicted peak of our step, for its row; the reason where there is none, for the measurement still counts."""
    try:
        predicted = predicted_peak(s, run) / 1e9
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"no prediction: {type(error).__name__}: {error}"}
    return {"predicted_gb": predicted, "plan": predicted / peak_gb}


def predicted_peak(s, run):
    """Bytes, by plan.py."""
    settings, config = our_settings(s, run), config_from_json(SHAPES[s.shape][run.shape])
    job = plan.Job(
        config=config,
        device=s.device,
        dtype=torch.bfloat16,
        quantize=settings.quantize,
        adapter=None if run.kind == "full" else adapter_config(settings, config),
        optimizer=settings.optimizer,
        recompute=settings.recompute,
    )
    return plan.Predictor(job).peak(plan.packed_shape(s.tokens, s.sample_tokens, targets=s.tokens))


def our_step(s, run, shape, samples, device):
    """A function that takes the step of a number with finetune.py's own: loss and norm of the gradient."""
    settings = our_settings(s, run)
    fabric = build.start_fabric(settings)
    model = random_model(shape, fabric.device, settings.quantize)
    if run.kind == "full":
        model.requires_grad_(True)
    else:
        lora.add_lora(model, adapter_config(settings, model.config))
    steps = dict(planned_steps(settings, samples, 0, WARM_UP + s.steps))
    optimizer = fabric.setup_optimizers(build.build_optimizer(settings, model))
    train_step = ours.step_function(build.Run(settings, fabric, model.train(), optimizer, samples))

    def step(number):
        row = train_step(number, steps[number])
        return row["loss"], row["grad_norm"]

    return step


def peer_step(s, run, shape, samples, device):
    """The same of transformers + PEFT, in a plain loop; with autocast as transformers' Trainer does for `bf16`."""
    from peft import get_peft_model

    model = peer_model(shape, device, ATTENTION[run.side], quantized=run.kind == "qlora")
    if run.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if run.kind != "full":
        model = get_peft_model(model, peers.peft_config(peers.LORA_ALL))
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = peer_optimizer(run, parameters)
    micro_batches = torch.arange(len(samples)).split(s.tokens // s.sample_tokens)
    target_count = samples.shards.listing.targets

    def step(number):
        total = torch.zeros((), device=device)
        for indices in micro_batches:  # all of one length: there is no padding to mask
            tokens, targets = (tensor.to(device) for tensor in samples.padded(indices.tolist())[:2])
            with torch.autocast(device.type, torch.bfloat16, enabled=run.side == AUTOCAST):
                logits = model(input_ids=tokens, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum") / target_count
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total.item(), norm.item()

    return step


def peer_optimizer(run, parameters):
    """The peer's, of the same kind as ours."""
    learning_rate = peers.MODES["full" if run.kind == "full" else "lora-all"].learning_rate
    if run.kind == "full":
        return bitsandbytes().optim.AdamW8bit(parameters, lr=learning_rate, weight_decay=0.0)
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)


@torch.no_grad()
def peer_model(shape, device, attention, quantized):
    """transformers' model of a config.json with the weights of `random_model`, in NF4 as its own loading makes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape)
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.copy_(random_weight(name, parameter.shape, device))
    if quantized:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not model.lm_head:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, peer_nf4(module, device))
        model.is_loaded_in_4bit = True  # by this PEFT knows its layers
    return model


def peer_nf4(linear, device):
    """transformers' NF4 layer with the weight of a linear layer."""
    layers = bitsandbytes().nn
    layer = layers.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta"
    )
    options = {"quant_type": "nf4", "compress_statistics": False, "requires_grad": False, "module": layer}
    layer.weight = layers.Params4bit(linear.weight.data, **options).to(device)
    return layer


def differing_losses(rows):
    """The peer's runs whose first loss is not ours to 1%: the two sides would not do the same."""
    trained = [(run, row["first_loss"]) for run, row in rows if "first_loss" in row]
    own = {(run.shape, run.kind): loss for run, loss in trained if run.side == OURS}
    pairs = [(run, loss, own.get((run.shape, run.kind))) for run, loss in trained]
    differing = {str(run) for run, loss, known in pairs if known and abs(loss - known) > 0.01 * known}
    return [f"{name}: its first loss is not ours" for name in sorted(differing)]
