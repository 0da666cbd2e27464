"""A comparison as Markdown tables, and its pictures as a sheet."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .cells import SIDE
from .configurations import BASELINE

COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "cells": ("cells", "{:.0f}".format),
    "subject_similarity": ("subject similarity ↑", "{:.3f}".format),
    "class_leak": ("class leak ↓", "{:.3f}".format),
    "subject_following": ("subject following ↑", "{:.3f}".format),
    "other_following": ("other following ↑", "{:.3f}".format),
    "prior_drift": ("prior drift ↓", "{:.3f}".format),
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
    "sigma_floor": ("dead sigmas", "{:.0%}".format),
}
DIFFERENCES = (
    "subject_similarity",
    "class_leak",
    "subject_following",
    "other_following",
    "prior_drift",
    "other_drift",
    "diversity",
    "copying",
    "loss_gap",
    "corruption",
    "latent_corruption",
    "noise",
)
Comparisons = Mapping[str, Mapping[str, Mapping[str, float]]]  # by row, by score


def markdown(result: Mapping[str, Any]) -> str:
    """Write the tables."""
    lines = [f"`{result['command']}`", "", f"{result['machine']}. {result['cells']}", ""]
    lines += means("method", result["methods"])
    for title, comparisons in compared(result).items():
        lines += ["", f"{title}:", "", *difference_table(comparisons)]
    for name, steps in result["trajectory"].items():
        lines += ["", f"{name}, over its steps:", "", *means("step", steps)]
    for name, steps in result["gamma"].items():
        lines += ["", f"{name}, its gamma:", "", *gamma_table(steps)]
    count = sum(map(intervals, compared(result).values()))
    if count:
        chance = f"Where nothing differs, 1 in 20 leaves out 0: about {count / 20:.1f} of these."
        lines += ["", f"{count} intervals are shown. {chance}"]
    return "\n".join(lines) + "\n"


def compared(result: Mapping[str, Any]) -> dict[str, Comparisons]:
    """Return all paired differences by their title."""
    matched = {
        "{} ({cells} of {of_cells} cells, {subjects} of {of_subjects} subjects)".format(
            label, **result["matched_cells"][label]
        ): row
        for label, row in result["matched"].items()
    }
    found = {
        f"Paired differences to {BASELINE} (mean [95 % interval over subjects])": result["paired"],
        "The same to what each is a variant of": result["variants"],
        "The same at equal subject similarity; what is beyond the other's is left out": matched,
    }
    on_the_way = result["trajectory_differences"]
    found |= {f"{pair}, over their steps": steps for pair, steps in on_the_way.items()}
    return {title: comparisons for title, comparisons in found.items() if comparisons}


def means(head: str, rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the lines of a table of means; without the columns that no row has."""
    columns = {key: how for key, how in COLUMNS.items() if any(key in row for row in rows.values())}
    return markdown_table(
        [head, *(title for title, _ in columns.values())],
        [
            [name, *(shown(row.get(key), how) for key, (_, how) in columns.items())]
            for name, row in rows.items()
        ],
    )


def difference_table(comparisons: Comparisons, keys: Sequence[str] = DIFFERENCES) -> list[str]:
    """Return the lines of a table of differences; n is the number of subjects."""
    keys = [key for key in keys if any(key in row for row in comparisons.values())]
    heads = ["", "n", *(key.replace("_", " ") for key in keys)]
    rows = [
        [
            name,
            f"{max((found['n'] for found in row.values()), default=0):.0f}",
            *(shown_interval(row.get(key)) for key in keys),
        ]
        for name, row in comparisons.items()
    ]
    return markdown_table(heads, rows)


def gamma_table(steps: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the lines of a table of APT's indicator: bins of timesteps down, steps across."""
    bins = list(zip(*steps.values(), strict=True))
    rows = [
        [f"{b / len(bins):g} to {(b + 1) / len(bins):g}", *map("{:.2f}".format, values)]
        for b, values in enumerate(bins)
    ]
    return markdown_table(["timestep / all", *(f"step {step}" for step in steps)], rows)


def intervals(comparisons: Comparisons) -> int:
    """Count the intervals that are shown."""
    found = [row[key] for row in comparisons.values() for key in DIFFERENCES if key in row]
    return sum(not math.isnan(difference["low"]) for difference in found)


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
