"""Every method on several unseen subjects and seeds: one table, one picture grid.

    python -m benchmarks.quality --subjects 101,102,103,104 --seeds 0,1,2 --json quality.json

Each (method, subject, seed) is trained and sampled once by a headless ComfyUI and kept under
benchmarks/work/quality/, so an interrupted run goes on where it was, and a table can grow. Prints
a Markdown table of means, and one of the differences to LoRA on the same subjects and seeds: their
mean with its 95 % interval (Student's t over subjects, each the mean of its seeds). Who learns less
drifts less; so a third table compares each with LoRA at equal subject similarity, interpolated
between the base and LoRAs of rising learning rates. What is more similar than these is left out.

    subject similarity   of "a zib totem …" with held-out pictures of the subject, mean cosine; its
                         prompts name backgrounds that it was not trained on
    class leak           the same similarity of "a totem …", with and without named parts
    subject following    share of what the subject's prompts name that their samples show
    other following      the same for prompts of other sprites
    class drift          energy distance from the base's samples of "a totem …"; that of the base
                         itself, from other noise, is its floor
    other drift          the same for other sprites
    diversity            mean distance of two samples of one prompt of the subject (LPIPS-like)
    nearest training     mean correlation of a sample's silhouette with the most alike training one
    nearest held-out     the same with as many held-out pictures: the difference is copying
    loss gap             stable loss on held-out pictures - on training ones, over the base's
                         held-out loss, less the same of the base
    corruption           log2 of the high-frequency energy of the subject's samples over that of
                         the base's samples from the same noise
    corruption, one step the same of latents predicted in one step, on held-out pictures
    noise                standard deviation of the grain in the subject's samples, in 1/255
"""

import argparse
import json
import math
import os
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from headless import OverrideError, PromptFailed

from .cells import (
    CLASS_PROMPTS,
    OTHER_PROMPTS,
    REFERENCE_NOISES,
    SIDE,
    Cell,
    Plan,
    Task,
    drawn,
    measure_memory,
    memory_file,
)
from .configurations import ABLATIONS, BASE, BASELINE, CONFIGURATIONS, MAIN, configuration
from .gain import interval, machine
from .metrics import (
    corruption_index,
    diversity,
    drift,
    features,
    nearest_silhouette,
    noise_level,
    prompt_following,
    subject_similarity,
)
from .servers import Worker, share_out, workers

CACHE = Path(__file__).parent / "work" / "quality"
REFERENCES = 8  # held-out pictures of the subject that samples are compared with
LADDER = (BASE, "lora-slow", BASELINE, "lora-fast")
COSTS = ("parameters", "file_size", "steps_per_second", "peak_memory")
Scores = dict[str, float]
History = list[dict[str, float]]
Table = dict[str, dict[tuple[int, int], Scores]]  # method -> (subject, seed) -> scores


def scores(cell: Cell, base: Cell, task: Task) -> Scores:
    """Judge what a trained network draws; with the base's own cell, what the base draws."""
    step = 0 if cell is base else task.plan.steps
    others = cell.pictures(step, OTHER_PROMPTS)
    following = prompt_following(others, repeated(OTHER_PROMPTS, task.plan.samples))
    named = subject_scores(cell, base, task, step)
    of_class = cell.pictures(step, CLASS_PROMPTS)
    drifts = [drift_from(base, cell, step, texts) for texts in (CLASS_PROMPTS, OTHER_PROMPTS)]
    return {
        **named,
        "prompt_following": (named["subject_following"] + following) / 2,
        "other_following": following,
        "class_leak": subject_similarity(of_class, drawn(task.subject, REFERENCES, "held-out")),
        "prior_drift": sum(drifts) / 2,
        "class_drift": drifts[0],
        "other_drift": drifts[1],
        **loss_scores(cell.facts),
        **costs(cell.facts),
    }


