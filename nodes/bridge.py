"""From a ComfyUI MODEL to a diffusers U-Net that shares its weights; the MODEL is never touched."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_sampling
import comfy.supported_models as families
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter.base import WeightAdapterBase
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from ..trainers.denoiser import Denoiser
from ..trainers.edits import parameter_name
from ..trainers.eight_bits import store_in_eight_bits
from ..trainers.errors import InputError

PREFIX = "diffusion_model."
SUPPORTED = {
    families.SD15: "stable-diffusion-v1",
    families.SD20: "stable-diffusion-v2",
    families.SDXL: "stable-diffusion-xl-v1-base",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}


def denoiser_of(model: ModelPatcher, precision: str = "fp32") -> Denoiser:
    """Build the diffusers twin of a MODEL, with the patches it carries, on the CPU.

    Weights that are not patched and already in `precision` share the MODEL's storage.
    Raises InputError for a family, or an alteration, that training can not see.
    """
    family(model)
    if unseen := alterations(model):
        raise InputError(
            "model",
            f"carries {', '.join(unseen)}, which training can not see; connect the model from "
            "before that node, and put the node behind training.",
        )
    weights = twin_weights(model, DTYPES[precision])
    with torch.device("meta"):
        unet = UNet2DConditionModel(**twin_config(model.model.model_config.unet_config))
    missing, unexpected = unet.load_state_dict(weights, strict=False, assign=True)
    unexpected += sorted(set(own_weights(model)) - set(twin_names(model).values()))
    if missing or unexpected:
        raise InputError(
            "model",
            f"has an unknown layout: {len(missing)} weights missing ({missing[:3]}), "
            f"{len(unexpected)} unexpected ({unexpected[:3]}); use a stock U-Net of SD 1.x, SD 2.x "
            "or SDXL.",
        )
    if compressed := [w for w in own_weights(model).values() if is_compressed(w)]:
        logging.info(
            "Personalize: %d weights of the base are stored in 8 bits or less (%s); the copy that "
            "is trained on has them in %s",
            len(compressed),
            ", ".join(sorted({storage(weight) for weight in compressed})),
            precision,
        )
    if precision == "int8":
        store_in_eight_bits(unet)
    return Denoiser(unet, *schedule(model))


def alterations(model: ModelPatcher) -> list[str]:
    """Name what nodes upstream changed in how the U-Net computes, other than its weights."""
    options = model.model_options
    found = [f"injected modules ({key})" for key in model.injections]
    for kind in ("patches", "patches_replace"):
        patches = options.get("transformer_options", {}).get(kind, {})
        found += [f"patches of its blocks ({name})" for name, applied in patches.items() if applied]
    if "model_function_wrapper" in options:
        found.append("a wrapper around its forward pass")
    return found


def schedule(model: ModelPatcher) -> tuple[Tensor, str]:
    """Return the base's cumulative alphas (T,) and prediction type.

    Raises InputError for a MODEL set to sample otherwise than it was trained (LCM, x0, EDM, ...).
    """
    known = comfy.model_sampling
    sampling: Any = model.get_model_object("model_sampling")
    kinds = {kind.__name__ for kind in type(sampling).__mro__}
    discrete = isinstance(sampling, known.ModelSamplingDiscrete) and isinstance(sampling, known.EPS)
    if not discrete or kinds & {"X0", "EDM", "LCM", "ModelSamplingDiscreteDistilled"}:
        raise InputError(
            "model",
            f"samples with {' + '.join(k.__name__ for k in type(sampling).__bases__)}; training "
            "knows noise and velocity prediction over discrete steps. Connect the model from "
            "before that Model Sampling node.",
        )
    sigmas = sampling.sigmas.detach().cpu().double()
    velocity = isinstance(sampling, known.V_PREDICTION)
    return 1 / (sigmas**2 + 1), "v_prediction" if velocity else "epsilon"


def family(model: ModelPatcher) -> str:
    """Name the base's family. Raises InputError when it is not supported."""
    config = model.model.model_config
    # the first that ComfyUI lists: some derive from others, and the demo's from SD15
    known = next((kind for kind in type(config).__mro__ if kind in families.models), type(config))
    channels = getattr(config, "unet_config", {}).get("in_channels")
    if known in SUPPORTED and channels == 4:
        return SUPPORTED[known]
    kind = f" with {channels} input channels, not 4 (inpainting?)" if known in SUPPORTED else ""
    raise InputError(
        "model",
        f"is {known.__name__}{kind}; this version trains the text-to-image models of "
        "Stable Diffusion 1.x, Stable Diffusion 2.x and SDXL base. Load such a checkpoint.",
    )


