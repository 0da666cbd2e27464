"""The benchmark of two subjects in one model: its judging, and one tiny real run."""

import json

import pytest
from PIL import Image

from benchmarks import together
from benchmarks.cells import SIDE, drawn
from benchmarks.gain import interval


def test_who_is_confused_with_whom_shows(monkeypatch):
    monkeypatch.setattr(together, "expected", lambda: ["a totem"] * 4)
    right = {str(subject): drawn(subject, 4) for subject in (101, 102)}
    swapped = dict(zip(right, reversed(right.values()), strict=True))
    found = together.scores({"right": right, "swapped": swapped}, (101, 102))
    assert found["right"]["own"] > 0.8 > 0.5 > found["right"]["other"]
    assert found["swapped"]["own"] == pytest.approx(found["right"]["other"], abs=1e-5)
    assert found["swapped"]["other"] == pytest.approx(found["right"]["own"], abs=1e-5)


def test_ways_are_compared_pair_by_pair_each_the_mean_of_its_seeds():
    def cell(pair, seed, ours, loras):
        values = {"PaRa, concat": ours, together.BASELINE: loras}
        scores = {way: dict.fromkeys(together.SCORES, value) for way, value in values.items()}
        return {"subjects": pair, "seed": seed, "scores": scores}

    cells = [cell([1, 2], 0, 0.5, 0.4), cell([1, 2], 1, 0.7, 0.4), cell([3, 4], 0, 0.5, 0.4)]
    table = together.by_way(cells)
    found = together.differences(table)["PaRa, concat"]["own"]
    mean, low, high = interval([0.2, 0.1])
    assert found == pytest.approx({"mean": mean, "low": low, "high": high, "n": 2})
    text = together.markdown(table)
    assert "| PaRa, concat | 0.550 | 0.550 | 0.550 |" in text
    assert f"| PaRa, concat | 2 | {mean:+.3f} [{low:+.3f}, {high:+.3f}] |" in text


@pytest.mark.slow
@pytest.mark.server
def test_a_tiny_run_trains_combines_and_judges(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(together, "BACKGROUNDS", together.BACKGROUNDS[:1])
    monkeypatch.setattr(together, "SAMPLES", 1)
    json_file, sheet_file = tmp_path / "together.json", tmp_path / "together.png"
    arguments = ["--pairs", "101:102", "--seeds", "0", "--steps", "1", "--rank", "1"]
    arguments += ["--called", "zib totem,wug heart", "--prior", "1", "--layers", "all"]
    together.main([*arguments, "--json", str(json_file), "--sheet", str(sheet_file)])
    result = json.loads(json_file.read_text(), parse_constant=pytest.fail)
    (cell,) = result["cells"]
    ways = ["PaRa apart", "LoRA apart", "PaRa, concat", "PaRa, sequential", "PaRa, sum"]
    assert list(cell["scores"]) == ["base", *ways, "two LoRAs"]
    assert all(-1 <= row["own"] <= 1 for row in cell["scores"].values())
    owns = [row["own"] for row in cell["scores"].values()]
    assert len(set(owns)) == len(owns)  # every way is a model of its own
    assert result["paired"].keys() == {"base", *ways}
    shown = capsys.readouterr().out
    assert all(shown.count(f"\n| {way} | ") == 2 for way in ways)
    assert Image.open(sheet_file).size[1] > 8 * SIDE
