"""The house rules that can be checked: which way imports point, and where what may be named."""

from __future__ import annotations

import ast
import re

import pytest

ROOMS = {
    # room: rooms of the pack it may import from
    "nodes": {"nodes", "patches", "patches.techniques", "presets", "latents"},
    "presets": {"presets", "patches", "patches.techniques", "latents"},
    "patches.techniques": {
        "patches.techniques",
        "patches",
        "patches.reuse",
        "patches.layouts",
        "patches.kernels",
    },
    "patches": {"patches", "patches.layouts", "patches.kernels"},
    "patches.reuse": {"patches.reuse", "patches.kernels"},
    "patches.layouts": {"patches.layouts", "patches.kernels"},
    "patches.kernels": {"patches.kernels"},
    "latents": {"latents"},
}
FAMILY = re.compile(
    r"LTXV|LTXAV|lightricks|attn1|attn2|transformer_blocks|keyframe_idxs|denoise_mask|latent_shapes|vae_scale_factors"
)


def runtime_files(root):
    return [
        path
        for room in ("nodes", "patches", "presets", "latents")
        for path in sorted((root / room).rglob("*.py"))
    ]


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


def test_kernels_know_no_comfy_and_only_mount_puts_something_on_a_model(pack):
    for path in runtime_files(pack.root):
        text = path.read_text(encoding="utf-8")
        if "kernels" in path.parts:
            # ComfyUI's package of kernels knows nothing of ComfyUI either.
            assert "comfy" not in text.lower().replace("comfy_kitchen", ""), path
        if path.name != "mount.py":
            assert not re.search(r"add_wrapper|\.clone\(\)|set_attachments", text), path
        if path.name not in ("mount.py", "wrappers.py"):
            assert "model_options" not in text, path


def table(root):
    """The techniques by their files: (file, class)."""
    lines = ast.walk(ast.parse((root / "patches/techniques/__init__.py").read_text(encoding="utf-8")))
    return [(line.module, line.names[0].name) for line in lines if isinstance(line, ast.ImportFrom)]


def test_no_technique_is_named_outside_its_room(pack):
    """But by the one node that mounts it and by presets, which set them; the table beside them lists all."""
    folder, own = pack.root / "patches/techniques", table(pack.root)
    assert {f"{file}.py" for file, _ in own} == {p.name for p in folder.glob("*.py")} - {"__init__.py"}
    names = {name for pair in own for name in pair}
    names |= {
        line.name
        for path in folder.glob("*.py")
        for line in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(line, ast.ClassDef)
    }
    named = re.compile(rf"\b({'|'.join(sorted(names))})\b")
    for path in runtime_files(pack.root):
        text = path.read_text(encoding="utf-8")
        if path.is_relative_to(folder):
            # Nor by each other.
            assert path.name == "__init__.py" or not re.search(r"from \.\w", text), path
            continue
        if path.parent.name == "presets":
            continue
        if path.parent.name == "nodes" and path.name != "__init__.py":
            assert len(re.findall(r"patches\.techniques\.(\w+)", text)) <= 1, path
        elif path.parent.name != "nodes":
            assert not named.search(text) and "techniques" not in re.findall(r"from \.+(\w+)", text), path


def test_the_table_is_in_the_order_of_stages_and_names_are_told_apart(pack):
    techniques = pack("patches.techniques").TECHNIQUES
    stages = [technique.stage for technique in techniques]
    assert stages == sorted(set(stages)) and len({technique.name for technique in techniques}) == len(stages)
    assert {technique.__name__ for technique in techniques} == {name for _, name in table(pack.root)}


def test_forms_show_the_settings_of_their_techniques(pack):
    """Ranges and defaults stand in one table a technique."""
    checked = 0
    kinds = {kind.__module__.rsplit(".", 1)[1]: kind for kind in pack("patches.techniques").TECHNIQUES}
    for node in pack("nodes").NODES:
        source = (pack.root / "nodes" / f"{node.__module__.rsplit('.', 1)[1]}.py").read_text(encoding="utf-8")
        for file in re.findall(r"patches\.techniques\.(\w+)", source):
            inputs = {entry.id: entry for entry in node.define_schema().inputs}
            for name, setting in kinds[file].settings().items():
                shown = inputs[name]
                assert shown.default == setting.default, name
                if hasattr(setting, "options"):
                    assert tuple(shown.options) == setting.options
                else:
                    assert (shown.min, shown.max) == (setting.low, setting.high), name
                checked += 1
    assert checked > 15


def test_model_families_are_named_only_in_layouts(pack):
    """Tooltips may name the models a node is for; class, module and argument names stay in their room."""
    of_samplers = {"denoise_mask", "latent_shapes"}
    for path in runtime_files(pack.root):
        if "layouts" not in path.parts:
            named = set(FAMILY.findall(path.read_text(encoding="utf-8")))
            assert not named - (of_samplers if path.name == "wrappers.py" else set()), path
    assert FAMILY.search((pack.root / "patches/layouts/ltx.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("word", ["TODO", "FIXME", "eval(", "exec("])
def test_nothing_unfinished_in_runtime_files(pack, word):
    for path in runtime_files(pack.root):
        assert word not in path.read_text(encoding="utf-8").replace(".eval(", ""), path
