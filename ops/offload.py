"""Host memory beside a device's: copies that run beside its computations, and tensors that wait there.

A CUDA device copies on a stream of its own, from and to pinned memory, while it computes; events keep the order. On a
CPU, and for tensors without memory (training/memory/plan.py), the same steps are plain copies.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ops.gpu import power_of_two


def has_streams(x: Tensor) -> bool:
    """Whether a tensor is on a device that copies and computes at the same time."""
    return x.is_cuda and not is_fake(x)


def host_tensor(nbytes: int, pinned: bool) -> Tensor:
    """So many bytes of host memory, uint8, which a CUDA device can reach by itself if they are pinned."""
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)


def host_bytes(nbytes: int, pinned: bool) -> int:
    """What `host_tensor` takes: torch rounds pinned memory up to a power of two."""
    return power_of_two(nbytes) if pinned and nbytes else nbytes


def laid_in(buffer: Tensor, x: Tensor) -> Tensor:
    """The beginning of a buffer of bytes as a contiguous tensor of x's shape and dtype."""
    return buffer[: x.nbytes].view(x.dtype).view(x.shape)


class CopyStream:
    """A CUDA stream for copies alone. Without one (`on_cuda` is false) everything is done when its call returns."""

    def __init__(self, on_cuda: bool):
        self.stream = torch.cuda.Stream() if on_cuda else None

    @torch.no_grad()
    def copy(self, target: Tensor, source: Tensor, computed: bool = True) -> torch.cuda.Event | None:
        """Copy once the device has computed all that it was given until now, or at once if `computed` is false.

        Until the returned event, target and source must live and stay as they are (None: it is done).
        """
        if self.stream is None:
            target.copy_(source)
            return None
        if computed:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    @staticmethod
    def wait(event: torch.cuda.Event | None) -> None:
        """Let what the device is given from now on wait for a copy; the CPU does not."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)


# ------------------------------------------------------------------------------- between forward and backward pass


class PinnedPool:
    """Buffers of pinned memory, which takes long to make: those given back are lent again."""

    def __init__(self):
        self.free = []

    def take(self, nbytes: int) -> Tensor:
        """The smallest buffer that is free and large enough. A new one takes the place of a free one too small."""
        self.free.sort(key=len)
        for place, buffer in enumerate(self.free):
            if len(buffer) >= nbytes:
                return self.free.pop(place)
        if self.free:
            self.free.pop()
        return host_tensor(nbytes, pinned=True)

    def give(self, buffer: Tensor) -> None:
        """Lend this one again. Copies from and to it must be of the one stream of `for_parking`."""
        self.free.append(buffer)


@functools.cache
def for_parking(on_cuda: bool) -> tuple[CopyStream, PinnedPool | None]:
    """The stream of parked tensors, one for both ways, so that copies of one buffer come one after the other."""
    return CopyStream(on_cuda), PinnedPool() if on_cuda else None


class Parked:
    """A tensor in host memory. before: (weakly) the one parked before it, which the backward pass wants after it."""

    def __init__(self, x: Tensor, before: Parked | None):
        self.device, self.before, self.fetched = x.device, before and weakref.ref(before), None
        self.stream, pool = for_parking(has_streams(x))
        buffer = pool.take(x.nbytes) if pool else host_tensor(x.nbytes, pinned=False)
        if pool:
            weakref.finalize(self, pool.give, buffer).atexit = False
        self.host, self.source, self.version = laid_in(buffer, x), x, x._version
        self.left = self.stream.copy(self.host, x)

    def release(self) -> None:
        """Let go of the tensor on the device: what is computed from now on, and may get its memory, waits for the copy.

        To mark it as used by the copy stream (record_stream) would do, too, but then when its memory is free depends on
        how far the CPU is ahead of the device.
        """
        if self.source is not None and self.source._version != self.version:  # autograd cannot check it for a copy
            raise RuntimeError("a tensor was changed in place while it was copied to host memory")
        self.stream.wait(self.left)
        self.source = None

    def fetch(self) -> None:
        """Start copying it back to the device."""
        if self.fetched is None:
            self.fetched = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
            self.arrived = self.stream.copy(self.fetched, self.host)

    def take(self) -> Tensor:
        """The tensor on the device; the one before it is on its way then, while the device computes with this one."""
        self.fetch()
        self.stream.wait(self.arrived)
        before = self.before and self.before()
        if before:
            before.fetch()
        x, self.fetched = self.fetched, None
        return x

    def __del__(self):
        if getattr(self, "fetched", None) is not None:  # nobody wanted it: its memory must outlive the copy
            self.stream.wait(self.arrived)


class Parking(torch.autograd.graph.saved_tensors_hooks):
    """Inside `with Parking():` what autograd keeps for the backward pass is kept in host memory.

    Made for the inputs of blocks under checkpoint (Chen et al. 2016, arXiv 1604.06174), which are then all it keeps.
    """

    def __init__(self):
        super().__init__(self.park, Parked.take)
        self.newest = None

    def park(self, x: Tensor) -> Parked:
        """Start copying x to host memory. The one parked before it is no longer needed on the device."""
        self._release_newest()
        self.newest = Parked(x, self.newest)
        return self.newest

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._release_newest()
        self.newest = None

    def _release_newest(self):
        if self.newest is not None:
            self.newest.release()
