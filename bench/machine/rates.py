"""How fast a CPU does each kind of operation of a step: every one timed by itself, at another size than in the step.

`measured` takes the operations of a micro-batch of other samples and times each on random tensors of its shapes, dtypes
and layouts. `Rates.seconds` then says what an operation of the step takes: by its FLOPs if it is a product or
attention, else by its bytes.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.operations import Operation, Spec

CALLS = 5  # of each operation; the median counts
ROWS = "rows"  # in the place of a size that depends on the micro-batch


class Rates(NamedTuple):
    """What was measured.

    timed: seconds and work (FLOPs or bytes) of one call, by `key`. least: seconds of any call.
    For operations that were not timed: products, FLOP/s of all that were; bandwidth, bytes per second of a copy.
    """

    timed: dict[tuple, tuple[float, int]]
    least: float
    products: float
    bandwidth: float

    def seconds(self, operation: Operation, rows: set[int]) -> float:
        """What an operation of a micro-batch takes. rows: the sizes that depend on the micro-batch."""
        known = self.timed.get(key(operation, rows))
        if known is None:
            return self.least + max(operation.flops / self.products, operation.bytes / self.bandwidth)
        seconds, work = known
        return self.least + max(0.0, seconds - self.least) * work_of(operation) / max(1, work)


def work_of(operation: Operation) -> int:
    """What its time is proportional to: FLOPs, or bytes if it has none."""
    return operation.flops or operation.bytes


def key(operation: Operation, rows: set[int]) -> tuple:
    """Equal for the operations of two micro-batches that differ in their sizes alone.

    rows: the sizes that depend on the micro-batch.
    """

    def kind_of(spec):
        sizes = tuple(ROWS if size in rows else size for size in spec.shape)
        order = tuple(sorted(range(len(sizes)), key=lambda i: -spec.stride[i]))  # the innermost dimension is the last
        return spec.dtype, sizes, order

    words = tuple(x for x in operation.arguments if isinstance(x, str | bool))
    return operation.function, tuple(map(kind_of, operation.specs())), words


def measured(operations: Iterable[Operation], rows: set[int], bandwidth: float) -> Rates:
    """The `Rates` of these operations, of a micro-batch whose sizes are `rows`."""
    largest = {}  # of equal ones, such as the loss's chunks, the whole ones
    for operation in operations:
        largest[name] = max(largest.get(name := key(operation, rows), operation), operation, key=work_of)
    least = seconds_of(torch.ops.aten.mul_.Tensor, (Spec(torch.float32, (1,), (1,), 0), 1.0), ())
    timed = {name: (seconds_of(*each[2:5]), work_of(each)) for name, each in largest.items()}
    products = [timed[name] for name, each in largest.items() if each.flops]
    rate = sum(flops for _, flops in products) / sum(seconds for seconds, _ in products) if products else math.inf
    return Rates(timed, least, rate, bandwidth)


def seconds_of(function: Callable, arguments: tuple, named: tuple) -> float:
    """The median of a few calls on random tensors, each on copies just made, as a step's tensors are."""
    storages = random_storages((arguments, named))
    times = []
    for _ in range(CALLS + 1):  # the first one does not count
        fresh = {number: tensor.clone() for number, tensor in storages.items()}
        positional, by_name = real(arguments, fresh), dict(real(named, fresh))
        started = time.perf_counter()
        function(*positional, **by_name)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def random_storages(tree: Any, device: str = "cpu") -> dict[int, Tensor]:
    """A flat tensor on a device for every storage that the `Spec`s in it share, large enough for all."""
    specs = all_specs(tree)
    least = min((size for spec in specs for size in spec.shape if size), default=1)  # whole numbers are indices
    storages = {}
    for spec in specs:
        elements = extent(spec)
        if spec.storage not in storages or storages[spec.storage].numel() < elements:
            if spec.dtype.is_floating_point:
                storages[spec.storage] = torch.empty(elements, dtype=spec.dtype, device=device).uniform_(-0.1, 0.1)
            else:
                storages[spec.storage] = (torch.arange(elements, device=device) % least).to(spec.dtype)
    return storages


def extent(spec: Spec) -> int:
    """Elements from the first to the last one of a tensor."""
    if 0 in spec.shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(spec.shape, spec.stride, strict=True))


def all_specs(tree: Any) -> list[Spec]:
    """The `Spec`s in nested tuples."""
    if isinstance(tree, Spec):
        return [tree]
    return [spec for each in tree for spec in all_specs(each)] if isinstance(tree, tuple) else []


def real(tree: Any, storages: dict[int, Tensor]) -> Any:
    """Nested tuples with tensors in the place of `Spec`s."""
    if isinstance(tree, Spec):
        return storages[tree.storage].view(tree.dtype).as_strided(tree.shape, tree.stride)
    return tuple(real(each, storages) for each in tree) if isinstance(tree, tuple) else tree
