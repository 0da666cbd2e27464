"""What `benchmarks.speed` times: our methods, and what there is besides, a step at a time.

Bare        the loop that a paper's appendix prints: diffusers' U-Net, peft's LoRA, AdamW, clipping
Diffusers   the step of diffusers' examples/dreambooth/train_dreambooth_lora.py, with accelerate
Stock       ComfyUI's Train LoRA, unchanged
Ours        `trainers.loop.train` on a MODEL's twin, as the training nodes run it
Forward     one forward pass of what Ours would train, without gradients

All share the storage of one base's frozen weights, and the same pictures, encoded before.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from comfy.model_patcher import ModelPatcher
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from personalize.nodes.bridge import denoiser_of
from personalize.trainers.data import Example, PersonalData
from personalize.trainers.denoiser import Denoiser
from personalize.trainers.loop import Step, adapt, draw_objectives, train
from personalize.trainers.methods import METHODS

from .stock import Geometry, StockTraining, build_model

LENGTH = 77  # of text states
PICTURES = 4
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
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
            empty_context=pictures[0].context,
            instance_prompt="a zib totem",
            class_prompt="",
            encode=lambda pixels: F.avg_pool2d(pixels, 8)[:, [0, 1, 2, 0]],
            empty_pooled=pictures[0].pooled,
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

    def trained(self) -> int:
        """Count the numbers that learn."""
        return 0

    def kept(self) -> int:
        """Return the bytes that stay from step to step, besides the base."""
        return 0

    def close(self) -> None:
        """Let go of everything."""


# Not ours


class Loop(Contestant):
    """A training loop over parameters of `unet`."""

    unet: nn.Module
    optimizer: Any

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return what learns."""
        return [p for p in self.unet.parameters() if p.requires_grad]

    def trained(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def kept(self) -> int:
        return bytes_of([p.data for p in self.parameters], self.optimizer)


class Bare(Loop):
    """The shortest loop that trains a LoRA."""

    def __init__(self, base: Base):
        plan = base.plan
        self.data, self.batch, self.device = base.data.training, plan.batch, plan.device
        self.denoiser = base.denoiser()
        self.unet = self.denoiser.unet
        config = LoraConfig(r=plan.rank, lora_alpha=plan.rank, target_modules=ATTENTION)
        inject_adapter_in_model(config, self.unet)
        cast_training_params(self.unet, torch.float32)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=plan.learning_rate)
        self.signal = self.denoiser.schedule.alphas_cumprod.to(plan.device)

    def advance(self) -> None:
        chosen = [self.data[i] for i in torch.randint(len(self.data), (self.batch,)).tolist()]
        latents = torch.stack([e.latent for e in chosen]).to(self.device)
        context = torch.stack([e.context for e in chosen]).to(self.device)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(len(self.signal), (self.batch,), device=self.device)
        loss = self.loss(latents, noise, timesteps, context, told(chosen, self.device))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()

    def loss(self, latents: Tensor, noise: Tensor, timesteps: Tensor, context: Tensor, told: Any):
        """Return the mean squared error of the predicted noise."""
        signal = self.signal[timesteps][:, None, None, None]
        noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        dtype = self.denoiser.dtype
        predicted = self.unet(
            noisy.to(dtype), timesteps, context.to(dtype), added_cond_kwargs=told
        ).sample
        return F.mse_loss(predicted.float(), noise)


class Diffusers(Loop):
    """diffusers' DreamBooth-LoRA; of a step, the encoders of picture and text are left out.

    Its own LoRA layers and start, scheduler, data loader, learning-rate schedule, accelerate, and
    the progress bar that shows the loss (not drawn). SDXL is told what its own script tells it.
    """

    def __init__(self, base: Base):
        plan = base.plan
        kind = "bf16" if plan.precision == "bf16" else "no"
        self.accelerator = Accelerator(mixed_precision=kind, cpu=plan.device.type == "cpu")
        unet = base.denoiser().unet
        unet.add_adapter(
            LoraConfig(
                r=plan.rank,
                lora_alpha=plan.rank,
                init_lora_weights="gaussian",
                target_modules=ATTENTION,
            )
        )
        learns = [p for p in unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learns, lr=plan.learning_rate, weight_decay=1e-2, eps=1e-8)
        loader = DataLoader(
            list(base.data.training) * plan.batch,
            batch_size=plan.batch,
            shuffle=True,
            collate_fn=collate,
        )
        schedule = get_scheduler("constant", optimizer, num_warmup_steps=0)
        self.unet, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            unet, optimizer, loader, schedule
        )
        self.noise_schedule = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
        )
        self.dtype = plan.dtype
        self.bar = tqdm(disable=True)
        self.batches = self._batches()

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        while True:
            self.unet.train()
            yield from self.loader

    def advance(self) -> None:
        batch, schedule = next(self.batches), self.noise_schedule
        with self.accelerator.accumulate(self.unet):
            latents = batch["latents"].to(dtype=self.dtype)
            noise = torch.randn_like(latents)
            steps = schedule.config["num_train_timesteps"]
            timesteps = torch.randint(0, steps, (len(latents),), device=latents.device).long()
            noisy = schedule.add_noise(latents, noise, timesteps)  # pyright: ignore
            more = {k: batch[k] for k in ("text_embeds", "time_ids") if k in batch}
            predicted = self.unet(
                noisy,
                timesteps,
                batch["context"].to(self.dtype),
                added_cond_kwargs=more,
                return_dict=False,
            )[0]
            loss = F.mse_loss(predicted.float(), noise.float(), reduction="mean")
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        self.bar.update(1)
        self.bar.set_postfix(loss=loss.detach().item(), lr=self.schedule.get_last_lr()[0])


def collate(examples: list[Example]) -> dict[str, Tensor]:
    """Stack examples as a data loader of diffusers' does."""
    batch = {
        "latents": torch.stack([e.latent for e in examples]),
        "context": torch.stack([e.context for e in examples]),
    }
    return batch | told(examples, torch.device("cpu"))


def told(examples: list[Example], device: torch.device) -> dict[str, Tensor]:
    """Return what SDXL is told besides; nothing for other bases."""
    if not len(examples[0].pooled):
        return {}
    return {
        "text_embeds": torch.stack([e.pooled for e in examples]).to(device),
        "time_ids": torch.stack([e.sizes for e in examples]).to(device),
    }


class Stock(Contestant):
    """ComfyUI's Train LoRA at the same rank, batch, learning rate and dtype."""

    def __init__(self, base: Base, **widgets: Any):
        plan = base.plan
        same = {"batch_size": plan.batch, "rank": plan.rank, "learning_rate": plan.learning_rate}
        same |= {"training_dtype": plan.precision, "lora_dtype": "fp32"}
        widgets = {"gradient_checkpointing": False} | same | widgets
        self.training = StockTraining(base.model, base.data.training, **widgets)

    def step(self, inside: Inside | None = None) -> None:
        self.training.step(inside)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return what learns; a step has to be made before."""
        assert self.training.optimizer is not None
        return [p for group in self.training.optimizer.param_groups for p in group["params"]]

    def trained(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def kept(self) -> int:
        return bytes_of([p.data for p in self.parameters], self.training.optimizer)

    def close(self) -> None:
        self.training.close()


# Ours


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


def bytes_of(parameters: list[Tensor], optimizer: Any) -> int:
    """Return the bytes of parameters and of an optimiser's state."""
    return sum(map(size, [*parameters, *tensors_in(optimizer.state_dict())]))


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
