"""Unconditional bases in pixel space: load, train, apply, sample. A3FT in its paper's setting."""

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..trainers.data import PersonalData
from ..trainers.errors import InputError, brief
from ..trainers.methods import a3ft
from ..trainers.pixel_folder import is_unconditional, load_unconditional
from ..trainers.run import Run, check_name
from ..trainers.unconditional import (
    WITHOUT_EFFECT,
    Unconditional,
    UnconditionalSettings,
    pixel_data,
)
from .fit import FITS, fitted, opaque
from .load import STRENGTH, Load, report, runs_root
from .pixels import PixelBase, as_images, batches, check_memory, draw
from .request import unpack
from .session import Place, Session
from .train import LEARNED, MONITOR, NAME, described
from .widgets import check_widget, widget
from .wires import CATEGORY, PersonalizedWire, PixelDataWire, UnconditionalWire, at

PLACE = f"{CATEGORY}/unconditional"
BUILT_IN = "glyphs (built in)"
GLYPHS = Path(__file__).parent.parent / "demo" / "pixel_base"
DEPTH = 3  # folders below models/diffusers that are looked into
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
BASE = UnconditionalWire.Input("base", tooltip="From Load Unconditional Base.")
TUNED = UnconditionalWire.Output(
    display_name="base", tooltip="The base with what was learned, for Sample Unconditional."
)


class LoadBase(io.ComfyNode):
    """Load an unconditional base from a diffusers folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeLoadUnconditional",
            display_name="Load Unconditional Base",
            category=PLACE,
            description="Loads a diffusion model that draws pictures of one kind without a prompt "
            "(a diffusers UNet2DModel, such as a DDPM) from a folder in models/diffusers, or the "
            "small one that comes with the pack: white letters and figures, 16x16 pixels. Reads "
            "safetensors only. Press R to refresh the list.",
            search_aliases=["ddpm", "UNet2DModel", "load diffusers", "pixel diffusion"],
            inputs=[
                io.Combo.Input(
                    "base",
                    options=list(bases()),
                    tooltip="A folder in models/diffusers with a UNet2DModel and its schedule.",
                )
            ],
            outputs=[
                UnconditionalWire.Output(
                    display_name="base", tooltip="For Pixel Dataset, training and sampling."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, base):
        """Check the choice ourselves: the list in the page is older than the folders."""
        try:
            with at(cls):
                base_folder(base)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, base):
        """Load again when a file changed."""
        with at(cls):
            files = sorted(file for file in base_folder(base).rglob("*") if file.is_file())
        return str([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def execute(cls, base) -> io.NodeOutput:
        with at(cls):
            return io.NodeOutput(load_unconditional(base_folder(base)))


def bases() -> dict[str, Path]:
    """List what can be loaded, {name: folder}, the built-in base first."""
    found = {BUILT_IN: GLYPHS}
    for root in map(Path, folder_paths.get_folder_paths("diffusers")):
        for folder in unconditional_folders(root, DEPTH):
            found.setdefault(folder.relative_to(root).as_posix(), folder)
    return found


def unconditional_folders(root: Path, depth: int) -> Iterator[Path]:
    """Yield the folders below `root` that hold an unconditional network, links followed."""
    try:
        inside = sorted(folder for folder in root.iterdir() if folder.is_dir())
    except OSError:  # not there, or not ours to read
        return
    for folder in inside:
        if is_unconditional(folder):
            yield folder
        elif depth > 1:
            yield from unconditional_folders(folder, depth - 1)


def base_folder(name: str) -> Path:
    """Return a folder by its name in the list, and nothing else. Raises InputError."""
    known = bases()
    if name not in known:
        raise InputError(
            "base",
            f"is '{brief(name)}', but models/diffusers has no such unconditional base. There are: "
            f"{', '.join(list(known)[:10])}. Put a diffusers folder with a UNet2DModel there.",
        )
    return known[name]


class PixelDataset(io.ComfyNode):
    """Prepare pictures for an unconditional base."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizePixelDataset",
            display_name="Pixel Dataset",
            category=PLACE,
            description="Prepares pictures for training an unconditional base: brings them to its "
            "size and colours, and sets some aside to measure over-fitting. No captions, no VAE.",
            search_aliases=["training images", "unconditional dataset", "pixel training data"],
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="The pictures, as one batch or as a list of any sizes: some hundreds "
                    "of one kind.",
                ),
                BASE,
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default="crop",
                    tooltip="crop: scale the shorter side, cut the longer at its centre. pad: "
                    "scale the longer side, fill with the edge. as is: refuse other sizes.",
                ),
                io.Int.Input(
                    "hold_out",
                    default=0,
                    min=0,
                    max=100_000,
                    tooltip="How many pictures, counted from the end, are kept out of training to "
                    "measure on: the trainer reports the loss on them beside that of the base.",
                ),
            ],
            outputs=[
                PixelDataWire.Output(display_name="data", tooltip="For Train A3FT (Unconditional).")
            ],
        )

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def execute(cls, images, base, fit, hold_out) -> io.NodeOutput:
        with at(cls, fit=fit, hold_out=hold_out):
            pictures = unpack("images", images)
            return io.NodeOutput(prepare(pictures, base[0], fit[0], hold_out[0]))


