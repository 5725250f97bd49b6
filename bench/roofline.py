"""What training and decoding can reach on a card that is not here, predicted from every operation of a step.

    python bench/roofline.py                                                # the whole table, in a minute or two
    python bench/roofline.py --models "[Mistral-7B]" --methods "[qlora]" --cards "[H200]" --tokens 8192
    python bench/roofline.py --device cpu --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --data_dir prepared/gsm8k

A step of the model's own code is traced on tensors without memory (operations.py). An operation takes the longer of its
FLOPs at the card's speed and its bytes at the card's bandwidth. "at limits" has the data sheet's figures and nothing
else; "predicted" what kernels reach of them (`REACHED`), and a time for each launch. No figure of a card was measured:
what the method is worth, --device cpu shows. It times the traced operations of half a micro-batch of other samples, in
their order and without the model (machine/replay.py), and compares the step predicted so with the step of finetune.py.

MFU counts 4 FLOPs for each weight of a product and token with an adapter, 6 for all weights, whatever is computed
besides, over the data sheet's speed. Every position is a target. A decoded token is a step of `StaticDecoder`, with no
time for Python: CUDA replays it as a graph. "weights once" is a decoder that reads each weight, as it is stored, and
each cached key and value once, and does nothing else, at the bandwidth reached.
"""

import statistics
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.measuring import add_line, cpu_times, describe, machine_name, others_share, print_table
from shell import cli
from shell.cli import UserError


class Card(NamedTuple):
    """TFLOP/s of dense bf16 products with sums in fp32, bandwidth in GB/s, memory in GB, L2 cache in MB.

    attention: the share of its FLOP/s that FlashAttention-2 reaches.
    """

    tflops: float
    bandwidth: float
    memory: float
    cache: float
    attention: float


# From NVIDIA's data sheets: A100 (June 2021), Ada whitepaper V2.02 (appendix A), H100 (SXM5), H200 (SXM). L2 of
# H200 as in H100. FlashAttention-2 reaches 50 to 73% on an A100 (Dao 2023, arXiv 2307.08691), 35% on an H100 (Shah et
# al. 2024, arXiv 2407.08608), for long sequences: taken is the lower end; for the 4090 assumed as the A100.
CARDS = {
    "A100-40GB": Card(312, 1555, 40, 40, 0.50),
    "RTX 4090": Card(165.2, 1008, 24, 72, 0.50),
    "H100": Card(989.4, 3350, 80, 50, 0.35),
    "H200": Card(989.4, 4800, 141, 50, 0.35),
}
# Shares of the data sheet that are reached: measured once on an H200, 790 TFLOP/s of a large bf16 product and 4.3 TB/s
# of a copy. Assumed alike for the other cards.
REACHED = {"products": 790 / 989.4, "bandwidth": 4300 / 4800}
# Assumed, not measured: what a kernel takes beside its work (start and end), and what Python, autograd and torch take
# to launch one. A step takes at least the latter for all of its kernels.
LAUNCH, HOST = 2e-6, 10e-6
REPLAYS = 7  # of the shortest sample, of which the median counts

MODELS = ("Llama-2-7B", "Mistral-7B", "Llama-3-8B")
METHODS = ("lora", "qlora", "full")  # rank 16 on all projections over bf16 or NF4; all weights with adamw-8bit
BATCHES = (1, 16)  # of decoding
# What peers publish, tokens/s. LoRA of rank 8; A100 without a word on its memory is taken for both.
TRAINED = {
    ("Llama-2-7B", "lora", "A100-40GB"): "Unsloth 4,007, transformers 2,954, LitGPT (q, v) 980",
    ("Llama-3-8B", "lora", "RTX 4090"): "torchtune 3,083",
    ("Llama-3-8B", "qlora", "RTX 4090"): "torchtune 2,413",
}
DECODED = {
    ("Llama-2-7B", "bf16", "A100-40GB"): "gpt-fast 104.9 (80 GB), LitGPT 31",
    ("Llama-2-7B", "nf4", "A100-40GB"): "gpt-fast 196.8 (int4, 80 GB), LitGPT 20",
}


