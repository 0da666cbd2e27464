"""The families of bases: SD 1.x, SD 2.x and SDXL, with their structure and random weights.

Numbers are checked on ComfyUI's own classes at a fifth of the width. Real geometry is checked on
the meta device, whose tensors have shapes but no numbers, and once with numbers (slow). What the
stock loaders make of files is in test_loaders.py.
"""

import logging
from types import SimpleNamespace

import comfy.model_base
import comfy.model_detection
import comfy.model_patcher
import comfy.sample
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models as families
import pytest
import torch
from comfy.sdxl_clip import SDXLClipModel, SDXLTokenizer
from comfy_extras.nodes_clip_sdxl import CLIPTextEncodeSDXL
from diffusers import UNet2DConditionModel

from personalize.nodes import bridge, load
from personalize.nodes.data import encode_text, prepare
from personalize.nodes.monitor import Monitoring, MonitorSettings, Prompt
from personalize.nodes.request import Request
from personalize.trainers.artifact import Header, Personalization
from personalize.trainers.data import Origin
from personalize.trainers.errors import InputError
from personalize.trainers.method import Draws, denoising_loss
from personalize.trainers.methods import METHODS
from personalize.trainers.monitor import Examination, stable_loss
from tests.tiny import (
    WIDTH,
    comfy_model,
    comfy_output,
    distance,
    geometry,
    make,
    noise,
    run,
    sdxl_geometry,
    tiny_data,
)

SD2 = geometry((64, 128), use_linear_in_transformer=True)
FAMILIES = {
    "SD 1.x": {"config": geometry(blocks=2)},
    "SD 2.x": {"config": SD2, "family": "SD20"},
    "SD 2.x, velocity": {"config": SD2, "family": "SD20", "prediction": "V_PREDICTION"},
    "SDXL": {"config": sdxl_geometry(), "family": "SDXL"},
    "SDXL, velocity": {
        "config": sdxl_geometry(),
        "family": "SDXL",
        "prediction": "V_PREDICTION",
    },
}
STORAGE = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8 e4m3": torch.float8_e4m3fn,
    "fp8 e5m2": torch.float8_e5m2,
}
SIZES = torch.tensor([[1024.0, 768, 0, 0, 1024, 1024], [300, 451, 12, 77, 512, 512]])


def of_family(name: str, **changes):
    return comfy_model(**FAMILIES[name] | changes)


@pytest.fixture(params=FAMILIES)
def model(request):
    return of_family(request.param)


def question(side: int = 8) -> tuple[torch.Tensor, ...]:
    """Make inputs of a denoiser, what only SDXL looks at included."""
    x, timesteps = noise(2, 4, side, side, seed=5), torch.tensor([3, 990])
    return x, timesteps, noise(2, 7, WIDTH, seed=6), noise(2, WIDTH, seed=7), SIZES


def told(model, pooled: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor | None:
    """Return what ComfyUI tells the network besides the text states, (B, adm)."""
    names = ("height", "width", "crop_h", "crop_w", "target_height", "target_width")
    rows = [
        model.model.encode_adm(
            pooled_output=vector[None], **dict(zip(names, row.tolist(), strict=True))
        )
        for vector, row in zip(pooled, sizes, strict=True)
    ]
    return torch.cat(rows) if rows[0] is not None else None


def answer(model, x, timesteps, context, pooled, sizes) -> torch.Tensor:
    """Return what ComfyUI's own U-Net answers."""
    return comfy_output(model, x, timesteps, context, told(model, pooled, sizes)).float()


def sdxl_data(count: int = 3):
    """Make data of random examples with pooled text, the last of them cut from a photograph."""
    from dataclasses import replace

    data = tiny_data(count, held_out=1)
    examples = [replace(e, pooled=noise(WIDTH, seed=50 + i)) for i, e in enumerate(data.training)]
    examples[-1] = replace(examples[-1], origin=Origin((300, 451), (0.0, 0.25)))
    kept = tuple(replace(e, pooled=noise(WIDTH, seed=60)) for e in data.held_out)
    empty = replace(data.empty, pooled=noise(WIDTH, seed=70))
    return replace(data, training=tuple(examples), held_out=kept, empty=empty)


# The same function


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_twin_is_the_model_whatever_it_is_stored_in(family, storage):
    model = of_family(family, dtype=STORAGE[storage])
    with torch.no_grad():
        twin = bridge.denoiser_of(model)(*question())
    own = answer(model, *question())
    assert own.abs().mean() > 0.1
    assert distance(twin, own) <= 1e-4


def test_every_weight_has_its_place(model):
    twin = bridge.denoiser_of(model).unet
    own = dict(model.model.diffusion_model.named_parameters())
    assert len(list(twin.parameters())) == len(own)
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in own.values()}


