"""Quantised layers: the plain NF4 against bitsandbytes, and every layer against the weight it dequantises to."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantize
from model import Linear
from ops.dequantize import NF4_VALUES, BlockScales, plain_dequantize_4bit, plain_quantize_4bit
from quantize import QUANTIZERS
from weights.checkpoint import load_model

every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)

# The largest |W - dequantised W| / |W| that is plausible for a normal weight.
ERROR = {"bnb.nf4": 0.10, "bnb.nf4-dq": 0.105, "bnb.fp4": 0.13, "bnb.fp4-dq": 0.135, "bnb.int8": 0.012}
BITS = {"bnb.nf4": 4.5, "bnb.nf4-dq": 4.127, "bnb.fp4": 4.5, "bnb.fp4-dq": 4.127, "bnb.int8": 8 + 32 / 512}


def make(name, out_features=96, in_features=128, bias=False, dtype=torch.float32):
    """A quantised layer, the weight it was made from and its bias."""
    weight = torch.randn(out_features, in_features, dtype=dtype) / 10
    bias = nn.Parameter(torch.randn(out_features, dtype=dtype), requires_grad=False) if bias else None
    return QUANTIZERS[name](weight, bias), weight, bias


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ------------------------------------------------------------------------------------------------ NF4, written out


def nf4_quantize(weight):
    return plain_quantize_4bit(weight, torch.tensor(NF4_VALUES))


def nf4_dequantize(codes, absmax, shape, dtype):
    return plain_dequantize_4bit(codes, BlockScales(absmax), torch.tensor(NF4_VALUES), shape, dtype)


def difficult(kind):
    weight = torch.randn(64, 192)
    if kind == "zero blocks":
        weight[3] = 0
        weight[10, 64:128] = 0
    elif kind == "one value a block":
        weight = torch.zeros(64, 192)
        weight[:, 5::64] = torch.randn(64, 3)
    elif kind == "tiny":
        weight = weight * 1e-12
    elif kind == "huge":
        weight = weight * 1e30
    elif kind == "outliers":
        weight[torch.rand_like(weight) < 0.01] *= 1000
    elif kind == "bf16":
        weight = weight.bfloat16()
    elif kind == "fp16":
        weight = weight.half()
    elif kind == "between two values":  # where the last bit of a scale decides
        values = torch.tensor(NF4_VALUES)
        middle = torch.cat(((values[1:] + values[:-1]) / 2, torch.ones(1)))
        weight = middle.repeat(64, 12) * torch.rand(64, 1)
    elif kind == "the values themselves":
        weight = torch.tensor(NF4_VALUES).repeat(64, 12) * 0.37
    return weight


KINDS = [
    "normal", "zero blocks", "one value a block", "tiny", "huge", "outliers", "bf16", "fp16", "the values themselves",
    "between two values",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_plain_nf4_is_bitsandbytes_bit_for_bit(kind):
    weight = difficult(kind)
    layer = QUANTIZERS["bnb.nf4"](weight, None)
    codes, absmax = nf4_quantize(weight)
    assert torch.equal(codes, layer.codes.flatten())
    assert torch.equal(absmax, layer.absmax)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        plain, fast = nf4_dequantize(codes, absmax, weight.shape, dtype), layer.dequantize(dtype)
        assert plain.dtype == fast.dtype == dtype and plain.shape == fast.shape == weight.shape
        assert torch.equal(plain, fast)


def test_nf4_keeps_what_it_can_represent():
    weight = difficult("the values themselves")
    assert relative(nf4_dequantize(*nf4_quantize(weight), weight.shape, torch.float32), weight) < 1e-6
    zeros = torch.zeros(4, 64)
    assert torch.equal(nf4_dequantize(*nf4_quantize(zeros), zeros.shape, torch.float32), zeros)


def test_nf4_picks_the_nearest_value():
    weight = torch.randn(32, 64)
    result = nf4_dequantize(*nf4_quantize(weight), weight.shape, torch.float32)
    choices = torch.tensor(NF4_VALUES) * weight.abs().amax(dim=1)[:, None, None]
    nearest = (weight[..., None] - choices).abs().amin(dim=-1)
    assert torch.allclose((weight - result).abs(), nearest, atol=1e-6)


# -------------------------------------------------------------------------------------------------- every quantiser


@every_quantizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dequantised_weight_is_near(name, dtype):
    layer, weight, _ = make(name, dtype=dtype)
    error = relative(layer.dequantize(torch.float32), weight)
    assert ERROR[name] / 10 < error < ERROR[name]
    for other in (torch.bfloat16, torch.float16):
        assert layer.dequantize(other).dtype == other
        assert relative(layer.dequantize(other), layer.dequantize(torch.float32)) < 5e-3


@every_quantizer
def test_codes_do_not_depend_on_the_dtype_of_the_model(name):
    weight = torch.randn(32, 64).bfloat16()
    a, b = QUANTIZERS[name](weight, None), QUANTIZERS[name](weight.float(), None)
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.dequantize(torch.float32), b.dequantize(torch.float32))


@every_quantizer
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(128,), (1, 1, 128), (2, 5, 128)], ids=str)
def test_forward_and_input_gradient(name, bias, dtype, shape):
    layer, _, offset = make(name, bias=bias, dtype=dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    weight = layer.dequantize(dtype)
    y = layer(x)
    expected = F.linear(x.detach(), weight)
    assert torch.equal(y, expected if offset is None else expected + offset)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert torch.equal(x.grad, grad @ weight)
    assert not list(layer.parameters()) if offset is None else layer.bias.grad is None


@every_quantizer
def test_gradient_is_that_of_the_function(name):
    """Against finite differences, in fp32 dequantised once to fp64."""
    layer, _, _ = make(name, 6, 64)
    weight = layer.dequantize(torch.float32).double()
    layer.dequantize = weight.to
    assert torch.autograd.gradcheck(layer, torch.randn(3, 64, dtype=torch.float64, requires_grad=True))


@every_quantizer
def test_nothing_of_the_weights_size_is_kept_for_backward(name):
    layer, weight, _ = make(name, 256, 256, bias=True)
    x, kept = torch.randn(4, 256, requires_grad=True), []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x).tanh()
    assert kept and max(kept) < weight.numel() / 2  # tanh's own result is the proof that the hook sees them
    reference = nn.Linear(256, 256)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        reference(x)
    assert max(kept) == weight.numel()
    y.sum().backward()
    assert x.grad.norm() > 0


@every_quantizer
def test_autocast(name):
    layer, _, offset = make(name, bias=True)
    x = torch.randn(2, 3, 128, requires_grad=True)
    dequantize, asked = layer.dequantize, set()
    layer.dequantize = lambda dtype: asked.add(dtype) or dequantize(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert asked == {torch.bfloat16}  # and not to fp32 first
    expected = F.linear(x.detach().bfloat16(), layer.dequantize(torch.bfloat16)) + offset.bfloat16()
    assert torch.equal(y, expected)
    y.backward(torch.ones_like(y))
    assert x.grad.dtype == torch.float32
    expected = torch.ones_like(y) @ layer.dequantize(torch.bfloat16)
    assert torch.equal(x.grad, expected.float())


@every_quantizer
def test_autocast_within_checkpoint(name):
    """Recomputed in the backward pass, a layer computes in the same dtype as before."""
    from torch.utils.checkpoint import checkpoint

    layer, _, _ = make(name)
    x = torch.randn(3, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = checkpoint(lambda x: layer(x).tanh(), x, use_reentrant=False)
    y.float().sum().backward()
    recomputed = x.grad.clone()
    x.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x).tanh()
    y.float().sum().backward()
    assert torch.equal(recomputed, x.grad)


@every_quantizer
def test_zero_rows_and_zero_weight(name):
    weight = torch.randn(8, 64)
    weight[3] = 0
    result = QUANTIZERS[name](weight, None).dequantize(torch.float32)
    assert result.isfinite().all() and result[3].count_nonzero() == 0
    assert QUANTIZERS[name](torch.zeros(8, 64), None).dequantize(torch.float32).count_nonzero() == 0


@every_quantizer
@pytest.mark.parametrize("shape", [(5, 24), (32, 48), (4, 80), (2, 32), (3, 160), (1, 2)], ids=str)
def test_rows_that_do_not_fill_blocks(name, shape):
    """Some of them end within a block; and some are what a processor's vectors hold, a trap for libraries."""
    weight = torch.randn(shape)
    layer = QUANTIZERS[name](weight, None)
    x = torch.randn(3, shape[1])
    assert (layer.dequantize(torch.float32) - weight).abs().max() < 0.2 * weight.abs().max()
    assert relative(layer(x), F.linear(x, layer.dequantize(torch.float32))) < 1e-6


