"""What a run's history comes to: a verdict, numbers, and a picture for a paper.

The picture is drawn with Pillow, at twice its size and then halved, so that no plotting library
has to be installed with the pack.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .errors import InputError
from .monitor import BINS, Evaluation, is_number
from .run import ENDS, FINISHED
from .verdict import (
    Rules,
    best_step,
    corruption_stage,
    curve,
    graininess,
    over_fitting_since,
    verdict,
    watched,
)

Point = tuple[float, float]
WIDTH, HEIGHT, SCALE = 1200, 900, 2  # pixels; drawn so many times larger
LEFT, RIGHT, TOP = 105, 145, 92  # margins of the panels
MARGIN, SMALLEST = 20, 9  # pixels: to the right of the texts, and of their letters
INK, QUIET, GRID, PAPER = "#1c1c1e", "#6e6e73", "#e5e5ea", "#ffffff"
BLUE, ORANGE, GREEN, GREY, PURPLE = "#0a6cff", "#d9480f", "#2b8a3e", "#c7c7cc", "#7048a8"
RISKY = "#fff0ea"  # behind the steps that over-fit
HEAT = ("#f3f6fb", "#9ec1e8", "#3f7fbf", "#173f6b")  # gamma from 0 to 1
TICKS = 6


@dataclass(frozen=True)
class History:
    """The lines of a run's history.jsonl by kind."""

    losses: list[tuple[int, float]]  # of every step that had one
    evaluations: list[Evaluation]
    end: Mapping[str, Any]  # {} while the run goes on
    rules: Rules = field(default_factory=Rules)
    steps: int = 0  # that were made

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> "History":
        """Sort lines; what is not known, or damaged, is left out."""
        lines = [line for line in lines if type(line.get("step")) is int and line["step"] >= 0]
        measured = [line for line in lines if line.get("evaluation")]
        ends = [line for line in lines if line.get("end")]
        made = [line for line in lines if "loss" in line or "learning_rate" in line]
        losses = [(line["step"], line.get("loss")) for line in made]
        return cls(
            [(step, loss) for step, loss in losses if is_number(loss) and math.isfinite(loss)],
            list(filter(None, map(evaluation_of, measured))),
            ends[-1] if ends else {},
            rules_of(measured[0].get("rules")) if measured else Rules(),
            made[-1]["step"] if made else 0,
        )

    @property
    def best(self) -> int:
        """The best step; the last where none was measured."""
        return best_step(self.evaluations, self.rules) or self.steps

    @property
    def verdict(self) -> str:
        """What came out, in plain words."""
        if not self.evaluations:
            return (
                f"{self.steps} steps, but no monitor was connected: over-fitting was not measured"
            )
        return verdict(self.evaluations, self.rules) + ended(self.end.get("reason"), self.steps)

    @property
    def decided(self) -> bool:
        """Whether a best step was looked for; if not, the last is kept."""
        return watched(self.evaluations, self.rules) is not None

    def metrics(self) -> dict[str, Any]:
        """Return the numbers of the run, for JSON."""
        by_step = {e.step: e.as_line() for e in self.evaluations}
        hump = corruption_stage(self.evaluations)
        steps = {"base": 0, "best": self.best, "last": max(by_step, default=0)}
        return {
            "steps": self.steps,
            "ended": self.end.get("reason"),
            "best_step": self.best,
            "over_fitting_since": over_fitting_since(self.evaluations),
            "corruption_stage": hump[0] if hump is not None else None,
            "verdict": self.verdict,
            "rules": {f.name: getattr(self.rules, f.name) for f in fields(Rules)},
            **{name: by_step.get(step) for name, step in steps.items()},
            "evaluations": [asdict(e) for e in self.evaluations],
        }


def ended(reason: Any, step: int) -> str:
    """Say why a run ended before its last step, to be added to a sentence."""
    return f"; {reason} at step {step}" if reason in ENDS and reason != FINISHED else ""


def evaluation_of(line: Mapping[str, Any]) -> Evaluation | None:
    """Read an evaluation; None where the line is damaged."""
    try:
        return Evaluation.from_line(line)
    except TypeError:
        return None