def prepare(pictures: list[Tensor], base: Unconditional, fit: str, hold_out: int) -> PersonalData:
    """Bring pictures (H, W, 3 or 4) in [0, 1] to the base's size and channels.

    Raises InputError for sizes that 'as is' does not take, and when none is left to train on.
    """
    side = base.side
    if hold_out >= len(pictures):
        raise InputError(
            "hold_out",
            f"is {hold_out} of {len(pictures)} images, which leaves none to train on; give at "
            f"most {len(pictures) - 1}, or more images.",
        )
    odd = {f"{p.shape[1]}x{p.shape[0]}" for p in pictures if p.shape[:2] != (side, side)}
    if odd and fit == "as is":
        raise InputError(
            "images",
            f"has pictures of {', '.join(sorted(odd)[:6])} where the base takes {side}x{side} and "
            "'fit' is 'as is'; choose 'crop' or 'pad', or resize them.",
        )
    return pixel_data([as_pixels(p, side, fit, base.channels) for p in pictures], hold_out)


def as_pixels(picture: Tensor, side: int, fit: str, channels: int) -> Tensor:
    """Return a picture (H, W, 3 or 4) in [0, 1] as (channels, side, side) in [-1, 1]."""
    pixels = fitted(opaque(picture), side, fit).movedim(-1, 0)
    if channels == 1:
        pixels = torch.einsum("chw,c->hw", pixels, torch.tensor(GREY))[None]
    return (pixels * 2 - 1).clone()


class TrainUnconditional(io.ComfyNode):
    """Train an unconditional base on pictures of another kind."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        fields = [
            field
            for field in dataclasses.fields(UnconditionalSettings)
            if field.name not in WITHOUT_EFFECT
        ]
        return io.Schema(
            node_id="PersonalizeTrainUnconditional",
            display_name="Train A3FT (Unconditional)",
            category=f"{CATEGORY}/train",
            description=described(inspect.getdoc(a3ft) or ""),
            search_aliases=["train a3ft", "fine-tune ddpm", "domain adaptation", "few-shot"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            inputs=[
                BASE,
                PixelDataWire.Input("data", tooltip="From Pixel Dataset."),
                MONITOR,
                NAME,
                *map(widget, sorted(fields, key=lambda field: field.metadata["advanced"])),
            ],
            outputs=[TUNED, *LEARNED],
        )

    @classmethod
    @torch.inference_mode(False)  # tensors born in inference mode can never train
    def execute(cls, base, data, name, monitor=None, **settings) -> io.NodeOutput:
        with at(cls):
            check_name(name)
            method = a3ft.A3FT(UnconditionalSettings(**settings))
            session = Session(method, PixelBase(base), data, name, Place.of(cls), monitor)
            learned = session.train()
            tuned = base.apply(learned)
        summary = ui.PreviewText(session.summary(learned))
        return io.NodeOutput(tuned, learned, {"loss": session.losses}, ui=summary)


class ApplyUnconditional(io.ComfyNode):
    """Apply a personalisation that is already in the graph to an unconditional base."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeApplyUnconditional",
            display_name="Apply Personalization (Unconditional)",
            category=PLACE,
            description="Applies what Train A3FT (Unconditional) learned to a base, with a "
            "strength of your choice. The base that comes in is left as it is.",
            search_aliases=["apply a3ft", "use personalization"],
            inputs=[
                BASE,
                PersonalizedWire.Input("personalized", tooltip="From a training node or loader."),
                STRENGTH,
            ],
            outputs=[TUNED],
        )

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def execute(cls, base, personalized, strength) -> io.NodeOutput:
        with at(cls, strength=strength):
            return io.NodeOutput(base.apply(personalized, strength))


