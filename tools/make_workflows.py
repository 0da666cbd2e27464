#!/usr/bin/env python3
"""Write the example workflows: workflows/*.json (graphs) and workflows/api/*.json (prompts).

The graphs are described here, and built, measured and exported by ComfyUI's own page, so that
sizes, widget order and the API twins are the real ones. Run it after a node's inputs changed:

    COMFYUI_PATH=… python tools/make_workflows.py [--screenshots DIR]

Thumbnails (workflows/*.jpg) are made by tools/make_thumbnails.py.
"""

import argparse
import json
import sys
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from demo.run import SETTINGS  # noqa: E402
from headless import ComfyServer  # noqa: E402
from tests.browser import launch, open_page  # noqa: E402

OUT = ROOT / "workflows"
TITLE_HEIGHT, GAP, PADDING, GROUP_TITLE = 30, 40, 22, 50  # pixels
BELOW = 72  # pixels below a node: in "Nodes 2.0" they are taller
BLUE, GREEN, VIOLET, GREY = "#3f789e", "#3f6e4a", "#6b4f8a", "#555555"


@dataclass
class Node:
    """A node; `inputs` are (node name, output index) by input name."""

    type: str
    title: str = ""
    widgets: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, tuple[str, int]] = field(default_factory=dict)
    width: int = 320
    height: int = 0  # at least


@dataclass
class Group:
    """A titled box; its columns of nodes stand side by side."""

    title: str
    colour: str
    columns: list[dict[str, Node]]


def note(text: str, height: int, width: int = 320) -> Node:
    return Node("MarkdownNote", "Read me", {"text": text}, width=width, height=height)


def prompt(title: str, text: str) -> Node:
    return Node("CLIPTextEncode", title, {"text": text}, {"clip": ("base", 1)}, height=110)


def sampler(title: str, model: tuple[str, int], how: dict[str, Any]) -> Node:
    return Node(
        "KSampler",
        title,
        {"seed": 1, "control_after_generate": "fixed", **how},
        {
            "model": model,
            "positive": ("positive", 0),
            "negative": ("negative", 0),
            "latent_image": ("latent", 0),
        },
    )


def decoded(samples: str) -> Node:
    return Node("VAEDecode", "", {}, {"samples": (samples, 0), "vae": ("base", 2)}, width=220)


def saved(title: str, images: str, prefix: str, height: int = 320) -> Node:
    prefix = f"personalize/{prefix}"
    return Node(
        "SaveImage", title, {"filename_prefix": prefix}, {"images": (images, 0)}, 320, height
    )


def loss_graph() -> Node:
    inputs = {"loss": ("train", 2)}
    prefix = {"filename_prefix": "personalize/loss"}
    return Node("LossGraphNode", "Plot Loss Graph", prefix, inputs, height=300)


DEMO_NOTE = """\
### Personalize in a few minutes
This graph needs none of your files: base model and pictures come with the pack.
1. **Run** it. The base learns a character it has never seen, *a zib totem*, from four pictures.
2. Compare **Base** with **Personalized**: same prompt, same seed.
3. Change the prompt, or the **Character**, and run again.
"""

COMPARE_NOTE = """\
### Several methods side by side
The same four pictures of a made-up character train a LoRA and the methods against over-fitting, \
300 steps each. One picture comes out: a row per method, in the order of the boxes, the base first.

Bypass (`Ctrl B`) what you don't want to wait for. With a card, raise `steps` and see which rows \
begin to copy.
"""

UNCONDITIONAL_NOTE = """\
### A³FT in its paper's own setting
A base that draws one kind of picture, without a prompt, learns another kind from some hundreds of \
pictures.
1. **Pictures**: put them into a folder in ComfyUI's `input` folder, press **R**, and choose it in \
*Load Personal Images*.
2. **Base**: the small one that comes with the pack draws letters and figures, 16x16 pixels. Or \
put a diffusers folder with a `UNet2DModel` into `models/diffusers`.
3. `mode` compares A³FT with training everything (naive), or attention alone.
"""

