"""What every method promises. A new entry in METHODS is tested here without a new line."""

import dataclasses
import importlib.util
import random

import numpy as np
import pytest
import torch

from personalize.trainers.artifact import Header, Personalization
from personalize.trainers.edits import from_tensors, of_weights, parameter_name, to_tensors
from personalize.trainers.errors import InputError
from personalize.trainers.loop import adapt, train
from personalize.trainers.method import Draws, Objective, assemble
from personalize.trainers.methods import METHODS
from personalize.trainers.optimizers import OPTIMIZERS
from personalize.trainers.sites import parameter_sites, sites
from tests.tiny import (
    distance,
    edited,
    example,
    make,
    question,
    run,
    same,
    snapshot,
    tiny_data,
    tiny_denoiser,
    tiny_unet,
)


@pytest.fixture(params=METHODS.values(), ids=METHODS.keys())
def method(request):
    return request.param


@pytest.fixture(scope="module", params=METHODS.values(), ids=METHODS.keys())
def trained(request):
    """A method after five steps: (method, its denoiser, its last step)."""
    denoiser, chosen = tiny_denoiser(), make(request.param, steps=5)
    return chosen, denoiser, run(chosen, denoiser)[-1]


def has(method, name: str) -> bool:
    return name in {field.name for field in dataclasses.fields(method.Settings)}


def choices(method, name: str) -> tuple:
    fields = {field.name: field for field in dataclasses.fields(method.Settings)}
    return fields[name].metadata["choices"] if name in fields else ()


def base_weights(unet) -> dict:
    """The frozen weights of an adapted network under their names before adapters came."""
    return {
        name.replace(".base_layer", ""): tensor
        for name, tensor in unet.state_dict().items()
        if name.replace(".base_layer", "") in ORIGINAL
    }


ORIGINAL = snapshot(tiny_unet())


# The base


def test_whether_it_starts_at_the_identity_is_declared_truthfully(method):
    denoiser, inputs = tiny_denoiser(), question()
    before = denoiser(*inputs)
    adapt(make(method), denoiser.unet)
    with torch.no_grad():
        after = denoiser(*inputs)
    assert torch.equal(before, after) == method.starts_at_identity, distance(after, before)


def test_the_base_weights_are_untouched_by_training(trained):
    _, denoiser, _ = trained
    assert same(base_weights(denoiser.unet), ORIGINAL)


def test_the_base_weights_are_untouched_when_training_is_closed_early(method):
    denoiser = tiny_denoiser()
    steps = train(make(method, steps=50), denoiser, tiny_data())
    next(steps)
    steps.close()
    assert same(base_weights(denoiser.unet), ORIGINAL)


def test_the_prior_is_the_base_bit_for_bit(trained):
    _, denoiser, _ = trained
    with torch.no_grad():
        base = tiny_denoiser()(*question())
        adapted = denoiser(*question())
        with denoiser.prior():
            prior = denoiser(*question())
        again = denoiser(*question())
    assert torch.equal(prior, base)
    assert torch.equal(adapted, again)
    assert distance(adapted, base) > 1e-4  # otherwise nothing was compared


def test_asking_the_prior_between_steps_changes_nothing(method):
    watched, results = tiny_denoiser(), []
    for step in train(make(method, steps=4), watched, tiny_data()):
        with torch.no_grad(), watched.prior():
            watched(*question())
        results.append(to_tensors(step.learned()))
    undisturbed = run(make(method, steps=4), tiny_denoiser())[-1]
    assert same(results[-1], to_tensors(undisturbed.learned()))


def test_the_prior_comes_back_when_its_block_fails(trained):
    _, denoiser, _ = trained
    with torch.no_grad():
        before = denoiser(*question())
        with pytest.raises(KeyError), denoiser.prior():
            raise KeyError
        assert torch.equal(denoiser(*question()), before)


# The seed