def subject_scores(cell: Cell, base: Cell, task: Task, step: int) -> Scores:
    """Judge the pictures of the subject after `step` steps."""
    prompts = task.plan.subject_prompts(task.subject)
    said = repeated(prompts, task.plan.samples)
    training = drawn(task.subject, task.plan.pictures)
    held_out = drawn(task.subject, REFERENCES, "held-out")
    samples = cell.pictures(step, prompts)
    nearest = nearest_silhouette(samples, training)
    nearest_held_out = nearest_silhouette(samples, held_out[: len(training)])
    return {
        "subject_similarity": subject_similarity(samples, held_out),
        "subject_following": prompt_following(samples, said),
        "diversity": diversity(samples, said),
        "nearest_training": nearest,
        "nearest_held_out": nearest_held_out,
        "copying": nearest - nearest_held_out,
        "corruption": corruption_index(samples, base.pictures(0, prompts)),
        "noise": float(noise_level(samples).mean()),
    }


def repeated(prompts: Iterable[str], count: int) -> list[str]:
    """Return each prompt `count` times, as its samples are."""
    return [prompt for prompt in prompts for _ in range(count)]


def drift_from(base: Cell, cell: Cell, step: int, prompts: Sequence[str]) -> float:
    """Return how far the samples of some prompts are from the base's, of other noise."""
    reference = features(base.pictures(0, prompts, REFERENCE_NOISES))
    return drift(features(cell.pictures(step, prompts)), reference)


def loss_scores(facts: Mapping[str, Any]) -> Scores:
    """Return how much more the loss fell on training pictures than on held-out ones."""
    if "train_loss" not in facts:
        return {}
    gap = facts["held_out_loss"] - facts["train_loss"]
    gap_of_base = facts["held_out_loss_of_base"] - facts["train_loss_of_base"]
    held_out = facts["held_out_loss"] / facts["held_out_loss_of_base"]
    scale = facts["held_out_loss_of_base"]
    found = {"loss_gap": (gap - gap_of_base) / scale, "held_out_loss": held_out}
    return found | {"latent_corruption": facts["corruption"]}


def costs(facts: Mapping[str, Any]) -> Scores:
    """Return what a training took, as far as it could be measured."""
    return {name: facts[name] for name in COSTS if facts.get(name) is not None}


# Statistics


def mean_scores(cells: Mapping[tuple[int, int], Scores]) -> Scores:
    """Return the means over subjects of the means over seeds."""
    per_subject = by_subject(cells)
    names = dict.fromkeys(name for row in per_subject.values() for name in row)
    return {name: mean(row[name] for row in per_subject.values() if name in row) for name in names}


def by_subject(cells: Mapping[tuple[int, int], Scores]) -> dict[int, Scores]:
    """Return each subject's means over its seeds."""
    groups: defaultdict[int, list[Scores]] = defaultdict(list)
    for (subject, _), row in cells.items():
        groups[subject].append(row)
    return {
        subject: {name: mean(row[name] for row in rows if name in row) for name in rows[0]}
        for subject, rows in groups.items()
    }


def paired(
    cells: Mapping[tuple[int, int], Scores], others: Mapping[tuple[int, int], Scores]
) -> dict[str, dict[str, float]]:
    """Compare two methods on the subjects and seeds that both have: mean difference, 95 % interval.

    Student's t over subjects, each the mean of its seeds. n is the number of subjects; one alone
    has no interval (NaN).
    """
    both = cells.keys() & others.keys()
    differences = by_subject(
        {
            key: {
                name: cells[key][name] - others[key][name]
                for name in cells[key]
                if name in others[key]
            }
            for key in sorted(both)
        }
    )
    names = dict.fromkeys(name for row in differences.values() for name in row)
    result = {}
    for name in names:
        values = [row[name] for row in differences.values() if name in row]
        middle, low, high = interval(values)
        result[name] = {"mean": middle, "low": low, "high": high, "n": len(values)}
    return result


