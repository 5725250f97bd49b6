"""The prepared data on disk, and the plans of micro-batches: what a step may and may not be cut into."""

import inspect
import itertools
import json
import math
import random
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from batching import (
    IGNORE,
    PLANNERS,
    Planner,
    Samples,
    grouped,
    in_order,
    packed_in_step,
    random_in_step,
    read_data_info,
    sample_steps,
    sorted_in_step,
    source_names,
)
from preparation.record_store import SampleWriter
from shell.cli import UserError
from training.steps import planned_steps

PLANS = pytest.mark.parametrize("planner", [planner.plan for planner in PLANNERS.values()])
DRAWN = pytest.mark.parametrize("planner", [packed_in_step, sorted_in_step, random_in_step])  # steps from the whole set


def positions(planner, lengths, micro_batch):
    """How many positions a micro-batch takes in the model, padding included."""
    sizes = [lengths[i] for i in micro_batch]
    return sum(sizes) if planner is packed_in_step else len(sizes) * max(sizes)


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


def write(path, samples):
    writer = SampleWriter()
    for sample in samples:
        writer.add(*sample)
    writer.save(path)
    return writer


def flat(step):
    return [i for micro_batch in step for i in micro_batch]


# ------------------------------------------------------------------------------------------------------- on disk


def test_what_is_written_is_read(tmp_path):
    written = random_samples(random.randint(5, 60))
    writer = write(tmp_path / "train.safetensors", written)
    samples = Samples(tmp_path / "train.safetensors")
    assert len(samples) == len(writer) == len(written)
    assert samples.lengths.tolist() == [len(ids) - 1 for ids, _, _ in written]
    assert samples.target_counts.tolist() == [sum(wanted) for _, wanted, _ in written]
    assert samples.sources.tolist() == [source for _, _, source in written]
    for i, (ids, wanted, _) in enumerate(written):
        tokens, targets, _ = samples.padded([i])
        assert tokens.tolist() == [ids[:-1]]
        assert targets.tolist() == [[id if w else IGNORE for id, w in zip(ids[1:], wanted[1:], strict=True)]]


def test_the_format_is_what_the_module_says(tmp_path):
    write(tmp_path / "x.safetensors", [([7, 8, 9], [False, True, True], 1), ([5, 6], [False, True], 0)])
    tensors = load_file(tmp_path / "x.safetensors")
    assert {name: (t.dtype, t.tolist()) for name, t in tensors.items()} == {
        "tokens": (torch.int32, [7, 8, 9, 5, 6]),
        "is_target": (torch.bool, [False, True, True, False, True]),
        "offsets": (torch.int64, [0, 3, 5]),
        "target_counts": (torch.int32, [2, 1]),
        "sources": (torch.int32, [1, 0]),
    }


def test_micro_batch_by_hand(tmp_path):
    long, short = [11, 12, 13, 14, 15], [21, 22, 23]
    write(tmp_path / "x.safetensors", [(short, [False, False, True], 0), (long, [False, True, False, True, True], 0)])
    tokens, targets = Samples(tmp_path / "x.safetensors").padded([1, 0])[:2]
    assert tokens.dtype == targets.dtype == torch.int64
    assert targets.tolist() == [[12, IGNORE, 14, 15], [IGNORE, 23, IGNORE, IGNORE]]
    assert tokens[0].tolist() == [11, 12, 13, 14]
    assert tokens[1, :2].tolist() == [21, 22]  # what stands in the padding is nobody's business, as long as...
    assert tokens.min() >= 0 and tokens.max() < 24  # ...it is a token of the model


def test_the_padding_is_as_long_as_the_longest_of_the_micro_batch(tmp_path):
    written = random_samples(30)
    write(tmp_path / "x.safetensors", written)
    samples = Samples(tmp_path / "x.safetensors")
    some = random.sample(range(30), 7)
    tokens, targets, _ = samples.padded(some)
    assert tokens.shape == targets.shape == (7, max(len(written[i][0]) for i in some) - 1)
    assert (targets != IGNORE).sum().item() == sum(samples.target_counts[i].item() for i in some)


