"""What a run's evaluations mean: pure decisions about curves."""

import math
from dataclasses import replace

import pytest

from personalize.trainers.monitor import BINS, Evaluation
from personalize.trainers.verdict import (
    Rules,
    best_step,
    corruption_stage,
    over_fitting_since,
    patience_left,
    plateaued,
    ranking,
    should_stop,
    state,
    stopped_at,
    verdict,
    worse_since,
)


def evaluation(step: int, train: float, held_out: float | None = None, **more) -> Evaluation:
    zeros = (0.0,) * BINS
    known = {"train_of_base": 1.0, "held_out_of_base": 1.0, "prior_of_base": 1.0, "corruption": 1.0}
    return Evaluation(
        step=step, train=train, held_out=held_out, train_bins=zeros, gamma=zeros, **known | more
    )


def u_shape(count: int = 21, bottom: int = 8, **more) -> list[Evaluation]:
    """Held-out loss falls to step 10 * bottom and rises again; training loss only falls."""
    return [
        evaluation(10 * i, math.exp(-i / 8), 0.8 + 0.2 * (1 - i / bottom) ** 2, **more)
        for i in range(count)
    ]


def rising_train(count: int = 21) -> list[Evaluation]:
    return [evaluation(10 * i, 1.0 + i / 10, 0.8 + abs(i - 8) / 10) for i in range(count)]


def falling(count: int = 21, held_out: bool = True) -> list[Evaluation]:
    losses = [math.exp(-i / 4) for i in range(count)]
    return [evaluation(10 * i, x, x + 0.1 if held_out else None) for i, x in enumerate(losses)]


def test_the_best_step_is_the_lowest_held_out_loss():
    assert best_step(u_shape(), Rules()) == 80
    assert ranking(u_shape(), Rules())[:3] == [80, 70, 90]


def test_the_base_is_never_the_best_step():
    worse = [evaluation(0, 1.0, 1.0), evaluation(10, 0.9, 1.2), evaluation(20, 0.8, 1.4)]
    assert best_step(worse, Rules()) == 10
    assert "the base was better" in verdict(worse, Rules())
    assert best_step(worse[:1], Rules()) is None


def test_best_can_be_the_training_loss_or_the_last_step():
    assert best_step(u_shape(), Rules(best="train")) == 200
    assert best_step(u_shape(), Rules(best="last")) == 200
    assert ranking(u_shape(), Rules(best="last"))[:2] == [200, 190]


def test_with_nothing_held_out_the_last_step_is_best_and_the_verdict_says_why():
    run = falling(held_out=False)
    assert best_step(run, Rules()) == 200
    assert patience_left(run, Rules()) is None
    assert "nothing was held out" in verdict(run, Rules())


def test_over_fitting_begins_where_the_held_out_loss_has_risen_for_good():
    run = u_shape()
    since = over_fitting_since(run)
    naive = [e.step for e in run if e.step > 80 and e.held_out >= 0.8 * 1.02]
    assert since == naive[0] == 110
    assert state(run, Rules()) == "over-fitting"


def test_a_rise_is_called_over_fitting_only_when_it_lasts():
    assert over_fitting_since(u_shape(count=13)) is None  # two evaluations above: 110, 120
    assert over_fitting_since(u_shape(count=14)) == 110
    back = [*u_shape(), evaluation(210, 0.01, 0.8)]
    assert over_fitting_since(back) is None


def test_a_rise_of_both_losses_is_not_over_fitting():
    assert over_fitting_since(rising_train()) is None


def test_a_run_that_only_learns_is_not_over_fitting():
    assert over_fitting_since(falling()) is None
    assert over_fitting_since(falling(held_out=False)) is None
    assert state(falling(count=6), Rules()) == "learning"


@pytest.mark.parametrize("patience", [1, 3, 5])
def test_patience_ends_so_many_evaluations_after_the_best(patience):
    rules = Rules(patience=patience)
    assert stopped_at(u_shape(), rules) == 80 + 10 * patience
    before = u_shape(count=9 + patience - 1)
    assert patience_left(before, rules) == 1 and not should_stop(before, rules)


def test_without_early_stop_a_run_never_ends_early():
    assert stopped_at(u_shape(), Rules(early_stop=False)) is None
    assert patience_left(u_shape(), Rules(early_stop=False)) is None


def test_a_plateau_is_a_small_share_of_the_variance():
    flat = [1.0, 0.5, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert plateaued(flat)
    assert not plateaued(flat[-9:])  # too few to tell
    ratio = variance(flat[-5:]) / variance(flat)
    assert ratio < 0.15


@pytest.mark.parametrize("count", [10, 13, 20, 100, 1000])
def test_a_straight_line_is_no_plateau_however_many_evaluations_there_are(count):
    line = [1 - i / count for i in range(count)]
    assert not plateaued(line)
    wavy = [x + 0.05 * math.sin(9 * i) for i, x in enumerate(line)]
    assert not plateaued(wavy)


def test_how_often_is_evaluated_does_not_decide_when_a_run_is_flat():
    def stops(every: int) -> int:
        losses = [math.exp(-step / 100) for step in range(0, 1001, every)]
        run = [evaluation(every * i, x) for i, x in enumerate(losses)]
        return stopped_at(run, Rules())

    found = [stops(every) for every in (5, 10, 20, 50)]
    assert min(found) > 300 and max(found) - min(found) <= 120


def variance(values) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values)


