"""Does training help? Base against personalised model, on several subjects and seeds.

    python -m benchmarks.gain --subjects 1,2,3 --seeds 0,1,2 --methods lora,para --json gain.json

Runs workflows/api/demo.json through a headless ComfyUI once per (method, subject, seed) and has the
judges of demo/judges.py score the pictures. Prints a Markdown table: means, and the mean of the
paired differences with its 95 % interval (Student's t over subjects, each the mean of its seeds).
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from demo.run import BASE, PERSONALIZED, WORKFLOW, adjusted, collect, judged, node_of, subject_name
from headless import Comfy

from .servers import Worker, share_out, workers

METRICS = ("subject_similarity", "prompt_following")
PROMPTS = ("a {} totem in a meadow", "a {} totem on a white background", "a {} totem at sunset")


@dataclass(frozen=True)
class Cell:
    """One training and its scores, base beside personalised."""

    method: str
    subject: int
    seed: int
    subject_similarity: dict[str, float]
    prompt_following: dict[str, float]

    def difference(self, metric: str) -> float:
        """Return personalised minus base."""
        scores = getattr(self, metric)
        return scores[PERSONALIZED] - scores[BASE]


def measure(
    workers: Sequence[Worker],
    methods: Sequence[str],
    subjects: Sequence[int],
    seeds: Sequence[int],
    steps: int | None = None,
) -> Iterator[Cell]:
    """Train and score every (method, seed, subject), shared out to the servers."""

    def cell(worker: Worker, what: tuple[str, int, int]) -> Cell:
        return train_and_score(worker.comfy, *what, steps)

    return share_out(workers, cell, product(methods, seeds, subjects))


def train_and_score(comfy: Comfy, method: str, seed: int, subject: int, steps: int | None) -> Cell:
    """Run the demo's workflow once, two pictures a prompt, and judge what it saved."""
    options = argparse.Namespace(method=method, subject=subject, steps=steps)
    workflow = json.loads(WORKFLOW.read_text())
    prompt = adjusted(workflow, options, comfy.object_info(), PROMPTS)
    prompt[node_of(prompt, "PersonalizeTrain")]["inputs"]["seed"] = seed
    for node in prompt.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["seed"] = 1000 * seed
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"]["batch_size"] = 2
    pictures = collect(comfy, prompt, comfy.run(prompt, timeout=1800))
    scores = judged(pictures, subject_name(prompt))
    return Cell(method, subject, seed, *(scores[metric] for metric in METRICS))


def by_subject(cells: Sequence[Cell], metric: str) -> list[float]:
    """Return each subject's mean difference over its seeds."""
    subjects = dict.fromkeys(cell.subject for cell in cells)
    return [
        float(np.mean([cell.difference(metric) for cell in cells if cell.subject == subject]))
        for subject in subjects
    ]


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and the ends of its 95 % interval."""
    values = np.asarray(differences)
    if len(values) < 2:
        return float(values.mean()), float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def table(cells: Sequence[Cell]) -> str:
    """Write the Markdown table."""
    lines = [
        "| method | metric | base | personalized | difference [95 % interval] | raised in |",
        "|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(cell.method for cell in cells):
        own = [cell for cell in cells if cell.method == method]
        for metric in METRICS:
            before = np.mean([getattr(cell, metric)[BASE] for cell in own])
            after = np.mean([getattr(cell, metric)[PERSONALIZED] for cell in own])
            raised = sum(cell.difference(metric) > 0 for cell in own)
            mean, low, high = interval(by_subject(own, metric))
            lines.append(
                f"| {method} | {metric.replace('_', ' ')} | {before:.3f} | {after:.3f} "
                f"| {mean:+.3f} [{low:+.3f}, {high:+.3f}] | {raised} of {len(own)} |"
            )
    return "\n".join(lines)


def machine() -> str:
    """Say what this ran on."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs{gpu}"
    return f"{system}, torch {torch.__version__}"


def main() -> None:
    """Parse the command line, measure, print and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gain", description=__doc__)
    parser.add_argument("--subjects", default="1,2,3", help="seeds of the made-up characters")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of training and sampling")
    parser.add_argument("--methods", default="lora,para")
    parser.add_argument("--steps", type=int, help="training steps; default: the workflow's")
    parser.add_argument("--json", type=Path, help="where to save the cells")
    options = parser.parse_args()
    cells: list[Cell] = []
    numbers = (map(int, text.split(",")) for text in (options.subjects, options.seeds))
    subjects, seeds = (list(values) for values in numbers)
    with workers(min(4, os.cpu_count() or 1)) as started:
        for cell in measure(started, options.methods.split(","), subjects, seeds, options.steps):
            cells.append(cell)
            print(cell, file=sys.stderr)
    print(table(cells))
    if options.json:
        result = {
            "command": " ".join(["python -m benchmarks.gain", *sys.argv[1:]]),
            "machine": machine(),
            "cells": [asdict(cell) for cell in cells],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
