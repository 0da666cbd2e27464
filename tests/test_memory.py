"""What a run needs of the memory is known before it begins; it is made to fit, or told why not."""

import dataclasses
import os
import subprocess
import sys
from typing import ClassVar

import comfy.model_management
import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.configurations import BASE, CONFIGURATIONS, Configuration
from benchmarks.servers import peak_memory, reset_peak_memory
from personalize.nodes import room
from personalize.nodes import session as node
from personalize.trainers import memory as memory_of
from personalize.trainers.data import Wording
from personalize.trainers.denoiser import Denoiser
from personalize.trainers.eight_bits import eight_bit_layers, store_in_eight_bits
from personalize.trainers.errors import InputError
from personalize.trainers.loop import Learner, draw_objectives
from personalize.trainers.memory import LiveBytes, Rehearsal, needed, remedies
from personalize.trainers.method import Draws
from personalize.trainers.methods import METHODS
from personalize.trainers.methods.a3ft import A3FT
from personalize.trainers.run import Run
from personalize.trainers.settings import MOST_BATCHES
from personalize.trainers.unconditional import UnconditionalSettings, pixel_data
from tests.published import ROOT
from tests.sessions import interrupt, session, show
from tests.test_unconditional import pictures, tiny_base
from tests.tiny import (
    WIDTH,
    example,
    make,
    mixed_data,
    noise,
    sd_alphas,
    tiny_data,
    tiny_denoiser,
    tiny_unet,
)

every_method = pytest.mark.parametrize("name", METHODS)


def measured(method, denoiser, data, steps: int = 2) -> int:
    """Return the peak bytes of really training, the network's own among them."""
    with LiveBytes() as bytes_of:
        own = sum(p.nbytes for p in denoiser.parameters())
        learner = Learner(method, denoiser)
        for step in range(steps):
            objectives = list(draw_objectives(method, denoiser, data, step))
            learner.advance(step + 1, objectives, 1e-4)
    return own + bytes_of.peak


@every_method
@pytest.mark.parametrize(
    "checkpointing, how", [(False, {}), (True, {"batch_size": 3, "ema_decay": 0.5})]
)
def test_the_memory_that_a_run_needs_is_known_before(name, checkpointing, how):
    method, denoiser, data = make(METHODS[name], **how), tiny_denoiser(), tiny_data()
    if checkpointing:
        denoiser.unet.enable_gradient_checkpointing()
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    estimate = needed(method, denoiser, data)
    after = denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    steps = 8 if name == "selective_zo" else 2  # both branches
    assert estimate == pytest.approx(measured(method, denoiser, data, steps), rel=0.05)


def test_the_memory_of_large_random_weights_is_known_before(monkeypatch):
    monkeypatch.setattr("personalize.trainers.methods.bnn.DRAWN_ON_CPU", 0)
    method, denoiser, data = make(METHODS["bnn"], over="full"), tiny_denoiser(), tiny_data()
    estimate = needed(method, denoiser, data)
    assert estimate == pytest.approx(measured(method, denoiser, data), rel=0.05)


def kinds() -> dict[str, Configuration]:
    """Return the benchmark's rows that are more than other numbers (0 aside) of one before."""
    rows = {}
    for name, row in CONFIGURATIONS.items():
        words = ((k, v if isinstance(v, str) else bool(v)) for k, v in row.settings.items())
        rows.setdefault((row.method, *words), name)
    return {name: CONFIGURATIONS[name] for name in rows.values() if name != BASE}


@pytest.mark.parametrize("row", kinds().values(), ids=kinds())
def test_every_kind_of_training_is_known_on_layers_as_wide_as_a_real_bases(row):
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 1280),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=8,
            cross_attention_dim=WIDTH,
        )
    denoiser = Denoiser(unet.requires_grad_(False), sd_alphas(), "epsilon")
    settings = {k: v for k, v in row.settings.items() if k != "learning_rate"}
    own = sum(p.nbytes for p in unet.parameters())
    assert own < needed(make(METHODS[row.method], **settings), denoiser, tiny_data()) < 8 * own


class Widths(Rehearsal):
    """Note the kinds of numbers that a step asks a device for."""

    found: ClassVar[set[torch.dtype]] = set()

    def follow(self, tensors, before=None) -> None:
        super().follow(tensors, before)
        self.found.update(t.dtype for t in tensors if torch.is_tensor(t) and t.is_meta)


