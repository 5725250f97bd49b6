"""Preference pairs on disk and in micro-batches: a packed row and padded rows have the same positions and targets."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from batching import (
    IGNORE,
    PLANNERS,
    Pairs,
    Samples,
    in_order,
    kind_of_samples,
    open_samples,
    read_data_info,
    shift,
    source_names,
)
from ops.forks import Forks
from preparation.record_store import SampleWriter
from shell.cli import UserError


def random_pair(shared=None, ends=None):
    """Ids of a prompt and two answers: (beginning and last shared token, answer, answer), no two of them alike."""
    shared = random.randint(1, 12) if shared is None else shared
    sizes = ends or (random.randint(1, 9), random.randint(1, 9))
    ids = random.sample(range(1000), shared + sum(sizes))
    return ids[:shared], ids[shared : shared + sizes[0]], ids[shared + sizes[0] :]


def write(path, pairs, sources=None):
    """Write pairs as prepare_data.py does: answers are targets."""
    writer = SampleWriter()
    for i, (prompt, chosen, rejected) in enumerate(pairs):
        beginning, last = prompt[:-1], prompt[-1:]
        ids = [*beginning, *last, *chosen, *last, *rejected]
        is_target = [0] * len(prompt) + [1] * len(chosen) + [0] * len(last) + [1] * len(rejected)
        writer.add(ids, bytes(is_target), (sources or [0] * len(pairs))[i], len(beginning), len(last) + len(chosen))
    writer.save(path)
    return path


@pytest.fixture
def some(tmp_path):
    """(the pairs, as they were written; the same, opened)."""
    pairs = [random_pair() for _ in range(random.randint(5, 40))]
    return pairs, open_samples(write(tmp_path / "x.safetensors", pairs))


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
    assert samples.end_target_counts().tolist() == [[len(end) for end in pair[1:]] for pair in pairs]


def test_the_format_is_what_the_module_says(tmp_path):
    write(tmp_path / "x.safetensors", [([1, 2, 3], [4, 5], [6]), ([7], [8], [9])], sources=[1, 0])
    tensors = load_file(tmp_path / "x.safetensors")
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
    samples = open_samples(write(tmp_path / "x.safetensors", [([1, 2, 3], [4, 5], [6]), ([7], [8], [9])]))
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
    writer, path = SampleWriter(), tmp_path_factory.mktemp("any") / "x.safetensors"
    writer.add(ids, bytes(wanted), 0, len(beginning), len(ends[0]))
    writer.save(path)
    samples = open_samples(path)
    rows = [shift(*sequence) for sequence in samples.sequences(0)]
    # The token with which an end begins is predicted in neither: it is context, or has nothing before it.
    rows = [(inputs, targets.index_fill(0, torch.arange(len(beginning)), IGNORE)) for inputs, targets in rows]
    for row, packed in zip(rows, unpack(*samples.packed([0])), strict=True):
        assert [x.tolist() for x in row] == [x.tolist() for x in packed]
    counts = [sum(wanted for wanted, _ in end[1:]) for end in ends]
    assert samples.end_target_counts()[:1].tolist() == [counts] and samples.target_counts.tolist() == [sum(counts)]
    assert samples.drop_without_target() == (0 in counts) and len(samples) == (0 not in counts)


def test_a_pair_without_a_target_in_both_ends_is_dropped(tmp_path):
    pairs = [random_pair() for _ in range(9)]
    path, empty = write(tmp_path / "x.safetensors", pairs), random.sample(range(9), 3)
    tensors = load_file(path)
    for i, end in zip(empty, (0, 1, random.randint(0, 1)), strict=True):
        start = tensors["offsets"][i] + tensors["beginnings"][i]
        cut = start + tensors["first_ends"][i]
        span = slice(start, cut) if end == 0 else slice(cut, tensors["offsets"][i + 1])
        tensors["target_counts"][i] -= tensors["is_target"][span].sum().int()
        tensors["is_target"][span] = False
    save_file(tensors, path)
    samples = open_samples(path)
    assert samples.drop_without_target() == 3 and len(samples) == 6
    assert samples.drop_without_target() == 0
    kept = [i for i in range(9) if i not in empty]
    assert samples.numbers.tolist() == kept
    for place, i in enumerate(kept):
        assert [x.tolist() for row in unpack(*samples.packed([place])) for x in row] == [
            x for row in rows_of(pairs[i]) for x in row
        ]


def test_a_part_without_samples(tmp_path):
    """The validation part of pairs is of pairs, though it has none."""
    writer = SampleWriter()
    writer.add([1, 2, 1, 3], bytes([0, 1, 0, 1]), 0, 0, 2)
    writer.save(tmp_path / "val.safetensors", [])
    samples = open_samples(tmp_path / "val.safetensors")
    assert isinstance(samples, Pairs) and len(samples) == 0 == samples.drop_without_target()
    for planner in PLANNERS.values():
        assert in_order(planner, planner.lengths(samples), samples.target_counts, 100) == []


def test_pairs_are_not_taken_for_samples(tmp_path):
    path = write(tmp_path / "x.safetensors", [random_pair()])
    with pytest.raises(UserError, match="x.safetensors holds preference pairs: expected samples of one answer"):
        Samples(path)
    writer = SampleWriter()
    writer.add([5, 6], [False, True], 0)
    writer.save(tmp_path / "y.safetensors")
    assert type(open_samples(tmp_path / "y.safetensors")) is Samples
    with pytest.raises(UserError, match="no row of torch.int32 called beginnings"):
        Pairs(tmp_path / "y.safetensors")


def test_damaged_files_are_refused_in_one_line(tmp_path):
    path = write(tmp_path / "x.safetensors", [random_pair() for _ in range(6)])
    tensors, i = load_file(path), random.randrange(6)
    most = torch.iinfo(torch.int32).max

    def changed(name, value):
        column = tensors[name].clone()
        column[i] = value
        return {name: column}

    size = tensors["offsets"].diff()[i].item()
    changes = [
        changed("beginnings", -1), changed("beginnings", most), changed("beginnings", size - 3),
        changed("first_ends", 1), changed("first_ends", 0), changed("first_ends", -(2**31)),
        changed("first_ends", most),
        changed("first_ends", size - tensors["beginnings"][i].item() - 1),
        changed("beginnings", most) | changed("first_ends", most), changed("beginnings", -(2**31)),
        changed("target_counts", size - 1), changed("target_counts", -1), changed("sources", -1),
        {"beginnings": tensors["beginnings"][:-1]}, {"first_ends": tensors["first_ends"].repeat(2)},
        {"beginnings": tensors["beginnings"].long()}, {"first_ends": None}, {"beginnings": None},
        {"first_ends": tensors["first_ends"][None]}, {"offsets": tensors["offsets"] + 1},
        changed("offsets", -(2**63)), changed("offsets", 2**63 - 1),
    ]  # fmt: skip
    for change in changes:
        kept = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        save_file({name: tensor.clone().contiguous() for name, tensor in kept.items()}, path)
        with pytest.raises(UserError, match="x.safetensors is damaged .*make it again") as caught:
            open_samples(path)
            pytest.fail(str(change))
        assert "\n" not in str(caught.value)


def test_data_json_says_what_the_samples_are(tmp_path):
    info = {"tokenizer_hash": "ab", "prompt_style": "plain", "sources": [{"name": "a"}]}
    pairs = open_samples(write(tmp_path / "x.safetensors", [random_pair()]))
    for kind in ("samples", "pairs", None):
        (tmp_path / "data.json").write_text(json.dumps(info | ({"kind": kind} if kind else {})))
        read = read_data_info(tmp_path)
        assert kind_of_samples(read) == (kind or "samples")
        if kind == "pairs":
            assert source_names(read, pairs) == []
        else:
            with pytest.raises(UserError, match="data.json is of samples, its samples are pairs: make it again"):
                source_names(read, pairs)
    for kind in ("triples", 5, ["pairs"], None):
        (tmp_path / "data.json").write_text(json.dumps(info | {"kind": kind}))
        with pytest.raises(UserError, match="data.json: key 'kind' is .*expected samples or pairs"):
            read_data_info(tmp_path)


# ------------------------------------------------------------------------------------------------------------ planning


@pytest.mark.parametrize("name", PLANNERS)
def test_micro_batches_stay_within_the_budget(tmp_path, name):
    """In its own layout no micro-batch has more positions than asked for, unless it is one pair; nor far fewer."""
    samples = open_samples(write(tmp_path / "x.safetensors", [random_pair() for _ in range(60)]))
    planner, budget = PLANNERS[name], random.randint(60, 200)
    steps = planner.plan(planner.lengths(samples), samples.target_counts, 16, budget, seed=3, epoch=0)
    assert sorted(i for step in steps for indices in step for i in indices) == list(range(60))
    sizes = [planner.layout(samples, indices)[0].numel() for step in steps for indices in step]
    alone = [len(indices) == 1 for step in steps for indices in step]
    assert all(size <= budget or one for size, one in zip(sizes, alone, strict=True))
    assert sum(sizes) / len(sizes) > budget / 4


def test_a_planner_plans_by_its_own_layout(some):
    _, samples = some
    assert PLANNERS["packed"].lengths(samples) is samples.lengths
    for i, length in enumerate(PLANNERS["random"].lengths(samples).tolist()):
        assert length == samples.padded([i])[0].numel()
