"""The command line of exact_match.py: in a file of its own, to be read without torch (search/metric.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shell import cli


@dataclass
class Settings:
    """The command line.

    Args:
        data: File of samples with answers, or a mixture's YAML file, as prepare_data.py reads them; of a mixture only
            the paths, fields and choices count.
        checkpoint_dir: Model folder; if not given, the one that the adapter was trained on.
        adapter_dir: Adapter to put over the model.
        quantize: Keep the weights in 4 or 8 bits, or each layer as in a file written by eval/quality.py --sensitivity;
            "none" for not at all. If not given, as the adapter was trained.
        precision: Dtype of the other weights and of the computation.
        prompt_style: How prompts are rendered; if not given, as in training.
        max_new_tokens: Tokens of an answer at most.
        batch_size: Prompts that are answered at one time.
        limit: Measure on so many samples from the start of the file.
        out_file: JSON file for the result and every answer.
    """

    data: Path
    checkpoint_dir: Path | None = None
    adapter_dir: Path | None = None
    quantize: Literal[*cli.table_keys("quantize.py", "QUANTIZERS"), "none"] | cli.JsonFile | None = None
    precision: Literal["32-true", "bf16-true", "16-true"] = "bf16-true"
    prompt_style: Literal[cli.table_keys("text/prompts.py", "STYLES")] | None = None
    max_new_tokens: int = 64
    batch_size: int = 50
    limit: int | None = None
    out_file: Path | None = None

    def __post_init__(self):
        cli.check_model(self)
        cli.check_files(self, "data")
        cli.check_out_file(self, "out_file")
        cli.check_numbers(self, "max_new_tokens", "batch_size", "limit", above=0)
