"""What happens beside a training: history, checkpoints, and what people are told."""

import time
from dataclasses import dataclass, field

import comfy.utils
from server import PromptServer

from ..trainers.artifact import Header, Personalization
from ..trainers.loop import Step
from ..trainers.run import LAST, Run
from ..trainers.settings import Settings
from .control import Control
from .evaluate import Evaluator, Line, saved

BY_HAND, EARLY, FINISHED = "stopped by hand", "stopped early", "finished"
INTERRUPTED, FAILED = "interrupted", "failed"
PREVIEW = 512  # pixels, the most a preview is wide


@dataclass
class Watch:
    """Follows a run: call `begin`, `after` every step, and `end` with the last."""

    run: Run
    header: Header
    settings: Settings
    control: Control
    progress: comfy.utils.ProgressBar
    evaluator: Evaluator | None = None
    losses: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    evaluating: float = 0.0  # seconds so far
    reason: str = FAILED  # why the run ended, until that is known

    def begin(self, evaluator: Evaluator | None) -> None:
        """Say how the base stands; `evaluator` where a monitor is connected."""
        self.evaluator = evaluator
        if evaluator is not None:
            self._evaluated(time.monotonic(), evaluator.of_base())

    def after(self, step: Step) -> bool:
        """Record a step, evaluate it when it is time; return whether to go on."""
        self.losses.append(step.loss)
        facts = {"loss": step.loss, "learning_rate": step.learning_rate, **step.facts}
        self._log({"step": step.index, **facts})
        self._save(step)
        over = FINISHED if step.index == self.settings.steps else ""
        over = over or (BY_HAND if self.control.stopping else "")
        if self.evaluator is not None and (over or self.evaluator.due(step.index)):
            self._evaluated(time.monotonic(), self.evaluator.evaluate(step, last=bool(over)))
            over = over or (EARLY if self.evaluator.done else "")
        self._show(step.index)
        self.reason = over or self.reason
        return not over

    def end(self, step: Step, facts: Line) -> Personalization:
        """Keep the last checkpoint and say how the run ended; return what was learned."""
        learned = Personalization.of(self.header, step.learned(), step.index)
        self.run.save(learned, LAST)
        best = self.evaluator.best if self.evaluator is not None else None
        ending = {"step": step.index, "reason": self.reason, "best_step": best}
        self._log({"end": True, **ending, **facts})
        return learned

    def _save(self, step: Step) -> None:
        """Write the checkpoint of a step that someone asked for."""
        pins = self.control.take_pins()
        if None in pins or saved(self.settings, step.index):
            learned = Personalization.of(self.header, step.learned(), step.index)
            self.run.save(learned, f"step {step.index}")
        there = self.run.checkpoints()
        for pin in (step.index if pin is None else pin for pin in pins):
            if f"step {pin}" in there:
                self.run.pin(pin)

    def _evaluated(self, since: float, line: Line) -> None:
        """Put an evaluation into the history. since: when it began."""
        now = time.monotonic()
        self.evaluating += now - since
        self._log(line | {"seconds": now - self.started, "evaluation_seconds": now - since})

    def _log(self, line: Line) -> None:
        self.run.log(**line)
        self.control.tell(line)

    def _show(self, step: int) -> None:
        """Move the progress bar, with the newest sample if there is one, and say where it is."""
        preview = None
        if self.evaluator is not None and self.evaluator.newest is not None:
            preview, self.evaluator.newest = ("JPEG", self.evaluator.newest, PREVIEW), None
        self.progress.update_absolute(step, self.settings.steps, preview)
        PromptServer.instance.send_progress_text(self._text(step), self.control.shown.node)

    def _text(self, step: int) -> str:
        total = self.settings.steps
        rate = max(1, step - 1) / max(1e-9, time.monotonic() - self.started)
        text = (
            f"step {step} of {total}, loss {self.recent_loss():.4f}, "
            f"{rate:.2f} steps/s, {(total - step) / rate:.0f} s left"
        )
        return text if self.evaluator is None else f"{text}\n{self.evaluator.verdict}"

    def recent_loss(self) -> float:
        """Return the mean loss of the last 50 steps."""
        recent = self.losses[-50:]
        return sum(recent) / len(recent)

    @property
    def share(self) -> float:
        """The evaluations' share of the time beyond training alone."""
        return self.evaluating / max(1e-9, time.monotonic() - self.started - self.evaluating)
