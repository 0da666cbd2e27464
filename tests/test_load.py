"""What is trained is what is loaded: learned edits as patches of a ComfyUI MODEL."""

import dataclasses
import logging

import comfy.lora
import comfy.model_management
import pytest
import torch
from safetensors.torch import load_file

from personalize.nodes import bridge, load
from personalize.trainers.artifact import Header, Personalization
from personalize.trainers.edits import of_weights
from personalize.trainers.errors import InputError
from personalize.trainers.methods import METHODS
from personalize.trainers.time_aware import SITE
from tests.test_bridge import lora_patch, question
from tests.tiny import comfy_model, comfy_output, distance, geometry, make, run, same, snapshot

METHOD_PARAMS = [pytest.param(method, id=name) for name, method in METHODS.items()]


def train_on(model, method, **settings):
    """Train and return (what was learned as an artifact, what the trained network computes)."""
    chosen = make(method, **{"layers": "all", "batch_size": 1} | settings)
    denoiser = bridge.denoiser_of(model)
    step = run(chosen, denoiser)[-1]
    with torch.no_grad():
        output = denoiser(*question())
    header = Header(
        method=method.name,
        step=0,
        settings=chosen.settings.as_dict(),
        base=bridge.fingerprint(model),
        instance_prompt="a zib totem",
        class_prompt="",
        data="0" * 16,
    )
    return Personalization.of(header, step.learned(), step.index), output


@pytest.fixture(scope="module", params=METHOD_PARAMS)
def learned(request):
    """A method's artifact and the output of the network that it trained on `comfy_model()`."""
    return train_on(comfy_model(), request.param)


@pytest.fixture(scope="module")
def lora():
    return train_on(comfy_model(), METHODS["lora"])


@pytest.fixture(scope="module")
def para():
    return train_on(comfy_model(), METHODS["para"])


@pytest.fixture
def base():
    return comfy_model()


# The same function


def test_what_is_trained_is_what_is_loaded(learned, base):
    artifact, trained = learned
    plain = comfy_output(base, *question())
    patched, _ = load.personalize(base, artifact, 1.0)
    loaded = comfy_output(patched, *question())
    assert distance(loaded, trained) <= 1e-4
    assert distance(trained, plain) > 1e-2  # it learned something


@pytest.mark.parametrize("method", METHOD_PARAMS)
@pytest.mark.parametrize(
    "base",
    [
        {
            "config": geometry((64, 64), use_linear_in_transformer=True),
            "family": "SD20",
            "prediction": "V_PREDICTION",
        },
        {"config": geometry((32,), (1,), transformer_depth_middle=-2)},
        {"config": geometry((32, 64, 64), (1, 1, 0)), "dtype": torch.float16},
    ],
    ids=["SD 2, velocity", "one level", "three levels in half precision"],
)
def test_it_is_so_on_every_kind_of_base(method, base):
    model = comfy_model(**base)
    artifact, trained = train_on(model, method)
    loaded = comfy_output(load.personalize(model, artifact, 1.0)[0], *question())
    # ComfyUI rounds a patched weight to the precision that the base is stored in
    tolerance = 2e-3 if base.get("dtype") == torch.float16 else 1e-4
    assert distance(loaded, trained) <= tolerance


def test_it_is_so_over_a_lora_that_was_there_before(learned, base):
    """Training on a patched MODEL: what is learned belongs on the patched MODEL."""
    method = METHODS[learned[0].header.method]
    upstream = base.clone()
    key, patch = lora_patch(base)
    upstream.add_patches({key: patch}, 0.8)
    artifact, trained = train_on(upstream, method)
    loaded = comfy_output(load.personalize(upstream, artifact, 1.0)[0], *question())
    assert distance(loaded, trained) <= 1e-4


def test_it_comes_through_a_file(learned, base, tmp_path):
    artifact, trained = learned
    artifact.save(tmp_path / "last.safetensors")
    again = Personalization.load(tmp_path / "last.safetensors")
    loaded = comfy_output(load.personalize(base, again, 1.0)[0], *question())
    assert distance(loaded, trained) <= 1e-4


