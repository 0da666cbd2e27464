"""Where a method may work: the layers of a diffusers U-Net by role. The one place that knows."""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from .errors import InputError

# role -> where it is, in diffusers' names
ROLES = {
    "self-attention": r"\.(attn1|attentions\.\d+)\.(to_q|to_k|to_v|to_out\.0)$",
    "cross-attention": r"\.attn2\.(to_q|to_k|to_v|to_out\.0)$",
    "feed-forward": r"\.ff\.net\.(0\.proj|2)$",
    "projection": r"\.attentions\.\d+\.proj_(in|out)$",
    "resnet": r"\.(resnets\.\d+\.(conv1|conv2|conv_shortcut)|(down|up)samplers\.0\.conv)$",
    "time": r"(^(time|add)_embedding\.linear_\d|\.time_emb_proj)$",  # add: SDXL's text and sizes
    "self-attention norm": r"\.(transformer_blocks\.\d+\.norm1|attentions\.\d+\.group_norm)$",
    "cross-attention norm": r"\.transformer_blocks\.\d+\.norm2$",
    "norm": r"(\.transformer_blocks\.\d+\.norm3|\.attentions\.\d+\.norm|\.resnets\.\d+\.norm\d"
    r"|^conv_norm_out)$",
    "door": r"^conv_(in|out)$",
}

TIME_EMBEDDING = "time_embedding"  # what tells every block the time

# what a user chooses from: layers with a matrix to change
PRESETS = {
    "attention": ("self-attention", "cross-attention"),
    "self-attention": ("self-attention",),
    "cross-attention": ("cross-attention",),
    "transformer": ("self-attention", "cross-attention", "feed-forward", "projection"),
    "all but cross-attention": ("self-attention", "feed-forward", "projection", "resnet", "time"),
    "all": (
        "self-attention",
        "cross-attention",
        "feed-forward",
        "projection",
        "resnet",
        "time",
    ),
}


def sites(unet: nn.Module, preset: str) -> list[str]:
    """List the layers of `unet` that belong to a preset, in module order.

    Raises InputError when the network has none.
    """
    found = layers_of(unet, PRESETS[preset])
    if not found:
        raise InputError("layers", f"is '{preset}', but this base has no such layers.")
    return found


def layers_of(unet: nn.Module, roles: Iterable[str]) -> list[str]:
    """List the layers that have one of the roles, in module order."""
    patterns = [re.compile(ROLES[role]) for role in roles]
    return [name for name, _ in unet.named_modules() if any(p.search(name) for p in patterns)]


def attentions(unet: nn.Module, role: str, half: str = "all") -> dict[str, Any]:
    """Return the attentions of a role by name, adapted or not, in module order.

    role: "self-attention" or "cross-attention". half: "all", or "decoder" for the half that
    leads to the output.
    """
    queries = [name for name in layers_of(unet, (role,)) if name.endswith(".to_q")]
    names = [name.removesuffix(".to_q") for name in queries]
    return {n: unet.get_submodule(n) for n in names if half == "all" or n.startswith("up_blocks.")}


def self_attention_outputs(unet: nn.Module) -> list[str]:
    """List the output projections of the self-attentions, in module order."""
    return [name for name in layers_of(unet, ["self-attention"]) if name.endswith(".to_out.0")]


def parameter_sites(unet: nn.Module) -> list[str]:
    """List every site of a plain network: `<layer>` is its weight, `<layer>.bias` its bias."""
    return [name.removesuffix(".weight") for name, _ in unet.named_parameters()]


def narrowest(unet: nn.Module, names: list[str]) -> int:
    """Return the smallest side of the named layers' weight matrices: the highest rank they have."""
    weights = [unet.get_parameter(f"{name}.weight") for name in names]
    return min(min(w.shape[0], w[0].numel()) for w in weights)
