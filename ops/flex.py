"""FlexAttention (Dong et al. 2024, arXiv 2412.05496): attention on CUDA where FlashAttention cannot compute the scores.

torch writes the kernel, in Triton, from two small functions: what becomes of a score, and which keys a query sees. A
`BlockMask` says which blocks of keys a block of queries sees at all, so that the kernel passes over the others.

torch.compile makes the kernels, on CUDA alone. On a CPU the same functions run uncompiled, with all scores in memory,
in tests: tests/ops/test_flex.py holds values and gradients to `plain_attention`, and lets torch.compile trace them
forward and backward, for one graph for all lengths. The kernels themselves are tested in tests/training/test_gpu.py.

Shapes: B rows, T positions, H query heads, K key/value heads, d head size.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ops.activation import plain_softcap
from ops.devices import constants_on, to_device

BLOCK = 128  # queries, and keys, of a block: torch's default, which the blocks of its kernels divide
LEAST_HEAD_DIM = 16  # of Triton's matrix products
# Above this many graphs torch.compile raises an error. A run makes a few: with gradients of q, k and v or without, of a
# row of one block or of more. Its default is 8.
GRAPHS = 64


def _options(size, stages):
    """torch's FlexKernelOptions for blocks of so many queries and keys, in so many stages of a pipeline."""
    names = [f"fwd_BLOCK_{name}" for name in "MN"] + [f"bwd_BLOCK_{name}" for name in ("M1", "N1", "M2", "N2")]
    return dict.fromkeys(names, size) | {"fwd_num_stages": stages, "bwd_num_stages": stages}


BLOCKS = {"torch's": {}, "small": _options(32, 2), "smallest": _options(16, 1)}


def score_function(scores: Any, device: torch.device) -> Callable:
    """What a layer with these `ops.attention.Scores` makes of the product of a query and a key, but for the sinks.

    Its numbers are tensors: torch.compile would make another kernel for each value of a Python number.
    """
    number = functools.partial(torch.full, (), device=device, dtype=torch.float32)
    scale = number(fill_value=scores.scale)
    softcap = None if scores.softcap is None else number(fill_value=scores.softcap)
    slopes = None if scores.slopes is None else constants_on(device, scores.slopes)

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
    first = to_device(first.to(torch.int32), device)

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


def blocks_that_fit(head_dim: int, element_size: int, shared_memory: int) -> str:
    """Which of BLOCKS has room in a CUDA card's shared memory. All sizes are in bytes, but for head_dim.

    Cards of sm_86, sm_89 and sm_120 (RTX 3090, 4090, 5090) have 101,376, A100 166,912 and H100 232,448. What kernels
    take was found by compiling them with Triton 3.7.1: bench/machine/flex_kernels.py. torch's own blocks fit A100 and
    H100; on the others they take up to 98,304 while a row of a head has 256 bytes, and up to 151,552 above. "small"
    takes up to 70,016 for rows of 512 bytes, "smallest" 66,560 for 1,024.
    """
    row = 2 ** math.ceil(math.log2(head_dim)) * element_size  # the kernels round up
    if head_dim <= 256 and (row <= 256 or shared_memory > 160_000):
        return "torch's"
    return "small" if row <= 512 else "smallest"


def attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, score: Callable, mask: Any, blocks: str = "torch's"
) -> Tensor:
    """Attention of q (1, H, T, d) to k, v (1, K, T, d): (1, H, T, d), by torch's FlexAttention.

    score: a `score_function`. mask: a `block_mask`. blocks: of the kernel, a name in BLOCKS.
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
        # For all lengths: for less than 128 queries there is another kernel.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True} | BLOCKS[blocks],
        return_aux=AuxRequest(lse=True),
    )
    return y if sinks is None else take_from_sinks(y, also.lse, sinks)


@functools.cache
def compiled() -> Callable:
    """`attend`, compiled at its first call and for all lengths.

    fullgraph: where a kernel cannot be made that is an error; all scores would be in memory otherwise.
    """
    return torch.compile(attend, dynamic=True, fullgraph=True, recompile_limit=GRAPHS)
