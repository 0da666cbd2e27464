"""A3FT's table 1 on a real change of domain: from drawn glyphs to scanned handwritten digits.

    python -m benchmarks.domain_shift --seeds 0,1,2 --images 200 --steps 400 \\
        --json benchmarks/results/domain_shift.json --sheet benchmarks/results/domain_shift.png

The unconditional base in demo/pixel_base (letters and figures, no digits) is tuned on a few of
scikit-learn's 1,797 scans in the three modes naive, attention and a3ft, at equal steps and batch.
The learning rate of each mode is the best by KID on validation pictures, of a split that is used
for nothing else: a walk along one ladder of rates, until those on both sides are worse. FID and KID
are of a small digit classifier's penultimate features, trained on 700 other scans; they are
measured against the training pictures, as in the paper, and against held-out ones, which
memorising does not help. Every training is kept in benchmarks/work/: the same command goes on where
it stopped.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from personalize.trainers.artifact import Header, Personalization
from personalize.trainers.loop import train
from personalize.trainers.methods.a3ft import A3FT
from personalize.trainers.monitor import stable_loss
from personalize.trainers.pixel_folder import load_unconditional
from personalize.trainers.unconditional import (
    Unconditional,
    UnconditionalSettings,
    pixel_data,
    sample,
)

from . import ROOT
from .distances import fid, kid, nearest
from .gain import interval, machine

MODES = ("naive", "attention", "a3ft")
LADDER = (2e-5, 6e-5, 2e-4, 6e-4, 2e-3, 6e-3, 2e-2)  # learning rates; the paper's is 2e-4
START = {"naive": 2e-4, "attention": 2e-3, "a3ft": 2e-3}  # where the search begins
SWEEP = 1000  # the seed, and so the split, on which rates are chosen
READER, VALIDATION, HELD_OUT = 700, 200, 500  # pictures
SAMPLING_STEPS, AT_ONCE = 20, 100
WORK = ROOT / "benchmarks" / "work" / "domain_shift"
METRICS = {
    "kid_held_out": "KID to held-out pictures",
    "fid_held_out": "FID to held-out pictures",
    "kid_training": "KID to training pictures",
    "fid_training": "FID to training pictures",
    "nearest_training": "distance to the nearest training picture",
    "gap": "denoising loss, held-out - training",
    "held_out_loss": "denoising loss, held-out",
}


# ------------------------------------------------------------------------------- pictures


def digits(side: int) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's scans (1797, 1, side, side) in [-1, 1], shuffled, and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    scaled = F.interpolate(pixels, size=(side, side), mode="bilinear")
    return scaled[order], torch.tensor(found.target)[order]


@dataclass(frozen=True)
class Split:
    """The pictures of one seed; no two parts share one."""

    training: Tensor
    validation: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, pool: Tensor, seed: int, images: int) -> "Split":
        """Draw the parts from the pictures that the classifier has not seen."""
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        parts = pool[order].split([images, VALIDATION, len(pool) - images - VALIDATION])
        return cls(parts[0], parts[1], parts[2][:HELD_OUT])


class Reader(nn.Module):
    """A small digit classifier; its penultimate features, scaled as a whole, are compared."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * (side // 4) ** 2, 64), nn.ReLU()),
        )
        self.head = nn.Linear(64, 10)
        self.scale = 1.0  # of the features of digits: root of their mean square

    @classmethod
    def trained(cls, pictures: Tensor, labels: Tensor, steps: int = 600) -> "Reader":
        """Train on pictures that are shifted by up to a pixel."""
        torch.manual_seed(0)
        reader = cls(pictures.shape[-1])
        optimiser = torch.optim.AdamW(reader.parameters(), 2e-3, weight_decay=0.05)
        for _ in range(steps):
            rows = torch.randint(len(pictures), (64,))
            shifts = tuple(torch.randint(-1, 2, (2,)).tolist())
            seen = pictures[rows].roll(shifts, (2, 3))
            loss = F.cross_entropy(reader.head(reader.trunk(seen)), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            reader.scale = float(reader.trunk(pictures).square().mean().sqrt())
        return reader.requires_grad_(False)

    def features(self, pictures: Tensor) -> Tensor:
        """Return (N, 64)."""
        return self.trunk(pictures.clamp(-1, 1)) / self.scale

    def accuracy(self, pictures: Tensor, labels: Tensor) -> float:
        """Return the share that is read rightly."""
        return float((self.head(self.trunk(pictures)).argmax(1) == labels).float().mean())

    def confidence(self, pictures: Tensor) -> float:
        """Return the mean of the largest probability: how much like digits they are."""
        probabilities = self.head(self.trunk(pictures.clamp(-1, 1))).softmax(1)
        return float(probabilities.max(1).values.mean())


# ------------------------------------------------------------------------------- one training


@dataclass(frozen=True)
class Bench:
    """What all trainings share."""

    base: Unconditional
    reader: Reader
    pool: Tensor
    images: int
    batch_size: int
    samples: int

    def cell(self, mode: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
        """Train, sample and score once; a training that was done before is read back."""
        where = f"{self.base.fingerprint()['weights']}-{self.images}-{self.batch_size}"
        name = f"{mode}-{rate:g}-{steps}-{seed}-{self.samples}"
        file = WORK / where / f"{name}.json"
        if not file.exists():
            found, drawn = self._measure(mode, rate, seed, steps)
            file.parent.mkdir(parents=True, exist_ok=True)
            sheet(drawn, columns=20).save(file.with_suffix(".png"))
            file.write_text(json.dumps(found, indent=1))
            print(name, {k: round(v, 4) for k, v in found.items() if k in METRICS}, flush=True)
        return json.loads(file.read_text()) | {"sheet": str(file.with_suffix(".png"))}

    def _measure(
        self, mode: str, rate: float, seed: int, steps: int
    ) -> tuple[dict[str, Any], Tensor]:
        split = Split.of(self.pool, seed, self.images)
        settings = UnconditionalSettings(
            mode=mode, learning_rate=rate, seed=seed, steps=steps, batch_size=self.batch_size
        )
        method, denoiser = A3FT(settings), self.base.denoiser()
        data = pixel_data([*split.training, *split.validation], len(split.validation))
        started = time.perf_counter()
        step = list(train(method, denoiser, data))[-1]
        seconds = time.perf_counter() - started
        header = Header("a3ft", 0, settings.as_dict(), self.base.fingerprint(), "", "", "")
        learned = Personalization.of(header, step.learned(), step.index)
        drawn = self.draw(self.base.apply(learned), seed)
        shown = min(64, len(data.held_out))
        losses = [stable_loss(denoiser, part[:shown]) for part in (data.training, data.held_out)]
        facts = {"mode": mode, "learning_rate": rate, "seed": seed, "steps": steps}
        told = {
            "training_loss": losses[0],
            "held_out_loss": losses[1],
            "gap": losses[1] - losses[0],
            "learned_parameters": learned.parameters,
            "steps_per_second": steps / seconds,
        }
        return facts | self.scores(drawn, split) | told, drawn

    def draw(self, base: Unconditional, seed: int) -> Tensor:
        """Sample from a base; the same noise for every mode."""
        unet, parts = base.network(), torch.arange(self.samples).split(AT_ONCE)
        drawn = [list(sample(base, unet, p.tolist(), SAMPLING_STEPS, seed))[-1] for p in parts]
        return torch.cat(drawn).clamp(-1, 1)

    def scores(self, drawn: Tensor, split: Split) -> dict[str, float]:
        """Compare pictures with each part of a split."""
        found, own = {}, self.reader.features(drawn)
        for part, real in vars(split).items():
            features = self.reader.features(real)
            found[f"kid_{part}"], found[f"kid_{part}_sd"] = kid(own, features)
            found[f"fid_{part}"] = fid(own, features)
        found["nearest_training"] = nearest(drawn.flatten(1), split.training.flatten(1))
        found["confidence"] = self.reader.confidence(drawn)
        return found


# ------------------------------------------------------------------------------- all trainings


def search(measured: Callable[[float], float], start: float) -> dict[float, float]:
    """Walk along the ladder until the best rate has a worse one on both sides, {rate: measured}."""
    tried: dict[float, float] = {}
    at = start
    while True:
        place = LADDER.index(at)
        for rate in LADDER[max(0, place - 1) : place + 2]:
            tried[rate] = tried[rate] if rate in tried else measured(rate)
        best = min(tried, key=lambda rate: tried[rate])
        if best == at:
            return dict(sorted(tried.items()))
        at = best


def sweep(bench: Bench, steps: int) -> dict[str, dict[float, float]]:
    """Return KID on validation pictures, {mode: {rate: KID}}."""
    return {
        mode: search(lambda rate, m=mode: bench.cell(m, rate, SWEEP, steps)["kid_validation"], at)
        for mode, at in START.items()
    }


def references(bench: Bench, seeds: Sequence[int]) -> dict[str, dict[str, float]]:
    """Score what bounds the table: the base before training, and real digits."""
    rows: dict[str, list[dict[str, float]]] = {"base, not tuned": [], "real digits": []}
    for seed in seeds:
        split = Split.of(bench.pool, seed, bench.images)
        rows["base, not tuned"].append(bench.scores(bench.draw(bench.base, seed), split))
        rows["real digits"].append(bench.scores(split.validation, split))
    return {name: mean_of(found) for name, found in rows.items()}


def mean_of(cells: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean of every number."""
    numbers = [key for key, value in cells[0].items() if not isinstance(value, str)]
    return {key: float(np.mean([cell[key] for cell in cells])) for key in numbers}


def paired(cells: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return mean and 95 % interval of the differences between modes, seed by seed."""
    of = {mode: [cell for cell in cells if cell["mode"] == mode] for mode in MODES}
    return {
        f"{one} - {other}": {
            metric: list(interval([a[metric] - b[metric] for a, b in zip(of[one], of[other])]))  # noqa: B905
            for metric in METRICS
        }
        for one, other in (("a3ft", "attention"), ("a3ft", "naive"), ("attention", "naive"))
    }


def sheet(pictures: Tensor, columns: int, scale: int = 3) -> Image.Image:
    """Lay pictures (N, 1, h, w) in [-1, 1] side by side."""
    grey = ((pictures[:, 0].clamp(-1, 1) + 1) * 127.5).round().byte()
    columns = min(columns, len(grey))
    grey = grey[: len(grey) // columns * columns]
    rows = [torch.cat(list(row), 1) for row in grey.split(columns)]
    image = Image.fromarray(torch.cat(rows).numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def contact_sheet(bench: Bench, cells: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a block of pictures each: training, base, and the modes in order, of the first seed."""
    seed = cells[0]["seed"]
    height, columns = 4 * bench.base.side * 3, 20
    training = Split.of(bench.pool, seed, bench.images).training[: 4 * columns]
    blocks = [sheet(part, columns) for part in (training, bench.draw(bench.base, seed)[:80])]
    shown = {cell["mode"]: cell["sheet"] for cell in cells if cell["seed"] == seed}
    blocks += [Image.open(shown[mode]) for mode in MODES]
    blocks = [block.crop((0, 0, block.width, min(height, block.height))) for block in blocks]
    total = Image.new("L", (blocks[0].width, sum(b.height + 8 for b in blocks)), 128)
    top = 0
    for block in blocks:
        total.paste(block, (0, top))
        top += block.height + 8
    total.save(path, optimize=True)


def markdown(result: dict[str, Any]) -> str:
    """Write the tables."""
    said = result["settings"]
    lines = [
        "# A3FT's table 1, from drawn glyphs to scanned digits",
        "",
        f"`{result['command']}`",
        "",
        f"{said['images']} training pictures, {said['steps']} steps of {said['batch_size']}, "
        f"{said['samples']} samples by DDIM in {SAMPLING_STEPS} steps, seeds {said['seeds']}; "
        f"{result['machine']}. The classifier reads {result['classifier_accuracy']:.1%} of the "
        "digits that it was not trained on.",
        "",
        "| | rate | "
        + " | ".join(METRICS.values())
        + " | like a digit | learned numbers | steps/s |",
        "|---|---|" + "---|" * (len(METRICS) + 3),
    ]
    for name, row in (result["references"] | result["table"]).items():
        rate = result["chosen"].get(name)
        numbers = [f"{row[m]:.4f}" if m in row else "" for m in METRICS]
        parameters = f"{row['learned_parameters']:,.0f}" if rate else ""
        speed = f"{row['steps_per_second']:.1f}" if rate else ""
        cells = [name, f"{rate:g}" if rate else "", *numbers, f"{row['confidence']:.3f}"]
        lines.append(f"| {' | '.join([*cells, parameters, speed])} |")
    lines += [
        "",
        "Paired differences, mean [95 % interval over seeds]; less is better but for the ",
    ]
    lines[-1] += "distance to the nearest training picture, where less is closer to memorising."
    lines += ["", "| | " + " | ".join(METRICS.values()) + " |", "|---|" + "---|" * len(METRICS)]
    for name, row in result["paired"].items():
        shown = [f"{m:+.4f} [{low:+.4f}, {high:+.4f}]" for m, low, high in row.values()]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    lines += ["", "Learning rates tried (KID on validation pictures of another split):", ""]
    for mode, found in result["sweep"].items():
        tried = ", ".join(f"{rate:g}: {value:.4f}" for rate, value in found.items())
        lines.append(f"- {mode}: {tried}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, measure, print and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.domain_shift", description=__doc__)
    parser.add_argument("--seeds", default="0,1,2", help="of the split, the training, the samples")
    parser.add_argument("--images", type=int, default=200, help="pictures to train on")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=300, help="pictures to draw and compare")
    parser.add_argument("--quick", action="store_true", help="to see it work: no search, few steps")
    parser.add_argument("--json", type=Path, help="also writes the table beside it, as .md")
    parser.add_argument("--sheet", type=Path, help="a picture of samples")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.samples, options.seeds = 20, 40, "0,1"
    torch.set_num_threads(1)
    result, bench = measure(options)
    print(markdown(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(markdown(result))
    if options.sheet:
        contact_sheet(bench, result["cells"], options.sheet)


def measure(options: argparse.Namespace) -> tuple[dict[str, Any], Bench]:
    """Run every training that is asked for."""
    base = load_unconditional(ROOT / "demo" / "pixel_base")
    pictures, labels = digits(base.side)
    reader = Reader.trained(pictures[:READER], labels[:READER])
    pool = pictures[READER:]
    bench = Bench(base, reader, pool, options.images, options.batch_size, options.samples)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    tried = {} if options.quick else sweep(bench, options.steps)
    chosen = START | {mode: min(found, key=lambda r: found[r]) for mode, found in tried.items()}
    cells = [bench.cell(m, chosen[m], seed, options.steps) for seed in seeds for m in MODES]
    asked = vars(options) | {"json": str(options.json), "sheet": str(options.sheet)}
    command = (
        f"python -m benchmarks.domain_shift --seeds {options.seeds} --images {options.images} "
        f"--steps {options.steps} --batch-size {options.batch_size} --samples {options.samples}"
    )
    result = {
        "command": command,
        "machine": machine(),
        "settings": asked,
        "classifier_accuracy": reader.accuracy(pool, labels[READER:]),
        "references": references(bench, seeds),
        "sweep": tried,
        "chosen": chosen,
        "table": {m: mean_of([cell for cell in cells if cell["mode"] == m]) for m in MODES},
        "paired": paired(cells),
        "cells": cells,
    }
    return result, bench


if __name__ == "__main__":
    main()
