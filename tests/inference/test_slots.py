"""The memory of recorded decoding steps: how much there is, when it grows, and that what was in it does not matter.

tests/families/test_decoding.py has the rest: every family, with rows that come and go at random.
"""

import random

import pytest
import torch
from families.replay import ReplayedDecoder

from inference import slots as slots_file
from inference.decode import Decoder, StaticDecoder
from inference.slots import Slots
from ops.gpu import power_of_two
from weights.checkpoint import load_model


@pytest.fixture(scope="session")
def model(tiny_checkpoint):
    """A window of 7 in a context of 256. Not to be changed."""
    return load_model(tiny_checkpoint("mistral"), torch.float32)


@pytest.fixture(autouse=True)
def _small_slots(monkeypatch):
    monkeypatch.setattr(slots_file, "LEAST_ROOM", 8)


def random_tokens(length):
    return torch.randint(3, 512, (1, length))


def start(decoder, length, room=300):
    """Begin with one row of random tokens, which are returned: (1, T)."""
    tokens = random_tokens(length)
    decoder.start(tokens, torch.zeros(1, dtype=torch.int64), room)
    return tokens


def join(decoder, length, more=300):
    tokens = random_tokens(length)
    decoder.take(decoder.read(tokens, torch.zeros(1, dtype=torch.int64), length).finish(), more)
    return tokens


def test_the_next_power_of_two():
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 8, 9, 1000)] == [1, 2, 4, 4, 8, 8, 16, 1024]


def test_memory_is_what_the_rows_of_the_time_need_rounded_up(model):
    """Never what many short rows and one long row would need together that were not there together."""
    slots, needed = Slots(model.config, torch.float32, torch.device("cpu")), 0
    for _ in range(50):
        rows, positions = random.randint(1, 20), random.choice((3, 8, 9, 100, 256, 400))
        slots.fit(rows, positions)
        assert rows <= slots.count < 2 * rows and positions <= slots.room < max(2 * positions, 9)
        needed = max(needed, slots.count * slots.room)
        assert slots.size == needed
        for flat, (heads, d, _) in zip(slots.flat, slots.kinds, strict=True):
            assert len(flat) == slots.size * heads * d


def test_a_slot_is_not_longer_than_the_context(model):
    slots = Slots(model.config, torch.float32, torch.device("cpu"))
    slots.context = 200
    for positions, room in ((100, 128), (129, 200), (200, 200), (201, 256)):
        slots.fit(1, positions)
        assert slots.room == room


def test_addresses_change_only_when_there_is_not_enough(model):
    slots = Slots(model.config, torch.float32, torch.device("cpu"))
    slots.fit(4, 60)
    before = [flat.data_ptr() for flat in slots.flat]
    for layout in ((16, 16), (1, 256), (2, 8), (4, 64)):
        slots.fit(*layout)
    assert slots.grown == 1 and [flat.data_ptr() for flat in slots.flat] == before
    slots.fit(5, 60)
    assert slots.grown == 2 and slots.size == 8 * 64


def test_rows_move_into_fewer_and_smaller_slots_when_others_leave(model):
    decoder = StaticDecoder(model)
    start(decoder, 3)
    for length in (40, 5, 6, 2):
        join(decoder, length)
    slots = decoder.slots
    assert (slots.count, slots.room) == (8, 64)
    decoder.keep(torch.tensor([0, 1, 3]))
    assert (slots.count, slots.room, slots.numbers, slots.lengths) == (4, 64, [0, 1, 3], [3, 40, 6])
    decoder.keep(torch.tensor([0, 2]))
    assert (slots.count, slots.room, slots.numbers, slots.lengths) == (2, 8, [0, 1], [3, 6])
    join(decoder, 1)
    assert (slots.count, slots.room, slots.numbers, slots.lengths) == (4, 8, [0, 1, 2], [3, 6, 1])


def test_steps_that_were_recorded_in_memory_that_is_gone_are_recorded_anew(model):
    """Memory grows under a row that gets longer, and layouts that it had before come again."""
    decoder, plain = ReplayedDecoder(model), Decoder(model)
    for length in (3, 5, 2):
        tokens = start(decoder, length)
        logits = plain.start(tokens, torch.zeros(1, dtype=torch.int64), 60)
        for _ in range(30):
            ids = logits.argmax(-1)
            logits = plain.step(ids)
            torch.testing.assert_close(decoder.step(ids), logits, rtol=1e-5, atol=3e-5)
    assert decoder.layouts[-1] == [(1, 64), (1, 8), (1, 16), (1, 32)]


