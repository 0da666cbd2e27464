"""A training as ComfyUI runs it: cancelled, saved on the way, and repeated."""

import json

import pytest

from headless import Graph, PromptFailed, fill_defaults

pytestmark = pytest.mark.server


def training(name: str, **settings) -> Graph:
    """Return a graph that trains the demo base on two drawn pictures; the node is the last."""
    graph = Graph()
    base = graph.add("PersonalizeDemoBase")
    drawn = graph.add("PersonalizeDemoSubject", count=2, resolution=64)
    wires = {"clip": (base, 1), "vae": (base, 2), "images": (drawn, 0), "captions": (drawn, 1)}
    data = graph.add("PersonalizeDataset", resolution=64, **wires)
    inputs = {"name": name, "model": (base, 0), "data": (data, 0), **settings}
    graph.add("PersonalizeTrainLoRA", **inputs)
    return graph


@pytest.fixture
def run(comfy):
    return lambda graph, **how: comfy.run(fill_defaults(graph, comfy.object_info()), **how)


def test_a_cancelled_training_keeps_what_it_learned_and_the_server_goes_on(server, comfy, run):
    from personalize.trainers.artifact import Personalization

    def cancel_after_three_steps(progress):
        if "Train" in progress.title and progress.value >= 3:
            comfy.interrupt()

    with pytest.raises(PromptFailed, match=r"(?i)interrupt"):
        run(training("cancelled", steps=2000), on_progress=cancel_after_three_steps)
    folder = server.output_dir / "personalized" / "cancelled"
    kept = Personalization.load(folder / "last.safetensors")
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert 3 <= kept.header.step == history[-1]["step"] < 2000
    assert not list(folder.glob("*.tmp"))  # no half-written file
    run(training("after the cancelled one", steps=1))


def test_checkpoints_on_the_way_are_kept_listed_and_loadable(server, comfy, run):
    result = run(training("on the way", steps=5, save_every=2))
    folder = server.output_dir / "personalized" / "on the way"
    names = {path.name for path in folder.iterdir()}
    files = {"checkpoint-000002.safetensors", "checkpoint-000004.safetensors", "last.safetensors"}
    assert names == {".lock", "run.json", "history.jsonl", *files}
    assert "5 steps" in result.texts("4")[0] and "'on the way'" in result.texts("4")[0]

    inputs = comfy.object_info()["PersonalizeLoad"]["input"]["required"]
    assert "on the way" in str(inputs["run"]) and "step 4" in str(inputs["checkpoint"])
    graph = Graph()
    base = graph.add("PersonalizeDemoBase")
    wires = {"model": (base, 0), "run": "on the way", "checkpoint": "step 2", "strength": 1.0}
    loaded = graph.add("PersonalizeLoad", **wires)
    shown = graph.add("PreviewAny", source=(loaded, 1))
    assert "after 2 steps: all 56 layers matched" in run(graph).texts(shown)[0]


def test_the_same_graph_twice_trains_once_and_a_new_seed_trains_again(server, run):
    root = server.output_dir / "personalized"
    for seed, runs in ((0, 1), (0, 1), (1, 2)):
        run(training("twice", steps=2, seed=seed))
        assert len([f for f in root.iterdir() if f.name.startswith("twice")]) == runs


def test_the_same_seed_gives_the_same_file_in_another_run(server, run):
    from personalize.trainers.artifact import Personalization

    run(training("one", steps=3, seed=7))
    run(training("two", steps=3, seed=7))
    files = [
        Personalization.load(server.output_dir / "personalized" / name / "last.safetensors")
        for name in ("one", "two")
    ]
    assert files[0].tensors.keys() == files[1].tensors.keys()
    assert all((files[1].tensors[k] == v).all() for k, v in files[0].tensors.items())
