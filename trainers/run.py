"""A run on disk: one folder with its facts, its history and its checkpoints."""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .artifact import Header, Personalization, atomic, patiently, sync_folder
from .errors import InputError, brief
from .settings import check_text

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,79}")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # on Windows
CHECKPOINT = re.compile(r"checkpoint-(\d{6,})")
LAST, BEST = "last", "best"
NAMED = (LAST, BEST)  # checkpoints that are not called by their step
BY_HAND, EARLY, FINISHED = "stopped by hand", "stopped early", "finished"
INTERRUPTED, FAILED = "interrupted", "failed"
ENDS = (BY_HAND, EARLY, FINISHED, INTERRUPTED, FAILED)
FINAL = (BY_HAND, EARLY, FINISHED)  # ends after which a run does not go on
IN_PLACE = (".lock", "history.jsonl", "samples")  # all else is replaced whole, links too

# what network and user-space file systems say of flock() that they do not have
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

DEEPEST = 50  # that JSON of ours may be nested

Lines = list[dict[str, Any]]  # of history.jsonl


@dataclass(frozen=True)
class Run:
    """A folder `<root>/<name>/` with run.json, history.jsonl, last.safetensors, best.safetensors,
    checkpoint-<step>.safetensors files, pinned.json and samples/; while it is not finished,
    state.safetensors.
    """

    folder: Path

    @classmethod
    def create(cls, root: Path, name: str, header: Header, **inputs: Any) -> "Run":
        """Make a new folder; a name that is taken gets a number above all that there are.

        inputs: what run.json says besides the header.
        """
        check_name(name)
        root.mkdir(parents=True, exist_ok=True)
        number = 1 + max(numbers_of(name, os.listdir(root)), default=0)
        while True:
            folder = root / (name if number == 1 else numbered(name, number))
            try:
                folder.mkdir()
                break
            except FileExistsError:
                number += 1
        run = cls(folder)
        with atomic(folder / "run.json") as temporary:
            facts = asdict(header) | inputs
            temporary.write_text(json.dumps(facts, indent=2), encoding="utf-8")
        return run

    @classmethod
    def of_name(cls, root: Path, name: str) -> "list[Run]":
        """List the runs of a name, numbered or not, newest first."""
        names = os.listdir(root) if root.is_dir() else []
        runs = [
            cls(root / (name if number == 1 else numbered(name, number)))
            for number in sorted(numbers_of(name, names), reverse=True)
        ]
        return [run for run in runs if is_run(root, run.folder)]

    @classmethod
    def open(cls, root: Path, name: str) -> "Run":
        """Find a run by name. Raises InputError when there is none, or the name leaves `root`."""
        folder = root / name
        if not NAME.fullmatch(name) or not folder.is_dir() or leads_out(root, folder):
            there = ", ".join(list_runs(root)[:10]) or "none yet: train one first"
            raise InputError(
                "run", f"is '{brief(name)}', but no such run exists. There are: {there}."
            )
        return cls(folder)

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return self.folder.name

    def checkpoints(self) -> list[str]:
        """List what can be loaded: "last" and "best" first, then "step N", newest first."""
        names = (CHECKPOINT.fullmatch(p.stem) for p in self.folder.glob("*.safetensors"))
        steps = sorted((int(name[1]) for name in names if name), reverse=True)
        named = [name for name in NAMED if self.path(name).is_file()]
        return named + [f"step {step}" for step in steps]

    def save(self, personalization: Personalization, checkpoint: str) -> Path:
        """Write a checkpoint ("last" or "step N") atomically; return its path."""
        path = self.path(checkpoint)
        personalization.save(path)
        return path

    def make_best(self, step: int) -> None:
        """Let "best" be the checkpoint of a step: the same file where the disk can do that."""
        source = self.path(f"step {step}")
        with atomic(self.path(BEST)) as temporary:
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)

    def remove(self, step: int) -> None:
        """Delete the checkpoint of a step, if it is there."""
        delete(self.path(f"step {step}"))

    def pin(self, step: int) -> None:
        """Note that the checkpoint of a step is to stay."""
        with atomic(self.folder / "pinned.json") as temporary:
            temporary.write_text(json.dumps(sorted({*self.pinned(), step})), encoding="utf-8")

    def pinned(self) -> list[int]:
        """List the steps that are to stay; none where the file is missing or damaged."""
        steps = read_json(self.folder / "pinned.json")
        return [n for n in steps if type(n) is int] if isinstance(steps, list) else []

    def facts(self) -> dict[str, Any]:
        """Read run.json; {} where it is missing or damaged."""
        facts = read_json(self.folder / "run.json")
        return facts if isinstance(facts, dict) else {}

    def history(self) -> Lines:
        """Read history.jsonl, without lines that are damaged or not yet whole."""
        path = self.folder / "history.jsonl"
        found = []
        for line in path.read_bytes().splitlines() if path.is_file() else []:
            with suppress(ValueError, RecursionError):
                found.append(parse(line))
        lines = [line for line in found if isinstance(line, dict)]
        return [line for line in lines if type(line.get("step", 0)) is int]

    @property
    def state(self) -> Path:
        """The file that holds what it takes to go on."""
        return self.folder / "state.safetensors"

    def ended(self) -> str | None:
        """Return how the run ended, when nothing was trained since."""
        lines = self.history()
        return str(lines[-1].get("reason")) if lines and lines[-1].get("end") else None

    def claim(self, patience: float = 0.0) -> FileLock | None:
        """Take the run for this process, until the lock is released or the process ends.

        patience: seconds to wait. None where another process has it all the while; a lock that is
        not locked where the disk knows none. Raises InputError when the folder can not be written.
        """
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            return None
        except NotImplementedError:  # of older versions, for a disk without locks
            return lock
        except OSError as error:
            if error.errno in WITHOUT_LOCKS:
                return lock
            problem = f"is '{self.name}', whose folder can not be written ({error.strerror})."
            raise InputError("name", problem) from error
        return lock

    def link_out(self) -> str | None:
        """Return what is written in place, but is a link to what lies elsewhere; None: nothing."""
        paths = chain(map(self.folder.joinpath, IN_PLACE), self.folder.glob("samples/*"))
        return next((path.name for path in paths if not inside(self.folder, path)), None)

    def forget_state(self) -> None:
        """Delete the state of a run that has ended."""
        delete(self.state)

    def cut(self, step: int) -> Lines:
        """Forget what the history tells after a step, and that the run ended; return the rest."""
        lines = [
            line for line in self.history() if not line.get("end") and line.get("step", 0) <= step
        ]
        with atomic(self.folder / "history.jsonl") as temporary:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            temporary.write_text(text, encoding="utf-8")
        os.utime(self.folder / "run.json")  # tells the page to read the history anew
        return lines

    def sync(self) -> None:
        """Have the history on the disk before a state that goes on from it."""
        with open(self.folder / "history.jsonl", "ab") as file:
            os.fsync(file.fileno())

    def load(self, checkpoint: str) -> Personalization:
        """Read a checkpoint. Raises InputError when it is not there or damaged."""
        if checkpoint not in self.checkpoints():
            there = ", ".join(self.checkpoints()) or "none"
            raise InputError(
                "checkpoint", f"is '{brief(checkpoint)}', but run '{self.name}' has: {there}."
            )
        return Personalization.load(self.path(checkpoint))

    def log(self, **values: Any) -> None:
        """Append one line to history.jsonl."""
        path = self.folder / "history.jsonl"
        new = not path.exists()
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(without_nan(values)) + "\n")
        if new:
            sync_folder(self.folder)

    def path(self, checkpoint: str) -> Path:
        """Return the file of a checkpoint, there or not."""
        if checkpoint in NAMED:
            return self.folder / f"{checkpoint}.safetensors"
        return self.folder / f"checkpoint-{int(checkpoint.removeprefix('step ')):06d}.safetensors"


