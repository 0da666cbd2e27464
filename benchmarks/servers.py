"""Several ComfyUI servers that share out work, and what a piece of work took of one."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

from headless import Comfy, ComfyServer, Progress

T, R = TypeVar("T"), TypeVar("R")
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Worker:
    """A server and its client."""

    server: ComfyServer
    comfy: Comfy


@contextmanager
def workers(count: int) -> Iterator[list[Worker]]:
    """Start servers of one thread each: small networks gain nothing from more."""
    with ExitStack() as stack:
        started = [stack.enter_context(ComfyServer(env=ENVIRONMENT)) for _ in range(count)]
        yield [
            Worker(server, stack.enter_context(Comfy(server.url, timeout=14_400)))
            for server in started
        ]


def share_out(
    workers: Sequence[Worker], work: Callable[[Worker, T], R], tasks: Iterable[T]
) -> Iterator[R]:
    """Yield the result of every task as it is done; each worker does one at a time.

    The first error ends it: tasks that have not begun are dropped.
    """
    free: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def one(task: T) -> R:
        worker = free.get()
        try:
            return work(worker, task)
        finally:
            free.put(worker)

    pool = ThreadPoolExecutor(len(workers))
    try:
        for future in as_completed([pool.submit(one, task) for task in tasks]):
            yield future.result()
    finally:  # does not wait: what still runs fails when its server is stopped
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class Meter:
    """Measure a training from outside: call it with every Progress.

    Speed is steps per second of processor time where /proc tells (a busy machine does not slow it
    down; on a GPU, which waits in other ways, use `wall=True`), else of the clock.
    """

    pid: int
    title: str  # of the training node
    wall: bool = False
    marks: list[tuple[float, float]] = field(default_factory=list)  # (step, seconds)

    def __call__(self, progress: Progress) -> None:
        """Note when a step was done."""
        if progress.title == self.title and progress.value >= 1:
            self.marks.append((progress.value, self._now()))

    def steps_per_second(self) -> float | None:
        """Return the speed between the first and the last step that was seen."""
        if len(self.marks) < 2:
            return None
        (first, start), (last, end) = self.marks[0], self.marks[-1]
        return (last - first) / (end - start) if end > start else None

    def _now(self) -> float:
        seconds = None if self.wall else processor_seconds(self.pid)
        return time.monotonic() if seconds is None else seconds


def processor_seconds(pid: int) -> float | None:
    """Return the processor time a process has used; None where there is no /proc."""
    stat = Path(f"/proc/{pid}/schedstat")
    if not stat.exists():
        return None
    nanoseconds = (int(p.read_text().split()[0]) for p in stat.parent.glob("task/*/schedstat"))
    return sum(nanoseconds) / 1e9


def reset_peak_memory(pid: int) -> int | None:
    """Start a new peak; return the resident memory now, in bytes. None where Linux is not."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except OSError:
        return None
    return _status(pid, "VmRSS")


def peak_memory(pid: int) -> int:
    """Return the highest resident memory since `reset_peak_memory`, in bytes."""
    return _status(pid, "VmHWM")


def _status(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))
