"""Edits: what a checkpoint does to a weight, as pure functions of that weight.

An edit is all that a loader needs: it knows nothing of methods, networks or ComfyUI. Convolutions
(out, in, kh, kw) are edited as matrices (out, in*kh*kw). A site is the path of a layer, for its
weight, or `<layer>.bias`. One site is no layer: `time_aware`, whose modules join the network.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from . import time_aware
from .time_aware import TimeAware


class Edit(Protocol):
    """One layer's learned change."""

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """Return the edited weight, shaped and typed like `weight`; strength 0 is `weight`."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file keeps, by suffix."""
        ...

    def fits(self, shape: torch.Size) -> bool:
        """Tell whether a weight of this shape can be edited."""
        ...


@dataclass(frozen=True)
class LowRank:
    """LoRA: W' = W + s (alpha / r) up @ down   (Hu et al. 2021, eq. 3)."""

    down: Tensor  # (r, in) or (r, in, kh, kw)
    up: Tensor  # (out, r) or (out, r, 1, 1)
    alpha: float
    suffixes: ClassVar = ("lora_down.weight", "lora_up.weight", "alpha")

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """Return (alpha / r) up @ down, (out, in*kh*kw), fp32."""
        product = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return (self.alpha / self.rank) * product

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        if strength == 0.0:
            return weight
        edited = weight.float() + strength * self.delta().to(weight.device).reshape(weight.shape)
        return edited.to(weight.dtype)

    def tensors(self) -> dict[str, Tensor]:
        alpha = torch.tensor(float(self.alpha))
        return dict(zip(self.suffixes, (self.down, self.up, alpha), strict=True))

    @classmethod
    def from_tensors(cls, down: Tensor, up: Tensor, alpha: Tensor) -> "LowRank":
        if down.ndim < 2 or up.ndim < 2 or up.shape[1] != down.shape[0] or not down.shape[0]:
            raise ValueError(f"up {tuple(up.shape)} and down {tuple(down.shape)} do not multiply")
        if alpha.numel() != 1:
            raise ValueError(f"alpha {tuple(alpha.shape)} is not one number")
        return cls(down, up, float(alpha))

    def fits(self, shape: torch.Size) -> bool:
        matrix = self.up.shape[0], self.down.flatten(1).shape[1]
        return len(shape) > 1 and matrix == (shape[0], shape[1:].numel())


@dataclass(frozen=True)
class RankReduction:
    """PaRa: W' = W - s Q Q^T W with Q = qr(B).Q   (Chen et al. 2025; s = 1 there)."""

    basis: Tensor  # B, (out, r)
    suffixes: ClassVar = ("para_basis",)

    def directions(self) -> Tensor:
        """Return Q, (out, r), fp32: an orthonormal basis of the removed output directions."""
        return torch.linalg.qr(self.basis.float()).Q

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        return remove_directions(weight, self.directions(), strength)

    def as_low_rank(self, weight: Tensor) -> LowRank:
        """Return the LoRA with the same effect on this very weight: up = -Q, down = Q^T W."""
        q = self.directions().to(weight.device)
        down = (q.mT @ weight.flatten(1).float()).reshape(-1, *weight.shape[1:])
        up = -q.reshape(*q.shape, *[1] * (weight.ndim - 2))
        return LowRank(down, up, alpha=float(q.shape[1]))

    def tensors(self) -> dict[str, Tensor]:
        return dict(zip(self.suffixes, (self.basis,), strict=True))

    @classmethod
    def from_tensors(cls, basis: Tensor) -> "RankReduction":
        if basis.ndim != 2:
            raise ValueError(f"basis {tuple(basis.shape)} is not a matrix")
        if not basis.shape[1] or not (basis.float().norm(dim=0) > 0).all():  # also catches NaN
            raise ValueError(f"basis {tuple(basis.shape)} has columns without a direction")
        if not independent(basis):
            raise ValueError(f"basis {tuple(basis.shape)} has columns that depend on each other")
        return cls(basis)

    def fits(self, shape: torch.Size) -> bool:
        out, rank = self.basis.shape
        return len(shape) > 1 and out == shape[0] and rank <= out


