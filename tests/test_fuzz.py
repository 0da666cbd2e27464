"""Thousands of damaged checkpoints: each is loaded, or refused in one sentence. Nothing else."""

import json
import random
import resource
import signal
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import folder_paths
import pytest
import torch
from aiohttp import web
from server import PromptServer

from personalize.nodes import load
from personalize.trainers.artifact import Personalization
from personalize.trainers.edits import of_weights
from personalize.trainers.errors import InputError
from personalize.trainers.loop import train
from personalize.trainers.methods import METHODS
from personalize.trainers.resume import find
from personalize.trainers.run import Run
from personalize.trainers.state import State
from personalize.trainers.time_aware import SITE
from tests import mutations
from tests.mutations import DAMAGES, STATE_DAMAGES
from tests.test_load import train_on
from tests.tiny import comfy_model, make, tiny_data, tiny_denoiser

QUICK, WHOLE = 560, 14_000  # files
QUICK_RUNS, ALL_RUNS = 40, 3_000  # folders
SECONDS = 20  # that one file may take
MEMORY = 300  # MB that all of them may add to the process


@pytest.fixture(scope="module")
def base():
    return comfy_model()


@pytest.fixture(scope="module")
def good(base, tmp_path_factory) -> dict[str, bytes]:
    """A small good file of every method, trained for a step: the smallest layers of each."""
    folder = tmp_path_factory.mktemp("good")
    files = {}
    for name, method in METHODS.items():
        learned, _ = train_on(base, method, steps=1)
        path = folder / f"{name}.safetensors"
        smallest(learned, base).save(path)
        files[name] = path.read_bytes()
    return files


def smallest(learned: Personalization, base, layers: int = 6) -> Personalization:
    """Keep the edits of the layers with the fewest numbers, and every module that joins."""
    edits, _ = learned.edits(list(load.site_names(base)))
    sizes = {site: sum(t.numel() for t in edit.tensors().values()) for site, edit in edits.items()}
    kept = sorted(of_weights(edits), key=lambda site: sizes[site])[:layers]
    chosen = {site: edits[site] for site in (*kept, *({SITE} & edits.keys()))}
    return Personalization.of(learned.header, chosen, learned.header.step)


@contextmanager
def time_limit(seconds: int):
    """Fail instead of hanging."""

    def late(*_):
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(path: Path, base) -> str:
    """Load a file, put it on the base and compute its weights; return how it was refused."""
    try:
        learned = Personalization.load(path)
        patched, text = load.personalize(base, learned, 1.0)
        edits, _ = learned.edits(list(load.site_names(base)))
    except InputError as error:
        return str(error)
    assert len(text) < 3000
    weights = base.model.diffusion_model.state_dict()
    for site, edit in of_weights(edits).items():
        assert edit.apply(weights[load.site_names(base)[site]].detach()).isfinite().all(), site
    assert patched is not base
    return ""


def is_one_sentence(message: str, path: Path) -> bool:
    return len(message) < 1500 and message.isprintable() and str(path.parent) not in message


def assault(count: int, good: dict[str, bytes], base, folder: Path) -> Counter:
    """Try `count` damaged files, the same ones every time; return how they ended, by damage."""
    path, ended = folder / "fuzz.safetensors", Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(count):
        rng = random.Random(seed)
        method, damage = rng.choice(list(good)), DAMAGES[seed % len(DAMAGES)]
        path.write_bytes(damage(good[method], rng))
        with time_limit(SECONDS):
            try:
                refused = attempt(path, base)
            except Exception as error:
                raise AssertionError(f"file {seed}: {damage.__name__} of {method}") from error
        assert not refused or is_one_sentence(refused, path), (seed, refused)
        assert damage.__name__ != "newer" or "Update Personalize" in refused, (seed, refused)
        ended[damage.__name__, "refused" if refused else "loaded"] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEMORY, f"{grown:.0f} MB"
    return ended


def test_every_method_has_a_good_file(good, base, tmp_path):
    for name, file in good.items():
        (tmp_path / name).write_bytes(file)
        assert attempt(tmp_path / name, base) == "" and len(file) < 400_000


def test_damaged_files_are_loaded_or_refused(good, base, tmp_path):
    ended = assault(QUICK, good, base, tmp_path)
    assert ended.total() == QUICK
    for damage in ("cut", "header_length", "foreign", "newer"):
        assert not ended[damage, "loaded"]
    assert ended["flip_data", "loaded"] > 10  # a flipped bit in a number is mostly a number


@pytest.mark.stress
def test_more_than_ten_thousand_damaged_files_are_loaded_or_refused(good, base, tmp_path):
    ended = assault(WHOLE, good, base, tmp_path)
    print(f"\n{ended.total()} damaged files: {dict(sorted(ended.items()))}")


# States of runs that broke off


QUICK_STATES, ALL_STATES = 39, 2_600  # files
GOING_ON = {"steps": 4, "ema_decay": 0.9, "schedule": "cosine"}


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> dict[str, bytes]:
    """What it takes to go on after two steps; APT keeps something of its own."""
    path, files = tmp_path_factory.mktemp("states") / "state.safetensors", {}
    for name in ("lora", "apt"):
        running = train(make(METHODS[name], **GOING_ON), tiny_denoiser(), tiny_data())
        next(running)
        next(running).state().save(path)
        running.close()
        files[name] = path.read_bytes()
    return files


