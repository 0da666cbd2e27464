"""A personalisation on disk: edits and a JSON header in one safetensors file."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, get_origin

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .edits import Edit, from_tensors, to_tensors
from .errors import InputError
from .time_aware import TimeAware

FORMAT = 1
HEADER = "personalize"  # key of our JSON in the file's metadata


@dataclass(frozen=True)
class Header:
    """What a file says about itself."""

    method: str
    step: int
    settings: dict[str, Any]
    base: dict[str, Any]  # family, geometry, weights: see nodes/bridge.py
    instance_prompt: str
    class_prompt: str
    data: str  # fingerprint of the training data
    format: int = FORMAT
    run: str = ""  # its folder's name, when it was made


@dataclass(frozen=True)
class Personalization:
    """What a run learned. Keys of `tensors` follow kohya's LoRA naming, so that a LoRA run's file
    is an ordinary LoRA file.
    """

    header: Header
    tensors: dict[str, Tensor]

    @classmethod
    def of(
        cls, header: Header, edits: Mapping[str, Edit | TimeAware], step: int
    ) -> "Personalization":
        """Pack edits as they are after `step` steps."""
        return cls(replace(header, step=step), to_tensors(edits))

    def edits(self, sites: list[str]) -> tuple[dict[str, Edit | TimeAware], list[str]]:
        """Read the edits for a network with `sites`: ({site: edit}, keys without a site).

        Raises InputError when tensors do not belong together.
        """
        try:
            return from_tensors(self.tensors, sites)
        except ValueError as error:
            raise InputError("checkpoint", f"is damaged ({error}); choose another.") from error

    @property
    def parameters(self) -> int:
        """Return how many numbers were learned."""
        return sum(t.numel() for name, t in self.tensors.items() if not name.endswith(".alpha"))

    def save(self, path: Path) -> None:
        """Write the file atomically: it is either whole or not there."""
        metadata = {HEADER: json.dumps(asdict(self.header)), **modelspec(self.header)}
        with atomic(path) as temporary:
            save_file(self.tensors, temporary, metadata)

    @classmethod
    def load(cls, path: Path, input_name: str = "checkpoint") -> "Personalization":
        """Read a file.

        Raises InputError for a missing, damaged, foreign or newer file.
        """
        if not path.is_file():
            raise InputError(input_name, f"names {path.name}, which is not there any more.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            # OSError's own text would show the folder
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(
                input_name, f"names {path.name}, which is damaged ({reason}); choose another."
            ) from error
        header = _read_header(metadata, path.name, input_name)
        if not tensors or not all(tensor.float().isfinite().all() for tensor in tensors.values()):
            reason = "numbers that are not finite" if tensors else "no tensors"
            raise InputError(input_name, f"names {path.name}, which has {reason}; choose another.")
        return cls(header, tensors)


def _read_header(metadata: dict[str, str], file: str, input_name: str) -> Header:
    if HEADER not in metadata:
        raise InputError(
            input_name,
            f"names {file}, which was not made by this pack; load LoRA files with 'Load LoRA'.",
        )
    try:
        values = json.loads(metadata[HEADER])
        if values["format"] > FORMAT:
            raise InputError(
                input_name,
                f"names {file} of format {values['format']}; this version reads up to {FORMAT}. "
                "Update Personalize.",
            )
        return _checked(Header(**values))
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(input_name, f"names {file}, whose header is damaged ({error}).") from error


def _checked(header: Header) -> Header:
    """Raise TypeError or ValueError unless every field is of the kind that it declares."""
    for field in fields(Header):
        kind: Any = get_origin(field.type) or field.type
        value = getattr(header, field.name)
        if type(value) is not kind:
            raise TypeError(f"{field.name} is {type(value).__name__}, not {kind.__name__}")
    if header.step < 0 or header.format < 1:
        raise ValueError(f"step {header.step}, format {header.format}")
    return header


def modelspec(header: Header) -> dict[str, str]:
    """Return the standard metadata that model managers show (modelspec 1.0.1)."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{header.base.get('family', 'unknown')}/{header.method}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": header.instance_prompt,
        "modelspec.trigger_phrase": header.instance_prompt,
        "modelspec.usage_hint": "strength 0 is the base, 1 is as trained",
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path` that replaces it when the block succeeds."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows syncs only what it may write
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
