"""Trainings as ComfyUI runs them, in this process: a tiny MODEL, a screen, a monitor."""

from collections.abc import Callable
from typing import Any

import comfy.model_management as memory
import torch
import torch.nn.functional as F

from personalize.nodes import session as node
from personalize.nodes.base import ModelBase
from personalize.nodes.monitor import Monitoring, MonitorSettings, Prompt
from personalize.trainers.artifact import Personalization
from personalize.trainers.data import PersonalData, Wording
from personalize.trainers.methods import METHODS
from personalize.trainers.run import Run
from tests.tiny import WIDTH, comfy_model, make, noise, tiny_data

CLOCK = ("seconds", "evaluation_seconds")  # what differs between runs that are the same


class Screen:
    """Stands in for the server, which shows progress; `then` is called with every text."""

    def __init__(self, then: Callable[[str], Any]):
        self.texts: list[str] = []
        self.send_progress_text = lambda text, node_id: (self.texts.append(text), then(text))
        self.send_sync = lambda event, data: None


def show(monkeypatch, then: Callable[[str], Any] = lambda text: None) -> Screen:
    """Let sessions show their progress; return what was shown."""
    screen = Screen(then)
    monkeypatch.setattr(node.PromptServer, "instance", screen, raising=False)
    return screen


class Pictures:
    """Stands in for a VAE: latents (N, 4, h, w) to pictures (N, 8 h, 8 w, 3)."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return F.interpolate(latents[:, :3], scale_factor=8).movedim(1, -1).sigmoid()


def prompt(text: str) -> Prompt:
    context = noise(1, 7, WIDTH, seed=len(text))
    return Prompt(Wording(text, context[0]), conditioning=[[context, {}]])


def monitoring(samples: bool = False, **settings) -> Monitoring:
    """Make a monitor; with samples, it draws and measures pictures, too."""
    how = {"every": 2, "early_stop": False, "sample_every": 1, "sample_steps": 3}
    kinds = {"shown": (prompt("a zib"),), "prior": (prompt("a class"),), "nothing": prompt("")}
    return Monitoring(
        MonitorSettings(**{**how, **settings}), **(kinds if samples else {}), vae=Pictures()
    )


def session(
    name: str = "some",
    method: str = "lora",
    monitor: Monitoring | None = None,
    data: PersonalData | None = None,
    model: Any = None,
    **settings,
) -> node.Session:
    """Make a session of a tiny base."""
    chosen = make(METHODS[method], **{"steps": 8, "precision": "fp32", **settings})
    base = ModelBase(comfy_model() if model is None else model)
    data = data or tiny_data(3, held_out=2)
    return node.Session(chosen, base, data, name, node.Place("1"), monitor)


def outcome(run: Run, learned: Personalization) -> tuple:
    """All that shall be the same in runs that are the same: tensors, history, sample pictures."""
    lines = [{k: v for k, v in line.items() if k not in CLOCK} for line in run.history()]
    pictures = {p.name: p.read_bytes() for p in sorted(run.folder.glob("samples/*"))}
    tensors = {name: tensor.numpy().tobytes() for name, tensor in learned.tensors.items()}
    last = run.load("last").tensors
    kept = {name: tensor.numpy().tobytes() for name, tensor in last.items()}
    return repr(lines), pictures, tensors, kept, run.checkpoints()


def interrupt() -> None:
    """Press ComfyUI's cancel button."""
    memory.interrupt_current_processing(True)
