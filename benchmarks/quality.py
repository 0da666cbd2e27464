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
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from headless import OverrideError, PromptFailed

from .cells import CLASS_PROMPTS, OTHER_PROMPTS, Plan, Task, drawn, measure_memory, memory_file
from .comparisons import LADDER, Table, at_equal_similarity, mean, mean_scores, paired
from .configurations import ABLATIONS, BASE, BASELINE, CONFIGURATIONS, MAIN, configuration
from .gain import machine
from .scores import Scores, scores, subject_scores
from .servers import Worker, share_out, workers
from .tables import markdown, sheet

CACHE = Path(__file__).parent / "work" / "quality"
History = list[dict[str, float]]


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, compute what is missing, print and save."""
    options = parser().parse_args(arguments)
    if options.quick:
        options = quick(options)
    names = chosen(options)
    plan = Plan(
        steps=options.steps,
        batch_size=options.batch_size,
        pictures=options.pictures,
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
    parser.add_argument("--pictures", type=int, default=Plan.pictures, help="to train on")
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
