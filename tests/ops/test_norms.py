"""RMSNorm and LayerNorm in C++ and Triton against their plain references: every gain and bias, and all gradients."""

import pytest
import torch

from ops.norm import layer_norm, layer_norm_of_sum, plain_layer_norm, plain_rms_norm, rms_norm, rms_norm_of_sum

SHAPES = [(2, 5, 24), (1, 1, 8), (7, 3), (3, 50), (2, 64), (33, 129)]
# Whether there is a weight, what it is increased by, and whether there is a bias.
GAINS = [(True, False, True), (True, False, False), (False, False, False), (True, True, True), (True, True, False)]


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).requires_grad_()


def norms(kind, plus_one):
    """Our norm and the plain one, as functions of x, weight and bias."""
    if kind == "layer":
        return (lambda x, w, b, f=f: f(x, w, b, 1e-5, plus_one) for f in (layer_norm, plain_layer_norm))
    return (lambda x, w, b, f=f: f(x, w, 1e-5, plus_one) for f in (rms_norm, plain_rms_norm))


def results(function, given, grad):
    """What a function gives, and the gradients of its inputs, of those that are not None."""
    y, inputs = function(*given), [x for x in given if x is not None and x.requires_grad]
    return y, *torch.autograd.grad(y, inputs, grad.to(y.dtype))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted, plus_one, biased", GAINS)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_is_the_plain_one(kind, weighted, plus_one, biased, shape, fused):
    size = shape[-1]
    given = random(*shape), random(size) if weighted else None, random(size) if biased and kind == "layer" else None
    grad, (ours, plain) = torch.randn(shape), norms(kind, plus_one)
    for one, other in zip(results(ours, given, grad), results(plain, given, grad), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_rows_of_one_number(kind, fused):
    """Less its mean it is 0, and the norm divides by sqrt(eps): 300 times the rounding."""
    x, weight, bias, grad = random(4, 1), random(1), random(1) if kind == "layer" else None, torch.randn(4, 1)
    ours, plain = (results(f, (x, weight, bias), grad) for f in norms(kind, False))
    torch.testing.assert_close(ours, plain, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_the_sums_of_weight_and_bias(threads, fused):
    given, grad, before = (random(50, 20), random(20), random(20)), torch.randn(50, 20), torch.get_num_threads()
    torch.set_num_threads(threads)
    ours, plain = (results(f, given, grad) for f in norms("layer", False))
    torch.set_num_threads(before)
    torch.testing.assert_close(ours, plain, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("trains", ["weight", "bias", "neither"])
def test_only_what_trains_has_a_gradient(trains, fused):
    x, weight, bias = random(6, 10), torch.randn(10), torch.randn(10)
    if trains != "neither":
        {"weight": weight, "bias": bias}[trains].requires_grad_()
    grad, (ours, plain) = torch.randn(6, 10), norms("layer", False)
    torch.testing.assert_close(results(ours, (x, weight, bias), grad), results(plain, (x, weight, bias), grad))


@pytest.mark.parametrize("weighted, plus_one, biased", GAINS)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_in_bf16_is_rounded_once(kind, weighted, plus_one, biased, fused):
    """All arithmetic is in fp32: what comes out is the exact result, rounded (2^-8 of each number at most)."""
    given = random(40, 96), random(96) if weighted else None, random(96) if biased and kind == "layer" else None
    rounded = [None if x is None else x.detach().bfloat16().requires_grad_() for x in given]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in rounded]
    grad, (ours, _) = torch.randn(40, 96).bfloat16(), norms(kind, plus_one)
    for one, other in zip(results(ours, rounded, grad), results(in_fp64(kind, plus_one), exact, grad), strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), other, atol=1e-5 * other.abs().max().item(), rtol=2**-8)


def in_fp64(kind, plus_one):
    """The formula, written out."""

    def norm(x, weight, bias):
        x = x - x.mean(-1, keepdim=True) if kind == "layer" else x
        y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        y = y if weight is None else y * (weight + plus_one)
        return y if bias is None else y + bias

    return norm


def test_fp32_parameters_of_a_bf16_model_keep_their_dtype(fused):
    x, weight, bias = random(9, 20, dtype=torch.bfloat16), random(20), random(20)
    y = layer_norm(x, weight, bias, 1e-5)
    grads = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert [t.dtype for t in (y, *grads)] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(grads[2], torch.full((20,), 9.0))


def test_a_large_mean_does_not_hide_the_deviation(fused):
    x = torch.randn(4, 50) + 300
    expected = in_fp64("layer", False)(x.double(), None, None)
    torch.testing.assert_close(layer_norm(x, None, None, 1e-5).double(), expected, atol=1e-4, rtol=1e-4)


def test_any_layout_and_rows_that_are_all_alike(fused):
    x, weight = random(6, 10), random(6)
    ours, plain = (f(x.T, weight, None) for f in norms("layer", False))
    torch.testing.assert_close(ours, plain)
    assert torch.equal(layer_norm(torch.full((2, 5), 3.0), None, None, 1e-5), torch.zeros(2, 5))
    assert torch.equal(rms_norm(torch.zeros(2, 5), None, 1e-5), torch.zeros(2, 5))


# --------------------------------------------------------------------------------------------- the norm of a sum of two


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("used", ["both", "sum", "norm"])
@pytest.mark.parametrize("weighted, plus_one, biased", GAINS)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_of_a_sum(kind, weighted, plus_one, biased, used, scale, way):
    x, added, weight = random(3, 5, 24), random(3, 5, 24), random(24) if weighted else None
    bias = (random(24) if biased else None,) if kind == "layer" else ()
    norm, (_, plain) = {"layer": layer_norm_of_sum, "rms": rms_norm_of_sum}[kind], norms(kind, plus_one)
    ours = norm(x, added, scale, weight, *bias, 1e-5, plus_one)
    total = x + scale * added
    expected = total, plain(total, weight, *bias or [None])
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)
    places = {"both": (0, 1), "sum": (0,), "norm": (1,)}[used]
    inputs = [t for t in (x, added, weight, *bias) if t is not None and (used != "sum" or t.dim() == 3)]
    grads = [torch.randn(3, 5, 24) for _ in places]
    for results in zip(
        *(torch.autograd.grad([r[i] for i in places], inputs, grads) for r in (ours, expected)), strict=True
    ):
        torch.testing.assert_close(*results, atol=2e-5, rtol=2e-5)


