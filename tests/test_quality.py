"""The quality benchmark: its metrics, its statistics, its cells, and one tiny real run."""

import json
import math
import mmap
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from benchmarks import comparisons, metrics, provenance, quality, reports, tables
from benchmarks.cells import BASE_FILE, MOST_PICTURES, SIDE, Plan, Row, Task, drawn, memory_file
from benchmarks.configurations import BASE, BASELINE, CONFIGURATIONS, configuration
from benchmarks.servers import Meter, peak_memory, processor_seconds, reset_peak_memory, share_out
from headless import Progress
from tests.tiny import noise

PLAN = Plan(steps=4, samples=2, sampler_steps=2)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Eight pictures of a subject, (8, 128, 128, 3)."""
    return drawn(101, 8)


def noisy(pictures: torch.Tensor, scale: float) -> torch.Tensor:
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    return (pictures + scale * noise).clamp(0, 1)


# Metrics


def naive_drift(samples: np.ndarray, reference: np.ndarray) -> float:
    """Return the mean over prompts and judges of the energy distance, by sums over pairs."""

    def distances(a, b, same=False):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return sum(math.dist(a[i], b[j]) for i, j in pairs) / len(pairs)

    found = []
    for judge in range(samples.shape[2]):
        everything = np.concatenate(reference[:, :, judge])
        unit = distances(everything, everything, True)
        for prompt in range(len(samples)):
            x, y = samples[prompt, :, judge], reference[prompt, :, judge]
            energy = 2 * distances(x, y) - distances(x, x, True) - distances(y, y, True)
            found.append(energy / unit)
    return sum(found) / len(found)


def test_drift_equals_the_sum_over_pairs():
    samples = noise(3, 5, 2, 7, seed=1).double() + 0.5
    reference = noise(3, 6, 2, 7, seed=2).double()
    expected = naive_drift(samples.numpy(), reference.numpy())
    assert metrics.drift(samples, reference) == pytest.approx(expected)


def test_drift_of_one_distribution_is_zero_on_average_and_grows_with_the_shift():
    """However far apart the prompts are, and with fewer samples of each than the reference has."""
    generator = torch.Generator().manual_seed(0)
    prompts = 10 * torch.randn(4, 1, 1, 20, generator=generator, dtype=torch.float64)

    def draw(count, shift=0.0):
        around = torch.randn(4, count, 1, 20, generator=generator, dtype=torch.float64)
        return prompts + around + shift

    same = [metrics.drift(draw(4), draw(12)) for _ in range(400)]
    assert abs(np.mean(same)) < 3 * stats.sem(same)
    shifted = [metrics.drift(draw(50, shift), draw(50)) for shift in (0.0, 0.3, 1.0)]
    assert shifted[0] < shifted[1] < shifted[2]


def test_drift_is_measured_in_the_judges_own_units():
    samples, reference = noise(2, 5, 2, 7, seed=1) + 1, noise(2, 6, 2, 7, seed=2)
    units = torch.tensor([3.0, 0.1])[:, None]
    scaled = metrics.drift(samples * units, reference * units)
    assert scaled == pytest.approx(metrics.drift(samples, reference), rel=1e-4)


def test_another_subject_is_further_away_than_more_of_the_same():
    reference = metrics.features(drawn(101, 24))[None]
    same = metrics.drift(metrics.features(drawn(101, 24, "held-out"))[None], reference)
    other = metrics.drift(metrics.features(drawn(102, 24, "held-out"))[None], reference)
    assert same < other / 10


def test_copies_are_as_near_as_can_be_and_other_pictures_are_not(pictures):
    training, held_out = pictures[:4], pictures[4:]
    assert metrics.nearest_silhouette(training, pictures) == pytest.approx(1.0, abs=1e-5)
    assert metrics.nearest_silhouette(held_out, training) < 0.95


def test_diversity_is_zero_for_one_repeated_picture_and_compares_only_one_prompts_samples(pictures):
    repeated = pictures[:1].repeat(4, 1, 1, 1)
    assert metrics.diversity(repeated, ["a"] * 4) == pytest.approx(0.0, abs=1e-5)
    pairs = pictures[[0, 0, 1, 1]]
    assert metrics.diversity(pairs, ["a", "a", "b", "b"]) == pytest.approx(0.0, abs=1e-5)
    assert metrics.diversity(pairs, ["a", "b", "a", "b"]) > 0.05
    assert math.isnan(metrics.diversity(pairs[:2], ["a", "b"]))


def test_diversity_equals_the_naive_mean(pictures):
    x = pictures[:3]
    reader = metrics.attribute_reader()
    from demo.judges import resized

    units = torch.nn.functional.normalize(reader.trunk(resized(x)), dim=1)
    distances = [
        float(((units[i] - units[j]) ** 2).sum(0).mean()) for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert metrics.diversity(x, ["a"] * 3) == pytest.approx(np.mean(distances), rel=1e-3)


def test_noise_raises_the_corruption_index_and_is_measured_in_its_own_unit(pictures):
    scales = [0.0, 0.02, 0.05, 0.1]
    indices = [metrics.corruption_index(noisy(pictures, scale), pictures) for scale in scales]
    assert indices[0] == 0.0
    assert indices == sorted(indices)
    grey = torch.full((2, 64, 64, 3), 0.5)
    assert float(metrics.noise_level(noisy(grey, 0.02)).mean()) == pytest.approx(5.1, rel=0.1)
    assert float(metrics.noise_level(grey).max()) == 0.0


def test_the_corruption_index_is_the_log_of_the_naive_energy(pictures):
    x = pictures[:1, :6, :6]

    def energy(z):
        padded = np.pad(z[0].numpy(), ((1, 1), (1, 1), (0, 0)), mode="edge")
        means = sum(padded[i : i + 6, j : j + 6] for i in range(3) for j in range(3)) / 9
        return ((z[0].numpy() - means) ** 2).mean()

    changed = noisy(x, 0.1)
    expected = math.log2(energy(changed) / energy(x))
    assert metrics.corruption_index(changed, x) == pytest.approx(expected, rel=1e-4)


# Statistics


def test_the_paired_interval_is_that_of_the_t_test():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(1.0, 1, (5, 3)), rng.normal(0.0, 1, (5, 3))
    tables = [
        {(s, k): {"x": float(values[s, k])} for s in range(5) for k in range(3)}
        for values in (ours, theirs)
    ]
    found = comparisons.paired(*tables)["x"]
    expected = stats.ttest_rel(ours.mean(1), theirs.mean(1)).confidence_interval(0.95)
    assert found["n"] == 5
    assert found["mean"] == pytest.approx((ours - theirs).mean())
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))


def test_only_what_both_methods_have_is_compared_and_one_subject_has_no_interval():
    ours = {(1, 0): {"x": 3.0, "y": 1.0}, (2, 0): {"x": 9.0, "y": 1.0}}
    theirs = {(1, 0): {"x": 1.0}, (3, 0): {"x": 5.0}}
    found = comparisons.paired(ours, theirs)
    assert found.keys() == {"x"}
    assert found["x"]["mean"] == 2.0
    assert math.isnan(found["x"]["low"])


def row(similarity: float, drift: float) -> dict[str, float]:
    return {"subject_similarity": similarity, "prior_drift": drift}


LADDER = {
    "base": {(1, 0): row(0.0, 0.0), (2, 0): row(0.0, 0.0)},
    "lora-slow": {(1, 0): row(0.2, 0.1), (2, 0): row(0.3, 0.1)},
    "lora": {(1, 0): row(0.4, 0.5), (2, 0): row(0.4, 0.5)},
    "lora-fast": {(1, 0): row(0.5, 0.9), (2, 0): row(0.5, 0.9)},
    "apt": {(1, 0): row(0.3, 0.2), (2, 0): row(0.6, 0.2)},  # the second beyond any LoRA
}


def test_at_equal_similarity_lora_is_taken_between_its_learning_rates():
    found, remain = comparisons.at_equal_similarity(LADDER, "apt", "lora")
    assert found["prior_drift"]["mean"] == pytest.approx(0.2 - 0.3)
    assert found["subject_similarity"]["mean"] == pytest.approx(0.0)
    assert found["prior_drift"]["n"] == 1
    assert remain == {"cells": 1, "of_cells": 2, "subjects": 1, "of_subjects": 2}


@pytest.mark.parametrize("rung", ["base", "lora-slow", "lora", "lora-fast"])
def test_nothing_is_matched_without_the_whole_ladder(rung):
    short = {name: cells for name, cells in LADDER.items() if name != rung}
    assert comparisons.at_equal_similarity(short, "apt", "lora") == ({}, {})
    assert not reports.differences(short)["matched"]


def test_para_is_compared_with_the_ladder_of_what_it_is_compared_with_too():
    own = {f"lora-like-para{speed}": LADDER[f"lora{speed}"] for speed in ("-slow", "", "-fast")}
    found = reports.differences({**LADDER, **own, "para": LADDER["apt"]})
    assert {"para - lora", "para - lora-like-para"} <= found["matched"].keys()
    assert found["matched"]["para - lora-like-para"]["prior_drift"]["mean"] == pytest.approx(-0.1)
    assert found["matched_cells"]["para - lora-like-para"]["cells"] == 1
    assert "lora-like-para-slow - lora-like-para" not in found["matched"]  # a rung itself


def test_every_row_is_compared_with_what_it_varies():
    names = ("bnn", "bnn-0", "apt", "apt-ata-rs", "apt-ata", "selective_zo", "selective_zo-still")
    found = reports.differences({name: LADDER["lora"] for name in (BASE, BASELINE, *names)})
    assert found["paired"].keys() == set(names)
    assert found["variants"].keys() == {
        "bnn - bnn-0",
        "apt - apt-ata-rs",
        "apt-ata-rs - apt-ata",
        "selective_zo - selective_zo-still",
    }


def test_a_changed_row_is_compared_with_what_it_varies_with_and_without_the_change():
    names = ("lora@rank=2", "bnn-0@rank=2", "bnn@rank=2", "bnn", "bnn@sigma=0.1", "apt@rank=4")
    found = reports.differences({name: LADDER["lora"] for name in (BASE, *names)})
    assert not found["paired"]
    assert found["variants"].keys() == {
        "bnn-0@rank=2 - lora@rank=2",
        "bnn@rank=2 - bnn",
        "bnn@rank=2 - bnn-0@rank=2",
        "bnn@sigma=0.1 - bnn",
    }


def test_the_indicator_is_averaged_over_runs_at_parts_of_their_length():
    histories = [
        [{"step": step, "gamma_0": step * slope, "gamma_1": 0.0} for step in range(1, 21)]
        for slope in (0.01, 0.03)
    ]
    histories[0].append({"step": 20, "train_loss": 0.1})
    own = [reports.gamma_of(history) for history in (*histories, [{"step": 1, "loss": 0.5}])]
    parts = {"key": "", "code": "", "scores": {}, "on_the_way": {}}
    judged = [reports.Judgement("apt", 101, seed, gamma=g, **parts) for seed, g in enumerate(own)]
    found = reports.gammas(judged)["apt"]
    assert found.keys() == {"2", "4", "10", "20"}
    assert found["10"] == [pytest.approx(0.2), 0.0]


def test_means_weigh_subjects_alike():
    cells = {(1, 0): {"x": 0.0}, (1, 1): {"x": 2.0}, (2, 0): {"x": 5.0}}
    assert comparisons.mean_scores(cells) == {"x": 3.0}


# Cells


def keep(
    task: Task, cache, value: int = 128, facts: dict | None = None, code: str = "0123"
) -> None:
    """Put a finished cell of grey pictures into a cache."""
    folder = cache / task.key
    folder.mkdir(parents=True)
    page = np.full((len(task.rows) * SIDE, task.plan.samples * SIDE, 3), value, np.uint8)
    Image.fromarray(page).save(folder / "samples.png")
    (folder / "history.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    kept = {"facts": facts or {}, "code": code}
    (folder / "cell.json").write_text(json.dumps(kept))


def task(name: str = BASELINE, **changes) -> Task:
    return replace(Task(CONFIGURATIONS[name], 101, 0, PLAN), **changes)


def test_a_cell_that_is_there_is_not_computed_again(tmp_path, monkeypatch):
    keep(task(), tmp_path)
    keep(task(BASE), tmp_path)
    monkeypatch.setattr(quality, "workers", None)  # no server is started
    tasks = {(BASELINE, 101, 0): task()}
    assert quality.compute(tasks, tmp_path, servers=1) == []
    assert task().make(None, tmp_path).history[0]["loss"] == 0.5


def test_whatever_matters_makes_another_cell():
    settings = {**CONFIGURATIONS[BASELINE].settings, "rank": 3}
    others = [
        task(),
        task("para"),
        task(subject=102),
        task(seed=1),
        task(plan=replace(PLAN, steps=5)),
        task(configuration=replace(CONFIGURATIONS[BASELINE], settings=settings)),
        task(configuration=replace(CONFIGURATIONS[BASELINE], version=2)),
    ]
    assert len({other.key for other in others}) == len(others)
    assert task(configuration=replace(CONFIGURATIONS[BASELINE], against="x")).key == task().key


def test_the_base_is_one_cell_for_all_subjects_and_steps_but_not_for_all_noise():
    changed = task(subject=102, plan=replace(PLAN, steps=9))
    assert changed.base.key == task().base.key == task(BASE, subject=0).key
    assert task(seed=1).base.key != task().base.key


def test_every_seed_has_start_noise_of_its_own():
    draws = [0, 1, 2, 3]
    seeds = {task(seed=s).noise_seed(Row(0, draw, "")) for s in range(10) for draw in draws}
    assert len(seeds) == 40
    assert {row.draw for row in task().base.rows} == set(draws)
    assert {row.draw for row in task().rows} == {0}


def test_memory_is_measured_once_for_all_subjects_seeds_and_steps(tmp_path):
    changed = task(subject=102, seed=3, plan=replace(PLAN, steps=9))
    assert memory_file(changed, tmp_path) == memory_file(task(), tmp_path)
    assert memory_file(task("para"), tmp_path) != memory_file(task(), tmp_path)


def test_a_half_done_cell_does_not_count(tmp_path):
    (tmp_path / task().key).mkdir()
    assert task().load(tmp_path) is None


def test_samples_come_back_by_their_row(tmp_path):
    keep(task(), tmp_path)
    path = tmp_path / task().key / "samples.png"
    page = np.array(Image.open(path))
    for number in range(len(task().rows)):
        page[number * SIDE : (number + 1) * SIDE, SIDE : 2 * SIDE] = number
    Image.fromarray(page).save(path)
    cell = task().load(tmp_path)
    for number, row in enumerate(task().rows):
        first, second = cell.samples[row]
        assert torch.all(first == 128 / 255)
        assert torch.all(second == number / 255)


@pytest.mark.parametrize("pictures", range(1, MOST_PICTURES + 1))
def test_the_subject_is_asked_for_on_backgrounds_it_was_not_trained_on(pictures):
    from demo.world import subject_pictures

    trained = {caption for _, caption in subject_pictures(101, pictures)}
    asked = replace(PLAN, pictures=pictures).subject_prompts(101)
    assert len(set(asked)) == len(asked) == min(4, 9 - pictures) >= 2
    assert not trained & set(asked)


def test_what_leaves_no_background_to_ask_for_is_refused(capsys):
    with pytest.raises(SystemExit):
        quality.main(["--only-kept", "--pictures", "8"])
    assert "--pictures: 8 is not in 1 to 7" in capsys.readouterr().err


def fake_table(tmp_path, names=(BASE, BASELINE, "para")) -> list[str]:
    """Keep cells of two subjects; return the arguments that show them."""
    plan = Plan(samples=2)
    losses = {"train_loss": 0.5, "train_loss_of_base": 1.0}
    losses |= {"held_out_loss": 0.8, "held_out_loss_of_base": 1.0, "corruption": 0.1}
    costs = {"parameters": 1000, "file_size": 4000, "steps_per_second": 2.0}
    for name in names:
        for subject in (101, 102) if name != BASE else (101,):
            one = Task(CONFIGURATIONS[name], subject if name != BASE else 0, 0, plan)
            facts = losses | costs if name != BASE else {}
            keep(one, tmp_path, 100 + subject % 7, facts, code=f"code of {name}")
    memory = memory_file(Task(CONFIGURATIONS[BASELINE], 101, 0, plan), tmp_path)
    memory.parent.mkdir()
    memory.write_text('{"peak_memory": 5000000}')
    command = f"--only-kept --cache {tmp_path} --subjects 101,102 --seeds 0 --samples 2"
    return [*command.split(), "--methods", "lora,para"]


@pytest.mark.parametrize(
    ("asked", "rows"), [("para", ["lora", "para"]), ("lora@rank=2,para", ["lora@rank=2", "para"])]
)
def test_the_baseline_is_there_once_with_or_without_other_settings(asked, rows):
    assert quality.chosen(quality.parsed(["--methods", asked])) == rows


def test_rows_can_go_without_the_baseline():
    asked = quality.parsed(["--methods", "bp-low-then-still,bp-low-then-zo-high", "--no-lora"])
    assert quality.chosen(asked) == ["bp-low-then-still", "bp-low-then-zo-high"]
    assert reports.rivals("bp-low-then-zo-high") == ["bp-low-then-still"]


def test_the_json_holds_what_it_promises(tmp_path, capsys):
    arguments = fake_table(tmp_path)
    files = {name: tmp_path / f"table.{name}" for name in ("json", "md", "png")}
    more = ["--json", files["json"], "--markdown", files["md"], "--sheet", files["png"]]
    all_of_it = [*arguments, *map(str, more)]
    assert quality.main(all_of_it) == 0
    found = json.loads(files["json"].read_text(), parse_constant=pytest.fail)
    assert {"machine", "command", "methods", "paired"} <= found.keys()
    assert found["command"] == f"python -m benchmarks.quality {' '.join(map(str, all_of_it))}"
    assert not found["matched"]  # there is no ladder
    assert found["methods"].keys() == {"base", "lora", "para"}
    promised = {
        "subject_similarity",
        "prompt_following",
        "prior_drift",
        "diversity",
        "nearest_training",
        "loss_gap",
        "corruption",
        "parameters",
        "file_size",
        "steps_per_second",
    }
    assert promised <= found["methods"]["lora"].keys()
    assert found["methods"]["lora"]["loss_gap"] == pytest.approx(0.3)
    assert found["methods"]["lora"]["peak_memory"] == 5_000_000
    assert "peak_memory" not in found["methods"]["para"]  # was not measured
    assert found["paired"].keys() == {"para"}
    assert found["paired"]["para"]["prior_drift"].keys() == {"mean", "low", "high", "n"}
    assert found["paired"]["para"]["prior_drift"]["n"] == 2
    assert found["methods"]["para"]["cells"] == 2
    said = capsys.readouterr()
    assert files["md"].read_text() == said.out.rstrip("\n") + "\n"
    shown = re.findall(r"\[[+-]", said.out)
    assert f"{len(shown)} intervals are shown" in said.out and shown
    assert "2 of code of lora, 2 of code of para" in said.err
    assert Image.open(files["png"]).size[1] > 4 * SIDE


def test_a_table_grows_from_a_result_of_before(tmp_path, monkeypatch, capsys):
    here, elsewhere, first = tmp_path / "here", tmp_path / "elsewhere", tmp_path / "first.json"
    arguments = fake_table(here)
    assert quality.main([*arguments, "--json", str(first)]) == 0
    known = ["--cache", str(elsewhere), "--known", str(first)]
    monkeypatch.setattr(quality, "workers", None)  # no server is started
    training = [word for word in arguments if word != "--only-kept"]
    second = tmp_path / "second.json"
    assert quality.main([*training, *known, "--json", str(second)]) == 0
    found, before = (json.loads(file.read_text()) for file in (second, first))
    before["methods"]["lora"].pop("peak_memory")  # is measured on the machine itself
    for part in ("cells", "code", "methods", "paired", "judged", "plan"):
        assert found[part] == before[part]
    assert len(found["judged"]) == 6  # with the base, for each subject

    more = Task(CONFIGURATIONS["para"], 103, 0, Plan(samples=2))
    keep(more, elsewhere, code="new")
    keep(more.base, elsewhere)
    grown = [word.replace("101,102", "101,102,103") for word in arguments]
    assert quality.main([*grown, *known, "--json", str(second)]) == 0
    found = json.loads(second.read_text())
    assert found["methods"]["para"]["cells"] == 3
    assert found["methods"]["lora"]["cells"] == 2
    assert found["code"] == {"code of lora": 2, "code of para": 2, "new": 1}
    capsys.readouterr()
    with pytest.raises(SystemExit, match="does not hold cells of this plan: 9 steps"):
        quality.main([*arguments, *known, "--steps", "9"])


def test_steps_on_the_way_are_compared_pair_by_pair(tmp_path, capsys):
    plan = Plan(steps=20, samples=2, trajectory=(10,))
    values = {"lora": 90, "bnn-0": 100, "bnn": 110}
    for subject in (101, 102):
        for name, value in values.items():
            keep(Task(CONFIGURATIONS[name], subject, 0, plan), tmp_path, value + subject % 7)
    keep(Task(CONFIGURATIONS[BASE], 0, 0, plan), tmp_path)
    command = f"--only-kept --cache {tmp_path} --subjects 101,102 --seeds 0 --samples 2 --steps 20"
    more = ["--trajectory", "10", "--methods", "lora,bnn-0,bnn", "--json", str(tmp_path / "json")]
    assert quality.main([*command.split(), *more]) == 0
    found = json.loads((tmp_path / "json").read_text())
    assert found["trajectory"].keys() == values.keys()
    differences = found["trajectory_differences"]
    assert differences.keys() == {"bnn-0 - lora", "bnn - lora", "bnn - bnn-0"}
    for steps in differences.values():
        assert steps.keys() == {"10", "20"}
        assert steps["10"]["corruption"].keys() == {"mean", "low", "high", "n"}
        assert steps["10"]["subject_similarity"]["n"] == 2
    rows = {name: steps["10"]["subject_similarity"] for name, steps in found["trajectory"].items()}
    mean = differences["bnn - bnn-0"]["10"]["subject_similarity"]["mean"]
    assert mean == pytest.approx(rows["bnn"] - rows["bnn-0"])
    assert "bnn - bnn-0, over their steps" in capsys.readouterr().out


def test_gamma_is_shown_by_bins_and_steps():
    lines = tables.gamma_table({"20": [0.1, 0.2], "200": [0.3, 0.4]})
    assert lines[0] == "| timestep / all | step 20 | step 200 |"
    assert lines[2:] == ["| 0 to 0.5 | 0.10 | 0.30 |", "| 0.5 to 1 | 0.20 | 0.40 |"]


def test_a_method_that_does_not_exist_is_named():
    with pytest.raises(SystemExit, match="nonesuch"):
        quality.main(["--methods", "nonesuch", "--only-kept"])


def test_a_row_can_be_asked_for_with_other_settings():
    found = configuration("lora@rank=2+layers=all+learning_rate=1e-4")
    assert found.settings == {"rank": 2, "layers": "all", "learning_rate": 1e-4}
    assert found.against == BASELINE
    assert configuration("para") is CONFIGURATIONS["para"]


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name != BASE])
def test_the_settings_of_every_row_exist(name):
    from personalize.trainers.methods import METHODS

    found = CONFIGURATIONS[name]
    METHODS[found.method].Settings(**found.settings)
    assert found.against in CONFIGURATIONS


def test_what_is_given_counts_more_than_quick_and_tuning():
    options = quality.parsed(["--quick", "--steps", str(Plan.steps)])
    assert (options.steps, options.samples, options.subjects) == (Plan.steps, 2, "101")
    tuning = quality.parsed(["--tuning", "--seeds", "0,1", "--samples", "3"])
    assert (tuning.subjects, tuning.seeds, tuning.samples) == ("51,52", "0,1", 3)
    assert tuning.steps == Plan.steps


# Where a cell comes from


def test_other_code_has_another_hash(tmp_path, monkeypatch):
    assert provenance.code_hash(BASE_FILE) == provenance.code_hash(BASE_FILE)
    code, base = tmp_path / "trainers" / "methods" / "some.py", tmp_path / "base"
    code.parent.mkdir(parents=True)
    base.mkdir()
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    found = []
    for text, weights in (("a", "a"), ("b", "a"), ("a", "b")):
        code.write_text(text)
        (base / "weights").write_text(weights)
        found.append(provenance.code_hash.__wrapped__(base))
    assert len(set(found)) == 3


# Servers


def test_work_is_shared_out_and_each_worker_does_one_thing_at_a_time():
    busy: set[str] = set()

    def work(worker, task):
        assert worker not in busy
        busy.add(worker)
        busy.discard(worker)
        return task * 2

    assert sorted(share_out(["a", "b"], work, range(9))) == [2 * n for n in range(9)]


def test_the_meter_counts_steps_by_the_clock():
    meter = Meter(0, "train", wall=True)
    meter(Progress("1", "train", 0, 10, 0.0))
    assert meter.steps_per_second() is None
    meter.marks = [(1, 10.0), (9, 14.0)]
    assert meter.steps_per_second() == 2.0


def test_peak_memory_sees_what_was_freed_again():
    before = reset_peak_memory(os.getpid())
    if before is None:
        pytest.skip("no /proc/<pid>/clear_refs on this system")
    with mmap.mmap(-1, 64 << 20) as fresh:  # no heap, which may have room already
        fresh.write(b"1" * (64 << 20))
    assert peak_memory(os.getpid()) - before > 60 << 20
    assert processor_seconds(os.getpid()) > 0


@pytest.mark.slow
@pytest.mark.server
def test_a_tiny_run_trains_samples_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Plan, "sampler_steps", 1)
    monkeypatch.setattr("benchmarks.cells.REFERENCE_DRAWS", (1,))
    monkeypatch.setattr("benchmarks.scores.REFERENCE_DRAWS", (1,))
    arguments = ["--quick", "--steps", "4", "--samples", "2", "--trajectory", "2"]
    arguments += ["--methods", "lora", "--servers", "1", "--cache", str(tmp_path)]
    assert quality.main([*arguments, "--json", str(tmp_path / "first.json")]) == 0
    found = json.loads((tmp_path / "first.json").read_text())
    lora = found["methods"]["lora"]
    assert lora["parameters"] > 1000
    assert lora["file_size"] > 4 * lora["parameters"]
    assert lora["steps_per_second"] > 0
    assert lora["peak_memory"] > 1e6
    assert abs(lora["loss_gap"]) < 1
    assert found["trajectory"]["lora"].keys() == {"2", "4"}
    monkeypatch.setattr(quality, "workers", None)
    assert quality.main([*arguments, "--json", str(tmp_path / "second.json")]) == 0
    assert json.loads((tmp_path / "second.json").read_text())["methods"] == found["methods"]
