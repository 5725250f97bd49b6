"""Every activation, gated and not, in C++ and by torch with our backward pass, against its plain form."""

import pytest
import torch

from ops.activation import ACTIVATIONS, activate, gated, plain_gated
from ops.cpp import compiled_library
from ops.rotation import plain_rotate, rotate

SHAPES = [(2, 5, 12), (1, 1, 1), (3, 5000), (7, 17)]
each_activation = pytest.mark.parametrize("name", ACTIVATIONS)


def random(*shape, scale=1.0):
    return (torch.randn(shape) * scale).requires_grad_()


def assert_alike(y, expected, inputs, within=1e-5, **how):
    """The same result and the same gradients, from a random gradient of the result. how: of torch.autograd.grad."""
    grad = torch.randn_like(expected)
    torch.testing.assert_close(y, expected, atol=within, rtol=within)
    for one, other in zip(*(torch.autograd.grad(result, inputs, grad, **how) for result in (y, expected)), strict=True):
        torch.testing.assert_close(one, other, atol=within, rtol=within)


@each_activation
@pytest.mark.parametrize("shape", SHAPES)
def test_gated(name, shape, way):
    gate, up = random(*shape), random(*shape)
    assert_alike(gated(name, gate, up), plain_gated(name, gate, up), (gate, up))
    gate, up = (x.detach().transpose(0, 1).requires_grad_() for x in (gate, up))  # in another layout
    assert_alike(gated(name, gate, up), plain_gated(name, gate, up), (gate, up))


@each_activation
@pytest.mark.parametrize("shape", SHAPES)
def test_activate(name, shape, way):
    x = random(*shape)
    assert_alike(activate(name, x), ACTIVATIONS[name](x), (x,))
    x = x.detach().transpose(0, 1).requires_grad_()
    assert_alike(activate(name, x), ACTIVATIONS[name](x), (x,))


@each_activation
@pytest.mark.parametrize("is_gated", [True, False])
def test_gradients_in_the_memory_of_the_inputs(name, is_gated, way):
    """The same gradients, and an error for who needs the inputs once more."""
    leaves = [random(5, 70) for _ in range(1 + is_gated)]
    ours, plain = (gated, plain_gated) if is_gated else (activate, lambda name, x: ACTIVATIONS[name](x))
    inputs = [leaf * 1 for leaf in leaves]
    y, before = ours(name, *inputs, reuse=True), [x.detach().clone() for x in inputs]
    assert_alike(y, plain(name, *leaves), leaves, retain_graph=True)
    if way != "torch":
        assert not any(torch.equal(x, x_before) for x, x_before in zip(inputs, before, strict=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@each_activation
def test_activations_are_exact_everywhere(name, way):
    """Near 0 and far out, against fp64: each step of the fp32 in between costs about 1e-7 of |x|."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.randn(200) * 1e-3]).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = activate(name, x), ACTIVATIONS[name](exact)
    torch.testing.assert_close(y.double(), expected, atol=2e-6, rtol=1e-6)
    slopes = [torch.autograd.grad(result.sum(), given)[0].double() for result, given in ((y, x), (expected, exact))]
    torch.testing.assert_close(*slopes, atol=4e-6, rtol=1e-6)


@each_activation
def test_bf16_is_rounded_once(name):
    if not compiled_library("kernels_cpu"):
        pytest.skip("no C++ compiler")
    given = [torch.randn(40, 50).bfloat16().requires_grad_() for _ in range(2)]
    exact = [x.detach().double().requires_grad_() for x in given]
    y, expected, grad = gated(name, *given), plain_gated(name, *exact), torch.randn(40, 50).bfloat16()
    pairs = [(y, expected)]
    pairs += zip(torch.autograd.grad(y, given, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True)
    for one, other in pairs:  # bf16 has 8 significant bits
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=2**-8)


@each_activation
def test_large_numbers_and_what_is_no_number(name, way):
    x = torch.tensor([-1e18, -200.0, -90.0, -0.0, 0.0, 90.0, 1e18, torch.nan], requires_grad=True)
    y, (grad,) = activate(name, x), torch.autograd.grad(activate(name, x)[:-1].sum(), x)
    size = x.detach()[5:7] ** (2 if name == "relu2" else 1)
    torch.testing.assert_close(y[:5], torch.zeros(5))
    torch.testing.assert_close(y[5:7], size)
    assert y[7].isnan()
    torch.testing.assert_close(grad[:3], torch.zeros(3))
    torch.testing.assert_close(grad[5:7], 2 * x.detach()[5:7] if name == "relu2" else torch.ones(2))


@each_activation
def test_only_inputs_are_saved(name, way):
    saved = []
    gate, up = random(4, 50), random(4, 50)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        gated(name, gate, up)
        activate(name, gate)
    assert [x.data_ptr() for x in saved] == [gate.data_ptr(), up.data_ptr(), gate.data_ptr()]


@each_activation
def test_two_dtypes_are_multiplied_in_the_wider(name, way):
    gate, up = random(4, 50), torch.randn(4, 50).bfloat16()
    assert_alike(gated(name, gate, up), plain_gated(name, gate, up.float()), (gate,))


# --------------------------------------------------------------------------------------------------- partial rotation


@pytest.mark.parametrize("d, turned", [(8, 2), (10, 6), (40, 8), (80, 32), (64, 48), (5, 4)])
@pytest.mark.parametrize("rows", [(), (1, 1), (2, 1)])
def test_the_first_dimensions_are_turned(d, turned, rows, way):
    q, k, angles = random(2, 6, 7, d), random(2, 3, 7, d), torch.randn(*rows, 7, turned // 2)
    turns = angles.cos(), angles.sin()
    together, expected = rotate(q, k, *turns), [plain_rotate(x, *turns) for x in (q, k)]
    assert_alike(torch.cat(together, dim=1), torch.cat(expected, dim=1), (q, k))
    for x, y in zip((q, k), together, strict=True):
        assert torch.equal(y[..., turned:], x[..., turned:]) and not torch.equal(y[..., :turned], x[..., :turned])
    transposed = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))  # as the model has it
    for one, other in zip(rotate(*transposed, *turns), together, strict=True):
        assert torch.equal(one, other)


def test_the_rest_is_copied_in_bf16(way):
    x, angles = torch.randn(2, 3, 7, 20).bfloat16(), torch.randn(7, 4)
    cos, sin = (f(angles).bfloat16() for f in (torch.cos, torch.sin))
    y, _ = rotate(x, x[:, :1], cos, sin)
    assert torch.equal(y[..., 8:], x[..., 8:])
    expected = plain_rotate(x.double(), cos.double(), sin.double())
    torch.testing.assert_close(y.double(), expected, atol=2e-2, rtol=2**-7)  # what torch adds is rounded twice
