"""Every operation of a training step or of a decoded token, with its FLOPs and bytes, from shapes alone.

The model's own code runs on fake tensors (training/memory/plan.py), which have shapes but no memory, under a mode of
torch that sees each operation below autograd. One operation is one kernel: what ops/ registers (ops/cpp.py) is one, as
its Triton kernel is on CUDA. Views, metadata and allocations are none.

Bytes are those of tensors, each part of a storage read once and written once, whatever a cache could spare. FLOPs are
those of products; of attention the tiles that the kernel really computes, not the square of a sample's length.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import quantize
from inference.decode import StaticDecoder
from inference.kv_cache import KVCache
from training.memory import plan
from training.metrics import flop_counter
from training.optimizer import moment_bytes

aten = torch.ops.aten

# What an operation is for, by its name; products are those with a formula for their FLOPs.
KINDS = {
    "torch_attn::_varlen_attn": "attention",
    "torch_attn::_varlen_attn_backward": "attention",
    "onetune::attend": "attention",
    "onetune::attend_backward": "attention",
    "aten::_scaled_dot_product_flash_attention": "attention",
    "aten::_scaled_dot_product_efficient_attention": "attention",
    "onetune::norm": "norm",
    "onetune::norm_backward": "norm",
    "onetune::rotate": "rotation",
    "onetune::activate": "activation",
    "onetune::activate_backward": "activation",
    "onetune::loss_": "loss",
    "onetune::add_low_rank_": "adapter",
    "onetune::low_rank_": "adapter",
    "onetune::low_rank_backward_": "adapter",
    "onetune::drop": "dropout",
}
OTHERS = "copies and sums"  # casts, layouts, sums of gradients, scales: what no kernel of ours does
# They move nothing: allocations, and questions that torch answers itself.
FREE = {
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
    "aten::promote_types", "aten::_has_compatible_shallow_copy_type", "prim::device", "aten::sym_size",
}  # fmt: skip
OVERWRITING = {"aten::copy_", "aten::zero_", "aten::fill_"}  # in place, without a look at what was there
GATHERING = {"aten::embedding", "aten::index", "aten::index_select", "aten::gather"}  # read as much as they write
SCATTERING = {"aten::index_put_", "aten::_index_put_impl_", "aten::index_add_", "aten::scatter_add_"}
PUTTING = {"aten::scatter_", "aten::index_copy_"}  # write what they are given to some places
FILLED_BEFORE = {"aten::select_backward", "aten::slice_backward"}  # with zeros, by a kernel of its own
# Queries and keys that attention computes at one time: kernels_cpu.cpp's, and FlashAttention-2's for heads of 128.
CPU_TILE, FLASH_TILE = (32, 16), (128, 64)


class Spec(NamedTuple):
    """A tensor of an operation. storage: a number that tensors of one storage share, from 0 in each operation."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage: int

    def extent(self) -> int:
        """Elements from its first to its last one in memory."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))


class Operation(NamedTuple):
    """One kernel. function: what torch calls. read, written: bytes.

    arguments, named: of the function, by position and as pairs of name and value, with a `Spec` for each tensor.
    launches: 0 where one kernel does it for many tensors.
    """

    name: str
    kind: str
    function: Callable
    arguments: tuple
    named: tuple
    flops: int
    read: int
    written: int
    launches: int = 1

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written

    def specs(self) -> list[Spec]:
        """Those of its tensors, in order."""
        leaves = tree_leaves((self.arguments, self.named), is_leaf=lambda x: isinstance(x, Spec))
        return [leaf for leaf in leaves if isinstance(leaf, Spec)]

    def call(self, tensor: Callable[[Spec], Tensor]) -> tuple[tuple, dict]:
        """Its arguments by position and by name, with `tensor(spec)` in the place of each `Spec`, in order."""

        def filled(tree):
            if isinstance(tree, Spec):
                return tensor(tree)
            return tuple(map(filled, tree)) if isinstance(tree, tuple) else tree

        return filled(self.arguments), dict(filled(self.named))


class Operations(TorchDispatchMode):
    """Counts the operations inside it.

    lengths: of the samples of a packed row, which fake offsets do not say. targets: positions that have one.
    ranks: products with a dimension of one of these sizes are the adapter's.
    counts: how often each `Operation` was run. unknown: names of those that come out at no cost and are not in FREE.
    """

    def __init__(self, lengths: list[int] = (), targets: int | None = None, ranks: tuple = ()):
        super().__init__()
        self.lengths, self.targets, self.ranks = lengths, targets, {*ranks}
        self.counts, self.unknown = Counter(), set()
        linear = lambda x, *_, out_val: 2 * out_val.numel() * x.size(-1)  # noqa: E731 (inference mode leaves it whole)
        self.formulas = flop_counter().flop_registry | {aten.linear: linear}

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation, and count it."""
        kwargs = kwargs or {}
        if func is aten.nonzero.default and self.targets is not None:
            out = args[0].new_empty((self.targets, args[0].dim()), dtype=torch.int64)
        else:
            out = func(*args, **kwargs)
        name = func._schema.name
        if name not in FREE and not is_view(func, args, kwargs, out):
            read, written = moved(func, args, kwargs, out)
            flops = self.flops(func, name, args, kwargs, out)
            if not flops + read + written and not is_empty(args, kwargs, out):
                self.unknown.add(name)
            storages = {}
            given = spec(args, storages), spec(tuple(sorted(kwargs.items())), storages)
            kind = self.kind(name, args, flops)
            self.record(Operation(name, kind, func, *given, flops, read, written), tensors((args, kwargs)), out)
        return out

    def record(self, operation: Operation, given: list[Tensor], out: Any) -> None:
        """Count an operation that got these tensors."""
        self.counts[operation] += 1

    def flops(self, func: Callable, name: str, args: tuple, kwargs: dict, out: Any) -> int:
        """FLOPs of an operation, 0 for what is not a product."""
        if name in ("torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"):
            named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
            q, left = named["query"], (named.get("window_size") or [-1])[0]
            return attention_flops(q.size(1), q.size(2), self.lengths, left + 1, FLASH_TILE, "backward" in name)
        if name in ("onetune::attend", "onetune::attend_backward"):
            backward = name.endswith("backward")
            q, (offsets, window) = args[int(backward)], args[6:8] if backward else args[4:6]
            lengths = [end - start for start, end in itertools.pairwise(offsets)]
            return attention_flops(q.size(2), q.size(3), lengths, window, CPU_TILE, backward)
        formula = self.formulas.get(func._overloadpacket)
        return formula(*args, **kwargs, out_val=out) if formula else 0

    def kind(self, name: str, args: tuple, flops: int) -> str:
        """What an operation is for."""
        if name in KINDS:
            return KINDS[name]
        if flops:
            return "products" if self.ranks.isdisjoint(n for x in tensors(args) for n in x.shape) else "adapter"
        return "dequantising" if "dequantize" in name else OTHERS


