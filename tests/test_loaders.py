"""What the stock loaders make of files, in every storage that they read, is what training sees.

The files are written here: an SD 1.5 U-Net of real width with one level (13.6 M random numbers),
which ComfyUI takes for SD 1.5, alone or in a checkpoint (its parts from files of their own: see
test_stock_path.py); SD-XS, the smallest published layout that
ComfyUI reads from a diffusers folder; and SDXL's two text encoders, whole (slow).
"""

import logging

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from nodes import DiffusersLoader, DualCLIPLoader, UNETLoader
from personalize.nodes import bridge, load
from personalize.nodes.data import encode_text
from personalize.trainers.artifact import Header, Personalization
from personalize.trainers.data import Wording
from personalize.trainers.methods import METHODS
from tests import stock
from tests.tiny import comfy_output, distance, make, noise, run, tiny_data

PREFIX = "model.diffusion_model."
STORAGE = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8 e4m3": torch.float8_e4m3fn,
    "fp8 e5m2": torch.float8_e5m2,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """ComfyUI's models folder, for these tests alone."""
    root = tmp_path_factory.mktemp("models")
    kinds = ("checkpoints", "diffusion_models", "text_encoders", "diffusers")
    before = {kind: folder_paths.folder_names_and_paths[kind] for kind in kinds}
    for kind, (_, endings) in before.items():
        (root / kind).mkdir()
        folder_paths.folder_names_and_paths[kind] = ([str(root / kind)], endings)
    yield root
    folder_paths.folder_names_and_paths.update(before)


@pytest.fixture(scope="module")
def unet() -> dict[str, torch.Tensor]:
    """The weights of the U-Net, fp32, under ComfyUI's names."""
    return {n.removeprefix(PREFIX): w.clone() for n, w in stock.one_level_unet(4).items()}


def question():
    return noise(2, 4, 8, 8, seed=5), torch.tensor([3, 990]), noise(2, 77, 768, seed=6)


def twin(model, precision: str = "fp32") -> torch.Tensor:
    with torch.no_grad():
        return bridge.denoiser_of(model, precision)(*question())


def own(model) -> torch.Tensor:
    return comfy_output(model, *question()).float()


def check_twin(model) -> None:
    found = own(model)
    assert found.abs().mean() > 0.1
    assert distance(twin(model), found) <= 1e-4


@pytest.mark.parametrize("storage", STORAGE)
def test_load_checkpoint(models, unet, storage):
    file = {PREFIX + name: weight.to(STORAGE[storage]) for name, weight in unet.items()}
    save_file(file, models / "checkpoints" / f"{storage}.safetensors")
    model = comfy.sd.load_checkpoint_guess_config(
        str(models / "checkpoints" / f"{storage}.safetensors"), output_vae=False, output_clip=False
    )[0]
    assert bridge.family(model) == "stable-diffusion-v1"
    check_twin(model)
    rounded = {name: weight.to(STORAGE[storage]).float() for name, weight in unet.items()}
    held = {name: bridge.plain(w).float() for name, w in bridge.own_weights(model).items()}
    assert all(torch.equal(held[name], rounded[name]) for name in rounded)


