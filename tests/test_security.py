"""Names from workflows, files and requests stay inside their folders, and tell nothing of them."""

import contextlib
import dataclasses
import os
from pathlib import Path

import folder_paths
import pytest
from aiohttp import web
from PIL import Image
from server import PromptServer

from headless import Graph, PromptFailed, fill_defaults
from personalize.trainers.artifact import Header, Personalization
from personalize.trainers.run import Run
from tests.tiny import noise
from tests.waiting import awaited

HOSTILE = [
    *("..", ".", "", " ", "/", "\\", "../..", "../outside", "a run/../../../outside"),
    *("..\\outside", "a run\\..\\..\\outside", "C:", "C:\\Windows", "C:outside", "\\\\host\\share"),
    *(
        "//host/share",
        "file:///etc/passwd",
        "/etc/passwd",
        "~",
        "~root",
        "$HOME",
        "%2e%2e%2foutside",
    ),
    *(
        "NUL",
        "con",
        "aux.txt",
        "COM1",
        "lpt9.safetensors",
        "CONIN$",
        "a run:stream",
        "a run::$DATA",
    ),
    *(
        "a run\0",
        "a run\0.png",
        "a run\n",
        "\ra run",
        "a run ",
        "a run.",
        " a run",
        "-rf",
        ".hidden",
    ),
    *("\uff0e\uff0e\uff0foutside", "\u2025/outside", "..\u2215outside", "..\u2044outside"),
    *(
        "a\u0300 run",
        "\u0430 run",
        "a run\u200b",
        "\u202eevil",
        "\ud800",
        "linked/secret",
    ),
    *("<img src=x onerror=alert(1)>", "'; DROP TABLE runs; --", "x" * 81, "x" * 100_000),
]
TEXTS = {  # inputs that are shown or encoded, and name no file
    *("instance_prompt", "captions", "class_prompt", "prompts", "prior_prompts"),
    *("held_out_caption", "subject_name", "caption_templates"),
}
LISTED = {"run", "checkpoint", "folder", "base"}  # combos whose options are files
NAMES = {  # every input that names a file or a folder
    ("PersonalizeImageFolder", "folder"),
    ("PersonalizeReport", "run"),
    ("PersonalizeLoad", "run"),
    ("PersonalizeLoad", "checkpoint"),
    ("PersonalizeLoadUnconditional", "base"),
    ("PersonalizeLoadUnconditionalRun", "run"),
    ("PersonalizeLoadUnconditionalRun", "checkpoint"),
    ("PersonalizeExportLoRA", "filename_prefix"),
    *((f"PersonalizeTrain{method}", "name") for method in ("LoRA", "PaRa", "DreamBooth", "APT")),
    *((f"PersonalizeTrain{method}", "name") for method in ("Attention", "BNN", "A3FT")),
    *((f"PersonalizeTrain{method}", "name") for method in ("SelectiveZO", "Unconditional")),
}
LEARNED = Personalization(
    Header("lora", 1, {}, {}, "a zib totem", "", "0" * 16), {"lora_unet_conv_in.diff": noise(8)}
)


