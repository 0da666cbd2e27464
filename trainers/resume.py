"""Asking for a run again: whether it goes on, is finished, or something changed."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from .data import PersonalData
from .errors import InputError, brief, printable, reason_of
from .run import FINAL, Run
from .state import State

TOLERANCE = 0.02  # how far encodings may be off, relative: a GPU is not exact
SKETCHED = 16  # numbers of an encoding that are compared
DIGITS = 4  # of them, after the point
UNREADABLE = "the one before has no readable run.json"
BASE = {
    "family": "another family",
    "geometry": "another size",
    "weights": "other weights",
    "patches": "other patches (LoRAs)",
    "all_of_patches": "other patches (LoRAs)",
    "schedule": "another schedule",
}
SINCE = ("all_of_patches", "schedule")  # of the base, that runs of before did not note

Inputs = Mapping[str, Any]  # what run.json holds: the header, the monitor, a sketch of the data
Sketch = dict[str, list[float]]


@dataclass(frozen=True)
class Found:
    """What there is of a run that is asked for.

    run: to go on with, or finished; None: a new one begins. why: what is new about that, or "".
    state: to go on from; None: the run is finished. claim: a lock on a run that goes on.
    """

    run: Run | None = None
    why: str = ""
    state: State | None = None
    claim: FileLock | None = None


def find(root: Path, name: str, inputs: Inputs, defaults: Inputs) -> Found:
    """Look for a run of that name with these inputs.

    defaults: settings of runs from before there was such a setting. Raises InputError when a run
    could go on, but its folder can not be written.
    """
    runs = Run.of_name(root, name)
    told = [compared(run.facts(), inputs, defaults) for run in runs]
    alike = [run for run, changed in zip(runs, told, strict=True) if not changed]
    why = ""
    for run in alike:
        try:
            found = Found(run) if run.ended() in FINAL else claimed(run)
        except OSError as error:
            found = Found(why=f"'{run.name}' can not be read ({reason_of(error)})")
        if found.run is not None:
            return found
        why = why or found.why
    if runs and not alike:
        why = printable(brief("; ".join(told[0]), 1000))
    return Found(why=why)


def claimed(run: Run) -> Found:
    """Take a run that broke off for this process, with its state; say why if that can not be."""
    if link := run.link_out():
        return Found(why=f"'{run.name}' has {brief(link)}, a link that leads out of its folder")
    claim = run.claim()
    if claim is None:
        return Found(why=f"'{run.name}' is being trained by another ComfyUI")
    if run.ended() in FINAL:  # by now
        claim.release()
        return Found(run)
    try:
        if not run.state.is_file():
            raise InputError("name", "broke off before there was anything to go on from.")
        return Found(run, state=State.load(run.state), claim=claim)
    except InputError as error:
        claim.release()
        return Found(why=str(error).replace("'name'", f"'{run.name}'", 1).removesuffix("."))


def compared(before: Inputs, now: Inputs, defaults: Inputs) -> list[str]:
    """Say what differs, as `changes` does, from a run.json that may hold anything."""
    try:
        return changes(before, now, defaults)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError):
        return [UNREADABLE]


def changes(before: Inputs, now: Inputs, defaults: Inputs) -> list[str]:
    """Say what differs, in words of the node's inputs: ["learning_rate was 0.0001, now 0.0002"]."""
    if not before:
        return [UNREADABLE]
    if before.get("method") != now["method"]:
        return [f"the method was {before.get('method')}, now {now['method']}"]
    settings = {**defaults, **before["settings"]}
    told = list(differing(settings, now["settings"]))
    told += (
        of_precision(before, now) if settings["precision"] == now["settings"]["precision"] else []
    )
    told += [f"the base has {other}" for other in of_base(before["base"], now["base"])]
    if before.get("data") != now["data"]:
        told += of_data(before.get("dataset") or {}, now.get("dataset") or {})
    elif "encoded" in before and not near(before["encoded"], now["encoded"]):
        told.append("data was encoded by another CLIP or VAE")
    prompts = ("instance_prompt", "class_prompt")
    told += differing({n: before.get(n) for n in prompts}, {n: now[n] for n in prompts})
    return told + list(of_monitor(before.get("monitor"), now["monitor"]))


def of_precision(before: Inputs, now: Inputs) -> Iterator[str]:
    """Say what 'auto' stood for; runs of before did not note it."""
    used, wanted = before.get("computed_in"), now.get("computed_in")
    if used is not None and used != wanted:
        yield f"the base was in {shown(used)}, now in {shown(wanted)} ('precision' auto)"


def of_versions(before: Inputs, now: Inputs) -> Iterator[str]:
    """Say which versions are others; runs of before did not note them."""
    for name, version in now.items():
        if (other := before.get(name, version)) != version:
            yield f"{name} was {brief(other, 40)}, now {version}"


def of_base(before: Inputs, now: Inputs) -> list[str]:
    """Say what differs between bases, each kind of difference once."""
    noted = [part for part in BASE if part not in SINCE or (part in before and part in now)]
    return list(dict.fromkeys(BASE[p] for p in noted if before.get(p) != now.get(p)))


def of_data(before: Inputs, now: Inputs) -> Iterator[str]:
    """Say what differs between data that is not the same."""
    told = [f"data's {text}" for text in differing(before, now)] if before and now else []
    yield from told or ["data has other pictures or captions"]


def of_monitor(before: Inputs | None, now: Inputs | None) -> Iterator[str]:
    """Say what differs between monitors; None is none."""
    if before is None or now is None:
        if before is not now:
            yield f"a monitor was {'not ' if before is None else ''}connected"
        return
    # what a run of before did not note is taken to be as it is now
    yield from (f"the monitor's {text}" for text in differing({**now, **before}, now))


def differing(before: Inputs, now: Inputs) -> Iterator[str]:
    """Say which values differ."""
    for name in dict.fromkeys([*now, *before]):
        if before.get(name) != now.get(name):
            yield f"{name} was {shown(before.get(name))}, now {shown(now.get(name))}"


def shown(value: Any) -> str:
    """Return a value as people write it."""
    text = f"{value:g}" if isinstance(value, float) else repr(value).replace("None", "not set")
    return brief(text)


def sketch(data: PersonalData) -> Sketch:
    """Return some numbers of what VAE and CLIP made of the first picture of each kind."""
    kinds = {"training": data.training, "held-out": data.held_out, "prior": data.prior}
    found = {"empty text": data.empty.context, "empty pooled": data.empty.pooled}
    for kind, (first, *_) in ((kind, examples) for kind, examples in kinds.items() if examples):
        found |= {f"{kind} latent": first.latent, f"{kind} text": first.context}
    return {name: some_of(tensor.flatten()) for name, tensor in found.items()}


def some_of(numbers: Tensor) -> list[float]:
    """Return numbers (N,) from all over, rounded."""
    places = slice(None, None, max(1, len(numbers) // SKETCHED))
    return [round(float(number), DIGITS) for number in numbers[places][:SKETCHED]]


def near(before: Sketch | list[float], now: Sketch) -> bool:
    """Tell whether two sketches are of the same encodings.

    before: of older runs a list, of the first training picture alone.
    """
    if isinstance(before, list):
        return alike(before, now["training latent"] + now["training text"])
    return before.keys() == now.keys() and all(alike(before[name], now[name]) for name in now)


def alike(before: list[float], now: list[float]) -> bool:
    """Tell whether some numbers of an encoding are those of the same one."""
    most = TOLERANCE * math.hypot(*now) + SKETCHED * 10**-DIGITS
    return len(before) == len(now) and math.dist(before, now) <= most
