"""A frozen base with linear layers in 8 bits: LLM.int8() (Dettmers et al. 2022), by bitsandbytes.

Its weights take a half of bf16's memory; what is learned over them stays fp32. They become 8 bits
when the network is moved to its device.
"""

import dataclasses
import logging
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from .errors import InputError
from .settings import Settings, redeclared
from .sites import PRESETS, layers_of

OUTLIERS = 6.0  # inputs beyond it are multiplied in 16 bits, as the paper does
INT8 = "int8"


def precision_or_eight_bits() -> Any:
    """Declare `precision` for a method that leaves the base's own weights alone."""
    (plain,) = [field for field in dataclasses.fields(Settings) if field.name == "precision"]
    return redeclared(
        Settings,
        "precision",
        help=f"{plain.metadata['help']} int8: bf16, with most weights in 8 bits, half the memory "
        "again (needs the package bitsandbytes).",
        choices=(*plain.metadata["choices"], INT8),
    )


def installed() -> bool:
    """Tell whether bitsandbytes is."""
    return find_spec("bitsandbytes") is not None


def takes_eight_bits(settings: Settings) -> bool:
    """Tell whether a method with these settings can learn over a base in 8 bits."""
    (precision,) = [f for f in dataclasses.fields(settings) if f.name == "precision"]
    return INT8 in precision.metadata["choices"]


def store_in_eight_bits(unet: nn.Module) -> None:
    """Replace the linear layers of the transformer blocks; their weights are not copied before.

    Raises InputError when bitsandbytes is not installed.
    """
    try:
        from .int8_linear import Int8Linear
    except ImportError as error:
        raise InputError(
            "precision",
            "is 'int8', which needs the package bitsandbytes: install it with "
            "`pip install bitsandbytes`, or choose bf16.",
        ) from error
    # it would say at every product of every step that inputs are rounded to fp16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for name, layer in wide_layers(unet):
        unet.set_submodule(name, Int8Linear(layer, OUTLIERS))


def wide_layers(unet: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the layers that go into 8 bits: the linear ones of a U-Net's transformer blocks."""
    for name in layers_of(unet, PRESETS["transformer"]):
        layer = unet.get_submodule(name)
        if type(layer) is nn.Linear:
            yield name, layer


def eight_bit_layers(unet: nn.Module) -> dict[str, Any]:
    """Return the layers that are, or will be, in 8 bits, by name."""
    return {name: module for name, module in unet.named_modules() if in_eight_bits(module)}


def in_eight_bits(module: nn.Module) -> bool:
    """Tell whether a layer is in 8 bits, will be, or stands for one that is."""
    return isinstance(module, InsteadOfEightBits) or type(module).__name__ == "Int8Linear"


class InsteadOfEightBits(nn.Linear):
    """A layer without numbers, in the network's precision, for one in 8 bits."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype):
        shape = layer.in_features, layer.out_features, layer.bias is not None
        super().__init__(*shape, device="meta", dtype=dtype)
        self.requires_grad_(False)
