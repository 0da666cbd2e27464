"""What is trained on: pictures, their latents and their text states, all on the CPU."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

NO_POOLED = torch.zeros(0)  # of text encoders that give no pooled text
PIXELS = 8  # of a picture's side, for one of its latent's


@dataclass(frozen=True)
class Origin:
    """The photograph that a picture was cut from."""

    size: tuple[int, int]  # height and width in pixels, before scaling
    corner: tuple[float, float]  # top and left of the picture, in its own heights and widths


@dataclass(frozen=True)
class Example:
    """One picture, ready to be drawn."""

    pixels: Tensor  # (3, H, W) in [-1, 1]
    latent: Tensor  # (C, h, w), as the VAE gives it
    caption: str
    context: Tensor  # (L, D) text states
    pooled: Tensor = NO_POOLED  # (P,) the whole text as one vector; SDXL is told it as well
    origin: Origin | None = None  # None: SDXL is told what a sampler tells it of such a picture

    @property
    def sizes(self) -> Tensor:
        """Return what SDXL is told of a picture (Podell et al. 2023, section 2.2): (6,) fp32.

        Height and width of the photograph, top and left of the cut, height and width of the
        picture, in pixels.
        """
        own = [PIXELS * side for side in self.latent.shape[1:]]
        if self.origin is None:
            return torch.tensor([*own, 0, 0, *own], dtype=torch.float32)
        cut = [round(share * side) for share, side in zip(self.origin.corner, own, strict=True)]
        return torch.tensor([*self.origin.size, *cut, *own], dtype=torch.float32)


@dataclass(frozen=True)
class PersonalData:
    """The pictures of a subject, those held out, and pictures of its class.

    `empty_context` (L, D) and `empty_pooled` (P,) are the text of the empty caption. `encode` is
    the VAE, for what is drawn while training (augmented, or of another size): pixels (N, 3, H, W)
    in [-1, 1] to latents (N, C, h, w) on the CPU, in the scale of the examples' own.
    """

    training: tuple[Example, ...]
    held_out: tuple[Example, ...]
    prior: tuple[Example, ...]
    empty_context: Tensor
    instance_prompt: str
    class_prompt: str
    encode: Callable[[Tensor], Tensor]
    empty_pooled: Tensor = NO_POOLED

    def unsaid(self, example: Example) -> Example:
        """Return an example with the empty caption."""
        return replace(example, caption="", context=self.empty_context, pooled=self.empty_pooled)

    def fingerprint(self) -> str:
        """Return a hash of all pictures and captions, 16 hex digits."""
        digest = hashlib.sha256()
        for group in (self.training, self.held_out, self.prior):
            digest.update(f"|{len(group)}|".encode())
            for example in group:
                digest.update(example.pixels.contiguous().numpy().tobytes())
                digest.update(example.caption.encode())
                digest.update(str(example.origin or "").encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Batch:
    """What one forward pass is asked about."""

    latents: Tensor  # (B, C, h, w) clean, in the network's scale
    noise: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,) int in [0, T)
    context: Tensor  # (B, L, D)
    pooled: Tensor  # (B, P)
    sizes: Tensor  # (B, 6), see Example
    weight: Tensor  # (B,) share of each example in the loss
    of_subject: Tensor  # (B,) bool: not a prior picture
    seed: int  # of what else is random while this batch is looked at, such as weights

    @property
    def conditions(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the network is told besides the time: context, pooled text, sizes."""
        return self.context, self.pooled, self.sizes

    def to(self, device: torch.device) -> "Batch":
        """Move every tensor."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)
        }
        return replace(self, **moved)


def conditions(examples: Sequence[Example]) -> dict[str, Tensor]:
    """Return what the network is told of examples besides the time, as fields of a Batch."""
    return {
        "context": stack_contexts([example.context for example in examples]),
        "pooled": torch.stack([example.pooled for example in examples]),
        "sizes": torch.stack([example.sizes for example in examples]),
    }


def stack_contexts(contexts: list[Tensor]) -> Tensor:
    """Stack text states (L_i, D) to (B, L, D), repeated to one length as ComfyUI does."""
    length = math.lcm(*(context.shape[0] for context in contexts))
    return torch.stack([c.repeat(length // c.shape[0], 1) for c in contexts])
