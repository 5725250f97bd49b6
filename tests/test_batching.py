"""The prepared data on disk, and the plans of micro-batches: what a step may and may not be cut into."""

import inspect
import itertools
import json
import math
import random
import re
import shutil
import time
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_parts import write_part
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare

from batching import (
    IGNORE,
    PLANNERS,
    Order,
    OrderInWindows,
    Planner,
    Samples,
    in_order,
    longest_first,
    open_samples,
    order_of,
    packed_in_step,
    read_data_info,
    shuffled,
    source_names,
)
from preparation.record_store import SampleWriter
from samples.shards import COLUMNS
from shell.cli import UserError
from shell.files import new_folder, read_json, write_json
from training.steps import planned_steps
from weights.safetensors_format import read_header, read_metadata

PLANS = pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS)
DRAWN = pytest.mark.parametrize(  # steps from the whole set
    "planner", [planner for planner in PLANNERS.values() if planner.draw is shuffled]
)
SEARCH = settings(max_examples=60, deadline=None)  # the machine may be busy
SORTED, RANDOM = PLANNERS["sorted_in_step"], PLANNERS["random"]


def positions(planner, lengths, micro_batch):
    """How many positions a micro-batch takes in the model, padding included."""
    sizes = [lengths[i] for i in micro_batch]
    return sum(sizes) if planner.cut is packed_in_step else len(sizes) * max(sizes)


def padding(planner, lengths, steps):
    """The share of all positions that hold no token."""
    return 1 - sum(lengths) / sum(positions(planner, lengths, micro_batch) for step in steps for micro_batch in step)


def random_samples(N, longest=40):
    """N samples: ids, which of them are targets, and the number of a source."""
    samples = []
    for _ in range(N):
        length = random.randint(2, longest)
        prompt = random.randrange(1, length)
        ids = [random.randrange(32_000) for _ in range(length)]
        samples.append((ids, [i >= prompt for i in range(length)], random.randrange(3)))
    return samples


def flat(step):
    return [i for micro_batch in step for i in micro_batch]


# ------------------------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("shard_tokens", [None, 100, 1])
def test_what_is_written_is_read(tmp_path, shard_tokens):
    """In one shard, in some, and in one for each sample."""
    written = random_samples(random.randint(20, 60))
    samples = open_samples(write_part(tmp_path, written, shard_tokens=shard_tokens), "train")
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    N = len(files)
    assert files == ([f"train-{k:05}-of-{N:05}.safetensors" for k in range(1, N + 1)] if shard_tokens else
                     ["train.safetensors"])  # fmt: skip
    assert len(written) == N if shard_tokens == 1 else N > 2 if shard_tokens else N == 1
    assert len(samples) == len(written)
    assert samples.lengths[:].tolist() == [len(ids) - 1 for ids, _, _ in written]
    assert samples.target_counts[:].tolist() == [sum(wanted) for _, wanted, _ in written]
    assert samples.sources[:].tolist() == [source for _, _, source in written]
    some = random.choices(range(len(written)), k=9)  # in any order, some of them twice
    assert samples.lengths[some].tolist() == [len(written[i][0]) - 1 for i in some]
    assert samples.lengths[torch.tensor(some)].dtype == torch.int64 and samples.sources[some].dtype == torch.int32
    for i, (ids, wanted, _) in enumerate(written):
        tokens, targets, _ = samples.padded([i])
        assert tokens.tolist() == [ids[:-1]] and samples.lengths[i].item() == len(ids) - 1
        assert targets.tolist() == [[id if w else IGNORE for id, w in zip(ids[1:], wanted[1:], strict=True)]]
    for beyond in (-1, len(written)):
        with pytest.raises(IndexError):
            samples.lengths[[0, beyond]]


def test_shards_are_as_large_as_they_may_be(tmp_path):
    written = [([5] * n, [False] + [True] * (n - 1), 0) for n in (10, 20, 30, 70, 5, 25, 40)]
    write_part(tmp_path, written, shard_tokens=60)
    shards = read_json(tmp_path / "data.json")["train"]["shards"]
    assert [(shard["samples"], shard["tokens"]) for shard in shards] == [(3, 60), (1, 70), (2, 30), (1, 40)]


