"""A model folder with random weights in a published shape: what a step costs does not depend on the weights' values.

    python bench/random_model.py --shape Pythia-160M --tokenizer_dir checkpoints/SmolLM2-135M-Instruct \
      --out_dir checkpoints/random-Pythia-160M

The tokenizer may be any whose ids the shape's vocabulary has.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # the project's folder in place of this one, wherever it is started from
    sys.path[0] = str(ROOT)

from bench.shapes import SHAPES
from shell import cli
from shell.cli import UserError

SCALE = 0.02  # standard deviation of the weights


@dataclass(kw_only=True)
class Settings:
    """The command line.

    Args:
        shape: Whose numbers of layers, heads and so on.
        tokenizer_dir: Folder to copy the tokenizer from.
        out_dir: Folder to write.
    """

    shape: Literal[tuple(SHAPES)]
    tokenizer_dir: Path
    out_dir: Path

    def __post_init__(self):
        if not self.tokenizer_dir.is_dir():
            raise UserError(f"--tokenizer_dir {self.tokenizer_dir}: no such folder")
        if self.out_dir.exists():
            raise UserError(f"--out_dir {self.out_dir} exists: remove it, or choose another")


if __name__ == "__main__":
    settings = cli.parse(Settings)


def main(s):
    """Write the folder, in bf16."""
    count = write_random_model(SHAPES[s.shape], s.tokenizer_dir, s.out_dir)
    print(f"wrote {s.out_dir}: {count:,} random weights")


def write_random_model(shape, tokenizer_dir, out_dir):
    """Write the folder of a shape's config.json, in bf16. Returns the number of its weights."""
    import torch

    from model import Transformer
    from shell.files import new_folder, write_json
    from weights.checkpoint import SIDE_FILES, write_model_weights
    from weights.families import config_from_json

    values = {**shape, "torch_dtype": "bfloat16"}
    torch.manual_seed(0)
    model = Transformer(config_from_json(values)).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = "norm" in name and name.endswith(".weight") and model.config.norm_gain == "weight"
            parameter.normal_(std=SCALE).add_(float(is_gain))
    parameters = dict(model.named_parameters())
    layout = {name: (parameter.dtype, tuple(parameter.shape)) for name, parameter in parameters.items()}
    with new_folder(out_dir) as folder:
        write_model_weights(folder, model.config, layout, parameters.__getitem__)
        for name in SIDE_FILES:
            if (tokenizer_dir / name).is_file():
                shutil.copyfile(tokenizer_dir / name, folder / name)
        write_json(folder / "config.json", values)
    return sum(parameter.numel() for parameter in parameters.values())


if __name__ == "__main__":
    cli.run(main, settings)
