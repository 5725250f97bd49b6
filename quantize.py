"""Linear layers whose frozen weight is kept in 4 or 8 bits: what `--quantize` chooses among.

The quantising itself is bitsandbytes', called directly, on CPU and CUDA alike. The layers only store its result and
multiply by what it dequantises to, so that the gradient is the exact one of the dequantised weight. NF4 (Dettmers et
al. 2023, arXiv 2305.14314) is written out in plain torch at the end: slow, readable, and bit for bit the same.

To add a quantiser: a class with `in_features`, `out_features`, `bias`, `codes`, `forward` and `dequantize(dtype)`,
made from a weight and an optional bias, and a line in `QUANTIZERS`. bitsandbytes takes seconds to import, so that
waits until a layer is made.
"""

import copy
import logging
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

BLOCK = 64  # weights that share one scale in the 4-bit formats


def bitsandbytes():
    """The bitsandbytes package, without its advice to install `kernels`: with it, it would fetch native code."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


class _DequantizedLinear(torch.autograd.Function):
    """x @ W.T for a frozen, quantised W. The backward pass dequantises again: kept, W would undo all the saving."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantize(grad.dtype), None


class QuantizedLinear(nn.Module):
    """What the quantised layers share: y = x @ dequantize(x.dtype).T + bias, for x (..., in_features)."""

    def __init__(self, weight, bias):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias  # (out_features,), unquantised, or None

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _DequantizedLinear.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self, dtype):
        """The weight that this layer multiplies by, (out_features, in_features) of `dtype`."""
        raise NotImplementedError

    def nbytes(self):
        """Bytes that the quantised weight takes, its scales included."""
        raise NotImplementedError


class Linear4bit(QuantizedLinear):
    """4 bits a weight and one fp32 scale for each 64: 4.5 bits. `double_quant` stores the scales in 8 bits: 4.13."""

    def __init__(self, weight, bias, data_type, double_quant):
        super().__init__(weight, bias)
        # From fp32 always: the codes must not depend on the precision that the rest of the model is loaded in.
        self.codes, self.state = bitsandbytes().functional.quantize_4bit(
            weight.float().contiguous(), blocksize=BLOCK, compress_statistics=double_quant, quant_type=data_type
        )

    def dequantize(self, dtype):
        state = copy.copy(self.state)
        state.dtype = dtype
        return bitsandbytes().functional.dequantize_4bit(self.codes, state)

    def nbytes(self):
        tensors = [self.codes, self.state.absmax]
        if self.state.nested:
            tensors.append(self.state.state2.absmax)
        return sum(tensor.nbytes for tensor in tensors)


class Linear8bit(QuantizedLinear):
    """8 bits a weight and one fp32 scale a row, as LLM.int8() stores them (Dettmers et al. 2022, arXiv 2208.07339).

    Only the weight is quantised: activations stay as they are, so there are no outlier columns to treat apart.
    """

    def __init__(self, weight, bias):
        super().__init__(weight, bias)
        # bitsandbytes takes fp16 alone here, whose range a weight never leaves.
        self.codes, self.scales, _ = bitsandbytes().functional.int8_vectorwise_quant(weight.half().contiguous())

    def dequantize(self, dtype):
        return bitsandbytes().functional.int8_vectorwise_dequant(self.codes, self.scales).to(dtype)

    def nbytes(self):
        return self.codes.nbytes + self.scales.nbytes


QUANTIZERS = {
    "bnb.nf4": partial(Linear4bit, data_type="nf4", double_quant=False),
    "bnb.nf4-dq": partial(Linear4bit, data_type="nf4", double_quant=True),
    "bnb.fp4": partial(Linear4bit, data_type="fp4", double_quant=False),
    "bnb.fp4-dq": partial(Linear4bit, data_type="fp4", double_quant=True),
    "bnb.int8": Linear8bit,
}


# ------------------------------------------------------------------------------------ NF4, the readable reference

# The 16 values of NormalFloat4: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero. The paper
# (appendix E) prints them.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def nf4_quantize(weight):
    """NF4 codes and scales of a weight whose size is a multiple of 64.

    Returns codes (size/2,) uint8, the first of two weights in the high half, and absmax (size/64,) fp32.
    """
    values = torch.tensor(NF4_VALUES, device=weight.device)
    blocks = weight.float().reshape(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]  # times the reciprocal, as the fast kernel does
    codes = torch.bucketize(scaled, (values[1:] + values[:-1]) / 2).flatten().to(torch.uint8)
    return codes[0::2] << 4 | codes[1::2], absmax


def nf4_dequantize(codes, absmax, shape, dtype):
    """The weight of `shape` and `dtype` that NF4 codes and scales stand for."""
    values = torch.tensor(NF4_VALUES, device=codes.device)
    pairs = torch.stack((codes >> 4, codes & 15), dim=1)
    return (values[pairs.int()].reshape(-1, BLOCK) * absmax[:, None]).reshape(shape).to(dtype)