@pytest.mark.parametrize("part", ["pooled", "sizes"])
def test_sdxl_listens_to_what_it_is_told_besides_the_text(part):
    denoiser = bridge.denoiser_of(of_family("SDXL"))
    x, t, context, pooled, sizes = question()
    other = (pooled + 1, sizes) if part == "pooled" else (pooled, sizes.flip(0))
    with torch.no_grad():
        one, two = denoiser(x, t, context, pooled, sizes), denoiser(x, t, context, *other)
    assert distance(one, two) > 1e-3


def test_eight_bit_weights_are_named_in_the_log(caplog):
    caplog.set_level(logging.INFO)
    bridge.denoiser_of(of_family("SD 1.x"))
    assert "8 bits" not in caplog.text
    model = of_family("SD 1.x", dtype=torch.float8_e4m3fn)
    bridge.denoiser_of(model)
    count = len(model.model.diffusion_model.state_dict())
    assert f"{count} weights of the base are stored in 8 bits or less" in caplog.text
    assert "float8_e4m3fn" in caplog.text


def test_a_lora_that_was_applied_upstream_is_part_of_the_twin(model):
    """Through ComfyUI's own LoRA reader, one layer of every kind."""
    sites = list(load.site_names(model).items())
    own = bridge.own_weights(model)
    file = {}
    for site, name in sites:
        if own[name].ndim < 2:
            continue
        shape = own[name].shape
        key = f"lora_unet_{site.replace('.', '_')}"
        file[f"{key}.lora_down.weight"] = noise(2, *shape[1:], seed=len(file)) / shape[1:].numel()
        up = noise(shape[0], 2, *[1] * (len(shape) - 2), seed=len(file))
        file[f"{key}.lora_up.weight"] = up
    patched, _ = comfy.sd.load_lora_for_models(model, None, file, 0.7, 0.0)
    assert len(patched.patches) == len(file) / 2
    with torch.no_grad():
        twin = bridge.denoiser_of(patched)(*question())
        plain = bridge.denoiser_of(model)(*question())
    assert distance(twin, answer(patched, *question())) <= 1e-4
    assert distance(twin, plain) > 1e-2


# Real geometry

