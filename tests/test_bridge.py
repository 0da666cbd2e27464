"""The diffusers twin of a ComfyUI MODEL: the same function, the same storage, nothing touched."""

import comfy.model_base
import comfy.weight_adapter
import pytest
import torch
import torch.nn.functional as F

from personalize.demo import base_model
from personalize.nodes import bridge, demo
from personalize.nodes.base import ModelBase
from personalize.trainers.errors import InputError
from personalize.trainers.methods import METHODS
from personalize.trainers.resume import of_base
from tests.tiny import (
    comfy_model,
    comfy_output,
    distance,
    geometry,
    make,
    noise,
    run,
    same,
    snapshot,
    tiny_data,
)

SD2 = {"use_linear_in_transformer": True}  # the class itself brings 64 channels per head
BASES = {
    "two levels": {},
    "one level without a middle": {
        "config": geometry((32,), (1,), transformer_depth_middle=-2),
    },
    "three levels, the last without attention": {
        "config": geometry((32, 64, 64), (1, 1, 0), blocks=2),
    },
    "attention only further down": {"config": geometry((32, 64, 64), (0, 1, 1))},
    "two transformer blocks per level": {
        "config": geometry((32, 64), (1, 2), transformer_depth_middle=2),
    },
    "SD 2: heads per level, linear projections": {
        "config": geometry((64, 128), **SD2),
        "family": "SD20",
    },
    "SD 2, velocity": {
        "config": geometry((64, 128), **SD2),
        "family": "SD20",
        "prediction": "V_PREDICTION",
    },
    "stored in half precision": {"dtype": torch.float16},
}


def question(side: int = 8):
    return noise(2, 4, side, side, seed=5), torch.tensor([3, 990]), noise(2, 7, 32, seed=6)


@pytest.fixture(params=BASES.values(), ids=BASES.keys())
def model(request):
    return comfy_model(**request.param)


def lora_patch(model, scale: float = 0.5) -> tuple[str, comfy.weight_adapter.LoRAAdapter]:
    """Make a stock LoRA patch of one attention layer."""
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    width = model.model.diffusion_model.state_dict()[key.removeprefix("diffusion_model.")].shape[0]
    weights = (noise(width, 2, seed=8) * scale, noise(2, width, seed=9), 2.0, None, None, None)
    return key, comfy.weight_adapter.LoRAAdapter(set(), weights)


# The same function


def test_the_twin_is_the_model(model):
    with torch.no_grad():
        twin = bridge.denoiser_of(model)(*question())
    own = comfy_output(model, *question())
    assert own.abs().mean() > 0.1  # not nothing
    assert distance(twin, own.float()) <= 1e-5


def test_the_twin_of_the_demo_base_is_the_model():
    """As nodes/demo.py builds it from diffusers' weights: there and back."""
    config = {**base_model.UNET_CONFIG, "block_out_channels": [32, 64]}
    config |= {"cross_attention_dim": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = base_model.UNet2DConditionModel.from_config(config).requires_grad_(False)
    built = demo.build_model(config, unet.state_dict())
    with torch.no_grad():
        twin = bridge.denoiser_of(built)(*question())
        source = unet(*question()).sample
    assert distance(comfy_output(built, *question()), source) <= 1e-5
    assert distance(twin, source) <= 1e-6


def test_every_weight_has_its_place(model):
    twin = bridge.denoiser_of(model).unet
    own = model.model.diffusion_model.state_dict()
    assert len(twin.state_dict()) == len(own)
    assert sum(p.numel() for p in twin.parameters()) == sum(t.numel() for t in own.values())


def test_a_patched_model_gives_a_patched_twin():
    base = comfy_model()
    patched = base.clone()
    key, lora = lora_patch(base)
    assert patched.add_patches({key: lora}, 0.8) == [key]
    with torch.no_grad():
        twin = bridge.denoiser_of(patched)(*question())
        plain = bridge.denoiser_of(base)(*question())
    assert distance(twin, comfy_output(patched, *question())) <= 1e-5
    assert distance(plain, comfy_output(base, *question())) <= 1e-5
    assert distance(twin, plain) > 1e-3


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 0.1)])
def test_the_twin_has_the_precision_that_was_asked_for(precision, tolerance):
    model = comfy_model(dtype=torch.float16)
    denoiser = bridge.denoiser_of(model, precision)
    assert {p.dtype for p in denoiser.parameters()} == {bridge.DTYPES[precision]}
    with torch.no_grad():
        error = distance(denoiser(*question()), comfy_output(model, *question()).float())
    assert error <= tolerance


# The same storage


def pointers(tensors) -> set[int]:
    return {tensor.data_ptr() for tensor in tensors}


