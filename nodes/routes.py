"""What the page reads of runs, and the two wishes it may have.

Run names come from outside: each is checked, and nothing outside its folder is read, links
followed. Wishes from other sites are refused, as ComfyUI's own middleware does since 0.19.
"""

import functools
import json
import math
import os
import re
import stat
from dataclasses import asdict
from io import FileIO
from typing import Any

from aiohttp import web
from comfy.cli_args import args
from server import PromptServer

from ..trainers.errors import InputError
from ..trainers.methods import METHODS
from ..trainers.run import Run, inside, shallow
from . import control
from .load import runs_root

AT_ONCE = 1 << 20  # bytes of history in one answer
LONGEST = 1000  # bytes of a wish
SHORT = 4000  # bytes of a line that is remembered: a step, measured or not
SAMPLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.png")
HUGE = re.compile(rb"[eE]\+?\d{3}|\d{300}")  # may be a number that floats can not hold
HEADERS = {"Cache-Control": "no-cache", "X-Content-Type-Options": "nosniff"}

# of twenty who watch, all ask for the same: reading and parsing were most of an answer's time
remembered = functools.lru_cache(maxsize=2048)
routes = web.RouteTableDef()


@routes.get("/personalize/runs")
async def list_latest(_: web.Request) -> web.Response:
    """Each node's newest run since the server started, and whether it goes on."""
    shown = [asdict(s) | {"running": _goes_on(s.run)} for s in control.latest()]
    return web.json_response({"runs": shown}, headers=HEADERS)


@routes.get("/personalize/runs/{run}/history")
async def read_history(request: web.Request) -> web.Response:
    """Whole lines of history.jsonl from byte `from` on, `next` to go on at, and the run's facts.

    Another `created` than before: the folder was deleted and made anew.
    """
    run = _run(request)
    start = _number(request.query.get("from", "0"))
    # asked before reading: what ends in between is seen as ended only with its last line
    running = _goes_on(run.name)
    lines, end = _read_lines(run, start)
    facts = json.dumps({"next": end, "running": running, **_facts(run)})
    text = f'{{"lines": [{", ".join(lines)}], {facts[1:]}'
    return web.Response(text=text, content_type="application/json", headers=HEADERS)


@routes.get("/personalize/runs/{run}/samples/{file}")
async def read_sample(request: web.Request) -> web.FileResponse:
    """Send a sample picture."""
    folder = _run(request).folder / "samples"
    name = request.match_info["file"]
    path = folder / name
    if not SAMPLE.fullmatch(name) or not inside(folder.parent, path) or not path.is_file():
        raise _problem(web.HTTPNotFound, "There is no such sample.")
    return web.FileResponse(path, headers={**HEADERS, "Content-Type": "image/png"})


@routes.post("/personalize/runs/{run}/stop")
async def stop(request: web.Request) -> web.Response:
    """Let a training end after the step it is at; the graph goes on."""
    _control(request).stop()
    return web.json_response({"stopping": True})


@routes.post("/personalize/runs/{run}/pin")
async def pin(request: web.Request) -> web.Response:
    """Keep the checkpoint of {"step": n}, or with {} the next step's."""
    training = _control(request)
    step = await _step(request)
    run = _run(request)
    if step is not None and f"step {step}" not in run.checkpoints():
        raise _problem(web.HTTPConflict, f"The checkpoint of step {step} is not kept any more.")
    training.pin(step)
    return web.json_response({"step": step})


def register() -> None:
    """Add the routes to ComfyUI's server, before it starts to listen."""
    for route in routes:
        assert isinstance(route, web.RouteDef)
        PromptServer.instance.routes.route(route.method, route.path)(route.handler)


def _run(request: web.Request) -> Run:
    try:
        return Run.open(runs_root(), request.match_info["run"])
    except InputError:
        raise _problem(web.HTTPNotFound, "There is no such run.") from None


def _look_at(run: Run, file: str) -> os.stat_result | None:
    """Return size and time of a run's file, None where there is none. Links may not lead out."""
    path = run.folder / file
    try:
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode):
            if not inside(run.folder, path):
                raise _problem(web.HTTPNotFound, "That file lies outside the run.")
            found = path.stat()
    except OSError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _control(request: web.Request) -> control.Control:
    if request.headers.get("Sec-Fetch-Site") == "cross-site" and not args.enable_cors_header:
        raise _problem(web.HTTPForbidden, "Other sites may not ask for that.")
    training = control.of_run(_run(request).name)
    if training is None:
        raise _problem(web.HTTPConflict, "This run is not being trained now.")
    return training


