"""Read an unconditional base from a diffusers folder: safetensors and JSON, nothing that runs.

Two layouts: a pipeline's (`unet/`, `scheduler/`), and all files in one folder.
"""

import json
import re
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from .errors import InputError, brief
from .unconditional import Unconditional

WEIGHTS = "diffusion_pytorch_model"  # the stem that diffusers gives to every weight file
MOST = {  # of numbers in the JSON files, above which no base is read: far beyond all there are
    "sample_size": 1024,
    "layers_per_block": 16,
    "block_out_channels": 4096,
    "attention_head_dim": 4096,
    "norm_num_groups": 4096,
    "downsample_padding": 2,
    "num_train_timesteps": 100_000,
}
MOST_LEVELS = 10
PIECE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
CHANNELS = ((1, 1), (3, 3), (1, 2), (3, 6))  # in and out; twice as many: with variances
UNREADABLE = (OSError, ValueError, RuntimeError, TypeError, KeyError, ZeroDivisionError)


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
    does not know: class labels, continuous time, latents of a VAE.
    """

    def wrong(problem: str) -> InputError:
        return InputError(input_name, f"is '{folder.name}', which {problem}.")

    network = network_folder(folder)
    facts, pipeline = read_json(network / "config.json"), read_json(folder / "model_index.json")
    problem = unknown_to_training(facts, pipeline) or missing_weights(network)
    if problem := problem or beyond(facts) or larger_than_its_weights(network, facts):
        raise wrong(problem)
    schedule = read_schedule(folder)
    if isinstance(schedule, str):
        raise wrong(schedule)
    try:
        return Unconditional(read_network(network), schedule)
    except UNREADABLE as error:
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
        "is quantised": "quantization_config" in facts,
        "counts time continuously (a score network), not in steps": time != "positional",
        f"has {channels} input and {out} output channels": (channels, out) not in CHANNELS,
        f"is for size {size}, not for squares": not (square and isinstance(sides[0], int)),
    }
    found = [problem for problem, applies in problems.items() if applies]
    return f"{found[0]}; choose another base" if found else ""


def missing_weights(network: Path) -> str:
    """Say when there are no weights in safetensors, and what to do; or nothing."""
    if strange := [n for file in network.glob("*index*.json") for n in strange_pieces(file)]:
        return (
            f"has a list of its pieces that names {brief(strange[0], 60)}; only .safetensors files "
            "in the same folder are read, as others can run code when opened. Remove the list"
        )
    if any(network.glob(f"{WEIGHTS}*.safetensors")):
        return ""
    pickled = any(network.glob("*.bin"))
    found = "only pickled ones (.bin), which can run code when opened" if pickled else "none"
    return (
        f"needs weights in {WEIGHTS}.safetensors, but has {found}; convert it where you trust it: "
        "UNet2DModel.from_pretrained(…).save_pretrained(…)"
    )


def strange_pieces(index: Path) -> list[str]:
    """Return what a list of a network's pieces names besides safetensors files at its side."""
    if index.name.startswith(f"{WEIGHTS}.bin."):  # never looked at
        return []
    pieces = read_json(index).get("weight_map")
    if not isinstance(pieces, dict):
        return ["nothing that can be read"]
    files = [file if isinstance(file, str) else repr(file) for file in pieces.values()]
    return [f for f in files if not PIECE.fullmatch(f) or not (index.parent / f).is_file()]


def beyond(facts: dict[str, Any]) -> str:
    """Say which number of a JSON file is none, or so large that nobody means it; or nothing."""
    for name, most in MOST.items():
        value = facts.get(name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and (type(number) is not int or not 0 <= number <= most):
                return f"has {name} {brief(value, 60)}, not up to {most}; download it again"
    blocks = [facts.get(f"{way}_block_types", []) for way in ("down", "up")]
    levels = [facts.get("block_out_channels", []), *blocks]
    if any(not isinstance(level, list) or len(level) > MOST_LEVELS for level in levels):
        return f"has more than {MOST_LEVELS} levels; download it again"
    return ""


def larger_than_its_weights(network: Path, facts: dict[str, Any]) -> str:
    """Say when a network has more numbers than its files can hold; or nothing."""
    try:
        with torch.device("meta"):
            described = cast(UNet2DModel, UNet2DModel.from_config(facts))
    except UNREADABLE as error:
        return f"has a config.json that can not be used ({brief(error)}); download it again"
    numbers = sum(parameter.numel() for parameter in described.parameters())
    size = sum(file.stat().st_size for file in network.glob("*.safetensors"))
    if numbers <= size:
        return ""
    return f"describes {numbers:,} numbers, but its files have {size:,} bytes; download it again"


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
        disable_mmap=True,  # the file may be replaced while this is in use
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
    if problem := beyond(found):
        return problem
    kind = found.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        return f"predicts '{kind}', not noise or velocity; choose another base"
    if found.get("variance_type") == "learned":
        return "predicts variances as such, not between its schedule's; choose another base"
    try:
        return cast(DDIMScheduler, DDIMScheduler.from_config(found))
    except (*UNREADABLE, NotImplementedError) as error:
        return (
            f"has a scheduler_config.json that can not be used ({brief(error)}); download it again"
        )
