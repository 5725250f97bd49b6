"""What quantising and merging cost an adapter: every way to run it, compared with the adapter as it was trained.

python eval/quality.py --adapter_dir out/RUN/final --data test.jsonl --data_dir prepared/my --general_text wiki.txt
python eval/quality.py --adapter_dir out/RUN/final --data_dir prepared/my --sensitivity --bits_per_weight 5

A variant is KIND:FORM. KIND: base, adapter (over the base) or merged (into it). FORM: fp32, bf16, or a --quantize (the
other weights are bf16 then). The reference is base and adapter as in training, but computed in fp32. Each variant is
measured in a process of its own, so that its peak memory is its own. Written to --out_dir: report.json, report.png.

With --sensitivity the linear layers are quantised one at a time instead, and those that suffer most stay wide in a plan
that fits the budget: sensitivity.json, sensitivity.png, and plan.json for --quantize.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from shell import cli
from shell.cli import UserError

KINDS = ("base", "adapter", "merged")
VARIANTS = [
    "base:bf16", "adapter:fp32", "adapter:bf16", "adapter:bnb.int8", "adapter:bnb.nf4", "adapter:bnb.nf4-dq",
    "adapter:bnb.fp4", "merged:fp32", "merged:bf16", "merged:bnb.int8", "merged:bnb.nf4",
]  # fmt: skip


@dataclass
class Settings:
    """The command line.

    Args:
        checkpoint_dir: Model folder; if not given, the one that the adapter was trained on.
        adapter_dir: Adapter to put over the model.
        quantize: How the base was quantised when the adapter was trained: "none", or as in finetune.py. If not given,
            as the adapter's onetune.json says.
        data: File of samples for exact match, as eval/exact_match.py takes it.
        data_dir: Prepared folder; the target tokens of its validation samples are the task's. Without it those of data
            are.
        general_text: Text that has nothing to do with the training, to see what was forgotten: plain text, or .jsonl
            with "text".
        variants: What to measure; without an adapter the base alone, in the same forms.
        prompt_style: How prompts are rendered; if not given, as in training.
        limit: Samples of data, from the start of the file.
        max_tokens: Positions to read of data_dir, and as many of general_text.
        window: Positions of a sequence of general_text.
        micro_batch_tokens: Positions in the model at one time.
        max_new_tokens: Tokens of an answer at most.
        batch_size: Prompts that are answered at one time.
        sensitivity: Measure the layers one by one instead, on data_dir, data or general_text, the first that is given.
        quantizers: With sensitivity, the quantisers that a layer may have; the others stay in bf16.
        precision: With sensitivity, dtype of the model whose layers are quantised. bf16 takes half the memory; on a GPU
            its rounding may hide the layers that suffer least.
        budget_bytes: With sensitivity, make a plan in which all weights of the model take so much, such as 90MB or 5GB.
        bits_per_weight: With sensitivity, make a plan in which the linear layers in the blocks take so many bits a
            weight.
        out_dir: Folder for what is written.
    """

    checkpoint_dir: Path | None = None
    adapter_dir: Path | None = None
    quantize: Literal[*cli.table_keys("quantize.py", "QUANTIZERS"), "none"] | cli.JsonFile | None = None
    data: Path | None = None
    data_dir: Path | None = None
    general_text: Path | None = None
    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    prompt_style: Literal[cli.table_keys("text/prompts.py", "STYLES")] | None = None
    limit: int | None = None
    max_tokens: int = 8192
    window: int = 512
    micro_batch_tokens: int = 1024
    max_new_tokens: int = 64
    batch_size: int = 50
    sensitivity: bool = False
    quantizers: list[Literal[cli.table_keys("quantize.py", "QUANTIZERS")]] = field(
        default_factory=lambda: ["bnb.nf4", "bnb.int8"]
    )
    precision: Literal["32-true", "bf16-true"] = "32-true"
    budget_bytes: str | None = None
    bits_per_weight: float | None = None
    out_dir: Path = Path("out/quality")

    def __post_init__(self):
        cli.check_model(self)
        if self.data is None and self.data_dir is None and self.general_text is None:
            raise UserError("one of --data, --data_dir and --general_text is required")
        cli.check_files(self, "data", "general_text")
        above_zero = ("limit", "max_tokens", "micro_batch_tokens", "max_new_tokens", "batch_size", "bits_per_weight")
        cli.check_numbers(self, *above_zero, above=0)
        cli.check_numbers(self, "window", least=2)  # a token predicts the next
        if self.out_dir.exists() and not self.out_dir.is_dir():
            raise UserError(f"--out_dir {self.out_dir} is a file: choose another")
        self._check_variants()
        self._check_sensitivity()

    def _check_variants(self):
        if self.adapter_dir is None:
            self.variants = list(dict.fromkeys("base:" + v.partition(":")[2] for v in self.variants))
        for variant in self.variants:
            if variant.partition(":")[0] not in KINDS or not variant.partition(":")[2]:
                raise UserError(f"--variants {variant}: expected KIND:FORM, such as adapter:bnb.nf4; a kind is "
                                f"{', '.join(KINDS)}")  # fmt: skip
        if not self.variants or len(set(self.variants)) < len(self.variants):
            raise UserError("--variants: name at least one, and none twice")

    def _check_sensitivity(self):
        given = [name for name in ("budget_bytes", "bits_per_weight") if getattr(self, name) is not None]
        if len(given) == 2:
            raise UserError("--budget_bytes and --bits_per_weight exclude each other")
        if given and not self.sensitivity:
            raise UserError(f"--{given[0]} needs --sensitivity")
        if self.budget_bytes is not None:
            cli.number_of_bytes(self.budget_bytes, "budget_bytes")
        if not self.quantizers or len(set(self.quantizers)) < len(self.quantizers):
            raise UserError("--quantizers: name at least one, and none twice")


if __name__ == "__main__":
    settings = cli.parse(Settings)

import dataclasses
import multiprocessing
import os
import platform
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

from eval import quality_report, quality_texts, sensitivity
from eval.divergence import Text
from eval.quality_variants import DTYPES, make_references, measure_variant
from inference.writer import find_model
from model import Transformer
from ops.core_sharing import share_cores
from quantize import read_quantization, write_plan
from shell.files import whole_file, write_json
from shell.progress import bar
from store.cache import address_of
from store.fetch import fetch_folders
from tracking.results import record_result
from weights.checkpoint import load_model, read_config, trained_quantization
from weights.merge import check_mergeable
from weights.peft_format import load_adapter

Result = TypeVar("Result")


def main(s: Settings) -> None:
    """Measure the variants, or with --sensitivity the layers, and write what was found to --out_dir."""
    fetch_folders(s)
    s.checkpoint_dir = find_model(s.checkpoint_dir, s.adapter_dir)
    s.quantize = trained_quantization(s.adapter_dir, s.quantize)
    check(s)
    texts, samples = quality_texts.read_texts(s)
    if s.sensitivity:
        measure_sensitivity(s, next(iter(texts.values())))
    else:
        measure_variants(s, len(samples))


def measure_variants(s: Settings, samples: int) -> None:
    """Measure each variant in a process of its own; print the report and write it with its chart."""
    report = {"settings": plain(s), "machine": machine(), "samples": samples}
    with tempfile.TemporaryDirectory() as folder:
        report["reference"] = in_process(make_references, s, folder)
        report["variants"] = []
        for variant in bar(s.variants, "variants"):
            report["variants"].append(in_process(measure_variant, s, variant, folder))
    s.out_dir.mkdir(parents=True, exist_ok=True)
    with whole_file(s.out_dir / "report.json") as file:
        write_json(file, report)
    quality_report.draw_report(report, s.out_dir / "report.png")
    quality_report.show_report(report)
    print(f"written to {s.out_dir}: report.json, report.png")
    record_result(s.adapter_dir or s.checkpoint_dir, "quality", "", quality_report.metrics_of(report), vars(s))


def check(s: Settings) -> None:
    """Check the settings against the model's config.json, on the meta device, before any weight is read."""
    with torch.device("meta"):
        model = Transformer(read_config(s.checkpoint_dir))
    s.quantize = read_quantization(s.quantize, model)
    for variant in s.variants:
        try:
            form = variant.partition(":")[2]
            read_quantization(None if form in DTYPES else form, model)
        except UserError as error:
            raise UserError(f"--variants {variant}: a form is fp32, bf16 or a --quantize; {error}") from None
    if s.adapter_dir is not None:
        check_mergeable(load_adapter(model, s.adapter_dir), s.adapter_dir)


