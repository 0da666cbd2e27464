"""The three networks of the base, at the size and with the key names that ComfyUI expects."""

import json
import os
from pathlib import Path
from typing import NamedTuple, cast

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .token_table import VOCABULARY, text_table

FOLDER = Path(__file__).parent
TABLE_SEED, TABLE_STD = 20261121, 0.1  # of the token rows that no caption uses
SD15_LATENT_SCALE = 0.18215  # ComfyUI's latent format: U-Net latents = VAE latents * this

TEXT_CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 96,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
UNET_CONFIG = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": [96, 192],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 4,  # diffusers' name for the number of heads
    "cross_attention_dim": TEXT_CONFIG["hidden_size"],
}


# ------------------------------------------------------------------------------- VAE


def _conv(n_in: int, n_out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=bias)


class _Clamp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


class _Block(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(n, n), nn.ReLU(), _conv(n, n), nn.ReLU(), _conv(n, n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv(x) + x)


def _blocks(count: int) -> list[nn.Module]:
    return [_Block(64) for _ in range(count)]


def _upsampling(blocks: int) -> list[nn.Module]:
    return [nn.Upsample(scale_factor=2), _conv(64, 64, bias=False), *_blocks(blocks)]


class TinyVAE(nn.Module):
    """TAESD (MIT, Ollin Boer Bohan) in ComfyUI's key names; f8, 4 channels, no normalisation.

    Pixels are (N, 3, H, W) in [-1, 1]; latents (N, 4, H/8, W/8). Times `SD15_LATENT_SCALE` the
    latents have mean 0 and standard deviation 1 per channel, once `vae_scale` is set.
    """

    def __init__(self) -> None:
        super().__init__()
        down = [layer for _ in range(3) for layer in (_conv(64, 64, 2, False), *_blocks(3))]
        up = [layer for n in (3, 3, 1) for layer in _upsampling(n)]
        self.taesd_encoder = nn.Sequential(_conv(3, 64), *_blocks(1), *down, _conv(64, 4))
        self.taesd_decoder = nn.Sequential(
            _Clamp(), _conv(4, 64), nn.ReLU(), *_blocks(3), *up, _conv(64, 3)
        )
        self.vae_scale = nn.Parameter(torch.tensor(1.0), requires_grad=False)
        self.vae_shift = nn.Parameter(torch.tensor(0.0), requires_grad=False)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn pixels in [-1, 1] into latents."""
        return self.taesd_encoder(pixels * 0.5 + 0.5) / self.vae_scale + self.vae_shift

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Turn latents into pixels, about in [-1, 1]."""
        return self.taesd_decoder((latents - self.vae_shift) * self.vae_scale) * 2 - 1


# ------------------------------------------------------------------------------- U-Net


def new_unet(config: dict = UNET_CONFIG) -> UNet2DConditionModel:
    """Make an SD-1.x U-Net whose residual branches begin at zero, as LDM's own code does."""
    unet = cast(UNet2DConditionModel, UNet2DConditionModel.from_config(config))
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out")) or name == "conv_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


def noise_schedule() -> DDPMScheduler:
    """Return SD-1.x's schedule: 1000 steps, scaled-linear betas, eps-prediction."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )


# ------------------------------------------------------------------------------- text


def new_text_encoder(config: dict = TEXT_CONFIG) -> CLIPTextModel:
    """Make a small CLIP text encoder."""
    return CLIPTextModel(CLIPTextConfig(**config))


def tokenizer() -> CLIPTokenizer:
    """Load CLIP's tokenizer from a ComfyUI checkout ($COMFYUI_PATH)."""
    root = os.environ.get("COMFYUI_PATH")
    if not root:
        raise OSError(
            "COMFYUI_PATH is not set; point it at a ComfyUI checkout (for its tokenizer)."
        )
    return CLIPTokenizer.from_pretrained(Path(root) / "comfy" / "sd1_tokenizer")


def token_ids(tokens: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Turn captions into (N, 77) ids, padded with the end token as SD-1 does."""
    padded = tokens(captions, padding="max_length", max_length=77, truncation=True)
    return torch.tensor(padded.input_ids)


# ------------------------------------------------------------------------------- the file


class Base(NamedTuple):
    """The three networks and the tokenizer, ready to sample."""

    unet: UNet2DConditionModel
    text: CLIPTextModel
    vae: TinyVAE
    tokens: CLIPTokenizer

    def context(self, captions: list[str]) -> torch.Tensor:
        """Encode captions: (N, 77, D)."""
        return self.text(token_ids(self.tokens, captions)).last_hidden_state


def save_base(
    path: Path,
    unet: dict[str, torch.Tensor],
    text: dict[str, torch.Tensor],
    rows: tuple[torch.Tensor, torch.Tensor],
    vae: TinyVAE,
    facts: dict,
) -> None:
    """Write the base in half precision; `text` is a state dict without its token table.

    rows: trained table rows (K, D) and their token ids (K,). Keys: `unet.` + diffusers',
    `text.text_model.` + transformers', `text_rows`, `text_ids`, `vae.` + ComfyUI's TAESD.
    """
    tensors = {f"unet.{k}": v for k, v in unet.items()}
    tensors |= {f"text.text_model.{k}": v for k, v in text.items()}
    tensors |= {f"vae.{k}": v for k, v in vae.state_dict().items()}
    tensors = {k: v.detach().half().contiguous() for k, v in tensors.items()}
    tensors |= {"text_rows": rows[0].detach().half(), "text_ids": rows[1].int()}
    metadata = {
        "unet_config": json.dumps(UNET_CONFIG),
        "text_config": json.dumps(TEXT_CONFIG),
        "table_seed": str(TABLE_SEED),
        "table_std": str(TABLE_STD),
        "version": "1",
        "training": json.dumps(facts),
    }
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)


def load_base(path: Path = FOLDER / "base.safetensors") -> Base:
    """Load the base, rebuilding its token table."""
    tensors = {k: v if k == "text_ids" else v.float() for k, v in load_file(path).items()}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    unet, text = new_unet(json.loads(metadata["unet_config"])), new_text_encoder()
    seed, std = int(metadata["table_seed"]), float(metadata["table_std"])
    table = text_table(tensors["text_rows"], tensors["text_ids"], seed, std)
    unet.load_state_dict(part("unet."))
    text.load_state_dict(part("text.text_model.") | {"embeddings.token_embedding.weight": table})
    vae = TinyVAE()
    vae.load_state_dict(part("vae."))
    for module in (unet, text, vae):
        module.eval().requires_grad_(False)
    return Base(unet, text, vae, tokenizer())
