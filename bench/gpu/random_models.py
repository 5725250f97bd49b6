"""Shapes, random weights made on the device, and random samples: nothing is downloaded."""

import tempfile
import zlib
from pathlib import Path

import torch

from batching import open_samples
from bench.shapes import SHAPES as PUBLISHED
from model import Transformer
from preparation.record_store import SampleWriter
from shell.files import write_json
from weights.checkpoint import fill_model
from weights.families import config_from_json

TINY = PUBLISHED["Llama-2-7B"] | dict(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
SHAPES = {"7b": {name: PUBLISHED[name] for name in ("Llama-2-7B", "Mistral-7B")}, "tiny": {"tiny": TINY}}
MICRO_BATCHES = 2  # in an optimiser step


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


def random_samples(s, vocab_size):
    """The samples of one optimiser step, all of one length, every token a target. They go through a prepared file."""
    tokens = torch.Generator().manual_seed(1)
    writer = SampleWriter()
    for _ in range(MICRO_BATCHES * s.tokens // s.sample_tokens):
        ids = torch.randint(vocab_size, (s.sample_tokens + 1,), generator=tokens).tolist()
        writer.add(ids, [True] * len(ids), source=0)
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder, "data.json"), {"kind": "samples", "train": writer.save(Path(folder), "train")})
        return open_samples(Path(folder), "train")
