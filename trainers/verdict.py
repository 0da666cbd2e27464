"""What a run's evaluations mean: which step is best, whether it over-fits, whether to go on.

Pure functions of the evaluations so far, so that a finished run can be judged again by other rules.
Ours: the thresholds. The plateau is that of DVAR (Voronov et al. 2023): training is done when the
last stable losses vary little beside all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import pvariance

from .monitor import Evaluation
from .settings import check, knob

BESTS = ("held-out", "train", "last")
RISE = 0.02  # of the held-out loss over its minimum that is called over-fitting
RISEN = 3  # evaluations in a row that must have risen so
FLAT = 0.15  # of the variance of all losses: DVAR's threshold
WINDOW = 5  # losses that DVAR looks at
GRAINY = 1.1  # corruption index that is worth a word

Evaluations = Sequence[Evaluation]


@dataclass(frozen=True)
class Rules:
    """What "best" means, and when to stop."""

    best: str = knob(
        BESTS[0],
        "Which checkpoint is best: that of the lowest loss on held-out pictures, on training "
        "pictures (which only knows a plateau), or the last. With nothing held out: the last.",
        choices=BESTS,
    )
    early_stop: bool = knob(
        True,
        "End the training when 'patience' is used up; where the last checkpoint is best, when the "
        "loss on the training pictures stays flat.",
    )
    patience: int = knob(
        5, "Evaluations without a new best that are waited for.", min=1, max=10_000
    )

    def __post_init__(self) -> None:
        check(self)


def watched(evaluations: Evaluations, rules: Rules) -> dict[int, float] | None:
    """Return the losses that decide, by step; None where the last step is best."""
    if rules.best == "train":
        return {e.step: e.train for e in evaluations}
    values = {e.step: e.held_out for e in evaluations if e.held_out is not None}
    return values if rules.best == "held-out" and values else None


def ranking(evaluations: Evaluations, rules: Rules) -> list[int]:
    """Return the steps that were trained, the best first."""
    steps = [e.step for e in evaluations if e.step > 0]
    losses = watched(evaluations, rules)
    if losses is None:
        return steps[::-1]
    return sorted(steps, key=lambda step: losses[step])


def best_step(evaluations: Evaluations, rules: Rules) -> int | None:
    """Return the best trained step; None before the first."""
    return next(iter(ranking(evaluations, rules)), None)


def over_fitting_since(evaluations: Evaluations) -> int | None:
    """Return where the held-out loss had risen clearly and for good while training loss fell.

    That is the first of at least RISEN evaluations up to the last that are RISE above the minimum,
    where the training loss ends below what it was at that minimum. None where it is not so.
    """
    seen = [(e.step, e.held_out, e.train) for e in evaluations if e.held_out is not None]
    if not seen:
        return None
    _, lowest, train_there = min(seen, key=lambda point: point[1])
    risen = 0
    for _, held_out, _ in reversed(seen):
        if held_out < lowest * (1 + RISE):
            break
        risen += 1
    falls = seen[-1][2] < train_there
    return seen[-risen][0] if risen >= RISEN and falls else None


def plateaued(losses: Sequence[float]) -> bool:
    """Tell whether the last WINDOW losses vary less than FLAT of what all of them do (DVAR)."""
    if len(losses) < 2 * WINDOW:
        return False
    return pvariance(losses[-WINDOW:]) < FLAT * pvariance(losses)


def patience_left(evaluations: Evaluations, rules: Rules) -> int | None:
    """Return how many evaluations may yet pass without a new best; None where none is counted."""
    best = best_step(evaluations, rules)
    if not rules.early_stop or best is None or watched(evaluations, rules) is None:
        return None
    return rules.patience - sum(e.step > best for e in evaluations)


def should_stop(evaluations: Evaluations, rules: Rules) -> bool:
    """Tell whether to go on is useless: patience is at its end, or there is nothing to wait for.

    Where the last step is best, that is when the training loss is on a plateau.
    """
    if not rules.early_stop:
        return False
    left = patience_left(evaluations, rules)
    if left is not None:
        return left <= 0
    return plateaued([e.train for e in evaluations])


def stopped_at(evaluations: Evaluations, rules: Rules) -> int | None:
    """Return the step at which a whole run would have been stopped by these rules."""
    for count in range(1, len(evaluations) + 1):
        if should_stop(evaluations[:count], rules):
            return evaluations[count - 1].step
    return None


def grainiest(evaluations: Evaluations) -> Evaluation | None:
    """Return where the pictures were grainier than before and after: the corruption stage."""
    if len(evaluations) < 3:
        return None
    top = max(evaluations, key=lambda e: e.corruption)
    return top if top.corruption >= GRAINY else None


def state(evaluations: Evaluations) -> str:
    """Say in a word where the run is: learning, over-fitting or plateau."""
    if over_fitting_since(evaluations) is not None:
        return "over-fitting"
    return "plateau" if plateaued([e.train for e in evaluations]) else "learning"


def verdict(evaluations: Evaluations, rules: Rules) -> str:
    """Say in plain words what came out: "over-fitting since step 420; best at 380; …"."""
    best = best_step(evaluations, rules)
    if best is None:
        return "nothing measured yet"
    parts = [_of_state(evaluations), _of_best(evaluations, rules, best)]
    chosen = next(e for e in evaluations if e.step == best)
    if chosen.prior_drift is not None:
        parts.append(f"prior drift {100 * chosen.prior_drift:+.0f} %")
    top = grainiest(evaluations)
    if top is not None:
        parts.append(
            f"pictures up to {100 * (top.corruption - 1):.0f} % grainier, at step {top.step}"
        )
    return "; ".join(parts)


def _of_state(evaluations: Evaluations) -> str:
    since = over_fitting_since(evaluations)
    if since is not None:
        return f"over-fitting since step {since}"
    last = evaluations[-1]
    if state(evaluations) == "plateau":
        return f"nothing new is learned by step {last.step}"
    return f"still learning at step {last.step}"


def _of_best(evaluations: Evaluations, rules: Rules, best: int) -> str:
    losses = watched(evaluations, rules)
    if losses is None:
        seen = any(e.held_out is not None for e in evaluations)
        return "the last is kept" + ("" if seen else ", as nothing was held out to measure on")
    if losses[best] >= losses.get(0, float("inf")):
        return f"best at {best}, but the base was better there: train less or slower"
    return f"best at {best}"
