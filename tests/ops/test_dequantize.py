"""Triton's kernels for weights in 4 and 8 bits, in its interpreter, against the plain forms and bitsandbytes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import quantize
from ops import dequantize as ops
from ops import gpu
from ops.dequantize import BLOCK, FP4_VALUES, NF4_VALUES, BlockScales
from quantize import QUANTIZERS, Linear4bit, QuantizedLinear, bitsandbytes
from training.memory.plan import fake_tensors

KINDS = {"nf4": NF4_VALUES, "fp4": FP4_VALUES}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
doubly = pytest.mark.parametrize("double_quant", [False, True], ids=["", "double"])
# The last has more blocks than share a scale of scales, and than a program dequantises.
SHAPES = [(1, 2), (3, 5), (7, 9), (5, 24), (2, 64), (3, 160), (33, 192), (130, 192)]


def layer_of(kind, double_quant, shape):
    """A `Linear4bit` with a random weight."""
    return Linear4bit(torch.randn(shape) / 10, None, kind, double_quant)


def parts(layer):
    """What the functions of ops/dequantize.py take of it."""
    return layer.codes, layer.stored_scales(), layer.values


def launched(monkeypatch):
    """The names of the kernels launched from now on, in order."""
    names = []
    monkeypatch.setattr(gpu, "observers", [*gpu.observers, lambda name, *_: names.append(name)])
    return names


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# --------------------------------------------------------------------------------------------------- to numbers


@every_kind
def test_the_tables_are_bitsandbytes(kind):
    theirs = bitsandbytes().functional.get_4bit_type(kind, device="cpu")
    assert torch.equal(torch.tensor(KINDS[kind]), theirs)


@every_kind
def test_plain_quantising_is_bitsandbytes(kind):
    weight, values = torch.randn(8, 192), torch.tensor(KINDS[kind])
    codes, absmax = ops.plain_quantize_4bit(weight, values)
    layer = Linear4bit(weight, None, kind, double_quant=False)
    assert torch.equal(absmax, layer.absmax)
    plain = ops.plain_dequantize_4bit(codes, BlockScales(absmax), values, weight.shape, torch.float32)
    assert torch.equal(plain, layer.dequantize(torch.float32))


@every_kind
@doubly
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_dtype
def test_the_plain_form_is_bitsandbytes_bit_for_bit(kind, double_quant, shape, dtype):
    layer = layer_of(kind, double_quant, shape)
    assert torch.equal(ops.plain_dequantize_4bit(*parts(layer), shape, dtype), layer.dequantize(dtype))


@every_kind
@doubly
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_dtype
def test_the_kernel_is_bitsandbytes_bit_for_bit(kind, double_quant, shape, dtype, interpreted, monkeypatch):
    layer, names = layer_of(kind, double_quant, shape), launched(monkeypatch)
    got = layer.dequantize(dtype)
    assert names == ["dequantize_4bit"] and got.dtype == dtype and got.shape == shape
    monkeypatch.setattr(gpu, "on_cpu", False)
    assert torch.equal(got, layer.dequantize(dtype)) and len(names) == 1


@pytest.mark.parametrize("shape", [*SHAPES, (2, 2049)], ids=str)
@every_dtype
def test_int8_is_bitsandbytes_bit_for_bit(shape, dtype, interpreted, monkeypatch):
    layer, names = QUANTIZERS["bnb.int8"](torch.randn(shape), None), launched(monkeypatch)
    got, plain = layer.dequantize(dtype), ops.plain_dequantize_rows(layer.codes, layer.scales, dtype)
    assert names == ["dequantize_rows"] and got.dtype == dtype
    monkeypatch.setattr(gpu, "on_cpu", False)
    assert torch.equal(got, layer.dequantize(dtype)) and torch.equal(got, plain) and len(names) == 1


# -------------------------------------------------------------------------------------------- products of a few rows


@every_kind
@doubly
@pytest.mark.parametrize("rows", [1, 2, 3, 16])
@pytest.mark.parametrize("shape", [(1, 64), (67, 192), (9, 1152)], ids=str)
def test_a_product_of_a_few_rows(kind, double_quant, rows, shape, interpreted, monkeypatch):
    layer, x, names = layer_of(kind, double_quant, shape), torch.randn(rows, shape[1]), launched(monkeypatch)
    got, plain = (f(x, *parts(layer), shape[0]) for f in (ops.multiply_4bit, ops.plain_multiply_4bit))
    assert names == ["multiply_4bit_sums" if rows <= 2 else "multiply_4bit_dots"]
    assert got.shape == plain.shape == (rows, shape[0])
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)], ids=str)
def test_a_product_in_16_bits(dtype, tolerance, rows, interpreted):
    layer, x = layer_of("nf4", True, (12, 320)), torch.randn(2, rows, 320)[1].to(dtype)
    got, plain = (f(x, *parts(layer), 12) for f in (ops.multiply_4bit, ops.plain_multiply_4bit))
    assert got.dtype == plain.dtype == dtype
    assert relative(got, plain) < tolerance


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("programs", [1, 2, 7, 1000])
def test_programs_that_share_a_row(programs, rows, interpreted, monkeypatch):
    """Also where the last has less to do than the others."""
    monkeypatch.setattr(ops, "PROGRAMS", programs)
    shapes = []
    monkeypatch.setattr(gpu, "observers", [lambda _, grid, *__: shapes.append(grid)])
    layer, x = layer_of("fp4", False, (3, 64 * 83)), torch.randn(rows, 64 * 83)
    got, plain = (f(x, *parts(layer), 3) for f in (ops.multiply_4bit, ops.plain_multiply_4bit))
    most = -(-83 // (ops.SUMS if rows == 2 else ops.DOTS)["BLOCKS"])
    assert 1 < shapes[0][1] <= min(programs, most) if programs > 1 else shapes[0] == (1, 1)
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=2e-4)


def test_rows_that_are_not_contiguous(interpreted):
    layer, x = layer_of("nf4", False, (6, 64)), torch.randn(64, 3).T
    torch.testing.assert_close(ops.multiply_4bit(x, *parts(layer), 6), layer.forward(x), rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------- in a layer


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(128,), (1, 1, 128), (2, 5, 128), (17, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_and_its_gradient_are_those_of_a_cpu(name, biased, shape, dtype, interpreted, monkeypatch):
    bias = nn.Parameter(torch.randn(96, dtype=dtype), requires_grad=False) if biased else None
    layer, x = QUANTIZERS[name](torch.randn(96, 128) / 10, bias), torch.randn(shape, dtype=dtype, requires_grad=True)
    y, names = layer(x), launched(monkeypatch)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert names == ["dequantize_rows" if name == "bnb.int8" else "dequantize_4bit"]  # again, for the gradient
    monkeypatch.setattr(gpu, "on_cpu", False)
    weight = layer.dequantize(dtype)
    expected = F.linear(x.detach(), weight)
    assert torch.equal(y, expected if bias is None else expected + bias)
    assert torch.equal(x.grad, grad @ weight)


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name != "bnb.int8"])
@pytest.mark.parametrize("way", ["no grad", "no gradient of x", "autocast"])
@pytest.mark.parametrize("shape", [(128,), (2, 1, 128), (16, 128)], ids=str)
def test_what_needs_no_gradient_takes_the_codes(name, way, shape, interpreted, monkeypatch):
    layer = QUANTIZERS[name](torch.randn(21, 128) / 10, torch.randn(21))
    x, names = torch.randn(shape), launched(monkeypatch)
    expected = F.linear(x, layer.dequantize(torch.float32), layer.bias)
    layer.is_standard()  # which may try the kernels
    names.clear()
    with torch.set_grad_enabled(way == "no gradient of x"), torch.autocast("cpu", enabled=way == "autocast"):
        y = layer(x)
    assert names == ["multiply_4bit_dots" if x.numel() > 256 else "multiply_4bit_sums"]
    assert y.dtype == (torch.bfloat16 if way == "autocast" else torch.float32) and y.shape == (*shape[:-1], 21)
    assert relative(y, expected) < (1e-2 if way == "autocast" else 1e-5)


@pytest.mark.parametrize("shape", [(17, 128), (0, 128), (3, 96), (3, 5)], ids=str)
def test_other_products_dequantise(shape, interpreted, monkeypatch):
    """Of more rows, of none, and with blocks that go across rows."""
    layer, x, names = layer_of("nf4", True, (10, shape[1])), torch.randn(shape), launched(monkeypatch)
    with torch.no_grad():
        y = layer(x)
    assert names == ["dequantize_4bit"]
    torch.testing.assert_close(y, ops.plain_multiply_4bit(x, *parts(layer), 10), rtol=1e-4, atol=1e-4)


class Doubled(Linear4bit):
    def dequantize(self, dtype):
        return 2 * super().dequantize(dtype)


@pytest.mark.parametrize("edit", ["subclass", "dequantize", "forward", "failing"])
def test_an_edit_is_not_passed_over(edit, interpreted, monkeypatch, capsys):
    """In a subclass or in the classes themselves."""
    x, dequantize, forward = torch.randn(2, 64), Linear4bit.dequantize, QuantizedLinear.forward
    layer = (Doubled if edit == "subclass" else Linear4bit)(torch.randn(5, 64), None, "nf4", double_quant=False)
    plain = ops.plain_multiply_4bit(x, *parts(layer), 5)
    Linear4bit.is_standard.__func__.cache_clear()
    if edit == "dequantize":
        monkeypatch.setattr(Linear4bit, "dequantize", lambda self, dtype: 2 * dequantize(self, dtype))
    elif edit == "forward":
        monkeypatch.setattr(QuantizedLinear, "forward", lambda self, x: 2 * forward(self, x))
    elif edit == "failing":
        monkeypatch.setattr(Linear4bit, "dequantize", lambda self, dtype: 2 * dequantize(self, dtype)[:, self.wide])
        layer.wide = slice(None)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), 2 * plain, rtol=1e-4, atol=1e-4)
        layer(x)
    note = "note: Linear4bit computes something new: going on without its fast way\n"
    assert capsys.readouterr().err == (note if edit in ("dequantize", "forward", "failing") else "")
    Linear4bit.is_standard.__func__.cache_clear()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_device_that_is_not_there(name, monkeypatch):
    """ "meta" stands for CUDA in a prediction of memory: nothing is computed."""
    Linear4bit.is_standard.__func__.cache_clear()
    names = launched(monkeypatch)
    with fake_tensors(FakeTensorMode(allow_non_fake_inputs=True), "meta"):
        layer = QUANTIZERS[name](torch.empty(96, 128, device="meta"), None)
        weight = layer.dequantize(torch.bfloat16)
        ys = [layer(torch.empty(rows, 128, device="meta", dtype=torch.bfloat16)) for rows in (1, 16, 17)]
    assert weight.shape == (96, 128) and weight.dtype == torch.bfloat16
    assert [y.shape for y in ys] == [(1, 96), (16, 96), (17, 96)] and {y.dtype for y in ys} == {torch.bfloat16}
    few = ["multiply_4bit_sums", "multiply_4bit_dots"]
    expected = ["dequantize_rows"] * 4 if name == "bnb.int8" else ["dequantize_4bit", *few, "dequantize_4bit"]
    assert names == expected


def test_the_blocks_are_those_of_the_quantiser():
    layer = layer_of("nf4", True, (2, 64))
    assert quantize.BLOCK == BLOCK == 2 * layer.codes.numel() // layer.absmax.numel()
    assert layer.nested.blocksize == ops.SCALE_BLOCK
