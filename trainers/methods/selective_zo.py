"""Selective BP/ZO: memory-efficient personalisation (Park et al. 2025, arXiv 2507.10029).

Every step is one of two. BP-low: back-propagation on small pictures, which learns fast and
distorts structure. ZO-high: zeroth-order optimisation on the pictures at their own size, which
keeps no activations, mends structure, and learns little from scratch. Chance decides, by timestep
and progress: fewer BP-low at high timesteps, where structure is made, and more ZO-high as training
goes on. So much is the paper's. Of its formulas and numbers none could be read; ours are

    P_ZO(t, s) = sigmoid(kappa (t/T - c(s))),  s = step/steps,  c from 1.2 (s = 0) to 0.3 (s = 1)

drawn once per step, from the mean over its first timesteps; the size of BP-low; and all rates. The
zeroth-order step is MeZO's SPSA (Malladi et al. 2023, arXiv 2305.17333) over a LoRA:

    g = (L(theta + eps z) - L(theta - eps z)) / 2 eps,    theta <- theta - rate g z

on the same noise, timesteps and captions, with z from a seed, held for one step: a LoRA's is small.
It moves by its own plain SGD: no momentum, decay or clipping, the rate following the schedule; the
optimiser of BP-low does not notice it.

Over a LoRA only, and not with APT, BNN, PaRa or A3FT in one training: a direction tried at random
among many more numbers helps next to never, and a second forward pass takes back what is saved.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Batch, Example, PersonalData
from ..denoiser import Denoiser
from ..errors import InputError
from ..method import Draws, Objective, generator
from ..settings import knob
from .lora import LoRA, LoRASettings

# what may be chosen -> (resolution, zeroth order?), or None where chance decides
BRANCHES = {
    "selective": None,
    "bp-low": ("low", False),
    "zo-high": ("high", True),
    "bp-high": ("high", False),
}


# by bytes per number of the base: in bf16, slopes over 0.01 hardly agree with those of fp32
# (correlation .14 on a small network; .99 over 0.1)
EPSILON = {4: 1e-2, 2: 1e-1}


@dataclass(frozen=True)
class SelectiveZOSettings(LoRASettings):
    """Settings of Selective BP/ZO."""

    rank: int = knob(
        8,
        "Width of the low-rank change: more holds more detail, and makes ZO-high noisier.",
        min=1,
        max=1024,
    )
    branches: str = knob(
        "selective",
        "selective: chance decides each step, by timestep and progress. bp-low, zo-high: always "
        "this one. bp-high: back-propagation at full size, which needs all the memory.",
        choices=tuple(BRANCHES),
    )
    low_resolution: int = knob(
        0,
        "Shorter side in pixels of the pictures that BP-low sees. 0: half of theirs, rounded down "
        "to what the base takes.",
        min=0,
        max=4096,
    )
    zo_learning_rate: float = knob(
        5e-5,
        "How far a ZO-high step moves, per slope and direction. It follows the schedule too.",
        min=0.0,
        max=1.0,
        step=1e-6,
    )
    zo_epsilon: float = knob(
        0.0,
        "How far ZO-high looks to either side. Smaller: a truer slope, drowned by rounding sooner. "
        "0: 0.01 as in MeZO, but 0.1 over a half-precision base.",
        min=0.0,
        max=1.0,
        step=1e-3,
        advanced=True,
    )
    zo_estimator: str = knob(
        "spsa",
        "spsa: look to both sides along normal directions (MeZO), 2 forward passes per direction. "
        "one-sided: to one side along random signs, 1 each and 1 more.",
        choices=("spsa", "one-sided"),
        advanced=True,
    )
    perturbations: int = knob(
        1,
        "Directions that ZO-high averages over. More: truer and slower steps, same memory.",
        min=1,
        max=256,
        advanced=True,
    )
    zo_restore: str = knob(
        "copy",
        "How the weights come back after a look. copy: from a copy, exactly. in place: by "
        "subtraction, which needs no copy and leaves rounding errors.",
        choices=("copy", "in place"),
        advanced=True,
    )
    kappa: float = knob(
        10.0,
        "How sharply the choice turns with the timestep. 0: a coin.",
        min=0.0,
        max=1000.0,
        step=0.5,
        advanced=True,
    )
    threshold_start: float = knob(
        1.2,
        "Timestep (as a share of all) from which ZO-high is the likelier, at the first step.",
        min=-1000.0,
        max=1000.0,
        step=0.05,
        advanced=True,
    )
    threshold_end: float = knob(
        0.3,
        "The same at the last step; in between it goes in a straight line.",
        min=-1000.0,
        max=1000.0,
        step=0.05,
        advanced=True,
    )


@dataclass(frozen=True)
class Branched(Batch):
    """A batch, and how to learn from it."""

    zeroth_order: bool
    p_zo: float  # the probability that it would be


class SelectiveZO(LoRA):
    name = "selective_zo"
    title = "Selective BP/ZO"
    Settings = SelectiveZOSettings
    settings: SelectiveZOSettings

    def __init__(self, settings: SelectiveZOSettings):
        super().__init__(settings)
        # the data, and its pictures made small, by the identity of the large ones' pixels
        self.small: tuple[PersonalData, dict[int, Example]] | None = None
        self.last: dict[str, float] = {}

    def draw(self, data: PersonalData, denoiser: Denoiser, draws: Draws) -> Branched:
        """Draw timesteps, with them the branch of the whole step, with it the resolution."""
        fixed = BRANCHES[self.settings.branches]
        p_zo = float(fixed[1]) if fixed else self.step_p_zo(data, denoiser, draws)
        resolution, zeroth_order = fixed or (
            ("high", True) if coin(draws) < p_zo else ("low", False)
        )
        shown, prior = draws.shown(data, self.settings.batch_size)
        if resolution == "low":
            small = self.shrunk(data, denoiser)
            shown, prior = ([resized(e, small[id(e.pixels)]) for e in es] for es in (shown, prior))
        batch = self.batch_of(data, shown, prior, denoiser, draws)
        return Branched(**vars(batch), zeroth_order=zeroth_order, p_zo=p_zo)

    def step_p_zo(self, data: PersonalData, denoiser: Denoiser, draws: Draws) -> float:
        """Return the mean P_ZO over the subject's timesteps in the step's first batch.

        All batches of a step share it. What is drawn here is drawn again for the batch itself:
        timesteps come first, so they do not depend on the resolution.
        """
        first = Draws(draws.seed, draws.step, 0, self.settings.gradient_accumulation)
        batch = super().draw(data, denoiser, first)
        share = batch.timesteps[batch.of_subject] / denoiser.timestep_count
        return float(self.p_zo(share, draws.step / self.settings.steps).mean())

    def p_zo(self, share: Tensor, progress: float) -> Tensor:
        """Return P_ZO at t/T = `share` (B,) when `progress`, in [0, 1], of the steps are done."""
        s = self.settings
        threshold = s.threshold_start + (s.threshold_end - s.threshold_start) * progress
        return torch.sigmoid(s.kappa * (share - threshold))

    def shrunk(self, data: PersonalData, denoiser: Denoiser) -> dict[int, Example]:
        """Return the pictures at the low resolution, encoded at the first call and kept.

        By the identity of their large pixels.
        """
        if self.small is None or self.small[0] is not data:
            low = shrunk(data, self.settings.low_resolution, denoiser.size_multiple)
            pairs = zip(data.drawn(), low.drawn(), strict=True)
            self.small = data, {id(large.pixels): small for large, small in pairs}
        return self.small[1]

    def update(self, objectives: Sequence[Objective], optimizer: torch.optim.Optimizer) -> Tensor:
        """Back-propagate, or estimate and descend with forward passes alone."""
        batch = objectives[0].batch
        assert isinstance(batch, Branched)
        self.last = {"branch": float(batch.zeroth_order), "p_zo": batch.p_zo}
        if not batch.zeroth_order:
            return super().update(objectives, optimizer)
        optimizer.zero_grad(set_to_none=True)  # gradients of the last BP step are memory
        self.moving = True
        loss, slopes = self.zeroth_order_step(objectives, optimizer, batch.seed)
        # E[(g z)^2] = |g|^2: the root mean square estimates the gradient's norm
        self.gradient_norm = self.last["projected_gradient"] = float(slopes.square().mean().sqrt())
        return loss

    @torch.no_grad()
    def zeroth_order_step(
        self, objectives: Sequence[Objective], optimizer: torch.optim.Optimizer, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Step against the estimated gradient; return the loss and the slopes (perturbations,).

        A loss that is not finite makes the returned one NaN, and no step is taken.
        """
        s = self.settings
        groups = optimizer.param_groups
        point = Point([p for g in groups for p in g["params"]], s.zo_restore == "copy")
        directions = [
            Directions(point.parameters, seed, index, signs=s.zo_estimator == "one-sided")
            for index in range(s.perturbations)
        ]

        def loss() -> Tensor:
            return torch.stack([objective() for objective in objectives]).mean()

        estimate = spsa if s.zo_estimator == "spsa" else one_sided
        epsilon = s.zo_epsilon or EPSILON[objectives[0].denoiser.dtype.itemsize]
        mean, slopes = estimate(loss, point, directions, epsilon)
        if not (mean + slopes.sum()).isfinite():
            return mean * torch.nan, slopes
        # a schedule sets the rate of BP-low; ZO-high's goes along in proportion
        scale = groups[0]["lr"] / s.learning_rate if s.learning_rate else 1.0
        for direction, slope in zip(directions, slopes.tolist(), strict=True):
            point.move(direction, -s.zo_learning_rate * scale * slope / len(directions))
        return mean, slopes

    def facts(self) -> dict[str, float]:
        """Return the branch (0 BP, 1 ZO), P_ZO, and of ZO the slope (over several: its rms)."""
        return self.last