def at_equal_similarity(table: Table, name: str) -> dict[str, dict[str, float]]:
    """Compare a row with LoRA trained just as far: differences as in `paired`."""
    alike = {
        key: found
        for key, row in table[name].items()
        if (found := interpolated(ladder_of(table, key), row["subject_similarity"])) is not None
    }
    return paired(table[name], alike)


def ladder_of(table: Table, key: tuple[int, int]) -> list[Scores]:
    """Return the base and the LoRAs of one subject and seed."""
    return [table[rung][key] for rung in LADDER if key in table.get(rung, {})]


def interpolated(ladder: Sequence[Scores], similarity: float) -> Scores | None:
    """Return the scores between those of a ladder; None where none is as similar."""
    rungs = sorted(ladder, key=lambda row: row["subject_similarity"])
    places = [row["subject_similarity"] for row in rungs]
    if not rungs or not places[0] <= similarity <= places[-1]:
        return None
    return {
        name: float(np.interp(similarity, places, [row[name] for row in rungs]))
        for name in rungs[0]
        if all(name in row for row in rungs)
    }


def mean(values: Iterable[float]) -> float:
    """Return the mean of what is a number; NaN when nothing is."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


# What is written

COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "subject_similarity": ("subject similarity ↑", "{:.3f}".format),
    "class_leak": ("class leak ↓", "{:.3f}".format),
    "subject_following": ("subject following ↑", "{:.3f}".format),
    "other_following": ("other following ↑", "{:.3f}".format),
    "class_drift": ("class drift ↓", "{:.3f}".format),
    "other_drift": ("other drift ↓", "{:.3f}".format),
    "diversity": ("diversity", "{:.3f}".format),
    "nearest_training": ("nearest training", "{:.3f}".format),
    "nearest_held_out": ("nearest held-out", "{:.3f}".format),
    "loss_gap": ("loss gap ↓", "{:+.3f}".format),
    "held_out_loss": ("held-out loss / base's ↓", "{:.3f}".format),
    "corruption": ("corruption", "{:+.2f}".format),
    "latent_corruption": ("corruption, one step", "{:+.3f}".format),
    "noise": ("noise", "{:.2f}".format),
    "parameters": ("learned numbers", "{:,.0f}".format),
    "file_size": ("file, MB", lambda value: f"{value / 1e6:.2f}"),
    "steps_per_second": ("steps/s", "{:.2f}".format),
    "peak_memory": ("peak memory, MB", lambda value: f"{value / 1e6:.0f}"),
}
TRAJECTORY = (
    "subject_similarity",
    "subject_following",
    "diversity",
    "nearest_training",
    "nearest_held_out",
    "corruption",
    "noise",
)
DIFFERENCES = (
    "subject_similarity",
    "class_leak",
    "subject_following",
    "other_following",
    "class_drift",
    "other_drift",
    "diversity",
    "copying",
    "loss_gap",
    "corruption",
    "latent_corruption",
)


def markdown(result: Mapping[str, Any]) -> str:
    """Write the tables."""
    lines = [f"`{result['command']}`", "", f"{result['machine']}. {result['cells']}", ""]
    lines += markdown_table(
        ["method", *(title for title, _ in COLUMNS.values())],
        [
            [name, *(shown(row.get(key), how) for key, (_, how) in COLUMNS.items())]
            for name, row in result["methods"].items()
        ],
    )
    for title, comparisons in (
        (f"Paired differences to {BASELINE} (mean [95 % interval])", result["paired"]),
        (f"Paired differences to {BASELINE} at equal subject similarity", result["matched"]),
        ("Paired differences to what each is a variant of", result["variants"]),
    ):
        if comparisons:
            rows = [
                [name, *(shown_interval(row.get(key)) for key in DIFFERENCES)]
                for name, row in comparisons.items()
            ]
            heads = ["method", *(key.replace("_", " ") for key in DIFFERENCES)]
            lines += ["", f"{title}:", "", *markdown_table(heads, rows)]
    for name, steps in result.get("trajectory", {}).items():
        rows = [
            [step, *(shown(row[key], COLUMNS[key][1]) for key in TRAJECTORY)]
            for step, row in steps.items()
        ]
        heads = ["step", *(COLUMNS[key][0] for key in TRAJECTORY)]
        lines += ["", f"{name}, over its steps:", "", *markdown_table(heads, rows)]
    return "\n".join(lines) + "\n"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def shown(value: float | None, how: Callable[[float], str]) -> str:
    """Write a number, or a dash for none."""
    return "-" if value is None or math.isnan(value) else how(value)


def shown_interval(found: Mapping[str, float] | None) -> str:
    """Write a difference with its interval; in bold when that leaves out zero."""
    if found is None or math.isnan(found["mean"]):
        return "-"
    if math.isnan(found["low"]):
        return f"{found['mean']:+.3f}"
    text = f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
    return f"**{text}**" if found["low"] > 0 or found["high"] < 0 else text


GAP, LEFT, INK, PAPER = 6, 110, "#1c1c1e", "#ffffff"


def sheet(rows: Mapping[str, Tensor], training: Tensor, heads: Sequence[str]) -> Image.Image:
    """Draw the training pictures above a row of samples for every method.

    rows: (columns, SIDE, SIDE, 3) in [0, 1] each, one column for every head.
    """
    step, columns = SIDE + GAP, max(len(heads), len(training))
    page = Image.new("RGB", (LEFT + columns * step, (len(rows) + 1) * step + 30), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for number, (title, pictures) in enumerate({"training": training, **rows}.items()):
        top = number * step + (30 if number else 0)
        draw.text((GAP, top + SIDE // 2), textwrap.fill(title, 15), INK, font, anchor="lm")
        for column, picture in enumerate(pictures):
            page.paste(as_image(picture), (LEFT + column * step, top))
    for column, head in enumerate(heads):
        middle = LEFT + column * step + SIDE // 2
        draw.text((middle, step + 12), head, INK, ImageFont.load_default(11), anchor="mm")
    return page.quantize(128, dither=Image.Dither.NONE)


def as_image(picture: Tensor) -> Image.Image:
    """Turn (H, W, 3) in [0, 1] into an image."""
    return Image.fromarray((picture * 255).round().byte().numpy())


# The command


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, compute what is missing, print and save."""
    options = parser().parse_args(arguments)
    if options.quick:
        options = quick(options)
    names = chosen(options)
    plan = Plan(
        steps=options.steps,
        batch_size=options.batch_size,
        samples=options.samples,
        trajectory=tuple(numbers(options.trajectory)) if options.trajectory else (),
    )
    keys = list(product(numbers(options.seeds), numbers(options.subjects)))
    tasks = {
        (name, subject, seed): Task(configuration(name), subject, seed, plan)
        for seed, subject in keys
        for name in names
    }
    base = Task(CONFIGURATIONS[BASE], 0, 0, plan)
    failed = []
    if not options.only_kept:
        failed = compute(tasks, base, options.cache, options.servers)
        measure_memories(tasks, options.cache)
    result = report(tasks, base, options.cache)
    result["command"] = " ".join(["python -m benchmarks.quality", *(arguments or sys.argv[1:])])
    text = markdown(result)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(finite(result), indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(text)
    if options.sheet:
        picture(tasks, base, options.cache).save(options.sheet, optimize=True)
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--subjects", default="101,102,103,104", help="seeds of the characters")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of training")
    parser.add_argument(
        "--methods", help=f"of: {', '.join(CONFIGURATIONS)}; default: the main ones"
    )
    parser.add_argument("--ablations", action="store_true", help="the variants of methods as well")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="training steps")
    parser.add_argument("--batch-size", type=int, default=Plan.batch_size)
    parser.add_argument("--samples", type=int, default=Plan.samples, help="pictures of each prompt")
    parser.add_argument(
        "--trajectory", metavar="STEPS", help="sample at these steps too, multiples of the first"
    )
    parser.add_argument("--quick", action="store_true", help="a small version, under 10 minutes")
    parser.add_argument(
        "--only-kept", action="store_true", help="train nothing: show what is there"
    )
    parser.add_argument("--servers", type=int, default=default_servers(), help="at a time")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where cells are kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--sheet", type=Path, help="where to save a picture of the samples (PNG)")
    return parser