def independent(columns: Tensor, tolerance: float = 1e-5) -> bool:
    """Tell whether columns (out, r) span r directions: a QR takes others where they do not.

    tolerance: the sine of the angle between a column and those before it that counts as none.
    """
    if columns.shape[0] < columns.shape[1]:
        return False
    unit = columns.float() / columns.float().norm(dim=0)
    return bool((torch.linalg.qr(unit, mode="r").R.diagonal().abs() > tolerance).all())


def remove_directions(weight: Tensor, q: Tensor, strength: float = 1.0) -> Tensor:
    """Return W - s Q Q^T W, (out, r) Q: what is removed where its columns are orthonormal."""
    if strength == 0.0:
        return weight
    q, matrix = q.to(weight.device, torch.float32), weight.flatten(1).float()
    return (matrix - strength * (q @ (q.mT @ matrix))).reshape(weight.shape).to(weight.dtype)


@dataclass(frozen=True)
class CombinedReduction:
    """Several rank reductions as one change: W <- W - s C C^T W for each C in turn."""

    factors: tuple[Tensor, ...]  # C, (out, r) each

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        for factor in self.factors:
            weight = remove_directions(weight, factor, strength)
        return weight

    def fits(self, shape: torch.Size) -> bool:
        return len(shape) > 1 and all(len(factor) == shape[0] for factor in self.factors)


WAYS = ("concat", "sequential", "sum")


def combine(reductions: Sequence[RankReduction], how: str) -> CombinedReduction:
    """Combine the rank reductions that several subjects made of one weight.

    how: one of WAYS. concat removes the span of all, whatever the order. sequential applies each
    to what the former left (Chen et al. 2025; the order matters). sum adds up their changes
    (peft), so what two share is taken away twice. They agree iff the spans are orthogonal.
    """
    directions = [reduction.directions() for reduction in reductions]
    if how == "sequential":
        return CombinedReduction(tuple(directions))
    if how == "sum":  # sum of Q_i Q_i^T = C C^T with C = [Q_1 Q_2 ...]
        return CombinedReduction((torch.cat(directions, dim=1),))
    if how == "concat":
        return CombinedReduction((span(torch.cat(directions, dim=1)),))
    raise ValueError(f"how is {how!r}; give one of {', '.join(WAYS)}")


def span(columns: Tensor, tolerance: float = 1e-4) -> Tensor:
    """Return an orthonormal basis of the columns' span; shared directions count once.

    A QR would fill up with directions that nobody asked for where columns depend on each other.
    tolerance: angles (radians, about) below it are none.
    """
    u, sizes, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    return u[:, sizes > tolerance * sizes[0]].float()


