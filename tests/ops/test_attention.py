"""Every way to attend against attention written out, and each sample of a packed row against itself alone."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen

from model import Layout
from ops import flex
from ops.attention import (
    Scores,
    causal_attention,
    choose_attention,
    cpp_attention,
    each_sample_attention,
    flash_varlen_attention,
    flex_attention,
    flex_stand_in,
    has_flash_attention,
    masked_attention,
    plain_attention,
    sdpa_attention,
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


def plain(q, k, v, offsets=None, window=None):
    """`plain_attention` of whole rows, or of samples end to end in one."""
    layout = Layout(torch.zeros(len(q), q.size(2), dtype=torch.int64, device=q.device), offsets=offsets)
    return plain_attention(q, k, v, None, scaled(q, window), layout.mask(window), layout.back())


def scaled(q, window=None):
    """The usual scores of queries (B, H, T, d)."""
    return Scores(q.size(-1) ** -0.5, window)


def fast(q, k, v, offsets, window=None):
    """`cpp_attention` with the usual scores."""
    return cpp_attention(q, k, v, None, scaled(q, window), offsets)


def by_samples(q, k, v, offsets, window=None):
    """`each_sample_attention` with the usual scores."""
    return each_sample_attention(q, k, v, None, scaled(q, window), offsets)


def flash(q, k, v, offsets, longest, window=None):
    """`flash_varlen_attention` with the usual scores."""
    return flash_varlen_attention(q, k, v, None, scaled(q, window), offsets, longest)


def fused(q, k, v, mask):
    """`sdpa_attention` with the usual scale."""
    return sdpa_attention(q, k, v, mask, q.size(-1) ** -0.5)


def one_by_one(q, k, v, window):
    """One sample alone, a query and a head at a time: what `plain_attention` itself is held to."""
    groups, heads = q.size(1) // k.size(1), []
    for head in range(q.size(1)):
        keys, values, rows = k[0, head // groups], v[0, head // groups], []
        for t, query in enumerate(q[0, head]):
            first = 0 if window is None else max(0, t + 1 - window)
            weights = (keys[first : t + 1] @ query / q.size(-1) ** 0.5).softmax(0)
            rows.append(weights @ values[first : t + 1])
        heads.append(torch.stack(rows))
    return torch.stack(heads)[None]


@pytest.mark.parametrize("window", [None, 3, 1])
@pytest.mark.parametrize("H, K", [(4, 4), (6, 2)])
def test_plain_attention_is_what_the_formula_says(H, K, window):
    inputs, offsets = packed((5, 1, 9), H, K, 8)
    samples = zip(*(x.split((5, 1, 9), dim=2) for x in inputs), strict=True)
    alone = torch.cat([one_by_one(*sample, window) for sample in samples], dim=2)
    assert_alike(plain(*inputs, offsets.tolist(), window), alone, inputs)


@pytest.mark.parametrize("window", [None, 3, 1])
@pytest.mark.parametrize("H, K", [(6, 6), (6, 2)])
def test_each_sample_gets_what_it_gets_alone(H, K, window):
    inputs, offsets = packed(LENGTHS, H, K, 8)
    y = by_samples(*inputs, offsets.tolist(), window)
    assert_alike(y, plain(*inputs, offsets.tolist(), window), inputs)
    samples = zip(*(x.split(LENGTHS, dim=2) for x in inputs), strict=True)
    alone = torch.cat([plain(*sample, window=window) for sample in samples], dim=2)
    assert_alike(y, alone, inputs)


@pytest.mark.parametrize("window", [None, 3])
def test_a_later_sample_does_not_change_an_earlier_one(window):
    (q, k, v), offsets = packed(LENGTHS, 4, 2, 8)
    before = by_samples(q, k, v, offsets.tolist(), window)[:, :, :46]
    with torch.no_grad():
        k[:, :, 46:], v[:, :, 46:] = 100, torch.nan
    assert torch.equal(by_samples(q, k, v, offsets.tolist(), window)[:, :, :46], before)


PRODUCTS, SOFTCAP, SINKS = Scores(0.3), Scores(0.3, softcap=2.0), Scores(0.3, sinks=True)
ALIBI, WINDOW = Scores(0.3, slopes=(0.5, 0.25)), Scores(0.3, window=4)
HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "device, dtype, head_dim, scores, way, way_in_a_packed_row",
    [
        ("cpu", FULL, 8, SOFTCAP, cpp_attention, cpp_attention),
        ("cpu", HALF, 6, WINDOW, cpp_attention, cpp_attention),
        ("cpu", torch.float16, 8, PRODUCTS, causal_attention, each_sample_attention),
        ("cpu", torch.float16, 8, WINDOW, masked_attention, each_sample_attention),
        ("cpu", torch.float16, 8, SINKS, masked_attention, each_sample_attention),
        *(
            (device, dtype, head_dim, scores, way, way)
            for device, other in (("cuda", flex_attention), ("meta", flex_stand_in))
            for dtype, head_dim, scores, way in [
                (HALF, 64, PRODUCTS, flash_varlen_attention),
                (torch.float16, 64, WINDOW, flash_varlen_attention),
                (HALF, 100, PRODUCTS, flash_varlen_attention),
                (HALF, 256, WINDOW, flash_varlen_attention),
                (HALF, 264, PRODUCTS, other),
                (HALF, 64, SOFTCAP, other),
                (HALF, 64, ALIBI, other),
                (HALF, 64, SINKS, other),
                (FULL, 64, PRODUCTS, other),
            ]
        ),
    ],
)
@needs_compiler
def test_which_way_is_taken_when(device, dtype, head_dim, scores, way, way_in_a_packed_row, packed, monkeypatch):
    """On CUDA too, where only what is made there has to be left out."""
    if device == "cuda":
        monkeypatch.setattr("ops.attention.has_flash_attention", lambda device: True)
        monkeypatch.setattr(Layout, "block_mask", lambda self, window: window)
        monkeypatch.setattr(flex, "score_function", lambda *known: None)
        monkeypatch.setattr("ops.attention.numbers_on", lambda device, values, dtype: values)
    shape = (1, 10) if packed else (2, 5)
    tokens = torch.zeros(shape, dtype=torch.int64, device="meta" if device == "cuda" else device)
    if device == "cuda":
        tokens = SimpleNamespace(shape=tokens.shape, size=tokens.size, device=torch.device("cuda"))
    attend = choose_attention(Layout(tokens, offsets=[0, 5, 10] if packed else None), head_dim, dtype, scores)
    assert attend.function is (way_in_a_packed_row if packed else way)
    if device == "cuda":
        assert attend.known["offsets"] == [0, 5, 10]
    if way is flex_attention:
        assert attend.known["mask"] == scores.window


@pytest.mark.parametrize("capability, packed_way", [((7, 5), each_sample_attention), ((8, 0), flash_varlen_attention)])
def test_a_card_before_ampere_is_not_given_what_it_has_no_kernels_for(capability, packed_way, monkeypatch):
    """As a T4: FlashAttention begins with compute capability 8.0."""
    has_flash_attention.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("ops.attention.numbers_on", lambda device, values, dtype: values)
    monkeypatch.setattr(Layout, "mask", lambda self, window: window)
    for shape, offsets, scores, way in (
        ((1, 10), [0, 5, 10], PRODUCTS, packed_way),
        ((1, 10), [0, 5, 10], WINDOW, packed_way),
        ((2, 5), None, PRODUCTS, causal_attention),
        ((2, 5), None, WINDOW, masked_attention),
    ):
        tokens = torch.zeros(shape, dtype=torch.int64)
        tokens = SimpleNamespace(shape=tokens.shape, size=tokens.size, device=torch.device("cuda"))
        attend = choose_attention(Layout(tokens, offsets=offsets), 64, torch.float16, scores)
        assert attend.function is (way if capability < (8, 0) else flash_varlen_attention)
    has_flash_attention.cache_clear()


def varlen_reference(q, k, v, starts, ends, longest, longest_key, scale, window_size, return_aux, enable_gqa=False):
    """What torch's operation computes, and that it is asked as it wants to be: q (T, H, d), starts (n + 1,) int32."""
    assert starts is ends and starts.dtype == torch.int32 and starts.diff().max() == longest == longest_key
    assert q.size(-1) % 8 == 0 and q.size(-1) <= 256 and enable_gqa == (q.size(1) != k.size(1))
    how = Scores(scale, window_size[0] + 1 or None)
    layout = Layout(torch.zeros(1, len(q), dtype=torch.int64), offsets=starts.tolist())
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    y = plain_attention(q, k, v, None, how, layout.mask(how.window), layout.back())
    return y[0].transpose(0, 1), torch.zeros(q.size(1), q.size(2))


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("H, K, d", [(6, 3, 8), (4, 4, 5), (9, 3, 12), (2, 1, 1)])
def test_the_fast_kernel_gets_samples_and_head_sizes_that_it_knows(H, K, d, window, monkeypatch):
    """Packed samples and rows of a batch, for heads of any size."""
    monkeypatch.setattr(varlen, "varlen_attn", varlen_reference)
    inputs, offsets = packed(LENGTHS, H, K, d)
    assert_alike(flash(*inputs, offsets, 40, window), plain(*inputs, offsets.tolist(), window), inputs)
    rows = [torch.randn(3, 20, heads, d).transpose(1, 2).requires_grad_() for heads in (H, K, K)]
    ends = torch.arange(0, 80, 20, dtype=torch.int32)
    assert_alike(flash(*rows, ends, 20, window), plain(*rows, window=window), rows)


