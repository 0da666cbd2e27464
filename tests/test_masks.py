"""Masks: the loss only where it matters, wherever the picture goes."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from personalize.nodes.fit import fitted_mask
from personalize.trainers.data import evened
from personalize.trainers.edits import to_tensors
from personalize.trainers.loop import adapt, draw_objectives
from personalize.trainers.method import Draws, Objective, denoising_loss, generator
from personalize.trainers.methods.apt import APT, Views
from personalize.trainers.methods.lora import LoRA
from personalize.trainers.methods.selective_zo import SelectiveZO, shrunk
from personalize.trainers.monitor import Probe, stable_loss
from tests.test_dataset import SIDE, pictures, prepared, refusal, vae  # noqa: F401
from tests.tiny import example, make, noise, run, same, tiny_data, tiny_denoiser


def masked(data, *masks):
    """Give the training pictures masks; None: none."""
    pairs = zip(data.training, masks, strict=True)
    return dataclasses.replace(
        data, training=tuple(dataclasses.replace(e, mask=mask) for e, mask in pairs)
    )


def left_half() -> torch.Tensor:
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    return mask


def whole_set(data, method=None, **settings):
    """Return a batch of all training pictures."""
    method = method or make(LoRA, batch_size=len(data.training), **settings)
    return method.draw(data, tiny_denoiser(), Draws(0, 0, 0, 1))


# The loss


def test_the_loss_is_measured_inside_the_mask_its_naive_reference():
    grey = noise(8, 8, seed=1).clamp(0, 1)
    data, denoiser = masked(tiny_data(3), left_half(), None, grey), tiny_denoiser()
    batch = whole_set(data)
    with torch.no_grad():
        found = denoising_loss(denoiser, batch)
        noisy = denoiser.noised(batch.latents, batch.noise, batch.timesteps)
        errors = (denoiser(noisy, batch.timesteps, batch.context) - batch.noise).square()
    for i, latent in enumerate(batch.latents):
        own = next(e for e in data.training if torch.equal(e.latent, latent))
        weights = torch.ones(8, 8) if own.mask is None else own.mask
        expected = float((errors[i].mean(0) * weights).sum() / weights.sum())
        assert float(found[i]) == pytest.approx(expected, rel=1e-5)


def test_what_is_masked_out_has_no_part_in_the_loss():
    data, denoiser = masked(tiny_data(1), left_half()), tiny_denoiser()
    batch = whole_set(data)
    predicted = noise(1, 4, 8, 8, seed=9).requires_grad_()
    denoiser.forward = lambda *_: predicted  # what the network says, as numbers of its own
    denoising_loss(denoiser, batch).sum().backward()
    gradient = predicted.grad.abs().sum((0, 1))
    assert gradient[:, 4:].max() == 0 < gradient[:, :4].min()


def test_a_small_mask_does_not_slow_learning_down():
    """The same error everywhere gives the same loss, however much of it is masked out."""
    errors = torch.full((1, 4, 8, 8), 0.7)
    small = torch.zeros(8, 8)
    small[0, 0] = 0.2
    for mask in (small, left_half(), torch.ones(8, 8)):
        assert float((errors * evened(mask)).mean()) == pytest.approx(0.7, rel=1e-6)
    assert evened(torch.zeros(8, 8)).abs().max() == 0


def test_a_white_mask_is_none_bit_for_bit():
    plain, white = tiny_data(3), masked(tiny_data(3), *[torch.ones(8, 8)] * 3)
    for method in (LoRA, APT, SelectiveZO):
        one, other = (
            run(make(method, min_snr_gamma=5.0), tiny_denoiser(), data)[-1]
            for data in (plain, white)
        )
        assert same(to_tensors(one.learned()), to_tensors(other.learned())), method.name
        assert one.loss == other.loss


def test_a_mask_changes_what_is_learned():
    plain, half = tiny_data(1), masked(tiny_data(1), left_half())
    a, b = (to_tensors(run(make(LoRA), tiny_denoiser(), d)[-1].learned()) for d in (plain, half))
    assert not same(a, b)


def test_what_is_inside_is_learned_better_than_what_is_outside():
    """Each half is known better by the network that was trained inside it than by the other."""
    halves = [masked(tiny_data(1), mask) for mask in (left_half(), 1 - left_half())]
    known = []
    for data in halves:
        denoiser = tiny_denoiser()
        run(make(LoRA, steps=40, batch_size=4), denoiser, data)
        known.append([stable_loss(denoiser, half.training) for half in halves])
    assert known[0][0] < known[1][0] and known[1][1] < known[0][1]


def test_prior_pictures_and_min_snr_go_with_masks():
    data, denoiser = masked(tiny_data(1, prior=1), left_half()), tiny_denoiser()
    method = make(LoRA, batch_size=1, min_snr_gamma=5.0, prior_weight=0.5)
    adapt(method, denoiser.unet)
    (objective,) = draw_objectives(method, denoiser, data, 0)
    batch = objective.batch
    assert torch.equal(batch.masks[1], torch.ones(1, 8, 8))
    with torch.no_grad():
        found, each = Objective(method, denoiser, batch)(), denoising_loss(denoiser, batch)
    each = each * denoiser.min_snr_weight(batch.timesteps, 5.0)
    expected = each[0] + 0.5 * each[1]
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


# What is measured


def test_the_monitor_measures_inside_the_mask():
    data, denoiser = masked(tiny_data(1), left_half()), tiny_denoiser()
    (one,) = data.training
    answer = Probe.of([one], 1000, 1).ask(denoiser)
    for row in range(3):
        timestep = torch.tensor([row * 100 + 50])
        epsilon = torch.randn(1, 4, 8, 8, generator=generator(0, 3, row))
        with torch.no_grad():
            noisy = denoiser.noised(one.latent[None], epsilon, timestep)
            error = (denoiser(noisy, timestep, one.context[None]) - epsilon).square()
        inside = float(error[..., :4].mean())
        assert float(answer.loss[row]) == pytest.approx(inside, rel=1e-5)
        assert inside != pytest.approx(float(error.mean()), rel=1e-3)


# It goes where its picture goes


def as_picture(mask: torch.Tensor) -> torch.Tensor:
    """Draw a mask (h, w) as pixels, (3, 8 h, 8 w) in [-1, 1]."""
    return (2 * mask.repeat_interleave(8, 0).repeat_interleave(8, 1) - 1).expand(3, -1, -1)


def blob(height: int = 8, width: int = 8) -> torch.Tensor:
    """A soft mask with one corner darker than the others."""
    mask = torch.zeros(height, width)
    mask[2:6, 2:6], mask[2:4, 2:4] = 1, 0.5
    return mask


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("least", [0.0, 0.25])
def test_a_view_zooms_and_turns_the_mask_with_the_picture(number, least):
    mask = blob() * (1 - least) + least
    one = dataclasses.replace(example(0), pixels=as_picture(blob()), mask=mask)
    shown = {}
    data = dataclasses.replace(
        tiny_data(), encode=lambda x: shown.update(pixels=x) or torch.zeros(1, 4, 8, 8)
    )
    view = Views(0, "black").encoded(data, one, number)
    seen = (F.avg_pool2d(shown["pixels"], 8)[0, 0] + 1) / 2 * (1 - least) + least
    assert (view.mask - seen).abs().mean() < 0.03
    assert (view.mask - mask).abs().mean() > 0.03  # it did move
    assert float(view.mask.min()) >= least - 1e-6


def test_apt_trains_on_the_mask_of_the_view():
    data = masked(tiny_data(3), *[blob()] * 3)
    method = make(APT, batch_size=3, p_max=1.0, temperature=1e6)
    method.indicator.ema_base.fill_(1.0)
    plain = whole_set(data)
    batch = whole_set(data, method)
    assert batch.augmented.all() and batch.masks.shape == (3, 1, 8, 8)
    assert not torch.equal(batch.masks, plain.masks)
    assert batch.masks.mean((1, 2, 3)).tolist() == pytest.approx([1.0] * 3)
    view = method.views.encoded(
        data,
        next(e for e in data.training if torch.equal(e.latent, plain.latents[1])),
        number=1,
    )
    assert torch.equal(batch.masks[1, 0], evened(view.mask))


def test_small_pictures_have_small_masks():
    """Also of a picture that is cut: 13 places wide, 6 of 6.5 are left."""
    for width, kept in ((8, 4), (13, 6)):
        mask = blob(8, width)
        one = dataclasses.replace(example(0, 8, width), pixels=as_picture(mask), mask=mask)
        low = shrunk(dataclasses.replace(tiny_data(), training=(one,)), 0, 2).training[0]
        assert low.mask.shape == low.latent.shape[1:] == (4, kept)
        seen = (F.avg_pool2d(low.pixels[None], 8)[0, 0] + 1) / 2
        assert (low.mask - seen).abs().max() < 0.15
        assert (low.mask - seen).abs().mean() < 0.05


def test_a_mirrored_picture_has_a_mirrored_mask(vae):  # noqa: F811
    mask = torch.zeros(3, SIDE, SIDE)
    mask[:, :, : SIDE // 4] = 1
    data = prepared(vae, masks=[mask], flip=True)
    for one in data.training:
        assert torch.equal(one.mask[:, :2], torch.ones(8, 2)) and one.mask[:, 2:].max() == 0
        assert torch.equal(one.mirrored.mask, one.mask.flip(-1))


@pytest.mark.parametrize("fit", ["crop", "pad", "buckets"])
@pytest.mark.parametrize("size", [(128, 224), (96, 64), (64, 64)])
def test_a_mask_is_fitted_as_its_picture_is(vae, fit, size):  # noqa: F811
    """White where the picture is white, at the places of the latent."""
    height, width = size
    picture = torch.zeros(1, height, width, 3)
    picture[:, height // 4 : height // 2, width // 3 : width // 2] = 1
    data = prepared(vae, [picture], fit=fit, masks=[picture[..., 0]])
    (one,) = data.training
    seen = (F.avg_pool2d(one.pixels[None], 8)[0, 0] + 1) / 2
    assert one.mask.shape == one.latent.shape[1:]
    assert (one.mask - seen).abs().max() < 0.1 and one.mask.max() > 0.5


def test_a_mask_of_another_size_is_a_whole_pictures():
    picture, mask = torch.zeros(64, 128, 3), torch.zeros(32, 32)
    mask[:, 8:16] = 1
    found = fitted_mask(mask, picture, (64, 128), "buckets")
    assert found.shape == (64, 128)
    assert found[:, 36:60].min() > 0.9 and found[:, :28].max() < 0.1 > found[:, 70:].max()


def test_what_padding_fills_is_black():
    found = fitted_mask(torch.ones(64, 128), torch.zeros(64, 128, 3), (64, 64), "pad")
    assert found[16:48].min() == 1 and found[:15].max() == 0 == found[49:].max()


# The node


def test_what_is_outside_counts_as_much_as_it_is_given(vae):  # noqa: F811
    mask = torch.zeros(3, SIDE, SIDE)
    mask[:, :, :32] = 1
    mask[:, :, 32:40] = 0.5
    for outside in (0.0, 0.2):
        for one in prepared(vae, masks=[mask], unmasked_weight=outside).training:
            expected = [1.0] * 4 + [(1 + outside) / 2] + [outside] * 3
            assert one.mask[3].tolist() == pytest.approx(expected)


def test_masks_come_as_batches_and_lists_in_the_order_of_the_pictures(vae):  # noqa: F811
    mixed = [pictures(2), pictures(1, 80, 120, seed=1), pictures(1, 200, 64, seed=2)]
    grey = [torch.full((2, SIDE, SIDE), 0.25), torch.full((80, 120), 0.5), torch.ones(1, 64, 64)]
    data = prepared(vae, mixed, masks=grey, hold_out=1)
    found = [float(e.mask.mean()) for e in (*data.training, *data.held_out)]
    assert found == pytest.approx([0.25, 0.25, 0.5, 1.0])
    assert data.traits()["masks"] == 3
    assert all(e.mask is None for e in prepared(vae, mixed).training)


def test_prior_images_have_no_mask(vae):  # noqa: F811
    how = {"masks": [torch.ones(3, SIDE, SIDE)], "prior_images": [pictures(1)]}
    assert prepared(vae, class_prompt="a totem", **how).prior[0].mask is None


def test_a_mask_for_every_picture():
    assert refusal(None, masks=[torch.ones(2, SIDE, SIDE)]) == (
        "'masks' has 2 masks for 3 images; give one per image, in their order (white all over for "
        "a picture that counts as a whole), or none."
    )


def test_masks_that_leave_nothing_to_learn_are_named_before_anything_is_encoded():
    masks = torch.ones(4, SIDE, SIDE)
    masks[0] = 0
    masks[2, 3, 3] = float("nan")
    assert refusal(None, [pictures(4)], masks=[masks]) == (
        "'masks' can not be used: mask 1 is black wherever its picture is shown; mask 3 has places "
        "that are NaN or infinite. White is where to learn: paint there, or set 'unmasked_weight' "
        "above 0."
    )
    edge = torch.zeros(1, 64, 256)
    edge[..., :32] = 1  # what crop cuts off
    assert "mask 1 is black wherever" in refusal(None, [pictures(1, 64, 256)], masks=[edge])


def test_a_black_mask_with_a_weight_outside_is_a_whole_picture(vae):  # noqa: F811
    (one, *_) = prepared(vae, masks=[torch.zeros(3, SIDE, SIDE)], unmasked_weight=0.5).training
    assert torch.equal(evened(one.mask), torch.ones(8, 8))


def test_masks_are_part_of_the_fingerprint(vae):  # noqa: F811
    images, half = [pictures()], torch.ones(3, SIDE, SIDE)
    half[..., :30] = 0
    prints = [
        prepared(vae, images, **how).fingerprint()
        for how in (
            {},
            {"masks": [torch.ones(3, SIDE, SIDE)]},
            {"masks": [half]},
            {"masks": [half], "unmasked_weight": 0.1},
        )
    ]
    assert len(set(prints)) == 4


def test_masks_born_in_inference_mode_can_be_trained_with(vae):  # noqa: F811
    """As nodes make them; `prepared` runs the node in inference mode."""
    with torch.inference_mode():
        mask = torch.ones(3, SIDE, SIDE)
    assert not any(e.mask.is_inference() for e in prepared(vae, masks=[mask]).training)
