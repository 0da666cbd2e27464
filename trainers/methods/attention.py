"""Attention-only fine-tuning: of the attention blocks, everything learns; of the rest, nothing.

The baseline of A3FT (Moon et al. 2022, table 1): norm, query, key, value and output projection.
There on unconditional bases; on text-to-image bases, self- and cross-attention: ours.
"""

from dataclasses import dataclass

from ..settings import knob
from .dreambooth import DreamBooth, DreamBoothSettings


@dataclass(frozen=True)
class AttentionSettings(DreamBoothSettings):
    """Settings of attention-only fine-tuning."""

    learning_rate: float = knob(
        1e-5,
        "How far each step moves: a tenth of what a LoRA takes.",
        min=0.0,
        max=1.0,
        step=1e-7,
    )
    free: str = knob(
        "attention",
        "Which layers of the U-Net learn.",
        choices=("attention", "self-attention"),
        advanced=True,
    )


class Attention(DreamBooth):
    name = "attention"
    title = "Attention (fine-tuning)"
    Settings = AttentionSettings
