"""One training run inside ComfyUI: memory, interrupts and files around the loop."""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from filelock import FileLock
from server import PromptServer

from ..trainers.artifact import Header, Personalization
from ..trainers.data import PersonalData
from ..trainers.denoiser import Denoiser
from ..trainers.errors import InputError
from ..trainers.loop import train
from ..trainers.memory import forget
from ..trainers.method import Method, by_size
from ..trainers.monitor import over_fitting
from ..trainers.report import History, ended
from ..trainers.resume import Found, find, of_versions, sketch
from ..trainers.run import BEST, FAILED, INTERRUPTED, LAST, Run, held
from ..trainers.versions import versions
from . import control
from .base import Base, ModelBase
from .bridge import choose_precision
from .evaluate import Evaluator, interruptible
from .load import runs_root
from .monitor import Material, Monitoring, stop_when_interrupted
from .room import Room
from .watch import Watch

UNLOCKED = "this disk knows no locks: let no other ComfyUI train a run of that name"
LONGEST_ID = 100  # characters of a workflow's id, usually 36
A_WHILE = 10.0  # seconds that a new run waits for another server that just looks at it


@dataclass(frozen=True)
class Place:
    """Where in a graph a training runs."""

    node: str
    workflow: str | None = None  # its id; None for a prompt that no page queued

    @classmethod
    def of(cls, node: type[io.ComfyNode]) -> "Place":
        """Return the place of the node that runs now."""
        return cls(str(node.hidden.unique_id), workflow_of(node.hidden.extra_pnginfo))


def workflow_of(told: Any) -> str | None:
    """Return the id of the workflow that a prompt tells of; None for whatever is none."""
    workflow = told.get("workflow") if isinstance(told, dict) else None
    id = workflow.get("id") if isinstance(workflow, dict) else None
    return id if isinstance(id, str) and len(id) <= LONGEST_ID else None


