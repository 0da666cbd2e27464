"""What does training far too long do? One run, sampled at several of its checkpoints.

    python -m benchmarks.overfit --subject 1 --checkpoints 100,400,1600 --json overfit.json

Prints, for the base and every checkpoint: likeness of the subject; how prompts of the subject and
of other sprites are followed; and copying: the correlation of a sample's silhouette (32x32 pixels)
with that of the training picture most like it, beside the same for as many held-out pictures.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from demo.judges import AttributeReader, SubjectJudge
from demo.report import Picture, tensor
from headless import Comfy, Graph, fill_defaults
from headless.client import Prompt, Result

from .metrics import nearest_silhouette
from .servers import workers

SUBJECT_PROMPTS = ("a zib totem in a meadow", "a zib totem on a white background")
OTHER_PROMPTS = (
    "a big striped red star on a green background",
    "a big plain blue circle on a white background",
    "a big dotted yellow heart at night",
)
SEEDS = 4  # pictures per prompt


def workflow(subject: int, checkpoints: list[int], settings: dict[str, Any]) -> tuple[Graph, Graph]:
    """Return the prompt that trains, and the one that samples what it left."""
    training, sampling = Graph(), Graph()
    base = training.add("PersonalizeDemoBase")
    drawn = training.add("PersonalizeDemoSubject", subject=subject, count=4)
    wires = {"clip": (base, 1), "vae": (base, 2), "images": (drawn, 0), "captions": (drawn, 1)}
    data = training.add("PersonalizeDataset", resolution=128, **wires)
    how = {"name": "overfit", "steps": checkpoints[-1], "save_every": checkpoints[0], **settings}
    training.add("PersonalizeTrainLoRA", model=(base, 0), data=(data, 0), **how)

    base, latent = sampling.add("PersonalizeDemoBase"), sampling.empty_latent(128, SEEDS)
    models = {0: (base, 0)}
    for step in checkpoints:
        inputs = {"model": (base, 0), "run": "overfit", "checkpoint": f"step {step}"}
        models[step] = (sampling.add("PersonalizeLoad", **inputs, strength=1.0), 0)
    for step, model in models.items():
        for text in (*SUBJECT_PROMPTS, *OTHER_PROMPTS):
            sampling.pictures(base, model, text, latent, title=f"{step}|{text}")
    for split, count in (("training", 4), ("held-out", 4)):
        drawn = sampling.add("PersonalizeDemoSubject", subject=subject, count=count, split=split)
        sampling.add("SaveImage", f"{split}|", images=(drawn, 0), filename_prefix="drawn")
    return training, sampling


Pictures = dict[tuple[str, str], Tensor]  # by (step or split, prompt): (N, H, W, 3) in [0, 1]


def run(comfy: Comfy, subject: int, checkpoints: list[int], settings: dict[str, Any]) -> Pictures:
    """Train on a server, and draw with the base and every checkpoint."""
    training, sampling = workflow(subject, checkpoints, settings)
    comfy.run(fill_defaults(training, comfy.object_info()))
    sampling = fill_defaults(sampling, comfy.object_info())
    return images(comfy, sampling, comfy.run(sampling))


def images(comfy: Comfy, prompt: Prompt, result: Result) -> Pictures:
    """Return the pictures by (step or split, prompt), (N, H, W, 3) in [0, 1] each."""
    found = {}
    for node, spec in prompt.items():
        if spec["class_type"] == "SaveImage":
            step, _, text = spec["_meta"]["title"].partition("|")
            files = [comfy.image(file).convert("RGB") for file in result.files(node)]
            found[step, text] = tensor([Picture(image, text) for image in files])
    return found


def sheet(found: Pictures, steps: list[int], path: Path) -> None:
    """Write the training pictures above two samples of every prompt, a row per checkpoint."""
    rows = [
        [found[str(step), text][:2] for text in (*SUBJECT_PROMPTS, *OTHER_PROMPTS)]
        for step in steps
    ]
    samples = [torch.cat([picture for pair in row for picture in pair], 1) for row in rows]
    top = torch.cat(list(found["training", ""]), 1)
    top = F.pad(top, (0, 0, 0, samples[0].shape[1] - top.shape[1]), value=1.0)
    page = (torch.cat([top, *samples]) * 255).byte().numpy()
    Image.fromarray(page).save(path, optimize=True)


def scores(found: Pictures, step: str) -> dict[str, float]:
    """Judge the samples of one checkpoint."""
    reader, judge = AttributeReader.load(), SubjectJudge.load()

    def following(texts: tuple[str, ...]) -> float:
        samples = torch.cat([found[step, text] for text in texts])
        said = [text for text in texts for _ in range(SEEDS)]
        return float(torch.as_tensor(reader.prompt_following(samples, said)).float().mean())

    subject = torch.cat([found[step, text] for text in SUBJECT_PROMPTS])
    held_out = found["held-out", ""]
    return {
        "subject_similarity": float(judge.similarity(subject, held_out).mean()),
        "following_subject": following(SUBJECT_PROMPTS),
        "following_others": following(OTHER_PROMPTS),
        "copying_training": nearest_silhouette(subject, found["training", ""]),
        "copying_held_out": nearest_silhouette(subject, held_out),
    }


def main() -> None:
    """Parse the command line, train, sample, print and save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overfit", description=__doc__)
    parser.add_argument("--subject", type=int, default=1)
    parser.add_argument("--checkpoints", default="100,400,1600", help="multiples of the first")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--layers", default="all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="where to save a picture of the samples")
    options = parser.parse_args()
    checkpoints = [int(step) for step in options.checkpoints.split(",")]
    settings = {
        "learning_rate": options.learning_rate,
        "rank": options.rank,
        "layers": options.layers,
        "batch_size": 2,
    }
    with workers(1) as (worker,):
        found = run(worker.comfy, options.subject, checkpoints, settings)
    rows = {step: scores(found, str(step)) for step in (0, *checkpoints)}
    names = list(rows[0])
    print("| step | " + " | ".join(name.replace("_", " ") for name in names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for step, row in rows.items():
        print(f"| {step or 'base'} | " + " | ".join(f"{row[name]:.3f}" for name in names) + " |")
    if options.sheet:
        sheet(found, list(rows), options.sheet)
    if options.json:
        options.json.write_text(json.dumps({"settings": settings, "steps": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
