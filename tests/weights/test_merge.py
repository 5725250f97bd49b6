"""A model with one block at a time in memory."""

import pytest
import torch
from conftest import FAMILIES

from model import Transformer
from shell.files import read_json
from weights.checkpoint import load_model
from weights.merge import Tuned
from weights.stored import Weights


@pytest.mark.parametrize("family", FAMILIES)
def test_its_logits_are_the_models(tiny_checkpoint, family):
    folder = tiny_checkpoint(family)
    tokens = torch.randint(512, (1, 9))
    expected = load_model(folder, torch.float32)(tokens)
    found = Tuned(read_json(folder / "config.json"), Weights(folder)).logits(tokens)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_an_edit_of_the_models_forward_pass_is_followed(tiny_checkpoint, monkeypatch):
    """Such as a scale of the embedding: a merged model must be compared with the model that is there."""
    folder = tiny_checkpoint("llama")
    tokens, before = torch.randint(512, (1, 9)), Transformer.hidden_states

    def edited(self, tokens, *args, **kwargs):
        self.model.embed_tokens.register_forward_hook(lambda module, args, x: 3 * x)
        return before(self, tokens, *args, **kwargs) ** 2

    plain = Tuned(read_json(folder / "config.json"), Weights(folder)).logits(tokens)
    monkeypatch.setattr(Transformer, "hidden_states", edited)
    expected = load_model(folder, torch.float32)(tokens)
    found = Tuned(read_json(folder / "config.json"), Weights(folder)).logits(tokens)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (found - plain).abs().max() > 0.01 * plain.abs().max()
