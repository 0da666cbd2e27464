"""Networks on pixels, and what trains the variances that some of them predict.

    log Sigma = u log beta_t + (1 - u) log beta~_t,   u = (v + 1) / 2      eq. 15
    L_t = KL(q(x_t-1 | x_t, x_0) || N(mu, Sigma)),    L_0 = -log p(x_0 | x_1)

Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021: the network's second
half is v, and lambda L_vlb, the sum of all L_t, is added to the plain loss; mu is taken as it is,
so that the bound trains variances alone. As in their code: bits per number, T times the term of the
timestep that was drawn stands for the sum, and beta~ at t = 0, where it is 0, is that at t = 1.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .data import Batch
from .denoiser import Denoiser
from .normal import normal_kl

LAMBDA = 1e-3  # Nichol and Dhariwal, section 3.1; Moon et al. 2022
HALF_BIN = 1 / 255  # of 8 bits over [-1, 1]
LEAST_CHANCE = 1e-12


class PixelDenoiser(Denoiser):
    """Predict noise (or velocity) on pixels; `unet` is a UNet2DModel, text is not looked at."""

    @property
    def predicts_variance(self) -> bool:
        """Whether the network's output has a second half, v."""
        return self.unet.config["out_channels"] == 2 * self.unet.config["in_channels"]

    def forward(self, noisy: Tensor, timesteps: Tensor, *_: Any) -> Tensor:
        """Return the prediction, (B, C, H, W) fp32, for noisy pixels (B, C, H, W)."""
        return self.answer(noisy, timesteps)[:, : noisy.shape[1]]

    def answer(self, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Return all that the network says, (B, C or 2 C, H, W) fp32."""
        return self.unet(noisy.to(self.dtype), timesteps).sample.float()


def variational_bound(
    denoiser: PixelDenoiser, batch: Batch, noisy: Tensor, answer: Tensor
) -> Tensor:
    """Return T L_t of each example in bits per number, (B,); its gradient reaches v alone.

    noisy: (B, C, H, W), of which `answer` (B, 2 C, H, W) speaks.
    """
    predicted, v = answer.chunk(2, dim=1)
    of_clean, of_noisy, beta, least = reverse_step(denoiser, batch.timesteps)
    clean = denoiser.cleaned(noisy, predicted.detach(), batch.timesteps)
    own, true = (of_clean * x + of_noisy * noisy for x in (clean, batch.latents))
    u = (v + 1) / 2
    sigma = (u * beta.log() / 2 + (1 - u) * least.log() / 2).exp()
    terms = torch.where(
        batch.timesteps[:, None, None, None] == 0,
        surprise(batch.latents, own, sigma),
        normal_kl(true, least.sqrt(), own, sigma),
    )
    return denoiser.timestep_count * terms.flatten(1).mean(1) / math.log(2)


def reverse_step(denoiser: Denoiser, timesteps: Tensor) -> tuple[Tensor, ...]:
    """Return what q(x_t-1 | x_t, x_0) is made of (Ho et al. 2020, eq. 7), (B, 1, 1, 1) each.

    The shares of x_0 and of x_t in its mean, beta_t and beta~_t.
    """
    signal = denoiser.schedule.alphas_cumprod.double()
    before = torch.cat([signal.new_ones(1), signal[:-1]])
    beta = 1 - signal / before
    least = beta * (1 - before) / (1 - signal)
    least[0] = least[1]
    of_clean = before.sqrt() * beta / (1 - signal)
    of_noisy = (1 - beta).sqrt() * (1 - before) / (1 - signal)
    table = torch.stack([of_clean, of_noisy, beta, least]).float().to(timesteps.device)
    return tuple(table[:, timesteps, None, None, None])


def surprise(pixels: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """Return -log of a Gaussian's chance to be in each pixel's bin of 8 bits, shaped like them.

    The bins of black and white have no outer side.
    """
    off = (pixels - mean) / sigma
    half = HALF_BIN / sigma
    # of the lower tail: near 1 two chances would have no digits left to differ in
    chance = torch.special.ndtr(half - off.abs()) - torch.special.ndtr(-half - off.abs())
    chance = torch.where(pixels > 1 - HALF_BIN, torch.special.ndtr(half - off), chance)
    chance = torch.where(pixels < HALF_BIN - 1, torch.special.ndtr(half + off), chance)
    return -chance.clamp(min=LEAST_CHANCE).log()
