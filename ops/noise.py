"""Noise on embedded tokens in training: NEFTune (Jain et al. 2023, arXiv 2310.05914)."""

import torch
from torch import Tensor

from ops.forks import Forks


def neftune_sizes(alpha: float, D: int, inside: Tensor, offsets: list[int] | Forks | None) -> Tensor:
    """How large the noise on each position is, (B, T) fp32: alpha / sqrt(L D), for samples of L tokens of size D.

    L is the sample's own length, also where several lie end to end in one row (offsets); with `Forks` a beginning and
    one of its ends are a sample, and the beginning has the noise of the first. inside: bool (B, T) on the CPU, which
    positions of padded rows are a sample's; the others have no noise.
    """
    if isinstance(offsets, Forks):
        return neftune_sizes(alpha, D, inside, offsets.whole_offsets())[:, offsets.copies()]
    if offsets is not None:
        lengths = torch.tensor(offsets).diff()
        return (alpha / (lengths * D).sqrt()).repeat_interleave(lengths)[None]
    lengths = inside.sum(1, keepdim=True).clamp(min=1)
    return inside * (alpha / (lengths * D).sqrt())
