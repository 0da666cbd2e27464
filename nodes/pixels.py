"""Unconditional bases on ComfyUI's device: their pictures, and one as what a session trains."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import comfy.model_management
import torch
from torch import Tensor

from ..trainers.artifact import Personalization
from ..trainers.data import PersonalData
from ..trainers.denoiser import Denoiser
from ..trainers.errors import InputError
from ..trainers.unconditional import Unconditional, sample
from .base import Sampler
from .monitor import Monitoring

PIXELS_AT_ONCE = 64 * 32 * 32  # that are sampled together


@dataclass(frozen=True)
class PixelBase:
    """An unconditional base, as a session takes it."""

    base: Unconditional
    prompted: ClassVar[bool] = False

    def denoiser(self, precision: str) -> Denoiser:
        return self.base.denoiser(precision)

    def in_network_scale(self, data: PersonalData, denoiser: Denoiser) -> PersonalData:
        return self.base.in_network_scale(data, denoiser)

    def fingerprint(self) -> dict[str, str]:
        return self.base.fingerprint()

    def sampler(self, monitoring: Monitoring, shape: tuple[int, ...]) -> Sampler:
        s = monitoring.settings
        steps = min(s.sample_steps, len(self.base.schedule.alphas_cumprod))

        def drawn(learned: Personalization | None) -> list[Tensor]:
            base = self.base.apply(learned) if learned is not None else self.base
            return [as_images(draw(base, s.sample_count, steps, s.sample_seed))]

        return drawn


def as_images(pixels: Tensor) -> Tensor:
    """Return (N, C, H, W) in about [-1, 1] as an IMAGE, (N, H, W, 3) in [0, 1]."""
    images = (pixels.movedim(1, -1) + 1) / 2
    return images.clamp(0, 1).expand(*images.shape[:3], 3).contiguous()


def check_memory(base: Unconditional, count: int) -> None:
    """Raise InputError when the pictures would not fit into the memory that is free."""
    needed = 2 * 4 * count * 3 * base.side**2  # bytes: as they are drawn, and as they come out
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    if needed > free:
        raise InputError(
            "count",
            f"is {count}, which takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are "
            "free; draw fewer at once.",
        )


def batches(base: Unconditional, count: int) -> int:
    """Return in how many parts so many pictures are drawn."""
    return math.ceil(count / at_once(base))


def at_once(base: Unconditional) -> int:
    """Return how many pictures are drawn together."""
    return max(1, PIXELS_AT_ONCE // base.side**2)


@torch.no_grad()
def draw(
    base: Unconditional,
    count: int,
    steps: int,
    seed: int,
    eta: float = 0.0,
    after_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Sample on ComfyUI's device, unless the stop button is pressed: (count, C, H, W)."""
    device = comfy.model_management.get_torch_device()
    unet = base.network()
    comfy.model_management.free_memory(comfy.model_management.module_size(unet), device)
    unet.to(device)  # pyright: ignore
    drawn = []
    for numbers in torch.arange(count).split(at_once(base)):
        drawn.append(torch.empty(0))
        for pixels in sample(base, unet, numbers.tolist(), steps, seed, eta):
            drawn[-1] = pixels
            after_step()
            comfy.model_management.throw_exception_if_processing_interrupted()
    return torch.cat(drawn)