@every_method
def test_a_step_takes_no_number_that_apples_devices_do_not_know(name, monkeypatch):
    monkeypatch.setattr(memory_of, "Rehearsal", Widths)
    monkeypatch.setattr(Widths, "found", set())
    settings = {"min_snr_gamma": 5.0, "ema_decay": 0.5}
    needed(make(METHODS[name], **settings), tiny_denoiser(), tiny_data())
    assert torch.float32 in Widths.found and torch.float64 not in Widths.found


@pytest.mark.parametrize("chunks", [5, 12])
def test_a_caption_is_known_that_comes_late_and_is_long(chunks):
    data, method = tiny_data(20), make(METHODS["lora"], batch_size=1, steps=20)
    (last,) = Draws(method.settings.seed, 19, 0, 1).examples(data.training, 1)
    long = dataclasses.replace(last, context=noise(chunks * 77, last.context.shape[1]))
    late = tuple(long if example is last else example for example in data.training)
    estimate = needed(method, tiny_denoiser(), dataclasses.replace(data, training=late))
    held = measured(method, tiny_denoiser(), dataclasses.replace(data, training=late), steps=20)
    assert estimate == pytest.approx(held, rel=0.05)
    assert estimate > 1.2 * needed(method, tiny_denoiser(), data)


def test_steps_that_come_late_are_known_too():
    method = make(METHODS["selective_zo"], steps=100_000, batch_size=1)
    steps = memory_of.kinds_of_step(method, tiny_denoiser(), tiny_data())
    kinds = {(o.batch.zeroth_order, o.batch.latents.shape[-1]) for step in steps for o in step}
    assert kinds == {(False, 4), (True, 8)}


def test_what_encodes_while_training_needs_room_for_it():
    taken = {(64, 64): 10**9, (32, 32): 10**8}
    data = dataclasses.replace(tiny_data(), encoder_bytes=lambda *size: taken[size])
    plain = needed(make(METHODS["apt"]), tiny_denoiser(), tiny_data())
    assert 10**9 < needed(make(METHODS["apt"]), tiny_denoiser(), data) < 10**9 + plain
    half = needed(make(METHODS["apt"]), tiny_denoiser(), data, halved=True)
    assert 10**8 < half < 10**8 + plain
    for others in (make(METHODS["apt"], adaptive=False), make(METHODS["lora"])):
        assert needed(others, tiny_denoiser(), data) < 2 * plain


@pytest.mark.parametrize("seed", range(3))
def test_of_many_sizes_only_those_that_need_most_are_rehearsed(seed):
    method = make(METHODS["lora"], batch_size=1, steps=40, gradient_accumulation=2, seed=seed)
    (step,) = memory_of.kinds_of_step(method, tiny_denoiser(), mixed_data())
    assert [objective.batch.latents.numel() for objective in step] == [4 * 12 * 8] * 2


class Stopped(BaseException):
    """What a stop button raises."""


@pytest.mark.parametrize("parts", [3, 9])
def test_batches_beyond_the_second_leave_nothing_behind_but_themselves(parts):
    method, denoiser = make(METHODS["lora"], gradient_accumulation=parts), tiny_denoiser()
    estimate, held = (f(method, denoiser, tiny_data()) for f in (needed, measured))
    assert estimate == pytest.approx(held, rel=0.005)


def test_a_large_step_is_rehearsed_as_fast_as_a_small_one():
    done = []
    for parts in (2, MOST_BATCHES):
        heeded: list[int] = []  # before every operation
        method = make(METHODS["lora"], gradient_accumulation=parts, batch_size=1)
        needed(method, tiny_denoiser(), tiny_data(), heed=lambda found=heeded: found.append(1))
        done.append(len(heeded))
    assert done[0] == done[1] > 1000


def test_more_batches_than_a_step_may_have_are_no_remedy():
    method = make(METHODS["lora"], gradient_accumulation=MOST_BATCHES, batch_size=2)
    assert not any("batch_size" in told for told in remedies(method, tiny_denoiser(), tiny_data()))


