"""The denoiser's schedule and targets against diffusers and against closed forms."""

import pytest
import torch
from diffusers import DDPMScheduler

from personalize.trainers.denoiser import Denoiser, noise_schedule
from tests.tiny import noise, question, sd_alphas, tiny_denoiser, tiny_unet

TIMESTEPS = torch.tensor([0, 1, 250, 500, 998, 999])


def test_the_schedule_has_exactly_the_bases_alphas():
    alphas = sd_alphas()
    schedule = noise_schedule(alphas, "epsilon")
    assert torch.equal(schedule.alphas_cumprod, alphas)
    from_betas = torch.cumprod(1 - schedule.betas.double(), 0)
    assert (from_betas - alphas.double()).abs().max() < 1e-6


def test_noising_keeps_power():
    denoiser = tiny_denoiser()
    x, eps = noise(6, 4, 8, 8), noise(6, 4, 8, 8, seed=1)
    noisy = denoiser.noised(x, eps, TIMESTEPS)
    for i, t in enumerate(TIMESTEPS):
        a = sd_alphas()[t]
        assert torch.allclose(noisy[i], a.sqrt() * x[i] + (1 - a).sqrt() * eps[i], atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_targets_are_diffusers(prediction_type):
    denoiser = tiny_denoiser(prediction_type=prediction_type)
    stock = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x, eps = noise(6, 4, 8, 8), noise(6, 4, 8, 8, seed=1)
    target = denoiser.target(x, eps, TIMESTEPS)
    expected = eps if prediction_type == "epsilon" else stock.get_velocity(x, eps, TIMESTEPS)
    assert torch.allclose(target, expected, atol=1e-6)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights_are_their_formula(gamma):
    epsilon = tiny_denoiser().min_snr_weight(TIMESTEPS, gamma)
    velocity = tiny_denoiser(prediction_type="v_prediction").min_snr_weight(TIMESTEPS, gamma)
    for i, t in enumerate(TIMESTEPS):
        a = float(sd_alphas()[t])
        snr = a / (1 - a)
        assert float(epsilon[i]) == pytest.approx(min(snr, gamma) / snr, rel=1e-4)
        assert float(velocity[i]) == pytest.approx(min(snr, gamma) / (snr + 1), rel=1e-4)


def test_min_snr_never_raises_a_weight():
    weights = tiny_denoiser().min_snr_weight(torch.arange(1000), 5.0)
    assert weights.max() <= 1.0 and (weights.diff() >= -1e-6).all()


def test_latents_must_halve_evenly_at_every_level():
    assert tiny_denoiser().size_multiple == 2
    three = tiny_unet(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
    )
    assert Denoiser(three, sd_alphas(), "epsilon").size_multiple == 4


def test_the_base_is_frozen_and_in_eval():
    denoiser = tiny_denoiser()
    assert not any(p.requires_grad for p in denoiser.parameters())
    assert not any(module.training for module in denoiser.unet.modules())
    assert denoiser.timestep_count == 1000


def test_a_half_precision_base_still_answers_in_fp32():
    with torch.no_grad():
        exact = tiny_denoiser()(*question())
        denoiser = tiny_denoiser()
        denoiser.unet.to(torch.bfloat16)
        rough = denoiser(*question())
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1 * exact.abs().max()