@dataclass
class Settings:
    """The command line.

    Args:
        device: "meta" predicts for cards; "cpu" predicts this machine's step of a real model and measures it.
        models: Which ones.
        methods: "lora", "qlora" or "full". The first one is what --device cpu trains.
        cards: Which ones. The kernels' shares are shown for the first of the models, the methods and the cards.
        tokens: Positions of a micro-batch.
        sample_tokens: Positions of a sample.
        micro_batches: How many are in an optimiser step.
        recompute: Activation checkpointing in every block.
        context: Positions of each text before a decoded token. A slot of the cache has room for a power of two.
        checkpoint_dir: Model folder, for --device cpu.
        data_dir: Folder made by prepare_data.py, for --device cpu.
        samples: Samples in a step, for --device cpu.
        runs: Measured steps, for --device cpu, in turns with the timing of operations; the medians count.
        out_file: A JSON line for every measured step is added to this file.
    """

    device: Literal["meta", "cpu"] = "meta"
    models: list[Literal[MODELS]] = field(default_factory=lambda: list(MODELS))
    methods: list[Literal[METHODS]] = field(default_factory=lambda: list(METHODS))
    cards: list[Literal[tuple(CARDS)]] = field(default_factory=lambda: list(CARDS))
    tokens: int = 2048
    sample_tokens: int = 512
    micro_batches: int = 8
    recompute: bool = False
    context: int = 1000
    checkpoint_dir: Path | None = None
    data_dir: Path | None = None
    samples: int = 16
    runs: int = 5
    out_file: Path = Path("out/bench/roofline.jsonl")

    def __post_init__(self):
        numbers = ("tokens", "sample_tokens", "micro_batches", "context", "samples", "runs")
        cli.check_numbers(self, *numbers, above=0)
        if not (self.models and self.methods and self.cards):
            raise UserError("--models, --methods and --cards must name at least one each")
        if self.device == "cpu" and not (self.checkpoint_dir and self.data_dir):
            raise UserError("--device cpu needs --checkpoint_dir and --data_dir")


if __name__ == "__main__":
    settings = cli.parse(Settings)

import torch
from torch import nn

from batching import PLANNERS, open_samples
from bench import operations
from bench.machine import limits, replay
from bench.operations import Operation
from bench.shapes import SHAPES
from bench.training import ours, peers
from lora import AdapterConfig
from model import Config, Transformer
from ops.loss import LOSS_CHUNK
from training import build
from training.from_settings import default_targets
from training.memory import budget, plan
from training.steps import planned_steps
from weights.families import config_from_json


def main(s):
    """Print the tables of the cards, or this machine's predicted and measured steps."""
    if s.device == "cpu":
        compare(s)
        return
    print("Predictions, not measurements: no figure of these cards was measured, beside those that peers publish.\n")
    show_training(s)
    show_decoding(s)


# ------------------------------------------------------------------------------------------------ time of operations


class Times(NamedTuple):
    """Seconds: at the data sheet's limits, and with what kernels reach of them."""

    limit: float
    predicted: float


def times_of(operation: Operation, card: Card) -> Times:
    """What an operation takes on a card: the longer of its FLOPs and its bytes."""
    in_fp32 = any(spec.dtype == torch.float32 for spec in operation.specs()) and operation.kind == "products"
    flops = operation.flops / (card.tflops * 1e12) * (2 if in_fp32 else 1)  # TF32
    moved = operation.bytes / (card.bandwidth * 1e9)
    reached = card.attention if operation.kind == "attention" else REACHED["products"]
    predicted = max(flops / reached, moved / REACHED["bandwidth"]) + operation.launches * LAUNCH
    return Times(max(flops, moved), predicted)


def total(counts: Counter, card: Card) -> Times:
    """What all operations take, one after the other."""
    each = [(count, times_of(operation, card)) for operation, count in counts.items()]
    return Times(sum(n * t.limit for n, t in each), sum(n * t.predicted for n, t in each))


def launches(counts: Counter) -> int:
    """How many kernels are launched."""
    return sum(count * operation.launches for operation, count in counts.items())


def step_times(counts: Counter, card: Card) -> Times:
    """What a step takes: not less than its kernels take to be launched."""
    limit, predicted = total(counts, card)
    return Times(limit, max(predicted, HOST * launches(counts)))


# ----------------------------------------------------------------------------------------------------------- training


def job_of(config: Config, method: str, recompute: bool, micro_batches: int) -> plan.Job:
    """The `plan.Job` of a way to train."""
    adapter = None if method == "full" else AdapterConfig(r=16, targets=tuple(default_targets(config)))
    return plan.Job(
        config, "meta", torch.bfloat16, quantize="bnb.nf4" if method == "qlora" else None, adapter=adapter,
        optimizer="adamw-8bit" if method == "full" else "adamw", recompute=float(recompute),
        gradients="kept" if micro_batches > 1 else "new",
    )  # fmt: skip


