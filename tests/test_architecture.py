"""The house rules that can be checked: which way imports point, and where model families may be named."""

from __future__ import annotations

import ast
import re

import pytest

ROOMS = {
    # room: rooms of the pack it may import from
    "nodes": {"nodes", "patches", "latents"},
    "patches": {"patches", "patches.layouts", "patches.kernels"},
    "patches.layouts": {"patches.layouts", "patches.kernels"},
    "patches.kernels": {"patches.kernels"},
    "latents": {"latents"},
}
FAMILY = re.compile(
    r"LTXV|LTXAV|lightricks|attn1|attn2|transformer_blocks|keyframe_idxs|denoise_mask|latent_shapes|vae_scale_factors"
)


def runtime_files(root):
    return [path for room in ("nodes", "patches", "latents") for path in sorted((root / room).rglob("*.py"))]


def room_of(parts):
    name = ".".join(parts)
    return name if name in ROOMS else ".".join(parts[:-1]) if ".".join(parts[:-1]) in ROOMS else parts[0]


def test_imports_point_one_way(pack):
    checked = 0
    for path in runtime_files(pack.root):
        package = list(path.relative_to(pack.root).parent.parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            target = room_of(base) if base else "root"
            assert target in ROOMS[room_of(package)], f"{path}: imports {'.'.join(base)}"
            checked += 1
    assert checked > 10


def test_kernels_know_no_comfy_and_only_mount_touches_the_patcher(pack):
    for path in runtime_files(pack.root):
        text = path.read_text(encoding="utf-8")
        if "kernels" in path.parts:
            assert "comfy" not in text.lower(), path
        if path.name != "mount.py":
            assert not re.search(r"model_options|add_wrapper|\.clone\(\)|set_attachments", text), path


def test_model_families_are_named_only_in_layouts(pack):
    """Tooltips may name the models a node is for; class, module and argument names stay in their room."""
    for path in runtime_files(pack.root):
        if "layouts" not in path.parts:
            assert not FAMILY.search(path.read_text(encoding="utf-8")), path
    assert FAMILY.search((pack.root / "patches/layouts/ltx.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("word", ["TODO", "FIXME", "eval(", "exec("])
def test_nothing_unfinished_in_runtime_files(pack, word):
    for path in runtime_files(pack.root):
        assert word not in path.read_text(encoding="utf-8").replace(".eval(", ""), path
