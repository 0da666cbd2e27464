"""The only training loop. A generator: the caller owns progress, cancellation and checkpoints."""

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from .data import PersonalData
from .denoiser import Denoiser
from .edits import Edit
from .errors import InputError, brief
from .health import Health
from .method import Draws, Method, Objective, generator
from .optimizers import alike, build_optimizer, check_shapes
from .settings import Settings
from .state import Done, State, copied, finite
from .time_aware import TimeAware


@dataclass(frozen=True)
class Step(Done):
    """What one optimiser step did, and what there is after it."""

    # a snapshot of what is learned so far (the EMA, if on)
    learned: Callable[[], Mapping[str, Edit | TimeAware]]
    # inside, the network is as `learned` keeps it
    kept: Callable[[], AbstractContextManager[None]]
    # a snapshot of all that it takes to go on from here; see Learner
    state: Callable[[], State]
    # let go of all that, whoever still holds a step: nothing can be asked any more
    free: Callable[[], None]


@torch.inference_mode(False)  # gradients on; a decorator, unlike a with-block, ends at each yield
def train(
    method: Method, denoiser: Denoiser, data: PersonalData, state: State | None = None
) -> Generator[Step, None, None]:
    """Adapt `denoiser.unet` and train it on `data`, yielding after every optimiser step.

    data: its latents are in the network's scale. state: of this very run, to go on from; its step
    is yielded first, as it was. Close the generator to stop early.
    Raises InputError when a setting does not fit the base, or the state the run;
    FloatingPointError when its numbers went wrong (see Health), with all as it was a step before.
    """
    settings = method.settings
    learner = Learner(method, denoiser)
    rate = learning_rates(settings, learner.optimizer)
    if settings.gradient_checkpointing == "on":
        denoiser.unet.enable_gradient_checkpointing()
    if state is not None:
        learner.load(state)
        yield learner.step(state.done)
    for index in range(state.done.index if state is not None else 0, settings.steps):
        now = rate(index) * learner.health.rate
        loss = learner.advance(index + 1, list(draw_objectives(method, denoiser, data, index)), now)
        facts = method.facts() | learner.health.facts()
        yield learner.step(Done(index + 1, loss, now, method.gradient_norm, facts))


def learning_rates(settings: Settings, optimizer: torch.optim.Optimizer) -> Callable[[int], float]:
    """Return the schedule: the learning rate by the number of steps made before."""
    schedule: Any = get_scheduler(
        settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=settings.steps,
    )
    return lambda index: settings.learning_rate * schedule.lr_lambdas[0](index)


class Learner:
    """All of a run that moves: what is learned, its average, its optimiser, and its health."""

    def __init__(self, method: Method, denoiser: Denoiser):
        s = method.settings
        self.method = method
        self.denoiser = denoiser
        self.parameters = adapt(method, denoiser.unet)
        self.names = [n for n, p in denoiser.unet.named_parameters() if p.requires_grad]
        self.optimizer = build_optimizer(
            s.optimizer, self.parameters, s.learning_rate, s.weight_decay
        )
        self.average = EMAModel(self.parameters, decay=s.ema_decay) if s.ema_decay > 0 else None
        self.health = Health()

    def advance(self, step: int, objectives: list[Objective], rate: float) -> float:
        """Make a step; return its loss, NaN where nothing moved. See `train` for errors."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = float(self.method.update(objectives, self.optimizer))
        if not math.isfinite(loss) and not finite(self.parameters):
            raise FloatingPointError(
                f"what is learned is not finite any more at step {step}: lower 'learning_rate' "
                f"(it is {rate:g}), or set 'gradient_clipping' to 1"
            )
        norm = self.method.gradient_norm
        self.health = self.health.after(step, loss, norm, self.method.settings)
        if self.average is not None and math.isfinite(loss):
            self.average.step(self.parameters)
        self.method.moving = False
        return loss

    def step(self, done: Done) -> Step:
        """Say what a step did, and offer what there is now."""
        return Step(
            **vars(done),
            learned=self.learned,
            kept=self.kept,
            state=lambda: self.state(done),
            free=self.free,
        )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, the network is as `learned` keeps it."""
        average = self.average
        if average is None or average.temp_stored_params is not None:  # it is so already
            yield
            return
        average.store(self.parameters)
        average.copy_to(self.parameters)
        try:
            yield
        finally:
            average.restore(self.parameters)

    def learned(self) -> Mapping[str, Edit | TimeAware]:
        """Return a snapshot of what is learned."""
        with self.kept():
            return self.method.learned(self.denoiser.unet)

    def free(self) -> None:
        """Let go of everything."""
        self.optimizer.state.clear()
        self.optimizer.param_groups.clear()
        self.parameters.clear()
        self.average = None

    def state(self, done: Done) -> State:
        """Return a snapshot of all that moves.

        Raises FloatingPointError when it is worth nothing: not finite, or left by an error with
        the optimiser half done.
        """
        if self.method.moving or not finite(self.parameters):
            problem = "half moved" if self.method.moving else "not finite"
            raise FloatingPointError(f"what is learned is {problem} after step {done.index}")
        average = {}
        if self.average is not None:
            shadows = dict(zip(self.names, self.average.shadow_params, strict=True))
            average = {"steps": self.average.optimization_step, "parameters": shadows}
        return State(
            done,
            self.health,
            copied(dict(zip(self.names, self.parameters, strict=True))),
            copied(average),
            copied(self.optimizer.state_dict()),
            copied(self.method.state_dict()),
        )

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Take over a state. Raises InputError when it is that of another kind of run."""
        try:
            fill(self.names, self.parameters, state.parameters)
            if self.average is not None:
                fill(self.names, self.average.shadow_params, state.average["parameters"])
                self.average.optimization_step = int(state.average["steps"])
            load_optimizer(self.optimizer, copied(state.optimizer))
            self.method.load_state_dict(copied(state.method))
            if not finite(self.parameters):
                raise ValueError("numbers that are not finite")
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                "name",
                f"has a state that does not fit ({brief(error)}); delete the run's "
                "state.safetensors, or take another name.",
            ) from error
        self.health = state.health


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over an optimiser's state, but for what this version and its settings switch.

    Raises LookupError, TypeError or ValueError when it is that of other weights, or damaged.
    """
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, before in zip(optimizer.param_groups, own, strict=True):
        for name, value in before.items():
            if value is None or isinstance(value, bool):
                group[name] = value
            elif not alike(group[name], value):
                raise ValueError(f"{name} {group[name]!r:.40} where {value!r:.40} was expected")
    check_shapes(optimizer)


def fill(names: list[str], tensors: list[Any], values: Mapping[str, Tensor]) -> None:
    """Write values into tensors. Raises ValueError unless names and shapes agree."""
    if list(values) != names or any(
        tensor.shape != values[name].shape for name, tensor in zip(names, tensors, strict=True)
    ):
        raise ValueError(f"{len(values)} tensors for {len(names)} parameters")
    for name, tensor in zip(names, tensors, strict=True):
        tensor.copy_(values[name])


def adapt(method: Method, unet: UNet2DConditionModel) -> list[nn.Parameter]:
    """Put the method's parameters into `unet`, seeded, in fp32; return them."""
    unet.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        # only the CPU's generator: torch.manual_seed would also set those of all GPUs
        torch.default_generator.manual_seed(generator(method.settings.seed, 0, 0).initial_seed())
        method.adapt(unet)
    nn.Module.to(unet, unet.device)  # diffusers has its own, which warns
    parameters = [p for p in unet.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("layers", "leaves nothing to train in this base; choose other layers.")
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.float32)
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
