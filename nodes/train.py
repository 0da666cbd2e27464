"""One training node per method; its widgets are read off the method's Settings."""

import dataclasses
import inspect
import sys
import time
from dataclasses import dataclass, replace
from typing import Any, ClassVar

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
from ..trainers.run import LAST, Run, check_name
from .bridge import choose_precision, denoiser_of, family, fingerprint
from .load import personalize, runs_root
from .wires import CATEGORY, PersonalDataWire, PersonalizedWire, at

WIDGETS = {int: io.Int, float: io.Float, bool: io.Boolean}


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
                io.String.Input(
                    "name",
                    default="my subject",
                    tooltip="The run's folder in output/personalized. A name that is taken gets a "
                    "number: no run is ever overwritten.",
                ),
                *map(widget, fields),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The base with what was learned, for any sampler."
                ),
                PersonalizedWire.Output(
                    display_name="personalized", tooltip="What was learned, for Apply."
                ),
                io.LossMap.Output(
                    display_name="loss_map", tooltip="Loss of every step, for Plot Loss Graph."
                ),
            ],
        )

    @classmethod
    @torch.inference_mode(False)  # tensors born in inference mode can never train
    def execute(cls, model, data, name, **settings) -> io.NodeOutput:
        with at(cls):
            check_name(name)
            method = cls.method(cls.method.Settings(**settings))
            session = Session(method, model, data, name, str(cls.hidden.unique_id))
            learned = session.train()
            patched, _ = personalize(model, learned, 1.0)
        summary = ui.PreviewText(session.summary(learned))
        return io.NodeOutput(patched, learned, {"loss": session.losses}, ui=summary)


@dataclass
class Session:
    """One training run inside ComfyUI: memory, progress, interrupts and files around the loop."""

    method: Method
    model: ModelPatcher
    data: PersonalData
    name: str
    node_id: str
    losses: list[float] = dataclasses.field(default_factory=list)
    run: Run | None = None

    def train(self) -> Personalization:
        """Train to the end and return what was learned.

        However it ends, what was learned so far is on disk and the memory is free.
        """
        family(self.model)
        comfy.model_management.unload_all_models()
        device = comfy.model_management.get_torch_device()
        precision = choose_precision(self.method.settings.precision, device)
        try:
            denoiser = denoiser_of(self.model, precision).to(device)
            return self._train(denoiser, in_network_scale(self.data, self.model, denoiser))
        finally:
            denoiser = None
            comfy.model_management.soft_empty_cache()

    def _train(self, denoiser: Denoiser, data: PersonalData) -> Personalization:
        settings = self.method.settings
        header = Header(
            method=self.method.name,
            step=0,
            settings=settings.as_dict(),
            base=fingerprint(self.model),
            instance_prompt=self.data.instance_prompt,
            class_prompt=self.data.class_prompt,
            data=self.data.fingerprint(),
        )
        progress = comfy.utils.ProgressBar(settings.steps, node_id=self.node_id)
        started, step, learned = time.monotonic(), None, None
        try:
            for step in train(self.method, denoiser, data):
                self._note(step, header, time.monotonic() - started)
                progress.update_absolute(step.index, settings.steps)
                comfy.model_management.throw_exception_if_processing_interrupted()
        finally:
            if step is not None and self.run is not None:
                learned = Personalization.of(header, step.learned(), step.index)
                self.run.save(learned, LAST)
        assert learned is not None
        return learned

    def _note(self, step: Step, header: Header, seconds: float) -> None:
        settings = self.method.settings
        if self.run is None:  # only now: a run that can not start leaves no folder
            self.run = Run.create(runs_root(), self.name, header)
        self.losses.append(step.loss)
        self.run.log(step=step.index, loss=step.loss, learning_rate=step.learning_rate)
        if settings.save_every and step.index % settings.save_every == 0:
            kept = Personalization.of(header, step.learned(), step.index)
            self.run.save(kept, f"step {step.index}")
        rate = step.index / max(seconds, 1e-9)
        left = (settings.steps - step.index) / rate
        recent = self.losses[-50:]
        text = (
            f"step {step.index} of {settings.steps}, loss {sum(recent) / len(recent):.4f} "
            f"(mean of {len(recent)}), {rate:.2f} steps/s, {left:.0f} s left"
        )
        PromptServer.instance.send_progress_text(text, self.node_id)

    def summary(self, learned: Personalization) -> str:
        """Say what came out, for the node's face."""
        assert self.run is not None
        recent = self.losses[-50:]
        return (
            f"{self.method.title}: {learned.header.step} steps, loss "
            f"{sum(recent) / len(recent):.4f} (mean of the last {len(recent)}), "
            f"{learned.parameters:,} learned numbers, saved as run '{self.run.name}'"
        )


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
    )


def widget(spec: dataclasses.Field) -> Any:
    """Turn a setting into a node input."""
    options = dict(spec.metadata)
    help_text, choices = options.pop("help"), options.pop("choices", None)
    common = {"tooltip": help_text, "default": spec.default, "advanced": options.pop("advanced")}
    if choices is not None:
        return io.Combo.Input(spec.name, options=list(choices), **common)
    if isinstance(spec.default, float):
        options["round"] = False
    return WIDGETS[type(spec.default)].Input(spec.name, **common, **options)


def train_node(method: type[Method]) -> type[TrainNode]:
    """Make the training node of a method."""
    return type(f"Train{method.__name__}", (TrainNode,), {"method": method})
