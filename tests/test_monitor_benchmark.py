"""The monitor's benchmark: what it counts, on curves whose answers are known."""

import json

import pytest

from benchmarks.monitor import RULES, Cell, Plan, Task, report, sampled_steps, table
from personalize.trainers.monitor import BINS, Evaluation


def lines(bottom: int = 8, count: int = 20) -> list[dict]:
    """Evaluations of a run whose held-out loss is lowest at step 10 * bottom."""
    found = []
    for i in range(count + 1):
        evaluation = Evaluation(
            step=10 * i,
            train=1 - i / 50,
            train_of_base=1.0,
            train_bins=(0.5,) * BINS,
            gamma=tuple(i / count * (1 - b / BINS) for b in range(BINS)),
            corruption=1.3 if i == 12 else 1.0,
            held_out=0.8 + 0.002 * (i - bottom) ** 2,
            held_out_of_base=0.9,
        )
        times = {"seconds": 11.0 * (i + 1), "evaluation_seconds": 1.0}
        found.append(evaluation.as_line() | times)
    return found


def cell(bottom: int = 8) -> Cell:
    """The fresh loss is lowest at step 100, where the monitor's is at 10 * bottom."""
    fresh = {10 * i: 0.8 + 0.002 * (i - 10) ** 2 for i in range(21)}
    row = {"likeness": 0.5, "following": 0.9}
    return Cell(lines(bottom), fresh, {0: row, 80: row, 150: row | {"likeness": 0.7}, 200: row})


def test_what_is_picked_is_compared_with_the_best_of_all_on_fresh_pictures():
    scores = cell().scores()
    assert (scores["picked"], scores["best"], scores["stopped_at"]) == (80, 100, 130)
    assert scores["picked_vs_best"] == pytest.approx(0.008 / 0.8)
    assert scores["last_vs_best"] == pytest.approx(0.2 / 0.8)
    assert scores["steps_saved"] == pytest.approx(1 - 130 / 200)
    assert scores["stopping_costs"] == 0.0
    assert scores["u_shaped"] == 1.0


def test_a_run_that_is_never_stopped_saves_nothing_and_is_not_u_shaped():
    scores = cell(bottom=20).scores()
    assert scores["stopped_at"] == scores["picked"] == 200
    assert scores["steps_saved"] == 0.0 and scores["u_shaped"] == 0.0


def test_overhead_is_the_evaluations_over_the_rest():
    assert cell().scores()["overhead"] == pytest.approx(21 / (11 * 21 - 21))


def test_judges_tell_of_the_picked_the_most_liked_and_the_last():
    scores = cell().scores()
    assert scores["liked_step"] == 150 and scores["liked_likeness"] == 0.7
    assert scores["picked_likeness"] == scores["last_likeness"] == 0.5


def test_gamma_and_corruption_are_read_where_they_are():
    scores = cell().scores()
    assert scores["corruption"] == 1.3 and scores["corruption_step"] == 120
    assert scores["gamma_0_late"] == 1.0 and scores["gamma_9_late"] == pytest.approx(0.1)
    assert scores["gamma_0_early"] == pytest.approx(0.1)


def test_the_sampled_checkpoints_hold_the_picked_and_the_last():
    assert sampled_steps(lines(), Plan(judged=3)) == [10, 70, 80, 140, 200]


def test_cells_are_found_again_and_told_in_a_table(tmp_path):
    tasks = [Task("lora", subject, 0, Plan()) for subject in (1, 2, 3)]
    assert len({task.key for task in tasks}) == 3
    for task in tasks[:2]:
        made = cell()
        kept = {"history": made.lines, "fresh": made.fresh, "judged": made.judged}
        (tmp_path / f"{task.key}.json").write_text(json.dumps(kept))
    found = tasks[0].load(tmp_path)
    assert found is not None and found.scores() == cell().scores()
    assert tasks[2].load(tmp_path) is None
    result = report(tasks, tmp_path)
    assert result["methods"]["lora"]["within_2_percent"] == 2
    assert result["methods"]["lora"]["interval"]["picked_vs_best"]["mean"] == pytest.approx(0.01)
    assert result["picked_vs_best"] == pytest.approx(0.01)  # of all methods
    text = table(json.loads(json.dumps(result)))
    assert "| picked vs best | 1.0% [1.0%, 1.0%] |" in text
    assert "2 of 2" in text and RULES.patience == 5
