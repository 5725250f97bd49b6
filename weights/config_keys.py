"""Checks of single values of a config.json: of the wrong kind, or out of all bounds."""

from typing import Any

LARGEST, MOST_LAYERS = 2**24, 1000  # of a size: a damaged file must not cost time or memory
MOST_EXPERTS = 1000
LARGEST_NUMBER = 1e30  # of a number with a fraction


def check_size(name: str, value: Any, least: int = 1, most: int = LARGEST) -> None:
    """Raise ValueError, naming the key, unless a value is a whole number between `least` and `most`."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}, it must be a whole number from {least} to {most:,}")


def check_number(name: str, value: Any) -> None:
    """Raise ValueError, naming the key, unless a value is a number above 0."""
    if type(value) not in (int, float) or not 0 < value < LARGEST_NUMBER:
        raise ValueError(f"{name} is {value!r}, it must be a number above 0 and below {LARGEST_NUMBER:g}")
