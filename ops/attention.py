"""Attention: which positions see which, and the fastest way to compute it on a device.

`plain_attention` is the thing itself, written out; the other ways are held against it. On CUDA fused kernels are
torch's, on a CPU they are kernels_cpu.cpp's.

Shapes: B rows, T queries, S keys, H query heads, K key/value heads, G = H / K heads that share keys, d head size.
"""

import ctypes
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from ops.cpp import call_cpp, in_cpp, operator

# From torch 2.12 on varlen_attn wants to be told that query heads share keys. Its kernel took them before, too.
GROUPS_ANNOUNCED = torch.__version__ >= (2, 12)


def choose_attention(config, tokens, dtype, cache, window, offsets, tree=None):
    """The fastest way to attend for these tokens (B, T), in `dtype` on their device: a function of q, k and v.

    offsets: where the samples begin that lie end to end in a single row, and the last one ends; None if each row is
    one sample. A sample attends to itself alone. tree: a `Tree`, where a row is one beginning with several ends.
    """
    (B, T), device = tokens.shape, tokens.device.type
    if tree is not None:
        return Attend(attend, mask=tree_mask(tree, window))
    if cache is None and in_cpp(tokens, dtype):
        return Attend(compiled_attention, offsets=offsets or list(range(0, (B + 1) * T, T)), window=window)
    if offsets is not None:
        # "meta" is a CUDA device that is not there, in plan.py.
        half = dtype != torch.float32 or (device == "cuda" and torch.is_autocast_enabled(device))
        if device in ("cuda", "meta") and half and config.head_dim % 8 == 0:
            longest = max(end - start for start, end in pairwise(offsets))
            on_device = torch.tensor(offsets, dtype=torch.int32, device=device)
            return Attend(fast_varlen_attention, offsets=on_device, max_length=longest, window=window)
        return Attend(plain_varlen_attention, offsets=offsets, window=window)
    length, padding = (0, None) if cache is None else (cache.length, cache.padding)
    return Attend(attend, mask=attention_mask(T, length + T, window, padding, tokens.device))


class Tree(NamedTuple):
    """Rows that branch: a beginning, and after it ends that each follow it directly and do not see one another.

    positions (B, T) int64: each token's place in its own text. branches (B, T) int64: 0 for the beginning, and a number
    above 0 for each end, the same for all of its tokens.
    """

    positions: torch.Tensor
    branches: torch.Tensor


class Attend:
    """One of the functions below with what it needs to know of a micro-batch: `attend(q, k, v)` calls it.

    torch.compile is to leave it alone (finetune.compile_blocks says so to it): it would make a new graph for every
    micro-batch, and has nothing to fuse here.
    """

    def __init__(self, function, **known):
        self.function, self.known = function, known

    def __call__(self, q, k, v):
        return self.function(q, k, v, **self.known)


def plain_attention(q, k, v, mask=None):
    """Attention written out, causal where `mask` (T, S) bool is None: q (B, H, T, d), k, v (B, K, S, d): as q."""
    B, H, T, d = q.shape
    K, S = k.size(1), k.size(2)
    scores = (q.reshape(B, K, H // K * T, d) @ k.transpose(-2, -1)).view(B, H, T, S).float() * d**-0.5
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).to(v.dtype)
    return (weights.view(B, K, H // K * T, S) @ v).view(B, H, T, d)


def attention_mask(T, S, window, padding, device):
    """Which of the S keys each of the last T positions may see: bool (B or 1, 1, T, S).

    None where causality alone says it, so that attention can take its fast path. `padding` (B,) counts the
    positions at the left of each row that hold nothing.
    """
    if padding is None and (window is None or S <= window) and T in (1, S):  # noqa: SIM300
        return None
    query = torch.arange(S - T, S, device=device)[:, None]
    key = torch.arange(S, device=device)[None]
    mask = (key <= query)[None, None]
    if window is not None:
        mask = mask & (key > query - window)
    if padding is not None:  # a padding position sees itself: a softmax over nothing would be NaN
        mask = mask & (key >= padding[:, None, None, None]) | (key == query)
    return mask


def tree_mask(tree, window):
    """Which keys each position of a `Tree` may see, in a window of its own text or in all of it: bool (B, 1, T, T)."""
    positions, branches = tree
    T = branches.size(1)
    mask = torch.ones(T, T, dtype=torch.bool, device=branches.device).tril()
    mask = mask & ((branches[:, None] == 0) | (branches[:, None] == branches[:, :, None]))
    if window is not None:
        mask &= positions[:, :, None] - positions[:, None] < window
    return mask[:, None]


def attend(q, k, v, mask):
    """Attention of q (B, H, T, d) to k, v (B, K, S, d), causal where `mask` is None: (B, H, T, d)."""
    B, H, T, d = q.shape
    K = k.size(1)
    if T == 1:  # the heads that share keys are the rows of one product: no key is copied
        return F.scaled_dot_product_attention(q.view(B, K, H // K, d), k, v, attn_mask=mask).view(B, H, T, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=K != H)


# ---------------------------------------------------------------------------------- samples end to end in one row


def fast_varlen_attention(q, k, v, offsets, max_length, window=None):
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


def plain_varlen_attention(q, k, v, offsets, window=None):
    """The same, sample by sample: the reference, and the way where the fast kernel cannot go. offsets: a list."""
    parts = []
    for start, end in pairwise(offsets):
        mask = attention_mask(end - start, end - start, window, None, q.device)
        parts.append(attend(*(x[:, :, start:end] for x in (q, k, v)), mask))
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


class _CompiledAttention(torch.autograd.Function):
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


def compiled_attention(q, k, v, offsets, window=None):
    """As `plain_varlen_attention`, in kernels_cpu.cpp: softmax in fp32, no tensor of weights, backward by hand.

    q (B, H, T, d), k, v (B, K, T, d) on a CPU: in bf16 if all three are, else in fp32 (autocast may mix them).
    offsets: of all rows, end to end: B * T positions.
    """
    dtype = torch.bfloat16 if q.dtype == k.dtype == v.dtype == torch.bfloat16 else torch.float32
    return _CompiledAttention.apply(*(x.to(dtype) for x in (q, k, v)), offsets, window or 0)
