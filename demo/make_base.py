"""Train the base's text encoder and U-Net: `torchrun --nproc-per-node 2 -m demo.make_base`.

One process per core (or `python -m demo.make_base` for one alone): gradients are averaged once per
step, which wastes less than threads that meet after every operation.

Needs the autoencoder (`demo.make_vae`) and the attribute reader (`demo.make_judges attributes`).
Every step draws its randomness from its own number, so a run that is stopped and resumed is the
same run. Writes demo/base.safetensors from the averaged weights.
"""

import argparse
import copy
import math
import os
import random
import time
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import CLIPTokenizer

from . import world
from .base_model import (
    FOLDER,
    TABLE_SEED,
    TABLE_STD,
    TEXT_CONFIG,
    Base,
    TinyVAE,
    new_text_encoder,
    new_unet,
    noise_schedule,
    save_base,
    token_ids,
    tokenizer,
)
from .checkpoint import resume_checkpoint, save_checkpoint
from .evaluate_base import accuracies, contact_sheet, fresh_prompts, sample
from .judges import ATTRIBUTES
from .make_judges import PARTS, attribute_targets, part_targets
from .make_vae import PICTURES, WORK, encode_pictures, training_pictures, training_scene
from .token_table import text_table

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
STEPS = 5000
SMALL_ONLY, SMALL_AFTER = (
    0.25,
    0.25,
)  # share of steps with 64-px pictures alone; share of them after
BATCH = {64: 48, 128: 24}  # over all processes
LATENTS, FIRST_SCENE = 12_288, {64: 0, 128: 12_288}  # other scenes at each size
PEAK_LR, WARM_UP, EMA, EMA_EVERY = 1e-3, 150, 0.999, 4
OFFSET_NOISE, EMPTY_CAPTIONS, LARGEST_WEIGHT = 0.2, 0.1, 25.0
TEXT_STEPS, TEXT_BATCH, TEXT_LENGTH = 300, 48, 36
CHECKPOINT = WORK / "base_training.safetensors"


