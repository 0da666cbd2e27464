"""Cancelling a training, wherever it is: all is kept, memory is free, and it goes on exactly."""

from dataclasses import replace

import comfy.model_management as memory
import pytest
import torch

from personalize.nodes import monitor
from personalize.nodes import session as node
from personalize.nodes.data import encode_pixels
from personalize.trainers.monitor import Probe
from personalize.trainers.run import Run
from personalize.trainers.state import State
from tests.sessions import Pictures, interrupt, monitoring, outcome, session, show
from tests.test_session_memory import networks  # noqa: F401
from tests.tiny import comfy_model

MOST_STEPS = 2  # between the button and the end


def at_call(monkeypatch, owner, name: str, number: int, then, calls: list | None = None) -> None:
    """Call `then` when a function begins for the nth time, and only then; note all calls."""
    function, calls = getattr(owner, name), [] if calls is None else calls

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            then()
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


def at_text(monkeypatch, beginning: str, then) -> None:
    """Call `then` when a text is shown for the first time."""
    fired = []
    show(
        monkeypatch,
        lambda text: text.startswith(beginning) and not fired and (fired.append(1), then()),
    )


# when the button is pressed -> how that is arranged, and the step that is kept (0: none)
PHASES = {
    "preparing the prior pictures": (
        lambda at, then: at.calls(monitor.Monitoring, "sample", 1, then),
        0,
    ),
    "preparing the network": (lambda at, then: at.text("preparing the network", then), 0),
    "measuring the base": (lambda at, then: at.calls(Probe, "ask", 2, then), 1),
    "sampling of the base": (lambda at, then: at.calls(monitor.Monitoring, "samples", 1, then), 1),
    "a step": (lambda at, then: at.text("step 3 ", then), 3),
    "evaluating": (lambda at, then: at.calls(Probe, "ask", 5, then), 2),
    "sampling": (lambda at, then: at.calls(monitor.Monitoring, "samples", 3, then), 4),
    "saving the best": (lambda at, then: at.calls(Run, "make_best", 1, then), 2),
    "saving the state": (lambda at, then: at.calls(State, "save", 1, then), 2),
    "the last evaluation": (lambda at, then: at.calls(monitor.Monitoring, "samples", 5, then), 8),
}


class At:
    def __init__(self, monkeypatch):
        self.patch = monkeypatch

    def calls(self, owner, name, number, then):
        show(self.patch)
        at_call(self.patch, owner, name, number, then)

    def text(self, beginning, then):
        at_text(self.patch, beginning, then)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What comes of the run that nobody cancels."""
    root = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node, "runs_root", lambda: root)
        show(patch)
        learned = session(monitor=monitoring(samples=True), ema_decay=0.5).train()
    return outcome(Run(root / "some"), learned)


def test_pictures_are_not_encoded_any_more_when_the_button_was_pressed(monkeypatch):
    encoded = []

    class VAE(Pictures):
        def encode(self, pixels):
            encoded.append(len(pixels))
            if len(encoded) == 2:
                interrupt()
            return torch.zeros(len(pixels), 4, 8, 8)

    with pytest.raises(memory.InterruptProcessingException):
        for _ in range(5):
            encode_pixels(VAE(), torch.zeros(1, 3, 64, 64))
    assert len(encoded) == 2 and not memory.processing_interrupted()


def test_samples_are_not_decoded_any_more_when_the_button_was_pressed():
    """A step of a sampler, or the pictures of one prompt, is the most that comes after it."""
    asked, decoded = monitoring(samples=True), []

    class VAE(Pictures):
        def decode(self, latents):
            decoded.append(len(latents))
            interrupt()
            return super().decode(latents)

    several = replace(asked, shown=asked.shown * 3, vae=VAE())
    with pytest.raises(memory.InterruptProcessingException):
        several.samples(comfy_model(), (4, 8, 8))
    assert len(decoded) == 1 and not memory.processing_interrupted()


@pytest.mark.parametrize("pressed", [1, 2])
def test_drawing_a_sample_is_left_before_its_next_step(pressed):
    """Pressed in the middle of a sampler's step: no step comes after it."""
    asked, model, passes = monitoring(samples=True, sample_steps=9), comfy_model(), []

    def counted(apply, args):
        passes.append(1)
        if len(passes) == pressed:
            interrupt()
        return apply(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(counted)
    with pytest.raises(memory.InterruptProcessingException):
        asked.samples(model, (4, 8, 8))
    assert len(passes) <= pressed + 1 and not memory.processing_interrupted()


def test_an_evaluation_is_left_before_its_next_pass(monkeypatch, tmp_path):
    monkeypatch.setattr(node, "runs_root", lambda: tmp_path)
    show(monkeypatch)
    passes = []
    at_call(monkeypatch, Probe, "ask", 6, interrupt)
    at_call(monkeypatch, node.Denoiser, "forward", 0, None, passes)
    at_call(monkeypatch, Probe, "ask", 6, passes.clear)
    with pytest.raises(memory.InterruptProcessingException):
        session(monitor=monitoring()).train()
    assert passes == [] and State.load(tmp_path / "some" / "state.safetensors").done.index == 4


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_cancelled_while(phase, networks, monkeypatch, tmp_path, undisturbed):  # noqa: F811
    arrange, kept = PHASES[phase]
    run, at_the_button = Run(tmp_path / "some"), []

    def press():
        at_the_button.append(sum("learning_rate" in line for line in run.history()))
        interrupt()

    with monkeypatch.context() as patch:
        arrange(At(patch), press)
        with pytest.raises(memory.InterruptProcessingException):
            session(monitor=monitoring(samples=True), ema_decay=0.5).train()
    assert not memory.processing_interrupted()
    assert memory.current_loaded_models == []
    assert all(p.is_meta for network in networks for p in network.parameters())
    assert not list(tmp_path.rglob("*.tmp"))
    if kept:
        end = run.history()[-1]
        assert end["reason"] == "interrupted" and end["step"] == kept
        assert kept - at_the_button[0] <= MOST_STEPS
        assert State.load(run.state).done.index == run.load("last").header.step == kept
    else:
        assert not run.folder.exists()

    screen = show(monkeypatch)
    learned = session(monitor=monitoring(samples=True), ema_decay=0.5).train()
    assert any(f"resumed at step {kept}" in text for text in screen.texts) == bool(kept)
    assert outcome(run, learned) == undisturbed
    assert not run.state.exists() and [f.name for f in tmp_path.iterdir()] == ["some"]
