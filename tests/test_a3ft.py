"""A3FT against its equations and counts (Moon et al. 2022), and in ComfyUI's hands."""

import gc
import math

import comfy.sample
import comfy.samplers
import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from personalize.nodes import bridge, load
from personalize.trainers import time_aware
from personalize.trainers.artifact import Personalization
from personalize.trainers.edits import from_tensors, of_weights, to_tensors
from personalize.trainers.errors import InputError
from personalize.trainers.loop import adapt
from personalize.trainers.methods import METHODS
from personalize.trainers.methods.a3ft import A3FT
from personalize.trainers.sites import layers_of, self_attention_outputs
from personalize.trainers.time_aware import SITE, TimeAware, TimeFusion, TimeScaling
from tests.test_bridge import lora_patch
from tests.test_load import train_on
from tests.tiny import (
    comfy_model,
    comfy_output,
    distance,
    edited,
    geometry,
    make,
    noise,
    question,
    randomise,
    run,
    same,
    tiny_denoiser,
    tiny_unet,
)

STARTED = {"near-identity": 1 / (1 + math.exp(5)), "half": 0.5}


def unconditional(**config) -> UNet2DModel:
    """Make a pixel-space U-Net with random weights: attention of two widths, 5 blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel(
            **{
                "sample_size": 16,
                "block_out_channels": (32, 64),
                "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
                "layers_per_block": 1,
                **config,
            }
        ).requires_grad_(False)


def pixels(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return noise(batch, 3, 16, 16, seed=5), torch.linspace(3, 990, batch).long()


def wild(adapter: TimeAware, seed: int = 7) -> TimeAware:
    """Give an adapter weights with which every part of it matters."""
    with torch.no_grad():
        for index, parameter in enumerate(adapter.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=1000 * seed + index) * 0.3)
    return adapter


def adapter_for(unet, seed: int = 7) -> TimeAware:
    """Make a finished adapter for a diffusers U-Net."""
    widths = {b: layer.weight.shape[1] for b, layer in time_aware.outputs_of(unet).items()}
    time = unet.time_embedding.linear_2.weight.shape[0]
    return wild(TimeAware(widths, time), seed).requires_grad_(False)


# The equations


def layer_norm(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def naive_adapter(adapter: TimeAware, block: str, z: torch.Tensor, time: torch.Tensor):
    """Eq. 1-3 without the output projection: one picture, one token, one channel at a time."""
    scaling, c = adapter.scaling[block], z.shape[2]
    fusion, results = adapter.fusion[str(c)], []
    silu = nn.functional.silu
    for tokens, t in zip(z, time, strict=True):  # (hw, c), (d,)
        shift = fusion.time_out(silu(fusion.time_in(t)))
        queries = torch.stack(
            [layer_norm(fusion.query(fusion.feature(x) + shift), fusion.query_norm) for x in tokens]
        )
        mixed = torch.zeros_like(tokens)
        for i in range(c):
            scores = [float(queries[:, i] @ tokens[:, j]) / len(tokens) ** 0.5 for j in range(c)]
            largest = max(scores)
            weights = [math.exp(score - largest) for score in scores]
            for j in range(c):
                mixed[:, i] += weights[j] / sum(weights) * tokens[:, j]
        out = torch.stack([layer_norm(x, fusion.output_norm) for x in mixed])
        alpha = torch.sigmoid(scaling.expand(silu(scaling.reduce(t))))
        results.append((1 - alpha) * tokens + alpha * out)
    return torch.stack(results)


def test_the_adapter_is_its_naive_reference():
    adapter = wild(TimeAware({"a": 8, "b": 12}, time_channels=16)).requires_grad_(False)
    time = noise(3, 16, seed=2)
    for block, c in adapter.widths.items():
        z = noise(3, 6, c, seed=c)
        expected = naive_adapter(adapter, block, z, time)
        assert distance(adapter(block, z, time), expected) < 1e-5
        assert distance(expected, z) > 0.1  # it does something
        halfway = (z + expected) / 2
        assert distance(adapter(block, z, time, strength=0.5), halfway) < 1e-5


def test_attention_is_over_channels_and_its_rows_sum_to_one():
    fusion = TimeFusion(12, 16).requires_grad_(False)
    attention = fusion.attention(noise(3, 50, 12), noise(3, 16, seed=2))
    assert attention.shape == (3, 12, 12) and (attention > 0).all()
    assert (attention.sum(-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("gate", STARTED)
def test_the_gate_starts_as_it_is_called_whatever_the_time(gate):
    method, unet = make(A3FT, gate=gate), tiny_unet()
    adapt(method, unet)
    for scaling in unet.time_aware.scaling.values():
        alpha = scaling(noise(4, 128, seed=3))
        assert (alpha - STARTED[gate]).abs().max() < 1e-6


def test_the_gate_never_leaves_zero_to_one():
    scaling = TimeScaling(8, 16, bias=0.0)
    randomise(scaling, seed=0)
    for scale in (0.1, 10.0, 1e4):
        alpha = scaling(noise(5, 16, seed=1) * scale)
        assert alpha.shape == (5, 8) and alpha.min() >= 0 and alpha.max() <= 1


@pytest.mark.parametrize(
    "unet, inputs",
    [(tiny_unet(), question()), (unconditional(), pixels())],
    ids=["text to image", "unconditional"],
)
def test_a_shut_gate_is_the_base_bit_for_bit(unet, inputs):
    base = unet(*inputs).sample
    adapter = adapter_for(unet)
    handles = time_aware.attach(unet, adapter)
    opened = unet(*inputs).sample
    for scaling in adapter.scaling.values():
        scaling.expand.bias.fill_(-math.inf)
    shut = unet(*inputs).sample
    for handle in handles:
        handle.remove()
    assert distance(opened, base) > 1e-3
    assert torch.equal(shut, base) and torch.equal(unet(*inputs).sample, base)


def test_every_picture_of_a_batch_has_its_own_time():
    unet = tiny_unet()
    time_aware.attach(unet, adapter_for(unet))
    x, timesteps, context = question(batch=3)
    together = unet(x, timesteps, context).sample
    for i in range(3):
        alone = unet(x[i : i + 1], timesteps[i : i + 1], context[i : i + 1]).sample
        assert distance(together[i : i + 1], alone) < 1e-5


def test_pictures_cut_into_tiles_keep_their_time():
    adapter = wild(TimeAware({"a": 8}, 16)).requires_grad_(False)
    z, time = noise(6, 5, 8), noise(2, 16, seed=1)
    expected = torch.cat([adapter("a", z[:3], time[:1]), adapter("a", z[3:], time[1:])])
    torch.testing.assert_close(adapter("a", z, time), expected)


def test_the_adapter_computes_in_fp32_over_a_half_precision_base():
    adapter, z, time = adapter_for(tiny_unet()), noise(2, 64, 32), noise(2, 128, seed=1)
    block = next(iter(adapter.widths))
    half = adapter(block, z.bfloat16(), time.bfloat16())
    assert half.dtype == torch.float32
    assert torch.equal(half, adapter(block, z.bfloat16().float(), time.bfloat16().float()))


# What is shared


def test_equal_widths_share_one_fusion_and_every_block_has_its_own_gate():
    unet = unconditional(down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"))
    method = make(A3FT)
    adapt(method, unet)
    adapter = unet.time_aware
    assert sorted(adapter.widths.values()) == [32, 64, 64, 64, 64]
    assert len(adapter.fusion) == 2 and len(set(map(id, adapter.scaling.values()))) == 5
    names = [n for n in to_tensors(method.learned(unet)) if n.startswith("time_aware.")]
    assert sum("fusion.64.time_in.weight" in name for name in names) == 1
    assert len(names) == 2 * 12 + 5 * 4


def test_the_gradient_of_what_is_shared_is_the_sum_over_blocks():
    """The same network with a copy of the fusion for each block: their gradients add up."""
    inputs = question()
    shared = tiny_unet()
    adapter = adapter_for(shared).requires_grad_(True)
    time_aware.attach(shared, adapter)
    shared(*inputs).sample.square().mean().backward()

    apart, copies = tiny_unet(), []
    outputs = time_aware.outputs_of(apart)
    for block, channels in adapter.widths.items():
        copy = TimeAware({block: channels}, adapter.time_channels)
        copy.fusion[str(channels)].load_state_dict(adapter.fusion[str(channels)].state_dict())
        copy.scaling[block].load_state_dict(adapter.scaling[block].state_dict())
        copy.attach(outputs, apart.time_embedding)
        copies.append(copy)
    apart(*inputs).sample.square().mean().backward()

    assert len(copies) > len(adapter.fusion)
    for width, fusion in adapter.fusion.items():
        users = [copy.fusion[width] for copy in copies if width in copy.fusion]
        for name, parameter in fusion.named_parameters():
            total = sum(user.get_parameter(name).grad for user in users)
            assert (parameter.grad - total).abs().max() <= 1e-5 * total.abs().max() + 1e-9, name


# What learns


@pytest.mark.parametrize(
    "unet, inputs, trained, learning",
    [
        (tiny_unet, question, "self- and cross-attention", ["attn1", "norm1", "attn2", "norm2"]),
        (tiny_unet, question, "self-attention", ["attn1", "norm1"]),
        (unconditional, pixels, "self- and cross-attention", ["attentions"]),
    ],
    ids=["text to image", "text to image, self-attention", "unconditional"],
)
def test_only_attention_and_the_adapter_have_gradients(unet, inputs, trained, learning):
    plain, adapted = unet(), unet()
    method = make(A3FT, trained=trained)
    parameters = adapt(method, adapted)
    adapted(*inputs()).sample.square().mean().backward()
    names = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert len(names) == len(parameters)
    own = {name for name in names if name.startswith("time_aware.")}
    assert len(own) == len(list(adapted.time_aware.parameters()))
    free = {name.replace(".free.default", "") for name in names - own}
    of_attention = [name for name, _ in plain.named_parameters() if ".attentions." in name]
    expected = {name for name in of_attention if set(learning) & set(name.split("."))}
    assert free == expected


@pytest.mark.parametrize("mode, twin", [("attention", "attention"), ("naive", "dreambooth")])
def test_the_modes_without_an_adapter_are_the_methods_of_that_kind(mode, twin):
    ours = run(make(A3FT, mode=mode), tiny_denoiser())[-1]
    theirs = run(make(METHODS[twin]), tiny_denoiser())[-1]
    assert SITE not in ours.learned()
    assert same(to_tensors(ours.learned()), to_tensors(theirs.learned()))


@pytest.mark.parametrize("mode", ["a3ft", "attention", "naive"])
def test_every_mode_comes_back_from_its_file_on_an_unconditional_base(mode):
    unet, method = unconditional(), make(A3FT, mode=mode)
    parameters = adapt(method, unet)
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            parameter.add_(noise(*parameter.shape, seed=index), alpha=0.05)
    plain = unconditional()
    sites = [name.removesuffix(".weight") for name, _ in plain.named_parameters()]
    edits, left = from_tensors(to_tensors(method.learned(unet)), sites)
    edited(plain, edits)
    assert not left and distance(plain(*pixels()).sample, unet(*pixels()).sample) < 1e-4
    assert distance(plain(*pixels()).sample, unconditional()(*pixels()).sample) > 1e-2
    if mode == "naive":
        assert len(edits) == len(sites)


def test_recomputed_activations_know_their_time():
    """A question to the prior between the forward pass and the backward pass disturbs nothing."""
    gradients = []
    for checkpointing in (False, True):
        denoiser, method = tiny_denoiser(), make(A3FT, gate="half")
        parameters = adapt(method, denoiser.unet)
        wild(denoiser.unet.time_aware)
        denoiser.unet.train()
        if checkpointing:
            denoiser.unet.enable_gradient_checkpointing()
        loss = denoiser(*question()).square().mean()
        with torch.no_grad(), denoiser.prior():
            denoiser(*question(seed=50, batch=1))
        loss.backward()
        gradients.append([p.grad for p in parameters])
    for plain, recomputed in zip(*gradients, strict=True):
        assert distance(recomputed, plain) < 1e-4


def test_a_base_without_attention_is_refused():
    unet = unconditional(
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )
    with pytest.raises(InputError, match="'mode' is 'a3ft', but this base has no attention"):
        adapt(make(A3FT), unet)


# The paper's counts


@pytest.fixture(scope="module")
def imagenet_64() -> UNet2DModel:
    """The paper's base, without its numbers: improved-diffusion's ImageNet 64 x 64, 128 channels.

    (4 heads there; diffusers counts channels per head, which changes no count.)
    """
    with torch.device("meta"):
        return unconditional(
            sample_size=64,
            out_channels=6,
            block_out_channels=(128, 256, 384, 512),
            layers_per_block=3,
            down_block_types=("DownBlock2D", "DownBlock2D", *["AttnDownBlock2D"] * 2),
            up_block_types=(*["AttnUpBlock2D"] * 2, "UpBlock2D", "UpBlock2D"),
            resnet_time_scale_shift="scale_shift",
            attn_norm_num_groups=32,
            attention_head_dim=128,
        )


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_base_is_the_papers(imagenet_64):
    blocks = {name: module for name, module in imagenet_64.named_modules()}
    residual = [n for n in blocks if ".resnets." in n and n.rpartition(".")[2].isdigit()]
    assert size(imagenet_64) == 121_063_942 and len(residual) == 30


def test_the_adapter_has_the_papers_size(imagenet_64):
    outputs = time_aware.outputs_of(imagenet_64)
    widths = {block: layer.weight.shape[1] for block, layer in outputs.items()}
    assert sorted(widths.values()) == [384] * 7 + [512] * 8
    with torch.device("meta"):
        adapter = TimeAware(widths, 512)
    norms = sum(size(m) for m in adapter.modules() if isinstance(m, nn.LayerNorm))
    assert size(adapter.fusion) - norms == 1_691_136
    assert size(adapter.scaling) == 470_112
    assert size(adapter) == 2_164_832
    shares = [size(part) / size(imagenet_64) for part in (adapter.fusion, adapter.scaling, adapter)]
    assert [round(100 * share, 2) for share in shares] == [1.4, 0.39, 1.79]


def test_attention_has_the_papers_size(imagenet_64):
    roles = ["self-attention", "self-attention norm"]
    layers = [imagenet_64.get_submodule(name) for name in layers_of(imagenet_64, roles)]
    attention = sum(map(size, layers))
    assert attention == 12_558_080
    assert round(100 * attention / size(imagenet_64), 2) == 10.37
    assert len(self_attention_outputs(imagenet_64)) == 15


# Files


def tensors_of_one() -> dict[str, torch.Tensor]:
    return TimeAware({"a": 8, "b": 12}, 16).tensors()


def test_a_snapshot_is_the_adapter_and_not_moved_with_it():
    adapter = wild(TimeAware({"a": 8, "b": 12}, 16))
    snapshot = adapter.snapshot()
    assert same(snapshot.tensors(), adapter.tensors()) and snapshot.widths == adapter.widths
    before = {name: tensor.clone() for name, tensor in snapshot.tensors().items()}
    wild(adapter, seed=8)
    assert same(snapshot.tensors(), before)
    assert not any(parameter.requires_grad for parameter in snapshot.parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"scaling.a.expand.bias": None},
        {"scaling.a.reduce.weight": None},
        {"fusion.8.query.weight": None},
        {"fusion.8.query.weight": torch.zeros(9, 8)},
        {"fusion.9.query.weight": torch.zeros(9, 9)},
        {"scaling.a.reduce.weight": torch.zeros(32, 17)},
        {"scaling.a.expand.bias": torch.zeros(10**7)},
        {"scaling.c.d.expand.bias": torch.zeros(8)},
        {"scaling.a.expand.bias": torch.zeros(())},
        {"scaling.a.reduce.weight": torch.zeros(())},
        {"surplus": torch.zeros(1)},
        {name: None for name in tensors_of_one() if name.startswith("scaling")},
    ],
    ids=lambda change: "+".join(f"{n} {t if t is None else [*t.shape]}" for n, t in change.items())[
        :60
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(change):
    tensors = {n: t for n, t in (tensors_of_one() | change).items() if t is not None}
    with pytest.raises(ValueError, match="time_aware"):
        TimeAware.from_tensors(tensors)
    named = {f"time_aware.{name}": tensor for name, tensor in tensors.items()}
    with pytest.raises(InputError, match="'checkpoint' is damaged"):
        Personalization(None, named).edits(["a", "b"])


def test_an_adapter_knows_what_it_fits():
    adapter = TimeAware({"x_to_out_0": 8}, 16)
    shapes = {
        "x.to_out.0": torch.Size((8, 8)),
        "time_embedding.linear_2": torch.Size((16, 16)),
        "other": torch.Size((3,)),
    }
    assert adapter.fits(shapes)
    assert not adapter.fits(shapes | {"x.to_out.0": torch.Size((8, 12))})
    assert not adapter.fits(shapes | {"time_embedding.linear_2": torch.Size((12, 12))})
    assert not adapter.fits({name: shapes[name] for name in list(shapes)[1:]})
    assert not adapter.fits({name: shapes[name] for name in list(shapes)[:1]})


# In ComfyUI


@pytest.fixture(scope="module")
def learned():
    return train_on(comfy_model(), A3FT, gate="half")[0]


@pytest.fixture(scope="module")
def another():
    return train_on(comfy_model(), A3FT, gate="half", seed=1)[0]


@pytest.fixture
def base():
    return comfy_model()


def sites_of(model) -> list[str]:
    return [name.removesuffix(".weight") for name in bridge.twin_names(model)]


def on_the_training_side(model, *applied) -> torch.Tensor:
    """What diffusers computes with (artifact, strength)s written into the twin of a MODEL."""
    denoiser = bridge.denoiser_of(model)
    denoiser.unet.load_state_dict(
        {name: tensor.clone() for name, tensor in denoiser.unet.state_dict().items()}, assign=True
    )
    for artifact, strength in applied:
        edited(denoiser.unet, artifact.edits(sites_of(model))[0], strength)
    with torch.no_grad():
        return denoiser(*question())


def untouched(model) -> bool:
    """Tell whether a MODEL's U-Net is free of hooks and replaced forwards."""
    modules = list(model.model.diffusion_model.modules())
    return not any(
        m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in modules
    )


