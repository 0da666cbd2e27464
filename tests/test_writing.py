"""Writing on a disk that fails: killed in the middle, full, read-only. Real processes and disks."""

import contextlib
import os
import random
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from headless import Graph, PromptFailed, fill_defaults
from personalize.trainers.artifact import LEFT_BEHIND, Header, Personalization
from personalize.trainers.errors import DiskError, InputError
from personalize.trainers.run import Run, list_runs

HEADER = Header("lora", 0, {}, {}, "a zib totem", "", "0" * 16)
NUMBERS = 1_000_000  # 4 MB, which takes some milliseconds to write
NOBODY = 65534
MOST_KILLS, CUT_OFF = 200, 7


def learned(step: int) -> Personalization:
    tensors = {"lora_unet_conv_in.diff": torch.full((NUMBERS,), float(step))}
    return Personalization(replace(HEADER, step=step), tensors)


@pytest.fixture
def run(tmp_path) -> Run:
    """A run with a first checkpoint."""
    run = Run.create(tmp_path, "a run", HEADER)
    run.save(learned(0), "last")
    return run


def child(work: Callable[[], None]) -> int:
    """Start a process that does `work` and ends; return its id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def told_by_child(work: Callable[[], object]) -> str:
    """Return what a process says that does `work` under conditions of its own."""
    reader, writer = os.pipe()

    def tell() -> None:
        try:
            told = str(work())
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        os.write(writer, told.encode())

    pid = child(tell)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    return told


def save_for_ever(run: Run) -> None:
    for step in range(1, 10**9):
        run.save(learned(step), "last")
        run.save(learned(step), "step 7")
        run.make_best(7)
        run.pin(step)


def assert_whole(run: Run) -> None:
    """Every checkpoint that is shown is whole, and so is what stands beside them."""
    assert list_runs(run.folder.parent) == ["a run"] and run.facts()["method"] == "lora"
    for checkpoint in run.checkpoints():
        tensor = run.load(checkpoint).tensors["lora_unet_conv_in.diff"]
        assert len(tensor) == NUMBERS and tensor.unique().tolist() == [
            run.load(checkpoint).header.step
        ]


def test_a_process_killed_while_it_writes_leaves_whole_files_only(run):
    rng, kills, cut_off = random.Random(0), 0, 0
    while cut_off < CUT_OFF:
        kills += 1
        assert kills <= MOST_KILLS  # about four in ten hit the middle of a write
        pid = child(lambda: save_for_ever(run))
        time.sleep(rng.uniform(0.01, 0.15))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        half_written = [file for file in run.folder.iterdir() if file.name.startswith(".")]
        cut_off += bool(half_written)
        for file in half_written:
            file.unlink()
        assert_whole(run)


def test_readers_beside_a_writer_see_whole_files_only(run):
    pid = child(lambda: save_for_ever(run))
    try:
        seen = set()
        for _ in range(30):
            tensor = run.load("last").tensors["lora_unet_conv_in.diff"]
            assert len(tensor.unique()) == 1
            seen.add(float(tensor[0]))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert len(seen) > 3


def test_what_a_killed_process_left_is_removed_when_it_is_old(run):
    old, young = run.folder / ".last.safetensors.0123.tmp", run.folder / ".last.safetensors.4.tmp"
    other, library = run.folder / ".best.safetensors.0123.tmp", run.folder / ".tmpaB3xYz"
    for file in (old, young, other, library):
        file.write_bytes(b"half")
    for file in (old, other, library):
        os.utime(file, (time.time() - LEFT_BEHIND - 60,) * 2)
    run.save(learned(1), "last")
    assert not old.exists() and not library.exists() and young.exists() and other.exists()


def test_a_checkpoint_may_be_read_by_whom_its_folder_says(run):
    note = run.folder / "note"
    note.touch()
    run.save(learned(1), "step 1")
    run.make_best(1)
    files = [*run.folder.glob("*.safetensors"), run.folder / "run.json"]
    assert len(files) == 4 and {file.stat().st_mode for file in files} == {note.stat().st_mode}


# A disk that takes no more


def limited(size: int) -> None:
    """Let this process write no file beyond `size` bytes: the system refuses in mid-write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [0, 100, 1 << 20])