def test_data_json_says_what_a_run_has_to_know(tmp_path):
    """What would take a pass over all samples: the same for any number of shards, but for these themselves."""
    written, listed = random_samples(40), []
    for shard_tokens in (None, 100):
        folder = tmp_path / str(shard_tokens)
        folder.mkdir()
        samples = open_samples(write_part(folder, written, shard_tokens=shard_tokens), "train")
        info = read_json(folder / "data.json")["train"]
        assert len({shard["hash"] for shard in info["shards"]}) == len(info["shards"]) == len(samples.shards)
        listed.append({key: value for key, value in info.items() if key not in ("shards", "hash")})
    lengths, counts = [len(ids) - 1 for ids, _, _ in written], [sum(wanted) for _, wanted, _ in written]
    sources = [[i for i, sample in enumerate(written) if sample[2] == k] for k in range(3)]
    assert listed[0] == listed[1] == {
        "samples": 40, "tokens": sum(lengths) + 40, "targets": sum(counts),
        "by_source": [{"samples": len(own), "targets": sum(counts[i] for i in own)} for own in sources],
        "longest": max(lengths), "longest_sample": lengths.index(max(lengths)), "longest_row": max(lengths),
        "largest_token": max(max(ids) for ids, _, _ in written),
        "largest_share": pytest.approx(max(n / length for n, length in zip(counts, lengths, strict=True))),
    }  # fmt: skip
    assert samples.positions() == sum(lengths) and samples.longest() == max(lengths)
    samples.prepend([7, 8])
    assert samples.positions() == samples.lengths[:].sum() and samples.longest() == samples.lengths[:].max()
    assert samples.units_by_source() == [info["by_source"][k]["targets"] for k in range(3)]


def test_the_format_is_what_the_module_says(tmp_path):
    samples = [([7, 8, 9], [False, True, True], 1), ([5, 6], [False, True], 0)]
    write_part(tmp_path, samples)
    tensors = load_file(tmp_path / "train.safetensors")
    checksums = [
        zlib.crc32(b"".join(number.to_bytes(4, "little") for number in ids) + bytes(wanted)
                   + b"".join(number.to_bytes(4, "little") for number in (sum(wanted), source)))
        for ids, wanted, source in samples
    ]  # fmt: skip
    assert {name: (t.dtype, t.tolist()) for name, t in tensors.items()} == {
        "tokens": (torch.int32, [7, 8, 9, 5, 6]),
        "is_target": (torch.bool, [False, True, True, False, True]),
        "offsets": (torch.int64, [0, 3, 5]),
        "target_counts": (torch.int32, [2, 1]),
        "sources": (torch.int32, [1, 0]),
        "checksums": (torch.int32, [(crc + 2**31) % 2**32 - 2**31 for crc in checksums]),
    }
    assert {*tensors} == {*COLUMNS}


def test_micro_batch_by_hand(tmp_path):
    long, short = [11, 12, 13, 14, 15], [21, 22, 23]
    write_part(tmp_path, [(short, [False, False, True], 0), (long, [False, True, False, True, True], 0)])
    tokens, targets = open_samples(tmp_path, "train").padded([1, 0])[:2]
    assert tokens.dtype == targets.dtype == torch.int64
    assert targets.tolist() == [[12, IGNORE, 14, 15], [IGNORE, 23, IGNORE, IGNORE]]
    assert tokens[0].tolist() == [11, 12, 13, 14]
    assert tokens[1, :2].tolist() == [21, 22]  # what stands in the padding is nobody's business, as long as...
    assert tokens.min() >= 0 and tokens.max() < 24  # ...it is a token of the model


def test_the_padding_is_as_long_as_the_longest_of_the_micro_batch(tmp_path):
    written = random_samples(30)
    samples = open_samples(write_part(tmp_path, written), "train")
    some = random.sample(range(30), 7)
    tokens, targets, _ = samples.padded(some)
    assert tokens.shape == targets.shape == (7, max(len(written[i][0]) for i in some) - 1)
    assert (targets != IGNORE).sum().item() == sum(samples.target_counts[i].item() for i in some)


def test_a_first_token_is_never_a_target_nor_counted_as_one(tmp_path):
    """With an empty prompt and no BOS the answer's first token has nothing to be predicted from."""
    samples = open_samples(write_part(tmp_path, [([4, 5, 6], [True, True, True], 0)]), "train")
    assert samples.target_counts[:].tolist() == [2] == [(samples.padded([0])[1] != IGNORE).sum().item()]


def test_a_sample_without_a_target_is_not_written():
    writer = SampleWriter()
    for is_target in ([False] * 3, [True, False, False]):  # nothing comes before the first
        with pytest.raises(ValueError, match="sample 0 has no target"):
            writer.add([4, 5, 6], is_target, 0)