REAL = {
    "SD15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "SD20": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "SDXL": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # as in the published folders' unet/config.json
PARAMETERS = {"SD15": 859_520_964, "SD20": 865_910_724, "SDXL": 2_567_463_684}


def published(family: str) -> UNet2DConditionModel:
    """Build the published network in diffusers, without numbers."""
    with torch.device("meta"):
        return UNet2DConditionModel(**REAL[family])


def real_model(family: str, device: str, dtype: torch.dtype = torch.float32):
    """Build the MODEL that ComfyUI makes of the published network; it chooses the family."""
    config = comfy.model_detection.unet_config_from_diffusers_unet(published(family).state_dict())
    known = comfy.model_detection.model_config_from_unet_config(config)
    assert type(known) is getattr(families, family)
    known.set_inference_dtype(dtype, None)
    base = known.get_model({}, device=torch.device(device))
    place = torch.device("cpu")
    return comfy.model_patcher.CoreModelPatcher(base, load_device=place, offload_device=place)


@pytest.mark.parametrize("family", REAL)
def test_the_published_networks_map_key_by_key(family):
    """On the meta device."""
    model, expected = real_model(family, "meta"), published(family)
    twin = bridge.denoiser_of(model).unet
    shapes = {name: p.shape for name, p in expected.named_parameters()}
    assert {name: p.shape for name, p in twin.named_parameters()} == shapes
    assert sum(shape.numel() for shape in shapes.values()) == PARAMETERS[family]
    own = dict(model.model.diffusion_model.named_parameters())
    names = bridge.twin_names(model)
    assert sorted(names.values()) == sorted(own)
    assert all(own[name].shape == shapes[twin] for twin, name in names.items())
    for part in ("attention_head_dim", "transformer_layers_per_block", "norm_num_groups"):
        assert as_list(twin.config[part]) == as_list(expected.config[part])


def as_list(value) -> list:
    """Spell out what a config says once for all levels."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * 4


@pytest.mark.slow
def test_a_whole_sdxl_computes_what_comfyui_computes():
    """2.6 thousand million numbers in bf16, 5.2 GB, shared by both; one step, 128x128 pixels."""
    model = real_model("SDXL", "cpu", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.diffusion_model.parameters():
            size = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.uniform_(-size * 1.7, size * 1.7, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    denoiser = bridge.denoiser_of(model, "bf16")
    own = {p.data_ptr() for p in model.model.diffusion_model.parameters()}
    assert {p.data_ptr() for p in denoiser.parameters()} == own
    x, t = noise(1, 4, 16, 16), torch.tensor([500])
    context, pooled = noise(1, 77, 2048, seed=1), 20 * noise(1, 1280, seed=2)
    y = told(model, pooled, SIZES[:1])
    with torch.no_grad():
        twin = denoiser(x, t, context, pooled, SIZES[:1])
        half = [tensor.bfloat16() for tensor in (x, context, y)]
        found = model.model.diffusion_model(half[0], t, context=half[1], y=half[2]).float()
        without = denoiser(x, t, context, pooled * 0, SIZES[1:])
    assert distance(twin, found) <= 0.02
    assert distance(without, found) > 0.05  # what it is told besides matters


# What is learned


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("family", ["SD 2.x, velocity", "SDXL"])
def test_what_is_trained_is_what_is_loaded(family, method):
    model = of_family(family)
    chosen = make(method, layers="all", batch_size=1)
    denoiser = bridge.denoiser_of(model)
    step = run(chosen, denoiser, sdxl_data())[-1]
    with torch.no_grad():
        trained = denoiser(*question())
    plain, settings = answer(model, *question()), chosen.settings.as_dict()
    header = Header(method.name, 0, settings, bridge.fingerprint(model), "a zib totem", "", "0")
    learned = Personalization.of(header, step.learned(), step.index)
    patched, _ = load.personalize(model, learned, 1.0)
    assert distance(answer(patched, *question()), trained) <= 1e-4
    assert distance(trained, plain) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_bases_own_objective(family):
    """Transcribed with ComfyUI's network, schedule and encoding: || target - f(x_t, t, c) ||^2."""
    model, data = of_family(family), sdxl_data()
    denoiser = bridge.denoiser_of(model)
    method = make(METHODS["lora"], batch_size=3)
    batch = method.draw(data, denoiser, Draws(0, 0, 0, 1))
    sampling, unet = model.model.model_sampling, model.model.diffusion_model
    naive = []
    for i, t in enumerate(batch.timesteps):
        alpha = 1 / (sampling.sigmas[t] ** 2 + 1)
        x, eps = batch.latents[i : i + 1], batch.noise[i : i + 1]
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * eps
        target = eps
        if "velocity" in family:
            target = alpha.sqrt() * eps - (1 - alpha).sqrt() * x
        (index,) = [n for n, e in enumerate(data.training) if torch.equal(e.latent, x[0])]
        y = told(model, data.training[index].pooled[None], batch.sizes[i : i + 1])
        with torch.no_grad():
            output = unet(noisy, t[None], context=batch.context[i : i + 1], y=y)
        naive.append((target - output).square().mean())
    with torch.no_grad():
        loss = denoising_loss(denoiser, batch)
    assert torch.allclose(loss, torch.stack(naive), rtol=1e-4, atol=0)


def test_the_examples_of_a_batch_have_sizes_of_their_own():
    data = sdxl_data()
    method, denoiser = make(METHODS["lora"], batch_size=3), bridge.denoiser_of(of_family("SDXL"))
    batch = method.draw(data, denoiser, Draws(0, 0, 0, 1))
    order = [int(row[1]) for row in batch.sizes]
    assert sorted(order) == [64, 64, 451]
    cut = batch.sizes[order.index(451)].tolist()
    assert cut == [300, 451, 0, 16, 64, 64]  # a quarter of its width from the left
    assert batch.sizes[order.index(64)].tolist() == [64, 64, 0, 0, 64, 64]


def test_a_dropped_caption_is_dropped_from_the_pooled_text_too():
    data = sdxl_data()
    denoiser = bridge.denoiser_of(of_family("SDXL"))
    for dropout, expected in ((1.0, True), (0.0, False)):
        method = make(METHODS["lora"], batch_size=3, caption_dropout=dropout)
        batch = method.draw(data, denoiser, Draws(0, 0, 0, 1))
        assert all(torch.equal(row, data.empty.pooled) == expected for row in batch.pooled)
        assert all(torch.equal(row, data.empty.context) == expected for row in batch.context)


def test_low_resolution_pictures_are_told_their_own_size():
    """Selective BP/ZO: the network is asked as a sampler would ask for such a picture."""
    from personalize.trainers.methods.selective_zo import shrunk

    small = shrunk(sdxl_data(), low=32, size_multiple=4)
    assert small.training[0].sizes.tolist() == [32, 32, 0, 0, 32, 32]
    assert small.training[-1].sizes.tolist() == [300, 451, 0, 8, 32, 32]


def test_the_monitor_measures_sdxl():
    data, denoiser = sdxl_data(), bridge.denoiser_of(of_family("SDXL"))
    splits = {"train": data.training, "held_out": data.held_out, "prior": ()}
    evaluation = Examination(denoiser, splits, 1).of_base()
    assert evaluation.train > 0 and evaluation.held_out is not None
    assert stable_loss(denoiser, data.held_out) > 0


# What a sampler tells


def tiny_sdxl_clip():
    """Build SDXL's pair of text encoders, random, 32 and 64 wide: states 96, pooled text 64."""
    common = {
        "max_position_embeddings": 77,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "eos_token_id": 49407,
        "vocab_size": 49408,
    }
    small = common | {"hidden_size": 32, "intermediate_size": 64, "hidden_act": "quick_gelu"}
    large = common | {"hidden_size": 64, "intermediate_size": 128, "hidden_act": "gelu"}
    small |= {"projection_dim": 32}
    large |= {"projection_dim": 64}
    target = SimpleNamespace(clip=SDXLClipModel, tokenizer=SDXLTokenizer, params={})
    options = {"clip_l_model_config": small, "clip_g_model_config": large}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = comfy.sd.CLIP(target, model_options=options)
        for weight in clip.cond_stage_model.parameters():
            weight.data = torch.randn_like(weight) * 0.1
    return clip


@pytest.fixture(scope="module")
def clip():
    return tiny_sdxl_clip()


@pytest.fixture(scope="module")
def vae():
    from personalize.demo.base_model import TinyVAE

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return comfy.sd.VAE(sd=TinyVAE().state_dict())


def sdxl_for(clip):
    return comfy_model(sdxl_geometry(context_dim=96, adm_in_channels=64 + 1536), family="SDXL")


def asked(model, conditioning, height: int, width: int) -> dict[str, torch.Tensor]:
    """Return what the stock sampler asks the U-Net at its first step."""
    seen = []

    def see(apply, args):
        seen.append({"x": args["input"], "t": args["timestep"], **args["c"]})
        return apply(args["input"], args["timestep"], **args["c"])

    watched = model.clone()
    watched.set_model_unet_function_wrapper(see)
    latent = torch.zeros(1, 4, height // 8, width // 8)
    comfy.sample.sample(
        watched, noise(*latent.shape), 2, 1.0, "euler", "normal", conditioning, [], latent, seed=0
    )
    return seen[0]


def y_of(denoiser, example) -> torch.Tensor:
    """Return what the twin tells its network of an example, (1, adm)."""
    sizes = denoiser.unet.add_time_proj(example.sizes).flatten()[None]
    return torch.cat([example.pooled[None], sizes], 1)


def prepared(clip, vae, picture, **widgets):
    """Prepare a picture (1, H, W, 3) as Personal Dataset does."""
    given = {
        "instance_prompt": ["a photo of sks cat"],
        "captions": [""],
        "class_prompt": [""],
        "resolution": [64],
        "fit": ["crop"],
        "hold_out": [0],
    }
    request = Request(**given | {name: [value] for name, value in widgets.items()})
    return prepare(request, [picture], [], clip, vae)


def test_training_tells_sdxl_what_clip_text_encode_tells_it(clip, vae):
    data = prepared(clip, vae, noise(150, 226, 3).abs().clamp(0, 1))
    model = sdxl_for(clip)
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize("a photo of sks cat"))
    seen = asked(model, conditioning, 64, 64)
    (example,) = data.training
    assert distance(y_of(bridge.denoiser_of(model), example), seen["y"]) <= 1e-5
    assert distance(example.context[None], seen["c_crossattn"]) <= 1e-5
    assert example.pooled.shape == (64,) and example.pooled.abs().mean() > 0


def test_as_photographed_is_what_clip_text_encode_sdxl_tells(clip, vae):
    """A photograph of 150x300, scaled to 64x128, its middle cut out."""
    picture = noise(150, 300, 3).abs().clamp(0, 1)
    data = prepared(clip, vae, picture, size_conditioning="as photographed")
    model, text = sdxl_for(clip), "a photo of sks cat"
    conditioning = CLIPTextEncodeSDXL.execute(clip, 300, 150, 32, 0, 64, 64, text, text)[0]
    seen = asked(model, conditioning, 64, 64)
    assert distance(y_of(bridge.denoiser_of(model), data.training[0]), seen["y"]) <= 1e-5


def test_padding_cuts_nothing_off(clip, vae):
    picture = noise(150, 300, 3).abs().clamp(0, 1)
    how = {"fit": "pad", "size_conditioning": "as photographed"}
    (example,) = prepared(clip, vae, picture, **how).training
    assert example.sizes.tolist() == [150, 300, 0, 0, 64, 64]


def test_size_conditioning_is_part_of_the_datas_fingerprint(clip, vae):
    picture = noise(150, 300, 3).abs().clamp(0, 1)
    one, two = (
        prepared(clip, vae, picture, size_conditioning=how).fingerprint()
        for how in ("as sampled", "as photographed")
    )
    assert one != two


def test_the_twin_answers_what_the_sampler_was_answered(clip):
    """The whole way: conditioning, schedule, network."""
    model, sizes = sdxl_for(clip), torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize("a zib totem"))
    seen = asked(model, conditioning, 64, 64)
    sampling, denoiser = model.model.model_sampling, bridge.denoiser_of(model)
    asked_x = sampling.calculate_input(seen["t"], seen["x"])
    said = encode_text(clip, "a zib totem")
    with torch.no_grad():
        predicted = denoiser(
            asked_x, sampling.timestep(seen["t"]), said.context[None], said.pooled[None], sizes
        )
        found = model.model.apply_model(
            seen["x"], seen["t"], c_crossattn=seen["c_crossattn"], y=seen["y"]
        )
    assert distance(sampling.calculate_denoised(seen["t"], predicted, seen["x"]), found) <= 1e-4


