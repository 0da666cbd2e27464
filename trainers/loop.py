"""The only training loop. A generator: the caller owns progress, cancellation and checkpoints."""

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from .data import PersonalData
from .denoiser import Denoiser
from .edits import Edit
from .errors import InputError
from .method import Draws, Method, Objective, generator
from .optimizers import build_optimizer
from .time_aware import TimeAware


@dataclass(frozen=True)
class Step:
    """What one optimiser step did."""

    index: int  # 1 for the first
    loss: float
    learning_rate: float
    facts: dict[str, float]  # what the method has to tell besides, by name
    # a snapshot of what is learned so far (the EMA, if on)
    learned: Callable[[], Mapping[str, Edit | TimeAware]]
    # inside, the network is as `learned` keeps it
    kept: Callable[[], AbstractContextManager[None]]


@torch.inference_mode(False)  # gradients on; a decorator, unlike a with-block, ends at each yield
def train(method: Method, denoiser: Denoiser, data: PersonalData) -> Generator[Step, None, None]:
    """Adapt `denoiser.unet` and train it on `data`, yielding after every optimiser step.

    data: its latents are in the network's scale. Close the generator to stop early.
    Raises InputError when a setting does not fit the base, FloatingPointError when the loss is
    no longer finite.
    """
    settings = method.settings
    parameters = adapt(method, denoiser.unet)
    optimizer = build_optimizer(
        settings.optimizer, parameters, settings.learning_rate, settings.weight_decay
    )
    schedule = get_scheduler(
        settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=settings.steps,
    )
    average = EMAModel(parameters, decay=settings.ema_decay) if settings.ema_decay > 0 else None
    if settings.gradient_checkpointing:
        denoiser.unet.enable_gradient_checkpointing()

    @contextmanager
    def kept() -> Iterator[None]:
        if average is None or average.temp_stored_params is not None:  # it is so already
            yield
            return
        average.store(parameters)
        average.copy_to(parameters)
        try:
            yield
        finally:
            average.restore(parameters)

    def learned() -> Mapping[str, Edit | TimeAware]:
        with kept():
            return method.learned(denoiser.unet)

    for index in range(settings.steps):
        objectives = list(draw_objectives(method, denoiser, data, index))
        rate = float(schedule.get_last_lr()[0])
        loss = float(method.update(objectives, optimizer))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss or its gradient is not finite at step {index + 1}: lower "
                f"'learning_rate' (it is {settings.learning_rate:g}) or set 'precision' to fp32"
            )
        schedule.step()
        if average is not None:
            average.step(parameters)
        yield Step(index + 1, loss, rate, method.facts(), learned, kept)


def adapt(method: Method, unet: UNet2DConditionModel) -> list[nn.Parameter]:
    """Put the method's parameters into `unet`, seeded, in fp32; return them."""
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        # only the CPU's generator: torch.manual_seed would also set those of all GPUs
        torch.default_generator.manual_seed(generator(method.settings.seed, 0, 0).initial_seed())
        method.adapt(unet)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("layers", "leaves nothing to train in this base; choose other layers.")
    for parameter in parameters:
        parameter.data = parameter.data.to(unet.device, torch.float32)
    return parameters


def draw_objectives(
    method: Method, denoiser: Denoiser, data: PersonalData, step: int
) -> Iterator[Objective]:
    """Draw the batches of one step; each becomes an objective."""
    parts = method.settings.gradient_accumulation
    for part in range(parts):
        draws = Draws(method.settings.seed, step, part, parts)
        batch = method.draw(data, denoiser, draws).to(denoiser.device)
        yield Objective(method, denoiser, batch)
