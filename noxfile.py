"""`nox -s demo`, `nox -s tests`, `nox -s lint` and more (`nox -l`): each sets up what it needs in .venv and .cache."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

import nox

sys.path.insert(0, str(Path(__file__).resolve().parent))
import comfyui_tree
from comfy_frontend import CHROMES

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "tests"]

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
TORCH = ["torch<2.15", "torchvision", "torchaudio"]
TYPED = ["patches", "latents", "presets", "nodes", "checks"]
# What also runs on the oldest ComfyUI release; its tree on the registry has no server.
IN_PROCESS = [
    f"tests/{room}" for room in ("kernels", "latents", "layouts", "patches", "presets", "reuse", "comfy")
]
OLDEST = "0.9.2"
# The first known to have the kernel of routed attention; newer than what the pinned ComfyUI requires.
KITCHEN = "comfy-kitchen==0.2.40"
PLAYWRIGHT = "playwright==1.65.2"
# A file is one worker's, so that its models are built, and its server is started, once.
IN_PARALLEL = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def prepare(session: nox.Session) -> None:
    """Creates or completes the one environment that all sessions share."""
    tree = comfyui_tree.find_comfyui(os.environ.get("FRAMETHRIFT_COMFYUI") or None)
    wanted = [
        line.strip()
        for line in (tree / "requirements.txt").read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    # torch has its own step; torchsde is no part of it and stays in the list.
    wanted = [line for line in wanted if project_of(line) not in {"torch", "torchvision", "torchaudio"}]
    tools = nox.project.dependency_groups(nox.project.load_toml(ROOT / "pyproject.toml"), "dev")

    stamp = VENV / "frame-thrift.stamp"
    digest = hashlib.sha256("\n".join([*TORCH, *wanted, *tools]).encode()).hexdigest()
    if PYTHON.exists() and stamp.exists() and stamp.read_text() == digest:
        return
    if not PYTHON.exists():
        # nox depends on virtualenv, which needs no ensurepip, unlike venv on some systems.
        session.run(sys.executable, "-m", "virtualenv", "--prompt", "frame-thrift", str(VENV), external=True)
    session.log("Installing torch (some GB, minutes on the first run), ComfyUI's requirements and the tools")
    for packages in (TORCH, wanted, tools):
        session.run(str(PYTHON), "-m", "pip", "install", *packages, external=True)
    stamp.write_text(digest)


def project_of(requirement: str) -> str:
    """The project name of a requirement line."""
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def run(session: nox.Session, *command: str, **env: str) -> None:
    # nox kills after 0.3 s by default, too early for a demo or test that has a server to stop.
    session.run(str(PYTHON), *command, env=env, external=True, interrupt_timeout=10, terminate_timeout=10)


@nox.session(python=False)
def demo(session: nox.Session) -> None:
    """Two-stage clips, dense and cheaper, through a real ComfyUI server on the CPU; see demo_output/."""
    prepare(session)
    run(session, "demo/run.py", *session.posargs)


@nox.session(python=False)
def tests(session: nox.Session) -> None:
    """All tests on ComfyUI 0.30.0, then the in-process ones on the oldest supported release."""
    prepare(session)
    if session.posargs:
        run(session, "-m", "pytest", *session.posargs)
        return
    run(session, "-m", "pytest", *IN_PARALLEL, **ONE_THREAD)
    # An empty COMFYUI_PATH counts as unset: this run is about that release and no other.
    oldest = {"COMFYUI_PATH": "", "FRAMETHRIFT_COMFYUI": OLDEST}
    run(session, "-m", "pytest", *IN_PARALLEL, *IN_PROCESS, **ONE_THREAD, **oldest)


@nox.session(python=False)
def newest(session: nox.Session) -> None:
    """The in-process tests on whatever ComfyUI COMFYUI_PATH names; .venv gets what that one requires."""
    if not os.environ.get("COMFYUI_PATH"):
        session.error(
            "COMFYUI_PATH is not set. Set it to a ComfyUI checkout, as in COMFYUI_PATH=../ComfyUI nox -s newest"
        )
    prepare(session)
    run(session, "-m", "pytest", *IN_PARALLEL, *IN_PROCESS, *session.posargs, **ONE_THREAD)


@nox.session(python=False)
def routed(session: nox.Session) -> None:
    """The tests of routed attention that need a newer comfy-kitchen, put in .cache/ beside what ComfyUI requires."""
    prepare(session)
    folder = ROOT / ".cache" / KITCHEN.replace("==", "-")
    if not (folder / "comfy_kitchen").is_dir():
        session.run(
            str(PYTHON), "-m", "pip", "install", "--no-deps", "--target", str(folder), KITCHEN, external=True
        )
    files = ["tests/kernels/test_routed.py", "tests/comfy/test_low_rank.py"]
    run(session, "-m", "pytest", *files, *session.posargs, PYTHONPATH=str(folder))


def with_browser(session: nox.Session) -> dict[str, str]:
    """The environment in which Playwright finds a Chromium: this machine's, or one put in .cache/."""
    folder = ROOT / ".cache" / PLAYWRIGHT.replace("==", "-")
    if not (folder / "playwright").is_dir():
        session.run(str(PYTHON), "-m", "pip", "install", "--target", str(folder), PLAYWRIGHT, external=True)
    env = {"PYTHONPATH": str(folder), "PLAYWRIGHT_BROWSERS_PATH": str(folder / "browsers")}
    if not any(map(shutil.which, CHROMES)):
        run(session, "-m", "playwright", "install", "chromium", **env)
    return env


@nox.session(python=False)
def browser(session: nox.Session) -> None:
    """Blueprints, workflow templates and help in ComfyUI's frontend."""
    prepare(session)
    files = [f"tests/e2e/test_{what}_in_browser.py" for what in ("blueprints", "templates", "help")]
    run(session, "-m", "pytest", *files, *session.posargs, **with_browser(session))


@nox.session(python=False)
def graphs(session: nox.Session) -> None:
    """Draws benchmarks/graphs/*.png, the README's recipes as ComfyUI's frontend shows them."""
    prepare(session)
    run(session, "benchmarks/graphs.py", **with_browser(session))


@nox.session(python=False)
def same(session: nox.Session) -> None:
    """Which outputs of two commits differ, be it by one bit: `nox -s same -- OLD [NEW]`."""
    prepare(session)
    run(session, "checks/same.py", *session.posargs)


@nox.session(python=False)
def mutants(session: nox.Session) -> None:
    """Whether the tests notice when the pack is broken in one place: `nox -s mutants [-- NAME ...]`."""
    prepare(session)
    run(session, "checks/mutants.py", *session.posargs)


@nox.session(python=False)
def docs(session: nox.Session) -> None:
    """Writes README.md, docs/ and tiny_ltx/README.md from benchmarks/pages/ and the JSONs beside it."""
    prepare(session)
    run(session, "benchmarks/render.py")


@nox.session(python=False)
def lint(session: nox.Session) -> None:
    """ruff (lint and format) and mypy."""
    prepare(session)
    run(session, "-m", "ruff", "check", ".")
    run(session, "-m", "ruff", "format", "--check", ".")
    run(session, "-m", "mypy", *[folder for folder in TYPED if (ROOT / folder).is_dir()])
