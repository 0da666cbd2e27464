"""The routes that the page reads runs by, and what it may ask of a training."""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

import folder_paths
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from headless import ComfyServer
from tests.waiting import awaited

LINES = [{"step": 1, "loss": 0.5}, {"evaluation": True, "step": 1, "train": 0.25}]


@pytest.fixture(scope="module")
def runs(server: ComfyServer) -> Path:
    """The runs folder, with a run and what must stay unread beside it."""
    root = server.output_dir / "personalized"
    folder = root / "routes"
    (folder / "samples").mkdir(parents=True)
    (folder / "run.json").write_text('{"method": "lora", "settings": {"steps": 7}}')
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (folder / "pinned.json").write_text("[1]")
    (folder / "samples" / "000001-0.png").write_bytes(b"a picture")
    (server.output_dir / "secret.png").write_bytes(b"secret")
    (server.output_dir / "history.jsonl").write_text('{"step": 1, "loss": 666}\n')
    (folder / "samples" / "link.png").symlink_to(server.output_dir / "secret.png")
    (folder / "samples" / "notes.txt").write_text("notes")
    (root / "a link").symlink_to(server.output_dir)
    return root


def ask(server: ComfyServer, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
    """Return status and body; a POST where `body` is given."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}/personalize/runs{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def history(server: ComfyServer, run: str, start: int = 0) -> dict:
    status, body = ask(server, f"/{quote(run)}/history?from={start}")
    assert status == 200
    return json.loads(body)


# Reading


def test_the_history_comes_with_the_runs_facts(server, runs):
    answer = history(server, "routes")
    assert answer.pop("created").isdigit()
    size = (runs / "routes" / "history.jsonl").stat().st_size
    facts = {"title": "LoRA", "total_steps": 7, "pinned": [1], "running": False}
    assert answer == {"lines": LINES, "next": size, **facts}


def test_reading_goes_on_where_it_ended_and_leaves_half_a_line(server, runs):
    path = runs / "growing" / "history.jsonl"
    path.parent.mkdir()
    assert history(server, "growing") | {"created": ""} == {
        **{"lines": [], "next": 0, "running": False, "title": "", "created": ""},
        **{"total_steps": None, "pinned": []},
    }
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    first = history(server, "growing")
    assert first["lines"] == [{"step": 1}, {"step": 2}]
    with path.open("a") as file:
        file.write('ep": 3}\n')
    second = history(server, "growing", first["next"])
    assert second["lines"] == [{"step": 3}] and second["next"] == path.stat().st_size
    assert history(server, "growing", second["next"] + 99)["lines"] == []


def test_a_long_history_comes_in_parts(server, runs):
    path = runs / "long" / "history.jsonl"
    path.parent.mkdir()
    count = 60_000
    path.write_text("".join(f'{{"step": {step}, "loss": 0.5}}\n' for step in range(count)))
    steps, start, parts = [], 0, 0
    while (answer := history(server, "long", start))["lines"]:
        steps += [line["step"] for line in answer["lines"]]
        start, parts = answer["next"], parts + 1
    assert steps == list(range(count)) and parts > 1


def test_what_is_no_number_is_null_and_damaged_lines_are_left_out(server, runs):
    path = runs / "garbled" / "history.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 1, "loss": NaN}\n\x00\x00garbage\n[1]\n{"step": 2}\n')
    (path.parent / "run.json").write_text("[]")
    assert history(server, "garbled")["lines"] == [{"step": 1, "loss": None}, {"step": 2}]


def test_a_sample_is_sent_as_a_picture_and_never_stale(server, runs):
    url = f"{server.url}/personalize/runs/routes/samples/000001-0.png"
    with urllib.request.urlopen(url, timeout=30) as reply:
        assert reply.read() == b"a picture"
        assert reply.headers["Content-Type"] == "image/png"
        assert "no-cache" in reply.headers["Cache-Control"]
        assert reply.headers["X-Content-Type-Options"] == "nosniff"


# Nothing else


OUTSIDE = [
    "..",
    ".",
    "a link",
    "../personalized/routes",
    "routes/../..",
    "/etc",
    "no such run",
    "\0",
    "..\\..",
    "C:\\Windows",
    "C:",
    "\\\\host\\share",
    "\u2025",  # two dot leader: ".." once normalised
    "\uff0e\uff0e",  # fullwidth full stops
    "..\u2215..",  # division slash
    "\uff0fetc",  # fullwidth solidus
    "routes\u0000",
    "routes/",
    "NUL",
    "com1.txt",
    "%252e%252e",
    "file:///etc/passwd",
]


@pytest.mark.parametrize("run", [*OUTSIDE, "x" * 300, "routes ", "con", "C:\\", "%2e%2e"])
def test_no_route_leaves_the_runs_folder(server, runs, run):
    name = quote(run, safe="")
    wishes = [("history", None), ("samples/secret.png", None), ("stop", {}), ("pin", {})]
    for path, body in wishes:
        status, text = ask(server, f"/{name}/{path}", body)
        assert status in (404, 405), path
        assert b"666" not in text and str(runs).encode() not in text and b"personalized" not in text


@pytest.mark.parametrize(
    "file",
    ["link.png", "notes.txt", "../run.json", "..%2f..%2f..%2fsecret.png", "no.png", "%00.png"],
)
def test_only_pictures_in_the_samples_folder_are_sent(server, runs, file):
    status, text = ask(server, f"/routes/samples/{file}")
    assert status == 404 and b"secret" not in text and str(runs).encode() not in text


def test_a_history_that_is_a_link_out_of_its_run_is_not_read(server, runs):
    folder = runs / "linked"
    folder.mkdir()
    (folder / "history.jsonl").symlink_to(server.output_dir / "history.jsonl")
    status, text = ask(server, "/linked/history")
    assert status == 404 and b"666" not in text
    (runs / "routes" / "samples" / "deep").symlink_to(server.output_dir)
    assert ask(server, "/routes/samples/deep%2fsecret.png")[0] == 404


def test_no_answer_is_a_number_that_pages_can_not_read(server, runs):
    folder = runs / "infinite"
    folder.mkdir()
    (folder / "history.jsonl").write_text('{"step": 1, "loss": 1e999}\n' + "[" * 90_000 + "\n")
    (folder / "pinned.json").write_text("[1e999, 3]")
    (folder / "run.json").write_text('{"method": ["lora"], "settings": 7}')
    answer = history(server, "infinite")
    assert answer["lines"] == [{"step": 1, "loss": None}] and answer["pinned"] == [3]
    assert answer["title"] == "" and answer["total_steps"] is None


@pytest.mark.parametrize("start", ["-1", "x", "1e3", "9" * 30])
def test_an_offset_that_is_none_is_refused(server, runs, start):
    assert ask(server, f"/routes/history?from={start}")[0] == 400


# Wishes


@pytest.mark.parametrize("wish", ["stop", "pin"])
def test_other_sites_may_not_ask_for_anything(server, runs, wish):
    for headers in ({"Origin": "http://elsewhere.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert ask(server, f"/routes/{wish}", {}, **headers)[0] == 403


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "TRACE"])
@pytest.mark.parametrize("wish", ["stop", "pin"])
def test_a_wish_can_only_be_posted(server, runs, wish, method):
    """A link or a picture's address can not end a training."""
    request = urllib.request.Request(f"{server.url}/personalize/runs/routes/{wish}", method=method)
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=30)
    assert error.value.code in (404, 405)


