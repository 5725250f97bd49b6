"""Numbers on their way between host and device. What a GPU computes, the host only queues, unless it has to wait."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch._guards import detect_fake_mode


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """x on a device, without waiting for the copy: to a GPU it goes from pinned memory, in its turn."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def numbers_on(device: torch.device, numbers: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of these numbers on a device, without waiting for the copy."""
    if device.type != "cuda" or detect_fake_mode() is not None:
        return torch.tensor(numbers, dtype=dtype, device=device)
    return to_device(torch.tensor(numbers, dtype=dtype), device)


@lru_cache
def constants_on(device: torch.device, numbers: tuple[float, ...]) -> Tensor:
    """A tensor of these numbers on a device, made once: not to be changed."""
    return torch.tensor(numbers, device=device)


def read_numbers(*tensors: Tensor) -> list[list[float]]:
    """The elements of each tensor as fp64: one copy for all, for which the host waits."""
    sizes = [x.numel() for x in tensors]
    parts = torch.cat([x.detach().double().flatten() for x in tensors]).cpu().split(sizes)
    return [part.tolist() for part in parts]
