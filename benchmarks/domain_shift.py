"""A3FT's table 1 on a real change of domain: from drawn glyphs to scanned handwritten digits.

    python -m benchmarks.domain_shift --seeds 0,1,2 --images 200 --steps 200,400,800,1600 \\
        --json benchmarks/results/domain_shift.json --sheet benchmarks/results/domain_shift.png

The unconditional base in demo/pixel_base (letters and figures, no digits) is tuned on a few of
scikit-learn's 1,797 scans in the three modes naive, attention and a3ft, with equal batches. Each
training is judged at several steps: a mode is as good as its best step, the one with the lowest
mean KID to held-out pictures; a table of all steps stands beside it.

The learning rate of each mode is the best on pictures that are in no other set: a walk along one
ladder of rates, until those on both sides are worse, by the lowest KID to held-out pictures at any
step but the last, which is left out to save time. `--learning-rate` gives one to all of them, as
the paper does. FID and KID are of a small digit classifier's penultimate features, trained on 700
other scans; they are measured against the training pictures, as in the paper, and against held-out
ones. Copies of real scans are like held-out scans, too: what memorising does shows in the distance
to the nearest training picture and in the loss. All sets are of one size, as small ones make FID
too large.

Everything is kept in benchmarks/work/, with the state of every training: the same command goes on
where it stopped, and more steps go on from fewer. `--modes` shares the work out to processes.
"""

import argparse
import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from personalize.trainers.artifact import Header, Personalization
from personalize.trainers.loop import Step, train
from personalize.trainers.methods.a3ft import A3FT
from personalize.trainers.monitor import stable_loss
from personalize.trainers.pixel_folder import load_unconditional
from personalize.trainers.state import State
from personalize.trainers.unconditional import (
    Unconditional,
    UnconditionalSettings,
    pixel_data,
    sample,
)

from . import ROOT
from .digits import COUNT, READER, Reader, Split, digits
from .distances import fid, kid, nearest
from .gain import interval, machine
from .options import command, number, numbers, read
from .provenance import code_hash, warn_of_mixed
from .reports import finite
from .shift_tables import METRICS, markdown, sheet, stacked

BASE = ROOT / "demo" / "pixel_base"
WORK = ROOT / "benchmarks" / "work" / "domain_shift"
MODES = ("a3ft", "attention", "naive")
LADDER = (2e-5, 6e-5, 2e-4, 6e-4, 2e-3, 6e-3, 2e-2)  # learning rates; the paper's is 2e-4
START = {"naive": 2e-4, "attention": 2e-3, "a3ft": 6e-4}  # where the search begins
TUNING = 1000  # the seed on whose split, of pictures of its own, rates are chosen
QUICK = {"seeds": "0,1", "images": 40, "steps": "10,20"}
SAMPLING_STEPS, AT_ONCE, PROBED = 20, 100, 64
MOST = (COUNT - READER) // 5  # pictures in a set: two for tuning, three for each seed
Cell = dict[str, Any]  # what is measured at one step of a training


