"""Noise on embedded tokens in training: NEFTune (Jain et al. 2023, arXiv 2310.05914)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.forks import Forks


def neftune_sizes(alpha: float, D: int, counted: Tensor, offsets: list[int] | Forks | None) -> Tensor:
    """How large the noise on each position is, (B, T) fp32: alpha / sqrt(L D), for samples of L tokens of size D.

    counted: bool (B, T) on the CPU, which positions have noise: not padding, and no virtual tokens. L is how many of
    the sample have it, also where several lie end to end in one row (offsets); with `Forks` a beginning and one of its
    ends are a sample, and the beginning has the noise of the first.
    """
    if isinstance(offsets, Forks):
        whole = counted[:, offsets.sources()]
        return neftune_sizes(alpha, D, whole, offsets.whole_offsets())[:, offsets.copies()]
    if offsets is None:
        lengths = counted.sum(1, keepdim=True)
    else:
        ends = torch.tensor(offsets)
        lengths = F.pad(counted[0].cumsum(0), (1, 0))[ends].diff().repeat_interleave(ends.diff())[None]
    return counted * (alpha / (lengths.clamp(min=1) * D).sqrt())
