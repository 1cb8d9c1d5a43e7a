"""run.py on Pythons that lack something, offline."""

from __future__ import annotations

import importlib.util
import sys
import urllib.error
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """A fresh run.py whose nox would go into a folder of this test."""
    spec = importlib.util.spec_from_file_location("run_under_test", REPO / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    home = tmp_path / "nox"
    monkeypatch.setattr(module, "HOME", home)
    monkeypatch.setattr(module, "PYTHON", home / module.PYTHON.relative_to(REPO / ".cache" / "nox"))
    return module


def test_a_python_that_is_too_old_is_told_which_is_not(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 6, "final", 0))
    with pytest.raises(SystemExit, match=r"This is Python 3\.9; expected 3\.10 or newer"):
        run.main(["demo"])
    assert not run.HOME.exists()


def test_a_python_without_pip_fetches_it_or_says_what_to_install(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    asked = []

    def unreachable(address: str, path: Path) -> None:
        asked.append((address, path))
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(run.urllib.request, "urlretrieve", unreachable)
    with pytest.raises(SystemExit, match=r"no network.*apt install python3-venv"):
        run.main(["demo"])
    assert asked == [(run.GET_PIP, run.HOME / "get-pip.py")]
    # What it has left is no nox, so that the next run begins anew.
    assert run.PYTHON.exists() and not run.has_nox()


@pytest.mark.skipif(sys.platform == "win32", reason="there it waits for nox instead")
def test_arguments_go_to_nox(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class Replaced(Exception):
        pass

    def replaced(path: str, command: list[str]) -> None:
        raise Replaced(command)

    monkeypatch.setattr(run, "has_nox", lambda: True)
    monkeypatch.setattr(run.os, "execv", replaced)
    start = [str(run.PYTHON), "-m", "nox", "-f", str(REPO / "noxfile.py")]
    for given, wanted in ((["tests", "--", "-x"], ["-s", "tests", "--", "-x"]), ([], ["-l"])):
        with pytest.raises(Replaced) as caught:
            run.main(given)
        assert caught.value.args[0] == [*start, *wanted]
