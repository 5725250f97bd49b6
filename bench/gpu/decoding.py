"""Decoding: generate.py's own loop over random weights, as a share of what reading each weight once would take."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import generate
import lora
from bench.gpu.device import synchronize
from bench.gpu.random_models import SHAPES, random_model
from bench.inference.sides import Ids
from bench.measuring import peak_memory
from inference import sampling
from inference.decode import fastest_decoder


@dataclass(frozen=True)
class Decoding:
    """One batch of prompts answered."""

    shape: str
    quantize: str | None
    batch: int
    seconds = 12

    def __str__(self):
        return f"{self.shape} decode {self.quantize or 'bf16'}, batch {self.batch}"

    def about(self):
        """What its line says of it."""
        return vars(self)

    def measure(self, s, limits):
        """Its row."""
        return measure_decoding(s, self, limits)


def measurements(s):
    """All, the most important first."""
    for shape in SHAPES[s.shape]:
        yield from [Decoding(shape, quantize, batch) for batch in (1, 16) for quantize in (None, "bnb.nf4")]


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
