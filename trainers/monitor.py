"""Measuring over-fitting. Raw training loss is mostly the luck of the timestep; this is not."""

from collections.abc import Sequence

import torch

from .data import Batch, Example
from .denoiser import Denoiser
from .method import denoising_loss, generator

TIMESTEPS = 10  # evenly spaced: the centres of as many bins


@torch.no_grad()
def stable_loss(denoiser: Denoiser, examples: Sequence[Example]) -> float:
    """Return the mean denoising loss over fixed timesteps and fixed noise, comparable over a run.

    Draws nothing from the run's generators. Inside `denoiser.prior()` it is the base's.
    """
    count = denoiser.timestep_count
    timesteps = torch.arange(TIMESTEPS) * count // TIMESTEPS + count // (2 * TIMESTEPS)
    losses = []
    for index, example in enumerate(examples):
        latents = example.latent.expand(TIMESTEPS, *example.latent.shape)
        noise = torch.randn(latents.shape, generator=generator(0, 3, index))
        context = example.context.expand(TIMESTEPS, *example.context.shape)
        ones = torch.ones(TIMESTEPS)
        batch = Batch(latents, noise, timesteps, context, ones, ones.bool(), seed=0)
        losses.append(denoising_loss(denoiser, batch.to(denoiser.device)).mean())
    return float(torch.stack(losses).mean())
