"""A function of each position by itself, run over some positions at a time."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_chunks(f: Callable[[Tensor], Tensor], x: Tensor, size: int | None) -> Tensor:
    """f(x), (B, T, D) for x (B, T, D), computed from `size` positions at a time; None for all.

    f must treat each position by itself. Each chunk is under checkpoint, so that what f keeps for the backward pass
    exists for one chunk at a time. The price: f is computed once more, also within a checkpoint around all of it.
    """
    B, T, _ = x.shape
    if size is None or size >= B * T:
        return f(x)
    parts = [checkpoint(f, part, use_reentrant=False) for part in x.flatten(0, 1).split(size)]
    return torch.cat(parts).unflatten(0, (B, T))
