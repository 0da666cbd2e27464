"""What the registry and ComfyUI's users rely on: metadata, layers, safety, help."""

import ast
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.published import ROOT, published_files

FORBIDDEN_IMPORTS = {
    *("pickle", "cPickle", "dill", "marshal", "shelve", "subprocess", "multiprocessing"),
    *("requests", "urllib", "http", "socket", "ftplib", "pip", "ensurepip", "ctypes"),
    *("urllib3", "httpx", "smtplib", "ssl", "socketserver", "xmlrpc", "webbrowser", "pty"),
    *("runpy", "code", "codeop", "huggingface_hub", "modelscope", "gradio", "websockets"),
}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "torch.load", "torch.save", "os.system", "os.popen"),
    *("joblib.load", "numpy.load", "np.load", "os.putenv", "os.unsetenv", "os.chdir", "os.umask"),
    *("os.fork", "os.kill", "os.startfile", "asyncio.open_connection", "aiohttp.ClientSession"),
    *("asyncio.create_subprocess_exec", "asyncio.create_subprocess_shell", "torch.hub.load"),
}
FORBIDDEN_STARTS = ("os.exec", "os.spawn", "os.posix_spawn", "os.environ", "sys.path")
FORBIDDEN_IN_PAGES = r"\beval\s*\(|new\s+Function\b|innerHTML|https?://(?!www\.w3\.org/)"


def read_toml(path: Path) -> dict:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    return tomllib.loads(path.read_text())


@pytest.fixture(scope="module")
def project() -> dict:
    return read_toml(ROOT / "pyproject.toml")


def runtime_files(suffix: str) -> list[Path]:
    """The pack's files that run inside ComfyUI (or in its page)."""
    return [ROOT / path for path in published_files() if path.suffix == suffix]


def test_the_registry_gets_the_pack_and_nothing_else():
    folders = {path.parts[0] for path in published_files() if len(path.parts) > 1}
    assert folders == {"demo", "nodes", "trainers", "web", "workflows"}
    helpers = {path.name for path in runtime_files(".py") if path.parent.name == "demo"}
    assert helpers == imported_from_demo()


def imported_from_demo() -> set[str]:
    """Return the files of demo/ that nodes/ needs, those that they need themselves included."""
    found, todo = set(), list((ROOT / "nodes").glob("*.py"))
    while todo:
        file = todo.pop()
        for node in ast.walk(ast.parse(file.read_text())):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) and node.level else ""
            inside = module.startswith("demo.") or (module and file.parent.name == "demo")
            helper = ROOT / "demo" / f"{module.removeprefix('demo.')}.py"
            if inside and helper.name not in found:
                found.add(helper.name)
                todo.append(helper)
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# Metadata


def test_requirements_are_the_declared_dependencies(project):
    lines = (ROOT / "requirements.txt").read_text().split("\n")
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted == project["project"]["dependencies"]


def test_torch_is_left_to_the_user(project):
    assert "torch" in project["project"]["dependencies"]  # no version: theirs fits their GPU


def test_the_registry_finds_what_it_asks_for(project):
    comfy = project["tool"]["comfy"]
    assert {"PublisherId", "DisplayName", "Icon", "requires-comfyui"} <= comfy.keys()
    assert project["project"]["name"] == "personalize"
    assert project["project"]["urls"]["Repository"].startswith("https://")
    assert (ROOT / project["project"]["license"]["file"]).is_file()


# Safety


@pytest.mark.parametrize("path", runtime_files(".py"), ids=relative)
def test_runtime_code_neither_pickles_nor_executes_nor_calls_out(path):
    found = [f"{relative(path)}:{line}: {what}" for line, what in forbidden(path.read_text())]
    assert not found, "\n".join(found)


