"""Tiny models of every family, made by transformers once in a session."""

from functools import lru_cache

import pytest
import torch
from families.rows import ROWS, each_row

from weights.checkpoint import load_model

VOCABULARY = 160


def pytest_generate_tests(metafunc):
    """A test with the argument `family_row` runs for every row of the table."""
    if "family_row" in metafunc.fixturenames:
        rows = each_row()
        metafunc.parametrize("family_row", rows, ids=[f"{family}-{number}" for family, number in rows])


class Tiny:
    """A tiny random model: transformers' `reference`, its `folder`, and how we load it.

    edits: changes to the row's settings.
    """

    def __init__(self, row, folder, edits=None):
        import transformers  # takes seconds, which only these tests have to wait for

        self.family, self.folder = row[0], folder
        # transformers' own way to add ALiBi to Falcon's scores adds it twice; with torch's kernels it does not.
        self.attention = "sdpa" if self.family == "falcon" else "eager"
        config = transformers.AutoConfig.for_model(self.family, **{**ROWS[row[0]][row[1]], **(edits or {})})
        self.reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=self.attention)
        self.reference = self.reference.float().eval()
        gain = float(not self.family.startswith(("gemma", "nemotron")))  # theirs are 1 + the weight
        with torch.no_grad():
            for name, parameter in self.reference.named_parameters():
                is_gain = ("norm" in name or "ln_" in name) and name.endswith("weight")
                parameter.normal_(mean=gain * is_gain, std=0.15)
        self.reference.save_pretrained(folder)

    def load(self, dtype=torch.float32, **options):
        """Our model of the folder."""
        return load_model(self.folder, dtype, **options)

    def loaded_by_transformers(self, folder):
        """transformers' model of another folder."""
        how = {"attn_implementation": self.attention, "dtype": torch.float32}
        if "mixtral" in self.family or "moe" in self.family:  # the grouped product wants multiples of 16 bytes in bf16
            how["experts_implementation"] = "eager"
        return type(self.reference).from_pretrained(folder, **how).eval()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """A function from a row to its `Tiny`."""
    return lru_cache(maxsize=None)(lambda row: Tiny(row, tmp_path_factory.mktemp(row[0])))


@pytest.fixture
def tiny(family_row, tiny_models):
    """The model of a row."""
    return tiny_models(family_row)


def random_tokens(*shape):
    """Tokens that are none of the special ones."""
    return torch.randint(3, VOCABULARY, shape)


def distance(one, other):
    """|one - other| / |other|."""
    return ((one - other).norm() / other.norm()).item()


def usual_distance(one, other):
    """The median of tokens' distances, for logits (..., V): of those whose experts rounding changes there are few."""
    return ((one - other).norm(dim=-1) / other.norm(dim=-1)).median().item()
