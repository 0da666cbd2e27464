"""The loop: rates, clipping, averages, draws, and how it ends."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from personalize.trainers.edits import to_tensors
from personalize.trainers.errors import InputError
from personalize.trainers.loop import adapt, train
from personalize.trainers.method import Draws, Method, Objective, generator
from personalize.trainers.methods import METHODS
from personalize.trainers.methods.lora import LoRA
from personalize.trainers.optimizers import build_optimizer
from tests.tiny import make, noise, run, same, tiny_data, tiny_denoiser, tiny_unet


def rates(**settings) -> list[float]:
    return [step.learning_rate for step in run(make(LoRA, **settings), tiny_denoiser())]


# Learning rates


def test_a_constant_rate_is_constant():
    assert rates(steps=4, learning_rate=2e-3) == [2e-3] * 4


def test_a_warm_up_rises_from_zero_in_equal_steps():
    found = rates(steps=6, learning_rate=1e-2, warmup_steps=4)
    assert found == pytest.approx([0, 2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2])


def test_a_linear_rate_falls_to_zero_at_the_end():
    found = rates(steps=5, learning_rate=1e-2, schedule="linear")
    assert found == pytest.approx([1e-2, 8e-3, 6e-3, 4e-3, 2e-3])


def test_a_cosine_rate_falls_along_half_a_cosine_after_its_warm_up():
    found = rates(steps=6, learning_rate=1e-2, schedule="cosine", warmup_steps=2)
    falling = [0.5e-2 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert found == pytest.approx([0, 5e-3, *falling])


# One step


def one_step(clipping: float) -> tuple[float, float]:
    """Return (gradient norm used, distance moved) of one plain SGD step with rate 1."""
    denoiser, method = tiny_denoiser(), make(LoRA, gradient_clipping=clipping)
    parameters = adapt(method, denoiser.unet)
    before = [p.detach().clone() for p in parameters]
    batch = method.draw(tiny_data(), denoiser, Draws(0, 0, 0, 1))
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    method.update([Objective(method, denoiser, batch)], optimizer)
    moved = torch.cat([(p - b).flatten() for p, b in zip(parameters, before, strict=True)])
    used = torch.cat([p.grad.flatten() for p in parameters])
    return float(used.norm()), float(moved.detach().norm())


def test_clipping_bounds_the_gradient_and_zero_does_not():
    free, moved = one_step(0.0)
    assert free > 1e-3 and moved == pytest.approx(free, rel=1e-4)
    limit = free / 10
    clipped, moved = one_step(limit)
    assert clipped == pytest.approx(limit, rel=1e-3) and moved == pytest.approx(limit, rel=1e-3)
    assert one_step(free * 2)[0] == pytest.approx(free, rel=1e-5)  # short ones are left alone


@pytest.mark.parametrize("clipping", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(clipping):
    """The loss is finite and one gradient is not, as half precision does it."""
    method, kept = make(LoRA, steps=3, gradient_clipping=clipping, non_finite="stop"), []
    with pytest.raises(FloatingPointError, match="step 2"):
        for step in train(method, denoiser := tiny_denoiser(), tiny_data()):
            kept.append((step, to_tensors(step.learned())))
            broken = next(p for p in denoiser.parameters() if p.requires_grad)
            broken.register_hook(lambda gradient: gradient * float("inf"))
    step, good = kept[-1]
    assert len(kept) == 1 and same(to_tensors(step.learned()), good)


class Reads(TorchDispatchMode):
    """Count how often a number is read off a tensor, for which a GPU has to be waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_an_update_waits_for_the_device_once():
    """It reads loss and norm together, before the weights move."""
    denoiser, method = tiny_denoiser(), make(LoRA)
    optimizer = build_optimizer("adamw", adapt(method, denoiser.unet), 1e-2, 0.0)
    batch = method.draw(tiny_data(), denoiser, Draws(0, 0, 0, 1))
    order = []
    optimizer.register_step_pre_hook(lambda *_: order.append(reads.count))
    with Reads() as reads:
        method.update([Objective(method, denoiser, batch)], optimizer)
    assert order == [2] and reads.count == 2


def test_adamw_moves_as_the_book_says():
    """Loshchilov & Hutter 2019, algorithm 2; however many kernels it takes."""
    rate, decay, betas, eps = 1e-2, 0.1, (0.9, 0.999), 1e-8
    weights = [torch.nn.Parameter(noise(5, 3, seed=i)) for i in range(2)]
    optimizer = build_optimizer("adamw", weights, rate, decay)
    theta = [w.detach().double() for w in weights]
    moments = [(torch.zeros(5, 3).double(), torch.zeros(5, 3).double()) for _ in weights]
    for t in range(1, 5):
        for i, weight in enumerate(weights):
            weight.grad = noise(5, 3, seed=100 * t + i)
            m, v = moments[i]
            g = weight.grad.double()
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
            moments[i] = m, v
            step = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
            theta[i] = theta[i] - rate * step - rate * decay * theta[i]
        optimizer.step()
    for weight, expected in zip(weights, theta, strict=True):
        assert torch.allclose(weight.double(), expected, atol=1e-6)


