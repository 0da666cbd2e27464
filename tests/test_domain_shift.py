"""The domain-shift benchmark: its distances against closed forms, its splits, one small run."""

import json
from itertools import product
from math import comb

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg, stats

from benchmarks import domain_shift
from benchmarks.digits import COUNT, READER, Reader, digits
from benchmarks.distances import fid, kid, nearest, squared_mmd
from benchmarks.domain_shift import Bench
from benchmarks.shift_tables import METRICS
from personalize.trainers.loop import train
from tests.test_unconditional import SIDE, tiny_base
from tests.tiny import noise


def gaussian(mean: torch.Tensor, covariance: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Draw features that have exactly this mean and covariance."""
    x = noise(count, len(mean), seed=seed).double()
    white = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_fid_is_the_frechet_distance_of_gaussians():
    one, two = (noise(6, 6, seed=seed).double() for seed in (1, 2))
    s, t = one @ one.T + torch.eye(6), two @ two.T + torch.eye(6)
    m, n = noise(6, seed=3).double(), noise(6, seed=4).double()
    mixed = np.trace(linalg.sqrtm((s @ t).numpy())).real
    expected = float((m - n).square().sum() + s.trace() + t.trace()) - 2 * mixed
    assert fid(gaussian(m, s, 50, 5), gaussian(n, t, 40, 6)) == pytest.approx(expected, rel=1e-8)


def test_fid_of_scaled_and_shifted_equals():
    """tr (sqrt(4 S) - sqrt(S))^2 = tr S, and |m|^2."""
    x = noise(100, 5).double()
    assert fid(x, x) == pytest.approx(0, abs=1e-9)
    assert fid(x, x + 2.0) == pytest.approx(4.0 * 5)
    centred = x - x.mean(0)
    assert fid(2 * centred, centred) == pytest.approx(float(x.T.cov().trace()))


def test_squared_mmd_is_its_sum():
    x, y = noise(7, 3, seed=1), noise(5, 3, seed=2)

    def mean(pairs):
        return np.mean([(float(a @ b) / 3 + 1) ** 3 for a, b in pairs])

    def others(z):
        return [(z[i], z[j]) for i, j in product(range(len(z)), repeat=2) if i != j]

    expected = mean(others(x)) + mean(others(y)) - 2 * mean(product(x, y))
    assert squared_mmd(x, y) == pytest.approx(expected, rel=1e-5)


def test_squared_mmd_is_unbiased():
    """0 on average between equals; between Gaussians sum_j (3 over j) (E x^j - E y^j)^2."""

    def mean_and_error(shift: float) -> tuple[float, float]:
        draws = [
            squared_mmd(noise(20, 1, seed=i), noise(20, 1, seed=1000 + i) + shift)
            for i in range(900)
        ]
        return float(np.mean(draws)), float(np.std(draws) / 30)

    def moments(m: float) -> tuple[float, float, float]:
        return m, m**2 + 1, m**3 + 3 * m

    for shift in (0.0, 0.7):
        expected = sum(
            comb(3, j) * (a - b) ** 2
            for j, a, b in zip((1, 2, 3), moments(0.0), moments(shift), strict=True)
        )
        found, error = mean_and_error(shift)
        assert abs(found - expected) < 4 * error


def test_kid_is_seeded_and_near_zero_between_equals():
    x, y = noise(300, 8, seed=1), noise(300, 8, seed=2)
    mean, deviation = kid(x, y)
    assert kid(x, y) == (mean, deviation)
    assert abs(mean) < deviation < 0.5
    assert kid(x, y + 1.0)[0] > 5 * deviation


def test_nearest_is_zero_for_copies():
    x = noise(10, 4)
    assert nearest(x[:3], x) == 0.0
    assert nearest(x[:3] + 10.0, x[:3]) == pytest.approx(10.0, abs=1.0)


# Splits and the run


def seen(pictures: torch.Tensor) -> set[float]:
    return set(pictures.flatten().tolist())


def test_no_picture_is_in_two_sets_and_those_for_tuning_are_in_no_other():
    pool = torch.arange(1097.0).reshape(1097, 1, 1, 1)
    bench = Bench(tiny_base(), Reader(16), pool, domain_shift.MOST, batch_size=2)
    splits = {seed: bench.split(seed) for seed in (0, 1, domain_shift.TUNING)}
    tuning = vars(splits.pop(domain_shift.TUNING)).values()
    tuned = set.union(*map(seen, tuning))
    assert [len(part) for part in tuning] == [219, 219, 0] and len(tuned) == 438
    for split in splits.values():
        parts = [seen(part) for part in vars(split).values()]
        assert [len(part) for part in parts] == [219, 219, 219]
        assert len(set.union(*parts)) == 657
        assert not tuned & set.union(*parts)
    assert seen(splits[0].training) != seen(splits[1].training)


def test_the_readers_pictures_are_not_in_the_pool():
    pictures, labels = digits(16)
    assert pictures.shape == (1797, 1, 16, 16) and pictures.min() == -1 and pictures.max() <= 1
    again, _ = digits(16)
    assert torch.equal(again, pictures)  # the same shuffle every time: reader and pool stay apart
    assert len(labels) == COUNT and READER + 5 * domain_shift.MOST <= COUNT


def test_more_pictures_than_there_are_are_refused(capsys):
    with pytest.raises(SystemExit):
        domain_shift.parsed(["--images", "220"])
    assert "--images: 220 is not in 2 to 219" in capsys.readouterr().err


def test_what_is_given_counts_more_than_quick():
    options = domain_shift.parsed(["--quick", "--images", "200"])
    assert (options.images, options.steps) == (200, "10,20")


@pytest.mark.parametrize("best", domain_shift.LADDER)
@pytest.mark.parametrize("start", set(domain_shift.START.values()))
def test_the_search_ends_at_a_rate_between_two_worse_ones(best, start):
    asked = []

    def measured(rate):
        asked.append(rate)
        return abs(np.log(rate / best))

    tried = domain_shift.search(measured, start)
    assert min(tried, key=lambda rate: tried[rate]) == best
    place = domain_shift.LADDER.index(best)
    assert set(domain_shift.LADDER[max(0, place - 1) : place + 2]) <= set(tried)
    assert len(asked) == len(set(asked)) == len(tried)


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    monkeypatch.setattr(domain_shift, "WORK", tmp_path)
    monkeypatch.setattr(domain_shift, "SAMPLING_STEPS", 2)
    pool = noise(100, 1, SIDE, SIDE).clamp(-1, 1)
    reader = Reader.trained(pool[:20], torch.arange(20) % 10, steps=2)
    return Bench(tiny_base(), reader, pool, images=20, batch_size=2)


def measured(cell: dict) -> dict:
    return {key: cell[key] for key in (*METRICS, "step", "learned_parameters")}


def test_a_training_goes_on_where_it_was_as_if_it_had_never_stopped(bench, monkeypatch, tmp_path):
    at_once = bench.cells("a3ft", 1e-3, 0, [2, 4])
    monkeypatch.setattr(domain_shift, "WORK", tmp_path / "again")
    bench.cells("a3ft", 1e-3, 0, [2])
    started = []

    def noted(method, denoiser, data, state=None):
        started.append(0 if state is None else state.done.index)
        yield from train(method, denoiser, data, state)

    monkeypatch.setattr(domain_shift, "train", noted)
    assert list(map(measured, bench.cells("a3ft", 1e-3, 0, [2, 4]))) == list(map(measured, at_once))
    assert started == [2]  # what was measured before is read back
    bench.cells("a3ft", 1e-3, 0, [3, 4])
    assert started == [2, 0]  # the state was too late


def test_every_set_has_one_size(bench, monkeypatch):
    sizes = []

    def noted(x, y):
        sizes.append((len(x), len(y)))
        return fid(x, y)

    monkeypatch.setattr(domain_shift, "fid", noted)
    bench.cells("naive", 1e-3, 0, [1])
    domain_shift.references(bench, [0])
    assert sizes == [(20, 20)] * 6


def cell(seed: int, kid_held_out: float) -> dict:
    return dict.fromkeys(METRICS, kid_held_out) | {"seed": seed, "code": "c", "confidence": 0.5}


def test_every_mode_is_compared_at_its_best_step_and_all_at_every_step(bench):
    cells = {
        "a3ft": {1: [cell(0, 0.5), cell(1, 0.4)], 2: [cell(0, 0.9), cell(1, 0.9)]},
        "naive": {1: [cell(0, 0.8), cell(1, 0.8)], 2: [cell(0, 0.7), cell(1, 0.5)]},
    }
    assert domain_shift.best_steps(cells) == {"a3ft": 1, "naive": 2}
    found = domain_shift.report(bench, cells, {})
    assert found["table"]["best"]["naive"]["kid_held_out"] == pytest.approx(0.6)
    assert found["table"]["last"]["a3ft"]["kid_held_out"] == pytest.approx(0.9)
    assert found["paired"]["last"]["a3ft - naive"]["gap"][0] == pytest.approx(0.3)
    mean, low, high = found["paired"]["best"]["a3ft - naive"]["kid_held_out"]
    expected = stats.ttest_rel([0.5, 0.4], [0.7, 0.5]).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((-0.15, expected.low, expected.high))
    assert found["kid_by_step"]["a3ft"][2] == pytest.approx((0.9, 0.9, 0.9))
    assert found["paired_by_step"]["a3ft - naive"][1][0] == pytest.approx(-0.35)
    assert found["code"] == {"c": 8}


@pytest.mark.slow
def test_the_command_measures_all_modes_and_tells_how_it_was_called(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(domain_shift, "WORK", tmp_path)
    monkeypatch.setattr(domain_shift, "SAMPLING_STEPS", 2)
    monkeypatch.setattr(domain_shift, "PROBED", 2)
    arguments = ["--quick", "--steps", "1", "--images", "20", "--json", str(tmp_path / "t.json")]
    domain_shift.main([*arguments, "--sheet", str(tmp_path / "t.png")])
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["command"].startswith("python -m benchmarks.domain_shift --quick --steps 1 ")
    learned = {mode: row["learned_parameters"] for mode, row in found["table"]["last"].items()}
    assert learned["attention"] < learned["a3ft"] < learned["naive"]
    text = (tmp_path / "t.md").read_text()
    assert text.rstrip() == capsys.readouterr().out.rstrip()
    assert all(text.count(f"\n| {mode} | ") == 3 for mode in domain_shift.MODES)
    assert text.count("\n| a3ft - attention | ") == 3 and "| real digits |" in text
    assert str(tmp_path) not in json.dumps(found["cells"])
    blocks = np.asarray(Image.open(tmp_path / "t.png")).reshape(5, 24 + 48, 960)
    assert all(title.min() < 128 for title in blocks[:, :24])


@pytest.mark.parametrize("given", [["--learning-rate", "3e-4"], []])
def test_one_rate_for_all_modes_is_not_searched(given, monkeypatch, tmp_path):
    """Without it each mode has its best."""
    rates = {"attention": 3e-4, "naive": 3e-4} if given else {"attention": 2e-3, "naive": 2e-5}

    def measured(self, mode, rate, seed, steps):
        kid_held_out = abs(np.log(rate / rates[mode]))
        more = {"step": 1, "learning_rate": rate, "learned_parameters": 1, "mode": mode}
        return [cell(seed, kid_held_out) | more for _ in steps]

    monkeypatch.setattr(Bench, "cells", measured)
    monkeypatch.setattr(domain_shift, "SAMPLING_STEPS", 1)
    arguments = ["--images", "20", "--steps", "1", "--seeds", "0", "--modes", "attention,naive"]
    domain_shift.main([*arguments, *given, "--json", str(tmp_path / "r.json")])
    found = json.loads((tmp_path / "r.json").read_text())
    used = {mode: row["learning_rate"] for mode, row in found["table"]["last"].items()}
    assert used == rates
    assert bool(found["sweep"]) != bool(given)
    assert ("Learning rates tried" in (tmp_path / "r.md").read_text()) != bool(given)
