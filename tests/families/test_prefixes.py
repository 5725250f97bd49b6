"""Beginnings that prompts share, kept from prompt to prompt, in every family: the logits are those of reading all."""

import random

import pytest
import torch
from families.rows import ROWS
from families.test_decoding import padded, random_ids, scaling_of
from families.tiny import distance

from inference import prefix_cache
from inference.decode import Decoder
from inference.prefix_cache import PrefixCache

TOLERANCE = 1e-5  # of logits in fp32, |difference| / |logits|
SHARED = 34


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(prefix_cache, "BLOCK", 4)


@torch.inference_mode()
def logits_of(decoder, prompts, following, prefixes=None):
    """The logits after prompts, read in chunks of random sizes, and after each of the tokens that follow: (n, B, V)."""
    reading = decoder.read(*padded(prompts), max(map(len, prompts)))
    if prefixes is not None:
        reading.reuse(prefixes)
    while not reading.done:
        reading.advance(random.randint(1, 30))
    if prefixes is not None:
        reading.hold(prefixes)
    logits = [decoder.take(reading, len(following)).clone()]
    logits += [decoder.step(ids).clone() for ids in following]
    decoder.forget()
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("family", "number"), [(family, number) for family, rows in ROWS.items() for number in range(len(rows))]
)
def test_what_is_held_is_what_would_be_read(tiny_models, family, number):
    """Prompts of several lengths together, past windows, and on both sides of where a length changes the angles."""
    model = tiny_models((family, number)).load().eval()
    prefixes, shared = PrefixCache(2**30), random_ids(SHARED)
    tails = [random_ids(random.randint(1, 9)) for _ in range(4)]
    for lengths in ([SHARED], [SHARED], [9, 12], [9, 13, SHARED], [SHARED, SHARED - 3], [12], [0, 20]):
        prompts = [shared[:length] + random.choice(tails) for length in lengths]
        following = [torch.tensor(random_ids(len(prompts))) for _ in range(4)]
        found = logits_of(Decoder(model), prompts, following, prefixes)
        assert distance(found, logits_of(Decoder(model), prompts, following)) < TOLERANCE
    least = {"dynamic": 1, "longrope": 3}.get(scaling_of(model), 5)
    assert prefixes.hits >= least and prefixes.reused > 0 and prefixes.prompts == 12
