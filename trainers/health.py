"""Numbers that go wrong in a run: losses and gradients that are not finite, explode or vanish.

Ours: the thresholds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from .settings import Settings

MOST_IN_A_ROW = 10  # steps without a finite gradient, or from the first on with none at all
LOWERED = 0.5  # of the learning rate, whenever it is lowered
EXPLODED = 100.0  # times the median of the gradients before
SEEN = 10  # gradients that a median is taken of, at least


@dataclass(frozen=True)
class Health:
    """What went wrong so far."""

    skipped: int = 0  # steps that did not move, as their loss or gradient was not finite
    in_a_row: int = 0  # of them, up to the last step
    rate: float = 1.0  # share of the learning rate that is left
    still: int = 0  # steps from the first on without any gradient
    moved: bool = False  # whether there was one

    def after(self, step: int, loss: float, norm: float, settings: Settings) -> "Health":
        """Return how it stands after a step. norm: of its gradient; NaN where that is not known.

        Raises FloatingPointError when going on is useless.
        """
        if not math.isfinite(loss):
            return self._after_skip(step, settings)
        if self.moved or norm != 0:
            return replace(self, in_a_row=0, moved=True)
        still = self.still + 1
        if still >= min(MOST_IN_A_ROW, settings.steps):
            raise FloatingPointError(
                f"the gradient is zero everywhere in the first {still} steps, so nothing is "
                "learned: set 'precision' to fp32, and see that no weight in the loss is 0"
            )
        return replace(self, in_a_row=0, still=still)

    def _after_skip(self, step: int, settings: Settings) -> "Health":
        row = self.in_a_row + 1
        if settings.non_finite == "stop" or row >= min(MOST_IN_A_ROW, settings.steps):
            times = f", for the {row}th time in a row" if row > 1 else ""
            raise FloatingPointError(
                f"the loss or its gradient is not finite at step {step}{times}: lower "
                f"'learning_rate' (it is {settings.learning_rate * self.rate:g}) or set "
                "'precision' to fp32. What was learned before is kept"
            )
        rate = self.rate * (LOWERED if settings.non_finite == "lower" else 1.0)
        return replace(self, skipped=self.skipped + 1, in_a_row=row, rate=rate)

    def facts(self) -> dict[str, float]:
        """Return what the history shall say of it, by name; nothing while all is well."""
        lowered = {"rate_left": self.rate} if self.rate < 1 else {}
        return ({"skipped": self.skipped} if self.skipped else {}) | lowered


def explosion(norms: Sequence[float]) -> float | None:
    """Return how many times the usual the last gradient's norm is, if that is far too much.

    norms: of the gradients so far, before clipping.
    """
    before = [norm for norm in norms[:-1] if math.isfinite(norm)]
    usual = median(before) if len(before) >= SEEN else 0.0
    return norms[-1] / usual if usual > 0 and norms[-1] > EXPLODED * usual else None
