"""Talk to a running ComfyUI: queue a prompt, follow it, collect what it made."""

import asyncio
import contextlib
import io
import json
import mimetypes
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from PIL import Image

from .errors import PromptFailed, refusal

T = TypeVar("T")
Prompt = dict[str, dict[str, Any]]  # API format: node id -> {"class_type", "inputs", "_meta"}


@dataclass(frozen=True)
class Progress:
    """Where a prompt is: at `value` of `maximum` in `node`; `fraction` of all, in [0, 1]."""

    node: str
    title: str
    value: float
    maximum: float
    fraction: float


@dataclass(frozen=True)
class SavedFile:
    """A file ComfyUI can show: `type` is output, temp or input."""

    filename: str
    subfolder: str = ""
    type: str = "output"
    node: str = ""


@dataclass(frozen=True)
class Result:
    """What a finished prompt left: `outputs` is {node id: {ui key: list}}."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]]
    history: dict[str, Any] = field(repr=False)

    def files(self, node: str | None = None) -> list[SavedFile]:
        """Return the files that the nodes (or one node) reported, in order."""
        return [file for file in _files(self.outputs) if node is None or file.node == node]

    def texts(self, node: str) -> list[str]:
        """Return the strings a node showed (`ui.PreviewText`)."""
        return [str(text) for text in self.outputs.get(node, {}).get("text", [])]


class Comfy:
    """A client of the ComfyUI at `url`; a context manager, used from ordinary (sync) code.

    `messages` holds every JSON message the server has sent to this client, oldest first.
    `timeout` is how many seconds `run` waits unless told otherwise; None: for ever.
    Every method raises ConnectionError when the server is gone.
    """

    def __init__(self, url: str, timeout: float | None = None):
        self.url = url.rstrip("/")
        self.timeout = timeout
        self.client_id = uuid.uuid4().hex
        self.messages: list[dict[str, Any]] = []
        self._arrived = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._reader: asyncio.Task[None] | None = None

    def __enter__(self) -> "Comfy":
        self._thread.start()
        try:
            self._await(self._connect())
        except BaseException:
            self._end_loop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._await(self._disconnect())
        self._end_loop()

    def get(self, path: str, **params: str) -> Any:
        """GET JSON."""
        return self._await(self._json("GET", path, params=params))[1]

    def post(self, path: str, body: Any = None) -> Any:
        """POST JSON and return the answer, decoded when it is JSON."""
        return self._await(self._json("POST", path, json=body))[1]

    def object_info(self, class_type: str | None = None) -> dict[str, Any]:
        """Return the nodes the server knows (or one of them), by class_type."""
        return self.get("/object_info" + (f"/{class_type}" if class_type else ""))

    def queue(self, prompt: Prompt, **extra: Any) -> str:
        """Queue a prompt in API format and return its id; raise PromptFailed if refused."""
        body = {"prompt": prompt, "client_id": self.client_id, **extra}
        status, reply = self._await(self._json("POST", "/prompt", json=body))
        if status != 200:
            raise refusal(reply, prompt)
        if reply["node_errors"]:  # the server would run the rest and drop these outputs
            self.withdraw(reply["prompt_id"])
            raise refusal(reply, prompt)
        return reply["prompt_id"]

    def run(
        self,
        prompt: Prompt,
        on_progress: Callable[[Progress], None] | None = None,
        timeout: float | None = None,  # seconds
    ) -> Result:
        """Queue a prompt and wait for its end; on Ctrl-C or a timeout withdraw it."""
        seen = len(self.messages)
        prompt_id = str(uuid.uuid4())
        try:
            self.queue(prompt, prompt_id=prompt_id)
            return self.wait(prompt_id, prompt, on_progress, timeout or self.timeout, seen)
        except (KeyboardInterrupt, SystemExit, TimeoutError):
            with contextlib.suppress(ConnectionError):
                self.withdraw(prompt_id)
            raise

    def wait(
        self,
        prompt_id: str,
        prompt: Prompt | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        timeout: float | None = None,
        seen: int = 0,
    ) -> Result:
        """Follow a queued prompt to its end, from the message `seen` on."""
        watch = Watch(prompt_id, prompt or {})
        for message in self._follow(prompt_id, timeout, seen):
            progress = watch.read(message)
            if progress is not None and on_progress is not None:
                on_progress(progress)
        return self.result(prompt_id)

    def result(self, prompt_id: str) -> Result:
        """Return the result of a finished prompt; raise PromptFailed if it failed."""
        history = self.get(f"/history/{prompt_id}")[prompt_id]
        status = history.get("status") or {}
        if status.get("status_str") == "error":
            raise PromptFailed.from_messages(status.get("messages", []))
        return Result(prompt_id, history["outputs"], history)

    def withdraw(self, prompt_id: str) -> None:
        """Take a prompt out of the queue, or stop it when it has begun."""
        self.post("/queue", {"delete": [prompt_id]})
        self.interrupt(prompt_id)

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stop the running prompt (only if it is `prompt_id`, when given)."""
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else None)

    def upload(self, path: Path, subfolder: str = "") -> str:
        """Put a file into the server's input folder; return the name nodes know it by."""
        reply = self._await(self._upload(Path(path), subfolder))
        return "/".join(part for part in (reply["subfolder"], reply["name"]) if part)

    def download(self, file: SavedFile) -> bytes:
        """Return the bytes of a file a node reported."""
        params = {"filename": file.filename, "subfolder": file.subfolder, "type": file.type}
        return self._await(self._bytes("/view", params))

    def image(self, file: SavedFile) -> Image.Image:
        """Return a saved or previewed image."""
        return Image.open(io.BytesIO(self.download(file)))

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Return the data of the messages of one type received so far."""
        return [message["data"] for message in list(self.messages) if message["type"] == kind]

    def _follow(self, prompt_id: str, timeout: float | None, seen: int) -> Iterator[dict[str, Any]]:
        """Yield messages until the prompt is over; asks for the history in case one was lost."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._arrived:
                if len(self.messages) == seen:
                    self._arrived.wait(timeout=1.0)
                fresh = self.messages[seen:]
            seen += len(fresh)
            yield from fresh
            over = any(_is_last(message, prompt_id) for message in fresh)
            if over or (not fresh and prompt_id in self.get(f"/history/{prompt_id}")):
                return
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"The prompt was not done after {timeout:g} s")

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result()
        except aiohttp.ClientResponseError as error:
            raise OSError(f"ComfyUI answered {error.status} {error.message}") from error
        except aiohttp.ClientError as error:
            raise ConnectionError(f"No ComfyUI answers at {self.url}: {error}") from error

    async def _connect(self) -> None:
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120))
        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.client_id}"
        try:
            self._socket = await self._http.ws_connect(address, max_msg_size=0)
        except aiohttp.ClientError:
            await self._http.close()
            raise
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._socket:
            if message.type == aiohttp.WSMsgType.TEXT:
                with self._arrived:
                    self.messages.append(json.loads(message.data))
                    self._arrived.notify_all()

    async def _disconnect(self) -> None:
        await self._socket.close()
        if self._reader is not None:
            self._reader.cancel()
        await self._http.close()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _json(self, method: str, path: str, **how: Any) -> tuple[int, Any]:
        async with self._http.request(method, self.url + path, **how) as reply:
            text = await reply.text()
            is_json = "json" in reply.headers.get("content-type", "")
            return reply.status, json.loads(text) if is_json and text else text

    async def _bytes(self, path: str, params: dict[str, str]) -> bytes:
        async with self._http.get(self.url + path, params=params) as reply:
            reply.raise_for_status()
            return await reply.read()

    async def _upload(self, path: Path, subfolder: str) -> dict[str, str]:
        form = aiohttp.FormData({"overwrite": "true", "subfolder": subfolder})
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        form.add_field("image", path.read_bytes(), filename=path.name, content_type=kind)
        async with self._http.post(self.url + "/upload/image", data=form) as reply:
            reply.raise_for_status()
            return await reply.json()


