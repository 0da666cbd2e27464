"""The path of every user: stock nodes before and after ours, on a real server.

The checkpoint has random weights, but the stock loader takes it for SD 1.5; the photographs are
real ones, of several sizes, one turned by its EXIF note, one with transparent parts.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from headless import Comfy, ComfyServer, Graph, PromptFailed, fill_defaults
from headless.client import Result
from tests import stock
from tests.stock import CHECKPOINT, INPAINTING
from tests.waiting import PATIENCE

pytestmark = pytest.mark.server
METHODS = {
    "LoRA": {},
    "PaRa": {"rank": 2},
    "A3FT": {"gate": "half"},
    "DreamBooth": {"free": "attention", "learning_rate": 1e-3},
}
FOLDER = "photographs"


@dataclass
class Bench:
    """The session's server with a checkpoint and photographs, and prompts run on it."""

    server: ComfyServer
    comfy: Comfy
    known: dict

    def run(self, graph: Graph) -> Result:
        return self.comfy.run(fill_defaults(graph, self.known), timeout=PATIENCE)

    def pictures(self, result: Result, node: str) -> list[np.ndarray]:
        """Return what a node showed, (H, W, 3) uint8 each."""
        files = result.files(node)
        return [np.asarray(self.comfy.image(file).convert("RGB")) for file in files]

    def runs(self) -> list[str]:
        """List the folders of all runs."""
        root = self.server.output_dir / "personalized"
        return sorted(folder.name for folder in root.iterdir()) if root.is_dir() else []


@pytest.fixture(scope="module")
def bench(server: ComfyServer, comfy: Comfy) -> Iterator[Bench]:
    stock.write_checkpoints(server.base / "models" / "checkpoints")
    stock.write_photographs(server.input_dir / FOLDER)
    yield Bench(server, comfy, comfy.object_info())


@dataclass
class Trained:
    """Pictures of one prompt that trained: by the base, by what was learned, by strength 0."""

    graph: Graph
    prompt_id: str
    run: str
    pictures: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def base_before(bench: Bench) -> np.ndarray:
    """A picture of the base before anything was trained."""
    graph = Graph()
    base = stock.load_checkpoint(graph)
    saved = stock.sample(graph, base, (base, 0))
    return bench.pictures(bench.run(graph), saved)[0]


@pytest.fixture(scope="module", params=METHODS)
def trained(request, bench: Bench, base_before: np.ndarray) -> Trained:
    graph = Graph()
    base = stock.load_checkpoint(graph)
    folder = graph.add("PersonalizeImageFolder", folder=FOLDER)
    data = stock.dataset(graph, base, (folder, 0), captions=(folder, 1), hold_out=1)
    how = {"name": f"stock {request.param}", **METHODS[request.param]}
    node = stock.train(graph, request.param, (base, 0), (data, 0), **how)
    models = {"tuned": (node, 0)}
    for name, strength in {"applied": 1.0, "zero": 0.0}.items():
        inputs = {"model": (base, 0), "personalized": (node, 1), "strength": strength}
        models[name] = (graph.add("PersonalizeApply", **inputs), 0)
    saved = {name: stock.sample(graph, base, model) for name, model in models.items()}
    saved["base"] = stock.sample(graph, base, (base, 0), again=True)
    before = set(bench.runs())
    result = bench.run(graph)
    (run,) = set(bench.runs()) - before
    pictures = {name: bench.pictures(result, id)[0] for name, id in saved.items()}
    return Trained(graph, result.prompt_id, run, pictures)


# Promises


def test_training_changes_what_the_stock_sampler_draws(trained, base_before):
    tuned = trained.pictures["tuned"]
    assert tuned.std() > 10  # a picture, not one colour: nothing was infinite on the way
    assert np.abs(tuned.astype(int) - base_before).mean() > 1


def test_what_is_trained_is_what_is_loaded(trained, bench):
    graph = Graph()
    base = stock.load_checkpoint(graph)
    load = graph.add("PersonalizeLoad", model=(base, 0), run=trained.run, checkpoint="last")
    saved = stock.sample(graph, base, (load, 0))
    loaded = bench.pictures(bench.run(graph), saved)[0]
    assert np.array_equal(loaded, trained.pictures["tuned"])
    assert np.array_equal(trained.pictures["applied"], trained.pictures["tuned"])