@pytest.mark.parametrize("window", [None, 3, 64])
@pytest.mark.parametrize("H, K", [(8, 8), (8, 2)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
def test_the_fast_kernel_agrees_with_the_plain_path(H, K, window, dtype, tolerance, device):
    lengths = (*LENGTHS, 300, 129)
    inputs, offsets = packed(lengths, H, K, 64, dtype=dtype, device=device)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    y, expected = (
        flash(*inputs, offsets, max(lengths), window),
        plain(*exact, offsets.tolist(), window),
    )
    grad = torch.randn_like(y)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, atol=tolerance, rtol=tolerance)
    gradients = torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, exact, grad.float())
    for got, wanted in zip(*gradients, strict=True):
        assert (got.float() - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=NEEDS_GPU)])
def test_the_fast_kernel_compiles_without_a_break(device):
    compiled = torch.compile(flash, fullgraph=True, dynamic=True)
    for lengths in (LENGTHS, (70, 30), (8, 9, 10, 11)):
        (q, k, v), offsets = packed(lengths, 4, 2, 64, dtype=torch.bfloat16, device=device)
        y, expected = (f(q, k, v, offsets, max(lengths)) for f in (compiled, flash))
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
    y = torch.compile(flash, backend=backend, fullgraph=True)(q, k, v, offsets, 40, 7)
    assert y.shape == q.shape
    y.sum().backward()
    assert called == ["torch_attn._varlen_attn.default", "torch_attn._varlen_attn_backward.default"]


