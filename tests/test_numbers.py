"""Numbers that go wrong: left out and counted, lowered, stopped; always said, never a success."""

import dataclasses
import math

import comfy.model_management as memory
import pytest
import torch

from personalize.nodes import base
from personalize.nodes import session as node
from personalize.trainers.edits import to_tensors
from personalize.trainers.health import EXPLODED, MOST_IN_A_ROW, explosion
from personalize.trainers.loop import train
from personalize.trainers.methods import METHODS
from personalize.trainers.run import Run
from personalize.trainers.state import State
from tests.sessions import monitoring, outcome, session, show
from tests.tiny import example, make, same, tiny_data, tiny_denoiser

NAN = float("nan")
BAD = dataclasses.replace(
    example(7), pixels=torch.full((3, 64, 64), NAN), latent=torch.full((4, 8, 8), NAN)
)


@pytest.fixture(params=METHODS.values(), ids=METHODS.keys())
def method(request):
    return request.param


def with_a_bad_picture(good: int = 1):
    """Data of which one picture makes every loss NaN that it is in."""
    data = tiny_data(good)
    return dataclasses.replace(data, training=(*data.training, BAD))


def broken_at(method, *steps: int, factor: float = NAN):
    """Let the loss of some steps be multiplied by a factor."""
    draw, loss = method.draw, method.loss
    drawn = []

    def noted(data, denoiser, draws):
        drawn.append(draws.step + 1)
        return draw(data, denoiser, draws)

    method.draw = noted
    method.loss = lambda *about: loss(*about) * (factor if drawn[-1] in steps else 1.0)
    return method


# Not finite


def test_what_is_not_finite_is_left_out_and_counted(method):
    """A picture of NaN is drawn every other step: those steps move nothing, the others do."""
    chosen, steps = make(method, steps=6, batch_size=1, ema_decay=0.5), []
    for step in train(chosen, tiny_denoiser(), with_a_bad_picture()):
        steps.append((step, to_tensors(step.learned())))
    lost = [i for i, (step, _) in enumerate(steps) if math.isnan(step.loss)]
    assert len(lost) == 3
    assert [step.facts.get("skipped", 0) for step, _ in steps][-1] == 3
    for i in lost:
        assert i == 0 or same(steps[i][1], steps[i - 1][1])
    for i in {1, 2, 3, 4, 5} - set(lost):
        assert not same(steps[i][1], steps[i - 1][1])
    assert all(tensor.isfinite().all() for tensor in steps[-1][1].values())


def test_lowering_halves_the_rate_for_the_rest_and_survives_a_stop(tmp_path):
    def rates(state=None):
        chosen = broken_at(make(METHODS["lora"], steps=6, non_finite="lower"), 2, 4)
        return train(chosen, tiny_denoiser(), tiny_data(), state)

    found = list(rates())
    assert [step.learning_rate for step in found] == [1e-2, 1e-2, 5e-3, 5e-3, 2.5e-3, 2.5e-3]
    assert [step.facts.get("rate_left") for step in found] == [None, 0.5, 0.5, 0.25, 0.25, 0.25]
    first = rates()
    for _ in range(3):
        step = next(first)
    step.state().save(tmp_path / "state")
    rest = list(rates(State.load(tmp_path / "state")))
    assert [step.learning_rate for step in rest] == [5e-3, 5e-3, 2.5e-3, 2.5e-3]
    assert same(to_tensors(rest[-1].learned()), to_tensors(found[-1].learned()))


def test_stopping_ends_the_run_with_what_was_learned_before():
    chosen, kept = broken_at(make(METHODS["lora"], non_finite="stop"), 2), []
    with pytest.raises(FloatingPointError, match=r"not finite at step 2: lower 'learning_rate'"):
        for step in train(chosen, tiny_denoiser(), tiny_data()):
            kept.append((step, to_tensors(step.learned())))
    ((step, good),) = kept
    assert same(to_tensors(step.learned()), good) and step.state().done.index == 1


