"""Does training help? Base against personalised model, on several subjects and seeds.

    python -m benchmarks.gain --subjects 1,2,3 --seeds 0,1,2 --methods lora,para --json gain.json

Runs workflows/api/demo.json through a headless ComfyUI once per (method, subject, seed) and has the
judges of demo/judges.py score the pictures. Prints a Markdown table: means, and the mean of the
paired differences with its 95 % interval (Student's t over subject x seed cells).
"""

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from demo.run import BASE, PERSONALIZED, WORKFLOW, adjusted, collect, judged, node_of, subject_name
from headless import Comfy, ComfyServer

METRICS = ("subject_similarity", "prompt_following")


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
    comfy: Comfy,
    methods: Sequence[str],
    subjects: Sequence[int],
    seeds: Sequence[int],
    steps: int | None = None,
) -> Iterator[Cell]:
    """Train and score every cell, one after the other."""
    known = comfy.object_info()
    for method in methods:
        for subject in subjects:
            for seed in seeds:
                prompt = json.loads(WORKFLOW.read_text())
                options = argparse.Namespace(method=method, subject=subject, steps=steps)
                prompt = adjusted(prompt, options, known)
                prompt[node_of(prompt, "PersonalizeTrain")]["inputs"]["seed"] = seed
                for node in prompt.values():  # other pictures for another seed
                    if node["class_type"] == "KSampler":
                        node["inputs"]["seed"] += 1000 * seed
                pictures = collect(comfy, prompt, comfy.run(prompt))
                scores = judged(pictures, subject_name(prompt))
                yield Cell(method, subject, seed, *(scores[metric] for metric in METRICS))


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
        "| method | metric | base | personalized | paired difference [95 % interval] | cells |",
        "|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(cell.method for cell in cells):
        own = [cell for cell in cells if cell.method == method]
        for metric in METRICS:
            before = np.mean([getattr(cell, metric)[BASE] for cell in own])
            after = np.mean([getattr(cell, metric)[PERSONALIZED] for cell in own])
            mean, low, high = interval([cell.difference(metric) for cell in own])
            lines.append(
                f"| {method} | {metric.replace('_', ' ')} | {before:.3f} | {after:.3f} "
                f"| {mean:+.3f} [{low:+.3f}, {high:+.3f}] | {len(own)} |"
            )
    return "\n".join(lines)


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
    with ComfyServer() as server, Comfy(server.url) as comfy:
        numbers = (map(int, text.split(",")) for text in (options.subjects, options.seeds))
        subjects, seeds = (list(values) for values in numbers)
        for cell in measure(comfy, options.methods.split(","), subjects, seeds, options.steps):
            cells.append(cell)
            print(cell, file=sys.stderr)
    print(table(cells))
    if options.json:
        result = {
            "command": " ".join(["python -m benchmarks.gain", *sys.argv[1:]]),
            "machine": f"{platform.machine()}, {platform.system()}",
            "cells": [asdict(cell) for cell in cells],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