# --------------------------------------------------------------------------------------------------------- on a CPU


@pytest.mark.parametrize("H, K, T", [(6, 3, 1), (6, 3, 2), (9, 3, 60), (4, 4, 33), (8, 1, 128)])
def test_plain_attention_is_the_fused_one(H, K, T):
    q = torch.randn(3, H, T, 16, requires_grad=True)
    k, v = (torch.randn(3, K, T, 16, requires_grad=True) for _ in range(2))
    assert_alike(plain(q, k, v), fused(q, k, v, None), (q, k, v))
    mask = Layout(torch.zeros(3, T, dtype=torch.int64)).mask(7)
    assert_alike(plain(q, k, v, window=7), fused(q, k, v, mask), (q, k, v))


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
def test_cpp_attention_is_the_plain_one(H, K, window, d):
    inputs, offsets = packed((*LENGTHS, 200, 64, 129), H, K, d)
    y = fast(*inputs, offsets.tolist(), window)
    assert_alike(y, plain(*inputs, offsets.tolist(), window), inputs)


@needs_compiler
@pytest.mark.parametrize("window", [None, 5])
def test_cpp_attention_of_several_rows(window):
    q, k, v = (torch.randn(3, 40, heads, 8).transpose(1, 2).requires_grad_() for heads in (6, 2, 2))
    y = fast(q, k, v, [0, 40, 80, 120], window)
    assert_alike(y, plain(q, k, v, window=window), (q, k, v))


