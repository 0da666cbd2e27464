"""What a run's evaluations mean: pure decisions about curves."""

import math

import pytest

from personalize.trainers.monitor import BINS, Evaluation
from personalize.trainers.verdict import (
    Rules,
    best_step,
    grainiest,
    over_fitting_since,
    patience_left,
    plateaued,
    ranking,
    should_stop,
    state,
    stopped_at,
    verdict,
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
    assert state(run) == "over-fitting"


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
    assert state(falling(count=6)) == "learning"


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
    assert not plateaued([1 - i / 10 for i in range(10)])
    assert not plateaued(flat[-9:])  # too few to tell
    ratio = variance(flat[-5:]) / variance(flat)
    assert ratio < 0.15


def variance(values) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values)


def test_where_the_last_is_best_a_plateau_ends_the_run():
    rules, run = Rules(best="last"), falling()
    assert stopped_at(run, rules) == next(
        e.step for i, e in enumerate(run) if plateaued([x.train for x in run[: i + 1]])
    )
    assert state(run) == "plateau"


def test_the_corruption_stage_is_the_grainiest_evaluation():
    values = (1.0, 1.05, 1.3, 1.2, 1.02)
    run = [evaluation(i, 1 - i / 10, 1.0, corruption=c) for i, c in enumerate(values)]
    assert grainiest(run).step == 2
    assert "30 % grainier, at step 2" in verdict(run, Rules())
    assert grainiest(u_shape()) is None


def test_the_verdict_is_one_plain_sentence():
    prior = [1.0 + 0.01 * i for i in range(21)]
    run = [
        evaluation(e.step, e.train, e.held_out, prior=p)
        for e, p in zip(u_shape(), prior, strict=True)
    ]
    assert verdict(run, Rules()) == "over-fitting since step 110; best at 80; prior drift +8 %"
    assert verdict([], Rules()) == "nothing measured yet"
    assert verdict(falling(count=6), Rules()) == "still learning at step 50; best at 50"
