"""Read an unconditional base from a diffusers folder: safetensors and JSON, nothing that runs.

Two layouts: a pipeline's (`unet/`, `scheduler/`), and all files in one folder.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from .errors import InputError
from .unconditional import Unconditional

WEIGHTS = "diffusion_pytorch_model"  # the stem that diffusers gives to every weight file


def is_unconditional(folder: Path) -> bool:
    """Tell whether a folder holds a UNet2DModel, bare or as a pipeline's `unet`."""
    return read_json(network_folder(folder) / "config.json").get("_class_name") == "UNet2DModel"


def network_folder(folder: Path) -> Path:
    """Return where the network of a base is: the folder's `unet`, or the folder itself."""
    return folder / "unet" if (folder / "unet" / "config.json").is_file() else folder


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; {} when there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def load_unconditional(folder: Path, input_name: str = "base") -> Unconditional:
    """Read a base from a diffusers folder.

    Raises InputError for another kind of model, missing or damaged weights, and what training
    does not know: class labels, learned variances, continuous time, latents of a VAE.
    """

    def wrong(problem: str) -> InputError:
        return InputError(input_name, f"is '{folder.name}', which {problem}.")

    network = network_folder(folder)
    facts, pipeline = read_json(network / "config.json"), read_json(folder / "model_index.json")
    if problem := unknown_to_training(facts, pipeline) or missing_weights(network):
        raise wrong(problem)
    schedule = read_schedule(folder)
    if isinstance(schedule, str):
        raise wrong(schedule)
    try:
        return Unconditional(read_network(network), schedule)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200].replace(str(folder), folder.name)
        raise wrong(f"can not be read ({reason}); download it again") from error


def unknown_to_training(facts: dict[str, Any], pipeline: dict[str, Any]) -> str:
    """Say what of a network this pack does not train, and what to do; or nothing."""
    name = facts.get("_class_name", "no readable config.json")
    channels, out = facts.get("in_channels", 3), facts.get("out_channels", 3)
    size = facts.get("sample_size")
    sides = size if isinstance(size, list) and size else [size]
    labels = facts.get("class_embed_type") or facts.get("num_class_embeds")
    time, square = facts.get("time_embedding_type", "positional"), len(set(map(str, sides))) == 1
    problems = {
        f"holds {name} instead of UNet2DModel": name != "UNet2DModel",
        "works on the latents of a VAE, not on pixels": {"vae", "vqvae"} & pipeline.keys(),
        "is conditioned on class labels": labels,
        "counts time continuously (a score network), not in steps": time != "positional",
        "predicts variances too, which is not trained here": (channels, out) in ((1, 2), (3, 6)),
        f"has {channels} input and {out} output channels": (channels, out) not in ((1, 1), (3, 3)),
        f"is for size {size}, not for squares": not (square and isinstance(sides[0], int)),
    }
    found = [problem for problem, applies in problems.items() if applies]
    return f"{found[0]}; choose another base" if found else ""


def missing_weights(network: Path) -> str:
    """Say when there are no weights in safetensors, and what to do; or nothing."""
    if any(network.glob(f"{WEIGHTS}*.safetensors")):
        return ""
    pickled = any(network.glob("*.bin"))
    found = "only pickled ones (.bin), which can run code when opened" if pickled else "none"
    return (
        f"needs weights in {WEIGHTS}.safetensors, but has {found}; convert it where you trust it: "
        "UNet2DModel.from_pretrained(…).save_pretrained(…)"
    )


def read_network(folder: Path) -> UNet2DModel:
    """Read the network in fp32. Raises OSError, ValueError or RuntimeError when it is not whole."""
    files = [file.name for file in folder.glob(f"{WEIGHTS}*.safetensors")]
    variant = "fp16" if all(".fp16" in name for name in files) else None
    read: Any = UNet2DModel.from_pretrained(
        folder,
        variant=variant,
        torch_dtype=torch.float32,
        use_safetensors=True,  # given, it also refuses to fall back to pickle
        local_files_only=True,
        output_loading_info=True,
    )
    unet, report = read
    if missing := report["missing_keys"]:
        raise ValueError(f"{len(missing)} weights are missing, such as {sorted(missing)[0]}")
    return unet.requires_grad_(False).eval()


def read_schedule(folder: Path) -> DDIMScheduler | str:
    """Read the schedule that the base was trained with; or say why there is none to train by."""
    files = (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    found: dict[str, Any] = next(filter(None, map(read_json, files)), {})
    if not found:
        return "has no scheduler_config.json; put the one of its training beside config.json"
    if "beta_schedule" not in found and "trained_betas" not in found:
        return f"was trained for {found.get('_class_name')}, not a schedule of betas; choose a DDPM"
    kind = found.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        return f"predicts '{kind}', not noise or velocity; choose another base"
    try:
        return cast(DDIMScheduler, DDIMScheduler.from_config(found))
    except (ValueError, TypeError, NotImplementedError) as error:
        return f"has a scheduler_config.json that can not be used ({error}); download it again"
