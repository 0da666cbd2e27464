"""Whether a training fits into memory, said before it begins, with what would make it fit."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..trainers.data import PersonalData
from ..trainers.denoiser import Denoiser
from ..trainers.memory import needed, remedies, without_numbers
from ..trainers.method import Method
from .monitor import stop_when_interrupted

GIB = 2**30
OF_LIBRARIES = GIB // 2  # what those of a GPU take for themselves once they compute


@dataclass(frozen=True)
class Room:
    """What a training needs of a device's memory, and what there is.

    denoiser: as it will be trained, without its numbers. there: bytes of it that are on the device
    already: on a CPU all, and on a GPU where ComfyUI keeps its models there.
    """

    method: Method
    denoiser: Denoiser
    data: PersonalData
    device: torch.device
    there: int

    @classmethod
    def of(
        cls, method: Method, denoiser: Denoiser, data: PersonalData, device: torch.device
    ) -> "Room":
        """Look at a denoiser before it is adapted, or moved."""
        there = sum(p.nbytes for p in denoiser.parameters() if p.device.type == device.type)
        return cls(method, without_numbers(denoiser), data, device, there)

    @cached_property
    def needed(self) -> int:
        """Bytes at the peak, the network's own among them."""
        return needed(self.method, self.denoiser, self.data, heed=stop_when_interrupted)

    @cached_property
    def free(self) -> int:
        """Bytes that training can have, the network's own among them."""
        free: Any = comfy.model_management.get_free_memory(self.device)
        return int(free) + self.there - (0 if self.on_cpu else OF_LIBRARIES)

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def enough(self) -> bool:
        return self.needed <= self.free

    def kept(self, data: PersonalData) -> PersonalData:
        """Return data that encodes while training without leaving a VAE where it needs the room."""

        def encode(pixels: Tensor) -> Tensor:
            latents = data.encode(pixels)
            if loaded_by_comfyui(self.device) > self.free - self.needed:
                comfy.model_management.unload_all_models()
            return latents

        return replace(data, encode=encode)

    def __str__(self) -> str:
        how = " with gradient checkpointing" if self.denoiser.unet.is_gradient_checkpointing else ""
        return (
            f"training needs about {gib(self.needed)} at its peak{how}; of the "
            f"{'memory' if self.on_cpu else 'GPU memory'}, {gib(self.free)} are free"
        )

    @cached_property
    def advice(self) -> str:
        """Say what would need less, and how much it would need then."""
        found = remedies(self.method, self.denoiser, self.data, stop_when_interrupted)
        helpful = {change: size for change, size in found.items() if size < 0.98 * self.needed}
        listed = "; ".join(f"{change}: {gib(size)}" for change, size in helpful.items())
        return f"What needs less: {listed}" if helpful else "Train on smaller pictures"


def loaded_by_comfyui(device: torch.device) -> int:
    """Return the bytes of the models that ComfyUI holds on a device."""
    loaded = comfy.model_management.loaded_models()
    return sum(m.loaded_size() for m in loaded if m is not None and m.load_device == device)


def gib(size: int) -> str:
    """Format bytes."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 2 else f"{size / 2**20:.0f} MiB"
