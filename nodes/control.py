"""What the page may ask of a training that goes on, and what the training tells the page."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from server import PromptServer

from ..trainers.run import without_nan

EVENT = "personalize.run"
PAUSE = 0.5  # seconds between two step lines that the page is told
MOST_SHOWN = 1000  # nodes whose newest run is remembered


@dataclass(frozen=True)
class Shown:
    """Where a run belongs: the node that trains it, in the workflow with that id."""

    run: str
    node: str  # as ComfyUI executes it: "12", or "7:12" inside the subgraph node 7
    workflow: str | None  # None for a prompt that no page queued


@dataclass
class Control:
    """One running training: the page's wishes come in, lines of its history go out.

    The routes call from the server's thread, the training loop from its own.
    """

    shown: Shown
    _stopping: bool = False
    _pins: list[int | None] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _told: float = 0.0  # time.monotonic() of the last step line

    @property
    def stopping(self) -> bool:
        """Tell whether the training shall end after this step, and the graph go on."""
        return self._stopping

    def stop(self) -> None:
        """Ask the training to end, keeping the best checkpoint and the last."""
        self._stopping = True

    def pin(self, step: int | None) -> None:
        """Ask to keep the checkpoint of `step` for good; None for the next step."""
        with self._lock:
            self._pins.append(step)

    def take_pins(self) -> list[int | None]:
        """Return the steps to keep, asked for since the last call."""
        with self._lock:
            pins, self._pins = self._pins, []
        return pins

    def tell(self, line: Mapping[str, Any]) -> None:
        """Send the page a line of the history; of step lines, two a second."""
        now = time.monotonic()
        if "evaluation" not in line and "end" not in line:
            if now - self._told < PAUSE:
                return
            self._told = now
        shown = self.shown
        detail = {"run": shown.run, "node": shown.node, "workflow": shown.workflow}
        PromptServer.instance.send_sync(EVENT, {**detail, "line": without_nan(dict(line))})


_running: dict[str, Control] = {}  # by run
_latest: dict[tuple[str | None, str], Shown] = {}  # by workflow and node, since the server started


@contextmanager
def running(run: str, node: str, workflow: str | None = None) -> Iterator[Control]:
    """Let the page reach a training, while the block lasts."""
    shown = Shown(run, node, workflow)
    control = Control(shown)
    try:
        _running[run] = control
        _latest.pop((workflow, node), None)  # the newest is last
        _latest[workflow, node] = shown
        while len(_latest) > MOST_SHOWN:
            _latest.pop(next(iter(_latest)))
        yield control
    finally:
        _running.pop(run, None)


def of_run(run: str) -> Control | None:
    """Return the control of a run that goes on, or None."""
    return _running.get(run)


def latest() -> list[Shown]:
    """Return each node's newest run since the server started."""
    return list(_latest.values())
