"""Soft cap, ALiBi and sinks in the C++ attention against the plain form, values and the gradients of all inputs."""

import pytest
import torch
import torch.nn.functional as F

from model import Layout
from ops.alibi import alibi_slopes
from ops.attention import Scores, choose_attention, cpp_attention, each_sample_attention, plain_attention
from ops.cpp import compiled_library

pytestmark = pytest.mark.skipif(not compiled_library("kernels_cpu"), reason="no C++ compiler")

LENGTHS = (5, 1, 40, 17, 2, 70)
KINDS = {
    "scale": dict(),
    "softcap": dict(softcap=1.5),
    "ALiBi": dict(slopes=True),
    "sinks": dict(sinks=True),
    "softcap and sinks": dict(softcap=0.8, sinks=True),
    "all": dict(softcap=3.0, slopes=True, sinks=True),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def scores(kind, H, window=None, d=8):
    """The `Scores` of a kind, for H heads of size d; not scaled by 1 / sqrt(d), as some families have it."""
    known = dict(KINDS[kind])
    slopes = alibi_slopes(H) if known.pop("slopes", False) else None
    return Scores(1.3 * d**-0.5, window, slopes=slopes, **known)


def packed(lengths, H, K, d, kind):
    """Random q, k, v with gradients, as a transposed view like the model's, the sinks (or None), and the offsets."""
    T = sum(lengths)
    q, k, v = (torch.randn(1, T, heads, d).transpose(1, 2).requires_grad_() for heads in (H, K, K))
    sinks = torch.randn(H).requires_grad_() if KINDS[kind].get("sinks") else None
    return (q, k, v, sinks), F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).tolist()


def plain(inputs, how, offsets=None):
    """`plain_attention` of whole rows, or of samples end to end in one."""
    layout = Layout(torch.zeros(len(inputs[0]), inputs[0].size(2), dtype=torch.int64), offsets=offsets)
    return plain_attention(*inputs, how, layout.mask(how.window), layout.back())


def results(y, inputs, grad):
    """y, and the gradients of the inputs that are there."""
    return y, *torch.autograd.grad(y, [x for x in inputs if x is not None], grad.to(y.dtype))


def assert_alike(y, expected, inputs, within=1e-5):
    grad = torch.randn_like(expected)
    for one, other in zip(results(y, inputs, grad), results(expected, inputs, grad), strict=True):
        assert one.dtype == other.dtype
        # A gradient is a sum over all positions, whose rounding is that of its largest terms.
        torch.testing.assert_close(one, other, atol=within * max(1, other.abs().max().item()), rtol=within)


@each_kind
@pytest.mark.parametrize("window", [None, 1, 9, 50])
@pytest.mark.parametrize("H, K, d", [(6, 6, 8), (9, 3, 10), (4, 1, 6), (3, 3, 40), (2, 1, 1), (2, 2, 80)])
def test_cpp_attention_is_the_plain_one(H, K, d, window, kind):
    inputs, offsets = packed(LENGTHS, H, K, d, kind)
    how = scores(kind, H, window, d)
    for attention in (cpp_attention, each_sample_attention):
        assert_alike(attention(*inputs, how, offsets), plain(inputs, how, offsets), inputs)


@each_kind
def test_a_model_of_any_family_attends_in_cpp(kind):
    """Rows of a batch and samples in one row, by what `choose_attention` chooses."""
    q, k, v = (torch.randn(3, 40, heads, 10).transpose(1, 2).requires_grad_() for heads in (6, 2, 2))
    inputs, how = (q, k, v, packed((1,), 6, 2, 10, kind)[0][3]), scores(kind, 6)
    attend = choose_attention(Layout(torch.zeros(3, 40, dtype=torch.int64)), 10, torch.float32, how)
    assert attend.function is cpp_attention
    assert_alike(attend(*inputs), plain(inputs, how), inputs)
    inputs, offsets = packed(LENGTHS, 6, 2, 10, kind)
    layout = Layout(torch.zeros(1, sum(LENGTHS), dtype=torch.int64), offsets=offsets)
    attend = choose_attention(layout, 10, torch.float32, how)
    assert attend.function is cpp_attention
    assert_alike(attend(*inputs), plain(inputs, how, offsets), inputs)


