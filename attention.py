"""Attention: which positions see which, and the fastest way to compute it on a device.

`plain_attention` is the thing itself, written out; the other ways are held against it. Fused kernels are torch's. In
bf16 on a CPU the products are cut by hand into blocks: its fused kernel is four times slower there for short rows.

Shapes: B rows, T queries, S keys, H query heads, K key/value heads, G = H / K heads that share keys, d head size.
"""

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

QUERY_BLOCK = 128  # queries that attend in one product on a CPU; keys that come after all of them are left out
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
    if cache is None and device == "cpu" and dtype != torch.float32:
        groups = config.num_attention_heads // config.num_key_value_heads
        blocks = query_blocks([offsets] if offsets else [[0, T]] * B, window, groups)
        return Attend(block_attention, blocks=blocks)
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


# ------------------------------------------------------------------------------------------------- in bf16 on a CPU


def query_blocks(rows, window, groups):
    """How the samples in each row attend, each to itself: a list of (row, queries, keys, bias).

    rows: for each row of the micro-batch where samples begin and the last one ends, n + 1 numbers for n samples.
    window: how many positions back a query sees, itself included, or None. queries, keys: slices of positions.
    bias (groups * queries, keys) fp32: 0 or minus infinity, the same for each of the G heads that share keys.
    """
    blocks = []
    for row, offsets in enumerate(rows):
        for start, end in pairwise(offsets):
            for first in range(start, end, QUERY_BLOCK):
                last = min(first + QUERY_BLOCK, end)
                begin = start if window is None else max(start, first - window + 1)
                bias = _bias(last - first, last - begin, window, groups)
                blocks.append((row, slice(first, last), slice(begin, last), bias))
    return blocks


@lru_cache(maxsize=64)
def _bias(queries, keys, window, groups):
    """Causality, and the window, for the last `queries` of so many keys."""
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(queries, keys).masked_fill_(hidden, -torch.inf).repeat(groups, 1)


def _weights(q, k, bias):
    """softmax(q k^T / sqrt(d) + bias) in fp32 for q (K, rows, d), k (K, keys, d): (K, rows, keys)."""
    scale = q.size(-1) ** -0.5
    if q.dtype == torch.float32:
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
    else:
        scores = (q @ k.transpose(1, 2)).float().mul_(scale).add_(bias)
    return scores.softmax(dim=-1)


class _BlockAttention(torch.autograd.Function):
    """Softmax attention block by block; the backward pass computes the weights again, which are larger than q, k, v."""

    @staticmethod
    def forward(ctx, q, k, v, blocks):
        B, H, T, d = q.shape
        K = k.size(1)
        y = q.new_empty(B, T, K, H // K, d)
        for row, queries, keys, bias in blocks:
            weights = _weights(_rows(q[row, :, queries], K), k[row, :, keys], bias)
            result = weights.to(v.dtype) @ v[row, :, keys]  # (K, G * queries, d)
            y[row, queries] = result.view(K, H // K, -1, d).permute(2, 0, 1, 3)
        ctx.save_for_backward(q, k, v)
        ctx.blocks = blocks
        return y.view(B, T, H, d).transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        K, d = k.size(1), q.size(-1)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for row, queries, keys, bias in ctx.blocks:
            q_rows, grad_rows = _rows(q[row, :, queries], K), _rows(grad[row, :, queries], K)
            weights = _weights(q_rows, k[row, :, keys], bias)
            grad_v[row, :, keys] += weights.to(v.dtype).transpose(1, 2) @ grad_rows
            through = (grad_rows @ v[row, :, keys].transpose(1, 2)).float()  # gradient of the weights
            along = (through * weights).sum(-1, keepdim=True)
            through = through.sub_(along).mul_(weights).mul_(d**-0.5).to(q.dtype)  # of the scores
            grad_q[row, :, queries] = (through @ k[row, :, keys]).view(q[row, :, queries].shape)
            grad_k[row, :, keys] += through.transpose(1, 2) @ q_rows
        return grad_q, grad_k, grad_v, None


def _rows(x, K):
    """x (H, T, d) with the heads that share keys as rows of one matrix: (K, G * T, d)."""
    return x.reshape(K, -1, x.size(-1))


def block_attention(q, k, v, blocks):
    """Causal attention on a CPU, as `blocks` of `query_blocks` says: q (B, H, T, d), k, v (B, K, T, d), as q."""
    return _BlockAttention.apply(q, k, v, blocks)