def test_the_sum_is_rounded_before_the_norm(way):
    """As x + added, then the norm, would do it in bf16; in the wider dtype of the two."""
    x, added, weight = torch.randn(4, 30).bfloat16(), torch.randn(4, 30).bfloat16(), torch.randn(30)
    total, y = rms_norm_of_sum(x, added, 1.0, weight, 1e-5)
    assert total.dtype == y.dtype == torch.bfloat16 and torch.equal(total, x + added)
    torch.testing.assert_close(y, rms_norm(x + added, weight, 1e-5), atol=0, rtol=2**-8)
    total, y = rms_norm_of_sum(x.float(), added, 1.0, weight, 1e-5)
    assert total.dtype == y.dtype == torch.float32 and torch.equal(total, x.float() + added.float())


def test_what_adds_without_a_gradient_gets_none(way):
    x, added = random(3, 8), torch.randn(3, 8)
    total, y = layer_norm_of_sum(x, added, 1.0, None, None, 1e-5)
    (total.sum() + y.square().sum()).backward()
    expected = x.detach().clone().requires_grad_()
    ((expected + added).sum() + plain_layer_norm(expected + added, None, None, 1e-5).square().sum()).backward()
    torch.testing.assert_close(x.grad, expected.grad, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert not any(t.requires_grad for t in layer_norm_of_sum(x, added, 1.0, None, None, 1e-5))


@pytest.mark.parametrize("rows", [0, 1, 700])
def test_any_number_of_rows_adds_up_in_the_gain(rows, fused):
    """As many as one program of Triton's has at a time, fewer and more; and a row wider than a program holds."""
    x, weight = random(rows, 130), random(130)
    y, expected = rms_norm(x, weight, 1e-5), plain_rms_norm(x, weight, 1e-5)
    grad = torch.randn(rows, 130)
    for one, other in zip(*(torch.autograd.grad(r, (x, weight), grad) for r in (y, expected)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_a_row_wider_than_a_program_holds(monkeypatch, way):
    monkeypatch.setattr("ops.norm.LARGEST", 16)
    x, weight = random(3, 17), random(17)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), plain_rms_norm(x, weight, 1e-5))
