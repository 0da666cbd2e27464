"""OFT: layers whose inputs are rotated (Qiu et al. 2023, arXiv 2306.07280). The layers are peft's.

Linear layers only: peft's 3 x 3 convolutions rotate pictures, which no change of a weight can do.
"""

import math

from peft import OFTConfig, inject_adapter_in_model
from peft.tuners.oft.layer import OFTLayer
from torch import nn

from .edits import Edit, Rotation
from .errors import InputError


def set_rotations(unet: nn.Module, layers: list[str], block_size: int) -> None:
    """Let the inputs of the Linear layers among those named turn, in blocks, from the identity.

    Raises InputError when no layer is Linear, or the block size does not divide their inputs.
    """
    linears = [name for name in layers if isinstance(unet.get_submodule(name), nn.Linear)]
    if not linears:
        raise InputError("layers", "has no linear layer in this base, and OFT rotates only those.")
    common = math.gcd(*(unet.get_parameter(f"{name}.weight").shape[1] for name in linears))
    if common % block_size:
        raise InputError(
            "block_size",
            f"is {block_size}; give a divisor of {common}: all layers' inputs are multiples of it.",
        )
    config = OFTConfig(
        oft_block_size=block_size,
        coft=False,
        use_cayley_neumann=False,  # the exact Cayley transform
        target_modules=linears,
    )
    inject_adapter_in_model(config, unet)


def rotations(unet: nn.Module) -> dict[str, Edit]:
    """Return what was turned, {site: edit}."""
    return {
        name: Rotation(layer.oft_R["default"].weight.detach().clone())
        for name, layer in unet.named_modules()
        if isinstance(layer, OFTLayer)
    }
