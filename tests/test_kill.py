"""Killed at any moment (kill -9), a run goes on in a new process, to the very same end.

Also two servers on one output folder. Each test starts servers of its own.
"""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from headless import Comfy, ComfyServer, Graph, PromptFailed, fill_defaults
from personalize.trainers.artifact import Personalization
from personalize.trainers.methods import METHODS
from personalize.trainers.run import Run
from tests.sessions import CLOCK
from tests.waiting import PAGE_PATIENCE, PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.server]
STEPS = 24
SIDE = 64  # pixels


def graph(name: str, method: str = "APT", **settings) -> Graph:
    """Return a graph that trains with everything on that keeps something; training comes last."""
    made = Graph()
    base = made.add("PersonalizeDemoBase")
    drawn = made.add("PersonalizeDemoSubject", count=4, resolution=SIDE)
    wires = {"clip": (base, 1), "vae": (base, 2), "images": (drawn, 0), "captions": (drawn, 1)}
    how = {"resolution": SIDE, "hold_out": 2, "instance_prompt": "a zib totem"}
    data = made.add("PersonalizeDataset", **how, **wires)
    watch = {"every": 4, "early_stop": False, "prompts": "a zib totem", "sample_steps": 2}
    monitor = made.add("PersonalizeMonitor", clip=(base, 1), vae=(base, 2), **watch)
    inputs: dict[str, Any] = {"steps": STEPS, "ema_decay": 0.9, "schedule": "cosine", **settings}
    wires = {"model": (base, 0), "data": (data, 0), "monitor": (monitor, 0)}
    made.add(f"PersonalizeTrain{method}", name=name, **wires, **inputs)
    return made


@contextmanager
def serving(base: Path, *flags: str) -> Iterator[tuple[ComfyServer, Comfy]]:
    """Start a server over a folder that outlives it."""
    with (
        ComfyServer(base, cpu=True, env={"OMP_NUM_THREADS": "1"}, flags=flags) as server,
        Comfy(server.url, timeout=PATIENCE) as comfy,
    ):
        yield server, comfy


def run(comfy: Comfy, prompt: Graph) -> str:
    """Train; return what the training node says."""
    return comfy.run(fill_defaults(prompt, comfy.object_info())).texts(str(len(prompt)))[0]


def outcome(folder: Path) -> tuple:
    """All that shall be the same in runs that are the same."""
    found = Run(folder)
    lines = [{k: v for k, v in line.items() if k not in CLOCK} for line in found.history()]
    tensors = {
        name: {key: value.numpy().tobytes() for key, value in found.load(name).tensors.items()}
        for name in found.checkpoints()
    }
    pictures = {p.name: p.read_bytes() for p in sorted(folder.glob("samples/*"))}
    return lines, tensors, pictures


def killed(base: Path, prompt: Graph, after: float) -> int | None:
    """Kill a server some seconds after a training has shown its first step.

    Return the step that its history ends at, or None when the run was done before that.
    """
    folder = base / "output" / "personalized" / prompt[str(len(prompt))]["inputs"]["name"]
    history = folder / "history.jsonl"
    begun = history.stat().st_mtime if history.is_file() else 0.0
    with suppress(ConnectionError, ProcessLookupError), serving(base) as (server, comfy):
        prompt_id = comfy.queue(fill_defaults(prompt, comfy.object_info()))

        def done() -> bool:
            return prompt_id in comfy.get(f"/history/{prompt_id}")

        while not done() and not changed_since(history, begun):
            time.sleep(0.02)
        time.sleep(after)
        if done():  # or the one before was killed between its last line and its answer
            return None
        os.kill(server.pid, signal.SIGKILL)
        return Run(folder).history()[-1].get("step", 0)
    return 0


def changed_since(path: Path, time_of_change: float) -> bool:
    """Tell whether a file is there and newer."""
    return path.is_file() and path.stat().st_mtime > time_of_change


def check_whole(folder: Path) -> None:
    """Every checkpoint there is can be loaded, whatever happened to its process."""
    for name in Run(folder).checkpoints():
        Run(folder).load(name)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("killed")


