"""A personalisation on disk: edits and a JSON header in one safetensors file."""

import glob
import json
import math
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, get_origin

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .edits import Edit, from_tensors, to_tensors
from .errors import DiskError, InputError, brief, reason_of
from .time_aware import TimeAware

FORMAT = 1
HEADER = "personalize"  # key of our JSON in the file's metadata
NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # that a file may hold
LARGEST = 1e12  # that a file may hold: products of two stay far from what fp32 can not hold
MOST_STEPS = 10**12
PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8) if os.name == "nt" else ()  # seconds between tries to replace
LEFT_BEHIND = 3600  # seconds after which a temporary file is nobody's any more
UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, RuntimeError, MemoryError)


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
            path.open("rb").close()  # says why not, where safetensors says that there is no file
            with safe_open(path, framework="pt") as file:
                header = _read_header(file.metadata() or {}, path.name, input_name)
                tensors = unmapped(file)
        except InputError:
            raise
        except UNREADABLE as error:
            raise InputError(
                input_name,
                f"names {path.name}, which is damaged ({reason_of(error)}); choose another.",
            ) from error
        if problem := _wrong_numbers(tensors):
            raise InputError(input_name, f"names {path.name}, which has {problem}; choose another.")
        return cls(header, tensors)


def unmapped(file: Any) -> dict[str, Tensor]:
    """Read the tensors of an open safetensors file into memory of their own.

    As they come they are views of the file: cutting it would kill this process, and on Windows
    nobody could replace it.
    """
    return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def _wrong_numbers(tensors: Mapping[str, Tensor]) -> str:
    """Say what of a file's tensors can not have been learned; or nothing."""
    if not tensors:
        return "no tensors"
    kinds = {
        str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.dtype not in NUMBERS
    }
    if kinds:
        return f"numbers of type {', '.join(sorted(kinds))}"
    largest = [float(tensor.abs().max()) for tensor in tensors.values() if tensor.numel()]
    if not all(map(math.isfinite, largest)):  # NaN is the maximum of what holds one
        return "numbers that are not finite"
    return f"numbers as large as {max(largest):.1g}" if max(largest, default=0.0) > LARGEST else ""


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
                f"names {file} of format {brief(values['format'], 40)}; this version reads up to "
                f"{FORMAT}. Update Personalize.",
            )
        return _checked(Header(**values))
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            input_name, f"names {file}, whose header is damaged ({brief(error)}); choose another."
        ) from error


def _checked(header: Header) -> Header:
    """Raise TypeError or ValueError unless a header can be one."""
    check_kinds(header)
    if not 0 <= header.step <= MOST_STEPS or header.format < 1:
        raise ValueError(f"step {header.step}, format {header.format}")
    return header


def check_kinds(record: Any) -> None:
    """Raise TypeError unless every field of a dataclass is of the kind that it declares."""
    for field in fields(record):
        kind: Any = get_origin(field.type) or field.type
        value = getattr(record, field.name)
        if type(value) not in ((int, float) if kind is float else (kind,)):
            raise TypeError(f"{field.name} is {type(value).__name__}, not {kind.__name__}")


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
    """Give a temporary file beside `path` that replaces it when the block succeeds.

    Raises DiskError when it can not be written; `path` is then as it was before.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        mode = _mode_of_new(temporary)
        yield temporary
        os.chmod(temporary, mode)  # safetensors lets only the owner read
        with open(temporary, "r+b") as file:  # Windows syncs only what it may write
            os.fsync(file.fileno())
        patiently(lambda: os.replace(temporary, path))
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise DiskError(path.name, reason_of(error)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
            _remove_left_behind(path)


def patiently(work: Callable[[], None]) -> None:
    """Do it again after a moment while Windows refuses, as it does for a file that is read now."""
    for seconds in PAUSES:
        try:
            return work()
        except PermissionError:
            time.sleep(seconds)
    work()


def sync_folder(folder: Path) -> None:
    """Let a new name survive a power cut, where the system can: not on Windows."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _mode_of_new(path: Path) -> int:
    """Return the permissions that a new file gets here."""
    path.touch()
    mode = path.stat().st_mode
    path.unlink()
    return stat.S_IMODE(mode)


def _remove_left_behind(path: Path) -> None:
    """Delete what killed processes left of earlier tries, ours and safetensors' own."""
    ours = path.parent.glob(f".{glob.escape(path.name)}.*.tmp")
    for left in (*ours, *path.parent.glob(".tmp??????")):
        if time.time() - left.stat().st_mtime > LEFT_BEHIND:
            left.unlink(missing_ok=True)
