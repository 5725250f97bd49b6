"""NF4 dequantised by one Triton launch: an experiment. bench/machine/gpu.py times it against bitsandbytes' own kernel.

Reads codes (n/2,) uint8 and absmax (n/64,) fp32 once and writes the n weights once, which is the least that can be
moved. If it measures faster on a GPU its place is in quantize.py; until then the product takes bitsandbytes'.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantize import BLOCK, NF4_VALUES


@triton.jit
def _dequantize(codes, absmax, values, out, pairs, block: tl.constexpr, SIZE: tl.constexpr):
    start = tl.program_id(0) * SIZE
    pair = start + tl.arange(0, SIZE)
    inside = pair < pairs
    code = tl.load(codes + pair, mask=inside, other=0).to(tl.int32)
    scale = tl.load(absmax + pair // (block // 2), mask=inside, other=0.0)
    high, low = tl.load(values + (code >> 4)), tl.load(values + (code & 15))  # 64 bytes: they stay in the L1 cache
    weights = tl.interleave(high * scale, low * scale).to(out.dtype.element_ty)
    place = 2 * start + tl.arange(0, 2 * SIZE)
    tl.store(out + place, weights, mask=place < 2 * pairs)


@lru_cache
def _values(device):
    return torch.tensor(NF4_VALUES, device=device)


def nf4_dequantize_triton(
    codes: Tensor, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype, size: int = 1024, num_warps: int = 4
) -> Tensor:
    """The weight of `shape` and `dtype` that NF4 codes and scales stand for, as quantize.nf4_dequantize gives it.

    size: bytes of codes for one program, a power of 2.
    """
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    pairs = codes.numel()
    _dequantize[(triton.cdiv(pairs, size),)](
        codes, absmax, _values(codes.device), out, pairs, BLOCK, size, num_warps=num_warps
    )
    return out
