"""What a multiprocessor of a card holds, by compute capability, for kernels that are compiled without the card."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from shell.cli import UserError


class Card(NamedTuple):
    """Of a multiprocessor (CUDA C++ Programming Guide, compute capabilities): bytes of shared memory that all its
    blocks can have and that one block can have, and how many threads and blocks it holds."""

    shared: int
    shared_of_block: int
    threads: int
    blocks: int


KB = 1024
CARDS = {
    80: Card(164 * KB, 163 * KB, 2048, 32),
    86: Card(100 * KB, 99 * KB, 1536, 16),
    89: Card(100 * KB, 99 * KB, 1536, 24),
    90: Card(228 * KB, 227 * KB, 2048, 32),
    100: Card(228 * KB, 227 * KB, 2048, 32),
    120: Card(100 * KB, 99 * KB, 1536, 24),
}


def check_known(**flags: tuple[Iterable, Iterable[Any]]) -> None:
    """Raise a UserError for the first value of a flag that is not among those it knows. flags: (given, known)."""
    for name, (given, known) in flags.items():
        unknown = [each for each in given if each not in known]
        if unknown:
            raise UserError(f"--{name} {unknown[0]}: expected some of {', '.join(map(str, known))}")
