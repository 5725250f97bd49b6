"""Weights in 4 and 8 bits as bitsandbytes stores them: to numbers, and in a product. The plain forms, and Triton's.

In 4 bits (NF4: Dettmers et al. 2023, arXiv 2305.14314; FP4) a code is a place in a table of 16 values, and 64 weights
in row order, a block, share a scale. A byte has two codes, the first in its high half; the last block is filled up.
With double quantisation scales are codes of 8 bits themselves (`BlockScales`). In 8 bits a row shares a scale.

On a CPU bitsandbytes computes the same, bit for bit (quantize.py).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.cpp import operator
from ops.gpu import launch, power_of_two

BLOCK = 64  # weights that share a scale in 4 bits
SCALE_BLOCK = 256  # scales that share a scale, with double quantisation
MOST_ROWS = 16  # that `multiply_4bit` takes: with more, dequantising is the smaller part of the product
# The 16 values of NormalFloat4: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero. The paper
# (appendix E) prints them.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# bitsandbytes' FP4: a sign, two bits of exponent and one of mantissa, over 12. Eight positive ones, eight negative.
FP4_VALUES = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 1 / 16, 8, 12, 4, 6, 2, 3))

# Sizes of dequantize_gpu.py's tiles, for 128 threads. Each loads 16 bytes of codes at once, the most that it can, and
# stores 16 at once beside its neighbour's; so between the two they exchange what they have, in 4 bits the codes.
BLOCKS = 64  # of a program of `dequantize_4bit`: 32 weights a thread
CODES = 2048  # of a program of `dequantize_rows`: 16 a thread
# On a fast card instructions, not bytes, limit the product. Compiled for an H100, with x in bf16, a weight takes 6.6 in
# sums with one row, 8.5 with two and 12 with four, and 8.6 in tl.dot with any number: its tiles have 16 rows.
SUMS = {"NS": 4, "BLOCKS": 16, "num_warps": 4}  # for up to MOST_SUMS rows
DOTS = {"NS": 64, "BLOCKS": 2, "num_warps": 4}
MOST_SUMS = 2
PROGRAMS = 256  # about two for each processor of a large GPU; if there would be fewer, several share each row


class BlockScales(NamedTuple):
    """The scale of each block: `absmax` (blocks,) fp32, or with double quantisation values[absmax] * nested + offset.

    Then absmax is uint8, values (256,) fp32, offset () fp32, and nested fp32, one for each 256 blocks.
    """

    absmax: Tensor
    values: Tensor | None = None
    nested: Tensor | None = None
    offset: Tensor | None = None


# ------------------------------------------------------------------------------------------------- the plain forms


def plain_quantize_4bit(weight: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight whose size is a multiple of 64: the nearest of `values` (16,) fp32, times the scale.

    Returns codes (size/2,) uint8 and absmax (size/64,) fp32.
    """
    ordered, places = values.sort(stable=True)
    blocks = weight.float().reshape(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]  # times the reciprocal, as bitsandbytes does
    codes = places[torch.bucketize(scaled, (ordered[1:] + ordered[:-1]) / 2).flatten()].to(torch.uint8)
    return codes[0::2] << 4 | codes[1::2], absmax


def plain_block_scales(scales: BlockScales) -> Tensor:
    """The scale of each block, (blocks,) fp32."""
    if scales.values is None:
        return scales.absmax
    shared = scales.nested.repeat_interleave(SCALE_BLOCK)[: len(scales.absmax)]
    return scales.values[scales.absmax.int()] * shared + scales.offset


def part_of_scales(scales: BlockScales, first: tuple[int, int], width: int) -> Tensor:
    """The scale of each block, fp32, of a part of a weight whose scales are quantised as those of the whole weight.

    scales: its absmax are the part's, (rows, blocks in a row of the part); the rest is the whole weight's. first: row
    and column of its first block in the whole weight, of which a row has `width` blocks.
    """
    rows, columns = (
        torch.arange(start, start + size, dtype=torch.int32, device=scales.absmax.device)
        for start, size in zip(first, scales.absmax.shape, strict=True)
    )
    group = (rows[:, None] * width + columns) // SCALE_BLOCK
    return scales.values[scales.absmax.int()] * scales.nested[group] + scales.offset


