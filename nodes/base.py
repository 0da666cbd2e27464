"""What a training session trains: a base, and personal data as that takes it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..trainers.artifact import Personalization
from ..trainers.data import Example, PersonalData
from ..trainers.denoiser import Denoiser, described_schedule
from ..trainers.errors import InputError
from .bridge import denoiser_of, fingerprint, schedule
from .load import personalize
from .monitor import Monitoring

Sampler = Callable[[Personalization | None], list[Tensor]]
"""Draws what a base would with what was learned (None: nothing), as a user would get it.

Returns the pictures of every prompt, (count, H, W, 3) in [0, 1] each.
"""


class Base(Protocol):
    """A MODEL, or an unconditional base."""

    # whether it draws what it is told; if not, it draws one kind of pictures, that of its training
    prompted: ClassVar[bool]

    def denoiser(self, precision: str) -> Denoiser:
        """Return a network of its own, on the CPU."""
        ...

    def in_network_scale(self, data: PersonalData, denoiser: Denoiser) -> PersonalData:
        """Return the data as the network takes it; raise InputError when they do not fit."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """Describe the base, for the file."""
        ...

    def sampler(self, monitoring: Monitoring, shape: tuple[int, ...]) -> Sampler | None:
        """Return what draws samples as a monitor wishes; None where it wishes none.

        shape: of a latent, (C, h, w).
        """
        ...


@dataclass(frozen=True)
class ModelBase:
    """A ComfyUI MODEL as a base."""

    model: ModelPatcher
    prompted: ClassVar[bool] = True

    def denoiser(self, precision: str) -> Denoiser:
        return denoiser_of(self.model, precision)

    def in_network_scale(self, data: PersonalData, denoiser: Denoiser) -> PersonalData:
        return in_network_scale(data, self.model, denoiser)

    def fingerprint(self) -> dict[str, str]:
        return fingerprint(self.model) | {"schedule": described_schedule(*schedule(self.model))}

    def sampler(self, monitoring: Monitoring, shape: tuple[int, ...]) -> Sampler | None:
        if not monitoring.shown:
            return None

        def drawn(learned: Personalization | None) -> list[Tensor]:
            tuned = self.model if learned is None else personalize(self.model, learned, 1.0)[0]
            return monitoring.samples(tuned, shape)

        return drawn


def in_network_scale(data: PersonalData, model: ModelPatcher, denoiser: Denoiser) -> PersonalData:
    """Bring the latents to the network's scale. Raises InputError when data and base do not fit."""
    sample = data.training[0]
    width = denoiser.unet.config["cross_attention_dim"]
    pooled = denoiser.pooled_width
    alike = sample.context.shape[-1] == width and pooled in (0, len(sample.pooled))
    if not alike or sample.latent.shape[0] != 4:
        raise InputError(
            "data",
            f"was encoded with text states of width {sample.context.shape[-1]} and "
            f"{sample.latent.shape[0]} latent channels, but this base expects {width} and 4; give "
            "Personal Dataset the CLIP and VAE of the same checkpoint.",
        )
    multiple = denoiser.size_multiple
    shapes = {e.latent.shape for e in (*data.training, *data.held_out, *data.prior)}
    odd = sorted(f"{w}x{h}" for _, h, w in shapes if h % multiple or w % multiple)
    if odd:
        raise InputError(
            "data",
            f"has latents of {', '.join(odd)}, but this base halves them to a {multiple}th: "
            f"set Personal Dataset's 'resolution' to a multiple of {8 * multiple}.",
        )

    def scaled(example: Example) -> Example:
        return replace(example, latent=model.model.process_latent_in(example.latent))

    return replace(
        data.changed(scaled),
        encode=lambda pixels: model.model.process_latent_in(data.encode(pixels)),
    )
