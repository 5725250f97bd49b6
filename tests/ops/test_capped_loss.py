"""The loss of logits that are kept within a soft cap, against its plain form."""

import pytest
import torch

from ops.loss import head_loss, plain_head_loss


def random(*shape):
    return torch.randn(shape).requires_grad_()


@pytest.mark.parametrize("softcap", [0.7, 3.0, 30.0, 500.0])
@pytest.mark.parametrize("V", [30, 1, 16, 333])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("chunk", [4, 100])
def test_capped_loss(chunk, biased, V, softcap, way, monkeypatch):
    monkeypatch.setattr("ops.loss.LOSS_CHUNK", chunk)
    x, weight, targets = random(9, 8), random(V, 8), torch.randint(0, V, (9,))
    bias = random(V) if biased else None
    inputs = [t for t in (x, weight, bias) if t is not None]
    (y, each), (expected, expected_each) = (f(x, weight, targets, bias, softcap) for f in (head_loss, plain_head_loss))
    torch.testing.assert_close((y, each), (expected, expected_each), atol=1e-5, rtol=1e-5)
    for one, other in zip(torch.autograd.grad(y, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_capped_loss_in_bf16_is_as_close_as_the_plain_one(way):
    targets, given = torch.randint(0, 200, (250,)), (random(250, 64), random(200, 64))  # one chunk
    rounded = [x.detach().bfloat16().requires_grad_() for x in given]
    exact = [x.detach().double().requires_grad_() for x in rounded]
    logits = exact[0] @ exact[1].T
    wanted = torch.nn.functional.cross_entropy(5 * torch.tanh(logits / 5), targets, reduction="sum")
    wanted = torch.autograd.grad(wanted, exact)
    ours, plain = (
        torch.autograd.grad(f(*rounded, targets, softcap=5.0)[0], rounded) for f in (head_loss, plain_head_loss)
    )
    for mine, theirs, right in zip(ours, plain, wanted, strict=True):
        assert mine.dtype == torch.bfloat16 and (mine - right).norm() < 1.2 * (theirs - right).norm()


def test_logits_far_beyond_the_cap_have_a_loss_and_next_to_no_gradient(way):
    """c tanh(x / c) is then c or -c."""
    x, weight = random(2, 4), torch.eye(4) * 1e4
    with torch.no_grad():
        x[:] = torch.tensor([[1.0, -1, -1, -1], [-1, 1.0, -1, -1]])
    loss, each = head_loss(x, weight, torch.tensor([1, 1]), softcap=30.0)
    torch.testing.assert_close(each, torch.tensor([60.0, 0.0]))
    loss.backward()
    assert torch.equal(x.grad, torch.zeros(2, 4))


def test_without_gradient_the_losses_are_the_same(way):
    x, weight, targets = torch.randn(9, 8), torch.randn(30, 8), torch.randint(0, 30, (9,))
    loss, each = head_loss(x, weight, targets, softcap=2.0)
    assert not loss.requires_grad
    torch.testing.assert_close((loss, each), plain_head_loss(x, weight, targets, softcap=2.0), atol=1e-4, rtol=1e-5)


def test_a_nan_does_not_vanish(way):
    x, weight = torch.randn(2, 8), torch.randn(30, 8)
    x[0, 0] = torch.nan
    _, each = head_loss(x, weight, torch.tensor([1, 1]), softcap=2.0)
    assert each[0].isnan() and each[1].isfinite()
