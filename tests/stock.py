"""What the tests of the stock path stand on: a checkpoint, photographs, and short prompts."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from headless import Graph

CHECKPOINT, INPAINTING = "random-sd15.safetensors", "random-inpainting.safetensors"
PART = "random-part.safetensors"


def write_checkpoints(folder: Path) -> None:
    """Write random SD 1.5 checkpoints of one level, as small as the stock loader accepts.

    The U-Net has 13.6 M weights; CLIP-L (only in CHECKPOINT) and TAESD are whole. 278 MB.
    """
    from comfy.sd1_clip import SD1ClipModel
    from comfy.taesd.taesd import TAESD

    folder.mkdir(parents=True, exist_ok=True)
    if (folder / CHECKPOINT).exists():
        return
    clip = random_weights(SD1ClipModel(dtype=torch.float32), seed=1).state_dict()
    rest = {
        "cond_stage_model." + name.removeprefix("clip_l."): weight
        for name, weight in clip.items()
        if "logit_scale" not in name and "text_projection" not in name
    }
    vae = random_weights(TAESD(latent_channels=4), seed=2).state_dict()
    rest |= {f"first_stage_model.{name}": weight for name, weight in vae.items()}
    write(folder / CHECKPOINT, one_level_unet(4) | rest)
    write(folder / INPAINTING, one_level_unet(9))


def write_parts(models: Path) -> None:
    """Write the parts of CHECKPOINT as files of their own, for the loaders of parts."""
    from safetensors.torch import load_file, save_file

    whole = load_file(models / "checkpoints" / CHECKPOINT)
    for folder, prefix in {
        "diffusion_models": "model.diffusion_model.",
        "text_encoders": "cond_stage_model.transformer.",
        "vae": "first_stage_model.",
    }.items():
        part = {n.removeprefix(prefix): w for n, w in whole.items() if n.startswith(prefix)}
        (models / folder).mkdir(exist_ok=True)
        save_file(part, models / folder / PART)


def one_level_unet(in_channels: int) -> dict[str, torch.Tensor]:
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    unet = UNetModel(
        image_size=32,
        in_channels=in_channels,
        out_channels=4,
        model_channels=320,  # what SD 1.5 is recognised by, with context_dim
        context_dim=768,
        num_res_blocks=[1],
        channel_mult=[1],
        use_spatial_transformer=True,
        transformer_depth=[1],
        transformer_depth_output=[1, 1],
        transformer_depth_middle=-2,  # none
        num_heads=8,
        num_head_channels=-1,
        legacy=False,
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    weights = random_weights(unet, seed=0).state_dict()
    return {f"model.diffusion_model.{name}": weight for name, weight in weights.items()}


def random_weights(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fill a module so that activations keep their size: the samples stay finite."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim >= 2:
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(noise * weight[0].numel() ** -0.5)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return module


def write(path: Path, weights: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    halves = {
        name: (weight.half() if weight.is_floating_point() else weight).contiguous()
        for name, weight in weights.items()
    }
    save_file(halves, path)


def photograph(name: str) -> Image.Image:
    """Return a photograph that comes inside scikit-image, without a download."""
    import skimage

    path = Path(skimage.__file__).parent / "data" / f"{name}.png"
    return Image.open(path).convert("RGB")


def write_photographs(folder: Path) -> None:
    """Write four pictures as cameras and editors leave them: sizes, a turned one, a cut-out."""
    folder.mkdir(parents=True, exist_ok=True)
    photograph("chelsea").save(folder / "a cat.jpg")  # 451x300
    photograph("astronaut").resize((256, 256)).save(folder / "b astronaut.webp")
    coffee = photograph("coffee").resize((300, 200))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees to look at it
    coffee.transpose(Image.Transpose.ROTATE_90).save(folder / "c coffee.jpg", exif=exif)
    cut_out = photograph("chelsea").resize((226, 150)).convert("RGBA")
    cut_out.paste((0, 120, 255, 0), (0, 0, 100, 150))  # transparent, and blue below that
    cut_out.save(folder / "d cut-out.png")
    (folder / "a cat.txt").write_text("a photo of sks cat\n  looking right", encoding="utf-8")
    (folder / "notes.md").write_text("not a picture")


# Prompts


def load_checkpoint(graph: Graph, name: str = CHECKPOINT) -> str:
    """Add the stock loader: outputs MODEL, CLIP, VAE."""
    return graph.add("CheckpointLoaderSimple", ckpt_name=name)


def dataset(graph: Graph, base: str, images: Any, **inputs: Any) -> str:
    """Add a small Personal Dataset of the base's own CLIP and VAE."""
    how = {"resolution": 64, "clip": (base, 1), "vae": (base, 2), **inputs}
    return graph.add("PersonalizeDataset", images=images, **how)


def train(graph: Graph, method: str, model: Any, data: Any, **inputs: Any) -> str:
    """Add a training of three steps that change the pictures."""
    how = {"steps": 3, "learning_rate": 1e-2, "layers": "attention", **inputs}
    return graph.add(f"PersonalizeTrain{method}", model=model, data=data, **how)


def sample(graph: Graph, base: str, model: Any, again: bool = False) -> str:
    """Add two stock sampling steps and Save Image, whose id is returned.

    `again` makes the server sample once more what it has sampled already.
    """
    latent = graph.empty_latent(side=64, count=1)
    if again:
        latent = (graph.add("LatentMultiply", samples=latent, multiplier=1.0), 0)
    return graph.pictures(base, model, "a photo of sks cat", latent, seed=1, steps=2)
