"""PaRa: parameter rank reduction (Chen et al., ICLR 2025, arXiv 2406.05641).

    Q = qr(B).Q,  B (out, r) learnable;     W' = W - Q Q^T W

What is learned is which r output directions every layer gives up: half of LoRA's parameters on
square layers, and no direction can be added. Linear layers are peft's `DeftConfig(para=True,
decomposition_method="qr")`. Ours: convolutions (as matrices out x in*kh*kw), the near-identity
start `bottom`, and the strength s at loading. The layers "all but cross-attention" are the
paper's best trade-off. Its learning rate is unpublished.

A LoRA goes on top (Combine Personalizations). Not with APT, BNN, A3FT or BP/ZO in one training:
what is learned means only the directions that it spans, of weights that have to stay.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft import DeftConfig, inject_adapter_in_model
from peft.tuners.deft.layer import DeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from ..edits import Edit, RankReduction
from ..eight_bits import precision_or_eight_bits
from ..method import Method
from ..settings import Settings, knob
from ..sites import PRESETS, narrowest, sites
from .lora import check_rank


@dataclass(frozen=True)
class PaRaSettings(Settings):
    """Settings of PaRa."""

    weight_decay: float = knob(
        0.0,
        "No effect on what is learned: only the span of B matters. Leave at 0.",
        min=0.0,
        max=1.0,
        step=1e-3,
        advanced=True,
    )
    rank: int = knob(
        4,
        "Output directions that every layer gives up. More: closer to the pictures, less editable.",
        min=1,
        max=1024,
    )
    init: str = knob(
        "bottom",
        "bottom: start from the directions that the base uses least (near-identity); "
        "random: from any (as in peft).",
        choices=("bottom", "random"),
        advanced=True,
    )
    layers: str = knob(
        "all but cross-attention",
        "Which layers of the U-Net learn.",
        choices=tuple(PRESETS),
        advanced=True,
    )
    precision: str = precision_or_eight_bits()


class PaRa(Method):
    name = "para"
    title = "PaRa"
    Settings = PaRaSettings
    settings: PaRaSettings
    starts_at_identity = False  # a subspace is removed from the first step on

    def adapt(self, unet: nn.Module) -> None:
        s = self.settings
        targets = sites(unet, s.layers)
        check_rank(s.rank, narrowest(unet, targets))
        layers = {name: unet.get_submodule(name) for name in targets}
        linears = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
        if linears:
            config = DeftConfig(
                r=s.rank, para=True, decomposition_method="qr", target_modules=linears
            )
            inject_adapter_in_model(config, unet)
        for name, layer in layers.items():
            if isinstance(layer, nn.Conv2d):
                unet.set_submodule(name, ReducedConv2d(layer, s.rank))
        if s.init == "bottom":
            for layer in reduced_layers(unet).values():
                basis = bottom_directions(dequantize_module_weight(layer.get_base_layer()), s.rank)
                layer.deft_P["default"].data.copy_(basis)

    def learned(self, unet: nn.Module) -> dict[str, Edit]:
        return {
            name: RankReduction(layer.deft_P["default"].detach().clone())
            for name, layer in reduced_layers(unet).items()
        }


class ReducedConv2d(nn.Module, BaseTunerLayer):
    """A convolution without the output directions spanned by B: y - Q Q^T (y - bias)."""

    adapter_layer_names = ("deft_P",)

    def __init__(self, base_layer: nn.Conv2d, rank: int):
        super().__init__()
        self.base_layer = base_layer
        basis = torch.randn(base_layer.out_channels, rank) * 0.02
        self.deft_P = nn.ParameterDict({"default": nn.Parameter(basis)})
        self._disable_adapters = False
        self._active_adapter = "default"
        self.merged_adapters = []

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        result = self.base_layer(x, *args)
        if self.disable_adapters:
            return result
        q = torch.linalg.qr(self.deft_P["default"].float()).Q
        product = result.float().flatten(2)  # (B, out, hw)
        removed = q.mT @ product  # (B, r, hw), with the bias's share in it
        if self.base_layer.bias is not None:
            removed = removed - (q.mT @ self.base_layer.bias.float())[:, None]
        kept = torch.baddbmm(product, q.expand(len(product), -1, -1), removed, alpha=-1)
        return kept.view_as(result).to(result.dtype)


def reduced_layers(unet: nn.Module) -> dict[str, DeftLinear | ReducedConv2d]:
    """Return the adapted layers by their site."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, (DeftLinear, ReducedConv2d))
    }


def bottom_directions(weight: Tensor, rank: int) -> Tensor:
    """Return the left-singular vectors of the `rank` smallest singular values, (out, rank).

    Removing them changes the weight least: ||W' - W||_F^2 is the sum of their squares. A tall
    weight has enough directions that it does not use at all: random ones among those are taken,
    which spares the eigenvectors of a large matrix.
    """
    if weight.is_meta:  # no numbers, no directions
        return torch.zeros(len(weight), rank)
    matrix = weight.detach().flatten(1).cpu().double()
    tall = matrix.shape[0] - matrix.shape[1] >= rank
    if tall:
        used = torch.linalg.qr(matrix).Q
        drawn = torch.randn(len(matrix), rank, dtype=matrix.dtype)
        return torch.linalg.qr(drawn - used @ (used.mT @ drawn)).Q.to(torch.float32)
    return torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[:, :rank].to(torch.float32)