@dataclass(frozen=True)
class Bench:
    """What all trainings share."""

    base: Unconditional
    reader: Reader
    pool: Tensor  # what the reader has not seen
    images: int  # in every set
    batch_size: int

    def split(self, seed: int) -> Split:
        """Return the sets of a seed; those for tuning share no picture with any other's."""
        reserved = 2 * self.images
        pool = self.pool[:reserved] if seed == TUNING else self.pool[reserved:]
        return Split.of(pool, seed, self.images)

    def file(self, mode: str, rate: float, seed: int, of: int | str) -> Path:
        """Return where a step, or the state, of a training is kept."""
        folder = f"{self.base.fingerprint()['weights']}-{self.images}-{self.batch_size}"
        return WORK / folder / f"{mode}-{rate:g}-{seed}-{of}.json"

    def cells(self, mode: str, rate: float, seed: int, steps: Sequence[int]) -> list[Cell]:
        """Train once, and measure at some steps; what was done before is read back."""
        files = {step: self.file(mode, rate, seed, step) for step in steps}
        missing = {step: file for step, file in files.items() if not file.exists()}
        if missing:
            how: Any = {"mode": mode, "learning_rate": rate, "seed": seed, "steps": max(missing)}
            self.learn(UnconditionalSettings(**how, batch_size=self.batch_size), missing)
        return [json.loads(file.read_text()) for file in files.values()]

    def learn(self, settings: UnconditionalSettings, files: Mapping[int, Path]) -> None:
        """Train, going on from a state that is early enough; write a file at some steps."""
        split, denoiser = self.split(settings.seed), self.base.denoiser()
        data = pixel_data([*split.training, *split.held_out], self.images)
        which = settings.mode, settings.learning_rate, settings.seed, f"state-{code_hash(BASE)}"
        kept = self.file(*which).with_suffix(".safetensors")
        kept.parent.mkdir(parents=True, exist_ok=True)
        state = State.load(kept) if kept.exists() else None
        if state is not None and state.done.index > min(files):
            state = None
        for step in train(A3FT(settings), denoiser, data, state):
            if step.index in files:
                step.state().save(kept)
                losses = [stable_loss(denoiser, p[:PROBED]) for p in (data.training, data.held_out)]
                found, drawn = self.measured(settings, step, split)
                found |= {"held_out_loss": losses[1], "gap": losses[1] - losses[0]}
                sheet(drawn).save(files[step.index].with_suffix(".png"))
                files[step.index].write_text(json.dumps(found, indent=1) + "\n")
                told = {key: round(found[key], 4) for key in METRICS}
                print(files[step.index].stem, told, file=sys.stderr, flush=True)

    def measured(
        self, settings: UnconditionalSettings, step: Step, split: Split
    ) -> tuple[Cell, Tensor]:
        """Sample from what is learned so far, and score it."""
        header = Header("a3ft", 0, settings.as_dict(), self.base.fingerprint(), "", "", "")
        learned = Personalization.of(header, step.learned(), step.index)
        drawn = self.draw(self.base.apply(learned), settings.seed)
        facts = {name: getattr(settings, name) for name in ("mode", "learning_rate", "seed")}
        facts |= {"step": step.index, "learned_parameters": learned.parameters}
        return facts | {"code": code_hash(BASE)} | self.scores(drawn, split), drawn

    def draw(self, base: Unconditional, seed: int) -> Tensor:
        """Sample from a base; the same noise for every mode."""
        unet, parts = base.network(), torch.arange(self.images).split(AT_ONCE)
        drawn = [list(sample(base, unet, p.tolist(), SAMPLING_STEPS, seed))[-1] for p in parts]
        return torch.cat(drawn).clamp(-1, 1)

    def scores(self, drawn: Tensor, split: Split) -> dict[str, float]:
        """Compare pictures with as many training and held-out ones."""
        found, own = {}, self.reader.features(drawn)
        for part, real in (("training", split.training), ("held_out", split.held_out)):
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


def sweep(bench: Bench, mode: str, steps: Sequence[int]) -> dict[float, float]:
    """Return the lowest KID on pictures for tuning at any step but the last, {rate: KID}."""

    def lowest(rate: float) -> float:
        cells = bench.cells(mode, rate, TUNING, steps[:-1] or steps)
        return min(cell["kid_held_out"] for cell in cells)

    return search(lowest, START[mode])


def references(bench: Bench, seeds: Sequence[int]) -> dict[str, dict[str, float]]:
    """Score what bounds the table: the base before training, and real digits."""
    rows: dict[str, list[Cell]] = {"base, not tuned": [], "real digits": []}
    for seed in seeds:
        split = bench.split(seed)
        rows["base, not tuned"].append(bench.scores(bench.draw(bench.base, seed), split))
        rows["real digits"].append(bench.scores(split.others, split))
    return {name: mean_of(found) for name, found in rows.items()}


def mean_of(cells: Sequence[Cell]) -> dict[str, float]:
    """Return the mean of every number."""
    numbers = [key for key, value in cells[0].items() if not isinstance(value, str)]
    return {key: float(np.mean([cell[key] for cell in cells])) for key in numbers}


Cells = Mapping[str, Mapping[int, Sequence[Cell]]]  # by mode, by step, one for each seed


def best_steps(cells: Cells) -> dict[str, int]:
    """Return the step of every mode with the lowest mean KID to held-out pictures."""
    return {
        mode: min(of, key=lambda step, of=of: mean_of(of[step])["kid_held_out"])
        for mode, of in cells.items()
    }


