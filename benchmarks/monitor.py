"""Is the checkpoint that the monitor picks a good one? And what does watching cost?

    python -m benchmarks.monitor --subjects 201,202,203,204,205 --seeds 0,1,2 --json monitor.json

Trains plain LoRA and full fine-tuning far too long through a headless ComfyUI, with a monitor at
its default cadence that keeps every evaluated checkpoint. Each checkpoint is then asked about 100
fresh pictures of the subject that neither training nor monitor has seen, and some are sampled and
judged. Cells are kept under benchmarks/work/monitor/: the same command goes on where it stopped.

    picked vs best   fresh loss of the checkpoint that is handed on when the run is stopped early,
                     over the lowest of all checkpoints, - 1
    last vs best     the same of the last step
    steps saved      share of the steps that early stopping leaves out
    stopping costs   fresh loss of what early stopping hands on, over that of the whole run's pick
    overhead         time of the evaluations over that of the training
    u-shaped         share of runs whose held-out loss falls first and ends 2 % above its lowest
    judged           likeness and prompt following of picked, most liked and last checkpoint
    corruption       highest index (1: as the base), its step, and the index at the end
    hump             share of runs whose index falls again by a quarter: the corruption stage
    gamma            of the lowest, middle and highest timesteps: at a tenth of the run, at its end
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from demo import world
from demo.run import training_node
from headless import Comfy, Graph, PromptFailed, fill_defaults, find_comfyui
from personalize.trainers.artifact import Personalization
from personalize.trainers.data import Example
from personalize.trainers.denoiser import Denoiser
from personalize.trainers.edits import of_weights, parameter_name
from personalize.trainers.monitor import Evaluation, Probe
from personalize.trainers.sites import parameter_sites
from personalize.trainers.verdict import RISE, Rules, best_step, corruption_stage, stopped_at

from . import ROOT
from .cells import OTHER_PROMPTS, SIDE, drawn, images
from .configurations import CONFIGURATIONS
from .gain import interval, machine
from .metrics import prompt_following, subject_similarity
from .servers import Worker, share_out, workers

CACHE = ROOT / "benchmarks" / "work" / "monitor"
FORMAT = 1  # of a cell: raise it, and all are made anew
FRESH, ROUNDS = 100, 10  # pictures; rows that each tenth of the timesteps is asked
RULES = Rules()  # the monitor's defaults
RATIOS = ("picked_vs_best", "last_vs_best", "steps_saved", "stopping_costs", "overhead")


@dataclass(frozen=True)
class Plan:
    """What all cells share."""

    steps: int = 1000
    batch_size: int = 2
    pictures: int = 4  # to train on
    held_out: int = 2  # for the monitor
    judged: int = 6  # checkpoints that are sampled, beside the picked and the last
    samples: int = 2  # of each prompt
    sampler_steps: int = 20


@dataclass(frozen=True)
class Task:
    """A cell: one training, there already or not."""

    method: str
    subject: int
    seed: int
    plan: Plan

    @property
    def key(self) -> str:
        """Return the hash of all that decides what is in the cell."""
        configuration = asdict(CONFIGURATIONS[self.method])
        text = json.dumps([FORMAT, asdict(self), configuration, asdict(RULES)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def load(self, folder: Path) -> "Cell | None":
        """Return the cell when it is there."""
        path = folder / f"{self.key}.json"
        if not path.is_file():
            return None
        kept = json.loads(path.read_text())
        lines = [line for line in kept["history"] if line.get("evaluation")]
        by_step = ({int(s): v for s, v in kept[name].items()} for name in ("fresh", "judged"))
        return Cell(lines, *by_step)

    def make(self, worker: Worker, folder: Path) -> None:
        """Train, measure and write the cell."""
        run = train(worker, self)
        history = [json.loads(line) for line in (run / "history.jsonl").open()]
        steps = [line["step"] for line in history if line.get("evaluation") and line["step"]]
        fresh = fresh_losses(self.subject, {step: checkpoint(run, step) for step in steps})
        judged = judge(worker.comfy, self, sampled_steps(history, self.plan))
        shutil.rmtree(run)
        kept = {"task": asdict(self), "history": history, "fresh": fresh, "judged": judged}
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{self.key}.part"
        temporary.write_text(json.dumps(kept))
        temporary.rename(folder / f"{self.key}.json")


@dataclass(frozen=True)
class Cell:
    """What is known of a training."""

    lines: list[dict[str, Any]]  # evaluations, as in the history
    fresh: dict[int, float]  # loss on the fresh pictures, by step; 0 is the base
    judged: dict[int, dict[str, float]]  # by step

    def scores(self) -> dict[str, float]:
        """Say how well the monitor did."""
        evaluations = [Evaluation.from_line(line) for line in self.lines]
        last = evaluations[-1].step
        stop = stopped_at(evaluations, RULES) or last
        seen = [e for e in evaluations if e.step <= stop]
        picked, whole = (best_step(part, RULES) or last for part in (seen, evaluations))
        trained = {step: loss for step, loss in self.fresh.items() if step > 0}
        lowest = min(trained.values())
        cost = sum(line["evaluation_seconds"] for line in self.lines)
        held_out = [e.held_out for e in evaluations if e.held_out is not None]
        inside = min(held_out) < min(held_out[0], held_out[-1] / (1 + RISE))
        grain = max(evaluations, key=lambda e: e.corruption)
        early = evaluations[len(evaluations) // 10].gamma
        return {
            "picked": picked,
            "best": min(trained, key=lambda step: trained[step]),
            "stopped_at": stop,
            "picked_vs_best": trained[picked] / lowest - 1,
            "last_vs_best": trained[last] / lowest - 1,
            "steps_saved": 1 - stop / last,
            "stopping_costs": trained[picked] / trained[whole] - 1,
            "overhead": cost / (self.lines[-1]["seconds"] - cost),
            "u_shaped": float(inside),
            "corruption": grain.corruption,
            "corruption_step": grain.step,
            "corruption_at_end": evaluations[-1].corruption,
            "hump": float(corruption_stage(evaluations) is not None),
            **{f"gamma_{b}_early": early[b] for b in (0, 5, 9)},
            **{f"gamma_{b}_late": evaluations[-1].gamma[b] for b in (0, 5, 9)},
            **self._judged(picked, last),
        }

    def _judged(self, picked: int, last: int) -> dict[str, float]:
        """Return the judges' scores of the picked, the most liked and the last checkpoint."""
        trained = {step: row for step, row in self.judged.items() if step > 0}
        liked = max(trained, key=lambda step: sum(trained[step].values()))
        nearest = min(trained, key=lambda step: abs(step - picked))
        rows = {"picked": trained[nearest], "liked": trained[liked], "last": trained[last]}
        found = {f"{name}_{of}": v for name, row in rows.items() for of, v in row.items()}
        return found | {"liked_step": liked}


