"""LoRA: low-rank adaptation, trained as DreamBooth does. The baseline of every other method.

    W' = W + (alpha / r) B A,   A random, B = 0 at the start      (Hu et al. 2021, eq. 3)

Only the U-Net learns; prior images, if given, keep the class from drifting to the subject
(Ruiz et al. 2023, eq. 2). The adapter is peft's.
"""

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ..edits import Edit, LowRank
from ..eight_bits import precision_or_eight_bits
from ..errors import InputError
from ..method import Method
from ..settings import Settings, knob
from ..sites import PRESETS, narrowest, sites

INITS: dict[str, Any] = {"kaiming": True, "gaussian": "gaussian"}  # ours -> peft's


@dataclass(frozen=True)
class LoRASettings(Settings):
    """Settings of LoRA, and of the methods that train one."""

    rank: int = knob(
        16,
        "Width of the low-rank change: more holds more detail, and over-fits sooner.",
        min=1,
        max=1024,
    )
    alpha: float = knob(
        0.0,
        "The change is scaled by alpha / rank. 0: same as the rank (scale 1).",
        min=0.0,
        max=4096.0,
        step=1.0,
        advanced=True,
    )
    layers: str = knob(
        "attention",
        "Which layers of the U-Net learn.",
        choices=tuple(PRESETS),
        advanced=True,
    )
    init: str = knob(
        "kaiming",
        "How A starts (B starts at 0). kaiming: as in peft, 1 / sqrt(3 * inputs) wide; gaussian: "
        "1 / rank wide, as in diffusers, where the first steps are larger.",
        choices=tuple(INITS),
        advanced=True,
    )
    precision: str = precision_or_eight_bits()


class LoRA(Method):
    name = "lora"
    title = "LoRA"
    Settings = LoRASettings
    settings: LoRASettings

    def adapt(self, unet: nn.Module) -> None:
        s = self.settings
        targets = sites(unet, s.layers)
        check_rank(s.rank, narrowest(unet, targets))
        alpha: Any = s.alpha or s.rank  # peft computes with any number
        config = LoraConfig(
            r=s.rank, lora_alpha=alpha, init_lora_weights=INITS[s.init], target_modules=targets
        )
        inject_adapter_in_model(config, unet)

    def learned(self, unet: nn.Module) -> dict[str, Edit]:
        alpha = float(self.settings.alpha or self.settings.rank)
        return {
            name: LowRank(
                layer.lora_A["default"].weight.detach().clone(),
                layer.lora_B["default"].weight.detach().clone(),
                alpha,
            )
            for name, layer in unet.named_modules()
            if isinstance(layer, LoraLayer)
        }


def check_rank(rank: int, width: int) -> None:
    """Raise InputError when the rank is above the width of the narrowest layer."""
    if rank > width:
        raise InputError(
            "rank", f"is {rank}, but the narrowest layer is {width} wide; give at most {width}."
        )
