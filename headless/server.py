"""Start a real ComfyUI with this pack in it, and end it again whatever happens."""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

PACK = Path(__file__).resolve().parent.parent
BROKEN_PACK = re.compile(r"IMPORT FAILED|Cannot import|Error while calling comfy_entrypoint")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}


class ServerError(RuntimeError):
    """ComfyUI did not start, started without the pack, or died; the message holds its log."""


def find_comfyui() -> Path:
    """Return the folder of ComfyUI: $COMFYUI_PATH, else the one `make env` put beside the venv."""
    given = os.environ.get("COMFYUI_PATH")
    path = Path(given).expanduser() if given else Path(sys.prefix).parent / "ComfyUI"
    if not (path / "main.py").is_file():
        origin = "COMFYUI_PATH is" if given else "COMFYUI_PATH is not set; beside this Python is"
        raise ServerError(
            f"No ComfyUI: {origin} {path}, which has no main.py. "
            "Set COMFYUI_PATH, or run with the Python that `make env` prints."
        )
    return path.resolve()


class ComfyServer:
    """A ComfyUI on a free port of 127.0.0.1, with a base directory of its own.

    `base` is kept when given, and removed afterwards when not. `packs` are linked into
    custom_nodes and are the only ones loaded. `models` is a folder laid out like ComfyUI's
    own `models`. `cpu=None` asks torch.
    """

    def __init__(
        self,
        base: Path | None = None,
        *,
        packs: Iterable[Path] = (PACK,),
        models: Path | None = None,
        cpu: bool | None = None,
        env: dict[str, str] | None = None,
        flags: Iterable[str] = (),
        timeout: float = 600.0,  # seconds to become ready
    ):
        self._temporary = None if base else tempfile.TemporaryDirectory(prefix="personalize-")
        self.base = Path(base or self._temporary.name).resolve()  # type: ignore[union-attr]
        self.log_path = self.base / "comfyui.log"
        self.url = ""
        self._packs = [Path(pack).resolve() for pack in packs]
        self._models = models
        self._cpu = cpu
        self._env = env or {}
        self._flags = list(flags)
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._old_sigterm: signal.Handlers | None = None

    input_dir = property(lambda self: self.base / "input")
    output_dir = property(lambda self: self.base / "output")
    pid = property(lambda self: self._process.pid if self._process else None)

    def __enter__(self) -> "ComfyServer":
        self._make_base()
        self._end_on_sigterm()
        try:
            self._start()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        died = self._obituary() if isinstance(error, ConnectionError) else ""
        self.stop()
        if died:
            raise ServerError(died) from error

    @property
    def log(self) -> str:
        """Everything ComfyUI has printed so far, without colours."""
        text = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        return COLOURS.sub("", text)

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End the server and its children; harmless when called again."""
        process, self._process = self._process, None
        if process is not None:
            _end_group(process)
        if self._old_sigterm is not None:
            signal.signal(signal.SIGTERM, self._old_sigterm)
            self._old_sigterm = None
        if self._temporary is not None:
            self._temporary.cleanup()

    def _obituary(self) -> str:
        """Say how ComfyUI ended by itself, with the end of its log; empty while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process is not None:  # it closes its port some moments before it ends
                code = self._process.wait(10.0)
                return f"ComfyUI ended (exit code {code}) during the work:\n{tail(self.log)}"
        return ""

    def _make_base(self) -> None:
        for name in ("custom_nodes", "input", "output", "models", "user/default"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for pack in self._packs:
            link = self.base / "custom_nodes" / pack_name(pack)
            if not link.exists():
                link.symlink_to(pack, target_is_directory=True)
        settings = self.base / "user" / "default" / "comfy.settings.json"
        if not settings.exists():
            settings.write_text(json.dumps(SETTINGS))
        if self._models is not None:
            (self.base / "models.yaml").write_text(models_config(self._models))

    def _start(self) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        environment = {
            **os.environ,
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            **self._env,
        }
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *self._command(port)],
                cwd=find_comfyui(),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches only us: we decide how it ends
                preexec_fn=_die_with_parent,
            )

    def _command(self, port: int) -> list[str]:
        names = [pack_name(pack) for pack in self._packs]
        command = ["main.py", "--listen", "127.0.0.1", "--port", str(port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-api-nodes", "--disable-auto-launch", "--disable-all-custom-nodes"]
        command += ["--whitelist-custom-nodes", *names] if names else []
        command += ["--cpu"] if (not has_cuda() if self._cpu is None else self._cpu) else []
        if self._models is not None:
            command += ["--extra-model-paths-config", str(self.base / "models.yaml")]
        return command + self._flags

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._timeout
        while not self._answers():
            if not self.running:
                raise ServerError(f"ComfyUI ended while starting:\n{tail(self.log)}")
            if time.monotonic() > deadline:
                raise ServerError(f"No answer in {self._timeout:.0f} s:\n{tail(self.log)}")
            time.sleep(0.1)
        broken = complaint(self.log, str(self.base / "custom_nodes"))
        if broken:
            raise ServerError(f"ComfyUI could not load the pack:\n{broken}")

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _end_on_sigterm(self) -> None:
        """Turn SIGTERM into SystemExit, so that `with` blocks end the server."""
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _exit_on_signal)
            self._old_sigterm = signal.SIG_DFL


def pack_name(pack: Path) -> str:
    """Return the folder name a pack gets in custom_nodes: ours is always `personalize`."""
    return "personalize" if pack == PACK else pack.name


def models_config(models: Path) -> str:
    """Return an extra-model-paths file for a folder laid out like ComfyUI's `models`."""
    folders = sorted(path.name for path in models.iterdir() if path.is_dir())
    lines = ["given:", f"  base_path: {json.dumps(str(models.resolve()))}"]
    return "\n".join(lines + [f"  {name}: {name}" for name in folders]) + "\n"


def has_cuda() -> bool:
    import torch  # takes a second: only when somebody asks

    return torch.cuda.is_available()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def complaint(log: str, folder: str) -> str:
    """Return what the log says about packs in `folder` that did not load, tracebacks included."""
    lines = log.splitlines()
    bad = [i for i, line in enumerate(lines) if BROKEN_PACK.search(line) and folder in line]
    if not bad:
        return ""
    traces = [i for i in range(bad[0]) if "Traceback" in lines[i]]
    return "\n".join(lines[traces[-1] if traces else bad[0] : bad[-1] + 1])


def tail(log: str, lines: int = 40) -> str:
    return "\n".join(log.splitlines()[-lines:])


def _exit_on_signal(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _end_group(process: "subprocess.Popen[bytes]", grace: float = 5.0) -> None:
    """Ask the process group to end, wait `grace` seconds, then kill it."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
            return


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """Have Linux kill this child when its parent is gone, however the parent ended."""
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