@contextmanager
def held(claim: FileLock | None) -> Iterator[None]:
    """Release a claim at the end of the block."""
    try:
        yield
    finally:
        if claim is not None:
            claim.release()


def delete(path: Path) -> None:
    """Delete a file that is of no use any more; that a disk keeps it harms nothing."""
    with suppress(OSError):
        patiently(lambda: path.unlink(missing_ok=True))


def check_name(name: str) -> None:
    """Raise InputError unless `name` is safe as a folder name on every system."""
    check_text("name", name)
    if not NAME.fullmatch(name) or RESERVED.fullmatch(name) or name.endswith((" ", ".")):
        raise InputError(
            "name",
            f"is '{brief(name)}'; give up to 80 letters, digits, spaces, dots, dashes or "
            "underscores, starting with a letter or digit.",
        )


def numbered(name: str, number: int) -> str:
    """Put a number behind a name, which is cut where the whole would be too long."""
    suffix = f" {number}"
    return name[: 80 - len(suffix)].rstrip(" .") + suffix


def numbers_of(name: str, folders: Iterable[str]) -> set[int]:
    """Return the numbers that a name has among folders; without one it is the first."""
    found = {1} if name in folders else set()
    for folder in folders:
        ending = re.search(r" ([1-9]\d{0,8})$", folder)
        if ending and int(ending[1]) > 1 and numbered(name, int(ending[1])) == folder:
            found.add(int(ending[1]))
    return found


def inside(root: Path, folder: Path) -> bool:
    """Tell whether a folder is below `root`, links followed."""
    return Path(os.path.realpath(root)) in Path(os.path.realpath(folder)).parents


def leads_out(root: Path, folder: Path) -> bool:
    """Tell whether a folder right below `root` is a link to what is not below it."""
    return folder.is_symlink() and not inside(root, folder)


def is_run(root: Path, folder: Path) -> bool:
    """Tell whether a folder below `root` holds a run that may be read."""
    try:
        return (folder / "run.json").is_file() and inside(root, folder)
    except OSError:  # not ours to look into, or deleted just now
        return False


def read_json(path: Path) -> Any:
    """Read a JSON file; None where it is missing or damaged."""
    try:
        return parse(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def parse(text: bytes) -> Any:
    """Read JSON.

    Raises ValueError or RecursionError for what is none, or nested as nothing here is: whatever
    looked at all of it would fail.
    """
    value = json.loads(text)
    if not shallow(text, value):
        raise ValueError(f"nested more than {DEEPEST} times")
    return value


def shallow(text: bytes, value: Any) -> bool:
    """Tell whether JSON is nested no more than DEEPEST times. value: what the text says."""
    opened = max(text.count(b"["), text.count(b"{"))
    return opened <= DEEPEST or nested_within(value, DEEPEST)


def nested_within(value: Any, levels: int) -> bool:
    """Tell whether a JSON value is nested no more than so many times."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels >= 0 and all(nested_within(part, levels - 1) for part in parts)


def list_runs(root: Path) -> list[str]:
    """List the runs below `root` that have a checkpoint and may be read, newest first."""
    found: list[tuple[float, str]] = []
    for name in os.listdir(root) if root.is_dir() else []:
        folder = root / name
        with suppress(OSError):  # deleted just now
            if is_run(root, folder) and Run(folder).checkpoints():
                found.append((folder.stat().st_mtime, name))
    return [name for _, name in sorted(found, reverse=True)]


def without_nan(value: Any) -> Any:
    """Return JSON values with null for numbers that are not finite, which strict readers refuse."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