def test_many_in_a_row_end_the_run(method):
    """Also where a step is left out: the first is good, none after it."""
    bad = range(2, 100)
    chosen, kept = broken_at(make(method, steps=50, zo_learning_rate=1e-3), *bad), []
    with pytest.raises(FloatingPointError, match=f"step 11, for the {MOST_IN_A_ROW}th time"):
        for step in train(chosen, tiny_denoiser(), tiny_data()):
            kept.append(to_tensors(step.learned()))
    assert len(kept) == MOST_IN_A_ROW and same(kept[0], kept[-1])


def test_a_run_without_one_good_step_is_an_error():
    chosen = make(METHODS["lora"], steps=3, batch_size=1)
    with pytest.raises(FloatingPointError, match="not finite at step 3"):
        list(train(chosen, tiny_denoiser(), dataclasses.replace(tiny_data(), training=(BAD,))))


def test_good_steps_between_begin_the_count_anew():
    odd = range(1, 40, 2)
    steps = list(
        train(broken_at(make(METHODS["lora"], steps=40), *odd), tiny_denoiser(), tiny_data())
    )
    assert steps[-1].facts["skipped"] == 20


def test_weights_that_are_not_finite_are_never_kept():
    """A step flies off to infinity: the loss after it tells."""
    chosen = make(METHODS["lora"], optimizer="sgd", gradient_clipping=0.0, steps=5)
    denoiser, kept = tiny_denoiser(), []
    with pytest.raises(FloatingPointError, match="not finite any more at step 3"):
        for step in train(chosen, denoiser, tiny_data()):
            kept.append(step)
            if step.index == 2:
                parameter = next(p for p in denoiser.parameters() if p.requires_grad)
                parameter.data.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="not finite after step 2"):
        kept[-1].state()


# No gradient, too much of it


def test_no_gradient_anywhere_is_an_error_and_not_a_success(method):
    chosen = broken_at(make(method, steps=20), *range(1, 21), factor=0.0)
    with pytest.raises(FloatingPointError, match=r"gradient is zero everywhere in the first 10"):
        list(train(chosen, tiny_denoiser(), tiny_data()))
    short = broken_at(make(method, steps=2), 1, 2, factor=0.0)
    with pytest.raises(FloatingPointError, match=r"gradient is zero everywhere in the first 2"):
        list(train(short, tiny_denoiser(), tiny_data()))


def test_no_gradient_for_a_while_is_not():
    chosen = broken_at(make(METHODS["lora"], steps=14), *range(2, 13), factor=0.0)
    assert len(list(train(chosen, tiny_denoiser(), tiny_data()))) == 14


def test_an_explosion_is_what_is_far_from_usual():
    usual = [1.0, 1.5, 0.5] * 4
    assert explosion([*usual, EXPLODED + 1]) == pytest.approx(EXPLODED + 1)
    assert explosion([*usual, EXPLODED - 1]) is None
    assert explosion([*usual, NAN]) is None
    assert explosion([*usual, NAN, EXPLODED + 1]) == pytest.approx(EXPLODED + 1)
    assert explosion([*usual[:5], 1e9]) is None  # nothing is usual yet
    assert explosion([*[0.0] * 12, 1.0]) is None
    assert explosion([1.0]) is None


# In ComfyUI


@pytest.fixture
def root(monkeypatch, tmp_path):
    monkeypatch.setattr(node, "runs_root", lambda: tmp_path)
    return tmp_path


def test_what_was_left_out_is_said_everywhere(root, monkeypatch):
    screen = show(monkeypatch)
    data = dataclasses.replace(with_a_bad_picture(2), held_out=tiny_data(1, held_out=1).held_out)
    odd = session(steps=6, batch_size=1, data=data)
    summary = odd.summary(odd.train())
    history = Run(root / "some").history()
    assert "2 steps were left out: the loss or its gradient was not finite" in summary
    assert "2 steps were left out" in screen.texts[-1]
    assert [line.get("skipped") for line in history if "learning_rate" in line][-1] == 2
    assert sum("loss" not in line for line in history if "learning_rate" in line) == 2
    assert len(odd.losses) == 4 and all(map(math.isfinite, odd.losses))
    assert "NaN" not in (root / "some" / "history.jsonl").read_text()


