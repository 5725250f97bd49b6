"""The prepared data on disk, and the plans of micro-batches: what a step may and may not be cut into."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

import batching
from batching import IGNORE, PLANNERS, Samples, SampleWriter, in_order, read_data_info, sorted_in_step
from cli import UserError

PLANS = pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS.keys())


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
        tokens, targets = samples.micro_batch([i])
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
    tokens, targets = Samples(tmp_path / "x.safetensors").micro_batch([1, 0])
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
    tokens, targets = samples.micro_batch(some)
    assert tokens.shape == targets.shape == (7, max(len(written[i][0]) for i in some) - 1)
    assert (targets != IGNORE).sum().item() == sum(samples.target_counts[i].item() for i in some)


def test_a_first_token_is_never_a_target_nor_counted_as_one(tmp_path):
    """With an empty prompt and no BOS the answer's first token has nothing to be predicted from."""
    write(tmp_path / "x.safetensors", [([4, 5, 6], [True, True, True], 0)])
    samples = Samples(tmp_path / "x.safetensors")
    assert samples.target_counts.tolist() == [2] == [(samples.micro_batch([0])[1] != IGNORE).sum().item()]


def test_a_part_without_samples(tmp_path):
    write(tmp_path / "val.safetensors", [])
    samples = Samples(tmp_path / "val.safetensors")
    assert len(samples) == 0
    assert in_order(samples.lengths, 100) == []


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


# ------------------------------------------------------------------------------------------------------ planning


def plan(planner, lengths, global_batch_size=16, micro_batch_tokens=200, seed=1, epoch=0):
    return planner(torch.tensor(lengths), torch.ones(len(lengths)), global_batch_size, micro_batch_tokens, seed, epoch)


@PLANS
@pytest.mark.parametrize("N", [1, 15, 16, 17, 200])
def test_an_epoch_has_each_sample_once(planner, N):
    lengths = [random.randint(1, 60) for _ in range(N)]
    steps = plan(planner, lengths)
    assert sorted(i for step in steps for i in flat(step)) == list(range(N))
    sizes = [len(flat(step)) for step in steps]
    assert sizes[:-1] == [16] * (len(sizes) - 1) and 1 <= sizes[-1] <= 16
    assert all(micro_batch for step in steps for micro_batch in step)


@PLANS
def test_micro_batches_keep_the_budget(planner):
    """Unless a sample alone exceeds it."""
    lengths = [random.choice([1, 2, 30, 90, 199, 200, 201, 700]) for _ in range(300)]
    micro_batches = [micro_batch for step in plan(planner, lengths) for micro_batch in step]
    for micro_batch in micro_batches:
        positions = len(micro_batch) * max(lengths[i] for i in micro_batch)
        assert positions <= 200 or len(micro_batch) == 1
    assert any(len(micro_batch) > 1 for micro_batch in micro_batches)


@PLANS
def test_the_budget_is_used(planner):
    """The next sample of a step would not have fit in."""
    lengths = [random.randint(1, 60) for _ in range(64)]
    for step in plan(planner, lengths, global_batch_size=32):
        for micro_batch, following in zip(step, step[1:], strict=False):
            assert (len(micro_batch) + 1) * max(lengths[i] for i in [*micro_batch, following[0]]) > 200


@PLANS
def test_samples_of_length_one(planner):
    steps = plan(planner, [1] * 50, global_batch_size=20, micro_batch_tokens=7)
    assert [[len(micro_batch) for micro_batch in step] for step in steps] == [[7, 7, 6], [7, 7, 6], [7, 3]]


@PLANS
def test_a_plan_is_a_function_of_seed_and_epoch(planner):
    lengths = [random.randint(1, 60) for _ in range(100)]
    seed = random.randrange(10**6)
    first = plan(planner, lengths, seed=seed)
    torch.manual_seed(random.randrange(10**6))  # nothing but its arguments counts
    torch.rand(3)
    assert plan(planner, lengths, seed=seed) == first
    others = [plan(planner, lengths, seed=seed, epoch=1), plan(planner, lengths, seed=seed + 1)]
    drawn = [[sorted(flat(step)) for step in steps] for steps in (first, *others)]
    assert drawn[0] != drawn[1] and drawn[0] != drawn[2] and drawn[1] != drawn[2]


@PLANS
def test_a_plan_leaves_the_global_random_state_alone(planner):
    before = torch.get_rng_state()
    plan(planner, [3, 4, 5])
    assert torch.equal(torch.get_rng_state(), before)


@PLANS
def test_which_samples_share_a_step_does_not_depend_on_the_budget(planner):
    lengths = [random.randint(1, 60) for _ in range(100)]
    plans = [plan(planner, lengths, micro_batch_tokens=budget) for budget in (1, 100, 10**6)]
    sets = [[sorted(flat(step)) for step in steps] for steps in plans]
    assert sets[0] == sets[1] == sets[2]
    assert all(len(step) == 1 for step in plans[2]) and all(len(step) == len(flat(step)) for step in plans[0])


def test_a_step_has_its_longest_samples_first():
    """So that memory runs out in the first step or never."""
    lengths = [random.randint(1, 60) for _ in range(100)]
    for step in plan(sorted_in_step, lengths):
        in_this = [lengths[i] for i in flat(step)]
        assert in_this == sorted(in_this, reverse=True)


def test_every_step_is_a_draw_from_the_whole_set():
    """Long and short samples in each step: grouping by length over an epoch would not pass."""
    lengths = [10] * 500 + [100] * 500
    random.shuffle(lengths)
    shares = [
        sum(lengths[i] == 100 for i in flat(step)) / 50 for step in plan(sorted_in_step, lengths, global_batch_size=50)
    ]
    assert all(0.2 < share < 0.8 for share in shares)  # 4 standard deviations of a draw


def test_padding_on_realistic_lengths():
    """Log-normal like instruction data. Sorted in the step it is a few percent; as drawn it would be near a half."""
    lengths = [min(1024, max(8, round(random.lognormvariate(4.9, 0.6)))) for _ in range(2000)]
    steps = plan(sorted_in_step, lengths, global_batch_size=128, micro_batch_tokens=1024)
    positions = sum(len(m) * max(lengths[i] for i in m) for step in steps for m in step)
    assert 1 - sum(lengths) / positions < 0.08


def test_epochs_and_seeds_do_not_share_generators():
    """A generator per (seed, epoch): neighbouring pairs give unrelated orders."""
    pairs = [(seed, epoch) for seed in range(4) for epoch in range(4)]
    orders = {tuple(torch.randperm(20, generator=batching.generator(*pair)).tolist()) for pair in pairs}
    assert len(orders) == len(pairs)


def test_in_order_takes_everything_once():
    lengths = torch.tensor([random.randint(1, 60) for _ in range(77)])
    micro_batches = in_order(lengths, 200)
    assert sorted(flat(micro_batches)) == list(range(77))
    assert all(len(m) == 1 or len(m) * lengths[m].max() <= 200 for m in micro_batches)
