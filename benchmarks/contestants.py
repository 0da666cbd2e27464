"""What `benchmarks.speed` times of ours, a step at a time; `rivals` has the rest.

Ours        `trainers.loop.train` on a MODEL's twin, as the training nodes run it
Forward     one forward pass of what Ours would train, without gradients

All share the storage of one base's frozen weights, and the same pictures, encoded before.
"""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from personalize.nodes.bridge import denoiser_of
from personalize.trainers.data import Example, PersonalData, Wording
from personalize.trainers.denoiser import Denoiser
from personalize.trainers.loop import Step, adapt, draw_objectives, train
from personalize.trainers.methods import METHODS

from .stock import Geometry, build_model

LENGTH = 77  # of text states
PICTURES = 4
Inside = AbstractContextManager[Any]


@dataclass(frozen=True)
class Plan:
    """What all contestants share."""

    geometry: Geometry
    device: torch.device
    precision: str  # of the base: "fp32" or "bf16"
    rank: int
    batch: int
    resolution: int
    learning_rate: float = 1e-4  # of all but our own methods, which have their defaults

    @property
    def dtype(self) -> torch.dtype:
        """What the base computes in."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]


@dataclass(frozen=True)
class Base:
    """A MODEL, and pictures that are encoded for it."""

    plan: Plan
    model: ModelPatcher
    data: PersonalData

    @classmethod
    def of(cls, plan: Plan) -> "Base":
        """Build a base of random weights, and random pictures."""
        pictures = tuple(example(plan, seed) for seed in range(PICTURES))
        data = PersonalData(
            training=pictures,
            held_out=(),
            prior=(),
            empty=Wording("", pictures[0].context, pictures[0].pooled),
            instance_prompt="a zib totem",
            class_prompt="",
            encode=lambda pixels: F.avg_pool2d(pixels, 8)[:, [0, 1, 2, 0]],
        )
        return cls(plan, build_model(plan.geometry, plan.device, plan.dtype), data)

    def denoiser(self) -> Denoiser:
        """Return a new twin, whose frozen weights are the MODEL's own."""
        return denoiser_of(self.model, self.plan.precision)


def example(plan: Plan, seed: int) -> Example:
    """Make a picture of noise."""
    g, side = torch.Generator().manual_seed(seed), plan.resolution // 8
    return Example(
        pixels=torch.randn(3, plan.resolution, plan.resolution, generator=g).clamp(-1, 1),
        latent=torch.randn(4, side, side, generator=g),
        caption=f"a zib totem {seed}",
        context=torch.randn(LENGTH, plan.geometry.context, generator=g),
        pooled=torch.randn(plan.geometry.pooled, generator=g),
    )


class Contestant:
    """Something that is done step by step."""

    def step(self, inside: Inside | None = None) -> None:
        """Do it once, inside a context."""
        with inside or nullcontext():
            self.advance()

    def advance(self) -> None:
        """Do it once."""
        raise NotImplementedError

    def rest(self) -> None:
        """Let go of what the next step makes anew, or a GPU's allocator would not count it."""

    def trained(self) -> int:
        """Count the numbers that learn."""
        return 0

    def kept(self) -> int:
        """Return the bytes that stay from step to step, besides the base."""
        return 0

    def close(self) -> None:
        """Let go of everything."""


def settings_of(base: Base, method: str, **changes: Any) -> Any:
    """Return a method's settings: its own defaults, and what all contestants share."""
    plan, kind = base.plan, METHODS[method].Settings
    same = {"batch_size": plan.batch, "rank": plan.rank, "precision": plan.precision}
    same |= {"steps": 1_000_000, **changes}
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in same.items() if name in known})


class Ours(Contestant):
    """A method of ours, in our loop."""

    def __init__(self, base: Base, method: str, checkpointed: bool = False, **settings: Any):
        self.method = METHODS[method](settings_of(base, method, **settings))
        self.denoiser = base.denoiser()
        if checkpointed:
            self.denoiser.unet.enable_gradient_checkpointing()
        self.steps = train(self.method, self.denoiser, base.data)
        self.last: Step | None = None

    def advance(self) -> None:
        self.last = next(self.steps)

    def rest(self) -> None:
        self.denoiser.unet.zero_grad(set_to_none=True)

    def trained(self) -> int:
        return sum(p.numel() for p in self.denoiser.unet.parameters() if p.requires_grad)

    def kept(self) -> int:
        assert self.last is not None
        state = self.last.state()
        return sum(map(size, [*state.parameters.values(), *tensors_in(state.optimizer)]))

    def close(self) -> None:
        self.steps.close()


class Forward(Contestant):
    """A forward pass of a network with a LoRA, over one batch."""

    def __init__(self, base: Base, method: str = "lora"):
        self.denoiser = base.denoiser()
        made = METHODS[method](settings_of(base, method))
        adapt(made, self.denoiser.unet)
        self.batch = next(draw_objectives(made, self.denoiser, base.data, 0)).batch

    @torch.no_grad()
    def advance(self) -> None:
        batch = self.batch
        float(self.denoiser(batch.latents, batch.timesteps, *batch.conditions).mean())


def size(tensor: Tensor) -> int:
    """Return the bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors of a nested value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for inner in value for tensor in tensors_in(inner)]
    return [value] if torch.is_tensor(value) else []
