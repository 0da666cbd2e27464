"""Unconditional pixel-space bases: read from folders, trained, loaded, sampled."""

import json
import math
import os
import shutil
from pathlib import Path

import comfy.model_management
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence

from headless import Graph, PromptFailed, fill_defaults
from personalize.nodes import unconditional as nodes
from personalize.nodes.demo import DemoSubject
from personalize.trainers.artifact import Header, Personalization
from personalize.trainers.errors import InputError
from personalize.trainers.loop import train
from personalize.trainers.memory import needed
from personalize.trainers.method import denoising_loss
from personalize.trainers.methods.a3ft import A3FT
from personalize.trainers.monitor import fixed_batch, high_frequency_energy, stable_loss
from personalize.trainers.pixel_denoiser import reverse_step, variational_bound
from personalize.trainers.pixel_folder import load_unconditional
from personalize.trainers.resume import of_base
from personalize.trainers.unconditional import (
    Unconditional,
    UnconditionalSettings,
    pixel_data,
    sample,
)
from tests.tiny import distance, noise, same, snapshot

MODES = ("naive", "attention", "a3ft")
SIDE = 8


def tiny_base(channels: int = 1, prediction_type: str = "epsilon", **config) -> Unconditional:
    """Make a random base with attention at two widths."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            **{
                "sample_size": SIDE,
                "in_channels": channels,
                "out_channels": channels,
                "layers_per_block": 1,
                "block_out_channels": (16, 32),
                "norm_num_groups": 8,
                "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
                "attention_head_dim": 8,
                **config,
            }
        )
    schedule = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)
    return Unconditional(unet.requires_grad_(False).eval(), schedule)


def pictures(count: int, channels: int = 1, seed: int = 0) -> list[torch.Tensor]:
    return list(noise(count, channels, SIDE, SIDE, seed=seed).clamp(-1, 1))


def trained(base: Unconditional, data=None, **settings):
    """Train and return (the denoiser, what was learned as an artifact)."""
    how = {"steps": 3, "batch_size": 2, "learning_rate": 1e-2, **settings}
    method, denoiser = A3FT(UnconditionalSettings(**how)), base.denoiser()
    data = data or pixel_data(pictures(4, base.channels))
    step = list(train(method, denoiser, data))[-1]
    header = Header(
        method="a3ft",
        step=0,
        settings=method.settings.as_dict(),
        base=base.fingerprint(),
        instance_prompt="",
        class_prompt="",
        data=data.fingerprint(),
    )
    return denoiser, Personalization.of(header, step.learned(), step.index)


def draw(base: Unconditional, numbers=range(2), steps=4, seed=0, eta=0.0) -> torch.Tensor:
    return list(sample(base, base.network(), numbers, steps, seed, eta))[-1]


def question(channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return noise(2, channels, SIDE, SIDE, seed=5), torch.tensor([3, 990])


# Folders


def write(folder: Path, base: Unconditional, bare: bool = False, **how) -> Path:
    """Write a base as diffusers does."""
    base.unet.save_pretrained(folder if bare else folder / "unet", **how)
    schedule = DDPMScheduler.from_config(base.schedule.config)
    schedule.save_pretrained(folder if bare else folder / "scheduler")
    if not bare:
        index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("bare", [False, True], ids=["pipeline", "bare"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_diffusers_folder_is_read_whole(tmp_path, bare, channels, prediction_type):
    base = tiny_base(channels, prediction_type)
    loaded = load_unconditional(write(tmp_path / "b", base, bare))
    assert same(snapshot(loaded.unet), snapshot(base.unet))
    assert torch.equal(loaded.schedule.alphas_cumprod, base.schedule.alphas_cumprod)
    assert loaded.denoiser().prediction_type == prediction_type
    assert (loaded.channels, loaded.side) == (channels, SIDE)
    assert loaded.fingerprint() == base.fingerprint()
    assert not loaded.unet.training and not any(p.requires_grad for p in loaded.unet.parameters())


def test_weights_in_half_precision_or_in_pieces_are_read_as_fp32(tmp_path):
    base = tiny_base()
    half = Unconditional(tiny_base().unet.half(), base.schedule)
    loaded = load_unconditional(write(tmp_path / "half", half, variant="fp16"))
    assert {p.dtype for p in loaded.unet.parameters()} == {torch.float32}
    assert distance(loaded.unet.conv_in.weight, base.unet.conv_in.weight) < 1e-3
    pieces = write(tmp_path / "pieces", base, max_shard_size="200KB")
    assert len(list((pieces / "unet").glob("*.safetensors"))) > 1
    assert same(snapshot(load_unconditional(pieces).unet), snapshot(base.unet))


def test_a_base_that_was_read_holds_no_file(tmp_path):
    """Else who overwrites it kills the process, and on Windows no one can."""
    for name, how in {"whole": {}, "pieces": {"max_shard_size": "200KB"}}.items():
        loaded = load_unconditional(write(tmp_path / name, tiny_base(), **how))
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
        assert same(snapshot(loaded.unet), snapshot(tiny_base().unet))


def test_attention_under_its_old_names_is_read(tmp_path):
    """DDPM checkpoints of 2022 say query, key, value and proj_attn."""
    folder = write(tmp_path / "old", base := tiny_base(), bare=True)
    file = folder / "diffusion_pytorch_model.safetensors"
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    weights = load_file(file)
    for new_name, old_name in old.items():
        weights = {k.replace(new_name, old_name): v for k, v in weights.items()}
    save_file(weights, file)
    assert same(snapshot(load_unconditional(folder).unet), snapshot(base.unet))


def change(folder: Path, file: str, **values) -> None:
    facts = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps(facts))


def config(**values):
    return lambda folder: change(folder, "unet/config.json", **values)


def schedule(**values):
    return lambda folder: change(folder, "scheduler/scheduler_config.json", **values)


def pickled(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))


def without_weights(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def cut_off(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def without_a_weight(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.weight"]
    save_file(weights, file)


def without_schedule(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")


def not_json(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("{")


def of_a_vae(folder: Path) -> None:
    change(folder, "model_index.json", vqvae=["diffusers", "VQModel"])


def no_betas(folder: Path) -> None:
    facts = {"_class_name": "ScoreSdeVeScheduler", "sigma_max": 1348.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(facts))


def in_pieces(**listed):
    """Say in the folder's list of pieces that a weight is in another file."""

    def damage(folder: Path) -> None:
        base = tiny_base()
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        base.unet.save_pretrained(folder / "unet", max_shard_size="200KB")
        (folder / "unet" / "evil.bin").write_bytes(b"would be unpickled")
        file = "unet/diffusion_pytorch_model.safetensors.index.json"
        pieces = json.loads((folder / file).read_text())["weight_map"]
        change(folder, file, **{"weight_map": pieces | {"conv_in.weight": "evil.bin"}, **listed})

    return damage