@pytest.mark.parametrize("trained", ["LoRA"], indirect=True)
def test_a_lora_runs_file_is_an_ordinary_lora_file(trained, bench):
    loras = bench.server.base / "models" / "loras"
    loras.mkdir(exist_ok=True)
    run = bench.server.output_dir / "personalized" / trained.run
    shutil.copyfile(run / "last.safetensors", loras / "mine.safetensors")
    graph = Graph()
    base = stock.load_checkpoint(graph)
    how = {"lora_name": "mine.safetensors", "strength_model": 1.0}
    lora = graph.add("LoraLoaderModelOnly", model=(base, 0), **how)
    saved = stock.sample(graph, base, (lora, 0))
    assert np.array_equal(bench.pictures(bench.run(graph), saved)[0], trained.pictures["tuned"])


def reloaded(bench: Bench, trained: Trained, save: Callable, use: Callable) -> np.ndarray:
    """Return a picture by what an exporting prompt wrote, used in a second prompt.

    save: adds the exporting node, given a graph, the stock loader and Load Personalization.
    use: adds the stock loader of what was written; returns (what has CLIP and VAE, the MODEL).
    """
    graph = Graph()
    base = stock.load_checkpoint(graph)
    load = graph.add("PersonalizeLoad", model=(base, 0), run=trained.run, checkpoint="last")
    save(graph, base, load)
    bench.run(graph)
    graph = Graph()
    saved = stock.sample(graph, *use(graph))
    return bench.pictures(bench.run(graph), saved)[0]


@pytest.mark.parametrize("trained", ["LoRA"], indirect=True)
def test_loaders_of_parts_train_the_same(trained, bench):
    """Load Diffusion Model, Load CLIP and Load VAE, instead of a checkpoint."""
    stock.write_parts(bench.server.base / "models")
    graph = Graph()
    unet = graph.add("UNETLoader", unet_name=stock.PART, weight_dtype="default")
    clip = (graph.add("CLIPLoader", clip_name=stock.PART, type="stable_diffusion"), 0)
    vae = (graph.add("VAELoader", vae_name=stock.PART), 0)
    folder = graph.add("PersonalizeImageFolder", folder=FOLDER)
    pictures = {"images": (folder, 0), "captions": (folder, 1), "hold_out": 1}
    how = {"resolution": 64, "clip": clip, "vae": vae}
    data = graph.add("PersonalizeDataset", **pictures, **how)
    node = stock.train(graph, "LoRA", (unet, 0), (data, 0), name="parts")
    graph.add("PersonalizeExportLoRA", personalized=(node, 1), filename_prefix="parts")
    bench.run(graph)
    file = bench.server.output_dir / "loras" / "parts.safetensors"
    run = bench.server.output_dir / "personalized" / trained.run / "last.safetensors"
    ours, theirs = load_file(file), load_file(run)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


@pytest.mark.parametrize("trained", ["LoRA", "PaRa"], indirect=True)
def test_an_exported_lora_is_listed_and_draws_the_same(trained, bench):
    """Without this pack's nodes: Load LoRA finds it where it lies."""
    name = f"exported {trained.run}"

    def save(graph, base, load):
        how = {"personalized": (load, 2), "model": (base, 0), "filename_prefix": f"mine/{name}"}
        graph.add("PersonalizeExportLoRA", **how)

    def use(graph):
        base = stock.load_checkpoint(graph)
        how = {"lora_name": f"mine/{name}.safetensors", "strength_model": 1.0}
        return base, (graph.add("LoraLoaderModelOnly", model=(base, 0), **how), 0)

    drawn = reloaded(bench, trained, save, use).astype(int)
    assert np.abs(drawn - trained.pictures["tuned"]).max() <= 1  # of PaRa, another rounding


@pytest.mark.parametrize("trained", ["LoRA", "PaRa", "DreamBooth"], indirect=True)
def test_stock_save_checkpoint_writes_what_was_learned(trained, bench):
    def save(graph, base, load):
        parts = {"model": (load, 0), "clip": (base, 1), "vae": (base, 2)}
        graph.add("CheckpointSave", **parts, filename_prefix=f"checkpoints/{trained.run}")

    def use(graph):
        merged = stock.load_checkpoint(graph, f"{trained.run}_00001_.safetensors")
        return merged, (merged, 0)

    assert np.array_equal(reloaded(bench, trained, save, use), trained.pictures["tuned"])


