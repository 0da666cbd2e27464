"""Two things measured in turn, so that whatever else a machine does falls on both.

A ratio is the median of the ratios of pairs, with its 95 % interval by bootstrap over the pairs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from personalize.trainers.memory import LiveBytes

RESAMPLES = 2000
Pair = tuple[float, float]  # seconds of either


@dataclass(frozen=True)
class Ratio:
    """How many times as long one takes as the other."""

    median: float
    low: float
    high: float
    seconds: Pair  # medians of either


def ratio_of(pairs: Sequence[Pair]) -> Ratio:
    """Compare the two of every pair."""
    times = np.asarray(pairs)
    ratios = times[:, 0] / times[:, 1]
    drawn = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    first, second = np.median(times, axis=0)
    middle = np.median(ratios)
    return Ratio(float(middle), float(low), float(high), (float(first), float(second)))


def interleaved(
    comparisons: Mapping[str, tuple[str, str]],
    seconds: Callable[[str], float],
    rounds: int,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, list[Pair]]:
    """Time the two of every comparison next to each other, in every round, by turns first.

    seconds: time one step of a contestant.
    """
    pairs: dict[str, list[Pair]] = {name: [] for name in comparisons}
    for number in range(rounds):
        for name, (a, b) in comparisons.items():
            if number % 2:
                second, first = seconds(b), seconds(a)
            else:
                first, second = seconds(a), seconds(b)
            pairs[name].append((first, second))
        say(f"round {number + 1} of {rounds}")
    return pairs


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that a step takes, with all that it started on the device."""
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


class LiveBytesOnGPU:
    """Ask the allocator of a GPU instead, which also knows what operators need inside."""

    def __init__(self, device: torch.device):
        self.device = device
        self.peak = 0

    def __enter__(self) -> "LiveBytesOnGPU":
        torch.cuda.reset_peak_memory_stats(self.device)
        self._before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *_: Any) -> None:
        torch.cuda.synchronize(self.device)
        self.peak = torch.cuda.max_memory_allocated(self.device) - self._before


def meter(device: torch.device) -> LiveBytes | LiveBytesOnGPU:
    """Make what follows the memory of tensors on a device."""
    return LiveBytesOnGPU(device) if device.type == "cuda" else LiveBytes()