def rules_of(values: Any) -> Rules:
    """Read the rules of a run; what is not known, or damaged, is as by default."""
    given = values if isinstance(values, dict) else {}
    known = {f.name: given[f.name] for f in fields(Rules) if f.name in given}
    try:
        return Rules(**{n: v for n, v in known.items() if type(v) is type(getattr(Rules, n))})
    except InputError:
        return Rules()


# The picture


def plot(history: History, title: str) -> Image.Image:
    """Draw losses, change against the base, and gamma over the steps: 1200x900 pixels."""
    canvas = Canvas(WIDTH, HEIGHT)
    room = WIDTH - LEFT - MARGIN
    canvas.text((LEFT, 24), title, size=canvas.fitting(title, 24, room))
    said = history.verdict
    canvas.text((LEFT, 56), said, size=canvas.fitting(said, 16, room), colour=QUIET)
    last = max(1, history.steps, *(e.step for e in history.evaluations))
    right = WIDTH - RIGHT
    if not history.evaluations:
        plot_losses(history, Axes(canvas, (LEFT, TOP, right, HEIGHT - 70), (0, last)))
        canvas.text(((LEFT + right) / 2, HEIGHT - 24), "step", size=16, anchor="mm")
        return canvas.finished()
    plot_losses(history, Axes(canvas, (LEFT, TOP, right, 430), (0, last), labelled=False))
    plot_change(history, Axes(canvas, (LEFT, 462, right, 596), (0, last), labelled=False))
    plot_gamma(history, Axes(canvas, (LEFT, 628, right, HEIGHT - 70), (0, last)))
    canvas.text(((LEFT + right) / 2, HEIGHT - 24), "step", size=16, anchor="mm")
    return canvas.finished()


def plot_losses(history: History, axes: "Axes") -> None:
    """Draw the stable losses, the smoothed loss of the steps, and what was decided."""
    evaluations = history.evaluations
    curves = {
        "each step, smoothed": (GREY, smoothed(history.losses) if not evaluations else []),
        "training pictures": (BLUE, curve(evaluations, "train")),
        "held-out pictures": (ORANGE, curve(evaluations, "held_out")),
        "pictures of the class": (GREEN, curve(evaluations, "prior")),
    }
    axes.scale([y for _, path in curves.values() for _, y in path])
    since = over_fitting_since(evaluations)
    if since is not None:
        axes.shade(since, RISKY, "over-fitting")
    axes.frame("denoising loss (MSE)")
    for colour, path in curves.values():
        axes.curve(path, colour, dots=len(path) <= 60)
    if history.decided:
        axes.upright(history.best, f"best: {history.best}")
    axes.legend([(name, colour) for name, (colour, path) in curves.items() if path])


def plot_change(history: History, axes: "Axes") -> None:
    """Draw prior drift and grain as percentages against the base, or the usual."""
    drift = [(x, 100 * y) for x, y in curve(history.evaluations, "prior_drift")]
    grain = [(x, 100 * (y - 1)) for x, y in graininess(history.evaluations)]
    axes.scale([0.0, *(y for _, y in drift + grain)], ticks=5)
    axes.frame("change from base (%)", zero=True)
    axes.curve(grain, PURPLE)
    axes.curve(drift, GREEN)
    if history.decided:
        axes.upright(history.best)
    shown = [("grain (corruption)", PURPLE)]
    axes.legend(shown + ([("prior drift", GREEN)] if drift else []))


def plot_gamma(history: History, axes: "Axes") -> None:
    """Draw gamma as a strip of cells: timesteps up, steps to the right, and its colours."""
    evaluations = history.evaluations
    axes.low, axes.high = 0.0, float(BINS)
    edges = [evaluations[0].step]
    edges += [(a.step + b.step) / 2 for a, b in pairwise(evaluations)]
    edges.append(evaluations[-1].step)
    for number, evaluation in enumerate(evaluations):
        for b, value in enumerate(evaluation.gamma):
            axes.cell((edges[number], b), (edges[number + 1], b + 1), heat(value))
    labels = [(b, f"{100 * b // BINS}") for b in range(0, BINS + 1, 2)]
    axes.frame("timestep (% of T)", labels=labels, grid=False)
    if history.decided:
        axes.upright(history.best)
    axes.colours("gamma")