@pytest.mark.parametrize("wish", ["stop", "pin"])
def test_a_run_that_is_not_trained_now_can_not_be_asked(server, runs, wish):
    status, text = ask(server, f"/routes/{wish}", {})
    assert status == 409 and "not being trained" in json.loads(text)["error"]


# Control


@pytest.fixture
def control(monkeypatch):
    """The module, with a server that notes what it sends."""
    from personalize.nodes import control

    class Server:
        sent: ClassVar[list] = []

        def send_sync(self, event, data):
            self.sent.append((event, data))

    monkeypatch.setattr(control.PromptServer, "instance", Server(), raising=False)
    Server.sent = []
    return control


def test_wishes_reach_the_training_once(control):
    with control.running("a run", "12", "flow") as training:
        assert control.of_run("a run") is training and control.of_run("another") is None
        assert not training.stopping and training.take_pins() == []
        training.pin(None)
        training.pin(100)
        assert training.take_pins() == [None, 100] and training.take_pins() == []
        training.stop()
        assert training.stopping
    assert control.of_run("a run") is None


def test_the_newest_run_of_a_node_is_remembered(control):
    for run, node in (("one", "12"), ("two", "12"), ("three", "7:12")):
        with control.running(run, node, "a flow"):
            pass
    known = {s.node: s.run for s in control.latest() if s.workflow == "a flow"}
    assert known == {"12": "two", "7:12": "three"}


def test_the_page_is_told_every_evaluation_but_not_every_step(control, monkeypatch):
    monkeypatch.setattr(control, "PAUSE", 3600)
    with control.running("a run", "12") as training:
        for step in range(5):
            training.tell({"step": step, "loss": float("nan")})
        training.tell({"evaluation": True, "step": 5})
        training.tell({"end": True, "step": 5})
    sent = control.PromptServer.instance.sent
    assert [event for event, _ in sent] == ["personalize.run"] * 3
    assert [data["line"] for _, data in sent] == [
        {"step": 0, "loss": None},
        {"evaluation": True, "step": 5},
        {"end": True, "step": 5},
    ]
    assert {(d["run"], d["node"], d["workflow"]) for _, d in sent} == {("a run", "12", None)}


# Wishes to a run that goes on, over real HTTP


