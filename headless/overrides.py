"""Apply `node.input=value` to a workflow in API format."""

import copy
import json
from collections.abc import Iterable
from typing import Any


class OverrideError(ValueError):
    """An override names what is not there, or gives a value of the wrong type."""


def apply_overrides(
    prompt: dict[str, dict[str, Any]],
    overrides: Iterable[str],
    object_info: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return a copy of `prompt` with the overrides in it.

    A node is named by its id, its title or its class_type; the last two must be unique.
    Values are read as JSON, else as text. `object_info` lets types and choices be checked.
    """
    prompt = copy.deepcopy(prompt)
    for override in overrides:
        target, equals, text = override.partition("=")
        if not equals:
            raise OverrideError(f"'{override}' is not of the form node.input=value")
        id, name = _find_node(prompt, target)
        spec = _input_spec(prompt[id], name, object_info or {})
        prompt[id]["inputs"][name] = _value(text, spec, target)
    return prompt


def fill_defaults(
    prompt: dict[str, dict[str, Any]], object_info: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return a copy of `prompt` in which absent required inputs have their declared defaults.

    ComfyUI's page does the same, so a saved workflow outlives the settings added after it.
    """
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        required = object_info.get(node["class_type"], {}).get("input", {}).get("required", {})
        node["inputs"] = {name: _default(spec) for name, spec in required.items()} | node["inputs"]
        node["inputs"] = {k: v for k, v in node["inputs"].items() if v is not None}
    return prompt


def _default(spec: list[Any]) -> Any:
    """Return the default of an input; None for wires, and for nested ones (their keys differ)."""
    kind, choices = _kind(spec)
    options = spec[1] if len(spec) > 1 else {}
    if choices and not isinstance(choices[0], dict):
        return options.get("default", choices[0])
    return options.get("default") if kind in ("INT", "FLOAT", "STRING", "BOOLEAN") else None


def names(id: str, node: dict[str, Any]) -> set[str]:
    """Return what a node may be called by."""
    title = node.get("_meta", {}).get("title")
    return {id, node["class_type"], *([title] if title else [])}


def _find_node(prompt: dict[str, dict[str, Any]], target: str) -> tuple[str, str]:
    """Split `target` into (node id, input name); both may contain dots, an id comes first."""
    hits = {
        (id, target[len(name) + 1 :])
        for id, node in prompt.items()
        for name in names(id, node)
        if target.startswith(name + ".") and len(target) > len(name) + 1
    }
    by_id = [hit for hit in hits if target.startswith(hit[0] + ".")]
    found = by_id or sorted(hits)
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(id for id, _ in found)
        raise OverrideError(f"'{target}' fits nodes {ids}; name one by its id")
    raise OverrideError(f"No node for '{target}'. The workflow has:\n{describe(prompt)}")


def describe(prompt: dict[str, dict[str, Any]]) -> str:
    """List nodes and inputs, one node a line."""
    return "\n".join(
        f"  {id}  {' / '.join(sorted(names(id, node) - {id}))}: {', '.join(node['inputs'])}"
        for id, node in prompt.items()
    )


def _input_spec(node: dict[str, Any], name: str, object_info: dict[str, Any]) -> list[Any] | None:
    """Return [type, options] of an input when the server tells; refuse unknown names."""
    declared: dict[str, Any] = {}
    for group in object_info.get(node["class_type"], {}).get("input", {}).values():
        declared |= group if isinstance(group, dict) else {}
    if name not in declared and name not in node["inputs"]:
        known = ", ".join(dict.fromkeys([*node["inputs"], *declared]))
        raise OverrideError(f"{node['class_type']} has no input '{name}'; it has: {known}")
    return declared.get(name)


def _value(text: str, spec: list[Any] | None, target: str) -> Any:
    kind, choices = _kind(spec)
    if kind == "STRING":
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    if choices is not None:
        return _choice(value, text, choices, target)
    wanted = {"INT": int, "FLOAT": (int, float), "BOOLEAN": bool}.get(kind)
    is_wrong_bool = isinstance(value, bool) and kind != "BOOLEAN"
    if wanted is not None and (not isinstance(value, wanted) or is_wrong_bool):
        raise OverrideError(f"{target}={text}: expected {kind}")
    return value


def _kind(spec: list[Any] | None) -> tuple[str, list[Any] | None]:
    """Return (type name, choices or None); a combo is a list of choices or "COMBO"."""
    if spec is None:
        return "", None
    if isinstance(spec[0], list):
        return "COMBO", spec[0]
    options = spec[1].get("options") if spec[0] == "COMBO" and len(spec) > 1 else None
    return spec[0], options


def _choice(value: Any, text: str, choices: list[Any], target: str) -> Any:
    for candidate in (value, text):
        if candidate in choices:
            return candidate
    shown = ", ".join(map(str, choices[:20])) + (", …" if len(choices) > 20 else "")
    raise OverrideError(f"{target}={text}: expected one of {shown}")
