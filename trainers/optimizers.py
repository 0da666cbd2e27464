"""Optimisers by name: torch's own, and those of well-kept libraries when they are installed."""

from collections.abc import Iterable
from importlib import import_module

import torch
from torch import nn

from .errors import InputError

# name -> (module, class, distribution to install, extra arguments)
OPTIMIZERS = {
    "adamw": ("torch.optim", "AdamW", "torch", {}),
    "adafactor": ("torch.optim", "Adafactor", "torch", {}),
    "sgd": ("torch.optim", "SGD", "torch", {"momentum": 0.9}),
    "adamw-8bit": ("bitsandbytes.optim", "AdamW8bit", "bitsandbytes", {}),
    "prodigy": ("prodigyopt", "Prodigy", "prodigyopt", {"safeguard_warmup": True}),
    "lion": ("lion_pytorch", "Lion", "lion-pytorch", {}),
}
FUSED = ("cpu", "cuda")  # where AdamW moves all weights in one kernel


def build_optimizer(
    name: str, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Build the optimiser called `name`.

    Raises InputError when its package is not installed.
    """
    module, cls, distribution, extra = OPTIMIZERS[name]
    try:
        optimizer = getattr(import_module(module), cls)
    except ImportError as error:
        raise InputError(
            "optimizer",
            f"is '{name}', which needs the package {distribution}: install it with "
            f"`pip install {distribution}`, or choose adamw.",
        ) from error
    learning = list(parameters)
    if name == "adamw" and all(p.device.type in FUSED for p in learning):
        extra = {"fused": True}
    return optimizer(learning, lr=learning_rate, weight_decay=weight_decay, **extra)
