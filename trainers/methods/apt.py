"""APT: adaptive personalised training (Chae et al., CVPR 2025, arXiv 2507.02687).

    gamma_b = 1 - exp(-T (EMA_b[L_base] - EMA_b[L])) in [0, 1]     how over-fitted bin b is
    L = (1 - gamma_b) L_DM + lambda_rs (L_mu + L_sigma) + lambda_aa L_attn

Over a LoRA, three parts. Adaptive Training Adjustment: per bin of timesteps (10), the loss of the
tuned and of the frozen model on the same input; the bin's loss is weighed down by 1 - gamma, and
its pictures are zoomed out (1 to 3 times) and turned (up to 15 degrees) with probability gamma.
Representation Stabilization: mean and standard deviation of self-attention's outputs stay those of
the base. Attention Alignment: so do the cross-attention maps.

Goes with BNN (`sigma`), and not with PaRa and A3FT's adapter, which are not the base even before
the first step, nor with BP/ZO, whose memory its frozen forward passes would take back.

Ours, for want of published values: T = 1000, a probability of at most p_max, features from the
decoder half, maps compared head by head on all tokens that are no padding where there are at most
32 x 32 queries, pictures of the class left out of the bins and of the weights 1 - gamma, both
caches, and both lambdas. On the demo base (benchmarks/regularisers.py) the terms are 11 to 20 % and
5 to 7 % of L_DM around step 100 of a LoRA that no part holds back; once they act, 1 to 2 %.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Batch, Example, PersonalData, evened
from ..denoiser import Denoiser
from ..errors import InputError
from ..method import Draws, Objective, averaged, denoising_loss, generator
from ..settings import knob, redeclared
from ..sites import attentions
from .bnn import BNN, BNNSettings
from .lora import LoRASettings

BINS = 10  # of timesteps
EMA_RATE = 0.1
MOST_ZOOM, MOST_DEGREES = 3.0, 15.0
MOST_QUERIES = 32**2  # of an attention map that is aligned
PREDICTION = "prediction"  # the name of the network's own output
VIEW_LIFETIME = 100  # steps until a pre-encoded view is replaced
PADDINGS = {"black": "zeros", "reflect": "reflection", "edge": "border"}  # ours -> torch's


@dataclass(frozen=True)
class APTSettings(BNNSettings):
    """Settings of APT, over anything that BNN works over; with `sigma` above 0, both at once."""

    rank: int = redeclared(LoRASettings, "rank")
    learning_rate: float = knob(
        1e-4,
        "How far each step moves. Right for over = lora and oft; full weights need 5e-6, those of "
        "attention 1e-5.",
        min=0.0,
        max=1.0,
        step=1e-7,
    )
    weight_decay: float = redeclared(LoRASettings, "weight_decay")
    sigma: float = knob(
        0.0,
        "Above 0: the weights are Bayesian, as in Train BNN (0.01 there; over a LoRA with "
        "init = gaussian).",
        min=0.0,
        max=10.0,
        step=1e-3,
        advanced=True,
    )
    kl_weight: float = redeclared(BNNSettings, "kl_weight", advanced=True)
    init: str = redeclared(LoRASettings, "init")
    adaptive: bool = knob(
        True, "Adaptive Training Adjustment: weigh and augment by how over-fitted a timestep is."
    )
    stabilize: bool = knob(
        True, "Representation Stabilization: keep the statistics of the base's features."
    )
    align: bool = knob(True, "Attention Alignment: keep looking at words where the base does.")
    lambda_rs: float = knob(
        0.1, "Weight of Representation Stabilization.", min=0.0, max=1e6, step=0.01
    )
    lambda_aa: float = knob(1.0, "Weight of Attention Alignment.", min=0.0, max=1e6, step=0.1)
    p_max: float = knob(
        0.8,
        "Highest share of pictures that are augmented.",
        min=0.0,
        max=1.0,
        step=0.05,
        advanced=True,
    )
    pad: str = knob(
        "black",
        "What surrounds a picture that was zoomed out.",
        choices=tuple(PADDINGS),
        advanced=True,
    )
    temperature: float = knob(
        1000.0,
        "T of the indicator: higher takes a smaller gap between the losses for over-fitting.",
        min=0.0,
        max=1e6,
        step=100.0,
        advanced=True,
    )
    features: str = knob(
        "decoder",
        "Whose self-attention is stabilised: the decoder half of the U-Net, or all of it.",
        choices=("decoder", "all"),
        advanced=True,
    )
    view_pool: int = knob(
        0,
        "Augmented views kept encoded per picture, each for 100 steps, where the VAE is slow. "
        "0: encode every one when it is drawn.",
        min=0,
        max=1000,
        advanced=True,
    )
    teacher_cache: int = knob(
        0,
        "Go through so many batches again and again, and keep what the frozen base says to them: "
        "faster, but noise repeats. 0: every batch is new.",
        min=0,
        max=100_000,
        advanced=True,
    )


class Indicator(nn.Module):
    """How over-fitted each of 10 equal bins of timesteps is; saved and restored as a state_dict."""

    ema_base: Tensor  # (10,) loss of the frozen model
    ema_tuned: Tensor  # (10,)
    seen: Tensor  # (10,) bool

    @torch.inference_mode(False)  # what is born in inference mode can not be moved outside
    def __init__(self, temperature: float = 1000.0):
        super().__init__()
        self.temperature = temperature
        self.register_buffer("ema_base", torch.zeros(BINS, dtype=torch.float64))
        self.register_buffer("ema_tuned", torch.zeros(BINS, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(BINS, dtype=torch.bool))

    def gamma(self) -> Tensor:
        """Return gamma of every bin, (10,) in [0, 1]; 0 where nothing was seen."""
        gap = self.ema_base - self.ema_tuned
        return (1 - torch.exp(-self.temperature * gap)).clamp(0, 1)

    @torch.no_grad()
    def observe(self, bins: Tensor, base: Tensor, tuned: Tensor) -> None:
        """Take in losses, (N,) each, one after the other; a bin's first one sets its averages."""
        for b, *losses in zip(bins.tolist(), base.double(), tuned.double(), strict=True):
            rate = EMA_RATE if self.seen[b] else 1.0
            for average, loss in zip((self.ema_base, self.ema_tuned), losses, strict=True):
                average[b] = (1 - rate) * average[b] + rate * loss
            self.seen[b] = True