def test_an_explosion_is_said_everywhere(root, monkeypatch):
    screen = show(monkeypatch)
    wild = session(steps=16)
    broken_at(wild.method, 13, factor=1e6)
    summary = wild.summary(wild.train())
    lines = [line for line in Run(root / "some").history() if "learning_rate" in line]
    assert [line["step"] for line in lines if "gradient_exploded" in line] == [13]
    assert all(line["gradient_norm"] > 0 for line in lines)
    assert "times as long as usual at 13" in summary
    assert "times as long as usual at 13" in screen.texts[-1]


def test_a_run_that_ends_for_its_numbers_keeps_the_last_good_ones(root, monkeypatch):
    """And goes on from there, if what was wrong is not any more."""
    show(monkeypatch)
    how = {"steps": 6, "non_finite": "stop", "monitor": monitoring()}
    whole = session("whole", **how).train()
    broken = session(**how)
    broken_at(broken.method, 4)
    with pytest.raises(FloatingPointError, match="not finite at step 4"):
        broken.train()
    run = Run(root / "some")
    assert run.ended() == "failed" and run.load("last").header.step == 3
    learned = session(**how).train()
    assert outcome(run, learned) == outcome(Run(root / "whole"), whole)


def test_what_is_not_finite_at_the_very_end_is_no_success(root, monkeypatch):
    show(monkeypatch)
    wild = session(steps=2)
    advance = wild.method.update

    def fly_off(objectives, optimizer):
        loss = advance(objectives, optimizer)
        if objectives[0].batch.seed and len(wild.losses) == 1:
            optimizer.param_groups[0]["params"][0].data.fill_(math.inf)
        return loss

    wild.method.update = fly_off
    with pytest.raises(FloatingPointError, match="not finite any more after step 2"):
        wild.train()
    run = Run(root / "some")
    assert run.ended() == "failed" and run.checkpoints() == []


# Memory


def allocate_too_much(*_):
    """Run out of memory, really: torch can not get so much from the host."""
    torch.empty(2**50, dtype=torch.uint8)


@pytest.mark.parametrize("error", ["host", "device"])
def test_out_of_memory_names_the_knobs_frees_everything_and_can_go_on(root, monkeypatch, error):
    def fail(text):
        if text.startswith("step 3 "):
            if error == "host":
                allocate_too_much()
            raise memory.OOM_EXCEPTION("CUDA out of memory")

    built, build = [], base.denoiser_of
    monkeypatch.setattr(base, "denoiser_of", lambda *a: built.append(build(*a)) or built[-1])
    show(monkeypatch)
    whole = session("whole", steps=5).train()
    show(monkeypatch, fail)
    with pytest.raises(MemoryError, match="out of memory: training needs about ") as error:
        session(steps=5).train()
    for knob in ("gradient_checkpointing", "precision", "batch_size", "resolution"):
        assert f"'{knob}'" in str(error.value)
    assert all(p.is_meta for network in built for p in network.parameters())
    assert memory.current_loaded_models == []
    show(monkeypatch)
    again = session(steps=5)
    learned = again.train()
    assert "resumed at step 3" in again.said
    assert outcome(Run(root / "some"), learned) == outcome(Run(root / "whole"), whole)


def test_out_of_memory_inside_a_step_keeps_the_step_before(root, monkeypatch):
    show(monkeypatch)
    greedy = session(steps=5)
    draw = greedy.method.draw
    monkeypatch.setattr(
        greedy.method,
        "draw",
        lambda data, denoiser, draws: (
            allocate_too_much() if draws.step == 3 else draw(data, denoiser, draws)
        ),
    )
    with pytest.raises(MemoryError, match="out of memory"):
        greedy.train()
    assert State.load(Run(root / "some").state).done.index == 3


def test_other_errors_are_not_taken_for_a_lack_of_memory(root, monkeypatch):
    def fail(text):
        if text.startswith("step 2 "):
            raise RuntimeError("something else")

    show(monkeypatch, fail)
    with pytest.raises(RuntimeError, match="something else"):
        session(steps=5).train()
