"""Pictures of several sizes: what is drawn, and that everything after it can work with them."""

import dataclasses
import math
from collections import Counter

import pytest
import torch

from personalize.nodes import bridge
from personalize.nodes.base import in_network_scale
from personalize.nodes.fit import BUCKETS, FITS, bucket_of, buckets, fitted_to, origin_of
from personalize.nodes.monitor import Monitoring, MonitorSettings, leave_one_out
from personalize.trainers.copies import nearest
from personalize.trainers.edits import to_tensors
from personalize.trainers.errors import InputError
from personalize.trainers.loop import draw_objectives
from personalize.trainers.method import Draws, generator
from personalize.trainers.methods import METHODS
from personalize.trainers.methods.apt import APT
from personalize.trainers.methods.lora import LoRA
from personalize.trainers.methods.selective_zo import SelectiveZO, shrunk
from personalize.trainers.monitor import BINS, Examination, Probe, over_fitting, stable_loss
from tests.test_dataset import SIDE, pictures, prepared, refusal, vae  # noqa: F401
from tests.tiny import (
    comfy_model,
    comfy_output,
    distance,
    example,
    make,
    mixed_data,
    noise,
    rich_data,
    run,
    same,
    tiny_data,
    tiny_denoiser,
)

SETTINGS = {"batch_size": 2, "steps": 6, "caption_dropout": 0.3, "min_snr_gamma": 5.0}


def drawn(data, count: int, batches: int, seed: int = 0) -> list[list]:
    """Return the training pictures of the first batches."""
    return [Draws(seed, step, 0, 1).shown(data, count)[0] for step in range(batches)]


# What is drawn


@pytest.mark.parametrize("count, prior, parts", [(1, 0, 1), (2, 0, 1), (2, 3, 2), (5, 2, 1)])
def test_plain_pictures_are_drawn_as_they_always_were(count, prior, parts):
    """Against the drawing of the first releases, written out: results measured then rest on it."""
    data, denoiser = tiny_data(3, prior=prior), tiny_denoiser()
    settings = {"caption_dropout": 0.5, "noise_offset": 0.1, "prior_weight": 0.7}
    method = make(LoRA, seed=4, batch_size=count, gradient_accumulation=parts, **settings)
    for step in range(5):
        for part, objective in enumerate(draw_objectives(method, denoiser, data, step)):
            index = step * parts + part

            def turn(pool, index=index):
                places = [divmod(i, len(pool)) for i in range(index * count, (index + 1) * count)]
                orders = [
                    torch.randperm(len(pool), generator=generator(4, 2, e)) for e, _ in places
                ]
                return [pool[int(order[p])] for order, (_, p) in zip(orders, places, strict=True)]

            shown = turn(data.training) + (turn(data.prior) if prior else [])
            rng = generator(4, 1, index)
            latents = torch.stack([e.latent for e in shown])
            timesteps = torch.randint(1000, (len(shown),), generator=rng)
            drawn_noise = torch.randn(latents.shape, generator=rng)
            drawn_noise = drawn_noise + 0.1 * torch.randn(len(shown), 4, 1, 1, generator=rng)
            unsaid = torch.rand(len(shown), generator=rng) < 0.5
            contexts = [
                data.empty.context if u else e.context for u, e in zip(unsaid, shown, strict=True)
            ]
            weight = torch.tensor([1.0] * count + [0.7] * (len(shown) - count)) / count
            batch = objective.batch
            assert torch.equal(batch.latents, latents) and torch.equal(batch.noise, drawn_noise)
            assert torch.equal(batch.timesteps, timesteps) and torch.equal(batch.weight, weight)
            assert torch.equal(batch.context, torch.stack(contexts))
            assert batch.seed == generator(4, 4, index).initial_seed()
            assert batch.masks is None


def test_the_fingerprint_of_plain_data_is_what_it_was():
    assert tiny_data(5, prior=2, held_out=2).fingerprint() == PLAIN
    assert mixed_data().fingerprint() != mixed_data(mask=torch.ones(1)).fingerprint()


PLAIN = "112b83bd060f1ddc"  # of the first releases


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_an_epoch_shows_every_picture_once_in_batches_of_one_size(count):
    data = mixed_data()
    batches = sum(math.ceil(n / count) for n in (3, 3, 1))
    shown = drawn(data, count, 3 * batches)
    for batch in shown:
        assert len({e.latent.shape for e in batch}) == 1 and 1 <= len(batch) <= count
    orders = []
    for epoch in range(3):
        own = [e.caption for batch in shown[epoch * batches :][:batches] for e in batch]
        assert Counter(own) == Counter(e.caption for e in data.training)
        orders.append(own)
    assert orders[0] != orders[1] != orders[2]


