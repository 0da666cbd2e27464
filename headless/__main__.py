"""Queue a workflow from the command line: `python -m headless workflows/api/demo.json`."""

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .bar import ProgressBar
from .client import Comfy, PromptFailed, Result
from .overrides import OverrideError, apply_overrides, fill_defaults
from .server import ComfyServer, ServerError


class WorkflowError(ValueError):
    """The workflow file cannot be read as a prompt in API format."""


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return queue(options)
    except (PromptFailed, OverrideError, WorkflowError, ServerError, OSError) as error:
        print(f"headless: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("headless: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m headless", description=__doc__)
    parser.add_argument("workflow", type=Path, help="a workflow in API format (JSON)")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="override an input; NODE is an id, a title or a class_type; repeatable",
    )
    parser.add_argument("--server", metavar="URL", help="use this ComfyUI; else start one")
    parser.add_argument("--models", type=Path, help="a models folder for the server started here")
    parser.add_argument("--output", type=Path, default=Path("output"), metavar="DIR")
    parser.add_argument(
        "--input",
        dest="inputs",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="files (or folders of files) to put into ComfyUI's input folder first",
    )
    return parser


def queue(options: argparse.Namespace) -> int:
    prompt = read_workflow(options.workflow)
    with serving(options) as server, Comfy(server.url if server else options.server) as comfy:
        for path in options.inputs:
            upload(comfy, path)
        known = comfy.object_info()
        prompt = fill_defaults(apply_overrides(prompt, options.overrides, known), known)
        with ProgressBar() as bar:
            result = comfy.run(prompt, bar)
        saved = save(comfy, result, options.output)
        if server is not None:
            saved += copy_new(server.output_dir, options.output, saved)
    for path in saved:
        print(path)
    return 0


@contextlib.contextmanager
def serving(options: argparse.Namespace) -> Iterator[ComfyServer | None]:
    """Yield a server of our own, or None when the user named one."""
    if options.server:
        yield None
    else:
        with ComfyServer(models=options.models) as server:
            yield server


def read_workflow(path: Path) -> dict[str, Any]:
    """Read a prompt in API format, or say what the file holds instead."""
    try:
        prompt = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise WorkflowError(f"{path} is not JSON: {error}") from error
    if isinstance(prompt, dict) and isinstance(prompt.get("nodes"), list):
        raise WorkflowError(
            f"{path} is in graph format, which only ComfyUI's page can read; "
            "give its API-format export (workflows/api/, or Workflow > Export (API))"
        )
    if not isinstance(prompt, dict) or not all(_is_node(node) for node in prompt.values()):
        raise WorkflowError(f"{path} is not a workflow in API format: {{id: {{class_type, …}}}}")
    return prompt


def _is_node(node: Any) -> bool:
    return isinstance(node, dict) and {"class_type", "inputs"} <= node.keys()


def upload(comfy: Comfy, path: Path) -> None:
    """Put a file, or the files of a folder under the folder's name, into the input folder."""
    if not path.is_dir():
        comfy.upload(path)
        return
    path = path.resolve()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        comfy.upload(file, file.parent.relative_to(path.parent).as_posix())


def save(comfy: Comfy, result: Result, folder: Path) -> list[Path]:
    """Download what the nodes reported; keeps sub-folders of the output folder."""
    paths = []
    for file in result.files():
        path = inside(folder, f"{file.subfolder}/{file.filename}")
        path.write_bytes(comfy.download(file))
        paths.append(path)
    return paths


def copy_new(source: Path, folder: Path, saved: list[Path]) -> list[Path]:
    """Copy what else the run left in the output folder: checkpoints, histories, reports."""
    copied = []
    for file in sorted(source.rglob("*")):
        path = folder / file.relative_to(source)
        if file.is_file() and path not in saved:
            path.parent.mkdir(parents=True, exist_ok=True)
            copied.append(Path(shutil.copyfile(file, path)))
    return copied


def inside(folder: Path, name: str) -> Path:
    """Return folder/name with its parents made; refuse names that lead out of it."""
    path = folder / name.lstrip("/")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise WorkflowError(f"The server named a file outside the output folder: {name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


if __name__ == "__main__":
    sys.exit(main())
