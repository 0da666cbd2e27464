"""What `comfy node publish` puts into the registry: what git tracks, without .comfyignore."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def published_files() -> list[Path]:
    """List the files that users get; paths are relative to the checkout."""
    left_out = set(_listed("-ci", "-X", ".comfyignore"))
    kept = [Path(name) for name in _listed() if name not in left_out]
    return sorted(path for path in kept if (ROOT / path).is_file())


def _listed(*options: str) -> list[str]:
    command = ["git", "ls-files", "-z", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name]
