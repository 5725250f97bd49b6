"""Dropout whose mask is computed from the numbers of the elements and a seed, and again in the backward pass: not kept.

A mask kept for the backward pass takes a byte an element, as much as half of the activations in bf16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ops.cpp import call_cpp, in_cpp, operator
from ops.gpu import in_triton, launch

BLOCK = 1024  # elements of a program of dropout_gpu.py


def plain_drop(x: Tensor, p: float, seeds: tuple[int, int]) -> Tensor:
    """The reference: x with a share p of its elements set to 0 and the others times 1 / (1 - p).

    seeds: each from 0 to below 2^31. An element stays if the hash of its number, in 32 bits, is at least 2^32 p.
    """
    number = torch.arange(x.numel(), device=x.device)
    kept = mixed(mixed(number ^ seeds[0]) ^ seeds[1]) >= threshold(p)
    return torch.where(kept.view_as(x), x.float() * (1 / (1 - p)), 0.0).to(x.dtype)


def mixed(h: Tensor) -> Tensor:
    """Each number from 0 to below 2^32, int64, hashed: MurmurHash3's last step (Appleby 2011, fmix32)."""
    h = ((h ^ h >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ h >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ h >> 16


def threshold(p: float) -> int:
    """The hashes below this one drop their element."""
    return min(round(p * 2**32), 2**32 - 1)


@operator("drop(Tensor x, float p, int[] seeds) -> Tensor")
def drop(x: Tensor, p: float, seeds: tuple[int, int]) -> Tensor:
    """As `plain_drop`, for x that is contiguous and has less than 2^31 elements."""
    y, least = torch.empty_like(x), threshold(p)
    assert x.numel() < 2**31
    if in_triton(x):
        # The halves of the threshold are numbers that fit 32 bits with a sign.
        given = (x, y, x.numel(), 1 / (1 - p), least >> 16, least & 0xFFFF, *seeds)
        launch("dropout", (-(-x.numel() // BLOCK),), *given, BLOCK=BLOCK)
    elif in_cpp(x):
        call_cpp("dropout", x, y, x.numel(), 1 / (1 - p), least, *seeds)
    else:
        y.copy_(plain_drop(x, p, seeds))
    return y


def new_seeds() -> tuple[int, int]:
    """Two random numbers of torch's generator for the CPU, whatever the device: nothing waits for it."""
    with _disable_current_modes(), torch.device("cpu"):
        return tuple(torch.randint(2**31, (2,)).tolist())


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, seeds):
        ctx.known = p, seeds
        return drop(x.contiguous(), p, seeds)

    @staticmethod
    def backward(ctx, grad):
        return drop(grad.contiguous(), *ctx.known), None, None  # dropping is its own transpose


def dropout(x: Tensor, p: float) -> Tensor:
    """x with a random share p of its elements set to 0 and the others times 1 / (1 - p) (Srivastava et al. 2014)."""
    if torch.compiler.is_compiling():
        return F.dropout(x, p)
    return _Dropout.apply(x, p, new_seeds())
