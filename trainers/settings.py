"""Settings: declared once (default, limits, help); the node's widgets are read off them."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import InputError, brief
from .optimizers import OPTIMIZERS

MOST_BATCHES = 1024  # of one step


def knob(default: Any, help: str, *, advanced: bool = False, **limits: Any) -> Any:
    """Declare a field that is also a widget. `limits`: min, max, step, or choices."""
    return field(default=default, metadata={"help": help, "advanced": advanced, **limits})


def redeclared(settings: type, name: str, **changes: Any) -> Any:
    """Declare a field again as `settings` has it, but for `changes`: default, help, limits."""
    (spec,) = [spec for spec in dataclasses.fields(settings) if spec.name == name]
    return knob(**{"default": spec.default, **spec.metadata, **changes})


@dataclass(frozen=True)
class Settings:
    """What every method needs to know about a run. Field names are the node's input names."""

    steps: int = knob(
        800,
        "Optimiser steps. As a start: 100-200 per training image at the default learning rate.",
        min=1,
        max=1_000_000,
    )
    learning_rate: float = knob(
        1e-4,
        "How far each step moves. Too high: noise and forgetting; too low: nothing is learned.",
        min=0.0,
        max=1.0,
        step=1e-6,
    )
    batch_size: int = knob(
        1,
        "Images per step (prior images come on top, as many again). More: smoother and slower.",
        min=1,
        max=1024,
    )
    seed: int = knob(
        0,
        "Seeds every random choice of the run: the same seed and inputs give the same file.",
        min=0,
        max=2**63 - 1,
    )
    schedule: str = knob(
        "constant",
        "How the learning rate goes over the run, after the warm-up.",
        choices=("constant", "cosine", "linear"),
        advanced=True,
    )
    warmup_steps: int = knob(
        0, "Steps over which the learning rate rises from zero.", min=0, max=100_000, advanced=True
    )
    gradient_accumulation: int = knob(
        1,
        "Batches averaged into one step: a larger batch in the memory of a small one.",
        min=1,
        max=MOST_BATCHES,
        advanced=True,
    )
    optimizer: str = knob(
        "adamw",
        "What moves the weights. A choice that needs a package names it when it is missing. "
        "prodigy: set the learning rate to 1; lion: to a third of adamw's.",
        choices=tuple(OPTIMIZERS),
        advanced=True,
    )
    weight_decay: float = knob(
        1e-2,
        "Pull of the learned weights towards zero.",
        min=0.0,
        max=1.0,
        step=1e-3,
        advanced=True,
    )
    gradient_clipping: float = knob(
        1.0,
        "Longest gradient (2-norm) that a step may use. 0: no limit.",
        min=0.0,
        max=1e6,
        step=0.1,
        advanced=True,
    )
    min_snr_gamma: float = knob(
        0.0,
        "Min-SNR loss weighting (Hang et al. 2023); 5 is usual, 0 is off.",
        min=0.0,
        max=100.0,
        step=0.5,
        advanced=True,
    )
    noise_offset: float = knob(
        0.0,
        "Adds noise that is constant over a picture, for darker darks; 0.05-0.1 is usual.",
        min=0.0,
        max=1.0,
        step=0.01,
        advanced=True,
    )
    prior_weight: float = knob(
        1.0,
        "Weight of the prior images in the loss (prior preservation); no effect without them.",
        min=0.0,
        max=100.0,
        step=0.1,
        advanced=True,
    )
    caption_dropout: float = knob(
        0.0,
        "Share of examples shown with an empty caption.",
        min=0.0,
        max=1.0,
        step=0.01,
        advanced=True,
    )
    gradient_checkpointing: str = knob(
        "auto",
        "Recompute activations instead of keeping them: much less memory, slower steps. auto: "
        "where the run would not fit otherwise.",
        choices=("auto", "on", "off"),
        advanced=True,
    )
    precision: str = knob(
        "auto",
        "Number format of the frozen base while training; what is learned is always fp32. "
        "auto: bf16 where the device computes in it, else fp32.",
        choices=("auto", "fp32", "bf16"),
        advanced=True,
    )
    ema_decay: float = knob(
        0.0,
        "Keep a running average of what is learned, and use that; 0.99-0.999 is usual, 0 is off. "
        "It starts fast: after n steps the decay is at most (1 + n) / (10 + n).",
        min=0.0,
        max=0.99999,
        step=0.001,
        advanced=True,
    )
    save_every: int = knob(
        0,
        "Also keep a checkpoint every so many steps. 0: only the last one.",
        min=0,
        max=1_000_000,
        advanced=True,
    )

    non_finite: str = knob(
        "skip",
        "What to do when the loss or its gradient is not finite. skip: leave the step out, and "
        "count it. lower: and halve the learning rate. stop: end the run with what was learned "
        "before. Ten in a row always end it.",
        choices=("skip", "lower", "stop"),
        advanced=True,
    )

    def __post_init__(self) -> None:
        check(self)
        if self.learning_rate == 0:
            usual = type(self).learning_rate
            raise InputError(
                "learning_rate", f"is 0.0, at which nothing is learned; give {usual:g}."
            )
        if self.warmup_steps >= self.steps:
            raise InputError(
                "warmup_steps",
                f"is {self.warmup_steps} of {self.steps} steps, in which the learning rate never "
                f"comes up; give less than 'steps', such as {self.steps // 10}.",
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return dataclasses.asdict(self)


def check(settings: Any) -> None:
    """Raise InputError unless every field of a dataclass of knobs is within its limits."""
    for spec in dataclasses.fields(settings):
        limits = {name: spec.metadata.get(name) for name in ("min", "max", "choices")}
        check_value(spec.name, getattr(settings, spec.name), type(spec.default), **limits)


def check_value(
    name: str,
    value: Any,
    kind: type,
    min: float | None = None,
    max: float | None = None,
    choices: Sequence[str] | None = None,
) -> None:
    """Raise InputError unless a value is of its kind (bool, int, float, str) and within limits."""
    if choices is not None:
        if not isinstance(value, str) or value not in choices:
            raise InputError(name, f"is {brief(repr(value))}; give one of {', '.join(choices)}.")
    elif kind is str:
        check_text(name, value)
    elif kind is bool:
        if not isinstance(value, bool):
            raise InputError(name, f"is {brief(repr(value))}; give true or false.")
    else:
        low, high = -math.inf if min is None else min, math.inf if max is None else max
        whole = "whole " if kind is int and not isinstance(value, int) else ""
        fits = isinstance(value, int if kind is int else (int, float))
        if not fits or isinstance(value, bool) or not low <= value <= high:  # also catches NaN
            told = f"is {brief(repr(value))}; give a {whole}number from {low} to {high}."
            raise InputError(name, told)


def check_text(name: str, value: Any) -> None:
    """Raise InputError unless a value is a text that files and tokenisers can hold."""
    if not isinstance(value, str):
        raise InputError(name, f"is {brief(repr(value))}; give a text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            name,
            f"has half a character ({value[error.start]!r}) at place {error.start + 1}; write it "
            "anew.",
        ) from error
