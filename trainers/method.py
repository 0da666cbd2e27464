"""A method answers four questions: what is free, what is shown, what is asked, how it moves.

Every default is the plain answer of DreamBooth-LoRA.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Batch, Example, PersonalData, conditions, stack_masks
from .denoiser import Denoiser
from .edits import Edit
from .settings import Settings as CommonSettings
from .time_aware import TimeAware


class Method:
    """Base of all methods; subclasses override only what their paper changes."""

    name: ClassVar[str]  # in files and for ever
    title: ClassVar[str]  # for people
    Settings: ClassVar[type[CommonSettings]] = CommonSettings
    starts_at_identity: ClassVar[bool] = True

    def __init__(self, settings: CommonSettings):
        self.settings = settings
        self.gradient_norm = math.nan  # of the last step, before clipping; NaN: not known
        self.moving = False  # whether a step is on its way: parameters are neither before nor after

    def adapt(self, unet: nn.Module) -> None:
        """What is free: put trainable parameters into a frozen U-Net."""
        raise NotImplementedError

    def learned(self, unet: nn.Module) -> Mapping[str, Edit | TimeAware]:
        """Return what was learned, {site: edit}: the contents of a checkpoint."""
        raise NotImplementedError

    def draw(self, data: PersonalData, denoiser: Denoiser, draws: "Draws") -> Batch:
        """What is shown: the next examples, noise and timesteps, uniform over [0, T)."""
        shown, prior = draws.shown(data, self.settings.batch_size)
        return self.batch_of(data, shown, prior, denoiser, draws)

    def batch_of(
        self,
        data: PersonalData,
        shown: list[Example],
        prior: list[Example],
        denoiser: Denoiser,
        draws: "Draws",
    ) -> Batch:
        """Make a batch of training pictures and, after them, of pictures of their class."""
        s = self.settings
        weights = [1.0] * len(shown) + [s.prior_weight] * len(prior)
        weight = torch.tensor(weights) / len(shown)
        of_subject = torch.arange(len(weights)) < len(shown)
        return assemble(data, shown + prior, weight, of_subject, s, denoiser, draws)

    def loss(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """What is asked: mean loss on the subject + prior weight * the same on its class."""
        weight = batch.weight
        if self.settings.min_snr_gamma > 0:
            weight = weight * denoiser.min_snr_weight(batch.timesteps, self.settings.min_snr_gamma)
        return (weight * self.errors(denoiser, batch)).sum()

    def errors(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Return the loss of each example, (B,)."""
        return denoising_loss(denoiser, batch)

    def update(self, objectives: Sequence["Objective"], optimizer: torch.optim.Optimizer) -> Tensor:
        """How it moves: back-propagate the objectives' mean, clip, step. Returns that mean.

        NaN means that the loss or a gradient is not finite, and no step was taken.
        """
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for objective in objectives:
            loss = objective() / len(objectives)
            loss.backward()
            total = total.to(loss.device) + loss.detach()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.gradient_clipping or math.inf)
        # the one time that a step waits for the device: what is returned is on the CPU
        loss, self.gradient_norm = float(total), float(norm)
        if not math.isfinite(loss + self.gradient_norm):
            return torch.tensor(math.nan)  # before the step: what was learned so far stays good
        self.moving = True
        optimizer.step()
        return torch.tensor(loss)

    def facts(self) -> dict[str, float]:
        """Return what the last step has to tell besides its loss, by name, for the history."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return what the method itself has to keep to go on with a run; nothing drawn is."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned. Raises RuntimeError when it does not fit."""


@dataclass(frozen=True)
class Objective:
    """The loss of one batch, evaluated when called: scalar."""

    method: Method
    denoiser: Denoiser
    batch: Batch

    def __call__(self) -> Tensor:
        return self.method.loss(self.denoiser, self.batch)


