"""Small real networks and data: diffusers' U-Net, ComfyUI's models, pictures of nothing."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from personalize.trainers.data import Example, PersonalData, Wording
from personalize.trainers.denoiser import Denoiser
from personalize.trainers.edits import Edit, of_weights, parameter_name
from personalize.trainers.loop import Step, train
from personalize.trainers.method import Method
from personalize.trainers.time_aware import SITE, TimeAware, attach

WIDTH = 32  # of the text states
SIDE = 8  # of the latents


# Trainers


def tiny_unet(seed: int = 0, **config: Any) -> UNet2DConditionModel:
    """Make an SD-1.x U-Net with random weights: 2 levels, every kind of layer, 0.9 M numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            **{
                "sample_size": SIDE,
                "block_out_channels": (32, 64),
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "layers_per_block": 1,
                "attention_head_dim": 4,
                "cross_attention_dim": WIDTH,
                **config,
            }
        ).requires_grad_(False)


def sd_alphas() -> Tensor:
    """Return the cumulative alphas of Stable Diffusion, (1000,)."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod


def tiny_denoiser(seed: int = 0, prediction_type: str = "epsilon") -> Denoiser:
    """Make a fresh denoiser; the same seed gives the same weights."""
    return Denoiser(tiny_unet(seed), sd_alphas(), prediction_type)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Draw normal noise without touching the global generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example(seed: int, height: int = SIDE, width: int = SIDE, **more: Any) -> Example:
    """Make an example; every seed is another one. height, width: of the latent."""
    return Example(
        pixels=noise(3, 8 * height, 8 * width, seed=seed).clamp(-1, 1),
        latent=noise(4, height, width, seed=1000 + seed),
        caption=f"picture {seed}",
        context=noise(7, WIDTH, seed=2000 + seed),
        **more,
    )


def encode(pixels: Tensor) -> Tensor:
    """Stand for a VAE: (N, 3, H, W) to (N, 4, H / 8, W / 8), linear."""
    mix = noise(4, 3, seed=4000)
    return torch.einsum("lc,nchw->nlhw", mix, torch.nn.functional.avg_pool2d(pixels, 8)) * 8


def tiny_data(count: int = 3, prior: int = 0, held_out: int = 0) -> PersonalData:
    """Make data of random examples."""
    return PersonalData(
        training=tuple(example(i) for i in range(count)),
        held_out=tuple(example(100 + i) for i in range(held_out)),
        prior=tuple(example(200 + i) for i in range(prior)),
        empty=Wording("", noise(7, WIDTH, seed=3000)),
        instance_prompt="a zib totem",
        class_prompt="a totem" if prior else "",
        encode=encode,
    )


SHAPES = ((8, 8), (12, 8), (8, 12), (8, 8), (12, 8), (8, 8), (12, 8))


def mixed_data(prior: int = 0, **more: Any) -> PersonalData:
    """Make data of three sizes: three square pictures, three upright ones, a wide one.

    prior: pictures of every size.
    """
    sizes = list(dict.fromkeys(SHAPES))
    return dataclasses.replace(
        tiny_data(1, held_out=1),
        training=tuple(example(i, *shape, **more) for i, shape in enumerate(SHAPES)),
        prior=tuple(example(200 + 10 * n + i, *sizes[n]) for n in range(3) for i in range(prior)),
    )


def rich_data() -> PersonalData:
    """Make data with all there is: two subjects of several sizes, masks, mirrors, wordings."""
    plain = mixed_data(prior=2)
    words = tuple(Wording(f"word {i}", noise(7, WIDTH, seed=5000 + i)) for i in range(3))

    def rich(number: int, one: Example) -> Example:
        height, width = one.latent.shape[1:]
        mask = noise(height, width, seed=6000 + number).clamp(0, 1)
        one = dataclasses.replace(
            one, mask=mask if number % 2 else None, wordings=words, subject=number % 2
        )
        pixels, latent = one.pixels.flip(-1), one.latent.flip(-1)
        turned = dataclasses.replace(one, pixels=pixels, latent=latent)
        if one.mask is not None:
            turned = dataclasses.replace(turned, mask=one.mask.flip(-1))
        return dataclasses.replace(one, mirrored=turned)

    return dataclasses.replace(
        plain,
        training=tuple(rich(number, one) for number, one in enumerate(plain.training)),
        subjects=("a zib totem", "a mog sprite"),
        take_turns=True,
    )


def make(method: type[Method], **settings: Any) -> Method:
    """Make a method for a short run; settings that it does not have are left out."""
    quick = {"steps": 3, "learning_rate": 1e-2, "batch_size": 2, "rank": 2} | settings
    known = {field.name for field in dataclasses.fields(method.Settings)}
    return method(method.Settings(**{k: v for k, v in quick.items() if k in known}))


def run(method: Method, denoiser: Denoiser, data: PersonalData | None = None) -> list[Step]:
    """Train to the end."""
    return list(train(method, denoiser, data or tiny_data()))


def question(seed: int = 5, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Make inputs of a denoiser: noisy latents, timesteps, context."""
    timesteps = torch.linspace(3, 990, batch).long()
    return (
        noise(batch, 4, SIDE, SIDE, seed=seed),
        timesteps,
        noise(batch, 7, WIDTH, seed=seed + 1),
    )


