"""What a run's history comes to: numbers, words, and a picture."""

import json
import math

import numpy as np
import pytest

from headless import Graph, PromptFailed, fill_defaults
from personalize.trainers.monitor import BINS, Evaluation
from personalize.trainers.report import (
    BLUE,
    HEAT,
    HEIGHT,
    INK,
    LEFT,
    ORANGE,
    RIGHT,
    RISKY,
    WIDTH,
    History,
    decimals,
    heat,
    plot,
    rgb,
    round_ticks,
    smoothed,
)


def lines(evaluated: bool = True, held_out: bool = True, steps: int = 200) -> list[dict]:
    """The history of a run that is best at 80."""
    found = [{"step": i, "loss": 1 / i, "learning_rate": 1e-3} for i in range(1, steps + 1)]
    for step in range(0, steps + 1, 10) if evaluated else ():
        lost = 0.8 + (step - 80) ** 2 / 1.1e5
        measured = Evaluation(
            step=step,
            train=math.exp(-step / 100),
            train_of_base=1.0,
            train_bins=(0.5,) * BINS,
            gamma=tuple(step / steps * (1 - b / BINS) for b in range(BINS)),
            corruption=1 + 0.3 * math.sin(math.pi * step / steps),
            held_out=lost if held_out else None,
            held_out_of_base=0.864 if held_out else None,
        )
        found.append(measured.as_line())
    return [*found, {"end": True, "step": steps, "reason": "finished", "best_step": 80}]


def test_the_history_is_sorted_by_kind_and_unknown_lines_are_left_out():
    history = History.of([*lines(), {"something": "else"}, {"step": 3, "peak_memory": 5}])
    assert len(history.losses) == history.steps == 200
    assert [e.step for e in history.evaluations] == list(range(0, 201, 10))
    assert history.best == 80 and history.end["reason"] == "finished"


def test_the_rules_of_the_monitor_are_read_from_the_history():
    found = lines()
    first = next(line for line in found if line.get("evaluation"))
    first["rules"] = {"best": "train", "patience": 9, "unknown": 1}
    history = History.of(found)
    assert (history.rules.best, history.rules.patience, history.best) == ("train", 9, 200)


def test_the_metrics_are_json_and_hold_base_best_and_last():
    metrics = json.loads(json.dumps(History.of(lines()).metrics()))
    assert metrics["best_step"] == 80 and metrics["over_fitting_since"] == 130
    assert [metrics[name]["step"] for name in ("base", "best", "last")] == [0, 80, 200]
    assert metrics["corruption_stage"] == 100
    assert "over-fitting since step 130; best at 80" in metrics["verdict"]


def test_the_verdict_says_why_a_run_ended_early():
    found = lines()
    assert "finished" not in History.of(found).verdict
    found[-1]["reason"] = "stopped early"
    assert History.of(found).verdict.endswith("; stopped early at step 200")
    found[-1]["reason"] = "<b>something else</b>"
    assert "something" not in History.of(found).verdict


def test_steps_that_were_left_out_are_steps():
    found = [line for line in lines() if line["step"] <= 150]
    found += [{"step": i, "learning_rate": 1e-3} for i in range(151, 201)]
    history = History.of(found)
    assert (history.steps, len(history.losses)) == (200, 150)
    only = History.of([{"step": 1, "learning_rate": 1e-3}])
    assert only.steps == 1 and plot(only, "").size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("broken", [math.nan, math.inf, None])
def test_evaluations_that_are_not_finite_are_left_out_of_the_picture(broken):
    found = lines()
    for line in found[-4:-1]:
        line |= {"train": broken, "held_out": broken, "corruption": broken}
    history = History.of(found)
    assert len(history.evaluations) == 21 and history.best == 80
    pixels = np.asarray(plot(history, ""))
    below = pixels[420:429, column(172) : column(181)]  # nothing plunges to the axis
    assert count(below, BLUE) == count(below, ORANGE) == 0


def test_with_nothing_held_out_no_step_is_marked_as_best():
    page = np.asarray(plot(History.of(lines(held_out=False)), ""))
    marks = [count(page[100:400, x - 1 : x + 2], INK) for x in (column(200), column(80))]
    assert max(marks) < 40


def test_long_texts_stay_on_the_page():
    names = {"short": "LoRA: zib", "long": "DreamBooth (full fine-tuning): " + 80 * "W"}
    pages = {name: np.asarray(plot(History.of(lines()), title)) for name, title in names.items()}
    for page in pages.values():
        assert (page[:70, -10:] == 255).all()
    assert count(pages["long"][:40], INK) > count(pages["short"][:40], INK) > 50


def test_a_run_without_a_monitor_says_that_over_fitting_was_not_measured():
    history = History.of(lines(evaluated=False))
    assert history.best == 200 and "no monitor" in history.verdict
    assert plot(history, "plain").size == (WIDTH, HEIGHT)
    assert History.of([]).verdict.startswith("0 steps")


def column(step: float, steps: int = 200) -> int:
    """Where a step lies in the picture."""
    return round(LEFT + step / steps * (WIDTH - RIGHT - LEFT))


