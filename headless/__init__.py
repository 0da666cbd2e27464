"""Drive ComfyUI without a browser: start a server, queue workflows, collect what they make.

Not part of the pack at run time: `nodes/` and `trainers/` never import it.
"""

from .client import Comfy, Progress, PromptFailed, Result
from .graph import Graph
from .overrides import OverrideError, apply_overrides, fill_defaults
from .server import ComfyServer, ServerError, find_comfyui

__all__ = [
    "Comfy",
    "ComfyServer",
    "Graph",
    "OverrideError",
    "Progress",
    "PromptFailed",
    "Result",
    "ServerError",
    "apply_overrides",
    "fill_defaults",
    "find_comfyui",
]
