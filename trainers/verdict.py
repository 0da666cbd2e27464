"""What a run's evaluations mean: which step is best, whether it over-fits, whether to go on.

Pure functions of the evaluations so far, so that a finished run can be judged again by other rules.
A loss that is not finite was not measured. Ours: the thresholds. The plateau is that of DVAR
(Voronov et al. 2023): training is done when the last stable losses vary little beside all of them;
as that is so of every smooth curve in the end, ours is that it must not fall any more either.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean, pvariance

from .monitor import Evaluation
from .settings import check, knob

BESTS = ("held-out", "train", "last")
RISE = 0.02  # of a loss over its minimum that is called a rise
RISEN = 3  # evaluations in a row that must have risen so
FLAT = 0.15  # of the variance of all losses: DVAR's threshold
WINDOW = 5  # losses that DVAR looks at
FALLS = 0.05  # share of the whole fall that the last quarter of a curve brings if it still falls
GRAINY = 1.1  # grain over the usual that is worth a word
FALLEN = 0.25  # of a peak of the grain that is gone again after the corruption stage

# In a word, where a run is
LEARNING, OVER_FITTING, PLATEAU = "learning", "over-fitting", "plateau"
NO_BETTER, WORSE, CORRUPTING = "no better", "getting worse", "corrupting"

Evaluations = Sequence[Evaluation]
Curve = list[tuple[int, float]]  # of (step, value)


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


def curve(evaluations: Iterable[Evaluation], name: str) -> Curve:
    """Return (step, value) of one measure, wherever it is a finite number."""
    values = ((e.step, getattr(e, name)) for e in evaluations)
    return [(step, v) for step, v in values if v is not None and math.isfinite(v)]


def watched(evaluations: Evaluations, rules: Rules) -> dict[int, float] | None:
    """Return the losses that decide, by step; None where the last step is best."""
    name = {"held-out": "held_out", "train": "train"}.get(rules.best)
    return dict(curve(evaluations, name)) or None if name else None


def ranking(evaluations: Evaluations, rules: Rules) -> list[int]:
    """Return the steps that were trained and measured, the best first."""
    steps = [e.step for e in evaluations if e.step > 0]
    losses = watched(evaluations, rules)
    if losses is None:
        return steps[::-1]
    return sorted((step for step in steps if step in losses), key=lambda step: losses[step])


def best_step(evaluations: Evaluations, rules: Rules) -> int | None:
    """Return the best trained step; None before the first."""
    return next(iter(ranking(evaluations, rules)), None)


def risen_since(values: Curve) -> int | None:
    """Return where a loss had risen clearly and for good.

    That is the first of at least RISEN values up to the last that are RISE above the minimum. None
    where it is not so.
    """
    lowest = min((value for _, value in values), default=math.inf)
    if not math.isfinite(lowest):
        return None
    risen = 0
    for _, value in reversed(values):
        if value < lowest * (1 + RISE):
            break
        risen += 1
    return values[-risen][0] if risen >= RISEN else None


def over_fitting_since(evaluations: Evaluations) -> int | None:
    """Return where the held-out loss had risen for good while the training loss fell; or None.

    The training loss must end below what it was at the minimum of the other.
    """
    since = risen_since(curve(evaluations, "held_out"))
    return since if since is not None and _learned_since_best(evaluations) else None


def worse_since(evaluations: Evaluations) -> int | None:
    """Return where the losses had risen for good, and not for over-fitting; or None."""
    if over_fitting_since(evaluations) is not None:
        return None
    train = [(e.step, e.train if math.isfinite(e.train) else math.inf) for e in evaluations]
    since = map(risen_since, (train, curve(evaluations, "held_out")))
    return min((step for step in since if step is not None), default=None)


def _learned_since_best(evaluations: Evaluations) -> bool:
    """Tell whether the training loss is lower than where the held-out loss was lowest."""
    held_out, train = (dict(curve(evaluations, name)) for name in ("held_out", "train"))
    both = [step for step in held_out if step in train]
    if not both:
        return False
    return train[both[-1]] < train[min(both, key=lambda step: held_out[step])]


def plateaued(losses: Sequence[float]) -> bool:
    """Tell whether a curve is flat by now: by DVAR, and by what its last quarter brought."""
    losses = [loss for loss in losses if math.isfinite(loss)]
    if len(losses) < 2 * WINDOW or pvariance(losses[-WINDOW:]) >= FLAT * pvariance(losses):
        return False
    quarter = len(losses) // 4
    before, last = fmean(losses[-2 * quarter : -quarter]), fmean(losses[-quarter:])
    return before - last <= FALLS * (losses[0] - min(losses))


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


def graininess(evaluations: Evaluations) -> Curve:
    """Return the grain over the usual: of samples where there are any, else of predictions."""
    return curve(evaluations, "grain") or curve(evaluations, "corruption")


def corruption_stage(evaluations: Evaluations) -> tuple[int, float] | None:
    """Return step and height of the hump of graininess: more than before, and than after; or None.

    It is where the grain has risen most above its lowest before. A quarter of that rise must be
    gone again in all of the last RISEN evaluations.
    """
    grain = graininess(evaluations)
    lowest = accumulate((value for _, value in grain), min)
    rises = [value - low for (_, value), low in zip(grain, lowest, strict=True)]
    if not rises:
        return None
    (step, top), rise = grain[rises.index(max(rises))], max(rises)
    gone = top - max(value for _, value in grain[-RISEN:])
    clear = top >= GRAINY and rise >= GRAINY - 1
    return (step, top) if clear and gone >= FALLEN * rise else None


def state(evaluations: Evaluations, rules: Rules) -> str:
    """Say in a word where the run is: learning, over-fitting, plateau, …"""
    if over_fitting_since(evaluations) is not None:
        return OVER_FITTING
    if worse_since(evaluations) is not None:
        return WORSE
    if _corrupts(evaluations):
        return CORRUPTING
    if _waiting(evaluations, rules) >= RISEN:
        return NO_BETTER
    return PLATEAU if plateaued([e.train for e in evaluations]) else LEARNING


def _corrupts(evaluations: Evaluations) -> bool:
    """Tell whether the pictures are grainy now, and were not so a little before."""
    grain = [value for _, value in graininess(evaluations)]
    return len(grain) > RISEN and grain[-1] >= GRAINY and grain[-1] > max(grain[-1 - RISEN : -1])


def _waiting(evaluations: Evaluations, rules: Rules) -> int:
    """Return how many evaluations have passed since the best; 0 where the last is best anyway."""
    best = best_step(evaluations, rules)
    if best is None or watched(evaluations, rules) is None:
        return 0
    return sum(e.step > best for e in evaluations)


def verdict(evaluations: Evaluations, rules: Rules) -> str:
    """Say in plain words what came out: "over-fitting since step 420; best at 380; …"."""
    best = best_step(evaluations, rules)
    if best is None:
        return "nothing measured yet"
    parts = [_of_state(evaluations, rules, best), _of_best(evaluations, rules, best)]
    drift = next(e for e in evaluations if e.step == best).prior_drift
    if drift is not None and math.isfinite(drift):
        parts.append(f"prior drift {100 * drift:+.0f} %")
    return "; ".join(filter(None, [*parts, _of_grain(evaluations)]))


def _of_state(evaluations: Evaluations, rules: Rules, best: int) -> str:
    word, last = state(evaluations, rules), evaluations[-1].step
    return {
        OVER_FITTING: f"over-fitting since step {over_fitting_since(evaluations)}",
        WORSE: f"getting worse since step {worse_since(evaluations)}: a lower learning rate helps",
        NO_BETTER: f"no better since step {best}",
        PLATEAU: f"nothing new is learned by step {last}",
    }.get(word, f"still learning at step {last}")


def _of_best(evaluations: Evaluations, rules: Rules, best: int) -> str:
    losses = watched(evaluations, rules)
    if losses is None:
        seen = any(e.held_out is not None for e in evaluations)
        return "the last is kept" + ("" if seen else ", as nothing was held out to measure on")
    if losses[best] >= losses.get(0, float("inf")):
        return f"best at {best}, but the base was better there: train less or slower"
    return f"best at {best}"


def _of_grain(evaluations: Evaluations) -> str:
    """Say how much grainier than usual pictures are, if it is worth a word."""
    hump = corruption_stage(evaluations)
    if hump is not None:
        step, top = hump
        return f"pictures up to {100 * (top - 1):.0f} % grainier, at step {step}, less later"
    grain = graininess(evaluations)
    if grain and grain[-1][1] >= GRAINY:
        return f"pictures {100 * (grain[-1][1] - 1):.0f} % grainier than usual"
    return ""
