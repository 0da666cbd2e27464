"""LoRA files for others: stock ComfyUI and diffusers make of them what our own loader makes."""

import logging
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import comfy.sd
import folder_paths
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from personalize.nodes import bridge, load
from personalize.nodes.export import ExportLoRA
from personalize.trainers.artifact import Header, Personalization
from personalize.trainers.edits import Difference, LowRank, RankReduction, Rotation
from personalize.trainers.errors import InputError
from personalize.trainers.export import as_lora, nearest, sites_of
from personalize.trainers.methods import METHODS
from tests.conftest import COMFYUI
from tests.test_families import answer, of_family, question, sdxl_data
from tests.tiny import distance, make, noise, run

EXACT = {
    "LoRA": ("lora", {"alpha": 1.0}),
    "APT": ("apt", {}),
    "BNN over LoRA": ("bnn", {"over": "lora"}),
    "Selective BP/ZO": ("selective_zo", {}),
    "PaRa": ("para", {}),
}
WHOLE = {
    "DreamBooth": ("dreambooth", {}),
    "Attention": ("attention", {}),
    "A3FT, attention alone": ("a3ft", {"mode": "attention"}),
    "BNN over full": ("bnn", {"over": "full"}),
    "BNN over OFT": ("bnn", {"over": "oft"}),
}
FAMILIES = ("SD 1.x", "SD 2.x, velocity", "SDXL")


@pytest.fixture(autouse=True)
def output(tmp_path, monkeypatch):
    """ComfyUI's output folder, for this test alone."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


@cache
def of_case(family: str, case: str) -> Personalization:
    """Train a case on a family, once."""
    method, settings = (EXACT | WHOLE)[case]
    return learned_on(of_family(family), method, **settings)


def learned_on(model, method: str, **settings) -> Personalization:
    """Train three steps on every kind of layer that the method takes."""
    chosen = make(METHODS[method], **{"layers": "all", "batch_size": 1} | settings)
    step = run(chosen, bridge.denoiser_of(model), sdxl_data())[-1]
    header = Header(
        method=method,
        step=0,
        settings=chosen.settings.as_dict(),
        base=bridge.fingerprint(model),
        instance_prompt="a zib totem",
        class_prompt="",
        data="0" * 16,
    )
    return Personalization.of(header, step.learned(), step.index)


def export(learned: Personalization, **inputs) -> tuple[str, Path]:
    """Run the node as ComfyUI does; return its report and the file."""
    given = {"filename_prefix": "mine", "full_weights": "whole", "rank": 4} | inputs
    with torch.inference_mode():
        text, file = ExportLoRA.execute(learned, **given).args
    return text, Path(folder_paths.get_output_directory()) / "loras" / file


def refusal(learned: Personalization, **inputs) -> str:
    with pytest.raises(ValueError) as error:
        export(learned, **inputs)
    assert str(error.value).startswith("Export LoRA: ")
    return str(error.value)


def ours(model, learned: Personalization, strength: float = 1.0) -> torch.Tensor:
    """Return what the network computes that our own loader makes."""
    return answer(load.personalize(model, learned, strength)[0], *question())


def stock(model, path: Path, strength: float = 1.0) -> torch.Tensor:
    """Return what it computes with the file in stock Load LoRA."""
    patched, _ = comfy.sd.load_lora_for_models(model, None, load_file(path), strength, 0.0)
    return answer(patched, *question())


def layers_in(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in load_file(path)}


# diffusers


def tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer, which comes with ComfyUI."""
    return CLIPTokenizer.from_pretrained(COMFYUI / "comfy" / "sd1_tokenizer")


def text_encoder(kind=CLIPTextModel):
    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2
    )
    return kind(config)


def pipeline(model):
    """Build diffusers' pipeline of small real parts around the twin of a MODEL."""
    parts = {
        "unet": deepcopy(bridge.denoiser_of(model).unet),
        "vae": AutoencoderKL(block_out_channels=(32,), norm_num_groups=8),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "scheduler": EulerDiscreteScheduler(),
    }
    if bridge.family(model).startswith("stable-diffusion-xl"):
        second = text_encoder(CLIPTextModelWithProjection)
        return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer())
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, **none)


