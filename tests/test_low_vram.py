"""ComfyUI's way with little memory: a patch is rebuilt from its parts whenever a weight is used."""

import comfy.lora
import pytest
import torch
from comfy.model_patcher import LowVramPatch

from personalize.nodes import bridge, load
from personalize.trainers.methods import METHODS
from tests.test_load import train_on
from tests.tiny import comfy_model


@pytest.fixture(scope="module", params=METHODS)
def patched(request):
    """A MODEL with what a method learned, and a second strength of it on top."""
    base = comfy_model()
    learned, _ = train_on(base, METHODS[request.param])
    once, _ = load.personalize(base, learned, 1.0)
    return load.personalize(once, learned, 0.5)[0]


def plain_weight(model, key: str) -> torch.Tensor:
    return bridge.own_weights(model)[key.removeprefix(bridge.PREFIX)].detach().clone()


@pytest.mark.parametrize("gathered", [True, False], ids=["copied into a buffer", "where it is"])
def test_a_rebuilt_patch_gives_the_same_weight(patched, gathered):
    for key, patches in patched.patches.items():
        lazy = LowVramPatch(key, patched.patches)
        size = lazy.memory_required()
        assert size > 0, "ComfyUI sees no tensor that it could move"
        lazy.prepare(torch.zeros(size, dtype=torch.uint8) if gathered else None, None)
        assert lazy.prepared_patches is not None
        expected = comfy.lora.calculate_weight(patches, plain_weight(patched, key), key)
        assert not torch.equal(expected, plain_weight(patched, key))
        assert torch.equal(lazy(plain_weight(patched, key)), expected), key
