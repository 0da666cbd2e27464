#!/usr/bin/env python3
"""Draw the thumbnails of the workflows (workflows/*.jpg) from what they really make.

Runs workflows/api/demo.json with every method, and a short training of the unconditional base (a
quarter of an hour on two CPU cores), and lays training pictures above samples. Run it after
demo/base.safetensors changed:

    COMFYUI_PATH=… python tools/make_thumbnails.py [NAME …]
"""

import json
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from benchmarks.servers import Worker, share_out, workers  # noqa: E402
from demo.run import SETTINGS, general  # noqa: E402
from headless import Comfy, Graph, fill_defaults  # noqa: E402
from tools.make_workflows import COMPARED, RECIPES  # noqa: E402

OUT = ROOT / "workflows"
SIDE = 510  # pixels
STEPS = 250
TRAINING, BASE, TUNED = "demo_training", "demo_base", "demo_personalized"  # file name prefixes
Pictures = dict[str, list[Image.Image]]


def main() -> None:
    wanted = sys.argv[1:] or ["demo", "compare_methods", "train_unconditional"] + [
        f"train_{name}" for name in RECIPES
    ]
    methods = {name.removeprefix("train_") for name in wanted} & RECIPES.keys()
    methods |= {"lora"} if "demo" in wanted else set()
    methods |= set(COMPARED) if "compare_methods" in wanted else set()
    unconditional = ["unconditional"] if "train_unconditional" in wanted else []
    with workers(2) as started:
        made = dict(share_out(started, run, sorted(methods) + unconditional))
    for name in wanted:
        save(name, rows(name, made))


def run(worker: Worker, method: str) -> tuple[str, Pictures]:
    """Train a method; return its name and the saved pictures by file name prefix."""
    comfy = worker.comfy
    if method == "unconditional":
        return method, digits(worker)
    prompt = json.loads((OUT / "api" / "demo.json").read_text(encoding="utf-8"))
    (train,) = (node for node in prompt.values() if "PersonalizeTrain" in node["class_type"])
    train["class_type"] = f"PersonalizeTrain{RECIPES[method].method}"
    train["inputs"] = general(train["inputs"]) | SETTINGS[method] | {"steps": STEPS}
    return method, pictures(comfy, prompt)


def digits(worker: Worker) -> Pictures:
    """Teach the built-in base scikit-learn's scanned digits."""
    from sklearn.datasets import load_digits

    folder = worker.server.input_dir / "digits"
    folder.mkdir(parents=True)
    for number, digit in enumerate(load_digits().images[:200]):
        scan = Image.fromarray((digit * 15.9).astype("uint8")).resize((64, 64))
        scan.save(folder / f"{number:03}.png")
    graph = Graph()
    images = graph.add("PersonalizeImageFolder", folder="digits")
    base = graph.add("PersonalizeLoadUnconditional")
    data = graph.add("PersonalizePixelDataset", images=(images, 0), base=(base, 0), fit="crop")
    settings = {"name": "digits", "steps": STEPS, "batch_size": 16}
    train = graph.add("PersonalizeTrainUnconditional", base=(base, 0), data=(data, 0), **settings)
    for prefix, model in ((BASE, base), (TUNED, train)):
        drawn = graph.add("PersonalizeSampleUnconditional", base=(model, 0), count=8)
        graph.add("SaveImage", images=(drawn, 0), filename_prefix=prefix)
    return pictures(worker.comfy, graph)


def pictures(comfy: Comfy, prompt: dict) -> Pictures:
    found: Pictures = {}
    result = comfy.run(fill_defaults(prompt, comfy.object_info()))
    for file in result.files():
        image = comfy.image(file).convert("RGB")
        found.setdefault(file.filename.rsplit("_", 2)[0], []).append(image)
    return found


def rows(name: str, made: dict[str, Pictures]) -> list[list[Image.Image]]:
    """Choose a thumbnail's pictures."""
    if name == "demo":
        return [made["lora"][part][:3] for part in (TRAINING, BASE, TUNED)]
    if name == "compare_methods":
        samples = [made[method][TUNED][0] for method in COMPARED]
        return [made["lora"][TRAINING][:3], samples[:3], samples[3:]]
    found = made[name.removeprefix("train_")]
    if name == "train_unconditional":
        return [found[BASE][:4], found[BASE][4:], found[TUNED][:4], found[TUNED][4:]]
    return [found[TRAINING][:2], found[TUNED][:2]]


def save(name: str, rows: list[list[Image.Image]]) -> None:
    """Lay the rows on a white square with thin gaps."""
    cell = SIDE // max(len(rows), *map(len, rows))
    sheet = Image.new("RGB", (SIDE, SIDE), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            scaled = picture.resize((cell - 6, cell - 6), Image.Resampling.LANCZOS)
            sheet.paste(scaled, (x * cell + 3, y * cell + 3))
    sheet.save(OUT / f"{name}.jpg", quality=88, optimize=True)
    print(OUT / f"{name}.jpg")


if __name__ == "__main__":
    main()
