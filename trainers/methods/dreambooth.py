"""DreamBooth: full fine-tuning of the U-Net (Ruiz et al. 2023, arXiv 2208.12242).

    min E || eps - eps_theta(x_t, c) ||^2 + prior weight * the same on the class      (eq. 2)

Every weight learns, at a learning rate that is small because of it. A checkpoint is as large as
the U-Net in fp32, and training needs about four times that. Ours: no weight decay, which would
pull the base to zero.
"""

from dataclasses import dataclass

from torch import nn

from ..edits import Edit
from ..errors import InputError
from ..free import differences, set_free
from ..method import Method
from ..settings import Settings, knob
from ..sites import ROLES, layers_of

FREE_LAYERS = {
    "everything": tuple(ROLES),
    "attention": (
        "self-attention",
        "self-attention norm",
        "cross-attention",
        "cross-attention norm",
    ),
    "self-attention": ("self-attention", "self-attention norm"),
    "norms": ("self-attention norm", "cross-attention norm", "norm"),
}


def free_layers(unet: nn.Module, choice: str, setting: str) -> list[str]:
    """List the layers of a choice. Raises InputError, naming the setting, when there are none."""
    found = layers_of(unet, FREE_LAYERS[choice])
    if not found:
        raise InputError(setting, f"is '{choice}', but this base has none.")
    return found


@dataclass(frozen=True)
class DreamBoothSettings(Settings):
    """Settings of full fine-tuning."""

    learning_rate: float = knob(
        5e-6,
        "How far each step moves. All weights move: a hundredth of what a LoRA takes.",
        min=0.0,
        max=1.0,
        step=1e-7,
    )
    weight_decay: float = knob(
        0.0,
        "Pull of the weights towards zero, not towards the base.",
        min=0.0,
        max=1.0,
        step=1e-3,
        advanced=True,
    )
    free: str = knob(
        "everything",
        "Which layers of the U-Net learn.",
        choices=tuple(FREE_LAYERS),
        advanced=True,
    )


class DreamBooth(Method):
    name = "dreambooth"
    title = "DreamBooth (full fine-tuning)"
    Settings = DreamBoothSettings
    settings: DreamBoothSettings

    def adapt(self, unet: nn.Module) -> None:
        set_free(unet, free_layers(unet, self.settings.free, "free"))

    def learned(self, unet: nn.Module) -> dict[str, Edit]:
        return differences(unet)
