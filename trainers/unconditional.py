"""Unconditional bases in pixel space: what is applied to them, their data, and sampling.

The setting of A3FT's paper. Such a base knows neither text nor VAE: its latents are its pixels,
and its text states are one of width 0.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from .artifact import Personalization
from .data import Example, PersonalData, Wording
from .denoiser import Denoiser, described_schedule
from .edits import Edit, of_weights, parameter_name
from .errors import InputError
from .method import generator
from .methods.a3ft import A3FTSettings
from .pixel_denoiser import PixelDenoiser
from .settings import knob
from .sites import parameter_sites
from .time_aware import SITE, TimeAware, attach

FAMILY = "unconditional"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NO_TEXT = torch.zeros(1, 0)  # (L, D): what stands for text states


@dataclass(frozen=True)
class UnconditionalSettings(A3FTSettings):
    """A3FT's settings with its paper's numbers, as far as a few hundred small pictures take them.

    What speaks of text, and of pictures of a class, has no effect here.
    """

    steps: int = knob(
        1000,
        "Optimiser steps. The paper: 500 times through its pictures.",
        min=1,
        max=1_000_000,
    )
    learning_rate: float = knob(
        2e-4, "How far each step moves. The paper: 2e-4.", min=0.0, max=1.0, step=1e-6
    )
    batch_size: int = knob(
        32, "Pictures per step. The paper: 128. More: smoother and slower.", min=1, max=1024
    )


WITHOUT_EFFECT = ("trained", "prior_weight", "caption_dropout")


@dataclass(frozen=True)
class Unconditional:
    """A base: network, schedule, and what is applied to it.

    unet: on the CPU, fp32, in eval; nobody changes it.
    schedule: DDIM with the base's own betas and clipping.
    applied: what was learned, with its strength.
    """

    unet: UNet2DModel
    schedule: DDIMScheduler
    applied: tuple[tuple[Personalization, float], ...] = ()

    @property
    def channels(self) -> int:
        """1 (grey) or 3."""
        return self.unet.config["in_channels"]

    @property
    def side(self) -> int:
        """Side of its pictures in pixels."""
        size = self.unet.config["sample_size"]
        return size if isinstance(size, int) else size[0]

    def apply(self, learned: Personalization, strength: float = 1.0) -> "Unconditional":
        """Return this base with what was learned; strength 0 is the base itself.

        Raises InputError when it does not fit, naming both.
        """
        self.matched(learned)
        return replace(self, applied=(*self.applied, (learned, strength)))

    def network(self) -> UNet2DModel:
        """Return a network of its own with what is applied, on the CPU."""
        unet = deepcopy(self.unet)
        for number, (learned, strength) in enumerate(self.applied):
            if strength != 0.0:
                edits = self.matched(learned)
                for site, edit in of_weights(edits).items():
                    weight = unet.get_parameter(parameter_name(site))
                    weight.data = edit.apply(weight.data, strength)
                for adapter in adapters(edits):
                    unet.add_module(f"applied_{number}", adapter)
                    attach(unet, adapter, strength)
        return unet

    def denoiser(self, precision: str = "fp32") -> PixelDenoiser:
        """Return a network of its own to train, on the CPU.

        Raises InputError when it carries an adapter, which training can not see.
        """
        if any(adapters(self.matched(learned)) for learned, strength in self.applied if strength):
            raise InputError(
                "base", "carries a time-aware adapter; connect the base from before 'Apply'."
            )
        unet: Any = self.network()
        if precision != "fp32":
            unet.to(DTYPES[precision])
        kind = self.schedule.config["prediction_type"]
        return PixelDenoiser(unet, self.schedule.alphas_cumprod, kind)

    def in_network_scale(self, data: PersonalData, denoiser: Denoiser) -> PersonalData:
        """Return the data as it is. Raises InputError when it was made for another base."""
        shape, expected = data.training[0].latent.shape, (self.channels, self.side, self.side)
        if shape != expected:
            raise InputError(
                "data",
                f"has pictures {tuple(shape)} where this base takes {expected}; connect "
                "the same base to Pixel Dataset.",
            )
        return data

    def matched(self, learned: Personalization) -> dict[str, Edit | TimeAware]:
        """Read what was learned, {site: edit}.

        Raises InputError when it does not fit, naming both.
        """
        sites = parameter_sites(self.unet)
        edits, unknown = learned.edits(sites)
        shapes = {site: self.unet.get_parameter(parameter_name(site)).shape for site in sites}
        unfit = [site for site, edit in of_weights(edits).items() if not edit.fits(shapes[site])]
        unfit += [SITE for adapter in adapters(edits) if not adapter.fits(shapes)]
        if unknown or unfit or not edits:
            here, there = self.fingerprint(), learned.header.base
            raise InputError(
                "base",
                f"does not fit: this {learned.header.method} file was trained on "
                f"{there.get('family')} ({there.get('geometry')}), the base is {here['family']} "
                f"({here['geometry']}); "
                f"{len(edits) - len(unfit)} sites match, {len(unfit)} have another shape, "
                f"{len(unknown)} keys belong to none. Connect the kind of base it was trained on.",
            )
        return edits

    def fingerprint(self) -> dict[str, str]:
        """Describe the base: family, hashes of its geometry, (samples of) its weights and edits."""
        geometry, weights, patches = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        for name, weight in sorted(self.unet.state_dict().items()):
            geometry.update(f"{name}{tuple(weight.shape)}".encode())
            weights.update(sample_of(weight))
        for learned, strength in self.applied:
            for name, tensor in sorted(learned.tensors.items()):
                patches.update(f"{name}{strength}".encode() + sample_of(tensor))
        return {
            "family": FAMILY,
            "geometry": geometry.hexdigest()[:16],
            "weights": weights.hexdigest()[:16],
            "patches": patches.hexdigest()[:16] if self.applied else "",
            "schedule": described_schedule(
                self.schedule.alphas_cumprod, self.schedule.config["prediction_type"]
            ),
        }


def sample_of(tensor: Tensor) -> bytes:
    """Return the first numbers of a tensor."""
    return tensor.flatten()[:64].float().contiguous().numpy().tobytes()


def adapters(edits: Mapping[str, Edit | TimeAware]) -> list[TimeAware]:
    """Return the modules that join the network."""
    return [edit for edit in edits.values() if isinstance(edit, TimeAware)]


# Data


def pixel_data(pictures: Sequence[Tensor], held_out: int = 0) -> PersonalData:
    """Make data of pictures, (C, H, W) in [-1, 1] each; the last `held_out` are not trained on."""
    examples = [Example(pixels=p, latent=p, caption="", context=NO_TEXT) for p in pictures]
    kept = len(examples) - held_out
    return PersonalData(
        training=tuple(examples[:kept]),
        held_out=tuple(examples[kept:]),
        prior=(),
        empty=Wording("", NO_TEXT),
        instance_prompt="",
        class_prompt="",
        encode=lambda pixels: pixels,
    )


# Sampling


@torch.no_grad()
def sample(
    base: Unconditional,
    unet: UNet2DModel,
    numbers: Sequence[int],
    steps: int,
    seed: int,
    eta: float = 0.0,
) -> Iterator[Tensor]:
    """Denoise by DDIM (Song et al. 2021), yielding (N, C, H, W) in about [-1, 1] after every step.

    unet: the base's `network()`, on any device.
    numbers: which pictures of the seed; a picture does not depend on the others.
    eta: 0 is deterministic, 1 has DDPM's noise.
    """
    schedule = deepcopy(base.schedule)  # which keeps count of its steps
    schedule.set_timesteps(steps)
    draws = [generator(seed, 12, number) for number in numbers]
    shape = (base.channels, base.side, base.side)
    pixels = torch.stack([torch.randn(shape, generator=draw) for draw in draws])
    for t in schedule.timesteps:
        answer = unet(pixels.to(unet.device), t).sample.float().cpu()
        predicted = answer[:, : base.channels]  # behind it: variances, which DDIM has of its own
        variance = torch.stack([torch.randn(shape, generator=draw) for draw in draws])
        how: Any = {"eta": eta, "variance_noise": variance}
        pixels = schedule.step(predicted, int(t), pixels, **how).prev_sample  # pyright: ignore
        yield pixels