@pytest.mark.parametrize("shape", [(32, 48), (4, 80), (4, 32), (2, 160)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_nf4_is_bitsandbytes_where_rows_do_not_fill_blocks(shape, dtype):
    weight = torch.randn(shape)
    plain = nf4_dequantize(*nf4_quantize(weight), shape, dtype)
    assert torch.equal(plain, QUANTIZERS["bnb.nf4"](weight, None).dequantize(dtype))


@every_quantizer
def test_bits_per_weight(name):
    layer, weight, _ = make(name, 512, 512)
    assert 8 * layer.nbytes() / weight.numel() == pytest.approx(BITS[name], abs=2e-3)


def test_more_bits_less_error():
    weight = torch.randn(128, 256)
    error = {name: relative(make(weight, None).dequantize(torch.float32), weight) for name, make in QUANTIZERS.items()}
    assert error["bnb.int8"] < 0.2 * error["bnb.nf4"] < 0.2 * error["bnb.fp4"]
    for name in ("bnb.nf4", "bnb.fp4"):
        assert error[name + "-dq"] == pytest.approx(error[name], rel=0.03)


# -------------------------------------------------------------------------------------------------- in a model


@every_quantizer
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_in_a_model_all_but_embedding_head_and_norms(tiny_checkpoint, name, family):
    model = load_model(tiny_checkpoint(family), torch.bfloat16, quantize=name)
    quantised = {path for path, module in model.named_modules() if isinstance(module, quantize.QuantizedLinear)}
    layers = model.config.num_hidden_layers
    assert len(quantised) == 7 * layers and not any("lm_head" in path or "embed" in path for path in quantised)
    assert type(model.lm_head) is Linear and type(model.model.embed_tokens) is nn.Embedding
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    assert sum(type(module) is Linear for module in model.modules()) == 1
    if family == "llama":
        assert model.model.layers[0].mlp.down_proj.bias is not None
    else:
        assert model.lm_head.weight is model.model.embed_tokens.weight


@every_quantizer
def test_model_computes_with_the_dequantised_weights(tiny_checkpoint, name):
    model = load_model(tiny_checkpoint("llama"), torch.float32, quantize=name)
    dense = load_model(tiny_checkpoint("llama"), torch.float32)
    tokens = torch.randint(512, (2, 9))
    before = dense(tokens)
    for path, module in model.named_modules():
        if isinstance(module, quantize.QuantizedLinear):
            dense.get_submodule(path).weight.data = module.dequantize(torch.float32)
    assert relative(model(tokens), dense(tokens)) < 1e-6
    assert relative(model(tokens), before) > 1e-4