def in_diffusers(model, path: Path) -> torch.Tensor:
    """Return what the network computes that diffusers makes of the file; all of it must be used."""
    from diffusers.utils import logging as diffusers_logging

    pipe, heard = pipeline(model), []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = diffusers_logging.get_logger("diffusers")
    logger.addHandler(handler)
    try:
        pipe.load_lora_weights(path.parent, weight_name=path.name)
    finally:
        logger.removeHandler(handler)
    heard = [line for line in heard if "associated to CLIPText" not in line]  # it has none
    assert not heard
    taken = [m for m in pipe.unet.modules() if isinstance(m, LoraLayer)]
    assert len(taken) == len(layers_in(path))
    denoiser = bridge.denoiser_of(model)
    denoiser.unet = pipe.unet
    with torch.no_grad():
        return denoiser(*question())


# Exact


@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_loaders_make_of_it_what_ours_makes(family, case, caplog):
    model = of_family(family)
    learned = of_case(family, case)
    text, path = export(learned, model=model)
    expected, plain = ours(model, learned), answer(model, *question())
    assert distance(plain, expected) > 1e-2
    assert distance(stock(model, path), expected) <= 1e-4
    assert "lora key not loaded" not in caplog.text
    assert distance(in_diffusers(model, path), expected) <= 1e-4
    assert "\nExact.\n" in text
    assert ("with the connected base only" in text) == (case == "PaRa")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_the_preset_all_is_in_the_file(family):
    """Convolutions, time embedding and, of SDXL, what is told besides."""
    learned = of_case(family, "LoRA")
    _, path = export(learned)
    assert len(layers_in(path)) == len(sites_of(learned.tensors)) / 2
    assert len(layers_in(path)) > 50
    added = {name for name in layers_in(path) if "label_emb" in name}
    assert len(added) == (2 if family == "SDXL" else 0)


@pytest.mark.parametrize("strength", [0.0, 0.6, -1.0])
@pytest.mark.parametrize("case", ["LoRA", "PaRa"])
def test_it_is_so_at_every_strength(case, strength):
    model = of_family("SD 1.x")
    learned = of_case("SD 1.x", case)
    _, path = export(learned, model=model)
    assert distance(stock(model, path, strength), ours(model, learned, strength)) <= 1e-4


def test_para_over_a_lora_goes_with_the_patched_base():
    """Its reduction takes from the LoRA too."""
    base = of_family("SD 1.x")
    below = export(learned_on(base, "lora"), filename_prefix="below")[1]
    patched, _ = comfy.sd.load_lora_for_models(base, None, load_file(below), 1.0, 0.0)
    learned = learned_on(patched, "para")
    _, path = export(learned, model=patched)
    assert distance(stock(patched, path), ours(patched, learned)) <= 1e-4
    assert distance(stock(base, path), ours(base, learned)) > 1e-3


def test_a_lora_needs_no_model():
    model = of_family("SDXL")
    learned = of_case("SDXL", "LoRA")
    with_model, without = (
        load_file(export(learned, model=m, filename_prefix=name)[1])
        for m, name in ((model, "with"), (None, "without"))
    )
    assert with_model.keys() == without.keys()
    assert all(torch.equal(with_model[name], without[name]) for name in without)


@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.parametrize("family", ["SD 1.x", "SDXL"])
def test_whole_weights_are_exact_in_comfyui(family, case, caplog):
    model = of_family(family)
    learned = of_case(family, case)
    text, path = export(learned, model=model)
    expected = ours(model, learned)
    assert distance(answer(model, *question()), expected) > 1e-3
    assert distance(stock(model, path), expected) <= 1e-4
    assert "lora key not loaded" not in caplog.text
    assert "Exact" in text and "whole weights" in text


# The nearest of a rank


def test_the_nearest_change_is_that_of_the_singular_values():
    for shape in ((30, 20), (20, 30), (12, 6, 3, 3), (12, 40, 1, 1)):
        delta = noise(*shape)
        low_rank, loss = nearest(delta, 5)
        assert low_rank.fits(delta.shape) and low_rank.rank == 5
        u, s, v = torch.linalg.svd(delta.flatten(1).double(), full_matrices=False)
        expected = (u[:, :5] * s[:5]) @ v[:5]
        assert distance(low_rank.delta().double(), expected) <= 1e-5
        assert loss.relative == pytest.approx(float(s[5:].norm() / s.norm()), rel=1e-4)


def test_a_rank_above_a_layers_width_loses_nothing():
    for shape in ((30, 20), (4, 6, 3, 3)):
        low_rank, loss = nearest(noise(*shape), 64)
        assert low_rank.rank == min(noise(*shape).flatten(1).shape)
        assert loss.relative < 1e-6


