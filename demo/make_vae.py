"""Train the base's autoencoder on fresh renders: `python -m demo.make_vae [--minutes M]`.

Two phases. First encoder and decoder together; three latent channels are drawn towards a blurred
copy of the picture, which makes colour appear early and the latents easy to model. Then the encoder
is frozen with its latents centred and scaled per channel, and the decoder alone learns to read
those.
"""

import argparse
import math
import random
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from . import world
from .base_model import SD15_LATENT_SCALE, TinyVAE
from .checkpoint import resume_checkpoint, save_checkpoint

WORK = Path(__file__).parent / "work"
PICTURES = 24_576
JOINT_STEPS, DECODER_STEPS = 2346, 800
JOINT_DECAY = 3800  # the joint phase stops before its cosine ends
PULL_STEPS = 960  # while three channels are drawn strongly to the blurred picture
BATCH, PEAK_LR, LATENT_NOISE = 16, 1.5e-3, 0.05


def training_scene(index: int) -> world.Scene:
    """Return what picture `index` of the training set shows."""
    return world.random_scene(random.Random(f"scene {index}"))


def _training_picture(size: int, index: int) -> np.ndarray:
    return world.render_scene(training_scene(index), random.Random(f"pose {index} {size}"), size)


def training_pictures(size: int) -> np.ndarray:
    """Return the cached training set, (PICTURES, size, size, 3) uint8, drawing it if need be."""
    path = WORK / f"pictures_{size}.npy"
    if not path.exists():
        WORK.mkdir(exist_ok=True)
        pictures = np.empty((PICTURES, size, size, 3), np.uint8)
        with ProcessPoolExecutor(2) as pool:
            drawn = pool.map(partial(_training_picture, size), range(PICTURES), chunksize=256)
            for index, picture in enumerate(drawn):
                pictures[index] = picture
        np.save(path, pictures)
    return np.load(path, mmap_mode="r")


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """Turn (N, H, W, 3) uint8 into (N, 3, H, W) float in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def held_out_pictures(kind: str, count: int = 48, size: int = 128) -> torch.Tensor:
    """Draw pictures outside the training set: "sprite", or "totem" with unseen subjects."""
    pictures = []
    for i in range(count):
        rng = random.Random(f"held-out {kind} {i}")
        scene: world.Scene = world.random_sprite(rng)
        if kind == "totem":
            scene = world.Portrait(world.subject(100 + i), rng.choice(world.BACKGROUNDS))
        pictures.append(world.render_scene(scene, rng, size))
    return to_pixels(np.stack(pictures))


def psnr(vae: TinyVAE, pixels: torch.Tensor) -> float:
    """Return the mean PSNR in dB of a round trip."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        back = vae.decode(vae.encode(pixels)).float().clamp(-1, 1)
    return (10 * torch.log10(4 / (back - pixels).square().mean((1, 2, 3)))).mean().item()


