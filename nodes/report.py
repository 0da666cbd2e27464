"""Personalize Report: what became of a run, as a picture, in words and in numbers."""

import json

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..trainers.errors import InputError
from ..trainers.methods import METHODS
from ..trainers.report import History, plot
from ..trainers.run import Run, list_runs, without_nan
from .load import runs_root
from .wires import CATEGORY, PersonalizedWire, at

CONNECTED = "(the connected one)"


class Report(io.ComfyNode):
    """Draw and judge a run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeReport",
            display_name="Personalize Report",
            category=CATEGORY,
            description="Draws the losses, the prior drift and the over-fitting indicator of a "
            "run, and says in plain words what came of it. The run needs a Personalize Monitor; "
            "without one there is only the loss of its steps.",
            search_aliases=["loss curve", "training chart", "over-fitting", "plot", "best step"],
            inputs=[
                PersonalizedWire.Input(
                    "personalized",
                    optional=True,
                    tooltip="From a training node or Load Personalization: its run is shown.",
                ),
                io.Combo.Input(
                    "run",
                    options=[CONNECTED, *list_runs(runs_root())],
                    default=CONNECTED,
                    tooltip="A run in output/personalized, newest first, or that of what is "
                    "connected to 'personalized'. Press R to refresh the list.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The report, 1200x900 pixels."),
                io.String.Output(display_name="verdict", tooltip="What came of it, in words."),
                io.Int.Output(display_name="best_step", tooltip="The best step of the run."),
                io.String.Output(display_name="metrics", tooltip="All numbers, as JSON."),
            ],
        )

    @classmethod
    def validate_inputs(cls, run):
        """Check the run ourselves: its list is older than the files."""
        if run == CONNECTED:
            return True
        try:
            with at(cls):
                Run.open(runs_root(), run)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, run="", personalized=None):
        """Draw again when the history has grown."""
        if run == CONNECTED:
            return CONNECTED
        with at(cls):
            history = Run.open(runs_root(), run).folder / "history.jsonl"
        return f"{run}/{history.stat().st_size}" if history.is_file() else run

    @classmethod
    def execute(cls, run, personalized=None) -> io.NodeOutput:
        with at(cls):
            shown = Run.open(runs_root(), run_name(run, personalized))
            facts = shown.facts()
            history = History.of(shown.history())
            if not history.steps:
                raise InputError("run", f"is '{shown.name}', which has no steps in its history.")
        method = METHODS.get(str(facts.get("method")))
        title = f"{method.title if method else 'Training'}: {shown.name}"
        picture = np.asarray(plot(history, title), np.float32) / 255
        image = torch.from_numpy(picture)[None]
        known = {name: facts.get(name) for name in ("method", "settings", "base")}
        metrics = without_nan({"run": shown.name, **known, **history.metrics()})
        shows = ui.PreviewImage(image, cls=cls)
        return io.NodeOutput(
            image,
            history.verdict,
            history.best,
            json.dumps(metrics, indent=1),
            ui={**shows.as_dict(), "text": [history.verdict]},
        )


def run_name(chosen: str, personalized) -> str:
    """Return the run to show. Raises InputError when nothing says which."""
    if chosen != CONNECTED:
        return chosen
    if personalized is None:
        raise InputError("run", "is that of 'personalized', but nothing is connected; choose one.")
    if not personalized.header.run:
        raise InputError(
            "personalized", "comes from a file that does not name its run; choose the run by name."
        )
    return personalized.header.run
