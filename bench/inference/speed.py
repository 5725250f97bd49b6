"""Generation speed against transformers (dynamic and static cache) and LitGPT: same weights and prompts.

    python bench/inference/speed.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --data_dir prepared/gsm8k

Needs requirements-dev.txt; LitGPT gets a virtual environment of its own on first use (minutes). Runs alternate, each in
a process; all take the likeliest token and never stop early. Prefill (reading the prompts) and decoding are timed
separately. A decoding step must read every weight once: "of limit" is its speed as a share of what the memory's read
bandwidth, measured in the same call, allows. Results are added to --out_file as JSON lines, and drawn beside it as a
PNG.
"""

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(ROOT)

from bench.inference.sides import SIDES, measure
from bench.measuring import (
    BEFORE,
    OURS,
    Comparison,
    alternate,
    check_checkout,
    describe,
    device_name,
    draw_bars,
    environment,
    machine_name,
    print_table,
    run_before,
    run_job,
    summarize,
)
from bench.training.peers import PEERS
from shell import cli
from shell.cli import UserError


@dataclass(kw_only=True)
class Settings(Comparison):
    """The command line.

    Args:
        data_dir: Folder made by prepare_data.py, whose text the prompts are cut from.
        quantize: bnb.nf4 for 4-bit layers.
        batches: Numbers of prompts that are answered together.
        prompt_tokens: Length of the longest prompt; the shortest of a batch has a quarter of it.
        new_tokens: Tokens to generate for each prompt.
        sides: What to compare.
        before_dir: A checkout of an earlier commit of this project, to measure beside this one.
        repeats: Generations that a process times, after one that does not count.
        venvs_dir: Folder of LitGPT's virtual environment, the logs and its converted model.
    """

    data_dir: Path
    quantize: Literal["bnb.nf4"] | None = None
    batches: list[int] = field(default_factory=lambda: [1, 16])
    prompt_tokens: int = 64
    new_tokens: int = 64
    sides: list[Literal[tuple(SIDES)]] = field(default_factory=lambda: list(SIDES))
    before_dir: Path | None = None
    repeats: int = 2
    venvs_dir: Path = ROOT / "bench" / "venvs"
    out_file: Path = Path("out/bench/inference_speed.jsonl")

    def __post_init__(self):
        check_checkout(self.before_dir)
        cli.check_numbers(self, "runs", "repeats", "batches", above=0)
        cli.check_numbers(self, "prompt_tokens", "new_tokens", least=4)
        if not self.batches or not self.sides:
            raise UserError("--batches and --sides must name at least one")


if __name__ == "__main__":
    settings = cli.parse(Settings)

MEDIANS = ("decode_tokens_per_second", "prefill_tokens_per_second", "peak_gb", "others_cpu")
COLUMNS = {
    "side": "{side}", "prompts": "{batch}", "prefill": "{prefill_tokens_per_second:.0f}",
    "decode": "{decode_tokens_per_second:.1f}", "from": "{spread[0]:.1f}", "to": "{spread[1]:.1f}",
    "of limit": "{of_limit:.1%}", "memory": "{peak_gb:.2f}", "same ids": "{same}", "others": "{others_cpu:.1%}",
}  # fmt: skip


def main(s):
    """Measure all sides, print their table and draw it."""
    from bench.machine import limits

    call = describe(s) | {
        "read_bytes_per_second": limits.read_rate(512, device_name()),
        "bytes_per_step": bytes_per_step(s),
    }
    sides = [*s.sides, BEFORE] if s.before_dir else s.sides
    pairs = [{"side": side, "batch": batch} for batch in s.batches for side in sides]
    lines = []
    for line in alternate(pairs, s.runs, lambda side, batch: run_side(s, side, batch), s, call):
        lines.append(line)
        print(in_words(line), flush=True)
    rows = table_rows(call, lines)
    if rows:
        show(call, rows)
        chart = s.out_file.with_suffix(".png")
        draw_chart(call, rows, chart)
        print(f"written to {s.out_file} and {chart}")


