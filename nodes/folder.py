"""Load Personal Images: a folder of pictures, upright and opaque, with their captions."""

import os
from dataclasses import dataclass
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..trainers.errors import InputError
from .wires import CATEGORY, at

NO_FOLDERS = "(no folders yet)"
PICTURES = {
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif"),  # not every Pillow reads these: better named than skipped
}
SMALLEST = 64  # pixels: below it is a thumbnail, and the smallest training resolution


class Folder(io.ComfyNode):
    """Load the pictures of a folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeImageFolder",
            display_name="Load Personal Images",
            category=CATEGORY,
            description="Loads all pictures of a folder in ComfyUI's input folder, of any sizes, "
            "sorted by name: turned upright as the camera noted it, transparency laid on white, "
            "each with the caption in the text file of the same name. Names every file that can "
            "not be read. Press R to refresh the list.",
            search_aliases=["load folder", "load images", "image folder", "training images"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=folder_paths.get_input_subfolders() or [NO_FOLDERS],
                    tooltip="A folder inside ComfyUI's input folder. Put your pictures there, and "
                    "press R here.",
                )
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    is_output_list=True,
                    tooltip="The pictures, each in its own size, for Personal Dataset.",
                ),
                io.String.Output(
                    display_name="captions",
                    is_output_list=True,
                    tooltip="One per picture, empty where there is no text file.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder):
        """Check the choice ourselves: the list in the page is older than the folder."""
        try:
            with at(cls):
                picture_files(folder)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder):
        """Load again when a file came, went or changed."""
        with at(cls):
            files = sorted(inside_input(folder).iterdir())
        return str([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files])

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def execute(cls, folder) -> io.NodeOutput:
        with at(cls):
            pictures = load(picture_files(folder))
        captions = [picture.caption for picture in pictures]
        sizes = sorted({f"{p.pixels.shape[2]}x{p.pixels.shape[1]}" for p in pictures})
        told = f"{len(pictures)} pictures, {sum(map(bool, captions))} with a caption, "
        told += f"of {', '.join(sizes[:6])}{', …' if len(sizes) > 6 else ''} pixels"
        return io.NodeOutput([p.pixels for p in pictures], captions, ui=ui.PreviewText(told))


@dataclass(frozen=True)
class Picture:
    """A picture and what its text file says."""

    pixels: Tensor  # (1, H, W, 3) in [0, 1]
    caption: str


def inside_input(folder: str) -> Path:
    """Return the path of a folder. Raises InputError when it leaves the input folder."""
    root = os.path.realpath(folder_paths.get_input_directory())
    path = os.path.realpath(os.path.join(root, folder))
    if not path.startswith(root + os.sep) or not os.path.isdir(path):
        there = ", ".join(folder_paths.get_input_subfolders()[:10]) or "none yet"
        raise InputError(
            "folder",
            f"is '{folder}', but ComfyUI's input folder has no such folder. There are: {there}. "
            f"Put your pictures into a folder in {root}.",
        )
    return Path(path)


def picture_files(folder: str) -> list[Path]:
    """List the pictures of a folder by name. Raises InputError when there is none."""
    path = inside_input(folder)
    files = [f for f in sorted(path.iterdir()) if f.is_file() and not f.name.startswith(".")]
    pictures = [f for f in files if f.suffix.lower() in PICTURES]
    if not pictures:
        raise InputError(
            "folder",
            f"is '{folder}', which has no picture directly in it ({len(files)} other files); "
            "put PNG, JPEG or WebP files there.",
        )
    return pictures


def load(files: list[Path]) -> list[Picture]:
    """Read pictures and captions. Raises InputError naming every file that can not be used."""
    pictures, problems = [], []
    for file in files:
        try:
            pictures.append(Picture(read_picture(file), read_caption(file)))
        except UnidentifiedImageError:
            problems.append(f"{file.name} (not a picture of a kind that can be read here)")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            problems.append(f"{file.name} ({error})")
    if problems:
        raise InputError(
            "folder",
            f"has {len(problems)} of {len(files)} pictures that can not be used: "
            f"{'; '.join(problems)}. Replace or remove them.",
        )
    return pictures


def read_picture(file: Path) -> Tensor:
    """Return the first frame, upright, transparency on white: (1, H, W, 3) in [0, 1]."""
    if file.stat().st_size == 0:
        raise ValueError("the file is empty")
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if min(image.size) < SMALLEST:
            raise ValueError(f"only {image.width}x{image.height} pixels, at least {SMALLEST}")
        return torch.from_numpy(opaque(image))[None]


def opaque(image: Image.Image) -> np.ndarray:
    """Return the colours on white, (H, W, 3) float32 in [0, 1]."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip to 8
        grey = np.asarray(image).astype(np.float32) / 65535
        return np.repeat(grey[..., None], 3, axis=2).clip(0, 1)
    if "A" not in image.getbands() and "transparency" not in image.info:
        return np.asarray(image.convert("RGB")).astype(np.float32) / 255
    rgba = np.asarray(image.convert("RGBA")).astype(np.float32) / 255
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    return colour * alpha + (1 - alpha)


def read_caption(file: Path) -> str:
    """Return the text beside a picture as one line; empty when there is none."""
    text = file.with_suffix(".txt")
    if not text.is_file():
        return ""
    try:
        return " ".join(text.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption {text.name} is not UTF-8 text") from error
