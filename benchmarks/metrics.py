"""Scores of pictures, each a pure function. Pictures are float (N, H, W, 3) in [0, 1]."""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.judges import AttributeReader, SubjectJudge, resized


@cache
def subject_judge() -> SubjectJudge:
    """Return the judge of who is in a picture."""
    return SubjectJudge.load()


@cache
def attribute_reader() -> AttributeReader:
    """Return the judge of what a picture shows."""
    return AttributeReader.load()


def subject_similarity(samples: Tensor, references: Tensor) -> float:
    """Return the mean cosine between samples and real pictures of the subject, in [-1, 1]."""
    return float(subject_judge().similarity(samples, references).mean())


def prompt_following(samples: Tensor, prompts: Sequence[str]) -> float:
    """Return the share of the named attributes that the samples show, in [0, 1]."""
    return attribute_reader().prompt_following(samples, list(prompts))


@torch.no_grad()
def features(pictures: Tensor) -> Tensor:
    """Return what the two judges see just before they judge: (N, 2, 192)."""
    pixels, reader = resized(pictures), attribute_reader()
    read = reader.hidden(reader.trunk(pixels).flatten(1)).relu()
    return torch.stack([subject_judge().features(pixels), read], 1)


def drift(samples: Tensor, reference: Tensor) -> float:
    """Return the mean over P prompts of the energy distance, (P, N, J, D) from (P, M, J, D).

    2 E|x - y| - E|x - x'| - E|y - y'| (Szekely & Rizzo 2013) of each prompt's N samples from its M
    reference ones, where the features of each of J judges are scaled to mean distance 1 within the
    whole reference. Two draws of one distribution give 0 on average, now and then less; sets that
    mix prompts would not, as their pairs of one prompt are fewer the smaller the set is. Chosen
    over KID for its light tails: samples are few.
    """
    found = []
    for x, y in zip(samples.unbind(2), reference.unbind(2), strict=True):  # (P, N, D), (P, M, D)
        energy = 2 * torch.cdist(x, y).mean() - distance_within(x) - distance_within(y)
        found.append(energy / distance_within(y.flatten(0, 1)))
    return float(torch.stack(found).mean())


def distance_within(points: Tensor) -> Tensor:
    """Return the mean distance of two different ones of (..., N, D), over all sets of N."""
    distances, count = torch.cdist(points, points), points.shape[-2]
    diagonal = distances.diagonal(dim1=-2, dim2=-1)
    return (distances.sum((-2, -1)) - diagonal.sum(-1)).mean() / (count * (count - 1))


@torch.no_grad()
def diversity(samples: Tensor, prompts: Sequence[str]) -> float:
    """Return the mean distance of two samples of one prompt, as LPIPS measures it.

    Squared distance of unit channel vectors, averaged over places (Zhang et al. 2018), in the last
    convolution of the attribute reader. Samples that are all alike: 0.
    """
    maps = attribute_reader().trunk(resized(samples))
    units = F.normalize(maps, dim=1).flatten(1) / maps[0, 0].numel() ** 0.5
    distances = torch.cdist(units, units) ** 2
    values = [
        distances[i, j] for i in range(len(prompts)) for j in range(i) if prompts[i] == prompts[j]
    ]
    return float(torch.stack(values).mean()) if values else float("nan")


def silhouettes(pictures: Tensor) -> Tensor:
    """Return what stands out from the background, (N, 32 * 32), mean 0 and norm 1."""
    edges = pictures[:, :, :4].mean(2, keepdim=True) + pictures[:, :, -4:].mean(2, keepdim=True)
    shown = ((pictures - edges / 2).abs().amax(-1) > 0.15).float()[:, None]
    flat = F.interpolate(shown, size=32, mode="area").flatten(1)
    return F.normalize(flat - flat.mean(1, keepdim=True), dim=1)


def nearest_silhouette(samples: Tensor, pictures: Tensor) -> float:
    """Return the mean over samples of the correlation with the silhouette most like it."""
    return float((silhouettes(samples) @ silhouettes(pictures).mT).amax(1).mean())


def noise_level(pictures: Tensor) -> Tensor:
    """Return the standard deviation of the noise in each picture, (N,), in 1/255.

    The median absolute diagonal Haar detail / 0.6745 (Donoho & Johnstone 1994): edges are few, so
    drawn patterns hardly count, but grain everywhere does.
    """
    a, b = pictures[:, 0::2, 0::2], pictures[:, 0::2, 1::2]
    c, d = pictures[:, 1::2, 0::2], pictures[:, 1::2, 1::2]
    details = (a - b - c + d) / 2
    return 255 * details.abs().flatten(1).median(1).values / 0.6745


def high_frequency_energy(pictures: Tensor) -> Tensor:
    """Return the mean square of what a 3x3 mean removes, of each picture, (N,)."""
    x = pictures.movedim(-1, 1)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return ((x - blurred) ** 2).flatten(1).mean(1)


def corruption_index(samples: Tensor, base: Tensor) -> float:
    """Return the log2 of the samples' high-frequency energy over the base's, of the same prompts.

    0: as the base; 1: twice the energy.
    """
    ratio = high_frequency_energy(samples).mean() / high_frequency_energy(base).mean()
    return float(torch.log2(ratio))
