"""What happens besides training steps: preparing pictures, watching, applying what was learned."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from personalize.nodes.data import prepare
from personalize.nodes.demo import BASE, load_base
from personalize.nodes.load import add_edits
from personalize.nodes.request import Request
from personalize.trainers.loop import adapt
from personalize.trainers.methods import METHODS
from personalize.trainers.monitor import Examination

from .contestants import Base, Contestant, settings_of
from .stock import build_vae


class Picture(Contestant):
    """Prepare one photograph, as Personal Dataset does."""

    def __init__(self, base: Base):
        side = base.plan.resolution
        _, self.clip, _ = load_base(Path(BASE))
        self.vae = build_vae()
        values: dict[str, Any] = {"resolution": side, "fit": "crop", "hold_out": 0}
        values |= {"instance_prompt": "a zib totem", "captions": "", "class_prompt": ""}
        self.request = Request(**{name: [value] for name, value in values.items()})
        self.photograph = torch.rand(2 * side, 3 * side, 3)

    @torch.no_grad()
    def advance(self) -> None:
        prepare(self.request, [self.photograph], [], self.clip, self.vae)


class Evaluate(Contestant):
    """Look once at a network with a LoRA, as the monitor does."""

    def __init__(self, base: Base):
        self.denoiser = base.denoiser()
        adapt(METHODS["lora"](settings_of(base, "lora")), self.denoiser.unet)
        self.examination = Examination(self.denoiser, {"train": base.data.training})

    def advance(self) -> None:
        self.examination.evaluate(self.denoiser, 1)


class Apply(Contestant):
    """Patch a LoRA into a MODEL: the node, and the weights that a sampler then computes."""

    def __init__(self, base: Base):
        self.model = base.model
        denoiser = base.denoiser()
        settings = dataclasses.replace(settings_of(base, "lora"), init="gaussian")
        method = METHODS["lora"](settings)
        adapt(method, denoiser.unet)
        self.edits = method.learned(denoiser.unet)

    @torch.no_grad()
    def advance(self) -> None:
        patched = self.model.clone()
        add_edits(patched, self.edits, 1.0)
        patched.patch_model(device_to=patched.load_device)
        patched.unpatch_model()
