"""Apply what was learned to a MODEL, for any stock sampler: as weight patches, and injections of
what is not a weight."""

from collections.abc import Mapping
from pathlib import Path

import comfy.weight_adapter
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter.base import WeightAdapterBase
from comfy_api.latest import io
from torch import Tensor

from ..trainers.artifact import Personalization
from ..trainers.edits import (
    CombinedReduction,
    Difference,
    Edit,
    LowRank,
    RankReduction,
    Rotation,
    of_weights,
)
from ..trainers.errors import InputError, brief, printable
from ..trainers.methods import METHODS
from ..trainers.resume import of_base
from ..trainers.run import NAMED, Run, list_runs
from ..trainers.time_aware import SITE, TimeAware, block_of
from .bridge import PREFIX, fingerprint, own_weights, twin_names
from .inject import add_time_aware
from .widgets import check_widget
from .wires import CATEGORY, PersonalizedWire, at

NO_RUNS = "(no runs yet)"
STRENGTH = io.Float.Input(
    "strength",
    default=1.0,
    min=-4.0,
    max=4.0,
    step=0.05,
    tooltip="How much of what was learned is used: 0 is the base, 1 as trained.",
)


def runs_root() -> Path:
    """Return the folder that holds the runs: output/personalized."""
    return Path(folder_paths.get_output_directory()) / "personalized"


class EditPatch(WeightAdapterBase):
    """An edit, for ComfyUI to apply whenever it computes a weight.

    ComfyUI rebuilds adapters from these two arguments when it has moved the weights to another
    device.
    """

    def __init__(self, loaded_keys: set[str], weights: list[Tensor]):
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(
        self,
        weight,
        key,
        strength,
        strength_model,
        offset,
        function,
        intermediate_dtype=torch.float32,
        original_weight=None,
    ):
        return self.edited(weight, strength)

    def edited(self, weight: Tensor, strength: float) -> Tensor:
        """Return the edited weight."""
        raise NotImplementedError


class ReductionPatch(EditPatch):
    """PaRa's. weights: Q, the removed directions (out, r); of several, one after the other."""

    name = "personalize para"

    def edited(self, weight: Tensor, strength: float) -> Tensor:
        return CombinedReduction(tuple(self.weights)).apply(weight, strength)


class RotationPatch(EditPatch):
    """OFT's. weights: [S], the skew generators (blocks, triangle)."""

    name = "personalize oft"

    def edited(self, weight: Tensor, strength: float) -> Tensor:
        return Rotation(self.weights[0]).apply(weight, strength)


def patch_of(edit: Edit | CombinedReduction) -> WeightAdapterBase | tuple:
    """Return the patch of an edit: ComfyUI's own where it has one."""
    if isinstance(edit, LowRank):
        weights = (edit.up, edit.down, edit.alpha, None, None, None)
        return comfy.weight_adapter.LoRAAdapter(set(), weights)
    if isinstance(edit, RankReduction):
        return ReductionPatch(set(), [edit.directions()])
    if isinstance(edit, CombinedReduction):
        return ReductionPatch(set(), list(edit.factors))
    if isinstance(edit, Rotation):
        return RotationPatch(set(), [edit.skew])
    if isinstance(edit, Difference):
        return ("diff", (edit.delta,))
    raise TypeError(f"no patch for {type(edit).__name__}")


def personalize(
    model: ModelPatcher, learned: Personalization, strength: float
) -> tuple[ModelPatcher, str]:
    """Return a clone of MODEL with what was learned, and a text of what matched.

    Raises InputError when it does not fit this base, naming both.
    """
    edits = fitting_edits(model, learned)
    weights, adapter = of_weights(edits), edits.get(SITE)
    patched = model.clone()
    add_edits(patched, weights, strength)
    if strength != 0.0 and isinstance(adapter, TimeAware):
        names = site_names(model)
        paths = {block_of(site): own.removesuffix(".weight") for site, own in names.items()}
        outputs = {block: paths[block] for block in adapter.widths}
        add_time_aware(patched, adapter, outputs, strength)
    return patched, report(learned, fingerprint(model), len(weights), strength)


def site_names(model: ModelPatcher) -> dict[str, str]:
    """Map sites to the names of the weights and biases in ComfyUI's U-Net."""
    return {twin.removesuffix(".weight"): own for twin, own in twin_names(model).items()}


def fitting_edits(
    model: ModelPatcher, learned: Personalization, input_name: str = "model"
) -> dict[str, Edit | TimeAware]:
    """Return what was learned by site. Raises InputError when it does not fit this base."""
    names, own = site_names(model), own_weights(model)
    edits, unknown = learned.edits(list(names))
    shapes = {site: own[name].shape for site, name in names.items()}
    unfit = [site for site, edit in of_weights(edits).items() if not edit.fits(shapes[site])]
    adapter = edits.get(SITE)
    if isinstance(adapter, TimeAware) and not adapter.fits(shapes):
        unfit.append(SITE)
    if unknown or unfit or not edits:
        here, there = fingerprint(model), origin(learned)
        raise InputError(
            input_name,
            f"does not fit: this {there['method']} file was trained on {there['family']} "
            f"({there['geometry']}), the model is {here['family']} ({here['geometry']}); "
            f"{len(edits) - len(unfit)} layers match, {len(unfit)} have another shape, "
            f"{len(unknown)} keys belong to no layer. Connect the kind of base it was trained on.",
        )
    return edits


