"""One training node per method; its widgets are read off the method's Settings."""

import dataclasses
import inspect
import sys
import time
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar, Protocol

import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from server import PromptServer

from ..trainers.artifact import Header, Personalization
from ..trainers.data import Example, PersonalData
from ..trainers.denoiser import Denoiser
from ..trainers.errors import InputError
from ..trainers.loop import Step, train
from ..trainers.method import Method
from ..trainers.monitor import over_fitting
from ..trainers.run import LAST, Run, check_name
from .bridge import choose_precision, denoiser_of, fingerprint
from .load import personalize, runs_root
from .wires import CATEGORY, PersonalDataWire, PersonalizedWire, at

WIDGETS = {int: io.Int, float: io.Float, bool: io.Boolean}
NAME = io.String.Input(
    "name",
    default="my subject",
    tooltip="The run's folder in output/personalized. A name that is taken gets a number: no run "
    "is ever overwritten.",
)
LEARNED = (
    PersonalizedWire.Output(display_name="personalized", tooltip="What was learned, for Apply."),
    io.LossMap.Output(display_name="loss_map", tooltip="Loss of every step, for Plot Loss Graph."),
)


class TrainNode(io.ComfyNode):
    """Train `method` on personal data."""

    method: ClassVar[type[Method]]

    @classmethod
    def define_schema(cls) -> io.Schema:
        method = cls.method
        fields = dataclasses.fields(method.Settings)
        return io.Schema(
            node_id=f"PersonalizeTrain{method.__name__}",
            display_name=f"Train {method.title}",
            category=f"{CATEGORY}/train",
            description=inspect.getdoc(sys.modules[method.__module__]) or "",
            search_aliases=[
                f"train {method.title.lower()}",
                "fine-tune",
                "dreambooth",
                "personalize",
                "few-shot training",
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The base to personalise; it stays as it is."),
                PersonalDataWire.Input("data", tooltip="From Personal Dataset."),
                NAME,
                *map(widget, sorted(fields, key=lambda field: field.metadata["advanced"])),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The base with what was learned, for any sampler."
                ),
                *LEARNED,
            ],
        )

    @classmethod
    @torch.inference_mode(False)  # tensors born in inference mode can never train
    def execute(cls, model, data, name, **settings) -> io.NodeOutput:
        with at(cls):
            check_name(name)
            method = cls.method(cls.method.Settings(**settings))
            session = Session(method, ModelBase(model), data, name, str(cls.hidden.unique_id))
            learned = session.train()
            patched, _ = personalize(model, learned, 1.0)
        summary = ui.PreviewText(session.summary(learned))
        return io.NodeOutput(patched, learned, {"loss": session.losses}, ui=summary)