def nodes() -> dict:
    """All nodes of the pack by id."""
    from personalize.nodes.extension import PersonalizeExtension

    found = awaited(PersonalizeExtension().get_node_list())
    return {node.define_schema().node_id: node for node in found}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """ComfyUI's folders with a good file each, links that lead out, and secrets outside."""
    for kind in ("input", "output", "temp"):
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    root, models = tmp_path / "output" / "personalized", tmp_path / "models" / "diffusers"
    known = {**folder_paths.folder_names_and_paths, "diffusers": ([str(models)], set())}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(PromptServer, "instance", Served(), raising=False)
    outside = tmp_path / "outside"
    for folder in (outside, models, tmp_path / "input" / "a run", tmp_path / "output" / "loras"):
        folder.mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(folder / "secret.png")
    for folder in (root, models, tmp_path / "input", tmp_path / "output" / "loras"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "linked").symlink_to(outside)
    Run.create(root, "a run", LEARNED.header).save(LEARNED, "last")
    LEARNED.save(outside / "last.safetensors")
    (outside / "run.json").write_text("{}")
    (outside / "history.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    return tmp_path


class Served:
    """What nodes/routes.py takes from the server at import."""

    routes = web.RouteTableDef()


def give(node: type, name: str, value: str) -> None:
    """Run a node with a value for one input, as ComfyUI would after its own checks."""
    good = {"run": "a run", "checkpoint": "last", "strength": 1.0, "personalized": LEARNED}
    good |= {"model": None, "base": None, "data": None, "full_weights": "whole", "rank": 16}
    schema = node.define_schema()
    inputs = {i.id: good[i.id] for i in schema.inputs if i.id in good} | {name: value}
    if schema.node_id == "PersonalizeReport":
        inputs.pop("personalized")
    node.execute(**inputs)


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def test_every_input_that_may_name_a_file_is_attacked_here():
    found = set()
    for id, node in nodes().items():
        for given in node.define_schema().inputs:
            if given.io_type == "STRING" and given.id not in TEXTS:
                found.add((id, given.id))
            if given.io_type == "COMBO" and given.id in LISTED:
                found.add((id, given.id))
    assert found == NAMES


@pytest.mark.parametrize(
    "id, name", sorted(NAMES), ids=lambda part: part.removeprefix("Personalize")
)
def test_no_name_leaves_its_folder(place, id, name):
    node, before = nodes()[id], listing(place)
    reads = name in LISTED  # what is written gets a new name beside the link
    for value in (*HOSTILE, *(["linked"] if reads else [])):
        with pytest.raises(ValueError) as error:
            give(node, name, value)
        told = str(error.value)
        assert told.startswith(f"{node.define_schema().display_name}: '"), (value, told)
        assert told.isprintable() and len(told) < 1000, (value, told)
        assert str(place) not in told, (value, told)
        assert listing(place) == before, value


@pytest.mark.parametrize(
    "id, name", sorted(NAMES), ids=lambda part: part.removeprefix("Personalize")
)
def test_looking_for_changes_leaves_no_folder_either(place, id, name):
    """ComfyUI asks before it validates: any error is only a line of its log."""
    node, before = nodes()[id], listing(place)
    if "fingerprint_inputs" not in vars(node):
        return
    asked = {"run": "a run", "checkpoint": "last"} if name in ("run", "checkpoint") else {}
    asked = {key: value for key, value in asked.items() if id != "PersonalizeReport"}
    for value in (*HOSTILE, "linked"):
        with contextlib.suppress(ValueError, OSError):
            found = node.fingerprint_inputs(**{**asked, name: value})
            raise AssertionError(f"{value!r} was looked at: {found}")
        assert listing(place) == before


@pytest.mark.parametrize("value", HOSTILE)
def test_the_run_that_a_files_header_names_does_not_leave_its_folder(place, value):
    header = dataclasses.replace(LEARNED.header, run=value)
    with pytest.raises(ValueError, match=r"^Personalize Report: '(run|personalized)' ") as error:
        nodes()["PersonalizeReport"].execute(
            "(the connected one)", dataclasses.replace(LEARNED, header=header)
        )
    assert str(place) not in str(error.value) and str(error.value).isprintable()


def test_names_that_are_fine_are_not_refused(place):
    found = nodes()
    assert awaited(found["PersonalizeImageFolder"].validate_inputs("a run")) is True
    for id in ("PersonalizeLoad", "PersonalizeLoadUnconditionalRun", "PersonalizeReport"):
        assert found[id].validate_inputs("a run") is True
    with pytest.raises(ValueError, match="no steps in its history"):
        give(found["PersonalizeReport"], "run", "a run")


# Through a server


@pytest.mark.server
@pytest.mark.parametrize(
    "value", ["../../input", "/etc", "C:\\Windows", "nul", "a\0b", "\uff0e\uff0e"]
)
def test_a_hostile_workflow_is_refused_without_a_word_of_the_disk(server, comfy, value):
    graph = Graph()
    base = graph.add("PersonalizeDemoBase")
    wires = {"model": (base, 0), "checkpoint": "last", "strength": 1.0}
    graph.add("PersonalizeLoad", run=value, **wires)
    graph.add("PreviewImage", images=(graph.add("PersonalizeImageFolder", folder=value), 0))
    graph.add("PreviewAny", source=(graph.add("PersonalizeReport", run=value), 1))
    before = set(os.listdir(server.base))
    with pytest.raises(PromptFailed) as error:
        comfy.run(fill_defaults(graph, comfy.object_info()))
    assert str(server.base) not in str(error.value) and "Personal" in str(error.value)
    assert set(os.listdir(server.base)) == before
