"""Every way to attend against attention written out, and each sample of a packed row against itself alone."""

import pytest
import torch
import torch.nn.functional as F

from ops.attention import (
    attend,
    attention_mask,
    compiled_attention,
    fast_varlen_attention,
    plain_attention,
    plain_varlen_attention,
)
from ops.cpp import compiled_library

LENGTHS = (5, 1, 40, 17, 2)
needs_compiler = pytest.mark.skipif(not compiled_library("kernels_cpu"), reason="no C++ compiler")
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def packed(lengths, H, K, d, **options):
    """Random q, k, v with gradients, as a transposed view like the model's, and the offsets of the samples."""
    T = sum(lengths)
    q, k, v = (torch.randn(1, T, heads, d, **options).transpose(1, 2).requires_grad_() for heads in (H, K, K))
    offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(q.device, torch.int32)
    return (q, k, v), offsets


def windowed_attention(q, k, v, window):
    """One sample alone, written out. With `window`, keys further back are hidden."""
    if window is None:
        return plain_attention(q, k, v)
    T, groups = q.size(2), q.size(1) // k.size(1)
    scores = q @ k.repeat_interleave(groups, 1).transpose(-2, -1) * q.size(-1) ** -0.5
    back = torch.arange(T)[:, None] - torch.arange(T)
    weights = scores.masked_fill((back < 0) | (back >= window), -torch.inf).softmax(-1)
    return weights @ v.repeat_interleave(groups, 1)


@pytest.mark.parametrize("window", [None, 3, 1])
@pytest.mark.parametrize("H, K", [(6, 6), (6, 2)])
def test_each_sample_gets_what_it_gets_alone(H, K, window):
    inputs, offsets = packed(LENGTHS, H, K, 8)
    y = plain_varlen_attention(*inputs, offsets.tolist(), window)
    samples = zip(*(x.split(LENGTHS, dim=2) for x in inputs), strict=True)
    alone = torch.cat([windowed_attention(*sample, window) for sample in samples], dim=2)
    assert_alike(y, alone, inputs)


@pytest.mark.parametrize("window", [None, 3])
def test_a_later_sample_does_not_change_an_earlier_one(window):
    (q, k, v), offsets = packed(LENGTHS, 4, 2, 8)
    before = plain_varlen_attention(q, k, v, offsets.tolist(), window)[:, :, :46]
    with torch.no_grad():
        k[:, :, 46:], v[:, :, 46:] = 100, torch.nan
    assert torch.equal(plain_varlen_attention(q, k, v, offsets.tolist(), window)[:, :, :46], before)