@pytest.mark.parametrize("estimate", [needed, remedies])
def test_a_rehearsal_can_be_stopped(estimate):
    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        estimate(make(METHODS["lora"]), tiny_denoiser(), tiny_data(), heed=stop)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_rehearsed_step_can_be_stopped_at_any_moment(share):
    """That of a large network takes seconds: forward and backward heed the button all the while."""
    method, denoiser, calls = make(METHODS["lora"]), tiny_denoiser(), []
    peak = needed(method, denoiser, tiny_data(), heed=lambda: calls.append(1))
    last = int(share * len(calls))
    assert last > 1000
    calls.clear()

    def stop() -> None:
        calls.append(1)
        if len(calls) == last:
            raise Stopped

    with pytest.raises(Stopped):
        needed(method, denoiser, tiny_data(), heed=stop)
    assert len(calls) <= last + 5
    assert needed(method, denoiser, tiny_data()) == peak


def test_live_bytes_are_counted():
    with LiveBytes() as bytes_of:
        a = torch.ones(1000)
        b = a * 2
        del a
        c = b.view(10, 100) + 1
        b.add_(1)
        del b, c
    assert (bytes_of.peak, bytes_of.live) == (8000, 0)


def test_a_base_of_pixels_is_known_too():
    denoiser, data = tiny_base().denoiser(), pixel_data(pictures(4))
    method = A3FT(UnconditionalSettings(batch_size=2))
    estimate = needed(method, denoiser, data)
    assert estimate == pytest.approx(measured(method, denoiser, data), rel=0.05)


def of_process() -> tuple[int, int]:
    """Return (what is estimated, what this process held more) of training at 512 pixels."""
    unet = tiny_unet(block_out_channels=(64, 128), layers_per_block=2, attention_head_dim=8)
    denoiser = Denoiser(unet, sd_alphas(), "epsilon")
    large = dataclasses.replace(example(0), pixels=noise(3, 512, 512), latent=noise(4, 64, 64))
    data, method = dataclasses.replace(tiny_data(), training=(large,)), make(METHODS["lora"])
    estimate = needed(method, denoiser, data) - sum(p.nbytes for p in unet.parameters())
    learner = Learner(method, denoiser)
    before = reset_peak_memory(os.getpid())
    assert before is not None
    for step in range(2):
        learner.advance(step + 1, list(draw_objectives(method, denoiser, data, step)), 1e-4)
    return estimate, peak_memory(os.getpid()) - before


def test_what_is_counted_is_what_a_process_holds():
    """Of 440 MB, within 15 %; with glibc's usual heap, which keeps gaps, it holds 1.7 as much."""
    code = "import tests.conftest; from tests.test_memory import of_process; print(*of_process())"
    tight = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=tight,
        capture_output=True,
        text=True,
        check=True,
    )
    estimate, held = map(int, told.stdout.split())
    assert estimate == pytest.approx(held, rel=0.15)


