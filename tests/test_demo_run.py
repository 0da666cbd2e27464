"""What `make demo` does around the workflow: prompts, options, the grid."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from demo.report import BASE, HELD_OUT, PERSONALIZED, TRAINING, Picture, grid, plot_loss
from demo.run import PROMPTS, WORKFLOW, adjusted, behind, role_of
from headless import OverrideError
from tests.waiting import PATIENCE

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def workflow():
    return json.loads(WORKFLOW.read_text())


def options(**changed):
    return Namespace(**{"method": None, "steps": None, "subject": None} | changed)


def test_the_workflow_says_which_pictures_are_which(workflow):
    roles = {role_of(node) for node in workflow.values()} - {None}
    assert roles == {TRAINING, HELD_OUT, BASE, PERSONALIZED}


def test_every_prompt_is_asked_of_both_models_with_the_same_seed(workflow):
    prompt = adjusted(workflow, options(), {})
    asked = {BASE: [], PERSONALIZED: []}
    for id, node in prompt.items():
        if role_of(node) in asked:
            sampler = prompt[prompt[node["inputs"]["images"][0]]["inputs"]["samples"][0]]["inputs"]
            asked[role_of(node)].append(
                (prompt[behind(prompt, id)]["inputs"]["text"], sampler["seed"])
            )
    assert asked[BASE] == asked[PERSONALIZED] and len(asked[BASE]) == len(PROMPTS)
    links = [v[0] for node in prompt.values() for v in node["inputs"].values() if type(v) is list]
    assert set(links) <= prompt.keys()


def test_another_method_starts_from_its_own_defaults(workflow, comfy):
    known = comfy.object_info()
    prompt = adjusted(workflow, options(method="para", steps=7, subject=5), known)
    (train,) = [n for n in prompt.values() if n["class_type"].startswith("PersonalizeTrain")]
    assert train["class_type"] == "PersonalizeTrainPaRa" and train["inputs"]["steps"] == 7
    assert train["inputs"].keys() == known["PersonalizeTrainPaRa"]["input"]["required"].keys()
    subjects = [n for n in prompt.values() if n["class_type"] == "PersonalizeDemoSubject"]
    assert {node["inputs"]["subject"] for node in subjects} == {5}


def test_an_unknown_method_is_answered_with_the_known_ones(workflow):
    known = {"PersonalizeTrainLoRA": {}, "PersonalizeTrainPaRa": {}}
    with pytest.raises(OverrideError, match="there are: lora, para"):
        adjusted(workflow, options(method="dora"), known)


def test_the_grid_has_a_column_per_prompt():
    def pictures(*prompts):
        return [Picture(Image.new("RGB", (8, 8)), prompt) for prompt in prompts]

    made = pictures("a", "a", "b")
    narrow = grid({TRAINING: pictures("", ""), BASE: made, PERSONALIZED: made}, "LoRA")
    made = pictures("a", "b", "c")
    wide = grid({TRAINING: pictures("", ""), BASE: made, PERSONALIZED: made}, "LoRA")
    assert wide.height == narrow.height and wide.width > narrow.width


@pytest.mark.parametrize("count", [1, 5, 100])
def test_the_loss_is_drawn_however_short_the_run(tmp_path, count):
    history = [{"step": step + 1, "loss": 1 / (step + 1)} for step in range(count)]
    plot_loss(history, "LoRA", tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").width > 500


# The whole of it


class Demo:
    """`python -m demo.run`, and every process that it starts."""

    def __init__(self, *arguments: str):
        self.mark = f"PERSONALIZE_TEST={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "demo.run", *arguments],
            cwd=ROOT,
            env={**os.environ, name: value, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # in the background of a shell, Ctrl-C would be ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def others(self) -> list[int]:
        """Return the processes with our mark, the demo itself left out."""
        return [
            int(folder.name)
            for folder in Path("/proc").glob("[0-9]*")
            if folder.name != str(self.process.pid) and self.mark in environment(folder)
        ]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pid in self.others():
            os.kill(pid, signal.SIGKILL)


def environment(folder: Path) -> list[str]:
    try:
        return (folder / "environ").read_text(errors="replace").split("\0")
    except OSError:
        return []


@pytest.fixture
def demo():
    """Start demos; whatever they leave is killed."""
    started: list[Demo] = []

    def start(*arguments: str) -> Demo:
        started.append(Demo(*arguments))
        return started[-1]

    yield start
    for one in started:
        one.end()


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@needs_proc
@pytest.mark.slow
@pytest.mark.server
def test_the_demo_leaves_pictures_a_curve_a_personalisation_and_a_summary(demo, tmp_path):
    running = demo("--steps", "2", "--output", str(tmp_path))
    printed, said = running.process.communicate(timeout=PATIENCE)
    assert running.process.returncode == 0, said
    assert not running.others()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert json.loads(printed) == summary
    assert summary["method"] == "LoRA" and summary["steps"] == 2 and summary["seconds"] > 0
    for figure in ("subject_similarity", "prompt_following"):
        assert {"base", "personalized"} <= summary[figure].keys()
        assert all(isinstance(value, float) for value in summary[figure].values())
    pictures, curve, learned = summary["files"]
    assert Image.open(tmp_path / pictures).width > 6 * 128
    assert Image.open(tmp_path / curve).width > 500
    with safe_open(tmp_path / learned, framework="pt") as file:
        assert len(list(file.keys())) > 0
    assert {path.name for path in tmp_path.iterdir()} == {*summary["files"], "summary.json"}


@needs_proc
@pytest.mark.slow
@pytest.mark.server
def test_ctrl_c_during_the_demo_ends_everything(demo, tmp_path):
    running = demo("--output", str(tmp_path))
    watchdog = threading.Timer(600, running.process.kill)
    watchdog.start()
    try:
        progress = next((line for line in running.process.stderr if "%" in line), None)
        assert progress, "the demo ended before its prompt began"
        assert running.others()
        running.process.send_signal(signal.SIGINT)
        _, said = running.process.communicate(timeout=PATIENCE)
    finally:
        watchdog.cancel()
    assert running.process.returncode == 130 and "demo: interrupted" in said
    assert all_gone(running)
    assert not list(tmp_path.iterdir())


def all_gone(demo: Demo, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while demo.others() and time.monotonic() < deadline:
        time.sleep(0.1)
    return not demo.others()
