"""Sample the base and read its samples: `python -m demo.evaluate_base [--prompts N] [--sheet]`."""

import argparse
import json
import math
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from . import world
from .base_model import FOLDER, SD15_LATENT_SCALE, Base, load_base, noise_schedule
from .judges import AttributeReader


@torch.no_grad()
def sample_latents(
    base: Base,
    captions: list[str],
    cfg: float = 4.0,
    steps: int = 25,
    seed: int = 0,
    size: int = 128,
) -> torch.Tensor:
    """Sample U-Net latents (N, 4, size/8, size/8) with DDIM and classifier-free guidance."""
    alphas = noise_schedule().alphas_cumprod
    times = torch.linspace(999, 0, steps + 1).round().long()
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(len(captions), 4, size // 8, size // 8, generator=generator)
    context = torch.cat([base.context(captions), base.context([""]).expand(len(captions), -1, -1)])
    for now, then in pairwise(times):
        with torch.autocast("cpu", torch.bfloat16):
            eps = base.unet(torch.cat([z, z]), now, context).sample.float()
        with_text, without = eps.chunk(2)
        eps = without + cfg * (with_text - without)
        # DDIM, eta 0 (Song et al. 2021, eq. 12); the last step lands on the clean picture
        a_now, a_then = alphas[now], alphas[then] if then > 0 else torch.tensor(1.0)
        clean = (z - (1 - a_now).sqrt() * eps) / a_now.sqrt()
        z = a_then.sqrt() * clean + (1 - a_then).sqrt() * eps
    return z


def sample(base: Base, captions: list[str], batch: int = 50, **settings) -> torch.Tensor:
    """Sample pictures (N, H, W, 3) in [0, 1]; batch `i` is seeded with `i`."""
    pictures = []
    for i in range(0, len(captions), batch):
        z = sample_latents(base, captions[i : i + batch], seed=i, **settings)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            pictures.append(base.vae.decode(z / SD15_LATENT_SCALE).float())
    return (torch.cat(pictures).clamp(-1, 1) / 2 + 0.5).movedim(1, -1)


def fresh_prompts(count: int, seed: int = 0) -> list[str]:
    """Return full prompts: every attribute is named."""
    prompts = []
    for i in range(count):
        rng = random.Random(f"prompt {seed} {i}")
        prompts.append(world.caption_sprite(world.random_sprite(rng)))
    return prompts


def accuracies(images: torch.Tensor, prompts: list[str]) -> dict[str, float]:
    """Return the share of pictures that show what was prompted, per attribute."""
    read = AttributeReader.load().follows(images, prompts)
    return {k: round(v.nanmean().item(), 3) for k, v in read.items() if not v.isnan().all()}


def interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share of `count`."""
    z2 = 1.96**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = 1.96 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return round(middle - half, 3), round(middle + half, 3)


def note_accuracies(path: Path, read: dict[str, dict]) -> None:
    """Write how well the base's samples were read into the metadata of its file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    facts = {k: v for k, v in json.loads(metadata["training"]).items() if "read" not in k}
    metadata["training"] = json.dumps(facts | {"read": read})
    save_file(load_file(path), path, metadata)


def contact_sheet(images: torch.Tensor, captions: list[str], path: Path, columns: int = 6) -> None:
    """Write pictures (N, H, W, 3) in [0, 1] with their captions underneath."""
    images = images.repeat_interleave(zoom := max(1, 128 // images.shape[1]), 1)
    images = images.repeat_interleave(zoom, 2)
    size, text, gap = images.shape[1], 38, 8
    rows = math.ceil(len(images) / columns)
    cell_x, cell_y = size + gap, size + text + gap
    sheet = Image.new("RGB", (columns * cell_x + gap, rows * cell_y + gap), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + i % columns * cell_x, gap + i // columns * cell_y
        sheet.paste(Image.fromarray((image.numpy() * 255).round().astype(np.uint8)), (x, y))
        draw.multiline_text((x, y + size + 2), _wrapped(caption), (40, 40, 40), font, spacing=1)
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def _wrapped(caption: str, width: int = 25) -> str:
    lines = [""]
    for word in caption.split():
        if len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, sample and read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--base", type=Path, default=FOLDER / "base.safetensors")
    parser.add_argument("--sheet", type=Path, help="also write the first 36 as a picture")
    parser.add_argument("--note", action="store_true", help="write the result into the base's file")
    arguments = parser.parse_args()
    prompts = fresh_prompts(arguments.prompts, arguments.seed)
    settings = {"cfg": arguments.cfg, "steps": arguments.steps, "size": arguments.size}
    images = sample(load_base(arguments.base), prompts, **settings)
    read = AttributeReader.load().follows(images, prompts)
    rows = {}
    for name, right in read.items():
        if count := int((~right.isnan()).sum()):
            share = right.nanmean().item()
            rows[name] = {"share": round(share, 3), "n": count, "interval": interval(share, count)}
            print(name, json.dumps(rows[name]), flush=True)
    if arguments.note:
        note_accuracies(arguments.base, rows)
    if arguments.sheet:
        contact_sheet(images[:36], prompts[:36], arguments.sheet)


if __name__ == "__main__":
    main()
