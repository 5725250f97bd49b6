"""Which micro-batches of a step each device gets: so that all have the same number of tokens, or nearly."""

from __future__ import annotations

import bisect
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

    def give(self, other, sizes, room):
        """Exchange a sample for one of another share, or for none, if that brings them closer. Returns whether."""
        given, taken = _exchange(self.sizes(sizes), other.sizes(sizes), self.tokens - other.tokens)
        if given is not None:
            other.take(given, self, sizes, room)
        if taken is not None:
            self.take(taken, other, sizes, room)
        return given is not None

    def sizes(self, sizes):
        """Pairs of the tokens and the number of each sample, in order."""
        return sorted((sizes[i], i) for micro_batch in self.micro_batches for i in micro_batch)

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

    def cut_into(self, number):
        """Have so many micro-batches: cut the longest of those that have fewer, then add empty ones."""
        while len(self.micro_batches) < number:
            longest = max(self.micro_batches, key=len, default=[])
            half = len(longest) // 2
            self.micro_batches.append(longest[len(longest) - half :])
            del longest[len(longest) - half :]


def share_out(
    step: Step, lengths: Tensor, budget: int, count: int, even: bool = False, padded: bool = False, least: int = 0
) -> list[Step]:
    """The micro-batches of a step for each of `count` devices.

    Whole micro-batches first, the largest to the device that has the fewest tokens; then samples are exchanged between
    the device with the most and another, first that with the fewest, as long as that brings them closer. A pure
    function of its arguments, the same on all devices; the gradient is that of the step, however it is cut.

    lengths: (N,) of all samples. budget: the positions of a micro-batch, as planners take it. padded: whether its rows
    are padded to one length. even: whether all devices get the same number of micro-batches, of which the last may be
    empty: where devices have parts of the model, all take part in each pass. least: how many micro-batches a device
    gets at least, of which the last may be empty too: as many as a pipeline has stages.
    """
    samples = [i for micro_batch in step for i in micro_batch]
    sizes = dict(zip(samples, lengths[samples].tolist(), strict=True))

    def room(samples):
        own = [sizes[i] for i in samples]
        return (len(own) * max(own) if padded else sum(own)) <= budget

    shares = [_Share() for _ in range(count)]
    for micro_batch in sorted(step, key=lambda each: -sum(sizes[i] for i in each)):  # stable: the same everywhere
        min(shares, key=lambda share: share.tokens).add([*micro_batch], sizes)
    for _ in sizes:  # each sample moves once, at most
        *others, most = sorted(shares, key=lambda share: share.tokens)
        if not any(most.give(other, sizes, room) for other in others):
            break
    counts = [max(least, len(share.micro_batches)) for share in shares]
    for share, number in zip(shares, counts, strict=True):
        share.cut_into(max(counts) if even else number)
    return [share.micro_batches for share in shares]


def _exchange(most, least, gap):
    """Which sample is to move from the fuller share, and which one back or None, so that the gap becomes smallest.

    (None, None) if it would not become smaller. most, least: pairs of tokens and number, in order.
    """
    best = gap, None, None
    for size, sample in most:
        wanted = size - gap / 2  # of the one that comes back
        place = bisect.bisect_left(least, (wanted, -1))
        for other, back in [(0, None), *least[max(0, place - 1) : place + 1]]:
            best = min(best, (abs(gap - 2 * (size - other)), sample, back), key=lambda found: found[0])
    return best[1:]


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
