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