def test_the_same_seed_gives_the_same_bits(trained):
    chosen, _, step = trained
    again = run(type(chosen)(chosen.settings), tiny_denoiser())[-1]
    assert same(to_tensors(step.learned()), to_tensors(again.learned()))
    assert step.loss == again.loss


def test_another_seed_gives_another_result(method):
    one, two = (run(make(method, seed=seed), tiny_denoiser())[-1] for seed in (0, 1))
    a, b = to_tensors(one.learned()), to_tensors(two.learned())
    assert a.keys() == b.keys()
    assert not any(torch.equal(a[key], b[key]) for key in a if not key.endswith("alpha"))


def test_training_neither_reads_nor_moves_the_global_generators(method):
    results = []
    for seed in (11, 12):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        results.append(to_tensors(run(make(method), tiny_denoiser())[-1].learned()))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.array_equal(np.random.get_state()[1], states[1])
        assert random.getstate() == states[2]
    assert same(*results)


def test_training_leaves_the_callers_autograd_modes_alone(method):
    denoiser, data = tiny_denoiser(), tiny_data()
    with torch.inference_mode():
        for _ in train(make(method, steps=2), denoiser, data):
            assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    with torch.no_grad():
        for _ in train(make(method, steps=2), tiny_denoiser(), tiny_data()):
            assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


# What moves


def test_every_free_parameter_moves_and_only_those_have_gradients(method):
    chosen, denoiser = make(method, steps=4, weight_decay=0.0), tiny_denoiser()
    fresh = tiny_unet()
    adapt(chosen, fresh)
    start = {name: p.detach().clone() for name, p in fresh.named_parameters() if p.requires_grad}
    had_gradient = set()
    for _ in train(chosen, denoiser, tiny_data()):
        had_gradient |= {n for n, p in denoiser.unet.named_parameters() if p.grad is not None}
    free = {name: p for name, p in denoiser.unet.named_parameters() if p.requires_grad}
    assert free.keys() == start.keys()
    still = [name for name, p in free.items() if torch.equal(p, start[name])]
    assert not still
    assert had_gradient == free.keys()


def test_the_free_parameters_are_fp32_over_a_half_precision_base(method):
    denoiser = tiny_denoiser()
    denoiser.unet.to(torch.bfloat16)
    assert {p.dtype for p in adapt(make(method), denoiser.unet)} == {torch.float32}
    denoiser = tiny_denoiser()
    denoiser.unet.to(torch.bfloat16)
    steps = run(make(method), denoiser)
    assert all(np.isfinite(step.loss) for step in steps)
    assert denoiser(*question()).dtype == torch.float32


def test_the_loss_falls_on_one_example(method):
    """Judged on fixed noise and timesteps, where the random draw of each step plays no part."""
    data, denoiser = tiny_data(1), tiny_denoiser()
    chosen = make(method, steps=20, batch_size=4, rank=8, layers="all", learning_rate=1e-2)
    draws = Draws(seed=99, step=0, part=0, parts=1)
    batch = make(method, batch_size=16).draw(data, denoiser, draws)
    with torch.no_grad():
        before = float(chosen.loss(denoiser, batch))
        run(chosen, denoiser, data)
        after = float(chosen.loss(denoiser, batch))
    print(f"{method.name}: {before:.3f} -> {after:.3f}")
    assert after < 0.9 * before, f"{before} -> {after}"


# What is kept


def test_a_file_gives_the_same_edits_back(trained, tmp_path):
    chosen, _, step = trained
    header = Header(chosen.name, 0, chosen.settings.as_dict(), {}, "a zib totem", "", "0" * 16)
    Personalization.of(header, step.learned(), step.index).save(tmp_path / "a.safetensors")
    loaded = Personalization.load(tmp_path / "a.safetensors")
    edits, left = loaded.edits(parameter_sites(tiny_unet()))
    assert not left and loaded.header.step == step.index == 5
    for site, edit in step.learned().items():
        assert type(edits[site]) is type(edit)
        assert same(edits[site].tensors(), {k: v for k, v in edit.tensors().items()})
    assert edits.keys() == step.learned().keys()