def smoothed(losses: Sequence[tuple[int, float]]) -> list[Point]:
    """Return the running mean over a twentieth of the run, at most 400 points."""
    window = max(1, len(losses) // 20)
    total, means = sum(loss for _, loss in losses[:window]), []
    for i in range(window, len(losses) + 1):
        means.append((float(losses[i - 1][0]), total / window))
        if i < len(losses):
            total += losses[i][1] - losses[i - window][1]
    return means[:: max(1, len(means) // 400)]


def heat(value: float) -> tuple[int, int, int]:
    """Return the colour of a gamma in [0, 1]."""
    place = min(1.0, max(0.0, value)) * (len(HEAT) - 1)
    below = min(int(place), len(HEAT) - 2)
    pair = (rgb(HEAT[below]), rgb(HEAT[below + 1]))
    r, g, b = (round(x + (y - x) * (place - below)) for x, y in zip(*pair, strict=True))
    return r, g, b


def rgb(colour: str) -> tuple[int, ...]:
    """Read "#rrggbb"."""
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def round_ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers that lie in a range."""
    raw = (high - low) / max(1, count - 1)
    power = 10 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next(power * n for n in (1, 2, 2.5, 5, 10) if power * n >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


class Canvas:
    """A page in pixels of its final size."""

    def __init__(self, width: int, height: int):
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def finished(self) -> Image.Image:
        """Return the page in its final size."""
        width, height = self.image.size
        return self.image.resize((width // SCALE, height // SCALE), Image.Resampling.LANCZOS)

    def line(self, path: Sequence[Point], colour: str, width: float = 1.0) -> None:
        """Draw a path."""
        scaled = [(x * SCALE, y * SCALE) for x, y in path]
        self.draw.line(scaled, colour, max(1, round(width * SCALE)), joint="curve")

    def box(self, a: Point, b: Point, colour: Any) -> None:
        """Fill a rectangle between two corners."""
        (x0, x1), (y0, y1) = sorted((a[0], b[0])), sorted((a[1], b[1]))
        self.draw.rectangle([round(v * SCALE) for v in (x0, y0, x1, y1)], colour)

    def dot(self, at: Point, colour: str, radius: float) -> None:
        """Fill a circle."""
        x, y = (v * SCALE for v in at)
        r = radius * SCALE
        self.draw.ellipse((x - r, y - r, x + r, y + r), colour)

    def text(
        self, at: Point, text: str, size: int = 14, colour: str = INK, anchor: str = "lm"
    ) -> None:
        """Write a line."""
        font = ImageFont.load_default(size * SCALE)
        self.draw.text((at[0] * SCALE, at[1] * SCALE), text, colour, font, anchor=anchor)

    def fitting(self, text: str, size: int, width: float) -> int:
        """Return the largest size up to `size` at which a line is at most so wide."""
        length = ImageFont.load_default(size * SCALE).getlength(text) / SCALE
        return max(SMALLEST, min(size, int(size * width / max(length, 1))))

    def upward(self, at: Point, text: str, size: int = 14) -> None:
        """Write a line from bottom to top, its middle at `at`."""
        font = ImageFont.load_default(size * SCALE)
        width, height = (round(v) for v in font.getbbox(text)[2:])
        label = Image.new("RGB", (width, height + SCALE), PAPER)
        ImageDraw.Draw(label).text((0, 0), text, INK, font)
        turned = label.rotate(90, expand=True)
        x, y = (round(v * SCALE) for v in at)
        self.image.paste(turned, (x - turned.width // 2, y - turned.height // 2))


class Axes:
    """A panel of a canvas: steps to the right, values up."""

    def __init__(
        self,
        canvas: Canvas,
        box: tuple[float, float, float, float],
        steps: Point,
        labelled: bool = True,  # whether the steps have numbers
    ):
        self.canvas, self.box, self.steps, self.labelled = canvas, box, steps, labelled
        self.low, self.high = 0.0, 1.0
        self.ticks: list[float] = []

    def scale(self, values: Sequence[float], ticks: int = TICKS) -> None:
        """Choose a range that holds all values, with some air."""
        low, high = min(values, default=0.0), max(values, default=1.0)
        air = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        self.low, self.high = low - air, high + air
        self.ticks = round_ticks(self.low, self.high, ticks)

    def at(self, x: float, y: float) -> Point:
        """Return where a point lies on the canvas."""
        left, top, right, bottom = self.box
        across = (x - self.steps[0]) / (self.steps[1] - self.steps[0])
        up = (y - self.low) / (self.high - self.low)
        return left + across * (right - left), bottom - min(1.02, max(0.0, up)) * (bottom - top)

    def frame(
        self,
        label: str,
        labels: Sequence[tuple[float, str]] | None = None,
        grid: bool = True,
        zero: bool = False,
    ) -> None:
        """Draw the axes, their numbers and the grid."""
        left, top, right, bottom = self.box
        digits = decimals(self.ticks)
        for value, text in labels or [(tick, f"{tick:.{digits}f}") for tick in self.ticks]:
            _, y = self.at(0, value)
            if grid:
                strong = zero and abs(value) < 1e-9
                self.canvas.line([(left, y), (right, y)], QUIET if strong else GRID)
            self.canvas.text((left - 10, y), text, anchor="rm", colour=QUIET)
        for step in round_ticks(*self.steps, 9):
            x, _ = self.at(step, self.low)
            if grid:
                self.canvas.line([(x, top), (x, bottom)], GRID)
            if self.labelled:
                self.canvas.line([(x, bottom), (x, bottom + 6)], QUIET)
                self.canvas.text((x, bottom + 20), f"{step:g}", anchor="mm", colour=QUIET)
        self.canvas.line([(left, top), (left, bottom), (right, bottom)], QUIET, 1.2)
        self.canvas.upward((left - 78, (top + bottom) / 2), label)

    def curve(self, curve: Sequence[Point], colour: str, dots: bool = False) -> None:
        """Draw a curve, with a dot at every point if asked."""
        path = [self.at(x, y) for x, y in curve]
        if len(path) > 1:
            self.canvas.line(path, colour, 2.2)
        for place in path if dots or len(path) == 1 else []:
            self.canvas.dot(place, colour, 3.2)

    def upright(self, step: float, label: str = "") -> None:
        """Draw a dashed line at a step."""
        (x, y0), (_, y1) = self.at(step, self.high), self.at(step, self.low)
        self.canvas.line([(x, y0), (x, y1)], PAPER, 3)
        for start in range(int(y0), int(y1), 10):
            self.canvas.line([(x, start), (x, min(start + 6, y1))], INK, 1.4)
        if label:
            left_side = x > (self.box[0] + self.box[2]) * 0.85
            place = (x - 7 if left_side else x + 7, self.box[1] + 12)
            self.canvas.text(place, label, size=15, anchor="rm" if left_side else "lm")

    def shade(self, since: float, colour: str, label: str) -> None:
        """Tint the panel from a step on."""
        _, top, right, bottom = self.box
        x, _ = self.at(since, self.low)
        self.canvas.box((x, top), (right, bottom), colour)
        self.canvas.text((right - 8, bottom - 14), label, colour=ORANGE, anchor="rm")

    def cell(self, a: Point, b: Point, colour: tuple[int, int, int]) -> None:
        """Fill a rectangle between two points."""
        self.canvas.box(self.at(*a), self.at(*b), colour)

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        """Name the curves to the right of the panel."""
        for row, (name, colour) in enumerate(entries):
            x, y = self.box[2] + 12, self.box[1] + 14 + row * 40
            self.canvas.line([(x, y), (x + 22, y)], colour, 3)
            first, _, rest = name.partition(" ")
            self.canvas.text((x + 28, y), first, size=13)
            self.canvas.text((x + 28, y + 15), rest, size=13)

    def colours(self, label: str) -> None:
        """Draw the scale of the cells' colours to the right of the panel."""
        _, top, right, bottom = self.box
        x, height = right + 24, bottom - top
        for i in range(int(height)):
            self.canvas.box((x, bottom - i - 1), (x + 16, bottom - i), heat(i / height))
        for value in (0.0, 0.5, 1.0):
            self.canvas.text((x + 24, bottom - value * height), f"{value:g}", colour=QUIET)
        self.canvas.text((x + 56, (top + bottom) / 2), label)


def decimals(ticks: Sequence[float]) -> int:
    """Return how many decimals tell neighbouring ticks apart."""
    if len(ticks) < 2:
        return 3
    step = ticks[1] - ticks[0]
    return max(0, next(n for n in range(9) if abs(round(step, n) - step) < 1e-9))
