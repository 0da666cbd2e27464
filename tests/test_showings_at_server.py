"""Photographs of many shapes, with masks, mirrored, in several words, two subjects: on the stock
path, through a real server.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from headless import Comfy, ComfyServer, Graph, PromptFailed, fill_defaults
from tests import stock
from tests.waiting import PATIENCE

pytestmark = pytest.mark.server
FOLDER, MASKS, WIDE = "subject", "subject masks", "wide"


@pytest.fixture(scope="module")
def known(server: ComfyServer, comfy: Comfy) -> dict:
    """The nodes of a server with a checkpoint, photographs, and their masks."""
    stock.write_checkpoints(server.base / "models" / "checkpoints")
    stock.write_photographs(server.input_dir / FOLDER)
    for name in (MASKS, WIDE):
        (server.input_dir / name).mkdir(exist_ok=True)
    for picture in sorted((server.input_dir / FOLDER).glob("*.[jpw][pne]*")):
        mask = Image.new("L", (100, 80))  # of no picture's size
        ImageDraw.Draw(mask).ellipse((20, 10, 80, 70), fill=255)
        mask.save(server.input_dir / MASKS / f"{picture.stem}.png")
    for number in range(2):
        wide = stock.photograph("coffee").resize((220 + 20 * number, 120))
        wide.save(server.input_dir / WIDE / f"{number}.png")
        (server.input_dir / WIDE / f"{number}.txt").write_text(f"zwx cup number {number}")
    return comfy.object_info()


@dataclass
class Trained:
    """What a run left behind, and what the nodes said."""

    facts: dict
    lines: list[dict]
    report: str
    samples: list[Path]


@pytest.fixture(scope="module")
def trained(server: ComfyServer, comfy: Comfy, known: dict) -> Trained:
    """Three steps of a LoRA, watched by a monitor, on all of it, and a stock sampler after it."""
    graph = Graph()
    base = stock.load_checkpoint(graph)
    folder = graph.add("PersonalizeImageFolder", folder=FOLDER)
    painted = graph.add("PersonalizeImageFolder", folder=MASKS)
    masks = graph.add("ImageToMask", image=(painted, 0), channel="red")
    how = {"resolution": 128, "fit": "buckets", "flip": True}
    cat = stock.dataset(
        graph,
        base,
        (folder, 0),
        captions=(folder, 1),
        masks=(masks, 0),
        instance_prompt="a photo of sks cat",
        unmasked_weight=0.1,
        caption_templates="a photo of {}\n{}, a picture",
        **how,
    )
    pairs = graph.add("LoadImageTextDataSetFromFolder", folder=WIDE)
    how["instance_prompt"] = "a photo of zwx cup"
    cup = stock.dataset(graph, base, (pairs, 0), captions=(pairs, 1), **how)
    both = graph.add("PersonalizeJoinSubjects", **{"data.data0": (cat, 0), "data.data1": (cup, 0)})
    monitor = graph.add(
        "PersonalizeMonitor",
        clip=(base, 1),
        vae=(base, 2),
        prompts="a photo of sks cat\nzwx cup",
        every=1,
        leave_one_out=True,
        sample_steps=1,
        sample_count=1,
        sample_every=10,
    )
    how = {"name": "all at once", "batch_size": 2, "monitor": (monitor, 0)}
    node = stock.train(graph, "LoRA", (base, 0), (both, 0), **how)
    stock.sample(graph, base, (node, 0))
    result = comfy.run(fill_defaults(graph, known), timeout=PATIENCE)
    run = server.output_dir / "personalized" / "all at once"
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    facts = json.loads((run / "run.json").read_text())
    return Trained(facts, lines, result.texts(both)[0], sorted((run / "samples").iterdir()))


def test_all_of_it_trains_and_the_run_says_on_what(trained):
    assert trained.facts["dataset"] == {
        "sizes": ["128x128", "160x96", "192x96"],
        "masks": 4,
        "mirrored pictures": 6,
        "wordings": 8,
        "subjects": ["a photo of sks cat", "a photo of zwx cup"],
        "turns": True,
    }
    losses = [line["loss"] for line in trained.lines if "loss" in line]
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and len(set(losses)) == 3
    assert trained.lines[-1]["reason"] == "finished"
    assert trained.report.startswith("2 subjects:\n'a photo of sks cat': 4 pictures\n")


def test_the_monitor_measures_pictures_of_all_sizes_and_samples_both_subjects(trained):
    evaluations = [line for line in trained.lines if line.get("evaluation")]
    assert len(evaluations) == 4
    for line in evaluations:
        assert math.isfinite(line["train"]) and math.isfinite(line["held_out"])
    assert [path.name for path in trained.samples if path.name.startswith("000003")] == [
        "000003-0.png",
        "000003-1.png",
    ]
    assert Image.open(trained.samples[0]).size in [(160, 96), (192, 96)]
    assert -1 <= evaluations[0]["nearest"] <= 1


def test_a_batch_of_masks_from_stock_nodes_goes_with_a_batch_of_pictures(comfy, known):
    """Load Image's own mask is black when nothing was painted; that is said, with the picture."""
    graph = Graph()
    base = stock.load_checkpoint(graph)
    loaded = graph.add("LoadImage", image=f"{WIDE}/0.png")
    data = stock.dataset(graph, base, (loaded, 0), masks=(loaded, 1))
    node = stock.train(graph, "LoRA", (base, 0), (data, 0), name="nothing painted")
    with pytest.raises(PromptFailed, match="mask 1 is black wherever its picture is shown"):
        comfy.run(fill_defaults(graph, known), timeout=PATIENCE)
    solid = graph.add("SolidMask", value=1.0, width=64, height=64)
    graph[data]["inputs"]["masks"] = [solid, 0]
    assert comfy.run(fill_defaults(graph, known), timeout=PATIENCE).texts(node)


def test_stock_dataset_nodes_go_before_ours(comfy, known):
    """Load Image (from Folder), Shuffle Images List, Adjust Contrast."""
    graph = Graph()
    base = stock.load_checkpoint(graph)
    pictures = graph.add("LoadImageDataSetFromFolder", folder=FOLDER)
    shuffled = graph.add("ShuffleDataset", images=(pictures, 0), seed=3)
    bright = graph.add("AdjustContrast", images=(shuffled, 0), factor=1.1)
    data = stock.dataset(graph, base, (bright, 0), resolution=128, fit="buckets", hold_out=1)
    node = stock.train(graph, "LoRA", (base, 0), (data, 0), name="stock nodes")
    assert "3 steps" in comfy.run(fill_defaults(graph, known), timeout=PATIENCE).texts(node)[0]


def test_a_training_on_plain_pictures_asks_for_no_new_input(known):
    """Prompts that were saved before these inputs came still run."""
    inputs = known["PersonalizeDataset"]["input"]
    new = {"masks", "unmasked_weight", "flip", "caption_templates"}
    assert new <= inputs["optional"].keys() and not new & inputs["required"].keys()
