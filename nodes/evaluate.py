"""The evaluations of one run: measured, sampled, kept on disk, and judged."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import comfy.model_management
import torch
from PIL import Image
from torch import Tensor

from ..trainers.artifact import Header, Personalization
from ..trainers.copies import diversity, nearest
from ..trainers.data import PersonalData
from ..trainers.denoiser import Denoiser
from ..trainers.errors import brief
from ..trainers.loop import Step
from ..trainers.monitor import (
    Evaluation,
    Examination,
    high_frequency_energy,
    is_number,
    rounds_for,
    spacing,
)
from ..trainers.report import evaluation_of
from ..trainers.run import BEST, Run
from ..trainers.settings import Settings
from ..trainers.state import finite
from ..trainers.verdict import (
    Rules,
    best_step,
    patience_left,
    ranking,
    should_stop,
    state,
    verdict,
    watched,
)
from .base import Base, Sampler
from .monitor import Monitoring, stop_when_interrupted

Line = dict[str, Any]  # of history.jsonl


@dataclass
class Evaluator:
    """Evaluates a run when it is asked to."""

    monitoring: Monitoring
    denoiser: Denoiser
    data: PersonalData  # in the network's scale; what it holds out or has of the class is looked at
    settings: Settings
    run: Run
    header: Header
    base: Base  # to sample with
    every: int = field(init=False)  # steps between two evaluations
    sampler: Sampler | None = field(init=False)  # None: no samples are wanted
    evaluations: list[Evaluation] = field(default_factory=list)
    newest: Image.Image | None = None  # sample, until it is shown
    failed: str = ""  # why the newest samples are missing
    usual_energy: float | None = None  # high-frequency, that samples are compared with
    heed_pins: Callable[[], None] = lambda: None  # called before checkpoints are deleted
    # steps whose checkpoints a run would need that goes on from the state on disk
    settled: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        data, s = self.data, self.settings
        splits = {"train": data.training, "held_out": data.held_out, "prior": data.prior}
        per_step = s.batch_size * s.gradient_accumulation
        measured = sum(map(bool, splits.values()))
        self.every = self.monitoring.settings.every or spacing(s.steps, per_step, measured)
        rounds = rounds_for(per_step, self.every, measured)
        with interruptible(self.denoiser):
            self.examination = Examination(self.denoiser, splits, rounds)
        self.sampler = self.base.sampler(self.monitoring, data.usual_shape)

    def take_up(self, lines: Sequence[Line]) -> None:
        """Go on from what the history tells; the best checkpoint is the best of these again."""
        self.evaluations = list(filter(None, map(evaluation_of, lines)))
        self._compare_with(lines[0].get("sample_energy") if lines else None)
        self.settle()
        if self.settled and f"step {self.settled[0]}" in self.run.checkpoints():
            self.run.make_best(self.settled[0])

    def settle(self) -> None:
        """Take note that the state on disk has all the evaluations so far."""
        self.settled = self._wanted()

    def knows(self, step: int) -> bool:
        """Tell whether a step was evaluated."""
        return any(evaluation.step == step for evaluation in self.evaluations)

    def _wanted(self) -> list[int]:
        """Return the steps whose checkpoints are to stay, the best first; none: the last does."""
        rules = self.monitoring.settings
        if watched(self.evaluations, rules) is None:
            return []
        return ranking(self.evaluations, rules)[: rules.keep]

    def due(self, step: int) -> bool:
        """Tell whether a step is to be evaluated."""
        return step % self.every == 0 or step == self.settings.steps

    @property
    def done(self) -> bool:
        """Whether going on is useless."""
        return should_stop(self.evaluations, self.monitoring.settings)

    @property
    def best(self) -> int | None:
        """The best step so far."""
        return best_step(self.evaluations, self.monitoring.settings)

    @property
    def verdict(self) -> str:
        """What there is to say, in plain words."""
        return verdict(self.evaluations, self.monitoring.settings)

    def of_base(self) -> Line:
        """Take the base as the run's step 0."""
        evaluation = self.examination.of_base()
        self.evaluations.append(evaluation)
        sampled = self._sampled(0, None)
        self._compare_with(sampled["sample_energy"])
        bins = {
            f"{name}_bins_of_base": getattr(evaluation, f"{name}_bins")
            for name in ("train", "held_out", "prior")
        }
        rules = {f.name: getattr(self.monitoring.settings, f.name) for f in fields(Rules)}
        return self._line(sampled) | bins | {"rules": rules}

    def evaluate(self, step: Step, last: bool) -> Line:
        """Measure a step, keep its checkpoint if it is good, sample when it is time.

        last: no other evaluation comes after it.
        """
        with step.kept(), interruptible(self.denoiser):
            self.evaluations.append(self.examination.evaluate(self.denoiser, step.index))
        self._keep(step)
        turn = (len(self.evaluations) - 1) % self.monitoring.settings.sample_every == 0
        sampled = self._of_samples(step) if turn or last or self.done else NO_SAMPLES
        return self._line(sampled)

    def restored(self, learned: Personalization) -> Personalization:
        """Return the best checkpoint, or what is given where that is best or wanted."""
        wanted = self.monitoring.settings.restore_best and BEST in self.run.checkpoints()
        return self.run.load(BEST) if wanted and self.best != learned.header.step else learned

    def _line(self, sampled: Line) -> Line:
        """Return what there is to tell of the newest evaluation, and of its samples."""
        rules, energy = self.monitoring.settings, sampled["sample_energy"]
        if energy is not None and self.usual_energy:
            grain = energy / self.usual_energy
            self.evaluations[-1] = replace(self.evaluations[-1], grain=grain)
        return {
            **self.evaluations[-1].as_line(),
            "total_steps": self.settings.steps,
            **sampled,
            "best_step": self.best,
            "verdict": state(self.evaluations, rules),
            "patience_left": patience_left(self.evaluations, rules),
        }

    def _keep(self, step: Step) -> None:
        """Write a checkpoint that is among the best, and delete those that are not."""
        self.heed_pins()
        wanted = self._wanted()
        if not wanted:
            return  # the last is the best, and is written anyway
        if step.index in wanted:
            self.run.save(learned_by(step, self.header), f"step {step.index}")
        if wanted[0] == step.index:
            self.run.make_best(step.index)
        self._tidy()

    def finish(self) -> None:
        """Keep only what is wanted of a run that will not go on."""
        self.settle()
        if self.settled:
            self._tidy()

    def _tidy(self) -> None:
        """Delete checkpoints that are no longer among the best, here and in the state on disk."""
        spared = {*self._wanted(), *self.settled, *self.run.pinned()}
        for old in (evaluation.step for evaluation in self.evaluations):
            if old not in spared and not saved(self.settings, old):
                self.run.remove(old)

    def _compare_with(self, of_base: Any) -> None:
        """Let samples have as much grain as the base's; without prompts, as the training pictures.

        Without prompts a base draws nothing but its own kind of pictures, before and after.
        """
        if not self.base.prompted:
            energies = [high_frequency_energy(picture[None]) for picture in self._known()]
            self.usual_energy = float(torch.cat(energies).mean())
        else:
            self.usual_energy = of_base if is_number(of_base) else None

    def _known(self) -> Iterator[Tensor]:
        """Yield what is trained on, (3, H, W) in [0, 1]."""
        for example in self.data.training:
            yield from (as_colour(view.pixels) for view in example.views)

    def _of_samples(self, step: Step) -> Line:
        """Sample what a user would get now."""
        if self.sampler is None:
            return NO_SAMPLES
        return self._sampled(step.index, learned_by(step, self.header))

    def _sampled(self, step: int, learned: Personalization | None) -> Line:
        """Sample every prompt, save the pictures, and compare them.

        Samples that can not be had do not end a training: it is said, and it goes on.
        """
        if self.sampler is None:
            return NO_SAMPLES
        try:
            groups = self.sampler(learned)
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:
            logging.warning("Personalize: no samples at step %d", step, exc_info=True)
            self.failed = f"no samples at step {step}: {brief(str(error))}"
            return NO_SAMPLES | {"samples_failed": self.failed}
        self.failed = ""
        folder = self.run.folder / "samples"
        folder.mkdir(exist_ok=True)
        names = []
        for number, picture in enumerate(torch.cat(groups)):
            names.append(f"samples/{step:06d}-{number}.png")
            image = as_image(picture)
            image.save(self.run.folder / names[-1])
            self.newest = image if number == 0 else self.newest
        channels_first = [group.movedim(-1, 1) for group in groups]
        return {
            "samples": names,
            "nearest": nearest(torch.cat(channels_first), self._known()),
            "diversity": diversity(channels_first),
            "sample_energy": float(high_frequency_energy(torch.cat(channels_first)).mean()),
        }


