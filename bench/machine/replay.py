"""The operations of a micro-batch run again on random tensors in their order, each timed: a CPU's `Rates`.

`record` traces the whole model on tensors without memory, and notes which tensors each operation takes and makes.
`measured` then runs the operations alone, without the model or autograd. A tensor lives from the operation that makes
it to the last one that takes it, so that the caches hold what they hold in a step.
"""

import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from bench import operations
from bench.machine import rates
from bench.machine.rates import Rates
from bench.operations import Operation, Operations
from training.memory import plan

INDICES = (torch.int32, torch.int64)  # made anew for each operation: they must fit what it looks up


class Call(NamedTuple):
    """An operation as it was recorded.

    given: of each of its `Spec`s the number of the storage, and where in it the tensor begins.
    made: the numbers of the storages of its results.
    """

    operation: Operation
    given: tuple[tuple[int, int], ...]
    made: tuple[int, ...]


class Recorded(Operations):
    """Notes the operations inside it in their order.

    calls: the operations. sizes: bytes of each storage. present: the dtypes of storages that were there before.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.calls: list[Call] = []
        self.sizes, self.present = [], {}
        self.numbers, self.known = {}, []  # by address: one that a weak reference knows is not given out again

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation, and note it and what it allocates."""
        for tensor in operations.tensors((args, kwargs or {})):
            if tensor.untyped_storage()._cdata not in self.numbers:
                self.present[self.number(tensor)] = tensor.dtype
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in operations.tensors(out):
            self.number(tensor)
        return out

    def record(self, operation: Operation, given: list[Tensor], out: Any) -> None:
        """Count an operation, and note it."""
        super().record(operation, given, out)
        places = tuple((self.number(tensor), tensor.storage_offset()) for tensor in given)
        self.calls.append(Call(operation, places, tuple(map(self.number, operations.tensors(out)))))

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor's storage."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.numbers:
            self.known.append(StorageWeakRef(storage))
            self.numbers[storage._cdata] = len(self.sizes)
            self.sizes.append(storage.nbytes())
        return self.numbers[storage._cdata]


def record(job: plan.Job, shape: plan.Shape) -> Recorded:
    """What a micro-batch of the whole model does, forward and backward."""
    run = operations.micro_batch_run(job, shape)
    make_mode = lambda: operations.micro_batch_mode(job, shape, Recorded)  # noqa: E731
    return operations.traced(job, job.config.num_hidden_layers, run, make_mode)


@torch.no_grad()
def measured(recorded: Recorded, rows: set[int], bandwidth: float, times: int = 1) -> Rates:
    """The `Rates` of a recorded micro-batch whose sizes are `rows`: of each operation the median of `times` replays."""
    names = [rates.key(call.operation, rows) for call in recorded.calls]
    seconds, work, count = defaultdict(list), Counter(), Counter(names)
    for name, call in zip(names, recorded.calls, strict=True):
        work[name] += rates.work_of(call.operation)
    for _ in range(times):
        taken = Counter()
        for name, elapsed_in_call in zip(names, replay(recorded), strict=True):
            taken[name] += elapsed_in_call
        for name, whole in taken.items():
            seconds[name].append(whole / count[name])
    timed = {name: (statistics.median(each), work[name] / count[name]) for name, each in seconds.items()}
    products = {name for name, call in zip(names, recorded.calls, strict=True) if call.operation.flops}
    of_products = sum(timed[name][0] * count[name] for name in products)
    rate = sum(work[name] for name in products) / of_products if products else math.inf
    return Rates(timed, least_seconds(), rate, bandwidth)


def least_seconds() -> float:
    """What torch takes for an operation on one number."""
    number = torch.ones(1)
    multiply = torch.ops.aten.mul_.Tensor
    return min(elapsed(multiply, (number, 1.0), {})[0] for _ in range(100))


def replay(recorded: Recorded) -> list[float]:
    """Seconds of each operation, run in order."""
    last = {number: i for i, call in enumerate(recorded.calls) for number in numbers_of(call)}
    memory = {number: random_storage(recorded.sizes[number], dtype) for number, dtype in recorded.present.items()}
    seconds = []
    for i, (operation, given, made) in enumerate(recorded.calls):
        arguments, named = real(operation, given, memory, recorded.sizes)
        taken, out = elapsed(operation.function, arguments, named)
        seconds.append(taken)
        memory |= {number: x.untyped_storage() for number, x in zip(made, operations.tensors(out), strict=True)}
        del arguments, named, out
        for number in numbers_of(recorded.calls[i]):
            if last[number] == i:
                memory.pop(number, None)
    return seconds


def numbers_of(call: Call) -> set[int]:
    """The storages that an operation takes or makes."""
    return {number for number, _ in call.given} | {*call.made}


def elapsed(function: Callable, arguments: tuple, named: dict) -> tuple[float, Any]:
    """Seconds of a call, and what came out."""
    started = time.perf_counter()
    out = function(*arguments, **named)
    return time.perf_counter() - started, out


def real(operation: Operation, given: tuple, memory: dict, sizes: list[int]) -> tuple[tuple, dict]:
    """The arguments of an operation, with tensors in the place of its `Spec`s."""
    places, least = iter(given), min((size for spec in operation.specs() for size in spec.shape if size), default=1)

    def tensor(spec):
        number, offset = next(places)
        if spec.dtype in INDICES:
            return (torch.arange(spec.extent()) % least).to(spec.dtype).as_strided(spec.shape, spec.stride)
        if number not in memory:  # allocated, and not written yet
            memory[number] = torch.empty(sizes[number], dtype=torch.uint8).untyped_storage()
        return torch.empty(0, dtype=spec.dtype).set_(memory[number], offset, spec.shape, spec.stride)

    return operation.call(tensor)


def random_storage(size: int, dtype: torch.dtype) -> torch.UntypedStorage:
    """So many bytes of random numbers, or of small whole ones."""
    count = size // dtype.itemsize
    if dtype.is_floating_point:
        return torch.empty(count, dtype=dtype).uniform_(-0.1, 0.1).untyped_storage()
    return (torch.arange(count) % 2).to(dtype).untyped_storage()
