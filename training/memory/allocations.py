"""The bytes that are alive and the operations that are done while a model's forward and backward pass run."""

import contextlib
import itertools
import math
import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.metrics import flop_counter

aten = torch.ops.aten


class Tracker(TorchDispatchMode):
    """Adds up the bytes of the storages that operations make, for as long as each lives, and what is alive at the peak.

    Works on real tensors and on those without memory. A view is its base's storage, counted once; a storage made
    before this began (a weight) is not counted. live and at_peak: bytes by part; what is made now belongs to `part`.
    targets: how many positions have a target, where the values that say so do not exist. flops: operations so far.
    untraced: bytes by part that blocks which are not run would hold now.
    """

    def __init__(self, targets=None, rounding=1):
        super().__init__()
        self.targets, self.rounding = targets, rounding
        self.part, self.flops = "saved activations", 0
        self.live, self.untraced, self.at_peak = Counter(), Counter(), Counter()
        self.storages = {}  # address of a living storage: its part and bytes
        self.flop_counts = flop_counter().flop_registry

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # every look at a fake tensor's device
            return func(*args, **kwargs)
        if func is aten.nonzero.default and self.targets is not None:
            out = args[0].new_empty((self.targets, args[0].dim()), dtype=torch.int64)
        else:
            out = func(*args, **kwargs)
        if func._overloadpacket in self.flop_counts:
            self.flops += self.flop_counts[func._overloadpacket](*args, **kwargs, out_val=out)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        if storage._cdata in self.storages:
            return
        nbytes = self.rounded(storage.nbytes())
        self.storages[storage._cdata] = (self.part, nbytes)
        weakref.finalize(storage, self.remove, storage._cdata)
        self.live[self.part] += nbytes
        self.note_peak()

    def rounded(self, nbytes):
        return math.ceil(nbytes / self.rounding) * self.rounding

    def note_peak(self):
        if self.live.total() + self.untraced.total() > self.at_peak.total():
            self.at_peak = self.live + self.untraced

    def remove(self, address):
        part, nbytes = self.storages.pop(address)
        self.live[part] -= nbytes

    def move(self, tensor, part):
        """Let a living tensor count as another part."""
        address = tensor.untyped_storage()._cdata
        if address in self.storages:
            before, nbytes = self.storages[address]
            self.storages[address] = (part, nbytes)
            self.live[before] -= nbytes
            self.live[part] += nbytes


def traced_step(model, batch, tracker, job, left_out=()):
    """Forward and backward of one micro-batch under `tracker`.

    batch: tokens, targets and offsets. job: its recompute is a share of this model's blocks.
    left_out: how many more blocks would follow a block and do as it does, by its number.
    Returns for each block the bytes that it kept for the backward pass, and its operations in both passes (too few for
    the first one, whose input may need no gradient).
    """
    before, after, layers = [], {}, model.model["layers"]  # before each block, and after the last; after the gradient
    swaps = {}  # when the gradient for this block's input is there: activations of blocks left out, and gradients

    def about_to_run(module, args):
        if tracker.part != "saved activations":  # it is computed again in the backward pass
            return
        number = len(before)
        before.append((tracker.live.total(), tracker.flops))
        if number - 1 in left_out:
            stand_in(number - 1)
        if args[0].requires_grad:
            args[0].register_hook(lambda grad: input_gradient_ready(number))
        if number == len(layers):
            tracker.part = "loss"

    def stand_in(number):
        """Blocks left out go backward before this one: each gives up activations for gradients, one by one. So most
        is alive in the first of them or in the last, and as this one does what they do, it is either of the two."""
        (kept_before, _), (kept, _) = before[number:]
        activations = left_out[number] * (kept - kept_before)
        gradients = left_out[number] * new_gradient_bytes(layers[number], tracker, job)
        tracker.untraced["saved activations"] += activations
        swaps[number if activations > gradients else number + 1] = activations, gradients

    def input_gradient_ready(number):
        after[number] = tracker.flops
        activations, gradients = swaps.get(number, (0, 0))
        tracker.untraced["saved activations"] -= activations
        tracker.untraced["gradients"] += gradients
        tracker.note_peak()

    def gradient_ready(parameter):
        tracker.move(parameter.grad, "gradients")
        if job.gradients == "freed":
            parameter.grad = None

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [module.register_forward_pre_hook(about_to_run) for module in (*layers, model.model["norm"])]
    handles += [parameter.register_post_accumulate_grad_hook(gradient_ready) for parameter in trainable]
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter) if job.gradients == "kept" else None
    tokens, targets, offsets = batch
    with tracker:
        with torch.autocast(job.device, job.autocast) if job.autocast else contextlib.nullcontext():
            loss = model(tokens, targets, recompute=job.recompute, offsets=offsets)
        tracker.part = "working set"
        loss.backward()
    for handle in handles:
        handle.remove()
    forward = itertools.pairwise(before)
    return [
        (kept - kept_before, flops - flops_before + after.get(number, 0) - after.get(number + 1, 0))
        for number, ((kept_before, flops_before), (kept, flops)) in enumerate(forward)
    ]


def new_gradient_bytes(block, tracker, job):
    """Bytes of gradients that are there after a block's backward pass, but not before."""
    return sum(tracker.rounded(p.nbytes) for p in block.parameters() if p.requires_grad and job.gradients == "new")
