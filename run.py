"""`python3 run.py demo`, `python3 run.py tests`: nox sessions, with a nox of its own in .cache/nox.

Needs nothing but Python, also where pip may not install into it, as on Debian, Ubuntu and Homebrew. What follows the
names of sessions goes to nox: `python3 run.py tests -- tests/e2e`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
import venv
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent
HOME = ROOT / ".cache" / "nox"
PYTHON = HOME / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
GET_PIP = "https://bootstrap.pypa.io/get-pip.py"
OLDEST = (3, 10)


def has_nox() -> bool:
    """Whether nox is there and its Python still works."""
    try:
        return subprocess.run([str(PYTHON), "-m", "nox", "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def provide_nox() -> None:
    """Raises SystemExit, saying what to do, where that is not possible."""
    if sys.version_info < OLDEST:
        sys.exit(
            f"This is Python {sys.version_info[0]}.{sys.version_info[1]}; expected {OLDEST[0]}.{OLDEST[1]} or newer. "
            "Run it again with a newer one, from your system or from python.org."
        )
    # Debian and Ubuntu have venv, but may lack the pip that it puts in.
    has_pip = find_spec("ensurepip") is not None
    venv.create(HOME, clear=True, symlinks=os.name != "nt", with_pip=has_pip)
    if not has_pip:
        fetch_pip()
    if subprocess.run([str(PYTHON), "-m", "pip", "install", "nox"]).returncode != 0:
        sys.exit("nox could not be installed, see above. Check the network and run this again.")


def fetch_pip() -> None:
    script = HOME / "get-pip.py"
    try:
        urllib.request.urlretrieve(GET_PIP, script)
    except OSError as problem:
        sys.exit(
            f"This Python comes without pip, and {GET_PIP} could not be fetched ({problem}). Install pip for new "
            "environments, on Debian and Ubuntu with: sudo apt install python3-venv. Then run this again."
        )
    subprocess.run([str(PYTHON), str(script)], check=True)


def main(arguments: list[str]) -> int:
    if not has_nox():
        provide_nox()
    sessions = ["-s", *arguments] if arguments else ["-l"]
    command = [str(PYTHON), "-m", "nox", "-f", str(ROOT / "noxfile.py"), *sessions]
    if os.name != "nt":
        # In our place, so that an interrupt is nox's, which has servers to stop.
        os.execv(command[0], command)
    signal.signal(signal.SIGINT, lambda *_: None)
    return subprocess.call(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