def step_counts(job: plan.Job, shapes: Counter) -> Counter:
    """How often each operation is run in a step with micro-batches of these shapes; says which have no known cost."""
    counts, unknown = Counter(), set()
    traces = [(operations.micro_batch(job, shape), count) for shape, count in shapes.items()]
    for trace, times in (*traces, (operations.optimizer_step(job), 1)):
        counts.update({operation: times * count for operation, count in trace.counts.items()})
        unknown |= trace.unknown
    if unknown:
        print(f"note: operations without a known cost count as free: {', '.join(sorted(unknown))}", file=sys.stderr)
    return counts


def matrix_weights(config: Config) -> int:
    """Weights that take part in products: all but the embedding, which is looked up, and the norms."""
    with torch.device("meta"):
        model = Transformer(config)
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def show_training(s):
    """Print speed, MFU and memory of all models, methods and cards, and where the time of the first goes."""
    rows, first = [], None
    shape = plan.packed_shape(s.tokens, s.sample_tokens, s.tokens)
    for model in s.models:
        config = config_from_json(SHAPES[model])
        weights = matrix_weights(config)
        for method in s.methods:
            job = job_of(config, method, s.recompute, s.micro_batches)
            counts, peak = step_counts(job, Counter({shape: s.micro_batches})), plan.Predictor(job).peak(shape)
            first = first or counts
            about = {"model": model, "method": method, "gb": peak / 1e9}
            flops = (6 if method == "full" else 4) * weights
            rows += [about | training_row(s, model, method, card, counts, flops, peak) for card in s.cards]
    what = f"{s.micro_batches} micro-batches of {s.tokens} positions, samples of {s.sample_tokens}"
    print(f"Training, {what}{', recomputing' if s.recompute else ''}, tokens/s:")
    columns = {"model": "model", "method": "method", "card": "card", "at limits": "limit:,.0f"}
    columns |= {"predicted": "predicted:,.0f", "MFU": "mfu:.0%", "no product": "rest:.0%", "GB": "gb:.1f"}
    columns |= {"fits": "fits", "peers publish": "published"}
    print_table({heading: f"{{{cell}}}" for heading, cell in columns.items()}, rows)
    show_kernels(first, s.cards[0], f"{s.models[0]}, {s.methods[0]}, {s.cards[0]}")


def training_row(s, model, method, name, counts, flops, peak):
    """One card's cells."""
    card, tokens = CARDS[name], s.micro_batches * s.tokens
    limit, predicted = step_times(counts, card)
    products = Counter({o: n for o, n in counts.items() if o.kind in ("products", "attention")})
    return {
        "card": name,
        "limit": tokens / limit,
        "predicted": tokens / predicted,
        "mfu": tokens * flops / predicted / (card.tflops * 1e12),
        "rest": 1 - total(products, card).predicted / predicted,
        "fits": "yes" if peak + plan.CUDA_OVERHEAD <= card.memory * 1e9 else "no",
        "published": TRAINED.get((model, method, name), ""),
    }


def show_kernels(counts, name, title):
    """Print the share of each kind of operation and of each kernel, and what a fusion could save."""
    card = CARDS[name]
    whole = total(counts, card).predicted
    for what, group in (("kind", lambda o: o.kind), ("kernel", kernel_name)):
        parts = {}
        for operation, count in counts.items():
            parts.setdefault(group(operation), Counter())[operation] += count
        rows = [kernel_row(part, card, whole) | {what: key} for key, part in parts.items()]
        rows = sorted(rows, key=lambda row: -row["ms"])[:25]
        print(f"\n{title}: predicted share of each {what} in a step")
        columns = {what: f"{{{what}}}", "launches": "{launches:,}", "TFLOP": "{tflop:.2f}", "GB": "{gb:.2f}"}
        columns |= {"ms": "{ms:.1f}", "share": "{share:.1%}", "of it within L2": "{cached:.0%}"}
        print_table(columns, rows)
    rest = Counter({o: n for o, n in counts.items() if o.kind not in ("products", "attention")})
    saved = total(rest, card).predicted
    in_cache = sum(n * times_of(o, card).predicted for o, n in rest.items() if o.bytes <= card.cache * 1e6)
    print(
        f"\nAll but attention and the products with the model's weights takes {saved / whole:.1%} of the GPU's time: "
        f"without it a step would be {whole / (whole - saved):.2f} times as fast.\n{in_cache / saved:.0%} of that is "
        f"in operations whose tensors fit into the L2 cache together, where fusing saves less. Launching "
        f"{launches(counts):,} kernels takes the host {HOST * launches(counts):.2f} s, the GPU {whole:.2f} s.\n"
    )


