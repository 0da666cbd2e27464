"""Train the two judges on fresh renders: `python -m demo.make_judges attributes|subject`.

Neither sees the base or a shipped subject. Blur and noise stand in for what an autoencoder does.
"""

import argparse
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import world
from .judges import ATTRIBUTES, JUDGED_SIZE, AttributeReader, SubjectJudge
from .make_vae import PICTURES, WORK, to_pixels, training_pictures, training_scene

BATCH, PEAK_LR = 128, 3e-3
FAMILIES, COUSINS, POSES = 600, 4, 12  # subjects to learn from: FAMILIES * COUSINS
PARTS: dict[str, tuple[str, ...]] = {
    "body": world.BODIES,
    "body_colour": tuple(world.COLOURS),
    "body_pattern": world.PATTERNS,
    "head": world.HEADS,
    "head_colour": tuple(world.COLOURS),
    "ears": world.EARS,
    "ears_colour": tuple(world.COLOURS),
    "mark": world.MARKS,
    "mark_colour": tuple(world.COLOURS),
    "arms": tuple(world.ARMS),
}


def roughened(pixels: torch.Tensor) -> torch.Tensor:
    """Blur, fade and add noise at random; pixels (N, 3, 64, 64) in [-1, 1]."""
    n = len(pixels)
    size = int(torch.randint(28, 64, ()).item())
    blurred = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    blurred = F.interpolate(blurred, pixels.shape[-2:], mode="bilinear")
    share = torch.rand(n, 1, 1, 1)
    mixed = share * blurred + (1 - share) * pixels
    contrast = 1 + 0.1 * torch.randn(n, 3, 1, 1)
    noise = 0.1 * torch.rand(n, 1, 1, 1) * torch.randn_like(mixed)
    return mixed * contrast + 0.05 * torch.randn(n, 3, 1, 1) + noise


def shifted(pixels: torch.Tensor, amount: int = 3) -> torch.Tensor:
    """Move a batch by up to `amount` pixels, repeating the edge."""
    y, x = torch.randint(0, 2 * amount + 1, (2,)).tolist()
    padded = F.pad(pixels, (amount,) * 4, mode="replicate")
    return padded[..., y : y + pixels.shape[-2], x : x + pixels.shape[-1]]