def count(pixels: np.ndarray, colour: str) -> int:
    return int((np.abs(pixels.astype(int) - rgb(colour)).max(-1) < 12).sum())


def test_the_picture_marks_the_best_step_and_tints_what_over_fits():
    page = np.asarray(plot(History.of(lines()), "LoRA: my subject"))
    assert page.shape == (HEIGHT, WIDTH, 3)
    marked = [count(page[100:400, x - 1 : x + 2], INK) for x in (column(80), column(60))]
    assert marked[0] > 80 > marked[1]
    tinted = [count(page[100:420, column(s - 4) : column(s + 4)], RISKY) for s in (115, 145)]
    assert tinted[1] > 1000 > tinted[0]


def test_the_picture_shows_the_curves_that_were_measured():
    both, one = (plot(History.of(lines(held_out=h)), "") for h in (True, False))
    assert count(np.asarray(both), BLUE) > 300 and count(np.asarray(both), ORANGE) > 300
    assert count(np.asarray(one), BLUE) > 300 and count(np.asarray(one), ORANGE) == 0


def test_gamma_is_drawn_as_cells_low_timesteps_at_the_bottom():
    page = np.asarray(plot(History.of(lines()), ""))
    x = column(155)
    low, high = page[820, x], page[638, x]  # bins 0 and 9 at step 150 or 160
    assert low.sum() < high.sum()
    assert np.abs(low.astype(int) - heat(0.75)).max() <= 20
    assert heat(0.0) == rgb(HEAT[0]) and heat(1.0) == rgb(HEAT[-1])


def test_one_evaluation_and_one_step_can_be_drawn():
    assert plot(History.of(lines(steps=10)[:11]), "").size == (WIDTH, HEIGHT)
    assert plot(History.of([{"step": 1, "loss": 0.5}]), "").size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("low, high", [(0, 1), (0.043, 0.108), (-3.1, 34), (0, 1234), (7, 7.001)])
def test_ticks_are_round_lie_inside_and_are_told_apart(low, high):
    ticks = round_ticks(low, high, 6)
    assert 3 <= len(ticks) <= 12 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert len({f"{tick:.{decimals(ticks)}f}" for tick in ticks}) == len(ticks)


def test_smoothing_is_its_naive_reference():
    losses = [(i, float((i * 7919) % 13)) for i in range(1, 101)]
    for step, value in smoothed(losses):
        window = [loss for i, loss in losses if step - 5 < i <= step]
        assert value == pytest.approx(sum(window) / 5)
    assert len(smoothed(losses)) == 96


# The node


@pytest.fixture(scope="module")
def trained(comfy):
    """Train with a report in the same graph; return what the nodes showed."""
    graph = Graph()
    base = graph.add("PersonalizeDemoBase")
    drawn = graph.add("PersonalizeDemoSubject", count=3, resolution=64)
    wires = {"clip": (base, 1), "vae": (base, 2), "images": (drawn, 0), "captions": (drawn, 1)}
    data = graph.add("PersonalizeDataset", resolution=64, hold_out=1, **wires)
    monitor = (graph.add("PersonalizeMonitor", every=1), 0)
    how = {"name": "reported", "steps": 3, "monitor": monitor}
    trainer = graph.add("PersonalizeTrainLoRA", model=(base, 0), data=(data, 0), **how)
    report = graph.add("PersonalizeReport", personalized=(trainer, 1))
    saved = graph.add("SaveImage", images=(report, 0), filename_prefix="report")
    texts = [graph.add("PreviewAny", source=(report, i)) for i in (1, 2, 3)]
    result = comfy.run(fill_defaults(graph, comfy.object_info()))
    picture = comfy.image(result.files(saved)[0])
    return picture, [result.texts(text)[0] for text in texts]


@pytest.mark.server
def test_the_run_that_was_just_trained_is_reported(trained):
    picture, (verdict, best, metrics) = trained
    assert picture.size == (WIDTH, HEIGHT)
    numbers = json.loads(metrics)
    assert numbers["run"] == "reported" and numbers["method"] == "lora"
    assert int(best) == numbers["best_step"] and verdict == numbers["verdict"]
    assert len(numbers["evaluations"]) == 4


@pytest.mark.server
def test_an_earlier_run_is_chosen_by_name(comfy, trained):
    graph = Graph()
    report = graph.add("PersonalizeReport", run="reported")
    shown = graph.add("PreviewAny", source=(report, 1))
    result = comfy.run(fill_defaults(graph, comfy.object_info()))
    assert result.texts(shown)[0] == trained[1][0]


@pytest.mark.server
@pytest.mark.parametrize(
    "run, problem", [("../etc", "no such run exists"), ("(the connected one)", "nothing is conn")]
)
def test_a_run_that_is_not_there_is_refused(comfy, trained, run, problem):
    graph = Graph()
    graph.add("PreviewAny", source=(graph.add("PersonalizeReport", run=run), 1))
    with pytest.raises(PromptFailed, match=problem):
        comfy.run(fill_defaults(graph, comfy.object_info()))