@pytest.mark.parametrize("trained", ["A3FT"], indirect=True)
def test_a_checkpoint_that_would_lack_a3fts_adapter_is_not_written(trained, bench, base_before):
    def save(graph, base, load):
        parts = {"model": (load, 0), "clip": (base, 1), "vae": (base, 2)}
        graph.add("CheckpointSave", **parts, filename_prefix="checkpoints/lacking")

    def use(graph):
        raise AssertionError("it was written")

    with pytest.raises(PromptFailed, match=r"time-aware adapter.*Load Personalization"):
        reloaded(bench, trained, save, use)
    assert not list(bench.server.output_dir.rglob("lacking*"))
    graph = Graph()
    base = stock.load_checkpoint(graph)
    saved = stock.sample(graph, base, (base, 0), again=True)
    assert np.array_equal(bench.pictures(bench.run(graph), saved)[0], base_before)


def test_strength_zero_is_the_base_bit_for_bit(trained, base_before):
    assert np.array_equal(trained.pictures["zero"], base_before)


def test_the_model_that_came_in_is_untouched(trained, base_before):
    assert np.array_equal(trained.pictures["base"], base_before)


def test_an_identical_prompt_is_answered_from_the_cache(trained, bench):
    runs = bench.runs()
    bench.run(trained.graph)  # what ran since may have pushed some of it out of the cache
    again = bench.run(trained.graph)
    cached = [
        e for e in bench.comfy.events("execution_cached") if e["prompt_id"] == again.prompt_id
    ]
    assert set(trained.graph) == {id for event in cached for id in event["nodes"]}
    assert len(bench.runs()) <= len(runs) + 1


# Photographs


def upright() -> dict[str, Image.Image]:
    """What a person sees, by the beginning of the file's name."""
    coffee = stock.photograph("coffee").resize((300, 200))
    cut_out = stock.photograph("chelsea").resize((226, 150))
    cut_out.paste("white", (0, 0, 100, 150))
    astronaut = stock.photograph("astronaut").resize((256, 256))
    return {"a": stock.photograph("chelsea"), "b": astronaut, "c": coffee, "d": cut_out}


def test_pictures_arrive_upright_opaque_and_in_order(bench):
    graph = Graph()
    folder = graph.add("PersonalizeImageFolder", folder=FOLDER)
    shown = graph.add("PreviewImage", images=(folder, 0))
    text = graph.add("PreviewAny", source=(folder, 1))
    result = bench.run(graph)
    for seen, expected in zip(bench.pictures(result, shown), upright().values(), strict=True):
        assert seen.shape == np.asarray(expected).shape
        assert np.abs(seen.astype(int) - np.asarray(expected)).mean() < 6  # JPEG and WebP
    assert result.texts(text)[0] == "a photo of sks cat looking right"


@pytest.mark.parametrize("loader", ["LoadImage", "LoadImageDataSetFromFolder"])
def test_stock_loaders_can_feed_the_dataset(bench, loader):
    """Pictures of different sizes: as a list, or one node each."""
    graph = Graph()
    base = stock.load_checkpoint(graph)
    if loader == "LoadImage":
        names = ["a cat.jpg", "b astronaut.webp", "c coffee.jpg", "d cut-out.png"]
        nodes = [graph.add("LoadImage", image=f"{FOLDER}/{name}") for name in names]
        inputs = {f"inputs.input{i}": (node, 0) for i, node in enumerate(nodes)}
        images = (graph.add("CreateList", **inputs), 0)
    else:
        images = (graph.add(loader, folder=FOLDER), 0)
    data = stock.dataset(graph, base, images, instance_prompt="a photo of sks cat", fit="pad")
    node = stock.train(graph, "LoRA", (base, 0), (data, 0), name="stock loader", steps=2)
    saved = stock.sample(graph, base, (node, 0))
    assert bench.pictures(bench.run(graph), saved)[0].std() > 10


def test_new_pictures_in_the_folder_are_noticed(bench):
    folder = bench.server.input_dir / "growing"
    stock.write_photographs(folder)
    graph = Graph()
    load = graph.add("PersonalizeImageFolder", folder="growing")
    shown = graph.add("PreviewImage", images=(load, 0))
    assert len(bench.run(graph).files(shown)) == 4
    stock.photograph("coffee").save(folder / "e more.png")
    assert len(bench.run(graph).files(shown)) == 5


# Mistakes: one error each, that names node, input, what was got, and what to do


def demo_data(graph: Graph, **inputs) -> tuple[str, str]:
    """Add demo base and dataset; returns their ids."""
    base = graph.add("PersonalizeDemoBase")
    count = inputs.pop("count", 2)
    subject = graph.add("PersonalizeDemoSubject", subject=1, count=count, resolution=64)
    return base, stock.dataset(graph, base, (subject, 0), instance_prompt="a zib totem", **inputs)


