"""FlexAttention, uncompiled and as torch.compile traces it, against the plain form; its block masks against torch's.

Here, without a GPU, it is torch's own reference that runs, with all scores in memory. torch.compile makes kernels of it
on CUDA alone: tests/training/test_gpu.py.
"""

import pytest
import torch
from test_scores import KINDS, assert_alike, each_kind, packed, plain, scores
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torchs

from model import Layout
from ops import flex
from ops.attention import Attend, _Counted, cpp_attention, flex_attention
from ops.cpp import compiled_library
from training.metrics import flop_counter

LENGTHS = (5, 1, 140, 0, 128, 2, 70)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _gradients_on_a_cpu(monkeypatch):
    """torch refuses them, as its kernels for a CPU have none; what runs here does."""
    monkeypatch.setattr(torchs, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torchs, "_WARNINGS_SHOWN", {"flex_attention_performance"})  # that it is not compiled
    yield
    torch._dynamo.reset()


def attended(inputs, how, offsets):
    """`flex_attention` of rows or samples end to end."""
    mask = flex.block_mask(offsets, how.window, CPU)
    return flex_attention(*inputs, how, offsets, flex.score_function(how, CPU), mask)


@each_kind
@pytest.mark.parametrize("H, K, d, window", [(6, 6, 16, None), (9, 3, 10, 9), (2, 1, 1, 1), (3, 3, 40, 130)])
def test_flex_attention_is_the_plain_one(H, K, d, window, kind):
    inputs, offsets = packed(LENGTHS, H, K, d, kind)
    how = scores(kind, H, window, d)
    assert_alike(attended(inputs, how, offsets), plain(inputs, how, offsets), inputs)


@pytest.mark.parametrize("kind, window", [("scale", None), ("all", 20)])
def test_rows_of_a_batch_are_samples(kind, window):
    q, k, v = (torch.randn(3, 50, heads, 20).transpose(1, 2).requires_grad_() for heads in (6, 2, 2))
    inputs, how = (q, k, v, packed((1,), 6, 2, 20, kind)[0][3]), scores(kind, 6, window)
    assert_alike(attended(inputs, how, [0, 50, 100, 150]), plain(inputs, how), inputs)


@pytest.mark.parametrize("sink", [-200.0, 200.0])
def test_a_sink_far_below_or_above_the_scores(sink):
    (q, k, v, _), offsets = packed(LENGTHS, 4, 2, 8, "sinks")
    inputs, how = (q, k, v, torch.full((4,), sink, requires_grad=True)), scores("sinks", 4)
    assert_alike(attended(inputs, how, offsets), plain(inputs, how, offsets), inputs)


@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (128,), (129, 127), (300, 1, 212), (0, 512, 0)])
@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 1000])
def test_a_block_mask_is_the_one_that_torch_makes_of_all_pairs(lengths, window):
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    ours, T = flex.block_mask(offsets, window, CPU), offsets[-1]
    theirs = torchs.create_block_mask(ours.mask_mod, 1, 1, T, T, device="cpu")
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for side in ("kv", "q"):
        for name in (f"{side}_num_blocks", f"{side}_indices", f"full_{side}_num_blocks", f"full_{side}_indices"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=0)


def test_a_layout_makes_each_block_mask_once():
    layout = Layout(torch.zeros(1, 9, dtype=torch.int64), offsets=[0, 4, 9])
    assert layout.block_mask(None) is layout.block_mask(None) is not layout.block_mask(3)
    rows = Layout(torch.zeros(2, 9, dtype=torch.int64)).block_mask(None)
    assert rows.shape[-1] == 18
    assert rows.mask_mod(0, 0, *torch.tensor([[9, 17, 17, 5], [8, 9, 17, 6]])).tolist() == [False, True, True, False]


