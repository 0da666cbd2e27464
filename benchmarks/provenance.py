"""Which code a kept result comes from."""

import hashlib
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from . import ROOT


@cache
def code_hash(base: Path) -> str:
    """Return a hash of all that trains, and of a base: a file, or a folder."""
    found = hashlib.sha256()
    for path in [*sorted(ROOT.glob("trainers/**/*.py")), *sorted(files_of(base))]:
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def files_of(path: Path) -> Iterable[Path]:
    """Return the file itself, or what a folder holds."""
    return [path] if path.is_file() else (inner for inner in path.rglob("*") if inner.is_file())


def warn_of_mixed(codes: Mapping[str, int]) -> None:
    """Say on stderr when results of different code, {hash: how many}, are put into one table."""
    if len(codes) > 1:
        shares = ", ".join(f"{count} of {code}" for code, count in codes.items())
        text = f"warning: cells of {len(codes)} states of the code are compared: {shares}"
        print(text, file=sys.stderr)
