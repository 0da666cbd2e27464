#!/usr/bin/env python3
"""Draw docs/monitor.png, docs/monitor_light.png and docs/report.png.

A training node as it trains, as ComfyUI's own page shows it in its dark and light theme, and what
Personalize Report makes of the run. Trains the demo base on a made-up subject, far too long, with
a monitor (some minutes on a CPU):

    COMFYUI_PATH=… python tools/make_monitor_picture.py
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from PIL import Image  # noqa: E402

from headless import Comfy, ComfyServer, Graph, fill_defaults  # noqa: E402
from tests.browser import ComfyPage, launch, open_page  # noqa: E402

DOCS = ROOT / "docs"
STEPS, SHOWN = 400, 330  # the picture is taken at that step
ZOOM = 1.5


def main() -> None:
    with (
        ComfyServer(env={"OMP_NUM_THREADS": "1"}) as server,
        Comfy(server.url) as comfy,
        launch() as browser,
        open_page(browser, server.url) as page,
    ):
        page.run(
            "async () => { await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true) }"
        )
        graph = fill_defaults(training(), comfy.object_info())
        page.run("async graph => { await app.loadApiJson(graph, 'totem') }", graph)
        page.queue()
        page.wait(f"{AT} >= {SHOWN}", seconds=900)
        shoot(page, DOCS / "monitor.png")
        page.run(
            "async () => { await app.extensionManager.setting.set('Comfy.ColorPalette', 'light') }"
        )
        shoot(page, DOCS / "monitor_light.png")
        report(comfy)


def report(comfy: Comfy) -> None:
    """Wait for the run's end, and save its report."""
    graph = Graph()
    shown = graph.add("PersonalizeReport", run="my subject")
    node = graph.add("SaveImage", images=(shown, 0), filename_prefix="report")
    (file,) = comfy.run(fill_defaults(graph, comfy.object_info())).files(node)
    picture = comfy.image(file).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    picture.save(DOCS / "report.png", optimize=True)


def training() -> Graph:
    """Return a graph that over-fits."""
    graph = Graph()
    base = graph.add("PersonalizeDemoBase")
    drawn = graph.add("PersonalizeDemoSubject", count=6, resolution=64)
    wires = {"clip": (base, 1), "vae": (base, 2)}
    pictures = {"images": (drawn, 0), "captions": (drawn, 1)}
    data = graph.add("PersonalizeDataset", resolution=64, hold_out=2, **wires, **pictures)
    prompts = "a zib totem\na zib totem on a red background"
    how = {"every": 10, "early_stop": False, "cfg": 4.0, "prior_prompts": "a totem"}
    monitor = graph.add("PersonalizeMonitor", prompts=prompts, **how, **wires)
    inputs = {"model": (base, 0), "data": (data, 0), "monitor": (monitor, 0)}
    how = {"name": "my subject", "steps": STEPS, "learning_rate": 8e-4, "batch_size": 2}
    graph.add("PersonalizeTrainLoRA", "Train LoRA", **inputs, **how)
    return graph


AT = "parseInt(document.querySelector('.personalize-monitor .progress')?.textContent)"


def shoot(page: ComfyPage, path: Path) -> None:
    """Save the training node, down to the end of its monitor."""
    page.run(
        """zoom => {
            const node = app.graph._nodes.find(n => n.type === "PersonalizeTrainLoRA")
            app.canvas.ds.scale = zoom
            app.canvas.ds.offset = [300 / zoom - node.pos[0], 200 / zoom - node.pos[1]]
            app.canvas.setDirty(true, true)
        }""",
        ZOOM,
    )
    page.page.set_viewport_size({"width": 1200, "height": 1600})
    time.sleep(2)  # until the page has drawn it so
    monitor = page.page.locator(".personalize-monitor").bounding_box()
    node = page.page.locator("[data-node-id]").filter(has=page.page.locator(".losses"))
    whole = node.bounding_box()
    assert monitor and whole
    edge = 10
    clip = {
        "x": whole["x"] - edge,
        "y": whole["y"] - edge,
        "width": whole["width"] + 2 * edge,
        "height": monitor["y"] + monitor["height"] - whole["y"] + 2 * edge,
    }
    page.page.screenshot(path=str(path), clip=clip)  # type: ignore[arg-type]
    print(path)


if __name__ == "__main__":
    main()