# ------------------------------------------------------------------------------------------------- bytes and FLOPs


def attention_flops(
    heads: int, d: int, lengths: list[int], window: int, tile: tuple[int, int], backward: bool = False
) -> int:
    """FLOPs of causal attention inside each sample: two products of all tiles that have a pair to compute.

    window: how many positions back a query sees, itself included; 0 for all. tile: queries and keys.
    Backward there are five products: scores again, and the gradients of weights, values, queries and keys.
    """
    queries, keys = tile
    pairs = 0
    for length in lengths:
        for first in range(0, length, queries):
            end = min(length, first + queries)
            start = max(0, first - window + 1) // keys * keys if window else 0
            pairs += (end - first) * math.ceil((end - start) / keys) * keys
    return (10 if backward else 4) * heads * d * pairs


def is_view(func: Callable, args: tuple, kwargs: dict, out: Any) -> bool:
    """Whether an operation gives only other looks at storages that it was given, or no tensor, and writes nothing."""
    if func._schema.is_mutable:
        return False
    given = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
    return bool(given) and all(x.untyped_storage()._cdata in given for x in tensors(out))


def is_empty(args: tuple, kwargs: dict, out: Any) -> bool:
    """Whether there is nothing to move: there are tensors, and none has an element."""
    found = tensors((args, kwargs, out))
    return bool(found) and not any(x.numel() for x in found)


