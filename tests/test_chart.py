"""The monitor inside the training node: ComfyUI's page in Chromium, over runs on disk."""

import json
import math
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from headless import Comfy, ComfyServer, Graph, fill_defaults
from headless.server import free_port
from tests.browser import READY, ComfyPage, open_page
from tests.waiting import PAGE_PATIENCE, PATIENCE

ROOT = Path(__file__).resolve().parent.parent
STEPS, EVERY = 400, 20
WAIT = 1000 * PAGE_PATIENCE  # ms
HOSTILE = '<img src=x onerror="window.pwned = 1">'
RENDERERS = pytest.mark.parametrize("vue", [False, True], ids=["canvas nodes", "vue nodes"])


@pytest.fixture(scope="module")
def runs(server: ComfyServer) -> Path:
    """The runs folder."""
    root = server.output_dir / "personalized"
    write_run(root, "ended", end="stopped early")
    write_run(root, "plain", monitored=False, last=300, end="finished")
    return root


@pytest.fixture(scope="module")
def page(browser, server: ComfyServer) -> Iterator[ComfyPage]:
    """One page for the module; `fresh` empties it."""
    with open_page(browser, server.url) as page:
        yield page


@pytest.fixture
def fresh(page: ComfyPage, request) -> Iterator[ComfyPage]:
    """The page with an empty graph; no test may cause an error or an external request.

    Where a test has the parameter `vue`, that says who renders the nodes.
    """
    page.run("() => app.graph.clear()")
    callspec = getattr(request.node, "callspec", None)
    vue = callspec is not None and callspec.params.get("vue", False)
    set_renderer(page, vue)
    page.errors.clear()
    page.external.clear()
    yield page
    page.page.keyboard.press("Escape")
    if vue:
        set_renderer(page, False)
    assert not page.errors
    assert not page.external
    assert page.run("() => window.pwned") is None


# What the tests do in the page


def add(page: ComfyPage, run: str | None = None, type: str = "LoRA", at: int = 0) -> str:
    """Add a training node that shows a run; return its id."""
    return page.run(
        """([type, run, x]) => {
            const node = LiteGraph.createNode("PersonalizeTrain" + type)
            node.pos = [x, 0]
            if (run) node.properties.personalize_run = run
            app.graph.add(node)
            return String(node.id)
        }""",
        [type, run, at],
    )


def tell(page: ComfyPage, node: str, run: str, workflow: str | None = "") -> None:
    """Let the page hear what the server says of a run; workflow: its id, "" for the page's own."""
    page.run(
        """([node, run, workflow]) => app.api.dispatchCustomEvent("personalize.run",
            {node, run, workflow: workflow === "" ? app.graph.id : workflow, line: {step: 1}})""",
        [node, run, workflow],
    )


ELEMENT = "app.graph.getNodeById({}).widgets.find(w => w.name === 'monitor').element"


def text(page: ComfyPage, node: str, part: str = "") -> str:
    """Return what a node's monitor says, or a part of it."""
    where = ELEMENT.format(node) + (f".querySelector('.{part}')" if part else "")
    return page.run(f"() => {where}.textContent")


def is_empty(page: ComfyPage, node: str) -> bool:
    """Tell whether a node shows no run, and says so."""
    shows_none = page.run(f"() => {ELEMENT.format(node)}.classList.contains('is-idle')")
    return shows_none and text(page, node, "idle") == "The chart appears here as it trains."


def wait_for(page: ComfyPage, node: str, words: str) -> None:
    page.wait(f"{ELEMENT.format(node)}.textContent.includes({json.dumps(words)})")


def look_at(page: ComfyPage, node: str, scale: float = 1.0) -> None:
    """Bring the monitor of a node into the window."""
    page.run(
        """([id, scale]) => {
            const node = app.graph.getNodeById(id)
            const shown = 900 / scale // the lower end of the node is at 900 px of the page
            app.canvas.ds.scale = scale
            app.canvas.ds.offset = [200 / scale - node.pos[0], shown - node.pos[1] - node.size[1]]
            app.canvas.draw(true, true)
        }""",
        [node, scale],
    )
    page.wait(f"{ELEMENT.format(node)}.querySelector('.losses canvas')?.clientWidth > 0")


def set_renderer(page: ComfyPage, vue: bool) -> None:
    page.run(
        "async on => { await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on) }", vue
    )


def hover(page: ComfyPage, plot: str, step: int, height: float = 0.5, click: bool = False) -> None:
    """Move the pointer to a step of a plot; height: 0 at the bottom, 1 at the top."""
    box = page.page.locator(f".personalize-monitor .{plot} .u-over").bounding_box()
    assert box
    x, y = box["x"] + box["width"] * step / STEPS, box["y"] + box["height"] * (1 - height)
    page.page.mouse.move(x - 3, y)
    page.page.mouse.move(x, y)
    if click:
        page.page.mouse.click(x, y)


# Runs as the training writes them


