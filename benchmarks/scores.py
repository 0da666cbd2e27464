"""What the judges and the run's own history say of one training."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .cells import CLASS_PROMPTS, OTHER_PROMPTS, REFERENCE_DRAWS, Cell, Task, drawn
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

REFERENCES = 8  # held-out pictures of the subject that samples are compared with
FACTS = ("parameters", "file_size", "steps_per_second", "peak_memory", "sigma_floor")
Scores = dict[str, float]


def scores(cell: Cell, base: Cell, task: Task) -> Scores:
    """Judge what a trained network draws; with the base's own cell, what the base draws."""
    step = 0 if cell is base else task.plan.steps
    others = cell.pictures(step, OTHER_PROMPTS)
    following = prompt_following(others, repeated(OTHER_PROMPTS, task.plan.samples))
    named = subject_scores(cell, base, task, step)
    of_class = cell.pictures(step, CLASS_PROMPTS)
    return {
        **named,
        "prompt_following": (named["subject_following"] + following) / 2,
        "other_following": following,
        "class_leak": subject_similarity(of_class, drawn(task.subject, REFERENCES, "held-out")),
        "prior_drift": drift_from(base, cell, step, CLASS_PROMPTS),
        "other_drift": drift_from(base, cell, step, OTHER_PROMPTS),
        **loss_scores(cell.facts),
        **{name: cell.facts[name] for name in FACTS if cell.facts.get(name) is not None},
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

    def seen(by: Cell, step: int, draws: Sequence[int]) -> Tensor:
        return torch.stack([features(by.pictures(step, [text], draws)) for text in prompts])

    return drift(seen(cell, step, [0]), seen(base, 0, REFERENCE_DRAWS))


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