OUTSIDE = {"conv_in.weight": "../scheduler/a.safetensors"}
HUGE = {"block_out_channels": [4096, 4096], "layers_per_block": 16}
WRONG = {
    "a pickle among its pieces": (in_pieces(), r"names evil\.bin; only .safetensors files in the"),
    "pieces elsewhere": (in_pieces(weight_map=OUTSIDE), r"names \.\./scheduler/a\.safetensors;"),
    "pieces not there": (in_pieces(weight_map={"a": "b.safetensors"}), r"names b\.safetensors;"),
    "no list of pieces": (in_pieces(weight_map=3), r"names nothing that can be read;"),
    "piece 3": (in_pieces(weight_map={"a": 3}), r"names 3;"),
    "too many layers": (config(layers_per_block=10**7), r"layers_per_block 10000000, not up to 16"),
    "too wide": (config(block_out_channels=[10**9, 64]), r"block_out_channels \[1000000000, 64\]"),
    "too deep": (config(block_out_channels=[32] * 10**4), r"more than 10 levels"),
    "too large": (config(sample_size=50_000), r"sample_size 50000, not up to 1024"),
    "too large for its file": (config(**HUGE), r"describes [\d,]+ numbers, but its files have"),
    "a fraction": (config(layers_per_block=1.5), r"layers_per_block 1\.5, not up to 16"),
    "no groups": (config(norm_num_groups=0), r"can not be used"),
    "unknown blocks": (config(down_block_types=["a", "b"]), r"can not be used"),
    "quantised": (config(quantization_config={"quant_method": "x"}), r"is quantised"),
    "too many steps": (schedule(num_train_timesteps=10**13), r"num_train_timesteps 100000000"),
    "only .bin": (pickled, r"only pickled ones \(\.bin\).*convert it where you trust it"),
    "no weights": (without_weights, r"but has none; convert"),
    "cut off": (cut_off, r"can not be read .*download it again"),
    "a weight less": (without_a_weight, r"1 weights are missing, such as conv_in\.weight"),
    "other size": (config(block_out_channels=[16, 64]), r"can not be read"),
    "wrong class": (config(_class_name="UNet2DConditionModel"), r"holds UNet2DCond.* instead of"),
    "not JSON": (not_json, r"holds no readable config.json"),
    "class labels": (config(num_class_embeds=10), r"conditioned on class labels; choose another"),
    "variances as such": (schedule(variance_type="learned"), r"predicts variances as such"),
    "channels": (config(in_channels=4, out_channels=4), r"has 4 input and 4 output channels"),
    "no size": (config(sample_size=None), r"for size None, not for squares"),
    "not square": (config(sample_size=[8, 16]), r"for size \[8, 16\], not for squares"),
    "score network": (config(time_embedding_type="fourier"), r"counts time continuously"),
    "latents": (of_a_vae, r"on the latents of a VAE"),
    "no schedule": (without_schedule, r"no scheduler_config\.json; put the one"),
    "sigmas": (no_betas, r"ScoreSdeVeScheduler, not a schedule of betas"),
    "predicts x0": (schedule(prediction_type="sample"), r"predicts 'sample', not noise"),
    "made-up betas": (schedule(beta_schedule="mine"), r"can not be used.*download"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_what_can_not_be_trained_is_refused_by_name(tmp_path, mistake):
    damage, message = WRONG[mistake]
    folder = write(tmp_path / "mine", tiny_base())
    damage(folder)
    with pytest.raises(InputError, match=rf"^'base' is 'mine', which .*{message}") as error:
        load_unconditional(folder)
    assert str(tmp_path) not in str(error.value)


def test_the_built_in_base_draws_grey_squares():
    base = load_unconditional(nodes.GLYPHS)
    assert (base.channels, base.side) == (1, 16)
    widths = {m.to_q.in_features for m in base.unet.modules() if hasattr(m, "to_q")}
    assert len(widths) == 2  # what A3FT shares, and what it does not
    assert 1.5e6 < sum(p.numel() for p in base.unet.parameters()) < 3e6


def test_only_unconditional_folders_are_listed_and_names_lead_nowhere_else(tmp_path, monkeypatch):
    write(tmp_path / "in" / "cats", tiny_base())
    write(tmp_path / "in" / "by someone" / "dogs", tiny_base(), bare=True)
    change(write(tmp_path / "in" / "other", tiny_base()), "unet/config.json", _class_name="Other")
    write(tmp_path / "out", tiny_base())
    roots = [str(tmp_path / "in"), str(tmp_path / "missing")]
    monkeypatch.setattr(nodes.folder_paths, "get_folder_paths", lambda kind: roots)
    assert list(nodes.bases()) == [nodes.BUILT_IN, "by someone/dogs", "cats"]
    assert nodes.base_folder("cats") == tmp_path / "in" / "cats"
    for name in ("../out", str(tmp_path / "out"), "cats/unet", "cats/../cats", "", "other"):
        with pytest.raises(InputError, match=r"no such unconditional base\. There are: glyphs"):
            nodes.base_folder(name)


# Training


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_its_formula(prediction_type):
    """E || eps - eps_theta(sqrt(abar) x + sqrt(1 - abar) eps, t) ||^2, picture by picture."""
    base = tiny_base(prediction_type=prediction_type)
    method, denoiser = A3FT(UnconditionalSettings(steps=1, batch_size=3)), base.denoiser()
    seen = []
    method.loss = lambda denoiser, batch: (seen.append(batch), A3FT.loss(method, denoiser, batch))[
        1
    ]
    data = pixel_data(pictures(4))
    (step,) = train(method, denoiser, data)
    (batch,) = seen
    plain, expected = tiny_base(prediction_type=prediction_type), []
    for x, eps, t in zip(batch.latents, batch.noise, batch.timesteps, strict=True):
        assert any(torch.equal(x, example.latent) for example in data.training)
        a = plain.schedule.alphas_cumprod[t]
        noisy, v = a.sqrt() * x + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * x
        with torch.no_grad():
            predicted = plain.unet(noisy[None], t).sample[0]
        expected.append((predicted - (eps if prediction_type == "epsilon" else v)).square().mean())
    # the near-identity gate is all that differs from the base before the first step
    assert step.loss == pytest.approx(float(torch.stack(expected).mean()), rel=0.05)
    with torch.no_grad():
        exact = denoising_loss(plain.denoiser(), batch)
    assert torch.allclose(exact, torch.stack(expected), rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_trained_is_what_is_loaded(tmp_path, mode, channels):
    base = tiny_base(channels)
    denoiser, learned = trained(base, mode=mode)
    learned.save(tmp_path / "last.safetensors")
    loaded = base.apply(Personalization.load(tmp_path / "last.safetensors"))
    x, t = question(channels)
    with torch.no_grad():
        tuned = denoiser(x, t, torch.zeros(2, 1, 0))
        assert distance(loaded.network()(x, t).sample, tuned) < 1e-5
        assert distance(tuned, base.unet(x, t).sample) > 1e-2  # it learned something


@pytest.mark.parametrize("mode", MODES)
def test_strength_zero_is_the_base_bit_for_bit(mode):
    base = tiny_base()
    before = snapshot(base.unet)
    _, learned = trained(base, mode=mode)
    pictures = [draw(base.apply(learned, strength)) for strength in (0.0, 0.5, 1.0)]
    assert torch.equal(pictures[0], draw(base))
    assert not torch.equal(pictures[1], pictures[0]) and not torch.equal(pictures[1], pictures[2])
    assert same(snapshot(base.unet), before)


@pytest.mark.parametrize("mode", MODES)
def test_what_learns_is_what_the_mode_says(mode):
    base = tiny_base()
    denoiser, learned = trained(base, mode=mode)
    moved = base.apply(learned).network()
    attends = {n for n, _ in base.unet.named_parameters() if ".attentions." in n}
    changed = {
        name
        for name, weight in base.unet.named_parameters()
        if not torch.equal(weight, moved.get_parameter(name))
    }
    everything = {name for name, _ in base.unet.named_parameters()}
    # a bias of the keys alone moves no softmax
    expected = everything if mode == "naive" else attends
    assert changed <= expected
    assert expected - changed <= {n for n in everything if n.endswith("to_k.bias")}
    assert any(name.startswith("time_aware.") for name in learned.tensors) == (mode == "a3ft")
    assert denoiser.unet.conv_in is not None


def test_the_prior_is_the_base_bit_for_bit():
    base = tiny_base()
    denoiser, _ = trained(base)
    x, t = question()
    with torch.no_grad(), denoiser.prior():
        assert torch.equal(denoiser(x, t, torch.zeros(2, 1, 0)), base.unet(x, t).sample)


def test_pictures_held_out_are_measured_and_never_trained_on():
    base = tiny_base()
    shown = pictures(5)
    data = pixel_data(shown, held_out=2)
    assert [len(data.training), len(data.held_out)] == [3, 2]
    method, seen = A3FT(UnconditionalSettings(steps=9, batch_size=2)), []
    method.loss = lambda denoiser, batch: (seen.append(batch), A3FT.loss(method, denoiser, batch))[
        1
    ]
    denoiser = base.denoiser()
    list(train(method, denoiser, data))
    drawn = torch.cat([batch.latents for batch in seen])
    counts = [sum(torch.equal(x, y) for x in drawn) for y in shown]
    assert counts == [6, 6, 6, 0, 0]
    assert stable_loss(denoiser, data.held_out) > 0


def test_the_same_seed_gives_the_same_file_and_another_seed_another():
    files = [trained(tiny_base(), seed=seed)[1].tensors for seed in (0, 0, 1)]
    assert same(files[0], files[1]) and not same(files[0], files[2])


@pytest.mark.parametrize("mode", ["naive", "a3ft"])
@pytest.mark.parametrize("how", [{"gradient_checkpointing": "on"}, {"ema_decay": 0.9}])
def test_settings_of_the_loop_work_here_too(mode, how):
    _, learned = trained(tiny_base(), mode=mode, **how)
    assert all(tensor.isfinite().all() for tensor in learned.tensors.values())


@pytest.mark.parametrize("mode", MODES)
def test_a_half_precision_base_trains(mode):
    base = tiny_base()
    denoiser = base.denoiser("bf16")
    method = A3FT(UnconditionalSettings(steps=2, batch_size=2, mode=mode))
    steps = list(train(method, denoiser, pixel_data(pictures(4))))
    exact = list(train(method, base.denoiser(), pixel_data(pictures(4))))
    assert steps[0].loss == pytest.approx(exact[0].loss, rel=0.02)


def test_data_of_another_base_is_refused():
    with pytest.raises(InputError, match=r"'data' has pictures \(3, 8, 8\) where .*\(1, 8, 8\)"):
        base = tiny_base()
        base.in_network_scale(pixel_data(pictures(2, channels=3)), base.denoiser())


def test_what_was_learned_on_another_base_is_refused():
    _, learned = trained(tiny_base())
    with pytest.raises(InputError, match=r"'base' does not fit: this a3ft file .*Connect the kind"):
        tiny_base(block_out_channels=(16, 16)).apply(learned)


def test_training_goes_on_from_applied_weights_but_not_from_an_adapter():
    base = tiny_base()
    first = base.apply(trained(base, mode="attention")[1])
    denoiser, second = trained(first, mode="attention")
    x, t = question()
    with torch.no_grad():
        tuned = denoiser(x, t, torch.zeros(2, 1, 0))
        assert distance(first.apply(second).network()(x, t).sample, tuned) < 1e-5
    assert second.header.base["patches"] and not base.fingerprint()["patches"]
    with pytest.raises(InputError, match="'base' carries a time-aware adapter; connect"):
        base.apply(trained(base)[1]).denoiser()


def test_the_schedule_is_part_of_a_base():
    plain, velocity = tiny_base().fingerprint(), tiny_base(prediction_type="v_prediction")
    linear = Unconditional(tiny_base().unet, DDIMScheduler(beta_schedule="linear"))
    assert of_base(plain, tiny_base().fingerprint()) == []
    for other in (velocity, linear):
        assert of_base(plain, other.fingerprint()) == ["another schedule"]


# Bases that predict variances


def with_variances(channels: int = 1, prediction_type: str = "epsilon") -> Unconditional:
    return tiny_base(channels, prediction_type, out_channels=2 * channels)


def asked(base: Unconditional, timesteps=(0, 1, 500, 998)):
    """A batch, its noisy pixels, and what the base says to them with gradients."""
    denoiser, count = base.denoiser(), len(timesteps)
    data = pixel_data(pictures(count, base.channels, seed=3))
    latents = torch.stack([example.latent for example in data.training])
    batch = fixed_batch(
        data.training, latents, noise(*latents.shape, seed=4), torch.tensor(timesteps)
    )
    noisy = denoiser.noised(batch.latents, batch.noise, batch.timesteps)
    answer = denoiser.answer(noisy, batch.timesteps)
    return denoiser, batch, noisy, answer.detach().requires_grad_()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_bound_is_its_naive_reference(channels, prediction_type):
    """T KL(q(x_t-1 | x_t, x_0) || p) in bits; at t = 0 the chance of the picture's own bytes."""
    base = with_variances(channels, prediction_type)
    denoiser, batch, noisy, answer = asked(base)
    found = variational_bound(denoiser, batch, noisy, answer)
    signal = base.schedule.alphas_cumprod.double()
    betas = [1 - a / b for a, b in zip(signal, [1.0, *signal.tolist()], strict=False)]
    for i, t in enumerate(batch.timesteps.tolist()):
        a, b = signal[t], signal[t - 1] if t else torch.ones((), dtype=signal.dtype)
        x, x0 = noisy[i].double(), batch.latents[i].double()
        said, v = answer[i].detach().double().chunk(2)
        guess = a.sqrt() * x - (1 - a).sqrt() * said
        if prediction_type == "epsilon":
            guess = (x - (1 - a).sqrt() * said) / a.sqrt()
        alpha, beta = a / b, betas[t]
        least = beta * (1 - b) / (1 - a)
        if t == 0:  # that of the next timestep
            least = betas[1] * (1 - signal[0]) / (1 - signal[1])
        means = [
            (b.sqrt() * beta * clean + alpha.sqrt() * (1 - b) * x) / (1 - a)
            for clean in (x0, guess)
        ]
        deviation = torch.exp((v + 1) / 4 * beta.log() + (1 - v) / 4 * least.log())
        model = Normal(means[1], deviation)
        if t:
            term = kl_divergence(Normal(means[0], least.sqrt()), model).mean()
        else:
            upper = torch.where(x0 > 1 - 1 / 255, 1.0, model.cdf(x0 + 1 / 255))
            lower = torch.where(x0 < 1 / 255 - 1, 0.0, model.cdf(x0 - 1 / 255))
            term = -(upper - lower).clamp(min=1e-12).log().mean()
        assert float(found[i].detach()) == pytest.approx(1000 * float(term) / math.log(2), rel=2e-3)


def test_variances_lie_where_diffusers_has_them():
    """At v in [-1, 1] between those of the schedule, as its sampler reads the same network."""
    base = with_variances()
    schedule = DDPMScheduler.from_config(base.schedule.config, variance_type="learned_range")
    v = torch.linspace(-1, 1, 5)
    for t in (1, 10, 999):
        _, _, beta, least = (x.flatten() for x in reverse_step(base.denoiser(), torch.tensor([t])))
        logs = (v + 1) / 2 * beta.log() + (1 - v) / 2 * least.log()
        assert torch.allclose(logs, schedule._get_variance(t, v), rtol=1e-3)


def test_the_bound_trains_variances_alone():
    denoiser, batch, noisy, answer = asked(with_variances(3))
    variational_bound(denoiser, batch, noisy, answer).sum().backward()
    predicted, v = answer.grad.chunk(2, dim=1)
    assert not predicted.any() and v.flatten(1).any(1).all() and v.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_a_base_that_predicts_variances_is_trained_loaded_and_sampled(tmp_path, mode):
    base = load_unconditional(write(tmp_path / "base", with_variances(3)))
    denoiser, learned = trained(base, mode=mode)
    learned.save(tmp_path / "last.safetensors")
    loaded = base.apply(Personalization.load(tmp_path / "last.safetensors"))
    x, t = question(3)
    with torch.no_grad():
        answer = denoiser.answer(x, t)
        assert answer.shape == (2, 6, SIDE, SIDE)
        assert distance(loaded.network()(x, t).sample, answer) < 1e-5
        plain = base.unet(x, t).sample
        for half, before in zip(answer.chunk(2, 1), plain.chunk(2, 1), strict=True):
            assert distance(half, before) > 1e-3  # both learned something
        assert torch.equal(denoiser(x, t), answer[:, :3])
    for eta in (0.0, 1.0):
        assert draw(loaded, eta=eta).shape == (2, 3, SIDE, SIDE)
        assert torch.equal(draw(base.apply(learned, 0.0), eta=eta), draw(base, eta=eta))


def test_the_loss_has_the_bound_and_what_is_measured_has_not():
    base = with_variances()
    method, (denoiser, batch, noisy, answer) = A3FT(UnconditionalSettings()), asked(base)
    simple = denoising_loss(denoiser, batch)
    bound = variational_bound(denoiser, batch, noisy, answer)
    assert torch.allclose(method.errors(denoiser, batch), simple + 1e-3 * bound, rtol=1e-4)
    assert 1e-3 * bound[0] > 0.5 * simple[0]
    held_out = pixel_data(pictures(2)).training
    plain = tiny_base().denoiser()
    plain.unet.load_state_dict(first_half(base.unet))
    assert stable_loss(denoiser, held_out) == pytest.approx(stable_loss(plain, held_out), rel=1e-5)
    assert torch.equal(method.errors(plain, batch), denoising_loss(plain, batch))


def first_half(unet: UNet2DModel) -> dict[str, torch.Tensor]:
    """The weights of the same network without variances."""
    return {n: x.chunk(2)[0] if n.startswith("conv_out") else x for n, x in snapshot(unet).items()}


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_variances_do_not_change_what_ddim_draws(eta):
    base, plain = with_variances(), tiny_base()
    plain.unet.load_state_dict(first_half(base.unet))
    assert torch.allclose(draw(base, eta=eta), draw(plain, eta=eta), atol=1e-6)


def test_memory_is_known_where_variances_are_predicted():
    data, method = pixel_data(pictures(4)), A3FT(UnconditionalSettings(steps=2, batch_size=4))
    more, less = (needed(method, b.denoiser(), data) for b in (with_variances(), tiny_base()))
    assert less < more < 1.2 * less


def test_training_lowers_the_bound():
    base = with_variances()
    denoiser, _ = trained(base, steps=25, mode="naive", learning_rate=3e-3)
    bounds = []
    for asked_of in (base.denoiser(), denoiser):
        _, batch, noisy, _ = asked(base, timesteps=(50, 300, 600, 900))
        with torch.no_grad():
            answer = asked_of.answer(noisy, batch.timesteps)
            bounds.append(float(variational_bound(asked_of, batch, noisy, answer).mean()))
    assert bounds[1] < 0.8 * bounds[0]


# Sampling


def test_a_picture_depends_on_its_number_and_seed_alone():
    base = tiny_base()
    for eta in (0.0, 1.0):
        all_at_once, one = draw(base, range(3), eta=eta), draw(base, [1], eta=eta)
        assert torch.allclose(all_at_once[1:2], one, atol=1e-5)
        assert torch.equal(draw(base, range(3), eta=eta), all_at_once)
        assert not torch.allclose(all_at_once[0], all_at_once[1])
        assert not torch.allclose(draw(base, [1], seed=1, eta=eta), one)


def test_sampling_is_ddims_formula():
    """Song et al. 2021, eq. 12 at eta 0: predict x0, clip it, go to the next timestep."""
    base = tiny_base()
    alphas, sides = base.schedule.alphas_cumprod.double(), (1, SIDE, SIDE)
    from personalize.trainers.method import generator

    x = torch.randn(sides, generator=generator(0, 12, 0))[None].double()
    for t in (750, 500, 250, 0):
        a = alphas[t]
        before = alphas[t - 250] if t else torch.tensor(1.0).double()
        with torch.no_grad():
            eps = base.unet(x.float(), t).sample.double()
        x0 = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
        x = before.sqrt() * x0 + (1 - before).sqrt() * eps
    assert distance(draw(base, [0]), x.float()) < 1e-4


# Nodes


def test_pictures_are_brought_to_the_bases_size_and_colours():
    picture = torch.zeros(20, 30, 3)
    picture[:, 10:, 0] = 1.0
    for channels in (1, 3):
        data = nodes.prepare([picture, picture], tiny_base(channels), "crop", 1)
        assert data.training[0].latent.shape == (channels, SIDE, SIDE)
        assert len(data.training) == len(data.held_out) == 1
        right = data.training[0].latent[:, 4, 6]
        assert torch.allclose(
            right, torch.tensor([2 * 0.299 - 1] if channels == 1 else [1, -1, -1.0]), atol=1e-3
        )
    with pytest.raises(InputError, match=r"'images' has pictures of 30x20 where .*8x8.*'crop'"):
        nodes.prepare([picture], tiny_base(), "as is", 0)
    with pytest.raises(InputError, match=r"'hold_out' is 1 of 1 images"):
        nodes.prepare([picture], tiny_base(), "crop", 1)


def test_images_are_pixels_again():
    for channels in (1, 3):
        pixels = torch.stack(pictures(3, channels))
        images = nodes.as_images(pixels)
        assert images.shape == (3, SIDE, SIDE, 3)
        again = torch.stack([nodes.as_pixels(i, SIDE, "crop", channels) for i in images])
        assert torch.allclose(again, pixels, atol=1e-5)


def test_nothing_stays_on_the_device(monkeypatch):
    freed = []
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda *a: freed.append(a))
    base = tiny_base()
    before = snapshot(base.unet)
    assert nodes.draw(base, 3, 2, 0, 0.0).shape == (3, 1, SIDE, SIDE)
    assert freed and same(snapshot(base.unet), before)


@pytest.fixture(scope="module")
def own_base(server) -> str:
    """A base of random weights in the server's models folder; returns its name."""
    write(server.base / "models" / "diffusers" / "mine" / "random", tiny_base(3))
    return "mine/random"


def sampled(graph: Graph, base) -> str:
    drawn = graph.add("PersonalizeSampleUnconditional", base=base, count=2, steps=3)
    return graph.add("SaveImage", images=(drawn, 0), filename_prefix="unconditional")


def test_nodes_train_apply_load_and_sample(server, comfy, own_base):
    graph = Graph()
    base = graph.add("PersonalizeLoadUnconditional", base=own_base)
    images = graph.add("PersonalizeDemoSubject", count=4, resolution=64)
    data = graph.add("PersonalizePixelDataset", images=(images, 0), base=(base, 0), hold_out=1)
    how = {"name": "pixels", "steps": 3, "batch_size": 2, "learning_rate": 1e-2}
    node = graph.add("PersonalizeTrainUnconditional", base=(base, 0), data=(data, 0), **how)
    tuned = {"base": (base, 0), "tuned": (node, 0)}
    for name, strength in {"applied": 1.0, "zero": 0.0}.items():
        wires = {"base": (base, 0), "personalized": (node, 1), "strength": strength}
        tuned[name] = (graph.add("PersonalizeApplyUnconditional", **wires), 0)
    saved = {name: sampled(graph, wire) for name, wire in tuned.items()}
    result = comfy.run(fill_defaults(graph, comfy.object_info()))
    assert "3 steps" in result.texts(node)[0] and "held out" in result.texts(node)[0]
    seen = {name: shown(comfy, result, id) for name, id in saved.items()}
    assert seen["base"].shape == (2, SIDE, SIDE, 3)
    assert np.array_equal(seen["zero"], seen["base"])
    assert np.array_equal(seen["applied"], seen["tuned"])
    assert not np.array_equal(seen["tuned"], seen["base"])

    graph = Graph()
    base = graph.add("PersonalizeLoadUnconditional", base=own_base)
    wires = {"base": (base, 0), "run": "pixels", "checkpoint": "last"}
    load = graph.add("PersonalizeLoadUnconditionalRun", **wires)
    text, drawn = graph.add("PreviewAny", source=(load, 1)), sampled(graph, (load, 0))
    result = comfy.run(fill_defaults(graph, comfy.object_info()))
    assert np.array_equal(shown(comfy, result, drawn), seen["tuned"])
    assert "A3FT after 3 steps" in result.texts(text)[0]
    assert "the base it was trained on" in result.texts(text)[0]

    other = {"model": (graph.add("PersonalizeDemoBase"), 0), "run": "pixels", "checkpoint": "last"}
    graph = Graph()
    base = graph.add("PersonalizeDemoBase")
    load = graph.add("PersonalizeLoad", **other | {"model": (base, 0)})
    graph.add("PreviewAny", source=(load, 1))
    with pytest.raises(PromptFailed, match=r"Load Personalization: 'model' does not fit.*uncond"):
        comfy.run(fill_defaults(graph, comfy.object_info()))


def test_a_monitor_watches_over_pixels_and_changes_nothing(server, comfy, own_base):
    graph = Graph()
    base = graph.add("PersonalizeLoadUnconditional", base=own_base)
    images = graph.add("PersonalizeDemoSubject", count=4, resolution=64)
    data = graph.add("PersonalizePixelDataset", images=(images, 0), base=(base, 0), hold_out=1)
    wires = {"base": (base, 0), "data": (data, 0), "steps": 2}
    monitor = graph.add("PersonalizeMonitor")
    graph.add("PersonalizeTrainUnconditional", **wires, monitor=(monitor, 0), name="watched pixels")
    graph.add("PersonalizeTrainUnconditional", **wires, name="unwatched pixels")
    comfy.run(fill_defaults(graph, comfy.object_info()))
    folders = [
        server.output_dir / "personalized" / f"{how} pixels" for how in ("watched", "unwatched")
    ]
    assert same(*(load_file(folder / "last.safetensors") for folder in folders))
    lines = [json.loads(line) for line in (folders[0] / "history.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line.get("evaluation")]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(line["held_out_bins"] for line in lines)
    check_samples(comfy, own_base, folders[0], lines)


def check_samples(comfy, own_base: str, folder: Path, lines: list[dict]) -> None:
    """Samples are those of Sample Unconditional, as grainy as they are beside what is learned."""
    assert [len(line["samples"]) for line in lines] == [2, 0, 2]
    graph = Graph()
    base = graph.add("PersonalizeLoadUnconditional", base=own_base)
    wires = {"base": (base, 0), "run": folder.name, "checkpoint": "last"}
    base = graph.add("PersonalizeLoadUnconditionalRun", **wires)
    drawn = graph.add("PersonalizeSampleUnconditional", base=(base, 0), count=2, steps=20)
    seen = graph.add("SaveImage", images=(drawn, 0), filename_prefix="unconditional")
    expected = shown(comfy, comfy.run(fill_defaults(graph, comfy.object_info())), seen)
    found = [np.asarray(Image.open(folder / name)) for name in lines[-1]["samples"]]
    assert np.array_equal(found, expected)

    pictures, _ = DemoSubject.execute(1, 4, "training", 64, "zib").args
    learned = nodes.prepare(list(pictures[:3]), tiny_base(3), "crop", 0).training
    usual = high_frequency_energy(torch.stack([e.pixels for e in learned]) / 2).mean()
    for line in (lines[0], lines[-1]):
        assert line["grain"] == pytest.approx(line["sample_energy"] / float(usual), rel=1e-4)


def shown(comfy, result, node: str) -> np.ndarray:
    return np.stack([np.asarray(comfy.image(f).convert("RGB")) for f in result.files(node)])


def test_a_base_that_is_not_there_is_refused_before_anything_runs(comfy):
    graph = Graph()
    base = graph.add("PersonalizeLoadUnconditional", base="../../etc")
    sampled(graph, (base, 0))
    with pytest.raises(PromptFailed, match="no such unconditional base"):
        comfy.run(fill_defaults(graph, comfy.object_info()))
