"""ComfyUI in this process, for measurements that a server's graph can not make."""

import importlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headless import find_comfyui

from . import ROOT


@contextmanager
def comfyui(cpu: bool, torch_attention: bool = False) -> Iterator[None]:
    """Inside, `import comfy` finds ComfyUI, whose own folders are temporary.

    The checkout leaves the path for good: its `nodes/` would hide ComfyUI's `nodes.py`.
    torch_attention: as with --use-pytorch-cross-attention, which is how it is on a GPU anyway.
    """
    if "comfy" in sys.modules:  # it is here already, in tests
        yield
        return
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    sys.path.append(str(find_comfyui()))
    importlib.import_module("utils.extra_config")  # first, as in main.py: nodes.py hides it
    importlib.import_module("comfy.options").enable_args_parsing(False)
    arguments = importlib.import_module("comfy.cli_args").args
    with tempfile.TemporaryDirectory(prefix="personalize-speed-") as folder:
        arguments.cpu, arguments.base_directory = cpu, folder
        arguments.use_pytorch_cross_attention = torch_attention
        yield
