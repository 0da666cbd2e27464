"""BNN against its equations (arXiv 2405.19931): weights that are random while they learn."""

import logging
import math

import comfy.lora
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from peft.tuners.oft.layer import OFTLayer
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn.utils.parametrize import register_parametrization

from personalize.nodes import bridge, load
from personalize.trainers.artifact import Personalization
from personalize.trainers.edits import Difference, LowRank, Rotation, to_tensors
from personalize.trainers.errors import InputError
from personalize.trainers.free import Free
from personalize.trainers.loop import adapt
from personalize.trainers.method import Draws, Objective, denoising_loss, generator
from personalize.trainers.methods.bnn import (
    BNN,
    DRAWN_ON_CPU,
    LEAST_SIGMA,
    Gaussian,
    divergence,
    draw,
    drawn,
    posteriors,
    random_layers,
    tuned_layers,
)
from personalize.trainers.methods.dreambooth import DreamBooth
from personalize.trainers.methods.lora import LoRA
from personalize.trainers.normal import normal_kl
from personalize.trainers.oft import rotations, set_rotations
from personalize.trainers.sites import sites
from tests.test_bridge import question as comfy_question
from tests.test_load import train_on, weights_when_loaded
from tests.tiny import (
    comfy_model,
    comfy_output,
    distance,
    edited,
    geometry,
    make,
    noise,
    question,
    run,
    same,
    snapshot,
    tiny_data,
    tiny_denoiser,
    tiny_unet,
)

FORMS = ("lora", "full", "attention", "oft")
RATES = {"lora": 1e-2, "full": 1e-4, "attention": 3e-4, "oft": 1e-2}  # where five steps show
DIRECTIONS = ("posterior to prior", "prior to posterior")


def bnn(over: str = "lora", **settings) -> BNN:
    """Make a BNN that a tiny network can stand."""
    return make(BNN, **{"over": over, "learning_rate": RATES[over], "block_size": 8} | settings)


def adapted(over: str = "lora", **settings):
    """Return (method, a denoiser that it adapted)."""
    method, denoiser = bnn(over, **settings), tiny_denoiser()
    adapt(method, denoiser.unet)
    return method, denoiser


def batch_of(method, denoiser, index: int = 0):
    return method.draw(tiny_data(), denoiser, Draws(0, index, 0, 1))


@pytest.fixture(params=FORMS)
def over(request):
    return request.param


@pytest.fixture(scope="module", params=FORMS)
def ready(request):
    """(method, a denoiser that it adapted), for tests that only look."""
    return adapted(request.param)


@pytest.fixture(scope="module", params=FORMS)
def trained(request):
    """(method, denoiser, last step) after five steps."""
    method, denoiser = bnn(request.param, steps=5), tiny_denoiser()
    return method, denoiser, run(method, denoiser)[-1]


# One random layer


def random_linear(outputs: int = 5, inputs: int = 7, sigma: float = 0.3) -> nn.Linear:
    """Make a layer whose weight has a sigma of its own everywhere, 0.15 to 0.45."""
    layer = nn.Linear(inputs, outputs, bias=False)
    with torch.no_grad():
        layer.weight.copy_(noise(outputs, inputs))
    register_parametrization(layer, "weight", Gaussian(layer.weight, sigma, index=3))
    with torch.no_grad():
        layer.parametrizations.weight[0].sigma.mul_(0.5 + noise(outputs, inputs, seed=1).sigmoid())
    return layer


def outputs_of(layer: nn.Linear, x: torch.Tensor, count: int) -> torch.Tensor:
    found = []
    for seed in range(count):
        draw(layer, seed)
        with torch.no_grad():
            found.append(layer(x))
    return torch.stack(found)


def test_a_layers_output_has_mean_x_mu_and_variance_x2_sigma2():
    """Both within 4.5 standard errors of 10,000 draws, for each of 5 outputs."""
    layer, x, count = random_linear(), noise(7, seed=2), 10_000
    parametrization = layer.parametrizations.weight
    mean = parametrization.original @ x
    variance = parametrization[0].sigma.square() @ x.square()
    found = outputs_of(layer, x, count)
    z = (found.mean(0) - mean) / (variance / count).sqrt()
    assert z.abs().max() < 4.5
    ratio = found.var(0) / variance
    assert (ratio - 1).abs().max() < 4.5 * math.sqrt(2 / count)