def test_edits_on_the_plain_weights_are_the_trained_network(trained):
    _, denoiser, step = trained
    edits, left = from_tensors(to_tensors(step.learned()), parameter_sites(tiny_unet()))
    plain = tiny_denoiser()
    edited(plain.unet, edits)
    with torch.no_grad():
        error = distance(plain(*question()), denoiser(*question()))
    assert not left and error <= 1e-4, error


def test_strength_zero_is_the_very_weight(trained):
    _, _, step = trained
    plain = tiny_unet()
    for site, edit in of_weights(step.learned()).items():
        weight = plain.get_parameter(parameter_name(site))
        assert edit.apply(weight, 0.0) is weight
        assert edit.fits(weight.shape)


def test_strength_zero_is_the_base_bit_for_bit(trained):
    _, _, step = trained
    plain = tiny_denoiser()
    edited(plain.unet, step.learned(), strength=0.0)
    with torch.no_grad():
        assert torch.equal(plain(*question()), tiny_denoiser()(*question()))


def test_an_edit_keeps_the_weights_shape_and_type(trained):
    _, _, step = trained
    plain = tiny_unet()
    for site, edit in of_weights(step.learned()).items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            weight = plain.get_parameter(parameter_name(site)).to(dtype)
            after = edit.apply(weight, 0.5)
            assert after.shape == weight.shape and after.dtype == dtype
            assert torch.isfinite(after).all()


def test_a_snapshot_is_not_moved_by_later_steps(method):
    kept = []
    for step in train(make(method), tiny_denoiser(), tiny_data()):
        kept.append((step.learned(), {k: v.clone() for k, v in to_tensors(step.learned()).items()}))
    assert all(same(to_tensors(edits), copy) for edits, copy in kept)
    assert not same(kept[0][1], kept[-1][1])


# How it moves


def test_two_half_batches_move_like_the_whole_batch(method):
    """The same four draws, as one batch and as two accumulated ones: equal to rounding."""
    data, results = tiny_data(4, prior=0), []
    whole = make(method, batch_size=4).draw(data, tiny_denoiser(), Draws(3, 0, 0, 1))
    halves = [
        dataclasses.replace(
            whole,
            **{n: t[i : i + 2] for n, t in vars(whole).items() if torch.is_tensor(t)},
        )
        for i in (0, 2)
    ]
    halves = [dataclasses.replace(half, weight=half.weight * 2) for half in halves]
    for batches in ([whole], halves):
        chosen, denoiser = make(method, gradient_clipping=0.0), tiny_denoiser()
        parameters = adapt(chosen, denoiser.unet)
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        objectives = [Objective(chosen, denoiser, batch) for batch in batches]
        loss = chosen.update(objectives, optimizer)
        gradients = torch.cat([p.grad.flatten() for p in parameters])
        results.append((float(loss), gradients))
    (loss, gradients), (loss_2, gradients_2) = results
    assert loss == pytest.approx(loss_2, rel=1e-5)
    assert gradients.abs().max() > 1e-4
    assert distance(gradients_2, gradients) < 1e-4


def test_accumulated_batches_are_distinct_and_go_through_the_data_equally(method):
    data, denoiser = tiny_data(6), tiny_denoiser()
    chosen = make(method, batch_size=1, gradient_accumulation=3)
    batches = [
        chosen.draw(data, denoiser, Draws(0, step, part, 3))
        for step in range(4)
        for part in range(3)
    ]
    for group in ("noise", "timesteps"):
        values = {getattr(batch, group).numpy().tobytes() for batch in batches}
        assert len(values) >= 11, group  # twelve timesteps of a thousand may meet once
    captions = [batch.context[0].numpy().tobytes() for batch in batches]
    assert all(captions.count(caption) == 2 for caption in captions)
    assert len(set(captions)) == 6


