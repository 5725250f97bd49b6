"""How many parameters models have by their configurations alone, against what papers and model cards say."""

import pytest
import torch

from bench.shapes import SHAPES
from model import Transformer
from weights.families import config_from_json

# In billions as the model cards have it, or exactly where that is published.
PUBLISHED = {
    "Llama-2-70B": 68_976_648_192,  # "70B": as transformers counts them
    "Pythia-6.9B": 6_857_302_016,  # Biderman et al. 2023, arXiv 2304.01373, the model card's table
    "Falcon-7B": 6_921_720_704,  # "7B" on the card; PEFT prints 6,926,439,296 with rank 16 on query_key_value
    "Falcon-40B": 60 * (9216 * 8192 + 9 * 8192**2 + 4 * 8192) + 65024 * 8192 + 2 * 8192,  # "40B": counted by hand
    "MPT-30B": "29.95",
    "BLOOM-7b1": 7_069_016_064,
    "OPT-350M": 331_196_416,
    "Gemma-2-9B": 256000 * 3584 + 8_324_201_984,  # arXiv 2408.00118, table 2, less 128 unused rows of its embedding
    "Mixtral-8x7B": "46.7",
    "Qwen3-30B-A3B": "30.5",
}
ACTIVE = {"Mixtral-8x7B": "12.9", "Qwen3-30B-A3B": "3.3"}  # billions of parameters that a token uses


def model_of(name):
    with torch.device("meta"):
        return Transformer(config_from_json(SHAPES[name]))


def is_published(count, published):
    """Whether a count is the exact one, or, in billions, the one that was rounded or cut off."""
    if isinstance(published, int):
        return count == published
    return abs(count / 1e9 - float(published)) < 10 ** -len(published.partition(".")[2])


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    assert is_published(sum(parameter.numel() for parameter in model_of(name).parameters()), PUBLISHED[name])


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters(name):
    model = model_of(name)
    experts = model.config.experts
    used = sum(
        parameter.numel() * (experts.per_token / experts.count if ".mlp.experts." in name else 1)
        for name, parameter in model.named_parameters()
    )
    assert is_published(used, ACTIVE[name])
