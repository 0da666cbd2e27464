"""The stable loss: fixed pictures, timesteps and noise."""

import torch

from personalize.trainers.method import denoising_loss
from personalize.trainers.methods.lora import LoRA
from personalize.trainers.monitor import TIMESTEPS, stable_loss
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
