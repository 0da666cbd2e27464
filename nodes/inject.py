"""A MODEL that carries modules besides its weights: injected when ComfyUI loads it."""

import secrets
import weakref
from collections.abc import Mapping
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import PatcherInjection
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..trainers.time_aware import TimeAware

TIME_EMBEDDING = "time_embed"  # in ComfyUI's U-Nets


def add_time_aware(
    model: ModelPatcher, adapter: TimeAware, outputs: Mapping[str, str], strength: float
) -> None:
    """Make a MODEL (a clone of your own) carry an adapter; ComfyUI moves it to the device.

    outputs: {block: path of its output projection in ComfyUI's U-Net}. Several may be carried, each
    under a key of its own: the one that was added first sees the base's features.
    """
    key = f"personalize time-aware adapter {secrets.token_hex(4)}"
    hooks = Hooks(adapter, outputs, strength)
    model.set_injections(key, [PatcherInjection(inject=hooks.put_in, eject=hooks.take_out)])
    patcher = ModelPatcher(adapter, model.load_device, model.offload_device)
    model.set_additional_models(key, [patcher])
    model.add_object_patch("model_config.process_unet_state_dict_for_saving", refuse_saving)


def refuse_saving(_: Any) -> None:
    """Keep Save Checkpoint and its like from writing files that lack the adapter."""
    raise ValueError(
        "The model carries A3FT's time-aware adapter: modules that join the network, which no "
        "checkpoint holds. Keep the run instead, and load it with Load Personalization; or train "
        "with 'mode' attention, whose weights can be saved."
    )


class Hooks:
    """One adapter's hooks in the U-Nets that it was injected into.

    Clones of a MODEL share its U-Net and this object; and a clone of a loaded MODEL believes that
    it is injected itself. So hooks belong to the clone that put them in: only it, its end, or
    the next clone that is loaded takes them out.
    """

    def __init__(self, adapter: TimeAware, outputs: Mapping[str, str], strength: float):
        self.adapter = adapter
        self.outputs = outputs
        self.strength = strength
        self.live: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[RemovableHandle]]]
        self.live = weakref.WeakKeyDictionary()  # U-Net -> (id of the clone, its hooks)

    def put_in(self, model: ModelPatcher) -> None:
        unet = model.model.diffusion_model
        _, before = self.live.get(unet, (0, []))
        remove(before)
        layers = {block: unet.get_submodule(path) for block, path in self.outputs.items()}
        handles = self.adapter.attach(layers, unet.get_submodule(TIME_EMBEDDING), self.strength)
        self.live[unet] = id(model), handles
        # ComfyUI ejects no MODEL that is gone, and goes on with the U-Net as it is
        weakref.finalize(model, remove, handles).atexit = False

    def take_out(self, model: ModelPatcher) -> None:
        owner, handles = self.live.get(model.model.diffusion_model, (0, []))
        if owner == id(model):
            remove(handles)


def remove(handles: list[RemovableHandle]) -> None:
    """Take hooks out of their modules; again is harmless."""
    for handle in handles:
        handle.remove()
