"""Few-shot fine-tuning in pixel space: do pictures fill with noise, and does BNN hold it off?

    python -m benchmarks.corruption_stage --seeds 0,1,2 --steps 6000 --sigmas 0.01,0.03 \\
        --json benchmarks/results/corruption_stage.json \\
        --sheet benchmarks/results/corruption_stage.png

BNN's paper (arXiv 2405.19931): likeness rises, then pictures fill with noisy patterns, then the
model copies. The demo base's pictures are too flat for grain; here a base without prompts, in pixel
space (demo/pixel_base: drawn glyphs), is tuned on five scanned digits, all weights, at a constant
learning rate: plainly (DreamBooth without a class), and with random weights (BNN over all weights).

Measured at steps at equal ratios, on samples of fixed noise:

- distance: to the nearest training picture, mean square, pixels in [-1, 1];
- grain: high-frequency energy over that of the training pictures, what the monitor looks at;
- noisy: the share of samples with more than half as much again as the grainiest training picture;
- diversity: mean square distance of two samples, over that of two training pictures;
- predicted: grain of pictures predicted in one step (the monitor's index without samples).

Every training is kept in benchmarks/work/, so that a command that was stopped goes on.
"""

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from personalize.trainers.artifact import Header, Personalization
from personalize.trainers.data import PersonalData
from personalize.trainers.loop import train
from personalize.trainers.method import Method
from personalize.trainers.methods.bnn import BNN, BNNSettings
from personalize.trainers.methods.dreambooth import DreamBooth, DreamBoothSettings
from personalize.trainers.monitor import Evaluation, Examination, high_frequency_energy
from personalize.trainers.pixel_folder import load_unconditional
from personalize.trainers.unconditional import Unconditional, pixel_data, sample
from personalize.trainers.verdict import corruption_stage

from . import ROOT
from .digits import READER, digits
from .gain import interval, machine
from .options import command, number, numbers, read
from .provenance import code_hash, warn_of_mixed
from .reports import finite
from .shift_tables import COLUMNS, SCALE, interval_table, sheet

BASE = ROOT / "demo" / "pixel_base"
WORK = ROOT / "benchmarks" / "work" / "corruption_stage"
HELD_OUT, SAMPLING_STEPS, FIRST, POINTS = 20, 20, 25, 36
PERIODS = 6  # of a training: each as many times as long as the one before
SHOWN, EVERY = 9, 3  # samples, and rows of a sheet
NOISY = 1.5  # of the grainiest training picture's energy
QUICK = {"seeds": "0", "steps": 100, "samples": 8}
METRICS = ("distance", "grain", "noisy", "diversity", "predicted")
Line = dict[str, float]  # what is measured at one step


@dataclass(frozen=True)
class Bench:
    """What all trainings share."""

    base: Unconditional
    pool: Tensor
    images: int
    samples: int
    steps: int
    learning_rate: float
    batch_size: int

    def method(self, sigma: float | None, seed: int) -> Method:
        """Return plain fine-tuning of all weights, or with random ones."""
        how: Any = {
            "steps": self.steps,
            "learning_rate": self.learning_rate,
            "batch_size": self.batch_size,
            "seed": seed,
        }
        if sigma is None:
            return DreamBooth(DreamBoothSettings(**how))
        return BNN(BNNSettings(**how, over="full", sigma=sigma))

    def data(self, seed: int) -> PersonalData:
        """Return the training pictures of a seed, and some that are held out."""
        first = seed * (self.images + HELD_OUT)
        return pixel_data(list(self.pool[first : first + self.images + HELD_OUT]), HELD_OUT)

    def file(self, sigma: float | None, seed: int) -> Path:
        """Return where a training's lines are kept; its samples lie beside them."""
        name = "plain" if sigma is None else f"bnn-{sigma:g}"
        how = f"{self.images}-{self.batch_size}-{self.learning_rate:g}-{self.steps}-{self.samples}"
        return WORK / self.base.fingerprint()["weights"] / how / f"{name}-{seed}.json"

    def training(self, sigma: float | None, seed: int) -> list[Line]:
        """Train, and measure on the way; what was done before is read back."""
        file = self.file(sigma, seed)
        if not file.exists():
            lines, drawn = self.learn(self.method(sigma, seed), self.data(seed))
            file.parent.mkdir(parents=True, exist_ok=True)
            columns = min(COLUMNS, self.samples)
            page = sheet(torch.cat([each[:columns] for each in drawn]), columns)
            page.save(file.with_suffix(".png"))
            file.write_text(json.dumps(lines, indent=1) + "\n")
        return json.loads(file.read_text())

    def learn(self, method: Method, data: PersonalData) -> tuple[list[Line], list[Tensor]]:
        """Return what is measured at some steps, and the first samples of some."""
        denoiser, lines, drawn = self.base.denoiser(), [], []
        known = torch.stack([example.latent for example in data.training])
        header = Header(method.name, 0, {}, self.base.fingerprint(), "", "", "")
        at, examination = points(self.steps), None
        for step in train(method, denoiser, data):
            if step.index not in at:
                continue
            splits = {"train": data.training, "held_out": data.held_out}
            examination = examination or Examination(denoiser, splits)
            with step.kept():
                stands = examination.evaluate(denoiser, step.index)
            pictures = self.draw(Personalization.of(header, step.learned(), step.index))
            lines.append(stands.as_line() | measured(pictures, known))
            lines[-1] |= {"predicted": stands.corruption, "code": code_hash(BASE)}
            drawn.append(pictures)
            told = {key: round(lines[-1][key], 3) for key in METRICS}
            print(method.name, step.index, told, file=sys.stderr, flush=True)
        return lines, drawn

    def draw(self, learned: Personalization) -> Tensor:
        """Sample; the same noise at every step of every training."""
        base = self.base.apply(learned)
        numbers = range(self.samples)
        return list(sample(base, base.network(), numbers, SAMPLING_STEPS, 0))[-1].clamp(-1, 1)


