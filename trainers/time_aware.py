"""The time-aware adapter of A3FT (Moon et al. 2022, sections 2.3 and C.4).

    z_q   = LN(W4 (W3 z + W2 SiLU(W1 t)))             eq. 1, time fusion
    A     = softmax(z_q^T z / sqrt(hw)), c x c
    z_out = LN(A z)                                   eq. 2, attention over channels
    a     = sigmoid(M2 SiLU(M1 t)) in [0, 1]^c        time scaling
    h     = proj_out((1 - a) z + a z_out)             eq. 3

z is what a self-attention hands to its output projection, t the network's own time embedding. The
first three lines are shared by all blocks of one width; time scaling is every block's own. Ours:
SiLU between W1 and W2, LN over the channels of each token, the start of the gate, and a strength
s that makes it s a. The adapter is not a change of a weight: it sits in the network as hooks.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .sites import TIME_EMBEDDING, self_attention_outputs

SITE = "time_aware"  # among a checkpoint's sites, and in front of its names in a file
HIDDEN = 32  # between M1 and M2
SHUT = -5.0  # a gate that starts near the identity: sigmoid(-5) = .0067


class TimeFusion(nn.Module):
    """Mix a block's channels by what they are and what time it is (eq. 1 and 2)."""

    def __init__(self, channels: int, time_channels: int):
        super().__init__()
        self.time_in = nn.Linear(time_channels, channels)  # W1
        self.time_out = nn.Linear(channels, channels)  # W2
        self.feature = nn.Linear(channels, channels)  # W3
        self.query = nn.Linear(channels, channels)  # W4
        self.query_norm = nn.LayerNorm(channels)
        self.output_norm = nn.LayerNorm(channels)

    def attention(self, z: Tensor, time: Tensor) -> Tensor:
        """Return A, (B, c, c), whose rows sum to 1. z: (B, hw, c), time: (B, d)."""
        time = self.time_out(F.silu(self.time_in(time)))[:, None]
        query = self.query_norm(self.query(self.feature(z) + time))
        return (query.mT @ z / z.shape[1] ** 0.5).softmax(-1)

    def forward(self, z: Tensor, time: Tensor) -> Tensor:
        """Return z_out, (B, hw, c)."""
        return self.output_norm(z @ self.attention(z, time).mT)


class TimeScaling(nn.Module):
    """Say how much of the mix each channel takes at a time; constant at the start."""

    def __init__(self, channels: int, time_channels: int, bias: float):
        super().__init__()
        self.reduce = nn.Linear(time_channels, HIDDEN)  # M1
        self.expand = nn.Linear(HIDDEN, channels)  # M2
        nn.init.zeros_(self.expand.weight)
        nn.init.constant_(self.expand.bias, bias)

    def forward(self, time: Tensor) -> Tensor:
        """Return a in [0, 1], (B, c). time: (B, d)."""
        return self.expand(F.silu(self.reduce(time))).sigmoid()