def quick(options: argparse.Namespace) -> argparse.Namespace:
    """Make everything small that was not asked for otherwise."""
    small = {"subjects": "101", "seeds": "0", "steps": 80, "samples": 2}
    given = vars(options)
    default = vars(parser().parse_args([]))
    kept = {name: value for name, value in small.items() if given[name] == default[name]}
    return argparse.Namespace(**given | kept)


def default_servers() -> int:
    """Return one server per core, or one alone on a GPU."""
    return 1 if torch.cuda.is_available() else min(4, os.cpu_count() or 1)


def numbers(text: str) -> list[int]:
    """Read "1,2,3"."""
    return [int(part) for part in text.split(",")]


def chosen(options: argparse.Namespace) -> list[str]:
    """Return the names of the rows to compute; the baseline always."""
    default = [*MAIN, *(ABLATIONS if options.ablations else ())]
    names = options.methods.split(",") if options.methods else default
    unknown = [name for name in names if name.partition("@")[0] not in CONFIGURATIONS]
    if unknown:
        raise SystemExit(f"--methods: no {', '.join(unknown)}; of: {', '.join(CONFIGURATIONS)}")
    return [name for name in dict.fromkeys([BASELINE, *names]) if name != BASE]


Tasks = Mapping[tuple[str, int, int], Task]


