"""Preference pairs on disk and in micro-batches: a packed row and padded rows have the same positions and targets."""

import random
import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_parts import write_part, writer_of
from safetensors.torch import load_file, save_file

from batching import (
    IGNORE,
    PLANNERS,
    Order,
    Pairs,
    Samples,
    in_order,
    kind_of_samples,
    open_samples,
    read_data_info,
    shift,
)
from ops.forks import Forks
from preparation.record_store import count_targets
from samples.shards import CUTS
from shell.cli import UserError
from shell.files import read_json, write_json
from weights.safetensors_format import read_metadata


def random_pair(shared=None, ends=None):
    """Ids of a prompt and two answers: (beginning and last shared token, answer, answer), no two of them alike."""
    shared = random.randint(1, 12) if shared is None else shared
    sizes = ends or (random.randint(1, 9), random.randint(1, 9))
    ids = random.sample(range(1000), shared + sum(sizes))
    return ids[:shared], ids[shared : shared + sizes[0]], ids[shared + sizes[0] :]


def write(folder, pairs, sources=None, shard_tokens=None):
    """Write pairs as prepare_data.py does: answers are targets."""
    written = []
    for i, (prompt, chosen, rejected) in enumerate(pairs):
        beginning, last = prompt[:-1], prompt[-1:]
        ids = [*beginning, *last, *chosen, *last, *rejected]
        is_target = [0] * len(prompt) + [1] * len(chosen) + [0] * len(last) + [1] * len(rejected)
        source = (sources or [0] * len(pairs))[i]
        written.append((ids, bytes(is_target), source, len(beginning), len(last) + len(chosen)))
    return write_part(folder, written, kind="pairs", shard_tokens=shard_tokens)


@pytest.fixture
def some(tmp_path):
    """(the pairs, as they were written; the same, opened)."""
    pairs = [random_pair() for _ in range(random.randint(5, 40))]
    return pairs, open_samples(write(tmp_path, pairs, shard_tokens=random.choice([None, 50])), "train")


def rows_of(pair):
    """The two sequences of a pair, their targets alone counting: [(inputs, targets)]."""
    prompt, *answers = pair
    return [(prompt + a[:-1], [IGNORE] * (len(prompt) - 1) + a) for a in answers]


# ------------------------------------------------------------------------------------------------------------- on disk


def test_what_is_written_is_read(some):
    pairs, samples = some
    assert isinstance(samples, Pairs) and len(samples) == len(pairs)
    for i, (prompt, chosen, rejected) in enumerate(pairs):
        assert samples.lengths[i] == len(prompt) - 1 + len(chosen) + len(rejected)
        assert samples.row_lengths[i] == len(prompt) - 1 + max(len(chosen), len(rejected))
        assert samples.target_counts[i] == len(chosen) + len(rejected)
        sequences = [(ids.tolist(), is_target.tolist()) for ids, is_target in samples.sequences(i)]
        assert sequences == [(prompt + a, [False] * len(prompt) + [True] * len(a)) for a in (chosen, rejected)]
        with pytest.raises(TypeError, match="no one sequence"):
            samples.inputs_and_targets(i)
    assert samples.unit_counts[:].tolist() == [1] * len(pairs) and samples.units_by_source() == [len(pairs)]
    samples.prepend([1] * 5)
    assert samples.longest() == samples.lengths[:].max() and samples.positions() == samples.lengths[:].sum()
    assert samples.longest_row() == samples.row_lengths[:].max() == samples.padded_longest() / 2
    listing, shares = samples.shards.listing, samples.target_counts[:] / samples.without_virtual_tokens().lengths[:]
    assert samples.lengths[listing.longest_sample] == samples.longest()
    assert listing.largest_share == pytest.approx(shares.max().item())


def test_the_format_is_what_the_module_says(tmp_path):
    write(tmp_path, [([1, 2, 3], [4, 5], [6]), ([7], [8], [9])], sources=[1, 0])
    tensors = load_file(tmp_path / "train.safetensors")
    ids, marks, numbers = (1, 2, 3, 4, 5, 3, 6), bytes([0, 0, 0, 1, 1, 0, 1]), (3, 1, 2, 3)
    crc = zlib.crc32(struct.pack("<7i", *ids) + marks + struct.pack("<4i", *numbers))
    assert tensors.pop("checksums")[0].item() % 2**32 == crc
    assert {name: (t.dtype, t.tolist()) for name, t in tensors.items()} == {
        "tokens": (torch.int32, [1, 2, 3, 4, 5, 3, 6, 7, 8, 7, 9]),
        "is_target": (torch.bool, [bool(i) for i in (0, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1)]),
        "offsets": (torch.int64, [0, 7, 11]),
        "target_counts": (torch.int32, [3, 2]),
        "sources": (torch.int32, [1, 0]),
        "beginnings": (torch.int32, [2, 0]),
        "first_ends": (torch.int32, [3, 2]),
    }