def edited(
    unet: UNet2DConditionModel, edits: Mapping[str, Edit | TimeAware], strength: float = 1.0
) -> None:
    """Write edits into the plain weights of a U-Net, and attach what is no change of a weight."""
    if SITE in edits:
        attach(unet, edits[SITE], strength)
    with torch.no_grad():
        for site, edit in of_weights(edits).items():
            weight = unet.get_parameter(parameter_name(site))
            weight.copy_(edit.apply(weight, strength))


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    """Copy all weights."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Tell whether two sets of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: Tensor, b: Tensor) -> float:
    """Return max |a - b| relative to max |b|."""
    return float((a - b).abs().max() / b.abs().max())


# ComfyUI


def geometry(
    channels: Sequence[int] = (32, 64),
    depths: Sequence[int] = (1, 1),
    blocks: int = 1,
    **changes: Any,
) -> dict[str, Any]:
    """Describe a U-Net as ComfyUI's model detection does."""
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": channels[0],
        "channel_mult": [n // channels[0] for n in channels],
        "num_res_blocks": [blocks] * len(channels),
        "transformer_depth": [d for d in depths for _ in range(blocks)],
        "transformer_depth_output": [d for d in depths for _ in range(blocks + 1)],
        "transformer_depth_middle": 1,
        "use_spatial_transformer": True,
        "context_dim": WIDTH,
        "legacy": False,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        **changes,
    }


def sdxl_geometry(**changes: Any) -> dict[str, Any]:
    """Describe a narrow SDXL: three levels, the first without attention, more transformer
    blocks further down, 64 channels per head, pooled text and sizes.
    """
    config = {
        "use_linear_in_transformer": True,
        "transformer_depth_middle": 2,
        "num_head_channels": 64,
        "num_classes": "sequential",
        "adm_in_channels": WIDTH + 6 * 256,
        **changes,
    }
    return geometry((64, 64, 128), (0, 1, 2), blocks=2, **config)


def comfy_model(
    config: dict[str, Any] | None = None,
    family: str = "SD15",
    prediction: str = "EPS",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
):
    """Build a MODEL of random weights from ComfyUI's own classes, as its loader does."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    config = config or geometry()
    known = getattr(comfy.supported_models, family)({**config})
    known.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    kind = comfy.model_base.ModelType[prediction]
    kinds = {"SDXL": comfy.model_base.SDXL}
    base = kinds.get(family, comfy.model_base.BaseModel)(known, kind, device="cpu")
    randomise(base.diffusion_model, seed)
    cpu = torch.device("cpu")
    return comfy.model_patcher.CoreModelPatcher(base, load_device=cpu, offload_device=cpu)


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Fill weights with noise that keeps activations near 1 (core starts some at zero)."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            values = noise(*parameter.shape, seed=seed * 10_000 + index)
            if parameter.ndim > 1:
                values = values / parameter[0].numel() ** 0.5
            else:
                values = values * 0.1 + 0.5
            parameter.copy_(values)


def comfy_output(model, x: Tensor, timesteps: Tensor, context: Tensor, y=None) -> Tensor:
    """Return what a MODEL computes once ComfyUI has loaded it, patches and all.

    y: (B, adm) what SDXL is told besides.
    """
    import comfy.model_management

    with torch.no_grad():  # as in a graph
        comfy.model_management.load_models_gpu([model])
        return model.model.diffusion_model(x, timesteps, context=context, y=y).clone()
