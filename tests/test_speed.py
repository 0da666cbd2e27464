"""The benchmark of speed: its statistics, and that contestants do the same work. Never a time."""

import json
import math
from itertools import count, pairwise

import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import speed
from benchmarks.contestants import Base, Forward, Ours, Plan
from benchmarks.pairs import interleaved, ratio_of
from benchmarks.rivals import Bare, Diffusers, Stock
from benchmarks.speed import COSTS, MORE, RATIOS, TARGETS, Measured, contestants, report, table
from benchmarks.stock import GEOMETRIES, Geometry, silent
from personalize.nodes.bridge import twin_config
from personalize.trainers.memory import LiveBytes
from personalize.trainers.method import Draws, Objective
from tests.tiny import noise

CPU = torch.device("cpu")
TINY = Geometry(64, (32, 64), (1, 0), 1, 32, heads=4)
XL = Geometry(64, (64, 128), (0, 1), 1, 32, head_channels=64, pooled=24)


@pytest.fixture(scope="module")
def base() -> Base:
    silent()
    return Base.of(plan())


def plan(geometry: Geometry = TINY, batch: int = 2) -> Plan:
    return Plan(geometry, CPU, "fp32", rank=4, batch=batch, resolution=geometry.resolution)


# Statistics


def test_a_ratio_is_the_median_over_pairs_and_not_the_ratio_of_sums():
    pairs = [(2.0, 1.0), (3.0, 2.0), (10.0, 10.0), (400.0, 100.0), (1.9, 1.0)]
    found = ratio_of(pairs)
    assert found.median == pytest.approx(1.9)
    assert found.seconds == (3.0, 2.0)
    assert found.low <= found.median <= found.high
    assert (found.low, found.high) == (1.0, 4.0)  # of five pairs, nothing more can be said


def test_the_interval_shrinks_with_more_pairs_and_covers_the_truth():
    def pairs(number: int) -> list[tuple[float, float]]:
        slower = noise(number).mul(0.1).exp().tolist()
        return [(1.3 * times, 1.0) for times in slower]

    few, many = ratio_of(pairs(10)), ratio_of(pairs(400))
    assert many.high - many.low < 0.4 * (few.high - few.low)
    assert many.low < 1.3 < many.high


def test_a_slow_while_falls_on_both_sides():
    """Every second the machine is half as fast; pairs do not notice."""
    clock = count()

    def seconds(name: str) -> float:
        slow = 2.0 if next(clock) // 2 % 2 else 1.0  # changes between pairs
        return slow * {"a": 3.0, "b": 2.0}[name]

    found = ratio_of(interleaved({"ratio": ("a", "b")}, seconds, 20)["ratio"])
    assert (found.low, found.median, found.high) == (1.5, 1.5, 1.5)


def test_who_goes_first_alternates_and_all_comparisons_take_turns():
    order = []
    comparisons = {"x": ("a", "b"), "y": ("c", "a")}
    found = interleaved(comparisons, lambda name: order.append(name) or float(len(order)), 2)
    assert "".join(order) == "abca" + "baac"
    assert found == {"x": [(1.0, 2.0), (6.0, 5.0)], "y": [(3.0, 4.0), (8.0, 7.0)]}


def test_the_report_has_all_ratios_intervals_and_memory():
    every = {**RATIOS, **MORE, **COSTS}
    sides = {name for pair in every.values() for name in pair}
    memory = {name: {"kept": 2**20, "step": 2**20, "peak": 2**21} for name in sides}
    pairs = {name: [(1.1, 1.0), (1.2, 1.0)] for name in every}
    measured = Measured(pairs, memory, dict.fromkeys(sides, 7))
    result = json.loads(json.dumps(report(measured, {"machine": "m", "command": "c"})))
    assert (
        set(result["ratios"])
        == set(RATIOS)
        >= {
            *("lora_vs_bare", "lora_vs_stock", "lora_vs_diffusers", "apt_vs_lora"),
            *("apt_cached_vs_lora", "bnn_vs_lora", "para_vs_lora", "a3ft_vs_attention"),
            "zo_vs_forward",
        }
    )
    assert set(result["intervals"]) == set(every)
    assert set(result["memory"]) == sides == set(contestants())
    assert all(result[key] for key in ("machine", "command", "costs"))
    text = table(result)
    assert text.count("MISSED: 1.05") == 1 and text.count("met: 1.6") == 1
    assert set(TARGETS) < {*RATIOS, *MORE}


# Contestants


