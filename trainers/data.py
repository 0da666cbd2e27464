"""What is trained on: pictures, their latents and their text states, all on the CPU."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One picture, ready to be drawn."""

    pixels: Tensor  # (3, H, W) in [-1, 1]
    latent: Tensor  # (C, h, w), as the VAE gives it
    caption: str
    context: Tensor  # (L, D) text states


@dataclass(frozen=True)
class PersonalData:
    """The pictures of a subject, those held out, and pictures of its class.

    `empty_context` (L, D) is the text states of the empty caption. `encode` is the VAE, for what is
    drawn while training (augmented, or of another size): pixels (N, 3, H, W) in [-1, 1] to latents
    (N, C, h, w) on the CPU, in the scale of the examples' own.
    """

    training: tuple[Example, ...]
    held_out: tuple[Example, ...]
    prior: tuple[Example, ...]
    empty_context: Tensor
    instance_prompt: str
    class_prompt: str
    encode: Callable[[Tensor], Tensor]

    def fingerprint(self) -> str:
        """Return a hash of all pictures and captions, 16 hex digits."""
        digest = hashlib.sha256()
        for group in (self.training, self.held_out, self.prior):
            digest.update(f"|{len(group)}|".encode())
            for example in group:
                digest.update(example.pixels.contiguous().numpy().tobytes())
                digest.update(example.caption.encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Batch:
    """What one forward pass is asked about."""

    latents: Tensor  # (B, C, h, w) clean, in the network's scale
    noise: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,) int in [0, T)
    context: Tensor  # (B, L, D)
    weight: Tensor  # (B,) share of each example in the loss
    of_subject: Tensor  # (B,) bool: not a prior picture
    seed: int  # of what else is random while this batch is looked at, such as weights

    def to(self, device: torch.device) -> "Batch":
        """Move every tensor."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)
        }
        return replace(self, **moved)


def stack_contexts(contexts: list[Tensor]) -> Tensor:
    """Stack text states (L_i, D) to (B, L, D), repeated to one length as ComfyUI does."""
    length = math.lcm(*(context.shape[0] for context in contexts))
    return torch.stack([c.repeat(length // c.shape[0], 1) for c in contexts])
