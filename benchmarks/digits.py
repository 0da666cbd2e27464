"""Scanned handwritten digits: scikit-learn's 1,797, their parts, and a small network that reads."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COUNT = 1797
READER = 700  # pictures that the reader is trained on, and nothing else sees


def digits(side: int) -> tuple[Tensor, Tensor]:
    """Return the scans (1797, 1, side, side) in [-1, 1], shuffled, and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    scaled = F.interpolate(pixels, size=(side, side), mode="bilinear")
    return scaled[order], torch.tensor(found.target)[order]


@dataclass(frozen=True)
class Split:
    """The pictures of one seed, as many in each part; no two parts share one."""

    training: Tensor
    held_out: Tensor
    others: Tensor  # real ones to compare with the two; none in the split for tuning

    @classmethod
    def of(cls, pool: Tensor, seed: int, images: int) -> "Split":
        """Draw the parts."""
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        return cls(*(pool[order[i * images : (i + 1) * images]] for i in range(3)))


class Reader(nn.Module):
    """A small digit classifier; its penultimate features, scaled as a whole, are compared."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * (side // 4) ** 2, 64), nn.ReLU()),
        )
        self.head = nn.Linear(64, 10)
        self.scale = 1.0  # of the features of digits: root of their mean square

    @classmethod
    def trained(cls, pictures: Tensor, labels: Tensor, steps: int = 600) -> "Reader":
        """Train on pictures that are shifted by up to a pixel."""
        torch.manual_seed(0)
        reader = cls(pictures.shape[-1])
        optimiser = torch.optim.AdamW(reader.parameters(), 2e-3, weight_decay=0.05)
        for _ in range(steps):
            rows = torch.randint(len(pictures), (64,))
            shifts = tuple(torch.randint(-1, 2, (2,)).tolist())
            seen = pictures[rows].roll(shifts, (2, 3))
            loss = F.cross_entropy(reader.head(reader.trunk(seen)), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            reader.scale = float(reader.trunk(pictures).square().mean().sqrt())
        return reader.requires_grad_(False)

    def features(self, pictures: Tensor) -> Tensor:
        """Return (N, 64)."""
        return self.trunk(pictures.clamp(-1, 1)) / self.scale

    def accuracy(self, pictures: Tensor, labels: Tensor) -> float:
        """Return the share that is read rightly."""
        return float((self.head(self.trunk(pictures)).argmax(1) == labels).float().mean())

    def confidence(self, pictures: Tensor) -> float:
        """Return the mean of the largest probability: how much like digits they are."""
        probabilities = self.head(self.trunk(pictures.clamp(-1, 1))).softmax(1)
        return float(probabilities.max(1).values.mean())