def test_a_first_token_is_never_a_target_nor_counted_as_one(tmp_path):
    """With an empty prompt and no BOS the answer's first token has nothing to be predicted from."""
    write(tmp_path / "x.safetensors", [([4, 5, 6], [True, True, True], 0)])
    samples = Samples(tmp_path / "x.safetensors")
    assert samples.target_counts.tolist() == [2] == [(samples.padded([0])[1] != IGNORE).sum().item()]


def test_a_part_without_samples(tmp_path):
    write(tmp_path / "val.safetensors", [])
    samples = Samples(tmp_path / "val.safetensors")
    assert len(samples) == 0
    assert all(in_order(planner, samples.lengths, samples.target_counts, 100) == [] for planner in PLANNERS.values())


def test_damaged_data_is_refused_by_name(tmp_path):
    path = tmp_path / "train.safetensors"
    with pytest.raises(UserError, match="train.safetensors"):
        Samples(path)  # missing
    write(path, random_samples(20))
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="train.safetensors"):
            Samples(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    changes = {
        "a tensor is missing": {k: v for k, v in tensors.items() if k != "offsets"},
        "too few tokens": tensors | {"tokens": tensors["tokens"][:-1]},
        "too few marks": tensors | {"is_target": tensors["is_target"][:-1]},
        "offsets start late": tensors | {"offsets": tensors["offsets"] + 1},
        "offsets end early": tensors | {"offsets": tensors["offsets"][:-1]},
        "no offsets": tensors | {"offsets": tensors["offsets"][:0]},
        "a sample without length": tensors | {"offsets": tensors["offsets"].clone().index_fill(0, torch.tensor(1), 0)},
        "too few counts": tensors | {"target_counts": tensors["target_counts"][:-1]},
    }
    for what, changed in changes.items():
        save_file({k: v.contiguous().clone() for k, v in changed.items()}, path)
        with pytest.raises(UserError, match="train.safetensors"):
            Samples(path)
            pytest.fail(what)


def test_data_info(tmp_path):
    path, info = tmp_path / "data.json", {"tokenizer_hash": "ab", "prompt_style": "plain", "sources": []}
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
    write(tmp_path / "x.safetensors", [([5, 6], [False, True], source) for source in (0, 2, 1)])
    samples = Samples(tmp_path / "x.safetensors")
    older, named = {"path": "/somewhere/else/train.v2.jsonl"}, {"name": "chess v1.5", "path": "a/b.json"}
    assert source_names({"sources": [older, named, older]}, samples) == ["train.v2-1", "chess v1.5", "train.v2-3"]
    assert source_names({"sources": [named]}, samples) == source_names({"sources": []}, samples) == []
    with pytest.raises(UserError, match="fewer sources"):
        source_names({"sources": [older, named]}, samples)


# ------------------------------------------------------------------------------------------------------ planning


def plan(planner, lengths, global_batch_size=16, micro_batch_tokens=200, seed=1, epoch=0):
    return planner(torch.tensor(lengths), torch.ones(len(lengths)), global_batch_size, micro_batch_tokens, seed, epoch)


SEARCH = settings(max_examples=60, deadline=None)  # the machine may be busy


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
    assert list(inspect.signature(planner).parameters) == [
        "lengths", "target_counts", "global_batch_size", "micro_batch_tokens", "seed", "epoch",
    ]  # fmt: skip
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
    for step in plan(sorted_in_step, lengths, global_batch_size=32):
        for micro_batch, following in zip(step, step[1:], strict=False):
            assert positions(sorted_in_step, lengths, [*micro_batch, following[0]]) > 200


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
    for step in plan(packed_in_step, lengths, global_batch_size=128, micro_batch_tokens=4096):
        sizes = sorted(positions(packed_in_step, lengths, row) for row in step)
        assert sum(sizes[1:]) >= 0.98 * 4096 * (len(sizes) - 1)
        rows, fewest = rows + len(step), fewest + math.ceil(sum(sizes) / 4096)
    assert fewest <= rows <= fewest + 5


def test_packed_rows_by_hand():
    """Each sample, the longest first, in the fullest row that has room."""
    lengths = [2, 3, 4, 5, 6]
    (step,) = plan(packed_in_step, lengths, micro_batch_tokens=10)
    assert [[lengths[i] for i in row] for row in step] == [[6, 4], [5, 3, 2]]


def test_a_plan_of_an_epoch_is_quick():
    """20,000 samples in under a second, of which it takes some hundredths."""
    lengths = torch.tensor(like_t0(20_000))
    for planner in PLANNERS.values():
        started = time.process_time()
        planner.plan(lengths, None, 128, 4096, seed=1, epoch=0)
        in_order(planner, lengths, lengths // 2, 4096)
        assert time.process_time() - started < 1


def test_samples_of_length_one():
    for planner in PLANNERS.values():
        sizes = [[len(row) for row in step] for step in plan(planner.plan, [1] * 50, 20, micro_batch_tokens=7)]
        assert sorted(sizes) == [[7, 3], [7, 7, 6], [7, 7, 6]]


@DRAWN
def test_which_samples_share_a_step_does_not_depend_on_the_budget(planner):
    lengths = [random.randint(1, 60) for _ in range(100)]
    plans = [plan(planner, lengths, micro_batch_tokens=budget) for budget in (1, 100, 10**6)]
    sets = [[sorted(flat(step)) for step in steps] for steps in plans]
    drawn = sample_steps(torch.tensor(lengths), 16, seed=1, epoch=0)
    assert sets[0] == sets[1] == sets[2] == [sorted(step.tolist()) for step in drawn]
    assert all(len(step) == 1 for step in plans[2]) and all(len(step) == len(flat(step)) for step in plans[0])


def test_a_step_has_its_longest_samples_first():
    """So that memory runs out in the first step or never."""
    lengths = [random.randint(1, 60) for _ in range(100)]
    for step in plan(sorted_in_step, lengths):
        in_this = [lengths[i] for i in flat(step)]
        assert in_this == sorted(in_this, reverse=True)


@DRAWN
def test_every_step_is_a_draw_from_the_whole_set(planner):
    """Long and short samples in each step."""
    assert all(0.1 < share < 0.9 for share in shares_of_the_long(planner))  # 5.8 standard deviations of a draw


def test_grouped_steps_are_not():
    """Neighbours in length share a step, and long and short steps follow each other in random order."""
    shares = shares_of_the_long(grouped)
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
        (min(sizes), max(sizes)) for sizes in ([lengths[i] for i in flat(s)] for s in plan(grouped, lengths))
    )
    assert all(longest <= shortest for (_, longest), (shortest, _) in itertools.pairwise(spans))


def test_equal_lengths_are_grouped_anew_in_every_epoch():
    plans = [plan(grouped, [7] * 200, epoch=epoch) for epoch in range(3)]
    sets = [{tuple(sorted(flat(step))) for step in steps} for steps in plans]
    assert not sets[0] & sets[1] and not sets[1] & sets[2]


def test_padding_of_each_planner():
    """On lengths like GSM8K's, steps of 128 samples and 1,024 positions: under 3% sorted in the step."""
    lengths = like_gsm8k(40 * 128)
    left = {
        name: padding(planner.plan, lengths, plan(planner.plan, lengths, 128, 1024))
        for name, planner in PLANNERS.items()
    }
    assert left["packed"] == 0 and left["grouped"] < 0.01 < left["sorted_in_step"] < 0.03 < 0.2 < left["random"]


def test_random_keeps_the_order_of_the_draw():
    lengths = torch.tensor(like_gsm8k(100))
    drawn = [step.tolist() for step in sample_steps(lengths, 16, seed=1, epoch=0)]
    assert [flat(step) for step in plan(random_in_step, lengths.tolist(), micro_batch_tokens=1000)] == drawn


def test_epochs_and_seeds_do_not_share_generators():
    """A generator per (seed, epoch): neighbouring pairs give unrelated orders."""
    draws = [sample_steps(torch.ones(20), 1, seed, epoch) for seed in range(4) for epoch in range(4)]
    assert len({str(steps) for steps in draws}) == len(draws)


@PLANS
def test_in_order_takes_everything_once(planner):
    lengths = torch.tensor([random.randint(1, 60) for _ in range(77)])
    chosen = next(entry for entry in PLANNERS.values() if entry.plan is planner)
    micro_batches = in_order(chosen, lengths, lengths // 2, 200)
    assert sorted(flat(micro_batches)) == list(range(77))
    assert all(len(m) == 1 or positions(planner, lengths.tolist(), m) <= 200 for m in micro_batches)


def test_packed_samples_lie_end_to_end(tmp_path):
    written = random_samples(5)
    write(tmp_path / "x.safetensors", written)
    samples = Samples(tmp_path / "x.safetensors")
    tokens, targets, offsets = samples.packed([3, 0, 4])
    assert tokens.shape == targets.shape == (1, offsets[-1]) and offsets[0] == 0
    for i, start, end in zip((3, 0, 4), offsets, offsets[1:], strict=False):
        alone = samples.padded([i])
        assert torch.equal(tokens[0, start:end], alone[0][0]) and torch.equal(targets[0, start:end], alone[1][0])


def test_a_validation_has_all_samples_whatever_the_planner_makes_of_them():
    """Also of a planner that asks for the targets, and cuts its samples into several steps."""

    def bucketed(lengths, target_counts, global_batch_size, micro_batch_tokens, seed, epoch):
        assert len(target_counts) == len(lengths)
        return [[[i] for i in range(len(lengths)) if (lengths[i] > 5) == long] for long in (True, False)]

    lengths = torch.randint(1, 11, (20,))
    micro_batches = in_order(Planner(bucketed, Samples.packed), lengths, lengths // 2, 100)
    assert sorted(i for micro_batch in micro_batches for i in micro_batch) == list(range(20))


@pytest.mark.parametrize(
    ("planned", "message"),
    [
        ([[[0, 1], [2]], [[3], [4, 1]]], "sample 1 of 5 is in an epoch 2 times, not once"),
        ([[[0, 1]], [[4, 2]]], "sample 3 of 5 is in an epoch 0 times"),
        ([[[0, 1, 2]], [[3, 4, 5]]], "sample 5 of 5 is in an epoch 1 times"),
        ([[[0, 1, 2, -1]], [[3, 4]]], "sample -1 of 5 is"),
        ([[[0, 1, 2], []], [[3, 4]]], "it planned a micro-batch without samples"),
    ],
)
def test_a_planner_that_does_not_plan_each_sample_once_is_refused(monkeypatch, planned, message):
    """The loss would look as always, and no one would notice."""
    s = SimpleNamespace(global_batch_size=3, micro_batch_tokens=100, seed=1, planner="wrong")
    monkeypatch.setitem(PLANNERS, "wrong", Planner(lambda *_: planned, Samples.packed))
    with pytest.raises(UserError, match=f"--planner wrong: {message}"):
        next(planned_steps(s, FiveSamples(), 0, 2))


class FiveSamples:
    lengths = target_counts = torch.ones(5)

    def __len__(self):
        return 5


def test_a_planner_with_another_number_of_steps_is_refused(monkeypatch):
    s = SimpleNamespace(global_batch_size=4, micro_batch_tokens=100, seed=1, planner="short")
    samples = SimpleNamespace(lengths=torch.ones(10), target_counts=torch.ones(10))
    monkeypatch.setitem(PLANNERS, "short", Planner(lambda *_: [[[0]]], Samples.packed))
    monkeypatch.setattr("training.steps.steps_per_epoch", lambda *_: 3)
    with pytest.raises(UserError, match="--planner short: it planned 1 steps for an epoch of 3"):
        next(planned_steps(s, samples, 0, 3))
