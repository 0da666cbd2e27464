"""The domain-shift benchmark: its distances against closed forms, its splits, one small run."""

import argparse
from itertools import product
from math import comb

import numpy as np
import pytest
import torch
from scipy import linalg

from benchmarks import domain_shift
from benchmarks.distances import fid, kid, nearest, squared_mmd
from benchmarks.domain_shift import MODES, Bench, Reader, Split, paired
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


def test_no_picture_is_in_two_parts_of_a_split():
    pool = torch.arange(1000.0).reshape(1000, 1, 1, 1)
    for seed in (0, 1):
        split = Split.of(pool, seed, images=200)
        parts = [set(part.flatten().tolist()) for part in vars(split).values()]
        assert [len(part) for part in parts] == [200, 200, 500]
        assert len(set.union(*parts)) == 900
    others = Split.of(pool, 2, images=200).training
    assert set(others.flatten().tolist()) != set(split.training.flatten().tolist())


def test_the_readers_pictures_are_not_in_the_pool():
    pictures, labels = domain_shift.digits(16)
    assert pictures.shape == (1797, 1, 16, 16) and pictures.min() == -1 and pictures.max() <= 1
    again, _ = domain_shift.digits(16)
    assert torch.equal(again, pictures)  # the same shuffle every time: reader and pool stay apart
    assert len(labels) == 1797 > domain_shift.READER + domain_shift.VALIDATION + 500


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
    pool = noise(250, 1, SIDE, SIDE).clamp(-1, 1)
    reader = Reader.trained(pool[:20], torch.arange(20) % 10, steps=2)
    return Bench(tiny_base(), reader, pool, images=8, batch_size=2, samples=20)


def test_every_training_is_done_once_and_told_in_the_tables(bench, monkeypatch):
    seeds, steps = (0, 1), 2
    cells = [bench.cell(mode, 1e-3, seed, steps) for seed in seeds for mode in MODES]
    learned = {cell["mode"]: cell["learned_parameters"] for cell in cells}
    assert learned["attention"] < learned["a3ft"] < learned["naive"]
    monkeypatch.setattr(Bench, "_measure", None)  # a second time nothing is trained
    assert [bench.cell(m, 1e-3, seed, steps) for seed in seeds for m in MODES] == cells
    differences = paired(cells)
    one, two = ([c["kid_held_out"] for c in cells if c["mode"] == m] for m in ("a3ft", "naive"))
    mean, low, high = differences["a3ft - naive"]["kid_held_out"]
    assert mean == pytest.approx(np.mean(one) - np.mean(two)) and low <= mean <= high
    domain_shift.contact_sheet(bench, cells, domain_shift.WORK / "sheet.png")
    result = {
        "command": "python",
        "machine": "here",
        "settings": vars(argparse.Namespace(images=8, steps=2, batch_size=2, samples=20, seeds=2)),
        "classifier_accuracy": 0.5,
        "references": domain_shift.references(bench, seeds),
        "sweep": {mode: {1e-3: 0.5} for mode in MODES},
        "chosen": dict.fromkeys(MODES, 1e-3),
        "table": {m: domain_shift.mean_of([c for c in cells if c["mode"] == m]) for m in MODES},
        "paired": differences,
    }
    text = domain_shift.markdown(result)
    assert all(f"| {name} | 0.001 |" in text for name in MODES)
    assert "| a3ft - attention | " in text and "| real digits |" in text
