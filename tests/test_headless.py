"""The headless client and server, with stock nodes and a real ComfyUI."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headless import (
    Comfy,
    ComfyServer,
    OverrideError,
    PromptFailed,
    ServerError,
    apply_overrides,
    fill_defaults,
)
from headless.__main__ import main
from headless.client import Watch
from tests.waiting import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def prompt(width=64, batch=2, prefix="headless/picture"):
    empty = {"width": width, "height": 64, "batch_size": batch, "color": 255}
    return {
        "1": {"class_type": "EmptyImage", "inputs": empty, "_meta": {"title": "Blue v1.0"}},
        "2": {
            "class_type": "SaveImage",
            "inputs": {"images": ["1", 0], "filename_prefix": prefix},
        },
    }


def long_prompt(sampler="euler"):
    """A prompt that takes minutes: a blur with a large kernel, many times over."""
    nodes = {"0": {"class_type": "EmptyImage", "inputs": prompt(1024, 8)["1"]["inputs"]}}
    for i in range(1, 200):
        blur = {"image": [str(i - 1), 0], "blur_radius": 31, "sigma": 5.0 + i / 100}
        nodes[str(i)] = {"class_type": "ImageBlur", "inputs": blur}
    nodes["end"] = {"class_type": "PreviewImage", "inputs": {"images": ["199", 0]}}
    return nodes


# Overrides


def test_a_node_is_named_by_id_title_or_class():
    for name in ("1", "Blue v1.0", "EmptyImage"):
        changed = apply_overrides(prompt(), [f"{name}.width=32"])
        assert changed["1"]["inputs"]["width"] == 32


def test_the_workflow_given_is_left_alone():
    given = prompt()
    apply_overrides(given, ["1.width=32"])
    assert given == prompt()


def test_input_names_may_hold_dots():
    nested = {"5": {"class_type": "X", "inputs": {"algorithm": "lora", "algorithm.rank": 4}}}
    changed = apply_overrides(nested, ["X.algorithm.rank=8"])
    assert changed["5"]["inputs"] == {"algorithm": "lora", "algorithm.rank": 8}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("nowhere.width=3", "No node for 'nowhere.width'"),
        ("1.colour=3", "EmptyImage has no input 'colour'; it has: width, height"),
        ("1.width", "not of the form"),
        ("X.a=1", "fits nodes 3, 4; name one by its id"),
        ("1.width=wide", "expected INT"),
        ("1.mode=c", "expected one of a, b"),
    ],
)
def test_a_wrong_override_says_what_exists(override, said):
    workflow = prompt() | {id: {"class_type": "X", "inputs": {"a": 0}} for id in "34"}
    known = {"width": ["INT", {}], "mode": [["a", "b"], {}]}
    with pytest.raises(OverrideError, match=said):
        apply_overrides(workflow, [override], {"EmptyImage": {"input": {"required": known}}})


def test_text_stays_text_where_text_is_expected():
    known = {"SaveImage": {"input": {"required": {"filename_prefix": ["STRING", {}]}}}}
    changed = apply_overrides(prompt(), ["2.filename_prefix=123"], known)
    assert changed["2"]["inputs"]["filename_prefix"] == "123"


def test_absent_inputs_get_their_defaults():
    declared = {
        "number": ["INT", {"default": 3}],
        "old_choice": [["a", "b"], {}],
        "choice": ["COMBO", {"options": ["c", "d"], "default": "d"}],
        "nested": ["COMFY_DYNAMICCOMBO_V3", {"options": [{"key": "x", "inputs": {}}]}],
        "wire": ["IMAGE", {}],
    }
    given = {"1": {"class_type": "X", "inputs": {"number": 5}}}
    filled = fill_defaults(given, {"X": {"input": {"required": declared}}})
    assert filled["1"]["inputs"] == {"number": 5, "old_choice": "a", "choice": "d"}


# The client


def test_a_run_returns_what_nodes_saved(comfy):
    result = comfy.run(prompt(width=32))
    files = result.files("2")
    assert len(files) == 2
    assert comfy.image(files[0]).size == (32, 64)


def test_progress_never_goes_back_and_ends_at_the_last_node(comfy):
    seen = []
    comfy.run(prompt(width=48, batch=1), seen.append)
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions) and fractions[0] >= 0 and fractions[-1] <= 1
    assert seen[-1].title == "SaveImage" and seen[-1].fraction >= 0.5


def test_a_node_of_many_steps_weighs_as_many_nodes():
    nodes = {"a": {"class_type": "A", "inputs": {"steps": 9}}, "b": {"class_type": "B"}}
    state = {"state": "running", "value": 5, "max": 10}
    message = {"type": "progress_state", "data": {"prompt_id": "p", "nodes": {"a": state}}}
    progress = Watch("p", nodes).read(message)
    assert progress.title == "A" and progress.fraction == pytest.approx(4.5 / 10)


def test_a_refused_prompt_says_which_input_is_wrong(comfy):
    with pytest.raises(PromptFailed, match=r"node 1 \(EmptyImage\).*width") as failure:
        comfy.run(prompt(width=-5))
    assert failure.value.node_type == "EmptyImage"


def test_a_half_valid_prompt_is_refused_and_not_run(comfy):
    half = prompt() | {"3": {"class_type": "PreviewImage", "inputs": {}}}
    with pytest.raises(PromptFailed, match=r"node 3 \(PreviewImage\)"):
        comfy.run(half)


def test_a_failing_node_is_named_with_its_exception(comfy):
    bad = prompt()
    bad["3"] = {"class_type": "LoadImageMask", "inputs": {"image": "x", "channel": "red"}}
    bad["2"]["inputs"]["filename_prefix"] = "../../outside"
    del bad["3"]
    with pytest.raises(PromptFailed, match=r"node 2 \(SaveImage\): .*outside") as failure:
        comfy.run(bad)
    assert failure.value.node_id == "2" and failure.value.traceback


def test_an_interrupted_prompt_says_so(comfy):
    prompt_id = comfy.queue(long_prompt())
    wait_until_started(comfy, prompt_id)
    comfy.interrupt(prompt_id)
    with pytest.raises(PromptFailed, match="Interrupted") as failure:
        comfy.wait(prompt_id, timeout=PATIENCE)
    assert failure.value.interrupted


def wait_until_started(comfy, prompt_id, seconds=PATIENCE):
    for _ in range(seconds * 20):
        if any(event["prompt_id"] == prompt_id for event in comfy.events("execution_start")):
            return
        time.sleep(0.05)
    raise TimeoutError(f"The prompt did not start in {seconds} s")


def test_a_timeout_interrupts_the_prompt(comfy):
    with pytest.raises(TimeoutError):
        comfy.run(long_prompt(), timeout=0.5)
    assert comfy.run(prompt(width=40)).files()


def test_a_timeout_takes_a_prompt_that_waits_out_of_the_queue(comfy):
    running = comfy.queue(long_prompt())
    wait_until_started(comfy, running)
    with pytest.raises(TimeoutError):
        comfy.run(prompt(width=56), timeout=0.5)
    queue = comfy.get("/queue")
    comfy.interrupt(running)
    assert [entry[1] for entry in queue["queue_running"]] == [running]
    assert queue["queue_pending"] == []


# The command


def write(path, workflow):
    path.write_text(json.dumps(workflow))
    return str(path)


def test_the_command_saves_outputs_and_prints_their_paths(server, tmp_path, capsys):
    workflow = write(tmp_path / "workflow.json", prompt(prefix="sub/picture"))
    output = tmp_path / "out"
    how = ["--server", server.url, "--output", str(output), "--set", "EmptyImage.batch_size=1"]
    assert main([workflow, *how]) == 0
    printed = capsys.readouterr().out.split()
    assert [Path(line).parent for line in printed] == [output / "sub"]
    assert all(Path(line).stat().st_size > 0 for line in printed)


@pytest.mark.parametrize(
    ("override", "said"),
    [("1.width=-1", "node 1 (EmptyImage)"), ("1.wide=1", "no input 'wide'")],
)
def test_the_command_fails_with_the_reason(server, tmp_path, capsys, override, said):
    workflow = write(tmp_path / "workflow.json", prompt())
    assert main([workflow, "--server", server.url, "--set", override]) == 1
    assert said in capsys.readouterr().err


def test_a_graph_format_workflow_is_explained(tmp_path, capsys):
    assert main([write(tmp_path / "graph.json", {"nodes": [], "links": []})]) == 1
    assert "graph format" in capsys.readouterr().err


def test_inputs_are_uploaded(server, comfy, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    image = comfy.run(prompt(width=32, batch=1)).files()[0]
    (folder / "a.png").write_bytes(comfy.download(image))
    load = {"1": {"class_type": "LoadImage", "inputs": {"image": "pictures/a.png"}}}
    load["2"] = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    how = ["--server", server.url, "--output", str(tmp_path / "out"), "--input", str(folder)]
    assert main([write(tmp_path / "load.json", load), *how]) == 0


# The server ends


def gone(pid, seconds=15):
    """Whether a process ends (or is a zombie of somebody else) within some seconds."""
    for _ in range(int(seconds * 10)):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.server
def test_a_pack_that_cannot_be_imported_is_reported_and_the_server_ended(tmp_path):
    pack = tmp_path / "broken"
    pack.mkdir()
    (pack / "__init__.py").write_text("import nothing_of_that_name\n")
    server = ComfyServer(packs=[pack], cpu=True, env=ONE_THREAD)
    with pytest.raises(ServerError, match="No module named 'nothing_of_that_name'"):
        server.__enter__()
    assert not server.running and not server.base.exists()


@pytest.mark.server
def test_an_exception_ends_the_server():
    with (
        pytest.raises(ZeroDivisionError),
        ComfyServer(packs=[], cpu=True, env=ONE_THREAD) as server,
    ):
        pid = server.pid
        raise ZeroDivisionError
    assert gone(pid)


@pytest.mark.server
def test_a_server_that_dies_during_a_prompt_is_reported_with_its_log():
    died = pytest.raises(ServerError, match=r"ComfyUI ended \(exit code -9\)[^$]*got prompt")
    with (
        died,
        ComfyServer(packs=[], cpu=True, env=ONE_THREAD) as server,
        Comfy(server.url, timeout=PATIENCE) as comfy,
    ):
        comfy.run(long_prompt(), lambda _: os.kill(server.pid, signal.SIGKILL))


def test_a_server_that_is_not_there_is_named(tmp_path, capsys):
    workflow = write(tmp_path / "workflow.json", prompt())
    assert main([workflow, "--server", "http://127.0.0.1:9"]) == 1
    assert "No ComfyUI answers at http://127.0.0.1:9" in capsys.readouterr().err


HOLD = """
import sys; sys.path.insert(0, {root!r})
from headless import ComfyServer
with ComfyServer(packs=[], cpu=True) as server:
    print(server.pid, flush=True)
    __import__("time").sleep(600)
"""


@pytest.mark.server
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_server(number):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(root=str(ROOT))],
        env=os.environ | ONE_THREAD,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # in the background of a shell, Ctrl-C would be ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        pid = int(holder.stdout.readline())
        holder.send_signal(number)
        assert holder.wait(30) != 0
        assert gone(pid)
    finally:
        holder.kill()
