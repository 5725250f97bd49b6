"""What is kept of prompts: how much, for how long, for whom; and that no answer shows it.

tests/families/test_prefixes.py has every family.
"""

import random

import pytest
import torch
from conftest import Ids
from families.replay import ReplayedDecoder
from test_serving import Client

import lora
from generate import Settings
from inference import prefix_cache
from inference.decode import CompiledDecoder, Decoder, PlainDecoder
from inference.prefix_cache import PrefixCache, Text
from inference.sampling import Batch, Row
from inference.serving import Engine
from inference.several import put_adapters
from ops.cpp import compiled_library
from weights import peft_format
from weights.checkpoint import load_model

needs_compiler = pytest.mark.skipif(not compiled_library("decode_cpu"), reason="no C++ compiler")
DECODERS = pytest.mark.parametrize(
    "kind", [PlainDecoder, Decoder, ReplayedDecoder, pytest.param(CompiledDecoder, marks=needs_compiler)]
)
LAYERS, HEADS, D = 2, 1, 3
BLOCK_BYTES = 2 * LAYERS * HEADS * 4 * D * 4


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(prefix_cache, "BLOCK", 4)


@pytest.fixture(scope="session")
def model(tiny_checkpoint):
    """A window of 7 in a context of 256. Not to be changed."""
    return load_model(tiny_checkpoint("mistral"), torch.float32)


def random_ids(length):
    return [random.randrange(3, 512) for _ in range(length)]


# ---------------------------------------------------------------------------------------------------------- the blocks


def hold(prefixes, text):
    """Add a text whose keys and values are made from its tokens, so that it can be seen whose a block is."""
    k = torch.tensor(text.ids, dtype=torch.float32).expand(LAYERS, HEADS, -1)[..., None].expand(-1, -1, -1, D)
    prefixes.add(text, k, -k)


def tokens_of(blocks):
    for block in blocks:
        assert torch.equal(block.k, -block.v) and block.k.shape == (LAYERS, HEADS, 4, D)
    return [int(token) for block in blocks for token in block.k[0, 0, :, 0]]


def test_whole_blocks_but_the_last_token_are_found():
    prefixes, ids = PrefixCache(2**20), random_ids(14)
    hold(prefixes, Text("a", ids))
    assert tokens_of(prefixes.find(Text("a", ids))) == ids[:12]
    assert tokens_of(prefixes.find(Text("a", ids[:12]))) == ids[:8]  # one token is left to be read
    assert tokens_of(prefixes.find(Text("a", [*ids[:12], 1]))) == ids[:12]
    assert tokens_of(prefixes.find(Text("a", [*ids[:7], 600, *ids[8:]]))) == ids[:4]
    assert prefixes.find(Text("b", ids)) == prefixes.find(Text("a", ids[4:])) == []
    assert prefixes.held(Text("a", ids)) == 12 and prefixes.size == 3 * BLOCK_BYTES


def test_what_texts_share_is_there_once():
    prefixes, shared = PrefixCache(2**20), random_ids(8)
    for _ in range(3):
        hold(prefixes, Text("a", shared + random_ids(4)))
    assert prefixes.size == (2 + 3) * BLOCK_BYTES
    hold(prefixes, Text("b", shared))
    assert prefixes.size == (2 + 3 + 2) * BLOCK_BYTES


def test_what_is_held_does_not_change_with_the_tensors_that_it_came_from():
    prefixes, k = PrefixCache(2**20), torch.ones(LAYERS, HEADS, 4, D)
    prefixes.add(Text("a", [5] * 4), k, -k)
    k.zero_()
    (block,) = prefixes.find(Text("a", [5] * 5))
    assert (block.k == 1).all() and (block.v == -1).all()


def test_what_was_used_longest_ago_goes_first():
    prefixes = PrefixCache(6 * BLOCK_BYTES)
    old, used, new = (random_ids(8) for _ in range(3))
    for ids in (old, used):
        hold(prefixes, Text("a", ids))
    assert prefixes.size == 4 * BLOCK_BYTES
    hold(prefixes, Text("a", [*old, 1]))  # used again
    hold(prefixes, Text("a", new + random_ids(4)))
    assert prefixes.size == 6 * BLOCK_BYTES
    assert [prefixes.held(Text("a", [*ids, 1])) for ids in (old, used, new)] == [8, 4, 8]