def test_the_loss_of_a_step_is_the_mean_of_its_parts():
    denoiser, data = tiny_denoiser(), tiny_data()
    method = make(LoRA, steps=1, batch_size=1, gradient_accumulation=3)
    expected = []
    with torch.no_grad():
        for part in range(3):
            batch = method.draw(data, denoiser, Draws(0, 0, part, 3))
            expected.append(float(method.loss(denoiser, batch)))
    assert run(method, denoiser, data)[0].loss == pytest.approx(sum(expected) / 3, rel=1e-5)


# The average


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_the_average_is_the_one_computed_by_hand(method):
    """diffusers' EMA warms up: step n decays by min(decay, n / (9 + n)), the first one copies."""
    decay, steps = 0.3, 4
    plain = train(make(method, steps=steps), tiny_denoiser(), tiny_data())
    history = [to_tensors(step.learned()) for step in plain]
    average = history[0]
    for n, now in enumerate(history[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        average = {k: d * average[k] + (1 - d) * now[k] for k in now}
    averaged = run(make(method, steps=steps, ema_decay=decay), tiny_denoiser())[-1]
    found = to_tensors(averaged.learned())
    assert found.keys() == average.keys()
    for key in found:
        assert torch.allclose(found[key], average[key], atol=1e-6), key
    assert not all(torch.allclose(found[k], history[-1][k], atol=1e-5) for k in found)


def test_reading_the_average_does_not_move_the_run():
    def last(read: bool):
        for step in train(make(LoRA, steps=4, ema_decay=0.5), tiny_denoiser(), tiny_data()):
            if read:
                step.learned()
        return to_tensors(step.learned())

    assert same(last(read=True), last(read=False))


# Draws


def test_draws_depend_on_seed_step_and_part_alone():
    def noise(seed: int, step: int, part: int):
        batch = make(LoRA).draw(tiny_data(), tiny_denoiser(), Draws(seed, step, part, 2))
        return batch.noise.numpy().tobytes()

    torch.manual_seed(1)
    first = noise(5, 3, 1)
    torch.manual_seed(2)
    torch.randn(100)
    assert noise(5, 3, 1) == first
    others = [noise(6, 3, 1), noise(5, 4, 1), noise(5, 3, 0)]
    assert len({first, *others}) == 4


@pytest.mark.parametrize("count, size", [(1, 5), (2, 5), (3, 7), (4, 3), (8, 1)])
def test_every_example_is_shown_equally_often(count, size):
    data, seen = tiny_data(size), []
    for step in range(size):
        for part in range(2):
            seen += [e.caption for e in Draws(9, step, part, 2).examples(data.training, count)]
    assert len(seen) == 2 * size * count
    assert {seen.count(example.caption) for example in data.training} == {2 * count}
    for epoch in range(2 * count):  # each pass through the data shows everything once
        assert len(set(seen[epoch * size : (epoch + 1) * size])) == size


def test_passes_through_the_data_differ_in_order():
    pool = tiny_data(6).training
    passes = [tuple(e.caption for e in Draws(0, i, 0, 1).examples(pool, 6)) for i in range(8)]
    assert len(set(passes)) > 6


def test_streams_do_not_share_numbers():
    states = {
        tuple(torch.rand(4, generator=generator(seed, stream, index)).tolist())
        for seed in (0, 1, 2**63 - 1)
        for stream in range(3)
        for index in range(10)
    }
    assert len(states) == 90


# Ends


def test_a_run_has_as_many_steps_as_were_asked_for():
    assert [step.index for step in run(make(LoRA, steps=5), tiny_denoiser())] == [1, 2, 3, 4, 5]


def test_a_method_that_frees_nothing_is_an_error():
    class Nothing(Method):
        name = title = "nothing"

        def adapt(self, unet):
            pass

    with pytest.raises(InputError, match="'layers' leaves nothing to train"):
        adapt(Nothing(Nothing.Settings()), tiny_unet())


def test_a_wrong_rank_is_refused_before_the_first_step():
    with pytest.raises(InputError, match="'rank'"):
        next(train(make(LoRA, rank=1000), tiny_denoiser(), tiny_data()))
