#!/usr/bin/env python3
"""Draw the thumbnails of the workflows (workflows/*.jpg) from what they really make.

Runs workflows/api/demo.json with LoRA and with PaRa (some minutes on a CPU), and lays training
pictures above samples. Run it after demo/base.safetensors changed:

    COMFYUI_PATH=… python tools/make_thumbnails.py
"""

import json
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from demo.run import SETTINGS, general  # noqa: E402
from headless import Comfy, ComfyServer, fill_defaults  # noqa: E402

OUT = ROOT / "workflows"
SIDE = 510  # pixels
TRAINING, BASE, TUNED = "demo_training", "demo_base", "demo_personalized"  # file name prefixes
Pictures = dict[str, list[Image.Image]]


def main() -> None:
    with ComfyServer(env={"OMP_NUM_THREADS": "1"}) as server, Comfy(server.url) as comfy:
        lora, para = run(comfy, "LoRA"), run(comfy, "PaRa")
    save("demo", [lora[TRAINING][:3], lora[BASE][:3], lora[TUNED][:3]])
    save("train_lora", [lora[TRAINING][:2], lora[TUNED][:2]])
    save("train_para", [para[TRAINING][:2], para[TUNED][:2]])


def run(comfy: Comfy, method: str) -> Pictures:
    """Run the demo with a method; return the saved pictures by file name prefix."""
    prompt = json.loads((OUT / "api" / "demo.json").read_text(encoding="utf-8"))
    for node in prompt.values():
        if method != "LoRA" and node["class_type"] == "PersonalizeTrainLoRA":
            node["class_type"] = f"PersonalizeTrain{method}"
            node["inputs"] = general(node["inputs"]) | SETTINGS[method.lower()]
    result = comfy.run(fill_defaults(prompt, comfy.object_info()))
    pictures: Pictures = {}
    for file in result.files():
        image = comfy.image(file).convert("RGB")
        pictures.setdefault(file.filename.rsplit("_", 2)[0], []).append(image)
    return pictures


def save(name: str, rows: list[list[Image.Image]]) -> None:
    """Lay the rows on a white square with thin gaps."""
    cell = SIDE // len(rows)
    sheet = Image.new("RGB", (SIDE, SIDE), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            scaled = picture.resize((cell - 6, cell - 6), Image.Resampling.LANCZOS)
            sheet.paste(scaled, (x * cell + 3, y * cell + 3))
    sheet.save(OUT / f"{name}.jpg", quality=88, optimize=True)
    print(OUT / f"{name}.jpg")


if __name__ == "__main__":
    main()
