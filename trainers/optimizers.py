"""Optimisers by name: torch's own, and those of well-kept libraries when they are installed."""

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

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
LARGEST = 1e38  # number that fp32 holds
TRUSTING = ("AdamW", "AdamW8bit")  # their kernels write where shapes of a state say, unchecked


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


def check_shapes(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError where a state has tensors of other shapes than its weight needs.

    A kernel that trusts them would kill the process.
    """
    kind: Any = type(optimizer)
    for parameter, state in optimizer.state.items() if kind.__name__ in TRUSTING else ():
        probe = nn.Parameter(torch.zeros_like(parameter))
        probe.grad = torch.zeros_like(probe)
        (fresh := kind([probe])).step()
        wanted = shapes(fresh.state[probe])
        if state and {key: shapes(state).get(key) for key in wanted} != wanted:
            raise ValueError(f"an optimizer's state for another weight than {tuple(probe.shape)}")


def shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shapes of tensors and the types of all else."""
    return {k: v.shape if torch.is_tensor(v) else type(v) for k, v in state.items()}


def alike(value: Any, known: Any) -> bool:
    """Tell whether a value may stand where a known one does: finite numbers, lists of as many."""
    if isinstance(known, (list, tuple)):
        same = type(value) is type(known) and len(value) == len(known)
        return same and all(map(alike, value, known))
    if type(known) in (int, float):
        return type(value) in (int, float) and (abs(value) < LARGEST or value == known)
    return type(value) is type(known)
