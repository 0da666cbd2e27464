"""What happens beside a training: pins at any time, samples that fail, histories with damage."""

import json

import pytest
import torch

from personalize.nodes import control
from personalize.nodes import session as node
from personalize.trainers.monitor import Examination
from personalize.trainers.report import History
from personalize.trainers.run import Run
from tests.sessions import Pictures, monitoring, session, show
from tests.test_interrupt import at_call
from tests.test_resume import cancelled


@pytest.fixture
def root(monkeypatch, tmp_path):
    monkeypatch.setattr(node, "runs_root", lambda: tmp_path)
    show(monkeypatch)
    return tmp_path


def pin(step: int | None):
    """Wish for a checkpoint as the page's route does."""
    return lambda: control.of_run("some").pin(step)


def test_what_is_pinned_while_a_step_is_evaluated_is_kept(root, monkeypatch):
    at_call(monkeypatch, Examination, "evaluate", 3, pin(4))  # that of step 6
    session(monitor=monitoring(), learning_rate=1e-3).train()
    run = Run(root / "some")
    steps = [line["best_step"] for line in run.history() if line.get("evaluation")]
    assert steps[1:4] == [2, 4, 6]  # each is better: the one before would go
    assert run.pinned() == [4] and run.checkpoints() == ["last", "best", "step 8", "step 4"]


def test_the_next_step_can_be_kept_during_the_last_evaluation(root, monkeypatch):
    at_call(monkeypatch, Examination, "evaluate", 4, pin(None))
    session(monitor=monitoring()).train()
    run = Run(root / "some")
    assert run.pinned() == [8] and run.load("step 8").header.step == 8


def test_a_wish_that_comes_as_a_run_breaks_off_is_granted(root, monkeypatch):
    def leave():
        pin(None)()
        raise RuntimeError("something else")

    at_call(monkeypatch, Examination, "evaluate", 2, leave)
    with pytest.raises(RuntimeError, match="something else"):
        session(monitor=monitoring()).train()
    assert Run(root / "some").pinned() == [4]


def test_samples_that_can_not_be_had_do_not_end_a_training(root, monkeypatch):
    def fail(self, latents):
        raise torch.OutOfMemoryError("no room for pictures")

    plain = session("plain", monitor=monitoring(samples=True))
    learned = plain.train()
    monkeypatch.setattr(Pictures, "decode", fail)
    failing = session(monitor=monitoring(samples=True))
    same = failing.train()
    assert all(torch.equal(learned.tensors[n], same.tensors[n]) for n in learned.tensors)
    lines = [line for line in Run(root / "some").history() if line.get("evaluation")]
    assert [line["samples"] for line in lines] == [[]] * 5
    assert lines[-1]["samples_failed"] == "no samples at step 8: no room for pictures"
    assert "No samples at step 8: no room for pictures" in failing.summary(same)
    assert "No samples" not in plain.summary(learned)


DAMAGE = {
    "an evaluation with words for numbers": {"evaluation": True, "step": 2, "train": "low"},
    "an evaluation without its times": {"evaluation": True, "step": 2},
    "a loss in words": {"step": 1, "loss": "low", "learning_rate": 1e-3},
    "a norm that is a list": {"step": 1, "loss": 1.0, "gradient_norm": [], "learning_rate": 1e-3},
}


@pytest.mark.parametrize("line", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_history_does_not_keep_a_run_from_going_on(root, monkeypatch, line):
    how = {"monitor": monitoring(), "steps": 6}
    whole = session("whole", **how).train()
    cancelled(monkeypatch, at=4, **how)
    path = root / "some" / "history.jsonl"
    lines = path.read_text().splitlines()
    at = next(i for i, text in enumerate(lines) if json.loads(text)["step"] == line["step"])
    lines[at] = json.dumps(line)
    path.write_text("\n".join(lines) + "\n")
    again = session(**how).train()
    assert all(torch.equal(whole.tensors[n], again.tensors[n]) for n in whole.tensors)
    assert History.of(Run(root / "some").history()).steps == 6


def test_what_went_wrong_before_a_cancel_is_said_after_it(root, monkeypatch):
    cancelled(monkeypatch, at=4, steps=6)
    path = root / "some" / "history.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    del lines[1]["loss"]
    lines[2]["gradient_exploded"] = 300.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = session(steps=6)
    text = again.summary(again.train())
    assert "1 step was left out" in text.lower()
    assert "the gradient was 300 times as long as usual at 3" in text.lower()
