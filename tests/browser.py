"""Drive ComfyUI's page in Chromium."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from tests.waiting import PAGE_PATIENCE

NAMES = ["chromium", "chromium-browser", "google-chrome"]
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--use-gl=swiftshader",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]
READY = "window.app && window.app.vueAppReady && window.app.extensionManager && window.app.graph"
# Said by ComfyUI's own page: without network, while it starts, for want of its own templates
# (480 MB, not installed), and when it asks for the models of its default workflow.
EXPECTED = (
    "net::ERR_",
    "Failed to load resource",
    "before initialization",
    "core workflow templates",
    "fuse options",
    "huggingface.co/Comfy-Org/",
)


@dataclass
class ComfyPage:
    """ComfyUI's page: `errors` and `external` list what it should not have done."""

    page: Page
    url: str
    errors: list[str] = field(default_factory=list)
    external: list[str] = field(default_factory=list)

    def run(self, script: str, argument: Any = None) -> Any:
        """Evaluate JavaScript; `app` is window.app."""
        return self.page.evaluate(script, argument)

    def load(self, workflow: dict) -> None:
        """Open a workflow in graph format."""
        self.run("async (workflow) => { await window.app.loadGraphData(workflow) }", workflow)

    def prompt(self) -> dict:
        """Return what the page would queue, in API format."""
        return self.run("async () => (await window.app.graphToPrompt()).output")

    def queue(self) -> None:
        self.run("async () => { await window.app.queuePrompt(0, 1) }")

    def nodes(self) -> list[dict]:
        """Return id, type, and widgets of the nodes in the graph."""
        return self.run(
            """() => window.app.graph._nodes.map(node => ({
                id: node.id, type: node.type,
                widgets: Object.fromEntries((node.widgets ?? []).map(w => [w.name, w.value])),
            }))"""
        )

    def wait(self, condition: str, seconds: float = PAGE_PATIENCE) -> None:
        """Wait until a JavaScript expression is true."""
        self.page.wait_for_function(condition, timeout=1000 * seconds)

    def screenshot(self, path: Path) -> None:
        self.page.screenshot(path=str(path))


@contextlib.contextmanager
def launch() -> Iterator[Browser]:
    """Start Chromium without a sandbox, a GPU, or any network but 127.0.0.1."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).exists():
            raise RuntimeError("No Chromium: `make env`, or `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def open_page(browser: Browser, url: str) -> Iterator[ComfyPage]:
    """Open ComfyUI's page with nothing remembered, and wait until its default graph is there."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    try:
        page = context.new_page()
        page.set_default_timeout(1000 * PAGE_PATIENCE)
        comfy = ComfyPage(page, url)
        page.on("console", lambda message: _note(comfy, message.type, message.text))
        page.on("pageerror", lambda error: comfy.errors.append(f"page error: {error}"))
        page.on("request", lambda request: _note_external(comfy, request.url))
        page.goto(url, wait_until="domcontentloaded")
        comfy.wait(READY)
        comfy.wait("app.graph._nodes.length > 0")  # its default graph must not come over ours
        yield comfy
    finally:
        context.close()


def _note(comfy: ComfyPage, kind: str, text: str) -> None:
    if kind == "error" and not any(words in text for words in EXPECTED):
        comfy.errors.append(text)


def _note_external(comfy: ComfyPage, url: str) -> None:
    if not url.startswith((comfy.url, comfy.url.replace("http", "ws"), "data:", "blob:")):
        comfy.external.append(url)