def plain_dequantize_4bit(
    codes: Tensor, scales: BlockScales, values: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The reference: the weight of `shape` and `dtype` that 4-bit codes stand for.

    codes: uint8, 32 of them for each block. values: (16,) fp32, the type's table.
    """
    codes = codes.flatten()
    pairs = torch.stack((codes >> 4, codes & 15), dim=1)
    weights = values[pairs.int()].reshape(-1, BLOCK) * plain_block_scales(scales)[:, None]
    return weights.flatten()[: shape[0] * shape[1]].reshape(shape).to(dtype)


def plain_dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The reference: the weight that codes (out, in) int8 and the largest size in each row, (out,) fp32, stand for."""
    return (codes * scales[:, None] * (1 / 127)).to(dtype)


def plain_multiply_4bit(x: Tensor, codes: Tensor, scales: BlockScales, values: Tensor, out_features: int) -> Tensor:
    """The reference: x (..., in) times the transposed 4-bit weight (out_features, in), in fp32 and then x's dtype."""
    weight = plain_dequantize_4bit(codes, scales, values, (out_features, x.size(-1)), torch.float32)
    return F.linear(x.float(), weight).to(x.dtype)


# --------------------------------------------------------------------------------------------------------- in Triton


@operator(
    "dequantize_4bit(Tensor codes, Tensor absmax, Tensor? nested_values, Tensor? nested, Tensor? offset, "
    "Tensor values, int[] shape, ScalarType dtype) -> Tensor"
)
def _dequantize_4bit(codes, absmax, nested_values, nested, offset, values, shape, dtype):
    weight = codes.new_empty(shape, dtype=dtype)
    given = (codes.view(torch.int32), absmax, nested_values, nested, offset, values, weight, weight.numel())
    # Rounded after the multiplication of a scale and again after the addition, as two operations are.
    launch("dequantize_4bit", (-(-len(absmax) // BLOCKS),), *given, BLOCKS=BLOCKS, enable_fp_fusion=False)
    return weight


def dequantize_4bit(
    codes: Tensor, scales: BlockScales, values: Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """`plain_dequantize_4bit` in one launch, for codes with which Triton computes (`in_triton(codes, dtype)`)."""
    return _dequantize_4bit(codes.flatten(), *scales, values, shape, dtype)


@operator("dequantize_rows(Tensor codes, Tensor scales, ScalarType dtype) -> Tensor")
def _dequantize_rows(codes, scales, dtype):
    weight, (rows, columns) = torch.empty_like(codes, dtype=dtype), codes.shape
    width = min(CODES, power_of_two(columns))
    height = CODES // width
    grid = (-(-rows // height), -(-columns // width))
    launch("dequantize_rows", grid, codes, scales, weight, rows, columns, ROWS=height, COLUMNS=width)
    return weight


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`plain_dequantize_rows` in one launch, for codes with which Triton computes."""
    return _dequantize_rows(codes, scales, dtype)


@operator(
    "multiply_4bit(Tensor x, Tensor codes, Tensor absmax, Tensor? nested_values, Tensor? nested, Tensor? offset, "
    "Tensor values, int out_features) -> Tensor"
)
def _multiply_4bit(x, codes, absmax, nested_values, nested, offset, values, out_features):
    rows, columns = x.shape
    name, how = ("multiply_4bit_sums", SUMS) if rows <= MOST_SUMS else ("multiply_4bit_dots", DOTS)
    programs, steps = -(-out_features // how["NS"]), -(-columns // (BLOCK * how["BLOCKS"]))
    part = -(-steps // -(-PROGRAMS // programs))  # steps of a program
    parts = -(-steps // part)
    y = x.new_empty((parts, rows, out_features), dtype=torch.float32 if parts > 1 else x.dtype)
    codes = codes.view(torch.int32) if rows <= MOST_SUMS else codes
    given = (x, codes, absmax, nested_values, nested, offset, values, y, rows, out_features, columns)
    padded = power_of_two(rows) if rows <= MOST_SUMS else MOST_ROWS
    launch(name, (programs, parts), *given, part * how["BLOCKS"], ROWS=padded, **how)
    return y[0] if parts == 1 else y.sum(0).to(x.dtype)  # no atomic additions: the same sum each time


def multiply_4bit(x: Tensor, codes: Tensor, scales: BlockScales, values: Tensor, out_features: int) -> Tensor:
    """`plain_multiply_4bit` reading the codes once, for x with which Triton computes and that `fits_multiply_4bit`."""
    y = _multiply_4bit(x.reshape(-1, x.size(-1)).contiguous(), codes.flatten(), *scales, values, out_features)
    return y.view(*x.shape[:-1], out_features)


def fits_multiply_4bit(x: Tensor) -> bool:
    """Whether `multiply_4bit` takes the shape of x (..., in): 1 to 16 rows of whole blocks."""
    return 0 < x.numel() <= MOST_ROWS * x.size(-1) and x.size(-1) % BLOCK == 0
