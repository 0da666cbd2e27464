"""ComfyUI's own page with the pack in it, in a real browser."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from headless import Comfy, ComfyServer
from tests.browser import ComfyPage, open_page
from tests.waiting import PAGE_PATIENCE, PATIENCE

ROOT = Path(__file__).resolve().parent.parent
GRAPHS = sorted((ROOT / "workflows").glob("*.json"))
NAMES = [path.stem for path in GRAPHS]
WAIT = 1000 * PAGE_PATIENCE  # ms


@pytest.fixture(scope="module")
def page(browser, server: ComfyServer) -> Iterator[ComfyPage]:
    """One page for the module; `fresh` empties its lists of complaints."""
    with open_page(browser, server.url) as page:
        yield page


@pytest.fixture
def fresh(page: ComfyPage) -> Iterator[ComfyPage]:
    """The page; whatever the test does must cause no error and no external request."""
    page.errors.clear()
    page.external.clear()
    yield page
    page.page.keyboard.press("Escape")
    assert not page.errors
    assert not page.external


def read(name: str, folder: str = "workflows") -> dict:
    return json.loads((ROOT / folder / f"{name}.json").read_text(encoding="utf-8"))


# The workflows


def test_the_pack_brings_workflows():
    assert {"demo", "train_lora", "train_para"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_api_twin_is_what_the_page_makes_of_the_graph(fresh, name):
    """After a node's inputs changed: run tools/make_workflows.py."""
    fresh.load(read(name))
    assert fresh.prompt() == read(name, "workflows/api")


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_loads_with_all_its_nodes_known_and_apart(fresh, name):
    fresh.load(read(name))
    types = fresh.run("() => app.graph._nodes.map(n => n.type)")
    assert fresh.run("types => types.every(t => LiteGraph.registered_node_types[t])", types)
    boxes = fresh.run(
        """() => app.graph._nodes.map(
            n => [n.title, n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30])"""
    )
    assert len(boxes) == len(read(name)["nodes"])
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert not [(a[0], b[0]) for a, b in pairs if overlap(a, b)]


def overlap(a: list, b: list) -> bool:
    (_, ax, ay, aw, ah), (_, bx, by, bw, bh) = a, b
    return ax < bx + bw and bx < ax + aw and ay < by + bh and by < ay + ah


ON_PURPOSE = {"save_every"}
ON_PURPOSE_FOR_THE_DEMO_BASE = {"temperature", "pad"}


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_keeps_the_defaults_of_what_it_does_not_mean_to_change(object_info, name):
    """Advanced settings are the method's business, not the example's."""
    meant = ON_PURPOSE | (ON_PURPOSE_FOR_THE_DEMO_BASE if name == "compare_methods" else set())
    for node in read(name, "workflows/api").values():
        if not node["class_type"].startswith("PersonalizeTrain"):
            continue
        declared = object_info[node["class_type"]]["input"]["required"]
        for key, (_, options) in declared.items():
            if options.get("advanced") and key not in meant:
                assert node["inputs"][key] == options["default"], key


def test_the_template_browser_lists_the_workflows_with_thumbnails(server):
    listed = json.loads(fetch(server, "/api/workflow_templates"))
    assert sorted(listed["personalize"]) == NAMES
    for name in NAMES:
        assert json.loads(fetch(server, f"/api/workflow_templates/personalize/{name}.json"))
        thumbnail = fetch(server, f"/api/workflow_templates/personalize/{name}.jpg")
        assert thumbnail[:2] == b"\xff\xd8" and len(thumbnail) <= 100_000


def fetch(server: ComfyServer, path: str) -> bytes:
    with urllib.request.urlopen(server.url + path, timeout=30) as reply:
        return reply.read()


def test_the_page_shows_the_templates_and_opens_one(fresh):
    """The dialog of templates has a section of ours with all names."""
    fresh.run("async () => { await app.extensionManager.command.execute('Comfy.BrowseTemplates') }")
    dialog = fresh.page.get_by_role("dialog")
    dialog.get_by_text("personalize", exact=True).click(timeout=WAIT)
    for name in NAMES:
        dialog.get_by_text(name.replace("_", " ")).last.wait_for(timeout=WAIT)
    dialog.get_by_text("demo").last.click()
    fresh.wait("app.graph._nodes.some(n => n.type === 'PersonalizeDemoBase')")


# Running one


SHORT = {
    "PersonalizeTrainLoRA": {"steps": 4, "batch_size": 1},
    "KSampler": {"steps": 2},
    "EmptyLatentImage": {"batch_size": 1},
}


def test_the_demo_runs_from_the_page_and_shows_pictures(fresh, comfy: Comfy):
    fresh.load(read("demo"))
    fresh.run(
        """short => { for (const node of app.graph._nodes)
            for (const [name, value] of Object.entries(short[node.type] ?? {}))
                node.widgets.find(w => w.name === name).value = value }""",
        SHORT,
    )
    known = set(comfy.get("/history"))
    fresh.queue()
    fresh.wait(
        "app.graph._nodes.filter(n => n.type === 'SaveImage').every(n => n.imgs?.length)", PATIENCE
    )
    (prompt_id,) = set(comfy.get("/history")) - known
    result = comfy.result(prompt_id)
    pictures = [comfy.image(file) for file in result.files() if "demo_" in file.filename]
    assert len(pictures) == 4 + 4 + 1 + 1 and all(p.size == (128, 128) for p in pictures)
    summary = [text for id in result.outputs for text in result.texts(id) if "saved as run" in text]
    assert len(summary) == 1


# Nodes in the page


def test_every_node_of_the_pack_can_be_added(fresh, object_info):
    made = fresh.run(
        "types => types.map(type => LiteGraph.createNode(type)?.comfyClass)", list(object_info)
    )
    assert made == list(object_info)


def test_advanced_widgets_are_marked(fresh):
    widgets = fresh.run(
        """() => LiteGraph.createNode('PersonalizeTrainLoRA').widgets.map(
            w => [w.name, !!(w.advanced ?? w.options?.advanced)])"""
    )
    advanced = {name for name, is_advanced in widgets if is_advanced}
    assert {"schedule", "noise_offset", "alpha"} <= advanced
    assert not advanced & {"name", "steps", "learning_rate", "rank", "seed"}


def test_a_widget_shows_its_tooltip(fresh, object_info):
    fresh.load(read("demo"))
    x, y = fresh.run(WHERE, ["PersonalizeTrainLoRA", "rank"])
    fresh.page.mouse.move(x - 5, y)
    fresh.page.mouse.move(x, y)
    tooltip = fresh.page.locator(".node-tooltip")
    tooltip.wait_for(timeout=WAIT)
    _, options = object_info["PersonalizeTrainLoRA"]["input"]["required"]["rank"]
    assert tooltip.inner_text() == options["tooltip"]


# Bring a widget into the middle of the page, and say where it is on the screen.
WHERE = """([type, name]) => {
    const node = app.graph._nodes.find(n => n.type === type)
    app.canvas.ds.scale = 1
    app.canvas.centerOnNode(node)
    app.canvas.draw(true, true)
    const widget = node.widgets.find(w => w.name === name)
    const inside = [node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10]
    const [x, y] = app.canvas.ds.convertOffsetToCanvas(inside)
    const {left, top} = app.canvas.canvas.getBoundingClientRect()
    return [x + left, y + top]
}"""


def test_the_training_seed_stays(fresh):
    """A control that draws a new seed after each queueing would train anew each time."""
    names = fresh.run("() => LiteGraph.createNode('PersonalizeTrainLoRA').widgets.map(w => w.name)")
    assert "seed" in names and "control_after_generate" not in names
