"""What is compared: a training node and its settings for every row of the table.

All rows share steps, batch size, pictures and seeds. Learning rates are scaled to the demo base:
what was tried is said beside each. It was tried on tuning subjects, which are never reported
(`--tuning` of benchmarks.quality), with seed 0; numbers are their subject similarity.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

TUNING_SUBJECTS = (51, 52)


@dataclass(frozen=True)
class Configuration:
    """One row. `version` is raised when the node's meaning changed, so that cells are made anew."""

    method: str  # "" is the base: nothing is trained
    settings: Mapping[str, Any] = field(default_factory=dict)
    against: str = "lora"  # what its paper compares it with
    version: int = 1


BASE, BASELINE = "base", "lora"


def at_three_rates(name: str, row: Configuration) -> dict[str, Configuration]:
    """Return a row, and the same at half and at twice its learning rate.

    What stays closer to the base than these at equal similarity does more than learn slowly.
    """
    rate = row.settings["learning_rate"]
    factors = {name: 1.0, f"{name}-slow": 0.5, f"{name}-fast": 2.0}
    return {
        each: replace(row, settings={**row.settings, "learning_rate": rate * factor})
        for each, factor in factors.items()
    }


# 200 steps of batch 2; tried: 1e-3 (.38), 2e-3 (.35), 4e-3 (.61, but breaks in longer runs)
LORA = {"learning_rate": 2e-3, "rank": 8}
PARA = {"learning_rate": 3e-3, "rank": 4}  # the demo's; tried: this (.52)
LIKE_PARA = LORA | {"rank": 4, "layers": "all but cross-attention"}  # its rank and its layers
FULL = {"learning_rate": 5e-5}  # ten times the default; tried on the first: this (.70)
ATTENTION = {"learning_rate": 2e-4}  # tried on the first: this (.48)
# gamma is 1 everywhere within 20 steps at the default temperature, which ends the training: the
# losses of the demo base are ten times those of Stable Diffusion. Tried at 50: 2e-3 (.41)
APT = LORA | {"temperature": 50.0, "pad": "edge"}
OFT = {"learning_rate": 1e-3, "over": "oft"}  # tried: this (.36)
ZO = LORA | {"zo_learning_rate": 5e-5}  # tried: this, and 0 (.49 both); 1e-1 breaks

MAIN = {
    BASE: Configuration(""),
    **at_three_rates(BASELINE, Configuration("lora", LORA)),
    "apt": Configuration("apt", APT, against="apt-ata-rs"),
    "bnn-0": Configuration("bnn", LORA | {"sigma": 0.0}),  # its wide random A without noise
    "bnn": Configuration("bnn", LORA, against="bnn-0"),
    "para": Configuration("para", PARA, against="lora-like-para"),
    "selective_zo": Configuration("selective_zo", ZO, against="selective_zo-still"),
    "dreambooth": Configuration("dreambooth", FULL),
    "attention": Configuration("attention", ATTENTION),
    "a3ft": Configuration("a3ft", ATTENTION, against="attention"),
}
ABLATIONS = {
    "apt-ata": Configuration("apt", APT | {"stabilize": False, "align": False}),
    "apt-ata-rs": Configuration("apt", APT | {"align": False}, against="apt-ata"),
    "bnn-large-sigma": Configuration("bnn", LORA | {"sigma": 0.3}, against="bnn"),
    "bnn-full": Configuration("bnn", FULL | {"over": "full"}, against="dreambooth"),
    "oft": Configuration("bnn", OFT | {"sigma": 0.0}),
    "bnn-oft": Configuration("bnn", OFT, against="oft"),
    "para-2": Configuration("para", PARA | {"rank": 2}, against="para"),
    "para-8": Configuration("para", PARA | {"rank": 8}, against="para"),
    **at_three_rates("para", MAIN["para"]),
    **at_three_rates("lora-like-para", Configuration("lora", LIKE_PARA)),
    "selective_zo-still": Configuration("selective_zo", ZO | {"zo_learning_rate": 0.0}),
    "bp-low": Configuration("selective_zo", ZO | {"branches": "bp-low"}, against="selective_zo"),
    "zo-high": Configuration("selective_zo", ZO | {"branches": "zo-high"}, against="selective_zo"),
    "bp-high": Configuration("selective_zo", ZO | {"branches": "bp-high"}, against="selective_zo"),
}
# BP-low alone in the first sixteenth of the steps, then ZO-high alone: for thousands of steps
PHASES = ZO | {"kappa": 1000.0, "threshold_start": 20.0, "threshold_end": -297.0}
IF_NAMED = {
    "bp-low-then-still": Configuration("selective_zo", PHASES | {"zo_learning_rate": 0.0}),
    # tried on the first, at 8,000 steps: this (.69); at 3e-2 the loss rises
    "bp-low-then-zo-high": Configuration(
        "selective_zo", PHASES | {"zo_learning_rate": 1e-2}, against="bp-low-then-still"
    ),
}
CONFIGURATIONS = MAIN | ABLATIONS | IF_NAMED


def configuration(name: str) -> Configuration:
    """Return a row by its name, or one that differs: `lora@rank=2+learning_rate=1e-4`.

    Raises KeyError for a name that is not there.
    """
    known, _, changes = name.partition("@")
    found = CONFIGURATIONS[known]
    if not changes:
        return found
    settings = dict(found.settings)
    for change in changes.split("+"):
        key, _, text = change.partition("=")
        try:
            settings[key] = json.loads(text)
        except json.JSONDecodeError:
            settings[key] = text
    return replace(found, settings=settings, against=known)