@pytest.mark.parametrize("strength", [1.0, 0.5, -0.5, 2.0])
def test_the_loaded_model_is_the_trained_network_at_every_strength(learned, base, strength):
    loaded = comfy_output(load.personalize(base, learned, strength)[0], *question())
    assert distance(loaded, on_the_training_side(base, (learned, strength))) < 1e-4


def test_the_adapter_is_part_of_what_is_loaded(learned, base):
    """Without it the output is another: no test above passes by the weights alone."""
    patched, _ = load.personalize(base, learned, 1.0)
    whole = comfy_output(patched, *question())
    bare = patched.clone()
    bare.injections.clear()
    assert distance(comfy_output(bare, *question()), whole) > 1e-3


def test_strength_zero_injects_nothing(learned, base):
    patched, _ = load.personalize(base, learned, 0.0)
    assert not patched.injections and not patched.additional_models and not patched.patches


@pytest.mark.parametrize("lora_first", [True, False])
def test_it_composes_with_a_lora_in_either_order(learned, base, lora_first):
    key, patch = lora_patch(base)
    one = base.clone()
    one.add_patches({key: patch}, 0.8)
    expected = on_the_training_side(one, (learned, 1.0))
    if lora_first:
        both, _ = load.personalize(one, learned, 1.0)
    else:
        both, _ = load.personalize(base, learned, 1.0)
        both.add_patches({key: patch}, 0.8)
    assert distance(comfy_output(both, *question()), expected) < 1e-4