@dataclass
class Session:
    """One training run, from what the node was given to what it hands on."""

    method: Method
    base: Base
    data: PersonalData
    name: str
    place: Place
    monitoring: Monitoring | None = None
    watch: Watch | None = None  # since the first step
    over_fitting: dict[str, float] = dataclasses.field(default_factory=dict)  # see the monitor
    said: str = ""  # about an earlier run of that name
    earlier: History | None = None  # of a finished run, if that is what comes out
    room: Room | None = None  # what it needs of the memory, since that is known

    def train(self) -> Personalization:
        """Train to the end and return what was learned, or the best of it.

        A run that broke off goes on; of one that is finished, the result is returned. However it
        ends, what was learned so far is on disk and the memory is free.
        """
        inputs = self._inputs()
        found = find(runs_root(), self.name, inputs, defaults(self.method))
        if found.run is not None and found.state is None:
            try:
                return self._handed_on(found.run)
            except InputError as error:  # what it had learned is gone
                found = Found(why=str(error).removesuffix("."))
        with held(found.claim):
            return self._on_device(found, inputs)

    def _on_device(self, found: Found, inputs: dict[str, Any]) -> Personalization:
        """Train with the memory to itself, and leave it free."""
        device = comfy.model_management.get_torch_device()
        denoiser: Denoiser | None = None
        with explained(self):
            try:
                material = self._material()
                comfy.model_management.unload_all_models()
                self._say("preparing the network")
                stop_when_interrupted()
                logging.info("Personalize: training in %s on %s", self.precision, device)
                denoiser = self.base.denoiser(self.precision)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                trained, measured = (self.base.in_network_scale(d, denoiser) for d in material)
                stop_when_interrupted()
                room = self._make_room(denoiser, trained, device)
                material = Material(room.kept(trained), measured)
                return self._train(denoiser.to(device), material, found, inputs)
            finally:
                if denoiser is not None:
                    forget(denoiser)  # a traceback may hold the network, but not its weights
                comfy.model_management.soft_empty_cache()

    def _make_room(self, denoiser: Denoiser, data: PersonalData, device: torch.device) -> Room:
        """See to it that training fits, and say so. Raises MemoryError when it can not."""
        choice = self.method.settings.gradient_checkpointing
        if choice == "on":
            denoiser.unet.enable_gradient_checkpointing()
        self.room = Room.of(self.method, denoiser, data, device)
        if choice == "auto" and not self.room.enough:
            denoiser.unet.enable_gradient_checkpointing()
            self.room = Room.of(self.method, denoiser, data, device)
        self._say(str(self.room))
        logging.info("Personalize: %s", self.room)
        if not self.room.enough:
            raise MemoryError
        return self.room

    @cached_property
    def precision(self) -> str:
        """What the base is held in; `auto` is resolved."""
        device = comfy.model_management.get_torch_device()
        return choose_precision(self.method.settings.precision, device)

    @property
    def model(self) -> ModelPatcher | None:
        """The base as a MODEL, if it is one."""
        return self.base.model if isinstance(self.base, ModelBase) else None

    def _material(self) -> Material:
        if self.monitoring is None:
            return Material(self.data, self.data)
        self._say("preparing the monitor")
        return self.monitoring.prepare(self.data, self.model, self.method.settings.seed)

    def _say(self, text: str) -> None:
        PromptServer.instance.send_progress_text(text, self.place.node)

    def _train(
        self, denoiser: Denoiser, material: Material, found: Found, inputs: dict[str, Any]
    ) -> Personalization:
        progress = comfy.utils.ProgressBar(self.method.settings.steps, node_id=self.place.node)
        with closing(train(self.method, denoiser, material.trained, found.state)) as steps:
            first = step = next(steps)  # a run that can not start leaves no folder
            run = found.run or self._create(inputs)
            self.said = self._story(found, run)
            header = replace(self._header, run=run.name)
            claim = found.claim or self._claimed(run)
            if not claim.is_locked:
                self.said = f"{self.said}; {UNLOCKED}" if self.said else UNLOCKED
            with (
                held(claim),
                control.running(run.name, self.place.node, self.place.workflow) as wishes,
            ):
                watch = Watch(run, header, self.method.settings, wishes, progress, self.said)
                self.watch = watch
                try:
                    lines = run.cut(first.index) if found.state is not None else []
                    watch.begin(self._evaluator(denoiser, material.measured, watch), lines)
                    for step in chain([first], steps):
                        going = watch.after(step)
                        stop_when_interrupted()
                        if not going:
                            break
                    facts = self._facts(denoiser, material.trained)
                    learned = watch.end(step, facts | self._memory(denoiser.device))
                except BaseException as error:
                    cancel = isinstance(error, comfy.model_management.InterruptProcessingException)
                    watch.rescue(step, INTERRUPTED if cancel else FAILED)
                    raise
                finally:
                    step.free()  # a traceback may hold the step
        return watch.evaluator.restored(learned) if watch.evaluator else learned

    @cached_property
    def _header(self) -> Header:
        """The header of the run's files, but for the run's name."""
        return Header(
            method=self.method.name,
            step=0,
            settings=self.method.settings.as_dict(),
            base=self.base.fingerprint(),
            instance_prompt=self.data.instance_prompt,
            class_prompt=self.data.class_prompt,
            data=self.data.fingerprint(),
        )

    def _inputs(self) -> dict[str, Any]:
        """Return all that a run depends on, for run.json."""
        monitor = described_monitor(self.monitoring) if self.monitoring is not None else None
        return asdict(self._header) | {
            "monitor": monitor,
            "encoded": sketch(self.data),
            "dataset": self.data.traits(),
            "computed_in": self.precision,
            "versions": versions(),
        }

    def _create(self, inputs: dict[str, Any]) -> Run:
        """Make the run's folder."""
        more = {name: value for name, value in inputs.items() if name not in asdict(self._header)}
        return Run.create(runs_root(), self.name, self._header, **more)

    def _claimed(self, run: Run) -> FileLock:
        """Take a new run for this process. Raises InputError when another one has it."""
        claim = run.claim(patience=A_WHILE)
        if claim is None:
            raise InputError(
                "name",
                f"is '{run.name}', a new run that another ComfyUI has taken already; queue again, "
                "or take another name.",
            )
        return claim

    def _story(self, found: Found, run: Run) -> str:
        """Say how the run came to be; nothing of the first one of a name."""
        if found.state is not None:
            others = "; ".join(of_versions(found.state.versions, versions()))
            told = f"run '{run.name}' resumed at step {found.state.done.index}"
            return f"{told}, with other versions: {others}" if others else told
        return f"new run '{run.name}': {found.why}" if found.why else ""

    def _handed_on(self, run: Run) -> Personalization:
        """Return the result of a finished run. Raises InputError when it is not there any more."""
        lines = run.history()
        best = self.monitoring is not None and self.monitoring.settings.restore_best
        there = run.checkpoints()
        learned = run.load(BEST if best and BEST in there else LAST)
        self.earlier = History.of(lines)
        self.said = (
            f"run '{run.name}' {lines[-1]['reason']} before, and nothing changed since: it was "
            "not trained again"
        )
        with control.running(run.name, self.place.node, self.place.workflow) as wishes:
            wishes.tell(lines[-1])  # the page shows it
        self._say(self.said)
        return learned

    def _evaluator(
        self, denoiser: Denoiser, measured: PersonalData, watch: Watch
    ) -> Evaluator | None:
        if self.monitoring is None:
            return None
        return Evaluator(
            self.monitoring,
            denoiser,
            measured,
            self.method.settings,
            watch.run,
            watch.header,
            self.base,
        )

    def _facts(self, denoiser: Denoiser, data: PersonalData) -> dict[str, float]:
        """Measure once at the end what no monitor has measured."""
        if self.monitoring is None and data.held_out:
            with interruptible(denoiser):
                self.over_fitting = over_fitting(denoiser, data.training, data.held_out)
        return self.over_fitting

    def _memory(self, device: torch.device) -> dict[str, int]:
        """Return what was to be held at the peak, and what a GPU has held for tensors, in bytes."""
        found = {"needed_memory": self.room.needed} if self.room is not None else {}
        if device.type == "cuda":
            found["peak_memory"] = torch.cuda.max_memory_allocated(device)
        return found

    @property
    def losses(self) -> list[float]:
        """The loss of every step that had one."""
        if self.earlier is not None:
            return [loss for _, loss in self.earlier.losses]
        losses = self.watch.losses if self.watch is not None else []
        return [loss for loss in losses if math.isfinite(loss)]

    def summary(self, learned: Personalization) -> str:
        """Say what came out, for the node's face."""
        if self.earlier is not None:
            return (
                f"{self.method.title}: {self.said}. {self.earlier.verdict.capitalize()}. What "
                f"comes out is step {learned.header.step}"
            )
        assert self.watch is not None
        watch = self.watch
        text = (
            f"{self.method.title}: {len(watch.losses)} steps, loss {watch.recent_loss():.4f} "
            f"(mean of the last 50), {learned.parameters:,} learned numbers, "
            f"saved as run '{watch.run.name}'{self._verdict_text(learned)}"
        )
        more = [*watch.trouble, *filter(None, [self.said, self._repeats])]
        return ". ".join([text, *(f"{said[0].upper()}{said[1:]}" for said in more)])

    @property
    def _repeats(self) -> str:
        """Say when a batch is larger than the set."""
        size, count = self.method.settings.batch_size, len(self.data.training)
        if size <= count or len(by_size(self.data.training)) > 1 or self.data.take_turns:
            return ""
        return f"every picture was shown {size / count:.1f} times a step: 'batch_size' is {size}"

    def _verdict_text(self, learned: Personalization) -> str:
        assert self.watch is not None
        if self.watch.evaluator is not None:
            share, step = self.watch.share, learned.header.step
            said = self.watch.evaluator.verdict + ended(self.watch.reason, len(self.watch.losses))
            text = f". {said.capitalize()}. Measuring took {share:.0%}"
            if step != len(self.watch.losses):
                return f"{text}. What comes out is step {step}"
            return text
        if not self.over_fitting:
            return ""
        base, tuned = (self.over_fitting[f"held_out_loss{of}"] for of in ("_of_base", ""))
        verdict = "it generalises" if tuned < base else "it over-fits: train less"
        return f". On the pictures held out: loss {tuned:.4f}, the base's {base:.4f}: {verdict}"


