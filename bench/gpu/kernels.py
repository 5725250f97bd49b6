"""Each kernel of ours that a training step and a decoded token launch, timed on its own against the bytes it must move.

What is launched is read off a dry run of the model (bench/operations.py), with its real shapes; each operator of
ops/cpp.py is one Triton kernel on CUDA (`multiply_4bit` adds up its parts with one of torch's), and a C++ function on a
CPU. "share" is its bytes, each tensor read once and written once, over its time and over the bandwidth of a copy that
is measured in the same run. The cache is filled with other data before every call.
"""

import itertools
import statistics
from dataclasses import dataclass
from unittest.mock import patch

import torch

from bench import operations
from bench.gpu.device import seconds_per_call
from bench.gpu.random_models import SHAPES
from bench.machine import limits as machine_limits
from bench.roofline import kernel_name
from lora import AdapterConfig
from ops import low_rank
from quantize import BLOCK, QUANTIZERS
from training.from_settings import default_targets
from training.memory import plan
from weights.families import config_from_json

OURS = "onetune::"  # before the names of the operators of ops/
CALLS = {"cuda": 20, "cpu": 5}  # the median counts, after two that do not
CACHE = {"cuda": 2**30, "cpu": 2**26}  # bytes that are written before each call; on CUDA the host gets ahead meanwhile


@dataclass(frozen=True)
class Kernel:
    """One operator at one shape."""

    shape: str
    where: str
    operation: operations.Operation
    launches: int
    seconds = 3

    def __str__(self):
        return f"{self.shape} {self.where}: {kernel_name(self.operation)}"

    def about(self):
        """What its line says of it."""
        moved = {"kernel": self.operation.name.removeprefix(OURS), "bytes": self.operation.bytes}
        return {"shape": self.shape, "where": self.where, "launches": self.launches, **moved}

    def measure(self, s, limits):
        """Its row."""
        seconds = seconds_of(self.operation, s.device)
        bandwidth = self.operation.bytes / seconds / 1e9
        return {"microseconds": 1e6 * seconds, "share": bandwidth / limits["gigabytes_per_second"]}


@dataclass(frozen=True)
class Dequantizing:
    """Our NF4 kernels and bitsandbytes' on a weight of the shape's MLP."""

    shape: str
    seconds = 10

    def __str__(self):
        return f"{self.shape} dequantise NF4"

    def about(self):
        """What its line says of it."""
        return vars(self)

    def measure(self, s, limits):
        """Its row."""
        return measure_dequantizing(s, self, limits)


def measurements(s):
    """All kernels of the first shape, in the order of what they move in a step, and bitsandbytes' beside ours."""
    shape = next(iter(SHAPES[s.shape]))
    yield from launched(s, shape)
    yield Dequantizing(shape)


def launched(s, shape):
    """A `Kernel` for each operator of ours, at each shape once. In a dry run "meta" stands for CUDA."""
    config, device, seen = config_from_json(SHAPES[s.shape][shape]), "meta" if s.device == "cuda" else "cpu", set()
    adapter = AdapterConfig(r=16, targets=tuple(default_targets(config)))
    dropping = AdapterConfig(r=16, targets=tuple(default_targets(config)), dropout=0.1)
    micro_batch = plan.packed_shape(s.tokens, s.sample_tokens, targets=s.tokens)

    def job(quantize=None, adapter=None):
        return plan.Job(config, device, torch.bfloat16, quantize=quantize, adapter=adapter)

    training = {"lora": job(None, adapter), "lora, dropout": job(None, dropping)}
    training |= {f"qlora {name}": job(name, adapter) for name in ("bnb.nf4", "bnb.nf4-dq", "bnb.int8")}
    with patch.object(low_rank, "new_seeds", lambda: (1, 2)):  # with random ones, equal blocks would not look equal
        traces = {name: operations.micro_batch(each, micro_batch) for name, each in training.items()}
    for quantize, batch in itertools.product((None, "bnb.nf4", "bnb.nf4-dq"), (1, 16)):
        name = f"decode {quantize or 'bf16'}, batch {batch}"
        traces[name] = operations.token(job(quantize), batch, s.prompt_tokens)
    for where, trace in traces.items():
        ours = [each for each in trace.counts if each.name.startswith(OURS)]
        for each in sorted(ours, key=lambda each: -trace.counts[each] * each.bytes):
            if looks(each) not in seen:
                seen.add(looks(each))
                yield Kernel(shape, where, each, trace.counts[each])


def looks(operation):
    """Equal for operations that take the same time: numbers such as the sign of a rotation do not count."""
    return operation.function, tuple(operation.specs()), operation.bytes


@torch.no_grad()
def seconds_of(operation, device):
    """The median of a few calls on random tensors, each on copies just made: some operators work in place."""
    storages = random_storages(operation.specs(), device)
    clock = machine_limits.cuda_seconds if device == "cuda" else machine_limits.cpu_seconds
    other, times = torch.empty(CACHE[device], dtype=torch.uint8, device=device), []
    for _ in range(CALLS[device] + 2):
        fresh = {number: tensor.clone() for number, tensor in storages.items()}
        positional, named = operation.call(lambda spec: look(fresh[spec.storage], spec))  # noqa: B023 (called at once)
        other.zero_()
        times.append(clock(lambda: operation.function(*positional, **named)))  # noqa: B023 (called before they change)
    return statistics.median(times[2:])


def random_storages(specs, device):
    """A flat tensor for every storage that tensors share, large enough for all."""
    least = min((size for spec in specs for size in spec.shape if size), default=1)  # whole numbers are indices
    storages = {}
    for spec in sorted(specs, key=lambda spec: spec.extent()):
        if spec.dtype.is_floating_point:
            values = torch.empty(spec.extent(), dtype=spec.dtype, device=device).uniform_(-0.1, 0.1)
        else:
            values = (torch.arange(spec.extent(), device=device) % least).to(spec.dtype)
        storages[spec.storage] = values
    return storages


def look(storage, spec):
    """A flat tensor as an operation sees it."""
    return storage.view(spec.dtype).as_strided(spec.shape, spec.stride)


# ------------------------------------------------------------------------------------------------------ bitsandbytes


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
    return torch.ops.bitsandbytes.dequantize_4bit(layer.codes, layer.absmax, BLOCK, "nf4", size, torch.bfloat16)


def their_product(layer, x):
    """bitsandbytes' own product with an NF4 layer."""
    size = (layer.out_features, layer.in_features)
    return torch.ops.bitsandbytes.gemm_4bit(x, layer.codes, size, layer.absmax, BLOCK, "nf4")
