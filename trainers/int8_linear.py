"""The layer of `eight_bits`; importing it needs bitsandbytes."""

from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Int8Linear(Linear8bitLt):
    """A frozen linear layer, in 8 bits once it is moved to its device.

    bitsandbytes' own keeps its inputs for the way back beside autograd, where gradient
    checkpointing can not let go of them; a frozen layer needs none.
    """

    def __init__(self, layer: nn.Linear, threshold: float):
        shape = layer.in_features, layer.out_features
        super().__init__(*shape, bias=False, has_fp16_weights=False, threshold=threshold)
        weight = layer.weight.data.cpu()  # from elsewhere it would be moved as it is
        self.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self)  # pyright: ignore[reportReturnType]

    def product(self, x: Tensor) -> Tensor:
        """Return x W^T + b, without a way back."""
        return super().forward(x)

    def weights(self, dtype: torch.dtype) -> Tensor:
        """Return W, as it is on the way back."""
        return self.state.CB.to(dtype, copy=True).mul_(self.state.SCB.unsqueeze(1).mul(1 / 127))


class Product(torch.autograd.Function):
    """x W^T + b of a frozen layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Linear) -> Tensor:
        ctx.layer = layer
        return layer.product(x.detach())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        rows = gradient.flatten(0, -2).contiguous()
        product = rows @ ctx.layer.weights(gradient.dtype)
        return product.view(*gradient.shape[:-1], -1), None
