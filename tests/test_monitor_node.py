"""The monitor in ComfyUI: what it measures, keeps and hands on, and that it changes nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from headless import Graph, PromptFailed, fill_defaults
from tests.tiny import same

pytestmark = pytest.mark.server
SIDE = 64  # pixels


def watched(name: str, steps: int = 8, monitor: dict[str, Any] | None = None, **train) -> Graph:
    """Return a graph that trains the demo base on two of four pictures; training comes last.

    monitor: its inputs; None: no monitor.
    """
    graph = Graph()
    base = graph.add("PersonalizeDemoBase")
    drawn = graph.add("PersonalizeDemoSubject", count=4, resolution=SIDE)
    wires = {"clip": (base, 1), "vae": (base, 2), "images": (drawn, 0), "captions": (drawn, 1)}
    how = {"resolution": SIDE, "hold_out": train.pop("hold_out", 2)}
    data = graph.add("PersonalizeDataset", **how, instance_prompt="a zib totem", **wires)
    inputs: dict[str, Any] = {"name": name, "steps": steps, **train}
    if monitor is not None:
        known = {"clip": (base, 1), "vae": (base, 2), "cfg": 4.0, "sample_steps": 2}
        inputs["monitor"] = (graph.add("PersonalizeMonitor", **known | monitor), 0)
    graph.add("PersonalizeTrainLoRA", model=(base, 0), data=(data, 0), **inputs)
    return graph


@pytest.fixture
def run(comfy):
    return lambda graph, **how: comfy.run(fill_defaults(graph, comfy.object_info()), **how)


def folder_of(server, name: str) -> Path:
    return server.output_dir / "personalized" / name


def history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [line for line in history(folder) if line.get("evaluation")]


def checkpoints(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.safetensors")}


EVERYTHING = {
    "every": 2,
    "early_stop": False,
    "prompts": "a zib totem at night\na small red star",
    "prior_prompts": "a totem in a meadow",
    "sampler_name": "euler_ancestral",  # draws noise while it samples
    "sample_every": 2,
}


@pytest.fixture(scope="module")
def everything(comfy, server) -> Path:
    """A run of eight steps with all that a monitor can do."""
    graph = watched("everything", monitor=EVERYTHING)
    comfy.run(fill_defaults(graph, comfy.object_info()))
    return folder_of(server, "everything")


def test_a_run_learns_the_very_same_with_a_monitor_and_without(server, run, everything):
    from personalize.trainers.artifact import Personalization

    run(watched("unwatched"))
    files = [everything, folder_of(server, "unwatched")]
    tensors = [Personalization.load(folder / "last.safetensors").tensors for folder in files]
    assert same(*tensors)
    steps = [[line["loss"] for line in history(folder) if "loss" in line] for folder in files]
    assert steps[0] == steps[1] and len(steps[0]) == 8


@pytest.mark.parametrize(
    "rate, verdict", [(1e-3, "it generalises"), (0.03, "it over-fits: train less")]
)
def test_without_a_monitor_what_is_held_out_is_measured_once_at_the_end(server, run, rate, verdict):
    graph = watched(f"no monitor {rate}", learning_rate=rate)
    summary = run(graph).texts(str(len(graph)))[0]
    line = history(folder_of(server, f"no monitor {rate}"))[-1]
    base, tuned = line["held_out_loss_of_base"], line["held_out_loss"]
    said = f"On the pictures held out: loss {tuned:.4f}, the base's {base:.4f}: {verdict}"
    assert said in summary
    assert {"train_loss", "train_loss_of_base", "corruption"} <= line.keys()


def test_the_history_holds_what_the_page_draws(everything):
    lines = evaluations(everything)
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8]
    for line in lines:
        assert line["total_steps"] == 8 and line["seconds"] >= line["evaluation_seconds"] > 0
        for split in ("train", "held_out", "prior"):
            assert line[split] == pytest.approx(sum(line[f"{split}_bins"]) / 10)
            assert line[f"{split}_of_base"] == lines[0][split]
        assert len(line["gamma"]) == 10 and all(0 <= value <= 1 for value in line["gamma"])
        assert line["gap"] == (line["held_out"] - line["train"]) / line["train_of_base"]
        assert line["prior_drift"] == line["prior"] / line["prior_of_base"] - 1
        assert line["verdict"] in ("learning", "over-fitting", "plateau")
    assert lines[0]["corruption"] == 1.0 and lines[0]["best_step"] is None
    assert lines[0]["train_bins_of_base"] == lines[0]["train_bins"]
    end = history(everything)[-1]
    assert end.pop("needed_memory") > 30e6  # the base alone has 36 MB
    assert end == {"end": True, "step": 8, "reason": "finished", "best_step": end["best_step"]}
    assert end["best_step"] == min(lines[1:], key=lambda line: line["held_out"])["step"]


def test_samples_are_saved_at_their_turn_and_at_the_end(everything):
    lines = {line["step"]: line for line in evaluations(everything)}
    for step in (0, 4, 8):
        names = [f"samples/{step:06d}-{i}.png" for i in range(4)]
        assert lines[step]["samples"] == names
        assert all(Image.open(everything / name).size == (SIDE, SIDE) for name in names)
        assert -1 <= lines[step]["nearest"] <= 1 and 0 <= lines[step]["diversity"] <= 2
        of_base = energy(everything, lines[0]["samples"])
        assert lines[step]["grain"] == pytest.approx(energy(everything, names) / of_base, rel=0.02)
    assert lines[2]["samples"] == lines[6]["samples"] == []
    assert lines[2]["nearest"] is lines[2]["diversity"] is lines[2]["grain"] is None
    assert lines[0]["grain"] == 1.0 != lines[8]["grain"]


def energy(folder: Path, names: list[str]) -> float:
    """Return the mean square of what 3x3 means leave of pictures, border and all."""
    pictures = np.stack([np.asarray(Image.open(folder / name)) / 255 for name in names])
    around = np.pad(pictures, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(around, (3, 3), (1, 2))
    return float(np.square(pictures - windows.mean((-2, -1))).mean())


def test_the_samples_are_those_of_a_stock_ksampler(comfy, run, everything):
    graph = Graph()
    base = graph.add("PersonalizeDemoBase")
    how = {"model": (base, 0), "run": "everything", "checkpoint": "last", "strength": 1.0}
    model = graph.add("PersonalizeLoad", **how)
    latent = graph.empty_latent(SIDE, 2)
    sampler = {"steps": 2, "cfg": 4.0, "sampler_name": "euler_ancestral", "seed": 0}
    saved = graph.pictures(base, (model, 0), "a zib totem at night", latent, **sampler)
    for number, file in enumerate(run(graph).files(saved)):
        ours = Image.open(everything / f"samples/000008-{number}.png")
        assert comfy.image(file).convert("RGB").tobytes() == ours.tobytes()


@pytest.fixture(scope="module")
def diverging(comfy, server) -> tuple[Path, str]:
    """A run that soon is worse on the held-out pictures, stopped and restored; its summary."""
    monitor = {"every": 1, "patience": 3, "keep": 2}
    graph = watched("diverging", steps=40, monitor=monitor, learning_rate=0.03, save_every=5)
    result = comfy.run(fill_defaults(graph, comfy.object_info()))
    return folder_of(server, "diverging"), result.texts(str(len(graph)))[0]


def test_a_run_stops_when_patience_is_used_up(diverging):
    folder, _ = diverging
    lines, end = evaluations(folder), history(folder)[-1]
    best = min(lines[1:], key=lambda line: line["held_out"])["step"]
    assert end["reason"] == "stopped early" and end["best_step"] == best
    assert end["step"] == best + 3 < 40
    assert [line["patience_left"] for line in lines[-4:]] == [3, 2, 1, 0]


def test_the_best_the_last_and_what_was_asked_for_stay_on_disk(diverging):
    folder, _ = diverging
    lines, end = evaluations(folder), history(folder)[-1]
    ranked = sorted(lines[1:], key=lambda line: line["held_out"])
    wanted = {line["step"] for line in ranked[:2]} | set(range(5, end["step"] + 1, 5))
    assert checkpoints(folder) == {"best", "last"} | {f"checkpoint-{n:06d}" for n in wanted}


def test_the_node_hands_on_the_best_and_says_so(diverging, comfy, run):
    from personalize.trainers.artifact import Personalization

    folder, summary = diverging
    best = history(folder)[-1]["best_step"]
    assert f"What comes out is step {best}" in summary and "best at" in summary
    assert Personalization.load(folder / "best.safetensors").header.step == best
    again = watched("handed on", steps=40, monitor={"every": 1, "patience": 3}, learning_rate=0.03)
    base, trainer = "1", str(len(again))
    applied = again.add("PersonalizeApply", model=(base, 0), personalized=(trainer, 1))
    load = {"model": (base, 0), "run": "diverging", "checkpoint": "best"}
    loaded = again.add("PersonalizeLoad", **load)
    pictures = [
        again.pictures(base, (model, 0), "a zib totem", again.empty_latent(SIDE, 1), steps=2)
        for model in (trainer, applied, loaded)
    ]
    result = run(again)
    drawn = [comfy.image(result.files(node)[0]).tobytes() for node in pictures]
    assert drawn[0] == drawn[1] == drawn[2]


def test_without_restore_the_last_comes_out(server, run):
    monitor = {"every": 1, "patience": 3, "restore_best": False}
    graph = watched("not restored", steps=40, monitor=monitor, learning_rate=0.03)
    trainer = str(len(graph))
    summary = run(graph).texts(trainer)[0]
    assert "What comes out" not in summary
    assert (folder_of(server, "not restored") / "best.safetensors").is_file()


def test_one_picture_can_be_left_out_to_measure_on(server, run):
    monitor = {"every": 1, "leave_one_out": True}
    run(watched("left out", steps=2, monitor=monitor, hold_out=0))
    lines = evaluations(folder_of(server, "left out"))
    assert all(line["held_out"] > 0 for line in lines)


def test_with_nothing_held_out_the_last_is_kept_and_the_reason_said(server, run):
    graph = watched("nothing held out", steps=3, monitor={"every": 1}, hold_out=0)
    summary = run(graph).texts(str(len(graph)))[0]
    assert "nothing was held out to measure on" in summary
    assert checkpoints(folder_of(server, "nothing held out")) == {"last"}


def test_pictures_to_measure_on_can_be_connected(server, run):
    graph = watched("connected", steps=2, monitor={"every": 1}, hold_out=0)
    more = graph.add("PersonalizeDemoSubject", count=2, split="held-out", resolution=100)
    graph[str(len(graph) - 2)]["inputs"] |= {"held_out": [more, 0], "held_out_caption": "a zib"}
    run(graph)
    assert all(line["held_out"] > 0 for line in evaluations(folder_of(server, "connected")))


@pytest.mark.parametrize(
    "monitor, problem",
    [
        ({"prompts": "a zib totem", "clip": None}, "'clip' is not connected"),
        ({"prompts": "a zib totem", "vae": None}, "'vae' is not connected"),
        ({"prior_prompts": "a totem", "clip": None}, "'clip' is not connected"),
    ],
)
def test_what_is_not_connected_is_named(run, monitor, problem):
    graph = watched("refused", monitor=monitor)
    for node in graph.values():
        node["inputs"] = {k: v for k, v in node["inputs"].items() if v is not None}
    with pytest.raises(PromptFailed, match=f"Personalize Monitor: {problem}"):
        run(graph)


def test_a_cancelled_run_says_so_and_keeps_its_best(server, comfy, run):
    def cancel(progress):
        if "Train" in progress.title and progress.value >= 3:
            comfy.interrupt()

    graph = watched("cut short", steps=2000, monitor={"every": 1})
    with pytest.raises(PromptFailed, match=r"(?i)interrupt"):
        run(graph, on_progress=cancel)
    folder = folder_of(server, "cut short")
    assert history(folder)[-1]["reason"] == "interrupted"
    assert {"best", "last"} <= checkpoints(folder)


def test_stop_and_keep_ends_the_training_and_the_graph_goes_on(server, comfy, run):
    wishes = ["stop", "pin"]

    def ask(progress):
        if "Train" in progress.title and progress.value >= 3 and wishes:
            comfy.post(f"/personalize/runs/by hand/{wishes.pop()}", {})

    graph = watched("by hand", steps=10_000, monitor={"every": 5_000})
    summary = run(graph, on_progress=ask).texts(str(len(graph)))[0]
    folder = folder_of(server, "by hand")
    end = history(folder)[-1]
    assert end["reason"] == "stopped by hand" and 3 < end["step"] < 5_000
    assert evaluations(folder)[-1]["step"] == end["step"] == end["best_step"]
    (pinned,) = json.loads((folder / "pinned.json").read_text())
    assert 3 < pinned <= end["step"]
    names = {f"checkpoint-{pinned:06d}", f"checkpoint-{end['step']:06d}"}
    assert checkpoints(folder) == {"best", "last"} | names
    assert f"{end['step']} steps" in summary


def test_the_page_is_sent_the_lines_of_the_history(server, comfy, everything):
    events = [e for e in comfy.events("personalize.run") if e["run"] == "everything"]
    lines = [e["line"] for e in events]
    assert [line for line in lines if line.get("evaluation")] == evaluations(everything)
    assert lines[-1] == history(everything)[-1]
    assert {e["node"] for e in events} == {"5"}


def test_every_kind_of_training_takes_a_monitor(object_info):
    training = [id for id in object_info if id.startswith("PersonalizeTrain")]
    assert len(training) > 5
    for id in training:
        assert object_info[id]["input"]["optional"]["monitor"][0] == "PERSONALIZE_MONITOR"