def coin(draws: Draws) -> float:
    """Draw the number in [0, 1) that decides the branch of a step."""
    return float(torch.rand((), generator=generator(draws.seed, 9, draws.step)))


# The pictures of BP-low


def shrunk(data: PersonalData, low: int, size_multiple: int) -> PersonalData:
    """Return the training and prior pictures with shorter sides of `low` pixels, encoded anew.

    low: 0 is half, rounded down. size_multiple: of latents, in the base.
    Raises InputError when the base does not take that size.
    """

    small = replace(data, held_out=()).changed(
        lambda example: shrunk_example(example, data, low, size_multiple)
    )
    return replace(small, held_out=data.held_out)


def resized(example: Example, small: Example) -> Example:
    """Return an example as it is worded, with a smaller picture."""
    return replace(example, pixels=small.pixels, latent=small.latent, mask=small.mask)


def shrunk_example(example: Example, data: PersonalData, low: int, size_multiple: int) -> Example:
    height, width = example.pixels.shape[1:]
    shorter = min(height, width)
    multiple = shorter // min(example.latent.shape[1:]) * size_multiple  # in pixels
    side = low or max(multiple, shorter // 2 // multiple * multiple)
    size = round(height * side / shorter), round(width * side / shorter)
    if side > shorter or side % multiple:
        raise InputError(
            "low_resolution",
            f"is {low}, which makes pictures of {width}x{height} ones that are "
            f"{size[1]}x{size[0]}; give a multiple of {multiple} below {shorter}, or 0.",
        )
    pixels = F.interpolate(example.pixels[None], size, mode="bicubic", antialias=True).clamp(-1, 1)
    pixels = middle(pixels, multiple)
    latent, mask = data.encode(pixels)[0], example.mask
    if mask is not None:
        whole = middle(F.interpolate(mask[None, None], size, mode="bilinear"), multiple)
        mask = F.interpolate(whole, latent.shape[1:], mode="area")[0, 0]
    return replace(example, pixels=pixels[0], latent=latent, mask=mask)


def middle(pixels: Tensor, multiple: int) -> Tensor:
    """Cut pixels (N, C, H, W) at the edges until both sides are a multiple of some pixels."""
    for axis in (2, 3):
        length = pixels.shape[axis]
        rest = length % multiple
        pixels = pixels.narrow(axis, rest // 2, length - rest)
    return pixels


# Zeroth order

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Directions:
    """One direction z through all parameters: made when asked for, the same each time.

    signs: of random signs instead of normal numbers. Both have E[z z^T] = 1.
    """

    parameters: list[nn.Parameter]
    seed: int
    index: int  # of this direction in its step
    signs: bool

    def __iter__(self) -> Iterator[Tensor]:
        """Yield z parameter by parameter, on the parameter's device."""
        count = len(self.parameters)
        for place, parameter in enumerate(self.parameters):
            rng = generator(self.seed, 8, self.index * count + place)
            if self.signs:
                z = torch.randint(2, parameter.shape, generator=rng, dtype=torch.float32) * 2 - 1
            else:
                z = torch.randn(parameter.shape, generator=rng)
            yield z.to(parameter.device)


class Point:
    """The parameters theta, to be moved away and brought back.

    copy: coming back is exact, for the memory of a copy.
    """

    def __init__(self, parameters: list[nn.Parameter], copy: bool):
        self.parameters = parameters
        self._theta: list[Tensor] = [*parameters]
        self.origin = [p.detach().clone() for p in parameters] if copy else None
        self._last: tuple[Directions, list[Tensor]] | None = None  # a direction, and its z

    def move(self, direction: Directions, length: float) -> None:
        """Add length * z."""
        if self._last is None or self._last[0] is not direction:
            self._last = direction, list(direction)  # a step moves three times along one
        torch._foreach_add_(self._theta, self._last[1], alpha=length)

    def look(self, loss: Loss, direction: Directions, length: float) -> Tensor:
        """Return loss() at theta + length * z; theta is back afterwards."""
        self.move(direction, length)
        value = loss()
        if self.origin is None:
            self.move(direction, -length)
        else:
            torch._foreach_copy_(self._theta, self.origin)
        return value


def spsa(
    loss: Loss, point: Point, directions: list[Directions], epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return (mean loss, slopes (L+ - L-) / 2 eps), two looks per direction."""
    sides = torch.stack(
        [torch.stack([point.look(loss, z, sign * epsilon) for sign in (1, -1)]) for z in directions]
    )  # (perturbations, 2)
    return sides.mean(), (sides[:, 0] - sides[:, 1]) / (2 * epsilon)


def one_sided(
    loss: Loss, point: Point, directions: list[Directions], epsilon: float
) -> tuple[Tensor, Tensor]:
    """Return (loss at theta, slopes (L+ - L) / eps), one look per direction and one more."""
    here = loss()
    ahead = torch.stack([point.look(loss, z, epsilon) for z in directions])
    return here, (ahead - here) / epsilon