def test_two_are_carried_in_the_order_that_they_were_applied_in(learned, another, base):
    first, _ = load.personalize(base, learned, 1.0)
    both, _ = load.personalize(first, another, 0.7)
    assert len(both.injections) == 2 == len(both.additional_models) and len(first.injections) == 1
    expected = on_the_training_side(base, (learned, 1.0), (another, 0.7))
    assert distance(comfy_output(both, *question()), expected) < 1e-4
    alone = on_the_training_side(base, (learned, 1.0))
    assert distance(comfy_output(first, *question()), alone) < 1e-4
    assert distance(comfy_output(both, *question()), expected) < 1e-4
    plain = on_the_training_side(base)
    assert distance(comfy_output(base, *question()), plain) < 1e-4
    assert untouched(base)


def test_the_same_file_twice_is_both(learned, base):
    twice, _ = load.personalize(load.personalize(base, learned, 0.4)[0], learned, 0.4)
    expected = on_the_training_side(base, (learned, 0.4), (learned, 0.4))
    assert len(twice.injections) == 2
    assert distance(comfy_output(twice, *question()), expected) < 1e-4


def test_everything_is_taken_out_when_the_base_is_loaded_again(learned, base):
    plain = comfy_output(base, *question())
    patched, _ = load.personalize(base, learned, 1.0)
    comfy_output(patched, *question())
    assert not untouched(base)
    assert torch.equal(comfy_output(base, *question()), plain) and untouched(base)
    assert not base.injections and not base.additional_models
    options = patched.model_options["transformer_options"]
    assert not options.get("patches_replace") and not options.get("patches")