def test_a_sample_is_mu_plus_sigma_eps_and_so_are_its_gradients():
    layer = random_linear()
    mean, gaussian = layer.parametrizations.weight.original, layer.parametrizations.weight[0]
    draw(layer, 11)
    eps = torch.randn(5, 7, generator=generator(11, 7, 3))
    assert torch.equal(layer.weight, mean + gaussian.sigma * eps)
    upstream = noise(5, 7, seed=4)
    (layer.weight * upstream).sum().backward()
    assert torch.equal(mean.grad, upstream)
    assert torch.allclose(gaussian.sigma.grad, upstream * eps)


@pytest.mark.parametrize("training", [False, True])
def test_noise_is_switched_by_the_seed_and_not_by_the_training_flag(training):
    """Parametrizations copy the flag of their layer, and a frozen U-Net is never in training."""
    layer = random_linear().train(training)
    mean = layer.parametrizations.weight.original
    assert torch.equal(layer.weight, mean)
    draw(layer, 1)
    assert not torch.equal(layer.weight, mean)
    draw(layer, None)
    assert torch.equal(layer.weight, mean)


def test_sigma_never_falls_below_its_floor():
    layer = random_linear()
    gaussian = layer.parametrizations.weight[0]
    with torch.no_grad():
        gaussian.sigma.copy_(noise(5, 7) * 1e-6)
    assert gaussian.sigma.min() < 0 and gaussian.spread().min() == LEAST_SIGMA == 1e-7
    draw(layer, 0)
    scale = (layer.weight - layer.parametrizations.weight.original).abs()
    assert scale.max() < 1e-5
    kl = normal_kl(torch.zeros(5, 7), gaussian.spread(), torch.zeros(()), torch.tensor(0.01))
    assert kl.isfinite().all()


def test_large_parameters_draw_with_the_same_seed():
    gaussian = Gaussian(torch.zeros(DRAWN_ON_CPU + 1), 0.1, index=2)
    assert torch.equal(gaussian.noise(5), gaussian.noise(5))
    assert not torch.equal(gaussian.noise(5), gaussian.noise(6))
    assert abs(float(gaussian.noise(5).std()) - 1) < 0.01


# Kullback-Leibler


def random_pair():
    mean, prior_mean = noise(40, seed=1), noise(40, seed=2)
    sigma, prior_sigma = noise(40, seed=3).exp(), torch.tensor(0.7)
    return mean.requires_grad_(), sigma.requires_grad_(), prior_mean, prior_sigma