def plain(s: Settings) -> dict:
    """The settings as JSON can hold them."""
    return {name: address_of(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(s).items()}


def machine() -> dict:
    """What the figures of a report depend on beside the settings."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
    }


def in_process(function: Callable[..., Result], *arguments: object) -> Result:
    """function(*arguments) in a new process, whose memory has held nothing else. What it raises is raised here."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            what = " ".join(str(a) for a in arguments if isinstance(a, str) and ":" in a) or "the reference"
            raise UserError(f"the process for {what} was killed: most likely it was out of memory") from None


# --------------------------------------------------------------------------------------------------------- sensitivity


def measure_sensitivity(s: Settings, text: Text) -> None:
    """Measure the layers, print the worst, and write what was found, with a plan if there is a budget."""
    share_cores()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"32-true": torch.float32, "bf16-true": torch.bfloat16}[s.precision]
    model = load_model(s.checkpoint_dir, dtype, device, None, s.adapter_dir)
    paths = sensitivity.block_layers(model)
    weights = sum(sensitivity.layer_size(model, path) for path in paths)
    other = sensitivity.other_bytes(model)
    budget = layer_budget(s, weights, other)
    if budget is not None:
        sensitivity.check_budget(model, s.quantizers, budget)
    rows = sensitivity.measure_layers(
        model, text, s.micro_batch_tokens, s.quantizers, lambda paths: bar(paths, "layers")
    )
    plans = {name: dict.fromkeys(paths, name) for name in s.quantizers}
    if budget is not None:
        plans["plan.json"] = sensitivity.choose_plan(rows, budget)
    found = {"settings": plain(s), "machine": machine(), "weights": weights, "other_bytes": other, "layers": rows}
    found["plans"] = {name: measure_plan(s, model, text, rows, plan) for name, plan in plans.items()}
    write_sensitivity(s.out_dir, found, plans.get("plan.json"), model)


