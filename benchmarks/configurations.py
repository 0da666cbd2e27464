"""What is compared: a training node and its settings for every row of the table.

All rows share steps, batch size, pictures and seeds. Learning rates are scaled to the demo base:
what was tried is said beside each, always on tuning subjects that are never reported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
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
LORA = {"learning_rate": 1e-3, "rank": 8}
PARA = {"learning_rate": 3e-3}

MAIN = {
    BASE: Configuration(""),
    BASELINE: Configuration("lora", LORA),
    "para": Configuration("para", PARA | {"rank": 4}),
    "dreambooth": Configuration("dreambooth", {"learning_rate": 5e-5}),
    "attention": Configuration("attention", {"learning_rate": 2e-4}),
}
ABLATIONS = {
    "para-2": Configuration("para", PARA | {"rank": 2}, against="para"),
    "para-8": Configuration("para", PARA | {"rank": 8}, against="para"),
    "para-16": Configuration("para", PARA | {"rank": 16}, against="para"),
}
CONFIGURATIONS = MAIN | ABLATIONS
