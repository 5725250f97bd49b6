"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864): how fast each pair of dimensions turns.

And the ways to stretch it to longer texts than those of the pre-training, `SCALINGS`. rotation.py applies it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ops.devices import constants_on


@dataclass(frozen=True)
class RoPE:
    """The rotary embedding of a layer.

    dims: of each head, that turn: the first ones, in pairs (i, i + dims/2), or if `interleaved` (2i, 2i + 1).
    gain: of cosines and sines; it multiplies the scores of attention by its square (YaRN, section 3.4).
    query_growth: b, if queries are multiplied by 1 + b log(1 + floor(position / original_context)), as in Llama 4.
    The other fields are explained at the functions in `SCALINGS` that take them.
    """

    theta: float
    dims: int
    scaling: str = "default"
    factor: float = 1.0
    original_context: int = 8192  # tokens in a sample of the pre-training
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    gain: float = 1.0
    interleaved: bool = False
    query_growth: float = 0.0

    @property
    def depends_on_length(self) -> bool:
        """Whether a text's length decides how fast it turns."""
        return self.scaling in ("dynamic", "longrope")


def plain_frequencies(theta: float | Tensor, dims: int, device: torch.device) -> Tensor:
    """1 / theta^(2i / dims): (dims/2,) fp32, or (..., dims/2) for thetas (..., 1)."""
    return 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims)


def linear(rope: RoPE, frequencies: Tensor) -> Tensor:
    """All slower by `factor` (Chen et al. 2023, arXiv 2306.15595)."""
    return frequencies / rope.factor


def llama3(rope: RoPE, frequencies: Tensor) -> Tensor:
    """Llama 3.1's: long waves are stretched, short ones kept, those between blended.

    Long: fewer than `low_freq_factor` turns within the context of pre-training; short: more than `high_freq_factor`.
    """
    turns = rope.original_context * frequencies / (2 * math.pi)
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / rope.factor


def yarn(rope: RoPE, frequencies: Tensor) -> Tensor:
    """YaRN (Peng et al. 2023, arXiv 2309.00071, section 3.2): as `llama3`, but blended by dimension.

    Kept are the dimensions before the one that turns `beta_fast` times within the context of pre-training, stretched
    those after the one that turns `beta_slow` times. truncate: both are rounded away from each other.
    """

    def dimension(turns):
        return rope.dims * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    number = torch.arange(rope.dims // 2, dtype=torch.float32, device=frequencies.device)
    stretch = ((number - low) / (high - low or 0.001)).clamp(0, 1)
    return frequencies / rope.factor * stretch + frequencies * (1 - stretch)


SCALINGS = {"default": lambda rope, frequencies: frequencies, "linear": linear, "llama3": llama3, "yarn": yarn}


@lru_cache
def inverse_frequencies(rope: RoPE, device: torch.device) -> Tensor:
    """Radians by which each pair of dimensions turns from one position to the next: (dims/2,) fp32."""
    return SCALINGS[rope.scaling](rope, plain_frequencies(rope.theta, rope.dims, device))


def frequencies_by_length(rope: RoPE, lengths: Tensor) -> Tensor:
    """The same, where the length of a token's text decides: (..., dims/2) fp32 for lengths (...) int64.

    longrope (Ding et al. 2024, arXiv 2402.13753): divided by `long_factors` in texts longer than the context of
    pre-training, by `short_factors` in others. dynamic (NTK-aware): theta grows with the length beyond that context.
    """
    lengths, device = lengths[..., None], lengths.device
    if rope.scaling == "longrope":
        short, long = (constants_on(device, f) for f in (rope.short_factors, rope.long_factors))
        factors = torch.where(lengths > rope.original_context, long, short)
        return plain_frequencies(rope.theta, rope.dims, device) / factors
    beyond = (lengths / rope.original_context).clamp(min=1)
    growth = (rope.factor * beyond - (rope.factor - 1)) ** (rope.dims / (rope.dims - 2))
    return plain_frequencies(rope.theta * growth, rope.dims, device)


def angles(rope: RoPE, positions: Tensor, lengths: Callable[[], Tensor]) -> Tensor:
    """By how much each pair of dimensions is turned: (..., dims/2) fp32.

    positions (...) int64: in the token's own text. lengths: returns (...) int64, of that text as far as it is known.
    """
    if rope.depends_on_length:
        return positions[..., None].float() * frequencies_by_length(rope, lengths())
    return positions[..., None].float() * inverse_frequencies(rope, positions.device)


def query_gain(rope: RoPE, positions: Tensor) -> Tensor:
    """What queries are multiplied by, (...) fp32 for positions (...): see `RoPE.query_growth`."""
    return 1 + rope.query_growth * torch.log(1 + torch.floor(positions / rope.original_context))
