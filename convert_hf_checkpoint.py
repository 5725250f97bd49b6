"""Make a model folder: download one, convert a foreign format, or merge an adapter into its base.

    python convert_hf_checkpoint.py --repo_id mistralai/Mistral-7B-v0.1
    python convert_hf_checkpoint.py --source model.Q4_K_M.gguf
    python convert_hf_checkpoint.py --adapter_dir out/RUN/final

A Hugging Face folder with safetensors is a model folder as it stands: it is only checked. pytorch_model*.bin (unpickled
as weights only) and GGUF are written as safetensors. All of it happens one tensor at a time, and a folder appears when
it is complete or not at all.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cli
from cli import UserError


@dataclass
class Settings:
    """The command line.

    Args:
        repo_id: Model to download from Hugging Face's hub (or from HF_ENDPOINT), such as mistralai/Mistral-7B-v0.1.
            Gated ones need a token in the environment variable HF_TOKEN.
        revision: Branch, tag or commit of repo_id, if not the newest.
        source: A folder with safetensors or pytorch_model*.bin, or a .gguf file. With adapter_dir: the base model, if
            not the one that the adapter names.
        adapter_dir: LoRA adapter, ours or PEFT's, to merge into its base.
        quantize: How the base was quantised when the adapter was trained, if not as the adapter's onetune.json says:
            "none", bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8.
        out_dir: Folder to write; by default checkpoints/REPO_ID, checkpoints/NAME or ADAPTER_DIR-merged.
        dtype: Of the weights written. auto: as they are in the source (quantised GGUF: float16, see below); float32
            for a merged model, since rounding to 16 bits costs a part of what the adapter learnt (it is printed).
    """

    repo_id: str | None = None
    revision: str | None = None
    source: Path | None = None
    adapter_dir: Path | None = None
    quantize: str | None = None
    out_dir: Path | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def __post_init__(self):
        if (self.repo_id is None) == (self.source is None and self.adapter_dir is None):
            raise UserError("give --repo_id (to download), --source (to convert) or --adapter_dir (to merge), one of them")
        if self.repo_id is not None and not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", self.repo_id):
            raise UserError(f"--repo_id {self.repo_id}: expected ORGANISATION/NAME; for a local path use --source")
        if self.revision is not None and self.repo_id is None:
            raise UserError("--revision goes with --repo_id")
        if self.quantize is not None and self.adapter_dir is None:
            raise UserError("--quantize goes with --adapter_dir: it says how the adapter's base was quantised")


if __name__ == "__main__":
    settings = cli.parse(Settings)

import zipfile

import torch

from checkpoint import INDEX, SIDE_FILES, Weights, copy_side_files, write_weights
from files import new_folder, read_json
from model import Config, Transformer

GIGABYTE = 10**9


def main(s):
    convert(s)


class BinWeights(Weights):
    """The tensors of pytorch_model*.bin files, memory-mapped; the interface of `Weights`."""

    def __init__(self, folder):
        self._tensors, self.path = {}, folder
        for path in _listed(folder, "pytorch_model.bin.index.json", "pytorch_model*.bin"):
            self._tensors.update(_unpickle(path))
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._tensors.items()}


def open_source(source):
    """The weights in `source`, its config.json as a dict, and a function that writes its other files to a folder."""
    if source.is_file() and source.suffix == ".gguf":
        import gguf_format

        weights = gguf_format.GGUFWeights(source)
        return weights, gguf_format.config_json(weights), lambda folder: gguf_format.write_tokenizer(weights, folder)


def convert(s):
    weights, config, write_side_files = open_source(s.source)
    with torch.device("meta"):
        model = Transformer(Config.from_dict(config))
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    weights.check(expected)
    wanted = None if s.dtype == "auto" else getattr(torch, s.dtype)
    layout = {name: (wanted or weights.dtypes[name] or torch.float16, shape) for name, shape in expected.items()}
    with new_folder(s.out_dir) as folder:
        write_weights(folder, layout, lambda name: weights.read(name).to(layout[name][0]))
        write_side_files(folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main, settings)
