"""Asking for a run again: whether it goes on, is finished, or something changed."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from .data import PersonalData
from .errors import InputError
from .run import FINAL, Run
from .state import State

TOLERANCE = 0.02  # how far encodings may be off, relative: a GPU is not exact
SKETCHED = 16  # numbers of an encoding that are compared
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
    alike = [run for run in runs if not changes(run.facts(), inputs, defaults)]
    why = ""
    for run in alike:
        if run.ended() in FINAL:
            return Found(run)
        found = claimed(run)
        if found.run is not None:
            return found
        why = why or found.why
    if runs and not alike:
        why = "; ".join(changes(runs[0].facts(), inputs, defaults))
    return Found(why=why)


def claimed(run: Run) -> Found:
    """Take a run that broke off for this process, with its state; say why if that can not be."""
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


def changes(before: Inputs, now: Inputs, defaults: Inputs) -> list[str]:
    """Say what differs, in words of the node's inputs: ["learning_rate was 0.0001, now 0.0002"]."""
    if not before:
        return ["the one before has no readable run.json"]
    if before.get("method") != now["method"]:
        return [f"the method was {before.get('method')}, now {now['method']}"]
    told = list(differing(dict(defaults) | (before.get("settings") or {}), now["settings"]))
    base = before.get("base") or {}
    told += [f"the base has {other}" for other in of_base(base, now["base"])]
    if before.get("data") != now["data"]:
        told += of_data(before.get("dataset") or {}, now.get("dataset") or {})
    elif "encoded" in before and not near(before["encoded"], now["encoded"]):
        told.append("data was encoded by another CLIP or VAE")
    prompts = ("instance_prompt", "class_prompt")
    told += differing({n: before.get(n) for n in prompts}, {n: now[n] for n in prompts})
    return told + list(of_monitor(before.get("monitor"), now["monitor"]))


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
    yield from (f"the monitor's {text}" for text in differing(before, now))


def differing(before: Inputs, now: Inputs) -> Iterator[str]:
    """Say which values differ."""
    for name in dict.fromkeys([*now, *before]):
        if before.get(name) != now.get(name):
            yield f"{name} was {shown(before.get(name))}, now {shown(now.get(name))}"


def shown(value: Any) -> str:
    """Return a value as people write it."""
    return f"{value:g}" if isinstance(value, float) else repr(value).replace("None", "not set")


def sketch(data: PersonalData) -> list[float]:
    """Return some numbers of the first picture's latent and text states."""
    first = data.training[0]
    return [
        round(float(number), 4)
        for tensor in (first.latent.flatten(), first.context.flatten())
        for number in tensor[:: max(1, tensor.numel() // SKETCHED)][:SKETCHED]
    ]


def near(before: list[float], now: list[float]) -> bool:
    """Tell whether two sketches are of the same encodings."""
    return len(before) == len(now) and math.dist(before, now) <= TOLERANCE * math.hypot(*now)
