"""Make the small unconditional base: glyphs in white on black, 1x16x16 pixels, no text, no VAE.

    python -m demo.make_pixel_base --minutes 30

Letters and signs of Pillow's own font, and drawn figures: arcs, polygons, strokes, blots. No
digits. Every step is seeded by its number; a sitting that ends goes on from its last checkpoint.
Writes demo/pixel_base/ in the layout that diffusers' pipelines have, in half precision.
"""

import argparse
import copy
import math
import random
import time
from pathlib import Path
from typing import cast

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from PIL import Image, ImageDraw, ImageFont

from .checkpoint import resume_checkpoint, save_checkpoint

FOLDER = Path(__file__).parent / "pixel_base"
WORK = Path(__file__).parent / "work"
CHECKPOINT = WORK / "pixel_base_training.safetensors"
SIDE, DRAWN = 16, 64  # pixels of a picture, and of the canvas it is drawn on
SIGNS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "&@#%?!+*<>{}[]=~^$/"
FIGURES = ("arc", "ellipse", "polygon", "strokes", "blot")
PICTURES, STEPS, BATCH = 24_000, 2200, 64
PEAK_LR, WARM_UP, EMA = 1e-3, 100, 0.998
UNET = {
    "sample_size": SIDE,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [32, 64, 96],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 16,
}


# ------------------------------------------------------------------------------- pictures


def glyph(index: int) -> np.ndarray:
    """Draw picture number `index`: (16, 16) uint8, white on black."""
    rng = random.Random(f"glyph {index}")
    canvas = Image.new("L", (DRAWN, DRAWN), 0)
    draw = ImageDraw.Draw(canvas)
    if rng.random() < 0.6:
        draw_sign(draw, rng)
    else:
        draw_figure(draw, rng)
    warped = canvas.transform(
        canvas.size, Image.Transform.AFFINE, random_affine(rng), Image.Resampling.BICUBIC
    )
    return np.asarray(warped.reduce(DRAWN // SIDE))


def draw_sign(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    """Write one letter or sign in the middle, of any size and weight."""
    font = ImageFont.load_default(rng.uniform(40, 58))
    middle, width = (DRAWN / 2, DRAWN / 2), rng.choice((0, 0, 1, 2))
    draw.text(middle, rng.choice(SIGNS), 255, font, anchor="mm", stroke_width=width)


def draw_figure(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    """Draw an arc, an ellipse, a polygon, some strokes, or a filled blot."""
    kind, width = rng.choice(FIGURES), rng.randint(3, 9)
    box = (rng.uniform(6, 20), rng.uniform(6, 20), rng.uniform(42, 58), rng.uniform(42, 58))
    if kind == "arc":
        start = rng.uniform(0, 360)
        draw.arc(box, start, start + rng.uniform(120, 300), 255, width)
    elif kind == "ellipse":
        draw.ellipse(box, outline=255, width=width)
    elif kind == "polygon":
        circle = (DRAWN / 2, DRAWN / 2, rng.uniform(16, 28))
        draw.regular_polygon(circle, rng.randint(3, 6), rng.uniform(0, 90), None, 255, width)
    elif kind == "strokes":
        draw.line(corners(rng, rng.randint(2, 5)), 255, width, joint="curve")
    else:
        draw.polygon(corners(rng, rng.randint(3, 6)), 255)


def corners(rng: random.Random, count: int) -> list[tuple[float, float]]:
    """Return points of the canvas, away from its edge."""
    return [(rng.uniform(10, 54), rng.uniform(10, 54)) for _ in range(count)]


def random_affine(rng: random.Random) -> tuple[float, ...]:
    """Return Pillow's six numbers: rotation to 20 degrees, shear .3, scale .8-1.25, a shift."""
    turn, shear = math.radians(rng.uniform(-20, 20)), rng.uniform(-0.3, 0.3)
    scale = rng.uniform(0.8, 1.25)
    a, b = math.cos(turn) / scale, (math.sin(turn) + shear) / scale
    d, e = -math.sin(turn) / scale, math.cos(turn) / scale
    x, y = DRAWN / 2 + rng.uniform(-5, 5), DRAWN / 2 + rng.uniform(-5, 5)
    return (a, b, DRAWN / 2 - a * x - b * y, d, e, DRAWN / 2 - d * x - e * y)


def pictures(first: int, count: int) -> torch.Tensor:
    """Draw pictures `first`, `first` + 1, ...: (count, 1, 16, 16) in [-1, 1]."""
    drawn = np.stack([glyph(index) for index in range(first, first + count)])
    return torch.from_numpy(drawn)[:, None].float() / 127.5 - 1


# ------------------------------------------------------------------------------- training


def new_unet() -> UNet2DModel:
    """Make the network, seeded; its residual branches begin at zero."""
    torch.manual_seed(0)
    unet = cast(UNet2DModel, UNet2DModel.from_config(UNET))
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "to_out.0")) or name == "conv_out":
            torch.nn.init.zeros_(module.weight)  # pyright: ignore
    return unet


def new_schedule() -> DDPMScheduler:
    """Return the cosine schedule of Nichol and Dhariwal (2021), eps-prediction, T = 1000."""
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2")


def learning_rate(step: int, steps: int) -> float:
    """Warm up, then decay along a cosine."""
    decay = 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))
    return PEAK_LR * min(1, (step + 1) / WARM_UP) * (0.02 + 0.98 * decay)


