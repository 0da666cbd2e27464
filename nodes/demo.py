"""The demo world as nodes: a small base with trained weights, and subjects to personalise it on."""

import json
from pathlib import Path
from typing import Any, ClassVar

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import numpy as np
import torch
from comfy_api.latest import io
from safetensors import safe_open
from torch import Tensor

from ..demo.token_table import text_table
from ..demo.world import SHIPPED_SUBJECTS, subject_pictures
from ..trainers.errors import InputError
from .wires import CATEGORY, at

BASE = Path(__file__).parent.parent / "demo" / "base.safetensors"
SPLITS = ("training", "held-out")


class SpriteFamily(comfy.supported_models.SD15):
    """SD 1.x at the size of the demo base. Not registered: core lists stay as they are."""

    unet_extra_config: ClassVar = {}  # the number of heads is the demo base's own


class DemoBase(io.ComfyNode):
    """Load the embedded base."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeDemoBase",
            display_name="Demo Base",
            category=f"{CATEGORY}/demo",
            description="A small text-to-image model that comes with the pack, for trying things "
            "without a download: it draws shapes ('a small striped red star on a green "
            "background') and totems ('a totem in a meadow') at 128x128 pixels, and trains in a "
            "few minutes on a CPU. Sample with CFG 4 and 25 steps.",
            search_aliases=["sprite base", "tiny model", "example model", "test model"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="U-Net of SD-1.x anatomy."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder."),
                io.Vae.Output(display_name="vae", tooltip="Its VAE."),
            ],
        )

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_base(BASE))


class DemoSubject(io.ComfyNode):
    """Draw pictures of a made-up character."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeDemoSubject",
            display_name="Demo Subject",
            category=f"{CATEGORY}/demo",
            description="Draws pictures of a made-up character, 'a zib totem', which the demo base "
            "has never seen: something to personalise on without a camera. Every seed is another "
            f"character; {SHIPPED_SUBJECTS[0]} to {SHIPPED_SUBJECTS[-1]} are the ones we show.",
            search_aliases=["totem", "example images", "toy dataset", "sample images"],
            inputs=[
                io.Int.Input(
                    "subject",
                    default=1,
                    min=0,
                    max=999_999,
                    tooltip="Which character: the same number is always the same one.",
                ),
                io.Int.Input(
                    "count", default=4, min=1, max=1000, tooltip="How many pictures of it."
                ),
                io.Combo.Input(
                    "split",
                    options=list(SPLITS),
                    default=SPLITS[0],
                    tooltip="Pictures to train on, or others of the same character to compare to.",
                ),
                io.Int.Input(
                    "resolution", default=128, min=64, max=1024, step=8, tooltip="Side in pixels."
                ),
                io.String.Input(
                    "subject_name",
                    default="zib",
                    tooltip="The rare word that stands for this character in the captions.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The pictures, as a batch."),
                io.String.Output(
                    display_name="captions", tooltip="One line each, for Personal Dataset."
                ),
            ],
        )

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def execute(cls, subject, count, split, resolution, subject_name) -> io.NodeOutput:
        widgets = {"subject": subject, "count": count, "split": split, "resolution": resolution}
        with at(cls, **widgets, subject_name=subject_name):
            if not subject_name.isalnum():
                raise InputError("subject_name", f"is '{subject_name}'; give one word.")
        pictures = subject_pictures(subject, count, split, resolution, subject_name.lower())
        images = np.stack([pixels for pixels, _ in pictures])
        captions = "\n".join(caption for _, caption in pictures)
        return io.NodeOutput(torch.from_numpy(images).float() / 255, captions)


def load_base(path: Path) -> tuple[Any, Any, Any]:
    """Build MODEL, CLIP and VAE from the demo base's file, through ComfyUI's own classes."""
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    unet_config = json.loads(facts["unet_config"])
    text_config = json.loads(facts["text_config"])
    table = text_table(
        tensors["text_rows"],
        tensors["text_ids"].long(),
        int(facts["table_seed"]),
        float(facts["table_std"]),
    )
    model = build_model(unet_config, part(tensors, "unet."))
    # what ComfyUI asks for a copy that shares nothing, as its Train LoRA does
    model.cached_patcher_init = (load_model, (path,))
    return (
        model,
        build_clip(text_config, part(tensors, "text."), table),
        comfy.sd.VAE(sd=part(tensors, "vae.")),
    )


def load_model(path: Path, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Build the MODEL anew; a dynamic one holds its weights as ComfyUI pleases."""
    model, _, _ = load_base(path)
    if disable_dynamic and model.is_dynamic():
        devices = {"load_device": model.load_device, "offload_device": model.offload_device}
        return comfy.model_patcher.ModelPatcher(model.model, **devices)
    return model


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def build_model(c: dict[str, Any], weights: dict[str, Tensor]) -> comfy.model_patcher.ModelPatcher:
    """Build a MODEL from a diffusers U-Net's config and weights."""
    levels = len(c["block_out_channels"])
    blocks = c["layers_per_block"]
    attends = [kind.startswith("CrossAttn") for kind in c["down_block_types"]]
    base = c["block_out_channels"][0]
    config = SpriteFamily(
        {
            "image_size": 32,
            "in_channels": c["in_channels"],
            "out_channels": c["out_channels"],
            "model_channels": base,
            "channel_mult": [n // base for n in c["block_out_channels"]],
            "num_res_blocks": [blocks] * levels,
            "transformer_depth": [int(a) for a in attends for _ in range(blocks)],
            "transformer_depth_output": [int(a) for a in attends for _ in range(blocks + 1)],
            "transformer_depth_middle": 1,
            "use_spatial_transformer": True,
            "context_dim": c["cross_attention_dim"],
            "num_heads": c["attention_head_dim"],
            "num_head_channels": -1,
            "legacy": False,
            "use_linear_in_transformer": False,
            "adm_in_channels": None,
            "use_temporal_attention": False,
            "use_temporal_resblock": False,
        }
    )
    config.set_inference_dtype(torch.float32, None)
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    model = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.EPS, device="cpu")
    model.diffusion_model.load_state_dict({names[k]: w for k, w in weights.items()})
    return comfy.model_patcher.CoreModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def build_clip(c: dict[str, Any], weights: dict[str, Tensor], table: Tensor) -> comfy.sd.CLIP:
    """Build a CLIP from a transformers CLIPTextModel's config and weights."""
    # transformers 5 dropped the "text_model." that older versions and ComfyUI use
    weights = {"text_model." + k.removeprefix("text_model."): w for k, w in weights.items()}
    weights["text_model.embeddings.token_embedding.weight"] = table
    target = comfy.supported_models_base.ClipTarget(
        comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel
    )
    return comfy.sd.CLIP(
        target,
        parameters=table.numel(),
        state_dict={f"clip_l.transformer.{k}": w for k, w in weights.items()},
        model_options={"clip_l_model_config": c, "dtype": torch.float32},
    )
