"""What `make demo` does around the workflow: prompts, options, the grid."""

import json
from argparse import Namespace

import pytest
from PIL import Image

from demo.report import BASE, HELD_OUT, PERSONALIZED, TRAINING, Picture, grid, plot_loss
from demo.run import PROMPTS, WORKFLOW, adjusted, behind, role_of
from headless import OverrideError


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