def test_the_divergence_is_that_of_torch_both_ways():
    mean, sigma, prior_mean, prior_sigma = random_pair()
    q, p = Normal(mean, sigma), Normal(prior_mean, prior_sigma)
    forward = normal_kl(mean, sigma, prior_mean, prior_sigma)
    backward = normal_kl(prior_mean, prior_sigma, mean, sigma)
    assert torch.allclose(forward, kl_divergence(q, p), rtol=1e-5, atol=1e-6)
    assert torch.allclose(backward, kl_divergence(p, q), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(forward, backward)


def test_gradients_from_posterior_to_prior():
    """d mu = (mu - mu0) / sigma0^2,   d sigma = sigma / sigma0^2 - 1 / sigma."""
    mean, sigma, mean0, sigma0 = random_pair()
    normal_kl(mean, sigma, mean0, sigma0).sum().backward()
    assert torch.allclose(mean.grad, (mean - mean0) / sigma0**2, rtol=1e-4)
    assert torch.allclose(sigma.grad, sigma / sigma0**2 - 1 / sigma, rtol=1e-4, atol=1e-5)


def test_gradients_from_prior_to_posterior():
    """d mu = (mu - mu0) / sigma^2,   d sigma = 1 / sigma - (sigma0^2 + (mu0 - mu)^2) / sigma^3."""
    mean, sigma, mean0, sigma0 = random_pair()
    normal_kl(mean0, sigma0, mean, sigma).sum().backward()
    assert torch.allclose(mean.grad, (mean - mean0) / sigma**2, rtol=1e-4)
    expected = 1 / sigma - (sigma0**2 + (mean0 - mean) ** 2) / sigma**3
    assert torch.allclose(sigma.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("over, sigma", [("lora", 0.013), ("full", 0.01), ("oft", 0.3)])
def test_the_divergence_is_exactly_zero_at_the_start(over, sigma):
    _, denoiser = adapted(over, sigma=sigma)
    for direction in DIRECTIONS:
        total = divergence(denoiser.unet, direction, "sum")
        assert float(total.detach()) == 0.0
        total.backward()
    for posterior in posteriors(denoiser.unet):
        assert not posterior.mean.grad.any()
        assert posterior.noise.sigma.grad.abs().max() < 1e-4 / sigma  # of two terms of 1 / sigma


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_networks_divergence_is_the_sum_over_its_layers(over, direction):
    """Prior means: theta_0 for full weights, 0 for B and for rotations; prior sigma: the first."""
    _, denoiser = adapted(over)
    base, expected, count = tiny_unet(), 0.0, 0
    for index, posterior in enumerate(posteriors(denoiser.unet)):
        with torch.no_grad():
            posterior.mean.add_(noise(*posterior.mean.shape, seed=index), alpha=0.02)
            posterior.noise.sigma.mul_(1.5 + 0.1 * (index % 3))
    for site, layer in tuned_layers(denoiser.unet).items():
        named = {"lora": "lora_B", "oft": "oft_R"}.get(over, "free")
        part = getattr(layer, named)["default"]
        for name, steps in part.parametrizations.items() if is_random(part) else ():
            start = 0.0 if named != "free" else base.get_parameter(f"{site}.{name}").double()
            q = Normal(steps.original.double(), steps[0].sigma.double())
            p = Normal(torch.as_tensor(start).expand(q.loc.shape), torch.tensor(0.01).double())
            pair = (q, p) if direction == DIRECTIONS[0] else (p, q)
            expected += float(kl_divergence(*pair).sum().detach())
            count += q.loc.numel()
    total = float(divergence(denoiser.unet, direction, "sum").detach())
    mean = float(divergence(denoiser.unet, direction, "mean").detach())
    assert expected > 0 and total == pytest.approx(expected, rel=1e-4)
    assert mean == pytest.approx(expected / count, rel=1e-4)


def is_random(module: nn.Module) -> bool:
    return any(isinstance(m, Gaussian) for m in module.modules())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_divergence_is_added_once_per_objective(direction):
    """Not per example, nor weighed by them."""
    plain, denoiser = adapted()
    with torch.no_grad():
        for posterior in posteriors(denoiser.unet):
            posterior.mean.add_(0.01)
    method = bnn(kl_weight=0.3, kl_direction=direction, kl_reduction="mean")
    batch = batch_of(method, denoiser)
    with torch.no_grad():
        difference = method.loss(denoiser, batch) - plain.loss(denoiser, batch)
        kl = float(divergence(denoiser.unet, direction, "mean"))
    assert kl > 0 and float(difference) == pytest.approx(0.3 * kl, rel=1e-4)


def test_a_large_lambda_holds_the_weights_at_their_start():
    """lambda 1e6 on the mean against lambda 0: the means go less far, sigma stays near 0.01."""
    far = {}
    for weight in (0.0, 1e6):
        method, denoiser = (
            bnn("full", kl_weight=weight, kl_reduction="mean", steps=8),
            tiny_denoiser(),
        )
        run(method, denoiser)
        shifts = [p.mean - p.prior_mean for p in posteriors(denoiser.unet)]
        sigmas = [p.noise.sigma - 0.01 for p in posteriors(denoiser.unet)]
        far[weight] = [
            float(torch.cat([t.detach().flatten() for t in g]).norm()) for g in (shifts, sigmas)
        ]
    assert far[1e6][0] < 0.5 * far[0.0][0] and far[1e6][1] < 0.5 * far[0.0][1]


# Whose weights are random


def test_sigma_zero_is_plain_lora_bit_for_bit():
    settings = {"steps": 4, "learning_rate": 1e-3, "weight_decay": 1e-2, "init": "gaussian"}
    plain = run(make(LoRA, **settings), tiny_denoiser())
    random = run(make(BNN, sigma=0.0, **settings), tiny_denoiser())
    assert [step.loss for step in plain] == [step.loss for step in random]
    assert same(to_tensors(plain[-1].learned()), to_tensors(random[-1].learned()))


@pytest.mark.parametrize("over, free", [("full", "everything"), ("attention", "attention")])
def test_sigma_zero_is_plain_dreambooth_bit_for_bit(over, free):
    settings = {"steps": 4, "learning_rate": 1e-4}
    plain = run(make(DreamBooth, free=free, **settings), tiny_denoiser())
    random = run(make(BNN, sigma=0.0, over=over, **settings), tiny_denoiser())
    assert [step.loss for step in plain] == [step.loss for step in random]
    assert same(to_tensors(plain[-1].learned()), to_tensors(random[-1].learned()))


def test_sigma_zero_registers_nothing(over):
    method, denoiser = adapted(over, sigma=0.0)
    assert not is_random(denoiser.unet) and not list(posteriors(denoiser.unet))
    run(bnn(over, sigma=0.0, steps=1), tiny_denoiser())
    assert method.facts() == {}


def test_over_attention_nothing_else_learns_and_its_linear_layers_are_random():
    _, denoiser = adapted("attention")
    layers = tuned_layers(denoiser.unet)
    plain = tiny_unet().named_modules()
    linear = {n for n, m in plain if ".attn1." in n and isinstance(m, nn.Linear)}
    assert {n.split(".")[-1] for n in layers} >= {"to_q", "to_k", "to_v", "norm1", "norm2"}
    assert not [n for n in layers if "resnets" in n or ".ff." in n or "time" in n]
    random = {name for name, layer in layers.items() if is_random(layer)}
    assert random == linear and linear
    learning = [n for n, p in denoiser.unet.named_parameters() if p.requires_grad]
    assert learning and all(".free." in n for n in learning)


def test_a_network_is_searched_once_and_its_weights_are_not_held():
    method, denoiser = adapted("full")
    found = method.random(denoiser.unet)
    assert method.random(denoiser.unet) is found
    assert method.random(tiny_denoiser().unet) == []
    found = method.random(denoiser.unet)
    denoiser.to("meta")  # as when a training ends
    assert found and all(p.mean.is_meta and p.prior_mean.is_meta for p in found)


def test_a_divergence_without_noise_is_refused():
    with pytest.raises(InputError, match=r"'kl_weight' is 0\.1, but 'sigma' is 0"):
        run(bnn(kl_weight=0.1, sigma=0.0), tiny_denoiser())


def test_of_a_lora_only_up_is_random():
    _, denoiser = adapted(layers="all")
    layers = [m for m in denoiser.unet.modules() if isinstance(m, LoraLayer)]
    assert layers and len(layers) == len(list(posteriors(denoiser.unet)))
    for layer in layers:
        assert is_random(layer.lora_B) and not is_random(layer.lora_A)
        assert layer.lora_B["default"].parametrizations.weight[0].sigma.eq(0.01).all()


def test_down_starts_one_over_rank_wide_and_noise_reaches_the_weights_as_the_paper_has_it():
    """std of (B A)_ij with B ~ N(0, sigma^2), A ~ N(0, 1/r^2): sigma / sqrt(r)."""
    found, rank = {}, 4
    for init in ("gaussian", "kaiming"):
        _, denoiser = adapted(layers="all", rank=rank, init=init)
        layers = [m for m in denoiser.unet.modules() if isinstance(m, LoraLayer)]
        down = torch.cat([layer.lora_A["default"].weight.flatten() for layer in layers])
        if init == "gaussian":
            assert float(down.detach().std()) == pytest.approx(1 / rank, rel=0.02)
        with torch.no_grad(), drawn(denoiser.unet, 3):
            deltas = [
                (
                    layer.lora_B["default"].weight.flatten(1)
                    @ layer.lora_A["default"].weight.flatten(1)
                )
                for layer in layers
            ]
        assert all(layer.scaling["default"] == 1.0 for layer in layers)
        found[init] = float(torch.cat([d.flatten() for d in deltas]).std())
    assert found["gaussian"] == pytest.approx(0.01 / math.sqrt(rank), rel=0.05)
    assert found["gaussian"] > 4 * found["kaiming"]  # 11 times on layers as wide as SD's


def test_the_rotation_is_what_is_random_of_oft():
    _, denoiser = adapted("oft")
    layers = [m for m in denoiser.unet.modules() if isinstance(m, OFTLayer)]
    assert layers and all(is_random(layer.oft_R) for layer in layers)
    with drawn(denoiser.unet, 1):
        blocks = [Rotation(layer.oft_R["default"].weight).blocks() for layer in layers]
    for r in blocks:  # whatever the noise, it stays a rotation
        assert (r @ r.mT - torch.eye(8)).abs().max() < 1e-5
        assert (r - torch.eye(8)).abs().max() > 1e-3


@pytest.mark.parametrize("preset", ["linear", "linear-up", "linear+cross", "norm"])
def test_presets_choose_random_layers_and_everything_learns(preset):
    _, denoiser = adapted("full", random=preset)
    kinds = (nn.LayerNorm, nn.GroupNorm) if preset == "norm" else (nn.Linear,)
    expected = {
        name
        for name, module in tiny_unet().named_modules()
        if isinstance(module, kinds)
        and "time" not in name
        and ("attn2" not in name or preset == "linear+cross")
        and (name.startswith("up_blocks") or preset != "linear-up")
    }
    layers = tuned_layers(denoiser.unet)
    random = {name for name, layer in layers.items() if is_random(layer)}
    assert random == expected and all(isinstance(layer, Free) for layer in layers.values())
    base = {name: p for name, p in tiny_unet().named_parameters()}
    free = sum(p.numel() for p in denoiser.unet.parameters() if p.requires_grad)
    sigmas = sum(p.mean.numel() for p in posteriors(denoiser.unet))
    assert free == sum(p.numel() for p in base.values()) + sigmas
    assert sigmas == sum(p.numel() for n, p in base.items() if n.rpartition(".")[0] in expected)


SD15 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


def test_the_presets_count_as_in_the_paper_on_stable_diffusion():
    """96 layers and 198,371,200 parameters, 23.1 %; the norms are .02 %."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
    total = sum(p.numel() for p in unet.parameters())
    assert total == 859_520_964
    counts = {}
    for preset in ("linear", "linear-up", "linear+cross", "norm"):
        layers = random_layers(unet, preset)
        parameters = [p for n in layers for p in unet.get_submodule(n).parameters()]
        counts[preset] = len(layers), sum(p.numel() for p in parameters)
    assert counts["linear"] == (96, 198_371_200)
    assert round(100 * counts["linear"][1] / total, 1) == 23.1
    assert counts["linear-up"][0] == 54 and counts["linear+cross"][0] == 96 + 64
    assert 100 * counts["norm"][1] / total == pytest.approx(0.02, abs=0.006)


def test_a_preset_without_layers_is_refused():
    plain = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    assert random_layers(tiny_unet(**plain), "linear")
    with pytest.raises(InputError, match="'random' is 'linear-up', but this base has no"):
        random_layers(tiny_unet(**plain), "linear-up")


def test_cross_attention_is_no_more_random_than_the_network_itself():
    """attn2's own weights are the same in every draw; attn1's never."""
    _, denoiser = adapted("full")
    seen = {}
    for seed in (1, 2):
        with drawn(denoiser.unet, seed):
            seen[seed] = {
                name: layer.free["default"].weight.detach().clone()
                for name, layer in tuned_layers(denoiser.unet).items()
                if ".attn" in name
            }
    base = tiny_unet()
    for name, weight in seen[1].items():
        plain = base.get_parameter(f"{name}.weight")
        assert torch.equal(weight, seen[2][name]) == (".attn2." in name), name
        assert torch.equal(weight, plain) == (".attn2." in name), name


def test_sigma_can_be_a_share_of_each_layers_own_deviation():
    """Of the base layer's weight, for a LoRA's B too; a rotation is relative by itself."""
    plain = tiny_unet()
    for over in FORMS:
        _, denoiser = adapted(over, sigma=0.2, sigma_relative=True)
        for site, layer in tuned_layers(denoiser.unet).items():
            for gaussian in (m for m in layer.modules() if isinstance(m, Gaussian)):
                weight = plain.get_parameter(f"{site}.weight")
                deviation = 1.0 if over == "oft" else float((weight - weight.mean()).norm())
                share = deviation / (1 if over == "oft" else weight.numel() ** 0.5)
                assert gaussian.prior_sigma == pytest.approx(0.2 * share, rel=1e-4)
                assert float(gaussian.sigma.mean()) == pytest.approx(0.2 * share, rel=1e-4)


# When they are random


def predictions(denoiser, seeds) -> list[torch.Tensor]:
    found = []
    for seed in seeds:
        with torch.no_grad(), drawn(denoiser.unet, seed):
            found.append(denoiser(*question()))
    return found


def test_training_passes_differ_and_evaluation_does_not(ready):
    _, denoiser = ready
    one, two, again = predictions(denoiser, (1, 2, 1))
    assert distance(one, two) > 1e-3 and torch.equal(one, again)
    plain = predictions(denoiser, (None, None))
    assert torch.equal(*plain) and distance(one, plain[0]) > 1e-3


def test_the_loss_is_of_drawn_weights_and_evaluation_of_the_means(ready):
    method, denoiser = ready
    first, second = (batch_of(method, denoiser, index) for index in (0, 1))
    with torch.no_grad():
        mean = (first.weight * denoising_loss(denoiser, first)).sum()
        noisy = method.loss(denoiser, first)
        with drawn(denoiser.unet, first.seed):
            expected = (first.weight * denoising_loss(denoiser, first)).sum()
        assert torch.equal(noisy, expected) and not torch.equal(noisy, mean)
        assert not torch.equal(method.loss(denoiser, second), noisy)
        # asked without gradients, it leaves the network as it was
        assert torch.equal((first.weight * denoising_loss(denoiser, first)).sum(), mean)


def test_every_layer_has_noise_of_its_own_and_every_step_too():
    _, denoiser = adapted("full")
    gaussians = [p.noise for p in posteriors(denoiser.unet)]
    draws = [g.noise(seed).flatten()[:16] for g in gaussians for seed in (1, 2)]
    assert len({d.numpy().tobytes() for d in draws}) == len(draws)


@pytest.mark.parametrize("over, fails", [("lora", False), ("lora", True), ("oft", False)])
def test_update_leaves_the_means_however_it_ends(over, fails):
    method, denoiser = adapted(over)
    before = predictions(denoiser, [None])[0]
    batch = batch_of(method, denoiser)
    if fails:
        batch.context.data = batch.context[..., :3]  # an error from inside the network
    parameters = [p for p in denoiser.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    try:
        method.update([Objective(method, denoiser, batch)], optimizer)
        assert not fails
    except RuntimeError:
        assert fails
    with torch.no_grad():
        assert torch.equal(denoiser(*question()), before)


def test_a_loss_that_waits_for_its_backward_pass_does_not_reach_a_checkpoint(ready):
    method, denoiser = ready
    before = to_tensors(method.learned(denoiser.unet))
    loss = method.loss(denoiser, batch_of(method, denoiser))
    assert same(to_tensors(method.learned(denoiser.unet)), before)
    assert loss.requires_grad
    draw(denoiser.unet, None)


def test_the_prior_is_the_base_while_weights_are_drawn(ready):
    _, denoiser = ready
    with torch.no_grad():
        base = tiny_denoiser()(*question())
        with drawn(denoiser.unet, 4), denoiser.prior():
            assert torch.equal(denoiser(*question()), base)


def test_checkpointing_meets_the_same_weights_again(over):
    gradients = []
    for checkpointing in (False, True):
        method, denoiser = adapted(over)
        if checkpointing:
            denoiser.unet.enable_gradient_checkpointing()
        seen = []
        gaussian = next(posteriors(denoiser.unet)).noise
        gaussian.register_forward_hook(lambda *a, seen=seen: seen.append(a[-1].detach().clone()))
        method.loss(denoiser, batch_of(method, denoiser)).backward()
        free = [p for p in denoiser.unet.parameters() if p.requires_grad]
        gradients.append(torch.cat([p.grad.flatten() for p in free]))
        assert all(torch.equal(value, seen[0]) for value in seen)
        gradients.append(len(seen))
    plain, calls, checkpointed, more_calls = gradients
    assert more_calls > calls and plain.abs().max() > 0
    assert distance(checkpointed, plain) < 1e-5


def test_noise_is_shared_by_a_batch():
    """Two equal examples get the same prediction in the same pass."""
    _, denoiser = adapted("full")
    x, timesteps, context = (t[:1].repeat(2, *[1] * (t.ndim - 1)) for t in question())
    with torch.no_grad(), drawn(denoiser.unet, 9):
        one, two = denoiser(x, timesteps, context)
    assert distance(one, two) < 1e-5


# What is kept and told


def test_what_is_kept_is_the_means(trained):
    method, denoiser, step = trained
    free = dict.fromkeys(("full", "attention"), Difference)
    kind = ({"lora": LowRank, "oft": Rotation} | free)[method.settings.over]
    edits = step.learned()
    assert edits and all(type(edit) is kind for edit in edits.values())
    plain = tiny_denoiser()
    edited(plain.unet, edits)
    with torch.no_grad():
        assert distance(plain(*question()), denoiser(*question())) <= 1e-4
        assert distance(tiny_denoiser()(*question()), denoiser(*question())) > 1e-3
    assert not any("sigma" in name or "parametriz" in name for name in to_tensors(edits))
    kept = {tensor.float().cpu().numpy().tobytes() for tensor in to_tensors(edits).values()}
    for posterior in posteriors(denoiser.unet):
        mean = posterior.mean.detach()
        if kind is Difference:
            mean = mean - posterior.prior_mean.float()
        assert mean.numpy().tobytes() in kept


def test_the_base_stays_as_it_was(trained):
    _, denoiser, _ = trained
    original = snapshot(tiny_unet())
    kept = {n.replace(".base_layer", ""): t for n, t in denoiser.unet.state_dict().items()}
    assert same({name: kept[name] for name in original}, original)


def test_sigmas_learn_and_the_history_tells(trained):
    _, denoiser, step = trained
    sigmas = torch.cat([p.noise.sigma.flatten() for p in posteriors(denoiser.unet)]).detach()
    assert (sigmas != 0.01).float().mean() > 0.5
    assert step.facts.keys() == {"kl", "sigma", "sigma_floor"} and step.facts["kl"] > 0
    assert step.facts["sigma"] == pytest.approx(float(sigmas.clamp(min=1e-7).mean()), rel=1e-4)


def test_a_sigma_that_fell_to_its_floor_stays_there_and_is_counted():
    """Its gradient is 0 there, whatever the batch."""
    method, denoiser = adapted(kl_weight=0.1, weight_decay=0.0)
    found = list(posteriors(denoiser.unet))
    with torch.no_grad():
        found[0].noise.sigma.fill_(-0.01)
        found[1].noise.sigma.flatten()[:3] = 1e-8
    below = [p.noise.sigma.detach() <= 1e-7 for p in found]
    before = [p.noise.sigma.detach().clone() for p in found]
    parameters = [p for p in denoiser.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    for step in range(3):
        batch = method.draw(tiny_data(), denoiser, Draws(1, step, 0, 1))
        method.update([Objective(method, denoiser, batch)], optimizer)
    for posterior, low, sigma in zip(found, below, before, strict=True):
        assert torch.equal(posterior.noise.sigma[low], sigma[low])
        assert (posterior.noise.sigma[~low] != sigma[~low]).any() or low.all()
    share = (found[0].mean.numel() + 3) / sum(p.mean.numel() for p in found)
    assert method.facts()["sigma_floor"] == pytest.approx(share)


def test_another_seed_and_another_step_give_other_noise():
    method, denoiser = adapted()
    batches = [
        method.draw(tiny_data(), denoiser, Draws(*where, 0, 1))
        for where in ((1, 0), (2, 0), (1, 1))
    ]
    noises = [next(posteriors(denoiser.unet)).noise.noise(batch.seed) for batch in batches]
    assert len({values.numpy().tobytes() for values in noises}) == 3


# In ComfyUI


@pytest.fixture(scope="module", params=["full", "oft"])
def artifact(request):
    """(what was learned over full weights or OFT, what that network computes)."""
    over = request.param
    settings = {"over": over, "learning_rate": 10 * RATES[over], "block_size": 8}
    return train_on(comfy_model(), BNN, **settings)


def test_what_is_trained_is_what_is_loaded(artifact, tmp_path):
    learned, trained = artifact
    learned.save(tmp_path / "last.safetensors")
    base, again = comfy_model(), Personalization.load(tmp_path / "last.safetensors")
    plain = comfy_output(base, *comfy_question())
    loaded = comfy_output(load.personalize(base, again, 1.0)[0], *comfy_question())
    assert distance(loaded, trained) <= 1e-4
    assert distance(trained, plain) > 1e-2  # it learned something
    without = comfy_output(load.personalize(base, again, 0.0)[0], *comfy_question())
    assert torch.equal(without, plain)


SD2 = {
    "config": geometry((64, 64), use_linear_in_transformer=True),
    "family": "SD20",
    "prediction": "V_PREDICTION",
}
HALF = {"config": geometry((32, 64, 64), (1, 1, 0)), "dtype": torch.float16}


@pytest.mark.parametrize("over, base", [("oft", SD2), ("oft", HALF), ("full", HALF)])
def test_it_is_so_on_other_bases(over, base):
    model = comfy_model(**base)
    settings = {"over": over, "learning_rate": RATES[over], "block_size": 8}
    learned, trained = train_on(model, BNN, **settings)
    loaded = comfy_output(load.personalize(model, learned, 1.0)[0], *comfy_question())
    assert distance(loaded, trained) <= (2e-3 if "dtype" in base else 1e-4)


@pytest.mark.parametrize("strength", [0.5, -1.0, 2.0])
def test_a_loaded_rotation_is_one_at_every_strength(strength):
    base = comfy_model()
    learned, _ = train_on(base, BNN, over="oft", block_size=8, learning_rate=0.05)
    plain = snapshot(base.model.diffusion_model)
    names = bridge.twin_names(base)
    found = weights_when_loaded(load.personalize(base, learned, strength)[0])
    for site in learned.edits([n.removesuffix(".weight") for n in names])[0]:
        before, after = (w[names[f"{site}.weight"]].flatten(1) for w in (plain, found))
        assert distance(after.norm(dim=1), before.norm(dim=1)) < 1e-5
        assert distance(after, before) > 1e-2


def test_over_lora_the_file_is_a_lora_file(caplog):
    base = comfy_model()
    learned, trained = train_on(base, BNN)
    keys = comfy.lora.model_lora_keys_unet(base.model, {})
    with caplog.at_level(logging.WARNING):
        patches = comfy.lora.load_lora(dict(learned.tensors), keys)
    assert "not loaded" not in caplog.text and len(patches) == len(learned.tensors) / 3
    stock = base.clone()
    assert len(stock.add_patches(patches, 1.0)) == len(patches)
    assert distance(comfy_output(stock, *comfy_question()), trained) <= 1e-4


def test_over_full_weights_the_stock_loader_takes_all_of_the_file(caplog):
    """`diff` and `diff_b` keys are ComfyUI's own."""
    base = comfy_model()
    learned, trained = train_on(base, BNN, over="full", learning_rate=1e-3)
    keys = comfy.lora.model_lora_keys_unet(base.model, {})
    with caplog.at_level(logging.WARNING):
        patches = comfy.lora.load_lora(dict(learned.tensors), keys)
    assert "not loaded" not in caplog.text and len(patches) == len(learned.tensors)
    stock = base.clone()
    assert len(stock.add_patches(patches, 1.0)) == len(patches)
    assert distance(comfy_output(stock, *comfy_question()), trained) <= 1e-4


# OFT in the network


def test_of_chosen_layers_oft_turns_the_linear_ones():
    unet = tiny_unet()
    set_rotations(unet, sites(unet, "all"), 8)
    plain = tiny_unet()
    linear = [s for s in sites(plain, "all") if isinstance(plain.get_submodule(s), nn.Linear)]
    assert list(rotations(unet)) == linear and 0 < len(linear) < len(sites(plain, "all"))
    for site, edit in rotations(unet).items():
        inputs = plain.get_parameter(f"{site}.weight").shape[1]
        assert edit.skew.shape == (inputs // 8, 28)  # b (b - 1) / 2 numbers per block


def test_a_turned_layer_is_pefts_and_keeps_its_base():
    unet, plain, x = tiny_unet(), tiny_unet(), noise(3, 32)
    set_rotations(unet, sites(unet, "attention"), 8)
    site = sites(plain, "attention")[0]
    layer = unet.get_submodule(site)
    with torch.no_grad():
        assert torch.equal(layer(x), plain.get_submodule(site)(x))  # starts at the identity
        layer.oft_R["default"].weight.normal_(0, 0.3, generator=generator(0, 99, 0))
        weight = rotations(unet)[site].apply(plain.get_submodule(site).weight)
        turned = nn.functional.linear(x, weight, plain.get_submodule(site).bias)
        assert (layer(x) - turned).abs().max() < 1e-5
        assert distance(layer(x), plain.get_submodule(site)(x)) > 0.1
        matrix = layer.get_delta_weight("default")
        assert (matrix @ matrix.T - torch.eye(32)).abs().max() < 1e-5


@pytest.mark.parametrize("size", [24, 64])
def test_a_block_that_does_not_divide_the_inputs_is_refused(size):
    with pytest.raises(InputError, match=f"'block_size' is {size}; give a divisor of 32"):
        run(bnn("oft", block_size=size), tiny_denoiser())


def test_oft_without_a_linear_layer_is_refused():
    with pytest.raises(InputError, match="'layers' has no linear layer"):
        set_rotations(tiny_unet(), ["conv_in"], 8)
