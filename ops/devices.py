"""Numbers on their way between host and device. What a GPU computes, the host only queues, unless it has to wait."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """x on a device, without waiting for the copy: to a GPU it goes from pinned memory, in its turn."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def read_numbers(*tensors: Tensor) -> list[list[float]]:
    """The elements of each tensor as fp64: one copy for all, for which the host waits."""
    sizes = [x.numel() for x in tensors]
    parts = torch.cat([x.detach().double().flatten() for x in tensors]).cpu().split(sizes)
    return [part.tolist() for part in parts]