def test_a_layer_that_did_not_move_has_no_error():
    low_rank, loss = nearest(torch.zeros(6, 5), 2)
    assert loss.relative == 0 and low_rank.delta().abs().max() == 0


@pytest.mark.parametrize(
    "family, case", [*(("SD 1.x", case) for case in WHOLE), ("SDXL", "DreamBooth")]
)
def test_low_rank_files_are_read_by_all_and_say_how_good_they_are(family, case, caplog):
    model = of_family(family)
    learned = of_case(family, case)
    expected = ours(model, learned)
    errors = []
    for rank in (2, 16):
        how = {"full_weights": "low rank", "rank": rank, "filename_prefix": f"r{rank}"}
        text, path = export(learned, model=model, **how)
        found = stock(model, path)
        assert "lora key not loaded" not in caplog.text
        assert distance(in_diffusers(model, path), found) <= 1e-4
        assert "relative error" in text and "Exact" not in text
        errors.append(distance(found, expected))
    assert errors[1] < errors[0]
    told = as_lora(load.fitting_edits(model, learned), bridge.weight_reader(model), 16)
    assert f"{told.mean_error:.3f} on average, at most {told.worst[1]:.3f}" in text
    assert f"of all that was learned, {told.total_error:.3f}." in text


def test_the_told_errors_are_those_of_the_file():
    """Measured on the file, layer by layer; biases and norms count as lost."""
    model = of_family("SD 1.x")
    learned = of_case("SD 1.x", "DreamBooth")
    edits = load.fitting_edits(model, learned)
    done = as_lora(edits, None, 4)
    lost = whole = 0.0
    for site, edit in edits.items():
        kept = done.edits.get(site)
        delta = kept.delta().reshape(edit.delta.shape) if kept else torch.zeros_like(edit.delta)
        difference = float((edit.delta - delta).norm())
        if site in done.losses:
            own = float(edit.delta.norm())
            told = done.losses[site].relative
            assert told == pytest.approx(difference / own, rel=1e-3, abs=1e-6)
        lost, whole = lost + difference**2, whole + float(edit.delta.norm()) ** 2
    assert done.total_error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert set(done.left_out) == {site for site, edit in edits.items() if edit.delta.ndim < 2}
    assert set(done.edits) | set(done.left_out) == set(edits)


# Refused


def test_a3fts_adapter_can_not_be_exported_and_it_says_why():
    model = of_family("SD 1.x")
    learned = learned_on(model, "a3ft")
    for given in (None, model):
        reason = refusal(learned, model=given)
        assert "time-aware adapter" in reason and "no LoRA file can hold" in reason
        assert "Load Personalization" in reason
    assert not list(Path(folder_paths.get_output_directory()).rglob("*.safetensors"))


@pytest.mark.parametrize("case", ["PaRa", "BNN over OFT"])
def test_what_depends_on_the_base_asks_for_it(case):
    assert "'model' is not connected" in refusal(of_case("SD 1.x", case))


def test_another_base_is_refused():
    learned = of_case("SD 1.x", "LoRA")
    assert "does not fit" in refusal(learned, model=of_family("SDXL"))


# The file


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_the_header_tells_base_rank_and_training():
    model = of_family("SDXL")
    learned = learned_on(model, "lora", rank=3, alpha=1.5, seed=7, optimizer="adamw")
    header = header_of(export(learned, filename_prefix="dogs/rex")[1])
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert header["modelspec.trigger_phrase"] == "a zib totem"
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    assert header["ss_network_module"] == "networks.lora"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("3", "1.5")
    assert (header["ss_steps"], header["ss_seed"]) == ("3", "7")
    assert header["ss_optimizer"] == "adamw" and float(header["ss_learning_rate"]) == 1e-2
    assert header["ss_output_name"] == "rex" and "lora" in header["ss_training_comment"]
    assert all(isinstance(value, str) for value in header.values())


def test_several_ranks_are_called_dynamic():
    learned = of_case("SD 1.x", "DreamBooth")
    how = {"full_weights": "low rank", "rank": 40}
    assert header_of(export(learned, **how)[1])["ss_network_dim"] == "Dynamic"


def test_nothing_is_overwritten(output):
    learned = of_case("SD 1.x", "LoRA")
    files = [export(learned)[1] for _ in range(3)]
    assert [file.name for file in files] == [
        "mine.safetensors",
        "mine 2.safetensors",
        "mine 3.safetensors",
    ]
    assert sorted(file.name for file in (output / "loras").iterdir()) == sorted(
        file.name for file in files
    )