def test_the_monitor_samples_sdxl(clip):
    prompts = [Prompt.of(clip, text) for text in ("a zib totem", "")]
    settings = MonitorSettings(sample_steps=2, sample_count=1)
    monitoring = Monitoring(settings, shown=(prompts[0],), nothing=prompts[1])
    samples = monitoring.sample(sdxl_for(clip), prompts[0], (4, 8, 8), 1)
    assert samples.shape == (1, 4, 8, 8) and samples.isfinite().all()


def test_held_out_pictures_are_told_of_as_the_others_are(clip, vae):
    """Those that the monitor is given by themselves, in both ways."""
    picture, text = noise(150, 300, 3).abs().clamp(0, 1), "a photo of sks cat"
    for how, expected in (
        ("as sampled", [64, 64, 0, 0, 64, 64]),
        ("as photographed", [150, 300, 0, 32, 64, 64]),
    ):
        data = prepared(clip, vae, picture, size_conditioning=how)
        monitoring = Monitoring(MonitorSettings(), held_out=(picture,))
        measured = monitoring.prepare(data, sdxl_for(clip), 0).measured
        (example,) = measured.held_out
        assert example.sizes.tolist() == expected
        assert torch.equal(example.pooled, encode_text(clip, text).pooled)


# Refused


def refusal(model) -> str:
    with pytest.raises(InputError) as error:
        bridge.denoiser_of(model)
    return str(error.value)


