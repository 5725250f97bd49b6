"""The memory allocated and the FLOPs done while a model runs forward and backward, on real or on fake tensors."""

from __future__ import annotations

import contextlib
import itertools
import math
import weakref
from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ops.offload import host_bytes
from training.metrics import flop_counter
from training.offload import STAGED

if TYPE_CHECKING:
    from model import Transformer
    from training.memory.plan import Job

aten = torch.ops.aten


class Allocations(TorchDispatchMode):
    """Adds up the bytes of the storages that operations create, for as long as each lives, and the peak of that sum.

    Works on real tensors and on fake ones. A view is its base's storage, counted once; a storage created before (a
    weight) is not counted. live and at_peak: bytes by part; what is created now belongs to `part`.
    targets: how many positions have a target, for fake tensors, which hold no targets. rounding: to multiples of so
    many bytes. flops: so far. untraced: bytes by part that blocks which are not run would hold now. in_block: `live` at
    its peak since the newest block began.
    device: the type of the one device whose tensors count, None for all. What is elsewhere, in host memory, adds up in
    host, bytes now, and host_peak.
    """

    def __init__(self, targets: int | None = None, rounding: int = 1, device: str | None = None):
        super().__init__()
        self.targets, self.rounding, self.device = targets, rounding, device
        self.host, self.host_peak, self.on_host = 0, 0, set()
        self.part, self.flops = "saved activations", 0
        self.live, self.untraced, self.at_peak, self.in_block = Counter(), Counter(), Counter(), Counter()
        self.storages = {}  # address of a living storage: its part and bytes
        self.flop_counts = flop_counter().flop_registry

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation, and count its FLOPs and what it allocates."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # called for every look at a fake tensor's device
            return func(*args, **kwargs)
        if func is aten.nonzero.default and self.targets is not None:
            out = args[0].new_empty((self.targets, args[0].dim()), dtype=torch.int64)
        else:
            out = func(*args, **kwargs)
        if func._overloadpacket in self.flop_counts:
            self.flops += self.flop_counts[func._overloadpacket](*args, **kwargs, out_val=out)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self._add(tensor.untyped_storage(), self.device in (None, tensor.device.type))
        return out

    def _add(self, storage, counts):
        if storage._cdata in self.storages:
            return
        if not counts:
            self._add_on_host(storage)
            return
        nbytes = self.rounded(storage.nbytes())
        self.storages[storage._cdata] = (self.part, nbytes)
        weakref.finalize(storage, self._remove, storage._cdata)
        self.live[self.part] += nbytes
        self.note_peak()

    def _add_on_host(self, storage):
        address, nbytes = storage._cdata, host_bytes(storage.nbytes(), pinned=True)
        if address not in self.on_host:
            self.on_host.add(address)
            weakref.finalize(storage, self._remove_on_host, address, nbytes)
            self.host += nbytes
            self.host_peak = max(self.host_peak, self.host)

    def _remove_on_host(self, address, nbytes):
        self.on_host.remove(address)
        self.host -= nbytes

    def _remove(self, address):
        part, nbytes = self.storages.pop(address)
        self.live[part] -= nbytes

    def rounded(self, nbytes: int) -> int:
        """The bytes that an allocation of `nbytes` takes."""
        return math.ceil(nbytes / self.rounding) * self.rounding

    def note_peak(self) -> None:
        """Remember what is allocated now if it is more than ever before."""
        if self.live.total() > self.in_block.total():
            self.in_block = self.live.copy()
        if self.live.total() + self.untraced.total() > self.at_peak.total():
            self.at_peak = self.live + self.untraced

    def move(self, tensor: Tensor, part: str) -> None:
        """Count a living tensor as another part from now on."""
        address = tensor.untyped_storage()._cdata
        if address in self.storages:
            before, nbytes = self.storages[address]
            self.storages[address] = (part, nbytes)
            self.live[before] -= nbytes
            self.live[part] += nbytes