def denoising_loss(
    unet: UNet2DModel, pool: torch.Tensor, schedule: DDPMScheduler, step: int
) -> torch.Tensor:
    """Return the eps-loss of one seeded batch, at stratified timesteps."""
    torch.manual_seed(step + 1)
    clean = pool[torch.randint(len(pool), (BATCH,))]
    share = (torch.randperm(BATCH) + torch.rand(BATCH)) / BATCH
    timesteps = (share * len(schedule.alphas_cumprod)).long()
    eps = torch.randn_like(clean)
    noisy = schedule.add_noise(clean, eps, timesteps)  # pyright: ignore
    return (unet(noisy, timesteps).sample - eps).square().mean()


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, step: int) -> None:
    """Move the averaged weights towards the model's."""
    rate = 1 - min(EMA, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), rate)


def train(steps: int, minutes: float) -> None:
    """Train for at most `minutes`, from the last checkpoint on; write base and samples."""
    pool, schedule = pictures(0, PICTURES), new_schedule()
    unet = new_unet()
    average = copy.deepcopy(unet).eval().requires_grad_(False)
    optimiser = torch.optim.AdamW(unet.parameters(), PEAK_LR, weight_decay=0.01, fused=True)
    modules = {"model": unet, "average": average}
    facts: dict = {"seconds": 0.0} | resume_checkpoint(CHECKPOINT, modules, optimiser)
    started, before, smooth = time.monotonic(), facts["seconds"], 1.0
    for step in range(facts["step"], steps):
        loss = denoising_loss(unet, pool, schedule, step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimiser.step()
        update_average(average, unet, step)
        smooth += 0.02 * (loss.item() - smooth)
        passed = time.monotonic() - started
        facts |= {"step": step + 1, "seconds": before + passed, "loss": smooth}
        last = step + 1 == steps or passed > minutes * 60
        if last or step % 250 == 249:
            print(f"pixel base {step + 1} {facts['seconds']:.0f} s {smooth:.4f}", flush=True)
            save_checkpoint(CHECKPOINT, modules, optimiser, facts)
            export(average, schedule)
        if last:
            return


def export(average: UNet2DModel, schedule: DDPMScheduler) -> None:
    """Write the averaged weights as the base, and a sheet of samples to look at."""
    copy.deepcopy(average).half().save_pretrained(FOLDER / "unet")
    schedule.save_pretrained(FOLDER / "scheduler")
    torch.manual_seed(0)
    sampler = cast(DDIMScheduler, DDIMScheduler.from_config(schedule.config))
    sampler.set_timesteps(25)
    with torch.no_grad():
        noisy = torch.randn(64, 1, SIDE, SIDE)
        for t in sampler.timesteps:
            noisy = sampler.step(average(noisy, t).sample, t, noisy).prev_sample  # pyright: ignore
    save_sheet(noisy, WORK / "pixel_base.png")
    save_sheet(pictures(0, 64), WORK / "pixel_source.png")


def save_sheet(pixels: torch.Tensor, path: Path, columns: int = 16, scale: int = 4) -> None:
    """Write pictures (N, 1, h, w) in [-1, 1] side by side."""
    grey = ((pixels[:, 0].clamp(-1, 1) + 1) * 127.5).round().byte()
    rows = [torch.cat(list(row), 1) for row in grey.split(columns)]
    sheet = Image.fromarray(torch.cat(rows).numpy())
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(path)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, default=60, help="longest sitting")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    WORK.mkdir(exist_ok=True)
    train(arguments.steps, arguments.minutes)


if __name__ == "__main__":
    main()
