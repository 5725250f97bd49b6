"""A stand-in for ops.offload.CopyStream that shows on a CPU who forgets to wait for a copy."""

import threading

import torch


class LazyStream:
    """Copies when it is waited for and not before; until then the target holds rubbish.

    queue: number, target and source of what is not copied yet. copies: how many were asked for; most: that waited at
    one time.
    """

    def __init__(self):
        self.queue, self.copies, self.most, self.lock = [], 0, 0, threading.Lock()

    def copy(self, target, source, computed=True):
        with self.lock, torch.no_grad():
            target.fill_(torch.nan)
            self.copies += 1
            self.queue.append((self.copies, target, source))
            self.most = max(self.most, len(self.queue))
            return Event(self, self.copies)

    def wait(self, event):
        with self.lock, torch.no_grad():
            while self.queue and self.queue[0][0] <= event.number:
                _, target, source = self.queue.pop(0)
                target.copy_(source)


class Event:
    """What a copy returns; `synchronize` is for a thread that waits for it."""

    def __init__(self, stream, number):
        self.stream, self.number = stream, number

    def synchronize(self):
        self.stream.wait(self)
