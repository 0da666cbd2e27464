"""Runs on disk: names that stay inside, nothing overwritten, lists that survive strangers."""

import errno
import fcntl
import json
import os
import stat
from pathlib import Path

import pytest

from personalize.trainers.artifact import Personalization
from personalize.trainers.errors import InputError
from personalize.trainers.run import Run, check_name, inside, list_runs
from tests.test_artifact import EDITS, HEADER_OF_A_RUN


def learned(step: int = 7) -> Personalization:
    return Personalization.of(HEADER_OF_A_RUN, EDITS, step)


def saved(root, name: str = "zib", steps: tuple[int, ...] = ()) -> Run:
    """Make a run with a last checkpoint and some on the way."""
    run = Run.create(root, name, HEADER_OF_A_RUN)
    run.save(learned(), "last")
    for step in steps:
        run.save(learned(step), f"step {step}")
    return run


BAD_NAMES = {
    "traversal": "../zib",
    "traversal inside": "a/../../zib",
    "dots": "..",
    "dot": ".",
    "hidden": ".zib",
    "empty": "",
    "space": " ",
    "absolute": "/tmp/zib",
    "subfolder": "a/b",
    "backslash": "a\\b",
    "drive": "C:zib",
    "drive with root": "C:\\zib",
    "unc": "\\\\server\\share",
    "stream": "zib:hidden",
    "reserved": "con",
    "reserved, any case": "NuL",
    "reserved with a suffix": "com1.safetensors",
    "reserved printer": "LPT9",
    "too long": "a" * 81,
    "trailing dot": "zib.",
    "trailing space": "zib ",
    "leading dash": "-zib",
    "newline": "zib\n",
    "null": "zib\0",
    "control": "zib\x1b[31m",
    "accents": "zïb",
    "other scripts": "项目",
    "digits of another script": "zib\u0661",
    "right-to-left mark": "zib\u202efdp",
    "wildcard": "zib*",
    "variable": "$HOME",
    "home": "~",
    "percent": "%TEMP%",
}


@pytest.mark.parametrize("name", BAD_NAMES.values(), ids=BAD_NAMES.keys())
def test_a_name_that_is_not_safe_everywhere_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="'name' is") as error:
        Run.create(tmp_path / "runs", name, HEADER_OF_A_RUN)
    assert error.value.input_name == "name"
    assert os.listdir(tmp_path) == []
    saved(tmp_path / "runs")
    with pytest.raises(InputError, match=r"(?s)'run' is .* There are: zib"):
        Run.open(tmp_path / "runs", name)


@pytest.mark.parametrize(
    "name", ["zib", "My subject 2", "v1.2_final-b", "0", "a" * 80, "console", "COM", "com10"]
)
def test_ordinary_names_are_taken(tmp_path, name):
    run = saved(tmp_path, name)
    assert run.name == name and Run.open(tmp_path, name) == run


def test_a_name_that_is_taken_gets_a_number_and_nothing_is_overwritten(tmp_path):
    first = saved(tmp_path)
    before = {p.name: p.read_bytes() for p in first.folder.iterdir()}
    assert [saved(tmp_path).name for _ in range(3)] == ["zib 2", "zib 3", "zib 4"]
    assert {p.name: p.read_bytes() for p in first.folder.iterdir()} == before


def test_a_file_in_the_way_is_not_overwritten_either(tmp_path):
    (tmp_path / "zib").write_text("mine")
    assert saved(tmp_path).name == "zib 2"
    assert (tmp_path / "zib").read_text() == "mine"


@pytest.mark.parametrize("name", ["a" * 80, "a" * 79 + "b"])
def test_a_numbered_name_can_be_opened_however_long_it_was(tmp_path, name):
    saved(tmp_path, name)
    again = saved(tmp_path, name)
    check_name(again.name)
    assert Run.open(tmp_path, again.name) == again


def test_a_run_keeps_its_facts_and_its_history(tmp_path):
    run = saved(tmp_path)
    run.log(step=1, loss=0.5)
    run.log(step=2, loss=0.25)
    assert json.loads((run.folder / "run.json").read_text())["method"] == "lora"
    lines = (run.folder / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25},
    ]


def test_runs_are_listed_newest_first_and_only_with_a_checkpoint(tmp_path):
    assert list_runs(tmp_path / "not there") == []
    for age, name in ((30, "old"), (10, "new"), (20, "middle")):
        os.utime(saved(tmp_path, name).folder, (1_000_000 - age,) * 2)
    Run.create(tmp_path, "empty", HEADER_OF_A_RUN)
    (tmp_path / "not a run").mkdir()
    (tmp_path / "file.txt").write_text("")
    assert list_runs(tmp_path) == ["new", "middle", "old"]


def test_checkpoints_are_listed_last_first_then_by_step(tmp_path):
    run = saved(tmp_path, steps=(100, 20, 1_234_567))
    assert run.checkpoints() == ["last", "step 1234567", "step 100", "step 20"]
    assert (run.folder / "checkpoint-000020.safetensors").is_file()
    assert [run.load(name).header.step for name in run.checkpoints()] == [7, 1234567, 100, 20]