class Draws:
    """The random choices of one batch, from (seed, step, part) alone: nothing to save or restore.

    All numbers come from the CPU, so that a run is the same on every device.
    """

    def __init__(self, seed: int, step: int, part: int, parts: int):
        self.seed = seed
        self.step = step  # 0 for the first
        self.index = step * parts + part  # of this batch in the run
        self.generator = generator(seed, 1, self.index)

    def shown(self, data: PersonalData, count: int) -> tuple[list[Example], list[Example]]:
        """Return the next training pictures, of one size, and as many of their class, if any.

        count: of training pictures, or fewer where there are no more of that size.
        """
        pool, index = self._turn(data)
        sizes = by_size(pool)
        mixed = len(sizes) > 1
        shown = self._bucket(sizes, count, index) if mixed else self.examples(pool, count, index)
        prior = of_their_class(data.prior, shown)
        return self._varied(shown), self.examples(prior, len(shown)) if prior else []

    def examples(
        self, pool: Sequence[Example], count: int, index: int | None = None
    ) -> list[Example]:
        """Take the next `count` of a pool that is reshuffled each time it has been gone through.

        index: of the batch among those of the pool; None: all of the run's are.
        """
        first = (self.index if index is None else index) * count
        return [pool[self._position(len(pool), i)] for i in range(first, first + count)]

    def _bucket(self, sizes: list[list[Example]], count: int, index: int) -> list[Example]:
        """Return a batch of one size, of an epoch in which every picture is shown once."""
        batches = sum(math.ceil(len(alike) / count) for alike in sizes)
        epoch, place = divmod(index, batches)
        rng = generator(self.seed, 2, epoch)
        parts = [
            [alike[i] for i in part.tolist()]
            for alike in sizes
            for part in torch.randperm(len(alike), generator=rng).split(count)
        ]
        return parts[int(torch.randperm(batches, generator=rng)[place])]

    def _turn(self, data: PersonalData) -> tuple[Sequence[Example], int]:
        """Return the pictures whose turn it is, and how many turns they had before."""
        if not data.take_turns:
            return data.training, self.index
        done, place = divmod(self.index, len(data.subjects))
        order = torch.randperm(len(data.subjects), generator=generator(self.seed, 13, done))
        return [e for e in data.training if e.subject == int(order[place])], done

    def _varied(self, shown: list[Example]) -> list[Example]:
        """Choose whether each is mirrored, and its words, where there is a choice."""
        sides = torch.rand(len(shown), generator=generator(self.seed, 14, self.index))
        words = torch.rand(len(shown), generator=generator(self.seed, 15, self.index))
        return [
            worded(e.views[int(side * len(e.views))], word)
            for e, side, word in zip(shown, sides.tolist(), words.tolist(), strict=True)
        ]

    def _position(self, size: int, index: int) -> int:
        epoch, place = divmod(index, size)
        return int(torch.randperm(size, generator=generator(self.seed, 2, epoch))[place])


def by_size(pool: Sequence[Example]) -> list[list[Example]]:
    """Group examples by the size of their latents, in the order of the first of each."""
    sizes: dict[tuple[int, ...], list[Example]] = {}
    for example in pool:
        sizes.setdefault(tuple(example.latent.shape), []).append(example)
    return list(sizes.values())


def of_their_class(prior: Sequence[Example], shown: list[Example]) -> list[Example]:
    """Return the prior pictures of the size of those shown, and of their class if there are any."""
    alike = [e for e in prior if e.latent.shape == shown[0].latent.shape]
    subjects = {example.subject for example in shown}
    return [e for e in alike if e.subject in subjects] or alike


def worded(example: Example, chance: float) -> Example:
    """Return an example with one of its wordings, if it has any. chance: in [0, 1)."""
    if not example.wordings:
        return example
    return example.said(example.wordings[int(chance * len(example.wordings))])


def generator(seed: int, stream: int, index: int) -> torch.Generator:
    """Make the generator of one draw; streams never share numbers."""
    digest = hashlib.sha256(f"{seed}/{stream}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def assemble(
    data: PersonalData,
    examples: list[Example],
    weight: Tensor,
    of_subject: Tensor,
    settings: CommonSettings,
    denoiser: Denoiser,
    draws: Draws,
) -> Batch:
    """Add noise, timesteps and captions to examples."""
    rng, count = draws.generator, len(examples)
    latents = torch.stack([example.latent for example in examples])
    timesteps = torch.randint(denoiser.timestep_count, (count,), generator=rng)
    noise = torch.randn(latents.shape, generator=rng)
    if settings.noise_offset > 0:
        noise = noise + settings.noise_offset * torch.randn(*latents.shape[:2], 1, 1, generator=rng)
    unsaid = torch.rand(count, generator=rng) < settings.caption_dropout
    said = [
        data.unsaid(example) if drop else example
        for drop, example in zip(unsaid.tolist(), examples, strict=True)
    ]
    seed = generator(draws.seed, 4, draws.index).initial_seed()
    return Batch(
        latents,
        noise,
        timesteps,
        **conditions(said),
        weight=weight,
        of_subject=of_subject,
        seed=seed,
        masks=stack_masks(said),
    )


def denoising_loss(denoiser: Denoiser, batch: Batch) -> Tensor:
    """Return || target - prediction ||^2, averaged over what counts of each example: (B,)."""
    noisy = denoiser.noised(batch.latents, batch.noise, batch.timesteps)
    return error_of(denoiser(noisy, batch.timesteps, *batch.conditions), denoiser, batch)


def error_of(predicted: Tensor, denoiser: Denoiser, batch: Batch) -> Tensor:
    """Do the same for a prediction (B, C, h, w) that was made already."""
    target = denoiser.target(batch.latents, batch.noise, batch.timesteps)
    return averaged(F.mse_loss(predicted, target, reduction="none"), batch.masks)


def averaged(errors: Tensor, masks: Tensor | None) -> Tensor:
    """Average errors (B, C, h, w) within each example, by what its places count: (B,)."""
    counted = errors if masks is None else errors * masks
    return counted.flatten(1).mean(1)
