"""Dropout without a mask that is kept: the same elements in every way to compute it, and again in the backward pass."""

import pytest
import torch

from ops.dropout import drop, dropout, mixed, new_seeds, plain_drop, threshold


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 7), (5000,), (33, 300)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_is_the_plain_one(shape, p, dtype, way):
    x, seeds = torch.randn(shape).to(dtype), new_seeds()
    assert torch.equal(drop(x, p, seeds), plain_drop(x, p, seeds))


def test_a_large_seed_is_the_same_in_every_way(way):
    x = torch.randn(100)
    assert torch.equal(drop(x, 0.3, (2**31 - 1, 2**31 - 2)), plain_drop(x, 0.3, (2**31 - 1, 2**31 - 2)))


def test_the_gradient_has_the_same_mask(way):
    x = torch.randn(40, 50, requires_grad=True)
    y = dropout(x, 0.25)
    grad = torch.randn(40, 50)
    y.backward(grad)
    kept = y.detach() != 0
    assert 0.1 < 1 - kept.float().mean() < 0.4
    torch.testing.assert_close(x.grad, torch.where(kept, grad / 0.75, 0.0))
    torch.testing.assert_close(y.detach(), torch.where(kept, x.detach() / 0.75, 0.0))


def test_the_share_is_p_and_masks_do_not_depend_on_each_other():
    """To within five standard deviations: among neighbours, and between two seeds."""
    n, p = 10**6, 0.2
    kept = [plain_drop(torch.ones(n), p, new_seeds()) > 0 for _ in range(2)]
    for both, expected in (
        (kept[0], 1 - p), (kept[0] & kept[1], (1 - p) ** 2), (kept[0][1:] & kept[0][:-1], (1 - p) ** 2),
        (kept[0][64:] & kept[0][:-64], (1 - p) ** 2),
    ):  # fmt: skip
        # Of pairs of neighbours, each element is in two: three times the variance at most.
        assert abs(both.float().mean().item() - expected) < 5 * (3 * expected * (1 - expected) / n) ** 0.5


def test_an_infinite_element_that_is_dropped_is_zero(way):
    x, seeds = torch.full((200,), torch.inf), new_seeds()
    y = drop(x, 0.5, seeds)
    assert set(y.tolist()) == {0.0, torch.inf}


def test_the_hash_is_murmurs():
    """fmix32 of 0, 1 and 0xFFFFFFFF, as MurmurHash3's own code gives them."""
    assert mixed(torch.tensor([0, 1, 0xFFFFFFFF])).tolist() == [0, 0x514E28B7, 0x81F16F39]
    assert threshold(0.0) == 0 and threshold(0.5) == 2**31 and threshold(1 - 1e-12) == 2**32 - 1


def test_seeds_are_torchs_own_for_the_cpu():
    """So that recomputation and resuming find them again, and fake tensors do not get in the way."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.manual_seed(5)
    first = new_seeds()
    torch.manual_seed(5)
    with FakeTensorMode():
        assert new_seeds() == first != new_seeds()
