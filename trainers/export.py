"""A personalisation as a LoRA file that other programs read.

What is low-rank goes as it is, and a rank reduction is a LoRA on the very base that it reduces:
up = -Q, down = Q^T W. Other changes of weights go whole (`.diff`, which ComfyUI reads), or as the
nearest change of a rank D_r = U U^T D, U the r first left-singular vectors (Eckart and Young 1936),
with the error |D - D_r| / |D|. Biases and norms have no such form. A module that joins the network
is no change of a weight: it can not be exported.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from .artifact import Header, modelspec
from .edits import Difference, Edit, LowRank, RankReduction, Rotation, file_name, to_tensors

WeightOf = Callable[[str], Tensor]  # site -> the base's own weight

# kohya's name of a base, by the family that a file was trained on
VERSIONS = {
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2": "sd_v2",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
}
# kohya's name of a setting -> ours
SETTINGS = {
    "ss_max_train_steps": "steps",
    "ss_learning_rate": "learning_rate",
    "ss_optimizer": "optimizer",
    "ss_lr_scheduler": "schedule",
    "ss_lr_warmup_steps": "warmup_steps",
    "ss_batch_size_per_device": "batch_size",
    "ss_gradient_accumulation_steps": "gradient_accumulation",
    "ss_seed": "seed",
    "ss_noise_offset": "noise_offset",
    "ss_min_snr_gamma": "min_snr_gamma",
    "ss_caption_dropout_rate": "caption_dropout",
    "ss_prior_loss_weight": "prior_weight",
}
PREFIX = file_name("", "").removesuffix(".")
# diffusers' reader loses the number of these two, but not of the names they have elsewhere
RENAMED = {"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}


@dataclass(frozen=True)
class Loss:
    """What of a layer's change is not in the file, squared Frobenius norms."""

    lost: float
    whole: float

    @property
    def relative(self) -> float:
        """|D - D_r| / |D|; 0 where nothing changed."""
        return (self.lost / self.whole) ** 0.5 if self.whole else 0.0


@dataclass(frozen=True)
class Export:
    """What a LoRA file holds."""

    edits: dict[str, LowRank | Difference]
    losses: dict[str, Loss]  # of the layers that are approximated
    left_out: dict[str, Loss]  # of the sites that have no low-rank form
    bound: bool  # to the base whose weights were used

    @property
    def mean_error(self) -> float:
        """Mean over the approximated layers."""
        return fmean(loss.relative for loss in self.losses.values())

    @property
    def worst(self) -> tuple[str, float]:
        """The layer with the largest error, and that."""
        site = max(self.losses, key=lambda name: self.losses[name].relative)
        return site, self.losses[site].relative

    @property
    def total_error(self) -> float:
        """|D - D_r| / |D| over all layers that are not exact, those left out included."""
        parts = [*self.losses.values(), *self.left_out.values()]
        return Loss(sum(p.lost for p in parts), sum(p.whole for p in parts)).relative

    @property
    def ranks(self) -> set[int]:
        """The ranks of its layers; none where all are whole."""
        return {edit.rank for edit in self.edits.values() if isinstance(edit, LowRank)}

    def tensors(self) -> dict[str, Tensor]:
        """Name the tensors as kohya does."""
        return {renamed(name): tensor for name, tensor in to_tensors(self.edits).items()}


def as_lora(edits: Mapping[str, Edit], weight_of: WeightOf | None, rank: int | None) -> Export:
    """Turn edits into what a LoRA file holds.

    weight_of: needed for what `needs_base`. rank: of the nearest change; None keeps changes whole.
    """
    kept: dict[str, LowRank | Difference] = {}
    losses: dict[str, Loss] = {}
    left_out: dict[str, Loss] = {}
    for site, edit in edits.items():
        if isinstance(edit, LowRank):
            kept[site] = edit
            continue
        weight = weight_of(site) if weight_of is not None and needs_base(edit) else None
        if isinstance(edit, RankReduction) and weight is not None:
            kept[site] = edit.as_low_rank(weight)
            continue
        delta = change(edit, weight)
        if rank is None:
            kept[site] = Difference(delta)
        elif delta.ndim < 2:
            whole = float(delta.double().square().sum())
            left_out[site] = Loss(whole, whole)
        else:
            kept[site], losses[site] = nearest(delta, rank)
    return Export(kept, losses, left_out, bound=any(map(needs_base, edits.values())))


def needs_base(edit: Edit) -> bool:
    """Tell whether a change depends on the weight that it changes."""
    return isinstance(edit, (RankReduction, Rotation))


def change(edit: Edit, weight: Tensor | None) -> Tensor:
    """Return W' - W, shaped like the weight, fp32."""
    if isinstance(edit, Difference):
        return edit.delta.float()
    assert weight is not None
    return edit.apply(weight.float()) - weight.float()


def nearest(delta: Tensor, rank: int) -> tuple[LowRank, Loss]:
    """Return the change of at most `rank` that is nearest to D, (out, in) or (out, in, kh, kw).

    The singular vectors are the eigenvectors of D D^T or D^T D, whichever is smaller.
    """
    matrix = delta.detach().flatten(1).double().cpu()
    rank = min(rank, *matrix.shape)
    tall = matrix.shape[0] > matrix.shape[1]
    gram = matrix.mT @ matrix if tall else matrix @ matrix.mT
    first = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    up, down = (matrix @ first, first.mT) if tall else (first, first.mT @ matrix)
    lost = float((matrix - up @ down).square().sum())
    low_rank = LowRank(
        down.float().reshape(rank, *delta.shape[1:]),
        up.float().reshape(-1, rank, *[1] * (delta.ndim - 2)),
        alpha=float(rank),
    )
    return low_rank, Loss(lost, float(matrix.square().sum()))


def renamed(name: str) -> str:
    """Return the name that all readers know."""
    layer, _, suffix = name.partition(".")
    own = layer.removeprefix(PREFIX)
    return f"{PREFIX}{RENAMED.get(own, own)}.{suffix}"


def sites_of(names: Iterable[str]) -> list[str]:
    """List the sites that tensors in a file may belong to, layers with _ for dots."""
    layers = {
        name.partition(".")[0].removeprefix(PREFIX) for name in names if name.startswith(PREFIX)
    }
    return [site for layer in sorted(layers) for site in (layer, f"{layer}.bias")]


def metadata(header: Header, export: Export, name: str) -> dict[str, str]:
    """Return the standard metadata of a LoRA file: modelspec's, and kohya's about its training.

    name: of the file.
    """
    family = str(header.base.get("family", "unknown"))
    alphas = {edit.alpha for edit in export.edits.values() if isinstance(edit, LowRank)}
    known = {key: header.settings[own] for key, own in SETTINGS.items() if own in header.settings}
    return {
        **modelspec(header),
        "modelspec.architecture": f"{family}/lora",
        "modelspec.description": f"{header.method}, {header.step} steps, made with Personalize",
        "ss_base_model_version": VERSIONS.get(family, family),
        "ss_v2": str(family == "stable-diffusion-v2"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": one_of(export.ranks),
        "ss_network_alpha": one_of(alphas),
        "ss_steps": str(header.step),
        "ss_output_name": name,
        "ss_training_comment": f"{header.method} by Personalize",
        **{key: str(value) for key, value in known.items()},
    }


def one_of(values: set) -> str:
    """Return the only value, or what kohya writes for several."""
    return str(*values) if len(values) < 2 else "Dynamic"
