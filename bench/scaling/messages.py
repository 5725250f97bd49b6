"""What a process hands to torch.distributed, counted where it does.

Every collective of torch.distributed is an operation of torch's dispatcher, those that C++ starts in a backward pass
too (DistributedDataParallel's), so a dispatch mode sees all of them with their tensors. What then goes over the wire is
the backend's matter, and gloo and NCCL differ in it: training/memory/layouts.py has the convention by which the bytes
that a device sends are counted.

Imports nothing of the project: peers' processes count with it too.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# By torch's name of the operation: what is done, and which of its arguments is the whole of what is sent.
KINDS = {
    "allreduce_": ("sum", 0),
    "_allgather_base_": ("gather", 0),
    "_reduce_scatter_base_": ("share out", 1),
    "broadcast_": ("broadcast", 0),
    "send": ("pass on", 0),
}
RECEIVING = ("recv_",)


class Message(NamedTuple):
    """A collective of the `count` processes of a `group`. nbytes: of the whole, as if one process had it."""

    kind: str
    group: str
    count: int
    nbytes: int


class Messages(TorchDispatchMode):
    """Notes the `Message`s of this process in `found` while the mode is on."""

    def __init__(self):
        super().__init__()
        self.found: list[Message] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation, and note it if it sends something. NotImplementedError: a collective that KINDS lacks."""
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and name not in RECEIVING:
            self.found.append(_message(name, args))
        return func(*args, **(kwargs or {}))

    def counted(self) -> list[dict]:
        """What was found, equal messages together with how many "times", as JSON can hold it."""
        return [{**message._asdict(), "times": times} for message, times in Counter(self.found).items()]


def _message(name, args):
    if name not in KINDS:
        raise NotImplementedError(f"c10d::{name} is not counted: bench/scaling/messages.py needs a line for it")
    kind, place = KINDS[name]
    tensors = args[place] if isinstance(args[place], (list, tuple)) else [args[place]]
    group = next(dist.ProcessGroup.unbox(arg) for arg in args if type(arg).__name__ == "ScriptObject")
    return Message(kind, group.group_name, group.size(), sum(tensor.nbytes for tensor in tensors))
