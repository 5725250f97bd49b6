"""Attention by the fastest way of each device. What it computes is written out in model.py, in `plain_attention`.

On CUDA the kernels are torch's, on a CPU they are kernels_cpu.cpp's. tests/ops/test_attention.py holds each way to the
plain one.

Shapes: B rows, T queries, S keys, H query heads, K key/value heads, G = H / K heads that share keys, d head size.
"""

import ctypes
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ops.cpp import call_cpp, in_cpp, operator

# From torch 2.12 on varlen_attn has to be told that query heads share keys. Before, it took them without a word.
GROUPS_ANNOUNCED = torch.__version__ >= (2, 12)


def choose_attention(layout: Any, head_dim: int, dtype: torch.dtype, window: int | None) -> "Attend":
    """The fastest way to attend for the tokens of a `model.Layout`: a function of q, k and v of `dtype`.

    It computes what `plain_attention` does with `layout.mask(window)`.
    """
    (B, T), cache, offsets, tree = layout.tokens.shape, layout.cache, layout.offsets, layout.tree
    if cache is None and tree is None:
        if in_cpp(layout.tokens, dtype):
            return Attend(cpp_attention, offsets=offsets or list(range(0, (B + 1) * T, T)), window=window)
        if offsets is not None:
            return _varlen(layout, head_dim, dtype, window)
    S = T if cache is None else cache.length + T
    padded = cache is not None and cache.padding is not None
    if tree is None and not padded and (window is None or window >= S) and T in (1, S):
        return Attend(sdpa_attention, mask=None)  # causality alone says it: the kernel can leave out half of the work
    return Attend(sdpa_attention, mask=layout.mask(window))


def _varlen(layout, head_dim, dtype, window):
    """The way for samples end to end in one row, where kernels_cpu.cpp is not used."""
    offsets, device = layout.offsets, layout.tokens.device.type
    # "meta" is a CUDA device that is not there, in training/memory/plan.py.
    half = dtype != torch.float32 or (device == "cuda" and torch.is_autocast_enabled(device))
    if device not in ("cuda", "meta") or not half or head_dim % 8:
        return Attend(sdpa_varlen_attention, offsets=offsets, window=window)
    longest = max(end - start for start, end in pairwise(offsets))
    on_device = torch.tensor(offsets, dtype=torch.int32, device=device)
    return Attend(flash_varlen_attention, offsets=on_device, max_length=longest, window=window)


