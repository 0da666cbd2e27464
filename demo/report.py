"""Show and score what the demo made: a grid of pictures, the loss curve, and two judges."""

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .judges import AttributeReader, SubjectJudge

TRAINING, HELD_OUT, BASE, PERSONALIZED = "training", "held-out", "base", "personalized"
ROLES = (TRAINING, HELD_OUT, BASE, PERSONALIZED)  # the first words of Save Image titles


@dataclass(frozen=True)
class Picture:
    """A picture the workflow saved, with the prompt it was made from ("" for a drawn one)."""

    image: Image.Image
    prompt: str


def judged(pictures: dict[str, list[Picture]], name: str) -> dict[str, Any]:
    """Score base and personalised pictures: the subject's likeness, and how prompts are followed.

    Likeness counts only pictures whose prompt names the subject; that of other real pictures of
    it is given too, as what could be reached.
    """
    judge, reader = SubjectJudge.load(), AttributeReader.load()
    references = tensor(pictures[HELD_OUT] or pictures[TRAINING])
    likeness, following = {}, {}
    for role in (BASE, PERSONALIZED):
        named = [picture for picture in pictures[role] if name in picture.prompt.lower().split()]
        likeness[role] = mean(judge.similarity(tensor(named), references)) if named else None
        prompts = [picture.prompt for picture in pictures[role]]
        following[role] = mean(reader.prompt_following(tensor(pictures[role]), prompts))
    likeness["real pictures"] = mean(judge.similarity(tensor(pictures[TRAINING]), references))
    return {"subject_similarity": likeness, "prompt_following": following}


def tensor(pictures: list[Picture]) -> torch.Tensor:
    """Stack pictures: (N, H, W, 3) in [0, 1]."""
    arrays = [np.asarray(picture.image, np.float32) / 255 for picture in pictures]
    return torch.from_numpy(np.stack(arrays))


def mean(scores: Any) -> float | None:
    """Return the mean to three digits, or None where there was nothing to score."""
    value = float(torch.as_tensor(scores, dtype=torch.float32).mean())
    return None if math.isnan(value) else round(value, 3)


SIDE, GAP, LEFT = 160, 12, 130  # pixels: a picture, the space between two, the row titles
INK, PAPER, QUIET = "#1c1c1e", "#ffffff", "#6e6e73"


def grid(pictures: dict[str, list[Picture]], method: str) -> Image.Image:
    """Draw the training pictures above the prompts, and base above personalised below them."""
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    base, personalized = (first_each(pictures[role]) for role in (BASE, PERSONALIZED))
    columns = len(base)
    training = pictures[TRAINING][:columns]
    labels = [textwrap.fill(picture.prompt, 24) for picture in base]
    label_height = 18 * max(label.count("\n") + 1 for label in labels) + GAP
    width = LEFT + columns * (SIDE + GAP) + GAP
    tops = [GAP, 2 * GAP + SIDE + label_height + GAP]
    tops += [tops[1] + SIDE + GAP]
    page = Image.new("RGB", (width, tops[2] + SIDE + GAP), PAPER)
    draw = ImageDraw.Draw(page)
    titles = ("training\npictures", "base", f"personalized\n({method})")
    rows = (training, base, personalized)
    for top, title, row in zip(tops, titles, rows, strict=True):
        draw.multiline_text((GAP, top + SIDE // 2), title, INK, font, anchor="lm", spacing=6)
        for column, picture in enumerate(row):
            scaled = picture.image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            page.paste(scaled, (LEFT + column * (SIDE + GAP), top))
    for column, label in enumerate(labels):
        centre = (LEFT + column * (SIDE + GAP) + SIDE // 2, tops[1] - GAP // 2)
        draw.multiline_text(centre, label, QUIET, small, anchor="md", align="center")
    return page


def first_each(pictures: list[Picture]) -> list[Picture]:
    """Return the first picture of each prompt."""
    first: dict[str, Picture] = {}
    for picture in pictures:
        first.setdefault(picture.prompt, picture)
    return list(first.values())


def plot_loss(history: list[dict[str, float]], title: str, path: Path) -> None:
    """Draw every step's loss and its running mean over a twentieth of the run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = np.array([line["step"] for line in history if "loss" in line])
    losses = np.array([line["loss"] for line in history if "loss" in line])
    window = min(len(losses), max(10, len(losses) // 20))
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, color="#c7c7cc", linewidth=0.8, label="each step")
    axes.plot(steps[window - 1 :], smooth, color="#0a6cff", label=f"mean of {window} steps")
    axes.set(
        xlabel="step", ylabel="loss (noise MSE)", title=f"Training with {title}", ylim=(0, None)
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