def test_a_file_that_can_not_be_finished_leaves_the_old_one(run, size):
    def save() -> None:
        limited(size)
        run.save(learned(1), "last")

    told = told_by_child(save)
    assert told.startswith("DiskError: could not write or read last.safetensors (")
    assert "File too large" in told and "make room" in told and str(run.folder) not in told
    assert run.load("last").header.step == 0
    assert sorted(os.listdir(run.folder)) == ["last.safetensors", "run.json"]


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int):
    """Mount a file system of its own at a folder; skip where this user may not."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_fails_in_one_sentence_and_keeps_what_there_was(tmp_path):
    with small_disk(tmp_path / "disk", 10) as root:
        run = Run.create(root, "a run", HEADER)
        run.save(learned(1), "last")
        run.save(learned(1), "step 1")
        with pytest.raises(DiskError, match=r"last\.safetensors \(.*No space left on device.*room"):
            run.save(learned(2), "last")
        run.make_best(1)  # a link takes no room
        assert_whole(run)
        assert run.checkpoints() == ["last", "best", "step 1"]
        (root / "filler").write_bytes(b"\0" * free(root))
        with pytest.raises(DiskError, match="pinned"):
            run.pin(1)
        (root / "filler").unlink()
        run.path("best").unlink()
        run.remove(1)
        run.save(learned(3), "last")
        assert run.load("last").header.step == 3


def free(folder: Path) -> int:
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_bsize


def as_nobody() -> None:
    """Give up root's right to write everywhere."""
    if os.geteuid() == 0:
        os.seteuid(NOBODY)


@pytest.fixture
def read_only(run):
    """The run in folders that nobody may write, though all may look in."""
    opened = [run.folder, run.folder.parent, *list(run.folder.parents)[1:4]]
    modes = {folder: folder.stat().st_mode for folder in opened}
    for folder in opened:
        folder.chmod(0o555)
    yield run
    for folder, mode in modes.items():
        folder.chmod(mode)


def test_a_read_only_folder_fails_in_one_sentence(read_only):
    def save() -> None:
        as_nobody()
        read_only.save(learned(1), "last")

    told = told_by_child(save)
    assert told.startswith(
        "DiskError: could not write or read last.safetensors (Permission denied)"
    )
    assert str(read_only.folder) not in told
    assert_whole(read_only)


def test_folders_that_may_not_be_read_do_not_hide_the_other_runs(run):
    for name in ("closed", "closed too"):
        closed = Run.create(run.folder.parent, name, HEADER)
        closed.save(learned(1), "last")
    of_all = Path(tempfile.gettempdir()).resolve()
    opened = [folder for folder in run.folder.parents if of_all in folder.parents]
    modes = {folder: folder.stat().st_mode for folder in opened}
    for folder in opened:
        folder.chmod(0o755)
    (run.folder.parent / "closed").chmod(0)
    (run.folder.parent / "closed too" / "last.safetensors").chmod(0)

    def look() -> object:
        as_nobody()
        runs = list_runs(run.folder.parent)
        try:
            Run(run.folder.parent / "closed too").load("last")
        except InputError as error:
            return sorted(runs), str(error)

    try:
        told = told_by_child(look)
    finally:
        (run.folder.parent / "closed").chmod(0o755)
        for folder, mode in modes.items():
            folder.chmod(mode)
    assert told.startswith("(['a run', 'closed too'], \"'checkpoint' names last.safetensors, which")
    assert "Permission denied" in told and str(run.folder.parent) not in told


# In a server


@contextlib.contextmanager
def full_for(pid: int, size: int):
    """Let another process write no file beyond `size` bytes, for a while."""
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


def test_a_server_whose_disk_is_full_says_so_and_goes_on_when_there_is_room(server, comfy):
    graph = Graph()
    base = graph.add("PersonalizeDemoBase")
    drawn = graph.add("PersonalizeDemoSubject", count=2, resolution=64)
    wires = {"clip": (base, 1), "vae": (base, 2), "images": (drawn, 0), "captions": (drawn, 1)}
    data = graph.add("PersonalizeDataset", resolution=64, **wires)
    inputs = {"model": (base, 0), "data": (data, 0), "steps": 2, "name": "no room"}
    graph.add("PersonalizeTrainLoRA", **inputs)
    prompt = fill_defaults(graph, comfy.object_info())
    root = server.output_dir / "personalized"
    sentence = r"Train LoRA: could not write or read \w+\.safetensors \(File too large\); make room"
    with (
        full_for(server.pid, 300_000),
        pytest.raises(PromptFailed, match=sentence) as error,
    ):
        comfy.run(prompt)
    assert str(server.base) not in str(error.value)
    halves = [path for path in root.glob("no room*/*") if path.suffix == ".safetensors"]
    assert not halves and not list(root.glob("no room*/.*tmp*"))
    text = comfy.run(prompt).texts(str(len(graph)))[0]
    assert "2 steps" in text or "step 2" in text
    whole = [Run(folder) for folder in root.glob("no room*") if Run(folder).checkpoints()]
    assert [run.load("last").header.step for run in whole] == [2]