def write_run(root: Path, name: str, **how) -> Path:
    """Write a run's folder: run.json, history.jsonl, samples."""
    folder = root / name
    (folder / "samples").mkdir(parents=True)
    facts = {"method": how.get("method", "lora"), "settings": {"steps": STEPS}}
    (folder / "run.json").write_text(json.dumps(facts))
    append(folder, history(folder, **how))
    return folder


def append(folder: Path, lines: list[dict]) -> None:
    with open(folder / "history.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def history(folder: Path, *, first=0, last=STEPS, monitored=True, end="", **_) -> list[dict]:
    """Return lines from step `first` to `last`: an over-fitting run, best at step 140."""
    lines = []
    for step in range(first, last + 1):
        if step:
            noise = 0.06 * math.sin(7.3 * step) * math.sin(1.7 * step)
            loss = 0.05 + 0.15 * math.exp(-step / 90) + noise
            lines.append({"step": step, "loss": loss, "learning_rate": 1e-3})
        if monitored and step % EVERY == 0:
            lines.append(evaluation(folder, step))
    if end:
        best = min(last, 140) if monitored else None
        lines.append({"end": True, "step": last, "reason": end, "best_step": best})
    return lines


def evaluation(folder: Path, step: int) -> dict:
    x = step / STEPS
    samples = [f"samples/{step:06d}-{i}.png" for i in range(3)]
    for index, name in enumerate(samples):
        write_sample(folder / name, f"{step}", index)
    gamma = [max(0.0, min(1.0, (1.6 * x - 0.1 * bin) * (1 - bin / 12))) for bin in range(10)]
    held_out = 0.16 - 0.055 * math.sin(4 * x) + 0.05 * x * x
    return {
        "evaluation": True,
        "step": step,
        "seconds": 0.25 * step,
        "total_steps": STEPS,
        "train": 0.04 + 0.12 * math.exp(-3.5 * x),
        "held_out": held_out,
        "prior": 0.2 * (1 + 0.12 * x * x),
        "gamma": gamma,
        "gap": 0.1 * x,
        "prior_drift": 0.12 * x * x,
        "corruption": 1 + 0.25 * math.sin(2.6 * x) * x,
        "nearest": 0.6 + 0.3 * x,
        "diversity": 0.4 - 0.2 * x,
        "grain": 1 + 0.4 * x,
        "samples": samples,
        "best_step": min(step, 140),
        "verdict": "learning" if step <= 200 else "over-fitting",
        "patience_left": 5 if step <= 140 else max(0, 5 - (step - 140) // 20),
    }


def write_sample(path: Path, text: str, index: int) -> None:
    image = Image.new("RGB", (96, 96), [(60, 90, 140), (140, 80, 60), (60, 130, 90)][index])
    ImageDraw.Draw(image).text((20, 36), text, fill="white", font_size=24)
    image.save(path)


def wait_for_samples(page: ComfyPage, step: int, count: int = 3) -> None:
    """Wait until the thumbnails are those of a step, all loaded."""
    names = [f"{step:06d}-{i}.png" for i in range(count)]
    images = "[...document.querySelectorAll('.personalize-monitor .thumbnail img')]"
    shown = f"{images}.map(image => new URL(image.src).pathname.split('/').at(-1)).join()"
    loaded = f"{images}.every(image => image.complete && image.naturalWidth > 0)"
    page.wait(f"{shown} === '{','.join(names)}' && {loaded}")


# A run that has ended


@RENDERERS
def test_a_node_draws_its_run_in_both_renderers(fresh, runs, vue):
    node = add(fresh, "ended")
    wait_for(fresh, node, "stopped early")
    look_at(fresh, node)
    assert text(fresh, node, "run") == "LoRA · ended"
    assert text(fresh, node, "progress") == "400 steps"
    assert text(fresh, node, "verdict") == "over-fitting · best at 140"
    values = evaluation(runs / "ended", STEPS)
    shown = text(fresh, node, "readLosses") + text(fresh, node, "readDrift")
    for key in ("train", "held_out"):
        assert f"{values[key]:.4f}" in shown
    assert f"+{100 * values['prior_drift']:.0f} %" in shown
    assert f"{values['corruption']:.2f}" in shown
    assert f"grain{values['grain']:.2f}" in text(fresh, node, "readSamples")
    fresh.page.locator(".personalize-monitor .losses canvas").wait_for(timeout=WAIT)
    for plot, colour in (("losses", "held"), ("losses", "train"), ("drift", "prior")):
        assert painted(fresh, node, plot, colour) > 100
    assert painted(fresh, node, "losses", "best") > 20
    assert painted(fresh, node, "gamma", "heat") > 100
    assert fresh.page.locator(".personalize-monitor .buttons").is_hidden()
    assert fresh.run(f"() => !!{ELEMENT.format(node)}.closest('[data-node-id]')") == vue


def painted(
    page: ComfyPage, node: str, plot: str, colour: str, share: tuple[float, float] = (0, 1)
) -> int:
    """Count the pixels of a plot that have a line's colour ("heat": the brightest of the strip).

    share: of the plot's width to look at.
    """
    return page.run(
        """([plot, colour, root, [from, to]]) => {
            root = eval(root)
            const canvas = root.querySelector(`.${plot} canvas`)
            const style = getComputedStyle(root).getPropertyValue(`--pm-${colour}`)
            const wanted = colour === "heat" ? [253, 231, 37]
                : [1, 3, 5].map(i => parseInt(style.slice(i, i + 2), 16))
            const [whole, over] = [canvas, root.querySelector(`.${plot} .u-over`)]
                .map(e => e.getBoundingClientRect())
            const scale = canvas.width / whole.width
            const [x, end] = from === 0 && to === 1 ? [0, canvas.width]
                : [from, to].map(s => scale * (over.left - whole.left + s * over.width))
            const {data} = canvas.getContext("2d").getImageData(x, 0, end - x, canvas.height)
            let count = 0
            for (let i = 0; i < data.length; i += 4)
                count += wanted.every((c, k) => Math.abs(c - data[i + k]) < 6) && data[i + 3] > 250
            return count
        }""",
        [plot, colour, ELEMENT.format(node), share],
    )


@RENDERERS
@pytest.mark.parametrize("scale", [0.7, 1.6])
def test_hovering_reads_the_values_of_a_step_however_the_graph_is_zoomed(fresh, runs, scale, vue):
    node = add(fresh, "ended")
    wait_for(fresh, node, "stopped early")
    look_at(fresh, node, scale)
    values = evaluation(runs / "ended", 200)
    hover(fresh, "losses", 200)
    fresh.wait(f"{ELEMENT.format(node)}.querySelector('.at').textContent === 'step 200'")
    assert f"{values['held_out']:.4f}" in text(fresh, node, "readLosses")
    hover(fresh, "gamma", 200, height=0.05)
    assert "t 0\N{EN DASH}10 %" in text(fresh, node, "readGamma")
    assert f"{values['gamma'][0]:.2f}" in text(fresh, node, "readGamma")
    hover(fresh, "gamma", 200, height=0.95)
    assert f"{values['gamma'][9]:.2f}" in text(fresh, node, "readGamma")
    fresh.page.mouse.move(1500, 500)
    fresh.wait(f"{ELEMENT.format(node)}.querySelector('.at').textContent === 'step 400'")


@RENDERERS
def test_the_slider_and_a_click_into_the_chart_show_the_samples_of_that_step(fresh, runs, vue):
    node = add(fresh, "ended")
    wait_for(fresh, node, "stopped early")
    look_at(fresh, node)
    wait_for_samples(fresh, 400)
    fresh.page.locator(".personalize-monitor .slider").fill("5")
    wait_for_samples(fresh, 100)
    assert text(fresh, node, "caption") == "step 100"
    hover(fresh, "losses", 200, click=True)
    wait_for_samples(fresh, 200)
    fresh.page.mouse.move(1500, 500)
    assert text(fresh, node, "at") == "step 200"
    tell(fresh, node, "ended")  # a reading does not take it away
    fresh.page.wait_for_timeout(1000)
    wait_for_samples(fresh, 200)


def test_a_thumbnail_opens_at_full_size_and_closes_again(fresh, runs):
    node = add(fresh, "ended")
    wait_for(fresh, node, "stopped early")
    look_at(fresh, node)
    fresh.page.locator(".personalize-monitor .thumbnail").nth(1).click()
    large = fresh.page.locator("dialog.personalize-sample")
    assert large.inner_text() == "Sample 2 of 3 at step 400"
    fresh.page.keyboard.press("ArrowRight")
    assert large.locator("img").get_attribute("src").split("?")[0].endswith("/000400-2.png")
    fresh.page.keyboard.press("Escape")
    large.wait_for(state="detached")
    assert fresh.nodes()  # the key went to the dialog, not to the graph


def test_the_wheel_zooms_the_graph_over_the_chart_too(fresh, runs):
    node = add(fresh, "ended")
    wait_for(fresh, node, "stopped early")
    look_at(fresh, node)
    hover(fresh, "losses", 200)
    fresh.page.mouse.wheel(0, -200)
    fresh.wait("app.canvas.ds.scale > 1.05")


def test_without_a_monitor_there_are_loss_and_progress(fresh, runs):
    node = add(fresh, "plain")
    wait_for(fresh, node, "finished")
    look_at(fresh, node)
    assert text(fresh, node, "progress") == "300 steps"
    assert "connect a monitor" in text(fresh, node, "verdict").lower()
    assert painted(fresh, node, "losses", "loss") > 100
    for part in ("drift", "gamma", "gallery", "buttons"):
        assert fresh.page.locator(f".personalize-monitor .{part}").is_hidden()


def test_the_chart_grows_with_the_history(fresh, runs):
    folder = write_run(runs, "grows", last=100)
    node = add(fresh, "grows")
    wait_for(fresh, node, "100 steps")
    append(folder, history(folder, first=101, last=240))
    tell(fresh, node, "grows")
    wait_for(fresh, node, "240 steps")
    assert text(fresh, node, "verdict") == "over-fitting · best at 140"
    append(folder, [{"end": True, "step": 240, "reason": "failed", "best_step": 140}])
    tell(fresh, node, "grows")
    wait_for(fresh, node, "failed")


def test_steps_that_were_left_out_count_and_are_a_gap_in_the_line(fresh, runs):
    folder = write_run(runs, "gaps", monitored=False, last=100, end="interrupted")
    node = add(fresh, "gaps")
    wait_for(fresh, node, "cancelled")
    append(folder, [{"step": step, "learning_rate": 1e-3} for step in range(101, 301)])
    tell(fresh, node, "gaps")
    wait_for(fresh, node, "300 steps")
    assert text(fresh, node, "state") == "broken off"  # it had gone on
    append(folder, history(folder, monitored=False, first=301, end="finished"))
    tell(fresh, node, "gaps")
    wait_for(fresh, node, "finished")
    assert text(fresh, node, "note") == "200 steps left out: not finite"
    look_at(fresh, node)
    drawn = [painted(fresh, node, "losses", "loss", (i / 20, (i + 1) / 20)) for i in range(20)]
    assert [i for i, pixels in enumerate(drawn) if not pixels] == list(range(5, 15))


def test_a_line_of_very_many_steps_lacks_none_where_many_were_left_out(fresh):
    """Of every four steps three are left out, where one in four is drawn."""
    steps, losses = fresh.run(
        """async () => {
            const {History} = await import("/extensions/personalize/js/history.js")
            const history = new History()
            history.add(Array.from({length: 3200}, (_, i) => (
                {step: i + 1, learning_rate: 1, ...i % 4 === 1 && {loss: i < 1600 ? 1 : 2}})))
            return history.losses()
        }"""
    )
    assert steps == list(range(4, 3201, 4))
    assert losses[:400] == pytest.approx([1] * 400) and losses[-1] > 1.9


def test_a_run_of_steps_that_were_all_left_out_is_shown(fresh, runs):
    folder = write_run(runs, "all left out", monitored=False, last=0)
    append(folder, [{"step": step, "learning_rate": 1e-3} for step in range(1, 9)])
    node = add(fresh, "all left out")
    wait_for(fresh, node, "8 steps")
    look_at(fresh, node)
    assert text(fresh, node, "note") == "8 steps left out: not finite"


def test_why_samples_are_missing_is_told_beside_the_older_ones(fresh, runs):
    folder = write_run(runs, "no samples", last=100)
    why = f"no samples at step 120: {HOSTILE}"
    append(folder, [evaluation(folder, 120) | {"samples": [], "samples_failed": why}])
    node = add(fresh, "no samples")
    wait_for(fresh, node, "120 steps")
    look_at(fresh, node)
    assert text(fresh, node, "note") == why
    assert fresh.page.locator(".personalize-monitor .gallery").is_visible()


@pytest.mark.parametrize("rule", ["held-out", "train", "last", None])
def test_a_best_step_is_told_only_where_it_was_looked_for(fresh, runs, rule):
    """With nothing held out; None: a run that does not tell its rules."""
    folder = runs / f"by {rule}"
    write_run(runs, folder.name, last=0, monitored=False)
    lines = [evaluation(folder, step) | {"held_out": None} for step in range(0, 101, EVERY)]
    for line in lines:
        line["best_step"] = line["step"]  # the newest
    lines[0] |= {"rules": {"best": rule, "early_stop": True, "patience": 5}} if rule else {}
    append(folder, [*lines, {"end": True, "step": 113, "reason": "interrupted", "best_step": 100}])
    node = add(fresh, folder.name)
    wait_for(fresh, node, "cancelled")
    look_at(fresh, node)
    known = rule == "train"
    assert text(fresh, node, "verdict") == ("learning · best at 100" if known else "learning")
    said = fresh.page.get_by_text("nothing held out: the last step is kept")
    assert said.is_visible() != known
    assert (painted(fresh, node, "losses", "best") > 20) == known


@pytest.mark.parametrize("word", ["over-fitting", "getting worse", "corrupting", "learning", "zib"])
def test_what_is_bad_for_the_subject_is_said_in_another_colour(fresh, runs, word):
    folder = write_run(runs, f"is {word}", monitored=False, last=20)
    append(folder, [evaluation(folder, 20) | {"verdict": word}])
    node = add(fresh, f"is {word}")
    wait_for(fresh, node, f"{word} · best at 20")
    said, around = fresh.run(
        "root => ['.word', '.verdict'].map(part => getComputedStyle(eval(root)"
        ".querySelector(part)).color)",
        ELEMENT.format(node),
    )
    assert (said != around) == (word not in ("learning", "zib"))


def test_colours_follow_the_theme(fresh, runs):
    node = add(fresh, "ended")
    wait_for(fresh, node, "stopped early")
    look_at(fresh, node)
    set_theme = "async id => { await app.extensionManager.setting.set('Comfy.ColorPalette', id) }"
    dark = fresh.run(f"() => getComputedStyle({ELEMENT.format(node)}).color")
    try:
        fresh.run(set_theme, "light")
        fresh.wait(f"getComputedStyle({ELEMENT.format(node)}).color !== {json.dumps(dark)}")
        deadline = time.monotonic() + PAGE_PATIENCE
        while painted(fresh, node, "losses", "held") <= 100:
            assert time.monotonic() < deadline
            fresh.page.wait_for_timeout(100)
    finally:
        fresh.run(set_theme, "dark")


# Whose run it is


def test_an_event_makes_the_node_show_the_run_and_the_workflow_remembers_it(fresh, runs):
    write_run(runs, "my subject 7", last=60, end="finished")
    node = add(fresh)
    assert is_empty(fresh, node)
    tell(fresh, node, "my subject 7")
    wait_for(fresh, node, "60 steps")
    saved = fresh.run("() => app.graph.serialize()")
    assert saved["nodes"][0]["properties"]["personalize_run"] == "my subject 7"
    fresh.run("() => app.graph.clear()")
    fresh.load(saved)
    wait_for(fresh, node, "60 steps")


def test_the_chart_is_no_input_of_the_prompt_and_no_widget_value(fresh, runs, object_info):
    add(fresh, "ended")
    (saved,) = fresh.run("() => app.graph.serialize()")["nodes"]
    declared = object_info["PersonalizeTrainLoRA"]["input"]["required"]
    widgets = [name for name, (kind, *_) in declared.items() if name not in ("model", "data")]
    assert len(saved["widgets_values"]) == len(widgets)
    ((_, prompt),) = fresh.prompt().items()
    assert set(prompt["inputs"]) == set(widgets)


def test_every_node_shows_its_own_run(fresh, runs):
    one, two = add(fresh, "ended"), add(fresh, "plain", "PaRa", at=500)
    three = add(fresh, at=1000)
    wait_for(fresh, one, "400 steps")
    wait_for(fresh, two, "300 steps")
    assert is_empty(fresh, three)


def test_a_copy_shows_nothing_until_it_is_trained(fresh, runs):
    node = add(fresh, "ended")
    wait_for(fresh, node, "stopped early")
    clone, copy = fresh.run(
        """id => {
            const node = app.graph.getNodeById(id)
            app.canvas.selectItems([node])
            app.canvas.copyToClipboard()
            app.canvas.pasteFromClipboard()
            const copy = app.graph._nodes.find(n => n !== node)
            return [node.clone().properties.personalize_run ?? null, String(copy.id)]
        }""",
        node,
    )
    assert clone is None
    assert is_empty(fresh, copy)
    assert "stopped early" in text(fresh, node)
    saved = fresh.run("() => app.graph.serialize()")["nodes"]
    assert [n["properties"].get("personalize_run") for n in saved] == ["ended", None]


def test_the_same_node_id_in_another_open_workflow_is_not_meant(fresh, runs):
    node = add(fresh)
    other = fresh.run(
        """async () => {
            const before = app.extensionManager.workflow.activeWorkflow
            await app.extensionManager.command.execute("Comfy.NewBlankWorkflow")
            const id = app.graph.id
            await app.extensionManager.workflow.syncWorkflows?.()
            return id
        }"""
    )
    # the new workflow is open now: its node of the same id must not take the first one's run
    first = fresh.run(
        """() => app.extensionManager.workflow.openWorkflows
            .map(w => w.activeState?.id).find(id => id && id !== app.graph.id)"""
    )
    assert first and first != other
    assert add(fresh) == node
    tell(fresh, node, "ended", first)
    tell(fresh, node, "my subject", first)
    fresh.page.wait_for_timeout(500)
    assert is_empty(fresh, node)


def test_a_run_with_another_name_is_not_meant(fresh, runs):
    node = add(fresh)
    tell(fresh, node, "ended")
    fresh.page.wait_for_timeout(500)
    assert is_empty(fresh, node)


def opened(name: str, method: str = "lora", id: str = "") -> tuple[dict, str]:
    """Return a template whose run is called `name`, and the id of its training node.

    id: of the workflow; "": one of its own.
    """
    text = (ROOT / "workflows" / f"train_{method}.json").read_text(encoding="utf-8")
    graph = json.loads(text) | {"id": id or str(uuid.uuid4())}
    (trainer,) = (n for n in graph["nodes"] if n["type"].startswith("PersonalizeTrain"))
    values = trainer["widgets_values"]
    values[values.index("my subject")] = name
    return graph, str(trainer["id"])


def test_a_run_of_a_workflow_that_was_closed_is_not_another_workflows(fresh, runs):
    """The templates' training nodes have the same id and the same name."""
    write_run(runs, "cat", last=60, end="finished")
    (lora, node), (para, other) = opened("cat"), opened("cat", "para")
    assert node == other
    fresh.load(lora)
    tell(fresh, node, "cat")
    wait_for(fresh, node, "60 steps")
    fresh.run(
        """async () => {
            const workflows = app.extensionManager.workflow
            const closed = workflows.activeWorkflow
            await app.extensionManager.command.execute("Comfy.NewBlankWorkflow")
            await workflows.closeWorkflow(closed)
        }"""
    )
    fresh.load(para)
    tell(fresh, node, "cat", lora["id"])
    fresh.page.wait_for_timeout(500)
    assert is_empty(fresh, node)
    saved = fresh.run("() => app.graph.serialize()")["nodes"]
    assert not [n for n in saved if "personalize_run" in n["properties"]]
    fresh.load(lora)
    wait_for(fresh, node, "60 steps")


def test_workflows_that_were_made_from_one_template_are_told_apart_by_name(fresh, runs):
    """They have one id for ever."""
    write_run(runs, "dog", last=60, end="finished")
    dog, node = opened("dog")
    hen, _ = opened("hen", id=dog["id"])
    fresh.load(hen)
    tell(fresh, node, "dog")
    fresh.load(hen)
    fresh.page.wait_for_timeout(500)
    assert is_empty(fresh, node)
    fresh.load(dog)
    wait_for(fresh, node, "60 steps")


def test_a_run_that_no_page_queued_is_shown_where_node_and_name_fit(fresh, runs):
    write_run(runs, "ant 2", last=60, end="finished")
    graph, node = opened("ant")
    fresh.load(graph)
    tell(fresh, node, "plain", None)
    tell(fresh, node, "ant 2", None)
    wait_for(fresh, node, "60 steps")
    (trainer,) = (n for n in graph["nodes"] if str(n["id"]) == node)
    trainer["properties"]["personalize_run"] = "ended"  # which that one does not take away
    fresh.load(graph)
    wait_for(fresh, node, "400 steps")
    fresh.page.wait_for_timeout(500)
    assert text(fresh, node, "run") == "LoRA · ended"


def execute(page: ComfyPage, node: str | None) -> None:
    """Let the page hear which node of its own prompt is executed."""
    page.run("node => app.api.dispatchCustomEvent('executing', node)", node)


def rename(page: ComfyPage, node: str, name: str) -> None:
    page.run(
        """([id, name]) => {
            app.graph.getNodeById(id).widgets.find(w => w.name === "name").value = name
        }""",
        [node, name],
    )


def test_a_run_is_shown_while_it_trains_though_its_node_was_renamed_since(fresh, runs):
    write_run(runs, "bee", last=60)
    graph, node = opened("bee")
    fresh.load(graph)
    rename(fresh, node, "wasp")
    tell(fresh, node, "bee")  # which another page trains
    fresh.page.wait_for_timeout(500)
    assert is_empty(fresh, node)
    execute(fresh, node)
    try:
        tell(fresh, node, "bee")
        wait_for(fresh, node, "60 steps")
    finally:
        execute(fresh, None)


def test_of_a_file_that_is_open_twice_the_name_tells_which_is_trained(fresh, runs):
    write_run(runs, "fox", last=60)
    graph, node = opened("fox")
    fresh.load(graph)
    fresh.load(graph)
    rename(fresh, node, "wolf")
    execute(fresh, node)
    try:
        tell(fresh, node, "fox")
        fresh.page.wait_for_timeout(500)
        assert is_empty(fresh, node)
    finally:
        execute(fresh, None)
    fresh.run("() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    wait_for(fresh, node, "60 steps")


def test_a_duplicate_of_a_workflow_goes_on_showing_its_run(fresh, runs):
    folder = write_run(runs, "eel", last=60)
    graph, node = opened("eel")
    fresh.load(graph)
    tell(fresh, node, "eel")
    wait_for(fresh, node, "60 steps")
    fresh.run("() => app.extensionManager.command.execute('Comfy.DuplicateWorkflow')")
    fresh.wait(f"app.graph.id !== {json.dumps(graph['id'])}")
    wait_for(fresh, node, "60 steps")
    append(folder, history(folder, first=61, last=80))
    tell(fresh, node, "eel", graph["id"])
    wait_for(fresh, node, "80 steps")


def test_a_node_inside_a_subgraph_is_reached(fresh, runs):
    write_run(runs, "my subject 8", last=60, end="finished")
    node = add(fresh)
    outer = fresh.run(
        """id => {
            const {node} = app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)]))
            return String(node.id)
        }""",
        node,
    )
    inner = fresh.run("id => String(app.graph.getNodeById(id).subgraph._nodes[0].id)", outer)
    tell(fresh, f"{outer}:{inner}", "my subject 8")
    fresh.wait(
        f"app.graph.getNodeById({outer}).subgraph._nodes[0].widgets"
        ".find(w => w.name === 'monitor').element.textContent.includes('60 steps')"
    )


# What may go wrong


def test_a_run_that_was_deleted_is_said_to_be_gone(fresh, runs):
    folder = write_run(runs, "to delete", last=60)
    node = add(fresh, "to delete")
    wait_for(fresh, node, "60 steps")
    shutil.rmtree(folder)
    tell(fresh, node, "to delete")
    wait_for(fresh, node, "not there any more")
    write_run(runs, "to delete", last=40, monitored=False)
    tell(fresh, node, "to delete")
    wait_for(fresh, node, "40 steps")


def test_a_folder_that_was_made_anew_is_read_anew(fresh, runs):
    folder = write_run(runs, "anew", last=60)
    node = add(fresh, "anew")
    wait_for(fresh, node, "60 steps")
    shutil.rmtree(folder)
    write_run(runs, "anew", last=140)
    tell(fresh, node, "anew")
    wait_for(fresh, node, "140 steps")


def test_hostile_texts_are_shown_as_text(fresh, runs):
    folder = write_run(runs, "hostile", last=20)
    line = evaluation(folder, 40) | {
        "verdict": HOSTILE,
        "samples": [HOSTILE, "../../x.png", "javascript:alert(1)", 7, "samples/000040-0.png"],
        "gamma": HOSTILE,
        "train": HOSTILE,
        "best_step": HOSTILE,
        "patience_left": {},
    }
    append(folder, [line, {"end": True, "step": 40, "reason": HOSTILE}, {"step": HOSTILE}])
    node = add(fresh, "hostile")
    wait_for(fresh, node, "<img")
    look_at(fresh, node)
    wait_for_samples(fresh, 40, count=1)
    other = add(fresh, HOSTILE, at=600)
    wait_for(fresh, other, "not there any more")
    assert HOSTILE in text(fresh, other)
    assert fresh.page.locator(".personalize-monitor img").count() == 1


def test_nodes_may_be_collapsed_removed_and_brought_back(fresh, runs):
    node = add(fresh, "ended")
    wait_for(fresh, node, "stopped early")
    look_at(fresh, node)
    fresh.run("id => app.graph.getNodeById(id).collapse()", node)
    monitor = fresh.page.locator(".personalize-monitor").filter(has_text="ended")
    monitor.wait_for(state="hidden", timeout=WAIT)
    fresh.run("id => app.graph.getNodeById(id).collapse()", node)
    monitor.wait_for(timeout=WAIT)
    fresh.run(
        """id => {
            const node = app.graph.getNodeById(id)
            app.graph.remove(node)
            app.graph.add(node)
        }""",
        node,
    )
    look_at(fresh, node)
    assert painted(fresh, node, "losses", "held") > 100


# While it trains


def watched_training(steps: int, name: str, monitored: bool = True) -> Graph:
    """Return a graph that trains the demo base on small pictures; the node is "train"."""
    graph = Graph()
    base = graph.add("PersonalizeDemoBase")
    drawn = graph.add("PersonalizeDemoSubject", count=3, resolution=64)
    wires = {"clip": (base, 1), "vae": (base, 2), "images": (drawn, 0), "captions": (drawn, 1)}
    data = graph.add("PersonalizeDataset", resolution=64, hold_out=1, **wires)
    inputs = {"name": name, "steps": steps, "model": (base, 0), "data": (data, 0)}
    if monitored:
        how = {"every": 5, "early_stop": False, "sample_steps": 2, "sample_every": 2, "keep": 2}
        wires = {"clip": (base, 1), "vae": (base, 2)}
        monitor = graph.add("PersonalizeMonitor", prompts="a zib totem", **how, **wires)
        inputs["monitor"] = (monitor, 0)
    graph.add("PersonalizeTrainLoRA", **inputs)
    return graph


@pytest.fixture
def idle(comfy):
    """See to it that no training goes on after a test that failed."""
    yield
    comfy.interrupt()


def start(page: ComfyPage, comfy: Comfy, graph: Graph) -> str:
    """Open a prompt as a graph, run it, and return the training node's id."""
    whole = fill_defaults(graph, comfy.object_info())
    page.run("async graph => { await app.loadApiJson(graph, 'a training') }", whole)
    (node,) = (str(n["id"]) for n in page.nodes() if n["type"] == "PersonalizeTrainLoRA")
    page.queue()
    wait_for(page, node, "training")
    return node


def step_of(page: ComfyPage, node: str) -> int:
    """Return the step that a node says it is at."""
    return int(text(page, node, "progress").split()[0].replace(",", ""))


def wait_for_more(page: ComfyPage, node: str, than: int) -> None:
    progress = f"{ELEMENT.format(node)}.querySelector('.progress').textContent"
    page.wait(f"parseInt({progress}.replace(',', '')) > {than}", seconds=PATIENCE)


def reload(page: ComfyPage) -> None:
    """Load the page again, as F5 does."""
    page.page.reload(wait_until="domcontentloaded")
    page.wait(READY)
    page.wait("app.graph._nodes.some(node => node.type === 'PersonalizeTrainLoRA')")


@RENDERERS
@pytest.mark.usefixtures("idle")
def test_a_training_is_watched_pinned_and_stopped(fresh, comfy, runs, vue):
    name = f"watched {'vue' if vue else 'canvas'}"
    node = start(fresh, comfy, watched_training(5000, name))
    folder = runs / name
    prompt = comfy.get("/queue")["queue_running"][0][1]

    # it grows by itself
    first = step_of(fresh, node)
    wait_for_more(fresh, node, first + 5)
    assert text(fresh, node, "run") == f"LoRA · {name}"
    wait_for(fresh, node, "held-out")

    # the slider shows the sample of its step; the base needs no pin
    look_at(fresh, node)
    slider = fresh.page.locator(".personalize-monitor .slider")
    pin = fresh.page.get_by_role("button", name="Pin this checkpoint")
    wait_for_more(fresh, node, 10)
    slider.fill("2")
    wait_for_samples(fresh, 10, count=2)
    slider.fill("0")
    wait_for_samples(fresh, 0, count=2)
    pin.click()
    wait_for(fresh, node, "the base: it needs no pin")

    # pin: of the newest step
    slider.press("End")
    pin.click()
    wait_for(fresh, node, "will be kept")
    (pinned,) = wait_for_file(folder / "pinned.json")
    assert pinned and (folder / f"checkpoint-{pinned:06d}.safetensors").is_file()

    # stop and keep: the graph goes on, and ends well
    fresh.page.get_by_role("button", name="Stop and keep").click()
    wait_for(fresh, node, "stopped")
    fresh.wait("!document.querySelector('.personalize-monitor .stop')?.checkVisibility()")
    comfy.wait(prompt)  # raises when it failed
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert lines[-1]["reason"] == "stopped by hand" and lines[-1]["step"] < 5000
    assert step_of(fresh, node) == lines[-1]["step"]
    assert (folder / "last.safetensors").is_file() and (folder / "best.safetensors").is_file()
    assert (folder / f"checkpoint-{pinned:06d}.safetensors").is_file()


@pytest.mark.usefixtures("idle")
def test_a_training_is_seen_after_a_reload_and_in_a_second_page(browser, server, comfy, runs):
    with open_page(browser, server.url) as page:
        node = start(page, comfy, watched_training(5000, "seen"))
        assert text(page, node, "run") == "LoRA · seen"
        prompt = comfy.get("/queue")["queue_running"][0][1]

        # a reload in the middle of the run
        first = step_of(page, node)
        reload(page)
        wait_for(page, node, "training")
        wait_for_more(page, node, first + 5)

        # a second page, which has the same graph open
        graph = page.run("() => app.graph.serialize()")
        with open_page(browser, server.url) as second:
            second.load(graph)
            wait_for(second, node, "training")
            wait_for_more(second, node, step_of(second, node))
            assert not second.errors and not second.external

        # and a reload when it has ended
        look_at(page, node)
        page.page.get_by_role("button", name="Stop and keep").click()
        wait_for(page, node, "stopped")
        comfy.wait(prompt)
        last = step_of(page, node)
        reload(page)
        wait_for(page, node, "stopped")
        assert step_of(page, node) == last
        assert not page.errors and not page.external


def wait_for_file(path: Path) -> list:
    """Return what a JSON file holds, once it is there."""
    deadline = time.monotonic() + 60
    while not path.is_file():
        assert time.monotonic() < deadline, path
        time.sleep(0.1)
    return json.loads(path.read_text())


@pytest.mark.usefixtures("idle")
def test_without_a_monitor_a_training_shows_loss_and_progress_live(fresh, comfy, runs):
    node = start(fresh, comfy, watched_training(400, "bare", monitored=False))
    wait_for_more(fresh, node, 2)
    assert "/ 400" in text(fresh, node, "progress")
    wait_for(fresh, node, "finished")
    look_at(fresh, node)
    assert text(fresh, node, "progress") == "400 steps"
    assert painted(fresh, node, "losses", "loss") > 50


def test_a_server_that_ends_in_the_middle_leaves_its_chart_behind(
    browser, tmp_path, monkeypatch, object_info
):
    """The page stays open; the server comes back at the same address without the training."""
    port = free_port()
    monkeypatch.setattr("headless.server.free_port", lambda: port)
    how = {"base": tmp_path, "cpu": True, "env": {"OMP_NUM_THREADS": "1"}}
    with (
        ComfyServer(**how) as server,
        Comfy(server.url, timeout=PATIENCE) as comfy,
        open_page(browser, server.url) as page,
    ):
        node = start(page, comfy, watched_training(5000, "cut"))
        wait_for_more(page, node, 6)
        server.stop()
        with ComfyServer(**how):
            wait_for(page, node, "broken off")
            assert step_of(page, node) > 6
            assert page.page.locator(".personalize-monitor .buttons").is_hidden()
            reload(page)
            wait_for(page, node, "broken off")
            assert not page.external
