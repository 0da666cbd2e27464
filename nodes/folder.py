"""Load Personal Images: a folder of pictures, upright and opaque, with their captions."""

import asyncio
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from comfy_api.latest import io, ui
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..trainers.errors import InputError, brief, reason_of
from ..trainers.run import inside
from .pictures import LARGEST, opened, read_caption, read_picture, scaled_size
from .wires import CATEGORY, at

NO_FOLDERS = "(no folders yet)"
PICTURES = {
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"),
    *(".gif", ".jfif"),
    *(".avif", ".heic", ".heif"),  # not every Pillow reads these: better named than skipped
}
LOOKED_INTO = 2**31  # pixels that are decoded before a prompt is queued, once for each file
ROOM = 0.8  # share of the free memory that the pictures may take


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
                ),
                io.Int.Input(
                    "shorter_side",
                    default=0,
                    min=0,
                    max=8192,
                    optional=True,
                    advanced=True,
                    tooltip="Scale larger pictures down while they are read, until their shorter "
                    "side has so many pixels. 0: as they are. For hundreds of pictures: Personal "
                    "Dataset's 'resolution', so that they fit into memory.",
                ),
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
    async def validate_inputs(cls, folder):
        """Look at the files before anything runs: the page's list is older than the folder."""
        try:
            with at(cls):
                await asyncio.to_thread(lambda: preflight(picture_files(folder)))
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder, shorter_side=0):
        """Load again when a file came, went or changed."""
        with at(cls):
            files = sorted(inside_input(folder).iterdir())
        return str([shorter_side, *((f.name, *version(f)) for f in files if f.is_file())])

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def execute(cls, folder, shorter_side=0) -> io.NodeOutput:
        with at(cls, shorter_side=shorter_side):
            pictures = load(picture_files(folder), shorter_side)
        captions = [picture.caption for picture in pictures]
        told = summary(pictures)
        return io.NodeOutput([p.pixels for p in pictures], captions, ui=ui.PreviewText(told))


@dataclass(frozen=True)
class Picture:
    """A picture and what its text file says."""

    name: str
    pixels: Tensor  # (1, H, W, 3) in [0, 1]
    caption: str


def summary(pictures: list[Picture]) -> str:
    """Say what was loaded, and which pictures are the same."""
    sizes = sorted({f"{p.pixels.shape[2]}x{p.pixels.shape[1]}" for p in pictures})
    captioned = sum(bool(picture.caption) for picture in pictures)
    told = f"{len(pictures)} pictures, {captioned} with a caption, "
    told += f"of {', '.join(sizes[:6])}{', …' if len(sizes) > 6 else ''} pixels"
    same = "; ".join(f"{later} is {first}" for first, later in twins(pictures))
    return f"{told}. The same picture twice: {brief(same, 1000)}" if same else told


def twins(pictures: list[Picture]) -> list[tuple[str, str]]:
    """Return (name of the first, name of the later) of pictures that are equal in every pixel."""
    seen: dict[bytes, str] = {}
    found = []
    for picture in pictures:
        digest = hashlib.sha256(picture.pixels.numpy().tobytes()).digest()
        digest += str(picture.pixels.shape).encode()
        if digest in seen:
            found.append((seen[digest], picture.name))
        seen.setdefault(digest, picture.name)
    return found


def inside_input(folder: str) -> Path:
    """Return the path of a folder. Raises InputError when it leaves the input folder."""
    root = os.path.realpath(folder_paths.get_input_directory())
    try:
        path = os.path.realpath(os.path.join(root, folder))
    except ValueError:  # null bytes, and what no file system can write
        path = root
    if not inside(Path(root), Path(path)) or not os.path.isdir(path):
        there = ", ".join(folder_paths.get_input_subfolders()[:10]) or "none yet"
        raise InputError(
            "folder",
            f"is '{brief(folder)}', but ComfyUI's input folder has no such folder. There are: "
            f"{there}. Put your pictures into a folder there.",
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


# Before anything runs


_good: dict[Path, tuple[int, int]] = {}  # files that were decoded, in the version that was


def version(file: Path) -> tuple[int, int]:
    """Return what changes when a file does."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def preflight(files: list[Path]) -> None:
    """Raise InputError naming every file that can not be used; decodes no more than LOOKED_INTO."""
    left = LOOKED_INTO
    problems = []
    for file in files:
        with noted(file, problems):
            read_caption(file)
            with opened(file) as image:
                left -= image.width * image.height
                if left > 0 and _good.get(file) != version(file):
                    image.load()
                    _good[file] = version(file)
    refuse(problems, len(files))


@contextmanager
def noted(file: Path, problems: list[str]) -> Iterator[None]:
    """Go on after a file that can not be used, with the reason among `problems`."""
    try:
        yield
    except UnidentifiedImageError:
        problems.append(f"{file.name} (not a picture of a kind that can be read here)")
    except Image.DecompressionBombError:
        problems.append(f"{file.name} (more than {LARGEST // 10**6} million pixels)")
    except Exception as error:  # Pillow's readers of formats raise whatever they meet
        problems.append(f"{file.name} ({reason_of(error) if is_of_system(error) else error})")


def is_of_system(error: Exception) -> bool:
    """Tell an error that would show a folder from one of Pillow's."""
    return isinstance(error, OSError) and error.errno is not None


def refuse(problems: list[str], count: int) -> None:
    """Raise InputError when there are problems, with all of them."""
    if problems:
        raise InputError(
            "folder",
            f"has {len(problems)} of {count} pictures that can not be used: "
            f"{'; '.join(problems)}. Replace or remove them.",
        )


# Reading


def load(files: list[Path], shorter_side: int = 0) -> list[Picture]:
    """Read pictures and captions. Raises InputError naming every file that can not be used, or
    when all of them together do not fit into memory.
    """
    pictures: list[Picture] = []
    problems: list[str] = []
    check_memory(files, shorter_side)
    for file in files:
        with noted(file, problems):
            pixels = read_picture(file, shorter_side)
            pictures.append(Picture(file.name, pixels, read_caption(file)))
        if problems:  # what is read from now on is only looked at
            pictures.clear()
        comfy.model_management.throw_exception_if_processing_interrupted()
    refuse(problems, len(files))
    return pictures


def check_memory(files: list[Path], shorter_side: int) -> None:
    """Raise InputError when the pictures would not fit into the memory that is free."""
    needed = 0
    for file in files:
        with noted(file, []), opened(file) as image:
            width, height = scaled_size(image.size, shorter_side)
            needed += width * height * 3 * 4
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    if needed > ROOM * free:
        raise InputError(
            "shorter_side",
            f"is {shorter_side}, at which {len(files)} pictures take {needed / 1e9:.1f} GB of "
            f"memory, and {free / 1e9:.1f} GB are free; give the 'resolution' of Personal Dataset.",
        )
