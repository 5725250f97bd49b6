"""Frozen linear layers of one input with LoRA, forward and backward by hand.

The products with A and B are thin: they take as long as reading what they multiply. So on a CPU one call of
kernels_cpu.cpp makes those of all layers and adapters; elsewhere torch does, and on a GPU low_rank_gpu.py adds those of
up to three layers in one launch.

Shapes: N positions (rows of a micro-batch end to end), r rank.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ops.cpp import call_cpp, in_cpp, operator
from ops.dropout import drop, new_seeds
from ops.dtypes import as_multiplied
from ops.gpu import in_triton, launch, power_of_two

TOGETHER = 3  # layers whose thin products low_rank_gpu.py adds in one launch: queries, keys and values


class LowRank(NamedTuple):
    """LoRA for some positions of several layers' input x (N, in): layer i's y += scale * (x @ A.T) @ B.T.

    start, end: of the positions. scales and factors: of each layer; A (r, in) and B (out, r), both trainable and fp32.
    A layer that has none has factors of rank 0.
    """

    start: int
    end: int
    scales: Sequence[float]
    factors: Sequence[tuple[Tensor, Tensor]]

    @property
    def ranks(self) -> list[int]:
        """The rank of each layer."""
        return [a.size(0) for a, _ in self.factors]

    def own(self, x: Tensor) -> Tensor:
        """These positions of x (N, ...)."""
        return x if self.end - self.start == len(x) else x[self.start : self.end]


def low_rank_linears(
    x: Tensor,
    restores: Sequence[Callable[[torch.dtype], Tensor]],
    parts: Sequence[LowRank],
    dropouts: Sequence[float] = (),
) -> tuple[Tensor, ...]:
    """Frozen linear layers of one input with LoRA: (..., out) for each.

    x (..., in). restores: for each layer a function that gives its weight (out, in) in a dtype. parts: the adapters,
    each at its own positions of the N that x has, end to end; no position is in two. dropouts: for each layer the share
    of A's input that is dropped.
    """
    x = as_multiplied(x)
    drops = [partial(drop, p=p, seeds=new_seeds()) for p in dropouts] if any(dropouts) else None
    how = [(part.start, part.end, part.scales) for part in parts]
    factors = (matrix for part in parts for pair in part.factors for matrix in pair)
    return _LowRankLinears.apply(x, restores, how, drops, *factors)


class _LowRankLinears(torch.autograd.Function):
    """x @ W.T + scale * (drop(x) @ A.T) @ B.T for several layers of one input, the small products added in place.

    Kept for the backward pass: x, and of each part x @ A.T; where torch multiplies, also all A as one matrix in x's
    dtype. `how`: (start, end, scales) of each part.
    """

    @staticmethod
    def forward(ctx, x, restores, how, drops, *factors):
        flat, parts = x.flatten(0, -2).contiguous(), _as_parts(how, factors)
        ys = [F.linear(flat, restore(x.dtype)) for restore in restores]
        cpp = _fits_cpp(flat, drops)
        if cpp:
            kept = [flat.new_empty(part.end - part.start, sum(part.ranks)) for part in parts]
            _low_rank_(flat, ys, kept, factors, *_numbers(parts))
        else:
            each = (_add_part(part.own(flat), [part.own(y) for y in ys], part, drops) for part in parts)
            kept = [tensor for pair in each for tensor in pair]
        ctx.save_for_backward(flat, *kept, *factors)
        ctx.known, ctx.shape = (restores, how, drops, cpp), x.shape
        return tuple(y.view(*x.shape[:-1], y.size(-1)) for y in ys)

    @staticmethod
    def backward(ctx, *grads):
        # `cpp` is kept, not asked for again: torch.compile's backward pass does not say that it is being compiled.
        (flat, *kept), (restores, how, drops, cpp) = ctx.saved_tensors, ctx.known
        count = len(how) if cpp else 2 * len(how)
        kept, factors = kept[:count], kept[count:]
        grads, parts = [grad.reshape(-1, grad.size(-1)) for grad in grads], _as_parts(how, factors)
        grad_x = None
        if ctx.needs_input_grad[0]:
            weights = (restore(grad.dtype) for restore, grad in zip(restores, grads, strict=True))
            grad_x = _sum_of_products(grads, weights)
        if cpp:
            grads = [grad.contiguous() for grad in grads]
            grad_factors = [torch.empty_like(factor) for factor in factors]
            _low_rank_backward_(flat, grad_x, grads, kept, factors, grad_factors, *_numbers(parts))
        else:
            grad_factors = []
            for part, small, a in zip(parts, kept[0::2], kept[1::2], strict=True):
                own_x = None if grad_x is None else part.own(grad_x)
                own = part.own(flat), own_x, [part.own(grad) for grad in grads]
                grad_factors += _add_part_backward(*own, small, a, part, drops)
        grad_x = None if grad_x is None else grad_x.view(ctx.shape)
        return grad_x, None, None, None, *grad_factors


def _sum_of_products(xs, weights):
    """The sum of x @ weight; no more than one weight is there at a time."""
    total = None
    for x, weight in zip(xs, weights, strict=True):
        total = x @ weight if total is None else total.addmm_(x, weight)
    return total


def _fits_cpp(x, drops):
    """Whether kernels_cpu.cpp makes the small products: of all parts and layers in one call."""
    return in_cpp(x) and not in_triton(x) and not drops


def _as_parts(how, factors):
    """The `LowRank`s of a flat list of their factors."""
    pairs, parts = [*zip(factors[0::2], factors[1::2], strict=True)], []
    for start, end, scales in how:
        parts.append(LowRank(start, end, scales, pairs[: len(scales)]))
        pairs = pairs[len(scales) :]
    return parts


# -------------------------------------------------------------------------------------------- with torch, and on a GPU


def _add_part(x, ys, part, drops):
    """Add to each of ys (N, out) what a part makes of x (N, in), its positions alone: x @ A.T, and all A as one matrix.

    Without dropout that is multiplied, forward and backward: so thin a product costs as much as reading x. With it each
    layer drops others of x's elements, again in the backward pass.
    """
    a = [a for a, _ in part.factors]
    a = (a[0] if len(a) == 1 else torch.cat(a)).to(x.dtype)
    if drops:
        each = zip(drops, a.split(part.ranks), strict=True)
        small = torch.cat([drop(x) @ own.T for drop, own in each], dim=1)
    else:
        small = x @ a.T
    _add_low_rank_(ys, small, [b for _, b in part.factors], part.scales)
    return small, a


def _add_part_backward(x, grad_x, grads, small, a, part, drops):
    """The gradients of a part's factors, those of each A and B in turn; what it gives x's is added to `grad_x`."""
    dtype, grad_small = torch.float32, torch.empty_like(small)
    own = grad_small.split(part.ranks, dim=1)
    for grad, place, (_, b), scale in zip(grads, own, part.factors, part.scales, strict=True):
        _scaled_product(grad, b.to(grad.dtype), scale, place)
    each = zip(grads, small.split(part.ranks, dim=1), part.scales, strict=True)
    grad_b = [_scaled_gradient(grad.T, place, dtype, scale) for grad, place, scale in each]
    if drops:
        grad_a = [_scaled_gradient(place.T, drop(x), dtype) for place, drop in zip(own, drops, strict=True)]
    else:
        grad_a = _scaled_gradient(grad_small.T, x, dtype).split(part.ranks)
    if grad_x is not None and drops:
        for place, factor, drop in zip(own, a.split(part.ranks), drops, strict=True):
            grad_x += drop(place @ factor)  # dropping is its own transpose
    elif grad_x is not None:
        _add_low_rank_([grad_x], grad_small, [a.T], [1.0])
    return [gradient for pair in zip(grad_a, grad_b, strict=True) for gradient in pair]


def _scaled_product(a, b, scale, out=None):
    """scale * a @ b, into `out` if there is one: on a GPU such small products take as long as they take to launch."""
    out = a.new_empty(a.size(0), b.size(1)) if out is None else out
    return torch.addmm(out, a, b, beta=0, alpha=scale, out=out)


def _scaled_gradient(a, b, dtype, scale=1.0):
    """scale * a @ b in the dtype of a weight; on a GPU by one kernel, which does not round to a's dtype before."""
    if a.dtype == dtype or a.device.type == "cpu":
        return _scaled_product(a, b, scale).to(dtype)
    out = a.new_empty((a.size(0), b.size(1)), dtype=dtype)
    return torch.addmm(out, a, b, out_dtype=dtype, beta=0, alpha=scale)