# What is computed


def train(worker: Worker, task: Task) -> Path:
    """Train far too long, with all that the monitor measures kept; return the run's folder."""
    comfy, plan = worker.comfy, task.plan
    known, graph = comfy.object_info(), Graph()
    base = graph.add("PersonalizeDemoBase")
    wires = []
    for split, count in (("training", plan.pictures), ("held-out", plan.held_out)):
        how = {"subject": task.subject, "count": count, "split": split, "resolution": SIDE}
        wires.append(graph.add("PersonalizeDemoSubject", **how))
    images = graph.add("ImageBatch", image1=(wires[0], 0), image2=(wires[1], 0))
    captions = graph.add(
        "StringConcatenate", string_a=(wires[0], 1), string_b=(wires[1], 1), delimiter="\n"
    )
    inputs = {"images": (images, 0), "captions": (captions, 0), "clip": (base, 1), "vae": (base, 2)}
    how = {"resolution": SIDE, "hold_out": plan.held_out, "instance_prompt": "a zib totem"}
    data = graph.add("PersonalizeDataset", **inputs, **how)
    monitor = graph.add("PersonalizeMonitor", early_stop=False, restore_best=False, keep=1000)
    configuration = CONFIGURATIONS[task.method]
    settings = {"steps": plan.steps, "batch_size": plan.batch_size, "seed": task.seed}
    graph.add(
        training_node(configuration.method, known),
        model=(base, 0),
        data=(data, 0),
        monitor=(monitor, 0),
        name=task.key,
        **settings,
        **dict(configuration.settings),
    )
    runs = worker.server.output_dir / "personalized"
    shutil.rmtree(runs / task.key, ignore_errors=True)  # of an attempt that failed
    comfy.run(fill_defaults(graph, known))
    return runs / task.key


def checkpoint(run: Path, step: int) -> Path:
    """Return the file of a step."""
    return run / f"checkpoint-{step:06d}.safetensors"


@cache
def demo_base() -> Any:
    """Load the demo base's networks into this process."""
    from demo.base_model import load_base

    os.environ.setdefault("COMFYUI_PATH", str(find_comfyui()))
    torch.set_num_threads(1)
    return load_base()