def bins_of(timesteps: Tensor, timestep_count: int) -> Tensor:
    """Return the bin of each timestep in [0, T): int in [0, 10)."""
    return timesteps * BINS // timestep_count


@dataclass(frozen=True)
class ViewedBatch(Batch):
    """A batch that knows which of its pictures were augmented."""

    augmented: Tensor  # (B,) bool
    draw: Tensor  # (B,) int, the same for the same example, view, noise and timestep

    def only(self, i: int) -> "ViewedBatch":
        """Return the batch of one example."""
        rows = {n: value[i : i + 1] for n, value in vars(self).items() if torch.is_tensor(value)}
        return replace(self, **rows)


@dataclass(frozen=True)
class Watched:
    """Where a network is compared with its base, by name."""

    unet: nn.Module
    self_attentions: dict[str, Any]
    cross_attentions: dict[str, Any]

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules whose outputs are compared, or needed for that."""
        queries = {f"{name}.to_q": a.to_q for name, a in self.cross_attentions.items()}
        keys = {f"{name}.to_k": a.to_k for name, a in self.cross_attentions.items()}
        return {**self.self_attentions, **queries, **keys}


@dataclass(frozen=True)
class Answer:
    """What a network has to say to a batch, as far as APT compares it."""

    loss: Tensor  # (B,) unweighted
    moments: tuple[Tensor, ...]  # per layer (B, 2, C): mean and deviation over the tokens
    maps: tuple[Tensor, ...]  # per layer (B, heads, queries, W): looks at each word

    def to(self, device: torch.device) -> "Answer":
        """Move every tensor."""
        return Answer(
            self.loss.to(device),
            tuple(m.to(device) for m in self.moments),
            tuple(m.to(device) for m in self.maps),
        )


@dataclass(frozen=True)
class Observation:
    """What a loss that is being back-propagated showed."""

    bins: Tensor  # (N,) of the subject's examples
    base: Tensor  # (N,) losses
    tuned: Tensor  # (N,)
    augmented: float  # share of them
    loss_rs: float
    loss_aa: float


class APT(BNN):
    name = "apt"
    title = "APT"
    Settings = APTSettings
    settings: APTSettings

    def __init__(self, settings: APTSettings):
        super().__init__(settings)
        self.indicator = Indicator(settings.temperature)
        self.views = Views(settings.seed, settings.pad)
        self._base_answers: dict[int, Answer] = {}  # by draw, on the CPU
        self._observed: list[Observation] | None = None  # a list while a step is made
        self._watched: Watched | None = None
        self._facts: dict[str, float] = {}

    @property
    def compares(self) -> bool:
        """Whether the frozen model is asked at all; if not, this is a plain LoRA."""
        s = self.settings
        return s.adaptive or s.stabilize or s.align

    @property
    def draws_views(self) -> bool:
        """Whether pictures are augmented, and encoded, while training."""
        return self.settings.adaptive and self.settings.p_max > 0

    def adapt(self, unet: nn.Module) -> None:
        s = self.settings
        if s.sigma > 0 and s.over == "lora" and s.init == "kaiming":
            raise InputError(
                "sigma",
                f"is {s.sigma:g} over a LoRA whose 'init' is 'kaiming', where noise reaches the "
                "weights many times too weak; set 'init' to 'gaussian', or 'sigma' to 0.",
            )
        if s.stabilize and not attentions(unet, "self-attention", s.features):
            raise InputError("features", f"is '{s.features}', where this base has no attention.")
        super().adapt(unet)

    def gamma(self, batch: Batch, timestep_count: int) -> Tensor:
        """Return how over-fitted the bin of each example is, (B,) in [0, 1]; 0 for the class."""
        if not self.settings.adaptive:
            return torch.zeros_like(batch.weight)
        bins = bins_of(batch.timesteps, timestep_count)
        gamma = self.indicator.gamma().float().to(bins.device)
        return gamma[bins] * batch.of_subject

    # What is shown

    def draw(self, data: PersonalData, denoiser: Denoiser, draws: Draws) -> Batch:
        if not self.compares:
            return super().draw(data, denoiser, draws)
        s = self.settings
        drawn = repeated(draws, s.teacher_cache) if s.teacher_cache else draws
        shown, prior = drawn.shown(data, s.batch_size)
        batch = self.batch_of(data, shown, prior, denoiser, drawn)
        chance = self.gamma(batch, denoiser.timestep_count).clamp(max=s.p_max)
        rng = generator(draws.seed, 5, draws.index)
        augmented = torch.rand(len(chance), generator=rng) < chance
        slots = torch.randint(max(1, s.view_pool), chance.shape, generator=rng)
        most = 2 * s.batch_size if data.prior else s.batch_size  # pictures in a batch
        number = drawn.index * most + torch.arange(len(chance))
        latents = batch.latents.clone()
        masks = batch.masks.clone() if batch.masks is not None else None
        for i in augmented.nonzero().flatten().tolist():  # of those shown: they come first
            view = self._view(data, shown[i], int(number[i]), int(slots[i]), draws.step)
            latents[i] = view.latent
            if masks is not None and view.mask is not None:
                masks[i] = evened(view.mask)
        seed = generator(draws.seed, 4, draws.index).initial_seed()  # never that of a repeated draw
        known = vars(batch) | {"latents": latents, "seed": seed, "masks": masks}
        return ViewedBatch(**known, augmented=augmented, draw=2 * number + augmented)

    def _view(
        self, data: PersonalData, example: Example, draw: int, slot: int, step: int
    ) -> "View":
        s = self.settings
        if s.teacher_cache:  # a repeated draw shows the very same view
            return self.views.kept(data, example, place=draw, number=draw)
        if s.view_pool:
            place = place_of(data, example) * s.view_pool + slot
            age = (step + slot * VIEW_LIFETIME // s.view_pool) // VIEW_LIFETIME  # one by one
            return self.views.kept(
                data, example, place, number=age * s.view_pool * len(data.training) + place
            )
        return self.views.encoded(data, example, number=draw)

    # What is asked

    def loss(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        if not self.compares:
            return super().loss(denoiser, batch)
        s = self.settings
        base = self._base_answer(denoiser, batch)
        gamma = self.gamma(batch, denoiser.timestep_count)
        with self._recording(denoiser) as outputs:
            total = super().loss(denoiser, replace(batch, weight=batch.weight * (1 - gamma)))
        tuned = self._answer(denoiser, batch, outputs)
        rs = (batch.weight * moment_distance(tuned, base)).sum()
        aa = (batch.weight * map_distance(tuned, base, batch.words)).sum()
        if self._observed is not None:
            self._observed.append(self._observation(denoiser, batch, base, tuned, rs, aa))
        return total + s.lambda_rs * rs + s.lambda_aa * aa

    def watched(self, unet: nn.Module) -> Watched:
        """Return what is compared of an adapted network, which is searched once."""
        if self._watched is None or self._watched.unet is not unet:
            s = self.settings
            of_features = attentions(unet, "self-attention", s.features) if s.stabilize else {}
            of_words = attentions(unet, "cross-attention") if s.align else {}
            self._watched = Watched(unet, of_features, of_words)
        return self._watched

    def _recording(self, denoiser: Denoiser) -> AbstractContextManager[dict[str, Tensor]]:
        return recording({PREDICTION: denoiser} | self.watched(denoiser.unet).modules())

    def _answer(self, denoiser: Denoiser, batch: Batch, outputs: dict[str, Tensor]) -> Answer:
        watched = self.watched(denoiser.unet)
        target = denoiser.target(batch.latents, batch.noise, batch.timesteps)
        error = F.mse_loss(outputs[PREDICTION].detach(), target, reduction="none")
        return Answer(
            averaged(error, batch.masks),
            tuple(token_moments(outputs[name]) for name in watched.self_attentions),
            tuple(
                attention_to(
                    batch.words,
                    outputs[f"{name}.to_q"],
                    outputs[f"{name}.to_k"],
                    attention.heads,
                )
                for name, attention in watched.cross_attentions.items()
                if outputs[f"{name}.to_q"].shape[1] <= MOST_QUERIES
            ),
        )

    def _base_answer(self, denoiser: Denoiser, batch: Batch) -> Answer:
        if not self.settings.teacher_cache or not isinstance(batch, ViewedBatch):
            return self._ask_base(denoiser, batch)
        draws = batch.draw.tolist()
        for i, draw in enumerate(draws):
            if draw not in self._base_answers:  # each alone: a resumed run gets the same bits
                answer = self._ask_base(denoiser, batch.only(i))
                self._base_answers[draw] = answer.to(torch.device("cpu"))
        return stacked([self._base_answers[draw] for draw in draws]).to(batch.latents.device)

    @torch.no_grad()
    def _ask_base(self, denoiser: Denoiser, batch: Batch) -> Answer:
        with denoiser.prior(), self._recording(denoiser) as outputs:
            denoising_loss(denoiser, batch)
        return self._answer(denoiser, batch, outputs)

    # How it moves

    def update(self, objectives: Sequence[Objective], optimizer: torch.optim.Optimizer) -> Tensor:
        self._observed = []
        try:
            total = super().update(objectives, optimizer)
        finally:
            observed, self._observed = self._observed, None
        if observed and total.isfinite():
            self._learn_from(observed)
        return total

    def _observation(
        self, denoiser: Denoiser, batch: Batch, base: Answer, tuned: Answer, rs: Tensor, aa: Tensor
    ) -> Observation:
        mine = batch.of_subject
        augmented = batch.augmented if isinstance(batch, ViewedBatch) else torch.zeros_like(mine)
        return Observation(
            bins_of(batch.timesteps, denoiser.timestep_count)[mine].cpu(),
            base.loss[mine].cpu(),
            tuned.loss[mine].cpu(),
            float(augmented[mine].float().mean()),
            float(rs.detach()),
            float(aa.detach()),
        )

    def _learn_from(self, observed: list[Observation]) -> None:
        for one in observed:
            self.indicator.observe(one.bins, one.base, one.tuned)
        gamma = self.indicator.gamma().tolist()
        self._facts = {f"gamma_{b}": value for b, value in enumerate(gamma)} | {
            name: sum(getattr(one, name) for one in observed) / len(observed)
            for name in ("loss_rs", "loss_aa", "augmented")
        }

    def facts(self) -> dict[str, float]:
        return super().facts() | self._facts

    def state_dict(self) -> dict[str, Tensor]:
        """Return the indicator; views and the base's answers follow from the draws."""
        return self.indicator.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.indicator.load_state_dict(state)


