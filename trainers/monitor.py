"""Measuring over-fitting. Raw training loss is mostly the luck of the timestep; this is not."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Batch, Example
from .denoiser import Denoiser
from .method import denoising_loss, generator

TIMESTEPS = 10  # evenly spaced: the centres of as many bins


def fixed_batches(denoiser: Denoiser, examples: Sequence[Example]) -> Iterator[Batch]:
    """Yield each example at fixed timesteps with fixed noise; draws nothing from the run."""
    count = denoiser.timestep_count
    timesteps = torch.arange(TIMESTEPS) * count // TIMESTEPS + count // (2 * TIMESTEPS)
    for index, example in enumerate(examples):
        latents = example.latent.expand(TIMESTEPS, *example.latent.shape)
        noise = torch.randn(latents.shape, generator=generator(0, 3, index))
        context = example.context.expand(TIMESTEPS, *example.context.shape)
        ones = torch.ones(TIMESTEPS)
        batch = Batch(latents, noise, timesteps, context, ones, ones.bool(), seed=0)
        yield batch.to(denoiser.device)


@torch.no_grad()
def stable_loss(denoiser: Denoiser, examples: Sequence[Example]) -> float:
    """Return the mean denoising loss over fixed timesteps and fixed noise, comparable over a run.

    Inside `denoiser.prior()` it is the base's.
    """
    batches = fixed_batches(denoiser, examples)
    return float(torch.stack([denoising_loss(denoiser, batch).mean() for batch in batches]).mean())


def high_frequency_energy(latents: Tensor) -> Tensor:
    """Return the mean square of what a 3x3 mean removes: (N, C, h, w) -> (N,)."""
    mean = F.avg_pool2d(F.pad(latents, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return ((latents - mean) ** 2).flatten(1).mean(1)


@torch.no_grad()
def grain(denoiser: Denoiser, examples: Sequence[Example]) -> Tensor:
    """Return the high-frequency energy of the pictures predicted in one step, (N, TIMESTEPS)."""
    rows = []
    for batch in fixed_batches(denoiser, examples):
        noisy = denoiser.noised(batch.latents, batch.noise, batch.timesteps)
        predicted = denoiser(noisy, batch.timesteps, batch.context)
        rows.append(high_frequency_energy(denoiser.cleaned(noisy, predicted, batch.timesteps)))
    return torch.stack(rows)


def corruption(denoiser: Denoiser, examples: Sequence[Example]) -> float:
    """Return the mean log2 of the grain over the base's: 0 as the base, 1 twice the energy.

    Rises and falls again over a run that passes through the corruption stage (arXiv 2405.19931);
    the measure is ours.
    """
    with denoiser.prior():
        before = grain(denoiser, examples)
    return float(torch.log2(grain(denoiser, examples) / before).mean())


def over_fitting(
    denoiser: Denoiser, training: Sequence[Example], held_out: Sequence[Example]
) -> dict[str, float]:
    """Compare tuned and base network on pictures that were trained on and on others.

    At most as many of the first are looked at as there are of the second. Names are those in
    history.jsonl.
    """
    training = training[: len(held_out)]
    with denoiser.prior():
        of_base = stable_loss(denoiser, training), stable_loss(denoiser, held_out)
    return {
        "train_loss": stable_loss(denoiser, training),
        "train_loss_of_base": of_base[0],
        "held_out_loss": stable_loss(denoiser, held_out),
        "held_out_loss_of_base": of_base[1],
        "corruption": corruption(denoiser, held_out),
    }