def test_a_whole_sd15_is_known_without_holding_it():
    """LoRA at 512 pixels in bf16: 3.6 GiB; with gradient checkpointing 2.1 GiB."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    denoiser = Denoiser(unet.to(torch.bfloat16), sd_alphas(), "epsilon")
    picture = dataclasses.replace(
        example(0), pixels=noise(3, 512, 512), latent=noise(4, 64, 64), context=noise(77, 768)
    )
    data = dataclasses.replace(tiny_data(), training=(picture,), empty=Wording("", noise(77, 768)))
    method = make(METHODS["lora"])
    before = reset_peak_memory(os.getpid())
    assert before is not None
    plain = needed(method, denoiser, data)
    lean = remedies(method, denoiser, data)["'gradient_checkpointing' on"]
    assert (plain / 2**30, lean / 2**30) == pytest.approx((3.59, 2.09), rel=0.02)
    assert peak_memory(os.getpid()) - before < 2**28


# In ComfyUI


def test_the_stop_button_ends_a_rehearsal(root, monkeypatch):
    """Pressed once the network is there."""
    show(monkeypatch, lambda text: text == "preparing the network" and interrupt())
    monkeypatch.setattr(node, "stop_when_interrupted", lambda: None)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        session(steps=2).train()
    assert not (root / "some").exists()


@pytest.fixture
def memory(monkeypatch):
    """Let the machine have so much memory that training can have `size` bytes."""

    def limit(size: float) -> None:
        monkeypatch.setattr(room.Room, "free", int(size))

    return limit


def estimates(**settings) -> tuple[int, int]:
    """Return what `session(**settings)` needs, without and with gradient checkpointing."""
    asked = session(**settings)
    data, denoiser = asked.data, asked.base.denoiser("fp32")
    plain = needed(asked.method, denoiser, asked.base.in_network_scale(data, denoiser))
    denoiser.unet.enable_gradient_checkpointing()
    return plain, needed(asked.method, denoiser, asked.base.in_network_scale(data, denoiser))


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(node, "runs_root", lambda: tmp_path)
    return tmp_path


def test_what_training_needs_is_said_before_and_kept(root, monkeypatch):
    screen, (plain, _) = show(monkeypatch), estimates(steps=2)
    session(steps=2).train()
    (said,) = [text for text in screen.texts if "at its peak" in text]
    assert said.startswith(f"training needs about {room.gib(plain)} at its peak; of the memory, ")
    assert screen.texts.index(said) < next(
        i for i, text in enumerate(screen.texts) if text.startswith("step 1 ")
    )
    assert Run(root / "some").history()[-1]["needed_memory"] == plain


def test_gradient_checkpointing_comes_on_by_itself_when_nothing_else_would_fit(
    root, monkeypatch, memory
):
    screen, (plain, lean) = show(monkeypatch), estimates(steps=2)
    memory((plain + lean) / 2)
    session(steps=2).train()
    said = f"training needs about {room.gib(lean)} at its peak with gradient checkpointing"
    assert any(text.startswith(said) for text in screen.texts)
    assert Run(root / "some").history()[-1]["needed_memory"] == lean


@pytest.mark.parametrize("choice", ["auto", "on", "off"])
def test_what_can_not_fit_is_refused_before_the_first_step_with_what_would(
    root, monkeypatch, memory, choice
):
    screen, (plain, lean) = show(monkeypatch), estimates(steps=2)
    memory(lean - 1)
    with pytest.raises(MemoryError) as error:
        session(steps=2, gradient_checkpointing=choice).train()
    needs = plain if choice == "off" else lean
    text = str(error.value)
    assert text.startswith(f"out of memory: training needs about {room.gib(needs)} at its peak")
    listed = text.split("What needs less: ")[1]
    assert ("'gradient_checkpointing' on: " in listed) == (choice == "off")
    for knob in ("'precision' bf16", "'batch_size' 1", "'resolution'"):
        assert f"{knob}" in listed
    assert not any(text.startswith("step") for text in screen.texts)
    assert not (root / "some").exists() and comfy.model_management.current_loaded_models == []


def test_every_remedy_needs_less_as_it_says():
    method, data = make(METHODS["lora"], rank=32, layers="transformer"), tiny_data()
    found, plain = (f(method, tiny_denoiser(), data) for f in (remedies, needed))
    assert len(found) == 6 and list(found.values()) == sorted(found.values())
    assert all(size < plain for size in found.values())
    half = Denoiser(tiny_unet().to(torch.bfloat16), sd_alphas(), "epsilon")
    assert found["'precision' bf16"] == needed(method, half, data)
    store_in_eight_bits(half.unet)
    assert found["'precision' int8"] == needed(method, half, data)


def test_8_bits_are_a_remedy_only_where_they_can_be_had(monkeypatch):
    small = "'precision' int8", "'optimizer' adamw-8bit"

    def told(name: str, **how) -> set[str]:
        method = make(METHODS[name], batch_size=1, **how)
        return remedies(method, tiny_denoiser(), tiny_data()).keys() & {*small}

    assert told("bnn", over="full", learning_rate=1e-6) == {small[1]}
    assert told("para", optimizer="sgd") == {small[0]}
    monkeypatch.setattr(memory_of, "installed", lambda: False)
    assert not told("bnn")


def test_moments_in_8_bits_are_counted_as_such():
    method, data = make(METHODS["dreambooth"], optimizer="adamw-8bit"), tiny_data()
    estimate = needed(method, tiny_denoiser(), data)
    assert estimate == pytest.approx(measured(method, tiny_denoiser(), data), rel=0.05)
    assert estimate < 0.8 * needed(make(METHODS["dreambooth"]), tiny_denoiser(), data)


@pytest.mark.parametrize("name", ["dreambooth", "attention"])
def test_who_trains_the_bases_own_weights_is_told_of_lora(name):
    found = remedies(make(METHODS[name]), tiny_denoiser(), tiny_data())
    assert found["Train LoRA instead"] < needed(make(METHODS[name]), tiny_denoiser(), tiny_data())
    assert "Train LoRA instead" not in remedies(make(METHODS["bnn"]), tiny_denoiser(), tiny_data())


# In 8 bits

OVER_THE_BASE = [
    *(("lora", {}), ("para", {}), ("apt", {}), ("bnn", {}), ("selective_zo", {})),
    ("bnn", {"over": "oft"}),
    ("bnn", {"sigma_relative": True}),
]


def trained_in(precision: str, name: str, **how):
    """Train some steps; return what was needed, what was held, the losses, and the network."""
    asked = session(method=name, precision=precision, steps=3, **how)
    denoiser = asked.base.denoiser(precision)
    data = asked.base.in_network_scale(asked.data, denoiser)
    estimate = needed(asked.method, denoiser, data)
    denoiser.to(torch.device("cpu"))
    own = sum(p.nbytes for p in denoiser.parameters())
    with LiveBytes() as bytes_of:
        learner = Learner(asked.method, denoiser)
        steps = [list(draw_objectives(asked.method, denoiser, data, i)) for i in range(3)]
        losses = [learner.advance(i + 1, step, 1e-3) for i, step in enumerate(steps)]
    return estimate, own + bytes_of.peak, losses, denoiser


@pytest.mark.parametrize("name, how", OVER_THE_BASE)
def test_a_base_in_8_bits_takes_less_and_trains_alike(name, how):
    plain_estimate, _, plain, whole = trained_in("bf16", name, **how)
    estimate, held, losses, small = trained_in("int8", name, **how)
    assert losses == pytest.approx(plain, rel=0.01)
    layers = eight_bit_layers(small.unet).values()
    assert layers and all(layer.weight.dtype is torch.int8 for layer in layers)
    assert not eight_bit_layers(whole.unet)
    spared = sum(layer.weight.numel() - 4 * layer.out_features for layer in layers)
    assert plain_estimate - estimate == pytest.approx(spared, abs=0.03 * plain_estimate)
    assert estimate == pytest.approx(held, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_base_in_8_bits_keeps_nothing_for_the_way_back(checkpointing):
    """Beside autograd; bitsandbytes' own layer keeps its inputs, which checkpoints can not free."""
    denoiser, large = Denoiser(tiny_unet().bfloat16(), sd_alphas(), "epsilon"), example(0, 16, 16)
    data = dataclasses.replace(tiny_data(), training=(large,))
    store_in_eight_bits(denoiser.unet)
    if checkpointing:
        denoiser.unet.enable_gradient_checkpointing()
    method = make(METHODS["lora"])
    estimate = needed(method, denoiser, data)
    held = measured(method, denoiser.to(torch.device("cpu")), data)
    assert estimate == pytest.approx(held, rel=0.03)