def test_a_clone_carries_it_too(learned, base):
    patched, _ = load.personalize(base, learned, 1.0)
    expected = comfy_output(patched, *question())
    clone = patched.clone()  # of a loaded MODEL
    assert torch.equal(comfy_output(clone, *question()), expected)
    assert torch.equal(comfy_output(clone.clone(), *question()), expected)
    assert torch.equal(comfy_output(patched, *question()), expected)


def test_a_clone_that_was_never_loaded_takes_nothing_out(learned, base):
    patched, _ = load.personalize(base, learned, 1.0)
    expected = comfy_output(patched, *question())
    clone = patched.clone()
    clone.eject_model()  # it believes that it is injected: its flag is a copy
    del clone
    gc.collect()
    with torch.no_grad():
        x, timesteps, context = question()
        again = patched.model.diffusion_model(x, timesteps, context=context)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("clones", [0, 1, 2])
def test_a_model_that_is_gone_leaves_the_base_as_it_was(learned, base, clones):
    plain = comfy_output(base, *question())
    patched, _ = load.personalize(base, learned, 1.0)
    chain = [patched]
    for _ in range(clones):
        chain.append(chain[-1].clone())
        comfy_output(chain[-1], *question())
    comfy_output(chain[-1], *question())
    del patched, chain
    gc.collect()
    assert torch.equal(comfy_output(base, *question()), plain)
    assert untouched(base)


