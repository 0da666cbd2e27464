"""One training with its samples: computed once, kept in a folder of its own, found again.

A folder is named by a hash of all that decides what is in it, and holds

    cell.json       what was asked, and what was measured while it trained; written last
    history.jsonl   the run's own history
    samples.png     a row for every (step, draw, prompt), a column for every picture of it
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from demo import world
from demo.run import training_node
from headless import Comfy, Graph, fill_defaults
from headless.client import Result

from . import ROOT
from .configurations import BASE, CONFIGURATIONS, Configuration
from .provenance import code_hash
from .servers import Meter, Worker, peak_memory, reset_peak_memory, workers

FORMAT = 2  # of a folder and what is measured: raise it, and every cell is made anew
SIDE = 128  # pixels
CLASS_PROMPTS = (
    "a totem in a meadow",
    "a totem on a white background",
    "a totem with a red oval body and a blue star head at night",
    "a totem with a green block body and a yellow heart head on a pink background",
)
OTHER_PROMPTS = (
    "a small striped red star on the left on a green background",
    "a big plain blue circle on a white background",
    "a big dotted yellow heart at night",
    "a small checkered purple ring at the top on a grey background",
)
REFERENCE_DRAWS = (1, 2, 3)  # of start noise, by the base alone; draw 0 is every cell's
BASE_FILE = ROOT / "demo" / "base.safetensors"
MOST_PICTURES = len(world.BACKGROUNDS) - 2  # to train on; the subject is asked for on the others
MEMORY_STEPS = 12
TRAIN = "train"  # the training node's title


@dataclass(frozen=True)
class Plan:
    """What all cells of a table share."""

    steps: int = 200
    batch_size: int = 2
    pictures: int = 5  # to train on
    held_out: int = 4  # kept out of training
    samples: int = 4  # of every prompt
    sampler_steps: int = 12  # of DPM++ 2M, half the work of 25 Euler steps
    trajectory: tuple[int, ...] = ()  # multiples of the first: the subject is sampled then too

    @property
    def steps_on_the_way(self) -> tuple[int, ...]:
        """Return the trajectory with its end; () without one."""
        return (*self.trajectory, self.steps) if self.trajectory else ()

    def subject_prompts(self, subject: int) -> list[str]:
        """Ask for the subject on (up to 4) backgrounds that it was not trained on."""
        drawn = world.subject_pictures(subject, len(world.BACKGROUNDS))  # one on each
        return [caption for _, caption in drawn[self.pictures :]][:4]


@dataclass(frozen=True)
class Row:
    """Some samples of one prompt: by the base (step 0) or by what was learned up to a step."""

    step: int
    draw: int  # of start noise: 0 or one of REFERENCE_DRAWS
    prompt: str


@dataclass(frozen=True)
class Task:
    """A cell, there already or not. The base's is the same for every subject."""

    configuration: Configuration
    subject: int
    seed: int
    plan: Plan

    @property
    def base(self) -> "Task":
        """Return the base's cell of the same start noise."""
        return replace(self, configuration=CONFIGURATIONS[BASE], subject=0)

    @cached_property
    def rows(self) -> list[Row]:
        """Return what is sampled, in order."""
        if not self.configuration.method:
            named = [world.subject_caption(background) for background in world.BACKGROUNDS]
            rows = [Row(0, 0, text) for text in (*named, *CLASS_PROMPTS, *OTHER_PROMPTS)]
            others = ((d, text) for d in REFERENCE_DRAWS for text in CLASS_PROMPTS + OTHER_PROMPTS)
            return rows + [Row(0, draw, text) for draw, text in others]
        named = self.plan.subject_prompts(self.subject)
        on_the_way = [Row(step, 0, text) for step in self.plan.trajectory for text in named]
        everything = (*named, *CLASS_PROMPTS, *OTHER_PROMPTS)
        return on_the_way + [Row(self.plan.steps, 0, text) for text in everything]

    @cached_property
    def key(self) -> str:
        """Return the hash of all that decides what is in the cell."""
        text = json.dumps([FORMAT, *self.spec().values()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def spec(self) -> dict[str, Any]:
        """Return what decides what is in the cell."""
        how = {
            "method": self.configuration.method,
            "settings": dict(self.configuration.settings),
            "version": self.configuration.version,
        }
        plan = asdict(self.plan)
        rows = [list(asdict(row).values()) for row in self.rows]
        if not self.configuration.method:
            sampling = {name: plan[name] for name in ("samples", "sampler_steps")}
            return how | {"seed": self.seed, "plan": sampling, "rows": rows}
        return how | {"subject": self.subject, "seed": self.seed, "plan": plan, "rows": rows}

    def noise_seed(self, row: Row) -> int:
        """Return the seed that a row's start noise is drawn from."""
        return self.seed + 1000 * row.draw

    def load(self, cache: Path) -> "Cell | None":
        """Return the cell when it is there."""
        folder = cache / self.key
        if not (folder / "cell.json").is_file():
            return None
        kept = json.loads((folder / "cell.json").read_text())
        page = torch.from_numpy(np.array(Image.open(folder / "samples.png"))).float() / 255
        squares = page.unflatten(0, (-1, SIDE)).unflatten(2, (-1, SIDE)).transpose(1, 2)
        history = [json.loads(line) for line in (folder / "history.jsonl").open()]
        samples = dict(zip(self.rows, squares, strict=True))
        return Cell(samples, kept["facts"], history, kept["code"])

    def make(self, worker: Worker, cache: Path) -> "Cell":
        """Return the cell, computed on a server if it is not there."""
        found = self.load(cache)
        if found is not None:
            return found
        temporary = cache / f"{self.key}.part"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        facts = train(worker, self, temporary)
        page = sample(worker.comfy, self)
        Image.fromarray(page).save(temporary / "samples.png")
        kept = {"facts": facts, "code": code_hash(BASE_FILE), "spec": self.spec()}
        (temporary / "cell.json").write_text(json.dumps(kept, indent=1) + "\n")
        temporary.rename(cache / self.key)
        made = self.load(cache)
        assert made is not None
        return made


@dataclass(frozen=True)
class Cell:
    """What a training left."""

    samples: dict[Row, Tensor]  # (N, H, W, 3) in [0, 1] each
    facts: dict[str, float | None]
    history: list[dict[str, float]]
    code: str  # hash of what made it

    def pictures(self, step: int, prompts: Iterable[str], draws: Iterable[int] = (0,)) -> Tensor:
        """Return the samples of some prompts, one prompt after the other."""
        rows = [Row(step, draw, prompt) for draw in draws for prompt in prompts]
        return torch.cat([self.samples[row] for row in rows])


def train(worker: Worker, task: Task, folder: Path) -> dict[str, float | None]:
    """Train once; keep the history in `folder` and return what was measured."""
    (folder / "history.jsonl").touch()
    if not task.configuration.method:
        return {}
    comfy, server = worker.comfy, worker.server
    known = comfy.object_info()
    meter = Meter(server.pid, TRAIN, wall=torch.cuda.is_available())
    comfy.run(fill_defaults(training(task, known), known), meter)
    run = server.output_dir / "personalized" / task.key
    shutil.copyfile(run / "history.jsonl", folder / "history.jsonl")
    last = dict[str, float]()
    for line in (folder / "history.jsonl").open():
        last |= json.loads(line)
    return {
        "parameters": learned_numbers(run / "last.safetensors"),
        "file_size": (run / "last.safetensors").stat().st_size,
        "steps_per_second": meter.steps_per_second(),
        **{name: value for name, value in last.items() if name != "step"},
    }


def memory_file(task: Task, cache: Path) -> Path:
    """Return where a configuration's peak memory is kept: it is the same for every subject."""
    return cache / "memory" / f"{replace(few_steps(task), subject=0, seed=0).key}.json"


def few_steps(task: Task) -> Task:
    """Return a cell's training as its memory is measured.

    Nothing is held out: pictures as small as these are asked about in greater batches at the end.
    """
    return replace(task, plan=replace(task.plan, steps=MEMORY_STEPS, trajectory=(), held_out=0))


def measure_memory(task: Task, cache: Path) -> None:
    """Keep the peak memory of a short training, in bytes above that with the base loaded.

    It is the resident memory of a server of its own: in one that has trained before, a peak hides
    in what that kept. Nothing is measured where the system does not tell.
    """
    kept = memory_file(task, cache)
    with workers(1) as (worker,):
        known, pid = worker.comfy.object_info(), worker.server.pid
        worker.comfy.run(fill_defaults(ready(), known))
        before = reset_peak_memory(pid)
        worker.comfy.run(fill_defaults(training(few_steps(task), known), known))
        if before is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps({"peak_memory": peak_memory(pid) - before}))


def ready() -> Graph:
    """Return a prompt that samples the base once."""
    graph = Graph()
    base = graph.add("PersonalizeDemoBase")
    graph.pictures(base, (base, 0), "a totem", graph.empty_latent(SIDE, 1), steps=1)
    return graph


def training(task: Task, known: dict[str, Any]) -> Graph:
    """Return the prompt that trains."""
    graph, plan = Graph(), task.plan
    base = graph.add("PersonalizeDemoBase")
    count = plan.pictures + plan.held_out
    drawn = graph.add("PersonalizeDemoSubject", subject=task.subject, count=count, resolution=SIDE)
    wires = {"clip": (base, 1), "vae": (base, 2), "images": (drawn, 0), "captions": (drawn, 1)}
    how = {"resolution": SIDE, "hold_out": plan.held_out, "instance_prompt": "a zib totem"}
    data = graph.add("PersonalizeDataset", **wires, **how)
    inputs: dict[str, Any] = {"model": (base, 0), "data": (data, 0), "name": task.key}
    inputs |= {"steps": plan.steps, "batch_size": plan.batch_size, "seed": task.seed}
    inputs |= {"save_every": plan.trajectory[0] if plan.trajectory else 0}
    inputs |= dict(task.configuration.settings)
    graph.add(training_node(task.configuration.method, known), TRAIN, **inputs)
    return graph


def sample(comfy: Comfy, task: Task) -> np.ndarray:
    """Sample every row: (rows * SIDE, samples * SIDE, 3) uint8."""
    known = comfy.object_info()
    graph = Graph()
    base = graph.add("PersonalizeDemoBase")
    latent = graph.empty_latent(SIDE, task.plan.samples)
    models = {0: (base, 0)}
    for step in dict.fromkeys(row.step for row in task.rows if row.step):
        checkpoint = "last" if step == task.plan.steps else f"step {step}"
        load = {"model": (base, 0), "run": task.key, "checkpoint": checkpoint}
        models[step] = (graph.add("PersonalizeLoad", **load, strength=1.0), 0)
    how = {"sampler_name": "dpmpp_2m", "steps": task.plan.sampler_steps}
    saved = [
        graph.pictures(base, models[row.step], row.prompt, latent, seed=task.noise_seed(row), **how)
        for row in task.rows
    ]
    result = comfy.run(fill_defaults(graph, known))
    rows = [[np.asarray(image) for image in images(comfy, result, node)] for node in saved]
    return np.concatenate([np.concatenate(row, 1) for row in rows])


def images(comfy: Comfy, result: Result, node: str) -> list[Image.Image]:
    """Return the pictures that a node saved."""
    return [comfy.image(file).convert("RGB") for file in result.files(node)]


def drawn(subject: int, count: int, split: str = "training") -> Tensor:
    """Draw pictures of a subject, (count, SIDE, SIDE, 3) in [0, 1]."""
    pictures = world.subject_pictures(subject, count, split, SIDE)
    return torch.from_numpy(np.stack([pixels for pixels, _ in pictures])).float() / 255


def learned_numbers(path: Path) -> int:
    """Count the learned numbers in a file."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if not name.endswith(".alpha")]  # noqa: SIM118
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)