@each_kind
@pytest.mark.parametrize("window", [None, 20])
def test_bf16_is_about_as_close_as_the_plain_form_in_bf16(kind, window):
    """Products of bf16 numbers, summed in fp32; weights are rounded to bf16 before they multiply, as torch does."""
    inputs, offsets = packed((200, 56, 1), 6, 2, 16, kind)
    how, grad = scores(kind, 6, window), torch.randn(1, 6, 257, 16)
    given = [None if x is None else x.detach().bfloat16().requires_grad_() for x in inputs]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in given]
    every = [
        results(y, of, grad)
        for y, of in (
            (plain(exact, how, offsets), exact),
            (plain(given, how, offsets), given),
            (cpp_attention(*given, how, offsets), given),
        )
    ]
    for wanted, theirs, ours in zip(*every, strict=True):
        assert ours.dtype == theirs.dtype == torch.bfloat16
        limit = max(1.5 * (theirs - wanted).norm().item(), 2**-7 * wanted.norm().item())
        assert (ours - wanted).norm() < limit


def test_a_sink_takes_its_share():
    """Of one key: softmax over its score and the sink's."""
    q, k = (torch.full((1, 1, 1, 4), x) for x in (1.0, 0.5))
    sink = torch.tensor([0.7], requires_grad=True)
    y = cpp_attention(q, k, torch.full((1, 1, 1, 4), 3.0), sink, Scores(0.5, sinks=True), [0, 1])
    share = torch.sigmoid(torch.tensor(0.7 - 1.0))
    torch.testing.assert_close(y, torch.full((1, 1, 1, 4), 3.0) * (1 - share))
    y[..., 0].sum().backward()
    torch.testing.assert_close(sink.grad, -3 * (share * (1 - share))[None])


@pytest.mark.parametrize("sink", [-200.0, 200.0])
def test_a_sink_far_below_or_above_the_scores(sink):
    (q, k, v, _), offsets = packed(LENGTHS, 4, 2, 8, "sinks")
    inputs = q, k, v, torch.full((4,), sink, requires_grad=True)
    how = scores("sinks", 4)
    assert_alike(cpp_attention(*inputs, how, offsets), plain(inputs, how, offsets), inputs)
    without = cpp_attention(q, k, v, None, scores("scale", 4), offsets)
    y = cpp_attention(*inputs, how, offsets)
    assert torch.equal(y, without) if sink < 0 else y.abs().max() < 1e-6


def test_sinks_in_bf16_have_a_gradient_in_bf16_and_frozen_ones_none():
    (q, k, v, _), offsets = packed(LENGTHS, 4, 2, 8, "sinks")
    sinks = torch.randn(4).bfloat16().requires_grad_()
    y = cpp_attention(q, k, v, sinks, scores("sinks", 4), offsets)
    y.sum().backward()
    assert sinks.grad.dtype == torch.bfloat16 and q.grad.dtype == torch.float32
    frozen = sinks.detach()
    cpp_attention(q, k, v, frozen, scores("sinks", 4), offsets).sum().backward()
    assert frozen.grad is None


@each_kind
@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_bits_again(threads, kind):
    inputs, offsets = packed((70, 56, 20), 6, 2, 16, kind)
    before, every = torch.get_num_threads(), []
    for count in (1, threads, threads):
        torch.set_num_threads(count)
        y = cpp_attention(*inputs, scores(kind, 6), offsets)
        every.append(results(y, inputs, torch.ones_like(y)))
    torch.set_num_threads(before)
    assert all(torch.equal(x, z) for others in every[1:] for x, z in zip(every[0], others, strict=True))


@each_kind
def test_a_nan_does_not_vanish(kind):
    inputs, offsets = packed((20, 30), 4, 2, 8, kind)
    with torch.no_grad():
        inputs[1][0, 0, 5, 0] = torch.nan
    seen = cpp_attention(*inputs, scores(kind, 4), offsets).isnan().any(dim=-1)[0]
    assert seen[:2, 5:20].all() and seen.sum() == 2 * 15  # the heads that share the key head, from its position on