def campaign(base: Path, faults: int, seed: int, method: str) -> dict[str, int]:
    """Kill one run so often, at random moments; return what came of it.

    lost: runs that did not come to the end of the undisturbed one, bit for bit.
    """
    chance, told = random.Random(seed), {"faults": 0, "survived": 0, "lost": 0, "steps": 0}
    root = base / "output" / "personalized"
    shutil.rmtree(root, ignore_errors=True)
    with serving(base) as (_, comfy):
        begun = time.monotonic()
        run(comfy, graph("whole", method))
        whole, lasts = outcome(root / "whole"), time.monotonic() - begun
    number = 0
    while told["faults"] < faults:
        number += 1
        name = f"killed {chr(96 + number)}"
        while told["faults"] < faults:
            ended = killed(base, graph(name, method), chance.uniform(0, 0.6 * lasts))
            if ended is None:
                break
            told["faults"] += 1
            check_whole(root / name)
            told["steps"] += ended
        with serving(base) as (_, comfy):
            run(comfy, graph(name, method))
        folder = max(root.glob(f"{name}*"), key=lambda f: f.stat().st_mtime)
        same = outcome(folder) == whole
        told["survived" if same else "lost"] += 1
    return told


def test_a_run_that_is_killed_goes_on_in_a_new_process_to_the_same_end(base):
    told = campaign(base, faults=1, seed=1, method="APT")
    print("killed servers:", told)
    assert told["lost"] == 0 and told["survived"] >= 1


@pytest.mark.stress
@pytest.mark.parametrize("method", [method.__name__ for method in METHODS.values()])
def test_a_campaign_of_kills(base, method, record_property):
    told = campaign(base, faults=10, seed=2, method=method)
    record_property("kills", told)
    print(method, "killed servers:", told)
    assert told["lost"] == 0


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Iterator[tuple[Path, tuple[Comfy, Comfy]]]:
    """Two servers that write to one folder; where their runs are."""
    root = tmp_path_factory.mktemp("pair")
    flags = ("--output-directory", str(root))
    with serving(root / "a", *flags) as (_, one), serving(root / "b", *flags) as (_, two):
        yield root / "personalized", (one, two)


def test_two_servers_on_one_folder_take_two_runs_and_corrupt_none(pair):
    """Both are asked for the same at the same time."""
    root, servers = pair
    with ThreadPoolExecutor(2) as both:
        said = list(both.map(lambda comfy: run(comfy, graph("same", "LoRA", steps=100)), servers))
    folders = sorted(root.glob("same*"))
    assert [folder.name for folder in folders] == ["same", "same 2"]
    assert outcome(folders[0]) == outcome(folders[1])
    assert sum("'same 2'" in text for text in said) == 1


def test_what_one_process_finished_another_hands_on(pair):
    root, (one, two) = pair
    run(one, graph("handed on", "LoRA", steps=12))
    files = {p: p.stat().st_mtime_ns for p in (root / "handed on").rglob("*.*") if p.stem}
    said = run(two, graph("handed on", "LoRA", steps=12))
    assert "run 'handed on' finished before, and nothing changed since" in said
    assert {p: p.stat().st_mtime_ns for p in files} == files
    assert len(list(root.glob("handed on*"))) == 1


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + PAGE_PATIENCE
    while not path.is_file():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def test_a_run_that_goes_on_is_not_taken_by_a_second_server(pair):
    """The first is in the middle of it; the second may neither resume nor write it."""
    root, (one, two) = pair
    first, second = root / "shared", root / "shared 2"
    long = graph("shared", "LoRA", steps=400)
    prompt_id = one.queue(fill_defaults(long, one.object_info()))
    wait_for_file(first / "state.safetensors")
    queued = two.queue(fill_defaults(long, two.object_info()))
    wait_for_file(second / "history.jsonl")
    for comfy, prompt in ((two, queued), (one, prompt_id)):
        comfy.interrupt(prompt)
        with pytest.raises(PromptFailed, match=r"(?i)interrupt"):
            comfy.wait(prompt, timeout=PATIENCE)
    for folder in (first, second):
        lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if "learning_rate" in line]
        assert steps == list(range(1, len(steps) + 1)) and lines[-1]["reason"] == "interrupted"
        assert Personalization.load(folder / "last.safetensors").header.step == steps[-1]
