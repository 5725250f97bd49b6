"""Samples that begin alike: the beginning is computed once, and attention sees each of its ends as a sample of its own.

A preference is one prompt with two answers. In a packed row the prompt stands once, and after it both answers. Every
operation on single positions has the prompt once then; only attention gets queries, keys and values of whole samples,
prompt and answer, so any of its kernels will do, and gives the positions of the row back.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor


class Forks(NamedTuple):
    """Samples end to end in one row, each a beginning and several ends that continue it and do not see one another.

    Of each sample `beginnings` has how many positions its ends share, and `ends` how many positions each of them has
    after those. A beginning may be empty, an end may not.
    """

    beginnings: tuple[int, ...]
    ends: tuple[tuple[int, ...], ...]

    def offsets(self) -> list[int]:
        """Where each sample begins in the row, and the last one ends."""
        sizes = (start + sum(ends) for start, ends in zip(self.beginnings, self.ends, strict=True))
        return list(accumulate(sizes, initial=0))

    def whole_offsets(self) -> list[int]:
        """The same if each end had its beginning to itself: where each of these whole samples begins."""
        sizes = [start + end for start, ends in zip(self.beginnings, self.ends, strict=True) for end in ends]
        return list(accumulate(sizes, initial=0))

    def sources(self) -> list[int]:
        """Of each position of the whole samples, which position of the row it is."""
        places = []
        for first, start, ends in zip(self.offsets(), self.beginnings, self.ends, strict=False):
            own = first + start
            for end in ends:
                places += [*range(first, first + start), *range(own, own + end)]
                own += end
        return places

    def copies(self) -> list[int]:
        """Of each position of the row, where it is in the whole samples: the first of the places that it has there."""
        places, whole = [], iter(self.whole_offsets())
        for start, ends in zip(self.beginnings, self.ends, strict=True):
            for number, end in enumerate(ends):
                first = next(whole)
                places += range(first + (start if number else 0), first + start + end)
        return places

    def part(self, number: int) -> "Forks":
        """Of one sample alone."""
        return Forks(self.beginnings[number : number + 1], self.ends[number : number + 1])


def attend_whole(attention: Callable, sources: Tensor, copies: Tensor) -> Callable:
    """`attention`, which is for whole samples, for a row in which they share beginnings.

    sources (S,), copies (T,) int64: those of `Forks`, as tensors. The function that is returned takes and gives
    (B, heads, T, d), as that one does (B, heads, S, d).
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        whole = (x.index_select(2, sources) for x in (q, k, v))
        return attention(*whole, sinks).index_select(2, copies)

    return attend