def test_where_the_last_is_best_a_plateau_ends_the_run():
    rules, run = Rules(best="last"), falling()
    assert stopped_at(run, rules) == next(
        e.step for i, e in enumerate(run) if plateaued([x.train for x in run[: i + 1]])
    )
    assert state(run, Rules()) == "plateau"


def grainy(*values: float) -> list[Evaluation]:
    return [evaluation(i, 1 - i / 100, 1 - i / 100, corruption=c) for i, c in enumerate(values)]


def test_the_corruption_stage_is_a_hump():
    run = grainy(1.0, 1.05, 1.3, 1.2, 1.1, 1.05, 1.02)
    assert corruption_stage(run) == (2, 1.3)
    assert verdict(run, Rules()).endswith("pictures up to 30 % grainier, at step 2, less later")
    assert corruption_stage(u_shape()) is None


def test_a_hump_may_follow_on_a_fall():
    """Without prompts a run begins with pictures of another kind."""
    run = grainy(6.0, 2.0, 0.9, 1.2, 1.9, 1.6, 1.3, 1.2)
    assert corruption_stage(run) == (4, 1.9)
    assert corruption_stage(run[:6]) is None  # not over
    assert corruption_stage(grainy(6.0, 3.0, 1.5, 1.2, 1.1, 1.05)) is None
    assert corruption_stage(grainy(1.0, 0.5, 0.7, 0.5, 0.5, 0.5)) is None  # never grainy


def test_the_grain_of_samples_tells_more_than_that_of_predictions():
    """They are fewer: not every evaluation samples."""
    run = grainy(*[1.0] * 13)
    hump = dict(zip(range(0, 13, 2), [1.0, 1.05, 1.3, 1.2, 1.1, 1.05, 1.02], strict=True))
    sampled = [replace(e, grain=hump.get(e.step)) for e in run]
    assert corruption_stage(run) is None and corruption_stage(sampled) == (4, 1.3)
    assert state(sampled[:4], Rules()) == "learning"
    rising = [replace(e, grain=1 + e.step / 20, corruption=0.9) for e in run]
    assert state(rising, Rules()) == "corrupting"


@pytest.mark.parametrize(
    "values",
    [(1.0, 1.1, 1.2, 1.3), (1.0, 1.3, 1.28, 1.26), (1.0, 1.05, 1.0), (1.0, 1.36, 1.4, 1.38, 1.29)],
)
def test_what_only_rises_or_hardly_falls_is_no_stage(values):
    assert corruption_stage(grainy(*values)) is None
    said = verdict(grainy(*values), Rules())
    assert ("% grainier than usual" in said) == (values[-1] > 1.1)


def test_a_run_whose_pictures_get_grainier_is_corrupting():
    assert state(grainy(1.0, 1.05, 1.1, 1.2, 1.3), Rules()) == "corrupting"
    assert state(grainy(1.0, 1.3, 1.2, 1.1, 1.05), Rules()) == "learning"


def test_a_run_that_diverges_is_called_so():
    run = [evaluation(10 * i, 0.5 + i / 10, 0.6 + i / 10) for i in range(8)]
    assert worse_since(run) == 10 and state(run, Rules()) == "getting worse"
    assert verdict(run, Rules()).startswith("getting worse since step 10: a lower learning rate")
    broken = [*falling(count=6), *(evaluation(60 + i, math.nan, math.nan) for i in range(3))]
    assert worse_since(broken) == 60
    assert worse_since(u_shape()) is None and worse_since(falling()) is None


def test_a_run_that_waits_for_a_better_step_says_so():
    losses = [1.0, 0.9, 0.8, *[0.81] * 6]  # risen, but not by enough to be called over-fitting
    run = [evaluation(10 * i, 1 - i / 20, x) for i, x in enumerate(losses)]
    assert over_fitting_since(run) is None
    assert verdict(run, Rules()) == "no better since step 20; best at 20"
    assert stopped_at(run, Rules()) == 70


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_was_not_measured(broken):
    run = u_shape()
    run[3] = evaluation(30, run[3].train, broken)
    run[15] = evaluation(150, broken, run[15].held_out, corruption=broken)
    assert ranking(run, Rules())[0] == 80 and 30 not in ranking(run, Rules())
    assert over_fitting_since(run) == over_fitting_since(u_shape())
    assert verdict(run, Rules()) == verdict(u_shape(), Rules())
    never = [evaluation(e.step, e.train, broken) for e in falling()]
    assert best_step(never, Rules()) == 200  # as with nothing held out
    assert stopped_at(never, Rules()) == stopped_at(falling(held_out=False), Rules())


def test_the_verdict_is_one_plain_sentence():
    prior = [1.0 + 0.01 * i for i in range(21)]
    run = [
        evaluation(e.step, e.train, e.held_out, prior=p)
        for e, p in zip(u_shape(), prior, strict=True)
    ]
    assert verdict(run, Rules()) == "over-fitting since step 110; best at 80; prior drift +8 %"
    assert verdict([], Rules()) == "nothing measured yet"
    assert verdict(falling(count=6), Rules()) == "still learning at step 50; best at 50"
