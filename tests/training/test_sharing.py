"""How the micro-batches of a step are shared out among devices, and the parts of layers among those along tensor."""

import dataclasses
import random
from collections import Counter

import pytest
import torch

from batching import packed_in_step
from model import Config, Transformer
from ops.rope import RoPE
from shell.cli import UserError
from training.parallel.part import Part
from training.parallel.sharing import share_out, surplus


def random_step(N, longest, budget):
    """Lengths of samples, and a step of all of them in rows of at most `budget` positions."""
    lengths = torch.randint(1, longest, (N,))
    return lengths, packed_in_step(lengths, lengths, budget)


def tokens_of(share, lengths):
    return sum(lengths[i].item() for micro_batch in share for i in micro_batch)


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_each_sample_is_at_one_device(even, padded):
    for _ in range(50):
        N, count, budget = random.randint(1, 40), random.randint(1, 9), random.randint(8, 60)
        lengths, step = random_step(N, 50, budget)
        before = [[*each] for each in step]
        shares = share_out(step, lengths, budget, count, even, padded)
        assert step == before  # the plan, which other devices have too, is left as it was
        assert len(shares) == count
        assert Counter(i for share in shares for each in share for i in each) == Counter(range(N))
        if even:
            assert len({len(share) for share in shares}) == 1
        else:
            assert all(micro_batch for share in shares for micro_batch in share)
        for micro_batch in (each for share in shares for each in share if len(each) > 1):
            sizes = [lengths[i].item() for i in micro_batch]
            whole = any(set(micro_batch) <= set(row) for row in step)  # padding may have been no concern of the plan
            assert whole or (len(sizes) * max(sizes) if padded else sum(sizes)) <= budget


def test_the_tokens_are_nearly_equal():
    for _ in range(50):
        lengths, step = random_step(64, 100, 1024)
        assert surplus([share_out(step, lengths, 1024, 4)], lengths).worst < 0.01


def test_one_row_is_cut_for_two_devices():
    shares = share_out([[0, 1, 2, 3]], torch.tensor([5, 4, 3, 2]), 99, 2)
    assert sorted(tokens_of(share, torch.tensor([5, 4, 3, 2])) for share in shares) == [7, 7]


def test_a_device_may_have_nothing():
    assert sorted(share_out([[0]], torch.tensor([5]), 99, 2)) == [[], [[0]]]
    assert sorted(share_out([[0]], torch.tensor([5]), 99, 2, even=True)) == [[[]], [[0]]]


@pytest.mark.parametrize("even", [False, True])
def test_each_device_has_a_micro_batch_for_each_stage(even):
    for _ in range(50):
        N, count, stages = random.randint(1, 40), random.randint(1, 4), random.randint(1, 5)
        lengths, step = random_step(N, 50, 60)
        shares = share_out(step, lengths, 60, count, even, least=stages)
        assert Counter(i for share in shares for each in share for i in each) == Counter(range(N))
        for share in shares:
            samples = sum(map(len, share))
            assert len(share) >= stages and sum(map(bool, share)) >= min(samples, stages)
            sizes = [tokens_of([each], lengths) for each in share if len(each) > 1]
            assert all(size <= 60 for size in sizes)


def config(H, K, inner=64, **more):
    rope = RoPE(8, 1e4)
    return Config(160, 48, inner, 1, H, K, 8, 1e-5, (rope,), (None,), (1.0,), 64, **more)


@pytest.mark.parametrize(
    ("H", "K", "count"), [(6, 3, 2), (6, 3, 3), (71, 1, 2), (71, 1, 5), (8, 2, 4), (12, 2, 4), (9, 3, 2)]
)
def test_each_head_is_at_one_device(H, K, count):
    parts = [Part(config(H, K, inner=640), rank, count) for rank in range(count)]
    heads = [range(*part.heads("q")) for part in parts]
    assert [head for each in heads for head in each] == [*range(H)]
    for part, own in zip(parts, heads, strict=True):  # and where it is, are its keys and values
        assert {head // (H // K) for head in own} == {*range(*part.heads("kv"))}
        assert len(own) % len(range(*part.heads("kv"))) == 0
        assert part.local_config().num_attention_heads == len(own)


@pytest.mark.parametrize(("layers", "stages"), [(5, 2), (4, 4), (7, 3), (8, 1)])
def test_each_layer_is_in_one_stage(layers, stages):
    whole = dataclasses.replace(config(2, 2), tie_word_embeddings=True).of_layers([0] * layers)
    parts = [Part(whole, stage=stage, stages=stages) for stage in range(stages)]
    assert [number for part in parts for number in part.layers] == [*range(layers)]
    assert max(len(part.layers) for part in parts) - min(len(part.layers) for part in parts) <= 1
    embedding, norm = (
        [part.stage for part in parts if part.has(f"model.{name}.weight")] for name in ("embed_tokens", "norm")
    )
    assert embedding == sorted({0, stages - 1}) and norm == [stages - 1]
    with torch.device("meta"):
        names = [{name for name, _ in part.model().named_parameters()} for part in parts]
        assert set.union(*names) == {name for name, _ in Transformer(whole).named_parameters()}
    for part, own in zip(parts, names, strict=True):
        assert all(part.has(name) and part.place(name) for name in own)
    with pytest.raises(UserError, match=f"only {layers} layers"):
        Part(whole, stages=layers + 1)


@pytest.mark.parametrize(
    ("H", "K", "inner", "count", "says"),
    [
        (6, 3, 64, 4, "cannot be divided among 4"),
        (2, 2, 64, 3, "cannot be divided among 3"),
        (6, 6, 64, 2, "MLP of 64"),
    ],
)
def test_what_cannot_be_divided_is_refused(H, K, inner, count, says):
    with pytest.raises(UserError, match=says):
        Part(config(H, K, inner), 0, count)