def test_weights_share_storage():
    model = comfy_model()
    twin = pointers(bridge.denoiser_of(model).unet.state_dict().values())
    assert twin == pointers(model.model.diffusion_model.state_dict().values())


def test_only_what_is_patched_is_copied():
    patched = comfy_model().clone()
    key, lora = lora_patch(patched)
    patched.add_patches({key: lora}, 1.0)
    twin = bridge.denoiser_of(patched).unet.state_dict().values()
    shared = pointers(twin) & pointers(patched.model.diffusion_model.state_dict().values())
    assert len(shared) == len(twin) - 1


def test_tensors_born_in_inference_mode_can_train_and_still_share_storage():
    with torch.inference_mode():
        model = comfy_model()
        for name, parameter in list(model.model.diffusion_model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            born_here = torch.nn.Parameter(parameter.clone(), requires_grad=False)
            setattr(model.model.diffusion_model.get_submodule(owner), leaf, born_here)
        own = model.model.diffusion_model.state_dict()
        assert all(tensor.is_inference() for tensor in own.values())
    denoiser = bridge.denoiser_of(model)
    assert not any(p.is_inference() for p in denoiser.parameters())
    assert pointers(denoiser.parameters()) == pointers(own.values())
    for method in METHODS.values():
        denoiser = bridge.denoiser_of(model)
        (step,) = run(make(method, steps=1, batch_size=1), denoiser, tiny_data(1))
        assert step.loss > 0
        free = [p for p in denoiser.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in free)


# Nothing touched


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_the_model_is_as_it_was_after_training_on_it(method):
    model = comfy_model().clone()
    key, lora = lora_patch(model)
    model.add_patches({key: lora}, 0.8)
    before, uuid = snapshot(model.model), model.patches_uuid
    patches = {key: list(values) for key, values in model.patches.items()}
    modes = [(m.training, m.__class__) for m in model.model.modules()]
    asking = [p.requires_grad for p in model.model.parameters()]  # true in ComfyUI 0.16
    denoiser = bridge.denoiser_of(model)
    step = run(make(method), denoiser)[-1]
    step.learned()
    bridge.fingerprint(model)
    denoiser.to("meta")
    assert same(snapshot(model.model), before)
    assert model.patches_uuid == uuid and model.patches == patches
    assert not model.injections and not model.object_patches
    assert modes == [(m.training, m.__class__) for m in model.model.modules()]
    assert asking == [p.requires_grad for p in model.model.parameters()]
    assert all(p.grad is None for p in model.model.parameters())


def test_a_model_that_is_loaded_with_patches_is_not_patched_twice():
    """A sampler leaves the patches written into the weights that all clones share."""
    base = comfy_model()
    before = bridge.fingerprint(base)
    patched = base.clone()
    key, lora = lora_patch(base)
    patched.add_patches({key: lora}, 0.8)
    with torch.no_grad():
        expected = [bridge.denoiser_of(m)(*question()) for m in (base, patched)]
        comfy_output(patched, *question())
        found = [bridge.denoiser_of(m)(*question()) for m in (base, patched)]
    assert distance(found[1], expected[1]) <= 1e-6, "patched twice"
    assert torch.equal(found[0], expected[0]), "the base carries its clone's patch"
    assert bridge.fingerprint(base) == before


# The schedule


@pytest.mark.parametrize("prediction", ["EPS", "V_PREDICTION"])
def test_the_schedule_is_the_models(prediction):
    model = comfy_model(prediction=prediction)
    sampling = model.model.model_sampling
    denoiser = bridge.denoiser_of(model)
    assert denoiser.prediction_type == ("epsilon" if prediction == "EPS" else "v_prediction")
    alphas = denoiser.schedule.alphas_cumprod
    assert torch.allclose(alphas, 1 / (sampling.sigmas**2 + 1), rtol=1e-6, atol=0)
    timesteps = torch.tensor([0, 1, 500, 998, 999])
    x, eps = noise(5, 4, 8, 8), noise(5, 4, 8, 8, seed=1)
    for i, t in enumerate(timesteps):
        sigma = sampling.sigmas[t].reshape(1)
        assert sampling.timestep(sigma) == t  # the same t reaches the network
        noisy = sampling.noise_scaling(sigma, eps[i : i + 1], x[i : i + 1])
        network_input = sampling.calculate_input(sigma, noisy)
        ours = denoiser.noised(x[i : i + 1], eps[i : i + 1], t.reshape(1))
        assert distance(ours, network_input) < 1e-4


def test_the_target_is_what_comfyui_takes_the_output_for():
    """Given the target as output, ComfyUI's sampler finds the clean latents."""
    for prediction in ("EPS", "V_PREDICTION"):
        model = comfy_model(prediction=prediction)
        sampling, denoiser = model.model.model_sampling, bridge.denoiser_of(model)
        x, eps, t = noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=1), torch.tensor([300])
        sigma = sampling.sigmas[t]
        noisy = sampling.noise_scaling(sigma, eps, x)
        clean = sampling.calculate_denoised(sigma, denoiser.target(x, eps, t), noisy)
        assert distance(clean, x) < 1e-4