def test_memory_has_an_end_and_no_block_is_without_those_before_it():
    """The model is a plain list of texts: what is held of each is a beginning, and all of it fits."""
    prefixes, texts = PrefixCache(20 * BLOCK_BYTES), []
    for _ in range(200):
        start = random.choice(texts).ids[: random.randint(0, 40)] if texts and random.random() < 0.7 else []
        texts.append(Text(random.choice("ab"), start + random_ids(random.randint(1, 30))))
        hold(prefixes, texts[-1])
        assert prefixes.size <= prefixes.room
        assert prefixes.size == BLOCK_BYTES * len(prefixes._blocks)
        befores = [before for before, _ in prefixes._blocks]
        assert all(before in ("a", "b") or before in prefixes._blocks.values() for before in befores)
        newest, room = texts[-1], 4 * 20
        assert prefixes.held(Text(newest.kind, [*newest.ids, 1])) == min(len(newest.ids) // 4 * 4, room)
        for text in random.sample(texts, min(5, len(texts))):
            assert tokens_of(found := prefixes.find(text)) == text.ids[: 4 * len(found)]


def test_a_text_larger_than_the_room_leaves_its_beginning():
    prefixes, ids = PrefixCache(2 * BLOCK_BYTES), random_ids(20)
    hold(prefixes, Text("a", ids))
    assert tokens_of(prefixes.find(Text("a", ids))) == ids[:8]


# ---------------------------------------------------------------------------------------------------------- the answers


def row(prompt, **options):
    flags = {name: options.pop(name) for name in ("temperature", "top_p", "repetition_penalty") if name in options}
    s = Settings(checkpoint_dir="any", max_new_tokens=8, **{"temperature": 0, **flags})
    return Row(prompt, Ids(), s, options.pop("seed", 0), **options)


def answers(batch, rows):
    """The ids of rows that are read and generated together."""
    batch.add(rows)
    while batch.going:
        batch.step()
    return [one.reply.ids for one in rows]


def same(one, other):
    return Row(one.prompt, Ids(), one.settings, one.seed, one.top, one.score_prompt, adapter=one.adapter)


@DECODERS
def test_answers_are_those_without_it(model, kind):
    """Greedy and sampled, with penalties, in batches with other prompts, while others are generated."""
    prefixes, shared = PrefixCache(2**30), random_ids(60)
    batch, decoder = Batch(kind(model), prefixes), kind(model)
    for _ in range(8):
        rows = [
            row(shared[: random.choice((0, 30, 60))] + random_ids(random.randint(1, 20)), seed=random.randrange(99),
                temperature=random.choice((0, 1.3)), repetition_penalty=random.choice((1, 1.5)), top=2)
            for _ in range(random.randint(1, 3))
        ]  # fmt: skip
        expected = [same(one, None) for one in rows]
        assert answers(batch, rows) == answers(Batch(decoder), expected)
        for one, other in zip(rows, expected, strict=True):
            for mine, theirs in zip(one.scores, other.scores, strict=True):
                assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert prefixes.hits > 3 and prefixes.prompts > prefixes.hits and 0 < prefixes.reused < prefixes.tokens


def test_the_prompt_is_not_read_again(model, monkeypatch):
    """What is read is what is not held. A prompt that is scored is read whole; and what it has read is held."""
    decoder, seen = Decoder(model), []
    extend = decoder.extend
    monkeypatch.setattr(
        decoder, "extend",
        lambda tokens, cache, scores=None: seen.append(tokens.numel() * (scores is not None))
        or extend(tokens, cache, scores),
    )  # fmt: skip
    batch, shared = Batch(decoder, PrefixCache(2**30)), random_ids(40)

    def read(prompt, **options):
        seen.clear()
        rows = [row(prompt, **options)]
        assert batch.unread(rows[0]) == (len(prompt) if options else max(1, len(prompt) - held))
        answers(batch, rows)
        return sum(seen)

    held = 0
    assert read([*shared, 5], top=1, score_prompt=True) == 41
    held = 40
    assert read([*shared, 5]) == 1
    assert read([*shared, 6, 7, 8]) == 3
    assert read([*shared, 5], top=1, score_prompt=True) == 41


def test_scores_of_a_prompt_are_complete(model):
    prompt = random_ids(30)
    batch = Batch(Decoder(model), PrefixCache(2**30))
    rows = [row(prompt, top=1, score_prompt=True) for _ in range(2)]
    for one in rows:
        answers(batch, [row(prompt), one])
    assert [len(one.prompt_scores) for one in rows] == [30, 30]
    for mine, theirs in zip(*(one.prompt_scores[1:] for one in rows), strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_a_prefix_under_one_adapter_is_none_under_another(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("mistral")
    for name in ("a", "b"):
        single = load_model(base, torch.float32)
        config = lora.AdapterConfig(r=3)
        lora.add_lora(single, config)
        for adapter in lora.adapters(single).values():
            adapter.lora_B.data.normal_(std=0.5)
        (tmp_path / name).mkdir()
        peft_format.save_adapter(single, config, tmp_path / name, base)
    several = load_model(base, torch.float32)
    put_adapters(several, {name: tmp_path / name for name in ("a", "b")})
    prefixes, prompt = PrefixCache(2**30), random_ids(30)
    batch, texts = Batch(Decoder(several), prefixes), []
    for round_ in range(2):
        for adapter in (0, 1, 2):
            (ids,) = answers(batch, [row(prompt, adapter=adapter)])
            assert [ids] == answers(Batch(Decoder(several)), [row(prompt, adapter=adapter)])
            texts.append(tuple(ids))
        assert prefixes.hits == 3 * round_
    assert len(set(texts)) > 1
    together = [row(prompt, adapter=adapter) for adapter in (0, 1, 2)]
    assert [tuple(ids) for ids in answers(batch, together)] == texts[:3] and prefixes.hits == 6


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_are_part_of_a_beginning(tiny_checkpoint, kind):
    tuned = load_model(tiny_checkpoint("mistral"), torch.float32)
    lora.add_lora(tuned, lora.AdapterConfig(kind=kind, virtual_tokens=6))
    tuned.eval()
    prefixes, shared = PrefixCache(2**30), random_ids(20)
    batch = Batch(Decoder(tuned), prefixes)
    for _ in range(3):
        prompts = [shared + random_ids(random.randint(1, 9)) for _ in range(2)]
        rows, expected = ([row(prompt) for prompt in prompts] for _ in range(2))
        assert answers(batch, rows) == answers(Batch(Decoder(tuned)), expected)
    assert prefixes.hits == 4 and prefixes.reused >= 4 * 20
    assert batch.unread(row(shared + [5])) <= 3


# ----------------------------------------------------------------------------------------------------------- the engine


def test_many_at_once_share_what_the_first_has_read(model):
    """Long prompts do not wait for each other's copies of one beginning: most of it is read once."""
    shared = random_ids(200)
    engines = [Engine(Decoder(model), 8, 100, prefix_bytes) for prefix_bytes in (2**30, 0)]
    try:
        clients = [Client(engine) for engine in engines]
        for tail in [random_ids(5) for _ in range(30)]:
            for client in clients:
                client.ask_for(shared + tail, 6)
        for client in clients:
            client.wait()
        for mine, theirs in zip(*(client.tasks for client in clients), strict=True):
            assert mine.error is None and mine.reply.ids == theirs.reply.ids
        prefixes = engines[0].prefixes
        assert prefixes.prompts == 30 and prefixes.hits >= 20 and prefixes.reused >= 20 * 196
        assert engines[1].prefixes is None
    finally:
        for engine in engines:
            engine.close()


def test_after_a_failure_it_is_still_good(model, monkeypatch):
    decoder = Decoder(model)
    engine = Engine(decoder, 4, 100, 2**30)
    try:
        client, shared = Client(engine), random_ids(40)
        client.wait(client.ask_for([*shared, 5], 3))
        with monkeypatch.context() as broken:
            broken.setattr(decoder, "step", lambda ids: 1 / 0)
            failed = client.ask_for([*shared, 5, 6], 3)
            client.wait(failed)
            assert failed.error
        task = client.ask_for([*shared, 6], 3)
        client.wait(task)
        assert [task.reply.ids] == answers(Batch(Decoder(model)), [same(task, None)])
        assert engine.prefixes.hits == 2
    finally:
        engine.close()
