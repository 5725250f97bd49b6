"""Each function written by hand against its plain reference: results and gradients, in fp32 to 1e-5."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from ops.activation import gated, plain_gated
from ops.dropout import plain_drop
from ops.dtypes import compute_dtype
from ops.linear import linear, stored_linear
from ops.loss import head_loss, plain_head_loss
from ops.low_rank import LowRank, low_rank_linears
from ops.norm import plain_rms_norm, rms_norm
from ops.rotation import plain_rotate, rotate

swiglu, plain_swiglu = partial(gated, "silu"), partial(plain_gated, "silu")


def rotate_one(x, cos, sin):
    """Queries; a key beside them."""
    return rotate(x, x[:, :1], cos, sin)[0]


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).requires_grad_()


def assert_alike(y, expected, inputs, within=1e-5):
    """The same result and the same gradients, from a random gradient of the result."""
    grad = torch.randn_like(expected)
    torch.testing.assert_close(y, expected, atol=within, rtol=within)
    for one, other in zip(*(torch.autograd.grad(result, inputs, grad) for result in (y, expected)), strict=True):
        assert other.norm() > 0 and one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=within, rtol=within)


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def assert_as_close(ours, plain, *inputs):
    """In bf16 our results and gradients are about as near to fp32's as those of the plain reference."""
    rounded = [x.detach().bfloat16().requires_grad_() for x in inputs]
    grad, every = None, []
    for function, given in ((plain, inputs), (plain, rounded), (ours, rounded)):
        y = function(*given)
        grad = torch.randn(y.shape) if grad is None else grad
        result = [y] if y.dim() else []  # a single number may be near by chance
        every.append(result + [*torch.autograd.grad(y, given, grad.to(y.dtype))])
    for exact, theirs, mine in zip(*every, strict=True):
        assert exact.norm() > 0 and (mine - exact).norm() < 1.2 * (theirs - exact).norm()


@pytest.mark.parametrize("shape", [(2, 5, 24), (1, 1, 8), (7, 3), (3, 50), (2, 64)])
def test_rms_norm(shape, threads):
    x, weight = random(*shape), random(shape[-1])
    assert_alike(rms_norm(x, weight, 1e-5), plain_rms_norm(x, weight, 1e-5), (x, weight))


def test_rms_norm_of_a_frozen_weight_and_of_zeros():
    x, weight = random(4, 8), torch.randn(8)
    assert_alike(rms_norm(x, weight, 1e-6), plain_rms_norm(x, weight, 1e-6), (x,))
    assert torch.equal(rms_norm(torch.zeros(2, 8), weight, 1e-6), torch.zeros(2, 8))


def test_rms_norm_in_bf16_is_as_close_as_the_plain_one():
    assert_as_close(lambda *x: rms_norm(*x, 1e-5), lambda *x: plain_rms_norm(*x, 1e-5), random(64, 96), random(96))


@pytest.mark.parametrize("shape", [(2, 5, 12), (1, 1, 1), (3, 5000)])
def test_swiglu(shape, way, threads):
    gate, up = random(*shape), random(*shape)
    assert_alike(swiglu(gate, up), plain_swiglu(gate, up), (gate, up))
    gate, up = (x.detach().transpose(0, 1).requires_grad_() for x in (gate, up))  # in another layout
    assert_alike(swiglu(gate, up), plain_swiglu(gate, up), (gate, up))


def test_swiglu_in_bf16_is_as_close_as_the_plain_one(way):
    assert_as_close(swiglu, plain_swiglu, random(40, 50), random(40, 50))


def test_swiglu_of_two_dtypes(way):
    gate, up = random(4, 50), torch.randn(4, 50).bfloat16()
    assert_alike(swiglu(gate, up), plain_swiglu(gate, up.float()), (gate,))


def test_swiglu_of_large_numbers(way):
    gate = torch.tensor([-1e30, -200.0, -90.0, -0.0, 90.0, 1e30, torch.inf, torch.nan], requires_grad=True)
    up = torch.full((8,), 0.5, requires_grad=True)
    y, expected = swiglu(gate, up), plain_swiglu(gate, up)
    torch.testing.assert_close(y, expected, equal_nan=True)
    grads = (torch.autograd.grad(result[:6].sum(), (gate, up)) for result in (y, expected))
    torch.testing.assert_close(*grads, equal_nan=True)


@pytest.mark.parametrize("angles", [(7, 4), (2, 1, 7, 4)])
def test_rotate(angles, way, threads):
    x, turns = random(2, 3, 7, 8), torch.randn(angles)
    y = rotate_one(x, turns.cos(), turns.sin())
    assert_alike(y, plain_rotate(x, turns.cos(), turns.sin()), (x,))
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)  # as the model has it
    assert torch.equal(rotate_one(transposed, turns.cos(), turns.sin()), y)


