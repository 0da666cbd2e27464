"""How a picture is brought to the size that is trained on: cropped, padded, or in a bucket."""

import math

import comfy.utils
import torch.nn.functional as F
from torch import Tensor

from ..trainers.data import Origin

FITS = ("crop", "pad", "as is")  # to a square
BUCKETS = "buckets"
MOST_RATIO = 2  # of a bucket's sides
STEP = 64  # pixels that the sides of buckets are multiples of: SD halves latents three times


def opaque(picture: Tensor) -> Tensor:
    """Return a picture (H, W, 3) in [0, 1], a copy on the CPU; transparency is laid on white."""
    picture = picture.cpu()
    colour, alpha = picture[..., :3].float(), picture[..., 3:].float()
    if picture.shape[-1] == 4:
        colour = colour * alpha + (1 - alpha)
    return colour.clamp(0, 1)


def fitted(picture: Tensor, side: int, fit: str) -> Tensor:
    """Bring a picture (H, W, 3) to (side, side, 3)."""
    return fitted_to(picture, (side, side), fit)


def fitted_to(picture: Tensor, size: tuple[int, int], fit: str) -> Tensor:
    """Bring a picture (H, W, 3) to a size, height first; "pad" only to squares."""
    height, width = picture.shape[:2]
    if (height, width) == size:
        return picture
    channels_first = picture.movedim(-1, 0)[None]
    if fit == "pad":
        channels_first = F.pad(channels_first, margins(height, width), mode="replicate")
    scaled = comfy.utils.common_upscale(channels_first, size[1], size[0], "lanczos", "center")
    return scaled[0].movedim(0, -1).clamp(0, 1)


def fitted_mask(mask: Tensor, picture: Tensor, size: tuple[int, int], fit: str) -> Tensor:
    """Bring the mask (h, w) of a picture (H, W, 3) to a size, as the picture; fillings are black.

    It may have another size than the picture, and is a whole picture's all the same.
    """
    whole = mask.cpu().float().clamp(0, 1)[None, None]
    height, width = picture.shape[:2]
    if whole.shape[2:] != (height, width):
        whole = F.interpolate(whole, (height, width), mode="bilinear", antialias=True).clamp(0, 1)
    if fit == "pad":
        whole = F.pad(whole, margins(height, width))
    return comfy.utils.common_upscale(whole, size[1], size[0], "area", "center")[0, 0]


def margins(height: int, width: int) -> tuple[int, int, int, int]:
    """Return what makes a square of a picture: left, right, top, bottom."""
    longest = max(height, width)
    top, left = (longest - height) // 2, (longest - width) // 2
    return left, longest - width - left, top, longest - height - top


def at_latent_places(weights: Tensor, latent: Tensor) -> Tensor:
    """Average what the pixels (H, W) count over the places of a latent (C, h, w): (h, w)."""
    return F.interpolate(weights[None, None], latent.shape[1:], mode="area")[0, 0]


def buckets(side: int) -> list[tuple[int, int]]:
    """Return the sizes (height, width) of about side^2 pixels, up to 2:1, the square first.

    Sides are multiples of 64 pixels; of less for small pictures, which would have no choice.
    """
    step = min(STEP, 1 << (side // 4).bit_length() - 1)
    square = max(step, side // step * step)
    found = [(square, square)]
    for longer in range(square + step, MOST_RATIO * side, step):
        shorter = round(side * side / longer / step) * step
        if longer <= MOST_RATIO * shorter:
            found += [(shorter, longer), (longer, shorter)]
    return found


def bucket_of(height: int, width: int, side: int) -> tuple[int, int]:
    """Return the bucket whose shape is nearest to that of a picture."""
    return min(buckets(side), key=lambda size: abs(math.log(size[0] * width / (size[1] * height))))


def origin_of(picture: Tensor, size: tuple[int, int], fit: str) -> Origin:
    """Tell where in a picture (H, W, 3) `fitted_to` cuts for a size; padding cuts nothing."""
    whole = height, width = picture.shape[0], picture.shape[1]
    if fit == "pad":
        return Origin(whole, (0.0, 0.0))
    cut = min(height, width * size[0] / size[1]), min(width, height * size[1] / size[0])
    return Origin(whole, ((height - cut[0]) / 2 / cut[0], (width - cut[1]) / 2 / cut[1]))
