"""Generation speed against transformers (dynamic and static cache) and LitGPT: same weights, same prompts, by turns.

    python bench/generate.py --checkpoint_dir checkpoints/SmolLM2-135M-Instruct --data_dir prepared/gsm8k

Needs requirements-dev.txt; LitGPT gets a virtual environment of its own on first use (minutes). Each run is a process;
all take the likeliest token and never stop early. Reading the prompts and decoding are timed apart. A decoding step
must read every weight once: "of limit" is its speed as a share of what the memory's read bandwidth, measured in the
same call, allows. Results are added to --out_file as JSON lines, and drawn beside it as a PNG.
"""

import statistics
import sys
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the project's folder, from wherever this is started

import peers
from lines import Unavailable, add_line, commit, environment, run_job
from shell import cli
from shell.cli import UserError

OURS = "onetune"
SIDES = (OURS, "transformers", "transformers-static", "litgpt")


@dataclass
class Settings:
    """The command line.

    Args:
        checkpoint_dir: Model folder.
        data_dir: Folder made by prepare_data.py, whose text the prompts are cut from.
        dtype: Of the weights.
        quantize: bnb.nf4 for 4-bit layers.
        batches: Numbers of prompts that are answered together.
        prompt_tokens: Length of the longest prompt; the shortest of a batch has a quarter of it.
        new_tokens: Tokens to generate for each prompt.
        sides: What to compare.
        runs: Processes for each side and batch, by turns.
        repeats: Generations that a process times, after one that does not count.
        venvs_dir: Folder of LitGPT's virtual environment, the logs and its converted model.
        out_file: JSON lines, one a run, are added to this file.
    """

    checkpoint_dir: Path
    data_dir: Path
    dtype: Literal["bf16", "fp32"] = "bf16"
    quantize: Literal["bnb.nf4"] | None = None
    batches: list[int] = field(default_factory=lambda: [1, 16])
    prompt_tokens: int = 64
    new_tokens: int = 64
    sides: list[Literal["onetune", "transformers", "transformers-static", "litgpt"]] = field(
        default_factory=lambda: list(SIDES)
    )
    runs: int = 3
    repeats: int = 2
    venvs_dir: Path = ROOT / "bench" / "venvs"
    out_file: Path = Path("out/bench/generate.jsonl")

    def __post_init__(self):
        cli.check_numbers(self, "runs", "repeats", "batches", above=0)
        cli.check_numbers(self, "prompt_tokens", "new_tokens", least=4)
        if not self.batches or not self.sides:
            raise UserError("--batches and --sides must name at least one")


if __name__ == "__main__":
    settings = cli.parse(Settings)


def main(s):
    call, lines, broken = describe_call(s), [], {}
    for run in range(s.runs):
        for batch in s.batches:
            prompts = cut_prompts(s, batch)
            for side in s.sides:
                line = {"side": side, "batch": batch, "run": run}
                if (side, batch) in broken:
                    continue
                line |= run_side(s, side, prompts)
                if "unavailable" in line:
                    broken[side, batch] = line["unavailable"]
                lines.append(line | call)
                add_line(s.out_file, lines[-1])
                print(in_words(line), flush=True)
    rows = summarize(lines)
    print_table(call, rows)
    if rows:
        draw_chart(call, rows, s.out_file.with_suffix(".png"))
        print(f"written to {s.out_file} and {s.out_file.with_suffix('.png')}")


def cut_prompts(s, batch):
    """`batch` prompts of evenly spread lengths, the longest first: lists of ids, the same in every run."""
    from batching import Samples

    samples = Samples(s.data_dir / "train.safetensors")
    text = samples.tokens[: batch * s.prompt_tokens].tolist()
    if len(text) < batch * s.prompt_tokens:
        raise UserError(f"{s.data_dir} has too little text for {batch} prompts of {s.prompt_tokens} tokens")
    shortest = max(1, s.prompt_tokens // 4)
    lengths = [s.prompt_tokens - (s.prompt_tokens - shortest) * i // max(1, batch - 1) for i in range(batch)]
    return [text[i * s.prompt_tokens :][:length] for i, length in enumerate(lengths)]


# ------------------------------------------------------------------------------------------------------------ a run


def run_side(s, side, prompts):
    """What `generators.measure` returns for one side, or {"unavailable": why}."""
    log = s.venvs_dir / f"generate-{side}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    job = {
        "side": side, "checkpoint_dir": str(s.checkpoint_dir.resolve()), "cache_dir": str(s.venvs_dir.resolve()),
        "dtype": s.dtype, "quantize": s.quantize, "prompts": prompts, "new_tokens": s.new_tokens, "repeats": s.repeats,
    }  # fmt: skip
    try:
        python = sys.executable
        if side == "litgpt":
            python = environment(s.venvs_dir, side, peers.PEERS[side].requirements, log)
        return run_job([python, Path(__file__).with_name("generators.py")], job, log)
    except Unavailable as error:
        if side == OURS:
            raise UserError(f"{OURS}: {error}") from None
        return {"unavailable": str(error)}


# ------------------------------------------------------------------------------------------------------ what is kept


def describe_call(s):
    """What all lines of this call share: when, where, with which settings, and what the memory allows."""
    import torch

    import limits

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "call": datetime.now().isoformat(timespec="seconds"),
        "settings": {
            key: value.name if isinstance(value, Path) else value
            for key, value in asdict(s).items()
            if key not in ("out_file", "venvs_dir")
        },
        "machine": limits.machine(),
        "read_bytes_per_second": limits.read_rate(512, device),
        "bytes_per_step": bytes_per_step(s),
        "commit": commit(),
    }


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