def go_on(path: Path, method: str) -> str:
    """Make a step from a state; return how it was refused."""
    try:
        chosen = make(METHODS[method], **GOING_ON)
        running = train(chosen, tiny_denoiser(), tiny_data(), State.load(path))
        next(running)
        next(running).state()
        running.close()
    except (InputError, FloatingPointError) as error:
        return str(error)
    return ""


def assault_on_states(count: int, states: dict[str, bytes], folder: Path) -> Counter:
    path, ended = folder / "state.safetensors", Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(count):
        rng = random.Random(seed)
        method, damage = rng.choice(list(states)), STATE_DAMAGES[seed % len(STATE_DAMAGES)]
        path.write_bytes(damage(states[method], rng))
        with time_limit(6 * SECONDS):
            try:
                refused = go_on(path, method)
            except Exception as error:
                raise AssertionError(f"state {seed}: {damage.__name__} of {method}") from error
        assert is_one_sentence(refused or "a", path), (seed, refused)
        ended[damage.__name__, "refused" if refused else "went on"] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEMORY, f"{grown:.0f} MB"
    return ended


def test_from_damaged_states_a_run_goes_on_or_is_refused(states, tmp_path):
    ended = assault_on_states(QUICK_STATES, states, tmp_path)
    assert ended["lying_state", "refused"] > ended["lying_state", "went on"]
    assert not ended["cut", "went on"] and ended["flip_data", "went on"]


@pytest.mark.stress
def test_from_thousands_of_damaged_states_a_run_goes_on_or_is_refused(states, tmp_path):
    ended = assault_on_states(ALL_STATES, states, tmp_path)
    print(f"\n{ended.total()} damaged states: {dict(sorted(ended.items()))}")


# Runs whose JSON lies


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    """A run of no content in ComfyUI's output folder."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    monkeypatch.setattr(PromptServer, "instance", Routes(), raising=False)
    folder = tmp_path / "output" / "personalized" / "a run"
    (folder / "samples").mkdir(parents=True)
    (folder / "last.safetensors").touch()
    return Run(folder)


class Routes:
    """What nodes/routes.py takes from the server at import."""

    routes = web.RouteTableDef()


def lie(run: Run, rng: random.Random) -> None:
    texts = {
        "run.json": mutations.lying_facts(rng),
        "history.jsonl": mutations.lying_history(rng),
        "pinned.json": rng.choice(("[1]", "", "[null]", "[1e999]", "3", '["a"]', "[" * 50_000)),
    }
    for name, text in texts.items():
        (run.folder / name).write_bytes(text.encode(errors="surrogatepass"))


def look_everywhere(run: Run) -> str:
    """Do all that reads a run's JSON; return the report's refusal, if it refuses."""
    from personalize.nodes import report, routes

    assert load.Load.define_schema() and report.Report.define_schema()
    assert all(type(step) is int for step in run.pinned())
    run.ended()
    found = find(run.folder.parent, run.name, mutations.FACTS, mutations.FACTS["settings"])
    assert len(found.why) <= 1000 and found.why.isprintable()
    if found.claim is not None:
        found.claim.release()
    lines, _ = routes._read_lines(run, 0)
    answer = {"lines": [json.loads(line) for line in lines], **routes._facts(run)}
    json.dumps(answer, allow_nan=False)
    try:
        image, verdict, best, metrics = report.Report.execute(run.name).args
    except ValueError as error:
        return str(error)
    assert image.shape == (1, 900, 1200, 3) and type(best) is int and json.loads(metrics)
    assert len(verdict) < 1000
    return ""


def assault_on_runs(count: int, run: Run) -> Counter:
    ended: Counter = Counter()
    for seed in range(count):
        lie(run, random.Random(seed))
        with time_limit(SECONDS):
            try:
                refused = look_everywhere(run)
            except Exception as error:
                raise AssertionError(f"run {seed}") from error
        assert refused.startswith("Personalize Report: ") or not refused
        assert is_one_sentence(refused or "a", run.folder), (seed, refused)
        ended["refused" if refused else "reported"] += 1
    return ended


def test_runs_whose_json_lies_are_listed_and_reported(run):
    assert assault_on_runs(QUICK_RUNS, run)["reported"] > QUICK_RUNS / 4


@pytest.mark.stress
def test_thousands_of_runs_whose_json_lies_are_listed_and_reported(run):
    print(f"\n{ALL_RUNS} lying runs: {dict(assault_on_runs(ALL_RUNS, run))}")


def test_the_harness_notices_what_it_looks_for(good, base, tmp_path, monkeypatch):
    def careless(path, input_name="checkpoint"):
        raise KeyError(path)

    monkeypatch.setattr(Personalization, "load", careless)
    with pytest.raises(AssertionError, match="file 0"):
        assault(1, good, base, tmp_path)
    with pytest.raises(AssertionError, match="took more"), time_limit(1):
        while True:
            torch.zeros(1)
