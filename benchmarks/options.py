"""What command lines are made of."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


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


def command(name: str, about: str | None) -> argparse.ArgumentParser:
    """Make the parser of a benchmark that writes tables and a picture, and has a small version."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a small version, to see it work")
    parser.add_argument("--json", type=Path, help="also writes the tables beside it, as .md")
    parser.add_argument("--sheet", type=Path, help="a picture of samples")
    return parser


def read(
    parser: argparse.ArgumentParser, arguments: Sequence[str], quick: Mapping[str, Any]
) -> argparse.Namespace:
    """Read a command line; what it gives counts more than what --quick stands for."""
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**quick)
    return parser.parse_args(arguments)