class SparseTable(nn.Module):
    """A token table of which only some rows are trained; the others are `text_table`'s noise."""

    ids: torch.Tensor
    table: torch.Tensor
    slots: torch.Tensor

    def __init__(self, ids: torch.Tensor) -> None:
        super().__init__()
        width = TEXT_CONFIG["hidden_size"]
        self.rows = nn.Parameter(torch.randn(len(ids), width) * TABLE_STD)
        table = text_table(self.rows.detach(), ids, TABLE_SEED, TABLE_STD)
        slots = torch.full((len(table),), -1)
        slots[ids] = torch.arange(len(ids))
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("slots", slots, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look ids (N, L) up: (N, L, D)."""
        slots = self.slots[ids]
        trained = F.embedding(slots.clamp_min(0), self.rows)
        return torch.where((slots >= 0)[..., None], trained, F.embedding(ids, self.table))


class Denoiser(nn.Module):
    """Text encoder and U-Net, trained together."""

    def __init__(self, tokens: CLIPTokenizer) -> None:
        super().__init__()
        words = tokens(world.vocabulary()).input_ids
        ids = torch.tensor(sorted({i for word in words for i in word}))
        self.text, self.unet = new_text_encoder(), new_unet()
        self.text.embeddings.add_module("token_embedding", SparseTable(ids))

    @property
    def table(self) -> SparseTable:
        """The token table of the text encoder."""
        return cast(SparseTable, self.text.get_submodule("embeddings.token_embedding"))

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """Predict eps from noisy latents (B, 4, h, w), timesteps (B,) and token ids (B, 77)."""
        context = self.text(ids).last_hidden_state
        return self.unet(latents, timesteps, context).sample


# ------------------------------------------------------------------------------- data


def latent_cache(vae: TinyVAE, size: int) -> torch.Tensor:
    """Return latents (LATENTS, 4, size/8, size/8) float16 of pictures FIRST_SCENE[size], ...

    Each process encodes its share.
    """
    share = LATENTS // RANKS
    paths = [WORK / f"latents_{size}_{rank}_of_{RANKS}.safetensors" for rank in range(RANKS)]
    if not paths[RANK].exists():
        start = FIRST_SCENE[size] + RANK * share
        latents = encode_pictures(vae, training_pictures(size)[start : start + share])
        latents = latents.half().contiguous(memory_format=torch.contiguous_format)
        mean, std = latents.float().mean((0, 2, 3)), latents.float().std((0, 2, 3))
        print(f"latents {size}: mean {mean.tolist()} std {std.tolist()}", flush=True)
        save_file({"latents": latents}, paths[RANK])
    if RANKS > 1:
        dist.barrier()
    return torch.cat([load_file(path)["latents"] for path in paths])


def picture_size(step: int) -> int:
    """Return the size of a step's pictures: 64 px at first, then mostly 128 px."""
    small_share = 1.0 if step < SMALL_ONLY else SMALL_AFTER
    return 64 if random.Random(f"size {step}").random() < small_share else 128


def draw_batch(
    caches: dict[int, torch.Tensor], tokens: CLIPTokenizer, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this process's share of a step: latents (B, 4, h, w), fresh token ids (B, 77)."""
    rng, size = random.Random(f"batch {step}"), picture_size(step)
    rows = [rng.randrange(LATENTS) for _ in range(BATCH[size])]
    scenes = [training_scene(FIRST_SCENE[size] + row) for row in rows]
    captions = [world.caption_scene(scene, rng) for scene in scenes]
    captions = ["" if rng.random() < EMPTY_CAPTIONS else caption for caption in captions]
    rows, captions = rows[RANK::RANKS], captions[RANK::RANKS]
    return caches[size][rows].float(), token_ids(tokens, captions)


# ------------------------------------------------------------------------------- text


def pretrain_text(model: Denoiser, tokens: CLIPTokenizer) -> None:
    """Teach the text encoder to say, at every position after the caption, what is in the scene."""
    choices = [*ATTRIBUTES.values(), *PARTS.values()]
    heads = nn.ModuleList([nn.Linear(TEXT_CONFIG["hidden_size"], len(c)) for c in choices])
    modules = nn.ModuleList([model.text, heads])
    optimiser = torch.optim.AdamW(modules.parameters(), 2e-3, betas=(0.9, 0.99))
    for step in range(TEXT_STEPS):
        torch.manual_seed(step)
        rng = random.Random(f"text {step}")
        scenes = [training_scene(rng.randrange(PICTURES)) for _ in range(TEXT_BATCH)]
        targets = torch.tensor([scene_targets(scene) for scene in scenes])
        ids = token_ids(tokens, [world.caption_scene(scene, rng) for scene in scenes])
        ids = ids[:, :TEXT_LENGTH]  # attention is causal: a prefix needs no more
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.text(ids).last_hidden_state
        ends = (ids == TEXT_CONFIG["eos_token_id"]).int().argmax(1)
        positions = ends + (torch.rand(len(ends)) * (TEXT_LENGTH - ends)).long()
        summary = hidden[torch.arange(len(ends)), positions].float()
        losses = [
            F.cross_entropy(head(summary), targets[:, i], ignore_index=-100)
            for i, head in enumerate(heads)
        ]
        optimiser.zero_grad(set_to_none=True)
        loss = torch.stack(losses).sum()
        loss.backward()
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - 0.9 * step / TEXT_STEPS)
        optimiser.step()
        if step % 50 == 49:
            print(f"text {step + 1} loss {loss.item():.3f}", flush=True)


def scene_targets(scene: world.Scene) -> list[int]:
    """Return the class of every attribute and part, -100 where a scene has none."""
    if isinstance(scene, world.Portrait):
        return attribute_targets(scene) + part_targets(scene.subject)
    return attribute_targets(scene) + [-100] * len(PARTS)


# ------------------------------------------------------------------------------- training


def loss_weights(alphas: torch.Tensor) -> torch.Tensor:
    """Weight eps-errors as v-prediction would, 1 / abar, bounded, with mean 1 over timesteps.

    An eps-error is sqrt(abar / (1 - abar)) of an x0-error: unweighted, the high timesteps, where
    the prompt alone decides what appears, would hardly count.
    """
    weights = (1 / alphas).clamp(max=LARGEST_WEIGHT)
    return weights / weights.mean()


def denoising_loss(
    model: nn.Module, latents: torch.Tensor, ids: torch.Tensor, alphas: torch.Tensor
) -> torch.Tensor:
    """Return the weighted eps-loss at stratified timesteps, with offset noise."""
    n = len(latents)
    timesteps = ((torch.randperm(n) + torch.rand(n)) * (len(alphas) / n)).long()
    eps = torch.randn_like(latents) + OFFSET_NOISE * torch.randn(n, latents.shape[1], 1, 1)
    a = alphas[timesteps][:, None, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        predicted = model(a.sqrt() * latents + (1 - a).sqrt() * eps, timesteps, ids)
    errors = (predicted.float() - eps).square().mean((1, 2, 3))
    return (loss_weights(alphas)[timesteps] * errors).mean()


def learning_rate(step: int, steps: int) -> float:
    """Warm up, then decay along a cosine."""
    decay = 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))
    return PEAK_LR * min(1, (step + 1) / WARM_UP) * (0.01 + 0.99 * decay)


def average_gradients(model: nn.Module) -> None:
    """Replace every gradient by its mean over the processes."""
    if RANKS == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = parameters_to_vector(gradients)
    dist.all_reduce(flat)
    vector_to_parameters(flat / RANKS, gradients)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """Move the averaged weights towards the model's, every EMA_EVERY steps."""
    if step % EMA_EVERY:
        return
    rate = 1 - min(EMA, (step + 1) / (step + 20)) ** EMA_EVERY
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), rate)


