"""The domain shift's results as Markdown tables, and its pictures side by side."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .tables import markdown_table

METRICS = {
    "kid_held_out": "KID to held-out pictures",
    "fid_held_out": "FID to held-out pictures",
    "kid_training": "KID to training pictures",
    "fid_training": "FID to training pictures",
    "nearest_training": "distance to the nearest training picture",
    "gap": "denoising loss, held-out - training",
    "held_out_loss": "denoising loss, held-out",
}
FACTS = {  # of a training: heading, and how it is written
    "step": ("step", ".0f"),
    "learning_rate": ("rate", "g"),
    "learned_parameters": ("learned numbers", ",.0f"),
}
COLUMNS, SCALE = 20, 3  # of a sheet; pixels of a pixel


WHEN = {
    "best": "Each mode at its best step, the one with the lowest KID to held-out pictures:",
    "last": "Each mode at its last step:",
}


def markdown(result: Mapping[str, Any]) -> str:
    """Write the tables."""
    said, by_step = result["settings"], result["kid_by_step"] | result["paired_by_step"]
    lines = [
        "# A3FT's table 1, from drawn glyphs to scanned digits",
        "",
        f"`{result['command']}`",
        "",
        f"{said['images']} pictures in every set, batches of {said['batch_size']}, seeds "
        f"{said['seeds']}; {result['machine']}. The classifier reads "
        f"{result['classifier_accuracy']:.1%} of the digits that it was not trained on.",
        "",
    ]
    for when, title in WHEN.items():
        lines += [
            title,
            "",
            *mean_table(result["references"] | result["table"][when]),
            "",
            "Paired differences of these, mean [95 % interval over seeds]; less is better but for "
            "the distance to the nearest training picture, where less is closer to memorising:",
            "",
            *interval_table(list(METRICS.values()), result["paired"][when]),
            "",
        ]
    lines += [
        "KID to held-out pictures at every step, mean [95 % interval over seeds]:",
        "",
        *interval_table([f"step {step}" for step in next(iter(by_step.values()))], by_step),
    ]
    if result["sweep"]:
        lines += ["", "Learning rates tried (lowest KID on pictures that are in no other set):", ""]
    for mode, found in result["sweep"].items():
        tried = ", ".join(f"{rate:g}: {value:.4f}" for rate, value in found.items())
        lines.append(f"- {mode}: {tried}")
    return "\n".join(lines) + "\n"


def mean_table(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the lines of a table of means; what is not a training has no step and no rate."""
    heads = [*(head for head, _ in FACTS.values()), *METRICS.values(), "like a digit"]
    how = {key: how for key, (_, how) in FACTS.items()}
    how |= dict.fromkeys(METRICS, ".4f") | {"confidence": ".3f"}
    written = [
        [name, *(f"{row[key]:{spec}}" if key in row else "" for key, spec in how.items())]
        for name, row in rows.items()
    ]
    return markdown_table(["", *heads], written)


def interval_table(
    heads: Sequence[str], rows: Mapping[str, Mapping[Any, Sequence[float]]]
) -> list[str]:
    """Return the lines of a table of means with their intervals; one seed alone has none."""
    shown = [
        [name, *(with_interval(*found) for found in row.values())] for name, row in rows.items()
    ]
    return markdown_table(["", *heads], shown)


def with_interval(mean: float, low: float, high: float) -> str:
    """Write a mean with its interval where it has one."""
    return f"{mean:+.4f}" if math.isnan(low) else f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def sheet(pictures: Tensor, columns: int = COLUMNS) -> Image.Image:
    """Lay pictures (N, 1, h, w) in [-1, 1] side by side."""
    grey = ((pictures[:, 0].clamp(-1, 1) + 1) * 127.5).round().byte()
    columns = min(columns, len(grey))
    grey = grey[: len(grey) // columns * columns]
    rows = [torch.cat(list(row), 1) for row in grey.split(columns)]
    image = Image.fromarray(torch.cat(rows).numpy())
    size = (image.width * SCALE, image.height * SCALE)
    return image.resize(size, Image.Resampling.NEAREST)


def stacked(blocks: Mapping[str, Image.Image], rows: int = 4) -> Image.Image:
    """Put the first rows of sheets of one width below each other, each under its title."""
    width = next(iter(blocks.values())).width
    tallest = max(block.height for block in blocks.values())
    height, gap = min(tallest, rows * width // COLUMNS), 24  # pictures are square
    page = Image.new("L", (width, len(blocks) * (height + gap)), 255)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for number, (title, block) in enumerate(blocks.items()):
        top = number * (height + gap)
        draw.text((0, top + gap - 6), title, 0, font, anchor="ls")
        page.paste(block.crop((0, 0, width, min(height, block.height))), (0, top + gap))
    return page
