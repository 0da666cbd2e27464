"""How far two sets of features are apart, (N, D) and (M, D)."""

import torch
from torch import Tensor


def fid(x: Tensor, y: Tensor) -> float:
    """Return the Frechet distance of the two Gaussians fitted (Heusel et al. 2017).

    |mx - my|^2 + tr(Sx + Sy - 2 (Sx^1/2 Sy Sx^1/2)^1/2). Small sets make it too large.
    """
    x, y = x.double(), y.double()
    sx, sy = x.T.cov(), y.T.cov()
    root = square_root(sx)
    mixed = torch.linalg.eigvalsh(root @ sy @ root).clamp(min=0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + sx.trace() + sy.trace() - 2 * mixed)


def square_root(matrix: Tensor) -> Tensor:
    """Return the root of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """Return the unbiased squared MMD with k(a, b) = (a.b / D + 1)^3: 0 on average for equals."""
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    return float(within(kernel(x, x)) + within(kernel(y, y)) - 2 * kernel(x, y).mean())


def kid(x: Tensor, y: Tensor, subsets: int = 100, size: int = 100) -> tuple[float, float]:
    """Return mean and standard deviation of the squared MMD over subsets (Binkowski et al. 2018).

    Subsets are seeded; each has at most half of the smaller set.
    """
    rng = torch.Generator().manual_seed(0)
    size = min(size, len(x) // 2, len(y) // 2)

    def some(z: Tensor) -> Tensor:
        return z[torch.randperm(len(z), generator=rng)[:size]]

    values = torch.tensor([squared_mmd(some(x), some(y)) for _ in range(subsets)])
    return float(values.mean()), float(values.std())


def nearest(x: Tensor, y: Tensor) -> float:
    """Return the mean over x of the root-mean-square difference to its nearest in y."""
    return float((torch.cdist(x, y).min(1).values / x.shape[1] ** 0.5).mean())