def moved(func: Callable, args: tuple, kwargs: dict, out: Any) -> tuple[int, int]:
    """Bytes that an operation reads and writes: each part of a storage once."""
    name, reads, writes = func._schema.name, {}, {}
    arguments = [*zip(func._schema.arguments, args, strict=False)]
    arguments += [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]
    for argument, value in arguments:
        mutated = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tensors(value):
            if mutated:
                writes[part(tensor)] = size(tensor)
            ignored = argument.name == "self" and kwargs.get("beta") == 0  # of addmm: a product that is not added
            if not ignored and not (mutated and (argument.is_out or name in OVERWRITING)):
                reads[part(tensor)] = size(tensor)
    given = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
    writes |= {part(x): size(x) for x in tensors(out) if x.untyped_storage()._cdata not in given}
    read, written = sum(reads.values()), sum(writes.values())
    if name in GATHERING:
        read += written - size(args[0])
    if name in SCATTERING:  # of the tensor itself only as much as is added
        added = read - size(args[0])
        read, written = 2 * added, added
    if name in PUTTING:
        read = written = read - size(args[0])
    return read, written * (2 if name in FILLED_BEFORE else 1)


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in it."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def part(tensor: Tensor) -> tuple:
    """Which part of which storage a tensor looks at: equal for two that look at the same."""
    apart = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if stride and size > 1]
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(sorted(apart))


def size(tensor: Tensor) -> int:
    """Bytes that a tensor looks at: of an expanded dimension one."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(n if stride else min(n, 1) for n, stride in pairs) * tensor.element_size()


def spec(value: Any, storages: dict) -> Any:
    """A value that can be hashed, with a `Spec` in the place of every tensor."""
    if isinstance(value, Tensor):
        number = storages.setdefault(value.untyped_storage()._cdata, len(storages))
        return Spec(value.dtype, tuple(value.shape), value.stride(), number)
    return tuple(spec(each, storages) for each in value) if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------------ steps and tokens


class Trace(NamedTuple):
    """What was counted: how often each `Operation` is run, and the names of those at no cost that should have one."""

    counts: Counter
    unknown: frozenset


def micro_batch(job: plan.Job, shape: plan.Shape) -> Trace:
    """Of a micro-batch, forward and backward."""
    return all_blocks(job, micro_batch_run(job, shape), lambda: micro_batch_mode(job, shape))


def micro_batch_mode(job: plan.Job, shape: plan.Shape, mode: type[Operations] = Operations) -> Operations:
    """The mode that knows what a trace of a micro-batch does not say."""
    return mode(plan.sample_lengths(shape), shape.targets, ranks(job))


def micro_batch_run(job: plan.Job, shape: plan.Shape) -> Callable:
    """`run(model, mode)` of a micro-batch, forward and backward."""

    def run(model, mode):
        for parameter in model.parameters():
            if parameter.requires_grad and job.gradients == "kept":
                parameter.grad = torch.zeros_like(parameter)
        tokens = torch.empty((shape.rows, shape.T), dtype=torch.int64, device=job.device)
        autocast = torch.autocast(job.device, job.autocast) if job.autocast else contextlib.nullcontext()
        with mode:
            with autocast:
                loss = model(tokens, tokens, recompute=job.recompute, offsets=shape.offsets and list(shape.offsets))
            loss.backward()

    return run


def ranks(job: plan.Job) -> tuple[int, ...]:
    """The sizes by which an adapter's products are known: up to three layers of one input have one matrix A."""
    return tuple(layers * job.adapter.r for layers in (1, 2, 3)) if job.adapter else ()