def test_micro_batches_by_hand(tmp_path):
    samples = open_samples(write(tmp_path, [([1, 2, 3], [4, 5], [6]), ([7], [8], [9])]), "train")
    tokens, targets, forks = samples.packed([1, 0])
    assert tokens.tolist() == [[7, 7, 1, 2, 3, 4, 3]] and tokens.dtype == targets.dtype == torch.int64
    assert targets.tolist() == [[8, 9, IGNORE, IGNORE, 4, 5, 6]]
    assert forks == Forks((0, 2), ((1, 1), (2, 1)))
    tokens, targets, none = samples.padded([1, 0])
    assert none is None and tokens.dtype == targets.dtype == torch.int64
    assert targets.tolist() == [
        [8, *[IGNORE] * 3], [9, *[IGNORE] * 3], [IGNORE, IGNORE, 4, 5], [IGNORE, IGNORE, 6, IGNORE],
    ]  # fmt: skip
    assert [tokens[0, :1].tolist(), tokens[1, :1].tolist(), tokens[2].tolist(), tokens[3, :3].tolist()] == [
        [7], [7], [1, 2, 3, 4], [1, 2, 3],
    ]  # fmt: skip


def unpack(tokens, targets, forks):
    """The rows of a packed micro-batch: each end after its beginning, as the ends do not see one another."""
    rows, place = [], 0
    for shared, ends in zip(*forks, strict=True):
        beginning = slice(place, place + shared)
        place += shared
        for size in ends:
            end = slice(place, place + size)
            rows.append(tuple(torch.cat([x[0, beginning], x[0, end]]) for x in (tokens, targets)))
            place += size
    assert place == tokens.size(1) == targets.size(1)
    return rows


def test_packed_and_padded_are_the_same_rows(some):
    pairs, samples = some
    indices = random.sample(range(len(pairs)), min(7, len(pairs)))
    packed, (tokens, targets, _) = unpack(*samples.packed(indices)), samples.padded(indices)
    wanted = [row for i in indices for row in rows_of(pairs[i])]
    assert len(packed) == len(tokens) == len(wanted) and tokens.size(1) == max(map(len, (row for row, _ in wanted)))
    for (inputs, expected), row, padded_inputs, padded_targets in zip(wanted, packed, tokens, targets, strict=True):
        assert [x.tolist() for x in row] == [inputs, expected]
        assert padded_inputs[: len(inputs)].tolist() == inputs and padded_targets[: len(inputs)].tolist() == expected
        assert (padded_targets[len(inputs) :] == IGNORE).all()
    layouts = samples.packed(indices), samples.padded(indices)
    assert all((x[1] != IGNORE).sum() == samples.target_counts[indices].sum() for x in layouts)
    assert samples.packed(indices)[0].numel() == samples.lengths[indices].sum()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1), st.data())
def test_any_masks_and_cuts(tmp_path_factory, beginning, data):
    """Whatever is a target in the ends: both layouts have the targets of the two sequences, in the same order."""
    ends = [data.draw(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=2)) for _ in range(2)]
    parts = [[(False, id) for _, id in beginning], *ends]
    wanted, ids = zip(*(token for part in parts for token in part), strict=True)
    counts = [sum(wanted for wanted, _ in end[1:]) for end in ends]
    sample = ids, bytes(wanted), 0, len(beginning), len(ends[0])
    assert count_targets(*sample[1:2], *sample[3:]) == counts
    if 0 in counts:
        with pytest.raises(ValueError, match="has no target"):
            writer_of([sample])
        return
    samples = open_samples(write_part(tmp_path_factory.mktemp("any"), [sample], kind="pairs"), "train")
    assert samples.target_counts[:].tolist() == [sum(counts)]
    rows = [shift(*sequence) for sequence in samples.sequences(0)]
    # The token with which an end begins is predicted in neither: it is context, or has nothing before it.
    rows = [(inputs, targets.index_fill(0, torch.arange(len(beginning)), IGNORE)) for inputs, targets in rows]
    for row, packed in zip(rows, unpack(*samples.packed([0])), strict=True):
        assert [x.tolist() for x in row] == [x.tolist() for x in packed]


