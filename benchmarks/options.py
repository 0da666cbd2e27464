"""What command lines are made of."""

import argparse
from collections.abc import Callable


def numbers(text: str) -> list[int]:
    """Read "1,2,3"."""
    return [int(part) for part in text.split(",")]


def number(low: int, high: int) -> Callable[[str], int]:
    """Return a reader of integers in a range, for an argument's type."""

    def read(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not in {low} to {high}")
        return value

    return read