@dataclass(frozen=True)
class View:
    """A picture as it was augmented."""

    latent: Tensor  # (C, h, w)
    mask: Tensor | None  # (h, w)


class Views:
    """Augmented views of the training pictures as latents; a view's number says all of it."""

    def __init__(self, seed: int, pad: str):
        self.seed = seed
        self.pad = pad
        self._places: dict[int, tuple[int, View]] = {}  # place -> (number, view)

    def encoded(self, data: PersonalData, example: Example, number: int) -> View:
        """Zoom a picture out by 1 to 3, turn it by -15 to 15 degrees, encode it.

        Its mask goes along; what surrounds the picture counts as its most masked place does.
        """
        zoom, turn = torch.rand(2, generator=generator(self.seed, 6, number)).tolist()
        how = 1 + (MOST_ZOOM - 1) * zoom, MOST_DEGREES * (2 * turn - 1), self.pad
        pixels, mask = zoomed_out(example.pixels, *how), example.mask
        if mask is not None:
            least = mask.min()
            mask = (zoomed_out(2 * (mask - least)[None] - 1, *how)[0] + 1) / 2 + least
        return View(data.encode(pixels[None])[0], mask)

    def kept(self, data: PersonalData, example: Example, place: int, number: int) -> View:
        """Do the same, keeping one view per place until another number is asked for there."""
        if self._places.get(place, (None,))[0] != number:
            self._places[place] = number, self.encoded(data, example, number)
        return self._places[place][1]


