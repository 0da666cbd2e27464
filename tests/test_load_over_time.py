"""A server that trains all day, and many who watch: memory stays flat, steps stay fast."""

import concurrent.futures
import http.client
import json
import os
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from headless import Comfy, ComfyServer, Graph, fill_defaults
from personalize.trainers.methods import METHODS

pytestmark = pytest.mark.server
TURNS = [method.__name__ for method in METHODS.values()]
CLIENTS, ROUNDS, SECONDS = 20, 6, 20.0
FLAT = 1.02
SETTLED = 3.0  # seconds in which memory falls no more
MALLOC = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "65536"}


@pytest.fixture(scope="module")
def alone() -> Iterator[ComfyServer]:
    """A server of its own, that gives back at once what it frees: all it has is held by something.

    Otherwise malloc keeps up to 90 MB of holes, or none, as it happens.
    """
    with ComfyServer(cpu=True, env={"OMP_NUM_THREADS": "1", **MALLOC}) as server:
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
    """Return the megabytes of memory that a server has allocated: no pages of files."""
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def freed(server: ComfyServer, comfy: Comfy) -> float:
    """Return the megabytes that stay once ComfyUI has unloaded its models and dropped its cache.

    It is asked again and again: what comes while it ends a prompt, it sees at the next asking.
    """
    lowest, since, begun = resident(server), time.monotonic(), time.monotonic()
    while time.monotonic() < min(since + SETTLED, begun + 10 * SETTLED):
        comfy.post("/free", {"unload_models": True, "free_memory": True})
        time.sleep(0.5)
        if resident(server) < lowest:
            lowest, since = resident(server), time.monotonic()
    return lowest


def train_often(server: ComfyServer, comfy: Comfy, rounds: int) -> list[float]:
    """Train short runs, every one another, a round has each method; return what stays after each.

    The first round is left out: libraries are loaded in it.
    """
    known, held = comfy.object_info(), []
    for number in range(rounds * len(TURNS)):
        method = TURNS[number % len(TURNS)]
        graph = training(method, f"run {number}", number % 2 == 0, steps=2, seed=number)
        comfy.run(fill_defaults(graph, known))
        comfy.messages.clear()
        if (number + 1) % len(TURNS) == 0:
            held.append(freed(server, comfy))
    folder = server.output_dir / "personalized"
    trained = [run for run in folder.iterdir() if (run / "last.safetensors").is_file()]
    assert len(trained) >= rounds * len(TURNS)
    return held[1:]


def growth(held: list[float]) -> float:
    """Return the memory after the last third of the rounds over that after the first."""
    third = len(held) // 3
    return statistics.median(held[-third:]) / statistics.median(held[:third])


def test_some_thirty_runs_in_one_server_leave_no_memory_behind(alone, client):
    """Two rounds lie between: a network kept in each of them is 80 MB of 690, a twelfth."""
    held = train_often(alone, client, rounds=4)
    assert growth(held) < 1.05, held


@pytest.mark.stress
def test_two_hundred_runs_in_one_server_leave_its_memory_flat(alone, client):
    held = train_often(alone, client, rounds=25)
    print(f"\n200 runs: {held[0]:.0f} MB to {held[-1]:.0f} MB at the end, {growth(held):.4f}")
    print([round(value) for value in held])
    assert growth(held) < FLAT, held


class Watchers:
    """Clients that ask for a run's new lines once a second, each over its own connection."""

    def __init__(self, url: str, run: str, start: int, count: int):
        self.address = url.removeprefix("http://")
        self.run, self.start = run, start
        self.answers, self.stopping = 0, threading.Event()
        self.pool = concurrent.futures.ThreadPoolExecutor(count)
        self.tasks = [self.pool.submit(self.watch) for _ in range(count)]

    def end(self) -> int:
        """Stop asking; return how many answers there were."""
        self.stopping.set()
        for task in self.tasks:
            task.result()
        return self.answers

    def watch(self) -> None:
        start, connection = self.start, http.client.HTTPConnection(self.address, timeout=60)
        while not self.stopping.wait(1.0):
            connection.request("GET", f"/personalize/runs/{self.run}/history?from={start}")
            start, self.answers = json.load(connection.getresponse())["next"], self.answers + 1
        connection.close()


def answering(server: ComfyServer) -> float:
    """Return the seconds of CPU that a server's first thread has used: it answers, none trains."""
    stat = Path(f"/proc/{server.pid}/task/{server.pid}/stat").read_text()
    fields = stat.rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.stress
def test_twenty_clients_that_watch_cost_less_than_a_hundredth_of_a_step(alone, client):
    """What answering takes is the most that a step can lose to it, when they share a core."""
    graph = training("LoRA", "watched", steps=100_000)
    client.queue(fill_defaults(graph, client.object_info()))
    history = alone.output_dir / "personalized" / "watched" / "history.jsonl"
    while not (history.is_file() and history.read_bytes().count(b"\n") > 20):
        time.sleep(0.1)

    def share() -> float:
        before, since = answering(alone), time.monotonic()
        time.sleep(SECONDS)
        return (answering(alone) - before) / (time.monotonic() - since)

    first, costs, answers = history.read_bytes().count(b"\n"), [], 0
    for _ in range(ROUNDS):
        quiet = share()
        watchers = Watchers(alone.url, "watched", history.stat().st_size, CLIENTS)
        costs.append(share() - quiet)
        answers += watchers.end()
    client.interrupt()
    steps, cost = history.read_bytes().count(b"\n") - first, statistics.mean(costs)
    each = ", ".join(f"{c:.2%}" for c in costs)
    print(
        f"\n{CLIENTS} clients, {answers} answers, {steps} steps: {cost:.2%} of their time ({each})"
    )
    assert steps > 10 * ROUNDS and answers > ROUNDS * CLIENTS * SECONDS / 2 and cost < 0.01