@contextmanager
def explained(session: Session) -> Iterator[None]:
    """Name the knobs when memory runs out inside."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        if (room := session.room) is None:
            raise MemoryError(
                "out of memory before training began; close other programs"
            ) from error
        raise MemoryError(f"out of memory: {room}. {room.advice}") from error


def out_of_memory(error: Exception) -> bool:
    """Tell whether an error is a lack of memory, of a device or the host."""
    if isinstance(error, (MemoryError, comfy.model_management.OOM_EXCEPTION)):
        return True
    host = "DefaultCPUAllocator", "not enough memory"  # torch says so in a RuntimeError
    return isinstance(error, RuntimeError) and any(text in str(error) for text in host)


def defaults(method: Method) -> dict[str, Any]:
    """Return the default of every setting."""
    return {field.name: field.default for field in dataclasses.fields(type(method.settings))}


def described_monitor(monitoring: Monitoring) -> dict[str, Any]:
    """Return what a monitor was told, for run.json."""
    digest = hashlib.sha256()
    for picture in monitoring.held_out:
        digest.update(picture.contiguous().numpy().tobytes())
    return {
        **asdict(monitoring.settings),
        "prompts": [prompt.text for prompt in monitoring.shown],
        "prior_prompts": [prompt.text for prompt in monitoring.prior],
        "held_out": digest.hexdigest()[:16] if monitoring.held_out else None,
        "held_out_caption": text.caption if (text := monitoring.held_out_text) else "",
    }
