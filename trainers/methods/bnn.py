"""BNN: Bayesian fine-tuning against the corruption stage (arXiv 2405.19931, 2024).

    theta = mu + sigma * eps, eps ~ N(0, 1)       one sample per layer and step, shared by a batch
    L = E_q L_DM + lambda KL(q || p)              q = N(mu, sigma^2), p = N(theta_0, sigma_0^2)

Few-shot fine-tuning narrows what a network has learned: likeness rises, then pictures fill with
noisy patterns, then it copies. Weights that are random while training keep what is learned wide.
Afterwards mu is used: the file is a plain one, and pictures cost no more. Over a LoRA the up matrix
is random (mu = 0 at first), over full weights, or those of attention alone, a choice of layers,
over OFT the rotation. sigma learns as mu does. The paper has lambda = 0 by default, and takes
KL(q || p) in its Eq. 3 but KL(p || q) in its Algorithm 1.

Goes with APT (Train APT has these settings too), and not with PaRa, A3FT's adapter or BP/ZO, which
have no mean to keep or draw at random themselves.

Ours: attention's weights alone, sigma relative to a layer's weights, the choice between sum and
mean of the KL, OFT's block size, no weight decay, and noise that follows from the batch's seed
alone, so that gradient checkpointing meets the same weights twice.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from ..data import Batch
from ..denoiser import Denoiser
from ..edits import Edit
from ..errors import InputError
from ..free import Free, differences, set_free
from ..method import Objective, generator
from ..normal import normal_kl
from ..oft import rotations, set_rotations
from ..settings import knob, redeclared
from ..sites import layers_of, sites
from .dreambooth import FREE_LAYERS, free_layers
from .lora import INITS, LoRA, LoRASettings

FREE = {"full": "everything", "attention": "attention"}  # over -> which weights themselves learn
STREAM = 7  # of the noise on weights
LEAST_SIGMA = 1e-7
DRAWN_ON_CPU = 2**18  # numbers; more are drawn where the weight is
LINEAR = ("self-attention", "feed-forward", "projection")

# preset -> roles of the layers that may be random, their kinds, where they are
RANDOM: dict[str, tuple[tuple[str, ...], tuple[type[nn.Module], ...], str]] = {
    "linear": (LINEAR, (nn.Linear,), ""),
    "linear-up": (LINEAR, (nn.Linear,), "up_blocks."),
    "linear+cross": ((*LINEAR, "cross-attention"), (nn.Linear,), ""),
    "norm": (FREE_LAYERS["norms"], (nn.LayerNorm, nn.GroupNorm), ""),
}
# kind of trained layer -> where its own parameters are
HOSTS: dict[type[BaseTunerLayer], str] = {LoraLayer: "lora_B", OFTLayer: "oft_R", Free: "free"}


@dataclass(frozen=True)
class BNNSettings(LoRASettings):
    """Settings of Bayesian fine-tuning."""

    rank: int = redeclared(LoRASettings, "rank", default=4)
    learning_rate: float = knob(
        1e-4,
        "How far each step moves means and sigmas. Right for over = lora and oft; full weights "
        "need 5e-6, those of attention 1e-5.",
        min=0.0,
        max=1.0,
        step=1e-7,
    )
    weight_decay: float = knob(
        0.0,
        "Pull of the weights, and of sigma, towards zero. Leave at 0: kl_weight pulls to the base.",
        min=0.0,
        max=1.0,
        step=1e-3,
        advanced=True,
    )
    over: str = knob(
        "lora",
        "What learns. lora: a low-rank change; full: every weight; attention: every weight of "
        "attention; oft: a rotation of every linear layer's inputs.",
        choices=("lora", *FREE, "oft"),
    )
    sigma: float = knob(
        0.01,
        "Standard deviation of the noise on the weights at the start; it learns too. Too high: the "
        "result collapses. 0: none, plain training.",
        min=0.0,
        max=10.0,
        step=1e-3,
    )
    kl_weight: float = knob(
        0.0,
        "Lambda, the pull of means and sigmas towards where they started; the paper has 0, and 0.1 "
        "in its runs on SD 1.4.",
        min=0.0,
        max=1e6,
        step=0.01,
    )
    sigma_relative: bool = knob(
        False,
        "Take sigma as a share of the standard deviation of each base layer's weight, for bases "
        "whose weights are not as large as Stable Diffusion's (0.02 to 0.04). No effect on oft.",
        advanced=True,
    )
    kl_direction: str = knob(
        "posterior to prior",
        "posterior to prior: KL(q || p), the paper's Eq. 3; prior to posterior: KL(p || q), its "
        "Algorithm 1.",
        choices=("posterior to prior", "prior to posterior"),
        advanced=True,
    )
    kl_reduction: str = knob(
        "sum",
        "sum: over all random weights; mean: per weight, so that lambda does not depend on how "
        "many there are.",
        choices=("sum", "mean"),
        advanced=True,
    )
    random: str = knob(
        "linear",
        "Which layers are random where weights themselves learn. linear: of self-attention and "
        "feed-forward; linear-up: those of the decoder half; linear+cross: and of cross-attention; "
        "norm: only the norms, nearly as good and at no cost.",
        choices=tuple(RANDOM),
        advanced=True,
    )
    block_size: int = knob(
        32,
        "Over oft: how many inputs turn together. More: a freer, larger change.",
        min=2,
        max=1024,
        advanced=True,
    )
    init: str = knob(
        "gaussian",
        "How a LoRA's A starts. gaussian: 1 / rank wide, as in the paper; kaiming: as in peft, "
        "where noise on B reaches the weights many times weaker.",
        choices=tuple(INITS),
        advanced=True,
    )


class BNN(LoRA):
    name = "bnn"
    title = "BNN"
    Settings = BNNSettings
    settings: BNNSettings

    def __init__(self, settings: BNNSettings):
        super().__init__(settings)
        self._noise_facts: dict[str, float] = {}
        self._random: tuple[nn.Module, list[Posterior]] | None = None  # a network, and its own

    def adapt(self, unet: nn.Module) -> None:
        s = self.settings
        if s.kl_weight > 0 and s.sigma == 0:
            raise InputError(
                "kl_weight", f"is {s.kl_weight:g}, but 'sigma' is 0: no weight is random; set both."
            )
        named = random_layers(unet, s.random) if s.over in FREE else None
        if s.over in FREE:
            set_free(unet, free_layers(unet, FREE[s.over], "over"))
        elif s.over == "oft":
            set_rotations(unet, sites(unet, s.layers), s.block_size)
        else:
            super().adapt(unet)
        if s.sigma > 0:
            randomize(unet, named, s.sigma, s.sigma_relative and s.over != "oft")

    def random(self, unet: nn.Module) -> "list[Posterior]":
        """Return what is random in an adapted network, which is searched once."""
        if self._random is None or self._random[0] is not unet:
            self._random = unet, list(posteriors(unet))
        return self._random[1]

    def learned(self, unet: nn.Module) -> dict[str, Edit]:
        with drawn(unet, None):
            if self.settings.over in FREE:
                return differences(unet)
            if self.settings.over == "oft":
                return rotations(unet)
            return super().learned(unet)

    def loss(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """What is asked, of weights drawn with the batch's seed, and of how they are drawn.

        Where gradients are on, the network stays drawn until `update` ends: with checkpointing the
        backward pass computes it once more.
        """
        s, unet = self.settings, denoiser.unet
        if torch.is_grad_enabled():
            set_seed(self.random(unet), batch.seed)
            loss = super().loss(denoiser, batch)
        else:
            with drawn(unet, batch.seed):
                loss = super().loss(denoiser, batch)
        if s.kl_weight == 0:
            return loss
        kl = divergence_of(self.random(unet), s.kl_direction, s.kl_reduction)
        return loss + s.kl_weight * kl.to(loss.device)

    def update(self, objectives: Sequence[Objective], optimizer: torch.optim.Optimizer) -> Tensor:
        unet = objectives[0].denoiser.unet
        try:
            loss = super().update(objectives, optimizer)
        finally:
            set_seed(self.random(unet), None)
        self._noise_facts = self._facts_of_noise(self.random(unet))
        return loss

    @torch.no_grad()
    def _facts_of_noise(self, found: "list[Posterior]") -> dict[str, float]:
        s = self.settings
        if not found:
            return {}
        count = sum(p.mean.numel() for p in found)
        total = torch.stack([p.noise.spread().sum() for p in found]).cpu().double().sum()
        still = torch.stack([(p.noise.sigma <= LEAST_SIGMA).sum() for p in found]).sum()
        kl = divergence_of(found, s.kl_direction, s.kl_reduction)
        return {
            "kl": float(kl),
            "sigma": float(total) / count,
            "sigma_floor": float(still) / count,
        }

    def facts(self) -> dict[str, float]:
        return super().facts() | self._noise_facts


class Gaussian(nn.Module):
    """A parametrization that stands mu + sigma * eps in for a parameter mu.

    Whether noise is drawn is `seed`'s to say, and not the training flag's: a frozen U-Net is always
    in evaluation mode, and parametrizations take over that flag from their layer.
    """

    def __init__(self, mean: Tensor, sigma: float, index: int):
        super().__init__()
        self.sigma = nn.Parameter(torch.full_like(mean, sigma, dtype=torch.float32))
        self.prior_sigma = max(sigma, LEAST_SIGMA)
        self.index = index  # of this parameter in the network
        self.seed: int | None = None  # of the batch; None: no noise

    def spread(self) -> Tensor:
        """Return sigma, at least 1e-7, shaped like mu; one below learns no more."""
        return self.sigma.clamp(min=LEAST_SIGMA)

    def forward(self, mean: Tensor) -> Tensor:
        if self.seed is None:
            return mean
        return mean + self.spread() * self.noise(self.seed).to(mean)

    def noise(self, seed: int) -> Tensor:
        """Return the eps of a batch, N(0, 1): for one device always the same.

        Small parameters get the same on all devices; for large ones the CPU would take too long.
        """
        if self.sigma.is_meta:  # no generator there, and no numbers
            return torch.empty_like(self.sigma)
        source = generator(seed, STREAM, self.index)
        device = self.sigma.device if self.sigma.numel() > DRAWN_ON_CPU else source.device
        if device != source.device:
            source = torch.Generator(device).manual_seed(source.initial_seed())
        return torch.randn(self.sigma.shape, generator=source, device=device)


# Which weights are random


def random_layers(unet: nn.Module, preset: str) -> set[str]:
    """Name the layers of a plain U-Net that are random where their weights themselves learn.

    Raises InputError when there are none.
    """
    roles, kinds, place = RANDOM[preset]
    found = {
        name
        for name in layers_of(unet, roles)
        if name.startswith(place) and isinstance(unet.get_submodule(name), kinds)
    }
    if not found:
        raise InputError("random", f"is '{preset}', but this base has no such layers.")
    return found


def tuned_layers(unet: nn.Module) -> dict[str, Any]:
    """Return the layers that LoRA, OFT or full fine-tuning put in, by site."""
    return {name: m for name, m in unet.named_modules() if isinstance(m, tuple(HOSTS))}


def own_part(layer: Any) -> Any:
    """Return the part of a tuned layer whose parameters may be random."""
    attribute = next(HOSTS[kind] for kind in HOSTS if isinstance(layer, kind))
    return getattr(layer, attribute)["default"]


def randomize(unet: nn.Module, named: set[str] | None, sigma: float, relative: bool) -> None:
    """Make the parameters of tuned layers (all, or those named) random.

    relative: sigma is a share of the standard deviation of each base layer's weight.
    """
    index = 0
    for site, layer in tuned_layers(unet).items():
        if named is not None and site not in named:
            continue
        scale = 1.0
        if relative:
            scale = float(dequantize_module_weight(layer.base_layer).float().std(correction=0))
        part = own_part(layer)
        for name, mean in list(part.named_parameters()):
            register_parametrization(part, name, Gaussian(mean, sigma * scale, index))
            index += 1


def draw(unet: nn.Module, seed: int | None) -> None:
    """Draw weights with the noise of a batch from now on. None: weights are their means."""
    for module in unet.modules():
        if isinstance(module, Gaussian):
            module.seed = seed


@contextmanager
def drawn(unet: nn.Module, seed: int | None) -> Iterator[None]:
    """Inside, weights are drawn with the noise of a batch (None: they are their means)."""
    found = [module for module in unet.modules() if isinstance(module, Gaussian)]
    before = [gaussian.seed for gaussian in found]
    draw(unet, seed)
    try:
        yield
    finally:
        for gaussian, earlier in zip(found, before, strict=True):
            gaussian.seed = earlier


# How far they went


@dataclass(frozen=True)
class Posterior:
    """q of one parameter, and its prior's mean.

    Holds modules alone: their tensors may be moved, or let go of.
    """

    noise: Gaussian
    steps: Any  # from mu to what the layer computes with: torch's ParametrizationList
    name: str  # of the parameter
    base_layer: nn.Module | None  # whose parameter of that name is theta_0; None: zero

    @property
    def mean(self) -> Tensor:
        """Return mu."""
        return self.steps.original

    @property
    def prior_mean(self) -> Tensor | None:
        """Return theta_0, shaped like the mean; None: zero."""
        return self.base_layer.get_parameter(self.name) if self.base_layer is not None else None


def posteriors(unet: nn.Module) -> Iterator[Posterior]:
    """Yield every random parameter of a network."""
    for layer in tuned_layers(unet).values():
        part = own_part(layer)
        if not is_parametrized(part):
            continue
        base_layer = layer.base_layer if isinstance(layer, Free) else None
        for name, steps in part.parametrizations.items():
            yield Posterior(steps[0], steps, name, base_layer)


def set_seed(found: Iterable[Posterior], seed: int | None) -> None:
    """Draw what is random with the noise of a batch from now on. None: it is its mean."""
    for posterior in found:
        posterior.noise.seed = seed


def divergence(unet: nn.Module, direction: str, reduction: str) -> Tensor:
    """Return the KL divergence between the network's posterior and prior: scalar.

    direction: "posterior to prior" is KL(q || p). reduction: "sum" over all random weights, or
    their "mean".
    """
    return divergence_of(list(posteriors(unet)), direction, reduction)


def divergence_of(found: Sequence[Posterior], direction: str, reduction: str) -> Tensor:
    """Do the same for the random parameters of a network."""
    total, count = torch.zeros(()), 0
    for mean, sigma, prior_mean, prior_sigma in together(found):
        total = total.to(mean.device)
        if direction == "posterior to prior":
            kl = normal_kl(mean, sigma, prior_mean, prior_sigma)
        else:
            kl = normal_kl(prior_mean, prior_sigma, mean, sigma)
        total, count = total + kl.sum(), count + mean.numel()
    return total / max(count, 1) if reduction == "mean" else total


def together(found: Iterable[Posterior]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield mean and sigma, prior mean and prior sigma; parameters with one prior are joined.

    A network has hundreds of small ones, and every operation on each takes time.
    """
    alike: dict[float, list[Posterior]] = {}
    for posterior in found:
        mean, prior_mean = posterior.mean, posterior.prior_mean
        # a tensor on the device: CUDA divides by a number with a rounded reciprocal
        prior_sigma = mean.new_full((), posterior.noise.prior_sigma)
        if prior_mean is None:
            alike.setdefault(posterior.noise.prior_sigma, []).append(posterior)
        else:
            yield mean, posterior.noise.spread(), prior_mean.to(mean.dtype), prior_sigma
    for number, group in alike.items():
        mean = torch.cat([posterior.mean.flatten() for posterior in group])
        sigma = torch.cat([posterior.noise.sigma.flatten() for posterior in group])
        zero, prior_sigma = mean.new_zeros(()), mean.new_full((), number)
        yield mean, sigma.clamp(min=LEAST_SIGMA), zero, prior_sigma
