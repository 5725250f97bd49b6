"""Noise on embedded tokens in training: NEFTune (Jain et al. 2023, arXiv 2310.05914)."""

import torch
from torch import Tensor

from batching import IGNORE


def neftune_sizes(alpha: float, D: int, targets: Tensor, offsets: list[int] | None) -> Tensor:
    """How large the noise on each position is, (B, T) fp32: alpha / sqrt(L D), for samples of L tokens of size D.

    L is the sample's own length, also where several lie end to end in one row (offsets). In padded rows, targets (B, T)
    on the CPU, a sample goes up to its last target; what comes after it has no noise.
    """
    if offsets is not None:
        lengths = torch.tensor(offsets).diff()
        return (alpha / (lengths * D).sqrt()).repeat_interleave(lengths)[None]
    inside = (targets != IGNORE).flip(1).cummax(1).values.flip(1)
    lengths = inside.sum(1, keepdim=True).clamp(min=1)
    return inside * (alpha / (lengths * D).sqrt())