def twin_config(c: dict[str, Any]) -> dict[str, Any]:
    """Translate a ComfyUI unet_config into the arguments of diffusers' UNet2DConditionModel."""
    channels = [c["model_channels"] * m for m in c["channel_mult"]]
    levels = range(len(channels))
    blocks = c["num_res_blocks"]
    depth_at = [c["transformer_depth"][sum(blocks[:i])] for i in levels]
    head_channels = c.get("num_head_channels", -1)
    heads = [n // head_channels if head_channels > 0 else c["num_heads"] for n in channels]
    down = ["CrossAttnDownBlock2D" if depth_at[i] else "DownBlock2D" for i in levels]
    up = ["CrossAttnUpBlock2D" if depth_at[i] else "UpBlock2D" for i in reversed(levels)]
    told = {  # SDXL: the pooled text, and six sizes as 256 numbers each
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": c["adm_in_channels"],
    }
    return {
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"],
        "block_out_channels": tuple(channels),
        "layers_per_block": tuple(blocks),
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
        "mid_block_type": (
            None if c["transformer_depth_middle"] == -2 else "UNetMidBlock2DCrossAttn"
        ),
        "transformer_layers_per_block": tuple(max(1, d) for d in depth_at),
        "attention_head_dim": tuple(heads),  # diffusers' name for the number of heads
        "cross_attention_dim": c["context_dim"],
        "use_linear_projection": c.get("use_linear_in_transformer", False),
        **(told if c.get("adm_in_channels") else {}),
    }


def twin_weights(model: ModelPatcher, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the base's weights under diffusers' names, patches applied, in `dtype`."""
    own, names = own_weights(model), twin_names(model)
    return {
        twin: _weight(model, PREFIX + name, own[name]).to(dtype) for twin, name in names.items()
    }


def weight_reader(model: ModelPatcher) -> Callable[[str], Tensor]:
    """Return what gives a weight by its site in the twin, patches applied, fp32."""
    own, names = own_weights(model), twin_names(model)

    def read(site: str) -> Tensor:
        name = names[parameter_name(site)]
        return _weight(model, PREFIX + name, own[name]).float()

    return read


def own_weights(model: ModelPatcher) -> dict[str, Tensor]:
    """Return the U-Net's weights under ComfyUI's names, without patches.

    Sampling leaves the patches of one clone written into the weights that all clones share; what
    was there before is in the backup that they share as well.
    """
    own = {
        name: weight
        for name, weight in model.model.diffusion_model.named_parameters()
        if not name.endswith(".input_scale")  # of a quantised layer's inputs, no weight
    }
    before = {name: model.backup.get(PREFIX + name) for name in own}
    return {name: b.weight if (b := before[name]) else weight for name, weight in own.items()}


def twin_names(model: ModelPatcher) -> dict[str, str]:
    """Map diffusers' weight names to those of ComfyUI's U-Net."""
    own = {name for name, _ in model.model.diffusion_model.named_parameters()}
    mapping = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    return {
        twin: name
        for twin, name in mapping.items()
        if name in own and not twin.startswith("class_embedding.")  # SDXL's is add_embedding
    }


def is_compressed(weight: Tensor) -> bool:
    """Tell whether a weight is quantised, or stored in 8 bits."""
    return isinstance(weight, QuantizedTensor) or weight.dtype.itemsize == 1


def storage(weight: Tensor) -> str:
    """Name what a weight is stored in."""
    if isinstance(weight, QuantizedTensor):
        return f"{weight.storage_dtype} with scales"
    return str(weight.dtype)


def plain(weight: Tensor) -> Tensor:
    """Return a weight as numbers: fp32 for a quantised one, else itself."""
    if isinstance(weight, QuantizedTensor):
        return weight.to(dtype=torch.float32).dequantize()
    return weight


def _weight(model: ModelPatcher, key: str, weight: Tensor) -> Tensor:
    weight = plain(weight)
    if key in model.patches:
        return comfy.lora.calculate_weight(model.patches[key], weight.float().clone(), key)
    return for_autograd(weight)


def for_autograd(tensor: Tensor) -> Tensor:
    """Alias a tensor by one that autograd accepts; storage is shared.

    What was born in inference mode has no version counter, and gets none when a module is moved.
    """
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(
        tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )


@torch.no_grad()  # the weights of ComfyUI 0.16 ask for gradients
def fingerprint(model: ModelPatcher) -> dict[str, str]:
    """Describe the base: family, hashes of its geometry, (samples of) its weights and patches.

    patches: as runs of before knew them, which missed whatever is no tensor of an adapter.
    """
    geometry, weights, patches = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    all_of_patches = hashlib.sha256()
    for name, weight in sorted(own_weights(model).items()):
        geometry.update(f"{name}{tuple(weight.shape)}".encode())
        sample = plain(weight).flatten()[:64].float().cpu().contiguous()
        weights.update(sample.numpy().tobytes())
    for key, applied in sorted(model.patches.items()):
        all_of_patches.update(key.encode())
        for part in parts_of(applied):
            all_of_patches.update(part)
        for strength, patch, *_ in applied:
            patches.update(f"{key}{strength}".encode())
            for part in getattr(patch, "weights", None) or ():
                if isinstance(part, Tensor):
                    patches.update(part.flatten()[:64].float().cpu().numpy().tobytes())
    return {
        "family": family(model),
        "geometry": geometry.hexdigest()[:16],
        "weights": weights.hexdigest()[:16],
        "patches": patches.hexdigest()[:16] if model.patches else "",
        "all_of_patches": all_of_patches.hexdigest()[:16] if model.patches else "",
    }


def parts_of(value: Any) -> Iterator[bytes]:
    """Yield what a patch is made of: numbers, words, and (samples of) tensors, however nested."""
    if isinstance(value, Tensor):
        numbers = plain(value).flatten()
        yield f"{tuple(value.shape)}".encode()
        yield numbers[:: max(1, len(numbers) // 64)].float().cpu().contiguous().numpy().tobytes()
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)} of".encode()
        for inner in value:
            yield from parts_of(inner)
    elif isinstance(value, dict):
        yield from parts_of(list(value.items()))
    elif isinstance(value, WeightAdapterBase):
        yield from parts_of([value.name, value.weights])
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield repr(value).encode()


def choose_precision(wanted: str, device: torch.device) -> str:
    """Resolve "auto": bf16 where the device computes in it, else fp32."""
    if wanted != "auto":
        return wanted
    fast = device.type != "cpu" and comfy.model_management.should_use_bf16(device)
    return "bf16" if fast else "fp32"
