"""What one GPU does: training and decoding at 7B shapes against its own limits and against transformers + PEFT.

    python bench/machine/gpu.py --out_file gpu.jsonl          # bench/gpu.sh runs the tests that need a GPU before it
    python bench/machine/gpu.py --shape tiny --device cpu     # all of it in small, to try the script itself

Weights are random and made on the device, nothing is downloaded. Training is finetune.py's own step, decoding
generate.py's own loop. Every measurement is a line of JSON, the most important ones first. When the time runs out the
rest are lines that say so; one that runs out of memory or fails is a line, too.

Shares count 2 operations for each weight of a matrix, token and product: 4 N a token for an adapter (forward, and the
gradient of the input), 6 N for all weights, 2 N more with activation checkpointing. Attention and the adapters
themselves count for nothing. They are divided by the matrix product measured in the same run, and by the data sheet.
"plan" is the peak that plan.py predicts for our step over the measured one; on a CPU that is the whole process', so
there the share means nothing.
"""

import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.measuring import OURS, add_line, describe, machine_name, peak_memory, print_table, summarize
from bench.shapes import SHAPES as PUBLISHED
from bench.training import peers
from shell import cli
from shell.cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        shape: "7b" for Llama-2-7B and Mistral-7B, "tiny" for a model that a CPU runs in no time.
        device: What to measure.
        tokens: Positions of a micro-batch in training; a step has two.
        sample_tokens: Positions of a sample.
        steps: Measured steps of a training run, after two that are not.
        repetitions: Runs of each side; the sides alternate, and the medians count.
        prompt_tokens: Length of a prompt in decoding.
        new_tokens: Tokens decoded.
        seconds: No measurement is started that may not end in this time.
        commit: Commit of the code, for the results, where there is no git to ask.
        out_file: The lines of JSON are added to this file.
    """

    shape: Literal["7b", "tiny"] = "7b"
    device: Literal["cuda", "cpu"] = "cuda"
    tokens: int = 2048
    sample_tokens: int = 512
    steps: int = 4
    repetitions: int = 3
    prompt_tokens: int = 128
    new_tokens: int = 128
    seconds: int = 540
    commit: str | None = None
    out_file: Path | None = None

    def __post_init__(self):
        numbers = ("tokens", "sample_tokens", "steps", "repetitions", "prompt_tokens", "new_tokens")
        cli.check_numbers(self, *numbers, above=0)
        if self.tokens % self.sample_tokens:
            raise UserError(f"--tokens {self.tokens} must be a multiple of --sample_tokens {self.sample_tokens}")


if __name__ == "__main__":
    settings = cli.parse(Settings)
    if settings.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # finetune.py takes a GPU where it sees one

import torch
import torch.nn.functional as F
from torch import nn

import generate
import lora
from batching import Samples
from bench.inference.sides import Ids
from bench.training import ours
from inference import sampling
from inference.decode import fastest_decoder
from model import Transformer
from preparation.record_store import SampleWriter
from quantize import BLOCK, QUANTIZERS, bitsandbytes
from training import build
from training.from_settings import adapter_config
from training.memory import plan
from training.steps import planned_steps
from weights.checkpoint import fill_model
from weights.families import config_from_json

TINY = PUBLISHED["Llama-2-7B"] | dict(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
SHAPES = {"7b": {name: PUBLISHED[name] for name in ("Llama-2-7B", "Mistral-7B")}, "tiny": {"tiny": TINY}}
# Dense bf16 products as the data sheets have them, TFLOP/s, by a part of the device's name.
NOMINAL_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312}

SIDES = (OURS, "transformers + PEFT", PEFT_AUTOCAST := "transformers + PEFT, autocast")
MICRO_BATCHES = 2  # in an optimiser step
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

    def measure(self, s, limits):
        """Its row."""
        return measure_training(s, self, limits)


@dataclass(frozen=True)
class Decoding:
    """One batch of prompts answered."""

    shape: str
    quantize: str | None
    batch: int
    seconds = 20

    def __str__(self):
        return f"{self.shape} decode {self.quantize or 'bf16'}, batch {self.batch}"

    def measure(self, s, limits):
        """Its row."""
        return measure_decoding(s, self, limits)


@dataclass(frozen=True)
class Dequantizing:
    """Our NF4 kernels and bitsandbytes' on a weight of the shape's MLP."""

    shape: str
    seconds = 10

    def __str__(self):
        return f"{self.shape} dequantise NF4"

    def measure(self, s, limits):
        """Its row."""
        return measure_dequantizing(s, self, limits)


def main(s):
    """Measure all parts, the most important first, and print their table."""
    if s.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device")
    deadline = time.monotonic() + s.seconds
    device = torch.device(s.device)
    limits = measure_limits(device)
    about = about_call(s)
    record(s, about | {"part": "limits", **limits})
    rows = []
    for part in parts(s):
        row = attempt(part, s, limits, deadline)
        rows.append((part, row))
        record(s, about | {"part": type(part).__name__.lower(), **vars(part), **row})
    show(rows, limits, about)
    disagreeing = differing_losses(rows)
    failed = [str(part) for part, row in rows if row.get("failed")]
    if disagreeing or failed:
        raise UserError(
            f"failed: {', '.join(failed) or 'none'}; first losses differ: {', '.join(disagreeing) or 'none'}"
        )


def parts(s):
    """All measurements, the most important first."""
    first, *others = SHAPES[s.shape]

    def trainings(shape, kind, recompute, repetitions):
        return [Training(shape, kind, recompute, side) for _ in range(repetitions) for side in SIDES]

    yield from trainings(first, "lora", False, s.repetitions)
    yield from trainings(first, "qlora", False, s.repetitions)
    yield from [Decoding(first, quantize, batch) for batch in (1, 16) for quantize in (None, "bnb.nf4")]
    yield from [Training(first, "full", recompute, OURS) for recompute in (True, False)]
    yield Dequantizing(first)
    yield from trainings(first, "qlora", True, s.repetitions)
    yield from trainings(first, "lora", True, s.repetitions)
    for shape in others:
        for kind, recompute in itertools.product(("lora", "qlora"), (False, True)):
            yield from trainings(shape, kind, recompute, 1)
        yield Training(shape, "full", True, OURS)
        yield from [Decoding(shape, quantize, batch) for batch in (1, 16) for quantize in (None, "bnb.nf4")]


def attempt(part, s, limits, deadline):
    """The row of a measurement; one that says why if there is none."""
    if time.monotonic() + part.seconds > deadline:
        return {"skipped": "no time left"}
    print(part, file=sys.stderr, flush=True)
    gc.collect()
    if s.device == "cuda":
        torch.cuda.empty_cache()
    try:
        return part.measure(s, limits)
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}
    except Exception as error:  # the machine is rented by the minute: the other measurements still count
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def record(s, row):
    """Print a line, and add it to the file."""
    print(json.dumps(row), flush=True)
    if s.out_file:
        add_line(s.out_file, row)


def about_call(s):
    """What all lines share."""
    call = describe(s)
    call["commit"] = s.commit or call["commit"]
    name = machine_name(call["machine"])
    return call | {"nominal_tflops": next((rate for key, rate in NOMINAL_TFLOPS.items() if key in name), None)}


def synchronize(device):
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_per_call(call, device, calls=10):
    """Median over 5 rounds of so many calls each, after one that does not count."""
    times = []
    for _ in range(6):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times[1:])


def measure_limits(device):
    """The best the machine does, on random data: a bf16 matrix product, and a copy (bytes read and written)."""
    size, elements = (8192, 2**30) if device.type == "cuda" else (512, 2**22)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = seconds_per_call(lambda: a @ b, device)
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = seconds_per_call(lambda: target.copy_(source), device)
    return {"tflops": 2 * size**3 / product / 1e12, "gigabytes_per_second": 2 * source.nbytes / copy / 1e9}


# -------------------------------------------------------------------------------------------- random weights and data


def random_weight(name, shape, device):
    """The bf16 weight `name`, the same on every call: ones for a norm, normal with deviation 0.02 otherwise."""
    if len(shape) == 1:
        return torch.ones(shape, device=device, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def random_model(shape, device, quantize=None):
    """A frozen bf16 model of a shape's config.json, made as checkpoint.load_model makes one."""
    with torch.device("meta"):
        model = Transformer(config_from_json(shape))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    fill_model(model, lambda name: random_weight(name, shapes[name], device), torch.bfloat16, device, quantize)
    return model.eval()


