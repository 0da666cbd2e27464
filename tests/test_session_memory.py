"""However a training ends, its network is gone and no MODEL stays loaded."""

import dataclasses
import weakref

import comfy.model_management as memory
import pytest
import torch

from personalize.nodes import base, load
from personalize.nodes import session as node
from personalize.nodes.room import GIB, Room
from personalize.trainers.loop import Learner
from personalize.trainers.methods import METHODS
from tests.sessions import session, show
from tests.test_load import train_on
from tests.tiny import (
    comfy_model,
    comfy_output,
    make,
    question,
    same,
    snapshot,
    tiny_data,
    tiny_denoiser,
)


@pytest.fixture
def networks(monkeypatch, tmp_path):
    """Every network that a session builds."""
    built = []
    denoiser_of = base.denoiser_of

    def noted(*arguments):
        built.append(denoiser_of(*arguments))
        return built[-1]

    monkeypatch.setattr(base, "denoiser_of", noted)
    monkeypatch.setattr(node, "runs_root", lambda: tmp_path)
    return built


@pytest.fixture
def loaded_base():
    """A MODEL that a sampler has loaded with a personalisation, as after a first prompt."""
    base = comfy_model()
    weights = snapshot(base.model)
    patched, _ = load.personalize(base, train_on(base, METHODS["para"])[0], 1.0)
    comfy_output(patched, *question())
    yield base
    memory.unload_all_models()
    assert same(snapshot(base.model), weights)


@pytest.fixture
def trained(monkeypatch):
    """What only training needs, as weak references: parameters, their average, the optimiser's."""
    seen = []
    advance = Learner.advance

    def noted(learner, *step):
        loss = advance(learner, *step)
        moments = [t for s in learner.optimizer.state.values() for t in s.values()]
        averages = learner.average.shadow_params if learner.average is not None else []
        tensors = [*learner.parameters, *averages, *moments]
        seen[:] = [weakref.ref(tensor) for tensor in tensors if tensor.numel() > 1]
        return loss

    monkeypatch.setattr(Learner, "advance", noted)
    return seen


def assert_gone(networks, trained=()) -> None:
    assert all(tensor.is_meta for reference in trained if (tensor := reference()) is not None)
    assert len(networks) == 1
    assert all(parameter.is_meta for parameter in networks[0].parameters())
    assert memory.current_loaded_models == []


def out_of_memory_at_step_three(text):
    if text.startswith("step 3 "):
        raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("method", METHODS)
def test_after_a_training_that_failed(method, networks, trained, loaded_base, monkeypatch):
    show(monkeypatch, out_of_memory_at_step_three)
    with pytest.raises(MemoryError, match="What needs less: ") as failure:
        session(method=method, model=loaded_base, ema_decay=0.5).train()
    assert_gone(networks, trained)
    assert failure.tb is not None  # a traceback is still there


@pytest.mark.parametrize("method, precision", [("lora", "int8"), ("a3ft", "fp32")])
def test_what_helps_is_the_same_once_a_training_failed(method, precision, tmp_path, monkeypatch):
    monkeypatch.setattr(node, "runs_root", lambda: tmp_path)
    show(monkeypatch, out_of_memory_at_step_three)
    asked = session(method=method, precision=precision)
    denoiser = asked.base.denoiser(precision)
    data = asked.base.in_network_scale(asked.data, denoiser)
    before = Room.of(asked.method, denoiser, data, memory.get_torch_device()).advice
    with pytest.raises(MemoryError) as failure:
        asked.train()
    assert str(failure.value).endswith(before) and "What needs less: " in before


def test_after_a_training_that_failed_in_its_first_step(networks, loaded_base, monkeypatch):
    show(monkeypatch)
    with pytest.raises(FloatingPointError):
        broken = session(model=loaded_base, non_finite="stop")
        broken.method.loss = lambda denoiser, batch: torch.tensor(torch.nan, requires_grad=True)
        broken.train()
    assert_gone(networks)
    assert broken.watch is None


def test_after_a_training_that_was_interrupted(
    networks, trained, loaded_base, monkeypatch, tmp_path
):
    def interrupt_at_step_three(text):
        if text.startswith("step 3 "):
            memory.interrupt_current_processing(True)

    show(monkeypatch, interrupt_at_step_three)
    with pytest.raises(memory.InterruptProcessingException):
        session(model=loaded_base, ema_decay=0.5).train()
    assert len(trained) > 100
    assert_gone(networks, trained)
    assert not memory.processing_interrupted()
    assert (tmp_path / "some" / "last.safetensors").is_file()


def test_after_a_training_that_went_well(networks, loaded_base, monkeypatch):
    show(monkeypatch)
    learned = session(model=loaded_base, steps=2).train()
    assert_gone(networks)
    assert not any(tensor.is_meta for tensor in learned.tensors.values())


@pytest.mark.parametrize("room", (0.5, 2.0))
def test_a_vae_stays_between_steps_only_where_there_is_room(networks, loaded_base, room):
    free, vae = 10**9, comfy_model(seed=5)

    def encode(pixels):
        memory.load_models_gpu([vae])  # as ComfyUI's VAE does
        return pixels

    data = dataclasses.replace(tiny_data(), encode=encode)
    device = memory.get_torch_device()
    found = Room.of(make(METHODS["apt"]), base.denoiser_of(loaded_base, "fp32"), data, device)
    of_all = vae.model_size() + loaded_base.model_size()
    vars(found).update(free=free, needed=free - int(room * of_all))
    found.kept(data).encode(torch.zeros(1))
    assert (vae in memory.loaded_models()) == (room > 1)


def test_a_gpu_has_room_for_its_libraries_and_counts_what_lies_there(monkeypatch):
    monkeypatch.setattr(memory, "get_free_memory", lambda device: 10 * GIB)

    def free(denoiser, device: str) -> int:
        return Room.of(make(METHODS["lora"]), denoiser, tiny_data(), torch.device(device)).free

    own = sum(parameter.nbytes for parameter in tiny_denoiser().parameters())
    assert free(tiny_denoiser(), "cpu") == 10 * GIB + own
    assert free(tiny_denoiser(), "cuda:0") == 9.5 * GIB
    assert free(tiny_denoiser().to(torch.device("meta")), "meta") == 9.5 * GIB + own