@pytest.mark.parametrize("kind", ["scale", "all"])
def test_torch_compiles_it_once_for_all_lengths(kind, monkeypatch):
    """One graph forward and one backward, without a break: what Inductor gets on CUDA, here run as it is."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex.attend, backend=counter, dynamic=True, fullgraph=True)
    monkeypatch.setattr(flex, "attend", compiled)
    for lengths in ((300, 41), (20, 300), (700,), (256, 257, 1000)):
        inputs, offsets = packed(lengths, 10, 5, 16, kind)
        how = scores(kind, 10, window=len(lengths) * 100)
        assert_alike(attended(inputs, how, offsets), plain(inputs, how, offsets), inputs)
        assert counter.frame_count == 1


def test_it_is_compiled_within_a_compiled_block_too(monkeypatch):
    """Which leaves attention alone (--compile), so that it would run uncompiled if torch took that for all within."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(flex, "attend", torch.compile(flex.attend, backend=counter, dynamic=True, fullgraph=True))
    monkeypatch.setattr(Attend, "__call__", torch.compiler.disable(Attend.__call__))
    inputs, offsets = packed((100, 241), 10, 5, 16, "all")
    how = scores("all", 10)
    known = {"score": flex.score_function(how, CPU), "mask": flex.block_mask(offsets, None, CPU)}
    attend = Attend(flex_attention, scores=how, offsets=offsets, **known)
    block = torch.compile(lambda q, *others: attend(q * 2, *others) + 1, backend="aot_eager", dynamic=True)
    q, *others = inputs
    assert_alike(block(*inputs), plain((q * 2, *others), how, offsets) + 1, inputs)
    assert counter.frame_count == 1


def test_blocks_with_activation_checkpointing(monkeypatch):
    compiled = torch.compile(flex.attend, backend="aot_eager", dynamic=True, fullgraph=True)
    monkeypatch.setattr(flex, "attend", compiled)
    inputs, offsets = packed((100, 200), 4, 2, 16, "all")
    how, grads = scores("all", 4, 50), []
    for again in (False, True):
        if again:
            y = torch.utils.checkpoint.checkpoint(attended, inputs, how, offsets, use_reentrant=False)
        else:
            y = attended(inputs, how, offsets)
        y.square().sum().backward()
        grads.append([x.grad.clone() for x in inputs])
        for x in inputs:
            x.grad = None
    torch.testing.assert_close(*grads)


@pytest.mark.skipif(not compiled_library("kernels_cpu"), reason="no C++ compiler")
def test_flops_are_those_of_any_other_attention():
    inputs, offsets = packed(LENGTHS, 6, 2, 16, "all")
    how, counts = scores("all", 6), []
    for forward in (cpp_attention, attended):
        with flop_counter() as counter:
            y = forward(*inputs, how, offsets) if forward is cpp_attention else forward(inputs, how, offsets)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    with flop_counter() as counter:
        cpp_attention(*inputs, how, offsets).sum().backward()
    x = torch.randn_like(inputs[0]).requires_grad_()
    with flop_counter() as passed_on:
        y = _Counted.apply(x, 2, offsets)
        y.sum().backward()
    assert torch.equal(x, y) and torch.equal(x.grad, torch.ones_like(x))
    assert passed_on.get_total_flops() == counter.get_total_flops()


@pytest.mark.parametrize(
    "head_dim, element_size, shared_memory, blocks",
    [
        (128, 2, 101376, "torch's"), (130, 2, 101376, "small"), (256, 2, 101376, "small"), (64, 4, 101376, "torch's"),
        (80, 4, 101376, "small"), (256, 4, 101376, "smallest"), (256, 4, 166912, "torch's"),
        (256, 2, 232448, "torch's"), (264, 2, 232448, "smallest"),
    ],
)  # fmt: skip
def test_blocks_fit_the_card(head_dim, element_size, shared_memory, blocks):
    assert flex.blocks_that_fit(head_dim, element_size, shared_memory) == blocks


def test_kinds_differ():
    """So that what is compared above is what each kind is there for."""
    (q, k, v, _), offsets = packed(LENGTHS, 4, 2, 16, "scale")
    sinks = torch.zeros(4)
    results = [
        attended((q, k, v, sinks if KINDS[kind].get("sinks") else None), scores(kind, 4), offsets) for kind in KINDS
    ]
    assert all(not torch.allclose(x, y) for i, x in enumerate(results) for y in results[:i])
