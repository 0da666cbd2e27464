"""What happens beside a training: history, checkpoints, and what people are told."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import comfy.utils
from server import PromptServer

from ..trainers.artifact import Header, Personalization
from ..trainers.health import explosion
from ..trainers.loop import Step
from ..trainers.monitor import is_number
from ..trainers.run import BY_HAND, EARLY, FAILED, FINISHED, LAST, Run
from ..trainers.settings import Settings
from .control import Control
from .evaluate import Evaluator, Line, learned_by, saved

PREVIEW = 512  # pixels, the most a preview is wide
STATE_EVERY = (
    30.0  # seconds, the most that a killed server may lose where states are quick to write
)
STATE_SHARE = 0.05  # of the time that writing states may take, else
RECENT = 200  # gradients that tell what is usual


@dataclass
class Watch:
    """Follows a run: call `begin`, `after` every step, and `end` with the last; or `rescue`."""

    run: Run
    header: Header
    settings: Settings
    control: Control
    progress: comfy.utils.ProgressBar
    said: str = ""  # about how the run came to be
    evaluator: Evaluator | None = None
    losses: list[float] = field(default_factory=list)  # of every step; NaN: it was left out
    norms: list[float] = field(default_factory=list)  # of their gradients
    started: float = field(default_factory=time.monotonic)  # less what it took before this process
    evaluating: float = 0.0  # seconds so far
    reason: str = FAILED  # why the run ended, until that is known
    exploded: str = ""  # what there is to say of it
    left_out: int = 0  # steps
    newest: Step | None = None
    first: int = 0  # steps that were made before this process
    began: float = field(default_factory=time.monotonic)
    kept_at: float = field(default_factory=time.monotonic)
    keeping: float = 0.0  # seconds that the last state took to write

    def begin(self, evaluator: Evaluator | None, lines: Sequence[Line] = ()) -> None:
        """Take up what the history has told already, or say how the base stands.

        evaluator: where a monitor is connected.
        """
        self.evaluator = evaluator
        steps = [line for line in lines if "learning_rate" in line]
        for line in steps:
            self._take_note(number(line, "loss"), number(line, "gradient_norm"), line)
        self.first = len(steps)
        measured = [line for line in lines if line.get("evaluation")]
        self.started -= max((number(line, "seconds", 0.0) for line in measured), default=0.0)
        self.evaluating = sum(number(line, "evaluation_seconds", 0.0) for line in measured)
        if evaluator is not None:
            evaluator.heed_pins = self._take_pins
            evaluator.take_up(measured)
            if not measured:
                self._evaluated(time.monotonic(), evaluator.of_base())

    def after(self, step: Step) -> bool:
        """Record a step, evaluate it when it is time; return whether to go on.

        What the history tells of the step already is not done again.
        """
        if step.index > len(self.losses):
            self._record(step)
        self._save(step)
        over = FINISHED if step.index == self.settings.steps else ""
        over = over or (BY_HAND if self.control.stopping else "")
        evaluates = self.evaluator is not None and not self.evaluator.knows(step.index)
        if evaluates and (over or self.evaluator.due(step.index)):
            self._evaluated(time.monotonic(), self.evaluator.evaluate(step, last=bool(over)))
        if self.evaluator is not None:
            over = over or (EARLY if self.evaluator.done else "")
        if not over and self._state_is_due(step.index):
            self._keep_state(step)
        self._show(step.index)
        self.reason = over or self.reason
        return not over

    def end(self, step: Step, facts: Line) -> Personalization:
        """Keep the last checkpoint and say how the run ended; return what was learned."""
        learned = learned_by(step, self.header)
        self.run.save(learned, LAST)
        self._take_pins()
        self._log_end(step, facts)
        self.run.sync()  # or a power cut could leave neither the state nor the end
        self.run.forget_state()
        if self.evaluator is not None:
            self.evaluator.finish()
        return learned

    def rescue(self, step: Step, reason: str) -> None:
        """Keep what there is of a run that breaks off after a step, as far as that can be done."""
        self.reason = reason
        keeps = (lambda: self._keep_state(step), self._take_pins, lambda: self._log_end(step))
        for keep in keeps:
            try:
                keep()
            except Exception as error:  # what the run broke off with is what people shall read
                logging.warning(f"Personalize: run '{self.run.name}' kept less: {error}")
        if self.run.state.is_file():
            self._say(f"{reason} after step {step.index}: queue again, and it goes on")

    def _record(self, step: Step) -> None:
        """Put what a step did into the history."""
        numbers = {"loss": step.loss, "gradient_norm": step.gradient_norm}
        line = {name: value for name, value in numbers.items() if math.isfinite(value)}
        line |= {"step": step.index, "learning_rate": step.learning_rate, **step.facts}
        times = explosion([*self.norms[-RECENT:], step.gradient_norm])
        if times is not None:
            line["gradient_exploded"] = times  # so many times the usual
        self._take_note(step.loss, step.gradient_norm, line)
        self._log(line)

    def _take_note(self, loss: float, norm: float, line: Line) -> None:
        """Remember what the history says of a step."""
        self.losses.append(loss)
        self.norms.append(norm)
        self.left_out += not math.isfinite(loss)
        if math.isfinite(times := number(line, "gradient_exploded")):
            step = line["step"]
            self.exploded = f"the gradient was {times:.0f} times as long as usual at {step}"

    def _log_end(self, step: Step, facts: Line | None = None) -> None:
        best = self.evaluator.best if self.evaluator is not None else None
        ending = {"step": step.index, "reason": self.reason, "best_step": best}
        self._log({"end": True, **ending, **(facts or {})})

    def _state_is_due(self, step: int) -> bool:
        """Tell whether to write the state: with what is kept anyway, and every so often."""
        since = time.monotonic() - self.kept_at
        kept = saved(self.settings, step)
        kept = kept or (self.evaluator is not None and self.evaluator.due(step))
        return since * STATE_SHARE >= self.keeping and (kept or since >= STATE_EVERY)

    def _keep_state(self, step: Step) -> None:
        """Write what it takes to go on after a step, and what is learned."""
        began = time.monotonic()
        self.run.sync()
        step.state().save(self.run.state)
        self.run.save(learned_by(step, self.header), LAST)
        if self.evaluator is not None:
            self.evaluator.settle()
        self.kept_at = time.monotonic()
        self.keeping = self.kept_at - began

    def _save(self, step: Step) -> None:
        """Write the checkpoint of a step that someone asked for, and pin what is to stay."""
        self.newest = step
        if saved(self.settings, step.index):
            self.run.save(learned_by(step, self.header), f"step {step.index}")
        self._take_pins()

    def _take_pins(self) -> None:
        """Pin what the page asked for since the last call: steps that are there, or the newest."""
        pins = self.control.take_pins()
        wanted = [pin for pin in pins if pin is not None]
        if None in pins and self.newest is not None:
            wanted.append(self.newest.index)
            self.run.save(learned_by(self.newest, self.header), f"step {self.newest.index}")
        there = self.run.checkpoints() if wanted else ()
        for step in wanted:
            if f"step {step}" in there:
                self.run.pin(step)

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
        self._say(self._text(step))

    def _say(self, text: str) -> None:
        PromptServer.instance.send_progress_text(text, self.control.shown.node)

    def _text(self, step: int) -> str:
        total = self.settings.steps
        rate = max(1, step - self.first - 1) / max(1e-9, time.monotonic() - self.began)
        text = (
            f"step {step} of {total}, loss {self.recent_loss():.4f}, "
            f"{rate:.2f} steps/s, {(total - step) / rate:.0f} s left"
        )
        verdict = self.evaluator.verdict if self.evaluator is not None else ""
        return "\n".join(filter(None, [text, verdict, *self.trouble, self.said]))

    @property
    def trouble(self) -> list[str]:
        """Say what went wrong with the numbers so far."""
        left_out = self.left_out
        steps = "1 step was" if left_out == 1 else f"{left_out} steps were"
        said = f"{steps} left out: the loss or its gradient was not finite" if left_out else ""
        samples = self.evaluator.failed if self.evaluator is not None else ""
        return [text for text in (said, self.exploded, samples) if text]

    def recent_loss(self) -> float:
        """Return the mean loss of the last 50 steps that had one."""
        recent = [loss for loss in self.losses[-50:] if math.isfinite(loss)]
        return sum(recent) / len(recent) if recent else math.nan

    @property
    def share(self) -> float:
        """The evaluations' share of the time beyond training alone."""
        return self.evaluating / max(1e-9, time.monotonic() - self.started - self.evaluating)


def number(line: Line, name: str, default: float = math.nan) -> float:
    """Return a number of a history line, which may be damaged."""
    value = line.get(name)
    return value if is_number(value) else default