@torch.no_grad()
def fresh_losses(subject: int, checkpoints: Mapping[int, Path]) -> dict[int, float]:
    """Return the loss on fresh pictures of the base (step 0) and of every checkpoint."""
    from copy import deepcopy

    from demo.base_model import noise_schedule

    base = demo_base()
    schedule = noise_schedule()
    probe = Probe.of(fresh_examples(subject), len(schedule.alphas_cumprod), ROUNDS)
    sites = parameter_sites(base.unet)
    losses = {}
    for step, path in {0: None, **checkpoints}.items():
        unet = deepcopy(base.unet)
        edits = Personalization.load(path).edits(sites)[0] if path is not None else {}
        for site, edit in of_weights(edits).items():
            weight = unet.get_parameter(parameter_name(site))
            weight.copy_(edit.apply(weight))
        denoiser = Denoiser(unet, schedule.alphas_cumprod, "epsilon")
        losses[step] = float(probe.ask(denoiser).loss.mean())
    return losses


def fresh_examples(subject: int) -> list[Example]:
    """Draw held-out pictures of a subject behind those that a monitor could have seen."""
    from demo.base_model import SD15_LATENT_SCALE

    base, skipped = demo_base(), 50
    found = []
    for pixels, caption in world.subject_pictures(subject, skipped + FRESH, "held-out", SIDE)[
        skipped:
    ]:
        picture = torch.from_numpy(pixels).float().movedim(-1, 0) / 127.5 - 1
        latent = base.vae.encode(picture[None])[0] * SD15_LATENT_SCALE
        found.append(Example(picture, latent, caption, base.context([caption])[0]))
    return found