@pytest.mark.parametrize("name, weights", [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
def test_a_geometry_is_that_of_the_real_base(name, weights):
    """The numbers of weights that the published U-Nets have."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**twin_config(GEOMETRIES[name].config()))
    assert sum(p.numel() for p in unet.parameters()) == weights


def test_the_benchmark_runs_and_writes_everything(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(GEOMETRIES, "demo", TINY)
    path = tmp_path / "speed.json"
    small = ["--geometry", "demo", "--device", "cpu", "--rank", "4", "--pairs", "1"]
    speed.main([*small, "--resolution", "64", "--json", str(path)])
    result = json.loads(path.read_text())
    assert set(result["ratios"]) == set(RATIOS)
    assert all(0 < ratio < math.inf for ratio in result["ratios"].values())
    assert all(m["step"] > 0 for m in result["memory"].values())
    assert result["command"].startswith("python -m benchmarks.speed --geometry demo")
    assert "comfyui" in result["versions"] and result["machine"]
    assert "| lora : bare loop |" in capsys.readouterr().out


def test_all_train_a_lora_of_the_same_size_on_the_same_base(base):
    made = [Ours(base, "lora"), Bare(base), Diffusers(base)]
    for one in made:
        one.step()
    assert len({one.trained() for one in made}) == 1
    assert len({one.kept() for one in made}) == 1


def test_the_gradients_of_a_step_are_part_of_its_memory(base, monkeypatch):
    """A GPU's allocator, asked before and after, would not count those of the step before."""
    ours, seen = Ours(base, "lora"), []

    class Meter(LiveBytes):
        def __enter__(self):
            seen.extend(p.grad is None for p in ours.denoiser.unet.parameters())
            return super().__enter__()

    monkeypatch.setattr(speed, "meter", lambda device: Meter())
    ours.step()
    assert speed.memory_of(ours, CPU)["step"] > 4 * ours.trained()
    assert seen and all(seen)


def test_all_share_the_storage_of_the_base(base):
    name = "conv_in.weight"
    ours, bare = base.denoiser().unet, Bare(base).unet
    assert ours.get_parameter(name).data_ptr() == bare.get_parameter(name).data_ptr()


@pytest.mark.parametrize("geometry", [TINY, XL], ids=["sd", "sdxl"])
def test_the_bare_loop_asks_what_we_ask(geometry):
    """The same batch and the same LoRA, as after much training: the same loss."""
    base = Base.of(plan(geometry))
    bare, ours = Bare(base), Ours(base, "lora")
    ours.step()
    learned = dict(ours.denoiser.unet.named_parameters())
    batch = ours.method.draw(base.data, ours.denoiser, Draws(0, 5, 0, 1))
    told = {"text_embeds": batch.pooled, "time_ids": batch.sizes} if geometry.pooled else {}
    asked = batch.latents, batch.noise, batch.timesteps, batch.context, told
    with torch.no_grad():
        at_first = float(bare.loss(*asked))
        for index, (name, parameter) in enumerate(bare.unet.named_parameters()):
            if parameter.requires_grad:
                learned[name].add_(noise(*parameter.shape, seed=index), alpha=0.1)
                parameter.copy_(learned[name])
        of_bare = float(bare.loss(*asked))
        of_ours = float(Objective(ours.method, ours.denoiser, batch)())
    assert of_bare == pytest.approx(of_ours, rel=1e-5)
    assert of_bare != pytest.approx(at_first, rel=1e-3)


def test_stock_is_stepped_through_and_learns(base):
    stock = Stock(base)
    try:
        seen = []
        for _ in range(3):
            stock.step()
            seen.append(torch.cat([p.detach().flatten().clone() for p in stock.parameters]))
        assert not any(torch.equal(a, b) for a, b in pairwise(seen))
        with LiveBytes() as elsewhere:
            stock.step()
        assert elsewhere.peak == 0  # it has a thread of its own
        stock.step(inside := LiveBytes())
        assert inside.peak > 4 * stock.trained()  # at least the gradients
    finally:
        stock.close()
    assert not stock.training._thread.is_alive()


def test_an_error_of_stock_comes_out(base):
    stock = Stock(base, optimizer="none")
    with pytest.raises(AttributeError):
        stock.step()
    stock.close()


def test_what_stock_trains_is_the_base_and_the_base_stays(base):
    before = {n: w.clone() for n, w in base.model.model.diffusion_model.named_parameters()}
    stock = Stock(base)
    try:
        stock.step()
    finally:
        stock.close()
    after = dict(base.model.model.diffusion_model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_forward_is_half_of_what_zo_does(base):
    """Counted, not timed: passes through the network."""
    zo = Ours(base, "selective_zo", branches="zo-high")
    assert (passes(zo), passes(Forward(base))) == (2, 1)


def test_a_cached_teacher_is_not_asked_again(base):
    apt = Ours(base, "apt", teacher_cache=2)
    for _ in range(speed.WARM_UP):
        apt.step()
    assert passes(apt) == 1
    assert passes(Ours(base, "apt")) == 2


def passes(contestant: Ours | Forward) -> int:
    """Count the forward passes of a step."""
    calls = []
    contestant.denoiser.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    contestant.step()
    return len(calls)