def test_a_clone_that_is_gone_leaves_its_parent_whole(learned, base):
    plain = comfy_output(base, *question())
    patched, _ = load.personalize(base, learned, 1.0)
    clone = patched.clone()
    expected = comfy_output(clone, *question())
    del clone
    gc.collect()
    assert torch.equal(comfy_output(base, *question()), plain)
    assert torch.equal(comfy_output(patched, *question()), expected)


def test_nothing_stays_of_a_model_that_comfyui_forgot_to_eject(learned, base):
    plain = comfy_output(base, *question())
    patched, _ = load.personalize(base, learned, 1.0)
    comfy_output(patched, *question())
    patched.is_injected = False  # as a parent has it whose clone was loaded
    del patched
    gc.collect()
    assert untouched(base)
    assert torch.equal(comfy_output(base, *question()), plain)


def sampled(model) -> torch.Tensor:
    """Sample with ComfyUI's KSampler, guided: prompt and empty prompt in one batch."""
    words = [[noise(1, 7, 32, seed=6), {}]]
    empty = [[noise(1, 7, 32, seed=7), {}]]
    latent = torch.zeros(2, 4, 8, 8)
    return comfy.sample.sample(
        model, noise(2, 4, 8, 8, seed=1), 3, 4.0, "euler", "normal", words, empty, latent, seed=0
    )