def matrix_weights(shape):
    """How many weights take part in products: all but the embedding, which is looked up, and the norms."""
    with torch.device("meta"):
        model = Transformer(config_from_json(shape))
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def random_samples(s, vocab_size):
    """The samples of one optimiser step, all of one length, every token a target. They go through a prepared file."""
    tokens = torch.Generator().manual_seed(1)
    writer = SampleWriter()
    for _ in range(MICRO_BATCHES * s.tokens // s.sample_tokens):
        ids = torch.randint(vocab_size, (s.sample_tokens + 1,), generator=tokens).tolist()
        writer.add(ids, [True] * len(ids), source=0)
    with tempfile.TemporaryDirectory() as folder:
        writer.save(Path(folder, "train.safetensors"))
        return Samples(Path(folder, "train.safetensors"))


# ------------------------------------------------------------------------------------------------------------ training


def measure_training(s, run, limits):
    """The row of a `Training`."""
    shape, device = SHAPES[s.shape][run.shape], torch.device(s.device)
    samples = random_samples(s, shape["vocab_size"])
    step = (our_step if run.side == OURS else peer_step)(s, run, shape, samples, device)
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
    rate = s.steps * int(samples.lengths.sum()) / seconds
    per_token = {"lora": 4, "qlora": 4, "full": 6}[run.kind] + 2 * run.recompute
    row = {
        "tokens_per_second": rate,
        "share": rate * per_token * matrix_weights(shape) / (limits["tflops"] * 1e12),
        "peak_gb": peak_memory() / 1e9,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "grad_norm": norms[-1],
        "step_seconds": seconds / s.steps,
        "micro_batch_tokens": s.tokens,
        "sample_tokens": s.sample_tokens,
    }
    return row | prediction(s, run) if run.side == OURS else row


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


def prediction(s, run):
    """The predicted peak of our step, for its row; the reason where there is none, for the measurement still counts."""
    try:
        return {"predicted_gb": predicted_peak(s.shape, run, s.device, s.tokens, s.sample_tokens) / 1e9}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"no prediction: {type(error).__name__}: {error}"}


