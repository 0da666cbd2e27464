"""The benchmark of the corruption stage: its measures, and a small run of it."""

import itertools
import json

import pytest
import torch
from PIL import Image

from benchmarks import corruption_stage as benchmark


def test_the_measures_are_those_that_are_written():
    generator = torch.Generator().manual_seed(0)
    known = torch.rand(3, 1, 4, 4, generator=generator) * 2 - 1
    pictures = torch.rand(5, 1, 4, 4, generator=generator) * 2 - 1
    found = benchmark.measured(pictures, known)
    apart = [min(float(((p - k) ** 2).mean()) for k in known) for p in pictures]
    assert found["distance"] == pytest.approx(sum(apart) / 5, rel=1e-4)
    assert benchmark.measured(known, known) == pytest.approx(
        {"distance": 0.0, "grain": 1.0, "noisy": 0.0, "diversity": 1.0}, abs=1e-3
    )
    grainy = benchmark.measured(3 * known, known)
    assert grainy["grain"] == pytest.approx(9.0, rel=1e-4) and grainy["noisy"] > 0
    assert grainy["diversity"] == pytest.approx(9.0, rel=1e-4)


def test_steps_stand_at_equal_ratios():
    steps = benchmark.points(6000)
    assert steps[0] == 25 and steps[-1] == 6000 and len(steps) == benchmark.POINTS
    assert all(
        later / step == pytest.approx(240 ** (1 / 35), rel=0.03)
        for step, later in itertools.pairwise(steps)
    )
    assert benchmark.points(2) == [2]


def test_a_small_run_is_kept_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "WORK", tmp_path / "work")
    monkeypatch.setattr(benchmark, "POINTS", 4)
    monkeypatch.setattr(benchmark, "FIRST", 1)
    monkeypatch.setattr(benchmark, "PERIODS", 2)
    asked = ["--seeds", "0,1", "--steps", "4", "--samples", "3", "--sigmas", "0.5"]
    files = [f"--json={tmp_path / 'found.json'}", f"--sheet={tmp_path / 'found.png'}"]
    benchmark.main([*asked, *files])
    found = json.loads((tmp_path / "found.json").read_text())
    steps = found["by_step"]
    assert set(steps) == {"plain", "bnn 0.5"} and list(steps["plain"]) == ["1", "2", "3", "4"]
    assert steps["plain"] != steps["bnn 0.5"] and set(found["paired"]) == {"bnn 0.5 - plain"}
    assert list(found["by_period"]["plain"]) == ["1 to 2", "3 to 4"]
    grain = {when: row["grain"][0] for when, row in found["by_period"]["plain"].items()}
    by_hand = [sum(steps["plain"][n]["grain"][0] for n in pair) / 2 for pair in ("12", "34")]
    assert list(grain.values()) == pytest.approx(by_hand)
    apart = found["paired_by_period"]["bnn 0.5 - plain"]["3 to 4"]["grain"][0]
    expected = found["by_period"]["bnn 0.5"]["3 to 4"]["grain"][0] - by_hand[1]
    assert apart == pytest.approx(expected)
    assert Image.open(tmp_path / "found.png").width > 100
    told = (tmp_path / "found.md").read_text()
    assert "seeds 0,1" in told and told in capsys.readouterr().out

    monkeypatch.setattr(benchmark, "train", None)
    benchmark.main([*asked, *files])
    again = json.loads((tmp_path / "found.json").read_text())
    assert again == found

    benchmark.main([*asked, *files, "--seeds", "1"])  # alone: means, and no intervals
    alone = json.loads((tmp_path / "found.json").read_text(), parse_constant=pytest.fail)
    assert alone["by_step"]["plain"]["4"]["grain"][1:] == [None, None]
    assert "nan" not in (tmp_path / "found.md").read_text()