def test_a_batch_depends_on_seed_and_index_alone():
    data = mixed_data()
    later = Draws(3, 11, 0, 1).shown(data, 2)[0]
    assert [e.caption for e in later] == [e.caption for e in drawn(data, 2, 12, seed=3)[11]]
    assert [[e.caption for e in b] for b in drawn(data, 2, 12, seed=4)] != [
        [e.caption for e in b] for b in drawn(data, 2, 12, seed=3)
    ]


def test_prior_pictures_have_the_size_of_those_they_come_with():
    data = mixed_data(prior=2)
    for step in range(12):
        shown, prior = Draws(0, step, 0, 1).shown(data, 2)
        assert len(prior) == len(shown)
        assert {e.latent.shape for e in prior} == {e.latent.shape for e in shown}
    lonely = dataclasses.replace(data, prior=data.prior[:2])  # square ones only
    batches = [o.batch for i in range(12) for o in objectives(lonely, i)]
    assert {bool(b.of_subject.all()) for b in batches} == {True, False}


def objectives(data, step: int):
    return draw_objectives(make(LoRA), tiny_denoiser_once(), data, step)


def tiny_denoiser_once(cache=[]):  # noqa: B006
    if not cache:
        cache.append(tiny_denoiser())
    return cache[0]


# Every method


CASES = [(method, {}) for method in METHODS.values()] + [
    (APT, {"teacher_cache": 4, "temperature": 1e6}),
    (APT, {"view_pool": 2, "temperature": 1e6}),
    (APT, {"sigma": 0.01, "init": "gaussian", "temperature": 1e6}),
    (SelectiveZO, {"branches": "bp-low"}),
    (SelectiveZO, {"branches": "zo-high"}),
]


@pytest.mark.parametrize(
    "method, more", CASES, ids=[" ".join([m.name, *map(str, s)]) for m, s in CASES]
)
@pytest.mark.parametrize("data", [mixed_data(prior=1), rich_data()], ids=["mixed", "rich"])
def test_every_method_trains_on_every_kind_of_data(method, more, data):
    steps = run(make(method, **SETTINGS, **more), tiny_denoiser(), data)
    assert all(math.isfinite(step.loss) for step in steps)
    again = run(make(method, **SETTINGS, **more), tiny_denoiser(), data)
    assert same(to_tensors(steps[-1].learned()), to_tensors(again[-1].learned()))
    assert len({step.loss for step in steps}) == len(steps)


def test_small_pictures_keep_their_shape_and_order():
    """Sizes that differ when large may be the same when small: the batches are those of before."""
    widths = (12, 12, 13, 13, 8)
    training = tuple(example(i, 8, width) for i, width in enumerate(widths))
    data = dataclasses.replace(tiny_data(), training=training)
    low = shrunk(data, 0, 2)
    assert [e.latent.shape[2] for e in low.training] == [6, 6, 6, 6, 4]
    high, small = (make(SelectiveZO, batch_size=2, branches=b) for b in ("bp-high", "bp-low"))
    for step in range(8):
        a, b = (m.draw(data, tiny_denoiser_once(), Draws(0, step, 0, 1)) for m in (high, small))
        assert torch.equal(a.context, b.context) and torch.equal(a.timesteps, b.timesteps)


def test_small_pictures_are_cut_and_not_squeezed():
    """A wide picture of even stripes: of 104 pixels 52 are left, of which 48 are shown."""
    stripes = torch.linspace(-1, 1, 104).expand(3, 64, 104)
    picture = dataclasses.replace(example(0, 8, 13), pixels=stripes)
    low = shrunk(dataclasses.replace(tiny_data(), training=(picture,)), 0, 2).training[0]
    assert low.pixels.shape == (3, 32, 48)
    steps = low.pixels[0, 0].diff()[4:-4]
    assert float(steps.mean()) == pytest.approx(2 * 2 / 104, rel=0.02)


# What is measured


MIXED = len(mixed_data().training)


