"""Train on a made-up subject in a headless ComfyUI and show before beside after.

`python -m demo.run` (or `make demo`) queues workflows/api/demo.json and leaves in demo/output/
before_after.png, loss.png, the personalisation, and summary.json. The workflow's Save Image nodes
say by their titles what they hold: "Training pictures", "Held-out pictures", "Base …" and
"Personalized …"; prompts and seeds are read off the nodes before them.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headless import Comfy, ComfyServer, OverrideError, PromptFailed, ServerError, fill_defaults
from headless.bar import ProgressBar
from headless.client import Prompt, Result

from .report import BASE, PERSONALIZED, ROLES, TRAINING, Picture, grid, judged, plot_loss

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / "workflows" / "api" / "demo.json"
OUTPUT = ROOT / "demo" / "output"
# {} is the subject's name; the last two ask whether what the base knew is still there.
PROMPTS = (
    "a {} totem in a meadow",
    "a {} totem at night",
    "a {} totem on a pink background",
    "a {} totem on a white background",
    "a small striped red star on a green background",
    "a big plain blue circle on a white background",
)

# what the demo base wants of a method, where that is not the workflow's or its default
SETTINGS = {
    "lora": {"learning_rate": 1e-3, "rank": 8},
    "para": {"learning_rate": 3e-3, "rank": 4},
    "apt": {"learning_rate": 1e-3, "rank": 8, "temperature": 50.0, "pad": "edge"},
    "bnn": {"learning_rate": 1e-3, "rank": 8},
    "dreambooth": {"learning_rate": 5e-5},
    "attention": {"learning_rate": 2e-4},
    "a3ft": {"learning_rate": 2e-4},
    "selective_zo": {"learning_rate": 1e-3, "rank": 8},
}


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
    threads = {"OMP_NUM_THREADS": "1"}  # networks this small gain nothing from more
    with ComfyServer(env=threads) as server, Comfy(server.url) as comfy:
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


def adjusted(
    prompt: Prompt,
    options: argparse.Namespace,
    known: dict[str, Any],
    prompts: Sequence[str] = PROMPTS,
) -> Prompt:
    """Return the workflow with the options of the command line in it, sampling every prompt."""
    train = prompt[node_of(prompt, "PersonalizeTrain")]
    if options.method:
        train["class_type"] = training_node(options.method, known)
        own = next((s for name, s in SETTINGS.items() if plain(name) == plain(options.method)), {})
        train["inputs"] = general(train["inputs"]) | own
        train["_meta"] = {"title": known[train["class_type"]]["display_name"]}
    if options.steps is not None:
        train["inputs"]["steps"] = options.steps
    if options.subject is not None:
        for node in prompt.values():
            if node["class_type"] == "PersonalizeDemoSubject":
                node["inputs"]["subject"] = options.subject
    prompt = for_prompts(prompt, [text.format(subject_name(prompt)) for text in prompts])
    return fill_defaults(prompt, known)


def for_prompts(prompt: Prompt, texts: list[str]) -> Prompt:
    """Return the workflow with everything that follows from its prompt once for each text."""
    original = behind(prompt, next(id for id in prompt if role_of(prompt[id]) == BASE))
    branch = downstream(prompt, original)
    result = {id: node for id, node in prompt.items() if id not in branch}
    for number, text in enumerate(texts, 1):
        for id in branch:
            copy = json.loads(json.dumps(prompt[id]))
            for name, value in copy["inputs"].items():
                if isinstance(value, list) and value[0] in branch:
                    copy["inputs"][name] = [f"{value[0]}.{number}", value[1]]
            result[f"{id}.{number}"] = copy
        result[f"{original}.{number}"]["inputs"]["text"] = text
    return result


def downstream(prompt: Prompt, start: str) -> list[str]:
    """Return the ids of `start` and of all nodes that use what it makes, in workflow order."""
    found: set[str] = set()
    fresh = {start}
    while fresh:
        found |= fresh
        fresh = {id for id, node in prompt.items() if sources(node) & fresh} - found
    return [id for id in prompt if id in found]


def sources(node: dict[str, Any]) -> set[str]:
    """Return the ids of the nodes a node takes its inputs from."""
    return {value[0] for value in node["inputs"].values() if isinstance(value, list)}


def role_of(node: dict[str, Any]) -> str | None:
    """Return what a Save Image node holds, by its title."""
    title = node.get("_meta", {}).get("title", "").lower()
    saves = node["class_type"] == "SaveImage"
    return next((role for role in ROLES if saves and title.startswith(role)), None)


def training_node(method: str, known: dict[str, Any]) -> str:
    """Return the class_type of a method's training node; case and _ do not matter."""
    nodes = {plain(kind): kind for kind in known if kind.startswith("PersonalizeTrain")}
    if plain(method) not in nodes:
        raise OverrideError(f"--method is '{method}'; there are: {', '.join(sorted(nodes))}")
    return nodes[plain(method)]


def plain(method: str) -> str:
    """Reduce a method's name, or its node's class_type, to what both share."""
    return method.removeprefix("PersonalizeTrain").lower().replace("_", "")


def general(inputs: dict[str, Any]) -> dict[str, Any]:
    """Keep what every method has; the rest becomes the method's own default."""
    kept = {"name", "steps", "seed", "batch_size"}
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
        role = role_of(node)
        if role is not None:
            text = prompt[behind(prompt, id)]["inputs"].get("text", "")
            images = (comfy.image(file).convert("RGB") for file in result.files(id))
            pictures[role] += [Picture(image, text) for image in images]
    missing = [role for role in (TRAINING, BASE, PERSONALIZED) if not pictures[role]]
    if missing:
        raise OverrideError(f"The workflow saves no pictures titled {', '.join(missing)} …")
    return pictures


def behind(prompt: Prompt, id: str) -> str:
    """Follow images -> samples -> positive from a Save Image node to where the picture began."""
    for name in ("images", "samples", "positive"):
        link = prompt[id]["inputs"].get(name)
        id = link[0] if isinstance(link, list) else id
    return id


def newest_run(root: Path) -> Path:
    """Return the folder the training node wrote."""
    runs = sorted(root.glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise FileNotFoundError(f"The workflow left no run in {root}")
    return runs[-1].parent


if __name__ == "__main__":
    sys.exit(main())