def test_gradient_checkpointing_changes_memory_and_nothing_else(method):
    calls, results = [], []
    for checkpointing in ("off", "on"):
        denoiser = tiny_denoiser()
        count = []
        block = denoiser.unet.up_blocks[-1].resnets[0]
        block.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        chosen = make(method, gradient_checkpointing=checkpointing)
        results.append(to_tensors(run(chosen, denoiser)[-1].learned()))
        calls.append(len(count))
    assert calls[1] > calls[0], "nothing was recomputed"
    for key, tensor in results[0].items():
        assert distance(results[1][key], tensor) <= 1e-5, key


@pytest.mark.parametrize(
    "method, preset", [(m, p) for m in METHODS.values() for p in choices(m, "layers")]
)
def test_every_choice_of_layers_trains_just_those(method, preset):
    denoiser = tiny_denoiser()
    step = run(make(method, layers=preset, steps=2), denoiser)[-1]
    assert list(step.learned()) == sites(tiny_unet(), preset)
    plain = tiny_denoiser()
    edited(plain.unet, step.learned())
    with torch.no_grad():
        assert distance(plain(*question()), denoiser(*question())) <= 1e-4


@pytest.mark.parametrize("method", [m for m in METHODS.values() if has(m, "rank")])
def test_a_rank_above_the_narrowest_layer_is_refused(method):
    with pytest.raises(InputError, match=r"'rank' is 33, .* 32 wide; give at most 32") as error:
        run(make(method, rank=33), tiny_denoiser())
    assert error.value.input_name == "rank"
    run(make(method, rank=32, steps=1), tiny_denoiser())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_or_names_its_package(method, name):
    module, _, distribution, _ = OPTIMIZERS[name]
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        with pytest.raises(InputError, match=f"'optimizer' .*pip install {distribution}"):
            run(make(method, optimizer=name), tiny_denoiser())
        return
    chosen = make(method, optimizer=name, learning_rate=1e-3)
    steps = train(chosen, tiny_denoiser(), tiny_data())
    first, *_, last = [to_tensors(step.learned()) for step in steps]
    assert not same(first, last) and all(tensor.isfinite().all() for tensor in last.values())


# What is shown


def test_every_caption_can_be_dropped(method):
    data, denoiser = tiny_data(3, prior=2), tiny_denoiser()
    batch = make(method, caption_dropout=1.0).draw(data, denoiser, Draws(0, 0, 0, 1))
    assert all(torch.equal(context, data.empty.context) for context in batch.context)
    batch = make(method, caption_dropout=0.0).draw(data, denoiser, Draws(0, 0, 0, 1))
    assert not any(torch.equal(context, data.empty.context) for context in batch.context)


def test_half_of_the_captions_are_dropped_at_one_half(method):
    data, denoiser = tiny_data(3), tiny_denoiser()
    batch = make(method, caption_dropout=0.5, batch_size=400).draw(
        data, denoiser, Draws(0, 0, 0, 1)
    )
    dropped = sum(torch.equal(context, data.empty.context) for context in batch.context)
    assert abs(dropped - 200) < 3 * 10  # 3 sigma of a binomial


def test_timesteps_are_uniform_over_the_whole_schedule(method):
    batch = make(method, batch_size=1000).draw(tiny_data(), tiny_denoiser(), Draws(0, 0, 0, 1))
    bins = torch.histc(batch.timesteps.float(), 10, 0, 1000)
    assert (bins - 100).abs().max() < 3.5 * 90**0.5
    assert batch.timesteps.min() < 10 and batch.timesteps.max() >= 990


