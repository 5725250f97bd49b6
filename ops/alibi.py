"""ALiBi (Press et al. 2021, arXiv 2108.12409): how much each head's scores fall with the distance of a key."""

import math


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """The paper's slopes, as BLOOM and Falcon-RW have them: for 8 heads 1/2, 1/4, ..., 1/256.

    Where the number of heads is no power of two, those of the next lower one, then every other one of twice as many.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * n / power) for n in range(1, power + 1)]
    between = [2 ** (-4 * n / power) for n in range(1, 2 * power + 1, 2)]
    return tuple(slopes + between[: heads - power])


def mpt_slopes(heads: int, most: float) -> tuple[float, ...]:
    """MPT's: those of the next higher power of two, every other one first; the last would be 2^-most."""
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2 ** (-most * n / power) for n in range(1, power + 1)]
    return tuple(slopes if power == heads else (slopes[1::2] + slopes[::2])[:heads])