def kernel_row(part, card, whole):
    """The cells of some operations."""
    seconds = total(part, card).predicted
    cached = sum(n * times_of(o, card).predicted for o, n in part.items() if o.bytes <= card.cache * 1e6)
    return {
        "launches": launches(part),
        "tflop": sum(n * o.flops for o, n in part.items()) / 1e12,
        "gb": sum(n * o.bytes for o, n in part.items()) / 1e9,
        "ms": 1e3 * seconds,
        "share": seconds / whole,
        "cached": cached / seconds if seconds else 0,
    }


def kernel_name(operation: Operation) -> str:
    """The operation with the sizes of its two largest tensors."""
    largest = sorted((spec.shape for spec in operation.specs()), key=lambda shape: -torch.Size(shape).numel())[:2]
    sizes = ", ".join("x".join(map(str, shape)) for shape in largest)
    return f"{operation.name.removeprefix('aten::')} {sizes}"


# ----------------------------------------------------------------------------------------------------------- decoding


def show_decoding(s):
    """Print the speed of decoding, in bf16 and NF4, of one text and of many."""
    rows = []
    for model in s.models:
        config = config_from_json(SHAPES[model])
        for quantize, batch in ((q, batch) for q in (None, "bnb.nf4") for batch in BATCHES):
            job = plan.Job(config, "meta", torch.bfloat16, quantize=quantize)
            trace = operations.token(job, batch, s.context)
            assert not trace.unknown, trace.unknown
            rows += [{"model": model} | decoding_row(s, job, model, batch, card, trace.counts) for card in s.cards]
    print(f"Decoding with {s.context} cached positions, tokens/s of all texts together:")
    columns = {"model": "model", "weights": "weights", "texts": "batch", "card": "card", "at limits": "limit:,.0f"}
    columns |= {"predicted": "predicted:,.0f", "weights once": "once:,.0f", "GB": "gb:.1f", "fits": "fits"}
    columns |= {"peers publish": "published"}
    print_table({heading: f"{{{cell}}}" for heading, cell in columns.items()}, rows)


def decoding_row(s, job, model, batch, name, counts):
    """One card's cells."""
    card, weights = CARDS[name], "nf4" if job.quantize else "bf16"
    limit, predicted = total(counts, card)
    read = bytes_of_weights(job) + bytes_of_cache(job.config, batch, s.context)
    held = read + job.config.vocab_size * job.config.hidden_size * 2  # the embedding, which is looked up
    return {
        "weights": weights,
        "batch": batch,
        "card": name,
        "limit": batch / limit,
        "predicted": batch / predicted,
        "once": batch / (read / (card.bandwidth * 1e9 * REACHED["bandwidth"])),
        "gb": held / 1e9,
        "fits": "yes" if held + plan.CUDA_OVERHEAD <= card.memory * 1e9 else "no",
        "published": DECODED.get((model, weights, name), "") if batch == 1 else "",
    }


def bytes_of_weights(job: plan.Job) -> float:
    """Of the weights of all products as they are stored: 16 bits, or in the blocks 4.5 bits in NF4 (quantize.py)."""
    head = job.config.vocab_size * job.config.hidden_size
    blocks = matrix_weights(job.config) - head
    return 2 * head + (4.5 / 8 if job.quantize else 2) * blocks


def bytes_of_cache(config: Config, batch: int, context: int) -> int:
    """Of the keys and values of `context` positions of each text, in 16 bits."""
    return 2 * 2 * config.num_hidden_layers * batch * context * config.num_key_value_heads * config.head_dim


# ------------------------------------------------------------------------------------------- this machine's own steps


def compare(s):
    """Predict steps of finetune.py from timed operations, measure them, in turns, and print both."""
    training = settings_of(s)
    samples = open_samples(s.data_dir, "train")
    steps = dict(planned_steps(training, samples, 0, s.runs + peers.SKIP + 1))
    *_, other = steps.values()  # of the last step nothing is trained: its samples are what operations are timed with
    job = budget.plan_job(training, "kept" if any(len(step) > 1 for step in steps.values()) else "new")
    timed_shape = half_shape(training, samples, other)
    recorded = replay.record(job, timed_shape)
    bandwidth = limits.copy_rate(256, "cpu")
    step = ours.step_function(ours.build_run(training, build.start_fabric(training), samples))
    between = between_operations(training, samples, job, step, bandwidth)
    call, lines, parts = describe(s), [], Counter()
    for number in range(s.runs + peers.SKIP):
        measured_rates = replay.measured(recorded, sizes(job, timed_shape), bandwidth)
        started = cpu_times()
        seconds = step(number, steps[number])["seconds"]
        others = others_share(started, cpu_times())
        shapes = [shape_of(training, samples, b) for b in steps[number]]
        predicted = predicted_parts(job, measured_rates, shapes, between)
        if number >= peers.SKIP:
            whole = sum(predicted.values())
            line = {"measured": seconds, "predicted": whole, "ratio": whole / seconds, "others_cpu": others}
            add_line(s.out_file, call | line | {"parts": dict(predicted)})
            lines.append({"step": number} | line)
            parts.update(predicted)
    show_comparison(s, call, lines, parts, bandwidth, timed_shape)