def cut_prompts(s, batch):
    """`batch` prompts of evenly spread lengths, the longest first: lists of ids, the same in every run."""
    from batching import open_samples

    samples = open_samples(s.data_dir, "train")
    stored = (id for i in range(len(samples)) for id in samples.stored(i)[0].tolist())
    text = list(itertools.islice(stored, batch * s.prompt_tokens))
    if len(text) < batch * s.prompt_tokens:
        raise UserError(f"{s.data_dir} has too little text for {batch} prompts of {s.prompt_tokens} tokens")
    shortest = max(1, s.prompt_tokens // 4)
    lengths = [s.prompt_tokens - (s.prompt_tokens - shortest) * i // max(1, batch - 1) for i in range(batch)]
    return [text[i * s.prompt_tokens :][:length] for i, length in enumerate(lengths)]


def run_side(s, side, batch):
    """What `sides.measure` returns for one side, in a process of its own. Raises Unavailable if it failed."""
    job = {
        "side": side, "checkpoint_dir": str(s.checkpoint_dir.resolve()), "cache_dir": str(s.venvs_dir.resolve()),
        "dtype": s.dtype, "quantize": s.quantize, "prompts": cut_prompts(s, batch), "new_tokens": s.new_tokens,
        "repeats": s.repeats,
    }  # fmt: skip
    log, python = s.venvs_dir / f"generate-{side}.log", sys.executable
    if side == "litgpt":
        python = environment(s.venvs_dir, side, PEERS[side].requirements, log)
    if side == BEFORE:
        return run_before(s.before_dir, measure, job | {"side": OURS}, log)
    return run_job(measure, job, log, python, ours=side == OURS)


def bytes_per_step(s):
    """Bytes of the weights that one decoding step must read, by arithmetic: all but the rows of the embedding."""
    import torch

    from lora import linear_layers
    from model import Transformer
    from weights.checkpoint import read_config

    with torch.device("meta"):
        model = Transformer(read_config(s.checkpoint_dir))
    layers = linear_layers(model)
    width = {"bf16": 2, "fp32": 4}[s.dtype]
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    if not s.quantize:
        return width * sum(sizes.values())
    head = sizes.pop("lm_head")
    return width * head + sum(sizes.values()) * (4 + 32 / 64) / 8  # 4 bits a weight, an fp32 scale for 64


# --------------------------------------------------------------------------------------------------- table and chart


def table_rows(call, lines):
    """A row for each side and batch, with its share of the limit and how far its ids are transformers'."""
    measured = [line for line in lines if "unavailable" not in line]
    outputs = {(line["side"], line["batch"]): line["outputs"] for line in measured}  # of the last run
    rows = summarize(measured, ("side", "batch"), MEDIANS)
    for row in rows:
        side, batch = row["side"], row["batch"]
        bandwidth = row["decode_tokens_per_second"] / batch * call["bytes_per_step"]
        same = agreement(outputs[side, batch], outputs.get(("transformers", batch)))
        row |= {"label": side, "of_limit": bandwidth / call["read_bytes_per_second"]}
        row["same"] = "" if same is None else f"{same:.1%}"
    return rows


def agreement(outputs, reference):
    """The share of tokens before each row's first difference from the reference; None without one."""
    if reference is None:
        return None
    same = total = 0
    for ours, theirs in zip(outputs, reference, strict=True):
        unequal = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        same, total = same + next(unequal, len(theirs)), total + len(theirs)
    return same / total


def in_words(line):
    """A run as it ends."""
    name = f"{line['side']}, {line['batch']} prompt{'s' if line['batch'] > 1 else ''}"
    if "unavailable" in line:
        return f"{name}: not measured: {line['unavailable']}"
    prefill, decode = line["prefill_tokens_per_second"], line["decode_tokens_per_second"]
    return f"{name}: prompts {prefill:.0f} tokens/s, decoding {decode:.1f} tokens/s"


def title(call):
    """What was measured, and where."""
    s = call["settings"]
    weights = f"{s['dtype']}, {s['quantize']}" if s["quantize"] else s["dtype"]
    return f"{s['checkpoint']}, {weights}, {machine_name(call['machine'])}"


def show(call, rows):
    """Print the table, and ours against the fastest peer for each batch."""
    gb = call["read_bytes_per_second"] / 1e9
    print(f"\n{title(call)}, reads {gb:.1f} GB/s, {call['bytes_per_step'] / 1e6:.0f} MB a step, {call['commit']}")
    print_table(COLUMNS, rows)
    for batch in dict.fromkeys(row["batch"] for row in rows):
        speeds = {row["side"]: row["decode_tokens_per_second"] for row in rows if row["batch"] == batch}
        if OURS in speeds and BEFORE in speeds:
            print(f"{batch} at a time: {speeds[OURS] / speeds[BEFORE]:.2f} times the decoding before")
        others = [speed for side, speed in speeds.items() if side not in (OURS, BEFORE)]
        if OURS in speeds and others:
            print(f"{batch} at a time: {speeds[OURS] / max(others):.2f} times the fastest peer's decoding")


def draw_chart(call, rows, path):
    """Bars for decoding and prefill, a row of two panels for each batch, as a PNG."""
    tables = {}
    for row in reversed(rows):  # the first one at the top
        tables.setdefault(f"{title(call)}, {row['batch']} at a time", []).append(row)
    columns = {f"{kind}_tokens_per_second": (f"{kind}, tokens/s", "{:,.0f}") for kind in ("decode", "prefill")}
    draw_bars(list(tables.items())[::-1], columns, path)


if __name__ == "__main__":
    cli.run(main, settings)