def test_a_part_without_samples(tmp_path):
    samples = open_samples(write_part(tmp_path, [], "val"), "val")
    assert len(samples) == 0 == samples.positions() and samples.lengths[:].tolist() == []
    assert all(in_order(planner, samples, 100) == [] for planner in PLANNERS.values())


# ------------------------------------------------------------------------------------------------------- damage


def read_all(folder):
    """What a run does: it opens the part, and reads each sample."""
    samples = open_samples(folder, "train")
    for i in range(len(samples)):
        samples.sequences(i)


def test_damaged_files_are_refused_at_the_start(tmp_path):
    """A file that is missing, cut off, of other columns or of other samples: whatever its header shows."""
    write_part(tmp_path, random_samples(20), shard_tokens=100)
    path = random.choice(sorted(tmp_path.glob("*.safetensors")))
    whole, tensors = path.read_bytes(), load_file(path)
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} does not exist: make it again"):
        open_samples(tmp_path, "train")
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=path.name):
            open_samples(tmp_path, "train")
    changes = {
        "a tensor is missing": {k: v for k, v in tensors.items() if k != "offsets"},
        "another tensor": tensors | {"more": tensors["offsets"]},
        "too few tokens": tensors | {"tokens": tensors["tokens"][:-1]},
        "too few marks": tensors | {"is_target": tensors["is_target"][:-1]},
        "offsets end early": tensors | {"offsets": tensors["offsets"][:-1]},
        "no offsets": tensors | {"offsets": tensors["offsets"][:0]},
        "too few counts": tensors | {"target_counts": tensors["target_counts"][:-1]},
        "another dtype": tensors | {"sources": tensors["sources"].long()},
        "another shape": tensors | {"sources": tensors["sources"][None]},
    }
    path.write_bytes(whole)
    hash = read_metadata(path, "")
    for what, changed in changes.items():
        save_file({k: v.contiguous().clone() for k, v in changed.items()}, path, hash)
        with pytest.raises(UserError, match=f"{path.name}.* make it again"):
            open_samples(tmp_path, "train")
            pytest.fail(what)
    save_file(tensors, path)  # whole, but it does not say that it is this one
    with pytest.raises(UserError, match=f"{path.name} has changed since data.json was written"):
        open_samples(tmp_path, "train")


