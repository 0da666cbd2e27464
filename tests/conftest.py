"""What every test stands on: the pack under the name `personalize`, ComfyUI, and a browser.

The checkout is never on sys.path: its `nodes/` would shadow ComfyUI's `nodes.py`. Instead a
finder maps the few names tests import, and ComfyUI comes last on the path:

    from personalize.trainers import …      the pack, loaded from a file location as ComfyUI does
    import comfy.model_base                 ComfyUI, in this process, on the CPU
    from headless import Comfy              the headless client
"""

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
sys.dont_write_bytecode = True  # the pack is also read through a link in custom_nodes


class CheckoutFinder:
    """Find `personalize` at the root of the checkout, and its plain packages by their names."""

    packages = ("headless", "demo", "benchmarks", "tests")

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "personalize":
            return importlib.util.spec_from_file_location(
                name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
            )
        if name in cls.packages:
            return importlib.machinery.PathFinder.find_spec(name, [str(ROOT)])
        return None


sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
sys.meta_path.insert(0, CheckoutFinder)  # type: ignore[arg-type]

import pytest  # noqa: E402
import torch  # noqa: E402

from headless import Comfy, ComfyServer, find_comfyui  # noqa: E402
from tests.waiting import PATIENCE  # noqa: E402

torch.set_num_threads(1)  # on a busy machine more threads are fifty times slower


def prepare_comfyui(base: str) -> Path:
    """Let `import comfy…` work here: on the CPU, with its folders under `base`."""
    path = find_comfyui()
    sys.path.append(str(path))
    importlib.import_module("utils.extra_config")  # first, as in main.py: nodes.py hides it
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = base
    return path


_base = tempfile.TemporaryDirectory(prefix="personalize-tests-")
COMFYUI = prepare_comfyui(_base.name)


@pytest.fixture(scope="session")
def comfy_path() -> Path:
    """The folder of the ComfyUI under test."""
    return COMFYUI


@pytest.fixture(scope="session")
def server() -> Iterator[ComfyServer]:
    """One ComfyUI with the pack, for the whole session."""
    with ComfyServer(cpu=True, env={"OMP_NUM_THREADS": "1"}) as server:
        yield server


@pytest.fixture(scope="session")
def comfy(server: ComfyServer) -> Iterator[Comfy]:
    """A client of the session's server."""
    with Comfy(server.url, timeout=PATIENCE) as comfy:
        yield comfy


@pytest.fixture(scope="session")
def object_info(comfy: Comfy) -> dict:
    """The pack's nodes as the server describes them, by node id."""
    nodes = comfy.object_info().items()
    return {id: node for id, node in nodes if node["python_module"] == "custom_nodes.personalize"}


@pytest.fixture(scope="session")
def browser():
    """Chromium; its absence is a failure, not a skip: `make env` installs it where it can."""
    from tests.browser import launch

    with launch() as browser:
        yield browser


@pytest.fixture
def browser_page(browser, server: ComfyServer):
    """ComfyUI's page, ready; `errors` and `external` list what it should not have done."""
    from tests.browser import open_page

    with open_page(browser, server.url) as page:
        yield page


def pytest_collection_modifyitems(config, items) -> None:
    """Mark tests by the fixtures they use, so that `-m "not server"` needs no bookkeeping.

    Stress tests run only where -m names them.
    """
    for item in items:
        names = set(getattr(item, "fixturenames", ()))
        for mark in ("server", "browser"):
            if mark in names:
                item.add_marker(mark)
    if "stress" not in config.option.markexpr:
        long = [item for item in items if item.get_closest_marker("stress")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)
