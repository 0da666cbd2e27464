"""The state of a run on disk: what it takes to go on, bit for bit, as if it had never stopped.

One safetensors file: tensors by name, all else as JSON in its header. What follows from seed and
step is not kept: the schedule, and all that is drawn.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .artifact import UNREADABLE, atomic, check_kinds, unmapped
from .errors import InputError, brief
from .health import Health
from .versions import versions

FORMAT = 1
HEADER = "personalize-state"  # key of our JSON in the file's metadata
SHAPES = {"tuple": tuple, "list": list, "map": dict}


@dataclass(frozen=True)
class Done:
    """What one optimiser step did."""

    index: int  # 1 for the first
    loss: float  # NaN when it, or its gradient, was not finite: then nothing moved
    learning_rate: float
    gradient_norm: float  # before clipping; NaN: not known
    facts: dict[str, float]  # what the method has to tell besides, by name


@dataclass(frozen=True)
class State:
    """A run after a step, on the CPU and on its own: later steps do not move it."""

    done: Done
    health: Health
    parameters: dict[str, Tensor]  # fp32, by name in the network
    average: dict[str, Any]  # of the parameters, and over how many steps; {} without one
    optimizer: dict[str, Any]  # its state_dict
    method: dict[str, Any]  # its state_dict
    versions: dict[str, str] = field(default_factory=versions)  # it was made with

    def save(self, path: Path) -> None:
        """Write the file atomically. Raises InputError for what no file of this kind can hold."""
        tensors: dict[str, Tensor] = {}
        values = {**vars(self), "done": vars(self.done), "health": vars(self.health)}
        header = {"format": FORMAT, "versions": values.pop("versions")}
        header["values"] = {name: pack(value, name, tensors) for name, value in values.items()}
        metadata = {HEADER: json.dumps(header)}
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: Path) -> "State":
        """Read a file. Raises InputError when it is missing, damaged or of a newer version."""
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[HEADER])
                tensors = unmapped(file)
            if header["format"] > FORMAT:
                raise InputError(
                    "name", f"has a state of format {header['format']}; update Personalize."
                )
            values = {name: unpack(value, tensors) for name, value in header["values"].items()}
            done, health = Done(**values.pop("done")), Health(**values.pop("health"))
            made_with = {str(k): str(v) for k, v in header.get("versions", {}).items()}
            state = cls(done=done, health=health, versions=made_with, **values)
            for record in (done, health, state):
                check_kinds(record)
            if done.index < 1:
                raise ValueError(f"step {done.index}")
            return state
        except InputError:
            raise
        except (*UNREADABLE, AttributeError, LookupError) as error:
            reason = error.strerror if isinstance(error, OSError) else brief(error)
            raise InputError("name", f"has a state that can not be read ({reason}).") from error


def pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return a nested value as JSON; its tensors go into `tensors`, under their paths."""
    if torch.is_tensor(value):
        tensors[path] = value.contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        items = [[key, pack(inner, f"{path}.{key}", tensors)] for key, inner in value.items()]
        return {"map": items}
    if isinstance(value, (list, tuple)):
        items = [pack(inner, f"{path}.{i}", tensors) for i, inner in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InputError(
        "optimizer",
        f"keeps a {type(value).__name__} ({path}), which a state can not; take another.",
    )


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return what was packed. Raises KeyError or ValueError where it is damaged."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "map":
        return {key: unpack(item, tensors) for key, item in inner}
    return SHAPES[kind](unpack(item, tensors) for item in inner)


def copied(value: Any) -> Any:
    """Copy a nested value; its tensors come to the CPU."""
    if torch.is_tensor(value):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copied(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(inner) for inner in value)
    return value


def finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether all numbers are finite."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