@pytest.mark.parametrize("rounds", [1, 2, MIXED])
def test_a_probe_of_mixed_sizes_is_its_naive_reference(rounds):
    data, denoiser = mixed_data(), tiny_denoiser()
    answer = Probe.of(data.training, 1000, rounds).ask(denoiser)
    losses = [[] for _ in range(BINS)]
    for row in range(rounds * BINS):
        one = data.training[row % MIXED]  # no more rows than a cycle of 70
        place = row % BINS + (row // BINS + 0.5) / rounds
        timestep = torch.tensor([int(place * 1000 / BINS)])
        epsilon = torch.randn(one.latent.shape, generator=generator(0, 3, row))[None]
        with torch.no_grad():
            noisy = denoiser.noised(one.latent[None], epsilon, timestep)
            predicted = denoiser(noisy, timestep, one.context[None])
        losses[row % BINS].append(float((predicted - epsilon).square().mean()))
    expected = [sum(own) / len(own) for own in losses]
    assert answer.loss.tolist() == pytest.approx(expected, rel=1e-5)
    if rounds == MIXED:
        mean = sum(expected) / BINS
        assert stable_loss(denoiser, data.training) == pytest.approx(mean, rel=1e-5)
        found = over_fitting(denoiser, data.training, data.training)
        assert found["train_loss"] == pytest.approx(mean, rel=1e-5)


def test_an_examination_of_mixed_sizes_and_prior_pictures_of_one():
    data, denoiser = mixed_data(prior=1), tiny_denoiser()
    splits = {"train": data.training, "held_out": data.held_out, "prior": data.prior}
    examination = Examination(denoiser, splits, 2)
    assert examination.of_base().train == examination.evaluate(denoiser, 1).train


def test_the_monitor_samples_and_draws_in_the_most_usual_size():
    upright = [example(i, 12, 8) for i in range(2)]
    data = dataclasses.replace(tiny_data(1), training=(example(9), *upright))
    assert data.usual_shape == (4, 12, 8)
    assert tiny_data(2).usual_shape == (4, 8, 8)


def test_held_out_pictures_of_the_monitor_get_the_size_nearest_to_theirs():
    data = dataclasses.replace(mixed_data(), instance_prompt="picture 0")
    held_out = tuple(torch.rand(*size, 3) for size in ((300, 210), (100, 99), (64, 200)))
    monitoring = Monitoring(MonitorSettings(), held_out=held_out)
    found = monitoring.prepare(data, comfy_model(), 0).measured.held_out[1:]
    assert [tuple(e.pixels.shape[1:]) for e in found] == [(96, 64), (64, 64), (64, 96)]
    assert [tuple(e.latent.shape[1:]) for e in found] == [(12, 8), (8, 8), (8, 12)]


def test_a_picture_is_left_out_of_mixed_ones():
    data = dataclasses.replace(mixed_data(), held_out=())
    left = leave_one_out(data, seed=3)
    assert len(left.training) == 6 and len(left.held_out) == 1


def test_copies_are_found_among_pictures_of_other_shapes():
    blobs = torch.nn.functional.interpolate(noise(2, 3, 4, 6), (64, 96))
    square = torch.nn.functional.interpolate(noise(1, 3, 4, 4, seed=3), (64, 64))[0]
    known = [square, *blobs]
    middle = blobs[1:, :, :, 16:80]
    assert nearest(middle, known) == pytest.approx(1.0, abs=1e-5)
    assert nearest(middle, known[:2]) < 0.7


# Sizes


@pytest.mark.parametrize("side", [64, 128, 192, 256, 512, 768, 1024, 520])
def test_buckets_have_as_many_pixels_and_are_no_longer_than_two_to_one(side):
    step = 64 if side >= 256 else side // 4 if side != 192 else 32
    found = buckets(side)
    assert found[0] == (side // step * step,) * 2 and len(set(found)) == len(found) >= 5
    for height, width in found:
        assert height % step == width % step == 0 and (width, height) in found
        assert max(height, width) <= 2 * min(height, width)
        assert abs(height * width / side**2 - 1) <= 0.13


def test_buckets_of_1024_are_those_that_sdxl_was_trained_on():
    """As far as they go to 2:1 (Podell et al. 2023, appendix I)."""
    paper = {(1024, 1024), (960, 1088), (896, 1152), (832, 1216), (768, 1344)}
    assert paper <= set(buckets(1024))


@pytest.mark.parametrize("height, width", [(300, 451), (1000, 1000), (90, 64), (64, 500), (7, 5)])
def test_a_picture_goes_to_the_nearest_bucket_and_is_not_enlarged_beyond_crop(height, width):
    size = bucket_of(height, width, 512)

    def off(bucket):
        return abs(math.log(bucket[0] / bucket[1]) - math.log(height / width))

    assert off(size) == pytest.approx(min(map(off, buckets(512))))
    enlarged = max(size[0] / height, size[1] / width)
    assert enlarged <= 512 / min(height, width) + 1e-9


def test_a_bucket_cuts_the_little_that_is_too_much_at_the_centre():
    picture = torch.zeros(200, 330, 3)
    picture[90:110, 155:175] = 1
    found = fitted_to(picture, (384, 640), BUCKETS)
    assert found.shape == (384, 640, 3)
    rows, columns = (found[..., 0] > 0.5).nonzero(as_tuple=True)
    assert float(rows.float().mean()) == pytest.approx(191.5, abs=0.6)
    assert float(columns.float().mean()) == pytest.approx(319.5, abs=0.6)
    assert len(rows.unique()) == pytest.approx(len(columns.unique()), abs=2)  # not squeezed
    origin = origin_of(picture, (384, 640), BUCKETS)
    assert origin.size == (200, 330) and origin.corner[0] > 0 == origin.corner[1]
    assert origin.corner[0] == pytest.approx((200 - 198) / 2 / 198)


def test_sdxl_is_told_the_size_that_a_picture_has():
    assert example(0, 12, 8).sizes.tolist() == [96, 64, 0, 0, 96, 64]
    origin = origin_of(torch.zeros(300, 190, 3), (96, 64), BUCKETS)
    told = dataclasses.replace(example(0, 12, 8), origin=origin).sizes.tolist()
    assert told == [300, 190, 3, 0, 96, 64]  # of 300 rows the middle 285 are shown


@pytest.mark.parametrize("height, width", [(12, 8), (6, 14)])
def test_on_pictures_that_are_not_square_training_computes_what_comfyui_does(height, width):
    model = comfy_model()
    inputs = noise(2, 4, height, width, seed=5), torch.tensor([3, 990]), noise(2, 7, 32, seed=6)
    with torch.no_grad():
        ours = bridge.denoiser_of(model)(*inputs)
    assert distance(ours, comfy_output(model, *inputs)) <= 1e-4


# The node


def test_the_dataset_keeps_shapes_and_brings_prior_images_to_each(vae):  # noqa: F811
    mixed = [pictures(1, 64, 64), pictures(1, 120, 72, seed=1), pictures(1, 50, 100, seed=2)]
    prior = {"prior_images": [pictures(2, 90, 90, seed=3)], "class_prompt": "a totem"}
    data = prepared(vae, mixed, fit="buckets", hold_out=1, **prior)
    assert [tuple(e.pixels.shape[1:]) for e in data.training] == [(64, 64), (80, 48)]
    assert [tuple(e.latent.shape[1:]) for e in data.training] == [(8, 8), (10, 6)]
    assert [tuple(e.pixels.shape[1:]) for e in data.held_out] == [(48, 96)]
    assert [tuple(e.pixels.shape[1:]) for e in data.prior] == [(64, 64)] * 2 + [(80, 48)] * 2
    assert data.traits()["sizes"] == ["48x80", "64x64"]


def test_square_pictures_are_the_same_in_buckets_and_cut(vae):  # noqa: F811
    images = [pictures(2, 90, 90), pictures(1, 64, 64)]
    a, b = (prepared(vae, images, fit=fit) for fit in ("crop", "buckets"))
    assert a.fingerprint() == b.fingerprint()
    for one, other in zip(a.training, b.training, strict=True):
        assert torch.equal(one.latent, other.latent)


def test_every_size_that_the_base_does_not_take_is_named():
    model = comfy_model()
    denoiser = bridge.denoiser_of(model)
    assert denoiser.size_multiple == 2
    data = dataclasses.replace(
        tiny_data(), training=(example(0), example(1, 8, 9)), held_out=(example(2, 7, 8),)
    )
    with pytest.raises(InputError, match=r"latents of 8x7, 9x8, but .* multiple of 16"):
        in_network_scale(data, model, denoiser)


def test_every_picture_is_brought_to_the_scale_of_the_network():
    model, data = comfy_model(), rich_data()
    scaled = in_network_scale(data, model, bridge.denoiser_of(model))
    for before, after in zip(data.drawn(), scaled.drawn(), strict=True):
        assert torch.equal(after.latent, model.model.process_latent_in(before.latent))
        assert not torch.equal(after.latent, before.latent)
    assert scaled.held_out[0].mirrored is None
    assert torch.equal(
        scaled.held_out[0].latent, model.model.process_latent_in(data.held_out[0].latent)
    )


def test_pixel_datasets_have_no_buckets(vae):  # noqa: F811
    """A base in pixel space takes one size only."""
    assert BUCKETS not in FITS
    assert SIDE % 8 == 0 and "multiple of 8" in refusal(vae, resolution=100, fit="buckets")
