"""Where a method may work: the layers of a diffusers U-Net by role. The one place that knows."""

import re

from torch import nn

from .errors import InputError

# role -> where it is, in diffusers' names
ROLES = {
    "self-attention": r"\.attn1\.(to_q|to_k|to_v|to_out\.0)$",
    "cross-attention": r"\.attn2\.(to_q|to_k|to_v|to_out\.0)$",
    "feed-forward": r"\.ff\.net\.(0\.proj|2)$",
    "projection": r"\.attentions\.\d+\.proj_(in|out)$",
    "resnet": r"\.(resnets\.\d+\.(conv1|conv2|conv_shortcut)|(down|up)samplers\.0\.conv)$",
    "time": r"(^time_embedding\.linear_\d|\.time_emb_proj)$",
}

# what a user chooses from
PRESETS = {
    "attention": ("self-attention", "cross-attention"),
    "self-attention": ("self-attention",),
    "cross-attention": ("cross-attention",),
    "transformer": ("self-attention", "cross-attention", "feed-forward", "projection"),
    "all but cross-attention": ("self-attention", "feed-forward", "projection", "resnet", "time"),
    "all": tuple(ROLES),
}


def sites(unet: nn.Module, preset: str) -> list[str]:
    """List the Linear and Conv2d layers of `unet` that belong to a preset, in module order.

    Raises InputError when the network has none.
    """
    roles = [re.compile(ROLES[role]) for role in PRESETS[preset]]
    found = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and any(r.search(name) for r in roles)
    ]
    if not found:
        raise InputError("layers", f"is '{preset}', but this base has no such layers.")
    return found


def narrowest(unet: nn.Module, names: list[str]) -> int:
    """Return the smallest side of the named layers' weight matrices: the highest rank they have."""
    weights = [unet.get_parameter(f"{name}.weight") for name in names]
    return min(min(w.shape[0], w[0].numel()) for w in weights)