def test_a_schedule_patched_onto_the_model_is_used():
    """ModelSamplingDiscrete upstream: the twin learns what the sampler will ask."""
    model = comfy_model().clone()
    sampling = comfy.model_base.model_sampling(
        model.model.model_config, comfy.model_base.ModelType.V_PREDICTION
    )
    model.add_object_patch("model_sampling", sampling)
    assert bridge.denoiser_of(model).prediction_type == "v_prediction"
    assert bridge.denoiser_of(comfy_model()).prediction_type == "epsilon"


# Refused


def refusal(model) -> str:
    with pytest.raises(InputError) as error:
        bridge.denoiser_of(model)
    assert error.value.input_name == "model" and str(error.value).startswith("'model' ")
    return str(error.value)


@pytest.mark.parametrize("how", ["lcm", "x0"])
def test_a_model_set_to_sample_otherwise_is_refused(how):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    (model,) = ModelSamplingDiscrete().patch(comfy_model(), how, zsnr=False)
    assert "Model Sampling" in refusal(model)


@pytest.mark.parametrize("how", ["eps", "v_prediction"])
def test_a_model_set_to_sample_by_noise_or_velocity_is_taken(how):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    (model,) = ModelSamplingDiscrete().patch(comfy_model(), how, zsnr=True)
    assert bridge.denoiser_of(model).prediction_type in ("epsilon", "v_prediction")


def test_the_fingerprint_knows_what_was_applied_upstream():
    model = comfy_model()
    patched = model.clone()
    key = "diffusion_model.input_blocks.1.0.in_layers.2.weight"
    patched.add_patches({key: ("diff", (torch.ones(model.model.state_dict()[key].shape),))}, 0.5)
    assert bridge.fingerprint(model)["weights"] == bridge.fingerprint(patched)["weights"]
    assert bridge.fingerprint(model)["patches"] != bridge.fingerprint(patched)["patches"]


KEY = "diffusion_model.input_blocks.1.0.in_layers.2.weight"


def merged_with(other, model):
    """Return what Model Merge puts on a model: the other's own weight, and patches upon it."""
    return other.get_key_patches("diffusion_model.")[KEY]


def adapter(model, alpha: float):
    shape = model.model.state_dict()[KEY].shape
    up, down = torch.ones(shape[0], 2), torch.ones(2, shape[1:].numel())
    return comfy.weight_adapter.LoRAAdapter(set(), (up, down, alpha, None, None, None))


def stacked(model, alpha: float):
    """Return a patch that is a merge whose other model carries a LoRA."""
    other = model.clone()
    other.add_patches({KEY: adapter(model, alpha)})
    return merged_with(other, model)


def difference(model, number: float):
    whole = torch.ones(model.model.state_dict()[KEY].shape)
    whole[1:] = number
    return ("diff", (whole,))


PATCHES = {  # two ways to patch a model that differ in one thing
    "the numbers of a difference": [(difference, 1.0, {}), (difference, 2.0, {})],
    "what stays of the weight": [
        (adapter, 1.0, {"strength_model": 1.0}),
        (adapter, 1.0, {"strength_model": 0.5}),
    ],
    "an adapter's alpha": [(adapter, 1.0, {}), (adapter, 2.0, {})],
    "the LoRA of a merged model": [(stacked, 1.0, {}), (stacked, 2.0, {})],
    "the strength": [(adapter, 1.0, {}), (adapter, 1.0, {"strength_patch": 0.5})],
}


@pytest.mark.parametrize("kind", PATCHES)
def test_the_fingerprint_knows_whatever_a_patch_is_made_of(kind):
    def patched(make, number, strengths):
        model = comfy_model()
        model.add_patches({KEY: make(model, number)}, **strengths)
        return bridge.fingerprint(model), bridge._weight(model, KEY, model.model.state_dict()[KEY])

    one, other = PATCHES[kind]
    (first, weight), (same_again, _), (second, changed) = (patched(*w) for w in (one, one, other))
    assert first == same_again and first["all_of_patches"] != second["all_of_patches"]
    assert not torch.equal(weight, changed)
    assert of_base(first, second) == ["other patches (LoRAs)"]
    older = {part: text for part, text in first.items() if part != "all_of_patches"}
    assert of_base(older, first) == []  # a run of before that part was noted