@pytest.fixture
def wish(control, monkeypatch, tmp_path):
    """Ask a running training for something: (path, body, headers) to (status, answer)."""
    monkeypatch.setattr(control.PromptServer.instance, "routes", web.RouteTableDef(), raising=False)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    (tmp_path / "personalized" / "a run").mkdir(parents=True)
    from personalize.nodes import routes

    async def post(path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict]:
        app = web.Application()
        app.add_routes(routes.routes)
        async with TestClient(TestServer(app)) as client:
            url = f"/personalize/runs/a%20run/{path}"
            reply = await client.post(url, data=body, headers=headers)
            return reply.status, await reply.json()

    def ask(path: str, body: bytes = b"", **headers: str) -> tuple[int, dict, object]:
        with control.running("a run", "12") as training:
            return *awaited(post(path, body, headers)), training

    return ask


def test_a_wish_is_heard(wish):
    status, answer, training = wish("stop")
    assert (status, answer, training.stopping) == (200, {"stopping": True}, True)
    status, answer, training = wish("pin", b"{}")
    assert (status, answer, training.take_pins()) == (200, {"step": None}, [None])


@pytest.mark.parametrize("path", ["stop", "pin"])
def test_a_running_training_does_not_hear_other_sites(wish, path):
    """Also on a ComfyUI that does not look at this header itself."""
    status, _, training = wish(path, b"{}", **{"Sec-Fetch-Site": "cross-site"})
    assert status == 403 and not training.stopping and not training.take_pins()


@pytest.mark.parametrize("size", [1001, 1 << 20, 30 << 20])
def test_a_body_that_is_too_long_is_refused(wish, size):
    status, answer, training = wish("pin", b" " * (size - 2) + b"{}")
    assert status == 413 and "too long" in answer["error"] and not training.take_pins()


@pytest.mark.parametrize(
    "body",
    [
        *(b"[]", b"3", b"{", b"\xff\xfe", b'{"step": -1}', b'{"step": "1"}', b'{"step": true}'),
        *(b'{"step": 1.0}', b"[" * 900, b'{"step": [1]}', b'{"step": {}}'),
    ],
)
def test_a_wish_that_is_none_is_refused(wish, body):
    status, answer, training = wish("pin", body)
    assert status == 400 and "step" in answer["error"] and not training.take_pins()


def test_a_step_that_is_not_kept_can_not_be_pinned(wish):
    status, answer, training = wish("pin", b'{"step": 99999999999999999999}')
    assert status == 409 and "not kept" in answer["error"] and not training.take_pins()


# Without a server


def all_lines(folder: Path) -> tuple[list[dict], int]:
    """Read on as the page does, until there is nothing new."""
    from personalize.nodes import routes
    from personalize.trainers.run import Run

    found, start = [], 0
    while True:
        lines, end = routes._read_lines(Run(folder), start)
        if end == start:
            return found, end
        found, start = found + [json.loads(line) for line in lines], end


@pytest.mark.parametrize("size", [90, 99, 100, 101, 350])
def test_a_line_longer_than_an_answer_is_passed_over(tmp_path, monkeypatch, size):
    from personalize.nodes import routes

    monkeypatch.setattr(routes, "AT_ONCE", 100)
    path = tmp_path / "history.jsonl"
    start = '{"step": 2, "text": "'
    long = start + "x" * (size - len(start) - 2) + '"}'
    path.write_text(f'{{"step": 1}}\n{long}\n{{"step": 3}}\n')
    steps, end = all_lines(tmp_path)
    assert [line["step"] for line in steps] == ([1, 2, 3] if size < 100 else [1, 3])
    assert end == path.stat().st_size
    path.write_text(f'{{"step": 1}}\n{long}')  # half written
    assert all_lines(tmp_path) == ([{"step": 1}], 12)


@pytest.mark.parametrize("file", ["run.json", "pinned.json"])
def test_facts_that_a_link_leads_to_outside_of_the_run_stay_unread(tmp_path, file):
    from personalize.nodes import routes
    from personalize.trainers.run import Run

    run = Run(tmp_path / "a run")
    run.folder.mkdir()
    (run.folder / "mine").write_text("{}")
    (tmp_path / "secret").write_text('{"method": "lora"}')
    (run.folder / file).symlink_to(run.folder / "mine")
    assert routes._facts(run)["title"] == ""
    (run.folder / file).unlink()
    (run.folder / file).symlink_to(tmp_path / "secret")
    with pytest.raises(web.HTTPNotFound):
        routes._facts(run)


@pytest.mark.parametrize("deep", [b"[" * 900 + b"]" * 900, b'{"a":' * 900 + b"1" + b"}" * 900])
def test_a_line_that_no_answer_could_hold_is_left_out(deep):
    from personalize.nodes import routes

    assert routes._parse(b'{"step": 1, "loss": ' + deep + b"}") is None
    assert routes._parse(b'{"text": "' + b"[" * 900 + b'"}') == {"text": "[" * 900}
