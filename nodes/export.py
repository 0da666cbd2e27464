"""Export LoRA: what was learned as a file for Load LoRA, and for other programs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from safetensors.torch import save_file

from ..trainers.artifact import Personalization, atomic
from ..trainers.edits import Difference, Edit, of_weights
from ..trainers.errors import InputError, brief
from ..trainers.export import Export, as_lora, metadata, needs_base, sites_of
from ..trainers.run import check_name, numbered
from .bridge import weight_reader
from .load import fitting_edits, title
from .wires import CATEGORY, PersonalizedWire, at

WHOLE, LOW_RANK = "whole", "low rank"


class ExportLoRA(io.ComfyNode):
    """Write a LoRA file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeExportLoRA",
            display_name="Export LoRA",
            category=CATEGORY,
            description="Writes what was learned as a LoRA file to output/loras, where Load LoRA "
            "finds it (press R) and from where other programs can take it. Exact for LoRA, APT, "
            "BNN over a LoRA, Selective BP/ZO, and PaRa on its base; fine-tuned weights go whole, "
            "or as the nearest change of a rank, and the error is told.",
            search_aliases=["save lora", "convert to lora", "kohya", "extract lora"],
            is_output_node=True,
            inputs=[
                PersonalizedWire.Input(
                    "personalized", tooltip="From a training node or Load Personalization."
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The base it was trained on. Needed for PaRa and OFT, whose changes "
                    "depend on the base's weights; for others it is checked whether they fit.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="my subject",
                    tooltip="The file's name below output/loras; folders with /. A name that is "
                    "taken gets a number: no file is ever overwritten.",
                ),
                io.Combo.Input(
                    "full_weights",
                    options=[WHOLE, LOW_RANK],
                    default=WHOLE,
                    tooltip="How changes go that are not low-rank (DreamBooth, Attention, BNN over "
                    "full and oft). whole: exactly, for ComfyUI only. low rank: the nearest change "
                    "of 'rank', which any program reads.",
                ),
                io.Int.Input(
                    "rank",
                    default=64,
                    min=1,
                    max=1024,
                    tooltip="Of the nearest low-rank change. More: a truer and larger file. No "
                    "effect on what is low-rank already.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="report", tooltip="What was written, and how exact it is."
                ),
                io.String.Output(display_name="file", tooltip="Its name, as Load LoRA lists it."),
            ],
        )

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def execute(
        cls, personalized, filename_prefix, full_weights, rank, model=None
    ) -> io.NodeOutput:
        with at(cls, filename_prefix=filename_prefix, full_weights=full_weights, rank=rank):
            free_path(filename_prefix)  # says early what is wrong with the name
            export = exported(personalized, model, rank if full_weights == LOW_RANK else None)
            tensors = export.tensors()
            with reserved(filename_prefix) as path, atomic(path) as temporary:
                save_file(tensors, temporary, metadata(personalized.header, export, path.stem))
        file = path.relative_to(loras_root()).as_posix()
        text = report(personalized, export, file, path.stat().st_size)
        return io.NodeOutput(text, file, ui={"text": [text]})


def loras_root() -> Path:
    """Return the folder of exports, one of those where ComfyUI looks for LoRAs: output/loras."""
    return Path(os.path.realpath(folder_paths.get_output_directory())) / "loras"


def free_path(prefix: str) -> Path:
    """Return where a file goes that is not there yet; its folder is.

    Raises InputError for a name that leaves output/loras, or that no file can have everywhere.
    """
    *folders, name = prefix.removesuffix(".safetensors").split("/")
    try:
        for part in (*folders, name):
            check_name(part)
    except InputError as error:
        raise InputError(
            "filename_prefix",
            f"is '{brief(prefix, 100)}'; give a name of up to 80 letters, digits, spaces, dots, "
            "dashes or underscores, in folders below output/loras if you like: 'dogs/rex'.",
        ) from error
    root = loras_root()
    folder = Path(os.path.realpath(root.joinpath(*folders)))
    if not folder.is_relative_to(root):
        raise InputError(
            "filename_prefix",
            f"is '{brief(prefix, 100)}', which a link leads out of output/loras; choose another.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    names = (name if number == 1 else numbered(name, number) for number in count(1))
    paths = (folder / f"{name}.safetensors" for name in names)
    return next(path for path in paths if not os.path.lexists(path))


@contextmanager
def reserved(prefix: str) -> Iterator[Path]:
    """Give a path that no other process can be given meanwhile: an empty file is there.

    It goes again when the block fails.
    """
    while True:
        path = free_path(prefix)
        with suppress(FileExistsError):  # taken since
            path.touch(exist_ok=False)
            break
    try:
        yield path
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def exported(learned: Personalization, model: ModelPatcher | None, rank: int | None) -> Export:
    """Turn what was learned into what a LoRA file holds.

    rank: of the nearest change; None keeps changes whole.
    Raises InputError for what no LoRA file can hold, and for what does not fit the model.
    """
    edits = weight_edits(learned, model)
    if model is None and any(map(needs_base, edits.values())):
        raise InputError(
            "model",
            f"is not connected, but what {title(learned)} changes depends on the base's own "
            "weights; connect the base it was trained on.",
        )
    return as_lora(edits, None if model is None else weight_reader(model), rank)


def weight_edits(learned: Personalization, model: ModelPatcher | None) -> dict[str, Edit]:
    """Return the edits by site; without a model, by the names of their layers in files."""
    if model is not None:
        edits = fitting_edits(model, learned)
    else:
        edits, _ = learned.edits(sites_of(learned.tensors))
    weights = of_weights(edits)
    if len(weights) < len(edits):
        raise InputError(
            "personalized",
            f"is {title(learned)} with its time-aware adapter: modules that join the network, "
            "which no LoRA file can hold. Use it with Apply or Load Personalization, or train with "
            "'mode' attention, which can be exported.",
        )
    if not weights:
        raise InputError("personalized", "has no layer that a LoRA file can hold.")
    return weights


def report(learned: Personalization, export: Export, file: str, size: int) -> str:
    """Say in plain words what was written."""
    lines = [
        f"{title(learned)} after {learned.header.step} steps, {len(export.edits)} layers, "
        f"{size / 1e6:.1f} MB: output/loras/{file}"
    ]
    if export.losses:
        site, worst = export.worst
        lines.append(
            f"Of {len(export.losses)} layers the nearest change of its rank: relative error "
            f"{export.mean_error:.3f} on average, at most {worst:.3f} ({site}); of all that was "
            f"learned, {export.total_error:.3f}. Raise 'rank' for less."
        )
    else:
        lines.append("Exact.")
    if export.left_out:
        lines.append(f"{len(export.left_out)} biases and norms have no low rank and are left out.")
    if any(isinstance(edit, Difference) for edit in export.edits.values()):
        lines.append(
            "It holds whole weights, which ComfyUI's Load LoRA reads and many other programs do "
            "not; for those set 'full_weights' to low rank."
        )
    if export.bound:
        lines.append("It goes with the connected base only, patches on it included.")
    lines.append(f"Use these words in your prompt: {brief(learned.header.instance_prompt, 1000)}")
    return "\n".join(lines)