@pytest.mark.parametrize("dtype", ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"])
def test_load_diffusion_model(models, unet, dtype, caplog):
    caplog.set_level(logging.INFO)
    save_file({n: w.half() for n, w in unet.items()}, models / "diffusion_models" / "u.safetensors")
    (model,) = UNETLoader().load_unet("u.safetensors", dtype)
    check_twin(model)
    assert ("8 bits" in caplog.text) == dtype.startswith("fp8")


def scaled(unet: dict[str, torch.Tensor], marker: int) -> dict[str, torch.Tensor]:
    """Quantise the matrices as 'fp8 scaled' files have them; marker: 0 or 2, their two kinds."""
    file = {"scaled_fp8": torch.zeros(marker, dtype=torch.float8_e4m3fn)}
    for name, weight in unet.items():
        if weight.ndim == 2 and ".transformer_blocks." in name:
            scale = weight.abs().max() / 448
            file[name] = (weight / scale).to(torch.float8_e4m3fn)
            file[name.replace(".weight", ".scale_weight")] = scale.float()
        else:
            file[name] = weight.half()
    return file


@pytest.mark.parametrize("marker", [0, 2])
def test_fp8_scaled_files(models, unet, marker, caplog):
    caplog.set_level(logging.INFO)
    file = scaled(unet, marker)
    save_file(file, models / "diffusion_models" / "scaled.safetensors")
    (model,) = UNETLoader().load_unet("scaled.safetensors", "default")
    quantised = [w for w in bridge.own_weights(model).values() if isinstance(w, QuantizedTensor)]
    assert len(quantised) == sum(name.endswith("scale_weight") for name in file)
    check_twin(model)
    reader = bridge.weight_reader(model)
    site = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    name = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    numbers = file[f"{name}.weight"].float() * file[f"{name}.scale_weight"]
    assert distance(reader(site), numbers) <= 1e-6
    assert f"{len(quantised)} weights of the base" in caplog.text and "scales" in caplog.text
    assert bridge.fingerprint(model) == bridge.fingerprint(model.clone())


def learned_on(model, method: str, **settings) -> tuple[Personalization, torch.Tensor]:
    """Train three steps; return what was learned, and what the trained network computes."""
    chosen = make(METHODS[method], batch_size=1, **settings)
    denoiser = bridge.denoiser_of(model)
    step = run(chosen, denoiser, wide_data())[-1]
    with torch.no_grad():
        output = denoiser(*question())
    base = bridge.fingerprint(model)
    header = Header(method, 0, chosen.settings.as_dict(), base, "a zib totem", "", "0")
    return Personalization.of(header, step.learned(), step.index), output


def wide_data():
    from dataclasses import replace

    data = tiny_data(2)
    examples = [replace(e, context=noise(77, 768, seed=i)) for i, e in enumerate(data.training)]
    return replace(data, training=tuple(examples), empty=Wording("", noise(77, 768, seed=9)))


# ComfyUI writes patched weights back in what the base is held in, rounded (fp8: by chance)
ROUNDING = {"fp32": 1e-4, "fp16": 1e-3, "bf16": 1e-2, "fp8 e4m3": 0.1, "fp8 scaled": 0.1}


@pytest.mark.parametrize("storage", ROUNDING)
def test_what_is_trained_is_what_is_loaded_up_to_comfyuis_own_rounding(models, unet, storage):
    """The patches are exact; on the CPU, ComfyUI holds half precision only when it is told to."""
    path = models / "diffusion_models" / "t.safetensors"
    dtype = STORAGE.get(storage)
    save_file(scaled(unet, 2) if dtype is None else unet, path)
    model = comfy.sd.load_diffusion_model(str(path), {} if dtype is None else {"dtype": dtype})
    check_twin(model)
    before = own(model)
    learned, trained = learned_on(model, "lora", layers="transformer")
    patched, _ = load.personalize(model, learned, 1.0)
    assert distance(before, trained) > 0.3
    assert distance(twin(patched), trained) <= 1e-4
    assert distance(own(patched), trained) <= ROUNDING[storage]


@pytest.mark.slow
def test_load_diffusers(models):
    """SD-XS: three levels of real width, one block each, no middle."""
    config = {
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "mid_block_type": None,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }
    folder = models / "diffusers" / "xs"
    source = UNet2DConditionModel(**config).requires_grad_(False)
    stock.random_weights(source, seed=3)
    source.half().save_pretrained(folder / "unet")
    (folder / "model_index.json").write_text("{}")
    model = DiffusersLoader().load_checkpoint("xs", output_vae=False, output_clip=False)[0]
    check_twin(model)
    with torch.no_grad():
        assert distance(twin(model), source.float()(*question()).sample) <= 1e-4


@pytest.mark.slow
def test_dual_clip_loader_gives_sdxls_texts(models):
    """clip_l and clip_g, whole: 123 M and 695 M random numbers."""
    from comfy.sdxl_clip import SDXLClipModel

    encoders = stock.random_weights(SDXLClipModel(dtype=torch.float16), seed=4)
    for name in ("clip_l", "clip_g"):
        weights = getattr(encoders, name).transformer.state_dict()
        kept = {k: w.half().contiguous() for k, w in weights.items()}
        save_file(kept, models / "text_encoders" / f"{name}.safetensors")
    del encoders, weights, kept
    (clip,) = DualCLIPLoader().load_clip("clip_l.safetensors", "clip_g.safetensors", "sdxl")
    said = encode_text(clip, "a photo of sks cat")
    context, pooled = said.context, said.pooled
    states, told = clip.encode_from_tokens_scheduled(clip.tokenize("a photo of sks cat"))[0]
    assert context.shape == (77, 2048) and pooled.shape == (1280,)
    assert torch.equal(context, states[0].float()) and context.isfinite().all()
    assert torch.equal(pooled, told["pooled_output"][0].float()) and pooled.abs().mean() > 0