def write_sensitivity(out_dir: Path, found: dict, plan: sensitivity.Plan | None, model: Transformer) -> None:
    """Print what was found, and write it with its chart and the plan, if there is one."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with whole_file(out_dir / "sensitivity.json") as file:
        write_json(file, found)
    if plan is not None:
        notes = {key: found["plans"]["plan.json"][key] for key in ("bytes", "bits_per_weight", "kl")}
        notes = {"total_bytes": notes["bytes"] + found["other_bytes"], **notes}
        write_plan(out_dir / "plan.json", plan, model.config, notes)
    quality_report.draw_layers(found, out_dir / "sensitivity.png")
    quality_report.show_layers(found)
    print(f"written to {out_dir}: sensitivity.json, sensitivity.png" + (", plan.json" if plan is not None else ""))


def layer_budget(s: Settings, weights: int, other: int) -> int | None:
    """The bytes that the linear layers in the blocks may take, None without a budget. UserError if none are left.

    weights: of these layers. other: bytes of all other weights.
    """
    if s.bits_per_weight is not None:
        return int(s.bits_per_weight * weights / 8)
    if s.budget_bytes is None:
        return None
    budget = cli.number_of_bytes(s.budget_bytes, "budget_bytes")
    if budget <= other:
        raise UserError(
            f"--budget_bytes {s.budget_bytes}: embedding, head, norms and biases alone take {other:,} bytes"
        )
    return budget - other


def measure_plan(s: Settings, model: Transformer, text: Text, rows: list[dict], plan: sensitivity.Plan) -> dict:
    """The bytes of the layers under a plan, its divergence, and the sum of the divergences of each layer alone."""
    nbytes, alone = sensitivity.plan_cost(rows, plan)
    weights = sum(sensitivity.layer_size(model, path) for path in plan)
    kl = sensitivity.measure_plan(model, text, s.micro_batch_tokens, plan)
    return {"bytes": nbytes, "bits_per_weight": 8 * nbytes / weights, "kl_of_layers_alone": alone, "kl": kl}


if __name__ == "__main__":
    cli.run(main, settings)