def trace_step(
    model: Transformer, batch: tuple, allocations: Allocations, job: Job, left_out: dict[int, int] | None = None
) -> list[tuple[int, int]]:
    """Run one micro-batch forward and, unless `job` has no gradients, backward under `allocations`.

    batch: tokens, targets and offsets. job: its recompute is a share of this model's blocks.
    left_out: for the number of a block, how many more blocks would follow it and do the same.
    Returns for each block the bytes that it kept for the backward pass, and its FLOPs in both passes (too few for the
    first one, whose input may need no gradient).
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trace = _BlockTrace(model.model["layers"], allocations, job, left_out or {})
    modules = (*model.model["layers"], model.model["norm"])
    handles = [module.register_forward_pre_hook(trace.block_begins) for module in modules]
    handles += [parameter.register_post_accumulate_grad_hook(trace.gradient_ready) for parameter in trainable]
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter) if job.gradients == "kept" and not job.offload else None
    tokens, targets, offsets = batch
    backward = job.gradients != "none"
    with allocations, torch.set_grad_enabled(backward):
        with torch.autocast(job.device, job.autocast) if job.autocast else contextlib.nullcontext():
            x = model.hidden_states(tokens, recompute=job.recompute, offsets=offsets)
            loss = job.loss(model, x, targets)
        allocations.part = "working set"
        if backward:
            loss.backward()
    for handle in handles:
        handle.remove()
    return trace.costs()


class _BlockTrace:
    """What happens at the borders of the blocks, forward and backward, while a model runs."""

    def __init__(self, layers, allocations, job, left_out):
        self.layers, self.allocations, self.job, self.left_out = layers, allocations, job, left_out
        self.before = []  # bytes and FLOPs before each block in the forward pass, and after the last
        self.after = {}  # FLOPs when the gradient of a block's input was there, by number
        self.leaving = deque(maxlen=STAGED)  # gradients that are being copied to host memory
        self.swaps = {}  # what blocks left out then free (activations) and allocate (gradients), by number

    def block_begins(self, module: nn.Module, args: tuple) -> None:
        """Before a block, or the final norm, runs forward."""
        allocations = self.allocations
        if allocations.part != "saved activations":  # it is computed again in the backward pass
            return
        number = len(self.before)
        # What a block parks it keeps, but that was allocated before it began.
        parks = self.job.recompute == "offload" and allocations.device in (None, "cpu") and number < len(self.layers)
        self.before.append((allocations.live.total() - parks * args[0].nbytes, allocations.flops))
        if number - 1 in self.left_out:
            self._stand_in(number - 1)
        allocations.in_block = allocations.live.copy()
        if args[0].requires_grad:
            args[0].register_hook(lambda grad: self._input_gradient_ready(number))
        if number == len(self.layers):
            allocations.part = "loss"

    def _stand_in(self, number):
        """Count what the blocks left out keep, until the backward pass has gone through them.

        They are like this block, and go backward one by one, each freeing activations and allocating gradients. If a
        block frees more than it allocates, the peak is in the first of them, else in the last. So this block stands for
        the first or for the last, and the others change what is allocated after it or before it. In the forward pass
        the last of them has the peak (which matters where a block allocates much that it does not keep, as experts do).
        """
        (kept_before, _), (kept, _) = self.before[number:]
        activations = self.left_out[number] * (kept - kept_before)
        gradients = self.left_out[number] * new_gradient_bytes(self.layers[number], self.allocations, self.job)
        self.allocations.untraced["saved activations"] += activations
        self.allocations.at_peak = max(
            self.allocations.at_peak, self.allocations.in_block + self.allocations.untraced, key=Counter.total
        )
        self.swaps[number if activations > gradients else number + 1] = activations, gradients

    def _input_gradient_ready(self, number):
        self.after[number] = self.allocations.flops
        activations, gradients = self.swaps.get(number, (0, 0))
        self.allocations.untraced["saved activations"] -= activations
        self.allocations.untraced["gradients"] += gradients
        self.allocations.note_peak()

    def gradient_ready(self, parameter: Tensor) -> None:
        """After the gradient of a trainable parameter is complete."""
        self.allocations.move(parameter.grad, "gradients")
        if self.job.offload:
            self.leaving.append(parameter.grad)
        if self.job.offload or self.job.gradients == "freed":
            parameter.grad = None

    def costs(self):
        """For each block: bytes kept for the backward pass, FLOPs of both passes."""
        return [
            (kept - kept_before, flops - flops_before + self.after.get(number, 0) - self.after.get(number + 1, 0))
            for number, ((kept_before, flops_before), (kept, flops)) in enumerate(itertools.pairwise(self.before))
        ]


def new_gradient_bytes(block: nn.Module, allocations: Allocations, job: Job) -> int:
    """Bytes of gradients that exist after a block's backward pass, but not before."""
    if job.offload or job.gradients != "new":
        return 0
    return sum(allocations.rounded(p.nbytes) for p in block.parameters() if p.requires_grad)