def test_a_part_without_samples(tmp_path):
    """The validation part of pairs is of pairs, though it has none."""
    writer = writer_of([([1, 2, 1, 3], bytes([0, 1, 0, 1]), 0, 0, 2)])
    write_json(tmp_path / "data.json", {"kind": "pairs", "val": writer.save(tmp_path, "val", [])})
    samples = open_samples(tmp_path, "val")
    assert isinstance(samples, Pairs) and len(samples) == 0
    for planner in PLANNERS.values():
        assert in_order(planner, samples, 100) == []


def test_pairs_are_not_taken_for_samples(tmp_path):
    write(tmp_path, [random_pair()])
    path = tmp_path / "data.json"
    write_json(path, read_json(path) | {"kind": "samples"})
    with pytest.raises(UserError, match="train.safetensors holds beginnings, first_ends: is it of another kind"):
        open_samples(tmp_path, "train")
    path.unlink()
    write_part(tmp_path, [([5, 6], [False, True], 0)])
    assert type(open_samples(tmp_path, "train")) is Samples
    write_json(path, read_json(path) | {"kind": "pairs"})
    with pytest.raises(UserError, match="train.safetensors is damaged .*called beginnings"):
        open_samples(tmp_path, "train")


def test_changed_cuts_are_found_when_their_pair_is_read(tmp_path):
    write(tmp_path, [random_pair() for _ in range(6)])
    path = tmp_path / "train.safetensors"
    tensors, hash, i = load_file(path), read_metadata(path, ""), random.randrange(6)
    for name in CUTS:
        for value in (-1, 0, 1, 2**31 - 1, -(2**31)):
            column = tensors[name].clone()
            column[i] = value
            if column.equal(tensors[name]):
                continue
            save_file(tensors | {name: column}, path, hash)
            samples = open_samples(tmp_path, "train")
            for layout in (samples.packed, samples.padded):
                with pytest.raises(UserError, match=f"train.safetensors is damaged .its sample {i} .* make it again"):
                    layout([i])


def test_data_json_says_what_the_samples_are(tmp_path):
    info = {"tokenizer_hash": "ab", "prompt_style": "plain", "sources": [{"name": "a"}]}
    for kind in ("samples", "pairs"):
        write_json(tmp_path / "data.json", info | {"kind": kind})
        assert kind_of_samples(read_data_info(tmp_path)) == kind
    for kind in ("triples", 5, ["pairs"], None):
        write_json(tmp_path / "data.json", info | {"kind": kind})
        with pytest.raises(UserError, match="data.json: key 'kind' is .*, expected samples or pairs: make it again"):
            read_data_info(tmp_path)


# ------------------------------------------------------------------------------------------------------------ planning


@pytest.mark.parametrize("name", PLANNERS)
def test_micro_batches_stay_within_the_budget(tmp_path, name):
    """In its own layout no micro-batch has more positions than asked for, unless it is one pair; nor far fewer."""
    samples = open_samples(write(tmp_path, [random_pair() for _ in range(60)]), "train")
    planner, budget = PLANNERS[name], random.randint(60, 200)
    draw = planner.draw(Order(60, seed=3, epoch=0), planner.lengths(samples), 16)
    steps = [planner.plan(samples, draw(place), budget) for place in range(4)]
    assert sorted(i for step in steps for indices in step for i in indices) == list(range(60))
    sizes = [planner.layout(samples, indices)[0].numel() for step in steps for indices in step]
    alone = [len(indices) == 1 for step in steps for indices in step]
    assert all(size <= budget or one for size, one in zip(sizes, alone, strict=True))
    assert sum(sizes) / len(sizes) > budget / 4


def test_a_planner_plans_by_its_own_layout(some):
    _, samples = some
    assert PLANNERS["packed"].lengths(samples)[:].equal(samples.lengths[:])
    for i, length in enumerate(PLANNERS["random"].lengths(samples)[:].tolist()):
        assert length == samples.padded([i])[0].numel()
