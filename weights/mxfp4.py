"""MXFP4, the format of GPT-OSS's experts: 4 bits a weight and one power of two for each 32 of them.

OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 and 6.3; quantise anew with --quantize.
"""

import torch
from torch import Tensor

BLOCK = 32  # weights that share a scale
# The values of E2M1: a sign, two bits of exponent, one of mantissa.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BIAS = 127  # of the scale's exponent (E8M0)


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """The weight (rows, columns) in bf16 of blocks (rows, columns / 32, 16) and scales (rows, columns / 32), in uint8.

    A byte has two weights, the first one in its lower half. Exact, as bf16 has 8 bits of mantissa.
    """
    values = torch.tensor(VALUES)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=1)  # (256, 2): of each byte
    factors = torch.exp2(scales.float() - BIAS)
    return (pairs[blocks.int()].flatten(-2) * factors[..., None]).flatten(-2).bfloat16()