class Base(Protocol):
    """What a session trains: a MODEL, or an unconditional base."""

    def denoiser(self, precision: str) -> Denoiser:
        """Return a network of its own, on the CPU."""
        ...

    def in_network_scale(self, data: PersonalData, denoiser: Denoiser) -> PersonalData:
        """Return the data as the network takes it; raise InputError when they do not fit."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """Describe the base, for the file."""
        ...


@dataclass(frozen=True)
class ModelBase:
    """A ComfyUI MODEL as a base."""

    model: ModelPatcher

    def denoiser(self, precision: str) -> Denoiser:
        return denoiser_of(self.model, precision)

    def in_network_scale(self, data: PersonalData, denoiser: Denoiser) -> PersonalData:
        return in_network_scale(data, self.model, denoiser)

    def fingerprint(self) -> dict[str, str]:
        return fingerprint(self.model)


@dataclass
class Session:
    """One training run inside ComfyUI: memory, progress, interrupts and files around the loop."""

    method: Method
    base: Base
    data: PersonalData
    name: str
    node_id: str
    losses: list[float] = dataclasses.field(default_factory=list)
    started: float = dataclasses.field(default_factory=time.monotonic)
    run: Run | None = None
    over_fitting: dict[str, float] = dataclasses.field(default_factory=dict)  # see the monitor

    def train(self) -> Personalization:
        """Train to the end and return what was learned.

        However it ends, what was learned so far is on disk and the memory is free.
        """
        comfy.model_management.unload_all_models()
        device = comfy.model_management.get_torch_device()
        precision = choose_precision(self.method.settings.precision, device)
        denoiser = self.base.denoiser(precision)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            data = self.base.in_network_scale(self.data, denoiser)
            return self._train(denoiser.to(device), data)
        except comfy.model_management.OOM_EXCEPTION as error:
            raise MemoryError(
                "out of memory. Switch 'gradient_checkpointing' on, set 'precision' to bf16, lower "
                f"'batch_size' (it is {self.method.settings.batch_size}) or train on smaller "
                "pictures (the dataset's 'resolution')"
            ) from error
        finally:
            denoiser.to("meta")  # a traceback may hold the network, but not its weights
            comfy.model_management.soft_empty_cache()

    def _train(self, denoiser: Denoiser, data: PersonalData) -> Personalization:
        settings = self.method.settings
        header = Header(
            method=self.method.name,
            step=0,
            settings=settings.as_dict(),
            base=self.base.fingerprint(),
            instance_prompt=self.data.instance_prompt,
            class_prompt=self.data.class_prompt,
            data=self.data.fingerprint(),
        )
        progress = comfy.utils.ProgressBar(settings.steps, node_id=self.node_id)
        PromptServer.instance.send_progress_text("preparing the network", self.node_id)
        with closing(train(self.method, denoiser, data)) as steps:
            first = step = next(steps)  # a run that can not start leaves no folder
            self.started = time.monotonic()
            self.run = Run.create(runs_root(), self.name, header)
            try:
                for step in chain([first], steps):
                    self._record(step, header)
                    progress.update_absolute(step.index, settings.steps)
                    comfy.model_management.throw_exception_if_processing_interrupted()
            finally:
                learned = Personalization.of(header, step.learned(), step.index)
                self.run.save(learned, LAST)
                if denoiser.device.type == "cuda":
                    peak = torch.cuda.max_memory_allocated(denoiser.device)
                    self.run.log(step=step.index, peak_memory=peak)
            if data.held_out:
                self.over_fitting = over_fitting(denoiser, data.training, data.held_out)
                self.run.log(step=step.index, **self.over_fitting)
        return learned

    def _record(self, step: Step, header: Header) -> None:
        """Put a step into the history, on the screen and, when its turn has come, on disk."""
        assert self.run is not None
        self.losses.append(step.loss)
        self.run.log(
            step=step.index, loss=step.loss, learning_rate=step.learning_rate, **step.facts
        )
        every = self.method.settings.save_every
        if every and step.index % every == 0:
            kept = Personalization.of(header, step.learned(), step.index)
            self.run.save(kept, f"step {step.index}")
        PromptServer.instance.send_progress_text(self._progress_text(step.index), self.node_id)

    def _progress_text(self, step: int) -> str:
        total = self.method.settings.steps
        rate = max(1, step - 1) / max(1e-9, time.monotonic() - self.started)
        return (
            f"step {step} of {total}, loss {self.recent_loss():.4f}, "
            f"{rate:.2f} steps/s, {(total - step) / rate:.0f} s left"
        )

    def recent_loss(self) -> float:
        """Return the mean loss of the last 50 steps."""
        recent = self.losses[-50:]
        return sum(recent) / len(recent)

    def summary(self, learned: Personalization) -> str:
        """Say what came out, for the node's face."""
        assert self.run is not None
        return (
            f"{self.method.title}: {learned.header.step} steps, loss {self.recent_loss():.4f} "
            f"(mean of the last 50), {learned.parameters:,} learned numbers, "
            f"saved as run '{self.run.name}'{self._held_out_text()}"
        )

    def _held_out_text(self) -> str:
        if not self.over_fitting:
            return ""
        base, tuned = (self.over_fitting[f"held_out_loss{of}"] for of in ("_of_base", ""))
        verdict = "it generalises" if tuned < base else "it over-fits: train less"
        return f". On the pictures held out: loss {tuned:.4f}, the base's {base:.4f}: {verdict}"


def in_network_scale(data: PersonalData, model: ModelPatcher, denoiser: Denoiser) -> PersonalData:
    """Bring the latents to the network's scale. Raises InputError when data and base do not fit."""
    sample = data.training[0]
    width = denoiser.unet.config["cross_attention_dim"]
    if sample.context.shape[-1] != width or sample.latent.shape[0] != 4:
        raise InputError(
            "data",
            f"was encoded with text states of width {sample.context.shape[-1]} and "
            f"{sample.latent.shape[0]} latent channels, but this base expects {width} and 4; give "
            "Personal Dataset the CLIP and VAE of the same checkpoint.",
        )
    sides, multiple = sample.latent.shape[1:], denoiser.size_multiple
    if any(side % multiple for side in sides):
        raise InputError(
            "data",
            f"has latents of {sides[1]}x{sides[0]}, but this base halves them to a {multiple}th: "
            f"set Personal Dataset's 'resolution' to a multiple of {8 * multiple}.",
        )

    def scaled(examples: tuple[Example, ...]) -> tuple[Example, ...]:
        return tuple(replace(e, latent=model.model.process_latent_in(e.latent)) for e in examples)

    return replace(
        data,
        training=scaled(data.training),
        held_out=scaled(data.held_out),
        prior=scaled(data.prior),
        encode=lambda pixels: model.model.process_latent_in(data.encode(pixels)),
    )


def widget(spec: dataclasses.Field) -> Any:
    """Turn a setting into a node input."""
    options = dict(spec.metadata)
    help_text, choices = options.pop("help"), options.pop("choices", None)
    common = {"tooltip": help_text, "default": spec.default, "advanced": options.pop("advanced")}
    if choices is not None:
        return io.Combo.Input(spec.name, options=list(choices), **common)
    if spec.name == "seed":  # else the page draws a new one, and trains anew, at every queueing
        options["control_after_generate"] = False
    if isinstance(spec.default, float):
        options["round"] = False
    return WIDGETS[type(spec.default)].Input(spec.name, **common, **options)


def train_node(method: type[Method]) -> type[TrainNode]:
    """Make the training node of a method."""
    return type(f"Train{method.__name__}", (TrainNode,), {"method": method})