def test_the_ksampler_samples_the_trained_network(learned, base):
    """The reference is a MODEL that has the weights written in and the adapter put on by hand."""
    plain = sampled(base)
    patched, _ = load.personalize(base, learned, 0.8)
    found = sampled(patched)

    by_hand, names = comfy_model(), bridge.twin_names(base)
    unet = by_hand.model.diffusion_model
    edits, _ = learned.edits(sites_of(base))
    with torch.no_grad():
        for site, edit in of_weights(edits).items():
            own = names.get(f"{site}.weight", names.get(site))
            weight = unet.get_parameter(own)
            weight.copy_(edit.apply(weight, 0.8))
    outputs = {
        time_aware.block_of(site): unet.get_submodule(names[f"{site}.weight"][: -len(".weight")])
        for site in self_attention_outputs(tiny_unet_of(base))
    }
    edits[SITE].attach(outputs, unet.time_embed, 0.8)
    assert distance(found, sampled(by_hand)) < 1e-4
    assert distance(found, plain) > 1e-2
    assert torch.equal(sampled(base), plain)
    assert torch.equal(sampled(patched.clone()), found)


def tiny_unet_of(model):
    return bridge.denoiser_of(model).unet


def test_comfyui_moves_the_adapter_with_the_model(learned, base):
    patched, _ = load.personalize(base, learned, 1.0)
    (adapter,) = patched.get_nested_additional_models()
    assert isinstance(adapter.model, TimeAware)
    assert (adapter.load_device, adapter.offload_device) == (
        base.load_device,
        base.offload_device,
    )
    assert not any(parameter.requires_grad for parameter in adapter.model.parameters())


def test_training_on_a_model_that_carries_one_is_refused(learned, base):
    patched, _ = load.personalize(base, learned, 1.0)
    with pytest.raises(InputError, match=r"time-aware adapter.*connect the model from before"):
        bridge.denoiser_of(patched)


def test_an_adapter_for_another_geometry_is_refused(learned):
    other = comfy_model(geometry((32, 96)))
    adapter = {n: t for n, t in learned.tensors.items() if n.startswith("time_aware.")}
    with pytest.raises(InputError, match=r"'model' does not fit.*1 have another shape"):
        load.personalize(other, Personalization(learned.header, adapter), 1.0)