def points(steps: int) -> list[int]:
    """Return the steps that are measured, at equal ratios."""
    return sorted({round(s) for s in np.geomspace(min(FIRST, steps), steps, POINTS)})


def measured(pictures: Tensor, known: Tensor) -> Line:
    """Score samples (N, 1, h, w) beside the training pictures (M, 1, h, w)."""
    energy, usual = high_frequency_energy(pictures), high_frequency_energy(known)
    to_known = torch.cdist(pictures.flatten(1), known.flatten(1)).square() / known[0].numel()
    return {
        "distance": float(to_known.amin(1).mean()),
        "grain": float(energy.mean() / usual.mean()),
        "noisy": float((energy > NOISY * usual.max()).float().mean()),
        "diversity": float(spread(pictures) / spread(known)),
    }


def spread(pictures: Tensor) -> Tensor:
    """Return the mean square distance of two pictures."""
    return torch.pdist(pictures.flatten(1)).square().mean()


def stage(lines: Sequence[Line]) -> tuple[int, float] | None:
    """Return step and height of the hump that the monitor would find; None where it finds none."""
    evaluations = [replace(Evaluation.from_line(line), grain=line["grain"]) for line in lines]
    return corruption_stage(evaluations)


Trainings = Mapping[str, Sequence[Sequence[Line]]]  # by name: of every seed, the lines


def report(trainings: Trainings) -> dict[str, Any]:
    """Compare the trainings: over all steps, in every period, and at each step."""
    plain = trainings["plain"]
    every = [line for of in trainings.values() for lines in of for line in lines]
    periods = {name: by_period(of) for name, of in trainings.items()}
    others = [name for name in trainings if name != "plain"]
    return {
        "machine": machine(),
        "code": dict(Counter(line["code"] for line in every)),
        "stages": {name: [stage(lines) for lines in of] for name, of in trainings.items()},
        "paired": {f"{name} - plain": compared(trainings[name], plain) for name in others},
        "by_period": {
            name: {when: summary(rows) for when, rows in of.items()} for name, of in periods.items()
        },
        "paired_by_period": {
            f"{name} - plain": {
                when: compared(rows, periods["plain"][when]) for when, rows in periods[name].items()
            }
            for name in others
        },
        "by_step": {
            name: {
                f"{int(row[0]['step'])}": summary([[line] for line in row])
                for row in zip(*of, strict=True)
            }
            for name, of in trainings.items()
        },
    }


Rows = Sequence[Sequence[Line]]  # of every seed, some lines
Intervals = dict[str, tuple[float, float, float]]  # by measure: mean, low and high of 95 %


def summary(rows: Rows) -> Intervals:
    """Return the means of some lines, over seeds."""
    return {key: interval([mean(lines, key) for lines in rows]) for key in METRICS}


def compared(rows: Rows, plain: Rows) -> Intervals:
    """Return the differences of the means of some lines, over seeds."""
    both = list(zip(rows, plain, strict=True))
    return {key: interval([mean(a, key) - mean(b, key) for a, b in both]) for key in METRICS}