@dataclass(frozen=True)
class Difference:
    """Free weights: W' = W + s D, for a weight or bias of any shape."""

    delta: Tensor
    suffixes: ClassVar = ("diff",)

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        if strength == 0.0:
            return weight
        return (weight.float() + strength * self.delta.to(weight.device)).to(weight.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return dict(zip(self.suffixes, (self.delta,), strict=True))

    @classmethod
    def from_tensors(cls, delta: Tensor) -> "Difference":
        return cls(delta)

    def fits(self, shape: torch.Size) -> bool:
        return self.delta.shape == shape


@dataclass(frozen=True)
class Rotation:
    """OFT: W' = W R^T, R = diag(R_1 .. R_k) orthogonal, R_i = (I - s S_i)(I + s S_i)^-1.

    The Cayley transform of skew-symmetric S_i (Qiu et al. 2023, section 4.1), on the inputs, as in
    peft. The strength scales S, so that every strength is a rotation.
    """

    skew: Tensor  # (k, b (b - 1) / 2), the upper triangles of S_i, row by row
    suffixes: ClassVar = ("oft_skew",)

    @property
    def block_size(self) -> int:
        return block_size_of(self.skew.shape[1])

    def blocks(self, strength: float = 1.0) -> Tensor:
        """Return R_i, (k, b, b), fp32."""
        b = self.block_size
        rows, columns = torch.triu_indices(b, b, 1, device=self.skew.device)
        upper = self.skew.new_zeros(len(self.skew), b, b, dtype=torch.float32)
        upper[:, rows, columns] = strength * self.skew.float()
        s, eye = upper - upper.mT, torch.eye(b, device=self.skew.device)
        return torch.linalg.solve(eye + s, eye - s, left=False)

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        if strength == 0.0:
            return weight
        r = self.blocks(strength).to(weight.device)
        inputs = weight.float().reshape(len(weight), *r.shape[:2])  # (out, k, b)
        rotated = torch.einsum("okb,kcb->okc", inputs, r)
        return rotated.reshape(weight.shape).to(weight.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return dict(zip(self.suffixes, (self.skew,), strict=True))

    @classmethod
    def from_tensors(cls, skew: Tensor) -> "Rotation":
        if skew.ndim != 2 or not skew.numel():
            raise ValueError(f"skew {tuple(skew.shape)} is not a matrix")
        b = block_size_of(skew.shape[1])
        if b * (b - 1) // 2 != skew.shape[1]:
            raise ValueError(f"skew {tuple(skew.shape)} does not hold upper triangles")
        return cls(skew)

    def fits(self, shape: torch.Size) -> bool:
        return len(shape) > 1 and len(self.skew) * self.block_size == shape[1:].numel()


def block_size_of(triangle: int) -> int:
    """Return b of b (b - 1) / 2 numbers above a diagonal."""
    return (1 + math.isqrt(1 + 8 * triangle)) // 2


KINDS = (LowRank, RankReduction, Difference, Rotation)


def to_tensors(edits: Mapping[str, Edit | TimeAware]) -> dict[str, Tensor]:
    """Name the tensors of edits by site, as LoRA files do (see `file_name`)."""
    return {
        file_name(site, suffix): tensor.detach().cpu().contiguous()
        for site, edit in edits.items()
        for suffix, tensor in edit.tensors().items()
    }


def file_name(site: str, suffix: str) -> str:
    """Return a tensor's name in a file: `lora_unet_<layer with _>.<suffix>`, `_b` for a bias.

    Of modules that join the network: `time_aware.<name>`.
    """
    if site == time_aware.SITE:
        return f"{site}.{suffix}"
    layer = site.removesuffix(".bias")
    return f"lora_unet_{layer.replace('.', '_')}.{suffix}{'_b' if layer != site else ''}"


def of_weights(edits: Mapping[str, Edit | TimeAware]) -> dict[str, Edit]:
    """Return the edits that change a weight: all but modules that join the network."""
    return {site: edit for site, edit in edits.items() if not isinstance(edit, TimeAware)}


def parameter_name(site: str) -> str:
    """Return the name of the parameter that a site stands for."""
    return site if site.endswith(".bias") else site + ".weight"


def from_tensors(
    tensors: dict[str, Tensor], sites: list[str]
) -> tuple[dict[str, Edit | TimeAware], list[str]]:
    """Read edits back for a network that has `sites`.

    Returns ({site: edit}, keys that belong to none of the sites).
    Raises ValueError when tensors do not belong together.
    """
    edits: dict[str, Edit | TimeAware] = {}
    left = dict(tensors)
    prefix = file_name(time_aware.SITE, "")
    own = {name[len(prefix) :]: left.pop(name) for name in tensors if name.startswith(prefix)}
    if own:
        edits[time_aware.SITE] = TimeAware.from_tensors(own)
    for site in sites:
        for kind in KINDS:
            names = [file_name(site, suffix) for suffix in kind.suffixes]
            if all(name in left for name in names):
                if site in edits:
                    raise ValueError(f"{site} is changed in two ways")
                try:
                    edits[site] = kind.from_tensors(*(left.pop(name) for name in names))
                except ValueError as error:
                    raise ValueError(f"{site}: {error}") from error
    return edits, sorted(left)
