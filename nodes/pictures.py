"""Read pictures as people see them, and the captions beside them; say what is of no use."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import folder_paths
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SMALLEST = 64  # pixels: below it is a thumbnail, and the smallest training resolution
LARGEST = 2**27  # pixels; 16k x 8k
LONGEST_CAPTION = 20_000  # bytes
ROWS = 1024  # that are turned to floats at once


@contextmanager
def opened(file: Path) -> Iterator[Image.Image]:
    """Open a picture, whose pixels are not read yet. Raises ValueError for one of no use."""
    root = os.path.realpath(folder_paths.get_input_directory())
    if file.is_symlink() and not os.path.realpath(file).startswith(root + os.sep):
        raise ValueError("a link out of ComfyUI's input folder")
    if file.stat().st_size == 0:
        raise ValueError("the file is empty")
    with Image.open(file) as image:
        width, height = image.size
        if min(width, height) < SMALLEST:
            raise ValueError(f"only {width}x{height} pixels, at least {SMALLEST}")
        if width * height > LARGEST:
            raise ValueError(f"{width}x{height}: more than {LARGEST // 10**6} million pixels")
        if image.mode == "F":
            raise ValueError("numbers without a range; save it with 8 or 16 bits")
        yield image


def read_caption(file: Path) -> str:
    """Return the text beside a picture as one line; empty when there is none."""
    text = file.with_suffix(".txt")
    if not text.is_file():
        return ""
    if text.is_symlink() and text.resolve().parent != file.resolve().parent:
        raise ValueError(f"its caption {text.name} is a link out of the folder")
    if text.stat().st_size > LONGEST_CAPTION:
        kilobytes = text.stat().st_size / 1000
        raise ValueError(f"its caption {text.name} has {kilobytes:.0f} kB, at most 20")
    try:
        return " ".join(text.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption {text.name} is not UTF-8 text") from error


def read_picture(file: Path, shorter_side: int = 0) -> Tensor:
    """Return the first frame, upright, transparency on white: (1, H, W, 3) in [0, 1]."""
    with opened(file) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return torch.from_numpy(opaque(shrunk(image, shorter_side)))[None]


def scaled_size(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    """Return (width, height) after scaling down; `shorter_side` 0 leaves them."""
    width, height = size
    scale = shorter_side / min(size) if shorter_side else 1.0
    return (round(width * scale), round(height * scale)) if scale < 1 else (width, height)


def shrunk(image: Image.Image, shorter_side: int) -> Image.Image:
    """Scale a picture down."""
    size = scaled_size(image.size, shorter_side)
    if size == image.size:
        return image
    if image.mode.startswith("I"):
        return image.convert("I").convert("F").resize(size, Image.Resampling.LANCZOS)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return image.resize(size, Image.Resampling.LANCZOS)


def opaque(image: Image.Image) -> np.ndarray:
    """Return the colours on white, (H, W, 3) float32 in [0, 1]."""
    found = np.empty((image.height, image.width, 3), np.float32)
    for top in range(0, image.height, ROWS):  # so that little is held besides the picture itself
        rows = image.crop((0, top, image.width, min(image.height, top + ROWS)))
        found[top : top + ROWS] = kind_of(rows)(rows)
    return found


def kind_of(image: Image.Image) -> Callable[[Image.Image], np.ndarray]:
    """Return what turns a picture of this mode to colours."""
    if image.mode.startswith(("I", "F")):
        return sixteen_bits
    if "A" in image.getbands() or "transparency" in image.info:
        return on_white
    return lambda rows: np.asarray(rows.convert("RGB")).astype(np.float32) / 255


def sixteen_bits(image: Image.Image) -> np.ndarray:
    """Read 16 bits a pixel, which convert() would clip to 8."""
    grey = np.asarray(image).astype(np.float32) / 65535
    return np.repeat(grey[..., None], 3, axis=2).clip(0, 1)


def on_white(image: Image.Image) -> np.ndarray:
    rgba = np.asarray(image.convert("RGBA")).astype(np.float32) / 255
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    return colour * alpha + (1 - alpha)