def demo_training(graph: Graph, **inputs) -> tuple[str, str]:
    how = {name: inputs.pop(name) for name in ("name", "rank", "steps") if name in inputs}
    base, data = demo_data(graph, **inputs)
    return base, stock.train(graph, "LoRA", (base, 0), (data, 0), **{"name": "demo", **how})


def wrong_caption_count(graph, bench):
    demo_training(graph, captions="one\ntwo\nthree")


def nothing_left_to_train_on(graph, bench):
    demo_training(graph, hold_out=2)


def wrong_size(graph, bench):
    demo_training(graph, fit="as is", resolution=128)


def wrong_multiple(graph, bench):
    demo_training(graph, resolution=72)


def pixels_not_numbers(graph, bench):
    """Multiply latents until they overflow, and subtract them from themselves."""
    base = graph.add("PersonalizeDemoBase")
    subject = graph.add("PersonalizeDemoSubject", subject=1, count=1, resolution=64)
    latent = graph.add("VAEEncode", pixels=(subject, 0), vae=(base, 2))
    for _ in range(45):
        latent = graph.add("LatentMultiply", samples=(latent, 0), multiplier=10.0)
    nan = graph.add("LatentSubtract", samples1=(latent, 0), samples2=(latent, 0))
    images = (graph.add("VAEDecode", samples=(nan, 0), vae=(base, 2)), 0)
    data = stock.dataset(graph, base, images, instance_prompt="a zib totem")
    stock.train(graph, "LoRA", (base, 0), (data, 0), name="demo")


def prior_images_without_a_prompt(graph, bench):
    prior = graph.add("PersonalizeDemoSubject", subject=2, count=2, resolution=64)
    demo_training(graph, prior_images=(prior, 0))


def unknown_family(graph, bench):
    _, data = stock_data(graph)
    inpainting = stock.load_checkpoint(graph, INPAINTING)
    stock.train(graph, "LoRA", (inpainting, 0), (data, 0), name="inpainting")


def data_of_another_base(graph, bench):
    _, data = demo_data(graph)
    base = stock.load_checkpoint(graph)
    stock.train(graph, "LoRA", (base, 0), (data, 0), name="mixed")


def stock_data(graph: Graph) -> tuple[str, str]:
    base = stock.load_checkpoint(graph)
    folder = graph.add("PersonalizeImageFolder", folder=FOLDER)
    return base, stock.dataset(graph, base, (folder, 0), instance_prompt="a cat")


def learned_on_another_base(graph, bench):
    _, trained = demo_training(graph, name="elsewhere")
    base = stock.load_checkpoint(graph)
    applied = graph.add("PersonalizeApply", model=(base, 0), personalized=(trained, 1))
    stock.sample(graph, base, (applied, 0))


def no_such_run(graph, bench):
    base = graph.add("PersonalizeDemoBase")
    load = graph.add("PersonalizeLoad", model=(base, 0), run="nowhere", checkpoint="last")
    stock.sample(graph, base, (load, 0))


def leaves_the_output_folder(graph, bench):
    base = graph.add("PersonalizeDemoBase")
    load = graph.add("PersonalizeLoad", model=(base, 0), run="../../input", checkpoint="last")
    stock.sample(graph, base, (load, 0))


def damaged_checkpoint(graph, bench):
    source = bench.server.output_dir / "personalized" / "mistakes"
    copy = source.with_name("damaged")
    shutil.copytree(source, copy, dirs_exist_ok=True)
    (copy / "last.safetensors").write_bytes((source / "last.safetensors").read_bytes()[:1000])
    base = graph.add("PersonalizeDemoBase")
    load = graph.add("PersonalizeLoad", model=(base, 0), run="damaged", checkpoint="last")
    stock.sample(graph, base, (load, 0))


def name_leaves_the_output_folder(graph, bench):
    demo_training(graph, name="../outside")


def rank_too_high(graph, bench):
    demo_training(graph, rank=1000)


def empty_folder(graph, bench):
    (bench.server.input_dir / "empty").mkdir(exist_ok=True)
    load_folder(graph, "empty")


def folder_outside(graph, bench):
    load_folder(graph, "../output")


