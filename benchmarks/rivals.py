"""What `benchmarks.speed` times besides our own: loops that train a LoRA on the same base.

Bare        the loop that a paper's appendix prints: diffusers' U-Net, peft's LoRA, AdamW, clipping
Diffusers   the step of diffusers' examples/dreambooth/train_dreambooth_lora.py, with accelerate
Stock       ComfyUI's Train LoRA, unchanged
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from personalize.trainers.data import Example

from .contestants import Base, Contestant, Inside, size, tensors_in
from .stock import StockTraining

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


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


def bytes_of(parameters: list[Tensor], optimizer: Any) -> int:
    """Return the bytes of parameters and of an optimiser's state."""
    return sum(map(size, [*parameters, *tensors_in(optimizer.state_dict())]))
