"""How fast a CPU does each kind of operation of a step, and what it takes at another size than was timed (replay.py).

`Rates.seconds` says what an operation of a step takes: by its FLOPs if it is a product or attention, else by its bytes.
"""

from typing import NamedTuple

from bench.operations import Operation

ROWS = "rows"  # in the place of a size that depends on the micro-batch


class Rates(NamedTuple):
    """What was measured.

    timed: mean seconds and work (FLOPs or bytes) of a call, by `key`. least: seconds of any call.
    For operations that were not timed: products, FLOP/s of all that were; bandwidth, bytes per second of a copy.
    """

    timed: dict[tuple, tuple[float, float]]
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
