"""The network that is trained: a diffusers U-Net with the schedule of the base it came from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_snr
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

SIZES = 6  # numbers that SDXL is told of a picture


class Denoiser(nn.Module):
    """Predict noise (or velocity) as the base does; `unet` is what methods adapt.

    unet: the frozen base, possibly sharing its weights with a ComfyUI model.
    alphas_cumprod: (T,) the signal power of the base's own schedule.
    prediction_type: "epsilon" or "v_prediction".
    """

    def __init__(self, unet: UNet2DConditionModel, alphas_cumprod: Tensor, prediction_type: str):
        super().__init__()
        self.unet = unet.requires_grad_(False).eval()
        self.prediction_type = prediction_type
        self.schedule = noise_schedule(alphas_cumprod, prediction_type)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.unet.conv_in.weight.device  # diffusers' own property walks all modules

    @property
    def dtype(self) -> torch.dtype:
        """What the frozen base computes in."""
        return self.unet.conv_in.weight.dtype

    @property
    def timestep_count(self) -> int:
        """T, the number of training timesteps."""
        return len(self.schedule.alphas_cumprod)

    @property
    def size_multiple(self) -> int:
        """What a latent's sides must be a multiple of, so that every level halves evenly."""
        return 2 ** (len(self.unet.config["block_out_channels"]) - 1)

    @property
    def pooled_width(self) -> int:
        """P, the width of the pooled text that SDXL is told besides; 0 for other bases."""
        config = self.unet.config
        if config["addition_embed_type"] != "text_time":
            return 0
        of_sizes = SIZES * config["addition_time_embed_dim"]
        return config["projection_class_embeddings_input_dim"] - of_sizes

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        context: Tensor,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction, (B, C, h, w) fp32.

        noisy: (B, C, h, w); timesteps: (B,) int in [0, T); context: (B, L, D) text states;
        pooled: (B, P) and sizes: (B, 6), see Example: only SDXL looks at these two.
        """
        told: Any = None
        if self.pooled_width:
            assert pooled is not None and sizes is not None
            told = {"text_embeds": pooled.to(self.dtype), "time_ids": sizes}
        predicted = self.unet(
            noisy.to(self.dtype), timesteps, context.to(self.dtype), added_cond_kwargs=told
        )
        return predicted.sample.float()

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise, (B, C, h, w)."""
        return self.schedule.add_noise(latents, noise, timesteps)  # pyright: ignore

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the base predicts at x_t: the noise, or the velocity."""
        if self.prediction_type == "v_prediction":
            return self.schedule.get_velocity(latents, noise, timesteps)  # pyright: ignore
        return noise

    def cleaned(self, noisy: Tensor, predicted: Tensor, timesteps: Tensor) -> Tensor:
        """Return the x_0 that a prediction at x_t stands for, (B, C, h, w)."""
        signal = self.schedule.alphas_cumprod.to(noisy)[timesteps][:, None, None, None]
        if self.prediction_type == "v_prediction":
            return signal.sqrt() * noisy - (1 - signal).sqrt() * predicted
        return (noisy - (1 - signal).sqrt() * predicted) / signal.sqrt()

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return min(SNR, gamma)/SNR, or /(SNR + 1) for velocity: (B,)   (Hang et al. 2023)."""
        snr = compute_snr(self.schedule, timesteps)
        velocity = self.prediction_type == "v_prediction"
        return snr.clamp(max=gamma) / (snr + 1 if velocity else snr)

    @contextmanager
    def prior(self) -> Iterator["Denoiser"]:
        """Inside, the network is the frozen base."""
        # peft's enable_adapters() also switches gradients off and on, one parameter after the
        # other: milliseconds for a hundred layers, in every step of a method that asks the base
        layers = [m for m in every_module(self.unet) if isinstance(m, BaseTunerLayer)]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield self
        finally:
            for layer in layers:
                layer._disable_adapters = False


def every_module(network: nn.Module) -> Iterator[nn.Module]:
    """Yield all modules, without the names that torch's own `modules()` makes on the way."""
    found = [network]
    while found:
        module = found.pop()
        yield module
        found += [child for child in module._modules.values() if child is not None]


def described_schedule(alphas_cumprod: Tensor, prediction_type: str) -> str:
    """Say what a base is trained with, alike on every device: its prediction and some alphas."""
    count = len(alphas_cumprod)
    shown = [f"{float(alpha):.3g}" for alpha in alphas_cumprod[:: max(1, count // 8)]]
    return f"{prediction_type}, {count} steps: {', '.join([*shown, f'{alphas_cumprod[-1]:.3g}'])}"


def noise_schedule(alphas_cumprod: Tensor, prediction_type: str) -> DDPMScheduler:
    """Build diffusers' scheduler with exactly these cumulative alphas (T,)."""
    alphas_cumprod = alphas_cumprod.detach().double().cpu()
    ratios = alphas_cumprod / torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    schedule = DDPMScheduler(
        num_train_timesteps=len(alphas_cumprod),
        trained_betas=(1 - ratios).tolist(),
        prediction_type=prediction_type,  # pyright: ignore
        clip_sample=False,
    )
    schedule.alphas_cumprod = alphas_cumprod.float()
    return schedule
