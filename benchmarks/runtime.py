"""Makes ComfyUI, the pack and the test model importable; every script here imports it first."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import comfyui_tree

comfyui_tree.use_comfyui()

import comfy.cli_args

# The default backend of a CPU slices its work by free memory, which the meta device of FLOP counts does not have.
comfy.cli_args.args.use_pytorch_cross_attention = True

PACK = comfyui_tree.load_pack().__name__
comfyui_tree.load_tiny()