def draw_batch(large: np.ndarray, small: np.ndarray, step: int) -> torch.Tensor:
    """Return (BATCH, 3, 64, 64) pixels: a quarter whole 64-px pictures, the rest 64-px crops."""
    rng = np.random.default_rng(step)
    whole = small[np.sort(rng.integers(0, len(small), BATCH // 4))]
    y, x = rng.integers(0, 9, 2) * 8
    crops = large[np.sort(rng.integers(0, len(large), BATCH - len(whole))), y : y + 64, x : x + 64]
    return to_pixels(np.concatenate([whole, crops])).to(memory_format=torch.channels_last)


def joint_loss(vae: TinyVAE, pixels: torch.Tensor, step: int) -> torch.Tensor:
    """Return reconstruction + prior + the fading pull of three channels to the blurred picture."""
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(pixels)
        back = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents))
    latents, back = latents.float(), back.float()
    blurred = 1.5 * (F.avg_pool2d(pixels, 8) - 0.2)
    pull = max(0.05, 1 - step / PULL_STEPS) * F.mse_loss(latents[:, :3], blurred)
    return reconstruction_loss(back, pixels) + 5e-4 * latents.square().mean() + pull


def decoder_loss(vae: TinyVAE, pixels: torch.Tensor) -> torch.Tensor:
    """Return the reconstruction error of the decoder alone."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            latents = vae.encode(pixels)
        noise = LATENT_NOISE * torch.randn_like(latents) / SD15_LATENT_SCALE
        back = vae.decode(latents + noise)
    return reconstruction_loss(back.float(), pixels)


def reconstruction_loss(back: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return 2 MSE + L1."""
    return 2 * F.mse_loss(back, pixels) + F.l1_loss(back, pixels)


@torch.no_grad()
def encode_pictures(vae: TinyVAE, pictures: np.ndarray, batch: int = 64) -> torch.Tensor:
    """Return U-Net latents (N, 4, H/8, W/8) of (N, H, W, 3) uint8 pictures."""
    latents = []
    for i in range(0, len(pictures), batch):
        pixels = to_pixels(pictures[i : i + batch]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encode(pixels).float() * SD15_LATENT_SCALE)
    return torch.cat(latents)


@torch.no_grad()
def standardise(vae: TinyVAE, pictures: np.ndarray) -> None:
    """Fold centring and scaling into the last encoder and the first decoder convolution."""
    latents = encode_pictures(vae, pictures) / SD15_LATENT_SCALE
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    last, first = vae.taesd_encoder[-1], vae.taesd_decoder[1]
    last.weight.div_(std[:, None, None, None])
    last.bias.sub_(mean).div_(std)
    first.bias.add_((first.weight * mean[:, None, None]).sum((1, 2, 3)))
    first.weight.mul_(std[:, None, None])
    vae.vae_scale.fill_(SD15_LATENT_SCALE)


def learning_rate(step: int) -> float:
    """Warm up over 100 steps and decay along a cosine; the decoder's phase has its own."""
    if step < JOINT_STEPS:
        return PEAK_LR * min(1, (step + 1) / 100) * _cosine(step / JOINT_DECAY)
    return 0.4 * PEAK_LR * _cosine((step - JOINT_STEPS) / DECODER_STEPS)


def _cosine(progress: float) -> float:
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def train(minutes: float) -> None:
    """Train for at most `minutes`, from the last checkpoint on."""
    large, small = training_pictures(128), training_pictures(64)
    torch.manual_seed(0)
    vae = TinyVAE().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(vae.parameters(), PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-4)
    facts: dict = {"seconds": 0.0} | resume_checkpoint(
        WORK / "vae.safetensors", {"vae": vae}, optimiser
    )
    held_out = {kind: held_out_pictures(kind) for kind in ("sprite", "totem")}
    started = saved = time.monotonic()
    before, total = facts["seconds"], JOINT_STEPS + DECODER_STEPS
    for step in range(facts["step"], total):
        torch.manual_seed(step)
        if step == JOINT_STEPS:
            standardise(vae, large[:512])
        pixels = draw_batch(large, small, step)
        loss = joint_loss(vae, pixels, step) if step < JOINT_STEPS else decoder_loss(vae, pixels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step)
        optimiser.step()
        now = time.monotonic()
        facts |= {"step": step + 1, "seconds": before + now - started}
        last = step + 1 == total or now - started > minutes * 60
        if step % 100 == 99:
            print(f"vae {step + 1} {facts['seconds']:.0f} s loss {loss.item():.4f}", flush=True)
        if last or now - saved > 200:
            facts |= {f"psnr_{kind}": round(psnr(vae, p), 2) for kind, p in held_out.items()}
            print("vae", facts, flush=True)
            save_checkpoint(WORK / "vae.safetensors", {"vae": vae}, optimiser, facts)
            saved = time.monotonic()
        if last:
            return


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="longest sitting")
    train(parser.parse_args().minutes)


if __name__ == "__main__":
    main()