def test_a_shard_of_other_samples_is_refused(tmp_path):
    """Of the same shapes: only the hash of its samples tells."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_part(tmp_path / name, [([random.randrange(2**20) for _ in range(9)], [True] * 9, 0) for _ in range(5)])
    shutil.copy(tmp_path / "one" / "train.safetensors", tmp_path / "other")
    with pytest.raises(UserError, match="train.safetensors has changed since data.json was written"):
        open_samples(tmp_path / "other", "train")


def test_any_flipped_bit_is_found_when_its_sample_is_read(tmp_path):
    """Also one in a number by which samples are planned; the others can still be read."""
    written = random_samples(12)
    write_part(tmp_path, written)
    path, (size, _) = tmp_path / "train.safetensors", read_header(tmp_path / "train.safetensors", "")
    whole = path.read_bytes()
    for place in random.sample(range(size, len(whole)), 150):
        data = bytearray(whole)
        data[place] ^= 1 << random.randrange(8)
        path.write_bytes(data)
        samples, bad = open_samples(tmp_path, "train"), []
        for i, (ids, _, _) in enumerate(written):
            try:
                assert samples.sequences(i)[0][0].tolist() == ids
            except UserError as error:
                assert re.search(f"train.safetensors is damaged .its sample {i} .* make it again", str(error))
                bad.append(i)
        assert 1 <= len(bad) <= 2  # two that share an offset


def test_a_changed_number_that_overflows_is_found(tmp_path):
    write_part(tmp_path, random_samples(9))
    path = tmp_path / "train.safetensors"
    tensors, hash = load_file(path), read_metadata(path, "")
    for value in (-(2**63), 2**63 - 1, -1, 10**6):
        offsets = tensors["offsets"].clone()
        offsets[random.randrange(10)] = value
        save_file(tensors | {"offsets": offsets}, path, hash)
        with pytest.raises(UserError, match="train.safetensors is damaged"):
            read_all(tmp_path)


def test_damage_of_data_json_is_found_by_the_manifest(tmp_path):
    with new_folder(tmp_path / "data") as folder:
        write_part(folder, random_samples(9), shard_tokens=100)
    path = tmp_path / "data" / "data.json"
    write_json(path, read_json(path) | {"version": "another"})
    with pytest.raises(UserError, match="data.json has changed since it was written: make it again"):
        open_samples(tmp_path / "data", "train")


def test_a_data_json_that_does_not_list_its_shards_is_refused(tmp_path):
    """One of an earlier version, or one that was changed by hand, where there is no manifest."""
    write_part(tmp_path, random_samples(9), shard_tokens=100)
    path = tmp_path / "data.json"
    info = read_json(path)
    train, first = info["train"], info["train"]["shards"][0]
    changes = [
        None, 5, [], {}, train | {"shards": []}, train | {"samples": 8}, train | {"tokens": "9"},
        train | {"longest": -1}, train | {"largest_share": 2.0}, train | {"by_source": [{}]}, train | {"more": 1},
        {key: value for key, value in train.items() if key != "largest_token"},
        {"samples": 9, "tokens": 100, "targets": 50},
        *(train | {"shards": [first | change, *train["shards"][1:]]} for change in
          ({"file": "../x.safetensors"}, {"file": "/x"}, {"samples": 1e3}, {"hash": None}, {"more": 1})),
    ]  # fmt: skip
    for changed in changes:
        write_json(path, info | {"train": changed})
        with pytest.raises(UserError, match="data.json does not list the shards of train, or is damaged: make"):
            open_samples(tmp_path, "train")
            pytest.fail(str(changed))


# ------------------------------------------------------------------------------------------------- data.json


def test_data_info(tmp_path):
    path, info = (
        tmp_path / "data.json",
        {"tokenizer_hash": "ab", "prompt_style": "plain", "sources": [], "kind": "samples"},
    )
    with pytest.raises(UserError, match="prepare_data.py"):
        read_data_info(tmp_path)
    path.write_text(json.dumps(info))
    assert read_data_info(tmp_path) == info
    for key in info:
        path.write_text(json.dumps({k: v for k, v in info.items() if k != key}))
        with pytest.raises(UserError, match=f"data.json.*{key}"):
            read_data_info(tmp_path)
    for broken in (b'{"tokenizer_hash": ', b"[]", b"\xff\xfe"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="data.json"):
            read_data_info(tmp_path)


def test_names_of_sources(tmp_path):
    samples = open_samples(write_part(tmp_path, [([5, 6], [False, True], source) for source in (0, 2, 1)]), "train")
    older, named = {"path": "/somewhere/else/train.v2.jsonl"}, {"name": "chess v1.5", "path": "a/b.json"}
    assert source_names({"sources": [older, named, older]}, samples) == ["train.v2-1", "chess v1.5", "train.v2-3"]
    assert source_names({"sources": [named]}, samples) == source_names({"sources": []}, samples) == []
    with pytest.raises(UserError, match="fewer sources"):
        source_names({"sources": [older, named]}, samples)


# -------------------------------------------------------------------------------------------- the order of an epoch


def orders(N, count):
    """The orders of N numbers for so many seeds, as tuples."""
    first = random.randrange(10**6)
    return [tuple(Order(N, first + k, epoch=k % 3)[:].tolist()) for k in range(count)]


@SEARCH
@given(N=st.one_of(st.integers(0, 70), st.integers(0, 20_000)), seed=st.integers(0, 2**63), epoch=st.integers(0, 99))
def test_an_order_has_each_number_once(N, seed, epoch):
    assert sorted(Order(N, seed, epoch)[:].tolist()) == list(range(N))


@SEARCH
@given(N=st.one_of(st.integers(1, 300), st.integers(1, 10**12)), seed=st.integers(0, 2**31), data=st.data())
def test_a_place_of_an_order_is_found_without_the_others(N, seed, data):
    """Also of a trillion: memory does not grow with N, nor is a generator's state passed on."""
    order, start = Order(N, seed, 1), data.draw(st.integers(0, N - 1))
    here = order[start : start + 100].tolist()
    assert all(0 <= i < N for i in here) and len(set(here)) == len(here) == min(100, N - start)
    assert [order[start + k : start + k + 1].item() for k in range(min(3, len(here)))] == here[:3]
    assert Order(N, seed, 1)[start : start + 100].tolist() == here


@pytest.mark.parametrize("N", [2, 3, 4, 5])
def test_all_orders_of_a_few_come_equally_often(N):
    """Chi-square below what one sound run in 1e9 exceeds."""
    every = [*itertools.permutations(range(N))]
    counts = Counter(orders(N, max(400, 20 * len(every))))
    observed = [counts[order] for order in every]
    assert chisquare(observed).pvalue > 1e-9 and min(observed) > 0