def test_the_twin_of_the_loaded_model_is_the_trained_network(learned, base):
    """Training can go on from a personalised MODEL, unless more than weights changed."""
    artifact, trained = learned
    patched, _ = load.personalize(base, artifact, 1.0)
    if patched.injections:
        with pytest.raises(InputError, match=r"injected modules \(personalize time-aware adapter"):
            bridge.denoiser_of(patched)
        return
    with torch.no_grad():
        assert distance(bridge.denoiser_of(patched)(*question()), trained) <= 1e-4


# Strength


def test_strength_zero_is_the_base_bit_for_bit(learned, base):
    plain = comfy_output(base, *question())
    patched, _ = load.personalize(base, learned[0], 0.0)
    assert torch.equal(comfy_output(patched, *question()), plain)


@pytest.mark.parametrize("strength", [0.5, -1.0, 2.0])
def test_the_change_of_every_weight_is_linear_in_the_strength(learned, base, strength):
    """s W' + (1 - s) W: LoRA's delta and PaRa's removed part both scale."""
    plain = snapshot(base.model.diffusion_model)
    full = weights_when_loaded(load.personalize(base, learned[0], 1.0)[0])
    scaled = weights_when_loaded(load.personalize(base, learned[0], strength)[0])
    changed = [name for name in plain if not torch.equal(plain[name], full[name])]
    assert len(changed) == len(of_weights(learned[0].edits(sites_of(base))[0]))
    for name in changed:
        expected = plain[name] + strength * (full[name] - plain[name])
        assert (scaled[name] - expected).abs().max() < 1e-5, name


def weights_when_loaded(model) -> dict[str, torch.Tensor]:
    comfy.model_management.load_models_gpu([model])
    return snapshot(model.model.diffusion_model)


def sites_of(model) -> list[str]:
    return [name.removesuffix(".weight") for name in bridge.twin_names(model)]


# Composition


def test_para_takes_its_part_out_of_what_a_lora_added_before(lora, para, base):
    """Patches apply in order: PaRa after LoRA gives W' = (I - QQ^T)(W + D), and the reverse."""
    plain = snapshot(base.model.diffusion_model)
    names = bridge.twin_names(base)
    orders = {"para last": (lora, para), "lora last": (para, lora)}
    for first, last in orders.values():
        one, _ = load.personalize(base, first[0], 1.0)
        both, _ = load.personalize(one, last[0], 1.0)
        found = weights_when_loaded(both)
        edits = [artifact.edits(sites_of(base))[0] for artifact, _ in (first, last)]
        for site in edits[0].keys() & edits[1].keys():
            own = names[f"{site}.weight"]
            expected = edits[1][site].apply(edits[0][site].apply(plain[own]))
            assert (found[own] - expected).abs().max() < 1e-5, site


def test_two_subjects_stack_without_disturbing_each_other(base):
    one, two = (train_on(base, METHODS["para"], seed=seed)[0] for seed in (1, 2))
    first, _ = load.personalize(base, one, 1.0)
    alone = comfy_output(first, *question())
    load.personalize(first, two, 1.0)
    assert torch.equal(comfy_output(first, *question()), alone)


# The stock loader


def test_a_lora_run_is_a_lora_file(lora, base, tmp_path, caplog):
    artifact, trained = lora
    artifact.save(tmp_path / "last.safetensors")
    tensors = load_file(tmp_path / "last.safetensors")
    keys = comfy.lora.model_lora_keys_unet(base.model, {})
    with caplog.at_level(logging.WARNING):
        patches = comfy.lora.load_lora(tensors, keys)
    assert "not loaded" not in caplog.text
    assert len(patches) == len(artifact.edits(sites_of(base))[0]) == len(tensors) / 3
    stock = base.clone()
    assert len(stock.add_patches(patches, 1.0)) == len(patches)
    output = comfy_output(stock, *question())
    assert distance(output, trained) <= 1e-4
    ours, _ = load.personalize(base, artifact, 1.0)
    assert distance(comfy_output(ours, *question()), output) <= 1e-6


