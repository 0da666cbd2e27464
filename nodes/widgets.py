"""Node inputs made from settings, which are declared once."""

import dataclasses
from typing import Any

from comfy_api.latest import io

WIDGETS = {int: io.Int, float: io.Float, bool: io.Boolean}


def widget(spec: dataclasses.Field) -> Any:
    """Turn a setting into a node input."""
    options = dict(spec.metadata)
    help_text, choices = options.pop("help"), options.pop("choices", None)
    common = {"tooltip": help_text, "default": spec.default, "advanced": options.pop("advanced")}
    if choices is not None:
        return io.Combo.Input(spec.name, options=list(choices), **common)
    if spec.name == "seed":  # else the page draws a new one, and trains anew, at every queueing
        options["control_after_generate"] = False
    if isinstance(spec.default, float):
        options["round"] = False
    return WIDGETS[type(spec.default)].Input(spec.name, **common, **options)