def test_each_number_is_in_each_place_equally_often():
    """And the next number is any other one: of 40, the place and the step between neighbours."""
    found = np.array(orders(40, 4000))
    steps = (found[:, 1:] - found[:, :-1]) % 40
    assert min(chisquare(np.bincount(column, minlength=40)).pvalue for column in found.T) > 1e-9
    assert min(chisquare(np.bincount(column, minlength=40)[1:]).pvalue for column in steps.T) > 1e-9


def test_orders_of_other_seeds_epochs_and_streams_are_others():
    given = [*itertools.product(range(3), range(3), range(2))]
    found = [Order(100, *each)[:] for each in given]
    alike = [(a == b).sum().item() for a, b in itertools.combinations(found, 2)]
    assert max(alike) < 12  # 1 on average; 12 in one of 1e9


@SEARCH
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=20), window=st.integers(1, 20), data=st.data())
def test_an_order_in_windows_has_the_samples_of_a_few_shards_at_a_time(sizes, window, data):
    starts = np.cumsum([0, *sizes])
    order, N = OrderInWindows(starts, window, data.draw(st.integers(0, 99)), epoch=1), sum(sizes)
    numbers = order[:].tolist()
    assert sorted(numbers) == list(range(N)) and len(order) == N
    assert sorted(itertools.chain(*order.windows)) == list(range(len(sizes)))
    assert [*map(len, order.windows)] == [window] * (len(sizes) // window) + [len(sizes) % window] * (
        len(sizes) % window > 0
    )
    for place, number in enumerate(numbers):
        assert np.searchsorted(starts, number, "right") - 1 in order.windows[order.window_of(place)]
    start = data.draw(st.integers(0, N - 1))
    assert order[start : start + 7].tolist() == numbers[start : start + 7]


def test_an_order_in_windows_mixes_them():
    """Shards, samples inside a window, and other epochs otherwise."""
    found = [OrderInWindows(np.arange(0, 1001, 100), 2, seed=1, epoch=epoch) for epoch in range(3)]
    assert len({str(order.windows) for order in found}) == 3
    for order in found:
        first = order[:100] // 100
        assert 20 < (first == order.windows[0][0]).sum() < 80 and not order[:100].equal(order[:100].sort().values)
    inside = [order[:200] % 100 for order in found]
    assert not inside[0].equal(inside[1]) and not inside[1].equal(inside[2])


def test_the_window_of_all_shards_is_no_window(tmp_path):
    samples = open_samples(write_part(tmp_path, random_samples(40), shard_tokens=100), "train")
    everything = Order(40, seed=3, epoch=1)[:]
    for window in (0, len(samples.shards), 99):
        assert order_of(samples, window, 3, 1)[:].equal(everything)
    assert not order_of(samples, 2, 3, 1)[:].equal(everything)


# ------------------------------------------------------------------------------------------------------ planning


def drawn(planner, lengths, global_batch_size, seed, epoch):
    """The samples of each step of an epoch."""
    draw = planner.draw(Order(len(lengths), seed, epoch), torch.tensor(lengths), global_batch_size)
    return [draw(place) for place in range(math.ceil(len(lengths) / global_batch_size))]