class Watch:
    """Turn the server's messages about one prompt into Progress.

    A node that says how many steps it takes counts as that many nodes that do not.
    """

    def __init__(self, prompt_id: str, prompt: Prompt):
        self._prompt_id = prompt_id
        self._titles = {id: _title(node) for id, node in prompt.items()}
        self._weights = {id: _steps(node) for id, node in prompt.items()}
        self._done: set[str] = set()

    def read(self, message: dict[str, Any]) -> Progress | None:
        """Return where the prompt is now, or None when the message says nothing about it."""
        data = message.get("data") or {}
        if data.get("prompt_id") != self._prompt_id:
            return None
        if message["type"] == "execution_cached":
            self._done |= set(data["nodes"])
        if message["type"] != "progress_state":
            return None
        states = data["nodes"]
        self._done |= {id for id, state in states.items() if state["state"] == "finished"}
        running = [id for id, state in states.items() if state["state"] == "running"]
        return self._at(running[-1], states[running[-1]]) if running else None

    def _at(self, id: str, state: dict[str, Any]) -> Progress:
        value, maximum = state["value"], state["max"]
        within = value / maximum if maximum else 0.0
        done = sum(self._weight(one) for one in self._done) + within * self._weight(id)
        total = sum(self._weight(one) for one in self._titles.keys() | self._done | {id})
        title = self._titles.get(state.get("display_node_id", id), id)
        return Progress(id, title, value, maximum, min(1.0, done / total))

    def _weight(self, id: str) -> float:
        return self._weights.get(id, 1)


def _steps(node: dict[str, Any]) -> float:
    steps = node.get("inputs", {}).get("steps")
    return max(1, steps) if isinstance(steps, int) else 1


def _title(node: dict[str, Any]) -> str:
    return node.get("_meta", {}).get("title") or node.get("class_type", "?")


def _is_last(message: dict[str, Any], prompt_id: str) -> bool:
    """ComfyUI says "executing nothing" once the history holds the prompt."""
    data = message.get("data") or {}
    ended = message["type"] == "executing" and data.get("node") is None
    return ended and data.get("prompt_id") == prompt_id


def _files(outputs: dict[str, dict[str, Any]]) -> Iterator[SavedFile]:
    for node, shown in outputs.items():
        for entries in shown.values():
            for entry in entries if isinstance(entries, list) else []:
                if isinstance(entry, dict) and "filename" in entry:
                    kind = entry.get("type", "output")
                    yield SavedFile(entry["filename"], entry.get("subfolder", ""), kind, node)