USER_NOTE = """\
### What to change first
1. **Pictures**: put 4 to 20 pictures of one subject into a folder in ComfyUI's `input` folder, \
press **R**, and choose it in *Load Personal Images*. A `.txt` of the same name is its caption.
2. **Checkpoint**: choose a Stable Diffusion 1.x or 2.x model.
3. **Words**: in *Personal Dataset*, write a rare word and the class (*a photo of sks dog*). \
Use the same words in *Prompt*.

4. *Personalize Monitor* keeps one picture out of training to see when the model begins to copy, \
ends the training then, and hands on the best checkpoint. Its prompts are sampled on the way.

{method}
The run is kept in `output/personalized`; *Load Personalization* brings it back later.
"""


@dataclass
class Recipe:
    """How one method is started on photographs, and what to say about it."""

    method: str  # as in the node's id
    note: str
    widgets: dict[str, Any]


RECIPES = {
    "lora": Recipe(
        "LoRA",
        "Too weak: more `steps`. Stiff copies of your pictures: fewer `steps`, or a lower `rank`.",
        {"steps": 800, "learning_rate": 1e-4, "rank": 16},
    ),
    "para": Recipe(
        "PaRa",
        "PaRa takes directions away instead of adding some. "
        "Not like your subject: more `steps` or `rank`. Deaf to the prompt: less `rank`.",
        {"steps": 800, "learning_rate": 1e-4, "rank": 4},
    ),
    "dreambooth": Recipe(
        "DreamBooth",
        "Every weight learns: the strongest way, the quickest to over-fit, and the one that takes "
        "most memory. Keep `learning_rate` small.",
        {"steps": 800, "learning_rate": 5e-6},
    ),
    "attention": Recipe(
        "Attention",
        "Only the attention blocks learn: calmer than moving every weight.",
        {"steps": 800, "learning_rate": 1e-5},
    ),
    "apt": Recipe(
        "APT",
        "APT measures at which noise levels the model over-fits, trains less there and shows "
        "turned and shrunken pictures instead. Stiff copies: raise `lambda_rs` and `lambda_aa`.",
        {"steps": 1000, "learning_rate": 1e-4, "rank": 16},
    ),
    "bnn": Recipe(
        "BNN",
        "BNN trains with random weights around those it keeps, which holds off the stage of noisy, "
        "corrupted pictures. Pictures stay vague: lower `sigma`.",
        {"steps": 1600, "learning_rate": 1e-4, "rank": 4},
    ),
    "a3ft": Recipe(
        "A3FT",
        "A³FT trains the attention blocks and a small adapter that knows the noise level. "
        "`mode` compares it with training everything, or attention alone.",
        {"steps": 800, "learning_rate": 2e-5},
    ),
    "selective_zo": Recipe(
        "SelectiveZO",
        "Selective BP/ZO trains on small pictures with gradients, and on full-size ones with "
        "forward passes only: for cards with little memory.",
        {"steps": 1200, "learning_rate": 1e-4, "rank": 8},
    ),
}
COMPARED = ("lora", "para", "apt", "bnn", "a3ft", "selective_zo")  # in the order of the rows


def subject(split: str) -> Node:
    widgets = {"count": 4, "split": split, "resolution": 128}
    return Node("PersonalizeDemoSubject", "", widgets, {"subject": ("character", 0)})


