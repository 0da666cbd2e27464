"""Node inputs made from settings, which are declared once."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..trainers.errors import InputError
from ..trainers.settings import check_value

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


def check_widgets(node: type[io.ComfyNode], given: Mapping[str, Any]) -> None:
    """Raise InputError for values that a node's widgets would not take: a link may bring any."""
    schema = node.define_schema()
    for spec in schema.inputs:
        if spec.id not in given:
            continue
        values = given[spec.id] if schema.is_input_list else [given[spec.id]]
        if not values:
            raise InputError(spec.id, "is an empty list; connect what gives one value, or more.")
        for value in values:
            check_widget(spec, value)


def check_widget(spec: Any, value: Any) -> None:
    """Raise InputError for a value that a widget would not take."""
    if isinstance(spec, io.Combo.Input):
        check_value(spec.id, value, str, choices=[str(option) for option in spec.options or ()])
    elif isinstance(spec, io.Int.Input):
        check_value(spec.id, value, int, spec.min, spec.max)
    elif isinstance(spec, io.Float.Input):
        check_value(spec.id, value, float, spec.min, spec.max)
    elif isinstance(spec, io.Boolean.Input):
        check_value(spec.id, value, bool)
    elif isinstance(spec, io.String.Input):
        check_value(spec.id, value, str)