NO_SAMPLES: Line = {"samples": [], "nearest": None, "diversity": None, "sample_energy": None}


def learned_by(step: Step, header: Header) -> Personalization:
    """Return what is learned after a step.

    Raises FloatingPointError when that is not finite: no such file is ever written.
    """
    learned = Personalization.of(header, step.learned(), step.index)
    if not finite(learned.tensors.values()):
        raise FloatingPointError(
            f"what is learned is not finite any more after step {step.index}: lower "
            f"'learning_rate' (it is {step.learning_rate:g})"
        )
    return learned


@contextmanager
def interruptible(denoiser: Denoiser) -> Iterator[None]:
    """Inside, the stop button is heeded before every pass through the network.

    Not for steps: they are heeded between, where all is whole.
    """
    hook = denoiser.register_forward_pre_hook(stop_when_interrupted)
    try:
        yield
    finally:
        hook.remove()


def saved(settings: Settings, step: int) -> bool:
    """Tell whether the user asked for the checkpoint of a step beforehand."""
    return step > 0 and settings.save_every > 0 and step % settings.save_every == 0


def as_colour(pixels: Tensor) -> Tensor:
    """Return pixels (1 or 3, H, W) in [-1, 1] as (3, H, W) in [0, 1]."""
    return ((pixels + 1) / 2).expand(3, *pixels.shape[1:])


def as_image(picture: Tensor) -> Image.Image:
    """Turn (H, W, 3) in [0, 1] into an image, as the stock Save Image does."""
    return Image.fromarray((picture.clamp(0, 1) * 255).byte().numpy())