def unreadable_files(graph, bench):
    folder = bench.server.input_dir / "broken"
    stock.write_photographs(folder)
    whole = (folder / "a cat.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    (folder / "phone.heic").write_bytes(whole[:20])
    stock.photograph("coffee").resize((32, 32)).save(folder / "thumbnail.png")
    load_folder(graph, "broken")


def load_folder(graph: Graph, name: str) -> None:
    folder = graph.add("PersonalizeImageFolder", folder=name)
    graph.add("PreviewImage", images=(folder, 0))


MISTAKES = {
    wrong_caption_count: r"Personal Dataset: 'captions' has 3 lines for 2 images; give",
    nothing_left_to_train_on: r"Personal Dataset: 'hold_out' is 2 of 2 images.*give at most 1",
    wrong_size: r"Personal Dataset: 'images' has pictures of 64x64.*128x128.*choose",
    wrong_multiple: r"Train LoRA: 'data' has latents.*'resolution' to a multiple of",
    pixels_not_numbers: r"Personal Dataset: 'images' can not be used: image 1 .*NaN.*Replace",
    prior_images_without_a_prompt: r"Personal Dataset: 'class_prompt' is empty.*say what",
    unknown_family: r"Train LoRA: 'model' is SD15 with 9 input channels.*Load such",
    data_of_another_base: r"Train LoRA: 'data' was encoded with text states of width.*768.*give",
    learned_on_another_base: r"Apply Personalization: 'model' does not fit.*Connect",
    no_such_run: r"Load Personalization: 'run' is 'nowhere', but no such run exists.*There are",
    leaves_the_output_folder: r"Load Personalization: 'run' is '../../input', but no such run",
    damaged_checkpoint: r"Load Personalization: 'checkpoint' names last.safetensors.*damaged",
    name_leaves_the_output_folder: r"Train LoRA: 'name' is '../outside'; give up to 80 letters",
    rank_too_high: r"Train LoRA: 'rank' is 1000, but the narrowest layer.*give at most",
    empty_folder: r"Load Personal Images: 'folder' is 'empty', which has no picture.*put PNG",
    folder_outside: r"Load Personal Images: 'folder' is '../output', but .*no such folder.*Put",
    unreadable_files: r"Load Personal Images: 'folder' has 5 of 9 pictures.*Replace or remove",
}


@pytest.fixture(scope="module")
def good_prompt(bench: Bench) -> Graph:
    """A short prompt that works, run once; its run is called "mistakes"."""
    graph = Graph()
    base, trained = demo_training(graph, name="mistakes", steps=1)
    stock.sample(graph, base, (trained, 0))
    bench.run(graph)
    return graph


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_one_clear_error_and_harms_nothing(bench, good_prompt, mistake):
    graph = Graph()
    mistake(graph, bench)
    runs = bench.runs()
    with pytest.raises(PromptFailed) as failure:
        bench.run(graph)
    said = str(failure.value)
    assert re.search(MISTAKES[mistake], said)
    assert said.count(MISTAKES[mistake].split(":")[0]) == 1  # ComfyUI may say it once per input
    left = set(bench.runs()) - {*runs, "elsewhere", "damaged"}  # those two are there to be misused
    assert not left, "a run that could not start left a folder"
    assert bench.run(good_prompt).files()
    assert bench.comfy.get("/queue") == {"queue_running": [], "queue_pending": []}


def test_every_unreadable_file_is_named_once(bench, good_prompt):
    graph = Graph()
    unreadable_files(graph, bench)
    with pytest.raises(PromptFailed) as failure:
        bench.run(graph)
    for name in ("half.jpg", "empty.png", "text.png", "phone.heic", "thumbnail.png"):
        assert str(failure.value).count(name) == 1
    assert "a cat.jpg" not in str(failure.value)


def test_the_checkpoint_is_really_random(bench):
    """Guard the bench: nothing here was downloaded, and it is as small as the loader accepts."""
    path = bench.server.base / "models" / "checkpoints" / CHECKPOINT
    assert 200e6 < path.stat().st_size < 320e6


def test_stock_train_lora_trains_the_demo_base(bench):
    """It trains on a copy that shares nothing, which the MODEL's maker has to give."""
    graph = Graph()
    base, drawn = graph.add("PersonalizeDemoBase"), graph.add("PersonalizeDemoSubject", count=1)
    latents = graph.add("VAEEncode", pixels=(drawn, 0), vae=(base, 2))
    text = graph.add("CLIPTextEncode", clip=(base, 1), text="a zib totem")
    same = {"model": (base, 0), "latents": (latents, 0), "positive": (text, 0)}
    stock_node = graph.add("TrainLoraNode", **same, steps=3, rank=2, training_dtype="fp32")
    graph.add("LossGraphNode", loss=(stock_node, 1), filename_prefix="stock")
    assert bench.run(graph)
