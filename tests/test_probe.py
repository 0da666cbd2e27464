"""What is trained is what is loaded, through the process of a real ComfyUI: tests/probe/."""

import json
from pathlib import Path

import pytest

from headless import Comfy, ComfyServer, Graph, fill_defaults
from headless.server import PACK
from personalize.trainers.methods import METHODS
from tests.waiting import PATIENCE

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def probing():
    packs = [PACK, Path(__file__).parent / "probe"]
    with (
        ComfyServer(packs=packs, cpu=True, env={"OMP_NUM_THREADS": "1"}) as server,
        Comfy(server.url, timeout=PATIENCE) as comfy,
    ):
        yield comfy


@pytest.mark.parametrize("method", METHODS)
def test_the_model_computes_what_the_trainer_computed(probing, method):
    graph = Graph()
    base = graph.add("PersonalizeDemoBase")
    drawn = graph.add("PersonalizeDemoSubject", count=2, resolution=64)
    wires = {"clip": (base, 1), "vae": (base, 2), "images": (drawn, 0), "captions": (drawn, 1)}
    data = graph.add("PersonalizeDataset", resolution=64, **wires)
    probe = graph.add("PersonalizeProbe", model=(base, 0), data=(data, 0), method=method)
    result = probing.run(fill_defaults(graph, probing.object_info()))
    found = json.loads(result.texts(probe)[0])
    assert found["trained - loaded"] <= 1e-4 * found["scale"]
    assert found["trained - base"] >= 1e-2 * found["scale"]  # it learned something
    assert found["strength 0 - base"] == 0.0
