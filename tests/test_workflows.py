"""The example workflows run on a real server, through their API twins."""

import json
from pathlib import Path
from typing import Any

import pytest

from headless import Comfy, ComfyServer, apply_overrides
from headless.client import Result
from personalize.trainers.methods import METHODS
from tests import stock
from tests.waiting import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.server


def run(comfy: Comfy, name: str, overrides: dict[str, Any]) -> Result:
    """Run a workflow with `{"node title.input": value}` overrides."""
    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    listed = [f"{target}={value}" for target, value in overrides.items()]
    return comfy.run(apply_overrides(prompt, listed, comfy.object_info()), timeout=PATIENCE)


def saved(comfy: Comfy, result: Result) -> dict[str, list]:
    """Return the saved pictures by the beginning of their file names."""
    pictures: dict[str, list] = {}
    for file in result.files():
        pictures.setdefault(file.filename.rsplit("_", 2)[0], []).append(comfy.image(file))
    return pictures


def test_the_demo_runs_without_a_file_of_the_user(comfy):
    short = {f"Sample the {which}.steps": 2 for which in ("base", "personalised model")}
    short |= {"Train LoRA.steps": 3, "Train LoRA.batch_size": 1, "Empty Latent Image.batch_size": 1}
    pictures = saved(comfy, run(comfy, "demo", short))
    counts = {name: len(images) for name, images in pictures.items() if name.startswith("demo")}
    assert counts == {
        "demo_training": 4,
        "demo_held_out": 4,
        "demo_base": 1,
        "demo_personalized": 1,
    }
    before, after = pictures["demo_base"][0], pictures["demo_personalized"][0]
    assert before.size == after.size == (128, 128) and before.tobytes() != after.tobytes()


def test_methods_are_compared_in_one_grid(comfy):
    """A row of four pictures per method below the base's, and no two rows are alike."""
    short, rows = {}, 1
    prompt = json.loads((ROOT / "workflows" / "api" / "compare_methods.json").read_text())
    for node, spec in prompt.items():
        if spec["class_type"].startswith("PersonalizeTrain"):
            short |= {f"{node}.steps": 3, f"{node}.batch_size": 1}
            rows += 1
        if spec["class_type"] == "KSampler":
            short |= {f"{node}.steps": 2}
    (grid,) = saved(comfy, run(comfy, "compare_methods", short))["compare"]
    cell, gap = 128, 4
    assert grid.size == (4 * cell + 3 * gap, rows * cell + (rows - 1) * gap) and rows == 7
    strips = [grid.crop((0, y, grid.width, y + cell)) for y in range(0, grid.height, cell + gap)]
    assert len({strip.tobytes() for strip in strips}) == rows


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_training_on_ones_own_pictures_runs(comfy: Comfy, server: ComfyServer, method):
    stock.write_checkpoints(server.base / "models" / "checkpoints")
    stock.write_photographs(server.input_dir / "my subject")
    node = f"PersonalizeTrain{method.__name__}"
    result = run(
        comfy,
        f"train_{method.name}",
        {
            "Load Checkpoint.ckpt_name": stock.CHECKPOINT,
            "Personal Dataset.resolution": 64,
            "Personalize Monitor.sample_steps": 2,
            "Personalize Monitor.sample_count": 1,
            f"{node}.steps": 3,
            f"{node}.name": method.name,
            "Empty Latent Image.width": 64,
            "Empty Latent Image.height": 64,
            "Empty Latent Image.batch_size": 1,
            "Sample the personalised model.steps": 2,
        },
    )
    (picture,) = saved(comfy, result)[method.__name__.lower()]
    assert picture.size == (64, 64) and len(picture.getcolors(64 * 64)) > 10
    kept = server.output_dir / "personalized" / method.name
    assert {"last.safetensors", "best.safetensors"} <= {path.name for path in kept.iterdir()}
    assert list((kept / "samples").glob("*.png"))


def test_an_unconditional_base_learns_ones_own_pictures(comfy: Comfy, server: ComfyServer):
    stock.write_photographs(server.input_dir / "my pictures")
    short = {
        "PersonalizePixelDataset.hold_out": 1,
        "PersonalizeTrainUnconditional.steps": 3,
        "PersonalizeTrainUnconditional.batch_size": 2,
        "Sample the base.steps": 2,
        "Sample what was trained.steps": 2,
    }
    pictures = saved(comfy, run(comfy, "train_unconditional", short))
    before, after = pictures["before"], pictures["after"]
    assert len(before) == len(after) == 16
    assert all(a.tobytes() != b.tobytes() for a, b in zip(before, after, strict=True))


def test_there_is_a_workflow_for_every_method():
    names = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    assert names == {path.stem for path in (ROOT / "workflows" / "api").glob("*.json")}
    assert names == {"demo", "compare_methods", "train_unconditional"} | {
        f"train_{name}" for name in METHODS
    }