@pytest.mark.parametrize(
    "stranger",
    [
        "checkpoint-final.safetensors",
        "checkpoint-000020 (copy).safetensors",
        "checkpoint-.safetensors",
    ],
)
def test_a_strange_file_does_not_break_the_list(tmp_path, stranger):
    run = saved(tmp_path, steps=(20,))
    (run.folder / stranger).write_bytes(b"")
    assert run.checkpoints() == ["last", "step 20"] and list_runs(tmp_path) == ["zib"]


@pytest.mark.parametrize("checkpoint", ["step 21", "step", "step x", "best", "", "../zib/last"])
def test_a_checkpoint_that_is_not_there_names_those_that_are(tmp_path, checkpoint):
    run = saved(tmp_path, steps=(20,))
    with pytest.raises(InputError, match=r"'checkpoint' is .* run 'zib' has: last, step 20"):
        run.load(checkpoint)


def test_a_run_that_does_not_exist_names_those_that_do(tmp_path):
    with pytest.raises(InputError, match="train one first"):
        Run.open(tmp_path, "zob")
    saved(tmp_path)
    with pytest.raises(InputError, match=r"'run' is 'zob', .*There are: zib"):
        Run.open(tmp_path, "zob")


def test_a_link_out_of_the_folder_is_neither_opened_nor_listed(tmp_path):
    root, outside = tmp_path / "runs", tmp_path / "outside"
    saved(root)
    saved(outside, "secret")
    (root / "link").symlink_to(outside / "secret", target_is_directory=True)
    with pytest.raises(InputError, match="no such run"):
        Run.open(root, "link")
    assert list_runs(root) == ["zib"]


def test_saving_again_replaces_the_checkpoint_whole(tmp_path):
    run = saved(tmp_path)
    run.save(learned(8), "last")
    assert run.load("last").header.step == 8
    assert not [p for p in run.folder.iterdir() if p.name.endswith(".tmp")]


def test_the_best_is_that_of_a_step_and_stays_when_the_step_is_deleted(tmp_path):
    run = saved(tmp_path, steps=(20, 40))
    run.make_best(20)
    assert run.checkpoints() == ["last", "best", "step 40", "step 20"]
    run.make_best(40)
    run.remove(40)
    run.remove(40)
    assert run.checkpoints() == ["last", "best", "step 20"]
    assert run.load("best").header.step == 40
    assert not [p for p in run.folder.iterdir() if p.name.endswith(".tmp")]


def test_the_best_is_copied_where_the_disk_knows_no_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    run = saved(tmp_path, steps=(20,))
    run.make_best(20)
    assert run.load("best").header.step == 20


def test_saving_a_step_again_leaves_the_best_as_it_was(tmp_path):
    run = saved(tmp_path, steps=(20,))
    run.make_best(20)
    run.save(learned(21), "step 20")
    assert run.load("best").header.step == 20


def test_pins_add_up_and_a_damaged_file_counts_as_none(tmp_path):
    run = saved(tmp_path)
    assert run.pinned() == []
    for step in (40, 20, 40):
        run.pin(step)
    assert run.pinned() == [20, 40]
    for damaged in ("{", "7", '["a"]'):
        (run.folder / "pinned.json").write_text(damaged)
        assert run.pinned() == []


def test_history_and_facts_leave_out_what_is_damaged(tmp_path):
    run = saved(tmp_path)
    assert run.history() == []
    run.log(step=1, loss=0.5)
    with open(run.folder / "history.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert run.history() == [{"step": 1, "loss": 0.5}]
    assert run.facts()["method"] == HEADER_OF_A_RUN.method
    (run.folder / "run.json").write_text("[")
    assert run.facts() == {}


@pytest.mark.parametrize("deep", ["[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900])
def test_what_is_nested_too_deeply_to_be_looked_at_is_damaged(tmp_path, deep):
    run = saved(tmp_path)
    run.log(step=1, loss=0.5, prompts=["[" * 900])
    (run.folder / "run.json").write_text(f'{{"method": "lora", "data": {deep}}}')
    with open(run.folder / "history.jsonl", "a") as file:
        file.write(f'{{"step": 2, "loss": {deep}}}\n')
    assert run.facts() == {} and [line["step"] for line in run.history()] == [1]


def without_locks(monkeypatch, number: int = errno.ENOLCK) -> None:
    """Let the disk be one that knows no locks."""

    def flock(*_) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_gives_one_that_is_not_locked(tmp_path, monkeypatch, number):
    run = saved(tmp_path)
    without_locks(monkeypatch, number)
    claims = run.claim(), run.claim()
    assert not any(claim.is_locked for claim in claims)
    for claim in claims:
        claim.release()


def test_the_name_of_a_new_history_is_on_the_disk(tmp_path, monkeypatch):
    run, synced, fsync = saved(tmp_path), [], os.fsync

    def recorded(descriptor: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    for step in (1, 2):
        run.log(step=step)
    assert synced == [True]


def test_what_is_inside_a_folder_is_told_of_the_top_folder_too(tmp_path):
    assert inside(tmp_path, tmp_path / "a") and inside(Path("/"), tmp_path)
    for outside in (tmp_path, tmp_path.parent, tmp_path / "..", tmp_path.with_name("zib")):
        assert not inside(tmp_path, outside)
    assert not inside(Path("/"), Path("/"))