@pytest.mark.parametrize("other", [True, False])
def test_the_weights_of_a_merged_model_are_in_the_fingerprint(other):
    found = []
    for seed in (1, 2 if other else 1):
        model = comfy_model()
        model.add_patches({KEY: merged_with(comfy_model(seed=seed), model)}, 0.5, 0.5)
        found.append(bridge.fingerprint(model))
    assert (found[0] != found[1]) == other


def test_the_fingerprints_of_older_runs_still_hold():
    model = comfy_model()
    assert bridge.fingerprint(model)["patches"] == ""
    model.add_patches({KEY: adapter(model, 1.0)}, 0.8)
    assert bridge.fingerprint(model)["patches"] == "d4760cd4e83e09e8"  # as before 0.2


def test_the_schedule_is_part_of_a_base():
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    def described(how: str, zsnr: bool) -> dict[str, str]:
        return ModelBase(ModelSamplingDiscrete().patch(comfy_model(), how, zsnr)[0]).fingerprint()

    plain = ModelBase(comfy_model()).fingerprint()
    assert of_base(plain, described("eps", False)) == []
    for how in (("v_prediction", False), ("eps", True)):
        assert of_base(plain, described(*how)) == ["another schedule"]
    assert of_base(bridge.fingerprint(comfy_model()), plain) == []  # a run of before
    assert plain["schedule"].startswith("epsilon, 1000 steps: 0.999, ")


def test_another_family_is_refused_by_name():
    config = geometry((64, 128), **SD2 | {"num_head_channels": 64})
    reason = refusal(comfy_model(config, family="SDXLRefiner"))
    assert "SDXLRefiner" in reason
    assert "Stable Diffusion 1.x, Stable Diffusion 2.x and SDXL base" in reason


def test_an_inpainting_model_is_refused():
    assert "SD15 with 9 input channels" in refusal(comfy_model(geometry(in_channels=9)))


@pytest.mark.parametrize("family", ["SD21UnclipL", "LotusD"])
def test_a_base_that_needs_more_than_text_is_refused(family):
    """unCLIP and Lotus look like SD 2, with a class embedding that training would not see."""
    config = geometry((64, 128), **SD2 | {"adm_in_channels": 16, "num_classes": "sequential"})
    refusal(comfy_model(config, family=family))


def test_a_weight_without_a_place_in_the_twin_is_refused():
    model = comfy_model()
    model.model.diffusion_model.register_parameter(
        "something_new", torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    )
    assert "something_new" in refusal(model)


def test_a_middle_without_attention_is_refused():
    model = comfy_model(geometry((64, 64), (1, 0), transformer_depth_middle=-1))
    assert "layout" in refusal(model)


def test_injected_modules_are_refused_by_name():
    model = comfy_model()
    model.set_injections("some_adapter", [])
    assert "some_adapter" in refusal(model)


def test_what_nodes_upstream_do_to_the_forward_pass_is_refused_by_name():
    from comfy_extras.nodes_freelunch import FreeU_V2

    patched = FreeU_V2.execute(comfy_model(), 1.3, 1.4, 0.9, 0.2)[0]
    assert "output_block_patch" in refusal(patched)
    wrapped = comfy_model()
    wrapped.set_model_unet_function_wrapper(lambda apply, args: apply(**args))
    assert "wrapper around its forward pass" in refusal(wrapped)


def test_a_node_that_only_changes_sampling_is_no_obstacle():
    from comfy_extras.nodes_model_advanced import RescaleCFG

    rescaled = RescaleCFG().patch(comfy_model(), 0.7)[0]
    assert rescaled.model_options["sampler_cfg_function"]
    bridge.denoiser_of(rescaled)


def test_fingerprints_tell_geometry_from_weights():
    one, same_one = bridge.fingerprint(comfy_model()), bridge.fingerprint(comfy_model())
    other = bridge.fingerprint(comfy_model(seed=1))
    wider = bridge.fingerprint(comfy_model(geometry((64, 64))))
    assert one == same_one and one["family"] == "stable-diffusion-v1"
    assert one["geometry"] == other["geometry"] and one["weights"] != other["weights"]
    assert one["geometry"] != wider["geometry"]


def test_weights_that_were_moved_after_inference_mode_can_be_trained_on():
    """ComfyUI's unloading moves weights that were born in inference mode outside of it."""
    with torch.inference_mode():
        layer = torch.nn.Linear(4, 4)
    layer.to(torch.float64)
    with pytest.raises(RuntimeError, match="version counter"):
        F.linear(noise(1, 4).double().requires_grad_(), layer.weight.detach()).sum().backward()
    weight = bridge.for_autograd(layer.weight)
    x = noise(1, 4).double().requires_grad_()
    F.linear(x, weight).square().sum().backward()
    assert x.grad.abs().sum() > 0 and weight.data_ptr() == layer.weight.data_ptr()
