"""Two subjects that were learned apart, in one model: PaRa's ways of merging beside two LoRAs.

    python -m benchmarks.together --pairs 101:102,103:104,105:106,107:108 --json together.json

Trains "a zib totem" and "a wug totem" (or what `--called` says) on one subject each, combines what
was learned, and asks for both. Prints Markdown tables: means, and paired differences to two LoRAs
with their 95 % interval (Student's t over pairs, each the mean of its seeds).

    apart        each alone in its model: what combining could reach at best
    own          likeness of the subject that was asked for
    other        likeness of the one that was not: who is confused with whom
    following    share of what the prompts name that the samples show
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demo import world
from headless import Comfy, Graph, fill_defaults
from headless.graph import Output

from .cells import SIDE, drawn, images
from .comparisons import Differences, Table, mean_scores, paired
from .configurations import CONFIGURATIONS
from .gain import machine
from .metrics import prompt_following, subject_similarity
from .options import numbers
from .reports import finite
from .servers import Worker, share_out, workers
from .tables import difference_table, markdown_table, sheet

CALLED = "zib totem,wug totem"
BACKGROUNDS = world.BACKGROUNDS[:3]
WAYS = ("concat", "sequential", "sum")
BASELINE = "two LoRAs"
SCORES = ("own", "other", "following")
SAMPLES, PICTURES = 4, 5
Rows = dict[str, dict[str, Tensor]]  # way -> subject -> (N, SIDE, SIDE, 3) in [0, 1]


@dataclass(frozen=True)
class Training:
    """What every training has in common."""

    seed: int
    steps: int
    rank: int
    layers: str  # that learn
    prior: int  # pictures of the class, drawn by the base
    called: Sequence[str]  # what each subject is called: a name and a class


def prompts(called: str) -> list[str]:
    """Return what the samples of a subject are asked for with."""
    return [f"a {called} {world.background_words(b)}" for b in BACKGROUNDS]


def captions(subject: int, called: str) -> str:
    """Return the captions of a subject's pictures, one a line."""
    written = [text for _, text in world.subject_pictures(subject, PICTURES)]
    return "\n".join(text.replace(f"zib {world.KIND}", called) for text in written)


def class_pictures(graph: Graph, base: str, training: Training, called: str) -> dict[str, Any]:
    """Add pictures of the class, drawn by the base; return what a Dataset takes of them."""
    if not training.prior:
        return {}
    text = f"a {called.split()[-1]}"
    latent = graph.empty_latent(SIDE, training.prior)
    saved = graph.pictures(base, (base, 0), text, latent, seed=training.seed)
    return {"prior_images": tuple(graph[saved]["inputs"]["images"]), "class_prompt": text}


def models(
    graph: Graph, base: str, subjects: Sequence[int], training: Training
) -> dict[str, list[Output]]:
    """Add all trainings; return the MODELs of every way, one for each name."""
    learned: dict[str, list[str]] = {"para": [], "lora-like-para": []}
    for called, subject in zip(training.called, subjects, strict=True):
        how = {"subject": subject, "count": PICTURES, "resolution": SIDE}
        pictures = graph.add("PersonalizeDemoSubject", **how)
        known: dict[str, Any] = {"captions": captions(subject, called), "resolution": SIDE}
        known |= class_pictures(graph, base, training, called)
        wires = {"images": (pictures, 0), "clip": (base, 1), "vae": (base, 2)}
        data = graph.add("PersonalizeDataset", **wires, **known)
        for row, trained in learned.items():
            how = CONFIGURATIONS[row]
            kind = {"para": "PersonalizeTrainPaRa", "lora": "PersonalizeTrainLoRA"}[how.method]
            more = {"name": f"{row} {subject} {training.seed}", "seed": training.seed}
            more |= {"steps": training.steps, "batch_size": 2}
            more |= {**how.settings, "rank": training.rank, "layers": training.layers}
            trained += [graph.add(kind, model=(base, 0), data=(data, 0), **more)]

    def together(row: str, how: str) -> Output:
        wires = {f"personalized.personalized{i}": (node, 1) for i, node in enumerate(learned[row])}
        inputs = {"model": (base, 0), "how": how, "strength": 1.0}
        return graph.add("PersonalizeCombine", **inputs, **wires), 0

    apart = {
        f"{title} apart": [(node, 0) for node in learned[row]]
        for row, title in {"para": "PaRa", "lora-like-para": "LoRA"}.items()
    }
    ways = {f"PaRa, {how}": [together("para", how)] * len(subjects) for how in WAYS}
    loras = {BASELINE: [together("lora-like-para", "sum")] * len(subjects)}
    return {"base": [(base, 0)] * len(subjects)} | apart | ways | loras


