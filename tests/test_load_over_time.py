"""A server that trains all day, and many who watch: memory stays flat, steps stay fast."""

import concurrent.futures
import json
import statistics
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from headless import Comfy, ComfyServer, Graph, fill_defaults

pytestmark = pytest.mark.server
METHODS = ("LoRA", "PaRa", "BNN", "A3FT", "SelectiveZO", "APT")  # taken in turns
CLIENTS = 20
FLAT = 1.02


@pytest.fixture(scope="module")
def alone() -> Iterator[ComfyServer]:
    """A server of its own: other tests' work is no part of its memory."""
    with ComfyServer(cpu=True, env={"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}) as server:
        yield server


@pytest.fixture(scope="module")
def client(alone: ComfyServer) -> Iterator[Comfy]:
    with Comfy(alone.url, timeout=600) as comfy:
        yield comfy


def training(method: str, name: str, monitored: bool = False, **settings) -> Graph:
    """Return a graph that trains the demo base on two small pictures."""
    graph = Graph()
    base = graph.add("PersonalizeDemoBase")
    drawn = graph.add("PersonalizeDemoSubject", count=3, resolution=64)
    wires = {"clip": (base, 1), "vae": (base, 2), "images": (drawn, 0), "captions": (drawn, 1)}
    data = graph.add("PersonalizeDataset", resolution=64, hold_out=1, **wires)
    inputs = {"name": name, "model": (base, 0), "data": (data, 0), **settings}
    if monitored:
        inputs["monitor"] = (graph.add("PersonalizeMonitor", every=1, early_stop=False), 0)
    graph.add(f"PersonalizeTrain{method}", **inputs)
    return graph


def resident(server: ComfyServer) -> float:
    """Return the megabytes that a server holds in memory."""
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def train_often(server: ComfyServer, comfy: Comfy, count: int, warm: int) -> list[float]:
    """Train `count` short runs, every one another; return the memory after each from `warm` on."""
    known, held = comfy.object_info(), []
    for number in range(count):
        method = METHODS[number % len(METHODS)]
        graph = training(method, f"run {number}", number % 2 == 0, steps=2, seed=number)
        comfy.run(fill_defaults(graph, known))
        comfy.messages.clear()
        held.append(resident(server))
    folder = server.output_dir / "personalized"
    assert len([run for run in folder.iterdir() if (run / "last.safetensors").is_file()]) >= count
    return held[warm:]


def growth(held: list[float]) -> float:
    """Return the memory of the last third over that of the first: medians, one rarely cleans up."""
    third = len(held) // 3
    return statistics.median(held[-third:]) / statistics.median(held[:third])


def test_twenty_runs_in_one_server_leave_no_memory_behind(alone, client):
    """A network is 40 MB here and more than 2 %: one that is kept each run would be seen."""
    held = train_often(alone, client, 24, warm=6)
    assert growth(held) < 1.05, held


@pytest.mark.stress
def test_two_hundred_runs_in_one_server_leave_its_memory_flat(alone, client):
    held = train_often(alone, client, 200, warm=30)
    print(
        f"\n200 runs: {held[0]:.0f} MB after 30, {held[-1]:.0f} MB at the end, {growth(held):.4f}"
    )
    print([round(value) for value in held[::10]])
    assert growth(held) < FLAT, held


class Watchers:
    """Clients that ask for all that the page asks for, as often as it does."""

    def __init__(self, url: str, run: str, count: int):
        self.url, self.run, self.count = url, run, count
        self.answers, self.stopping = 0, threading.Event()
        self.pool = concurrent.futures.ThreadPoolExecutor(count)

    def __enter__(self) -> "Watchers":
        self.tasks = [self.pool.submit(self.watch) for _ in range(self.count)]
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for task in self.tasks:
            task.result()

    def watch(self) -> None:
        start = 0
        while not self.stopping.wait(1.0):  # as the page does at most; it mostly listens
            self.get("/personalize/runs")
            answer = json.loads(self.get(f"/personalize/runs/{self.run}/history?from={start}"))
            start, self.answers = answer["next"], self.answers + 1

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as reply:
            return reply.read()


@pytest.mark.stress
def test_twenty_clients_that_watch_cost_less_than_a_hundredth_of_a_step(alone, client):
    """Steps with and without watchers in turns, in one run: both meet the same machine."""
    known, turns, pause = client.object_info(), 24, 4.0
    graph = training("LoRA", "watched", steps=100_000)
    ident = client.queue(fill_defaults(graph, known))
    history = alone.output_dir / "personalized" / "watched" / "history.jsonl"
    while not (history.is_file() and history.read_text().count("\n") > 10):
        time.sleep(0.1)

    def steps_in(seconds: float) -> float:
        first, since = history.read_bytes().count(b"\n"), time.monotonic()
        time.sleep(seconds)
        return (history.read_bytes().count(b"\n") - first) / (time.monotonic() - since)

    alone_rates, watched_rates, answers = [], [], 0
    for turn in range(turns):
        if turn % 2:
            with Watchers(alone.url, "watched", CLIENTS) as watchers:
                watched_rates.append(steps_in(pause))
            answers += watchers.answers
        else:
            alone_rates.append(steps_in(pause))
    client.interrupt()
    ratios = [watched / quiet for quiet, watched in zip(alone_rates, watched_rates, strict=True)]
    cost = 1 - statistics.median(ratios)
    quiet = statistics.median(alone_rates)
    print(f"\n{CLIENTS} clients, {answers} answers: {quiet:.1f} steps/s alone, cost {cost:.2%}")
    assert ident and answers > CLIENTS * turns and cost < 0.01, ratios
