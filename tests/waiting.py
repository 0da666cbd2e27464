"""How long tests wait, and a wait for coroutines that also works beside Playwright's loop."""

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = 1200  # seconds, for a prompt that takes seconds: the machine may be busy
PAGE_PATIENCE = 180  # seconds, for what a page does at once


def awaited(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return what the coroutine returns, from a loop and thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()
