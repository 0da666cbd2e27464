"""Going on with a run: N steps and N more are 2N steps, bit for bit, whatever is switched on."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from personalize.trainers.edits import to_tensors
from personalize.trainers.errors import InputError
from personalize.trainers.loop import Step, train
from personalize.trainers.methods import METHODS
from personalize.trainers.optimizers import OPTIMIZERS
from personalize.trainers.state import State, pack
from tests.tiny import make, same, tiny_data, tiny_denoiser

HALF = 3  # steps


@pytest.fixture(params=METHODS.values(), ids=METHODS.keys())
def method(request):
    return request.param


EVERYTHING = {
    "gradient_accumulation": 2,
    "batch_size": 1,
    "schedule": "cosine",
    "warmup_steps": 2,
    "ema_decay": 0.9,
    "noise_offset": 0.1,
    "caption_dropout": 0.3,
}
# settings under which a method keeps something that could be forgotten
OWN = {
    "apt": {"teacher_cache": 3, "view_pool": 2, "p_max": 1.0, "temperature": 1e6},
    "bnn": {"sigma": 0.01, "kl_weight": 0.1},
    "a3ft": {"gate": "half"},
    "selective_zo": {"zo_learning_rate": 1e-2, "zo_restore": "in place", "perturbations": 2},
    "para": {"init": "random"},
}


def steps_of(method, state: State | None = None, dtype=torch.float32, **settings):
    """Train a fresh network of 2 * HALF steps, from the start or a state."""
    denoiser = tiny_denoiser()
    denoiser.unet.to(dtype)
    chosen = make(method, **{"steps": 2 * HALF, **settings})
    return train(chosen, denoiser, tiny_data(3, prior=1), state)


def told(step: Step) -> str:
    """What a step says, and what is learned after it; NaN and all."""
    learned = {k: v.numpy().tobytes() for k, v in to_tensors(step.learned()).items()}
    numbers = [step.index, step.loss, step.learning_rate, step.gradient_norm, step.facts]
    return repr((numbers, learned))


def stop_after(path: Path, method, steps: int, state: State | None = None, **settings) -> list[str]:
    """Go so many steps from a state, keep the new state in a file; return what was told."""
    running, said = steps_of(method, state, **settings), []
    if state is not None:
        said.append(told(next(running)))
    for _ in range(steps):
        step = next(running)
        said.append(told(step))
    step.state().save(path)
    running.close()
    return said


def check_exact(path: Path, method, **settings) -> None:
    """Compare a whole run with one that stopped twice."""
    whole = [told(step) for step in steps_of(method, **settings)]
    parts = stop_after(path, method, 2, **settings)
    again = stop_after(path, method, 2, State.load(path), **settings)
    assert again[0] == parts[-1]  # the step of the state comes back as it was
    rest = [told(step) for step in steps_of(method, State.load(path), **settings)]
    assert rest[0] == again[-1]
    assert parts + again[1:] + rest[1:] == whole
    assert len(set(whole)) == 2 * HALF  # every step moved


def test_a_run_that_stopped_twice_is_the_whole_run_bit_for_bit(tmp_path, method):
    check_exact(tmp_path / "state", method)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_with_average_accumulation_schedule_and_the_methods_own_state(tmp_path, method, dtype):
    settings = EVERYTHING | OWN.get(method.name, {})
    check_exact(tmp_path / "state", method, dtype=dtype, **settings)


@pytest.mark.parametrize("over", ["full", "oft"])
def test_over_other_kinds_of_weights(tmp_path, over):
    check_exact(tmp_path / "state", METHODS["bnn"], over=over, sigma=0.01, block_size=8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_every_optimizer_there_is(tmp_path, name):
    if importlib.util.find_spec(OPTIMIZERS[name][0].partition(".")[0]) is None:
        pytest.skip(f"{name} is not installed")
    check_exact(tmp_path / "state", METHODS["lora"], optimizer=name, schedule="cosine")
