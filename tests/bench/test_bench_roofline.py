"""bench/operations.py counts FLOPs and bytes as formulas say, for every operation; bench/roofline.py adds them up."""

import dataclasses
import itertools
import json
import weakref
from collections import Counter
from unittest.mock import patch

import pytest
import torch

import prepare_data
from bench import operations, roofline
from bench.machine import rates, replay
from bench.operations import Operation, Operations, Spec
from bench.shapes import SHAPES
from training.memory import plan
from weights.families import config_from_json

LLAMA = config_from_json(SHAPES["Llama-2-7B"])
TINY = config_from_json(
    SHAPES["Mistral-7B"]
    | dict(
        vocab_size=97, hidden_size=144, intermediate_size=88, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=3, head_dim=24,
    )
)  # fmt: skip
aten = torch.ops.aten


def counted(work, *tensors, **how):
    """The operations of `work(*tensors)`: those with a cost, and the mode."""
    with Operations(**how) as mode, torch.no_grad():
        work(*tensors)
    return list(mode.counts.elements()), mode


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


# --------------------------------------------------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize(
    "work, shapes",
    [
        (lambda a, b: a @ b, [(5, 7), (7, 3)]),
        (lambda a, b, y: torch.mm(a, b, out=y), [(5, 7), (7, 3), (5, 3)]),
        (lambda a, b, y: y.addmm_(a, b), [(5, 7), (7, 3), (5, 3)]),
        (lambda a, b, y: torch.addmm(y, a, b), [(5, 7), (7, 3), (3,)]),
    ],
)
def test_flops_of_products(work, shapes):
    (operation,), _ = counted(work, *(meta(*shape) for shape in shapes))
    assert operation.flops == 2 * 5 * 7 * 3 and operation.kind == "products"


def test_flops_of_a_batch_and_of_an_adapter():
    (batch,), _ = counted(torch.bmm, meta(2, 5, 7), meta(2, 7, 3))
    assert batch.flops == 2 * 2 * 5 * 7 * 3
    (thin,), _ = counted(torch.mm, meta(90, 70), meta(70, 3), ranks=(3, 6))
    assert thin.kind == "adapter"