def forbidden(source: str) -> list[tuple[int, str]]:
    """Return (line, name) of every forbidden import and call in a Python source."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names if is_forbidden(name.name)]
        elif isinstance(node, ast.ImportFrom) and not node.level and is_forbidden(node.module):
            found.append((node.lineno, node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
            found.append((node.lineno, ast.unparse(node.func)))
        elif reaches_out(node):
            found.append((node.lineno, ast.unparse(node)))
    return found


def reaches_out(node: ast.AST) -> bool:
    """Tell whether an expression concerns the process, its environment or a download."""
    if isinstance(node, ast.Attribute):
        return ast.unparse(node).startswith(FORBIDDEN_STARTS)
    return isinstance(node, ast.Call) and goes_online(node)


def goes_online(call: ast.Call) -> bool:
    """Tell whether diffusers or transformers may download what they are asked for."""
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return (
        ast.unparse(call.func).endswith(".from_pretrained")
        and given.get("local_files_only") != "True"
    )


def is_forbidden(module: str) -> bool:
    return module.partition(".")[0] in FORBIDDEN_IMPORTS


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from urllib import request",
        "torch.load(x)",
        "eval('1')",
        "import http.client",
        "os.environ['A'] = '1'",
        "os.environ.setdefault('A', '1')",
        "os.execv('/bin/true', [])",
        "sys.path.insert(0, 'x')",
        "UNet2DModel.from_pretrained('a/b')",
        "from huggingface_hub import hf_hub_download",
    ],
)
def test_the_safety_check_notices(source):
    assert forbidden(source)


def test_the_checks_of_the_registrys_own_tool_pass():
    """What `comfy node validate` runs, on the whole checkout."""
    command = [sys.executable, "-m", "ruff", "check", ".", "-q", "--select", "S102,S307,E702"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_pages_run_no_strings_and_load_nothing_from_elsewhere():
    scripts = runtime_files(".js")
    texts = {relative(path): without_comments(path.read_text()) for path in scripts}
    found = {path: re.findall(FORBIDDEN_IN_PAGES, text) for path, text in texts.items()}
    assert not any(found.values()), found


def without_comments(script: str) -> str:
    return re.sub(r"/\*[\s\S]*?\*/|(^|\s)//.*", r"\1", script)


def test_what_is_not_ours_is_unchanged_and_says_where_it_is_from():
    """web/js/vendor/README.md names the version and the SHA-256 of every file."""
    vendor = ROOT / "web" / "js" / "vendor"
    told = (vendor / "README.md").read_text()
    for path in (path for path in vendor.iterdir() if path.suffix in (".js", ".css")):
        assert f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" in told
    assert "MIT" in told and (vendor / "uPlot.LICENSE").is_file()


# Layers


@pytest.mark.parametrize("module", ["comfy.utils", "folder_paths", "server", "nodes", "execution"])
def test_only_nodes_may_import_comfyui(module):
    assert "TID251" in lint("trainers/methods/made_up.py", f"import {module}\n")
    assert "TID251" not in lint("nodes/made_up.py", f"import {module}\n")


def lint(path: str, source: str) -> str:
    """Return ruff's verdict on `source` as if it stood at `path`."""
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", str(ROOT / path), "-"]
    done = subprocess.run(command, input=source, cwd=ROOT, capture_output=True, text=True)
    return done.stdout


def test_trainers_need_no_comfyui(tmp_path):
    """Import every module of trainers/ in a process that has no ComfyUI on its path."""
    names = [relative(path)[:-3].replace("/", ".") for path in runtime_files(".py")]
    trainers = [name for name in names if name.startswith("trainers") and "__init__" not in name]
    (tmp_path / "personalize").symlink_to(ROOT)
    lines = [f"import personalize.{name}" for name in trainers]
    lines += ["import sys", "assert 'comfy' not in sys.modules and 'nodes' not in sys.modules"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Nodes, as a real ComfyUI describes them


def test_comfyui_loads_the_pack(object_info):
    assert object_info, "no node of the pack is in /object_info: see the server's log"
    assert all(name.startswith("Personalize") for name in object_info)


def test_every_node_explains_itself(object_info):
    silent = [id for id, node in object_info.items() if len(node["description"]) < 20]
    unfindable = [id for id, node in object_info.items() if not node.get("search_aliases")]
    assert not silent and not unfindable


def test_every_node_is_in_the_packs_category(object_info):
    assert {node["category"].split("/")[0] for node in object_info.values()} == {"personalize"}


def test_every_input_and_output_has_a_tooltip(object_info):
    bare = []
    for id, node in object_info.items():
        bare += [f"{id}.{path}" for path in untold_inputs(node["input"])]
        tips = node.get("output_tooltips") or [None] * len(node["output"])
        names = zip(node["output_name"], tips, strict=True)
        bare += [f"{id} -> {name}" for name, tip in names if not tip]
    assert not bare


def untold_inputs(groups: dict, prefix: str = "") -> list[str]:
    """Return the names of inputs without a tooltip, those inside dynamic combos included."""
    bare = []
    for group, inputs in groups.items():
        for name, (_, *rest) in (inputs if group in ("required", "optional") else {}).items():
            options = rest[0] if rest else {}
            bare += [] if options.get("tooltip") else [prefix + name]
            for option in options.get("options") or []:
                if isinstance(option, dict):
                    bare += untold_inputs(option["inputs"], f"{prefix}{name}.")
    return bare


def test_every_node_has_a_help_page_that_names_its_inputs(object_info):
    missing = []
    for id, node in object_info.items():
        page = ROOT / "web" / "docs" / f"{id}.md"
        text = page.read_text() if page.is_file() else ""
        inputs = [
            name for group in ("required", "optional") for name in node["input"].get(group, {})
        ]
        missing += [f"{id}: {name}" for name in inputs if f"`{name}`" not in text]
        missing += [] if text.strip() else [f"{id}: no page {relative(page)}"]
    assert not missing


def test_the_help_page_is_served(object_info, comfy):
    for id in object_info:
        text = comfy.get(f"/extensions/personalize/docs/{id}.md")
        assert isinstance(text, str) and text.strip()