def optimiser_and_schedule(
    module: nn.Module, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW with a one-cycle schedule."""
    optimiser = torch.optim.AdamW(module.parameters(), PEAK_LR, weight_decay=1e-2)
    return optimiser, torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_LR, steps, pct_start=0.1)


# ------------------------------------------------------------------------------- attributes


def attribute_targets(scene: world.Scene) -> list[int]:
    """Return the class of each attribute, -100 where a scene has none."""
    if isinstance(scene, world.Portrait):
        has = {"kind": world.KIND, "background": scene.background}
    else:
        has = {"kind": "sprite"} | vars(scene)
        if scene.size == "big":
            has.pop("position")
    return [v.index(has[k]) if k in has else -100 for k, v in ATTRIBUTES.items()]


def attribute_accuracy(
    reader: AttributeReader, pixels: torch.Tensor, targets: torch.Tensor
) -> dict[str, float]:
    """Return the share read correctly per attribute; pixels (N, 3, 64, 64), targets (N, A)."""
    with torch.no_grad():
        logits = reader(pixels)
    result = {}
    for column, (name, values) in enumerate(logits.items()):
        known = targets[:, column] >= 0
        right = values.argmax(1)[known] == targets[known, column]
        result[name] = round(right.float().mean().item(), 4)
    return result


def train_attributes(steps: int) -> None:
    """Train the attribute reader and write it."""
    half = training_pictures(128).reshape(PICTURES, 64, 2, 64, 2, 3)
    halved = [half[i : i + 512].mean((2, 4)).astype(np.uint8) for i in range(0, PICTURES, 512)]
    pictures = np.concatenate([*halved, training_pictures(64)])
    labels = torch.tensor([attribute_targets(training_scene(i)) for i in range(PICTURES)]).repeat(
        2, 1
    )
    scenes = [world.random_scene(random.Random(f"unseen {i}")) for i in range(2000)]
    fresh = [
        world.render_scene(s, random.Random(f"unseen pose {i}"), 64) for i, s in enumerate(scenes)
    ]
    fresh_pixels = to_pixels(np.stack(fresh))
    fresh_labels = torch.tensor([attribute_targets(s) for s in scenes])

    torch.manual_seed(0)
    reader = AttributeReader()
    optimiser, schedule = optimiser_and_schedule(reader, steps)
    started = time.monotonic()
    for step in range(steps):
        rows = torch.randint(0, len(pictures), (BATCH,)).numpy()
        pixels = roughened(shifted(to_pixels(pictures[rows])))
        with torch.autocast("cpu", torch.bfloat16):
            logits = reader(pixels)
        losses = [
            F.cross_entropy(values.float(), labels[rows, column], ignore_index=-100)
            for column, values in enumerate(logits.values())
        ]
        loss = torch.stack(losses).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 250 == 249 or step + 1 == steps:
            reader.eval()
            accuracy = attribute_accuracy(reader, fresh_pixels, fresh_labels)
            print(f"reader {step + 1} {time.monotonic() - started:.0f} s", accuracy, flush=True)
            reader.train()
    reader.save()


# ------------------------------------------------------------------------------- subjects


def cousin(identity: world.Subject, rng: random.Random) -> world.Subject:
    """Change one part of an identity: the hardest subject to tell from it."""
    while True:
        part = rng.choice([p for p in PARTS if not p.endswith("pattern")])
        changed = replace(identity, **{part: rng.choice(PARTS[part])})
        hidden = any(
            part == f"{p}_colour" and getattr(identity, p) == "no" for p in ("ears", "mark")
        )
        if changed != identity and not hidden and changed not in world.reserved_identities():
            return changed


def family(index: int) -> list[world.Subject]:
    """Return COUSINS training subjects: one of the pre-training range and variants of it."""
    rng = random.Random(f"family {index}")
    first = world.pretraining_subject(rng)
    return [first, *(cousin(first, rng) for _ in range(COUSINS - 1))]


def family_pictures(index: int) -> np.ndarray:
    """Draw POSES pictures of each member: (COUSINS, POSES, 64, 64, 3) uint8."""
    rng = random.Random(f"family poses {index}")
    return np.stack(
        [
            [
                world.render_subject(member, rng.choice(world.BACKGROUNDS), rng, JUDGED_SIZE)
                for _ in range(POSES)
            ]
            for member in family(index)
        ]
    )


def part_targets(identity: world.Subject) -> list[int]:
    """Return the class of each part, -100 for the colour of a part that is missing."""
    targets = [values.index(getattr(identity, part)) for part, values in PARTS.items()]
    for part in ("ears", "mark"):
        if getattr(identity, part) == "no" and (part != "ears" or identity.arms == "no"):
            targets[list(PARTS).index(f"{part}_colour")] = -100
    return targets


def contrastive_loss(
    embeddings: torch.Tensor, owners: torch.Tensor, temperature: float = 0.15
) -> torch.Tensor:
    """Return the supervised contrastive loss (Khosla et al. 2020, eq. 2); owners (N,) int."""
    logits = embeddings @ embeddings.T / temperature
    itself = torch.eye(len(owners), dtype=torch.bool)
    logits = logits.masked_fill(itself, -torch.inf)
    positive = (owners[:, None] == owners[None]) & ~itself
    log_p = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(~positive, 0.0)
    has = positive.any(1)
    return -(log_p.sum(1)[has] / positive.sum(1)[has]).mean()


def train_subject(steps: int) -> None:
    """Train the subject embedder and write it."""
    with ProcessPoolExecutor(2) as pool:
        pictures = np.stack(list(pool.map(family_pictures, range(FAMILIES), chunksize=16)))
    labels = torch.tensor([[part_targets(m) for m in family(i)] for i in range(FAMILIES)])
    strangers = training_pictures(64)[:4096]
    torch.manual_seed(0)
    judge = SubjectJudge()
    parts = nn.ModuleList([nn.Linear(192, len(v)) for v in PARTS.values()])
    optimiser, schedule = optimiser_and_schedule(nn.ModuleList([judge, parts]), steps)
    started = time.monotonic()
    for step in range(steps):
        rng = np.random.default_rng(step)
        pixels, owners, rows = subject_batch(pictures, strangers, rng)
        with torch.autocast("cpu", torch.bfloat16):
            features = judge.features(roughened(shifted(pixels)))
            embeddings = F.normalize(judge.head(features).float(), dim=1)
            guesses = [head(features) for head in parts]
        known = labels.flatten(0, 1)[rows]  # (members in the batch, PARTS)
        reading = sum(
            F.cross_entropy(guess[: len(rows)].float(), known[:, i], ignore_index=-100)
            for i, guess in enumerate(guesses)
        )
        loss = contrastive_loss(embeddings, owners) + 0.1 * reading
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 250 == 249 or step + 1 == steps:
            judge.eval()
            centre_on(judge, to_pixels(pictures[:, 0, 0]))
            print(
                f"subject {step + 1} {time.monotonic() - started:.0f} s",
                verification(judge),
                flush=True,
            )
            judge.centre.zero_()
            judge.train()
    judge.eval()
    centre_on(judge, to_pixels(pictures[:, 0, 0]))
    judge.save()


def subject_batch(
    pictures: np.ndarray, strangers: np.ndarray, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw 8 families (4 members, 4 poses each) and 16 strangers.

    Returns pixels (144, 3, 64, 64), owners (144,), and the member rows (128,) of all but strangers.
    """
    chosen = rng.choice(FAMILIES, 8, replace=False)
    rows = (chosen[:, None] * COUSINS + np.arange(COUSINS)).reshape(-1).repeat(4)  # (128,)
    poses = rng.integers(0, POSES, len(rows))
    members = pictures.reshape(FAMILIES * COUSINS, *pictures.shape[2:])[rows, poses]
    others = strangers[np.sort(rng.integers(0, len(strangers), 16))]
    owners = np.concatenate([rows, -1 - np.arange(len(others))])
    pixels = to_pixels(np.concatenate([members, others]))
    return pixels, torch.from_numpy(owners), torch.from_numpy(rows)


@torch.no_grad()
def centre_on(judge: SubjectJudge, pixels: torch.Tensor) -> None:
    """Set the centre to the mean embedding of many subjects."""
    judge.centre.zero_()
    judge.centre.copy_(judge(pixels).mean(0))


def verification(judge: SubjectJudge, subjects: int = 100, poses: int = 6) -> dict[str, float]:
    """Measure on reserved subjects, never trained on, and on a cousin of each.

    AUC of same against different pairs; mean similarity of same, different and cousin pairs.
    """

    def embedded(identity: world.Subject, seed: str) -> torch.Tensor:
        rng = random.Random(seed)
        drawn = [
            world.render_subject(identity, rng.choice(world.BACKGROUNDS), rng, 64)
            for _ in range(poses)
        ]
        with torch.no_grad():
            return judge(to_pixels(np.stack(drawn)))

    seeds = range(500, 500 + subjects)
    own = torch.stack([embedded(world.subject(s), f"own {s}") for s in seeds])  # (S, P, D)
    relatives = [cousin(world.subject(s), random.Random(f"cousin {s}")) for s in seeds]
    near = torch.stack([embedded(c, f"near {s}") for s, c in zip(seeds, relatives, strict=True)])
    pairs = torch.einsum("ipd,jqd->ijpq", own, own)
    off = ~torch.eye(poses, dtype=torch.bool)
    same = pairs[torch.arange(subjects), torch.arange(subjects)][:, off].flatten()
    different = pairs[~torch.eye(subjects, dtype=torch.bool)].flatten()
    hard = torch.einsum("ipd,iqd->ipq", own, near).flatten()
    return {
        "auc": round(area_under_curve(same, different), 4),
        "auc_cousins": round(area_under_curve(same, hard), 4),
        "same": round(same.mean().item(), 3),
        "different": round(different.mean().item(), 3),
        "cousins": round(hard.mean().item(), 3),
    }


def area_under_curve(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Return the probability that a positive score exceeds a negative one."""
    ordered = negative.sort().values
    return (torch.searchsorted(ordered, positive).float() / len(ordered)).mean().item()


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("judge", choices=("attributes", "subject"))
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    {"attributes": train_attributes, "subject": train_subject}[arguments.judge](arguments.steps)


if __name__ == "__main__":
    main()