def add_edits(
    patched: ModelPatcher, edits: Mapping[str, Edit | CombinedReduction], strength: float
) -> None:
    """Put edits of weights on top of what a MODEL (a clone of your own) carries already."""
    if strength == 0.0:
        return
    names = site_names(patched)
    patches = {PREFIX + names[site]: patch_of(edit) for site, edit in edits.items()}
    accepted = patched.add_patches(patches, strength)
    if len(accepted) != len(patches):
        raise InputError(
            "model", f"took {len(accepted)} of {len(patches)} layers; is it a stock U-Net?"
        )


def report(learned: Personalization, here: dict[str, str], layers: int, strength: float) -> str:
    """Say in plain words what was loaded."""
    header, method = learned.header, title(learned)
    same = header.base.get("weights") == here["weights"] and not of_base(header.base, here)
    base = "the base it was trained on" if same else "another base of the same shape"
    adapter = (
        " and the time-aware adapter" if any(n.startswith(SITE) for n in learned.tensors) else ""
    )
    return (
        f"{method} after {header.step} steps: all {layers} layers{adapter} matched, "
        f"{learned.parameters:,} learned numbers, strength {strength:g}, on {base}.\n"
        f"Use these words in your prompt: {brief(printable(header.instance_prompt), 1000)}"
    )


def origin(learned: Personalization) -> dict[str, str]:
    """Return what a file says it was trained by and on, short enough for a message."""
    facts = {"method": learned.header.method} | learned.header.base
    return {name: brief(facts.get(name), 40) for name in ("method", "family", "geometry")}


def title(learned: Personalization) -> str:
    """Return the name of its method, for people."""
    name = learned.header.method
    return METHODS[name].title if name in METHODS else brief(printable(name), 40)


class Apply(io.ComfyNode):
    """Apply a personalisation that is already in the graph."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeApply",
            display_name="Apply Personalization",
            category=CATEGORY,
            description="Applies what a training node in this graph learned to a model, with a "
            "strength of your choice. The model that comes in is left as it is.",
            search_aliases=["apply lora", "use personalization", "apply trained"],
            inputs=[
                io.Model.Input("model", tooltip="The base it was trained on, or one like it."),
                PersonalizedWire.Input("personalized", tooltip="From a training node or loader."),
                STRENGTH,
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For any sampler.")],
        )

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def execute(cls, model, personalized, strength) -> io.NodeOutput:
        with at(cls, strength=strength):
            return io.NodeOutput(personalize(model, personalized, strength)[0])


class Load(io.ComfyNode):
    """Load a checkpoint of an earlier run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        runs = list_runs(runs_root()) or [NO_RUNS]
        return io.Schema(
            node_id="PersonalizeLoad",
            display_name="Load Personalization",
            category=CATEGORY,
            description="Loads a checkpoint of an earlier training run and applies it to a model. "
            "Says what matched, and fails when nothing does. Press R to refresh the lists.",
            search_aliases=["load lora", "load run", "load personalized model", "load checkpoint"],
            inputs=[
                io.Model.Input("model", tooltip="The base it was trained on, or one like it."),
                io.Combo.Input(
                    "run", options=runs, tooltip="A run in output/personalized, newest first."
                ),
                io.Combo.Input(
                    "checkpoint",
                    options=checkpoint_names(runs),
                    default="last",
                    tooltip="last; best, where a monitor was connected; or a step that was kept.",
                ),
                STRENGTH,
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For any sampler."),
                io.String.Output(display_name="report", tooltip="What was loaded and matched."),
                PersonalizedWire.Output(
                    display_name="personalized", tooltip="For Apply, Combine and Export."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, run):
        """Check the run ourselves: its list is older than the files.

        Only the run: ComfyUI repeats the error for every input that is named here.
        """
        try:
            with at(cls):
                Run.open(runs_root(), run)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, model=None, run="", checkpoint="", strength=1.0):
        """Load again when the file changed."""
        with at(cls):
            stat = Run.open(runs_root(), run).path(checkpoint).stat()
        return f"{run}/{checkpoint}/{stat.st_mtime_ns}/{stat.st_size}"

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def execute(cls, model, run, checkpoint, strength) -> io.NodeOutput:
        with at(cls):
            check_widget(STRENGTH, strength)
            learned = Run.open(runs_root(), run).load(checkpoint)
            patched, text = personalize(model, learned, strength)
            return io.NodeOutput(patched, text, learned, ui={"text": [text]})


def checkpoint_names(runs: list[str]) -> list[str]:
    """List every checkpoint name that some run may have; "last" first."""
    steps = {
        int(name.removeprefix("step "))
        for run in runs
        if run != NO_RUNS
        for name in Run(runs_root() / run).checkpoints()
        if name.startswith("step ")
    }
    return [*NAMED, *(f"step {step}" for step in sorted(steps))]