def sampled_steps(history: Iterable[Mapping[str, Any]], plan: Plan) -> list[int]:
    """Choose the checkpoints to judge: some over the run, the one that is picked, the last."""
    evaluations = [Evaluation.from_line(line) for line in history if line.get("evaluation")]
    steps = [e.step for e in evaluations if e.step > 0]
    stop = stopped_at(evaluations, RULES) or steps[-1]
    picked = best_step([e for e in evaluations if e.step <= stop], RULES)
    spread = [steps[i * len(steps) // plan.judged] for i in range(plan.judged)]
    return sorted({*spread, picked or steps[-1], steps[-1]})


def judge(comfy: Comfy, task: Task, steps: Sequence[int]) -> dict[int, dict[str, float]]:
    """Sample the base (step 0) and some checkpoints, and have the pictures judged."""
    plan, known, graph = task.plan, comfy.object_info(), Graph()
    base, latent = graph.add("PersonalizeDemoBase"), graph.empty_latent(SIDE, plan.samples)
    mine = [world.subject_caption(background) for background in world.BACKGROUNDS[:4]]
    saved = {}
    for step in (0, *steps):
        model = (base, 0)
        if step:
            load = {"model": model, "run": task.key, "checkpoint": f"step {step}", "strength": 1.0}
            model = (graph.add("PersonalizeLoad", **load), 0)
        for text in (*mine, *OTHER_PROMPTS):
            saved[step, text] = graph.pictures(base, model, text, latent, steps=plan.sampler_steps)
    result = comfy.run(fill_defaults(graph, known))

    def pictures(step: int, texts: Iterable[str]) -> Tensor:
        found = [np.asarray(i) for t in texts for i in images(comfy, result, saved[step, t])]
        return torch.from_numpy(np.stack(found)).float() / 255

    references = drawn(task.subject, 8, "held-out")
    said = [text for text in (*mine, *OTHER_PROMPTS) for _ in range(plan.samples)]
    return {
        step: {
            "likeness": subject_similarity(pictures(step, mine), references),
            "following": prompt_following(pictures(step, (*mine, *OTHER_PROMPTS)), said),
        }
        for step in (0, *steps)
    }


# The command


def compute(tasks: Sequence[Task], folder: Path, servers: int) -> None:
    """Make the cells that are missing; what fails is said and does not end it."""
    missing = [task for task in tasks if task.load(folder) is None]

    def one(worker: Worker, task: Task) -> str:
        name = f"{task.method} {task.subject} {task.seed}"
        try:
            task.make(worker, folder)
        except PromptFailed as error:
            return f"{name}: FAILED: {error}"
        return name

    if missing:
        with workers(min(servers, len(missing))) as started:
            for number, text in enumerate(share_out(started, one, missing), 1):
                print(
                    f"{time.strftime('%H:%M:%S')} {number}/{len(missing)} {text}", file=sys.stderr
                )


def report(tasks: Sequence[Task], folder: Path) -> dict[str, Any]:
    """Summarise the cells that are there: the main ratios over all, and everything by method."""
    methods = {}
    for method in dict.fromkeys(task.method for task in tasks):
        own = [(t, cell) for t in tasks if t.method == method and (cell := t.load(folder))]
        rows = {f"{t.subject}/{t.seed}": cell.scores() for t, cell in own}
        if rows:
            methods[method] = {
                "cells": rows,
                "mean": {name: mean(rows, name) for name in next(iter(rows.values()))},
                "interval": {name: by_subject(rows, name) for name in RATIOS},
                "gamma": mean_gamma([cell for _, cell in own]),
                "within_2_percent": sum(r["picked_vs_best"] <= 0.02 for r in rows.values()),
            }
    every = {f"{m}/{key}": row for m, each in methods.items() for key, row in each["cells"].items()}
    overall = {name: mean(every, name) for name in RATIOS if every}
    return {**overall, "machine": machine(), "plan": asdict(tasks[0].plan), "methods": methods}


def mean_gamma(cells: Sequence[Cell]) -> dict[str, list[float]]:
    """Return the indicator of every bin, low timesteps first, by step: the mean over cells."""
    lines = zip(*(cell.lines for cell in cells), strict=True)
    return {
        str(at_step[0]["step"]): np.mean([line["gamma"] for line in at_step], 0).round(3).tolist()
        for at_step in lines
    }


def mean(rows: Mapping[str, Mapping[str, float]], name: str) -> float:
    """Return the mean over cells."""
    return statistics.fmean(row[name] for row in rows.values())


def by_subject(rows: Mapping[str, Mapping[str, float]], name: str) -> dict[str, float | None]:
    """Return the mean over subjects (each the mean of its seeds) with its 95 % interval."""
    subjects = dict.fromkeys(key.split("/")[0] for key in rows)
    means = [
        statistics.fmean(row[name] for key, row in rows.items() if key.split("/")[0] == subject)
        for subject in subjects
    ]
    values = zip(("mean", "low", "high"), interval(means), strict=True)
    return {key: None if value != value else value for key, value in values}


def table(result: Mapping[str, Any]) -> str:
    """Write the Markdown table."""
    names = list(result["methods"])
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]

    def row(title: str, cells: Iterable[str]) -> None:
        lines.append(f"| {title} | " + " | ".join(cells) + " |")

    found = result["methods"].values()
    row("runs", [str(len(m["cells"])) for m in found])
    row(
        "picked within 2 % of the best",
        [f"{m['within_2_percent']} of {len(m['cells'])}" for m in found],
    )
    for name in RATIOS:
        row(name.replace("_", " "), [percent(m["interval"][name]) for m in found])
    for name, title in {"u_shaped": "u-shaped", "hump": "corruption stage seen"}.items():
        row(title, [f"{m['mean'][name]:.0%}" for m in found])
    for judge_ in ("likeness", "following"):
        for which in ("picked", "liked", "last"):
            row(f"{judge_}, {which}", [f"{m['mean'][f'{which}_{judge_}']:.3f}" for m in found])
    for name in ("corruption", "corruption_step", "corruption_at_end"):
        row(name.replace("_", " "), [f"{m['mean'][name]:.2f}" for m in found])
    for when in ("early", "late"):
        values = [[m["mean"][f"gamma_{b}_{when}"] for b in (0, 5, 9)] for m in found]
        row(f"gamma, {when}", [" ".join(f"{v:.2f}" for v in each) for each in values])
    return "\n".join(lines)


def percent(found: Mapping[str, float | None]) -> str:
    """Write a share with its interval."""
    if found["low"] is None:
        return f"{found['mean']:.1%}"
    return f"{found['mean']:.1%} [{found['low']:.1%}, {found['high']:.1%}]"


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, compute what is missing, print and save."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.monitor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--subjects", default="201,202,203,204,205")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default="lora,dreambooth")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--batch-size", type=int, default=Plan.batch_size)
    parser.add_argument("--quick", action="store_true", help="one subject, one seed, LoRA alone")
    parser.add_argument(
        "--only-kept", action="store_true", help="train nothing: show what is there"
    )
    parser.add_argument("--servers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--cache", type=Path, default=CACHE, help="where cells are kept")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    subjects, seeds = (
        [int(n) for n in text.split(",")] for text in (options.subjects, options.seeds)
    )
    methods, plan = options.methods.split(","), Plan(options.steps, options.batch_size)
    if options.quick:
        subjects, seeds, methods = subjects[:1], seeds[:1], methods[:1]
        plan = Plan(min(options.steps, 300), options.batch_size, judged=2, samples=1)
    tasks = [Task(m, subject, seed, plan) for seed, subject, m in product(seeds, subjects, methods)]
    if not options.only_kept:
        compute(tasks, options.cache, options.servers)
    result = report(tasks, options.cache)
    result["command"] = " ".join(["python -m benchmarks.monitor", *(arguments or sys.argv[1:])])
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
