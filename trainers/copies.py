"""How alike pictures are, without a judge: do samples copy the training pictures, or each other?

Ours, and crude on purpose: the correlation of two pictures at 32x32 pixels, each channel's mean
taken out. A copy gives 1, whatever its details; other poses and backgrounds give less.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32


def thumbnails(pictures: Tensor) -> Tensor:
    """Return pictures (N, 3, H, W) as (N, 3 * 32 * 32), mean 0 in every channel, norm 1.

    Of those that are not square, the square at the centre.
    """
    height, width = pictures.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    pictures = pictures[..., top : top + side, left : left + side]
    small = F.interpolate(pictures.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
    centred = small - small.mean((2, 3), keepdim=True)
    return F.normalize(centred.flatten(1), dim=1)


def nearest(samples: Tensor, pictures: Iterable[Tensor]) -> float:
    """Return the mean over samples of the correlation with the picture most like it: up to 1.

    samples: (N, 3, H, W); pictures: (3, H, W) each, of any sizes.
    """
    known = torch.cat([thumbnails(picture[None]) for picture in pictures])
    return float((thumbnails(samples) @ known.mT).amax(1).mean())


def diversity(groups: Sequence[Tensor]) -> float | None:
    """Return 1 - the mean correlation of two samples of one prompt: 0 when all are the same.

    groups: the samples of every prompt, (N, 3, H, W) each. None when each prompt has but one.
    """
    correlations = []
    for samples in groups:
        unit = thumbnails(samples)
        above = torch.triu_indices(len(unit), len(unit), 1)
        correlations.append((unit @ unit.mT)[above[0], above[1]])
    pairs = torch.cat(correlations) if correlations else torch.zeros(0)
    return 1 - float(pairs.mean()) if len(pairs) else None