def token(job: plan.Job, batch: int, context: int) -> Trace:
    """Of a step of decoding for `batch` texts with `context` positions in the cache: what CUDA replays as a graph."""

    def run(model, mode):
        cache = KVCache(model.config, batch, context, job.dtype, job.device)
        cache.length, cache.tokens = context, torch.zeros((batch, context), dtype=torch.int64, device=job.device)
        decoder = StaticDecoder(model.eval())
        decoder.take(SimpleNamespace(cache=cache, logits=None), more=1)
        decoder._recorded_step()  # what is made once for a layout is made here
        with mode, patch.object(F, "scaled_dot_product_attention", fused_attention):
            decoder.step(torch.zeros(batch, dtype=torch.int64, device=job.device))

    return all_blocks(job, run, Operations)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float) -> Tensor:
    """F.scaled_dot_product_attention of a token as the one kernel of CUDA: for a meta tensor torch takes it apart."""
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    mask = attn_mask.expand(*q.shape[:3], k.size(2))
    return aten._scaled_dot_product_efficient_attention(q, k, v, mask, False, scale=scale)[0]


def optimizer_step(job: plan.Job) -> Trace:
    """Of the end of a step: the gradient's norm, clipping, and the optimiser, whose one kernel takes many tensors."""

    def run(model, mode):
        for parameter in model.parameters():
            if parameter.requires_grad:
                mode.counts.update(update(parameter, job))

    return all_blocks(job, run, Operations)


def update(parameter: Tensor, job: plan.Job) -> Iterator[Operation]:
    """The operations that clip a parameter's gradient and update it, with the bytes of its dtype and of its moments."""
    moments, size = moment_bytes(job, [("", parameter)], job.device), parameter.nbytes
    of = (Spec(parameter.dtype, tuple(parameter.shape), parameter.stride(), 0),)
    update = torch.optim.AdamW if job.optimizer == "adamw" else None
    yield Operation("gradient's norm", "optimiser", aten._foreach_norm.Scalar, (of,), (), 0, size, 0, 0)
    yield Operation("clip", "optimiser", aten._foreach_mul_.Scalar, (of, 1.0), (), 0, size, size, 0)
    yield Operation(job.optimizer, "optimiser", update, of, (), 0, 2 * size + moments, size + moments, 0)


def all_blocks(job: plan.Job, run: Callable, make_mode: Callable[[], Operations]) -> Trace:
    """What `run(model, mode)` does in the model of `job`. Of equal blocks two are traced.

    The second stands for all others: the first one's input may need no gradient.
    """
    L = job.config.num_hidden_layers
    if not equal_blocks(job):
        whole = traced(job, L, run, make_mode)
        return Trace(whole.counts, frozenset(whole.unknown))
    one, two = (traced(job, blocks, run, make_mode) for blocks in (1, min(2, L)))
    counts, more = one.counts.copy(), two.counts.copy()
    more.subtract(one.counts)
    assert all(count >= 0 for count in more.values()), "a block changed what others do"
    counts.update({operation: count * (L - 1) for operation, count in more.items() if count})
    return Trace(counts, frozenset(one.unknown | two.unknown))


def equal_blocks(job: plan.Job) -> bool:
    """Whether all blocks of a model do the same."""
    one_kind = len(set(job.config.kinds_of_layers())) == 1
    return one_kind and job.recompute in (0, 1) and not isinstance(job.quantize, dict)


def traced(job: plan.Job, blocks: int, run: Callable, make_mode: Callable[[], Operations]) -> Operations:
    """The mode that has seen what `run(model, mode)` does in the first blocks of the model of `job`."""
    if job.quantize:  # its table of 8-bit values must be a real tensor: the first one is cached for the process
        functional = quantize.bitsandbytes().functional
        functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    mode = make_mode()
    with plan.fake_tensors(FakeTensorMode(allow_non_fake_inputs=True), job.device):
        run(plan.build(job, list(range(blocks))), mode)
    return mode
