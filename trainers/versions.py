"""What a run is made with: another version of it may compute other last digits."""

import re
from functools import cache
from pathlib import Path

import diffusers
import peft
import torch

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


@cache
def versions() -> dict[str, str]:
    """Return the versions of the libraries that compute, and of this pack, by name."""
    libraries = {library.__name__: library.__version__ for library in (torch, diffusers, peft)}
    project = PROJECT.read_text(encoding="utf-8") if PROJECT.is_file() else ""
    own = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    return libraries | ({"personalize": own[1]} if own else {})
