"""APT against its equations (arXiv 2507.02687): the indicator, its uses, and both regularisers."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from personalize.trainers.data import Batch, Example, words_of
from personalize.trainers.edits import to_tensors
from personalize.trainers.errors import InputError
from personalize.trainers.loop import adapt, draw_objectives
from personalize.trainers.method import Draws, Method, Objective, denoising_loss
from personalize.trainers.methods.apt import (
    APT,
    VIEW_LIFETIME,
    Answer,
    APTSettings,
    Indicator,
    ViewedBatch,
    attention_to,
    bins_of,
    map_distance,
    recording,
    zoomed_out,
)
from personalize.trainers.methods.lora import LoRA
from personalize.trainers.monitor import fixed_batch
from personalize.trainers.sites import attentions
from tests.tiny import (
    SIDE,
    WIDTH,
    distance,
    example,
    make,
    noise,
    run,
    same,
    tiny_data,
    tiny_denoiser,
    tiny_unet,
)

OFF = {"adaptive": False, "stabilize": False, "align": False}
PARTS = tuple(OFF)


def only(part: str) -> dict[str, bool]:
    return OFF | {part: True}


def apt(**settings) -> APT:
    method = make(APT, **settings)
    assert isinstance(method, APT)
    return method


def moved(method: Method, seed: int = 50):
    """A denoiser whose learned weights are anywhere but at the start; (denoiser, parameters)."""
    denoiser = tiny_denoiser()
    parameters = adapt(method, denoiser.unet)
    with torch.no_grad():
        for i, parameter in enumerate(parameters):
            parameter.add_(0.1 * noise(*parameter.shape, seed=seed + i))
    return denoiser, parameters


def batch_of(method: Method, prior: int = 0, step: int = 0, count: int = 3):
    return method.draw(tiny_data(count, prior=prior), tiny_denoiser(), Draws(7, step, 0, 1))


def gradients(method: Method, denoiser, parameters, batch) -> torch.Tensor:
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(method.loss(denoiser, batch), parameters)]
    )


def overfit(method: APT, gaps: dict[int, float]) -> None:
    """Make the indicator see these gaps between the base's and the tuned loss, by bin."""
    for b, gap in gaps.items():
        method.indicator.observe(torch.tensor([b]), torch.tensor([1.0]), torch.tensor([1.0 - gap]))


def gap_for(gamma: float) -> float:
    return -math.log(1 - gamma) / 1000


@contextmanager
def counted_forwards(unet) -> Iterator[list[int]]:
    """Count forward passes, by their number of examples."""
    sizes: list[int] = []
    hook = unet.register_forward_pre_hook(lambda _m, inputs: sizes.append(len(inputs[0])))
    try:
        yield sizes
    finally:
        hook.remove()


# The indicator


def test_timesteps_fall_into_ten_equal_bins():
    assert bins_of(torch.tensor([0, 99, 100, 500, 999]), 1000).tolist() == [0, 0, 1, 5, 9]
    assert torch.bincount(bins_of(torch.arange(1000), 1000)).tolist() == [100] * 10
    assert bins_of(torch.tensor([0, 4, 5, 49]), 50).tolist() == [0, 0, 1, 9]


def test_gamma_of_a_gap_is_its_formula():
    indicator = Indicator()
    one = torch.ones(1, dtype=torch.float64)
    indicator.observe(torch.tensor([4]), one + 1e-3, one)
    assert float(indicator.gamma()[4]) == pytest.approx(0.63212, abs=1e-5)
    cool = Indicator(temperature=10.0)
    cool.observe(torch.tensor([4]), torch.tensor([0.3]), torch.tensor([0.1]))
    assert float(cool.gamma()[4]) == pytest.approx(1 - math.exp(-10 * 0.2), rel=1e-5)


def test_gamma_rises_with_the_gap_and_is_zero_below_none():
    indicator = Indicator()
    gaps = torch.tensor([-1.0, -1e-3, 0.0, 1e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 1.0]).double()
    indicator.observe(torch.arange(10), 2 + gaps, torch.full((10,), 2.0))
    gamma = indicator.gamma()
    assert gamma[:3].tolist() == [0, 0, 0] and (gamma[2:].diff() > 0).all()
    assert ((gamma >= 0) & (gamma <= 1)).all()


def test_a_bin_never_seen_is_not_over_fitted():
    assert Indicator().gamma().tolist() == [0.0] * 10


@pytest.mark.parametrize("n", [0, 1, 5, 30])
def test_the_averages_are_their_closed_form(n):
    """After n equal observations v from v0: v + (v0 - v) 0.9^n."""
    indicator, (v0, v), (w0, w) = Indicator(), (0.7, 0.2), (0.5, 0.9)
    bins = torch.full((n + 1,), 3)
    base, tuned = torch.tensor([v0] + [v] * n), torch.tensor([w0] + [w] * n)
    indicator.observe(bins[:1], base[:1], tuned[:1])
    assert float(indicator.ema_base[3]) == float(base[0])  # the first one exactly
    indicator.observe(bins[1:], base[1:], tuned[1:])
    assert float(indicator.ema_base[3]) == pytest.approx(v + (v0 - v) * 0.9**n, rel=1e-6)
    assert float(indicator.ema_tuned[3]) == pytest.approx(w + (w0 - w) * 0.9**n, rel=1e-6)