class TimeAware(nn.Module, BaseTunerLayer):
    """The adapters of a network: one fusion per width, one scaling per block.

    widths: {block: channels}, a block being the path of its output projection with _ for dots.
    """

    def __init__(self, widths: Mapping[str, int], time_channels: int, bias: float = SHUT):
        super().__init__()
        self.widths = dict(widths)
        self.time_channels = time_channels
        self.fusion = nn.ModuleDict(
            {str(c): TimeFusion(c, time_channels) for c in sorted(set(widths.values()))}
        )
        self.scaling = nn.ModuleDict(
            {block: TimeScaling(c, time_channels, bias) for block, c in widths.items()}
        )
        self._disable_adapters = False

    def forward(self, block: str, z: Tensor, time: Tensor, strength: float = 1.0) -> Tensor:
        """Return what goes to the block's output projection instead of z, (B, hw, c), in fp32."""
        z, time = z.float(), time.float()
        if len(time) != len(z):  # pictures cut into tiles, which lie side by side in the batch
            time = time.repeat_interleave(len(z) // len(time), dim=0)
        gate = strength * self.scaling[block](time)[:, None]
        return z + gate * (self.fusion[str(z.shape[-1])](z, time) - z)

    def attach(
        self, outputs: Mapping[str, nn.Module], time_embedding: nn.Module, strength: float = 1.0
    ) -> list[RemovableHandle]:
        """Put every block's adapter before its output projection; the handles take it out again.

        outputs: {block: output projection}; time_embedding: gives (B, d) before they are called.
        """
        seen: dict[str, Tensor] = {}  # also what recomputed activations are computed with

        def see(module: nn.Module, args: Any, time: Tensor) -> None:
            if not self.disable_adapters:
                seen["time"] = time

        def adapted(block: str):
            def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
                if self.disable_adapters:
                    return None
                z = self(block, args[0], seen["time"], strength)
                return (z.to(args[0].dtype), *args[1:])

            return before

        handles = [
            outputs[block].register_forward_pre_hook(adapted(block)) for block in self.widths
        ]
        return [time_embedding.register_forward_hook(see), *handles]

    def fits(self, shapes: Mapping[str, torch.Size]) -> bool:
        """Tell whether a network has every block. shapes: of its weights, {site: shape}."""
        known = {block_of(site): shape for site, shape in shapes.items()}
        time = shapes.get(f"{TIME_EMBEDDING}.linear_2", (0,))
        return time[0] == self.time_channels and all(
            block in known and known[block][1:] == (channels,)
            for block, channels in self.widths.items()
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file keeps, by name."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    def snapshot(self) -> "TimeAware":
        """Return a frozen copy, detached from any network."""
        return self.from_tensors({name: tensor.clone() for name, tensor in self.tensors().items()})

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "TimeAware":
        """Build it around tensors. Raises ValueError when they do not belong together."""
        sizes = {tuple(n.split(".")): t.shape[-1] for n, t in tensors.items() if t.ndim}
        widths = {n[1]: size for n, size in sizes.items() if n[2:] == ("expand", "bias")}
        time_channels = {size for n, size in sizes.items() if n[2:] == ("reduce", "weight")}
        if not widths or len(time_channels) != 1:
            raise ValueError(f"{SITE} has {len(widths)} blocks for {len(time_channels)} times")
        try:
            with torch.device("meta"):  # the sizes are a file's: allocate nothing for them
                adapter = cls(widths, time_channels.pop())
            adapter.load_state_dict(tensors, assign=True)
        except (RuntimeError, KeyError, TypeError) as error:  # KeyError: of names that are taken
            raise ValueError(f"{SITE}: {str(error).splitlines()[-1].strip()}") from error
        return adapter.requires_grad_(False)


def block_of(site: str) -> str:
    """Return the name of a block, from the path of its output projection."""
    return site.replace(".", "_")


def outputs_of(unet: nn.Module) -> dict[str, nn.Module]:
    """Return the output projections of a diffusers U-Net's self-attentions, {block: layer}."""
    return {block_of(site): unet.get_submodule(site) for site in self_attention_outputs(unet)}


def attach(unet: nn.Module, adapter: TimeAware, strength: float = 1.0) -> list[RemovableHandle]:
    """Attach a finished adapter to a diffusers U-Net."""
    return adapter.attach(outputs_of(unet), unet.get_submodule(TIME_EMBEDDING), strength)


def set_time_aware(unet: nn.Module, bias: float = SHUT) -> None:
    """Give a diffusers U-Net an adapter that learns. Replace its layers before, not after."""
    widths = {block: next(layer.parameters()).shape[1] for block, layer in outputs_of(unet).items()}
    time = unet.get_parameter(f"{TIME_EMBEDDING}.linear_2.weight").shape[0]
    adapter = TimeAware(widths, time, bias)
    attach(unet, adapter)
    unet.add_module(SITE, adapter)
