"""Measuring over-fitting. Raw training loss is mostly the luck of the timestep; this is not."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Batch, Example, conditions, stack_masks
from .denoiser import Denoiser
from .method import averaged, generator

BINS = 10  # of timesteps
TEMPERATURE = 1000.0  # T of APT's indicator
SHARE = 0.1  # of a run's work that its evaluations may take
ROWS_PER_EXAMPLE = 2.5  # forward passes that a trained example costs, there and back
ROW = 0.75  # forward passes that a row costs, many being asked at once
MOST_ROUNDS = 4
EVALUATIONS, FEWEST = 20, 8  # of a run, where the user leaves it to us
LARGEST = 1e15  # of the numbers in a history
BINNED = ("_bins", "gamma")  # how names of values of every bin end
NOISY = 3  # lowest bins, where corruption is looked for
LATENTS_AT_ONCE = 64 * 64  # places in the latents of one forward pass: one SD 1.5 picture


def is_number(value: Any) -> TypeGuard[float]:
    """Tell whether a value out of a file can be computed with; NaN and infinities can."""
    return type(value) in (int, float) and (abs(value) < LARGEST or not math.isfinite(value))


def read_number(value: Any) -> Any:
    """Read a number of a history, where null stands for one that was not finite."""
    return math.nan if value is None else value


@dataclass(frozen=True)
class Evaluation:
    """How a network stands after some steps; base and tuned were asked the very same.

    Losses are stable losses; None where there is nothing to measure on, NaN where the network had
    no finite answer. `..._bins` have a number for every tenth of the timesteps, low first.
    """

    step: int  # 0: the base
    train: float
    train_of_base: float
    train_bins: tuple[float, ...]
    gamma: tuple[float, ...]  # APT's indicator on the training pictures: 0..1 in every bin
    corruption: float  # grain left in nearly clean training pictures, over the base's: 1 as there
    held_out: float | None = None
    held_out_of_base: float | None = None
    held_out_bins: tuple[float, ...] | None = None
    prior: float | None = None
    prior_of_base: float | None = None
    prior_bins: tuple[float, ...] | None = None
    grain: float | None = None  # of samples, over the usual: the base's, or what is learned

    @property
    def gap(self) -> float | None:
        """How much more is lost on held-out pictures than on training ones, over the base's."""
        if self.held_out is None:
            return None
        return (self.held_out - self.train) / self.train_of_base

    @property
    def prior_drift(self) -> float | None:
        """How much worse the class is drawn than by the base: 0 as there, 1 twice the loss."""
        if self.prior is None or self.prior_of_base is None:
            return None
        return self.prior / self.prior_of_base - 1

    def as_line(self) -> dict[str, Any]:
        """Return the line of history.jsonl."""
        return {
            "evaluation": True,
            **asdict(self),
            "gap": self.gap,
            "prior_drift": self.prior_drift,
        }

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> "Evaluation":
        """Read a line of history.jsonl. Raises TypeError for another kind of line."""
        known: dict[str, Any] = {}
        for field, value in ((f, line[f.name]) for f in fields(cls) if f.name in line):
            name = field.name
            binned, required = name.endswith(BINNED), field.default is MISSING
            if binned and (required or value is not None):
                value = tuple(map(read_number, value))
            elif required:
                value = read_number(value)
            numbers = value if isinstance(value, tuple) else [value]
            known[name] = value
            if not all(map(is_number, (n for n in numbers if n is not None))):
                raise TypeError(f"{name} is {value!r:.80}")
        evaluation = cls(**known)
        bases = evaluation.train_of_base, evaluation.held_out_of_base, evaluation.prior_of_base
        if type(evaluation.step) is not int or 0 in bases:
            raise TypeError(f"step {evaluation.step!r:.80}, losses of the base {bases!r:.80}")
        return evaluation


