"""Which micro-batches of a step each device gets: so that all have the same number of tokens, or nearly."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from batching import Step


class _Share:
    """The micro-batches of one device, and how many tokens they have."""

    def __init__(self):
        self.micro_batches, self.tokens = [], 0

    def add(self, micro_batch, sizes):
        self.micro_batches.append(micro_batch)
        self.tokens += sum(sizes[i] for i in micro_batch)

    def take(self, sample, other, sizes, room):
        """Take a sample from another share, into a row that has room for it or a new one."""
        for micro_batch in other.micro_batches:
            if sample in micro_batch:
                micro_batch.remove(sample)
        other.micro_batches = [each for each in other.micro_batches if each]
        row = next((each for each in self.micro_batches if room([*each, sample])), None)
        if row is None:
            self.micro_batches.append([sample])
        else:
            row.append(sample)
        self.tokens, other.tokens = self.tokens + sizes[sample], other.tokens - sizes[sample]


def share_out(
    step: Step, lengths: Tensor, budget: int, count: int, even: bool = False, padded: bool = False
) -> list[Step]:
    """The micro-batches of a step for each of `count` devices.

    Whole micro-batches first, the largest to the device that has the fewest tokens; then single samples move from the
    device with the most to that with the fewest, as long as that makes the most less. A pure function of its arguments,
    the same on all devices; the gradient is that of the step, however it is cut.

    lengths: (N,) of all samples. budget: the positions of a micro-batch, as planners take it. padded: whether its rows
    are padded to one length. even: whether all devices get the same number of micro-batches, of which the last may be
    empty: where devices have parts of the model, all take part in each pass.
    """
    sizes = {i: lengths[i].item() for micro_batch in step for i in micro_batch}

    def room(samples):
        own = [sizes[i] for i in samples]
        return (len(own) * max(own) if padded else sum(own)) <= budget

    shares = [_Share() for _ in range(count)]
    for micro_batch in sorted(step, key=lambda each: -sum(sizes[i] for i in each)):  # stable: the same everywhere
        min(shares, key=lambda share: share.tokens).add([*micro_batch], sizes)
    for _ in sizes:  # each sample moves once, about
        most, least = (choose(shares, key=lambda share: share.tokens) for choose in (max, min))
        gap = most.tokens - least.tokens
        movable = [i for each in most.micro_batches for i in each if sizes[i] < gap]
        if not movable:
            break
        least.take(min(movable, key=lambda i: (abs(gap - 2 * sizes[i]), i)), most, sizes, room)
    if even:
        _level(shares)
    return [share.micro_batches for share in shares]


def _level(shares):
    """Give all the same number of micro-batches: cut the longest of those that have fewer, then add empty ones."""
    most = max(len(share.micro_batches) for share in shares)
    for share in shares:
        while len(share.micro_batches) < most:
            longest = max(share.micro_batches, key=len, default=[])
            half = len(longest) // 2
            share.micro_batches.append(longest[len(longest) - half :])
            del longest[len(longest) - half :]


class Surplus(NamedTuple):
    """How many tokens more than the mean the device with the most has, as a share: on average, and at the worst."""

    mean: float
    worst: float


def surplus(shared: list[list[Step]], lengths: Tensor) -> Surplus:
    """Of several steps, each shared out."""
    each = []
    for shares in shared:
        tokens = [sum(lengths[micro_batch].sum().item() for micro_batch in share if micro_batch) for share in shares]
        each.append(max(tokens) * len(tokens) / sum(tokens) - 1)
    return Surplus(sum(each) / len(each), max(each))