def compute(tasks: Tasks, base: Task, cache: Path, servers: int) -> list[str]:
    """Make the cells that are missing; return what failed, which is said and does not end it."""
    wanted = {task.key: (label, task) for label, task in tasks.items()}
    missing = {"base": base} if base.load(cache) is None else {}
    missing |= {
        " ".join(map(str, label)): task
        for label, task in wanted.values()
        if task.load(cache) is None
    }
    if not missing:
        return []
    print(f"{len(tasks) + 1 - len(missing)} cells are there, {len(missing)} to do", file=sys.stderr)

    def one(worker: Worker, label: str) -> tuple[str, str]:
        try:
            missing[label].make(worker, cache)
        except (PromptFailed, OverrideError) as error:
            return label, str(error)
        return label, ""

    failed = []
    with workers(min(servers, len(missing))) as started:
        for number, (label, error) in enumerate(share_out(started, one, missing), 1):
            note = f": FAILED: {error}" if error else ""
            print(
                f"{time.strftime('%H:%M:%S')} {number}/{len(missing)} {label}{note}",
                file=sys.stderr,
            )
            failed += [label] if error else []
    return failed


def measure_memories(tasks: Tasks, cache: Path) -> None:
    """Measure the peak memory of every row once; a GPU's is in each cell."""
    if torch.cuda.is_available():
        return
    for name, task in of_each_name(tasks).items():
        if task.load(cache) is not None and not memory_file(task, cache).exists():
            print(f"{time.strftime('%H:%M:%S')} memory of {name}", file=sys.stderr)
            measure_memory(task, cache)


def of_each_name(tasks: Tasks) -> dict[str, Task]:
    """Return the first task of every row."""
    return {name: task for (name, _, _), task in reversed(list(tasks.items()))}