def test_noise_is_normal_and_the_offset_adds_a_constant(method):
    data, denoiser = tiny_data(), tiny_denoiser()
    for offset in (0.0, 0.5):
        chosen = make(method, noise_offset=offset, batch_size=500)
        noise = chosen.draw(data, denoiser, Draws(0, 0, 0, 1)).noise
        pixels = noise[0, 0].numel()
        of_means = noise.mean((2, 3)).var()  # of 2000 (example, channel) pairs
        within = noise.var((2, 3)).mean()
        assert of_means == pytest.approx(offset**2 + 1 / pixels, rel=0.12)
        assert within == pytest.approx(1.0, rel=0.02)


# What is asked


def naive_loss(denoiser, batch, count: int, prior_weight: float, gamma: float) -> float:
    """mean over the subject + prior_weight * mean over the class, one example at a time."""
    losses = []
    for i in range(len(batch.timesteps)):
        a = float(denoiser.schedule.alphas_cumprod[batch.timesteps[i]])
        noisy = a**0.5 * batch.latents[i] + (1 - a) ** 0.5 * batch.noise[i]
        with torch.no_grad():
            out = denoiser.unet(noisy[None], batch.timesteps[i], batch.context[i][None]).sample[0]
        velocity = denoiser.schedule.config.prediction_type == "v_prediction"
        target = batch.noise[i]
        if velocity:
            target = a**0.5 * batch.noise[i] - (1 - a) ** 0.5 * batch.latents[i]
        snr = a / (1 - a)
        weight = min(snr, gamma) / (snr + 1 if velocity else snr) if gamma else 1.0
        losses.append(weight * float(((out - target) ** 2).mean()))
    subject, prior = losses[:count], losses[count:]
    return sum(subject) / count + (prior_weight * sum(prior) / len(prior) if prior else 0.0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("prior, gamma", [(0, 0.0), (2, 0.0), (2, 5.0)])
def test_the_loss_is_its_naive_reference(method, prediction_type, prior, gamma):
    denoiser, data = tiny_denoiser(prediction_type=prediction_type), tiny_data(3, prior=prior)
    chosen = make(method, batch_size=3, prior_weight=0.3, min_snr_gamma=gamma)
    batch = chosen.draw(data, denoiser, Draws(4, 0, 0, 1))
    assert len(batch.timesteps) == (6 if prior else 3)
    with torch.no_grad():
        loss = float(chosen.loss(denoiser, batch))
    assert loss == pytest.approx(naive_loss(denoiser, batch, 3, 0.3, gamma), rel=1e-4)


def test_what_can_not_be_finite_stops_with_the_last_good_weights(method):
    """The second picture drawn is NaN: the run says so, and step 1 is still what is learned."""
    nan = float("nan")
    bad = dataclasses.replace(
        example(7), pixels=torch.full((3, 64, 64), nan), latent=torch.full((4, 8, 8), nan)
    )
    data = dataclasses.replace(tiny_data(1), training=(example(0), bad))
    seed = next(s for s in range(50) if Draws(s, 0, 0, 1).examples(data.training, 1)[0] is not bad)
    chosen, steps = make(method, seed=seed, batch_size=1, non_finite="stop"), []
    with pytest.raises(FloatingPointError, match=r"step 2.*'learning_rate'.*0\.01.*'precision'"):
        for step in train(chosen, tiny_denoiser(), data):
            steps.append((step, to_tensors(step.learned())))
    ((step, good),) = steps
    assert same(to_tensors(step.learned()), good)
    assert all(tensor.isfinite().all() for tensor in good.values())


def test_contexts_of_different_lengths_are_repeated_to_one(method):
    data, denoiser = tiny_data(2), tiny_denoiser()
    longer = dataclasses.replace(data.training[0], context=data.training[0].context.repeat(2, 1))
    data = dataclasses.replace(data, training=(longer, data.training[1]))
    draws = Draws(0, 0, 0, 1)
    batch = assemble(
        data,
        list(data.training),
        torch.ones(2),
        torch.ones(2).bool(),
        make(method).settings,
        denoiser,
        draws,
    )
    assert batch.context.shape == (2, 14, 32)
    assert torch.equal(batch.context[1, :7], batch.context[1, 7:])