@pytest.mark.parametrize(
    "family, config, named",
    [
        ("SD15", geometry(in_channels=9), "SD15 with 9 input channels, not 4 (inpainting?)"),
        ("SD20", {**SD2, "in_channels": 9}, "SD20 with 9 input channels, not 4 (inpainting?)"),
        ("SDXL", sdxl_geometry(in_channels=9), "SDXL with 9 input channels, not 4 (inpainting?)"),
        ("SDXL", sdxl_geometry(in_channels=8), "SDXL with 8 input channels"),
        ("SDXLRefiner", {**SD2, "num_head_channels": 64}, "is SDXLRefiner;"),
        ("SSD1B", sdxl_geometry(), "is SSD1B;"),
        ("Segmind_Vega", sdxl_geometry(), "is Segmind_Vega;"),
        ("SD21UnclipL", SD2 | {"adm_in_channels": 16, "num_classes": "sequential"}, "SD21UnclipL"),
        ("SD15_instructpix2pix", geometry(in_channels=8), "is SD15_instructpix2pix;"),
    ],
)
def test_other_families_are_refused_by_name_in_one_sentence(family, config, named):
    reason = refusal(comfy_model(config, family=family))
    assert named in reason
    assert "Stable Diffusion 1.x, Stable Diffusion 2.x and SDXL base" in reason
    assert reason.endswith("Load such a checkpoint.")


def test_an_sdxl_that_samples_by_edm_is_refused():
    """Playground 2.5."""
    model = comfy_model(sdxl_geometry(), family="SDXL", prediction="EDM")
    assert "noise and velocity prediction over discrete steps" in refusal(model)


def test_data_without_the_pooled_text_is_refused():
    from personalize.nodes.base import in_network_scale

    model = of_family("SDXL")
    with pytest.raises(InputError, match="CLIP and VAE of the same checkpoint"):
        in_network_scale(tiny_data(), model, bridge.denoiser_of(model))
