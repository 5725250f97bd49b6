"""FlexAttention (Dong et al. 2024, arXiv 2412.05496): attention on CUDA where FlashAttention cannot compute the scores.

torch writes the kernel, in Triton, from two small functions: what becomes of a score, and which keys a query sees. A
`BlockMask` says which blocks of keys a block of queries sees at all, so that the kernel passes over the others.

torch.compile makes the kernels, on CUDA alone. On a CPU the same functions run uncompiled, with all scores in memory,
in tests: tests/ops/test_flex.py holds values and gradients to `plain_attention`, and lets torch.compile trace them
forward and backward, for one graph for all lengths. The kernels themselves are tested in tests/training/test_gpu.py.

Shapes: B rows, T positions, H query heads, K key/value heads, d head size.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.activation import plain_softcap

BLOCK = 128  # queries, and keys, of a block: torch's default, which the blocks of its kernels divide
LEAST_HEAD_DIM = 16  # of Triton's matrix products
# Above this many graphs torch.compile raises an error. A run makes a few: with gradients of q, k and v or without, of a
# row of one block or of more. Its default is 8.
GRAPHS = 64

# Of heads above this size torch's own blocks need up to 151,552 bytes of shared memory (compiled by Triton 3.7.1 for
# sm_89, head size 256). A100 and H100 have 166,912 and 232,448; cards of sm_86, sm_89 and sm_120 have 101,376.
MANY_DIMS, MANY_BYTES = 128, 160_000


def score_function(scores: Any, device: torch.device) -> Callable:
    """What a layer with these `ops.attention.Scores` makes of the product of a query and a key, but for the sinks.

    Its numbers are tensors: torch.compile would make another kernel for each value of a Python number.
    """
    number = functools.partial(torch.full, (), device=device, dtype=torch.float32)
    scale = number(fill_value=scores.scale)
    softcap = None if scores.softcap is None else number(fill_value=scores.softcap)
    slopes = None if scores.slopes is None else torch.tensor(scores.slopes, device=device)

    def function(score, row, head, query, key):
        score = plain_softcap(score * scale, softcap)
        return score if slopes is None else score - slopes[head] * (query - key)

    return function


def block_mask(offsets: list[int], window: int | None, device: torch.device) -> Any:
    """torch's BlockMask of samples end to end in one row, in which a query sees `window` positions (None: all).

    It equals torch's `create_block_mask`, which makes a dense (T, T) mask first or has to be compiled. Here it follows
    from the first key of each query, which never falls from one query to the next.
    offsets: where each sample begins and the last one ends.
    """
    from torch.nn.attention.flex_attention import BlockMask

    ends = torch.tensor(offsets)
    T, positions = offsets[-1], torch.arange(offsets[-1])
    first = ends[:-1].repeat_interleave(ends.diff())  # of each query's sample
    if window is not None:
        first = torch.maximum(first, positions - (window - 1))
    first = first.to(device, torch.int32)

    def sees(row, head, query, key):
        return (first[query] <= key) & (key <= query)

    start = torch.arange(0, T, BLOCK, device=device)  # of each block, and its last position
    last = (start + BLOCK - 1).clamp(max=T - 1)
    some = (start <= last[:, None]) & (last >= first[start][:, None])  # (blocks of queries, blocks of keys)
    every = (start + BLOCK - 1 <= start[:, None]) & (start >= first[last][:, None]) & (start + BLOCK <= T)[:, None]
    blocks = *_ordered(some & ~every), *_ordered(every)
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(T, T))


def _ordered(blocks):
    """Of each row of (n, n) bool: how many are true, and their columns before the others, as BlockMask has them."""
    columns = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], columns.int()[None, None]


def take_from_sinks(y: Tensor, log_sums: Tensor, sinks: Tensor) -> Tensor:
    """Attention y (B, H, T, d) without sinks, as it is with the scores `sinks` (H,) among those of each softmax.

    log_sums (B, H, T) fp32: of the softmax without them. Gradients of q and k go through them, too.
    """
    share = torch.sigmoid(log_sums - sinks.float()[:, None])
    return (y.float() * share[..., None]).to(y.dtype)


def needs_small_blocks(head_dim: int, device: torch.device) -> bool:
    """Whether torch's choice of blocks would be too large for a CUDA card's shared memory."""
    properties = torch.cuda.get_device_properties(device)
    return head_dim > MANY_DIMS and properties.shared_memory_per_block_optin < MANY_BYTES


def kernel_options(element_size: int, small_blocks: bool) -> dict[str, int | bool]:
    """torch's FlexKernelOptions for tensors whose elements take so many bytes.

    Small blocks need at most 70,016 bytes of shared memory for heads of 256 (compiled as above).
    """
    options = {"FORCE_USE_FLEX_ATTENTION": True}  # for all lengths: for less than 128 queries there is another kernel
    if small_blocks:
        size, stages = 64 // element_size, 4 // element_size  # 32 and 2 in 16 bits, 16 and 1 in fp32
        options |= {f"fwd_{name}": size for name in ("BLOCK_M", "BLOCK_N")} | {"fwd_num_stages": stages}
        options |= {f"bwd_BLOCK_{name}": size for name in ("M1", "N1", "M2", "N2")} | {"bwd_num_stages": stages}
    return options


def attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, score: Callable, mask: Any, small_blocks: bool = False
) -> Tensor:
    """Attention of q (1, H, T, d) to k, v (1, K, T, d): (1, H, T, d), by torch's FlexAttention.

    score: a `score_function`. mask: a `block_mask`. small_blocks: as `needs_small_blocks` says.
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    y, also = flex_attention(
        q,
        k,
        v,
        score_mod=score,
        block_mask=mask,
        scale=1.0,  # `score` has it
        enable_gqa=q.size(1) != k.size(1),
        kernel_options=kernel_options(q.element_size(), small_blocks),
        return_aux=AuxRequest(lse=True),
    )
    return y if sinks is None else take_from_sinks(y, also.lse, sinks)


@functools.cache
def compiled() -> Callable:
    """`attend`, compiled at its first call and for all lengths.

    fullgraph: where a kernel cannot be made that is an error; all scores would be in memory otherwise.
    """
    return torch.compile(attend, dynamic=True, fullgraph=True, recompile_limit=GRAPHS)
