"""A frozen base with linear layers in 8 bits: LLM.int8() (Dettmers et al. 2022), by bitsandbytes.

Its weights take a half of bf16's memory; what is learned over them stays fp32. They become 8 bits
when the network is moved to its device.
"""

import dataclasses
import logging
from typing import Any

from torch import nn

from .errors import InputError
from .settings import Settings, redeclared
from .sites import PRESETS, layers_of

OUTLIERS = 6.0  # inputs beyond it are multiplied in 16 bits, as the paper does


def precision_or_eight_bits() -> Any:
    """Declare `precision` for a method that leaves the base's own weights alone."""
    (plain,) = [field for field in dataclasses.fields(Settings) if field.name == "precision"]
    return redeclared(
        Settings,
        "precision",
        help=f"{plain.metadata['help']} int8: bf16, with most weights in 8 bits, half the memory "
        "again (needs the package bitsandbytes).",
        choices=(*plain.metadata["choices"], "int8"),
    )


def store_in_eight_bits(unet: nn.Module) -> None:
    """Replace the linear layers of the transformer blocks; their weights are not copied before.

    Raises InputError when bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn import Int8Params, Linear8bitLt
    except ImportError as error:
        raise InputError(
            "precision",
            "is 'int8', which needs the package bitsandbytes: install it with "
            "`pip install bitsandbytes`, or choose bf16.",
        ) from error
    # it would say at every product of every step that inputs are rounded to fp16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for name in layers_of(unet, PRESETS["transformer"]):
        layer = unet.get_submodule(name)
        if type(layer) is not nn.Linear:
            continue
        shape = layer.in_features, layer.out_features
        small = Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=OUTLIERS)
        small.weight = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        small.bias = layer.bias
        unet.set_submodule(name, small)


def eight_bit_layers(unet: nn.Module) -> dict[str, Any]:
    """Return the layers that are, or will be, in 8 bits, by name."""
    return {
        name: module
        for name, module in unet.named_modules()
        if type(module).__name__ == "Linear8bitLt" and isinstance(module, nn.Linear)
    }
