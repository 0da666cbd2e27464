"""The example workflows run on a real server, through their API twins."""

import json
from pathlib import Path
from typing import Any

import pytest

from headless import Comfy, ComfyServer, apply_overrides
from headless.client import Result
from tests import stock

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.server


def run(comfy: Comfy, name: str, overrides: dict[str, Any]) -> Result:
    """Run a workflow with `{"node title.input": value}` overrides."""
    prompt = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    listed = [f"{target}={value}" for target, value in overrides.items()]
    return comfy.run(apply_overrides(prompt, listed, comfy.object_info()), timeout=300)


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


@pytest.mark.parametrize("method", ["LoRA", "PaRa"])
def test_training_on_ones_own_pictures_runs(comfy: Comfy, server: ComfyServer, method):
    stock.write_checkpoints(server.base / "models" / "checkpoints")
    stock.write_photographs(server.input_dir / "my subject")
    result = run(
        comfy,
        f"train_{method.lower()}",
        {
            "Load Checkpoint.ckpt_name": stock.CHECKPOINT,
            "Personal Dataset.resolution": 64,
            f"Train {method}.steps": 3,
            f"Train {method}.layers": "attention",
            "Empty Latent Image.width": 64,
            "Empty Latent Image.height": 64,
            "Empty Latent Image.batch_size": 1,
            "Sample the personalised model.steps": 2,
        },
    )
    (picture,) = saved(comfy, result)[method.lower()]
    assert picture.size == (64, 64) and len(set(picture.getdata())) > 10
    kept = server.output_dir / "personalized" / "my subject"
    assert (kept / "last.safetensors").is_file()