def _goes_on(run: str) -> bool:
    return control.of_run(run) is not None


def _facts(run: Run) -> dict[str, Any]:
    """Return what the page says of a run besides its history."""
    changed, pinned = _changed(run, "run.json"), _changed(run, "pinned.json")
    title, steps = _of_training(run, changed)
    return {
        "title": title,
        "total_steps": steps,
        "created": str(changed or ""),
        "pinned": _pinned(run, pinned),
    }


def _changed(run: Run, file: str) -> int:
    """Return when a run's file was written, in ns; 0 where there is none."""
    found = _look_at(run, file)
    return found.st_mtime_ns if found else 0


@remembered
def _of_training(run: Run, _: int) -> tuple[str, int | None]:
    """Return the title of a run's method and the steps it was asked for."""
    header = run.facts()
    settings = header.get("settings")
    steps = settings.get("steps") if isinstance(settings, dict) else None
    method = METHODS.get(str(header.get("method")))
    return method.title if method else "", steps if type(steps) is int else None


@remembered
def _pinned(run: Run, _: int) -> list[int]:
    return run.pinned()


def _read_lines(run: Run, start: int) -> tuple[list[str], int]:
    """Return the whole lines of the history from byte `start` on, as JSON, and the byte behind."""
    found = _look_at(run, "history.jsonl")
    if found is None or found.st_size <= start:
        return [], start
    with open(run.folder / "history.jsonl", "rb", buffering=0) as file:
        file.seek(start)
        data = file.read(AT_ONCE)
        if len(data) == AT_ONCE and b"\n" not in data:
            return [], _behind_line(file, start)
    data = data[: data.rfind(b"\n") + 1]  # the last line may be half written
    lines = [_strict(line) for line in data.splitlines()]
    return [line for line in lines if line], start + len(data)


def _behind_line(file: FileIO, start: int) -> int:
    """Return the byte behind a line that is too long for an answer; `start` while it is half."""
    while part := file.read(AT_ONCE):
        if (place := part.find(b"\n")) >= 0:
            return file.tell() - len(part) + place + 1
    return start


def _strict(line: bytes) -> str:
    """Return a line as JSON that pages can read; "" for what is no object."""
    return _dump(line) if len(line) <= SHORT else _dump.__wrapped__(line)


@remembered
def _dump(line: bytes) -> str:
    found = _parse(line)
    return json.dumps(found) if isinstance(found, dict) else ""


def _parse(text: bytes) -> Any:
    """Read JSON; NaN and infinities, which pages can not read, and broken text become None."""
    try:
        careful = _finite if HUGE.search(text) else None  # a fifth of the speed
        found = json.loads(text, parse_constant=lambda _: None, parse_float=careful)
        return found if shallow(text, found) else None
    except (ValueError, RecursionError):
        return None


def _finite(text: str) -> float | None:
    return number if math.isfinite(number := float(text)) else None  # 1e999 is read as infinite


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise _problem(web.HTTPBadRequest, "'from' is not a byte offset.")
    return int(text)


async def _step(request: web.Request) -> int | None:
    """Return the step that the request's body names, None for the next."""
    body = b""
    while chunk := await request.content.readany():
        body += chunk
        if len(body) > LONGEST:
            limit = {"max_size": LONGEST, "actual_size": len(body)}
            raise _problem(web.HTTPRequestEntityTooLarge, "That is too long for a wish.", **limit)
    wish = _parse(body or b"{}")
    step = wish.get("step") if isinstance(wish, dict) else -1
    if step is None or (type(step) is int and step >= 0):
        return step
    raise _problem(web.HTTPBadRequest, 'Give {"step": n}, or {} for the next step.')


def _problem(kind: type[web.HTTPException], text: str, **more: Any) -> web.HTTPException:
    """Make an answer that says what is wrong, and nothing about the disk."""
    body = json.dumps({"error": text})
    return kind(text=body, content_type="application/json", headers=HEADERS, **more)