class Examination:
    """Fixed questions to a network that is being trained, and the base's answers to them.

    splits: pictures that are trained on ("train"), others of the subject ("held_out"), and of its
    class ("prior"); the last two may be missing or empty. Draws nothing from the run's generators.
    """

    def __init__(
        self, denoiser: Denoiser, splits: Mapping[str, Sequence[Example]], rounds: int = 1
    ):
        count = denoiser.timestep_count
        self.probes = {
            name: Probe.of(examples, count, rounds if name != "prior" else 1)
            for name, examples in splits.items()
            if examples
        }
        with denoiser.prior():
            self.base = self._answers(denoiser)

    def of_base(self) -> Evaluation:
        """Return how the base stands."""
        return self._evaluation(0, self.base)

    def evaluate(self, denoiser: Denoiser, step: int) -> Evaluation:
        """Ask the network as it is now."""
        return self._evaluation(step, self._answers(denoiser))

    def _answers(self, denoiser: Denoiser) -> "dict[str, Answer]":
        return {name: probe.ask(denoiser) for name, probe in self.probes.items()}

    def _evaluation(self, step: int, answers: "dict[str, Answer]") -> Evaluation:
        found: dict[str, Any] = {}
        for name, answer in answers.items():
            found[name] = float(answer.loss.mean())
            found[f"{name}_of_base"] = float(self.base[name].loss.mean())
            found[f"{name}_bins"] = tuple(answer.loss.tolist())
        gamma = indicator(self.base["train"].loss, answers["train"].loss)
        grain = log_ratio(answers["train"].grain, self.base["train"].grain)
        return Evaluation(step=step, gamma=tuple(gamma.tolist()), corruption=2**grain, **found)


@dataclass(frozen=True)
class Answer:
    """What a network has to say to a probe."""

    loss: Tensor  # (BINS,) fp64
    grain: Tensor  # (BINS,) high-frequency energy of the pictures predicted in one step


