"""The stable loss: fixed pictures, timesteps and noise."""

from itertools import product

import pytest
import torch

from personalize.trainers.loop import adapt
from personalize.trainers.method import denoising_loss
from personalize.trainers.methods.dreambooth import DreamBooth
from personalize.trainers.methods.lora import LoRA
from personalize.trainers.monitor import (
    TIMESTEPS,
    corruption,
    fixed_batches,
    high_frequency_energy,
    over_fitting,
    stable_loss,
)
from tests.tiny import make, run, tiny_data, tiny_denoiser


def test_it_is_the_same_number_every_time_and_draws_nothing():
    denoiser, data = tiny_denoiser(), tiny_data(held_out=2)
    before = torch.get_rng_state()
    first = stable_loss(denoiser, data.held_out)
    assert first == stable_loss(denoiser, data.held_out) > 0
    assert torch.equal(before, torch.get_rng_state())


def test_it_covers_the_whole_schedule_evenly(monkeypatch):
    asked = []
    from personalize.trainers import monitor

    def spy(denoiser, batch):
        asked.append(batch.timesteps)
        return denoising_loss(denoiser, batch)

    monkeypatch.setattr(monitor, "denoising_loss", spy)
    stable_loss(tiny_denoiser(), tiny_data().training[:1])
    assert torch.cat(asked).tolist() == [50 + 100 * i for i in range(TIMESTEPS)]


def test_training_lowers_it_on_the_training_pictures_and_the_prior_keeps_the_bases():
    data, fresh = tiny_data(count=1), tiny_denoiser()
    base = stable_loss(fresh, data.training)
    denoiser = tiny_denoiser()
    run(make(LoRA, steps=60, batch_size=4), denoiser, data)
    assert stable_loss(denoiser, data.training) < base
    with denoiser.prior():
        assert stable_loss(denoiser, data.training) == base


def test_noise_raises_the_high_frequency_energy_and_a_flat_picture_has_none():
    flat = torch.ones(1, 4, 8, 8) * torch.randn(1, 4, 1, 1)
    noise = torch.randn(1, 4, 8, 8)
    energies = [float(high_frequency_energy(flat + scale * noise)) for scale in (0.0, 0.1, 0.2)]
    assert energies[0] < 1e-12 < energies[1]
    assert energies[2] == pytest.approx(4 * energies[1], rel=1e-3)


def test_high_frequency_energy_equals_the_naive_sum():
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    total = 0.0
    for i, j in product(range(4), range(4)):
        around = [
            x[0, 0, min(max(i + di, 0), 3), min(max(j + dj, 0), 3)]
            for di, dj in product((-1, 0, 1), (-1, 0, 1))
        ]
        total += float(x[0, 0, i, j] - sum(around) / 9) ** 2
    assert float(high_frequency_energy(x)) == pytest.approx(total / 16)


def test_the_picture_predicted_from_the_true_target_is_the_picture():
    for kind in ("epsilon", "v_prediction"):
        denoiser = tiny_denoiser(prediction_type=kind)
        for batch in fixed_batches(denoiser, tiny_data().training[:1]):
            noisy = denoiser.noised(batch.latents, batch.noise, batch.timesteps)
            target = denoiser.target(batch.latents, batch.noise, batch.timesteps)
            found = denoiser.cleaned(noisy, target, batch.timesteps)
            assert torch.allclose(found, batch.latents, atol=1e-3)


def test_an_untrained_network_is_as_grainy_as_the_base_and_a_broken_one_grainier():
    data, denoiser = tiny_data(held_out=2), tiny_denoiser()
    adapt(make(DreamBooth), denoiser.unet)
    assert corruption(denoiser, data.held_out) == 0.0
    with torch.no_grad():
        denoiser.unet.get_parameter("conv_out.free.default.weight").mul_(100)
    assert corruption(denoiser, data.held_out) > 0.5


def test_training_on_one_picture_opens_a_gap():
    data, denoiser = tiny_data(count=3, held_out=1), tiny_denoiser()
    run(make(LoRA, steps=60, batch_size=4), denoiser, data)
    found = over_fitting(denoiser, data.training, data.held_out)
    assert found["train_loss"] == stable_loss(denoiser, data.training[:1])
    fell_in_training = found["train_loss_of_base"] - found["train_loss"]
    assert fell_in_training > found["held_out_loss_of_base"] - found["held_out_loss"]
