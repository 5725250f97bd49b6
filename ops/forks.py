"""Samples that fork: one beginning, and several ends that continue it."""

from typing import NamedTuple


class Forks(NamedTuple):
    """Samples end to end in one row, each a beginning and several ends that continue it and do not see one another.

    beginnings: for each sample the number of positions that its ends share. ends: for each sample the numbers of
    positions of its ends, which follow the beginning one after another.
    """

    beginnings: tuple[int, ...]
    ends: tuple[tuple[int, ...], ...]
