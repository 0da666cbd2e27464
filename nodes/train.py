"""One training node per method; its widgets are read off the method's Settings."""

import dataclasses
import inspect
import sys
from typing import ClassVar

import torch
from comfy_api.latest import io, ui

from ..trainers.method import Method
from ..trainers.run import check_name
from .base import ModelBase
from .load import personalize
from .session import Place, Session
from .widgets import widget
from .wires import CATEGORY, MonitorWire, PersonalDataWire, PersonalizedWire, at

NAME = io.String.Input(
    "name",
    default="my subject",
    tooltip="The run's folder in output/personalized. Queued again, a cancelled run goes on, and a "
    "finished one is handed on as it is. When anything changed, the new run gets a number: none is "
    "ever overwritten.",
)
MONITOR = MonitorWire.Input(
    "monitor",
    optional=True,
    tooltip="From Personalize Monitor: shows over-fitting, stops in time, keeps the best.",
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
            description=described(inspect.getdoc(sys.modules[method.__module__]) or ""),
            search_aliases=[
                f"train {method.title.lower()}",
                "fine-tune",
                "dreambooth",
                "personalize",
                "few-shot training",
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            inputs=[
                io.Model.Input("model", tooltip="The base to personalise; it stays as it is."),
                PersonalDataWire.Input("data", tooltip="From Personal Dataset."),
                MONITOR,
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
    def execute(cls, model, data, name, monitor=None, **settings) -> io.NodeOutput:
        with at(cls):
            check_name(name)
            method = cls.method(cls.method.Settings(**settings))
            session = Session(method, ModelBase(model), data, name, Place.of(cls), monitor)
            learned = session.train()
            patched, _ = personalize(model, learned, 1.0)
        summary = ui.PreviewText(session.summary(learned))
        return io.NodeOutput(patched, learned, {"loss": session.losses}, ui=summary)


def described(method: str) -> str:
    """Add to a method's description what all training nodes do."""
    return f"{method}\n\nCancel whenever you like, and queue again: the run goes on where it was."


def train_node(method: type[Method]) -> type[TrainNode]:
    """Make the training node of a method."""
    return type(f"Train{method.__name__}", (TrainNode,), {"method": method})