def test_a_step_touches_only_the_bins_of_its_own_timesteps():
    method, data = apt(batch_size=1), tiny_data()
    denoiser, parameters = moved(method)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    for step in range(4):
        before = {k: v.clone() for k, v in method.indicator.state_dict().items()}
        (objective,) = draw_objectives(method, denoiser, data, step)
        method.update([objective], optimizer)
        mine = int(bins_of(objective.batch.timesteps, 1000))
        others = torch.arange(10) != mine
        for name, value in method.indicator.state_dict().items():
            assert torch.equal(value[others], before[name][others]), name
        assert method.indicator.seen[mine]
        assert not torch.equal(method.indicator.ema_base, before["ema_base"])


def test_the_averages_see_the_unweighted_losses_of_the_subject_alone():
    method = apt(batch_size=2, prior_weight=0.3, min_snr_gamma=5.0)
    denoiser, parameters = moved(method)
    batch = dataclasses.replace(
        batch_of(method, prior=2), timesteps=torch.tensor([150, 850, 350, 550])
    )
    with torch.no_grad():
        tuned = denoising_loss(denoiser, batch)
        with denoiser.prior():
            base = denoising_loss(denoiser, batch)
    method.update([Objective(method, denoiser, batch)], torch.optim.SGD(parameters, lr=0.0))
    assert method.indicator.seen.nonzero().flatten().tolist() == [1, 8]
    assert torch.allclose(method.indicator.ema_base[[1, 8]].float(), base[:2], rtol=1e-5)
    assert torch.allclose(method.indicator.ema_tuned[[1, 8]].float(), tuned[:2], rtol=1e-5)


def test_asking_for_the_loss_changes_nothing():
    method = apt()
    denoiser, _ = moved(method)
    batch = batch_of(method)
    losses = [float(method.loss(denoiser, batch).detach()) for _ in range(3)]
    assert len(set(losses)) == 1
    assert not method.indicator.seen.any() and method.facts() == {}


def test_a_step_that_is_not_taken_teaches_the_indicator_nothing():
    method = apt()
    denoiser, parameters = moved(method)
    good = batch_of(method)
    bad = dataclasses.replace(good, latents=good.latents * torch.nan)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    objectives = [Objective(method, denoiser, batch) for batch in (good, bad)]
    assert method.update(objectives, optimizer).isnan()
    assert not method.indicator.seen.any()


def test_the_indicator_survives_a_file_bit_for_bit(tmp_path):
    method = apt(steps=6)
    run(method, tiny_denoiser())
    assert method.indicator.seen.any() and method.indicator.gamma().any()
    save_file(method.indicator.state_dict(), tmp_path / "state.safetensors")
    restored = apt()
    restored.indicator.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert same(restored.indicator.state_dict(), method.indicator.state_dict())
    assert torch.equal(restored.indicator.gamma(), method.indicator.gamma())


@pytest.mark.parametrize("extra", [{}, {"view_pool": 2}, {"teacher_cache": 2}], ids=str)
def test_a_run_goes_on_from_its_saved_state_bit_for_bit(extra, tmp_path):
    """Weights, optimiser and the ten bins: nothing else decides what comes next."""
    data = tiny_data()

    def steps(method, denoiser, optimizer, numbers):
        for step in numbers:
            method.update(list(draw_objectives(method, denoiser, data, step)), optimizer)

    def start():
        method, denoiser = apt(**extra), tiny_denoiser()
        parameters = adapt(method, denoiser.unet)
        return method, denoiser, torch.optim.SGD(parameters, lr=0.3)

    whole, denoiser, optimizer = start()
    overfit(whole, dict.fromkeys(range(10), gap_for(0.7)))
    steps(whole, denoiser, optimizer, range(4))
    save_file(whole.indicator.state_dict(), tmp_path / "state.safetensors")
    resumed, copy, other = start()
    copy.load_state_dict(denoiser.state_dict())
    resumed.indicator.load_state_dict(load_file(tmp_path / "state.safetensors"))
    augmented = 0.0
    for step in range(4, 8):
        steps(whole, denoiser, optimizer, [step])
        steps(resumed, copy, other, [step])
        augmented += whole.facts()["augmented"]
    assert augmented > 0  # otherwise no view was compared
    assert same(to_tensors(whole.learned(denoiser.unet)), to_tensors(resumed.learned(copy.unet)))
    assert same(whole.indicator.state_dict(), resumed.indicator.state_dict())


# At the base