def summarize(lines):
    """A row for each side and batch: medians over the runs, share of the limit, how far the ids are transformers'."""
    rows = []
    measured = [line for line in lines if "unavailable" not in line]
    reference = {line["batch"]: line["outputs"] for line in measured if line["side"] == "transformers"}
    for side, batch in dict.fromkeys((line["side"], line["batch"]) for line in measured):
        runs = [line for line in measured if (line["side"], line["batch"]) == (side, batch)]
        row = {"side": side, "batch": batch, "runs": len(runs)}
        for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_gb", "others_cpu"):
            row[key] = statistics.median(run[key] for run in runs)
        speeds = [run["decode_tokens_per_second"] for run in runs]
        row["spread"] = min(speeds), max(speeds)
        bandwidth = row["decode_tokens_per_second"] / batch * runs[0]["bytes_per_step"]
        row["of_limit"] = bandwidth / runs[0]["read_bytes_per_second"]
        row["same"] = agreement(runs[-1]["outputs"], reference.get(batch))
        rows.append(row)
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
    name = f"{line['side']}, {line['batch']} prompt{'s' if line['batch'] > 1 else ''}"
    if "unavailable" in line:
        return f"{name}: not measured: {line['unavailable']}"
    prefill, decode = line["prefill_tokens_per_second"], line["decode_tokens_per_second"]
    return f"{name}: prompts {prefill:.0f} tokens/s, decoding {decode:.1f} tokens/s"


def title(call):
    s, machine = call["settings"], call["machine"]
    where = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    return f"{s['checkpoint_dir']}, {s['dtype']}{', ' + s['quantize'] if s['quantize'] else ''}, {where}"


def print_table(call, rows):
    gb = call["read_bytes_per_second"] / 1e9
    print(f"\n{title(call)}, reads {gb:.1f} GB/s, {call['bytes_per_step'] / 1e6:.0f} MB a step, {call['commit']}")
    print(
        f"{'':22} {'prompts':>7} {'prefill':>8} {'decode':>8} {'from':>7} {'to':>7} {'of limit':>8} {'memory':>7} "
        f"{'same ids':>8} {'others':>6}"
    )
    for row in rows:
        same = "" if row["same"] is None else f"{row['same']:.1%}"
        low, high = row["spread"]
        print(
            f"{row['side']:22} {row['batch']:7} {row['prefill_tokens_per_second']:8.0f} "
            f"{row['decode_tokens_per_second']:8.1f} {low:7.1f} {high:7.1f} {row['of_limit']:8.1%} "
            f"{row['peak_gb']:7.2f} {same:>8} {row['others_cpu']:6.1%}"
        )
    for batch in dict.fromkeys(row["batch"] for row in rows):
        speeds = {row["side"]: row["decode_tokens_per_second"] for row in rows if row["batch"] == batch}
        peers = [speed for side, speed in speeds.items() if side != OURS]
        if OURS in speeds and peers:
            print(f"{batch} at a time: {speeds[OURS] / max(peers):.2f} times the fastest peer's decoding")


def draw_chart(call, rows, path):
    """Bars of decoding and prefill speed, a row of two panels for each batch, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batches = list(dict.fromkeys(row["batch"] for row in rows))
    figure, axes = plt.subplots(
        len(batches), 2, figsize=(12, 2.4 * len(batches) + 0.6), layout="constrained", squeeze=False
    )
    for batch, panels in zip(batches, axes, strict=True):
        shown = [row for row in rows if row["batch"] == batch][::-1]
        colours = ["tab:orange" if row["side"] == OURS else "tab:blue" for row in shown]
        for panel, kind in zip(panels, ("decode", "prefill"), strict=True):
            bars = panel.barh([row["side"] for row in shown], [row[f"{kind}_tokens_per_second"] for row in shown])
            for bar, colour in zip(bars, colours, strict=True):
                bar.set_color(colour)
            panel.bar_label(bars, fmt="{:,.0f}", padding=3)
            panel.set(xlabel="tokens/s", xmargin=0.12, title=f"{kind}, {batch} at a time")
            panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title(call), fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    cli.run(main, settings)
