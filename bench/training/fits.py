"""Does a model fit on my card, and with what flags? A table by the planner, for cards that need not be here.

    python bench/training/fits.py

For each way to train and each length of the samples: the most `--micro_batch_tokens` (whole samples of that length, in
a packed row, half of their positions targets) for which the predicted peak fits on a card, with the smallest
`--recompute` for which any fits, or "no". A card of 24 GB counts as 24 x 10^9 bytes, less `plan.CUDA_OVERHEAD`. It
needs no weights, no GPU, and minutes of a CPU.
"""

import bisect
import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.measuring import print_table
from bench.shapes import SHAPES
from shell import cli
from shell.cli import UserError

MODELS = ("Llama-2-7B", "Mistral-7B", "OPT-350M", "Falcon-7B", "MPT-30B")


@dataclass
class Settings:
    """The command line.

    Args:
        models: Which ones.
        lengths: Positions of a sample.
        cards: GB of the cards.
        most_tokens: Where to stop looking: larger micro-batches are no faster.
    """

    models: list[Literal[MODELS]] = field(default_factory=lambda: list(MODELS))
    lengths: list[int] = field(default_factory=lambda: [512, 2048, 4096])
    cards: list[int] = field(default_factory=lambda: [16, 24, 40, 80])
    most_tokens: int = 16384

    def __post_init__(self):
        cli.check_numbers(self, "lengths", "cards", "most_tokens", above=0)
        if not self.lengths or not self.cards:
            raise UserError("--lengths and --cards must name at least one number each")


WAYS = {  # flags: method, quantize, optimizer
    "LoRA": ("lora", None, "adamw"),
    "LoRA, `--quantize bnb.nf4`": ("lora", "bnb.nf4", "adamw"),
    "LoRA, `--quantize bnb.nf4-dq`": ("lora", "bnb.nf4-dq", "adamw"),
    "`--method full --optimizer adamw-8bit`": ("full", None, "adamw-8bit"),
}

SHARES = (0.0, 0.5, 1.0)  # of the blocks, with activation checkpointing

if __name__ == "__main__":
    settings = cli.parse(Settings)


def main(s):
    """Print the table."""
    from tqdm import tqdm

    rows, ways = [], list(itertools.product(s.models, WAYS))
    for model, way in tqdm(ways, unit="row", leave=False):
        predictors = {share: make_predictor(SHAPES[model], *WAYS[way], share) for share in SHARES}
        for length in s.lengths:
            cells = {f"{card} GB": what_fits(predictors, length, card, s.most_tokens) for card in s.cards}
            rows.append({"model": model, "how": way, "length": length, **cells})
    print_table({heading: f"{{{heading}}}" for heading in rows[0]}, rows)


def make_predictor(values, method, quantize, optimizer, recompute):
    """The planner's prediction of the peak, for a model of a config.json's `values`."""
    import torch

    import lora
    from training.from_settings import default_targets
    from training.memory import plan
    from weights.families import config_from_json

    config = config_from_json(values)
    job = plan.Job(
        config, "meta", torch.bfloat16, quantize=quantize, optimizer=optimizer, recompute=recompute,
        adapter=lora.AdapterConfig(targets=tuple(default_targets(config))) if method == "lora" else None,
    )  # fmt: skip
    return plan.Predictor(job)


def what_fits(predictors, length, card, most):
    """Tokens of the most samples (1, 2, 4, ...) of `length` that fit on a card of so many GB, and the share recomputed.

    The smallest share with which one sample fits is taken.
    """
    from training.memory import plan

    budget = card * 1e9 - plan.CUDA_OVERHEAD
    counts = [2**n for n in range(max(1, most // length).bit_length())]
    for share, predictor in predictors.items():
        peak = lambda n, p=predictor: p.peak(plan.packed_shape(n * length, length, n * length // 2))  # noqa: E731
        fitting = bisect.bisect_right(counts, budget, key=peak)
        if fitting:
            return f"{counts[fitting - 1] * length}" + (f", `--recompute {share:g}`" if share else "")
    return "no"


if __name__ == "__main__":
    cli.run(main, settings)
