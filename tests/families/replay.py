"""CUDA graphs, imitated on a CPU: what a step does is recorded once, and done again with the same tensors.

As in a graph, no Python runs again, all addresses are those of the recording, and nothing may come from the host or
wait for it. So a decoder that passes here has steps that can be recorded, and replays none that has become wrong.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inference.decode import StaticDecoder

aten = torch.ops.aten
# What CUDA cannot do while it records: bring numbers to the host, make a tensor of its numbers, or wait for a shape.
HOST = {
    aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default,
    aten.lift_fresh.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
    aten.repeat_interleave.Tensor, aten.bincount.default,
}  # fmt: skip

INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


def tensors(x):
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor) and leaf.numel()]


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """Notes the operations that write memory, with the tensors that they read and write."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function in INDEXING and any(index.dtype == torch.bool for index in tensors(args[1]))
        assert function not in HOST and not by_mask, f"{function} waits for the host"
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        read = {memory(tensor) for tensor in tensors((args, kwargs))}
        is_new = all(memory(tensor) not in read for tensor in tensors(result))
        if function._schema.is_mutable or is_new:  # the others are views
            self.calls.append((function, args, kwargs, [] if function._schema.is_mutable else tensors(result)))
        return result

    def replay(self):
        for function, args, kwargs, results in self.calls:
            for old, new in zip(results, tensors(function(*args, **kwargs)), strict=bool(results)):
                old.copy_(new)


class ReplayedDecoder(StaticDecoder):
    """A `StaticDecoder` as it is on CUDA. layouts: each (count, room) that it recorded: a list for each memory."""

    def __init__(self, model):
        self.layouts = []
        super().__init__(model)

    def _forget_recorded(self):
        super()._forget_recorded()
        self.layouts.append([])

    def record(self, run):
        self.layouts[-1].append((self.slots.count, self.slots.room))
        with Recording() as recording:
            logits = run()

        def replay():
            recording.replay()
            return logits

        return replay
