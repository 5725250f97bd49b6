"""Each Triton kernel moves as many bytes as its docstring says, counted in Triton's interpreter."""

import re

import pytest
import torch
from conftest import kernels

from ops import gpu
from ops.activation import activate, gated
from ops.dropout import drop
from ops.loss import _loss_
from ops.low_rank import _add_low_rank_
from ops.norm import _norm, _norm_backward
from ops.rotation import rotate
from quantize import QUANTIZERS

BF16 = torch.bfloat16
N, D = 96, 2048  # rows, columns


@pytest.fixture
def moved(interpreted, monkeypatch):
    """A list of the bytes that each load and each store moves, masked elements not counted."""
    from triton.runtime.interpreter import InterpreterBuilder

    found = []

    def counted(method, place):
        def call(self, *arguments):
            pointers, mask = arguments[0], arguments[place]
            found.append(int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8)
            return method(self, *arguments)

        return call

    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        monkeypatch.setattr(InterpreterBuilder, name, counted(getattr(InterpreterBuilder, name), place))
    return found


def normal(*shape):
    return torch.randn(shape).to(BF16)


def norm(added):
    x, weight = normal(N, D), normal(D)
    return lambda: _norm(x, normal(N, D) if added else None, 1.0, weight, None, 1e-5, False, False), N * D


def norm_backward(total):
    x, weight = normal(N, D), normal(D)
    _, _, means, inverses = _norm(x, None, 1.0, weight, None, 1e-5, False, True)
    grads = normal(N, D), normal(N, D) if total else None
    return lambda: _norm_backward(*grads, x, weight, means, inverses, False, (False, False)), N * D


def rotation():
    q, k, angles = normal(1, N, 16, 64).transpose(1, 2), normal(1, N, 4, 64).transpose(1, 2), torch.randn(N, 32)
    return lambda: rotate(q, k, angles.cos().to(BF16), angles.sin().to(BF16)), N * 20 * 64


def activation(up):
    x = [normal(N, D) for _ in range(1 + up)]
    return lambda: (gated if up else activate)("silu", *x), N * D


def activation_backward(up):
    x = [normal(N, D).requires_grad_() for _ in range(1 + up)]
    y = (gated if up else activate)("silu", *x)
    return lambda: y.backward(normal(N, D)), N * D


def loss(backward):
    logits, targets = normal(N, D), torch.randint(0, D, (N,))
    return lambda: _loss_(logits, targets, backward, 0.0, 0.0), N * D


def dropping():
    x = normal(N, D)
    return lambda: drop(x, 0.1, (1, 2)), N * D


def low_rank():
    ys, factors = [normal(256, D) for _ in range(2)], [torch.randn(D, 8) for _ in range(2)]
    small = normal(256, 16)
    return lambda: _add_low_rank_(ys, small, factors, [1.0, 1.0]), 2 * 256 * D


def quantised(name):
    return QUANTIZERS[name](torch.randn(256, 4096), None)


def dequantising(name):
    layer = quantised(name)
    return lambda: layer.dequantize(BF16), 256 * 4096


def multiplying(name, rows):
    layer, x = quantised(name), normal(rows, 4096)

    def run():
        with torch.no_grad():
            layer(x)

    return run, 256 * 4096


# Of each kernel: a phrase of its docstring that says how many bytes an element takes, and what to run.
CASES = [
    ("norm", r"Moves (\d+) bytes an element", norm, False),
    ("norm", r"or (\d+) with `added`", norm, True),
    ("norm_backward", r"Moves (\d+) bytes an element", norm_backward, False),
    ("norm_backward", r"or (\d+) with\s+`grad_total`", norm_backward, True),
    ("rotate", r"Moves (\d+) bytes an element", rotation),
    ("activate", r"Moves (\d+) bytes an element", activation, False),
    ("activate", r"or (\d+) with `up`", activation, True),
    ("activate_backward", r"Moves (\d+) bytes an element", activation_backward, False),
    ("activate_backward", r"or (\d+) with `up`", activation_backward, True),
    ("dropout", r"Moves (\d+) bytes an element", dropping),
    ("add_low_rank", r"Moves ([\d.]+) bytes an element", low_rank),
    ("dequantize_4bit", r"Moves ([\d.]+) bytes a weight", dequantising, "bnb.nf4"),
    ("dequantize_4bit", r"or ([\d.]+) with scales in 8 bits", dequantising, "bnb.fp4-dq"),
    ("dequantize_rows", r"Moves ([\d.]+) bytes a weight", dequantising, "bnb.int8"),
    ("multiply_4bit_sums", r"Moves ([\d.]+) bytes a weight", multiplying, "bnb.nf4", 1),
    ("multiply_4bit_sums", r"or ([\d.]+) with\s+scales in 8 bits", multiplying, "bnb.nf4-dq", 1),
    ("multiply_4bit_dots", r"Moves ([\d.]+) bytes a weight", multiplying, "bnb.nf4", 16),
    ("loss", r"Moves (\d+) bytes a logit", loss, True),
    ("loss", r"or (\d+) without BACKWARD", loss, False),
]


@pytest.mark.parametrize("name, phrase, case, arguments", [(*case[:3], case[3:]) for case in CASES])
def test_bytes_are_those_of_the_docstring(name, phrase, case, arguments, moved):
    run, elements = case(*arguments)
    moved.clear()
    run()
    said = float(re.search(phrase, gpu.kernel(name).fn.__doc__)[1]) * elements
    # Beside the elements there are gains, angles, and what a row has one of: some percent here, less where it matters.
    assert said <= sum(moved) < 1.06 * said


def test_every_kernel_is_counted():
    assert {case[0] for case in CASES} == kernels()