def by_period(rows: Rows) -> dict[str, Rows]:
    """Cut every training into periods of as many measured steps, at equal ratios."""
    places = np.array_split(np.arange(len(rows[0])), PERIODS)
    return {
        f"{rows[0][at[0]]['step']:.0f} to {rows[0][at[-1]]['step']:.0f}": [
            [lines[i] for i in at] for lines in rows
        ]
        for at in places
        if len(at)
    }


def mean(lines: Sequence[Line], key: str) -> float:
    """Return the mean over the steps, which stand at equal ratios."""
    return float(np.mean([line[key] for line in lines]))


def markdown(result: Mapping[str, Any]) -> str:
    """Write the tables."""
    lines = ["# The corruption stage, in pixel space", "", f"`{result['command']}`", ""]
    lines += [f"{result['settings']}; {result['machine']}.", ""]
    lines += ["Hump of the grain that the monitor finds, seed by seed (step, height):", ""]
    for name, found in result["stages"].items():
        told = (f"{s[0]} ({s[1]:.2f})" if s else "none" for s in found)
        lines.append(f"- {name}: {', '.join(told)}")
    lines += ["", "Paired differences of the means over all steps [95 % interval over seeds]:", ""]
    lines += interval_table(METRICS, result["paired"])
    for name, of in result["by_period"].items():
        lines += ["", f"{name}, period by period of its steps [95 % interval over seeds]:", ""]
        lines += interval_table(METRICS, of)
    for name, of in result["paired_by_period"].items():
        lines += ["", f"{name}, period by period [95 % interval over seeds]:", ""]
        lines += interval_table(METRICS, of)
    return "\n".join(lines) + "\n"


def contact_sheet(bench: Bench, sigmas: Sequence[float | None], seed: int) -> Image.Image:
    """Draw training pictures, and below them every training's samples, a row for each step."""
    known = torch.stack([example.latent for example in bench.data(seed).training])
    pages = [Image.open(bench.file(sigma, seed).with_suffix(".png")) for sigma in sigmas]
    side, steps = bench.base.side * SCALE, points(bench.steps)
    rows = sorted({*range(0, len(steps), EVERY), len(steps) - 1})
    left, top, wide = 48, side + 40, min(SHOWN, bench.samples) * side
    page = Image.new("L", (left + len(pages) * (wide + 16), top + len(rows) * side), 255)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    page.paste(sheet(known, len(known)), (left, 0))
    for row, at in enumerate(rows):
        draw.text((left - 8, top + (row + 0.5) * side), f"{steps[at]}", 0, font, anchor="rm")
    for panel, (sigma, shown) in enumerate(zip(sigmas, pages, strict=True)):
        x = left + panel * (wide + 16)
        title = "plain" if sigma is None else f"BNN, sigma {sigma:g}"
        draw.text((x, top - 8), title, 0, font, anchor="ls")
        for row, at in enumerate(rows):
            page.paste(shown.crop((0, at * side, wide, (at + 1) * side)), (x, top + row * side))
    return page


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = command("corruption_stage", __doc__)
    parser.add_argument("--seeds", default="0,1,2", help="of pictures and training")
    parser.add_argument("--images", type=number(2, 50), default=5)
    parser.add_argument("--samples", type=number(2, 1000), default=40)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sigmas", default="0.01,0.03", help="of BNN's weights")
    return read(parser, arguments, QUICK)


def main(arguments: list[str] | None = None) -> None:
    """Measure what is asked for, print and save."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parsed(arguments)
    torch.set_num_threads(1)
    base = load_unconditional(BASE)
    how = {k: getattr(options, k) for k in ("images", "samples", "steps", "learning_rate")}
    how["batch_size"] = options.batch_size
    bench = Bench(base, digits(base.side)[0][READER:], **how)
    sigmas = [None, *map(float, options.sigmas.split(","))]
    seeds = numbers(options.seeds)
    trainings = {
        "plain" if sigma is None else f"bnn {sigma:g}": [bench.training(sigma, s) for s in seeds]
        for sigma in sigmas
    }
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.corruption_stage", *arguments]),
        "settings": ", ".join(f"{k} {v}" for k, v in {"seeds": options.seeds, **how}.items()),
        **report(trainings),
    }
    warn_of_mixed(result["code"])
    print(markdown(result))
    if options.json:
        options.json.write_text(json.dumps(finite(result), indent=1) + "\n")
        options.json.with_suffix(".md").write_text(markdown(result))
    if options.sheet:
        contact_sheet(bench, sigmas, seeds[0]).save(options.sheet, optimize=True)


if __name__ == "__main__":
    main()