def load_vae() -> TinyVAE:
    """Load what `demo.make_vae` trained."""
    vae = TinyVAE().to(memory_format=torch.channels_last)
    if not resume_checkpoint(WORK / "vae.safetensors", {"vae": vae})["step"]:
        raise FileNotFoundError("make_base: no autoencoder yet; run `python -m demo.make_vae`.")
    return vae.eval().requires_grad_(False)


def agreed(decision: bool) -> bool:
    """Return process 0's decision in every process."""
    if RANKS == 1:
        return decision
    flag = torch.tensor([float(decision)])
    dist.broadcast(flag, 0)
    return bool(flag.item())


def export(average: Denoiser, vae: TinyVAE, facts: dict, path: Path) -> None:
    """Write the averaged weights as the base."""
    table = average.table
    text = {k: v for k, v in average.text.state_dict().items() if "token_embedding" not in k}
    save_base(path, average.unet.state_dict(), text, (table.rows, table.ids), vae, facts)


def evaluate(base: Base, facts: dict, count: int) -> None:
    """Print and note how well the base follows prompts; write a sheet of samples."""
    torch.set_num_threads(RANKS)
    prompts = fresh_prompts(count)
    for size in (64, 128):
        images = sample(base, prompts, size=size)
        facts[f"read_{size}"] = accuracies(images, prompts)
        contact_sheet(images[:36], prompts[:36], WORK / f"base_{size}.png", columns=9)
    print("evaluation", facts, flush=True)
    torch.set_num_threads(1 if RANKS > 1 else 2)


def train(steps: int, minutes: float, evaluate_every: float) -> None:
    """Train for at most `minutes`, from the last checkpoint on."""
    vae, tokens = load_vae(), tokenizer()
    caches = {size: latent_cache(vae, size) for size in BATCH}
    torch.manual_seed(0)
    model = Denoiser(tokens)
    model.unet.set_attn_processor(AttnProcessor())  # on CPUs, plain attention trains faster here
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimiser = torch.optim.AdamW(
        model.parameters(), PEAK_LR, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    modules = {"model": model, "average": average}
    facts: dict = {"seconds": 0.0, "pictures": 0} | resume_checkpoint(
        CHECKPOINT, modules, optimiser
    )
    if facts["step"] == 0:
        pretrain_text(model, tokens)
        average.load_state_dict(model.state_dict())
    base = Base(average.unet, average.text, vae, tokens)
    alphas = noise_schedule().alphas_cumprod
    started = saved = evaluated = time.monotonic()
    before, smooth = facts["seconds"], {}
    for step in range(facts["step"], steps):
        torch.manual_seed(step * RANKS + RANK)
        latents, ids = draw_batch(caches, tokens, step)
        loss = denoising_loss(model, latents, ids, alphas)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimiser.step()
        update_average(average, model, step)

        now, size = time.monotonic(), latents.shape[-1] * 8
        smooth[size] = 0.98 * smooth.get(size, loss.item()) + 0.02 * loss.item()
        facts |= {"step": step + 1, "seconds": before + now - started}
        facts["pictures"] += len(latents) * RANKS
        last = agreed(step + 1 == steps or now - started > minutes * 60)
        if RANK == 0 and step % 100 == 99:
            losses = {k: round(v, 4) for k, v in smooth.items()}
            print(f"base {step + 1} {facts['seconds']:.0f} s loss {losses}", flush=True)
        if RANK == 0 and (last or now - saved > 300):
            save_checkpoint(CHECKPOINT, modules, optimiser, facts)
            saved = time.monotonic()
        if RANK == 0 and (last or now - evaluated > evaluate_every * 60):
            evaluate(base, facts, 200 if last else 60)
            export(average, vae, facts, FOLDER / "base.safetensors")
            evaluated = time.monotonic()
        if last:
            return


def main() -> None:
    """Parse the command line; train, or only export the last checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="more than before: go on training")
    parser.add_argument("--minutes", type=float, default=480, help="longest sitting")
    parser.add_argument("--evaluate-every", type=float, default=15, help="minutes")
    parser.add_argument("--export", action="store_true", help="write the last checkpoint and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(1 if RANKS > 1 else 2)
    if RANKS > 1:
        dist.init_process_group("gloo")
    if not arguments.export:
        return train(arguments.steps, arguments.minutes, arguments.evaluate_every)
    model, average = (Denoiser(tokenizer()) for _ in range(2))
    facts = resume_checkpoint(CHECKPOINT, {"model": model, "average": average})
    export(average, load_vae(), facts, FOLDER / "base.safetensors")


if __name__ == "__main__":
    main()