class Attend:
    """One of the functions below with what it has to know of a micro-batch: `attend(q, k, v)` calls it.

    torch.compile has to leave it alone: it would make a new graph for every micro-batch, and has nothing to fuse here.
    """

    def __init__(self, function: Callable, **known):
        self.function, self.known = function, known

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q (B, H, T, d) to k, v (B, K, S, d): (B, H, T, d)."""
        return self.function(q, k, v, **self.known)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`plain_attention` in torch's fused kernels; causal where `mask` is None."""
    B, H, T, d = q.shape
    K = k.size(1)
    if T == 1:  # the heads that share keys are the rows of one product: no key is copied
        return F.scaled_dot_product_attention(q.view(B, K, H // K, d), k, v, attn_mask=mask).view(B, H, T, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=K != H)


# ---------------------------------------------------------------------------------- samples end to end in one row


def flash_varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, max_length: int, window: int | None = None
) -> Tensor:
    """Causal attention of q (1, H, T, d) to k, v (1, K, T, d) inside each sample of a packed row: (1, H, T, d).

    In one kernel: FlashAttention (Dao 2023, arXiv 2307.08691), which takes bf16 and fp16 on CUDA alone.
    offsets: (n + 1,) int32 on q's device; sample i takes the positions offsets[i] to before offsets[i + 1], T in all.
    max_length: the length of the longest sample. window: how many positions back a query sees, itself included.
    """
    from torch.nn.attention.varlen import varlen_attn

    if torch.is_autocast_enabled(q.device.type):  # it knows scaled_dot_product_attention, but not this kernel
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    groups = {"enable_gqa": True} if k.size(1) != q.size(1) and GROUPS_ANNOUNCED else {}
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (T, heads, d)
    left = -1 if window is None else window - 1  # the kernel does not count the query itself
    y = varlen_attn(q, k, v, offsets, offsets, max_length, max_length, window_size=(left, 0), **groups)
    return y.transpose(0, 1)[None]


def sdpa_varlen_attention(q: Tensor, k: Tensor, v: Tensor, offsets: list[int], window: int | None = None) -> Tensor:
    """The same, sample by sample, where that kernel cannot go: in fp32, or on a CPU without kernels_cpu.cpp."""
    parts = []
    for start, end in pairwise(offsets):
        T, mask = end - start, None
        if window is not None and window < T:
            mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        parts.append(sdpa_attention(*(x[:, :, start:end] for x in (q, k, v)), mask))
    return torch.cat(parts, dim=2)


# --------------------------------------------------------------------------------------------------------- on a CPU


class Heads(ctypes.Structure):
    """kernels_cpu.cpp's description of what attends to what."""

    _fields_ = [(name, ctypes.c_int64) for name in ("heads", "key_heads", "d", "window", "samples")]
    _fields_ += [("offsets", ctypes.c_void_p), ("scale", ctypes.c_float)]


def _call_cpp(function, q, k, v, offsets, window, arguments):
    """Attend in kernels_cpu.cpp. q, k, v (B, T, heads, d); arguments: the tensors that its function takes."""
    starts, d = torch.tensor(offsets, device=q.device), q.size(-1)
    where = None if q.is_meta else starts.data_ptr()
    heads = Heads(q.size(2), k.size(2), d, window, len(offsets) - 1, where, d**-0.5)
    call_cpp(function, *arguments, ctypes.byref(heads))


@operator("attend(Tensor q, Tensor k, Tensor v, int[] offsets, int window) -> (Tensor, Tensor)")
def _attend(q, k, v, offsets, window):
    """Attention of q (B, T, H, d) to k, v (B, T, K, d) as q, and the log-sums of its softmax (B, T, H) fp32."""
    y, log_sums = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    _call_cpp("attend", q, k, v, offsets, window, (q, k, v, y, log_sums))
    return y, log_sums


@operator(
    "attend_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor log_sums, int[] offsets, int window)"
    " -> (Tensor, Tensor, Tensor)"
)
def _attend_backward(grad, q, k, v, log_sums, offsets, window):
    grads = tuple(torch.empty_like(x) for x in (q, k, v))
    _call_cpp("attend_backward", q, k, v, offsets, window, (grad, q, k, v, log_sums, *grads))
    return grads


@register_flop_formula(torch.ops.onetune.attend)
def _attend_flops(q, k, v, offsets, *_, out_shape=None):
    return 4 * q[2] * q[3] * sum((end - start) ** 2 for start, end in pairwise(offsets))


@register_flop_formula(torch.ops.onetune.attend_backward)
def _attend_backward_flops(grad, q, k, v, log_sums, offsets, *_, out_shape=None):
    return 5 * _attend_flops(q, k, v, offsets) // 2  # five products instead of two


class _CppAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, offsets, window):
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        y, log_sums = _attend(q, k, v, offsets, window)
        ctx.save_for_backward(q, k, v, log_sums)
        ctx.known = offsets, window
        return y.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        grads = _attend_backward(grad.transpose(1, 2).contiguous(), *ctx.saved_tensors, *ctx.known)
        return *(x.transpose(1, 2) for x in grads), None, None


def cpp_attention(q: Tensor, k: Tensor, v: Tensor, offsets: list[int], window: int | None = None) -> Tensor:
    """As `sdpa_varlen_attention`, in kernels_cpu.cpp: softmax in fp32, no tensor of weights, backward by hand.

    q (B, H, T, d), k, v (B, K, T, d) on a CPU: in bf16 if all three are, else in fp32 (autocast may mix them).
    offsets: of all rows, end to end: B * T positions.
    """
    dtype = torch.bfloat16 if q.dtype == k.dtype == v.dtype == torch.bfloat16 else torch.float32
    return _CppAttention.apply(*(x.to(dtype) for x in (q, k, v)), offsets, window or 0)