def demo() -> list[Group]:
    """Save Image titles begin with the words that demo/run.py looks for."""
    how = {"steps": 25, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}
    size = {"width": 128, "height": 128, "batch_size": 4}
    dataset = Node(
        "PersonalizeDataset",
        "",
        {"instance_prompt": "a zib totem", "resolution": 128},
        {
            "images": ("pictures", 0),
            "clip": ("base", 1),
            "vae": ("base", 2),
            "captions": ("pictures", 1),
        },
    )
    training = {"name": "demo", "steps": 400, "learning_rate": 1e-3, "batch_size": 4, "rank": 8}
    inputs = {"model": ("base", 0), "data": ("dataset", 0)}
    character = {"value": 1}
    return [
        Group(
            "1  Base and pictures",
            BLUE,
            [
                {
                    "note": note(DEMO_NOTE, 200),
                    "base": Node("PersonalizeDemoBase"),
                    "character": Node("PrimitiveInt", "Character", character),
                    "pictures": subject("training"),
                    "shown": saved("Training pictures", "pictures", "demo_training", 330),
                }
            ],
        ),
        Group(
            "2  Train",
            GREEN,
            [
                {"dataset": dataset, "loss": loss_graph()},
                {"train": Node("PersonalizeTrainLoRA", "", training, inputs)},
            ],
        ),
        Group(
            "3  Compare",
            VIOLET,
            [
                {
                    "positive": prompt("Prompt", "a zib totem on a green background"),
                    "negative": prompt("Negative prompt (empty)", ""),
                    "latent": Node("EmptyLatentImage", "", size),
                    "others": replace(subject("held-out"), title="More of the same character"),
                },
                {
                    "sample_base": sampler("Sample the base", ("base", 0), how),
                    "decode_base": decoded("sample_base"),
                    "sample_tuned": sampler("Sample the personalised model", ("train", 0), how),
                    "decode_tuned": decoded("sample_tuned"),
                },
                {
                    "before": saved("Base: before training", "decode_base", "demo_base"),
                    "after": saved(
                        "Personalized: after training", "decode_tuned", "demo_personalized"
                    ),
                    "held_out": saved(
                        "Held-out pictures (never shown)",
                        "others",
                        "demo_held_out",
                    ),
                },
            ],
        ),
    ]


def compare_methods() -> list[Group]:
    """A row of the grid per method: the base first, then the methods in their order."""
    how = {"steps": 25, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}
    size = {"width": 128, "height": 128, "batch_size": 4}
    data = {"images": ("pictures", 0), "captions": ("pictures", 1)}
    dataset = Node(
        "PersonalizeDataset",
        "",
        {"instance_prompt": "a zib totem", "resolution": 128},
        {"clip": ("base", 1), "vae": ("base", 2), **data},
    )
    columns, rows = [], {"base": ("base", 0)}
    for name in COMPARED:
        inputs = {"model": ("base", 0), "data": ("dataset", 0)}
        widgets = {"name": f"compare {name}", "steps": 300, "batch_size": 4, **SETTINGS[name]}
        node = Node(f"PersonalizeTrain{RECIPES[name].method}", "", widgets, inputs)
        columns.append({f"train_{name}": node})
        rows[name] = (f"train_{name}", 0)
    samples = {
        f"sample_{name}": sampler(f"Sample: {name}", model, how) for name, model in rows.items()
    }
    decodes = {f"decode_{name}": decoded(f"sample_{name}") for name in rows}
    batch = {f"images.image{i}": (name, 0) for i, name in enumerate(decodes)}
    first = {
        "note": note(COMPARE_NOTE, 260),
        "base": Node("PersonalizeDemoBase"),
        "character": Node("PrimitiveInt", "Character", {"value": 1}),
        "pictures": subject("training"),
        "dataset": dataset,
    }
    words = {
        "positive": prompt("Prompt", "a zib totem on a green background"),
        "negative": prompt("Negative prompt (empty)", ""),
        "latent": Node("EmptyLatentImage", "", size),
    }
    grid = {
        "batch": Node("BatchImagesNode", "", {}, batch),
        "list": Node("RebatchImages", "One by one", {"batch_size": 1}, {"images": ("batch", 0)}),
        "grid": Node(
            "ImageGrid",
            "",
            {"columns": 4, "cell_width": 128, "cell_height": 128},
            {"images": ("list", 0)},
        ),
        "saved": saved("A row per method", "grid", "compare", 700),
    }
    return [
        Group("1  Base and pictures", BLUE, [first]),
        Group("2  Train each method on the same pictures", GREEN, columns),
        Group("3  Same prompt, same seeds", VIOLET, [words, samples, decodes]),
        Group("4  Compare", GREY, [grid]),
    ]