def between_operations(training, samples, job, step, bandwidth) -> float:
    """Seconds that Python and autograd take for an operation: what a step takes beyond its operations, of each.

    Found with the shortest sample by itself, whose operations are timed at their own sizes.
    """
    shortest = [samples.lengths[:].argmin().item()]
    shape = shape_of(training, samples, shortest)
    alone = replay.record(job, shape)
    of_operations = replay.measured(alone, sizes(job, shape), bandwidth, REPLAYS)
    seconds = statistics.median(step(0, [shortest])["seconds"] for _ in range(REPLAYS))
    count = alone.counts.total() + operations.optimizer_step(job).counts.total()
    return max(0.0, seconds - predicted_parts(job, of_operations, [shape]).total()) / count


def settings_of(s):
    """The flags of finetune.py."""
    mode = peers.MODES["full" if s.methods[0] == "full" else f"{s.methods[0]}-all"]
    paths = {"checkpoint_dir": s.checkpoint_dir, "data_dir": s.data_dir, "dtype": "bf16"}
    return ours.training_settings(
        paths | mode._asdict(), global_batch_size=s.samples, micro_batch_tokens=s.tokens, recompute=float(s.recompute)
    )


def shape_of(training, samples, indices) -> plan.Shape:
    """The shape of a micro-batch of these samples."""
    return plan.shape_of(samples, PLANNERS[training.planner].layout, indices)


def half_shape(training, samples, step) -> plan.Shape:
    """The shape of a micro-batch about half as large as those of a step: of half of the first one's samples."""
    return shape_of(training, samples, step[0][: max(1, len(step[0]) // 2)])


def sizes(job: plan.Job, shape: plan.Shape) -> set[int]:
    """The sizes of a micro-batch's tensors that depend on it: its positions, its targets, chunks of these.

    Without those that the model's own tensors have too: which of both a tensor has could not be told.
    """
    c, targets = job.config, shape.targets
    heads = {c.num_attention_heads, c.num_key_value_heads}
    own = {c.vocab_size, c.hidden_size, c.intermediate_size, c.head_dim, c.head_dim // 2, *heads}
    own |= {count * c.head_dim for count in heads} | {*operations.ranks(job)}
    return {shape.T, shape.positions, targets, min(targets, LOSS_CHUNK), targets % LOSS_CHUNK} - own - {0, 1}


def predicted_parts(job, measured_rates, shapes, between=0.0) -> Counter:
    """Seconds of a step by kind of operation, from rates. between: what each takes beside."""
    parts = Counter()
    traces = [(operations.micro_batch(job, shape), sizes(job, shape)) for shape in shapes]
    for trace, known in (*traces, (operations.optimizer_step(job), set())):
        for operation, count in trace.counts.items():
            parts[operation.kind] += count * measured_rates.seconds(operation, known)
            parts["Python and autograd"] += count * between
    return parts


def show_comparison(s, call, lines, parts, bandwidth, shape):
    """Print the steps, the kinds of operations by their share, and the median."""
    print(f"{s.checkpoint_dir.name}, {s.methods[0]}, bf16, {machine_name(call['machine'])}")
    columns = {"step": "{step}", "predicted s": "{predicted:.3f}", "measured s": "{measured:.3f}"}
    print_table(columns | {"ratio": "{ratio:.3f}", "others' share of the CPU": "{others_cpu:.0%}"}, lines)
    whole = sum(parts.values())
    print(f"\nOperations timed with {shape.positions} positions; copies at {bandwidth / 1e9:.1f} GB/s")
    kinds = [{"kind": kind, "share": seconds / whole} for kind, seconds in parts.most_common()]
    print_table({"kind": "{kind}", "predicted share": "{share:.1%}"}, kinds)
    print(f"\npredicted / measured, median of {len(lines)}: {statistics.median(line['ratio'] for line in lines):.3f}")


if __name__ == "__main__":
    cli.run(main, settings)
