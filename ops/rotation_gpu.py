"""Triton's rotation of queries and keys. rotation.py has what it computes."""

import triton
import triton.language as tl


@triton.jit
def _turn(x, y, token, heads, first, cos, sin, half, d, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr):
    """Some heads of a token of x (tokens, heads, d): HEADS from number `first` on."""
    head = first + tl.arange(0, HEADS)[:, None]
    start, pair = (token.to(tl.int64) * heads + head) * d, tl.arange(0, HALF)[None]
    inside = (head < heads) & (pair < half)
    one = tl.load(x + start + pair, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x + start + half + pair, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + start + pair, (one * cos - other * sin).to(y.dtype.element_ty), mask=inside)
    tl.store(y + start + half + pair, (other * cos + one * sin).to(y.dtype.element_ty), mask=inside)
    if REST:  # dimensions that are not turned
        left = 2 * half + tl.arange(0, REST)[None]
        kept = (head < heads) & (left < d)
        tl.store(y + start + left, tl.load(x + start + left, mask=kept), mask=kept)


@triton.jit
def rotate(
    q, k, cos, sin, sign, to_q, to_k, query_heads, key_heads, d, half, angles,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """q (tokens, query_heads, d) and k (tokens, key_heads, d) turned: a program for HEADS heads of a token.

    cos, sin: (angles, half), of which the tokens have one after the other, again and again. sign: -1 to turn back.
    Moves 4 bytes an element in bf16.
    """
    token, first = tl.program_id(0), tl.program_id(1) * HEADS
    pair = tl.arange(0, HALF)[None]
    angle = (token % angles) * half + pair
    cosine = tl.load(cos + angle, mask=pair < half, other=0.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=pair < half, other=0.0).to(tl.float32) * sign
    query_programs = tl.cdiv(query_heads, HEADS)
    if tl.program_id(1) < query_programs:
        _turn(q, to_q, token, query_heads, first, cosine, sine, half, d, HEADS, HALF, REST)
    else:
        first -= query_programs * HEADS
        _turn(k, to_k, token, key_heads, first, cosine, sine, half, d, HEADS, HALF, REST)