@needs_compiler
def test_cpp_attention_takes_any_layout():
    q, k, v = (torch.randn(1, heads, 40, 8, requires_grad=True) for heads in (6, 2, 2))  # not as the model has it
    assert_alike(fast(q, k, v, [0, 40]), plain(q, k, v), (q, k, v))


@needs_compiler
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float16)])
def test_cpp_attention_of_what_autocast_hands_over(dtypes):
    inputs, offsets = packed((20, 30), 4, 2, 8)
    q, k, v = (x.to(dtype) for x, dtype in zip(inputs, (dtypes[0], *[dtypes[1]] * 2), strict=True))
    y = fast(q, k, v, offsets.tolist())
    expected = plain(q.float(), k.float(), v.float(), offsets.tolist())
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(result.square().sum(), inputs, retain_graph=True) for result in (y, expected)]
    for one, other in zip(*grads, strict=True):
        assert (one - other).norm() < 1e-2 * other.norm()  # rounded on their way through 16 bits


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
def test_cpp_attention_gives_the_same_bits_again(threads):
    inputs, offsets = packed((200, 56, 70), 6, 2, 16, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    results = []
    for count in (1, threads, threads):
        torch.set_num_threads(count)
        y = fast(*inputs, offsets.tolist())
        results.append((y, *torch.autograd.grad(y.float().square().sum(), inputs)))
    torch.set_num_threads(before)
    assert all(torch.equal(x, z) for result in results[1:] for x, z in zip(results[0], result, strict=True))


@needs_compiler
@pytest.mark.parametrize("window", [None, 50])
def test_cpp_attention_in_bf16_is_about_as_close_as_torchs(window):
    exact, offsets = packed((200, 56, 1), 6, 2, 16)
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    results = [
        attention(*inputs, offsets.tolist(), window)
        for attention, inputs in (
            (by_samples, exact),
            (fast, rounded),
            (by_samples, rounded),
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
def test_a_nan_does_not_vanish_in_cpp_attention():
    inputs, offsets = packed((20, 30), 4, 2, 8)
    with torch.no_grad():
        inputs[1][0, 0, 5, 0] = torch.nan
    y = fast(*inputs, offsets.tolist())
    seen = y.isnan().any(dim=-1)[0]  # (H, T): the heads that share the key head, from its position on
    assert seen[:2, 5:20].all() and seen.sum() == 2 * 15


@pytest.mark.parametrize("H, K", [(6, 6), (6, 3), (6, 1)])
def test_a_token_gets_the_same_from_a_kernel_that_lays_heads_out_last(H, K, monkeypatch):
    """As CUDA's kernel for masks does: what it gives for heads that share keys cannot be viewed as heads."""
    fused = F.scaled_dot_product_attention
    heads_last = lambda *args, **how: fused(*args, **how).transpose(1, 2).contiguous().transpose(1, 2)  # noqa: E731
    monkeypatch.setattr(F, "scaled_dot_product_attention", heads_last)
    q, k, v, mask = (
        torch.randn(2, H, 1, 8),
        torch.randn(2, K, 9, 8),
        torch.randn(2, K, 9, 8),
        torch.rand(2, 1, 1, 9) < 0.6,
    )
    mask[..., 0] = True
    expected = plain_attention(q, k, v, None, Scores(0.3), mask, None)
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    for how in (mask, bias, bias.expand(2, H, 1, 9)):
        torch.testing.assert_close(sdpa_attention(q, k, v, how, 0.3), expected)