def paired(ones: Sequence[Cell], others: Sequence[Cell]) -> dict[str, list[float]]:
    """Return mean and 95 % interval of the differences, seed by seed."""
    both = list(zip(ones, others, strict=True))
    return {key: list(interval([one[key] - other[key] for one, other in both])) for key in METRICS}


def report(bench: Bench, cells: Cells, sweeps: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the modes, each at its best step and all at every step."""
    best, modes = best_steps(cells), list(combinations(cells, 2))
    every = [cell for of in cells.values() for row in of.values() for cell in row]
    at = {"best": best, "last": {mode: max(of) for mode, of in cells.items()}}
    return {
        "machine": machine(),
        "code": dict(Counter(cell["code"] for cell in every)),
        "references": references(bench, sorted({cell["seed"] for cell in every})),
        "table": {
            when: {mode: mean_of(cells[mode][step]) for mode, step in steps.items()}
            for when, steps in at.items()
        },
        "paired": {
            when: {
                f"{one} - {other}": paired(cells[one][steps[one]], cells[other][steps[other]])
                for one, other in modes
            }
            for when, steps in at.items()
        },
        "kid_by_step": {
            mode: {step: interval([c["kid_held_out"] for c in row]) for step, row in of.items()}
            for mode, of in cells.items()
        },
        "paired_by_step": {
            f"{one} - {other}": {
                step: paired(row, cells[other][step])["kid_held_out"]
                for step, row in cells[one].items()
            }
            for one, other in modes
        },
        "sweep": sweeps,
        "cells": every,
    }


def contact_sheet(bench: Bench, cells: Cells) -> Image.Image:
    """Draw training pictures, the base's, and the modes' at best and at last, of the first seed."""
    best = best_steps(cells)
    first = [of[step][0] for mode, of in cells.items() for step in sorted({best[mode], max(of)})]
    seed = first[0]["seed"]
    training, before = bench.split(seed).training, bench.draw(bench.base, seed)
    blocks = {"training pictures": sheet(training), "base, not tuned": sheet(before)}
    for cell in first:
        file = bench.file(cell["mode"], cell["learning_rate"], seed, cell["step"])
        blocks[f"{cell['mode']}, step {cell['step']}"] = Image.open(file.with_suffix(".png"))
    return stacked(blocks)


# ------------------------------------------------------------------------------- the command


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = command("domain_shift", __doc__)
    parser.add_argument("--seeds", default="0,1,2", help="of the split, the training, the samples")
    parser.add_argument("--images", type=number(2, MOST), default=200, help="in every set")
    parser.add_argument("--steps", default="200,400,800,1600", help="to measure at")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--learning-rate", type=float, help="of every mode; else each one's best")
    return read(parser, arguments, QUICK)


def main(arguments: list[str] | None = None) -> None:
    """Measure what is asked for, print and save."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parsed(arguments)
    torch.set_num_threads(1)
    base = load_unconditional(BASE)
    pictures, labels = digits(base.side)
    reader = Reader.trained(pictures[:READER], labels[:READER])
    bench = Bench(base, reader, pictures[READER:], options.images, options.batch_size)
    steps, seeds = (sorted(numbers(t)) for t in (options.steps, options.seeds))
    modes = options.modes.split(",")
    one_rate = options.learning_rate
    searched = () if options.quick or one_rate else modes
    sweeps = {mode: sweep(bench, mode, steps) for mode in searched}
    rates = dict.fromkeys(MODES, one_rate) if one_rate else START
    rates |= {mode: min(tried, key=tried.__getitem__) for mode, tried in sweeps.items()}
    trainings = {m: [bench.cells(m, rates[m], seed, steps) for seed in seeds] for m in modes}
    cells = {m: dict(zip(steps, zip(*of, strict=True), strict=True)) for m, of in trainings.items()}
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.domain_shift", *arguments]),
        "settings": {name: getattr(options, name) for name in ("seeds", "images", "batch_size")},
        "classifier_accuracy": reader.accuracy(bench.pool, labels[READER:]),
        **report(bench, cells, sweeps),
    }
    warn_of_mixed(result["code"])
    print(markdown(result))
    if options.json:
        options.json.write_text(json.dumps(finite(result), indent=1) + "\n")
        options.json.with_suffix(".md").write_text(markdown(result))
    if options.sheet:
        contact_sheet(bench, cells).save(options.sheet, optimize=True)


if __name__ == "__main__":
    main()
