"""Layers whose very weights learn: what full and attention-only fine-tuning are made of."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call

from .edits import Difference, Edit
from .eight_bits import in_eight_bits
from .errors import InputError


class Free(nn.Module, BaseTunerLayer):
    """A layer with fp32 weights of its own; the base's stay as they are, for the prior."""

    adapter_layer_names = ("free",)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        own = deepcopy(base_layer).requires_grad_(True)
        self.free = nn.ModuleDict({"default": own.to(torch.float32)})
        self._disable_adapters = False
        self._active_adapter = "default"
        self.merged_adapters = []

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        if self.disable_adapters:
            return self.base_layer(x, *args)
        own = self.free["default"]
        names = [name for name, _ in self.base_layer.named_parameters()]
        values = {name: getattr(own, name).to(x.dtype) for name in names}
        return functional_call(self.base_layer, values, (x, *args))


def set_free(unet: nn.Module, layers: Iterable[str]) -> None:
    """Let the named layers' own weights learn. Raises InputError for weights in 8 bits."""
    for name in layers:
        layer = unet.get_submodule(name)
        if in_eight_bits(layer):
            raise InputError(
                "precision",
                "is 'int8', in which the base's own weights can not learn; choose bf16, or a "
                "method that learns beside them, such as LoRA.",
            )
        unet.set_submodule(name, Free(layer))


def differences(unet: nn.Module) -> dict[str, Edit]:
    """Return what the free weights moved, {site: edit}; a bias is the site `<layer>.bias`."""
    return {
        site: Difference((getattr(layer.free["default"], part) - base.float()).detach())
        for layer_name, layer in unet.named_modules()
        if isinstance(layer, Free)
        for part, base in layer.base_layer.named_parameters()
        for site in [layer_name if part == "weight" else f"{layer_name}.{part}"]
    }