def test_rotate_in_bf16_is_as_close_as_the_plain_one(way):
    cos, sin = (f(torch.randn(9, 20)).bfloat16() for f in (torch.cos, torch.sin))
    ours, plain = (lambda x, f=f: f(x, cos.to(x.dtype), sin.to(x.dtype)) for f in (rotate_one, plain_rotate))
    assert_as_close(ours, plain, random(2, 3, 9, 40))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_multiplies_in_the_dtype_of_its_input(stored, trainable, bias):
    x, weight = random(2, 5, 12), torch.randn(7, 12, dtype=stored).requires_grad_(trainable)
    b = torch.randn(7, dtype=stored) if bias else None
    y = linear(x, weight, b)
    expected = F.linear(x, weight.float(), None if b is None else b.float())
    within = 1e-5 if stored == torch.float32 or not trainable else 1e-2  # its gradient is rounded to bf16
    assert_alike(y, expected, (x, weight) if trainable else (x,), within)


def test_a_cast_weight_is_not_kept():
    kept = []
    x, weight = random(3, 8), torch.randn(5, 8, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        linear(x, weight)
        stored_linear(x, weight.to)
    assert not kept


@pytest.mark.parametrize("ranks", [(3,), (3, 1, 5), (2, 70), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("shape", [(2, 5, 12), (1, 1, 12), (4, 12), (0, 12), (150, 12)])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_low_rank_linears(shape, ranks, stored, p, way, monkeypatch):
    """With dropout: the same elements are dropped in the backward pass, others in each layer."""
    seeds = [tuple(torch.randint(2**31, (2,)).tolist()) for _ in ranks]
    monkeypatch.setattr("ops.low_rank.new_seeds", iter(seeds).__next__)
    x, weights = random(*shape), [torch.randn(7 + 20 * r, 12, dtype=stored) for r in ranks]
    factors, scales = [(random(r, 12), random(7 + 20 * r, r)) for r in ranks], [0.5 / r for r in ranks]
    part = LowRank(0, x.shape[:-1].numel(), scales, factors)
    ys = low_rank_linears(x, [weight.to for weight in weights], [part], [p for _ in ranks])
    masks = [plain_drop(torch.ones(shape), p, seed) if p else 1 for seed in seeds]
    expected = [
        F.linear(x, weight.float()) + scale * F.linear(F.linear(x * mask, a), b)
        for weight, scale, mask, (a, b) in zip(weights, scales, masks, factors, strict=True)
    ]
    inputs = (x, *(matrix for pair in factors for matrix in pair))
    if x.numel():
        assert_close_in_norm(torch.cat(ys, dim=-1), torch.cat(expected, dim=-1), inputs)
    assert [y.shape for y in ys] == [y.shape for y in expected]


@pytest.mark.parametrize("lengths", [(4, 1, 3), (70, 1, 130)])
def test_positions_have_low_rank_layers_of_their_own(lengths, way, threads):
    """Three adapters over three layers of one input; some positions have none, and the last layer has but one."""
    x, weights = random(1, sum(lengths) + 2, 12), [torch.randn(7, 12), torch.randn(40, 12), torch.randn(9, 12)]
    ranks = [(2, 17, 0), (3, 1, 5), (1, 2, 0)]
    starts = [0, lengths[0] + 1, lengths[0] + 1 + lengths[1]]  # one position between the first and the second has none
    parts = []
    for start, length, own in zip(starts, lengths, ranks, strict=True):
        factors = [(random(r, 12), random(len(weight), r)) for r, weight in zip(own, weights, strict=True)]
        parts.append(LowRank(start, start + length, [0.5, 1.5, 0.7], factors))
    ys = low_rank_linears(x, [weight.to for weight in weights], parts)
    expected = [F.linear(x, weight) for weight in weights]
    for part in parts:
        for layer, (scale, (a, b)) in enumerate(zip(part.scales, part.factors, strict=True)):
            delta = scale * F.linear(F.linear(x[:, part.start : part.end], a), b)
            expected[layer] = expected[layer] + F.pad(delta, (0, 0, part.start, x.size(1) - part.end))
    trained = [matrix for part in parts for pair in part.factors for matrix in pair if matrix.numel()]
    assert_close_in_norm(torch.cat(ys, dim=-1), torch.cat(expected, dim=-1), (x, *trained))


def test_what_is_no_number_stays_at_its_positions(way):
    x, weight = random(8, 12), torch.randn(7, 12)
    good, bad = ((random(3, 12), random(7, 3)) for _ in range(2))
    with torch.no_grad():
        bad[0][1, 2] = torch.nan
    (y,) = low_rank_linears(x, [weight.to], [LowRank(0, 5, [1.0], [good]), LowRank(5, 8, [1.0], [bad])])
    y.sum().backward()
    assert y[:5].isfinite().all() and not y[5:].isfinite().any()
    assert x.grad[:5].isfinite().all() and all(factor.grad.isfinite().all() for factor in good)


def assert_close_in_norm(y, expected, inputs, within=1e-5):
    """As `assert_alike`, over all elements of a tensor together: sums of many products differ in their rounding."""
    grad = torch.randn_like(expected)
    each = zip(*((r, *torch.autograd.grad(r, inputs, grad)) for r in (y, expected)), strict=True)
    assert all(other.norm() > 0 and (one - other).norm() < within * other.norm() for one, other in each)


def test_low_rank_linears_give_no_gradient_to_an_input_that_wants_none(way):
    x, a, b = torch.randn(4, 12), random(3, 12), random(7, 3)
    low_rank_linears(x, [torch.randn(7, 12).to], [LowRank(0, 4, [1.0], [(a, b)])])[0].sum().backward()
    assert x.grad is None and a.grad.norm() > 0 and b.grad.norm() > 0


def test_low_rank_linears_keep_fp32_gradients_in_bf16(way):
    x, a, b = random(6, 12, dtype=torch.bfloat16), random(3, 12), random(7, 3)
    weight = torch.randn(7, 12, dtype=torch.bfloat16)
    (y,) = low_rank_linears(x, [weight.to], [LowRank(0, 6, [2.0], [(a, b)])])
    expected = F.linear(x.float(), weight.float()) + 2 * F.linear(F.linear(x.float(), a), b)
    assert y.dtype == torch.bfloat16 and (y - expected).norm() < 0.02 * expected.norm()
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and a.grad.dtype == b.grad.dtype == torch.float32


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("trainable", [True, False])
def test_head_loss(chunk, trainable, monkeypatch, way, threads):
    monkeypatch.setattr("ops.loss.LOSS_CHUNK", chunk)
    x, weight, targets = random(9, 8), torch.randn(30, 8).requires_grad_(trainable), torch.randint(0, 30, (9,))
    (y, each), (expected, expected_each) = head_loss(x, weight, targets), plain_head_loss(x, weight, targets)
    assert_alike(y, expected, (x, weight) if trainable else (x,))
    torch.testing.assert_close(each, expected_each, atol=1e-5, rtol=1e-5)
    assert each.shape == (9,) and not each.requires_grad and not expected_each.requires_grad


def test_head_loss_in_bf16_is_as_close_as_the_plain_one(way):
    targets = torch.randint(0, 200, (300,))
    ours, plain = (lambda x, weight, f=f: f(x, weight, targets)[0] for f in (head_loss, plain_head_loss))
    assert_as_close(ours, plain, random(300, 64), random(200, 64))


def test_head_loss_of_unlikely_targets_is_finite(way):
    """A probability that rounds to zero still has a logarithm."""
    x, weight = random(2, 4), torch.eye(4) * 300
    with torch.no_grad():
        x[:] = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    loss, _ = head_loss(x, weight, torch.tensor([1, 0]))
    assert loss.item() == pytest.approx(600)
    loss.backward()
    assert x.grad.isfinite().all()


def test_head_loss_without_gradient_computes_none(way):
    x, weight, targets = torch.randn(9, 8), torch.randn(30, 8), torch.randint(0, 30, (9,))
    loss, _ = head_loss(x, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain_head_loss(x, weight, targets)[0], atol=1e-4, rtol=1e-5)


def test_autocast_decides_the_dtype_of_the_products():
    x, a, b, weight, targets = random(5, 8), random(2, 8), random(8, 2), torch.randn(8, 8), torch.randint(0, 8, (5,))
    with torch.autocast("cpu", torch.bfloat16):
        adapted = low_rank_linears(x, [weight.to], [LowRank(0, 5, [1.0], [(a, b)])])
        results = (stored_linear(x, weight.to), *adapted, linear(x, weight))
        assert all(y.dtype == torch.bfloat16 for y in results)
        assert [y.dtype for y in head_loss(x, weight, targets)] == [torch.float32] * 2


def test_weights_are_multiplied_as_the_device_likes():
    assert compute_dtype(torch.float32, "cpu") == compute_dtype(torch.float16, "cpu") == torch.float32
    assert compute_dtype(torch.bfloat16, "cuda") == torch.bfloat16
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert compute_dtype(torch.bfloat16, "cpu") == (torch.bfloat16 if fast else torch.float32)