@pytest.mark.parametrize("window", [None, 3, 64])
@pytest.mark.parametrize("H, K", [(8, 8), (8, 2)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
def test_the_fast_kernel_agrees_with_the_plain_path(H, K, window, dtype, tolerance, device):
    lengths = (*LENGTHS, 300, 129)
    inputs, offsets = packed(lengths, H, K, 64, dtype=dtype, device=device)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    y, expected = (
        fast_varlen_attention(*inputs, offsets, max(lengths), window),
        plain_varlen_attention(*exact, offsets.tolist(), window),
    )
    grad = torch.randn_like(y)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, atol=tolerance, rtol=tolerance)
    gradients = torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, exact, grad.float())
    for got, wanted in zip(*gradients, strict=True):
        assert (got.float() - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
def test_the_fast_kernel_compiles_without_a_break(device):
    compiled = torch.compile(fast_varlen_attention, fullgraph=True, dynamic=True)
    for lengths in (LENGTHS, (70, 30), (8, 9, 10, 11)):
        (q, k, v), offsets = packed(lengths, 4, 2, 64, dtype=torch.bfloat16, device=device)
        y, expected = (f(q, k, v, offsets, max(lengths)) for f in (compiled, fast_varlen_attention))
        torch.testing.assert_close(y, expected, atol=1e-2, rtol=1e-2)
        got, wanted = (torch.autograd.grad(out.float().square().sum(), q)[0] for out in (y, expected))
        assert (got.float() - wanted.float()).norm() < 2e-2 * wanted.float().norm()


def test_torch_traces_the_fast_kernel_forward_and_backward():
    """Without a GPU: torch.compile finds one graph, with the kernel and its gradient as operations that it knows."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    called = []

    def record(graph, inputs):
        nodes = graph.graph.nodes
        called.extend(str(node.target) for node in nodes if "varlen" in str(node.target))
        values = [node and node.meta["val"] for node in graph.graph.output_node().args[0]]
        blank = [None if value is None else (tuple(value.shape), value.dtype) for value in values]
        return make_boxed_func(lambda *_: [like and torch.zeros(like[0], dtype=like[1]) for like in blank])

    (q, k, v), offsets = packed(LENGTHS, 4, 2, 64, dtype=torch.bfloat16)
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    y = torch.compile(fast_varlen_attention, backend=backend, fullgraph=True)(q, k, v, offsets, 40, 7)
    assert y.shape == q.shape
    y.sum().backward()
    assert called == ["torch_attn._varlen_attn.default", "torch_attn._varlen_attn_backward.default"]


# --------------------------------------------------------------------------------------------------------- on a CPU


@pytest.mark.parametrize("H, K, T", [(6, 3, 1), (6, 3, 2), (9, 3, 60), (4, 4, 33), (8, 1, 128)])
def test_plain_attention_is_the_fused_one(H, K, T):
    q = torch.randn(3, H, T, 16, requires_grad=True)
    k, v = (torch.randn(3, K, T, 16, requires_grad=True) for _ in range(2))
    assert_alike(plain_attention(q, k, v), attend(q, k, v, None), (q, k, v))


def assert_alike(y, expected, inputs):
    """The same result and the same gradients, from a random gradient of the result."""
    grad = torch.randn_like(y)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    gradients = (torch.autograd.grad(result, inputs, grad, retain_graph=True) for result in (y, expected))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("d", [8, 64, 40])
@pytest.mark.parametrize("window", [None, 2, 9, 100])
@pytest.mark.parametrize("H, K", [(6, 6), (9, 3), (4, 1)])
def test_compiled_attention_is_the_plain_one(H, K, window, d):
    inputs, offsets = packed((*LENGTHS, 200, 64, 129), H, K, d)
    y = compiled_attention(*inputs, offsets.tolist(), window)
    assert_alike(y, plain_varlen_attention(*inputs, offsets.tolist(), window), inputs)


@needs_compiler
@pytest.mark.parametrize("window", [None, 5])
def test_compiled_attention_of_several_rows(window):
    q, k, v = (torch.randn(3, 40, heads, 8).transpose(1, 2).requires_grad_() for heads in (6, 2, 2))
    mask = attention_mask(40, 40, window, None, q.device)
    y = compiled_attention(q, k, v, [0, 40, 80, 120], window)
    assert_alike(y, plain_attention(q, k, v, None if mask is None else mask[0, 0]), (q, k, v))


@needs_compiler
def test_compiled_attention_takes_any_layout():
    q, k, v = (torch.randn(1, heads, 40, 8, requires_grad=True) for heads in (6, 2, 2))  # not as the model has it
    assert_alike(compiled_attention(q, k, v, [0, 40]), plain_attention(q, k, v), (q, k, v))


@needs_compiler
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float16)])
def test_compiled_attention_of_what_autocast_hands_over(dtypes):
    inputs, offsets = packed((20, 30), 4, 2, 8)
    q, k, v = (x.to(dtype) for x, dtype in zip(inputs, (dtypes[0], *[dtypes[1]] * 2), strict=True))
    y = compiled_attention(q, k, v, offsets.tolist())
    expected = plain_varlen_attention(q.float(), k.float(), v.float(), offsets.tolist())
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(result.square().sum(), inputs, retain_graph=True) for result in (y, expected)]
    for one, other in zip(*grads, strict=True):
        assert (one - other).norm() < 1e-2 * other.norm()  # rounded on their way through 16 bits


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
def test_compiled_attention_gives_the_same_bits_again(threads):
    inputs, offsets = packed((200, 56, 70), 6, 2, 16, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    for count in (1, threads, threads):
        torch.set_num_threads(count)
        y = compiled_attention(*inputs, offsets.tolist())
        results.append((y, *torch.autograd.grad(y.float().square().sum(), inputs)))
    torch.set_num_threads(before)
    assert all(torch.equal(x, z) for result in results[1:] for x, z in zip(results[0], result, strict=True))


@needs_compiler
@pytest.mark.parametrize("window", [None, 50])
def test_compiled_attention_in_bf16_is_about_as_close_as_torchs(window):
    exact, offsets = packed((200, 56, 1), 6, 2, 16)
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    results = [
        attention(*inputs, offsets.tolist(), window)
        for attention, inputs in (
            (plain_varlen_attention, exact),
            (compiled_attention, rounded),
            (plain_varlen_attention, rounded),
        )
    ]
    assert results[1].dtype == torch.bfloat16
    grad = torch.randn_like(results[0])
    gradients = [
        torch.autograd.grad(y, inputs, grad.to(y.dtype))
        for y, inputs in zip(results, (exact, rounded, rounded), strict=True)
    ]
    for wanted, ours, theirs in zip(*([y, *grads] for y, grads in zip(results, gradients, strict=True)), strict=True):
        assert (ours - wanted).norm() < 1.5 * (theirs - wanted).norm() < 0.05 * wanted.norm()


@needs_compiler
def test_a_nan_does_not_vanish_in_compiled_attention():
    inputs, offsets = packed((20, 30), 4, 2, 8)
    with torch.no_grad():
        inputs[1][0, 0, 5, 0] = torch.nan
    y = compiled_attention(*inputs, offsets.tolist())
    seen = y.isnan().any(dim=-1)[0]  # (H, T): the heads that share the key head, from its position on
    assert seen[:2, 5:20].all() and seen.sum() == 2 * 15