def zoomed_out(pixels: Tensor, zoom: float, degrees: float, pad: str) -> Tensor:
    """Shrink a picture about its centre and turn it, both (C, H, W) in [-1, 1].

    zoom: 1 or more; the content takes 1 / zoom^2 of the area. pad: what surrounds it.
    """
    height, width = pixels.shape[1:]
    size = [max(1, round(height / zoom)), max(1, round(width / zoom))]
    # shrunk first, or pixels would be skipped; a grid's coordinates know no size
    small = F.interpolate(pixels[None] + 1, size, mode="bilinear", antialias=True)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = [[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]
    grid = F.affine_grid(zoom * torch.tensor([turn]), [1, 1, height, width], align_corners=False)
    view = F.grid_sample(small, grid, padding_mode=PADDINGS[pad], align_corners=False)
    return view[0].clamp(0, 2) - 1


def repeated(draws: Draws, pool: int) -> Draws:
    """Return the draws of one of the run's first `pool` batches, in turn."""
    again = Draws(draws.seed, draws.index % pool, 0, 1)
    again.step = draws.step
    return again


def place_of(data: PersonalData, example: Example) -> int:
    """Return a number for a training picture; a mirrored one has another."""
    views = [*data.training, *(one.mirrored for one in data.training)]
    return next(i for i, view in enumerate(views) if view and view.pixels is example.pixels)


@contextmanager
def recording(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect the modules' outputs by name while inside; the hooks never outlive the block.

    Only references are kept: under gradient checkpointing a hook may not compute anything that
    the recomputation, which has no hooks, would not compute as well.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: outputs.__setitem__(name, output)

    hooks = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def token_moments(features: Tensor) -> Tensor:
    """Return mean and deviation over the tokens of features (B, N, C): (B, 2, C) fp32."""
    features = features.float()
    deviation = (features.var(1, correction=0) + 1e-6).sqrt()  # its gradient is finite at 0
    return torch.stack([features.mean(1), deviation], 1)


def attention_to(words: Tensor, query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Return every head's softmax(Q K^T / sqrt(d)), as far as it goes to words: (B, heads, N, W).

    words: (B, L, W), see Batch; query: (B, N, heads * d); key: (B, L, heads * d). fp32.
    """
    q, k = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ words[:, None]


def moment_distance(tuned: Answer, base: Answer) -> Tensor:
    """Return L_mu + L_sigma of each example, averaged over channels and layers: (B,)."""
    layers = zip(tuned.moments, base.moments, strict=True)
    return mean_over_layers([(a - b).square().mean(2).sum(1) for a, b in layers], tuned)


def map_distance(tuned: Answer, base: Answer, words: Tensor) -> Tensor:
    """Return L_attn of each example, averaged over heads, queries, words and layers: (B,).

    words: (B, L, W), see Batch; an example's may be fewer than W.
    """
    counts = words.amax(1).sum(1)
    layers = zip(tuned.maps, base.maps, strict=True)
    return mean_over_layers(
        [(a - b).square().mean((1, 2)).sum(1) / counts for a, b in layers], tuned
    )


def mean_over_layers(distances: list[Tensor], of: Answer) -> Tensor:
    """Average (B,) distances; without layers they are 0."""
    return torch.stack(distances).mean(0) if distances else torch.zeros_like(of.loss)


def stacked(answers: list[Answer]) -> Answer:
    """Join answers to single examples."""
    return Answer(
        torch.cat([a.loss for a in answers]),
        tuple(torch.cat(layer) for layer in zip(*(a.moments for a in answers), strict=True)),
        tuple(torch.cat(layer) for layer in zip(*(a.maps for a in answers), strict=True)),
    )