def report(tasks: Tasks, base: Task, cache: Path) -> dict[str, Any]:
    """Score every cell that is there and compare."""
    of_base = base.load(cache)
    if of_base is None:
        raise SystemExit(f"{cache} does not hold the base's samples: run without --only-kept")
    table: Table = {BASE: {}}
    trajectories: dict[str, dict[str, list[Scores]]] = {}
    histories: dict[str, list[History]] = {}
    for (name, subject, seed), task in tasks.items():
        cell = task.load(cache)
        if cell is None:
            continue
        table[BASE][subject, seed] = scores(of_base, of_base, task)
        table.setdefault(name, {})[subject, seed] = scores(cell, of_base, task)
        histories.setdefault(name, []).append(cell.history)
        for step in (*task.plan.trajectory, *([task.plan.steps] if task.plan.trajectory else [])):
            row = subject_scores(cell, of_base, task, step)
            trajectories.setdefault(name, {}).setdefault(str(step), []).append(row)
    methods = {name: mean_scores(cells) for name, cells in table.items()}
    for name, task in of_each_name(tasks).items():
        kept = memory_file(task, cache)
        if name in methods and kept.exists():
            methods[name] |= json.loads(kept.read_text())
    names = [name for name in table if name not in (BASE, BASELINE)]
    variants = {n: configuration(n).against for n in names}
    return {
        "machine": machine(),
        "cells": f"{sum(map(len, table.values())) - len(table[BASE])} trainings; "
        f"{describe(next(iter(tasks.values())).plan)}",
        "methods": methods,
        "paired": {name: paired(table[name], table[BASELINE]) for name in names},
        "matched": {
            name: found
            for name in names
            if name not in LADDER and (found := at_equal_similarity(table, name))
        },
        "variants": {
            f"{name} - {other}": paired(table[name], table[other])
            for name, other in variants.items()
            if other != BASELINE and other in table
        },
        "gamma": {
            name: gammas(of_name)
            for name, of_name in histories.items()
            if any("gamma_0" in line for line in of_name[0])
        },
        "trajectory": {
            name: {
                step: {key: mean(row[key] for row in rows) for key in rows[0]}
                for step, rows in steps.items()
            }
            for name, steps in trajectories.items()
        },
    }


def gammas(histories: Sequence[History]) -> dict[str, list[float]]:
    """Return APT's indicator in every bin of timesteps, low ones first, over the steps."""
    steps = [[line for line in history if "gamma_0" in line] for history in histories]
    count = min(map(len, steps))
    result = {}
    for tenths in (1, 2, 5, 10):
        lines = [of_run[max(0, count * tenths // 10 - 1)] for of_run in steps]
        bins = sum(key.startswith("gamma_") for key in lines[0])
        result[str(int(lines[0]["step"]))] = [
            mean(line[f"gamma_{bin}"] for line in lines) for bin in range(bins)
        ]
    return result


def describe(plan: Plan) -> str:
    """Say what all cells share."""
    return (
        f"{plan.steps} steps of batch {plan.batch_size} on {plan.pictures} pictures, "
        f"{plan.samples} samples of a prompt"
    )


def finite(value: Any) -> Any:
    """Return JSON values with null for what is not a number, as strict readers want it."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def picture(tasks: Tasks, base: Task, cache: Path) -> Image.Image:
    """Draw the sheet of the first subject and seed: two samples of each kind of prompt."""
    _, subject, seed = next(iter(tasks))
    plan = base.plan
    prompts = [*plan.subject_prompts(subject)[:2], *CLASS_PROMPTS[1:3], *OTHER_PROMPTS[:2]]
    heads = [short(text) for text in prompts for _ in range(2)]
    rows = {}
    named = {(BASE, subject, seed): base} | dict(tasks)
    for (name, *which), task in named.items():
        cell = task.load(cache) if which == [subject, seed] else None
        if cell is not None:
            step = 0 if name == BASE else plan.steps
            samples = cell.pictures(step, prompts).unflatten(0, (len(prompts), -1))
            rows[name] = samples[:, :2].flatten(0, 1)
    return sheet(rows, drawn(subject, plan.pictures), heads)


def short(prompt: str) -> str:
    """Return the words of a prompt that tell it from others, for a narrow column."""
    words = prompt.replace("background", "").replace("a ", "", 1).split()
    return " ".join(words[:3]) + (" …" if len(words) > 3 else "")


if __name__ == "__main__":
    sys.exit(main())
