"""What users get from the registry works without the rest of the checkout."""

import shutil

from headless import Comfy, ComfyServer, Graph, fill_defaults
from tests.published import ROOT, published_files
from tests.waiting import PATIENCE

LISTS = {"run", "checkpoint", "folder", "base"}  # inputs whose choices are the files there are


def without_lists(node: dict) -> dict:
    """Return a node's description without what lists the files that are there."""
    groups = node["input"].values()
    inputs = {name: given for group in groups for name, given in group.items()}
    kept = {n: given for n, given in inputs.items() if n not in LISTS}
    return node | {"input": kept}


def test_the_published_files_alone_are_the_pack(tmp_path, object_info):
    pack = tmp_path / "personalize"
    for path in published_files():
        (pack / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, pack / path)
    with (
        ComfyServer(packs=[pack], cpu=True, env={"OMP_NUM_THREADS": "1"}) as server,
        Comfy(server.url, timeout=PATIENCE) as comfy,
    ):
        known = comfy.object_info()
        assert all(
            without_lists(known[id]) == without_lists(node) for id, node in object_info.items()
        )
        ours = {id for id, node in known.items() if "personalize" in node["python_module"]}
        assert ours == object_info.keys()
        graph = Graph()
        base = graph.add("PersonalizeDemoBase")
        picture = graph.add("PersonalizeDemoSubject", count=1)
        latent = graph.add("VAEEncode", pixels=(picture, 0), vae=(base, 2))
        text = graph.add("CLIPTextEncode", clip=(base, 1), text="a totem")
        words = {"positive": (text, 0), "negative": (text, 0), "latent_image": (latent, 0)}
        how = {"seed": 1, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal"}
        sampled = graph.add("KSampler", model=(base, 0), **words, **how)
        decoded = graph.add("VAEDecode", samples=(sampled, 0), vae=(base, 2))
        graph.add("PreviewImage", images=(decoded, 0))
        (file,) = comfy.run(fill_defaults(graph, known)).files()
        assert comfy.image(file).size == (128, 128)


def test_the_large_files_that_are_published_are_the_two_bases_alone():
    large = [path for path in published_files() if (ROOT / path).stat().st_size > 1_000_000]
    bases = ["base.safetensors", "pixel_base/unet/diffusion_pytorch_model.safetensors"]
    assert [path.as_posix() for path in large] == [f"demo/{base}" for base in bases]