@pytest.mark.parametrize("window", [0, 1, 5, 200])
def test_flops_of_attention_are_those_of_its_tiles(window):
    """Every tile with a pair of a query and a key that it sees is computed whole (but for queries after the end)."""
    queries, keys = 4, 3
    pairs = 0
    for length in (1, 7, 22):
        sees = torch.tensor([[0 <= i - j < (window or length) for j in range(length)] for i in range(length)])
        for rows in sees.split(queries):
            seen = rows.any(0).nonzero().flatten()
            first = int(seen.min()) // keys
            # From the first tile on, which begins at a multiple of its size, to the query's own key.
            pairs += len(rows) * (-(-(int(seen.max()) + 1 - first * keys) // keys)) * keys
    assert operations.attention_flops(2, 8, [1, 7, 22], window, (queries, keys)) == 4 * 2 * 8 * pairs
    assert operations.attention_flops(2, 8, [1, 7, 22], window, (queries, keys), True) == 10 * 2 * 8 * pairs


def job(config, method="lora", device="meta", **changes):
    return dataclasses.replace(roofline.job_of(config, method, False, 2), device=device, **changes)


@pytest.mark.parametrize("method, per_weight", [("lora", 4), ("qlora", 4), ("full", 6)])
def test_flops_of_a_7b_step_are_those_of_its_weights(method, per_weight):
    T, targets, D = 96, 50, LLAMA.hidden_size
    counts = operations.micro_batch(job(LLAMA, method), plan.packed_shape(T, 40, targets)).counts
    head = LLAMA.vocab_size * D
    blocks = roofline.matrix_weights(LLAMA) - head
    assert blocks + 2 * head + (2 * LLAMA.num_hidden_layers + 1) * D == 6_738_415_616  # what is published
    expected = per_weight * (T * blocks + targets * head)
    if method != "full":  # nobody needs the gradient of what the first q, k and v get
        expected -= 2 * T * 3 * D * D
    found = sum(count * o.flops for o, count in counts.items() if o.kind == "products")
    assert found == expected
    attention = sum(count * o.flops for o, count in counts.items() if o.kind == "attention")
    assert attention == 32 * 14 * 32 * 128 * (40 * 64 + 40 * 64 + 16 * 64)  # one tile of keys for each sample


# --------------------------------------------------------------------------------------------------------------- bytes

X = 2 * 6 * 10  # bytes of a bf16 tensor of (6, 10)


@pytest.mark.parametrize(
    "work, read, written",
    [
        (lambda x, y: x + y, 2 * X, X),
        (lambda x, y: x.add_(y), 2 * X, X),
        (lambda x, y: x * x, X, X),
        (lambda x, y: x.mul_(2.0), X, X),
        (lambda x, y: x.copy_(y), X, X),
        (lambda x, y: x.zero_(), 0, X),
        (lambda x, y: torch.zeros_like(x), X, X),
        (lambda x, y: x.float(), X, 2 * X),
        (lambda x, y: torch.add(x, y, out=x), 2 * X, X),
        (lambda x, y: x[2:4] + y[:2], 2 * X // 3, X // 3),
        (lambda x, y: x[:1].expand(6, 10) + y, X // 6 + X, X),
        (lambda x, y: torch.cat([x, y, x]), 2 * X, 3 * X),
        (lambda x, y: x.t().contiguous(), X, X),
        (lambda x, y: torch.addmm(x[:, :6], x, y.t(), beta=0), 2 * X, 6 * X // 10),
        (lambda x, y: torch.addmm(x[:, :6], x[:, 6:], y.t()[:4], beta=1), X + 4 * X // 10, 6 * X // 10),
        (lambda x, y: aten.select_backward(x[0], (6, 10), 0, 1), X // 6, 2 * X),
    ],
)
def test_bytes(work, read, written):
    found, mode = counted(work, meta(6, 10), meta(6, 10))
    assert (sum(o.read for o in found), sum(o.written for o in found)) == (read, written) and not mode.unknown


def test_only_rows_that_are_looked_up_are_read():
    index = meta(4, dtype=torch.int64)
    (rows,), _ = counted(lambda x, i: x[i], meta(500, 10), index)
    assert (rows.read, rows.written) == (4 * 10 * 2 + 4 * 8, 4 * 10 * 2)
    (rows,), _ = counted(torch.nn.functional.embedding, index, meta(500, 10))
    assert (rows.read, rows.written) == (4 * 10 * 2 + 4 * 8, 4 * 10 * 2)
    (added,), _ = counted(lambda x, i, y: x.index_add_(0, i, y), meta(500, 10), index, meta(4, 10))
    assert added.bytes < 500 * 10


def test_views_metadata_and_allocations_are_free():
    def work(x):
        x.view(60).detach()[3:].unsqueeze(0).transpose(0, 1)
        x.t().split(2)
        torch.empty_like(x)
        x.new_empty(5)
        torch.promote_types(x.dtype, torch.float32)

    found, mode = counted(work, meta(6, 10))
    assert not found and not mode.unknown


def test_an_operation_without_a_cost_is_named():
    library = torch.library.Library("roofline_test", "DEF")
    library.define("mystery(int n) -> int")
    library.impl("mystery", lambda n: n, "CompositeExplicitAutograd")
    _, mode = counted(lambda x: torch.ops.roofline_test.mystery(3), meta(1))
    assert mode.unknown == {"roofline_test::mystery"}


@pytest.mark.parametrize("method", roofline.METHODS)
def test_every_operation_of_a_step_has_a_cost(method):
    shape = plan.packed_shape(77, 30, 50)
    for recompute in (0.0, 1.0):
        trace = operations.micro_batch(job(TINY, method, recompute=recompute), shape)
        assert not trace.unknown
        costly = {o.kind for o in trace.counts}
        assert {"products", "attention", "norm", "rotation", "activation", "loss"} <= costly
        assert ("dequantising" in costly) == (method == "qlora") and ("adapter" in costly) == (method != "full")


def test_the_optimizer_reads_what_torchs_does():
    parameter = torch.nn.Parameter(torch.ones(30, 20))
    parameter.grad = torch.ones(30, 20)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    optimizer.step()
    with Operations() as mode:
        optimizer.step()
    (theirs,) = [o for o in mode.counts if o.name == "aten::_fused_adamw_"]
    *_, ours = operations.update(parameter, job(TINY))
    assert ours.read == theirs.read - 4  # its number of steps
    assert ours.written == 3 * parameter.nbytes


# ----------------------------------------------------------------------------------------------------------- all blocks


def test_nothing_is_copied_around_attention():
    names = {o.name for o in operations.micro_batch(job(TINY), plan.packed_shape(77, 30, 50)).counts}
    assert "torch_attn::_varlen_attn_backward" in names
    assert not names & {"aten::select_backward", "aten::clone"}


def test_an_adapters_gradients_come_in_fp32_without_a_cast():
    """A cast of so small a matrix takes as long as its launch: there were eleven in each block."""
    counts = operations.micro_batch(job(TINY), plan.packed_shape(77, 30, 50)).counts
    cast = [o for o in counts if o.name == "aten::_to_copy" and o.specs()[0].dtype == torch.bfloat16]
    assert not [o for o in cast if 16 in o.specs()[0].shape]
    gradients = [o for o in counts if o.name == "aten::addmm" and torch.float32 in o.arguments]
    assert gradients and all(o.flops and o.kind == "adapter" for o in gradients)


@pytest.mark.parametrize("method", roofline.METHODS)
@pytest.mark.parametrize("recompute", [0.0, 1.0])
def test_two_blocks_stand_for_all(method, recompute):
    given = job(TINY, method, recompute=recompute)
    trace = lambda: operations.micro_batch(given, plan.packed_shape(77, 30, 50))  # noqa: E731
    updates = lambda: operations.optimizer_step(given)  # noqa: E731
    quick = trace(), updates()
    with patch.object(operations, "equal_blocks", lambda job: False):
        assert (trace(), updates()) == quick


@pytest.mark.parametrize("quantize", [None, "bnb.nf4"])
def test_two_blocks_stand_for_all_of_a_token(quantize):
    given = plan.Job(TINY, "meta", torch.bfloat16, quantize=quantize)
    quick = operations.token(given, 2, 19)
    with patch.object(operations, "equal_blocks", lambda job: False):
        assert operations.token(given, 2, 19) == quick
    assert not quick.unknown
    (attention,) = [o for o in quick.counts if o.kind == "attention"]
    assert quick.counts[attention] == 4 and attention.read >= roofline.bytes_of_cache(TINY, 2, 20) / 4


def test_a_decoded_token_reads_every_weight_once():
    given = plan.Job(LLAMA, "meta", torch.bfloat16)
    counts = operations.token(given, 1, 100).counts
    read = sum(count * o.read for o, count in counts.items() if o.kind == "products")
    assert read == pytest.approx(roofline.bytes_of_weights(given), rel=1e-3)


def test_blocks_that_differ_are_all_traced():
    assert operations.equal_blocks(job(TINY)) and not operations.equal_blocks(job(TINY, recompute=0.5))
    windows = dataclasses.replace(TINY, windows=(5, None, 5, None))
    assert not operations.equal_blocks(job(windows))


# ---------------------------------------------------------------------------------------------------------------- time


def product(n):
    (operation,), _ = counted(torch.mm, meta(n, n), meta(n, n))
    return operation


def test_an_operation_takes_the_longer_of_flops_and_bytes():
    card = roofline.CARDS["A100-40GB"]
    large, small = product(8192), product(16)
    assert roofline.times_of(large, card).limit == pytest.approx(2 * 8192**3 / 312e12)
    assert roofline.times_of(small, card).limit == pytest.approx(3 * 2 * 16**2 / 1555e9)
    for operation in (large, small):
        limit, predicted = roofline.times_of(operation, card)
        assert predicted > limit / 0.9 > limit
    copied = counted(lambda x: x.clone(), meta(1000, 1000))[0][0]
    assert roofline.times_of(copied, card).predicted == pytest.approx(4e6 / 1555e9 * 4800 / 4300 + roofline.LAUNCH)


def test_many_small_kernels_take_as_long_as_their_launches():
    times = roofline.step_times(Counter({product(16): 1000}), roofline.CARDS["H200"])
    assert times.predicted == pytest.approx(1000 * roofline.HOST)


def test_the_script_prints_its_tables(run_script):
    flags = ("--models", "[Mistral-7B]", "--methods", "[qlora]", "--cards", "[H200]", "--tokens", 512)
    code, out, err = run_script("bench/roofline.py", *flags)
    assert code == 0 and not err, err
    assert "Predictions, not measurements" in out
    tables = [list(lines) for is_table, lines in itertools.groupby(out.splitlines(), lambda line: line[:1] == "|")
              if is_table]  # fmt: skip
    training, kinds, kernels, decoding = ([[c.strip() for c in line.split("|")[1:-1]] for line in t] for t in tables)
    row = dict(zip(training[0], training[2], strict=True))
    at_limits, predicted = (float(row[name].replace(",", "")) for name in ("at limits", "predicted"))
    assert 0 < predicted < at_limits and row["fits"] == "yes" and 0 < int(row["MFU"][:-1]) < 100
    shares = [float(line[kinds[0].index("share")][:-1]) for line in kinds[2:]]
    assert sum(shares) == pytest.approx(100, abs=1) and shares == sorted(shares, reverse=True)
    assert "dequantising" in {line[0] for line in kinds[2:]} and len(kernels) > 10
    for line in decoding[2:]:
        row = dict(zip(decoding[0], line, strict=True))
        assert float(row["predicted"].replace(",", "")) < float(row["weights once"].replace(",", ""))


# ------------------------------------------------------------------------------------------------- on this machine


@pytest.mark.parametrize("method", roofline.METHODS)
def test_every_operation_of_a_step_can_be_timed_and_found_again(method):
    """At another size: what is looked up for a step was timed in another micro-batch, whatever its kind."""
    given = job(TINY, method, device="cpu")
    small, large = plan.packed_shape(61, 25, 37), plan.packed_shape(113, 50, 71)
    recorded = replay.record(given, small)
    assert recorded.counts == operations.micro_batch(given, small).counts
    found = replay.measured(recorded, roofline.sizes(given, small), bandwidth=1e10)
    step = operations.micro_batch(given, large).counts
    missing = {o.name for o in step if rates.key(o, roofline.sizes(given, large)) not in found.timed}
    assert missing <= {"aten::bucketize", "aten::index", "aten::lift_fresh"}  # of offsets, one for each sample
    assert all(found.seconds(o, roofline.sizes(given, large)) > 0 for o in step)


def test_time_grows_with_the_work():
    one = Operation("add", "", aten.add.Tensor, (Spec(torch.float32, (10,), (1,), 0),), (), 0, 40, 40)
    known = rates.Rates({rates.key(one, {10}): (5e-6, 80)}, least=1e-6, products=1e9, bandwidth=1e9)
    assert known.seconds(one, {10}) == pytest.approx(5e-6)
    twice = one._replace(read=80, written=80)
    assert known.seconds(twice, {10}) == pytest.approx(9e-6)
    assert known.seconds(twice, {11}) == pytest.approx(1e-6 + 160 / 1e9)  # not timed: a copy
    assert known.seconds(twice._replace(flops=5000), {11}) == pytest.approx(1e-6 + 5e-6)


def recorded(work, *tensors):
    with replay.Recorded() as mode, torch.no_grad():
        work(*tensors)
    return mode


def test_operations_are_replayed_in_order_on_the_tensors_that_they_had():
    """A view is of the tensor it was of; what is written in place is there for the next one."""

    def work(x, index):
        y = x[1:].t() * 2.0
        y[:3].add_(1.0)
        z = torch.empty_like(y)
        z.copy_(y)
        return z[:, index.add(1)]

    seen = []
    real = replay.elapsed

    def elapsed(function, arguments, named):
        taken, out = real(function, arguments, named)
        seen.append((function._schema.name, arguments, out))
        return taken, out

    mode = recorded(work, torch.empty(6, 4), torch.zeros(2, dtype=torch.int64))
    with patch.object(replay, "elapsed", elapsed):
        replay.replay(mode)
    names = [name.removeprefix("aten::") for name, _, _ in seen]
    assert names == ["mul", "add_", "copy_", "add", "index"]
    (x, _), y = seen[0][1], seen[0][2]
    assert x.shape == (4, 5) and x.storage_offset() == 4 and x.std() > 0
    twice = 2 * x
    twice[:3] += 1
    assert torch.equal(y, twice) and seen[1][1][0].data_ptr() == y.data_ptr()
    z = seen[2][2]
    assert torch.equal(z, y) and z.data_ptr() != y.data_ptr() and seen[4][1][0].data_ptr() == z.data_ptr()


def test_a_replayed_tensor_lives_until_nothing_takes_it():
    alive = []

    def work(x):
        y = x + 1
        z = y + x
        z + 1

    def elapsed(function, arguments, named):
        alive.append([ref() is not None for ref in refs])
        out = function(*arguments, **named)
        refs.append(weakref.ref(out.untyped_storage()))
        return 1.0, out

    refs, mode = [], recorded(work, torch.empty(3))
    with patch.object(replay, "elapsed", elapsed):
        seconds = replay.replay(mode)
    assert sum(seconds) == 3
    assert alive == [[], [True], [False, True]]


def test_a_cpu_is_predicted_and_measured(tiny_model_dir, tmp_path, run_script):
    rows = ({"prompt": f"what is {i}?", "completion": "yes and no " * (i % 5 + 1)} for i in range(40))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_data.main(
        prepare_data.Settings(data=tmp_path / "rows.jsonl", checkpoint_dir=tiny_model_dir, out_dir=tmp_path / "data")
    )
    flags = {
        "device": "cpu", "checkpoint_dir": tiny_model_dir, "data_dir": tmp_path / "data", "samples": 4, "runs": 2,
        "tokens": 200, "out_file": tmp_path / "roofline.jsonl",
    }  # fmt: skip
    code, out, err = run_script("bench/roofline.py", *(f"--{name}={value}" for name, value in flags.items()))
    assert code == 0, err
    lines = list(map(json.loads, (tmp_path / "roofline.jsonl").read_text().splitlines()))
    assert len(lines) == 2
    for line in lines:
        assert line["ratio"] == pytest.approx(line["predicted"] / line["measured"])
        assert sum(line["parts"].values()) == pytest.approx(line["predicted"]) and line["parts"]["attention"] > 0
    assert f"median of 2: {sum(line['ratio'] for line in lines) / 2:.3f}" in out