def plan(planner, lengths, global_batch_size=16, micro_batch_tokens=200, seed=1, epoch=0):
    """The steps of an epoch, as `Planner.plan` and training/steps.py make them, of samples of these lengths."""
    steps = []
    for step in drawn(planner, lengths, global_batch_size, seed, epoch):
        sizes = torch.tensor(lengths)[step]
        steps.append([step[places].tolist() for places in planner.cut(sizes, sizes // 2, micro_batch_tokens)])
    return steps


@st.composite
def jobs(draw):
    """Arguments of a planner: any lengths, all of one length, or one giant among them; any steps, budget and seed."""
    length = st.integers(1, 60)
    lengths = draw(
        st.one_of(
            st.lists(length, min_size=1, max_size=150),
            st.builds(lambda length, N: [length] * N, length, st.integers(1, 150)),
            st.builds(lambda rest, giant: [*rest, giant], st.lists(length, max_size=50), st.integers(1000, 5000)),
        )
    )
    return dict(
        lengths=lengths,
        global_batch_size=draw(st.integers(1, 200)),
        micro_batch_tokens=draw(st.one_of(st.just(1), st.integers(1, 400))),
        seed=draw(st.integers(0, 2**31)),
        epoch=draw(st.integers(0, 20)),
    )


@PLANS
@SEARCH
@given(job=jobs())
def test_an_epoch_has_each_sample_once(planner, job):
    N, size = len(job["lengths"]), job["global_batch_size"]
    steps = plan(planner, **job)
    assert sorted(i for step in steps for i in flat(step)) == list(range(N))
    assert all(micro_batch for step in steps for micro_batch in step)
    sizes = [len(flat(step)) for step in steps]
    assert len(sizes) == math.ceil(N / size)  # what the training loop counts on
    assert sorted(sizes) == sorted([size] * (N // size) + [N % size] * (N % size > 0))


@PLANS
@SEARCH
@given(job=jobs())
def test_micro_batches_keep_the_budget(planner, job):
    """Unless a sample alone exceeds it."""
    for micro_batch in itertools.chain(*plan(planner, **job)):
        assert positions(planner, job["lengths"], micro_batch) <= job["micro_batch_tokens"] or len(micro_batch) == 1


@PLANS
@SEARCH
@given(job=jobs(), torch_seed=st.integers(0, 1000))
def test_a_plan_is_a_function_of_its_arguments(planner, job, torch_seed):
    """The state of no random generator is in it, nor does it change the global one."""
    first = plan(planner, **job)
    torch.manual_seed(torch_seed)
    before = torch.get_rng_state()
    assert plan(planner, **job) == first
    assert torch.equal(torch.get_rng_state(), before)


@PLANS
@SEARCH
@given(job=jobs(), ranks=st.integers(1, 9))
def test_any_number_of_ranks_does_the_same_steps(planner, job, ranks):
    """A planner is not told it; cut as `train_step` does, every micro-batch is some rank's, and no other's."""
    assert list(inspect.signature(planner.cut).parameters) == ["lengths", "target_counts", "micro_batch_tokens"]
    assert list(inspect.signature(planner.draw).parameters) == ["order", "lengths", "global_batch_size"]
    for step in plan(planner, **job):
        shares = [step[rank::ranks] for rank in range(ranks)]
        assert sorted(itertools.chain(*shares)) == sorted(step)


@PLANS
def test_seeds_and_epochs_give_other_plans(planner):
    lengths = [random.randint(1, 60) for _ in range(random.randint(100, 300))]
    seed = random.randrange(10**6)
    others = [(seed, 0), (seed, 1), (seed, 2), (seed + 1, 0), (seed + 1, 1)]
    plans = [plan(planner, lengths, seed=seed, epoch=epoch) for seed, epoch in others]
    in_steps = [[sorted(flat(step)) for step in steps] for steps in plans]
    assert len(set(map(str, in_steps))) == len(others)


def test_the_budget_is_used_by_padded_rows():
    """The next sample of a step would not have fit in."""
    lengths = [random.randint(1, 60) for _ in range(64)]
    for step in plan(SORTED, lengths, global_batch_size=32):
        for micro_batch, following in zip(step, step[1:], strict=False):
            assert positions(SORTED, lengths, [*micro_batch, following[0]]) > 200


def like_gsm8k(N):
    """Lengths of GSM8K in SmolLM2's tokens: log-normal, quartiles 133, 172 and 224, cut at 512."""
    return [min(511, max(65, round(random.lognormvariate(5.155, 0.358)))) for _ in range(N)]


def like_t0(N):
    """Lengths of T0: log-normal, median 110, one in a hundred above 1,900, cut at 2,048."""
    return [min(2048, max(8, round(random.lognormvariate(math.log(110), 1.225)))) for _ in range(N)]


@pytest.mark.parametrize("make_lengths", [like_gsm8k, like_t0])
def test_packed_rows_are_full(make_lengths):
    """To 98%, but for the last of each step, which has what is left; hardly a step takes a row more than it must."""
    lengths = make_lengths(20 * 128)
    rows, fewest = 0, 0
    for step in plan(PLANNERS["packed"], lengths, global_batch_size=128, micro_batch_tokens=4096):
        sizes = sorted(positions(PLANNERS["packed"], lengths, row) for row in step)
        assert sum(sizes[1:]) >= 0.98 * 4096 * (len(sizes) - 1)
        rows, fewest = rows + len(step), fewest + math.ceil(sum(sizes) / 4096)
    assert fewest <= rows <= fewest + 5


def test_packed_rows_by_hand():
    """Each sample, the longest first, in the fullest row that has room."""
    lengths = torch.tensor([5, 2, 6, 3, 4])
    step = packed_in_step(lengths, None, micro_batch_tokens=10)
    assert [lengths[row].tolist() for row in step] == [[6, 4], [5, 3, 2]]


def test_a_plan_of_an_epoch_is_quick():
    """20,000 samples in under two seconds, of which it takes some tenths."""
    lengths = like_t0(20_000)
    for planner in PLANNERS.values():
        started = time.process_time()
        plan(planner, lengths, 128, 4096)
        assert time.process_time() - started < 2


def test_samples_of_length_one():
    for planner in PLANNERS.values():
        sizes = [[len(row) for row in step] for step in plan(planner, [1] * 50, 20, micro_batch_tokens=7)]
        assert sorted(sizes) == [[7, 3], [7, 7, 6], [7, 7, 6]]


@DRAWN
def test_which_samples_share_a_step_does_not_depend_on_the_budget(planner):
    lengths = [random.randint(1, 60) for _ in range(100)]
    plans = [plan(planner, lengths, micro_batch_tokens=budget) for budget in (1, 100, 10**6)]
    sets = [[sorted(flat(step)) for step in steps] for steps in plans]
    expected = Order(100, seed=1, epoch=0)[:].split(16)
    assert sets[0] == sets[1] == sets[2] == [sorted(step.tolist()) for step in expected]
    assert all(len(step) == 1 for step in plans[2]) and all(len(step) == len(flat(step)) for step in plans[0])


def test_a_step_has_its_longest_samples_first():
    """So that memory runs out in the first step or never."""
    lengths = [random.randint(1, 60) for _ in range(100)]
    for step in plan(SORTED, lengths):
        in_this = [lengths[i] for i in flat(step)]
        assert in_this == sorted(in_this, reverse=True)


@DRAWN
def test_every_step_is_a_draw_from_the_whole_set(planner):
    """Long and short samples in each step."""
    assert all(0.1 < share < 0.9 for share in shares_of_the_long(planner))  # 5.8 standard deviations of a draw


def test_grouped_steps_are_not():
    """Neighbours in length share a step, and long and short steps follow each other in random order."""
    shares = shares_of_the_long(PLANNERS["grouped"])
    assert set(shares) == {0.0, 1.0} and shares not in (sorted(shares), sorted(shares, reverse=True))


def shares_of_the_long(planner):
    """Of 500 samples of length 10 and 500 of length 100, the share of the longer ones in each step of 50."""
    lengths = [10] * 500 + [100] * 500
    random.shuffle(lengths)
    steps = plan(planner, lengths, global_batch_size=50)
    return [sum(lengths[i] == 100 for i in flat(step)) / 50 for step in steps]


def test_grouped_steps_are_neighbours_in_length():
    lengths = [random.randint(1, 500) for _ in range(20 * 16)]
    spans = sorted(
        (min(sizes), max(sizes))
        for sizes in ([lengths[i] for i in flat(s)] for s in plan(PLANNERS["grouped"], lengths))
    )
    assert all(longest <= shortest for (_, longest), (shortest, _) in itertools.pairwise(spans))


def test_equal_lengths_are_grouped_anew_in_every_epoch():
    plans = [plan(PLANNERS["grouped"], [7] * 200, epoch=epoch) for epoch in range(3)]
    sets = [{tuple(sorted(flat(step))) for step in steps} for steps in plans]
    assert not sets[0] & sets[1] and not sets[1] & sets[2]


def test_padding_of_each_planner():
    """On lengths like GSM8K's, steps of 128 samples and 1,024 positions: under 3% sorted in the step."""
    lengths = like_gsm8k(40 * 128)
    left = {name: padding(planner, lengths, plan(planner, lengths, 128, 1024)) for name, planner in PLANNERS.items()}
    assert left["packed"] == 0 and left["grouped"] < 0.01 < left["sorted_in_step"] < 0.03 < 0.2 < left["random"]


def test_random_keeps_the_order_of_the_draw():
    lengths = like_gsm8k(100)
    expected = [step.tolist() for step in drawn(RANDOM, lengths, 16, seed=1, epoch=0)]
    assert [flat(step) for step in plan(RANDOM, lengths, micro_batch_tokens=1000)] == expected


def test_longest_first_keeps_the_order_of_equals():
    lengths = torch.tensor([5, 9, 5, 9, 1])
    assert longest_first(torch.tensor([4, 2, 3, 0, 1]), lengths).tolist() == [3, 1, 2, 0, 4]


@PLANS
def test_in_order_takes_everything_once(tmp_path, planner):
    samples = open_samples(write_part(tmp_path, random_samples(77), shard_tokens=300), "train")
    lengths, chosen = samples.lengths[:].tolist(), torch.tensor(random.sample(range(77), 20))
    for some, expected in ((None, range(77)), (chosen, sorted(chosen.tolist()))):
        micro_batches = in_order(planner, samples, 200, some)
        assert sorted(flat(micro_batches)) == list(expected)
        assert all(len(m) == 1 or positions(planner, lengths, m) <= 200 for m in micro_batches)


def test_packed_samples_lie_end_to_end(tmp_path):
    written = random_samples(5)
    samples = open_samples(write_part(tmp_path, written, shard_tokens=50), "train")
    tokens, targets, offsets = samples.packed([3, 0, 4])
    assert tokens.shape == targets.shape == (1, offsets[-1]) and offsets[0] == 0
    for i, start, end in zip((3, 0, 4), offsets, offsets[1:], strict=False):
        alone = samples.padded([i])
        assert torch.equal(tokens[0, start:end], alone[0][0]) and torch.equal(targets[0, start:end], alone[1][0])


def test_a_planner_is_given_the_targets_of_its_samples(tmp_path):
    samples = open_samples(write_part(tmp_path, random_samples(20)), "train")
    given = []

    def by_targets(lengths, target_counts, micro_batch_tokens):
        given.extend(target_counts.tolist())
        return [[place] for place in target_counts.argsort().tolist()]

    chosen = torch.tensor([3, 9, 4])
    assert sorted(flat(Planner(by_targets, Samples.packed).plan(samples, chosen, 100))) == [3, 4, 9]
    assert given == samples.target_counts[[3, 9, 4]].tolist()


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([[0, 1], [1]], "not each of the 3 samples of a step is in one micro-batch"),
        ([[0, 1]], "not each of the 3"),
        ([[0, 1, 2, 3]], "not each of the 3"),
        ([[0, 1, -1]], "not each of the 3"),
        ([[0, 1, 2], []], "it planned a micro-batch without samples"),
    ],
)
def test_a_planner_that_does_not_cut_a_step_into_its_samples_is_refused(five, monkeypatch, places, message):
    """The loss would look as always, and no one would notice."""
    s, samples = five
    monkeypatch.setitem(PLANNERS, "wrong", Planner(lambda *_: places, Samples.packed))
    with pytest.raises(UserError, match=f"--planner wrong: {message}"):
        next(planned_steps(s, samples, 0, 2))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([[0, 1, 1], [3, 4]], "step 1 of an epoch has 2 samples, not 3"),
        ([[0, 1], [2]], "step 2 of an epoch has 1 samples, not 2"),
        ([[0, 1, 2, 3], [4]], "step 1 of an epoch has 4 samples, not 3"),
        ([[0, 1, 5], [3, 4]], "sample 5 of 5 is in a step"),
        ([[0, 1, -1], [3, 4]], "sample -1 of 5 is in a step"),
        ([[0, 1, 2], [2, 3]], "not each sample was in one step of the epoch"),
        ([[0, 2, 4], [2, 3]], "not each sample was in one step of the epoch"),
        ([[0, 3, 4], [1, 3]], "not each sample was in one step of the epoch"),
    ],
)
def test_a_planner_that_does_not_draw_each_sample_once_is_refused(five, monkeypatch, steps, message):
    s, samples = five

    def draw(order, lengths, size):
        return lambda place: torch.tensor(steps[place])

    monkeypatch.setitem(PLANNERS, "wrong", RANDOM._replace(draw=draw))
    with pytest.raises(UserError, match=f"--planner wrong: {message}"):
        [*planned_steps(s, samples, 0, 2)]


def test_the_smaller_step_of_an_epoch_may_be_any(five, monkeypatch):
    s, samples = five
    draw = lambda *_: lambda place: torch.tensor([[4, 1], [0, 3, 2]][place])  # noqa: E731
    monkeypatch.setitem(PLANNERS, "wrong", RANDOM._replace(draw=draw))
    assert [sorted(flat(step)) for _, step in planned_steps(s, samples, 0, 4)] == 2 * [[1, 4], [0, 2, 3]]


@PLANS
def test_a_step_is_planned_without_those_before_it(five, planner):
    """Resuming needs only its number."""
    s, samples = five
    s.planner = next(name for name, known in PLANNERS.items() if known is planner)
    every = [*planned_steps(s, samples, 0, 12)]
    for start in range(12):
        assert [*planned_steps(s, samples, start, 12)] == every[start:]


@pytest.fixture
def five(tmp_path):
    """Settings of steps of three samples, and five of these."""
    s = SimpleNamespace(global_batch_size=3, micro_batch_tokens=100, seed=1, planner="wrong", shuffle_window=0)
    return s, open_samples(write_part(tmp_path, random_samples(5)), "train")