def test_memory_that_grows_when_a_row_leaves(model):
    """The others have filled their slots, and lie in larger ones from then on."""
    decoder, plain = ReplayedDecoder(model), Decoder(model)
    for _ in range(2):
        tokens = random_tokens(5).repeat(4, 1)
        for each in (decoder, plain):
            each.start(tokens, torch.zeros(4, dtype=torch.int64), 40)
        for step in range(8):
            ids = torch.randint(3, 512, (4 - (step >= 3),))
            torch.testing.assert_close(decoder.step(ids), plain.step(ids), rtol=1e-5, atol=3e-5)
            if step == 2:
                before = decoder.slots.grown
                for each in (decoder, plain):
                    each.keep(torch.tensor([0, 1, 3]))
    assert before == decoder.slots.grown == 2


@torch.inference_mode()
def test_what_others_left_does_not_spread(model):
    """A row that overflowed leaves NaN in its slot; rows that come later see none, wherever they are moved."""
    decoder, plain = ReplayedDecoder(model), Decoder(model)
    start(decoder, 20)
    for length in (9, 30):
        join(decoder, length)
    decoder.keep(torch.tensor([1]))
    for kind in range(1, len(decoder.slots.flat)):
        held = decoder.slots.view(kind, decoder.slots.count, decoder.slots.room)
        kept = held[decoder.slots.numbers, :, : decoder.slots.longest].clone()
        decoder.slots.flat[kind].fill_(float("nan"))
        held[decoder.slots.numbers, :, : decoder.slots.longest] = kept
    join(decoder, 2)
    decoder.keep(torch.tensor([1]))
    tokens = start(decoder, 5)
    logits = plain.start(tokens, torch.zeros(1, dtype=torch.int64), 60)
    for _ in range(40):  # through several layouts
        ids = logits.argmax(-1)
        logits, got = plain.step(ids), decoder.step(ids)
        torch.testing.assert_close(got, logits, rtol=1e-5, atol=3e-5)


@torch.inference_mode()
def test_rows_go_on_after_memory_that_others_left_full_of_nan(model):
    """Free slots beside them compute with it."""
    decoder, plain = ReplayedDecoder(model), Decoder(model)
    start(decoder, 20)
    for flat in decoder.slots.flat[1:]:
        flat.fill_(float("nan"))
    decoder.forget()
    texts = [random_tokens(length) for length in (4, 1, 6)]
    decoder.start(texts[0], torch.zeros(1, dtype=torch.int64), 300)
    for tokens in texts[1:]:
        decoder.take(decoder.read(tokens, torch.zeros(1, dtype=torch.int64), tokens.size(1)).finish(), 300)
    right = []
    for tokens in texts:
        plain.start(tokens, torch.zeros(1, dtype=torch.int64), 60)
        right.append(torch.cat([plain.step(torch.tensor([9])) for _ in range(20)]))
    got = torch.stack([decoder.step(torch.tensor([9, 9, 9])) for _ in range(20)], dim=1)
    torch.testing.assert_close(got, torch.stack(right), rtol=1e-5, atol=3e-5)


def test_memory_that_ends_while_it_grows_is_given_back_and_asked_for_again(model, monkeypatch):
    decoder = ReplayedDecoder(model)
    start(decoder, 20)
    new_zeros, asked = torch.Tensor.new_zeros, []

    def ending(tensor, *size, **how):
        asked.append(size)
        if len(asked) > 3:
            raise torch.OutOfMemoryError("no memory")
        return new_zeros(tensor, *size, **how)

    with monkeypatch.context() as broken:
        broken.setattr(torch.Tensor, "new_zeros", ending)
        with pytest.raises(torch.OutOfMemoryError):
            decoder.slots.fit(64, 200)
    decoder.forget()
    assert not any(len(flat) for flat in decoder.slots.flat)
    tokens = start(decoder, 5)
    plain = Decoder(model)
    plain.start(tokens, torch.zeros(1, dtype=torch.int64), 9)
    ids = torch.tensor([7])
    torch.testing.assert_close(decoder.step(ids), plain.step(ids), rtol=1e-5, atol=3e-5)
