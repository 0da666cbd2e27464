"""The benchmark of two subjects in one model: its judging, and one tiny real run."""

import json

import pytest
from PIL import Image

from benchmarks import together
from benchmarks.cells import SIDE, drawn


def test_who_is_confused_with_whom_shows(monkeypatch):
    monkeypatch.setattr(together, "said", lambda name: ["a totem"] * 4)
    right = {
        name: drawn(subject, 4) for name, subject in zip(together.NAMES, (101, 102), strict=True)
    }
    swapped = dict(zip(right, reversed(right.values()), strict=True))
    found = together.scores({"right": right, "swapped": swapped}, (101, 102))
    assert found["right"]["own"] > 0.8 > 0.5 > found["right"]["other"]
    assert found["swapped"]["own"] == pytest.approx(found["right"]["other"], abs=1e-5)
    assert found["swapped"]["other"] == pytest.approx(found["right"]["own"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.server
def test_a_tiny_run_trains_combines_and_judges(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(together, "BACKGROUNDS", together.BACKGROUNDS[:1])
    monkeypatch.setattr(together, "SAMPLES", 1)
    json_file, sheet_file = tmp_path / "together.json", tmp_path / "together.png"
    arguments = ["--pairs", "101:102", "--seeds", "0", "--steps", "1"]
    together.main([*arguments, "--json", str(json_file), "--sheet", str(sheet_file)])
    (cell,) = json.loads(json_file.read_text())["cells"]
    ways = ["PaRa apart", "LoRA apart", "PaRa, concat", "PaRa, sequential", "PaRa, sum"]
    assert list(cell["scores"]) == ["base", *ways, "two LoRAs"]
    assert all(-1 <= row["own"] <= 1 for row in cell["scores"].values())
    owns = [row["own"] for row in cell["scores"].values()]
    assert len(set(owns)) == len(owns)  # every way is a model of its own
    assert capsys.readouterr().out.count("\n") == len(ways) + 4
    assert Image.open(sheet_file).size[1] > 8 * SIDE