def test_a_run_in_8_bits_is_loaded_over_the_whole_base(root, monkeypatch):
    show(monkeypatch)
    learned = session(steps=2, precision="int8").train()
    assert Run(root / "some").load("last").tensors.keys() == learned.tensors.keys()
    alike = session("other", steps=2, precision="bf16").train()
    assert learned.tensors.keys() == alike.tensors.keys()


@pytest.mark.parametrize("name", ["bnn", "apt"])
def test_the_bases_own_weights_can_not_learn_in_8_bits(root, monkeypatch, name):
    show(monkeypatch)
    with pytest.raises(InputError, match="'precision' is 'int8', in which the base's own weights"):
        session(method=name, over="full", precision="int8").train()
    assert not (root / "some").exists()


def test_without_its_package_8_bits_are_refused(root, monkeypatch):
    show(monkeypatch)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    monkeypatch.delitem(sys.modules, "personalize.trainers.int8_linear", raising=False)
    with pytest.raises(InputError, match="'precision' is 'int8', which needs the package bits"):
        session(precision="int8").train()
    assert "int8" not in choices_of("dreambooth") and "int8" in choices_of("selective_zo")


def choices_of(name: str) -> tuple[str, ...]:
    fields = {f.name: f for f in dataclasses.fields(METHODS[name].Settings)}
    return fields["precision"].metadata["choices"]
