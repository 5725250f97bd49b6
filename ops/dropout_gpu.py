"""Triton's dropout. dropout.py has what it computes."""

import triton
import triton.language as tl


@triton.jit
def _mixed(h):
    h = tl.mul(h ^ h >> 16, 0x85EBCA6B, sanitize_overflow=False)
    h = tl.mul(h ^ h >> 13, 0xC2B2AE35, sanitize_overflow=False)
    return h ^ h >> 16


@triton.jit
def dropout(x, y, elements, factor, threshold_high, threshold_low, seed, other_seed, BLOCK: tl.constexpr):
    """y = x * factor where the hash of an element's number is at least the threshold, else 0.

    Moves 4 bytes an element in bf16.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    number = place.to(tl.uint32)
    threshold = threshold_high.to(tl.uint32) << 16 | threshold_low.to(tl.uint32)
    kept = _mixed(_mixed(number ^ seed.to(tl.uint32)) ^ other_seed.to(tl.uint32)) >= threshold
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * factor
    tl.store(y + place, tl.where(kept, value, 0.0).to(y.dtype.element_ty), mask=inside)