@operator("add_low_rank_(Tensor(a!)[] ys, Tensor small, Tensor[] factors, float[] scales) -> ()")
def _add_low_rank_(ys, small, factors, scales):
    """Each y (N, out) += scale * its part (N, r) of small @ factor.T, for factors (out, r) of any layout, fp32."""
    ranks = [factor.size(1) for factor in factors]
    if in_triton(small):
        for first in range(0, len(ys), TOGETHER):
            some = slice(first, first + TOGETHER)
            part = small if len(ys) <= TOGETHER else small.split(ranks, dim=1)[some]
            part = part if isinstance(part, Tensor) else torch.cat(part, dim=1)
            _launch_add(ys[some], part, factors[some], scales[some])
    else:
        for y, part, factor, scale in zip(ys, small.split(ranks, dim=1), factors, scales, strict=True):
            y.addmm_(part, factor.to(y.dtype).T, alpha=scale)


def _launch_add(ys, small, factors, scales):
    columns, ranks = [y.size(1) for y in ys], [factor.size(1) for factor in factors]
    how = {"ROWS": 64, "COLUMNS": 128, "RANK": min(64, max(16, power_of_two(max(ranks))))}
    grid = -(-len(small) // how["ROWS"]), sum(-(-each // how["COLUMNS"]) for each in columns)
    distances = zip(*(factor.stride() for factor in factors), strict=True)
    ys, factors = ([*each, *[None] * (TOGETHER - len(each))] for each in (ys, factors))
    numbers = [[*each, *[0] * (TOGETHER - len(each))] for each in (scales, columns, ranks, *distances)]
    scales, columns, ranks, of_column, of_rank = numbers
    given = (*ys, *factors, *map(float, scales), *columns, *ranks, len(small), *of_column, *of_rank)
    launch("add_low_rank", grid, small, *given, **how)


@register_flop_formula(torch.ops.onetune.add_low_rank_)
def _add_low_rank_flops(ys, small, factors, scales, *_, out_shape=None):
    return sum(2 * y[0] * factor[0] * factor[1] for y, factor in zip(ys, factors, strict=True))


# ---------------------------------------------------------------------------------------------------- in C++, on a CPU


class _CFactors(ctypes.Structure):
    """kernels_cpu.cpp's Factors."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("A", "B", "grad_A", "grad_B")]
    _fields_ += [("rank", ctypes.c_int64), ("scale", ctypes.c_float)]


class _CPart(ctypes.Structure):
    """kernels_cpu.cpp's Part."""

    _fields_ = [(name, ctypes.c_int64) for name in ("start", "end", "ranks")]
    _fields_ += [("small", ctypes.c_void_p), ("layers", ctypes.POINTER(_CFactors))]


class _CLayers(ctypes.Structure):
    """kernels_cpu.cpp's Layers. It holds what its addresses are of."""

    _fields_ = [(name, ctypes.c_int64) for name in ("inputs", "count", "parts")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("outs", "ys", "all")]


@operator(
    "low_rank_(Tensor x, Tensor(a!)[] ys, Tensor(b!)[] smalls, Tensor[] factors, float[] scales, int[] starts) -> ()"
)
def _low_rank_(x, ys, smalls, factors, scales, starts):
    """In C++: add what all parts make of x (N, in) to ys (N, out), and leave x @ A.T of each in `smalls`."""
    if not x.is_meta:
        layers = _c_layers(x, ys, smalls, factors, None, scales, starts)
        call_cpp("low_rank", x, ctypes.byref(layers))


@operator(
    "low_rank_backward_(Tensor x, Tensor(a!)? grad_x, Tensor[] grads, Tensor[] smalls, Tensor[] factors, "
    "Tensor(b!)[] grad_factors, float[] scales, int[] starts) -> ()"
)
def _low_rank_backward_(x, grad_x, grads, smalls, factors, grad_factors, scales, starts):
    """In C++: the gradients of all factors, and what the parts give that of x, which is added to `grad_x`."""
    if not x.is_meta:
        layers = _c_layers(x, grads, smalls, factors, grad_factors, scales, starts)
        address = ctypes.c_void_p(None if grad_x is None else grad_x.data_ptr())
        call_cpp("low_rank_backward", x, address, ctypes.byref(layers))


def _c_layers(x, ys, smalls, factors, grad_factors, scales, starts):
    """The `_CLayers` of some parts, each of which has len(ys) pairs of factors."""
    assert all(each.is_contiguous() for each in (*ys, *smalls, *factors, *(grad_factors or ())))
    count, parts = len(ys), (_CPart * len(smalls))()
    of_factors = (_CFactors * len(scales))()
    for n, scale in enumerate(scales):
        pair = slice(2 * n, 2 * n + 2)
        own = [each.data_ptr() for each in (*factors[pair], *(grad_factors[pair] if grad_factors else ()))]
        of_factors[n] = _CFactors(*own, *[None] * (4 - len(own)), factors[2 * n].size(0), scale)
    for n, (small, start) in enumerate(zip(smalls, starts, strict=True)):
        own = ctypes.cast(ctypes.byref(of_factors, n * count * ctypes.sizeof(_CFactors)), ctypes.POINTER(_CFactors))
        parts[n] = _CPart(start, start + len(small), small.size(1), small.data_ptr(), own)
    outs = (ctypes.c_int64 * count)(*(y.size(1) for y in ys))
    addresses = (ctypes.c_void_p * count)(*(y.data_ptr() for y in ys))
    layers = _CLayers(x.size(1), count, len(parts), *map(ctypes.addressof, (outs, addresses, parts)))
    layers.held = outs, addresses, parts, of_factors
    return layers


def _numbers(parts):
    """The scales of all layers of all parts, and where each part begins."""
    return [scale for part in parts for scale in part.scales], [part.start for part in parts]


@register_flop_formula(torch.ops.onetune.low_rank_)
def _low_rank_flops(x, ys, smalls, factors, *_, out_shape=None):
    return sum(_flops_of_parts(smalls, factors, 2, 2))


@register_flop_formula(torch.ops.onetune.low_rank_backward_)
def _low_rank_backward_flops(x, grad_x, grads, smalls, factors, *_, out_shape=None):
    return sum(_flops_of_parts(smalls, factors, 2 if grad_x is None else 4, 4))


def _flops_of_parts(smalls, factors, of_a, of_b):
    """FLOPs of each part, from the shapes of its small and its factors, with so many for each element and position."""
    count = len(factors) // max(1, len(smalls))
    for n, (positions, _) in enumerate(smalls):
        own = factors[n * count : (n + 1) * count]
        yield positions * (of_a * sum(map(prod, own[0::2])) + of_b * sum(map(prod, own[1::2])))