def train_on_own_pictures(recipe: Recipe) -> list[Group]:
    how = {"steps": 25, "cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
    dataset = Node(
        "PersonalizeDataset",
        "",
        {"instance_prompt": "a photo of sks dog", "resolution": 512, "hold_out": 1},
        {
            "images": ("pictures", 0),
            "clip": ("base", 1),
            "vae": ("base", 2),
            "captions": ("pictures", 1),
        },
    )
    monitor = Node(
        "PersonalizeMonitor",
        "",
        {"prompts": "a photo of sks dog on the beach\na photo of a dog"},
        {"clip": ("base", 1), "vae": ("base", 2)},
    )
    inputs = {"model": ("base", 0), "data": ("dataset", 0), "monitor": ("monitor", 0)}
    return [
        Group(
            "1  Base and pictures",
            BLUE,
            [
                {
                    "note": note(USER_NOTE.format(method=recipe.note), 470),
                    "pictures": Node("PersonalizeImageFolder", "", {"folder": "my subject"}),
                    "base": Node(
                        "CheckpointLoaderSimple",
                        "",
                        {"ckpt_name": "v1-5-pruned-emaonly.safetensors"},
                    ),
                }
            ],
        ),
        Group(
            "2  Train",
            GREEN,
            [
                {"dataset": dataset, "monitor": monitor, "loss": loss_graph()},
                {
                    "train": Node(
                        f"PersonalizeTrain{recipe.method}",
                        "",
                        {"name": "my subject", "save_every": 200, **recipe.widgets},
                        inputs,
                    )
                },
            ],
        ),
        Group(
            "3  Use it",
            VIOLET,
            [
                {
                    "positive": prompt("Prompt", "a photo of sks dog on the beach, golden hour"),
                    "negative": prompt("Negative prompt", "blurry, low quality, deformed"),
                    "latent": Node(
                        "EmptyLatentImage", "", {"width": 512, "height": 512, "batch_size": 4}
                    ),
                    "sample": sampler("Sample the personalised model", ("train", 0), how),
                    "decode": decoded("sample"),
                },
                {"after": saved("Your subject", "decode", recipe.method.lower(), 480)},
            ],
        ),
    ]


def train_unconditional() -> list[Group]:
    pictures = {"pictures": Node("PersonalizeImageFolder", "", {"folder": "my pictures"})}
    dataset = Node(
        "PersonalizePixelDataset",
        "",
        {"hold_out": 50},
        {"images": ("pictures", 0), "base": ("base", 0)},
    )
    training = {"name": "my pictures", "steps": 2000, "batch_size": 16, "save_every": 500}
    inputs = {"base": ("base", 0), "data": ("dataset", 0)}
    train = Node("PersonalizeTrainUnconditional", "", training, inputs)

    def drawn(title: str, base: str) -> Node:
        widgets = {"count": 16, "control_after_generate": "fixed"}
        return Node("PersonalizeSampleUnconditional", title, widgets, {"base": (base, 0)})

    return [
        Group(
            "1  Base and pictures",
            BLUE,
            [
                {
                    "note": note(UNCONDITIONAL_NOTE, 300),
                    **pictures,
                    "base": Node("PersonalizeLoadUnconditional"),
                }
            ],
        ),
        Group("2  Train", GREEN, [{"dataset": dataset, "loss": loss_graph()}, {"train": train}]),
        Group(
            "3  Compare",
            VIOLET,
            [
                {
                    "sample_base": drawn("Sample the base", "base"),
                    "sample_tuned": drawn("Sample what was trained", "train"),
                },
                {
                    "before": saved("Before", "sample_base", "before"),
                    "after": saved("After", "sample_tuned", "after"),
                },
            ],
        ),
    ]


def workflows() -> dict[str, list[Group]]:
    own = {f"train_{name}": train_on_own_pictures(recipe) for name, recipe in RECIPES.items()}
    return {
        "demo": demo(),
        "compare_methods": compare_methods(),
        **own,
        "train_unconditional": train_unconditional(),
    }


# The page does the rest

BUILD = """async (specs) => {
    const app = window.app
    app.graph.clear()
    const made = {}
    for (const [name, spec] of specs) {
        const node = LiteGraph.createNode(spec.type)
        if (!node) throw new Error(`no node ${spec.type}`)
        if (spec.title) node.title = spec.title
        app.graph.add(node)
        for (const [key, value] of Object.entries(spec.widgets)) {
            const widget = node.widgets?.find(w => w.name === key)
            if (!widget) throw new Error(`${spec.type} has no widget ${key}`)
            widget.value = value
        }
        made[name] = node
    }
    for (const [name, spec] of specs) {
        for (const [key, [from, output]] of Object.entries(spec.inputs)) {
            const slot = made[name].findInputSlot(key)
            if (slot < 0) throw new Error(`${spec.type} has no input ${key}`)
            if (!made[from].connect(output, made[name], slot)) throw new Error(`${name}.${key}`)
        }
    }
    for (const [name, spec] of specs) {
        const node = made[name]
        node.pos = spec.pos ?? [0, 0]
        node.size = [spec.width, Math.max(spec.height, node.computeSize()[1])]
    }
    const sizes = Object.fromEntries(specs.map(([name]) => [name, [...made[name].size]]))
    return JSON.stringify({graph: app.graph.serialize(), sizes})  // drops what is undefined
}"""


def build(page, name: str, groups: list[Group]) -> dict[str, Any]:
    """Return the graph: built once to measure the nodes, and once more in place."""
    nodes = {
        key: node for group in groups for column in group.columns for key, node in column.items()
    }
    specs = [[key, vars(node)] for key, node in nodes.items()]
    sizes = json.loads(page.run(BUILD, specs))["sizes"]
    places, boxes = layout(groups, sizes)
    specs = [[key, {**vars(node), "pos": places[key]}] for key, node in nodes.items()]
    graph = json.loads(page.run(BUILD, specs))["graph"]
    graph["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"personalize/{name}"))
    graph["groups"] = boxes
    graph["extra"] = {}
    return graph


def layout(
    groups: list[Group], sizes: dict[str, list[float]]
) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """Stack nodes in columns, columns in groups, groups from left to right."""
    places, boxes, x = {}, [], 0.0
    for number, group in enumerate(groups, 1):
        left, x, bottom = x, x + PADDING, 0.0
        for column in group.columns:
            y = GROUP_TITLE + TITLE_HEIGHT
            for key in column:
                places[key] = [x, y]
                y += sizes[key][1] + TITLE_HEIGHT + BELOW
            bottom = max(bottom, y - TITLE_HEIGHT - BELOW)
            x += max(sizes[key][0] for key in column) + GAP
        x += PADDING - GAP
        boxes.append(
            {
                "id": number,
                "title": group.title,
                "bounding": [left, 0, x - left, bottom + PADDING],
                "color": group.colour,
                "font_size": 24,
                "flags": {},
            }
        )
        x += GAP
    return places, boxes


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(path.relative_to(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--screenshots", type=Path, help="also picture the graphs, into this folder"
    )
    parser.add_argument("--server", help="use this ComfyUI; else start one")
    options = parser.parse_args()
    if options.server:
        make(options.server, options.screenshots)
    else:
        with ComfyServer(cpu=True) as server:
            make(server.url, options.screenshots)


def make(url: str, screenshots: Path | None) -> None:
    with launch() as browser:
        for name, groups in workflows().items():
            with open_page(browser, url) as page:  # a fresh one: it remembers widgets by node id
                page.page.set_viewport_size({"width": 2600, "height": 1300})
                graph = build(page, name, groups)
            with open_page(browser, url) as page:
                page.page.set_viewport_size({"width": 2600, "height": 1300})
                page.load(graph)
                prompt = page.prompt()
                assert prompt.keys() <= {str(node["id"]) for node in graph["nodes"]}, name
                write(OUT / f"{name}.json", graph)
                write(OUT / "api" / f"{name}.json", prompt)
                if screenshots:
                    page.page.wait_for_timeout(1500)  # the page fits the graph into view
                    page.screenshot(screenshots / f"{name}.png")


if __name__ == "__main__":
    main()