class LoadUnconditionalRun(io.ComfyNode):
    """Load a checkpoint of an earlier run for an unconditional base."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        alike = Load.define_schema()  # not inherited: ComfyUI keeps a node's types on its class
        return io.Schema(
            node_id="PersonalizeLoadUnconditionalRun",
            display_name="Load Personalization (Unconditional)",
            category=PLACE,
            description="Loads a checkpoint of an earlier training run and applies it to an "
            "unconditional base. Says what matched, and fails when nothing does. Press R to "
            "refresh the lists.",
            search_aliases=["load run", "load a3ft", "load checkpoint"],
            inputs=[BASE, *alike.inputs[1:]],
            outputs=[TUNED, *alike.outputs[1:]],
        )

    @classmethod
    def validate_inputs(cls, run):
        """Check the run ourselves: its list is older than the files."""
        try:
            with at(cls):
                Run.open(runs_root(), run)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, base=None, run="", checkpoint="", strength=1.0):
        """Load again when the file changed."""
        with at(cls):
            stat = Run.open(runs_root(), run).path(checkpoint).stat()
        return f"{run}/{checkpoint}/{stat.st_mtime_ns}/{stat.st_size}"

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def execute(cls, base, run, checkpoint, strength) -> io.NodeOutput:
        with at(cls):
            check_widget(STRENGTH, strength)
            learned = Run.open(runs_root(), run).load(checkpoint)
            tuned = base.apply(learned, strength)
        sites = len(base.matched(learned))
        text = report(learned, base.fingerprint(), sites, strength).splitlines()[0]
        return io.NodeOutput(tuned, text, learned, ui={"text": [text]})


class SampleUnconditional(io.ComfyNode):
    """Draw pictures with an unconditional base."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeSampleUnconditional",
            display_name="Sample Unconditional",
            category=PLACE,
            description="Draws pictures with an unconditional base, by DDIM on the base's own "
            "schedule. Picture n of a seed is the same whatever the count.",
            search_aliases=["ddim", "ddpm sampler", "generate without prompt"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                BASE,
                io.Int.Input("count", default=16, min=1, max=100_000, tooltip="How many pictures."),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=1000,
                    tooltip="Denoising steps of each picture: 20 for a look, 50 to 100 for good.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=True,
                    tooltip="Seeds the noise: the same seed gives the same pictures.",
                ),
                io.Float.Input(
                    "eta",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Noise added at every step: 0 is DDIM, 1 is DDPM.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The pictures, as a batch.")],
        )

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def execute(cls, base, count, steps, seed, eta) -> io.NodeOutput:
        with at(cls, count=count, steps=steps, seed=seed, eta=eta):
            if steps > (most := len(base.schedule.alphas_cumprod)):
                raise InputError("steps", f"is {steps}; this base has {most} at most.")
            check_memory(base, count)
        progress = comfy.utils.ProgressBar(steps * batches(base, count))
        drawn = draw(base, count, steps, seed, eta, lambda: progress.update(1))
        return io.NodeOutput(as_images(drawn))


NODES = [
    LoadBase,
    PixelDataset,
    TrainUnconditional,
    ApplyUnconditional,
    LoadUnconditionalRun,
    SampleUnconditional,
]