def sampled(comfy: Comfy, subjects: Sequence[int], training: Training) -> Rows:
    """Train, combine and sample everything for one pair."""
    known, graph = comfy.object_info(), Graph()
    base = graph.add("PersonalizeDemoBase")
    latent = graph.empty_latent(SIDE, SAMPLES)
    sampler = {"sampler_name": "dpmpp_2m", "steps": 12, "seed": training.seed}
    saved = {
        (way, called): [
            graph.pictures(base, model, text, latent, **sampler) for text in prompts(called)
        ]
        for way, of_subjects in models(graph, base, subjects, training).items()
        for called, model in zip(training.called, of_subjects, strict=True)
    }
    result = comfy.run(fill_defaults(graph, known))
    rows: Rows = {}
    for (way, called), nodes in saved.items():
        found = [np.asarray(image) for node in nodes for image in images(comfy, result, node)]
        rows.setdefault(way, {})[called] = torch.from_numpy(np.stack(found)).float() / 255
    return rows


def scores(rows: Rows, subjects: Sequence[int]) -> dict[str, dict[str, float]]:
    """Judge every way of one pair."""
    references = [drawn(subject, 8, "held-out") for subject in subjects]
    return {
        way: {
            "own": mean_likeness(pictures, references),
            "other": mean_likeness(pictures, references[::-1]),
            "following": statistics.fmean(
                prompt_following(samples, expected()) for samples in pictures.values()
            ),
        }
        for way, pictures in rows.items()
    }


def mean_likeness(pictures: Mapping[str, Tensor], references: Sequence[Tensor]) -> float:
    """Return the mean over subjects of the likeness to the reference of that place."""
    pairs = zip(pictures.values(), references, strict=True)
    return statistics.fmean(subject_similarity(samples, real) for samples, real in pairs)


def expected() -> list[str]:
    """Return what the samples of a subject are to show, whatever it is called."""
    return [world.subject_caption(b) for b in BACKGROUNDS for _ in range(SAMPLES)]


def by_way(cells: Sequence[Mapping[str, Any]]) -> Table:
    """Return the scores by way, and by pair and seed."""
    ways = cells[0]["scores"]
    return {
        way: {(tuple(cell["subjects"]), cell["seed"]): cell["scores"][way] for cell in cells}
        for way in ways
    }


def differences(table: Table) -> dict[str, Differences]:
    """Compare every way with two LoRAs."""
    return {way: paired(table[way], table[BASELINE]) for way in table if way != BASELINE}


def markdown(table: Table) -> str:
    """Write the tables."""
    means = {way: mean_scores(cells) for way, cells in table.items()}
    rows = [[way, *(f"{row[name]:.3f}" for name in SCORES)] for way, row in means.items()]
    lines = markdown_table(["", *SCORES], rows)
    lines += ["", f"Differences to {BASELINE} (mean [95 % interval over n pairs]):", ""]
    return "\n".join([*lines, *difference_table(differences(table), SCORES)])


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, train, judge, print and save."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.together",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pairs", default="101:102,103:104,105:106,107:108", help="of subjects")
    parser.add_argument("--seeds", default="0", help="of training and sampling")
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument("--rank", type=int, default=4, help="of PaRa and of the LoRA")
    parser.add_argument("--layers", default="all but cross-attention", help="that learn")
    parser.add_argument("--called", default=CALLED, help="a name and a class for each subject")
    parser.add_argument("--prior", type=int, default=0, help="pictures of the class, by the base")
    parser.add_argument("--servers", type=int, default=2, help="at a time")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="where to save a picture of the samples (PNG)")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    pairs = [[int(part) for part in pair.split(":")] for pair in options.pairs.split(",")]
    tasks, called = list(product(pairs, numbers(options.seeds))), options.called.split(",")

    def one(worker: Worker, task: tuple[list[int], int]) -> tuple[dict[str, Any], Rows]:
        subjects, seed = task
        training = Training(
            seed, options.steps, options.rank, options.layers, options.prior, called
        )
        rows = sampled(worker.comfy, subjects, training)
        return {"subjects": subjects, "seed": seed, "scores": scores(rows, subjects)}, rows

    cells, pictures = [], {}
    with workers(min(options.servers, len(tasks))) as started:
        for cell, rows in share_out(started, one, tasks):
            print(cell, file=sys.stderr)
            cells.append(cell)
            pictures[str(cell["subjects"]), cell["seed"]] = rows
    table = by_way(cells)
    print(markdown(table))
    if options.json:
        command = shlex.join(["python", "-m", "benchmarks.together", *arguments])
        result = {"command": command, "machine": machine(), "steps": options.steps}
        result |= {"cells": cells, "paired": finite(differences(table))}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.sheet:
        subjects, seed = tasks[0]
        first = pictures[str(subjects), seed]
        heads = [f"a {name}, {background}" for name in called for background in BACKGROUNDS]
        shown = {way: torch.cat([x[::SAMPLES] for x in of.values()]) for way, of in first.items()}
        training = torch.cat([drawn(subject, 3) for subject in subjects])
        sheet(shown, training, heads).save(options.sheet, optimize=True)


if __name__ == "__main__":
    main()