def test_names_may_have_folders_and_the_ending():
    learned = of_case("SD 1.x", "LoRA")
    _, path = export(learned, filename_prefix="my dogs/rex.safetensors")
    assert path.is_file() and path.parent.name == "my dogs" and path.name == "rex.safetensors"


@pytest.mark.parametrize(
    "prefix", ["", "../out", "/tmp/x", "a/../../b", "a//b", "a\\b", "a:b", "x" * 99, ".x", "nul"]
)
def test_names_that_leave_the_folder_are_refused(prefix, output):
    learned = of_case("SD 1.x", "LoRA")
    assert "'filename_prefix' is" in refusal(learned, filename_prefix=prefix)
    assert not list(output.rglob("*.safetensors"))


def test_a_link_out_of_the_folder_is_refused(output, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (output / "loras").mkdir()
    (output / "loras" / "door").symlink_to(outside, target_is_directory=True)
    learned = of_case("SD 1.x", "LoRA")
    assert "out of output/loras" in refusal(learned, filename_prefix="door/x")
    assert not list(outside.iterdir())


def test_sites_are_read_off_the_files_names():
    edits = {"a": LowRank(noise(2, 5), noise(3, 2), 2.0), "b.bias": Difference(noise(4))}
    header = Header("lora", 1, {}, {}, "", "", "")
    tensors = Personalization.of(header, edits, 1).tensors
    assert sites_of([*tensors, "something.else"]) == ["a", "a.bias", "b", "b.bias"]


def test_what_comes_out_of_every_kind_of_edit():
    """A rank reduction and a rotation on a layer, against plain matrix products."""
    weight, basis, skew = noise(6, 8), noise(6, 2), noise(2, 6, seed=1) * 0.1
    edits = {"para": RankReduction(basis), "oft": Rotation(skew)}
    done = as_lora(edits, lambda site: weight, None)
    q = torch.linalg.qr(basis).Q
    assert distance(done.edits["para"].delta(), -q @ q.T @ weight) <= 1e-5
    assert isinstance(done.edits["oft"], Difference) and done.bound
    r = torch.block_diag(*Rotation(skew).blocks())
    assert distance(done.edits["oft"].delta, weight @ r.T - weight) <= 1e-5


def test_the_personalization_stays_as_it_is():
    model = of_family("SD 1.x")
    learned = learned_on(model, "para")
    before = {name: tensor.clone() for name, tensor in learned.tensors.items()}
    export(learned, model=model)
    assert all(torch.equal(learned.tensors[name], tensor) for name, tensor in before.items())
    assert replace(learned.header, step=3) == learned.header


def test_input_errors_name_their_input():
    with pytest.raises(InputError) as error:
        from personalize.nodes.export import free_path

        free_path("../x")
    assert error.value.input_name == "filename_prefix"


def test_a_name_is_given_to_one_export_at_a_time(tmp_path, monkeypatch):
    from personalize.nodes import export

    monkeypatch.setattr(export.folder_paths, "output_directory", str(tmp_path))
    with export.reserved("zib") as first, export.reserved("zib") as second:
        assert (first.name, second.name) == ("zib.safetensors", "zib 2.safetensors")
    with pytest.raises(KeyError), export.reserved("mog") as path:
        raise KeyError
    assert not path.exists()


def test_a_link_to_nothing_takes_a_name_too(tmp_path, monkeypatch):
    from personalize.nodes import export

    monkeypatch.setattr(export.folder_paths, "output_directory", str(tmp_path))
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "zib.safetensors").symlink_to(tmp_path / "nothing")
    assert export.free_path("zib").name == "zib 2.safetensors"


def test_a_name_that_is_taken_between_the_look_and_the_grip_is_not_given(tmp_path, monkeypatch):
    from personalize.nodes import export

    monkeypatch.setattr(export.folder_paths, "output_directory", str(tmp_path))
    look, looked = export.free_path, []

    def taken(prefix: str) -> Path:
        looked.append(path := look(prefix))
        if len(looked) == 1:
            path.write_text("another's")
        return path

    monkeypatch.setattr(export, "free_path", taken)
    with export.reserved("zib") as path:
        assert path.name == "zib 2.safetensors"
    assert looked[0].read_text() == "another's"