@lru_cache
def predicted_peak(size, run, device, tokens, sample_tokens):
    """Bytes, by plan.py."""
    settings = our_settings(Settings(size, device, tokens, sample_tokens), run)
    config = config_from_json(SHAPES[size][run.shape])
    job = plan.Job(
        config=config,
        device=device,
        dtype=torch.bfloat16,
        quantize=settings.quantize,
        adapter=None if run.kind == "full" else adapter_config(settings, config),
        optimizer=settings.optimizer,
        recompute=settings.recompute,
    )
    return plan.Predictor(job).peak(plan.packed_shape(tokens, sample_tokens, targets=tokens))


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

    base = peer_model(shape, device, quantized=run.kind == "qlora")
    if run.recompute:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = get_peft_model(base, peers.peft_config(peers.LORA_ALL))
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0, fused=True)
    micro_batches = torch.arange(len(samples)).split(s.tokens // s.sample_tokens)
    target_count = samples.target_counts.sum().item()

    def step(number):
        total = torch.zeros((), device=device)
        for indices in micro_batches:  # all of one length: there is no padding to mask
            tokens, targets = (tensor.to(device) for tensor in samples.padded(indices.tolist())[:2])
            with torch.autocast(device.type, torch.bfloat16, enabled=run.side == PEFT_AUTOCAST):
                logits = model(input_ids=tokens, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum") / target_count
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total.item(), norm.item()

    return step


@torch.no_grad()
def peer_model(shape, device, quantized):
    """transformers' model of a config.json with the weights of `random_model`, in NF4 as its own loading makes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape)
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
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


# ------------------------------------------------------------------------------------------------ decoding and kernels


def measure_decoding(s, run, limits):
    """The row of a `Decoding`."""
    shape, device = SHAPES[s.shape][run.shape], torch.device(s.device)
    model = random_model(shape, device, run.quantize)
    prompts = torch.randint(shape["vocab_size"], (run.batch, s.prompt_tokens)).tolist()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    decoder = fastest_decoder(model)
    decode_seconds(decoder, prompts, 4, device)  # warm-up
    prefill, seconds, steps = decode_seconds(decoder, prompts, s.new_tokens, device)
    read = weight_bytes(model) * steps / seconds  # bytes a second, if each step reads every weight once
    return {
        "tokens_per_second": run.batch * steps / seconds,
        "share": read / 1e9 / limits["gigabytes_per_second"],
        "peak_gb": peak_memory() / 1e9,
        "prefill_seconds": prefill,
        "prompt_tokens": s.prompt_tokens,
        "new_tokens": steps + 1,
    }


def decode_seconds(decoder, prompts, new_tokens, device):
    """Seconds to the first token, seconds for those after it, and how many those are. Greedy."""
    settings = generate.Settings(checkpoint_dir=Path("random"), max_new_tokens=new_tokens, temperature=0)
    replies = [Ids() for _ in prompts]
    synchronize(device)
    started = time.perf_counter()
    tokens = sampling.generate(decoder, prompts, replies, settings, list(range(len(prompts))))
    next(tokens)
    synchronize(device)
    first = time.perf_counter()
    steps = sum(1 for _ in tokens)
    synchronize(device)
    return first - started, time.perf_counter() - first, steps


def weight_bytes(model):
    """Bytes of the weights that a decoding step must read: those of all products."""
    layers = lora.linear_layers(model).values()
    return sum(layer.weight.nbytes if isinstance(layer, nn.Linear) else layer.nbytes() for layer in layers)


@torch.no_grad()
def measure_dequantizing(s, run, limits):
    """Microseconds for one gate_proj in NF4, made bf16 and multiplied by a few rows: ours, and bitsandbytes'."""
    shape, device = SHAPES[s.shape][run.shape], torch.device(s.device)
    size = (shape["intermediate_size"], shape["hidden_size"])
    # More than the cache holds, taken in turn: in training another layer's weight comes between.
    layers = [QUANTIZERS["bnb.nf4"](torch.randn(size, device=device), None) for _ in range(4)]
    moved = {"dequantised": 2 * size[0] * size[1] + layers[0].nbytes()}
    ways = {"dequantised": (lambda layer: layer.dequantize(torch.bfloat16), their_weight)}
    for rows in (1, 2, 4, 16):
        x = torch.randn(rows, size[1], device=device, dtype=torch.bfloat16)
        ways[f"rows: {rows}"] = (lambda layer, x=x: layer(x), lambda layer, x=x: their_product(layer, x))
        moved[f"rows: {rows}"] = layers[0].nbytes()
    for name, (our_way, their_way) in ways.items():
        ours, theirs = our_way(layers[0]).float(), their_way(layers[0]).float()
        assert (ours - theirs).norm() <= 0.01 * theirs.norm(), f"{name} gives something else"
    turn, row = itertools.cycle(layers), {"microseconds": {}, "shares": {}}
    for name, pair in ways.items():
        for side, way in zip((name, f"{name}, bitsandbytes"), pair, strict=True):
            seconds = seconds_per_call(lambda: way(next(turn)), device, 40)  # noqa: B023
            row["microseconds"][side] = 1e6 * seconds
            row["shares"][side] = moved[name] / seconds / 1e9 / limits["gigabytes_per_second"]
    return row


def their_weight(layer):
    """bitsandbytes' own dequantisation of an NF4 layer."""
    size = (layer.out_features, layer.in_features)
    return torch.ops.bitsandbytes.dequantize_4bit(layer.codes, layer.state.absmax, BLOCK, "nf4", size, torch.bfloat16)


def their_product(layer, x):
    """bitsandbytes' own product with an NF4 layer."""
    size = (layer.out_features, layer.in_features)
    return torch.ops.bitsandbytes.gemm_4bit(x, layer.codes, size, layer.state.absmax, BLOCK, "nf4")


# ------------------------------------------------------------------------------------------------------------- results


def differing_losses(rows):
    """Names of the peer's runs whose first loss is not ours to 1%: the two sides would not do the same."""
    ours = {}
    for part, row in rows:
        if "first_loss" in row and part.side == OURS:
            ours[part.shape, part.kind] = row["first_loss"]
    return sorted(
        {
            str(part)
            for part, row in rows
            if "first_loss" in row and (loss := ours.get((part.shape, part.kind))) is not None
            if abs(row["first_loss"] - loss) > 0.01 * loss
        }
    )


COLUMNS = {
    "median": "{name}", "runs": "{runs}", "tokens/s": "{tokens_per_second:,.0f}", "spread": "{relative_spread:.1%}",
    "share": "{share:.1%}", "on paper": "{on_paper}", "GB": "{peak_gb:.2f}", "plan": "{plan}", "loss": "{loss}",
}  # fmt: skip


def show(rows, limits, about):
    """Print the table of what has a speed, and the other rows."""
    nominal = about["nominal_tflops"]
    print(
        f"\n{machine_name(about['machine'])}: bf16 product {limits['tflops']:.1f} TFLOP/s ({nominal or 'no figure'} on "
        f"paper), copy {limits['gigabytes_per_second']:.0f} GB/s. Shares are of these."
    )
    with_speed = [{"name": str(part), **row} for part, row in rows if "tokens_per_second" in row]
    first = {row["name"]: row for row in reversed(with_speed)}
    table = summarize(with_speed, ("name",), ("tokens_per_second", "share", "peak_gb"))
    for row in table:
        run, (low, high) = first[row["name"]], row["spread"]
        row["relative_spread"] = (high - low) / row["tokens_per_second"]
        trained = "first_loss" in run
        row["loss"] = f"{run['first_loss']:.3f}" if trained else ""
        row["on_paper"] = f"{row['share'] * limits['tflops'] / nominal:.1%}" if nominal and trained else ""
        row["plan"] = f"{run['predicted_gb'] / row['peak_gb']:.3f}" if "predicted_gb" in run else ""
    print_table(COLUMNS, table)
    for part, row in rows:
        if "tokens_per_second" not in row:
            print(f"{part}: {row.get('skipped') or row.get('failed') or row}")


if __name__ == "__main__":
    cli.run(main, settings)