def test_at_the_base_nothing_is_over_fitted_and_both_regularisers_are_flat():
    """theta = theta_0: gamma 0, weight 1, no augmentation, terms and gradients exactly 0."""
    method = apt(lambda_rs=1e3, lambda_aa=1e3)
    denoiser = tiny_denoiser()
    parameters = adapt(method, denoiser.unet)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    for step in range(6):
        batch = batch_of(method, step=step)
        assert not batch.augmented.any()
        total = method.update([Objective(method, denoiser, batch)], optimizer)
        regularised = gradients(method, denoiser, parameters, batch)
        plain = gradients(make(LoRA), denoiser, parameters, batch)
        assert torch.equal(regularised, plain)  # also: no gradient of theirs
        assert float(total) == float(make(LoRA).loss(denoiser, batch).detach())
        facts = method.facts()
        assert facts["loss_rs"] == facts["loss_aa"] == facts["augmented"] == 0.0
    assert method.indicator.gamma().tolist() == [0.0] * 10
    assert method.indicator.seen.sum() >= 5


# Without its parts


def test_without_its_parts_it_is_lora_bit_for_bit_and_the_base_is_never_asked():
    results, forwards = [], []
    for method in (apt(steps=4, teacher_cache=3, view_pool=2, **OFF), make(LoRA, steps=4)):
        denoiser = tiny_denoiser()
        with counted_forwards(denoiser.unet) as sizes:
            steps = run(method, denoiser, tiny_data(prior=2))
        results.append((to_tensors(steps[-1].learned()), [step.loss for step in steps]))
        forwards.append(sizes)
    assert same(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    assert forwards == [[4] * 4] * 2
    assert method.facts() == {}


@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone_asks_the_base_once_a_step_and_changes_what_is_learned(part):
    denoiser, method = tiny_denoiser(), apt(steps=4, lambda_rs=1.0, lambda_aa=1.0, **only(part))
    overfit(method, dict.fromkeys(range(10), gap_for(0.5)))
    with counted_forwards(denoiser.unet) as sizes:
        learned = to_tensors(run(method, denoiser)[-1].learned())
    assert len(sizes) == 8
    plain = to_tensors(run(make(LoRA, steps=4), tiny_denoiser())[-1].learned())
    assert not same(learned, plain)
    facts = method.facts()
    assert set(facts) == {*(f"gamma_{b}" for b in range(10)), "loss_rs", "loss_aa", "augmented"}
    assert (facts["loss_rs"] > 0) == (part == "stabilize")
    assert (facts["loss_aa"] > 0) == (part == "align")


@pytest.mark.parametrize("part", ["stabilize", "align"])
def test_a_regulariser_of_weight_zero_is_lora(part):
    losses = []
    for method in (apt(lambda_rs=0.0, lambda_aa=0.0, **only(part)), make(LoRA)):
        losses.append(run(method, tiny_denoiser())[-1].loss)
    assert losses[0] == losses[1]


# Adaptive Training Adjustment


def test_the_gradient_is_scaled_by_what_is_not_over_fitted():
    method = apt(batch_size=1, **only("adaptive"))
    denoiser, parameters = moved(method)
    batch = batch_of(method)
    plain = gradients(make(LoRA), denoiser, parameters, batch)
    overfit(method, {int(bins_of(batch.timesteps, 1000)): gap_for(0.75)})
    assert distance(gradients(method, denoiser, parameters, batch), 0.25 * plain) < 1e-5


def test_pictures_of_the_class_keep_their_weight():
    method = apt(batch_size=2, prior_weight=0.5, **only("adaptive"))
    denoiser, _ = moved(method)
    batch = batch_of(method, prior=2)
    overfit(method, dict.fromkeys(range(10), gap_for(0.9)))
    each = denoising_loss(denoiser, batch).detach()
    expected = 0.1 * each[:2].mean() + 0.5 * each[2:].mean()
    assert float(method.loss(denoiser, batch).detach()) == pytest.approx(float(expected), rel=1e-4)


def test_a_step_weighs_with_what_was_known_before_it():
    method = apt(batch_size=1, **only("adaptive"))
    denoiser, parameters = moved(method)
    batch = batch_of(method)
    overfit(method, {int(bins_of(batch.timesteps, 1000)): gap_for(0.5)})
    expected = 0.5 * float(denoising_loss(denoiser, batch).detach())
    objectives = [Objective(method, denoiser, batch)] * 2
    total = method.update(objectives, torch.optim.SGD(parameters, lr=0.0))
    assert float(total) == pytest.approx(expected, rel=1e-4)


def augmented_share(gamma: float, batch: int = 400, **settings) -> float:
    method = apt(batch_size=batch, **only("adaptive") | settings)
    overfit(method, dict.fromkeys(range(10), gap_for(gamma)))
    drawn = batch_of(method)
    plain = batch_of(make(LoRA, batch_size=batch))
    changed = (drawn.latents != plain.latents).flatten(1).any(1)
    assert torch.equal(changed, drawn.augmented)
    for name in ("noise", "timesteps", "context", "weight", "of_subject"):
        assert torch.equal(getattr(drawn, name), getattr(plain, name)), name
    return float(changed.float().mean())


def test_as_many_pictures_are_augmented_as_are_over_fitted_but_never_more_than_p_max():
    def sigma(p):
        return (p * (1 - p) / 400) ** 0.5

    assert augmented_share(0.0) == 0.0
    assert abs(augmented_share(0.4) - 0.4) < 3 * sigma(0.4)
    assert abs(augmented_share(0.99) - 0.8) < 3 * sigma(0.8)
    assert augmented_share(0.99, batch=50, p_max=0.0) == 0.0
    assert augmented_share(1 - 1e-9, batch=50, p_max=1.0) == 1.0


def test_only_the_over_fitted_bin_is_augmented():
    method = apt(batch_size=200, p_max=1.0, **only("adaptive"))
    overfit(method, {2: 1.0})
    batch = batch_of(method)
    assert torch.equal(batch.augmented, bins_of(batch.timesteps, 1000) == 2)


def test_pictures_of_the_class_are_never_augmented():
    method = apt(batch_size=3, p_max=1.0)
    overfit(method, dict.fromkeys(range(10), 1.0))
    batch, plain = batch_of(method, prior=3), batch_of(make(LoRA, batch_size=3), prior=3)
    assert batch.augmented.tolist() == [True] * 3 + [False] * 3
    assert torch.equal(batch.latents[3:], plain.latents[3:])


def test_an_augmented_latent_is_the_encoded_view_of_its_own_picture():
    method, data = apt(batch_size=3, p_max=1.0, pad="edge"), tiny_data(3)
    overfit(method, dict.fromkeys(range(10), 1.0))
    plain = make(LoRA, batch_size=3).draw(data, tiny_denoiser(), Draws(0, 5, 0, 1))
    batch = method.draw(data, tiny_denoiser(), Draws(0, 5, 0, 1))
    for i in range(3):
        picture = next(e for e in data.training if torch.equal(e.latent, plain.latents[i]))
        view = method.views.encoded(data, picture, number=5 * 3 + i)
        assert torch.equal(batch.latents[i], view.latent)
    assert len({latent.numpy().tobytes() for latent in batch.latents}) == 3


# Views


def disc(side: int = 96) -> torch.Tensor:
    """A soft-edged disc with a mark, (3, side, side)."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    return torch.stack([(1 - x**2 - y**2).clamp(-1, 1), x, y])


@pytest.mark.parametrize("pad", ["black", "reflect", "edge"])
@pytest.mark.parametrize("shape", [(64, 64), (40, 64)], ids=str)
def test_zoom_one_without_a_turn_is_the_picture(pad, shape):
    pixels = noise(3, *shape).clamp(-1, 1)
    assert (zoomed_out(pixels, 1.0, 0.0, pad) - pixels).abs().max() < 1e-4


@pytest.mark.parametrize("zoom", [1.5, 2.0, 3.0])
def test_zooming_out_shrinks_the_area_by_the_zooms_square(zoom):
    white = torch.ones(3, 96, 96)
    view = (zoomed_out(white, zoom, 0.0, "black") + 1) / 2
    assert float(view.mean()) == pytest.approx(1 / zoom**2, rel=0.02)
    turned = (zoomed_out(white, zoom, 15.0, "black") + 1) / 2
    assert zoom == 1.5 or float(turned.mean()) == pytest.approx(1 / zoom**2, rel=0.02)
    assert view[:, 48, 48].min() > 0.999 and view[:, 0].max() == 0.0


def test_black_is_minus_one_and_the_edge_is_the_pictures_own():
    grey = torch.full((3, 48, 48), 0.25)
    assert zoomed_out(grey, 3.0, 10.0, "black")[:, 0, 0].tolist() == [-1.0] * 3
    for pad in ("edge", "reflect"):
        assert (zoomed_out(grey, 3.0, 10.0, pad) - 0.25).abs().max() < 1e-5


def test_a_view_is_what_plain_geometry_says():
    """Every output pixel, looked up by hand where the picture is smooth."""
    pixels, zoom, degrees = disc(), 2.0, 12.0
    view, side = zoomed_out(pixels, zoom, degrees, "black"), 96
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    worst = 0.0
    for row in range(30, 66, 5):
        for column in range(30, 66, 5):
            x, y = (2 * column + 1) / side - 1, (2 * row + 1) / side - 1
            u, v = zoom * (cos * x - sin * y), zoom * (sin * x + cos * y)
            j, i = ((u + 1) * side - 1) / 2, ((v + 1) * side - 1) / 2
            worst = max(
                worst, float((view[:, row, column] - pixels[:, round(i), round(j)]).abs().max())
            )
    assert worst < 0.06  # a pixel of the small picture is 0.04


def test_shrinking_averages_instead_of_skipping_pixels():
    """A checkerboard of single pixels becomes grey, not another pattern."""
    board = torch.ones(3, 96, 96)
    board[:, ::2, ::2] = board[:, 1::2, 1::2] = -1
    inner = zoomed_out(board, 2.0, 0.0, "edge")[:, 30:66, 30:66]
    assert inner.abs().max() < 0.1


def test_zooms_and_turns_are_uniform_in_their_ranges(monkeypatch):
    drawn = []

    def watched(pixels, zoom, degrees, pad):
        drawn.append((zoom, degrees))
        return pixels

    monkeypatch.setattr("personalize.trainers.methods.apt.zoomed_out", watched)
    method, data = apt(), tiny_data(1)
    for number in range(2000):
        method.views.encoded(data, data.training[0], number)
    zooms, turns = torch.tensor(drawn).T
    assert 1 <= zooms.min() < 1.02 and 2.98 < zooms.max() <= 3
    assert -15 <= turns.min() < -14.8 and 14.8 < turns.max() <= 15
    for values, low, high in ((zooms, 1, 3), (turns, -15, 15)):
        counts = torch.histc(values, 10, low, high)
        assert (counts - 200).abs().max() < 4 * 180**0.5
    assert abs(torch.corrcoef(torch.stack([zooms, turns]))[0, 1]) < 0.1


def counting(data):
    """Data whose encoder counts the pictures it encodes."""
    calls = []

    def encode(pixels):
        calls.append(len(pixels))
        return data.encode(pixels)

    return dataclasses.replace(data, encode=encode), calls


def test_a_pool_of_views_is_encoded_once_and_replaced_as_training_goes():
    method = apt(batch_size=4, view_pool=2, p_max=1.0)
    overfit(method, dict.fromkeys(range(10), 1.0))
    data, calls = counting(tiny_data(3))
    shown: dict[int, set[bytes]] = {}
    for step in range(2 * VIEW_LIFETIME):
        batch = method.draw(data, tiny_denoiser_once(), Draws(0, step, 0, 1))
        half = step // (VIEW_LIFETIME // 2)
        shown.setdefault(half, set()).update(x.numpy().tobytes() for x in batch.latents)
    views = [len(latents) for latents in shown.values()]
    assert views == [6] * 4  # 3 pictures x 2 slots
    assert [len(shown[i] & shown[i + 1]) for i in range(3)] == [3] * 3  # one slot at a time
    assert len(calls) == sum(views) - 3 * 3


def test_without_a_pool_every_view_is_new():
    method = apt(batch_size=4, p_max=1.0)
    overfit(method, dict.fromkeys(range(10), 1.0))
    data, calls = counting(tiny_data(3))
    seen = set()
    for step in range(10):
        batch = method.draw(data, tiny_denoiser_once(), Draws(0, step, 0, 1))
        seen.update(x.numpy().tobytes() for x in batch.latents)
    assert len(seen) == len(calls) == 40


def tiny_denoiser_once(cache=[]):  # noqa: B006
    if not cache:
        cache.append(tiny_denoiser())
    return cache[0]


# Representation Stabilization and Attention Alignment


@contextmanager
def watched(unet, suffix: str) -> Iterator[dict[str, list]]:
    """Collect (inputs, output) of the modules whose names end so."""
    calls: dict[str, list] = {}
    hooks = [
        module.register_forward_hook(
            lambda _m, inputs, output, name=name: calls.setdefault(name, []).append(
                (inputs[0].detach(), output.detach())
            )
        )
        for name, module in unet.named_modules()
        if name.endswith(suffix)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def both_ways(denoiser, batch, suffix: str) -> list[dict]:
    """Return what the modules compute, tuned and as the base: [{name: output}] x 2."""
    found = []
    with torch.no_grad():
        for prior in (False, True):
            with watched(denoiser.unet, suffix) as calls:
                if prior:
                    with denoiser.prior():
                        denoising_loss(denoiser, batch)
                else:
                    denoising_loss(denoiser, batch)
            found.append({name: outputs[0][1] for name, outputs in calls.items()})
    return found


@pytest.mark.parametrize("features", ["decoder", "all"])
def test_stabilization_is_its_naive_reference(features):
    method = apt(lambda_rs=2.0, features=features, prior_weight=0.5, **only("stabilize"))
    denoiser, _ = moved(method)
    batch = batch_of(method, prior=2)
    tuned, base = both_ways(denoiser, batch, ".attn1")
    names = [n for n in tuned if features == "all" or n.startswith("up_blocks")]
    assert 0 < len(names) <= len(tuned) and (len(names) < len(tuned)) == (features == "decoder")
    expected = 0.0
    for i in range(4):
        for name in names:
            one, other = tuned[name][i].double(), base[name][i].double()  # (tokens, channels)
            for c in range(one.shape[1]):
                means = [sum(x[:, c].tolist()) / len(x) for x in (one, other)]
                sigmas = [
                    math.sqrt(sum((v - m) ** 2 for v in x[:, c].tolist()) / len(x) + 1e-6)
                    for x, m in zip((one, other), means, strict=True)
                ]
                gap = (means[0] - means[1]) ** 2 + (sigmas[0] - sigmas[1]) ** 2
                expected += float(batch.weight[i]) * gap / one.shape[1] / len(names)
    plain = float(make(LoRA).loss(denoiser, batch).detach())
    found = float(method.loss(denoiser, batch).detach())
    assert expected > 1e-4
    assert found - plain == pytest.approx(2.0 * expected, rel=1e-3)


def padded(seed: int, chunks: Sequence[int]) -> Example:
    """A picture with a text of chunks of 7 states, of which so many are no padding."""
    words = torch.tensor([place < count for count in chunks for place in range(7)])
    return dataclasses.replace(
        example(seed), context=noise(7 * len(chunks), WIDTH, seed=900 + seed), words=words
    )


def shown_together(examples: Sequence[Example]) -> Batch:
    """A batch whose noise and timesteps depend on the place alone."""
    latents = torch.stack([e.latent for e in examples])
    timesteps = torch.tensor([210, 510, 810, 110])[: len(examples)]
    return fixed_batch(examples, latents, noise(4, 4, SIDE, SIDE)[: len(examples)], timesteps)


def alignment_of(method: APT, denoiser, batch: Batch) -> torch.Tensor:
    """L_attn of each example, (B,)."""
    with method._recording(denoiser) as outputs:
        denoising_loss(denoiser, batch)
    tuned = method._answer(denoiser, batch, outputs)
    return map_distance(tuned, method._ask_base(denoiser, batch), batch.words).detach()


def test_alignment_is_its_naive_reference():
    """Head by head, query by query, word by word; the mean of all, and of the layers."""
    method = apt(lambda_aa=3.0, **only("align"))
    denoiser, _ = moved(method)
    examples = [padded(0, [3]), padded(1, [5]), padded(2, [7, 4]), padded(3, [2])]
    batch = dataclasses.replace(
        shown_together(examples), weight=torch.tensor([0.5, 0.5, 0.25, 0.25])
    )
    assert batch.context.shape[1] == 14  # the text of two chunks is as it is, the others twice
    queries, keys = (both_ways(denoiser, batch, f".attn2.{name}") for name in ("to_q", "to_k"))
    expected, layers = 0.0, len(queries[0])
    assert layers == 4  # down, middle, twice up
    for i, one in enumerate(examples):
        for name in queries[0]:
            heads, costs = denoiser.unet.get_submodule(name.removesuffix(".to_q")).heads, []
            for head in range(heads):
                maps = []
                for way in (0, 1):  # with the text as it is, not repeated
                    q = queries[way][name][i].double()
                    k = keys[way][name.replace("to_q", "to_k")][i].double()[: len(one.context)]
                    d = q.shape[1] // heads
                    part = slice(head * d, (head + 1) * d)
                    weights = torch.exp(q[:, part] @ k[:, part].T / d**0.5)
                    maps.append(weights / weights.sum(1, keepdim=True))
                for word in one.words.nonzero().flatten().tolist():
                    for query in range(len(maps[0])):
                        costs.append(float(maps[0][query, word] - maps[1][query, word]) ** 2)
            expected += float(batch.weight[i]) * sum(costs) / len(costs) / layers
    plain = float(make(LoRA).loss(denoiser, batch).detach())
    found = float(method.loss(denoiser, batch).detach())
    assert expected > 1e-5
    assert found - plain == pytest.approx(3.0 * expected, rel=1e-3)


def attentions_of(query: torch.Tensor, key: torch.Tensor, words: torch.Tensor) -> Answer:
    return Answer(torch.zeros(1), (), (attention_to(words, query, key, 2),))


def test_heads_that_swap_their_maps_cost_something():
    query, key, words = noise(1, 16, 8), noise(1, 7, 8, seed=1), torch.eye(7)[None]
    swapped = [torch.cat([x[..., 4:], x[..., :4]], -1) for x in (query, key)]
    one, other = attentions_of(query, key, words), attentions_of(*swapped, words)
    assert torch.allclose(one.maps[0].mean(1), other.maps[0].mean(1), atol=1e-6)
    assert map_distance(one, other, words) > 1e-3


def test_what_happens_among_padding_costs_nothing():
    """Two states swap places: of the padding, or of the words."""
    query, key = noise(1, 16, 8), noise(1, 7, 8, seed=1)
    words = words_of([padded(0, [4])])
    assert words.shape == (1, 7, 4)
    base = attentions_of(query, key, words)
    for places, costs in (((5, 6), False), ((1, 2), True), ((3, 4), True)):
        order = list(range(7))
        order[places[0]], order[places[1]] = places[1], places[0]
        tuned = attentions_of(query, key[:, order], words)
        assert (float(map_distance(tuned, base, words)) > 1e-6) == costs


def test_what_a_text_costs_does_not_depend_on_those_beside_it():
    method = apt(**only("align"))
    denoiser, _ = moved(method)
    examples = [padded(0, [3]), padded(1, [7, 2]), padded(2, [7, 7, 5])]
    alone = alignment_of(method, denoiser, shown_together(examples[:1]))
    together = shown_together(examples)
    assert together.context.shape[1] == 42 and together.words.sum(1).amax(1).tolist() == [6, 3, 2]
    costs = alignment_of(method, denoiser, together)
    assert costs.min() > 1e-6 and torch.allclose(costs[:1], alone, rtol=1e-3)


def test_words_that_are_not_known_all_count():
    plain, told = example(0), padded(0, [7])
    told = dataclasses.replace(told, context=plain.context)
    assert plain.words is None and torch.equal(words_of([plain]), words_of([told]))


def test_only_maps_of_at_most_1024_queries_are_aligned():
    method = apt(batch_size=1, **only("align"))
    denoiser, _ = moved(method)
    layers = []
    for side in (32, 64):  # latents; the network's upper level is as large, the lower a half
        batch = dataclasses.replace(
            batch_of(method),
            latents=noise(1, 4, side, side),
            noise=noise(1, 4, side, side, seed=1),
        )
        layers.append([m.shape[2] for m in method._ask_base(denoiser, batch).maps])
    assert layers == [[1024, 1024, 1024, 256], [1024]]


@pytest.mark.parametrize("part", ["stabilize", "align"])
def test_a_regulariser_pulls_back_to_the_base(part):
    """Training on it alone lowers it: its gradient is that of what it says."""
    method = apt(lambda_rs=1.0, lambda_aa=1.0, **only(part))
    denoiser, parameters = moved(method)
    batch = dataclasses.replace(batch_of(method), weight=torch.full((2,), 0.5))
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    values = []
    for _ in range(8):
        optimizer.zero_grad()
        plain = make(LoRA).loss(denoiser, batch)
        term = method.loss(denoiser, batch) - plain
        term.backward()
        optimizer.step()
        values.append(float(term.detach()))
    assert values[-1] < 0.7 * values[0], values


def test_no_gradient_reaches_the_base():
    method = apt(lambda_rs=1.0, lambda_aa=1.0)
    denoiser, parameters = moved(method)
    overfit(method, dict.fromkeys(range(10), gap_for(0.5)))
    batch = batch_of(method)
    base = method._ask_base(denoiser, batch)
    assert base.moments and base.maps
    assert not any(x.requires_grad for x in (base.loss, *base.moments, *base.maps))
    method.loss(denoiser, batch).backward()
    learned = {id(parameter) for parameter in parameters}
    for name, parameter in denoiser.unet.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in learned), name
        assert parameter.requires_grad == (id(parameter) in learned), name
    assert not any(buffer.requires_grad for buffer in method.indicator.buffers())


def test_the_regularisers_are_finite_where_features_are_constant():
    from personalize.trainers.methods.apt import token_moments

    features = torch.zeros(2, 5, 3, requires_grad=True)
    moments = token_moments(features)
    assert torch.allclose(moments[:, 1], torch.full((2, 3), 1e-3))
    moments.sum().backward()
    assert features.grad is not None and features.grad.isfinite().all()


# Hooks


def hooks_of(unet) -> int:
    return sum(len(module._forward_hooks) for module in unet.modules())


def test_hooks_are_gone_after_the_loss_and_after_a_failure():
    method = apt()
    denoiser, _ = moved(method)
    method.loss(denoiser, batch_of(method))
    assert hooks_of(denoiser) == 0
    with pytest.raises(RuntimeError):
        method.loss(denoiser, dataclasses.replace(batch_of(method), context=noise(2, 7, 3)))
    assert hooks_of(denoiser) == 0
    with pytest.raises(KeyError), recording({"all": denoiser.unet}):
        assert hooks_of(denoiser) == 1
        raise KeyError
    assert hooks_of(denoiser) == 0


def test_gradient_checkpointing_gives_the_same_gradients():
    method = apt(lambda_rs=2.0, lambda_aa=3.0)
    overfit(method, dict.fromkeys(range(10), gap_for(0.5)))
    found = []
    for checkpointing in (False, True):
        denoiser, parameters = moved(method)
        if checkpointing:
            denoiser.unet.enable_gradient_checkpointing()
        with counted_forwards(denoiser.unet.up_blocks[-1].resnets[0]) as blocks:
            found.append(gradients(method, denoiser, parameters, batch_of(method)))
        assert len(blocks) == 2 + checkpointing  # base, tuned, and recomputed
    assert distance(found[1], found[0]) < 1e-5


def test_it_trains_over_a_half_precision_base():
    method, denoiser = apt(steps=4, gradient_checkpointing="on"), tiny_denoiser()
    denoiser.unet.to(torch.bfloat16)
    steps = run(method, denoiser)
    assert all(
        math.isfinite(value) for step in steps for value in (step.loss, *step.facts.values())
    )
    answer = method._ask_base(denoiser, batch_of(method))
    assert {x.dtype for x in (answer.loss, *answer.moments, *answer.maps)} == {torch.float32}


def test_accumulated_batches_share_their_gammas_and_count_all():
    method, data = apt(batch_size=1, gradient_accumulation=3), tiny_data()
    denoiser, parameters = moved(method)
    objectives = list(draw_objectives(method, denoiser, data, 0))
    expected = sum(float(objective().detach()) for objective in objectives) / 3
    total = method.update(objectives, torch.optim.SGD(parameters, lr=0.0))
    assert float(total) == pytest.approx(expected, rel=1e-5)
    bins = {int(bins_of(o.batch.timesteps, 1000)) for o in objectives}
    assert set(method.indicator.seen.nonzero().flatten().tolist()) == bins


# The frozen model's answers, kept


def test_a_repeated_draw_costs_no_frozen_forward_and_gives_the_same_loss():
    settings = {"lambda_rs": 2.0, "lambda_aa": 3.0, "p_max": 1.0}
    cached, exact = apt(teacher_cache=2, **settings), apt(**settings)
    denoiser, _ = moved(cached)
    data = tiny_data(prior=2)
    for method in (cached, exact):
        overfit(method, dict.fromkeys(range(10), gap_for(0.5)))
    frozen = []
    with torch.no_grad():
        for step in range(12):
            batch = cached.draw(data, denoiser, Draws(0, step, 0, 1))
            with counted_forwards(denoiser.unet) as sizes:
                loss = float(cached.loss(denoiser, batch))
            frozen.append(sum(sizes) - 4)
            assert loss == pytest.approx(float(exact.loss(denoiser, batch)), rel=1e-5)
    # 2 batches of 4 examples; the subject's 4 also augmented, once each
    assert frozen[:2] == [4, 4] and sum(frozen) <= 12 and frozen[-1] == 0
    assert len(cached._base_answers) == sum(frozen)


def test_repeated_draws_are_the_runs_first_ones_with_new_coins_and_seeds():
    method, data, denoiser = apt(teacher_cache=2), tiny_data(), tiny_denoiser_once()
    overfit(method, dict.fromkeys(range(10), gap_for(0.5)))
    batches = [method.draw(data, denoiser, Draws(0, step, 0, 1)) for step in range(20)]
    plain = [make(LoRA).draw(data, denoiser, Draws(0, step, 0, 1)) for step in range(2)]
    by_draw: dict[int, torch.Tensor] = {}
    for step, batch in enumerate(batches):
        assert isinstance(batch, ViewedBatch)
        for name in ("noise", "timesteps", "context"):
            assert torch.equal(getattr(batch, name), getattr(plain[step % 2], name)), name
        for draw, latent in zip(batch.draw.tolist(), batch.latents, strict=True):
            assert torch.equal(by_draw.setdefault(draw, latent), latent)
    assert len(by_draw) == 8  # 2 batches x 2 examples, plain and augmented
    assert len({batch.seed for batch in batches}) == 20


# Settings


def test_every_part_is_on_by_default():
    defaults = APTSettings()
    assert (defaults.adaptive, defaults.stabilize, defaults.align) == (True, True, True)
    assert (defaults.p_max, defaults.pad, defaults.temperature) == (0.8, "black", 1000.0)
    assert (defaults.features, defaults.view_pool, defaults.teacher_cache) == ("decoder", 0, 0)


def test_a_base_without_attention_in_its_decoder_is_refused():
    unet = tiny_unet(up_block_types=("UpBlock2D", "UpBlock2D"))
    assert not attentions(unet, "self-attention", "decoder")
    with pytest.raises(InputError, match="'features' is 'decoder'"):
        adapt(apt(), unet)
    adapt(apt(features="all"), unet)


# What it composes with


def test_noise_over_a_lora_that_would_hardly_feel_it_is_refused():
    with pytest.raises(InputError, match=r"'sigma' is 0.01 .*'init' is 'kaiming'.*'gaussian'"):
        adapt(apt(sigma=0.01), tiny_unet())
    forms = [{"over": over} for over in ("full", "attention", "oft")]
    for settings in ({"init": "gaussian"}, *forms):
        adapt(apt(sigma=0.01, **settings), tiny_unet())


@pytest.mark.parametrize("over", ["lora", "full", "attention", "oft"])
def test_it_works_over_bayesian_weights_of_every_form(over):
    """APT and BNN in one: the frozen base is asked without noise, the tuned network with it."""
    settings = {"steps": 4, "over": over, "kl_weight": 1e-6, "init": "gaussian"}
    noisy = run(apt(sigma=0.01, **settings), tiny_denoiser())
    plain = run(apt(**settings | {"kl_weight": 0.0}), tiny_denoiser())
    assert not same(to_tensors(noisy[-1].learned()), to_tensors(plain[-1].learned()))
    assert {"kl", "sigma", "gamma_0", "loss_rs", "loss_aa"} <= noisy[-1].facts.keys()
    assert "kl" not in plain[-1].facts
    method, denoiser = apt(sigma=0.01, **settings), tiny_denoiser()
    adapt(method, denoiser.unet)
    batch = batch_of(method)
    with torch.no_grad(), denoiser.prior():
        quiet = denoising_loss(tiny_denoiser(), batch)
    answer = method._base_answer(denoiser, batch)
    assert torch.equal(answer.loss, quiet)