def test_a_para_run_becomes_an_exact_stock_lora_for_its_base(para, base):
    artifact, trained = para
    own, names = bridge.own_weights(base), bridge.twin_names(base)
    edits = artifact.edits(sites_of(base))[0]
    exported = {s: e.as_low_rank(own[names[f"{s}.weight"]]) for s, e in edits.items()}
    as_lora = Personalization.of(artifact.header, exported, 3)
    patches = comfy.lora.load_lora(
        dict(as_lora.tensors), comfy.lora.model_lora_keys_unet(base.model, {})
    )
    stock = base.clone()
    assert len(stock.add_patches(patches, 1.0)) == len(edits)
    output = comfy_output(stock, *question())
    assert distance(output, trained) <= 1e-4
    weights, native = weights_when_loaded(stock), load.personalize(base, artifact, 1.0)[0]
    for name, weight in weights_when_loaded(native).items():
        assert (weights[name] - weight).abs().max() < 1e-5, name
    assert distance(comfy_output(native, *question()), output) <= 1e-5


# Nothing touched


def test_the_model_that_comes_in_is_left_as_it_is(learned, base):
    before, uuid = snapshot(base.model), base.patches_uuid
    patched, _ = load.personalize(base, learned[0], 1.0)
    comfy_output(patched, *question())
    assert not base.patches and base.patches_uuid == uuid != patched.patches_uuid
    comfy_output(base, *question())  # ComfyUI takes the patches out again
    assert same(snapshot(base.model), before)


# What does not fit


def test_the_report_says_what_was_loaded(learned, base):
    artifact, _ = learned
    _, text = load.personalize(base, artifact, 0.75)
    edits = artifact.edits(sites_of(base))[0]
    layers, more = len(of_weights(edits)), " and the time-aware adapter" if SITE in edits else ""
    assert f"{METHODS[artifact.header.method].title} after 3 steps" in text
    assert f"all {layers} layers{more} matched" in text and f"{artifact.parameters:,}" in text
    assert "strength 0.75" in text and "the base it was trained on" in text
    assert "a zib totem" in text
    other = comfy_model(seed=1)
    assert "another base of the same shape" in load.personalize(other, artifact, 1.0)[1]


def test_the_report_is_the_same_while_the_result_is_loaded(learned, base):
    """Sampling leaves patches in shared weights; the base is still the base."""
    patched, text = load.personalize(base, learned[0], 1.0)
    comfy_output(patched, *question())
    assert load.personalize(base, learned[0], 1.0)[1] == text


@pytest.mark.parametrize(
    "config",
    [geometry((32, 96)), geometry((64, 128)), geometry((32,), (1,), transformer_depth_middle=-2)],
    ids=["other widths", "twice the width", "fewer levels"],
)
def test_another_geometry_is_refused_and_both_are_named(learned, config):
    artifact, other = learned[0], comfy_model(config)
    with pytest.raises(InputError, match="'model' does not fit") as error:
        load.personalize(other, artifact, 1.0)
    text = str(error.value)
    assert artifact.header.base["geometry"] in text
    assert bridge.fingerprint(other)["geometry"] in text
    assert text.count("stable-diffusion-v1") == 2 and not other.patches


def test_a_file_that_matches_nothing_is_refused(lora, base):
    tensors = {f"lora_te_{name}": tensor for name, tensor in lora[0].tensors.items()}
    with pytest.raises(InputError, match="0 layers match"):
        load.personalize(base, dataclasses.replace(lora[0], tensors=tensors), 1.0)
    with pytest.raises(InputError, match="0 layers match"):
        load.personalize(base, dataclasses.replace(lora[0], tensors={}), 1.0)


def test_a_file_that_matches_in_part_is_refused(lora, base):
    extra = {"lora_te_something.alpha": torch.tensor(1.0)}
    odd = dataclasses.replace(lora[0], tensors=lora[0].tensors | extra)
    with pytest.raises(InputError, match="1 keys belong to no layer"):
        load.personalize(base, odd, 1.0)


def test_an_unsupported_model_is_refused(lora):
    with pytest.raises(InputError, match="SDXLRefiner"):
        load.personalize(comfy_model(geometry((64, 128)), family="SDXLRefiner"), lora[0], 1.0)


def test_an_edit_for_what_is_no_matrix_is_refused(lora, base):
    """A norm's weight has no output directions to remove."""
    tensors = {"lora_unet_conv_norm_out.para_basis": torch.ones(32, 1)}
    odd = dataclasses.replace(lora[0], tensors=tensors)
    assert set(odd.edits(sites_of(base))[0]) == {"conv_norm_out"}
    with pytest.raises(InputError, match="1 have another shape"):
        load.personalize(base, odd, 1.0)
