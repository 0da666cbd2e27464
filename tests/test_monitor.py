"""The stable loss: fixed pictures, timesteps and noise."""

import json
import math
from itertools import product

import pytest
import torch

from personalize.trainers import monitor
from personalize.trainers.edits import to_tensors
from personalize.trainers.loop import adapt, train
from personalize.trainers.method import generator
from personalize.trainers.methods import METHODS
from personalize.trainers.methods.dreambooth import DreamBooth
from personalize.trainers.methods.lora import LoRA
from personalize.trainers.monitor import (
    BINS,
    ROW,
    ROWS_PER_EXAMPLE,
    SHARE,
    Evaluation,
    Examination,
    Probe,
    high_frequency_energy,
    indicator,
    log_ratio,
    over_fitting,
    rounds_for,
    spacing,
    stable_loss,
)
from tests.tiny import SIDE, example, make, noise, run, same, tiny_data, tiny_denoiser


def test_it_is_the_same_number_every_time_and_draws_nothing():
    denoiser, data = tiny_denoiser(), tiny_data(held_out=2)
    before = torch.get_rng_state()
    first = stable_loss(denoiser, data.held_out)
    assert first == stable_loss(denoiser, data.held_out) > 0
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("count", [1, 2])
def test_it_covers_the_whole_schedule_evenly(count):
    asked, denoiser = [], tiny_denoiser()
    denoiser.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[1]))
    stable_loss(denoiser, tiny_data(count).training)
    width = 100 // count
    assert sorted(torch.cat(asked).tolist()) == list(range(width // 2, 1000, width))


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
        for batch in Probe.of(tiny_data().training[:1], denoiser.timestep_count, 1).batches:
            noisy = denoiser.noised(batch.latents, batch.noise, batch.timesteps)
            target = denoiser.target(batch.latents, batch.noise, batch.timesteps)
            found = denoiser.cleaned(noisy, target, batch.timesteps)
            assert torch.allclose(found, batch.latents, atol=1e-3)


def test_an_untrained_network_is_as_grainy_as_the_base_and_a_broken_one_grainier():
    data, denoiser = tiny_data(held_out=2), tiny_denoiser()
    adapt(make(DreamBooth), denoiser.unet)
    assert over_fitting(denoiser, data.training, data.held_out)["corruption"] == 0.0
    with torch.no_grad():
        denoiser.unet.get_parameter("conv_out.free.default.weight").mul_(100)
    assert over_fitting(denoiser, data.training, data.held_out)["corruption"] > 0.5
    assert Examination(denoiser, {"train": data.held_out}).evaluate(denoiser, 1).corruption > 1.4


def test_corruption_is_grain_at_low_timesteps_where_the_base_draws_no_blur():
    of_base = torch.rand(BINS, generator=torch.Generator().manual_seed(0)) + 0.1
    sharper, noisier = of_base.clone(), of_base.clone()
    sharper[3:] *= 8  # memorised pictures, drawn out of pure noise
    noisier[:3] *= torch.tensor([2.0, 4.0, 8.0])  # noise that is left
    assert log_ratio(sharper, of_base) == 0.0
    assert log_ratio(noisier, of_base) == pytest.approx(2.0)


def test_training_on_one_picture_opens_a_gap():
    data, denoiser = tiny_data(count=3, held_out=1), tiny_denoiser()
    run(make(LoRA, steps=60, batch_size=4), denoiser, data)
    found = over_fitting(denoiser, data.training, data.held_out)
    assert found["train_loss"] == stable_loss(denoiser, data.training[:1])
    fell_in_training = found["train_loss_of_base"] - found["train_loss"]
    assert fell_in_training > found["held_out_loss_of_base"] - found["held_out_loss"]


# Examinations


def examined(steps: int, **data) -> tuple[Evaluation, Evaluation]:
    """Train and return how the base and the tuned network stand."""
    pictures, denoiser = tiny_data(count=1, **data), tiny_denoiser()
    splits = {"train": pictures.training, "held_out": pictures.held_out}
    examination = Examination(denoiser, splits | {"prior": pictures.prior}, rounds=2)
    run(make(LoRA, steps=steps, batch_size=4), denoiser, pictures)
    return examination.of_base(), examination.evaluate(denoiser, steps)


def naive_answer(denoiser, examples, rounds: int) -> list[float]:
    """The loss of every bin, one row at a time."""
    bins = [[] for _ in range(BINS)]
    for turn, b in product(range(rounds), range(BINS)):
        row = turn * BINS + b
        picture = examples[(row + row // math.lcm(len(examples), BINS)) % len(examples)]
        t = torch.tensor([int((b + (turn + 0.5) / rounds) * 100)])
        eps = torch.randn(4, SIDE, SIDE, generator=generator(0, 3, row))
        a = float(denoiser.schedule.alphas_cumprod[t])
        noisy = a**0.5 * picture.latent + (1 - a) ** 0.5 * eps
        with torch.no_grad():
            out = denoiser.unet(noisy[None], t, picture.context[None]).sample[0]
        bins[b].append(float(((out - eps) ** 2).mean()))
    return [sum(values) / len(values) for values in bins]


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_loss_of_every_bin_is_its_naive_reference(rounds):
    denoiser, data = tiny_denoiser(), tiny_data(count=4)
    answer = Probe.of(data.training, denoiser.timestep_count, rounds).ask(denoiser)
    expected = naive_answer(denoiser, data.training, rounds)
    assert answer.loss.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 10, 12, 20])
def test_all_pictures_are_asked_about_equally_and_take_turns_in_every_bin(count):
    data = tiny_data(count=count)
    rounds = count
    batch = Probe.of(data.training, 1000, rounds).batches[0]
    which = [
        next(i for i, e in enumerate(data.training) if torch.equal(e.latent, latent))
        for latent in batch.latents
    ]
    times = [which.count(i) for i in range(count)]
    assert max(times) == min(times)
    in_bins = [{which[row] for row in range(b, len(which), BINS)} for b in range(BINS)]
    assert all(len(seen) >= min(count, rounds) / 2 for seen in in_bins)
    assert (batch.timesteps * BINS // 1000).tolist() == [r % BINS for r in range(rounds * BINS)]


def test_asking_in_pieces_gives_the_same_answer(monkeypatch):
    data, denoiser = tiny_data(count=2), tiny_denoiser()
    whole = Probe.of(data.training, 1000, 2).ask(denoiser)
    monkeypatch.setattr(monitor, "LATENTS_AT_ONCE", 3 * SIDE * SIDE)  # 3 rows at a time
    pieces = Probe.of(data.training, 1000, 2).ask(denoiser)
    assert torch.allclose(whole.loss, pieces.loss, rtol=1e-5)


@pytest.mark.parametrize(("side", "most"), [(16, 16), (64, 1), (128, 1)])
def test_what_does_not_fit_beside_one_picture_of_sd15_is_asked_about_alone(side, most):
    """So that watching a run on such pictures needs no more memory than the run, at batch 1."""
    (batch,) = Probe.of([example(0, side, side)], 1000, 2).batches
    sizes = [len(part.latents) for part in monitor.parts(batch)]
    assert max(sizes) == most and sum(sizes) == 2 * BINS


def test_the_base_is_at_zero_everywhere():
    base, _ = examined(steps=1, held_out=2, prior=2)
    assert base.step == 0
    assert (base.train, base.held_out, base.prior) == (
        base.train_of_base,
        base.held_out_of_base,
        base.prior_of_base,
    )
    assert set(base.gamma) == {0.0} and base.prior_drift == 0.0 and base.corruption == 1.0


@pytest.fixture(scope="module")
def before_and_after() -> tuple[Evaluation, Evaluation]:
    return examined(steps=30, held_out=2, prior=2)


def test_training_on_one_picture_lowers_its_loss_and_widens_the_gap(before_and_after):
    base, tuned = before_and_after
    assert tuned.train < base.train
    assert tuned.gap > base.gap
    assert tuned.gap == (tuned.held_out - tuned.train) / tuned.train_of_base
    assert tuned.prior_drift == tuned.prior / tuned.prior_of_base - 1 != 0


def test_the_indicator_is_apts_formula_in_every_bin(before_and_after):
    base, tuned = before_and_after
    gaps = zip(base.train_bins, tuned.train_bins, strict=True)
    expected = [min(1.0, max(0.0, 1 - math.exp(-1000 * (a - b)))) for a, b in gaps]
    assert list(tuned.gamma) == pytest.approx(expected)
    values = indicator(torch.tensor([1.001, 1.0, 0.5]).double(), torch.ones(3).double())
    assert values.tolist() == pytest.approx([0.63212, 0.0, 0.0], abs=1e-4)


def test_what_is_missing_is_not_measured():
    base, tuned = examined(steps=1)
    assert base.held_out is base.prior is tuned.held_out_bins is None
    assert tuned.gap is tuned.prior_drift is None


def test_a_line_of_the_history_gives_the_evaluation_back():
    _, tuned = examined(steps=1, held_out=1)
    line = json.loads(json.dumps(tuned.as_line() | {"seconds": 1.5, "samples": []}))
    assert line["evaluation"] is True and line["step"] == 1
    assert Evaluation.from_line(line) == tuned
    with pytest.raises((KeyError, TypeError)):
        Evaluation.from_line({"step": 3, "loss": 0.1})
    for lie in ({"gamma": None}, {"train_bins": None}, {"train_of_base": 0}, {"prior_of_base": 0}):
        with pytest.raises(TypeError):
            Evaluation.from_line({**line, **lie})


def test_asking_leaves_network_and_generators_alone():
    denoiser, data = tiny_denoiser(), tiny_data(held_out=1)
    inputs = noise(1, 4, SIDE, SIDE), torch.tensor([5]), noise(1, 7, 32)
    before, state = denoiser(*inputs), torch.get_rng_state()
    Examination(denoiser, {"train": data.training}).evaluate(denoiser, 1)
    assert torch.equal(before, denoiser(*inputs))
    assert torch.equal(state, torch.get_rng_state())


def test_a_tenth_of_the_run_is_what_measuring_may_take():
    assert rounds_for(1, 50, 2) == 1  # 1,000 steps of one picture, 20 evaluations
    assert rounds_for(4, 50, 2) == 2
    assert rounds_for(64, 50, 2) == 4
    assert rounds_for(1, 1, 3) == 1


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("examples", [1, 2, 4, 16])
def test_small_batches_are_evaluated_less_often(examples, splits):
    every = spacing(1000, examples, splits)
    rows = splits * BINS * rounds_for(examples, every, splits) * 1000 / every
    assert rows * ROW <= SHARE * ROWS_PER_EXAMPLE * examples * 1000 * 1.05
    assert 8 <= 1000 / every <= 20.01
    assert (every == 50) == (examples * 1.7 >= splits)


def test_short_runs_are_evaluated_eight_times():
    assert spacing(80, 1, 2) == 10 and spacing(4, 1, 2) == 1


def test_large_pictures_are_asked_about_a_few_at_a_time(monkeypatch):
    data, denoiser, asked = tiny_data(), tiny_denoiser(), []
    whole = over_fitting(denoiser, data.training, data.training)
    denoiser.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    monkeypatch.setattr(monitor, "LATENTS_AT_ONCE", 4 * 8 * 8)
    parts = over_fitting(denoiser, data.training, data.training)
    assert parts == pytest.approx(whole, rel=1e-5) and set(asked) == {2, 4}


@pytest.mark.parametrize("average", [0.0, 0.5], ids=["plain", "averaged"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_a_run_that_is_examined_after_every_step_learns_the_very_same(method, average):
    data, results, losses = tiny_data(held_out=1, prior=1), [], []
    for examined in (False, True):
        chosen, denoiser = make(method, ema_decay=average), tiny_denoiser()
        examination, state = None, torch.get_rng_state()
        for step in train(chosen, denoiser, data):
            losses.append((examined, step.index, step.loss))
            if examined:
                splits = {"train": data.training, "held_out": data.held_out, "prior": data.prior}
                examination = examination or Examination(denoiser, splits)
                with step.kept():
                    examination.evaluate(denoiser, step.index)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(to_tensors(step.learned()) | parameters(denoiser))
    assert same(*results)
    half = len(losses) // 2
    assert [loss[1:] for loss in losses[:half]] == [loss[1:] for loss in losses[half:]]


def parameters(denoiser) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in denoiser.unet.named_parameters()}


def test_what_is_examined_is_what_is_kept():
    """With a running average that is the average, not the network as it is trained."""
    data, denoiser = tiny_data(1), tiny_denoiser()
    for step in train(make(LoRA, ema_decay=0.9, steps=5), denoiser, data):
        before = parameters(denoiser)
        with step.kept():
            kept = {n: t for n, t in to_tensors(step.learned()).items() if "lora_up" in n}
            inside = Probe.of(data.training, 1000, 1).ask(denoiser).loss
        assert same(parameters(denoiser), before)
    outside = Probe.of(data.training, 1000, 1).ask(denoiser).loss
    assert kept and not torch.equal(inside, outside)
    assert same({n: t for n, t in to_tensors(step.learned()).items() if "lora_up" in n}, kept)
