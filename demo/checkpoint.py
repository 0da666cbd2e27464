"""Save and resume a training run: safetensors only, no pickle."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn


def _optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimiser.state_dict()["state"]
    return {
        f"optimiser.{i}.{k}": torch.as_tensor(v) for i, s in state.items() for k, v in s.items()
    }


def save_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer, facts: dict
) -> None:
    """Write modules, optimiser state and JSON-able facts ("step" among them) in one move."""
    tensors = _optimiser_tensors(optimiser)
    for name, module in modules.items():
        tensors |= {f"{name}.{k}": v for k, v in module.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    tensors = {k: v.detach().contiguous().clone() for k, v in tensors.items()}
    save_file(tensors, unfinished, {"facts": json.dumps(facts)})
    os.replace(unfinished, path)


def resume_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer | None = None
) -> dict:
    """Load what `save_checkpoint` wrote, if it exists; return its facts or {"step": 0}."""
    if not path.exists():
        return {"step": 0}
    tensors = load_file(path)
    for name, module in modules.items():
        start = len(name) + 1
        own = {k[start:]: v for k, v in tensors.items() if k.startswith(f"{name}.")}
        module.load_state_dict(own)
    if optimiser is not None:
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimiser."):
                _, index, field = key.split(".")
                state.setdefault(int(index), {})[field] = value
        optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["facts"])