@dataclass(frozen=True)
class Probe:
    """Pictures at fixed timesteps with fixed noise. Row i is in bin i % BINS.

    The pictures take turns, in every bin; rows of different probes have the same noise. What is
    masked counts as it does in training; pictures are asked about with their own caption, unturned.
    """

    rows: tuple[Tensor, ...]  # of every batch, (B,) int
    batches: tuple[Batch, ...]  # one for each size of pictures, on the CPU

    @classmethod
    def of(cls, examples: Sequence[Example], timestep_count: int, rounds: int) -> "Probe":
        """Put `rounds` rows into every bin, evenly spaced."""
        rows = range(rounds * BINS)
        cycle = math.lcm(len(examples), BINS)  # then a bin would meet the same pictures again
        chosen = [examples[(row + row // cycle) % len(examples)] for row in rows]
        places = [row % BINS + (row // BINS + 0.5) / rounds for row in rows]
        timesteps = torch.tensor([int(place * timestep_count / BINS) for place in places])
        sizes: dict[tuple[int, ...], list[int]] = {}
        for row, example in zip(rows, chosen, strict=True):
            sizes.setdefault(tuple(example.latent.shape), []).append(row)
        batches = []
        for shape, alike in sizes.items():
            latents = torch.stack([chosen[row].latent for row in alike])
            noise = [torch.randn(shape, generator=generator(0, 3, row)) for row in alike]
            batches.append(
                fixed_batch(
                    [chosen[row] for row in alike], latents, torch.stack(noise), timesteps[alike]
                )
            )
        return cls(tuple(torch.tensor(alike) for alike in sizes.values()), tuple(batches))

    @torch.no_grad()
    def ask(self, denoiser: Denoiser) -> Answer:
        """Return the answer of the network as it is; inside `denoiser.prior()`, of the base."""
        losses, grains = [], []
        for batch in (part.to(denoiser.device) for whole in self.batches for part in parts(whole)):
            noisy = denoiser.noised(batch.latents, batch.noise, batch.timesteps)
            predicted = denoiser(noisy, batch.timesteps, *batch.conditions)
            target = denoiser.target(batch.latents, batch.noise, batch.timesteps)
            cleaned = denoiser.cleaned(noisy, predicted, batch.timesteps)
            losses.append(averaged((predicted - target).square(), batch.masks).cpu())
            grains.append(high_frequency_energy(cleaned).cpu())
        order = torch.cat(self.rows).argsort()
        return Answer(per_bin(torch.cat(losses)[order]), per_bin(torch.cat(grains)[order]))


def parts(batch: Batch) -> Iterator[Batch]:
    """Cut a batch into pieces: one picture of 64 x 64 latents or more, or as many as fill that."""
    size = max(1, LATENTS_AT_ONCE // batch.latents[0, 0].numel())
    for start in range(0, len(batch.latents), size):
        tensors: dict[str, Any] = {
            name: value[start : start + size]
            for name, value in vars(batch).items()
            if torch.is_tensor(value)
        }
        yield replace(batch, **tensors)


def per_bin(values: Tensor) -> Tensor:
    """Average the values of rows, (rounds * BINS,), in every bin: (BINS,) fp64."""
    return values.double().unflatten(0, (-1, BINS)).mean(0)


def indicator(base: Tensor, tuned: Tensor) -> Tensor:
    """Return 1 - exp(-T (L_base - L)) of every bin, clamped to 0..1   (APT's gamma)."""
    return (1 - torch.exp(-TEMPERATURE * (base - tuned))).clamp(0, 1)


def spacing(steps: int, examples_per_step: int, splits: int) -> int:
    """Return the steps between evaluations: about 20 in a run, fewer where that would cost more.

    A tenth of the time is what they may take; 8 there are at least. splits: how many are measured.
    """
    work = SHARE * ROWS_PER_EXAMPLE * examples_per_step / ROW  # rows that a step pays for
    wanted = max(steps / EVALUATIONS, splits * BINS / work)
    return max(1, round(min(wanted, steps / FEWEST)))


def rounds_for(examples_per_step: int, every: int, splits: int) -> int:
    """Return how many rows a bin can have for a tenth of a run's work; at least one.

    every: steps between evaluations; splits: how many there are.
    """
    rows = SHARE * ROWS_PER_EXAMPLE * examples_per_step * every
    return min(MOST_ROUNDS, max(1, int(rows / (splits * BINS))))


def fixed_batch(
    examples: Sequence[Example], latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Batch:
    """Return a batch of examples that count alike."""
    ones = torch.ones(len(examples))
    return Batch(
        latents,
        noise,
        timesteps,
        **conditions(examples),
        weight=ones,
        of_subject=ones.bool(),
        seed=0,
        masks=stack_masks(examples),
    )


def stable_loss(denoiser: Denoiser, examples: Sequence[Example]) -> float:
    """Return the mean denoising loss over fixed timesteps and fixed noise, comparable over a run.

    Inside `denoiser.prior()` it is the base's.
    """
    probe = Probe.of(examples, denoiser.timestep_count, rounds=len(examples))
    return float(probe.ask(denoiser).loss.mean())


def high_frequency_energy(latents: Tensor) -> Tensor:
    """Return the mean square of what a 3x3 mean removes: (N, C, h, w) -> (N,)."""
    mean = F.avg_pool2d(F.pad(latents, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return ((latents - mean) ** 2).flatten(1).mean(1)


def log_ratio(grain: Tensor, of_base: Tensor) -> float:
    """Return the mean log2 of a grain over the base's, (BINS,) each, in the lowest bins.

    Higher up the base draws a blur: there, more grain is sharpness, which comes with learning by
    heart, and not what is left of the noise.
    """
    return float(torch.log2(grain / of_base)[:NOISY].mean())


def over_fitting(
    denoiser: Denoiser, training: Sequence[Example], held_out: Sequence[Example]
) -> dict[str, float]:
    """Compare tuned and base network on pictures that were trained on and on others.

    At most as many of the first are looked at as there are of the second. Names are those in
    history.jsonl; the corruption is in powers of two: 0 as the base, 1 twice its grain.
    """
    rounds = len(held_out)
    splits = {"train": training[:rounds], "held_out": held_out}
    found = Examination(denoiser, splits, rounds).evaluate(denoiser, 0)
    assert found.held_out is not None and found.held_out_of_base is not None
    return {
        "train_loss": found.train,
        "train_loss_of_base": found.train_of_base,
        "held_out_loss": found.held_out,
        "held_out_loss_of_base": found.held_out_of_base,
        "corruption": math.log2(found.corruption),
    }
