"""Train on a made-up subject in a headless ComfyUI and show before beside after.

`python -m demo.run` (or `make demo`) queues workflows/api/demo.json and leaves in demo/output/
before_after.png, loss.png, the personalisation, and summary.json. The workflow's Save Image nodes
say by their titles what they hold: "Training pictures", "Held-out pictures", "Base …" and
"Personalized …"; prompts and seeds are read off the nodes before them.
"""

import argparse
import json
import math
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from headless import Comfy, ComfyServer, OverrideError, PromptFailed, ServerError, fill_defaults
from headless.bar import ProgressBar
from headless.client import Prompt, Result

from .judges import AttributeReader, SubjectJudge

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / "workflows" / "api" / "demo.json"
OUTPUT = ROOT / "demo" / "output"
TRAINING, HELD_OUT, BASE, PERSONALIZED = "training", "held-out", "base", "personalized"
ROLES = (TRAINING, HELD_OUT, BASE, PERSONALIZED)  # the first words of Save Image titles


@dataclass(frozen=True)
class Picture:
    """A picture the workflow saved, with the prompt it was made from ("" for a drawn one)."""

    image: Image.Image
    prompt: str


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        run(options)
    except (PromptFailed, OverrideError, ServerError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m demo.run", description="Run the demo.")
    parser.add_argument("--subject", type=int, metavar="SEED", help="which made-up character")
    parser.add_argument("--method", metavar="NAME", help="lora, para, …: the training node to use")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--workflow", type=Path, default=WORKFLOW)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser


def run(options: argparse.Namespace) -> None:
    """Queue the workflow on a server of our own and write the four results."""
    prompt = json.loads(options.workflow.read_text())
    started = time.monotonic()
    print("Starting ComfyUI …", file=sys.stderr)
    with ComfyServer() as server, Comfy(server.url) as comfy:
        prompt = adjusted(prompt, options, comfy.object_info())
        with ProgressBar() as bar:
            result = comfy.run(prompt, bar)
        pictures = collect(comfy, prompt, result)
        folder = newest_run(server.output_dir / "personalized")
        write(pictures, prompt, folder, options.output, time.monotonic() - started)


def write(
    pictures: dict[str, list[Picture]], prompt: Prompt, run: Path, output: Path, seconds: float
) -> None:
    """Leave the grid, the loss curve, the personalisation and the summary in `output`."""
    output.mkdir(parents=True, exist_ok=True)
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    title = run_title(prompt)
    grid(pictures, title).save(output / "before_after.png")
    plot_loss(history, title, output / "loss.png")
    kept = output / f"{run.name.replace(' ', '-')}.safetensors"
    shutil.copyfile(run / "last.safetensors", kept)
    summary = {
        "method": title,
        "steps": int(history[-1]["step"]),
        "seconds": round(seconds, 1),
        **judged(pictures, subject_name(prompt)),
        "files": ["before_after.png", "loss.png", kept.name],
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    print(f"Look at {output / 'before_after.png'}", file=sys.stderr)


# The workflow


def adjusted(prompt: Prompt, options: argparse.Namespace, known: dict[str, Any]) -> Prompt:
    """Return the workflow with the options of the command line in it."""
    train = prompt[node_of(prompt, "PersonalizeTrain")]
    if options.method:
        train["class_type"] = training_node(options.method, known)
        train["inputs"] = general(train["inputs"])
        train.pop("_meta", None)
    if options.steps is not None:
        train["inputs"]["steps"] = options.steps
    if options.subject is not None:
        for node in prompt.values():
            if node["class_type"] == "PersonalizeDemoSubject":
                node["inputs"]["subject"] = options.subject
    return fill_defaults(prompt, known)


def training_node(method: str, known: dict[str, Any]) -> str:
    """Return the class_type of a method's training node."""
    nodes = {
        name.removeprefix("PersonalizeTrain").lower(): name
        for name in known
        if name.startswith("PersonalizeTrain")
    }
    if method.lower() not in nodes:
        raise OverrideError(f"--method is '{method}'; there are: {', '.join(sorted(nodes))}")
    return nodes[method.lower()]


def general(inputs: dict[str, Any]) -> dict[str, Any]:
    """Keep what every method has; the rest becomes the method's own default."""
    kept = {"name", "steps", "seed"}
    return {k: value for k, value in inputs.items() if k in kept or isinstance(value, list)}


def node_of(prompt: Prompt, kind: str) -> str:
    """Return the id of the first node whose class_type begins with `kind`."""
    found = next((id for id, node in prompt.items() if node["class_type"].startswith(kind)), None)
    if found is None:
        raise OverrideError(f"The workflow has no {kind}… node")
    return found


def run_title(prompt: Prompt) -> str:
    train = prompt[node_of(prompt, "PersonalizeTrain")]
    return train["class_type"].removeprefix("PersonalizeTrain")


def subject_name(prompt: Prompt) -> str:
    return prompt[node_of(prompt, "PersonalizeDemoSubject")]["inputs"].get("subject_name", "zib")


def collect(comfy: Comfy, prompt: Prompt, result: Result) -> dict[str, list[Picture]]:
    """Return the saved pictures by role, in the workflow's order."""
    pictures: dict[str, list[Picture]] = {role: [] for role in ROLES}
    for id, node in prompt.items():
        title = node.get("_meta", {}).get("title", "").lower()
        role = next((role for role in ROLES if title.startswith(role)), None)
        if role is not None:
            text = prompt_behind(prompt, id)
            images = (comfy.image(file).convert("RGB") for file in result.files(id))
            pictures[role] += [Picture(image, text) for image in images]
    missing = [role for role in (TRAINING, BASE, PERSONALIZED) if not pictures[role]]
    if missing:
        raise OverrideError(f"The workflow saves no pictures titled {', '.join(missing)} …")
    return pictures


def prompt_behind(prompt: Prompt, id: str) -> str:
    """Follow images -> samples -> positive -> text from a Save Image node; "" without a sampler."""
    for name in ("images", "samples", "positive", "text"):
        value = prompt[id]["inputs"].get(name, "")
        if isinstance(value, list):
            id = value[0]
    return value if isinstance(value, str) else ""


def newest_run(root: Path) -> Path:
    """Return the folder the training node wrote."""
    runs = sorted(root.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise FileNotFoundError(f"The workflow left no run in {root}")
    return runs[-1].parent


# What came out


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
    columns = max(len(pictures[role]) for role in (BASE, PERSONALIZED))
    training = pictures[TRAINING][:columns]
    labels = [textwrap.fill(picture.prompt, 24) for picture in pictures[BASE]]
    label_height = 18 * max(label.count("\n") + 1 for label in labels) + GAP
    width = LEFT + columns * (SIDE + GAP) + GAP
    tops = [GAP, 2 * GAP + SIDE + label_height + GAP]
    tops += [tops[1] + SIDE + GAP]
    page = Image.new("RGB", (width, tops[2] + SIDE + GAP), PAPER)
    draw = ImageDraw.Draw(page)
    titles = ("training\npictures", "base", f"personalized\n({method})")
    rows = (training, pictures[BASE], pictures[PERSONALIZED])
    for top, title, row in zip(tops, titles, rows, strict=True):
        draw.multiline_text((GAP, top + SIDE // 2), title, INK, font, anchor="lm", spacing=6)
        for column, picture in enumerate(row):
            scaled = picture.image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            page.paste(scaled, (LEFT + column * (SIDE + GAP), top))
    for column, label in enumerate(labels):
        centre = (LEFT + column * (SIDE + GAP) + SIDE // 2, tops[1] - GAP // 2)
        draw.multiline_text(centre, label, QUIET, small, anchor="md", align="center")
    return page


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


if __name__ == "__main__":
    sys.exit(main())
